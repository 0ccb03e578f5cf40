//! Latencies in logarithmic buckets: four per power of two, from 256 ns to 2^37 ns (137 s), so that none of those is
//! wider than a quarter of where it begins. The first bucket holds all that is shorter, the last all that is longer.

#![cfg_attr(not(test), no_std)]

use core::ops::RangeInclusive;

/// log2 of where the second bucket begins.
const FIRST_EXPONENT: u32 = 8;
/// log2 of where the last bucket begins.
const LAST_EXPONENT: u32 = 37;
/// log2 of the number of buckets per power of two.
const SPLIT: u32 = 2;

/// Number of buckets.
pub const BUCKETS: usize = (((LAST_EXPONENT - FIRST_EXPONENT) << SPLIT) + 2) as usize;

const LAST: usize = BUCKETS - 1;

/// The bucket that a latency of `ns` nanoseconds is counted in: below [`BUCKETS`].
#[inline]
#[must_use]
pub const fn bucket_of(ns: u64) -> usize {
    if ns < 1 << FIRST_EXPONENT {
        return 0;
    }
    if ns >= 1 << LAST_EXPONENT {
        return LAST;
    }
    let exponent = ns.ilog2();
    // The two bits below the highest one.
    let within = (ns >> (exponent - SPLIT)) as usize & ((1 << SPLIT) - 1);
    1 + ((exponent - FIRST_EXPONENT) << SPLIT) as usize + within
}

/// The latencies, in nanoseconds, that `bucket` counts.
///
/// # Panics
/// If `bucket` is not below [`BUCKETS`].
#[must_use]
pub fn bucket_bounds(bucket: usize) -> RangeInclusive<u64> {
    assert!(bucket < BUCKETS, "bucket {bucket} of {BUCKETS}");
    let end = if bucket == LAST { u64::MAX } else { start_of(bucket + 1) - 1 };
    start_of(bucket)..=end
}

const fn start_of(bucket: usize) -> u64 {
    if bucket == 0 {
        return 0;
    }
    let step = bucket as u64 - 1;
    let (power, within) = (step >> SPLIT, step & ((1 << SPLIT) - 1));
    ((1 << SPLIT) + within) << (power + FIRST_EXPONENT as u64 - SPLIT as u64)
}

/// How many requests took how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// One count per bucket.
    pub counts: [u64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: [0; BUCKETS] }
    }
}

impl Histogram {
    /// Counts one latency.
    pub fn record(&mut self, ns: u64) {
        let count = &mut self.counts[bucket_of(ns)];
        *count = count.wrapping_add(1);
    }

    /// Counts `count` latencies of `ns` nanoseconds.
    pub fn record_many(&mut self, ns: u64, count: u64) {
        let sum = &mut self.counts[bucket_of(ns)];
        *sum = sum.wrapping_add(count);
    }

    /// Number of latencies that were counted.
    #[must_use]
    pub fn total(&self) -> u128 {
        self.counts.iter().copied().map(u128::from).sum()
    }

    /// The latency in nanoseconds that the fraction `p` of all did not exceed, as the upper bound of its bucket.
    ///
    /// It is never below the true quantile and never a quarter or more above it, except in the two outermost buckets:
    /// the first answers 255, the last `u64::MAX`. `p` is cut to 0 (the shortest) and 1 (the longest). `None` if
    /// nothing was counted.
    #[must_use]
    pub fn quantile(&self, p: f64) -> Option<u64> {
        let total = self.total();
        // A float as wide as 2^53 rounds the rank of huge totals, which is far below the width of a bucket.
        let exact = p.clamp(0.0, 1.0) * total as f64;
        // Rounded up: `ceil` needs the standard library.
        let rank = (exact as u128 + u128::from((exact as u128 as f64) < exact)).clamp(1, total.max(1));
        let mut seen = 0;
        let bucket = self.counts.iter().position(|&count| {
            seen += u128::from(count);
            seen >= rank
        })?;
        Some(*bucket_bounds(bucket).end())
    }

    /// The latency in nanoseconds at the fraction `p`, reckoned as if the latencies of a bucket were spread evenly over it: less biased
    /// than [`Histogram::quantile`], and no bound. `None` if nothing was counted.
    #[must_use]
    pub fn estimate(&self, p: f64) -> Option<f64> {
        let rank = p.clamp(0.0, 1.0) * self.total() as f64;
        let mut below = 0.0;
        let mut last = None;
        for (bucket, &count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let bounds = bucket_bounds(bucket);
            let start = *bounds.start() as f64;
            // The last bucket has no end worth the name.
            let end = if bucket == LAST { start } else { *bounds.end() as f64 + 1.0 };
            let count = count as f64;
            if below + count >= rank {
                return Some(start + (end - start) * ((rank - below) / count).clamp(0.0, 1.0));
            }
            below += count;
            last = Some(end);
        }
        last
    }

    /// Adds the counts of another queue, kind or backend.
    pub fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count = count.saturating_add(more);
        }
    }

    /// What was counted since `earlier`, a snapshot of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        Histogram { counts: core::array::from_fn(|bucket| self.counts[bucket].wrapping_sub(earlier.counts[bucket])) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As many short latencies as long ones: uniform numbers would nearly all fall into the last bucket.
    fn any_latency() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0..64_u32).prop_map(|(ns, shift)| ns >> shift)
    }

    fn of(latencies: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for &ns in latencies {
            histogram.record(ns);
        }
        histogram
    }

    #[test]
    fn the_buckets_cover_everything_without_a_gap() {
        let mut next = 0;
        for bucket in 0..LAST {
            let bounds = bucket_bounds(bucket);
            assert_eq!(*bounds.start(), next, "bucket {bucket}");
            next = bounds.end() + 1;
        }
        assert_eq!(bucket_bounds(LAST), 1 << 37..=u64::MAX);
        assert_eq!(next, 1 << 37);
    }

    #[test]
    fn the_first_buckets_are_where_the_layout_has_them() {
        assert_eq!([0, 1, 2, 4, 5].map(bucket_bounds), [0..=255, 256..=319, 320..=383, 448..=511, 512..=639]);
    }

    #[test]
    fn no_bucket_but_the_outermost_is_wider_than_a_quarter_of_its_start() {
        for bucket in 1..LAST {
            let bounds = bucket_bounds(bucket);
            assert!((bounds.end() + 1 - bounds.start()) * 4 <= *bounds.start(), "bucket {bucket}");
        }
    }

    #[test]
    #[should_panic(expected = "bucket 118 of 118")]
    fn a_bucket_that_does_not_exist_is_our_own_mistake() {
        let _refused = bucket_bounds(BUCKETS);
    }

    #[test]
    fn an_empty_histogram_has_no_quantile() {
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn wild_counts_and_fractions_give_some_bucket() {
        let wild = Histogram { counts: [u64::MAX; BUCKETS] };
        for p in [f64::NAN, f64::NEG_INFINITY, -1.0, 0.0, 0.5, 1.0, 2.0, f64::INFINITY] {
            assert!(wild.quantile(p).is_some(), "{p}");
        }
        assert_eq!(wild.quantile(0.0), Some(255));
        assert_eq!(wild.quantile(1.0), Some(u64::MAX));
    }

    #[test]
    fn an_estimate_lies_where_evenly_spread_latencies_would_have_it() {
        let mut histogram = Histogram::default();
        histogram.record_many(1_024, 100);
        assert_eq!(histogram.estimate(0.5), Some(1_152.0), "the bucket is 1024 to 1279");
        histogram.record_many(1 << 40, 100);
        assert_eq!(histogram.estimate(1.0), Some((1_u64 << 37) as f64));
        assert_eq!(Histogram::default().estimate(0.5), None);
    }

    proptest! {
        #[test]
        fn every_latency_falls_into_the_bucket_whose_bounds_contain_it(ns in any_latency()) {
            prop_assert!(bucket_bounds(bucket_of(ns)).contains(&ns));
        }

        #[test]
        fn the_ends_of_every_bucket_belong_to_it(bucket in 0..BUCKETS) {
            let bounds = bucket_bounds(bucket);
            prop_assert_eq!(bucket_of(*bounds.start()), bucket);
            prop_assert_eq!(bucket_of(*bounds.end()), bucket);
        }

        #[test]
        fn a_quantile_is_never_below_the_true_one_and_less_than_a_quarter_above(
            mut latencies in proptest::collection::vec(256..1_u64 << 37, 1..200), p in 0.0..=1.0,
        ) {
            let answer = of(&latencies).quantile(p).expect("something was counted");
            latencies.sort_unstable();
            let rank = ((p * latencies.len() as f64).ceil() as usize).max(1);
            let exact = latencies[rank - 1];
            prop_assert!(exact <= answer && answer - exact < exact.div_ceil(4), "{answer} for {exact}");
        }

        #[test]
        fn merging_is_counting_both_and_since_takes_it_back(
            one in proptest::collection::vec(any_latency(), 0..50),
            two in proptest::collection::vec(any_latency(), 0..50),
        ) {
            let mut both = of(&one);
            both.merge(&of(&two));
            prop_assert_eq!(&both, &of(&[one.clone(), two.clone()].concat()));
            prop_assert_eq!(both.since(&of(&one)), of(&two));
        }
    }
}
