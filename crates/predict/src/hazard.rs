//! The probability of a failure within each of a few horizons: an additive model of dimensionless inputs.
//!
//! The logit of each horizon is a bias and, for every input, the value of a table at the bin that the input lies in (a generalized additive model
//! with piecewise constant shapes: T. Hastie, R. Tibshirani, Generalized Additive Models, 1990; Y. Lou, R. Caruana, J. Gehrke, Intelligible models
//! for classification and regression, KDD 2012). Tables never fall: more of a bad sign is never good news. Risk never falls with the horizon.
//! What each input contributes is exact: the tables are the explanation.

use crate::inputs::INPUT_COUNT;
use crate::math::logistic;

/// Horizons, in windows: a second, ten, a minute and ten minutes of windows of a second.
pub const HORIZONS: [u32; HORIZON_COUNT] = [1, 10, 60, 600];
/// Number of horizons.
pub const HORIZON_COUNT: usize = 4;
/// Bins of a table.
pub const BINS: usize = 16;
/// Logits are stored as whole numbers of this.
pub const LOGIT_STEP: f32 = 1.0 / 512.0;

/// The trained part: shared, never written.
#[derive(Clone, Debug, PartialEq)]
pub struct Hazard {
    /// Upper ends of all bins of an input but the last, ascending.
    pub edges: [[f32; BINS - 1]; INPUT_COUNT],
    /// Per input and horizon the logit that a bin adds, in [`LOGIT_STEP`]s.
    pub tables: [[[i16; BINS]; HORIZON_COUNT]; INPUT_COUNT],
    /// Per horizon the logit where every table adds nothing.
    pub bias: [f32; HORIZON_COUNT],
}

impl Hazard {
    /// The bin that a value of an input lies in.
    #[must_use]
    pub fn bin(&self, input: usize, value: f32) -> usize {
        self.edges[input].partition_point(|edge| *edge < value)
    }

    /// Logit and probability of a failure within each horizon, the probability never falling.
    #[must_use]
    pub fn risk(&self, inputs: &[f32; INPUT_COUNT], bias: f32) -> [f32; HORIZON_COUNT] {
        let mut logits = self.bias;
        for (input, value) in inputs.iter().copied().enumerate() {
            let bin = self.bin(input, value);
            for (logit, table) in logits.iter_mut().zip(&self.tables[input]) {
                *logit += f32::from(table[bin]) * LOGIT_STEP;
            }
        }
        let mut least = 0.0;
        logits.map(|logit| {
            least = logistic(logit + bias).max(least);
            least
        })
    }

    /// What an input adds to the logit of a horizon, above what it adds where it says nothing.
    #[must_use]
    pub fn contribution(&self, input: usize, horizon: usize, value: f32) -> f32 {
        let table = &self.tables[input][horizon];
        f32::from(table[self.bin(input, value)].saturating_sub(table[0])) * LOGIT_STEP
    }

    /// Whether edges ascend and tables never fall.
    #[must_use]
    pub fn is_monotone(&self) -> bool {
        self.edges.iter().all(|edges| edges.is_sorted() && edges.iter().all(|edge| edge.is_finite()))
            && self.tables.iter().flatten().all(|table| table.is_sorted())
            && self.bias.iter().all(|bias| bias.is_finite())
    }
}
