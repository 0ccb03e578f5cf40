//! A broker process and its control socket.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::common::broker::{BrokerProcess, Launch};
use crate::common::lines::Lines;

/// Name of the guarded device.
const NAME: &str = "bench";
/// How long its answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Lines of its log in an error.
const LOG_LINES: usize = 30;

/// A broker that runs. Ended on drop.
#[derive(Debug)]
pub(super) struct Broker {
    process: BrokerProcess,
    commands: Lines,
    status: Lines,
}

impl Broker {
    /// Starts one with its backends (`{socket}` in `backend`) and waits until it listens. `options` go to `guard`.
    pub(super) fn start(directory: &Path, options: &[&str], backend: &[String]) -> anyhow::Result<Self> {
        // What is measured is what it does, not what it comes to think of a machine under load.
        let options: Vec<String> = options.iter().copied().chain(["--observe"]).map(str::to_owned).collect();
        let process = BrokerProcess::start(&Launch {
            name: NAME,
            directory,
            options: &options,
            backend,
            environment: None,
            kept: false,
            program: None,
        })?;
        Ok(Broker { commands: process.connect()?, status: process.connect()?, process })
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        self.process.socket()
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
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

    /// What it has measured of the device: windows and the last tick.
    pub(super) fn profile(&mut self) -> anyhow::Result<Value> {
        self.status.send(&json!({"verb": "profile"}))?;
        let deadline = Instant::now() + ANSWER_MAX;
        loop {
            if let Some(line) = self.status.next()? {
                let answer: Value = serde_json::from_str(&line).context("the broker's profile")?;
                ensure!(answer["windows"].is_array(), "the broker tells no profile: {line}");
                return Ok(answer);
            }
            ensure!(Instant::now() < deadline, "the broker does not answer\n{}", self.last_words());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes a health snapshot: where it is, and how long that took.
    pub(super) fn snapshot(&mut self) -> anyhow::Result<(PathBuf, Duration)> {
        let asked = Instant::now();
        self.status.send(&json!({"verb": "snapshot", "reason": "lab bench"}))?;
        loop {
            if let Some(line) = self.status.next()? {
                let answer: Value = serde_json::from_str(&line).context("the broker's answer")?;
                let file = answer["file"].as_str().with_context(|| format!("no snapshot: {line}"))?;
                return Ok((file.into(), asked.elapsed()));
            }
            ensure!(
                asked.elapsed() < ANSWER_MAX,
                "the broker does not answer
{}",
                self.last_words()
            );
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The end of its log, for the report of a failure.
    pub(super) fn last_words(&self) -> String {
        self.process.log_tail(LOG_LINES)
    }
}
