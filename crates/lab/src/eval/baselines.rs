//! What others would run on the same telemetry: detectors without any knowledge of devices, one causal pass each.
//!
//! Every one gives a score per row; an alarm is a score beyond a threshold, which is set afterwards, for all runs alike, so that it raises as many
//! false alarms as the model does.

use warmswap_predict::{FEATURE_COUNT, FEATURES, Feature, Record, Role, SeriesDetector, Unit};

/// Rows that say what is usual.
pub(crate) const BURN_IN: usize = 40;

/// A detector.
pub(crate) trait Scorer {
    /// How unusual a row is; nothing during the burn-in. What is missing is NaN.
    fn step(&mut self, row: &[f32]) -> Option<f32>;
}

/// The baselines by name.
pub(crate) const BASELINES: [&str; 7] = [
    "frozen z",
    "exponentially weighted z",
    "sigma x 4 rows",
    "half-space trees",
    "random cut forest",
    "principal components",
    "static",
];

/// A new one.
pub(crate) fn baseline(name: &str, columns: usize, burn_in: usize) -> Box<dyn Scorer> {
    match name {
        "frozen z" => Box::new(FrozenZ::new(columns, burn_in, 1)),
        "sigma x 4 rows" => Box::new(FrozenZ::new(columns, burn_in, 4)),
        "exponentially weighted z" => {
            Box::new(Weighted(Box::new(SeriesDetector::new(columns, burn_in as u32, false)), burn_in, 0))
        }
        "half-space trees" => Box::new(super::trees::HalfSpaceTrees::new(columns, burn_in, 1)),
        "random cut forest" => Box::new(Forest::new(columns, burn_in)),
        "principal components" => Box::new(super::components::Components::new(columns, burn_in)),
        "static" => Box::new(Static { rows: 0, burn_in }),
        other => unreachable!("{other} is no baseline"),
    }
}

/// A record as a row: everything but what tells of the measurement, logarithms of what has a heavy tail.
pub(crate) fn row(record: &Record) -> [f32; FEATURE_COUNT] {
    std::array::from_fn(|at| {
        let feature = Feature::ALL[at];
        let value = record.get(feature).filter(|_| FEATURES[at].role != Role::Quality);
        match (value, feature.spec().unit) {
            (None, _) => f32::NAN,
            (Some(value), Unit::Share) => value,
            (Some(value), _) => value.max(0.0).ln_1p(),
        }
    })
}

/// Scores against mean and deviation of the burn-in. Of one row the mean square; of several the least, over the last ones, of the greatest.
struct FrozenZ {
    burn_in: usize,
    rows: usize,
    sums: Vec<(f64, f64, f64)>,
    in_a_row: usize,
    last: Vec<f32>,
}

impl FrozenZ {
    fn new(columns: usize, burn_in: usize, in_a_row: usize) -> Self {
        FrozenZ { burn_in, rows: 0, sums: vec![(0.0, 0.0, 0.0); columns], in_a_row, last: Vec::new() }
    }
}

impl Scorer for FrozenZ {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        self.rows += 1;
        let there = self.sums.iter_mut().zip(row).filter(|(_, value)| value.is_finite());
        if self.rows <= self.burn_in {
            there.for_each(|((count, sum, squares), value)| {
                let value = f64::from(*value);
                (*count, *sum, *squares) = (*count + 1.0, *sum + value, *squares + value * value);
            });
            return None;
        }
        let scores: Vec<f32> = there
            .filter(|((count, ..), _)| *count >= 2.0)
            .map(|((count, sum, squares), value)| {
                let mean = *sum / *count;
                let deviation = (*squares / *count - mean * mean).max(0.0).sqrt().max(0.01 * mean.abs()).max(0.01);
                ((f64::from(*value) - mean) / deviation) as f32
            })
            .collect();
        if self.in_a_row == 1 {
            return Some(scores.iter().map(|score| score * score).sum::<f32>() / scores.len().max(1) as f32);
        }
        self.last.push(scores.iter().map(|score| score.abs()).fold(0.0, f32::max));
        let last = &self.last[self.last.len().saturating_sub(self.in_a_row)..];
        Some(if last.len() < self.in_a_row { 0.0 } else { last.iter().copied().fold(f32::INFINITY, f32::min) })
    }
}

/// Our own detector of series, on all columns alike.
struct Weighted(Box<SeriesDetector<FEATURE_COUNT>>, usize, usize);

impl Scorer for Weighted {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        self.2 += 1;
        let scored = self.0.step(row, &[]);
        (self.2 > self.1).then_some(scored.score)
    }
}

/// A random cut forest (S. Guha et al., Robust random cut forest based anomaly detection on streams, ICML 2016), of the crate `rcf3`: 50 trees of 256 points.
struct Forest {
    forest: rcf3::Forest,
    rows: usize,
    burn_in: usize,
}

impl Forest {
    fn new(columns: usize, burn_in: usize) -> Self {
        let forest = rcf3::Forest::builder(columns).num_trees(50).capacity(256).shingle_size(1).output_after(1).seed(1);
        Forest { forest: forest.build().expect("a forest of this size can be made"), rows: 0, burn_in }
    }
}

impl Scorer for Forest {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        self.rows += 1;
        let row: Vec<f32> = row.iter().map(|value| if value.is_finite() { *value } else { 0.0 }).collect();
        let score = self.forest.update_and_score(&row).expect("a row of finite values is taken");
        (self.rows > self.burn_in).then_some(score as f32)
    }
}

/// A static threshold on the greatest latency: what a monitoring rule would watch.
struct Static {
    rows: usize,
    burn_in: usize,
}

impl Scorer for Static {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        self.rows += 1;
        let watched = [Feature::LatencyMean, Feature::LatencyP99, Feature::OldestAge, Feature::Gap];
        let greatest = watched.map(|feature| row.get(feature as usize).copied().unwrap_or(0.0));
        (self.rows > self.burn_in).then(|| greatest.into_iter().fold(0.0, f32::max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(step: usize, column: usize) -> f32 {
        let mixed = (step as u32 * 64 + column as u32).wrapping_mul(0x9e37_79b9);
        let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85eb_ca6b);
        ((mixed ^ (mixed >> 13)) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    #[test]
    fn each_scores_a_row_that_is_unlike_the_others_highest() {
        for name in BASELINES {
            let columns = FEATURE_COUNT;
            let mut scorer = baseline(name, columns, BURN_IN);
            let (mut usual, mut unusual) = (f32::NEG_INFINITY, 0.0);
            for step in 0..300 {
                let mut row: Vec<f32> = (0..columns).map(|at| 5.0 + noise(step, at)).collect();
                if step >= 295 {
                    row.iter_mut().for_each(|value| *value += 8.0);
                }
                let score = scorer.step(&row);
                assert_eq!(score.is_none(), step < BURN_IN, "{name}, row {step}");
                match score {
                    Some(score) if step < 295 => usual = usual.max(score),
                    Some(score) => unusual = score,
                    None => {}
                }
            }
            assert!(unusual > usual, "{name}: {unusual} against {usual}");
        }
    }
}
