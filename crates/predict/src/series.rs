//! The detector on any multivariate series: how unusual each row is, and which columns make it so, in one causal pass.
//!
//! Per column a robust score ([`Scale`]) of what context does not explain ([`Regression`]), and of that the part that the other columns do not
//! explain ([`Relation`]); over columns the mean magnitude, which sees many small changes at once, and a little of the mean of sixth powers, in which
//! one column of many does not drown; over rows means that fade, fast and slowly, for changes that are short and that last. Rows that are
//! unusual as a whole teach nothing. Simpler and other stages were measured against this: see `lab eval series`.

use crate::evidence::Evidence;
use crate::regress::Regression;
use crate::relation::Relation;
use crate::scale::{Scale, Z_MAX};

/// Most columns of context.
pub const CONTEXT_MAX: usize = 8;
/// A score is the mean of two exponentially weighted means, in which a row weighs as one of so many.
const SMOOTHED: [f32; 2] = [4.0, 30.0];
/// The first so many rows are usual whatever they are.
const USUAL_FIRST: f32 = 10.0;
/// What the mean of sixth powers counts in a row's score; the rest is the mean magnitude's.
const GREATEST_SHARE: f32 = 0.1;
/// Rows that a column's location and scale remember: a half-life of 2,000.
const MEMORY: f32 = 2_885.0;
/// How unusual rows usually are is first estimated of so many.
const USUAL_START: f32 = 100.0;
/// A row whose mean squared score, each at most 25, is beyond this teaches nothing.
const GATE: f32 = 12.0;
/// See `GATE`.
const SQUARE_MAX: f32 = 25.0;
/// No column's deviation is taken for less than this part of the largest value it had.
const FLOOR_SHARE: f32 = 0.005;
/// Context further from its mean than so many deviations counts as that far.
const TERM_MAX: f32 = 30.0;
/// Harm is the logarithm of how much more unusual a row is than rows usually are; it is whole at this many times.
const HARM_TIMES: f32 = 8.0;
/// What is borne with of it.
const TOLERANCE: f32 = 0.35;
/// Rows between false alarms, in the mean, as long as harm is within the tolerance.
const ROWS_PER_FALSE_ALARM: f32 = 1e5;

/// A cause of an unusual row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ColumnCause {
    /// The column.
    pub column: usize,
    /// Its score: how many deviations from what was expected, of itself or, if that is more, by the other columns, with its sign.
    pub score: f32,
    /// Its part of the sum of the sixth powers of all columns' scores, 0 to 1.
    pub share: f32,
}

/// What is said of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// How unusual it and those before it are, in deviations, the latest most: half of the score are of the last six; 0 during the burn-in.
    pub score: f32,
    /// Whether there is evidence of a change that is not a false alarm.
    pub alarm: bool,
    /// The columns that contribute most to this row's own score, the greatest first.
    pub causes: [Option<ColumnCause>; 3],
}

/// A detector for up to `N` columns. Most of it are the `N` times `N` numbers of [`Relation`]: 64 KiB where `N` is 128.
#[derive(Clone, Debug)]
pub struct SeriesDetector<const N: usize> {
    columns: usize,
    burn_in: u32,
    rows: u32,
    scales: [Scale; N],
    /// Largest magnitude of each column.
    largest: [f32; N],
    regression: Option<Regression<{ CONTEXT_MAX + 1 }, N>>,
    contexts: [Scale; CONTEXT_MAX],
    relation: Relation<N>,
    smoothed: [f32; SMOOTHED.len()],
    usual: Scale,
    evidence: Evidence,
}

impl<const N: usize> SeriesDetector<N> {
    /// For rows of `columns`, of which the first `burn_in` rows say what is usual. `with_context`: rows come with context.
    ///
    /// # Panics
    /// If there are more than `N` columns.
    #[must_use]
    pub fn new(columns: usize, burn_in: u32, with_context: bool) -> Self {
        assert!(columns <= N, "{columns} columns, at most {N}");
        SeriesDetector {
            columns,
            burn_in,
            rows: 0,
            scales: [Scale::default(); N],
            largest: [0.0; N],
            regression: with_context.then(Regression::default),
            contexts: [Scale::default(); CONTEXT_MAX],
            relation: Relation::new(columns),
            smoothed: [0.0; SMOOTHED.len()],
            usual: Scale::default(),
            evidence: Evidence::default(),
        }
    }

    /// Scores a row, then learns it. A value that is not finite is missing. `context` has at most [`CONTEXT_MAX`] terms.
    pub fn step(&mut self, row: &[f32], context: &[f32]) -> Scored {
        let terms = self.terms(context);
        for (largest, value) in self.largest.iter_mut().zip(row).filter(|(_, value)| value.is_finite()) {
            *largest = largest.max(value.abs());
        }
        let residuals: [f32; N] = core::array::from_fn(|at| match row.get(at).filter(|value| value.is_finite()) {
            Some(value) if at < self.columns => self.residual(at, *value, &terms),
            _ => f32::NAN,
        });
        let mut scores: [f32; N] = core::array::from_fn(|at| self.score(at, residuals[at]));
        let is_missing = |at: usize| !residuals[at].is_finite();
        self.relation.fill(&mut scores, is_missing);
        let mut related = self.relation.scores(&scores).map(|score| score.clamp(-Z_MAX, Z_MAX));
        (0..self.columns).filter(|at| is_missing(*at)).for_each(|at| related[at] = 0.0);
        let burning = self.rows < self.burn_in;
        self.rows = self.rows.saturating_add(1);
        let squares = scores[..self.columns].iter().map(|score| (score * score).min(SQUARE_MAX)).sum::<f32>();
        if burning || squares < GATE * self.columns as f32 {
            self.learn(&residuals, &terms, burning);
            self.relation.learn(&scores);
        }
        if burning {
            return Scored { score: 0.0, alarm: false, causes: [None; 3] };
        }
        let score = self.joint(&related);
        let causes = core::array::from_fn(|at| match (scores[at], related[at]) {
            _ if is_missing(at) => 0.0,
            (of_itself, by_others) if of_itself.abs() > by_others.abs() => of_itself,
            (_, by_others) => by_others,
        });
        Scored { score, alarm: self.is_alarm(score), causes: self.causes(&causes) }
    }

    /// The terms of the regression: 1 and the context, each in its own deviations of the burn-in.
    fn terms(&mut self, context: &[f32]) -> [f32; CONTEXT_MAX + 1] {
        let mut terms = [0.0; CONTEXT_MAX + 1];
        terms[0] = 1.0;
        for ((term, scale), value) in terms[1..].iter_mut().zip(&mut self.contexts).zip(context) {
            if value.is_finite() {
                if self.rows < self.burn_in {
                    scale.learn(*value, f32::INFINITY, 0.0);
                }
                let floor = (1e-3 * scale.mean().abs()).max(f32::MIN_POSITIVE);
                *term = ((value - scale.mean()) / scale.deviation(floor)).clamp(-TERM_MAX, TERM_MAX);
            }
        }
        terms
    }

    fn residual(&self, at: usize, value: f32, terms: &[f32; CONTEXT_MAX + 1]) -> f32 {
        self.regression.as_ref().map_or(value, |regression| value - regression.expected(at, terms))
    }

    fn floor(&self, at: usize) -> f32 {
        (FLOOR_SHARE * self.largest[at]).max(f32::MIN_POSITIVE)
    }

    /// Of a missing value nothing is known.
    fn score(&self, at: usize, residual: f32) -> f32 {
        if residual.is_finite() { self.scales[at].score(residual, self.floor(at)) } else { 0.0 }
    }

    fn joint(&mut self, scores: &[f32; N]) -> f32 {
        let (scores, count) = (&scores[..self.columns], self.columns.max(1) as f32);
        let mean = scores.iter().map(|score| score.abs()).sum::<f32>() / count;
        let greatest = libm::powf(scores.iter().map(|score| sixth(*score)).sum::<f32>() / count, 1.0 / 6.0);
        let score = mean + GREATEST_SHARE * (greatest - mean);
        let seen = self.rows.saturating_sub(self.burn_in).max(1) as f32;
        for (smoothed, rows) in self.smoothed.iter_mut().zip(SMOOTHED).filter(|_| score.is_finite()) {
            *smoothed += (score - *smoothed) / rows.min(seen);
        }
        self.smoothed.iter().sum::<f32>() / SMOOTHED.len() as f32
    }

    fn learn(&mut self, residuals: &[f32; N], terms: &[f32; CONTEXT_MAX + 1], burning: bool) {
        let memory = if burning { f32::INFINITY } else { MEMORY };
        let gain = self.regression.as_mut().and_then(|regression| regression.excite(terms));
        let there = residuals[..self.columns].iter().copied().enumerate().filter(|(_, residual)| residual.is_finite());
        for (at, residual) in there {
            let floor = self.floor(at);
            if let (Some(regression), Some(gain)) = (&mut self.regression, &gain) {
                let most = if burning { f32::INFINITY } else { 3.0 * self.scales[at].deviation(floor) };
                regression.learn(at, residual.clamp(-most, most), gain);
            }
            self.scales[at].learn(residual, memory, floor);
        }
    }

    fn is_alarm(&mut self, score: f32) -> bool {
        let times = score / self.usual.mean().max(0.1);
        let harm = libm::logf(times.max(1.0)) / libm::logf(HARM_TIMES);
        if self.usual.count() < USUAL_FIRST || harm < TOLERANCE {
            let memory = if self.usual.count() < USUAL_START { f32::INFINITY } else { MEMORY };
            self.usual.learn(score, memory, 0.01);
        }
        self.evidence.see(harm, TOLERANCE);
        let alarm = self.evidence.value() >= ROWS_PER_FALSE_ALARM;
        if alarm {
            self.evidence.clear();
        }
        alarm
    }

    fn causes(&self, scores: &[f32; N]) -> [Option<ColumnCause>; 3] {
        let sum: f32 = scores[..self.columns].iter().map(|score| sixth(*score)).sum();
        let mut causes: [Option<ColumnCause>; 3] = [None; 3];
        if sum <= 0.0 {
            return causes;
        }
        for (column, score) in scores[..self.columns].iter().copied().enumerate() {
            let cause = ColumnCause { column, score, share: sixth(score) / sum };
            let place = causes.iter().position(|other| other.is_none_or(|other| other.share < cause.share));
            if let Some(place) = place.filter(|_| cause.share > 0.0) {
                causes[place..].rotate_right(1);
                causes[place] = Some(cause);
            }
        }
        causes
    }
}

fn sixth(value: f32) -> f32 {
    let square = value * value;
    square * square * square
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(step: u32, column: u32) -> f32 {
        let mixed = (step * 64 + column).wrapping_mul(0x9e37_79b9);
        let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85eb_ca6b);
        ((mixed ^ (mixed >> 13)) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    #[test]
    fn an_unusual_column_is_found_and_named() {
        let mut detector = SeriesDetector::<8>::new(4, 200, false);
        let (mut last, mut usual) = (None, 0.0_f32);
        for step in 0..400 {
            let mut row: [f32; 4] = core::array::from_fn(|at| 10.0 + noise(step, at as u32));
            row[3] = 5.0;
            if step >= 390 {
                row[2] += 6.0;
            }
            last = Some(detector.step(&row, &[]));
            let scored = last.expect("just set");
            assert_eq!(scored.score == 0.0, step < 200, "{step}");
            usual = usual.max(if step < 390 { scored.score } else { 0.0 });
        }
        let last = last.expect("there were rows");
        assert!(usual < 1.0 && last.score > 2.5 * usual, "{usual}: {last:?}");
        assert_eq!(last.causes[0].map(|cause| cause.column), Some(2));
        assert!(last.causes[0].expect("it is there").share > 0.9);
    }

    #[test]
    fn a_change_that_lasts_raises_one_alarm_after_the_other_and_noise_none() {
        let mut detector = SeriesDetector::<2>::new(2, 200, false);
        let mut alarms = [0, 0];
        for step in 0..4_000 {
            let shift = if step >= 3_000 { 20.0 } else { 0.0 };
            let row = [noise(step, 0) + shift, noise(step, 1) + shift];
            alarms[usize::from(step >= 3_000)] += u32::from(detector.step(&row, &[]).alarm);
        }
        assert_eq!(alarms[0], 0);
        assert!(alarms[1] > 10, "{alarms:?}");
    }

    #[test]
    fn what_the_context_explains_is_not_unusual() {
        let run = |with_context: bool| {
            let mut detector = SeriesDetector::<2>::new(1, 300, with_context);
            let mut greatest = 0.0_f32;
            for step in 0..900 {
                let load = if step >= 600 { 30.0 } else { 10.0 + 5.0 * noise(step, 0) };
                let row = [3.0 * load + 0.1 * noise(step, 1)];
                greatest = greatest.max(detector.step(&row, &[load]).score);
            }
            greatest
        };
        assert!(run(false) > 4.0);
        assert!(run(true) < 3.0, "{}", run(true));
    }

    #[test]
    fn a_column_that_leaves_its_relation_is_found_within_its_own_bounds_and_its_absence_is_not() {
        let run = |third: fn(f32, f32) -> f32| {
            let mut detector = SeriesDetector::<4>::new(3, 500, false);
            let mut greatest = [0.0_f32; 2];
            for step in 0..2_000 {
                let load = 10.0 * noise(step, 0);
                let row = [load, 2.0 * load + noise(step, 1), load - noise(step, 2)];
                let row = if step < 1_960 { row } else { [row[0], row[1], third(row[2], noise(step, 3))] };
                let scored = detector.step(&row, &[]);
                greatest[usize::from(step >= 1_960)] = greatest[usize::from(step >= 1_960)].max(scored.score);
            }
            greatest[1] / greatest[0]
        };
        assert!(run(|_, other| 10.0 * other) > 1.5, "{}", run(|_, other| 10.0 * other));
        assert!(run(|_, _| f32::NAN) < 1.2, "{}", run(|_, _| f32::NAN));
        assert!(run(|value, _| value) < 1.2, "{}", run(|value, _| value));
    }

    #[test]
    fn what_is_missing_is_not_unusual() {
        let mut detector = SeriesDetector::<2>::new(2, 50, false);
        for step in 0..200 {
            let row = [noise(step, 0), if step % 3 == 0 { f32::NAN } else { 1.0 }];
            assert!(detector.step(&row, &[]).score < 2.5);
        }
        assert_eq!(detector.step(&[f32::NAN, f32::INFINITY], &[]).causes, [None; 3]);
    }
}
