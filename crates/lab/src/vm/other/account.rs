//! What the guest said of its loads.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::vm::orders::Heard;
use crate::vm::watch::Hear;

/// How many remarks of the guest are kept.
const NOTES_MAX: usize = 100;
/// A guest that says nothing for so long is lost.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A load that waits for so long waits for ever.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// The counts of one load.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Totals {
    /// Requests made.
    pub(super) begun: u64,
    /// Requests answered.
    pub(super) done: u64,
    /// Of these, after more than 100 ms.
    pub(super) late: u64,
    /// Requests that were given up.
    pub(super) lost: u64,
    /// Answers that came once more.
    pub(super) repeated: u64,
    /// Answers that were not what they must be.
    pub(super) wrong: u64,
    /// Requests that the guest's system refused.
    pub(super) errors: u64,
    /// The longest request, one that is still waiting included.
    pub(super) longest_us: u64,
    /// Whether the load came to its end.
    pub(super) ended: bool,
    #[serde(skip)]
    worst_us: u64,
    #[serde(skip)]
    waiting_us: u64,
}

/// Everything heard so far.
#[derive(Debug)]
pub(super) struct Account {
    /// Milliseconds from the start of the kernel to the start of the loads.
    pub(super) boot_ms: Option<u64>,
    /// Seconds of the guest under load.
    pub(super) seconds: u64,
    /// Its loads.
    pub(super) loads: BTreeMap<String, Totals>,
    /// Remarks on what went wrong.
    pub(super) notes: Vec<String>,
    /// Whether the guest said that it is done.
    pub(super) ended: bool,
    heard_at: Instant,
}

impl Account {
    pub(super) fn new() -> Self {
        Self {
            boot_ms: None,
            seconds: 0,
            loads: BTreeMap::new(),
            notes: Vec::new(),
            ended: false,
            heard_at: Instant::now(),
        }
    }

    /// Whether every load has had an answer.
    pub(super) fn under_way(&self) -> bool {
        !self.loads.is_empty() && self.loads.values().all(|load| load.done > 0)
    }

    /// Why the guest must be given up, if it must.
    pub(super) fn standstill(&self) -> Option<String> {
        let silent = self.heard_at.elapsed();
        if silent > SILENCE_MAX {
            return Some(format!("the guest has said nothing for {} s", silent.as_secs()));
        }
        let stuck = self.loads.iter().find(|(_, load)| u128::from(load.waiting_us) > WAIT_MAX.as_micros());
        stuck.map(|(name, load)| format!("{name} waits for {} s", load.waiting_us / 1_000_000))
    }

    /// The last second, in one line.
    pub(super) fn second(&self) -> String {
        let show = |(name, load): (&String, &Totals)| {
            format!("{name} {} done, {} lost, worst {} ms", load.done, load.lost, load.worst_us / 1000)
        };
        self.loads.iter().map(show).collect::<Vec<_>>().join("; ")
    }
}

impl Hear for Account {
    fn hear(&mut self, line: &str) -> bool {
        let Some(heard) = Heard::parse(line) else { return false };
        self.heard_at = Instant::now();
        match heard.word.as_str() {
            "up" => self.boot_ms = heard.number("uptime_ms"),
            "load" => {
                let name = heard.text("name").unwrap_or_default().to_owned();
                self.loads.insert(name, totals(&heard));
            }
            "tick" => self.seconds += 1,
            "end" => self.ended = true,
            _ if self.notes.len() < NOTES_MAX => self.notes.push(line.trim().replace('_', " ")),
            _ => {}
        }
        heard.word == "tick"
    }
}

fn totals(heard: &Heard) -> Totals {
    let number = |key| heard.number(key).unwrap_or(0);
    Totals {
        begun: number("begun"),
        done: number("done"),
        late: number("late"),
        lost: number("lost"),
        repeated: number("repeated"),
        wrong: number("wrong"),
        errors: number("errors"),
        longest_us: number("longest_us"),
        ended: number("last") == 1,
        worst_us: number("worst_us"),
        waiting_us: number("waiting_us"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_waits_for_ever_is_a_standstill() {
        let mut account = Account::new();
        assert!(!account.under_way());
        account.hear("LAB load name=random last=0 begun=4 done=3 late=1 lost=0 waiting_us=900");
        assert!(!account.hear("LAB nothing"));
        assert!(account.hear("LAB tick n=1"));
        assert_eq!((account.standstill(), account.under_way(), account.seconds), (None, true, 1));
        account.hear("LAB load name=random last=0 begun=4 done=3 late=1 lost=0 waiting_us=31000000");
        assert!(account.standstill().is_some_and(|why| why.contains("random waits for 31 s")));
        assert_eq!(account.notes.len(), 1);
    }
}
