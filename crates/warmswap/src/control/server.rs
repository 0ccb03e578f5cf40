//! The answering end of the control socket: a thread that accepts, and one per connection. Nothing here can delay a failover.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use warmswap_core::Outcome;

use super::history::{self, AskedGrain};
use super::json;
use crate::config::{DeviceConfig, Source};
use crate::driver::{Command, Commander};
use crate::journal::{Form, Journal};
use crate::profile::historian::HistoryHandle;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Longest command line, in bytes.
const LINE_MAX: u64 = 16 * 1024;

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
}

#[derive(Debug)]
struct Server {
    device: DeviceConfig,
    commander: Commander,
    journal: Journal,
    history: HistoryHandle,
    connections: AtomicUsize,
}

/// Serves one device's control socket on threads of its own.
pub(crate) fn serve(
    device: &DeviceConfig,
    listener: OwnedFd,
    commander: Commander,
    journal: Journal,
    history: HistoryHandle,
) -> std::io::Result<()> {
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(false)?;
    let server =
        Arc::new(Server { device: device.clone(), commander, journal, history, connections: AtomicUsize::new(0) });
    std::thread::Builder::new().name("control".to_owned()).stack_size(256 * 1024).spawn(move || {
        for stream in listener.incoming().flatten() {
            server.accept(stream);
        }
    })?;
    Ok(())
}

impl Server {
    fn accept(self: &Arc<Self>, mut stream: UnixStream) {
        if self.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            self.connections.fetch_sub(1, Ordering::AcqRel);
            // Whoever asked sees the end of the connection if this cannot be written.
            let _gone = writeln!(stream, "{}", error(1, "too many connections to the control socket"));
            return;
        }
        let server = Arc::clone(self);
        let thread = std::thread::Builder::new().name("asker".to_owned()).stack_size(256 * 1024).spawn(move || {
            // A connection that ends, in whatever way, ends nothing else.
            let _ended = server.converse(stream);
            server.connections.fetch_sub(1, Ordering::AcqRel);
        });
        if thread.is_err() {
            self.connections.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn converse(&self, stream: UnixStream) -> std::io::Result<()> {
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            let read = std::io::Read::take(&mut reader, LINE_MAX).read_line(&mut line)?;
            if read == 0 {
                return Ok(());
            }
            if read as u64 == LINE_MAX {
                return writeln!(writer, "{}", error(2, "the command is too long"));
            }
            match serde_json::from_str(&line) {
                Ok(Ask::Events { follow, text }) => self.events(&mut writer, follow, text)?,
                Ok(Ask::Profile { device }) => match self.name(device) {
                    Ok(device) => writeln!(writer, "{}", history::profile(&self.history, &device))?,
                    Err(error) => writeln!(writer, "{error}")?,
                },
                Ok(Ask::History { device, from_unix_ms, to_unix_ms, grain, raw }) => match self.name(device) {
                    Ok(device) => {
                        let asked = (from_unix_ms, to_unix_ms);
                        history::records(&mut writer, &self.history, &device, asked, grain.into(), raw)?;
                    }
                    Err(error) => writeln!(writer, "{error}")?,
                },
                Ok(Ask::Stream { device }) => match self.name(device) {
                    Ok(device) => history::stream(&mut writer, &self.history, &device)?,
                    Err(error) => writeln!(writer, "{error}")?,
                },
                Ok(ask) => writeln!(writer, "{}", self.answer(ask))?,
                Err(why) => writeln!(writer, "{}", error(2, &format!("the command is not understood: {why}")))?,
            }
        }
    }

    fn answer(&self, ask: Ask) -> Value {
        let ending = || error(4, "warmswap is ending");
        match ask {
            Ask::Status => {
                let (answer, status) = crossbeam_channel::bounded(1);
                self.commander.send(Command::Status { answer });
                let Ok(mut devices) = status.recv() else { return ending() };
                devices.retain(|(name, _)| *name == self.device.name);
                json::status(&devices, &self.device)
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
            Ask::Events { .. } | Ask::Profile { .. } | Ask::History { .. } | Ask::Stream { .. } => {
                error(2, "this is answered line by line")
            }
        }
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

    fn events(&self, writer: &mut UnixStream, follow: bool, text: bool) -> std::io::Result<()> {
        let mut from = 0;
        let form = if text { Form::Text } else { Form::Json };
        loop {
            let wait = if follow { Duration::from_millis(500) } else { Duration::ZERO };
            let (lines, next, ended) = self.journal.read(&self.device.name, from, wait, form);
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
