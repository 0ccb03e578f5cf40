//! VUS-PR and VUS-ROC: the volume under the precision-recall surface, and under the ROC surface, of a scored and labelled series.
//!
//! The measure of Paparrizos et al., "Volume Under the Surface" (PVLDB 15(11), 2022), with the definition that the benchmark
//! TSB-AD uses (`RangeAUC_volume_opt`). A label says when something was wrong, give or take; so each run of labelled rows is
//! extended on both sides by half of a window, with a weight that falls with the distance, and the area under the curve is
//! averaged over all windows from 0 to the longest. For one window `w` with half `h = w / 2`, rounded down:
//!
//! * A row at distance `d <= h` of a run weighs `sqrt(1 - d/w)`; the weights from several runs are added, and cut at 1. A
//!   labelled row weighs 1.
//! * The runs with their flanks are the zones; runs whose flanks meet or overlap share one.
//! * The rows at or above a threshold are flagged. `TP` is the weight of the flagged rows. `P` is the number of labelled rows plus
//!   half of the flagged weight beside them.
//! * Recall is `TP / P`, cut at 1, times the share of zones with a flagged row in them. Precision is `TP` over the number of
//!   flagged rows. The false positive rate is the flagged weightless rest over `rows - P`.
//! * The 250 thresholds are scores at equal distances in the sorted order, the largest and the smallest among them. The curve
//!   starts at recall 0, rate 0 and precision 1. The ROC curve alone ends at (1, 1).
//! * The area under the precision-recall curve is the sum of each gain in recall times the precision after it. Recall may fall
//!   from one threshold to the next; that gain is negative, as in the original.
//!
//! Pure arithmetic: no files, no clock.

use std::fmt;
use std::ops::RangeInclusive;

/// Thresholds of a curve.
const THRESHOLDS: usize = 250;

/// A series that can be judged: as many scores as labels, all finite, with rows of both kinds.
#[derive(Debug)]
pub(crate) struct Series<'a> {
    labels: &'a [bool],
    scores: &'a [f64],
}

/// Why a series has no volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There are more labels than scores, or fewer.
    Lengths {
        /// Rows with a label.
        labels: usize,
        /// Rows with a score.
        scores: usize,
    },
    /// A score is no number, or infinite.
    NotFinite {
        /// Its row, from 1.
        row: usize,
    },
    /// There are no rows.
    Empty,
    /// Every label is 0.
    NothingLabelled,
    /// Every label is 1.
    AllLabelled,
}

/// The volumes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Volume {
    /// Under the precision-recall surface.
    pub(crate) pr: f64,
    /// Under the ROC surface.
    pub(crate) roc: f64,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Lengths { labels, scores } => write!(f, "{labels} rows with a label, but {scores} with a score"),
            Refusal::NotFinite { row } => write!(f, "the score of row {row} is not finite"),
            Refusal::Empty => f.write_str("there are no rows"),
            Refusal::NothingLabelled => f.write_str("every label is 0: there is nothing to find"),
            Refusal::AllLabelled => f.write_str("every label is 1: there is nothing to find it in"),
        }
    }
}

impl std::error::Error for Refusal {}

impl<'a> Series<'a> {
    /// The series, if it can be judged.
    pub(crate) fn new(labels: &'a [bool], scores: &'a [f64]) -> Result<Self, Refusal> {
        if labels.len() != scores.len() {
            return Err(Refusal::Lengths { labels: labels.len(), scores: scores.len() });
        }
        if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
            return Err(Refusal::NotFinite { row: at + 1 });
        }
        if labels.is_empty() {
            return Err(Refusal::Empty);
        }
        if !labels.contains(&true) {
            return Err(Refusal::NothingLabelled);
        }
        if !labels.contains(&false) {
            return Err(Refusal::AllLabelled);
        }
        Ok(Series { labels, scores })
    }

    /// The volumes over all windows from 0 to `window_max`.
    pub(crate) fn volume(&self, window_max: usize) -> Volume {
        let mut surface = Surface::new(self);
        let (mut pr, mut roc) = (0.0, 0.0);
        for window in 0..=window_max {
            let area = surface.area(window);
            pr += area.pr;
            roc += area.roc;
        }
        let windows = (window_max + 1) as f64;
        Volume { pr: pr / windows, roc: roc / windows }
    }
}

/// A count or a weight for each threshold.
type PerThreshold = [f64; THRESHOLDS];

/// What is the same for all windows. A row is known by the first threshold that flags it: all that follow do, too.
struct Surface<'a> {
    labels: &'a [bool],
    /// The runs of labelled rows, in order.
    runs: Vec<RangeInclusive<usize>>,
    /// For each row the first threshold that flags it.
    first: Vec<usize>,
    /// Flagged rows.
    flagged: PerThreshold,
    /// Flagged rows with a label.
    hits: PerThreshold,
    /// Rows with a label.
    labelled: f64,
    /// For each row its weight in the window that is looked at; all zero in between.
    weights: Vec<f64>,
}

impl<'a> Surface<'a> {
    fn new(series: &Series<'a>) -> Self {
        let thresholds = thresholds(series.scores);
        // The last threshold is the smallest score, so there is one for every row.
        let first: Vec<usize> =
            series.scores.iter().map(|score| thresholds.partition_point(|threshold| threshold > score)).collect();
        let (mut flagged, mut hits) = ([0.0; THRESHOLDS], [0.0; THRESHOLDS]);
        for (&at, &label) in first.iter().zip(series.labels) {
            flagged[at] += 1.0;
            if label {
                hits[at] += 1.0;
            }
        }
        accumulate(&mut flagged);
        accumulate(&mut hits);
        Surface {
            labels: series.labels,
            runs: runs(series.labels),
            labelled: hits[THRESHOLDS - 1],
            weights: vec![0.0; first.len()],
            first,
            flagged,
            hits,
        }
    }

    /// The areas under both curves of one window.
    fn area(&mut self, window: usize) -> Volume {
        let beside = self.weight_beside_the_runs(window);
        let (found, zones) = self.zones_found(window / 2);
        let rows = self.labels.len() as f64;
        let (mut pr, mut roc) = (0.0, 0.0);
        let (mut recall, mut rate) = (0.0, 0.0);
        for at in 0..THRESHOLDS {
            let (before, rate_before) = (recall, rate);
            let hits = self.hits[at] + beside[at];
            let positives = self.labelled + beside[at] / 2.0;
            recall = (hits / positives).min(1.0) * (found[at] / zones);
            rate = (self.flagged[at] - hits) / (rows - positives);
            pr += (recall - before) * (hits / self.flagged[at]);
            roc += (rate - rate_before) * (recall + before) / 2.0;
        }
        roc += (1.0 - rate) * (1.0 + recall) / 2.0;
        Volume { pr, roc }
    }

    /// For each threshold the weight of the flagged rows that have none but for the window.
    fn weight_beside_the_runs(&mut self, window: usize) -> PerThreshold {
        let last = self.labels.len() - 1;
        let falling: Vec<f64> = (1..=window / 2).map(|d| (1.0 - d as f64 / window as f64).sqrt()).collect();
        for run in &self.runs {
            for (before, weight) in (0..*run.start()).rev().zip(&falling) {
                self.weights[before] += weight;
            }
            for (after, weight) in (run.end() + 1..=last).zip(&falling) {
                self.weights[after] += weight;
            }
        }
        // What is taken leaves a zero: a row in the reach of two runs is counted once.
        let mut beside = [0.0; THRESHOLDS];
        for zone in zones(&self.runs, window / 2, last) {
            for row in zone {
                let weight = std::mem::take(&mut self.weights[row]).min(1.0);
                if !self.labels[row] {
                    beside[self.first[row]] += weight;
                }
            }
        }
        accumulate(&mut beside);
        beside
    }

    /// For each threshold the zones with a flagged row, and the number of zones.
    fn zones_found(&self, half: usize) -> (PerThreshold, f64) {
        let mut found = [0.0; THRESHOLDS];
        let mut count = 0.0;
        for zone in zones(&self.runs, half, self.labels.len() - 1) {
            let first = self.first[zone].iter().min().expect("a zone holds its run, which has a row");
            found[*first] += 1.0;
            count += 1.0;
        }
        accumulate(&mut found);
        (found, count)
    }
}

/// The thresholds, falling: scores at equal distances in their order, the largest and the smallest among them.
fn thresholds(scores: &[f64]) -> PerThreshold {
    let mut falling = scores.to_vec();
    falling.sort_unstable_by(|a, b| b.total_cmp(a));
    let last = falling.len() - 1;
    // The step is rounded before it is multiplied, and the product is cut: other orders give other rows.
    let step = last as f64 / (THRESHOLDS - 1) as f64;
    let mut thresholds: PerThreshold = std::array::from_fn(|at| falling[((at as f64 * step) as usize).min(last)]);
    thresholds[THRESHOLDS - 1] = falling[last];
    thresholds
}

/// The runs of labelled rows, in order.
fn runs(labels: &[bool]) -> Vec<RangeInclusive<usize>> {
    let mut runs: Vec<RangeInclusive<usize>> = Vec::new();
    for (row, _) in labels.iter().enumerate().filter(|(_, label)| **label) {
        match runs.last_mut() {
            Some(run) if run.end() + 1 == row => *run = *run.start()..=row,
            _ => runs.push(row..=row),
        }
    }
    runs
}

/// The runs with `half` rows on either side, as far as there are rows; those that share a row are one.
fn zones(runs: &[RangeInclusive<usize>], half: usize, last: usize) -> Vec<RangeInclusive<usize>> {
    let mut zones: Vec<RangeInclusive<usize>> = Vec::new();
    for run in runs {
        let (start, end) = (run.start().saturating_sub(half), (run.end() + half).min(last));
        match zones.last_mut() {
            Some(zone) if *zone.end() >= start => *zone = *zone.start()..=end,
            _ => zones.push(start..=end),
        }
    }
    zones
}

/// Makes of what each threshold adds what it has.
fn accumulate(values: &mut PerThreshold) {
    let mut sum = 0.0;
    for value in values {
        sum += *value;
        *value = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many rows, of which these runs are labelled.
    fn labels(rows: usize, runs: &[RangeInclusive<usize>]) -> Vec<bool> {
        (0..rows).map(|row| runs.iter().any(|run| run.contains(&row))).collect()
    }

    fn listed(scores: &str) -> Vec<f64> {
        scores.split(' ').map(|score| score.parse().unwrap()).collect()
    }

    /// Scores that are whole numbers below `modulus`, in no order.
    fn mix(rows: u32, square: u32, linear: u32, modulus: u32) -> Vec<f64> {
        (0..rows).map(|row| f64::from((square * row * row + linear * row) % modulus)).collect()
    }

    fn check(name: &str, labels: &[bool], scores: &[f64], window: usize, original: [f64; 2]) {
        let Volume { pr, roc } = Series::new(labels, scores).unwrap().volume(window);
        let difference = (pr - original[0]).abs().max((roc - original[1]).abs());
        assert!(difference < 1e-12, "{name}: expected {original:?}, found {:?}", [pr, roc]);
    }

    /// The figures were printed by the original: `RangeAUC_volume_opt` of TSB-AD at 87630099ea8d, with 250 thresholds, under
    /// numpy 2.4.6; VUS-PR, then VUS-ROC.
    #[test]
    fn the_volumes_are_those_of_the_original() {
        check(
            "one run in the middle, found",
            &labels(20, &[8..=10]),
            &listed("0 1 0 2 0 1 0 3 9 8 9 2 0 1 0 1 0 2 0 1"),
            4,
            [1.0, 1.0],
        );
        check(
            "one run in the middle, missed by a row",
            &labels(20, &[8..=10]),
            &listed("0 1 0 2 0 1 9 7 0 1 0 2 0 1 0 1 0 2 0 1"),
            6,
            [0.36236019438644934, 0.618148752302625],
        );
        check(
            "found late, in the flank",
            &labels(20, &[8..=10]),
            &listed("0 1 0 2 0 1 0 0 1 0 1 5 7 9 0 1 0 2 0 1"),
            7,
            [0.36261668738029923, 0.6814508917361133],
        );
        check(
            "runs at both ends",
            &labels(16, &[0..=2, 14..=15]),
            &listed("5 1 0 2 0 4 0 0 1 3 1 0 6 2 7 1"),
            9,
            [0.7248072573896138, 0.797849522908732],
        );
        check(
            "all scores equal",
            &labels(12, &[3..=4]),
            &listed("1 1 1 1 1 1 1 1 1 1 1 1"),
            5,
            [0.2990488724257405, 0.5460016876358851],
        );
        check(
            "two scores only",
            &labels(18, &[4..=6, 12..=12]),
            &listed("0 0 1 0 1 1 0 0 0 0 1 0 1 0 0 1 0 0"),
            6,
            [0.5961133080343615, 0.8462082886238308],
        );
        check(
            "flanks that overlap",
            &labels(24, &[6..=7, 10..=11, 16..=16]),
            &mix(24, 3, 5, 17),
            10,
            [0.7199760652372175, 0.8808282491277619],
        );
        check(
            "flanks that meet, and that miss each other by a row",
            &labels(30, &[5..=6, 11..=12, 18..=19]),
            &mix(30, 7, 1, 23),
            5,
            [0.439760036125304, 0.7586692023013423],
        );
        check(
            "a flank longer than the series",
            &labels(8, &[3..=3]),
            &listed("3 1 4 1 5 9 2 6"),
            40,
            [0.843520912475068, 0.9180185341966655],
        );
        check("no window", &labels(20, &[2..=4, 9..=9]), &mix(20, 1, 3, 11), 0, [0.3145833333333333, 0.703125]);
        check(
            "one row, then all",
            &labels(2, &[1..=1]),
            &listed("0.5 -0.5"),
            3,
            [0.6580248931525697, 0.3612651974744743],
        );
        check("two rows, the labelled one on top", &labels(2, &[0..=0]), &listed("0.5 -0.5"), 2, [1.0, 1.0]);
        check(
            "the labelled rows last of all",
            &labels(10, &[4..=5]),
            &listed("9 8 7 6 -1 -2 5 4 3 2"),
            3,
            [0.20960287665628086, 0.18283177319235716],
        );
        check(
            "every second row",
            &labels(21, &[1..=1, 3..=3, 5..=5, 7..=7, 9..=9, 11..=11, 13..=13, 15..=15, 17..=17, 19..=19]),
            &mix(21, 5, 2, 13),
            8,
            [0.8731690034291808, 0.8508393273860881],
        );
        check(
            "all but one row",
            &labels(15, &[0..=6, 8..=14]),
            &mix(15, 2, 7, 9),
            12,
            [0.995071595071595, 0.945054945054945],
        );
        check(
            "signs and zeroes",
            &labels(12, &[5..=6]),
            &listed("-1.5 0 -0 2.25 0 1e-300 1e300 -1e300 0 -0 0.125 3"),
            4,
            [0.7153866080031726, 0.8616692593198811],
        );
        check(
            "as many rows as thresholds",
            &labels(250, &[30..=40, 100..=100, 170..=199]),
            &mix(250, 11, 7, 241),
            25,
            [0.27455923488416123, 0.6530720487865666],
        );
        check(
            "a row more than thresholds",
            &labels(251, &[30..=40, 100..=100, 170..=199]),
            &mix(251, 11, 7, 241),
            25,
            [0.269844548064346, 0.6499480424419345],
        );
        check(
            "steps of two",
            &labels(499, &[0..=9, 200..=220, 490..=498]),
            &mix(499, 13, 17, 487),
            33,
            [0.13927011634214814, 0.5986938047833398],
        );
        check(
            "a step that is cut just below a whole number",
            &labels(319, &[50..=52, 60..=75, 200..=200, 290..=310]),
            &mix(319, 13, 29, 311),
            60,
            [0.415907391446813, 0.8214806829222944],
        );
        check(
            "many ties",
            &labels(1000, &[100..=140, 150..=151, 600..=640, 997..=999]),
            &mix(1000, 3, 1, 7),
            50,
            [0.14766295277653246, 0.6516414711565797],
        );
        check(
            "rows by the thousand",
            &labels(3000, &[10..=12, 700..=750, 760..=765, 1500..=1500, 2200..=2300, 2999..=2999]),
            &mix(3000, 19, 23, 2003),
            125,
            [0.12842103689089723, 0.7266338873612134],
        );
    }

    #[test]
    fn only_the_order_of_the_scores_counts() {
        let (labels, scores) = (labels(300, &[40..=60, 200..=203]), mix(300, 11, 7, 241));
        let stretched: Vec<f64> = scores.iter().map(|score| score.powi(3) - 1e6).collect();
        let volume = |scores: &[f64]| Series::new(&labels, scores).unwrap().volume(30);
        assert_eq!(volume(&scores), volume(&stretched));
    }

    #[test]
    fn a_detector_that_is_upside_down_is_told_from_one_that_is_not() {
        let labels = labels(300, &[40..=60, 200..=203]);
        let upright: Vec<f64> = labels.iter().map(|&label| f64::from(u8::from(label))).collect();
        let inverted: Vec<f64> = upright.iter().map(|score| -score).collect();
        let volume = |scores: &[f64]| Series::new(&labels, scores).unwrap().volume(0);
        assert!(volume(&upright).pr > 0.9 && volume(&upright).roc > 0.9);
        assert!(volume(&inverted).pr < 0.1 && volume(&inverted).roc < 0.1);
    }

    #[test]
    fn what_cannot_be_judged_is_refused_with_the_reason() {
        let refusal = |labels: &[bool], scores: &[f64]| Series::new(labels, scores).expect_err("this is refused");
        assert_eq!(refusal(&[true, false], &[1.0]), Refusal::Lengths { labels: 2, scores: 1 });
        assert_eq!(refusal(&[true, false], &[1.0, f64::NAN]), Refusal::NotFinite { row: 2 });
        assert_eq!(refusal(&[true, false], &[f64::INFINITY, 1.0]), Refusal::NotFinite { row: 1 });
        assert_eq!(refusal(&[], &[]), Refusal::Empty);
        assert_eq!(refusal(&[false, false], &[1.0, 2.0]), Refusal::NothingLabelled);
        assert_eq!(refusal(&[true, true], &[1.0, 2.0]), Refusal::AllLabelled);
    }
}
