//! What a run says of itself.

use std::collections::BTreeMap;

use warmswap_core::Nanos;

/// How a run ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// What happened in it.
    pub stats: Stats,
    /// What went wrong, if anything did. The run ends with it.
    pub failure: Option<Failure>,
}

/// A promise that was not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Virtual time since the start of the run.
    pub at: Nanos,
    /// The check that found it, in a few words: one per promise.
    pub check: &'static str,
    /// What was found and what was expected.
    pub detail: String,
}

/// What happened in a run, or in many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Everything that happened, in its order, as one number: the same seed and options give the same.
    pub trace_hash: u64,
    /// Steps of all actors.
    pub steps: u64,
    /// Virtual time.
    pub elapsed: Nanos,
    /// Requests the driver issued.
    pub requests: u64,
    /// Requests it was told the end of.
    pub completed: u64,
    /// Requests that a guest's reset gave up.
    pub abandoned: u64,
    /// Failovers that settled.
    pub failovers: u64,
    /// Of these, with at least one request in flight.
    pub failovers_inflight: u64,
    /// Settled failovers by kind.
    pub kinds: BTreeMap<String, u64>,
    /// Requests in flight when a failover that settled began: how often how many, in powers of two (0, 1, 2–3, 4–7, …).
    pub inflight: [u64; 10],
    /// Requests the old primaries still owed when they were proved harmless.
    pub survivors: u64,
    /// Failovers that were refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Failovers that were halted, by reason. Each had one that the simulation knows of, too.
    pub halts: BTreeMap<String, u64>,
    /// Predictions that were not acted upon, by reason.
    pub withheld: BTreeMap<String, u64>,
    /// Backends started.
    pub backends: u64,
    /// Faults injected, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Connections of the VMM, its stops of a ring, its changes of memory.
    pub connections: u64,
    /// See `connections`.
    pub stops: u64,
    /// See `connections`.
    pub memory_changes: u64,
    /// Resets of the guest.
    pub resets: u64,
    /// Stops that had to be answered before the backend was proved quiet.
    pub stops_unproved: u64,
    /// Longest time a request of the VMM waited for its answer.
    pub answer_max: Nanos,
}

impl Stats {
    /// Adds the counts of another run. In which order does not matter.
    pub fn add(&mut self, other: &Stats) {
        self.trace_hash ^= other.trace_hash;
        self.steps += other.steps;
        self.elapsed = self.elapsed + other.elapsed;
        self.requests += other.requests;
        self.completed += other.completed;
        self.abandoned += other.abandoned;
        self.failovers += other.failovers;
        self.failovers_inflight += other.failovers_inflight;
        self.survivors += other.survivors;
        self.backends += other.backends;
        self.connections += other.connections;
        self.stops += other.stops;
        self.memory_changes += other.memory_changes;
        self.resets += other.resets;
        self.stops_unproved += other.stops_unproved;
        self.answer_max = self.answer_max.max(other.answer_max);
        for (count, more) in self.inflight.iter_mut().zip(other.inflight) {
            *count += more;
        }
        for (counts, more) in [
            (&mut self.kinds, &other.kinds),
            (&mut self.refused, &other.refused),
            (&mut self.halts, &other.halts),
            (&mut self.withheld, &other.withheld),
        ] {
            for (name, count) in more {
                if let Some(known) = counts.get_mut(name) {
                    *known += count;
                } else {
                    counts.insert(name.clone(), *count);
                }
            }
        }
        for (name, count) in &other.faults {
            *self.faults.entry(name).or_default() += count;
        }
    }
}
