//! What is known of one component: what its outcomes are at a given load, and by how much they vary.

use crate::outcomes::{CONTEXT_COUNT, DEPTH, Kind, OUTCOME_COUNT, OUTCOMES};
use crate::record::Record;
use crate::regress::Regression;
use crate::scale::Scale;
use crate::trained::Trained;

/// Innovations beyond so many deviations count as that many.
const CLIP: f32 = 3.0;

/// Outcomes of one window on their scales, NaN where they are missing, and its context.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) outcomes: [f32; OUTCOME_COUNT],
    pub(crate) context: [f32; CONTEXT_COUNT],
}

impl Seen {
    pub(crate) fn of(record: &Record) -> Self {
        let outcome = |at| crate::outcomes::outcome(record, at).filter(|value| value.is_finite()).unwrap_or(f32::NAN);
        Seen { outcomes: core::array::from_fn(outcome), context: crate::outcomes::context(record) }
    }
}

/// What is known of one component.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Knowledge {
    regression: Regression<CONTEXT_COUNT, OUTCOME_COUNT>,
    scales: [Scale; OUTCOME_COUNT],
}

impl Knowledge {
    pub(crate) fn new(trained: &Trained) -> Self {
        Knowledge { regression: Regression::from_weights(trained.weights), scales: [Scale::default(); OUTCOME_COUNT] }
    }

    /// Of a regression and scales that were stored.
    pub(crate) fn from_parts(
        regression: Regression<CONTEXT_COUNT, OUTCOME_COUNT>,
        scales: [Scale; OUTCOME_COUNT],
    ) -> Self {
        Knowledge { regression, scales }
    }

    /// Its regression and its scales, for storage.
    pub(crate) fn parts(&self) -> (&Regression<CONTEXT_COUNT, OUTCOME_COUNT>, &[Scale; OUTCOME_COUNT]) {
        (&self.regression, &self.scales)
    }

    /// What is expected of an outcome at this load.
    pub(crate) fn expected(&self, at: usize, context: &[f32; CONTEXT_COUNT]) -> f32 {
        self.regression.expected(at, context) + self.scales[at].mean()
    }

    /// Number of windows that an outcome was learnt from.
    pub(crate) fn count(&self, at: usize) -> f32 {
        self.scales[at].count()
    }

    /// How much worse each outcome is than expected, and the same in deviations; NaN where it is missing or nothing is known of it.
    pub(crate) fn residuals(&self, seen: &Seen, floors: &[f32; OUTCOME_COUNT]) -> [(f32, f32); OUTCOME_COUNT] {
        core::array::from_fn(|at| {
            if self.count(at) < Scale::START {
                return (f32::NAN, f32::NAN);
            }
            let residual = seen.outcomes[at] - self.expected(at, &seen.context);
            (residual, residual / self.scales[at].deviation(floors[at]))
        })
    }

    /// Learns a window, of which each outcome weighs as one of `memory`, or as one of all if that is infinite.
    pub(crate) fn learn(&mut self, seen: &Seen, memory: f32, floors: &[f32; OUTCOME_COUNT]) {
        let gain = self.regression.excite(&seen.context);
        for (at, outcome) in seen.outcomes.into_iter().enumerate() {
            if !outcome.is_finite() {
                continue;
            }
            let scale = &mut self.scales[at];
            let explained = self.regression.expected(at, &seen.context);
            // The scale has the level; the regression what load adds to it.
            let error = outcome - explained - scale.mean();
            if let Some(gain) = gain.as_ref().filter(|_| scale.count() >= Scale::START) {
                let most = CLIP * scale.deviation(floors[at]);
                self.regression.learn(at, error.clamp(-most, most), gain);
                if matches!(OUTCOMES[at].1, Kind::Latency | Kind::Tail) {
                    // By Little's law depth explains latency wholly where the rate stays, and would explain a fault away.
                    self.regression.bound_weight(at, DEPTH, (0.0, 0.9));
                }
            }
            scale.learn(outcome - explained, memory, floors[at]);
        }
    }
}
