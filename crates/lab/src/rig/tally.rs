//! What a run has seen, and its report.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Value, json};

use super::control::Failover;
use super::kind::Kind;
use super::verdict::Verdict;

/// What was seen of one kind.
#[derive(Debug)]
struct OfKind {
    injected: u64,
    settled: u64,
    with_inflight: u64,
    /// Longest time without a completion around the failover, in microseconds.
    blackout_us: Histogram<u64>,
}

impl OfKind {
    fn new() -> Self {
        let blackout_us = Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are valid");
        OfKind { injected: 0, settled: 0, with_inflight: 0, blackout_us }
    }

    fn json(&self) -> Value {
        json!({
            "injected": self.injected, "settled": self.settled, "with_inflight": self.with_inflight,
            "blackout_us": quantiles(&self.blackout_us),
        })
    }
}

/// p50, p99, max and n.
pub(crate) fn quantiles(histogram: &Histogram<u64>) -> Value {
    json!({
        "p50": histogram.value_at_quantile(0.5), "p99": histogram.value_at_quantile(0.99),
        "max": histogram.max(), "n": histogram.len(),
    })
}

/// The same in milliseconds.
fn milliseconds(histogram: &Histogram<u64>) -> Value {
    let ms = |us: u64| us as f64 / 1e3;
    let quantile = |q| ms(histogram.value_at_quantile(q));
    json!({ "p50": quantile(0.5), "p99": quantile(0.99), "max": ms(histogram.max()), "n": histogram.len() })
}

/// One failover, as the rig saw it.
#[derive(Debug)]
pub(crate) struct Seen {
    /// What was done.
    pub(crate) kind: Kind,
    /// Requests in flight at that instant.
    pub(crate) inflight: u64,
    /// Whether the guest did nothing else at that time, so that its waiting means something.
    pub(crate) timed: bool,
    /// Longest time without a completion, where it means something.
    pub(crate) blackout_ns: Option<u64>,
    /// The broker's report.
    pub(crate) report: Failover,
}

/// What the rig itself holds at the end of an epoch: it must not grow with the length of a run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct RigMemory {
    first: u64,
    last: u64,
    max: u64,
}

impl RigMemory {
    /// Notes what it holds now.
    pub(crate) fn note(&mut self, bytes: u64) {
        if self.first == 0 {
            self.first = bytes;
        }
        self.last = bytes;
        self.max = self.max.max(bytes);
    }
}

/// Most kinds of reasons that are told apart.
const REASONS_MAX: usize = 100;

/// Reasons by their kind, with their counts.
#[derive(Debug, Default)]
struct Reasons(BTreeMap<String, u64>);

impl Reasons {
    fn count(&mut self, reason: &str) {
        let kind = kind_of_reason(reason);
        let known = self.0.len() < REASONS_MAX || self.0.contains_key(&kind);
        *self.0.entry(if known { kind } else { "others".into() }).or_default() += 1;
    }
}

/// A reason without its numbers and without the ring it is about.
fn kind_of_reason(reason: &str) -> String {
    let mut kind = String::new();
    for letter in reason.chars() {
        match letter {
            '0'..='9' if kind.ends_with('N') => {}
            '0'..='9' => kind.push('N'),
            _ => kind.push(letter),
        }
    }
    kind.strip_prefix("ring N: ").map(str::to_owned).unwrap_or(kind)
}

/// The record of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Failovers that settled.
    pub(crate) failovers: u64,
    /// Of these, with requests in flight.
    pub(crate) with_inflight: u64,
    /// Refused with a reason, halted ones included.
    pub(crate) refused: u64,
    /// Refused or halted since one settled.
    pub(crate) refused_in_a_row: u64,
    /// Kinds of reasons for what was refused, with their counts.
    refusals: Reasons,
    /// Kinds of reasons for what was halted.
    halts: Reasons,
    /// Shadows killed without a failover; each was replaced.
    pub(crate) shadows_replaced: u64,
    /// Failovers the broker did without being made to: of primaries it found hung under load.
    pub(crate) unexpected: u64,
    /// Reports that name another kind than was injected.
    pub(crate) other_kind: BTreeMap<String, u64>,
    kinds: BTreeMap<Kind, OfKind>,
    survivors: BTreeMap<u64, u64>,
    /// Failures by the program of the primary they hit.
    primaries: BTreeMap<String, u64>,
    recovery: BTreeMap<String, u64>,
    fence: BTreeMap<String, u64>,
    behaviours: BTreeMap<&'static str, u64>,
    /// Where a backend was killed in the course of a failover.
    points: BTreeMap<String, u64>,
    /// Brokers that were killed.
    pub(crate) broker_kills: u64,
    /// Of these, in the middle of a failover.
    pub(crate) broker_kills_in_failover: u64,
    /// Brokers that were replaced by another build of the program.
    pub(crate) upgrades: u64,
    waits: BTreeMap<&'static str, Histogram<u64>>,
    /// Descriptors, processes, mappings or memory that were not given back.
    pub(crate) leaks: u64,
    /// Largest resident memory of a broker seen.
    pub(crate) broker_rss_max_bytes: u64,
    /// Resident memory of the rig itself at the end of the first epoch and of the last, and most of it at such an end.
    pub(crate) rig_rss: RigMemory,
    /// Requests completed and judged.
    pub(crate) requests: u64,
    /// What the oracle found.
    pub(crate) verdict: Verdict,
}

impl Tally {
    /// Counts an injection.
    pub(crate) fn injected(&mut self, kind: Kind) {
        self.kinds.entry(kind).or_insert_with(OfKind::new).injected += 1;
    }

    /// Counts a failover that settled.
    pub(crate) fn settled(&mut self, seen: &Seen) {
        self.failovers += 1;
        self.refused_in_a_row = 0;
        let of_kind = self.kinds.entry(seen.kind).or_insert_with(OfKind::new);
        of_kind.settled += 1;
        if seen.inflight > 0 {
            self.with_inflight += 1;
            of_kind.with_inflight += 1;
        }
        if let Some(blackout) = seen.blackout_ns {
            of_kind.blackout_us.saturating_record(blackout / 1000);
        }
        *self.survivors.entry(seen.report.survivors.unwrap_or(0)).or_default() += 1;
        *self.recovery.entry(seen.report.recovery.clone().unwrap_or_default()).or_default() += 1;
        *self.fence.entry(seen.report.fence.clone().unwrap_or_default()).or_default() += 1;
        if seen.kind.reported_as().is_some_and(|name| name != seen.report.kind) {
            *self.other_kind.entry(format!("{} as {}", seen.kind, seen.report.kind)).or_default() += 1;
        }
    }

    /// Counts a refusal.
    /// A failure is about to hit a primary of this program.
    pub(crate) fn primary(&mut self, program: &str) {
        *self.primaries.entry(program.to_owned()).or_default() += 1;
    }

    pub(crate) fn refusal(&mut self, reason: &str) {
        self.refused += 1;
        self.refused_in_a_row += 1;
        self.refusals.count(reason);
    }

    /// Counts a failover that ended with a halted device.
    pub(crate) fn halt(&mut self, reason: &str) {
        self.refused += 1;
        self.refused_in_a_row += 1;
        self.halts.count(reason);
    }

    /// Failovers that ended with a halted device.
    pub(crate) fn halted(&self) -> u64 {
        self.halts.0.values().sum()
    }

    /// Records how long the rig waited for something.
    pub(crate) fn waited(&mut self, what: &'static str, nanoseconds: u64) {
        let new = || Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are valid");
        self.waits.entry(what).or_insert_with(new).saturating_record(nanoseconds / 1000);
    }

    /// Counts where backends were killed in the course of a failover.
    pub(crate) fn points(&mut self, reached: Vec<String>) {
        for point in reached {
            *self.points.entry(point).or_default() += 1;
        }
    }

    /// Counts something the VMM did.
    pub(crate) fn behaviour(&mut self, name: &'static str) {
        *self.behaviours.entry(name).or_default() += 1;
    }

    /// Whether the run shows what it must: nothing found, nothing leaked.
    pub(crate) fn is_clean(&self) -> bool {
        self.verdict.is_clean() && self.leaks == 0
    }

    /// The report.
    pub(crate) fn json(&self) -> Value {
        let waits: BTreeMap<&str, Value> = self.waits.iter().map(|(what, times)| (*what, quantiles(times))).collect();
        let kinds: BTreeMap<&str, Value> = self.kinds.iter().map(|(kind, seen)| (kind.name(), seen.json())).collect();
        // The rule of three holds where nothing was found.
        let bound =
            if self.failovers == 0 || !self.is_clean() { Value::Null } else { json!(3.0 / self.failovers as f64) };
        json!({
            "failovers": self.failovers,
            "with_inflight": self.with_inflight,
            "lost": self.verdict.lost,
            "duplicated": self.verdict.duplicated,
            "corrupted": self.verdict.corrupted,
            "late_writes": self.verdict.late_writes,
            "leaks": self.leaks,
            "refused": self.refused,
            "refusals": self.refusals.0,
            "halted": self.halted(),
            "halts": self.halts.0,
            "io_errors": self.verdict.io_errors,
            "wrong_lengths": self.verdict.wrong_lengths,
            "missed_calls": self.verdict.missed_calls,
            "requests": self.requests,
            "kinds": kinds,
            "primaries": self.primaries,
            "survivors": self.survivors,
            "recovery": self.recovery,
            "fence": self.fence,
            "reported_as_other_kind": self.other_kind,
            "unexpected": self.unexpected,
            "shadows_replaced": self.shadows_replaced,
            "vmm_behaviours": self.behaviours,
            "points": self.points,
            "broker_kills": self.broker_kills,
            "upgrades": self.upgrades,
            "broker_kills_in_failover": self.broker_kills_in_failover,
            "upgrade_ms": self.waits.get("upgrade").map(milliseconds),
            "readopt_ms": self.waits.get("readopt").map(milliseconds),
            "waits_us": waits,
            "broker_rss_max_bytes": self.broker_rss_max_bytes,
            "rig_rss_bytes": self.rig_rss,
            "bound_95": bound,
            "findings": self.verdict.findings,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_by_kind_and_do_not_grow_without_bound() {
        let mut tally = Tally::default();
        for ring in 0..500 {
            tally.halt(&format!("ring {ring}: {ring} submissions and 1{ring} completions passed"));
            tally.refusal("the shadow is warming, not ready");
        }
        assert_eq!((tally.refused, tally.halted(), tally.refused_in_a_row), (1000, 500, 1000));
        let json = tally.json();
        assert_eq!(json["halts"], json!({"N submissions and N completions passed": 500}));
        assert_eq!(json["refusals"], json!({"the shadow is warming, not ready": 500}));
        ('a'..='z').flat_map(|one| ('a'..='z').map(move |two| format!("{one}{two}"))).for_each(|it| tally.halt(&it));
        assert_eq!(tally.halts.0.len(), REASONS_MAX + 1);
        assert_eq!(tally.halted(), 500 + 26 * 26);
    }
}
