//! What the control thread tells the sampler of a ring: numbers that one writes and the other reads, without a lock and without waiting.
//!
//! Counters are of different instants, some nanoseconds apart. Greatest values are those since they were taken last.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use warmswap_core::{Nanos, RingMeter};
use warmswap_histogram::{BUCKETS, Histogram};

/// See the module.
#[derive(Debug)]
pub(crate) struct RingFeed {
    looks: AtomicU64,
    size: AtomicU32,
    submitted: AtomicU64,
    completed: AtomicU64,
    depth_ns: AtomicU64,
    metered_ns: AtomicU64,
    inexact_ns: AtomicU64,
    outstanding: AtomicU32,
    /// An age and one more; 0: none, or not known.
    oldest_max_ns: AtomicU64,
    depth_max: AtomicU32,
    gap_max_ns: AtomicU64,
    floor_max_ns: AtomicU64,
    long: [AtomicU32; BUCKETS],
    woken: [AtomicU32; BUCKETS],
    /// As they were published last: only the control thread looks at it.
    published: [AtomicU64; 2],
}

/// A feed at one moment.
#[derive(Clone, Debug)]
pub(crate) struct RingReading {
    pub(crate) looks: u64,
    pub(crate) size: u32,
    pub(crate) submitted: u64,
    pub(crate) completed: u64,
    pub(crate) depth_ns: u64,
    pub(crate) metered_ns: u64,
    pub(crate) inexact_ns: u64,
    pub(crate) outstanding: u32,
    pub(crate) oldest_max: Option<Nanos>,
    pub(crate) depth_max: u32,
    pub(crate) gap_max: Nanos,
    pub(crate) floor_max: Nanos,
}

fn counts() -> [AtomicU32; BUCKETS] {
    std::array::from_fn(|_| AtomicU32::new(0))
}

impl Default for RingFeed {
    fn default() -> Self {
        RingFeed {
            looks: AtomicU64::new(0),
            size: AtomicU32::new(0),
            submitted: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            depth_ns: AtomicU64::new(0),
            metered_ns: AtomicU64::new(0),
            inexact_ns: AtomicU64::new(0),
            outstanding: AtomicU32::new(0),
            oldest_max_ns: AtomicU64::new(0),
            depth_max: AtomicU32::new(0),
            gap_max_ns: AtomicU64::new(0),
            floor_max_ns: AtomicU64::new(0),
            long: counts(),
            woken: counts(),
            published: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }
}

impl RingFeed {
    /// Publishes a meter, if it has changed. Called by the control thread alone.
    pub(crate) fn publish(&self, meter: &RingMeter) {
        if self.looks.load(Ordering::Relaxed) == meter.looks {
            return;
        }
        let depth = u32::from(meter.outstanding);
        self.size.store(meter.size.into(), Ordering::Relaxed);
        self.submitted.store(meter.submitted, Ordering::Relaxed);
        self.completed.store(meter.completed, Ordering::Relaxed);
        self.depth_ns.store(meter.depth_ns, Ordering::Relaxed);
        self.metered_ns.store(meter.metered_ns, Ordering::Relaxed);
        self.inexact_ns.store(meter.inexact_ns, Ordering::Relaxed);
        self.outstanding.store(depth, Ordering::Relaxed);
        self.oldest_max_ns.fetch_max(meter.oldest.map_or(0, |age| age.0 + 1), Ordering::Relaxed);
        self.depth_max.fetch_max(depth, Ordering::Relaxed);
        self.gap_max_ns.fetch_max(meter.gap.0, Ordering::Relaxed);
        self.floor_max_ns.fetch_max(meter.long_floor.0, Ordering::Relaxed);
        for (at, (counts, latencies)) in
            [(&self.long, &meter.long), (&self.woken, &meter.woken)].into_iter().enumerate()
        {
            // Told by their number, so that a look that brought none costs nothing.
            let total = latencies.total() as u64;
            if self.published[at].swap(total, Ordering::Relaxed) != total {
                counts.iter().zip(latencies.counts).for_each(|(count, now)| count.store(now as u32, Ordering::Relaxed));
            }
        }
        self.looks.store(meter.looks, Ordering::Release);
    }

    /// Looks at the ring so far.
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Ordering::Acquire)
    }

    /// Requests submitted so far.
    pub(crate) fn submitted(&self) -> u64 {
        self.submitted.load(Ordering::Relaxed)
    }

    /// Requests completed so far, and entries of the ring.
    pub(crate) fn completed(&self) -> (u64, u32) {
        (self.completed.load(Ordering::Relaxed), self.size.load(Ordering::Relaxed))
    }

    /// Requests completed so far, and requests in flight times nanoseconds.
    pub(crate) fn work(&self) -> (u64, u64) {
        (self.completed.load(Ordering::Relaxed), self.depth_ns.load(Ordering::Relaxed))
    }

    /// Reads it; greatest values begin anew.
    pub(crate) fn take(&self) -> RingReading {
        let looks = self.looks();
        let outstanding = self.outstanding.load(Ordering::Relaxed);
        RingReading {
            looks,
            size: self.size.load(Ordering::Relaxed),
            submitted: self.submitted.load(Ordering::Relaxed),
            completed: self.completed.load(Ordering::Relaxed),
            depth_ns: self.depth_ns.load(Ordering::Relaxed),
            metered_ns: self.metered_ns.load(Ordering::Relaxed),
            inexact_ns: self.inexact_ns.load(Ordering::Relaxed),
            outstanding,
            oldest_max: self.oldest_max_ns.swap(0, Ordering::Relaxed).checked_sub(1).map(Nanos),
            depth_max: self.depth_max.swap(outstanding, Ordering::Relaxed).max(outstanding),
            gap_max: Nanos(self.gap_max_ns.swap(0, Ordering::Relaxed)),
            floor_max: Nanos(self.floor_max_ns.swap(0, Ordering::Relaxed)),
        }
    }

    /// Latencies since the last call with the same `before`: those told by looks, and those of requests that woke the ring.
    pub(crate) fn latencies(&self, before: &mut [[u32; BUCKETS]; 2]) -> [Histogram; 2] {
        let mut latencies = [Histogram::default(), Histogram::default()];
        for ((counts, before), histogram) in [&self.long, &self.woken].into_iter().zip(before).zip(&mut latencies) {
            for ((count, before), sum) in counts.iter().zip(before).zip(&mut histogram.counts) {
                let now = count.load(Ordering::Relaxed);
                *sum = now.wrapping_sub(std::mem::replace(before, now)).into();
            }
        }
        latencies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_read_and_greatest_values_begin_anew() {
        let (feed, mut meter, mut before) = (RingFeed::default(), RingMeter::default(), [[0; BUCKETS]; 2]);
        (meter.looks, meter.size, meter.submitted, meter.completed) = (1, 256, 20, 17);
        (meter.outstanding, meter.gap, meter.oldest) = (3, Nanos(500), Some(Nanos(40)));
        meter.long.record(1_000_000);
        feed.publish(&meter);
        (meter.looks, meter.outstanding, meter.gap) = (2, 1, Nanos(10));
        feed.publish(&meter);
        let reading = feed.take();
        assert_eq!((reading.submitted, reading.completed, reading.depth_max, reading.gap_max), (20, 17, 3, Nanos(500)));
        assert_eq!((reading.outstanding, reading.oldest_max, reading.size), (1, Some(Nanos(40)), 256));
        let again = feed.take();
        assert_eq!((again.depth_max, again.gap_max), (1, Nanos(0)));
        let totals = |latencies: [Histogram; 2]| latencies.map(|it| it.total());
        assert_eq!(totals(feed.latencies(&mut before)), [1, 0]);
        assert_eq!(totals(feed.latencies(&mut before)), [0, 0]);
    }
}
