//! Samples and what is said about them.

use serde::Serialize;

/// Samples of one kind, in microseconds or any other unit.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<f64>);

/// What is printed of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Spread {
    /// Median.
    pub(super) p50: f64,
    /// 99th percentile (nearest rank).
    pub(super) p99: f64,
    /// Largest.
    pub(super) max: f64,
    /// Number of samples.
    pub(super) n: usize,
}

impl Samples {
    /// Adds one.
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a span of nanoseconds as microseconds.
    pub(super) fn push_ns(&mut self, nanoseconds: u64) {
        self.0.push(nanoseconds as f64 / 1e3);
    }

    /// The spread; all zero without samples.
    pub(super) fn spread(&self) -> Spread {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
            sorted.get(rank).copied().map_or(0.0, tenths)
        };
        Spread { p50: rank(50), p99: rank(99), max: rank(100), n: sorted.len() }
    }

    /// The median of an even number of samples is the mean of the two in the middle. Zero without samples.
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => 0.0,
            length if length % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    /// Smallest and largest.
    pub(super) fn range(&self) -> (f64, f64) {
        let min = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let max = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if self.0.is_empty() { (0.0, 0.0) } else { (min, max) }
    }
}

/// The header of a table of spreads.
pub(super) fn header(title: &str) -> String {
    format!("{title:<34} {:>10} {:>10} {:>10} {:>6}\n", "p50", "p99", "max", "n")
}

/// A line of a table of spreads, from a report.
pub(super) fn line(name: &str, spread: &serde_json::Value) -> String {
    let [p50, p99, max, n] = ["p50", "p99", "max", "n"].map(|field| spread[field].to_string());
    format!("{name:<34} {p50:>10} {p99:>10} {max:>10} {n:>6}\n")
}

/// Rounded to tenths: more digits would claim more than was measured.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Rounded to `digits` decimals.
pub(super) fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10_f64.powi(digits);
    (value * unit).round() / unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let mut samples = Samples::default();
        (1..=200).rev().for_each(|value| samples.push(f64::from(value)));
        assert_eq!(samples.spread(), Spread { p50: 100.0, p99: 198.0, max: 200.0, n: 200 });
        assert!((samples.median() - 100.5).abs() < 1e-9);
        assert_eq!(samples.range(), (1.0, 200.0));
    }

    #[test]
    fn nothing_is_zero() {
        assert_eq!(Samples::default().spread(), Spread::default());
        assert_eq!(Samples::default().range(), (0.0, 0.0));
    }
}
