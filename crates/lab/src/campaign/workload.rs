//! What the guest of a run asks for: loads, one after the other. Seeded, and no I/O here.
//!
//! Closed loops think: an answer is followed by the next request after a while, as a program that does something with what it has read. So a
//! run leaves the processors of a small machine to those beside it, and a slower disk is asked for less, as a real one is.

use crate::common::rng::Rng;
use crate::guest::{Kind, Request};

/// Blocks of the disk: 32 MiB.
pub(super) const BLOCKS: u64 = 8_192;
/// Blocks of the largest request.
pub(super) const BLOCKS_MAX: u32 = 32;
/// Most requests in flight.
pub(super) const DEPTH_MAX: u16 = 64;

/// What is asked for at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Load {
    /// Requests in flight at most.
    pub(super) depth: u16,
    /// A closed loop: mean time from an answer to the next request, in microseconds.
    pub(super) think_us: f64,
    /// An open loop instead: requests per second, whatever becomes of them.
    pub(super) rate: Option<f64>,
    /// Reads among reads and writes, in percent.
    pub(super) reads: u64,
    /// Flushes among all, in percent.
    pub(super) flushes: u64,
    /// Blocks of a read or write.
    pub(super) blocks: u32,
    /// One behind the other.
    pub(super) sequential: bool,
}

impl Load {
    const NONE: Load =
        Load { depth: 0, think_us: 1_000.0, rate: None, reads: 100, flushes: 0, blocks: 1, sequential: false };

    fn closed(depth: u16, think_us: f64) -> Load {
        Load { depth, think_us, ..Load::NONE }
    }

    fn open(rate: f64) -> Load {
        Load { depth: DEPTH_MAX, rate: Some(rate), ..Load::NONE }
    }

    /// The same with a part of the thinking, or a multiple of the rate.
    pub(super) fn times(self, factor: f64) -> Load {
        Load { think_us: self.think_us / factor, rate: self.rate.map(|rate| rate * factor), ..self }
    }

    /// Requests per second while the disk takes no time.
    pub(super) fn rate_most(&self) -> f64 {
        self.rate.unwrap_or_else(|| f64::from(self.depth) * 1e6 / self.think_us)
    }
}

/// A load for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Phase {
    /// For how long, in seconds.
    pub(super) seconds: f64,
    /// What.
    pub(super) load: Load,
}

impl Phase {
    /// The load of a time, in seconds, of phases that are repeated.
    pub(super) fn at(phases: &[Phase], seconds: f64) -> Load {
        let whole: f64 = phases.iter().map(|phase| phase.seconds).sum();
        let mut at = seconds % whole;
        let phase = phases.iter().find(|phase| {
            at -= phase.seconds;
            at < 0.0
        });
        phase.unwrap_or(&phases[0]).load
    }
}

/// Names of the workloads.
pub(super) const WORKLOADS: [&str; 8] =
    ["read-qd1", "mixed-qd8", "read-qd32", "sequential", "bursts", "idle-busy", "open-loop", "flush-heavy"];

/// A workload: phases that are repeated. Rates differ by up to a factor of two from seed to seed. None: there is no such workload.
pub(super) fn phases(name: &str, rng: &mut Rng) -> Option<Vec<Phase>> {
    let speed = 0.7 * (1.0 + rng.below(1_000) as f64 / 1_000.0);
    let steady = |load: Load| vec![Phase { seconds: 3_600.0, load: load.times(speed) }];
    Some(match name {
        "read-qd1" => steady(Load::closed(1, 400.0)),
        "mixed-qd8" => steady(Load { reads: 70, flushes: 1, ..Load::closed(8, 4_000.0) }),
        "read-qd32" => steady(Load::closed(32, 14_000.0)),
        "sequential" => steady(Load { reads: 60, blocks: 32, sequential: true, ..Load::closed(4, 8_000.0) }),
        "bursts" => {
            let calm = Load { reads: 60, ..Load::closed(4, 8_000.0) };
            let busy = Load { reads: 60, ..Load::closed(24, 5_000.0) };
            let (long, short) = (0.5 + 0.001 * rng.below(1_000) as f64, 0.3 + 0.001 * rng.below(400) as f64);
            vec![Phase { seconds: long, load: calm.times(speed) }, Phase { seconds: short, load: busy.times(speed) }]
        }
        "idle-busy" => {
            let busy = Load { reads: 80, flushes: 1, ..Load::closed(8, 3_000.0) };
            vec![
                Phase { seconds: 0.8 + 0.001 * rng.below(500) as f64, load: busy.times(speed) },
                Phase { seconds: 0.6, load: Load::NONE },
            ]
        }
        "open-loop" => steady(Load { reads: 70, ..Load::open(1_500.0) }),
        "flush-heavy" => steady(Load { reads: 30, flushes: 20, ..Load::closed(4, 4_000.0) }),
        _ => return None,
    })
}

/// The requests of a load, one after the other.
#[derive(Debug)]
pub(super) struct Stream {
    rng: Rng,
    /// Blocks of the disk.
    blocks: u64,
    next: u64,
}

impl Stream {
    /// A stream from the beginning of a disk of `blocks`.
    pub(super) fn new(blocks: u64, rng: Rng) -> Self {
        Stream { rng, blocks, next: 0 }
    }

    /// The next request of a load.
    pub(super) fn next(&mut self, load: &Load) -> Request {
        if self.rng.percent(load.flushes) {
            return Request::flush();
        }
        let places = self.blocks / u64::from(load.blocks);
        let place = if load.sequential { self.next % places } else { self.rng.below(places) };
        self.next = place + 1;
        let kind = if self.rng.percent(load.reads) { Kind::Read } else { Kind::Write };
        Request { kind, ..Request::read(place * u64::from(load.blocks), load.blocks) }
    }

    /// A time of that mean: anything up to twice as much.
    pub(super) fn about(&mut self, mean_us: f64) -> u64 {
        (mean_us * 2e3 * self.rng.below(1 << 20) as f64 / f64::from(1 << 20)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_stays_on_the_disk_and_asks_for_what_it_says() {
        for name in WORKLOADS {
            let phases = phases(name, &mut Rng::new(5, 1)).expect("it is listed");
            let mut stream = Stream::new(BLOCKS, Rng::new(5, 2));
            for phase in phases.iter().filter(|phase| phase.load.depth > 0) {
                let load = phase.load;
                assert!(load.depth <= DEPTH_MAX && load.blocks <= BLOCKS_MAX && phase.seconds > 0.0, "{name}");
                let requests: Vec<Request> = (0..4_000).map(|_| stream.next(&load)).collect();
                assert!(requests.iter().all(|it| it.block + u64::from(it.blocks) <= BLOCKS), "{name}");
                let share = |kind| 100 * requests.iter().filter(|it| it.kind == kind).count() as u64 / 4_000;
                assert!(share(Kind::Flush).abs_diff(load.flushes) <= 3, "{name}: {} % flushes", share(Kind::Flush));
                let reads = load.reads * (100 - load.flushes) / 100;
                assert!(share(Kind::Read).abs_diff(reads) <= 4, "{name}: {} % reads", share(Kind::Read));
            }
        }
        assert_eq!(phases("fast", &mut Rng::new(1, 1)), None);
    }

    #[test]
    fn a_sequential_load_goes_on_where_it_was() {
        let load = Load { blocks: 32, sequential: true, ..Load::closed(1, 1.0) };
        let mut stream = Stream::new(BLOCKS, Rng::new(1, 1));
        let blocks: Vec<u64> = (0..300).map(|_| stream.next(&load).block).collect();
        assert_eq!((blocks[1], blocks[2], blocks[255], blocks[256]), (32, 64, 255 * 32, 0));
    }

    #[test]
    fn speeds_differ_from_seed_to_seed_and_not_by_more_than_a_factor_of_two() {
        let rate = |seed| phases("read-qd1", &mut Rng::new(seed, 1)).expect("listed")[0].load.rate_most();
        let rates: Vec<f64> = (0..100).map(rate).collect();
        let (least, most) = rates.iter().fold((f64::MAX, 0.0_f64), |(a, b), rate| (a.min(*rate), b.max(*rate)));
        assert!(most / least > 1.5 && most / least <= 2.001, "{least} to {most}");
    }
}
