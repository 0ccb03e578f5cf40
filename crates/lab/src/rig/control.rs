//! What the broker says on its control socket, as far as the rig uses it.

use anyhow::{Context, bail};
use serde::Deserialize;

/// The answer to a status command.
#[derive(Debug, Deserialize)]
pub(crate) struct StatusAnswer {
    /// One entry per device; the rig has one.
    pub(crate) devices: Vec<DeviceStatus>,
}

/// What the broker says about the device. Fields the rig does not use are left out.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct DeviceStatus {
    /// starting, protected, unprotected, failing-over, halted.
    pub(crate) state: String,
    /// connected, absent.
    pub(crate) vmm: String,
    /// Phase of the failover that runs.
    pub(crate) phase: String,
    /// Recovery level.
    pub(crate) recovery_level: String,
    /// The backend that serves.
    pub(crate) primary: Option<BackendStatus>,
    /// The backend that waits.
    pub(crate) shadow: Option<BackendStatus>,
    /// The rings as the observer sees them.
    pub(crate) rings: Vec<RingStatus>,
    /// Counts.
    pub(crate) failovers: Counts,
    /// What is done about predictions.
    pub(crate) policy: Policy,
    /// More counts.
    pub(crate) counters: Counters,
    /// The last failover that ended.
    pub(crate) last_failover: Option<Failover>,
    /// The broker itself.
    pub(crate) broker: BrokerStatus,
}

impl DeviceStatus {
    /// What the report of the last failover says, if that one was halted.
    pub(crate) fn halt_message(&self) -> Option<&str> {
        let last = self.last_failover.as_ref().filter(|last| last.result == "halted");
        last.and_then(|last| last.message.as_deref())
    }
}

/// A backend.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct BackendStatus {
    /// Process, while there is one.
    pub(crate) pid: Option<u32>,
    /// State: `ready` is what a failover needs.
    pub(crate) state: String,
    /// Why it is not ready.
    pub(crate) reason: Option<String>,
}

/// A ring.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RingStatus {
    /// Index.
    pub(crate) index: u32,
    /// exact, inexact.
    pub(crate) observer: String,
}

/// What is done about predictions.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Policy {
    /// Why the last one was not acted upon.
    pub(crate) withheld: Option<Withheld>,
}

/// Why a prediction was not acted upon.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Withheld {
    /// In words.
    pub(crate) reason: String,
}

/// Counts of other things.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Counters {
    /// Predictions.
    pub(crate) alarms: u64,
    /// Of these, not acted upon.
    pub(crate) withheld: u64,
}

/// Failovers so far.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Counts {
    /// Ended well.
    pub(crate) settled: u64,
    /// Of these, because a backend hung.
    pub(crate) hang: u64,
    /// Not begun.
    pub(crate) refused: u64,
    /// Ended for an operator to decide.
    pub(crate) halted: u64,
}

impl Counts {
    /// All that ended.
    pub(crate) fn ended(self) -> u64 {
        self.settled + self.refused + self.halted
    }
}

/// The broker.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct BrokerStatus {
    /// Process.
    pub(crate) pid: u32,
    /// Resident memory.
    pub(crate) rss_bytes: u64,
}

/// A failover that ended.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Failover {
    /// Its id; text or number.
    pub(crate) id: serde_json::Value,
    /// settled, refused, halted.
    pub(crate) result: String,
    /// planned, crash, hang.
    pub(crate) kind: String,
    /// What set it off.
    pub(crate) cause: Option<String>,
    /// Why it was refused or halted.
    pub(crate) message: Option<String>,
    /// Requests the shadow was given.
    pub(crate) survivors: Option<u64>,
    /// Requests in flight when it began.
    pub(crate) inflight: Option<u64>,
    /// exact, drained, refused.
    pub(crate) recovery: Option<String>,
    /// stopped, reaped, target.
    pub(crate) fence: Option<String>,
}

/// What a failover command is answered with.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// It ended, one way or another.
    Ended(Failover),
    /// The command itself was refused.
    Refused(String),
}

impl Answer {
    /// Reads an answer line.
    pub(crate) fn parse(line: &str) -> anyhow::Result<Self> {
        let value: serde_json::Value = serde_json::from_str(line).context("the broker's answer")?;
        if let Some(error) = value.get("error") {
            let code = error.get("code").and_then(serde_json::Value::as_u64);
            let message = error.get("message").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
            if code == Some(3) {
                return Ok(Answer::Refused(message));
            }
            bail!("the broker refused the command: {line}");
        }
        Ok(Answer::Ended(serde_json::from_value(value).context("the broker's answer")?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        let ended = r#"{"id":"f-1","result":"settled","kind":"crash","survivors":3,"phases_us":{"Fencing":5}}"#;
        assert!(matches!(Answer::parse(ended), Ok(Answer::Ended(failover)) if failover.survivors == Some(3)));
        let refused = r#"{"error":{"code":3,"message":"the shadow is warming"}}"#;
        assert!(matches!(Answer::parse(refused), Ok(Answer::Refused(message)) if message.contains("warming")));
        Answer::parse(r#"{"error":{"code":2,"message":"usage"}}"#).expect_err("a mistake of ours");
    }
}
