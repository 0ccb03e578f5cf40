//! What was found, for people and for programs, and whether it is good.

use anyhow::ensure;
use serde_json::{Value, json};

use super::Args;
use super::probe::{Cost, Sample};
use super::round::{Round, tenths};
use crate::common::commit::commit;

/// Everything a run showed.
#[derive(Debug)]
pub(super) struct Report {
    /// io_uring, the broker as shipped.
    pub(super) guarded: Vec<Round>,
    /// io_uring, the storage proof skipped.
    pub(super) sabotaged: Vec<Round>,
    /// Linux AIO.
    pub(super) native: Vec<Round>,
    /// Threads.
    pub(super) threads: Vec<Round>,
    /// io_uring on an image that nobody locks, the broker as shipped.
    pub(super) unlocked: Vec<Round>,
    /// io_uring in a child of the process that warmswap starts, the broker as shipped.
    pub(super) wrapped: Vec<Round>,
    /// Cost of the proof.
    pub(super) cost: Cost,
}

impl Report {
    /// Prints it as `args` wants.
    pub(super) fn print(&self, args: &Args) {
        let report = self.json(args);
        if args.json {
            println!("{report}");
        } else {
            println!("{report:#}");
        }
    }

    fn json(&self, args: &Args) -> Value {
        let waits: Vec<f64> = self.guarded.iter().map(Round::fence_wait_ms).collect();
        let details = |rounds: &[Round]| rounds.iter().map(Round::json).collect::<Vec<_>>();
        json!({
            "late_writes": self.late_writes(),
            "late_writes_sabotaged": late(&self.sabotaged),
            "fence_wait_ms": { "p50": tenths(median(&waits)), "max": tenths(max(&waits)) },
            "probe_cost_us": self.probe_cost_us(),
            "late_writes_unlocked": late(&self.unlocked),
            "late_writes_wrapped": late(&self.wrapped),
            "idle_kills": {
                "io_uring_locks": medians(&self.cost.locks),
                "io_uring_unproved": medians(&self.cost.unproved),
                "threads": medians(&self.cost.threads),
                "n": self.cost.locks.len(),
                "evidence": self.cost.evidence,
            },
            "exit_waits": {
                "native": { "late_writes": late(&self.native), "rounds": details(&self.native) },
                "threads": { "late_writes": late(&self.threads), "rounds": details(&self.threads) },
            },
            "guarded": details(&self.guarded),
            "sabotaged": details(&self.sabotaged),
            "wrapped": details(&self.wrapped),
            "store": "loop device over memory, throttled for the primary by blkio",
            "rounds": args.rounds,
            "seed": args.seed,
            "commit": commit(),
            "command": format!("cargo run -rq -p lab -- fence --rounds {} --seed {} --age-ms {} --probes {} --json",
                args.rounds, args.seed, args.age_ms, args.probes),
        })
    }

    /// What the proof adds to the blackout: the same engine with and without it, killed one after the other.
    fn probe_cost_us(&self) -> f64 {
        let pairs = self.cost.locks.iter().zip(&self.cost.unproved);
        let added: Vec<f64> = pairs.map(|(proved, unproved)| proved.blackout - unproved.blackout).collect();
        tenths(median(&added))
    }

    /// Late writes past the broker as shipped, with whatever engine.
    fn late_writes(&self) -> usize {
        self.shipped().map(|round| round.findings.late.len()).sum()
    }

    fn shipped(&self) -> impl Iterator<Item = &Round> {
        [&self.guarded, &self.unlocked, &self.wrapped, &self.native, &self.threads].into_iter().flatten()
    }

    /// Fails if a promise was broken, or if the control shows that it was never at stake.
    pub(super) fn verdict(&self) -> anyhow::Result<()> {
        let wrong: Vec<&String> = self.shipped().flat_map(|round| &round.findings.wrong).collect();
        ensure!(
            late(&self.sabotaged) > 0,
            "the instrument has no teeth here: without the storage proof nothing was late either, so nothing is proved"
        );
        ensure!(self.late_writes() == 0, "the fence does not hold: {} late writes", self.late_writes());
        ensure!(wrong.is_empty(), "requests ended wrongly: {wrong:?}");
        ensure!(
            self.cost.evidence.contains("storage descriptions"),
            "the probe whose cost was to be measured was not made: {}",
            self.cost.evidence
        );
        Ok(())
    }
}

/// One round in one line.
pub(super) fn line(round: &Round) -> String {
    format!(
        "{} in flight, ended after {:.1} ms, fence waited {:.1} ms more, guest silent {:.1} ms, {} late; {}",
        round.in_flight,
        round.exit_ms,
        round.fence_wait_ms(),
        round.findings.first_completion_ms.unwrap_or_default(),
        round.findings.late.len(),
        round.failover["evidence"].as_str().unwrap_or_default()
    )
}

fn medians(samples: &[Sample]) -> Value {
    let of = |value: fn(&Sample) -> f64| tenths(median(&samples.iter().map(value).collect::<Vec<_>>()));
    json!({ "fencing_us": of(|sample| sample.fencing), "blackout_us": of(|sample| sample.blackout) })
}

fn late(rounds: &[Round]) -> usize {
    rounds.iter().map(|round| round.findings.late.len()).sum()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }
}
