//! A broker process, as shipped or sabotaged, and its status.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::interrupt::pause;
use crate::common::broker::{BrokerProcess, Launch, Refusal};
use crate::common::lines::Lines;
use crate::common::process::Target;

/// Name of the guarded device.
const NAME: &str = "fence";
/// Makes the lab's build of warmswap take a reaped process for a quiet one.
const TRUST_EXIT: &str = "WARMSWAP_LAB_TRUST_EXIT";
/// How long it may take to answer.
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

/// A broker that runs. Ended on drop.
#[derive(Debug)]
pub(super) struct Broker {
    process: BrokerProcess,
    status: Lines,
}

impl Broker {
    /// Starts one with its backends and waits until it listens, or until it has refused to.
    pub(super) fn start(directory: &Path, arm: Arm, backend: &[String]) -> anyhow::Result<Result<Self, Refusal>> {
        let options = ["--observe".to_owned(), "--journal".to_owned(), directory.join("journal").display().to_string()];
        let environment = Some((TRUST_EXIT, (arm == Arm::Sabotaged).then_some("1")));
        match BrokerProcess::try_start(&Launch {
            name: NAME,
            directory,
            options: &options,
            backend,
            environment,
            kept: false,
            program: None,
        })? {
            Ok(process) => Ok(Ok(Broker { status: process.connect()?, process })),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        self.process.socket()
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
        self.process.log_tail(LOG_LINES)
    }

    /// Ends it as an operator does and waits until it is gone.
    pub(super) fn end(self) -> anyhow::Result<()> {
        self.process.end()
    }
}
