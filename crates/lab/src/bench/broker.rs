//! A broker process and its control socket.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::rig::control::Lines;
use crate::rig::process::Target;
use crate::rig::sys::signal_with_parent;

/// Name of the guarded device.
const NAME: &str = "bench";
/// How long it may take to start and to end.
const TURN_MAX: Duration = Duration::from_secs(20);
/// Lines of its log in an error.
const LOG_LINES: usize = 30;

/// A broker that runs. Ended on drop.
#[derive(Debug)]
pub(super) struct Broker {
    child: Child,
    directory: PathBuf,
    commands: Lines,
    status: Lines,
}

impl Broker {
    /// Starts one with its backends (`{socket}` in `backend`) and waits until it listens. `options` go to `guard`.
    pub(super) fn start(directory: &Path, options: &[&str], backend: &[String]) -> anyhow::Result<Self> {
        let control = directory.join("control");
        std::fs::create_dir_all(&control)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["warmswap", "guard", "--name", NAME, "--type", "blk"]);
        command.arg("--socket").arg(socket(directory));
        command.arg("--control").arg(&control).arg("--run-dir").arg(directory.join("run"));
        command.args(options).arg("--").args(backend);
        let log = std::fs::File::create(directory.join("broker.log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // Asked to end in order, it takes its backends and control groups along.
        let child = signal_with_parent(&mut command, Signal::TERM).spawn().context("starting the broker")?;
        let mut started = Starting(Some(child));
        started.wait_until_ready().with_context(|| log_tail(directory))?;
        let socket = control.join(format!("{NAME}.sock"));
        let (commands, status) = (Lines::connect(&socket)?, Lines::connect(&socket)?);
        let child = started.0.take().expect("it was put there");
        Ok(Broker { child, directory: directory.to_path_buf(), commands, status })
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks for a planned failover. Its report comes with [`Broker::report`].
    pub(super) fn ask_failover(&mut self) -> anyhow::Result<()> {
        self.commands.send(&json!({"verb": "failover", "device": NAME, "now": false, "reason": "lab bench"}))
    }

    /// The report of the failover asked for, once it is there. Does not wait.
    pub(super) fn report(&mut self) -> anyhow::Result<Option<Value>> {
        self.commands.next()?.map(|line| serde_json::from_str(&line).context("the broker's report")).transpose()
    }

    /// Asks for the status. It comes with [`Broker::status`].
    pub(super) fn ask_status(&mut self) -> anyhow::Result<()> {
        self.status.send(&json!({"verb": "status"}))
    }

    /// The device's status, once it is there. Does not wait.
    pub(super) fn status(&mut self) -> anyhow::Result<Option<Value>> {
        let Some(line) = self.status.next()? else { return Ok(None) };
        let mut answer: Value = serde_json::from_str(&line).context("the broker's status")?;
        ensure!(answer["devices"][0].is_object(), "the broker has no device: {line}");
        Ok(Some(answer["devices"][0].take()))
    }

    /// The end of its log, for the report of a failure.
    pub(super) fn last_words(&self) -> String {
        log_tail(&self.directory)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A broker that is not ready yet: ended with whatever fails.
struct Starting(Option<Child>);

impl Starting {
    fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let child = self.0.as_mut().expect("it was put there");
        let stdout = child.stdout.take().context("the broker's output")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            // The receiver may have given up; the pipe is drained all the same, so that the broker never blocks on it.
            let _ = sender.send(lines.next());
            lines.for_each(drop);
        });
        match receiver.recv_timeout(TURN_MAX) {
            Ok(Some(Ok(line))) if line.starts_with("ready:") => Ok(()),
            Ok(Some(Ok(line))) => bail!("the broker said {line:?} instead of that it is ready"),
            Ok(_) => bail!("the broker ended before it was ready"),
            Err(_) => bail!("the broker was not ready within {TURN_MAX:?}"),
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

/// Ends a broker as an operator does; one that does not obey is killed, and its backends die with it.
fn end(child: &mut Child) {
    let asked = Target::open(child.id()).and_then(|target| target.signal(Signal::TERM));
    let deadline = Instant::now() + TURN_MAX;
    while asked.is_ok() && Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Fails only where it has ended.
    let _ = child.kill();
    let _ = child.wait();
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("vmm.sock")
}

fn log_tail(directory: &Path) -> String {
    let log = std::fs::read_to_string(directory.join("broker.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    format!("end of the broker's log:\n{}", lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
}
