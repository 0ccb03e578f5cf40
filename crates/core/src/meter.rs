//! What following a ring tells of its load, as plain counters: the part of a profile that is exact.
//!
//! Depth is integrated over time between looks (a trapezoid), so that depth over completions is the mean latency by Little's law however
//! rarely the ring is looked at. Single latencies are known as well as looks resolve them: those that spanned several looks, and all of those.

use warmswap_histogram::Histogram;

use crate::observer::{Knowledge, Observation, Observer};
use crate::time::Nanos;

/// A ring that had nothing in flight for longer than this was at rest: what is in flight now has only just come.
const REST: Nanos = Nanos::from_millis(20);

/// Counters of one ring since its pair was made; and, where said, how it was at the last look.
#[derive(Clone, Debug, Default)]
pub struct RingMeter {
    /// Looks, starts and stops: it changes when anything here does.
    pub looks: u64,
    /// Entries of the ring, at the last look.
    pub size: u16,
    /// Requests submitted.
    pub submitted: u64,
    /// Requests completed.
    pub completed: u64,
    /// Requests in flight times nanoseconds.
    pub depth_ns: u64,
    /// Nanoseconds over which that was taken.
    pub metered_ns: u64,
    /// The part of them in which it was not known which requests were in flight.
    pub inexact_ns: u64,
    /// Requests in flight, at the last look.
    pub outstanding: u16,
    /// For how long at least the oldest request in flight has been it, at the last look, where that is known.
    pub oldest: Option<Nanos>,
    /// Time in which at least nothing was completed while requests were in flight: up to the last look, or the one that the last look saw
    /// end.
    pub gap: Nanos,
    /// From this latency on every request that the last look saw completed is in [`RingMeter::long`]. Zero if it saw none.
    pub long_floor: Nanos,
    /// Latencies of all requests that took at least [`RingMeter::long_floor`].
    pub long: Histogram,
    /// Latencies of requests that woke an idle ring, whose submission is known from the kick: a sample.
    pub woken: Histogram,
    metered_at: Nanos,
}

impl RingMeter {
    /// The ring is started: nothing is reckoned for the time before.
    pub(crate) fn start(&mut self, now: Nanos) {
        self.stop();
        self.metered_at = now;
    }

    /// The ring is stopped: whatever it owes is nobody's now.
    pub(crate) fn stop(&mut self) {
        self.looks += 1;
        (self.outstanding, self.oldest, self.gap, self.long_floor) = (0, None, Nanos(0), Nanos(0));
    }

    /// A kick has woken the ring: until now nothing was in flight.
    pub(crate) fn woken(&mut self, now: Nanos) {
        if self.outstanding > 0 {
            // Somebody has looked before the kick was seen.
            return;
        }
        self.metered_ns += now.since(self.metered_at).0;
        self.metered_at = now;
    }

    /// Takes what a look at the ring saw. `progressed`: its last progress before.
    pub(crate) fn look(&mut self, observer: &mut Observer, seen: &Observation, progressed: Nanos, now: Nanos) {
        let elapsed = now.since(self.metered_at).0;
        self.metered_at = now;
        let outstanding = seen.outstanding.min(observer.layout().size());
        self.looks += 1;
        self.size = observer.layout().size();
        self.submitted += u64::from(seen.submitted);
        self.completed += u64::from(seen.completed);
        if self.outstanding > 0 || elapsed <= REST.0 {
            self.depth_ns += (u64::from(self.outstanding) + u64::from(outstanding)) * elapsed / 2;
        }
        self.metered_ns += elapsed;
        if observer.knowledge() != Knowledge::Exact {
            self.inexact_ns += elapsed;
        }
        // What completed may have done so right after the look before; what has not has not until now.
        let until = if seen.completed > 0 { Nanos(now.0.saturating_sub(observer.look_width().0)) } else { now };
        self.gap = if self.outstanding > 0 { until.since(progressed) } else { Nanos(0) };
        self.outstanding = outstanding;
        self.oldest = observer.oldest_age();
        self.long_floor = if seen.completed > 0 { observer.long_floor() } else { Nanos(0) };
        let [long, woken] = observer.take_latencies();
        long.for_each(|latency| self.long.record(latency.0));
        woken.for_each(|latency| self.woken.record(latency.0));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use warmswap_wire::ring::Layout;

    use super::*;
    use crate::testing::{PlainMemory, PlainRing};

    #[test]
    fn depth_over_completions_is_the_mean_latency() {
        // One request of 300 us every 1000 us, looked at every 70 us.
        let ring = PlainRing::new(8, 0);
        let mut memory = PlainMemory { rings: HashMap::from([(0, ring)]), ..PlainMemory::default() };
        let mut observer = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(0));
        let mut meter = RingMeter::default();
        meter.start(Nanos(0));
        for us in 1..=700_000_u64 {
            match us % 1_000 {
                0 => memory.ring(0).submit((us / 1_000 % 8) as u16),
                300 if us > 1_000 => memory.ring(0).complete((us / 1_000 % 8) as u16),
                _ => {}
            }
            if us % 70 == 0 {
                let now = Nanos::from_micros(us);
                let seen = observer.observe(now, 0, &mut memory);
                meter.look(&mut observer, &seen, Nanos(0), now);
            }
        }
        let mean_us = meter.depth_ns as f64 / 1e3 / meter.completed as f64;
        assert!((mean_us - 300.0).abs() < 5.0, "{mean_us}");
        assert_eq!((meter.submitted, meter.completed, meter.inexact_ns), (700, 699, 0));
        assert_eq!(meter.long.total(), 699, "300 us are more than four looks");
    }

    #[test]
    fn until_a_kick_wakes_it_nothing_was_in_flight() {
        let mut meter = RingMeter { outstanding: 0, ..RingMeter::default() };
        meter.start(Nanos(0));
        meter.woken(Nanos(1_000));
        assert_eq!((meter.metered_ns, meter.depth_ns), (1_000, 0));
    }

    #[test]
    fn rest_is_no_gap_and_no_depth_and_a_stopped_ring_owes_nothing() {
        let ring = PlainRing::new(8, 0);
        let mut memory = PlainMemory { rings: HashMap::from([(0, ring)]), ..PlainMemory::default() };
        let mut observer = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(0));
        let mut meter = RingMeter::default();
        meter.start(Nanos(0));
        observer.observe(Nanos(1), 0, &mut memory);
        observer.remember(0, &memory);
        // A look after half a minute of rest, just as a request has come.
        let now = Nanos::from_millis(30_000);
        memory.ring(0).submit(3);
        let seen = observer.observe(now, 0, &mut memory);
        meter.look(&mut observer, &seen, Nanos(1), now);
        assert_eq!((meter.gap, meter.depth_ns, meter.outstanding), (Nanos(0), 0, 1));
        // It has been waited for since then.
        let later = now + Nanos::from_millis(40);
        let seen = observer.observe(later, 0, &mut memory);
        meter.look(&mut observer, &seen, now, later);
        assert_eq!((meter.gap, meter.depth_ns), (Nanos::from_millis(40), 40_000_000));
        assert_eq!(meter.oldest, Some(Nanos::from_millis(40)));
        let looks = meter.looks;
        meter.stop();
        assert!(meter.looks > looks && meter.outstanding == 0 && meter.oldest.is_none());
    }
}
