//! A real broker process around the guest's device, and what its command line says of it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::Pid;
use serde_json::Value;

use super::process::{Process, command_line};
use super::succession::Succession;
use super::workspace::Workspace;
use crate::common::systemd;

/// The name the device is guarded under.
const NAME: &str = "vm0";
/// How long the broker may take to say that it is ready.
const READY_MAX: Duration = Duration::from_secs(20);
/// How long one word with the broker may take.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// What is guarded, and how.
#[derive(Debug, Clone)]
pub(crate) struct Guarded {
    /// A keeper starts the broker, and again when it dies.
    pub(crate) kept: bool,
    /// Options of `guard` beyond those every run gives.
    pub(crate) options: Vec<String>,
    /// The backends' command line, with `{socket}`.
    pub(crate) command_line: Vec<OsString>,
    /// What the backends' environment must hold.
    pub(crate) environment: Vec<(&'static str, PathBuf)>,
}

/// A broker that guards one device.
#[derive(Debug)]
pub(crate) struct Broker {
    process: Process,
    control: PathBuf,
    log: PathBuf,
    root: PathBuf,
    /// Of brokers that are killed.
    succession: Option<Succession>,
}

/// What `warmswap status` says, as far as a campaign needs it.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    /// Process of the primary, if there is one.
    pub(crate) primary: Option<Pid>,
    /// Whether the device is protected and its shadow could take over now.
    pub(crate) ready: bool,
    /// Whether the rings are followed, so that a crash would be survived.
    pub(crate) follows: bool,
    /// What keeps it from being ready, for the log.
    pub(crate) state: String,
    /// Memory the broker itself uses.
    pub(crate) broker_rss_bytes: u64,
    /// The last failover that came to an end.
    pub(crate) last: Option<Failover>,
}

/// One failover as the broker reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failover {
    /// Its name.
    pub(crate) id: String,
    /// `settled`, `refused` or `halted`.
    pub(crate) result: String,
    /// `planned`, `crash` or `hang`.
    pub(crate) kind: String,
    /// A sentence, where the broker gives one.
    pub(crate) message: String,
    /// Requests in flight when it began.
    pub(crate) inflight: u64,
    /// Requests the shadow was given.
    pub(crate) survivors: u64,
    /// How the survivors were known.
    pub(crate) recovery: String,
    /// What proved the primary quiet.
    pub(crate) fence: String,
    /// Time of each phase.
    pub(crate) phases_us: BTreeMap<String, u64>,
    /// From freeze or death to the first completion.
    pub(crate) blackout_us: Option<u64>,
}

impl Failover {
    /// One that was asked for in vain: the broker died first.
    pub(crate) fn never_begun() -> Self {
        let value = serde_json::json!({
            "id": "none", "result": "refused", "kind": "planned", "message": "the broker died before it had begun"
        });
        Self::read(&value).expect("it is an object")
    }

    fn read(value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let count = |key: &str| value[key].as_u64().or_else(|| Some(value[key].as_array()?.len() as u64)).unwrap_or(0);
        let phases = value["phases_us"].as_object().into_iter().flatten();
        Some(Self {
            id: value.as_object()?.get("id").map(ToString::to_string).unwrap_or_default(),
            result: text("result"),
            kind: text("kind"),
            message: text("message"),
            inflight: count("inflight"),
            survivors: count("survivors"),
            recovery: text("recovery"),
            fence: text("fence"),
            phases_us: phases.filter_map(|(phase, us)| Some((phase.clone(), whole_us(us)?))).collect(),
            blackout_us: whole_us(&value["blackout_us"]),
        })
    }
}

/// A time in microseconds, which the broker gives with decimals.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a span of microseconds, never negative")]
fn whole_us(value: &Value) -> Option<u64> {
    value.as_f64().map(|us| us.max(0.0).round() as u64)
}

impl Status {
    fn read(text: &str) -> anyhow::Result<Self> {
        let json: Value = serde_json::from_str(text).context("reading the status")?;
        let device = json["devices"].get(0).context("the broker names no device")?;
        let primary = device["primary"]["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let word = |value: &Value| value.as_str().unwrap_or("none").to_owned();
        let (state, shadow) = (word(&device["state"]), word(&device["shadow"]["state"]));
        Ok(Self {
            primary,
            ready: state == "protected" && shadow == "ready" && primary.is_some(),
            follows: device["recovery_level"] != "refused",
            state: format!("{state}, shadow {shadow}"),
            broker_rss_bytes: device["broker"]["rss_bytes"].as_u64().unwrap_or(0),
            last: Failover::read(&device["last_failover"]),
        })
    }
}

impl Broker {
    /// Starts a broker that guards a pair of backends and listens on `socket`.
    pub(crate) fn start(guarded: &Guarded, workspace: &Workspace, socket: &Path) -> anyhow::Result<Self> {
        let control = workspace.path("control");
        std::fs::create_dir(&control)?;
        let log = workspace.path("broker.log");
        let words = words(guarded, workspace, socket, &control)?;
        let mut command = match guarded.kept {
            true if systemd::is_inside() => systemd::stand_in(NAME, &words, &guarded.environment, &log)?,
            true => {
                let mut keeper = warmswap("keeper");
                keeper.arg("--run-dir").arg(&control).arg("--").args(&words);
                keeper
            }
            false => {
                let mut broker = Command::new(&words[0]);
                broker.args(&words[1..]);
                broker
            }
        };
        command.envs(guarded.environment.iter().cloned());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::options().create(true).append(true).open(&log)?);
        let process = Process::start("the broker", &mut command)?;
        let mut broker = Self { process, control, log, root: workspace.root().to_owned(), succession: None };
        broker.wait_until_ready()?;
        let control = broker.control.join(format!("{NAME}.ctl"));
        broker.succession = guarded.kept.then(|| Succession::watch(control));
        Ok(broker)
    }

    /// Waits for the line that says the broker listens; goes on reading, so that its output never blocks it.
    fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let output = self.process.child().stdout.take().context("the broker's output is a pipe")?;
        let (sender, receiver) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        match receiver.recv_timeout(READY_MAX) {
            Ok(line) if line.starts_with("ready:") => Ok(()),
            Ok(line) => anyhow::bail!("the broker said {line:?} instead of being ready"),
            Err(_) => anyhow::bail!("the broker is not ready: {}; {}", self.process.obituary(), self.last_words()),
        }
    }

    /// The end of what it wrote to its standard error.
    pub(crate) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join(" | ")
    }

    /// An explanation, if the broker is gone.
    pub(crate) fn gone(&mut self) -> Option<String> {
        self.process.ended()?;
        Some(format!("{}; {}", self.process.obituary(), self.last_words()))
    }

    /// Its status now.
    pub(crate) fn status(&self) -> anyhow::Result<Status> {
        Status::read(&self.ask(&["status", NAME, "--json"])?)
    }

    /// What somebody sees who watches the device with `warmswap top`, as one frame.
    pub(crate) fn picture(&self) -> anyhow::Result<String> {
        self.ask(&["top", NAME, "--once"])
    }

    /// Starts a planned failover; its end shows in the status.
    pub(crate) fn fail_over(&self) -> anyhow::Result<Failover> {
        let text = self.ask(&["failover", NAME, "--reason", "lab vm", "--json"])?;
        let json = serde_json::from_str(&text).with_context(|| format!("reading the failover's result {text:?}"))?;
        Failover::read(&json).context("the failover's result is no object")
    }

    /// The primary of `status`, after a check that it is a backend of this run and not some later owner of its number.
    pub(crate) fn primary_of(&self, status: &Status) -> anyhow::Result<Pid> {
        let pid = status.primary.context("there is no primary")?;
        let line = command_line(pid);
        anyhow::ensure!(
            line.contains(&*self.root.to_string_lossy()),
            "process {pid:?} is no backend of ours: {line:?}"
        );
        Ok(pid)
    }

    /// Those that died and those that followed, where a keeper starts them.
    pub(crate) fn succession(&mut self) -> Option<&mut Succession> {
        self.succession.as_mut()
    }

    /// Has the broker die before it does the `step`th thing from now on.
    pub(crate) fn die_before(&self, step: u64) -> anyhow::Result<()> {
        self.succession.as_ref().context("no keeper would start the next one")?.die_before(step, NAME)
    }

    /// Ends the broker; false if it had to be killed.
    pub(crate) fn end(&mut self) -> bool {
        self.process.end()
    }

    /// Runs one verb and returns what it printed, whatever its exit code: a refusal is printed too.
    fn ask(&self, words: &[&str]) -> anyhow::Result<String> {
        let mut command = warmswap(words[0]);
        command.args(&words[1..]).arg("--control").arg(&self.control);
        // The size of what is drawn.
        command.env("COLUMNS", "110").env("LINES", "46");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut asking = Process::start("the question to the broker", &mut command)?;
        let status = asking.wait(ANSWER_MAX).with_context(|| format!("the broker does not answer {}", words[0]))?;
        let mut said = String::new();
        if let Some(mut output) = asking.child().stdout.take() {
            output.read_to_string(&mut said)?;
        }
        if said.trim().is_empty() {
            let mut why = String::new();
            if let Some(mut output) = asking.child().stderr.take() {
                output.read_to_string(&mut why)?;
            }
            anyhow::bail!("{} said nothing ({status}): {}", words[0], why.trim());
        }
        Ok(said)
    }
}

/// The broker's command line.
fn words(guarded: &Guarded, workspace: &Workspace, socket: &Path, control: &Path) -> anyhow::Result<Vec<OsString>> {
    // To systemd, the running program is systemd.
    let program = if systemd::is_inside() { std::env::current_exe()? } else { RUNNING.into() };
    let mut words: Vec<OsString> = vec![program.into()];
    words.extend(["warmswap", "guard", "--observe", "--name", NAME, "--socket"].map(OsString::from));
    words.extend([socket, "--control".as_ref(), control, "--run-dir".as_ref(), control].map(OsString::from));
    words.extend(["--journal".into(), workspace.path("journal.log").into()]);
    words.extend(guarded.options.iter().map(OsString::from));
    words.push("--".into());
    words.extend(guarded.command_line.iter().cloned());
    Ok(words)
}

/// The program that runs.
const RUNNING: &str = "/proc/self/exe";

/// The broker's program, which is a hidden verb of this one. The name is that of the running program, so that a build
/// that replaces the file in the middle of a run changes nothing.
fn warmswap(verb: &str) -> Command {
    let mut command = Command::new(RUNNING);
    command.arg("warmswap").arg(verb);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_whether_a_failover_can_be_injected() {
        let text = r#"{"devices":[{"name":"vm0","state":"protected","primary":{"pid":12,"generation":1,"state":"serving"},
            "shadow":{"pid":13,"generation":2,"state":"ready","reason":""},"broker":{"pid":9,"rss_bytes":4096},
            "last_failover":{"id":7,"result":"settled","kind":"crash","message":"","survivors":3,"inflight":3,
            "recovery":"exact","fence":"reaped","phases_us":{"Fencing":900.4,"Draining":null},"blackout_us":1499.6}}]}"#;
        let status = Status::read(text).expect("a status");
        assert!(status.ready);
        let last = status.last.expect("a failover");
        assert_eq!((last.id.as_str(), last.survivors, last.blackout_us), ("7", 3, Some(1500)));
        assert_eq!(last.phases_us, BTreeMap::from([("Fencing".to_owned(), 900)]));
        let bare = r#"{"devices":[{"state":"unprotected","primary":{"pid":12},"shadow":null,"last_failover":null}]}"#;
        let status = Status::read(bare).expect("a status");
        assert!(!status.ready && status.last.is_none());
        Status::read(r#"{"devices":[]}"#).unwrap_err();
    }
}
