//! What a guest suffers from: time in which it waits and nothing is completed.

/// A silence of so long is no stall yet, in nanoseconds. Of a longer one only what is beyond counts.
const GRACE_NS: u64 = 10_000_000;

/// A stall: from when to when, by the clock of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    pub(super) from_ns: u64,
    pub(super) until_ns: u64,
}

impl Stall {
    /// How much of it lies between two instants.
    fn within(self, from_ns: u64, until_ns: u64) -> u64 {
        self.until_ns.min(until_ns).saturating_sub(self.from_ns.max(from_ns))
    }
}

/// Adds up stalls.
#[derive(Debug, Default)]
pub(super) struct StallClock {
    /// Since when somebody waits and nothing was completed.
    silent_since: Option<u64>,
    stalls: Vec<Stall>,
}

impl StallClock {
    /// Something waits, perhaps together with others.
    pub(super) fn waits(&mut self, now: u64) {
        self.silent_since.get_or_insert(now);
    }

    /// Something was completed; others may `wait` on.
    pub(super) fn completed(&mut self, now: u64, wait: bool) {
        self.close(now);
        self.silent_since = wait.then_some(now);
    }

    /// Nothing waits any more, or it is not looked at any longer.
    pub(super) fn close(&mut self, now: u64) {
        if let Some(from_ns) = self.silent_since.take().map(|since| since + GRACE_NS)
            && from_ns < now
        {
            self.stalls.push(Stall { from_ns, until_ns: now });
        }
    }

    /// All that were, in their order.
    pub(super) fn into_stalls(self) -> Vec<Stall> {
        self.stalls
    }
}

/// Time of all stalls between two instants, in nanoseconds.
pub(super) fn stalled_ns(stalls: &[Stall], from_ns: u64, until_ns: u64) -> u64 {
    stalls.iter().map(|stall| stall.within(from_ns, until_ns)).sum()
}

/// When the first stall of more than `least` nanoseconds began that was not over at `from`.
pub(super) fn first_beyond(stalls: &[Stall], least: u64, from_ns: u64) -> Option<u64> {
    let long = |stall: &&Stall| stall.until_ns > from_ns && stall.until_ns - stall.from_ns > least;
    stalls.iter().find(long).map(|stall| stall.from_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn only_what_is_beyond_ten_milliseconds_of_silence_counts() {
        let mut clock = StallClock::default();
        clock.waits(0);
        clock.completed(9 * MS, true);
        // Another one joins: the silence is as long as it was.
        clock.waits(15 * MS);
        clock.completed(49 * MS, false);
        // Nobody waits.
        clock.waits(500 * MS);
        clock.close(600 * MS);
        let stalls = clock.into_stalls();
        assert_eq!(stalled_ns(&stalls, 0, u64::MAX), (30 + 90) * MS);
        assert_eq!(stalled_ns(&stalls, 29 * MS, 520 * MS), (20 + 10) * MS);
        assert_eq!(first_beyond(&stalls, 50 * MS, 0), Some(510 * MS));
        assert_eq!(first_beyond(&stalls, 20 * MS, 0), Some(19 * MS));
        assert_eq!(first_beyond(&stalls, 20 * MS, 60 * MS), Some(510 * MS));
        assert_eq!(first_beyond(&stalls, 100 * MS, 0), None);
    }
}
