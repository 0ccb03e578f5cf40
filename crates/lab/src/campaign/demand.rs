//! What a guest asks for, and when: the load of its workload, as events have changed it, and the slots that may be used again.

use super::workload::{DEPTH_MAX, Load, Phase, Stream};
use crate::common::rng::Rng;
use crate::guest::Request;

/// A slot is first used within so many microseconds, in the mean.
const SOON_US: f64 = 2_000.0;
/// Of an open loop that found no slot no more than this, in nanoseconds, is made up for: a crowd is not kept.
const CROWD_NS: u64 = 5_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Demand {
    phases: Vec<Phase>,
    stream: Stream,
    speed: f64,
    writes: Option<u64>,
    /// When each slot may be used again.
    due: Vec<u64>,
    next_arrival: u64,
    /// Of the load that was asked for last.
    think_us: f64,
}

impl Demand {
    /// That of a workload on a disk of `blocks`.
    pub(super) fn new(phases: Vec<Phase>, blocks: u64, rng: Rng) -> Self {
        Demand {
            phases,
            stream: Stream::new(blocks, rng),
            speed: 1.0,
            writes: None,
            due: vec![0; usize::from(DEPTH_MAX)],
            next_arrival: 0,
            think_us: 0.0,
        }
    }

    /// Every slot is due soon.
    pub(super) fn begin(&mut self, now: u64) {
        for due in &mut self.due {
            *due = now + self.stream.about(SOON_US);
        }
        self.next_arrival = now;
    }

    /// So many times as much is asked for from now on.
    pub(super) fn speed(&mut self, factor: f64) {
        self.speed = factor;
    }

    /// So many of a hundred reads are writes from now on.
    pub(super) fn write(&mut self, percent: u64) {
        self.writes = Some(percent);
    }

    /// What is asked for at a time since the run began.
    pub(super) fn load(&mut self, since_ns: u64) -> Load {
        let load = Phase::at(&self.phases, since_ns as f64 / 1e9).times(self.speed);
        let reads = self.writes.map_or(load.reads, |writes| load.reads * (100 - writes.min(100)) / 100);
        self.think_us = load.think_us;
        Load { reads, ..load }
    }

    /// Whether a slot may be used now, or when it may.
    pub(super) fn is_due(&mut self, slot: usize, load: &Load, now: u64) -> Result<(), u64> {
        let due = if load.rate.is_some() { self.next_arrival } else { self.due[slot] };
        if due > now {
            return Err(due);
        }
        if let Some(rate) = load.rate {
            let from = self.next_arrival.max(now.saturating_sub(CROWD_NS));
            self.next_arrival = from + self.stream.about(1e6 / rate);
        }
        Ok(())
    }

    /// The next request of a load.
    pub(super) fn next(&mut self, load: &Load) -> Request {
        self.stream.next(load)
    }

    /// The request of a slot was answered: the guest thinks.
    pub(super) fn answered(&mut self, slot: usize, at_ns: u64) {
        self.due[slot] = at_ns + self.stream.about(self.think_us);
    }
}
