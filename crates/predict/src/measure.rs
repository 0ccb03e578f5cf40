//! What the sources saw, before anything is divided.

use warmswap_histogram::Histogram;

use crate::record::Record;
use crate::schema::{FEATURE_COUNT, FEATURES, Feature, Summary};

/// Which requests a latency is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyKind {
    /// Any.
    All,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
    /// Flushes.
    Flushes,
}

impl LatencyKind {
    const COUNT: usize = 4;
}

/// What was seen during some time. Measures of times that follow each other [merge](Measure::merge) into that of both.
#[derive(Clone, Debug, PartialEq)]
pub struct Measure {
    /// Sums, or greatest and latest values.
    above: [f64; FEATURE_COUNT],
    /// What sums are related to; 0: nothing was seen. 1 beside a greatest or latest value.
    below: [f64; FEATURE_COUNT],
    latencies: [Histogram; LatencyKind::COUNT],
    samples: u64,
}

impl Default for Measure {
    fn default() -> Self {
        Measure {
            above: [0.0; FEATURE_COUNT],
            below: [0.0; FEATURE_COUNT],
            latencies: core::array::from_fn(|_| Histogram::default()),
            samples: 0,
        }
    }
}

impl Measure {
    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Measure::default();
    }

    /// Adds `count` of something to what is related to `to`: a count to seconds for a rate, a part to the whole for a share, a sum to the
    /// number of its terms for a mean. Nothing is added where `to` is not positive, or either is no number.
    pub fn add(&mut self, feature: Feature, count: f64, to: f64) {
        debug_assert_eq!(feature.spec().summary, Summary::Ratio, "{}", feature.name());
        if count.is_finite() && to.is_finite() && to > 0.0 {
            self.above[feature as usize] += count;
            self.below[feature as usize] += to;
        }
    }

    /// Notes a value, of which the greatest or the latest is kept.
    pub fn note(&mut self, feature: Feature, value: f64) {
        if !value.is_finite() {
            return;
        }
        let at = feature as usize;
        let had = self.below[at] > 0.0;
        self.above[at] = match feature.spec().summary {
            Summary::Max if had => self.above[at].max(value),
            _ => value,
        };
        self.below[at] = 1.0;
    }

    /// Adds latencies that stand for others as well: `latencies` as they were sampled, for `of` requests in all. Every count is scaled, so
    /// that ticks with few samples weigh as much as their requests.
    pub fn sampled(&mut self, kind: LatencyKind, latencies: &Histogram, of: u64) {
        let seen = u64::try_from(latencies.total()).unwrap_or(u64::MAX);
        if seen == 0 {
            return;
        }
        // Shares of few samples are kept in fine parts: a count of 1 among 3 samples for 2 requests is not rounded away.
        let scale = (of.max(seen) as f64 * SCALE) / seen as f64;
        let sum = &mut self.latencies[kind as usize];
        for (sum, count) in sum.counts.iter_mut().zip(latencies.counts) {
            *sum = sum.saturating_add((count as f64 * scale) as u64);
        }
        if kind == LatencyKind::All {
            self.samples += seen;
        }
    }

    /// Adds the measure of the time that followed.
    pub fn merge(&mut self, later: &Measure) {
        for (at, spec) in FEATURES.iter().enumerate() {
            match spec.summary {
                Summary::Ratio => {
                    self.above[at] += later.above[at];
                    self.below[at] += later.below[at];
                }
                Summary::Max if self.below[at] > 0.0 && later.below[at] > 0.0 => {
                    self.above[at] = self.above[at].max(later.above[at]);
                }
                Summary::Max | Summary::Last if later.below[at] > 0.0 => {
                    self.above[at] = later.above[at];
                    self.below[at] = 1.0;
                }
                Summary::Max | Summary::Last | Summary::Quantile(..) => {}
            }
        }
        for (sum, more) in self.latencies.iter_mut().zip(&later.latencies) {
            sum.merge(more);
        }
        self.samples += later.samples;
    }

    /// The value of a feature so far.
    #[must_use]
    pub fn value(&self, feature: Feature) -> Option<f64> {
        let at = feature as usize;
        match feature.spec().summary {
            Summary::Quantile(kind, millionths) => {
                let us = self.latencies[kind as usize].estimate(f64::from(millionths) / 1e6)? / 1e3;
                // A bucket is wider than what is known of the longest.
                Some(self.value(Feature::LatencyMax).map_or(us, |max| us.min(max)))
            }
            _ if feature == Feature::LatencySamples => Some(self.samples as f64),
            _ if self.below[at] <= 0.0 => None,
            Summary::Ratio => Some(self.above[at] / self.below[at]),
            Summary::Max | Summary::Last => Some(self.above[at]),
        }
    }

    /// Puts every value into a record, the others are missing.
    pub(crate) fn fill(&self, record: &mut Record) {
        for feature in Feature::ALL {
            record.set(feature, self.value(feature).map(|value| value as f32));
        }
    }
}

/// Parts that a scaled count is kept in.
const SCALE: f64 = 64.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies(ns: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        ns.iter().for_each(|ns| histogram.record(*ns));
        histogram
    }

    #[test]
    fn what_was_not_seen_is_missing_and_never_zero() {
        let measure = Measure::default();
        for feature in Feature::ALL.into_iter().filter(|it| *it != Feature::LatencySamples) {
            assert_eq!(measure.value(feature), None, "{}", feature.name());
        }
    }

    #[test]
    fn a_rate_of_two_ticks_is_that_of_the_time_in_which_it_was_seen() {
        let (mut one, mut two) = (Measure::default(), Measure::default());
        one.add(Feature::Arrivals, 10.0, 0.1);
        two.add(Feature::Arrivals, 30.0, 0.3);
        one.merge(&two);
        assert_eq!(one.value(Feature::Arrivals), Some(100.0));
        one.add(Feature::Arrivals, f64::NAN, 1.0);
        one.add(Feature::Arrivals, 1.0, 0.0);
        assert_eq!(one.value(Feature::Arrivals), Some(100.0), "no numbers are not added");
    }

    #[test]
    fn of_greatest_and_latest_values_the_right_one_is_kept() {
        let (mut one, mut two) = (Measure::default(), Measure::default());
        one.note(Feature::DepthMax, 9.0);
        one.note(Feature::Rss, 9.0);
        one.merge(&two);
        assert_eq!((one.value(Feature::DepthMax), one.value(Feature::Rss)), (Some(9.0), Some(9.0)), "nothing came");
        two.note(Feature::DepthMax, 3.0);
        two.note(Feature::Rss, 3.0);
        one.merge(&two);
        assert_eq!((one.value(Feature::DepthMax), one.value(Feature::Rss)), (Some(9.0), Some(3.0)));
    }

    #[test]
    fn a_tick_with_few_samples_weighs_as_much_as_its_requests() {
        let (mut one, mut two) = (Measure::default(), Measure::default());
        one.sampled(LatencyKind::All, &latencies(&[1_024; 10]), 10);
        two.sampled(LatencyKind::All, &latencies(&[1 << 20]), 90);
        one.merge(&two);
        let median = one.value(Feature::LatencyP50).expect("there are latencies");
        assert!((1_048.0..1_311.0).contains(&median), "{median}");
        assert_eq!(one.value(Feature::LatencySamples), Some(11.0));
        assert_eq!(one.value(Feature::ReadP50), None);
    }
}
