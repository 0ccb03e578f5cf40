//! Counters of others, as differences.

/// A counter that only grows, read now and then. One that goes back was reset, or belongs to another process: the difference is missing
/// then, and never a huge number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    last: Option<u64>,
}

impl Counter {
    /// What was counted since the last reading, if there was one and the counter has not gone back.
    pub fn since(&mut self, now: u64) -> Option<u64> {
        let last = self.last.replace(now);
        now.checked_sub(last?)
    }

    /// Forgets the last reading: the next one is that of another counter.
    pub fn reset(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reading_and_one_that_goes_back_are_no_difference() {
        let mut counter = Counter::default();
        assert_eq!([5, 9, 9, 3, 4].map(|now| counter.since(now)), [None, Some(4), Some(0), None, Some(1)]);
        counter.reset();
        assert_eq!(counter.since(1_000), None);
    }
}
