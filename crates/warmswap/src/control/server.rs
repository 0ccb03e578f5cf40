//! The answering end of the control socket: a thread that accepts, and one per connection. Nothing here can delay a failover.

use std::io::{BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use serde::Deserialize;
use serde_json::{Value, json};
use warmswap_core::Outcome;

use super::history::{self, AskedGrain};
use super::json;
use super::line::read_line;
use super::places::{Place, Places};
use crate::config::{DeviceConfig, Source};
use crate::driver::{Command, Commander};
use crate::journal::{Form, Journal};
use crate::profile::historian::HistoryHandle;

/// Most connections that are told many lines at a time: events, profiles, histories and streams. The places beyond are left to those who
/// ask for the status, a failover or a new shadow.
const TELLING_MAX: usize = 48;
/// Longest command line, in bytes.
const LINE_MAX: usize = 32 * 1024;

/// How long an asker is waited for, so that those who hang do not keep the places of others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// A connection on which no whole command comes for this long is ended.
    pub(super) idle: Duration,
    /// One that takes nothing of its answer for this long as well.
    pub(super) write: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { idle: Duration::from_secs(60), write: Duration::from_secs(10) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase", deny_unknown_fields)]
enum Ask {
    Status,
    Failover {
        device: Option<String>,
        #[serde(default)]
        now: bool,
        reason: String,
    },
    /// Replaces the shadow by a newly started one.
    Refresh {
        device: Option<String>,
    },
    /// Ends this process and leaves everything to the next one of the same program.
    Upgrade,
    /// The same, with the configuration as it stands in the files now.
    Reload,
    Events {
        #[serde(default)]
        follow: bool,
        /// As lines for people, each as a member `text`.
        #[serde(default)]
        text: bool,
    },
    /// The last windows and the last tick.
    Profile {
        device: Option<String>,
    },
    /// Records of some time; all that there are, unless it is given.
    History {
        device: Option<String>,
        from_unix_ms: Option<f64>,
        to_unix_ms: Option<f64>,
        grain: AskedGrain,
        /// As encoded records in hexadecimal, each as a member `record`.
        #[serde(default)]
        raw: bool,
    },
    /// Every record from now on, encoded, in hexadecimal.
    Stream {
        device: Option<String>,
    },
    /// Says that the failure model has an alarm of the primary: for instruments that need many of them.
    #[cfg(feature = "lab")]
    Alarm {
        device: Option<String>,
        /// Name of the alarm.
        alarm: String,
    },
    /// Kills backends at a step of the next failover.
    #[cfg(feature = "lab")]
    Failpoint {
        device: Option<String>,
        step: u32,
        whom: crate::driver::failpoint::Whom,
    },
    /// Takes a health snapshot.
    Snapshot {
        device: Option<String>,
        reason: String,
    },
    /// What the failure model has learnt, in hexadecimal; with `state` it goes on with that, with `reset` it begins anew.
    Model {
        device: Option<String>,
        state: Option<String>,
        #[serde(default)]
        reset: bool,
    },
}

#[derive(Debug)]
struct Server {
    device: DeviceConfig,
    commander: Commander,
    journal: Journal,
    history: HistoryHandle,
    places: Places,
    telling: AtomicUsize,
    patience: Patience,
}

/// Serves one device's control socket on threads of its own.
pub(crate) fn serve(
    device: &DeviceConfig,
    listener: OwnedFd,
    commander: Commander,
    journal: Journal,
    history: HistoryHandle,
) -> std::io::Result<()> {
    serve_with(device, listener, commander, journal, history, Patience::default())
}

/// The same, with a patience of one's own.
pub(super) fn serve_with(
    device: &DeviceConfig,
    listener: OwnedFd,
    commander: Commander,
    journal: Journal,
    history: HistoryHandle,
    patience: Patience,
) -> std::io::Result<()> {
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(false)?;
    let (places, telling) = (Places::default(), AtomicUsize::new(0));
    let server = Arc::new(Server { device: device.clone(), commander, journal, history, places, telling, patience });
    std::thread::Builder::new().name("control".to_owned()).stack_size(256 * 1024).spawn(move || {
        for stream in listener.incoming().flatten() {
            server.accept(stream);
        }
    })?;
    Ok(())
}

impl Server {
    fn accept(self: &Arc<Self>, stream: UnixStream) {
        let stream = Arc::new(stream);
        let Some(place) = self.places.take(&stream) else {
            // Whoever asked sees the end of the connection if this cannot be written.
            let _gone = writeln!(&*stream, "{}", error(1, "too many connections to the control socket"));
            return;
        };
        let server = Arc::clone(self);
        // Where no thread can be started the place is dropped with what it would have run.
        let _none = std::thread::Builder::new().name("asker".to_owned()).stack_size(256 * 1024).spawn(move || {
            // A connection that ends, in whatever way, ends nothing else.
            let _ended = server.converse(&stream, &place);
        });
    }

    fn converse(&self, mut writer: &UnixStream, place: &Place) -> std::io::Result<()> {
        writer.set_write_timeout(Some(self.patience.write))?;
        let mut reader = BufReader::new(writer);
        loop {
            let line = match read_line(&mut reader, LINE_MAX, Some(Instant::now() + self.patience.idle)) {
                Ok(line) => line,
                Err(why) if why.kind() == ErrorKind::TimedOut => {
                    let text = format!("no command came for {} s", self.patience.idle.as_secs());
                    return writeln!(writer, "{}", error(1, &text));
                }
                Err(error) => return Err(error),
            };
            if line.is_empty() {
                return Ok(());
            }
            let _busy = place.busy();
            if line.len() == LINE_MAX {
                return writeln!(writer, "{}", error(2, "the command is too long"));
            }
            let ask = serde_json::from_slice(&line);
            let telling =
                matches!(ask, Ok(Ask::Events { .. } | Ask::Profile { .. } | Ask::History { .. } | Ask::Stream { .. }));
            let _telling = match telling.then(|| Telling::begin(&self.telling)) {
                Some(None) => {
                    let text = format!("{TELLING_MAX} others are being told of events or profiles: ask again later");
                    writeln!(writer, "{}", error(1, &text))?;
                    continue;
                }
                begun => begun,
            };
            match ask {
                Ok(Ask::Events { follow, text }) => self.events(writer, follow, text)?,
                Ok(Ask::Profile { device }) => match self.name(device) {
                    Ok(device) => writeln!(writer, "{}", history::profile(&self.history, &device))?,
                    Err(error) => writeln!(writer, "{error}")?,
                },
                Ok(Ask::History { device, from_unix_ms, to_unix_ms, grain, raw }) => match self.name(device) {
                    Ok(device) => {
                        let asked = (from_unix_ms, to_unix_ms);
                        history::records(writer, &self.history, &device, asked, grain.into(), raw)?;
                    }
                    Err(error) => writeln!(writer, "{error}")?,
                },
                Ok(Ask::Stream { device }) => match self.name(device) {
                    Ok(device) => history::stream(writer, &self.history, &device)?,
                    Err(error) => writeln!(writer, "{error}")?,
                },
                Ok(ask) => {
                    // A process that ends because of it waits until this end is dropped, when the answer is on its way.
                    let (_saying, said) = crossbeam_channel::bounded(0);
                    writeln!(writer, "{}", self.answer(ask, said))?;
                }
                Err(why) => writeln!(writer, "{}", error(2, &format!("the command is not understood: {why}")))?,
            }
        }
    }

    fn answer(&self, ask: Ask, said: Receiver<()>) -> Value {
        let ending = || error(4, "warmswap is ending");
        match ask {
            Ask::Status => {
                let (answer, status) = crossbeam_channel::bounded(1);
                self.commander.send(Command::Status { answer });
                let Ok(mut devices) = status.recv() else { return ending() };
                devices.retain(|(name, _)| *name == self.device.name);
                let mut answer = json::status(&devices, &self.device);
                let verdict = self.history.predictor(&self.device.name, history::verdict).flatten();
                if let Some(device) = answer["devices"].get_mut(0) {
                    device["verdict"] = verdict.unwrap_or(Value::Null);
                }
                answer
            }
            Ask::Failover { device, now, reason } => {
                let device = match self.name(device) {
                    Ok(device) => device,
                    Err(error) => return error,
                };
                let (answer, report) = crossbeam_channel::bounded(1);
                self.commander.send(Command::Failover { device, now, reason, answer });
                report.recv().map_or_else(
                    |_| ending(),
                    |report| {
                        let mut report = json::report(&report);
                        if let Some(why) = self.device.no_shadow()
                            && report["result"] == Outcome::Refused.name()
                        {
                            report["message"] = json!(format!("there is no shadow: {why}"));
                        }
                        report
                    },
                )
            }
            Ask::Refresh { device } => {
                let device = match self.name(device) {
                    Ok(device) => device,
                    Err(error) => return error,
                };
                if !matches!(self.device.source, Source::Command(_)) {
                    return error(3, "its backends are started by somebody else: replace the shadow there");
                }
                if let Some(why) = self.device.no_shadow() {
                    return error(3, &format!("there is no shadow: {why}"));
                }
                let (answer, replaced) = crossbeam_channel::bounded(1);
                self.commander.send(Command::Refresh { device, answer });
                match replaced.recv() {
                    Ok(Ok(generation)) => json!({ "replaced": generation }),
                    Ok(Err(why)) => error(3, &why),
                    Err(_) => ending(),
                }
            }
            Ask::Upgrade => {
                let (answer, may) = crossbeam_channel::bounded(1);
                self.commander.send(Command::Upgrade { answer, said });
                match may.recv() {
                    Ok(Ok(())) => json!({ "pid": std::process::id(), "version": env!("CARGO_PKG_VERSION") }),
                    Ok(Err(why)) => error(3, &why),
                    Err(_) => ending(),
                }
            }
            Ask::Reload => match self.commander.reload(Some(said)) {
                Ok(devices) => json!({ "pid": std::process::id(), "devices": devices }),
                Err(why) => error(3, &why),
            },
            #[cfg(feature = "lab")]
            Ask::Alarm { device, alarm } => self.alarm(device, &alarm),
            #[cfg(feature = "lab")]
            Ask::Failpoint { device, step, whom } => {
                let (answer, set) = crossbeam_channel::bounded(1);
                let device = self.name(device);
                device.map_or_else(
                    |error| error,
                    |device| {
                        self.commander.send(Command::Failpoint { device, step, whom, answer });
                        set.recv().map_or_else(|_| ending(), |()| json!({ "set": step }))
                    },
                )
            }
            Ask::Snapshot { device, reason } => {
                let taken = self.name(device).map(|device| self.history.snapshot(&device, &reason));
                match taken {
                    Ok(Ok(path)) => json!({ "file": path.display().to_string() }),
                    Ok(Err(why)) => error(1, &why),
                    Err(error) => error,
                }
            }
            Ask::Model { device, state, reset } => {
                let answer =
                    self.name(device).map(|device| history::model(&self.history, &device, state.as_deref(), reset));
                answer.unwrap_or_else(|error| error)
            }
            Ask::Events { .. } | Ask::Profile { .. } | Ask::History { .. } | Ask::Stream { .. } => {
                error(2, "this is answered line by line")
            }
        }
    }

    /// Has the control thread told of an alarm that nobody had.
    #[cfg(feature = "lab")]
    fn alarm(&self, device: Option<String>, alarm: &str) -> Value {
        use warmswap_core::{BackendId, Foresight};
        use warmswap_predict::{Alarm, Feature, Law};
        let device = match self.name(device) {
            Ok(device) => device,
            Err(error) => return error,
        };
        let alarm = match alarm {
            "law" => Alarm::Law(Law::RequestIsCompleted),
            "exhaustion" => Alarm::Exhaustion(Feature::DescriptorShare),
            "harm" => Alarm::Harm,
            other => return error(2, &format!("{other} is no alarm that can be made up")),
        };
        let (answer, status) = crossbeam_channel::bounded(1);
        self.commander.send(Command::Status { answer });
        let devices = status.recv().unwrap_or_default();
        let primary = devices.iter().find(|(name, _)| *name == device).and_then(|(_, it)| it.pair.primary.as_ref());
        let backend = primary.map_or(BackendId(0), |primary| primary.id);
        let causes = "none".to_owned();
        let foresight = Foresight { backend, alarm, risk: 0.5, harm: 0.5, cause: None, causes, others: 0 };
        self.commander.send(Command::Predicted { device: device.into(), foresight });
        json!({ "told": true })
    }

    /// The device a command is for, which is ours.
    fn name(&self, device: Option<String>) -> Result<String, Value> {
        match device {
            Some(other) if other != self.device.name => {
                Err(error(2, &format!("this is the control socket of {}, not of {other}", self.device.name)))
            }
            _ => Ok(self.device.name.clone()),
        }
    }

    fn events(&self, mut writer: &UnixStream, follow: bool, text: bool) -> std::io::Result<()> {
        let mut from = 0;
        let form = if text { Form::Text } else { Form::Json };
        loop {
            let wait = if follow { Duration::from_millis(500) } else { Duration::ZERO };
            let (lines, next, ended) = self.journal.read(&self.device.name, from, wait, form);
            if lines.is_empty() && follow && history::has_gone(writer) {
                return Ok(());
            }
            for line in lines {
                match form {
                    Form::Json => writeln!(writer, "{line}")?,
                    Form::Text => writeln!(writer, "{}", json!({ "text": line }))?,
                }
            }
            from = next;
            if !follow || ended {
                return writeln!(writer, "{}", json!({"end": true}));
            }
        }
    }
}

/// One who is being told many lines.
struct Telling<'a>(&'a AtomicUsize);

impl<'a> Telling<'a> {
    /// `None`: there are enough of them.
    fn begin(count: &'a AtomicUsize) -> Option<Self> {
        let telling = Telling(count);
        (count.fetch_add(1, Ordering::AcqRel) < TELLING_MAX).then_some(telling)
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(super) fn error(code: u8, message: &str) -> Value {
    json!({"error": {"code": code, "message": message}})
}

/// Exit code that a failover's outcome stands for.
pub(crate) fn exit_code(result: &str) -> u8 {
    if result == Outcome::Settled.name() {
        0
    } else if result == Outcome::Refused.name() {
        3
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::super::places::CONNECTIONS_MAX;
    use super::*;
    use crate::control::testing::{Served, wait_for};
    use crate::control::{Client, ClientError, socket_path};
    use std::io::Read;

    fn connect(served: &Served) -> UnixStream {
        UnixStream::connect(socket_path(&served.dir, "disk")).expect("somebody listens")
    }

    /// Without a device the answer to a question for the status is that the broker is ending: it is an answer.
    fn is_answered(client: &mut Client) -> bool {
        matches!(client.status(), Err(ClientError::Refused { code: 4, .. }))
    }

    #[test]
    fn silent_connections_keep_nobody_out() {
        let served = Served::start("silent", None);
        let mut first = served.client();
        assert!(is_answered(&mut first));
        let silent: Vec<UnixStream> = (0..3 * CONNECTIONS_MAX).map(|_| connect(&served)).collect();
        for _ in 0..3 {
            assert!(is_answered(&mut served.client()));
        }
        // Whoever has been idle for longest has made room.
        let mut byte = [0];
        silent[0].set_read_timeout(Some(Duration::from_secs(20))).expect("it can be set");
        assert_eq!((&silent[0]).read(&mut byte).expect("it was ended"), 0);
    }

    #[test]
    fn those_who_are_told_many_lines_leave_places_to_an_operator() {
        // A store that cannot be is one event that everybody is told.
        let served = Served::start("telling", Some("/dev/null".as_ref()));
        wait_for("the journal", || served.journal().contains("HistoryGivenUp"));
        let mut followers: Vec<Client> = (0..TELLING_MAX).map(|_| served.client()).collect();
        for client in &mut followers {
            client.tell(&json!({"verb": "events", "follow": true})).expect("it can be sent");
            client.line().expect("it is told");
        }
        let mut late = served.client();
        let refused = late.ask(&json!({"verb": "profile"})).expect_err("there are enough");
        assert!(refused.to_string().contains("ask again later"), "{refused}");
        assert!(is_answered(&mut late), "one that was refused is good for more");
        // Nobody idle takes the place of those who are told.
        let _silent: Vec<UnixStream> = (0..2 * CONNECTIONS_MAX).map(|_| connect(&served)).collect();
        assert!(is_answered(&mut served.client()));
        drop(followers);
        wait_for("room", || served.client().ask(&json!({"verb": "profile"})).is_ok());
    }

    #[test]
    fn who_asks_nothing_or_takes_nothing_is_left_and_who_follows_is_not() {
        let patience = Patience { idle: Duration::from_secs(1), write: Duration::from_millis(300) };
        let served = Served::start_with("patience", None, patience);
        let mut follower = served.client();
        follower.tell(&json!({"verb": "stream"})).expect("it can be sent");
        // A command that never ends is none.
        let mut idle = connect(&served);
        let drip = idle.try_clone().expect("a descriptor");
        std::thread::spawn(move || {
            while (&drip).write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut said = String::new();
        let _reset = idle.read_to_string(&mut said);
        assert!(said.is_empty() || said.contains("no command came"), "{said}");
        // It asks again and again, and reads none of the answers.
        let deaf = connect(&served);
        deaf.set_write_timeout(Some(Duration::from_secs(20))).expect("it can be set");
        let ask = format!("{}\n", json!({"verb": "nothing of the kind"}));
        while (&deaf).write_all(ask.as_bytes()).is_ok() {}
        served.note(warmswap_predict::Grain::Tick, 0..1);
        assert!(follower.line().expect("it is still told")["record"].is_string());
    }
}
