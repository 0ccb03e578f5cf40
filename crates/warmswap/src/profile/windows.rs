//! The last windows of a device, in memory.
//!
//! Of a device at rest successive windows say the same: of such a run the first is kept, and how many there were, so that a process with
//! a thousand devices of which few are busy is not made of copies. The latest window is always itself.

use std::collections::VecDeque;

use warmswap_predict::Record;
use warmswap_store::idle_like;

/// Windows that are kept.
pub(super) const WINDOWS_MAX: usize = 120;

/// The last windows of a device.
#[derive(Clone, Debug, Default)]
pub(super) struct LastWindows {
    runs: VecDeque<Run>,
    /// Windows of all runs.
    count: usize,
    latest: Option<Record>,
}

/// Windows that follow upon each other and are alike.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: Record,
    count: u32,
    /// End of the last of them.
    end_unix_ns: u64,
}

impl Run {
    fn goes_on_with(&self, next: &Record) -> bool {
        next.number == self.first.number + u64::from(self.count) && idle_like(&self.first, next)
    }

    /// One of them, reckoned from the first.
    fn at(&self, index: u32) -> Record {
        let apart = (self.end_unix_ns.saturating_sub(self.first.end_unix_ns)) / u64::from(self.count.max(2) - 1);
        let mut record = self.first;
        record.number += u64::from(index);
        record.end_unix_ns += u64::from(index) * apart;
        record
    }
}

impl LastWindows {
    pub(super) fn push(&mut self, window: &Record) {
        match self.runs.back_mut() {
            Some(run) if run.goes_on_with(window) => {
                (run.count, run.end_unix_ns) = (run.count + 1, window.end_unix_ns);
            }
            _ => self.runs.push_back(Run { first: *window, count: 1, end_unix_ns: window.end_unix_ns }),
        }
        self.latest = Some(*window);
        self.count += 1;
        if self.count > WINDOWS_MAX {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        let Some(run) = self.runs.front_mut() else { return };
        self.count -= 1;
        if run.count == 1 {
            self.runs.pop_front();
            return;
        }
        (run.first, run.count) = (run.at(1), run.count - 1);
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Record> + '_ {
        let windows = self.runs.iter().flat_map(|run| (0..run.count).map(|index| run.at(index)));
        windows.take(self.count.saturating_sub(1)).chain(self.latest)
    }

    /// The last of them, at most so many, the oldest first.
    pub(super) fn last(&self, count: usize) -> Vec<Record> {
        self.iter().skip(self.len().saturating_sub(count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmswap_predict::{Feature, Grain};

    fn window(number: u64, arrivals: f32, rss: f32) -> Record {
        let mut record = Record::new(Grain::Window, number, 1, 1_000_000 * number, 1_000);
        record.set(Feature::Arrivals, Some(arrivals));
        record.set(Feature::Rss, Some(rss));
        record
    }

    #[test]
    fn windows_come_back_as_they_were_whether_the_device_rested_or_not() {
        let mut kept = LastWindows::default();
        let mut all = Vec::new();
        for number in 0..300 {
            let arrivals = if number % 50 < 10 { 5.0 + number as f32 } else { 0.0 };
            let next = window(number, arrivals, 4096.0 * (1.0 + number as f32 / 1e6));
            kept.push(&next);
            all.push(next);
        }
        let last = kept.last(WINDOWS_MAX + 1);
        assert_eq!(last.len(), WINDOWS_MAX);
        for (kept, pushed) in last.iter().zip(&all[all.len() - WINDOWS_MAX..]) {
            assert_eq!((kept.number, kept.end_unix_ns), (pushed.number, pushed.end_unix_ns));
            assert_eq!(kept.get(Feature::Arrivals), pushed.get(Feature::Arrivals));
        }
        assert_eq!(last.last(), all.last());
        assert!(kept.runs.len() < 30, "{} runs", kept.runs.len());
        assert_eq!(kept.last(1), &all[299..]);
    }

    #[test]
    fn what_changes_slowly_ends_a_run_and_so_does_a_window_that_was_lost() {
        let mut kept = LastWindows::default();
        (0..100).for_each(|number| kept.push(&window(number, 0.0, 1e6 * (1.0 + number as f32 / 1e3))));
        assert!(kept.runs.len() > 10, "a leak is not hidden: {}", kept.runs.len());
        let runs = kept.runs.len();
        kept.push(&window(101, 0.0, 1.1e6));
        assert_eq!(kept.runs.len(), runs + 1);
        let numbers: Vec<u64> = kept.iter().map(|window| window.number).collect();
        assert_eq!(numbers[98..], [98, 99, 101]);
    }
}
