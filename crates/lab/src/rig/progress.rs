//! A line now and then that says how far a run is.

use std::time::{Duration, Instant};

use super::process::Holdings;
use super::tally::Tally;

/// Time between two lines.
const EVERY: Duration = Duration::from_secs(10);

/// The progress of a run.
#[derive(Debug)]
pub(crate) struct Progress {
    goal: u64,
    started: Instant,
    said: Instant,
}

impl Progress {
    /// A run to `goal` failovers that starts now.
    pub(crate) fn new(goal: u64) -> Self {
        let now = Instant::now();
        Progress { goal, started: now, said: now }
    }

    /// Says where the run is, if that was not said for a while.
    pub(crate) fn say(&mut self, tally: &Tally) {
        if self.said.elapsed() < EVERY {
            return;
        }
        self.said = Instant::now();
        let mebibytes = rss_bytes().unwrap_or(0) >> 20;
        let pace = pace(tally.failovers, self.goal, self.started.elapsed());
        let (refused, halted, unexpected) = (tally.refused, tally.halted(), tally.unexpected);
        eprintln!(
            "{pace}; {refused} refused, of these {halted} halted, {unexpected} unexpected; the rig holds {mebibytes} MiB"
        );
    }
}

/// Resident memory of the rig itself.
pub(crate) fn rss_bytes() -> anyhow::Result<u64> {
    Ok(Holdings::of(std::process::id())?.rss_bytes)
}

fn pace(done: u64, goal: u64, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(1e-3);
    let left = if rate > 0.0 { span(goal.saturating_sub(done) as f64 / rate) } else { "unknown".into() };
    format!("{done} of {goal} failovers, {rate:.1}/s, {left} to go")
}

fn span(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..100 => format!("{seconds} s"),
        100..6000 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_so_far_says_how_long_it_will_take() {
        assert_eq!(pace(100, 1100, Duration::from_secs(10)), "100 of 1100 failovers, 10.0/s, 1 min 40 s to go");
        assert_eq!(pace(0, 5, Duration::from_secs(10)), "0 of 5 failovers, 0.0/s, unknown to go");
        assert_eq!(pace(7, 5, Duration::from_secs(1)), "7 of 5 failovers, 7.0/s, 0 s to go");
        assert_eq!(span(20_000.0), "5 h 33 min");
    }
}
