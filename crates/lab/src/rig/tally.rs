//! What a run has seen, and its report.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
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

/// The record of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Failovers that settled.
    pub(crate) failovers: u64,
    /// Of these, with requests in flight.
    pub(crate) with_inflight: u64,
    /// Refused with a reason.
    pub(crate) refused: u64,
    /// Reasons given, with their counts.
    refusals: BTreeMap<String, u64>,
    /// Shadows killed without a failover; each was replaced.
    pub(crate) shadows_replaced: u64,
    /// Failovers the broker did without being made to.
    pub(crate) unasked: u64,
    /// Reports that name another kind than was injected.
    pub(crate) other_kind: BTreeMap<String, u64>,
    kinds: BTreeMap<Kind, OfKind>,
    survivors: BTreeMap<u64, u64>,
    recovery: BTreeMap<String, u64>,
    fence: BTreeMap<String, u64>,
    behaviours: BTreeMap<&'static str, u64>,
    waits: BTreeMap<&'static str, Histogram<u64>>,
    /// Descriptors, processes, mappings or memory that were not given back.
    pub(crate) leaks: u64,
    /// Largest resident memory of a broker seen.
    pub(crate) broker_rss_max_bytes: u64,
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
    pub(crate) fn refusal(&mut self, reason: &str) {
        self.refused += 1;
        *self.refusals.entry(reason.to_owned()).or_default() += 1;
    }

    /// Records how long the rig waited for something.
    pub(crate) fn waited(&mut self, what: &'static str, nanoseconds: u64) {
        let new = || Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are valid");
        self.waits.entry(what).or_insert_with(new).saturating_record(nanoseconds / 1000);
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
            "refusals": self.refusals,
            "io_errors": self.verdict.io_errors,
            "wrong_lengths": self.verdict.wrong_lengths,
            "missed_calls": self.verdict.missed_calls,
            "requests": self.requests,
            "kinds": kinds,
            "survivors": self.survivors,
            "recovery": self.recovery,
            "fence": self.fence,
            "reported_as_other_kind": self.other_kind,
            "unasked_failovers": self.unasked,
            "shadows_replaced": self.shadows_replaced,
            "vmm_behaviours": self.behaviours,
            "waits_us": waits,
            "broker_rss_max_bytes": self.broker_rss_max_bytes,
            "bound_95": bound,
            "findings": self.verdict.findings,
        })
    }
}
