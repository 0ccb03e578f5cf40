//! What a broker did in a run, as its events tell it.

use std::path::Path;
use std::thread::JoinHandle;

use serde_json::{Value, json};
use warmswap::control::Client;

use crate::guest::now_ns;

/// Something that a broker told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// When it came, by the clock of the guest.
    pub(super) at_ns: u64,
    pub(super) what: What,
    /// Why, as the broker says it.
    pub(super) why: String,
}

/// What it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A failover of that kind settled: planned, crash, hang, predicted.
    Settled(String),
    /// One was halted, and an operator has to decide.
    Halted,
    /// A backend was lost, or the guest's connection.
    Lost,
    /// A predicted failure was not acted upon.
    Withheld,
    /// A failure was predicted, whether anything was done about it or not.
    Predicted,
}

/// The kind of failovers that a prediction asked for.
pub(super) const PREDICTED: &str = "predicted";

impl What {
    /// A failover that a prediction asked for, and that settled.
    pub(super) fn is_foresight(&self) -> bool {
        matches!(self, What::Settled(kind) if kind == PREDICTED)
    }
}

/// Collects what a broker tells until it ends.
pub(super) fn follow(control: &Path) -> anyhow::Result<JoinHandle<Vec<Told>>> {
    let mut client = Client::connect(control)?;
    client.tell(&json!({"verb": "events", "follow": true}))?;
    Ok(std::thread::Builder::new().name("events".to_owned()).spawn(move || {
        let mut all = Vec::new();
        while let Ok(line) = client.line() {
            all.extend(told(&line, now_ns()));
        }
        all
    })?)
}

fn told(line: &Value, at_ns: u64) -> Option<Told> {
    let text = |name: &str| line["properties"][name].as_str().unwrap_or_default().to_owned();
    let (what, why) = match line["event"].as_str()? {
        "FailoverSettled" => (What::Settled(text("kind")), text("cause")),
        "FailoverHalted" => (What::Halted, text("message")),
        "FailurePredicted" => (What::Predicted, text("reason")),
        "FailoverWithheld" => (What::Withheld, text("reason")),
        "PrimaryLost" | "ShadowLost" | "BackendFailed" | "VmmGone" => (What::Lost, text("reason")),
        _ => return None,
    };
    Some(Told { at_ns, what, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failovers_are_told_by_their_kind() {
        let line = |event: &str, kind: &str| json!({"event": event, "properties": {"kind": kind, "cause": "a"}});
        let what = |event: &str, kind: &str| told(&line(event, kind), 7).map(|told| told.what);
        assert_eq!(what("FailoverSettled", "crash"), Some(What::Settled("crash".to_owned())));
        assert!(what("FailoverSettled", "predicted").is_some_and(|what| what.is_foresight()));
        assert_eq!(what("FailurePredicted", ""), Some(What::Predicted));
        assert_eq!(what("RingStarted", ""), None);
    }
}
