//! What the load explains: outcomes regressed on context, a window at a time.
//!
//! Recursive least squares with one covariance for all outcomes. It forgets only along directions that the context excites (directional
//! forgetting: R. Kulhavý, Restricted exponential forgetting in real-time identification, Automatica 23(5), 1987): a guest that asks for one
//! thing for hours does not unlearn what another load costs. In information form R <- R + (rho - (1 - rho)/zeta) x x', zeta = x'Px.

use warmswap_zoo::{Animal, loose};

/// Part of the old information that remains along a direction that is seen again.
const FORGETTING: f32 = 0.999;
/// Along what is excited less than this nothing is learnt.
const EXCITED_MIN: f32 = 1e-6;
/// The covariance at the beginning: how little is known.
const KNOWN_START: f32 = 1.0;
/// Greatest trace of the covariance, per dimension.
const TRACE_MAX: f32 = 2.0 * KNOWN_START;
/// Weights beyond this are none: what is expected with them, and how far it was off, have to be numbers.
pub(crate) const WEIGHT_MAX: f32 = 1e15;

/// `OUT` outcomes as linear functions of `IN` terms of context, of which one is to be the constant 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Regression<const IN: usize, const OUT: usize> {
    covariance: [[f32; IN]; IN],
    weights: [[f32; IN]; OUT],
}

impl<const IN: usize, const OUT: usize> Default for Regression<IN, OUT> {
    fn default() -> Self {
        let mut covariance = [[0.0; IN]; IN];
        (0..IN).for_each(|at| covariance[at][at] = KNOWN_START);
        Regression { covariance, weights: [[0.0; IN]; OUT] }
    }
}

/// How an update goes: computed once for all outcomes.
#[derive(Clone, Copy, Debug)]
pub struct Gain<const IN: usize>([f32; IN]);

impl<const IN: usize, const OUT: usize> Regression<IN, OUT> {
    /// One that begins with these weights.
    #[must_use]
    pub fn from_weights(weights: [[f32; IN]; OUT]) -> Self {
        Regression { weights, ..Self::default() }
    }

    /// Its covariance and its weights, for storage.
    #[must_use]
    pub fn parts(&self) -> (&[[f32; IN]; IN], &[[f32; IN]; OUT]) {
        (&self.covariance, &self.weights)
    }

    /// Of its covariance and its weights. None if these cannot be: a number is none or beyond all, or a variance is not positive.
    #[must_use]
    pub fn from_parts(covariance: [[f32; IN]; IN], weights: [[f32; IN]; OUT]) -> Option<Self> {
        let weighs = weights.iter().flatten().all(|weight| weight.abs() <= WEIGHT_MAX);
        (weighs && is_covariance(&covariance)).then_some(Regression { covariance, weights })
    }

    /// Keeps a weight within bounds.
    pub fn bound_weight(&mut self, outcome: usize, term: usize, (least, most): (f32, f32)) {
        let weight = &mut self.weights[outcome][term];
        *weight = weight.clamp(least, most);
    }

    /// What is expected of an outcome.
    #[must_use]
    pub fn expected(&self, outcome: usize, context: &[f32; IN]) -> f32 {
        dot(&self.weights[outcome], context)
    }

    /// Learns that a context was seen. Gives how outcomes are to be learnt with it, if anything can be.
    pub fn excite(&mut self, context: &[f32; IN]) -> Option<Gain<IN>> {
        let direction: [f32; IN] = core::array::from_fn(|at| dot(&self.covariance[at], context));
        let zeta = dot(&direction, context);
        if (!zeta.is_finite() && !loose(Animal::NanInModel)) || zeta < EXCITED_MIN {
            return None;
        }
        let gain = direction.map(|part| part / (1.0 + zeta));
        let kappa = (FORGETTING * zeta - (1.0 - FORGETTING)) / (zeta * FORGETTING * (1.0 + zeta));
        for (row, one) in self.covariance.iter_mut().zip(direction) {
            for (cell, other) in row.iter_mut().zip(direction) {
                *cell -= kappa * one * other;
            }
        }
        self.bound();
        Some(Gain(gain))
    }

    /// Learns an outcome of the context that gave `gain`: `error` is how far it was from what was expected, clipped by the caller.
    pub fn learn(&mut self, outcome: usize, error: f32, gain: &Gain<IN>) {
        if error.is_finite() || loose(Animal::NanInModel) {
            let learns = |(weight, part): (&mut f32, f32)| {
                *weight = (*weight + error * part).clamp(-WEIGHT_MAX, WEIGHT_MAX);
            };
            self.weights[outcome].iter_mut().zip(gain.0).for_each(learns);
        }
    }

    /// What is not excited for long would be forgotten without bound, by rounding alone.
    fn bound(&mut self) {
        let trace: f32 = (0..IN).map(|at| self.covariance[at][at]).sum();
        if !is_covariance(&self.covariance) {
            self.covariance = Self::default().covariance;
        } else if trace > TRACE_MAX * IN as f32 {
            let down = TRACE_MAX * IN as f32 / trace;
            self.covariance.iter_mut().flatten().for_each(|cell| *cell *= down);
        }
    }
}

/// Every variance is positive, and no cell is beyond what a trace within bounds allows for, with room for one step and rounding.
fn is_covariance<const N: usize>(cells: &[[f32; N]; N]) -> bool {
    let most = 4.0 * TRACE_MAX * N as f32;
    (0..N).all(|at| cells[at][at] > 0.0) && cells.iter().flatten().all(|cell| cell.abs() <= most)
}

fn dot<const N: usize>(one: &[f32; N], other: &[f32; N]) -> f32 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(regression: &mut Regression<3, 1>, context: [f32; 3], outcome: f32) {
        let error = outcome - regression.expected(0, &context);
        if let Some(gain) = regression.excite(&context) {
            regression.learn(0, error, &gain);
        }
    }

    fn wave(step: u32) -> (f32, f32) {
        (libm::sinf(step as f32 * 0.7), libm::cosf(step as f32 * 1.3))
    }

    #[test]
    fn a_linear_law_is_learnt() {
        let mut regression = Regression::<3, 1>::default();
        for step in 0..400 {
            let (a, b) = wave(step);
            learn(&mut regression, [1.0, a, b], 2.0 + 3.0 * a - b);
        }
        assert!((regression.expected(0, &[1.0, 0.5, -0.5]) - 4.0).abs() < 0.1);
    }

    #[test]
    fn what_is_not_excited_any_more_is_not_forgotten() {
        let mut regression = Regression::<3, 1>::default();
        for step in 0..400 {
            let (a, b) = wave(step);
            learn(&mut regression, [1.0, a, b], 2.0 + 3.0 * a - b);
        }
        // One load for a long time, and a little slower.
        (0..20_000).for_each(|_| learn(&mut regression, [1.0, 0.5, 0.0], 3.6));
        assert!((regression.expected(0, &[1.0, 0.5, 0.0]) - 3.6).abs() < 0.02, "that is followed");
        let slope = regression.expected(0, &[1.0, 0.5, 1.0]) - regression.expected(0, &[1.0, 0.5, 0.0]);
        assert!((slope + 1.0).abs() < 0.1, "and the other slope is still known: {slope}");
    }

    #[test]
    fn the_covariance_stays_positive_and_bounded() {
        let mut regression = Regression::<3, 1>::default();
        for step in 0..100_000_u32 {
            let context = if step % 1000 < 3 { [1.0, 1e4, -1e4] } else { [1.0, 1e-4, 0.0] };
            learn(&mut regression, context, 1.0);
            assert!((0..3).all(|at| regression.covariance[at][at] > 0.0), "step {step}");
        }
        assert!((0..3).map(|at| regression.covariance[at][at]).sum::<f32>() <= TRACE_MAX * 3.0 * 1.001);
        learn(&mut regression, [f32::NAN; 3], 1.0);
        assert!(regression.expected(0, &[1.0, 0.0, 0.0]).is_finite());
    }

    #[test]
    fn what_cannot_be_is_no_regression() {
        let mut regression = Regression::<3, 1>::default();
        (0..50).for_each(|step| learn(&mut regression, [1.0, wave(step).0, wave(step).1], 2.0));
        let (covariance, weights) = regression.parts();
        assert_eq!(Regression::from_parts(*covariance, *weights), Some(regression.clone()));
        for (row, column, value) in [(1, 1, 0.0), (0, 0, -1.0), (0, 2, f32::NAN), (2, 2, f32::INFINITY)] {
            let mut other = *covariance;
            other[row][column] = value;
            assert_eq!(Regression::from_parts(other, *weights), None, "{value}");
        }
        assert_eq!(Regression::from_parts(*covariance, [[0.0, f32::NAN, 0.0]]), None);
    }
}
