//! A broker process, as shipped or sabotaged, and its status.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::interrupt::pause;
use crate::rig::control::Lines;
use crate::rig::process::Target;
use crate::rig::sys::signal_with_parent;

/// Name of the guarded device.
const NAME: &str = "fence";
/// Makes the lab's build of warmswap take a reaped process for a quiet one.
const TRUST_EXIT: &str = "WARMSWAP_LAB_TRUST_EXIT";
/// How long it may take to start, to answer and to end.
const TURN_MAX: Duration = Duration::from_secs(20);
/// Lines of its log in an error.
const LOG_LINES: usize = 40;

/// Whether the storage proof is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arm {
    /// As shipped.
    Guarded,
    /// The proof is skipped: the control, which must show damage.
    Sabotaged,
}

/// How a broker ended that did not become ready.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Its exit.
    pub(super) status: ExitStatus,
    /// What it printed.
    pub(super) log: String,
}

/// A broker that runs. Ended on drop.
#[derive(Debug)]
pub(super) struct Broker {
    process: Ending,
    directory: PathBuf,
    status: Lines,
}

impl Broker {
    /// Starts one with its backends and waits until it listens, or until it has refused to.
    pub(super) fn start(directory: &Path, arm: Arm, backend: &[String]) -> anyhow::Result<Result<Self, Refusal>> {
        let control = directory.join("control");
        std::fs::create_dir_all(&control)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["warmswap", "guard", "--name", NAME, "--type", "blk"]);
        command.arg("--socket").arg(directory.join("vmm.sock"));
        command.arg("--control").arg(&control).arg("--run-dir").arg(directory.join("run"));
        command.arg("--journal").arg(directory.join("journal"));
        command.arg("--").args(backend).env_remove(TRUST_EXIT);
        if arm == Arm::Sabotaged {
            command.env(TRUST_EXIT, "1");
        }
        let log = File::create(directory.join("broker.log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // Asked to end in order, it takes its backends and control groups along.
        let child = signal_with_parent(&mut command, Signal::TERM).spawn().context("starting the broker")?;
        let mut process = Ending(child);
        if !process.becomes_ready().with_context(|| log_tail(directory))? {
            let status = process.0.wait()?;
            let log = std::fs::read_to_string(directory.join("broker.log"))?;
            return Ok(Err(Refusal { status, log }));
        }
        let status = Lines::connect(&control.join(format!("{NAME}.sock")))?;
        Ok(Ok(Broker { process, directory: directory.to_path_buf(), status }))
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join("vmm.sock")
    }

    /// The device's status.
    pub(super) fn status(&mut self) -> anyhow::Result<Value> {
        self.status.send(&json!({"verb": "status"}))?;
        let deadline = Instant::now() + TURN_MAX;
        loop {
            if let Some(line) = self.status.next()? {
                let mut answer: Value = serde_json::from_str(&line).context("the broker's status")?;
                ensure!(answer["devices"][0].is_object(), "the broker has no device: {line}");
                return Ok(answer["devices"][0].take());
            }
            ensure!(Instant::now() < deadline, "the broker does not answer");
            pause(Duration::from_micros(200))?;
        }
    }

    /// Waits until the pair is whole, and returns the primary.
    pub(super) fn protected_primary(&mut self) -> anyhow::Result<Target> {
        let deadline = Instant::now() + TURN_MAX;
        loop {
            let status = self.status()?;
            if status["state"] == "protected" {
                let pid = status["primary"]["pid"].as_u64().context("the primary has no process")?;
                return Target::open(u32::try_from(pid)?);
            }
            ensure!(Instant::now() < deadline, "the pair does not become whole: {status}\n{}", self.last_words());
            pause(Duration::from_millis(1))?;
        }
    }

    /// The end of its log, for the report of a failure.
    pub(super) fn last_words(&self) -> String {
        log_tail(&self.directory)
    }

    /// Ends it as an operator does and waits until it is gone.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        let status = self.process.end()?;
        ensure!(status.success(), "on SIGTERM the broker ended with {status}\n{}", self.last_words());
        Ok(())
    }
}

/// A broker process: ended in order, whatever fails.
#[derive(Debug)]
struct Ending(Child);

impl Ending {
    /// Waits for the line that says so. False: it has ended, or is about to.
    fn becomes_ready(&mut self) -> anyhow::Result<bool> {
        let stdout = self.0.stdout.take().context("the broker's output")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            // The receiver may have given up; the pipe is drained all the same, so that the broker never blocks on it.
            let _ = sender.send(lines.next());
            lines.for_each(drop);
        });
        match receiver.recv_timeout(TURN_MAX) {
            Ok(Some(line)) => {
                let line = line?;
                ensure!(line.starts_with("ready:"), "the broker said {line:?} instead of that it is ready");
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => bail!("the broker was not ready within {TURN_MAX:?}"),
        }
    }

    fn end(&mut self) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        Target::open(self.0.id())?.signal(Signal::TERM)?;
        let deadline = Instant::now() + TURN_MAX;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the broker did not end on SIGTERM within {TURN_MAX:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if self.end().is_err() {
            // Its backends die with it.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn log_tail(directory: &Path) -> String {
    let log = std::fs::read_to_string(directory.join("broker.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    format!("end of the broker's log:\n{}", lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
}
