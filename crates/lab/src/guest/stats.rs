//! What the guest felt: latencies and the longest silence.

use hdrhistogram::Histogram;

/// Latencies of requests and the longest gap between two completions.
#[derive(Debug)]
pub(crate) struct Latencies {
    histogram: Histogram<u64>,
    last_ns: Option<u64>,
    longest_gap_ns: u64,
}

impl Latencies {
    /// An empty record: 1 ns to 100 s, three digits, allocated once.
    pub(crate) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("the bounds are valid");
        Latencies { histogram, last_ns: None, longest_gap_ns: 0 }
    }

    /// Records one completion.
    pub(crate) fn record(&mut self, submitted_ns: u64, completed_ns: u64) {
        self.histogram.saturating_record(completed_ns.saturating_sub(submitted_ns));
        if let Some(last) = self.last_ns {
            self.longest_gap_ns = self.longest_gap_ns.max(completed_ns.saturating_sub(last));
        }
        self.last_ns = Some(completed_ns);
    }

    /// Longest gap between two completions.
    #[allow(dead_code, reason = "part of the interface: instruments that look for one gap keep their own")]
    pub(crate) fn longest_gap_ns(&self) -> u64 {
        self.longest_gap_ns
    }

    /// The histogram of latencies in nanoseconds.
    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_between_completions() {
        let mut latencies = Latencies::new();
        latencies.record(0, 100);
        latencies.record(50, 900);
        latencies.record(60, 1000);
        assert_eq!(latencies.longest_gap_ns(), 800);
        assert_eq!(latencies.histogram().len(), 3);
    }
}
