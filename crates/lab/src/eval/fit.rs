//! Fits the hazard: additive tables by cyclic boosting (Lou, Caruana, Gehrke, KDD 2012), each kept from falling by isotonic regression
//! (pool adjacent violators). Deterministic.

use warmswap_predict::{BINS, HORIZON_COUNT, Hazard, INPUT_COUNT, LOGIT_STEP};

/// Rounds over all inputs.
const ROUNDS: usize = 80;
/// Part of a Newton step that is taken.
const RATE: f64 = 0.2;
/// Weight of the belief that a bin adds nothing, in effective samples: what few windows say counts little.
const PRIOR: f64 = 8.0;
/// Most that a table adds.
const LOGIT_MAX: f64 = 6.0;

/// A window: what the model saw, and what came of it.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// The inputs of the hazard.
    pub(crate) inputs: [f32; INPUT_COUNT],
    /// Per horizon whether a failure came within it; nothing where that is not known.
    pub(crate) failed: [Option<bool>; HORIZON_COUNT],
    /// The harm that was seen.
    pub(crate) harm: f32,
    /// The run it is of.
    pub(crate) run: usize,
}

/// Fits a hazard to samples.
pub(crate) fn fit(samples: &[Sample]) -> Hazard {
    let edges = edges(samples);
    let mut hazard = Hazard { edges, tables: [[[0; BINS]; HORIZON_COUNT]; INPUT_COUNT], bias: [0.0; HORIZON_COUNT] };
    let bins: Vec<[u8; INPUT_COUNT]> = samples
        .iter()
        .map(|sample| std::array::from_fn(|at| u8::try_from(hazard.bin(at, sample.inputs[at])).expect("sixteen bins")))
        .collect();
    for horizon in 0..HORIZON_COUNT {
        let mut shapes = Shapes::new(samples, &bins, horizon);
        for _ in 0..ROUNDS {
            (0..INPUT_COUNT).for_each(|input| shapes.improve(input));
        }
        hazard.bias[horizon] = shapes.bias as f32;
        for (input, table) in shapes.tables.iter().enumerate() {
            hazard.tables[input][horizon] = table.map(|logit| (logit / f64::from(LOGIT_STEP)).round() as i16);
        }
    }
    hazard
}

/// Ends of bins: quantiles of what was seen, windows before a failure and others counting half each.
fn edges(samples: &[Sample]) -> [[f32; BINS - 1]; INPUT_COUNT] {
    std::array::from_fn(|input| {
        let of = |failing: bool| {
            let values = samples.iter().filter(|sample| (sample.failed[2] == Some(true)) == failing);
            let mut values: Vec<f32> = values.map(|sample| sample.inputs[input]).filter(|value| *value > 0.0).collect();
            values.sort_unstable_by(f32::total_cmp);
            values
        };
        let (failing, others) = (of(true), of(false));
        let quantile =
            |values: &[f32], part: f64| values.get((values.len() as f64 * part) as usize).or(values.last()).copied();
        let mut edges = [0.0; BINS - 1];
        // The first bin is of what says nothing at all.
        for (at, edge) in edges.iter_mut().enumerate().skip(1) {
            let part = at as f64 / (BINS - 1) as f64;
            // The tail of health is what tells it from sickness.
            let calm = quantile(&others, 1.0 - (1.0 - part) * (1.0 - part)).unwrap_or(0.0);
            let ill = quantile(&failing, part).unwrap_or(calm);
            *edge = (calm + ill) / 2.0;
        }
        edges.sort_unstable_by(f32::total_cmp);
        edges
    })
}

/// Tables of one horizon in the making.
struct Shapes<'a> {
    bins: &'a [[u8; INPUT_COUNT]],
    /// Of each sample that counts: its place, whether it failed, its weight.
    counted: Vec<(usize, bool, f64)>,
    logits: Vec<f64>,
    tables: [[f64; BINS]; INPUT_COUNT],
    bias: f64,
}

impl<'a> Shapes<'a> {
    fn new(samples: &[Sample], bins: &'a [[u8; INPUT_COUNT]], horizon: usize) -> Self {
        let known = samples.iter().enumerate().filter_map(|(at, sample)| Some((at, sample.failed[horizon]?)));
        let counted: Vec<(usize, bool, f64)> = known.map(|(at, failed)| (at, failed, 1.0)).collect();
        let failed: f64 = counted.iter().filter(|(_, failed, _)| *failed).map(|(_, _, weight)| weight).sum();
        let all: f64 = counted.iter().map(|(_, _, weight)| weight).sum();
        // Of a horizon of which nothing is known nothing is said.
        let share = if counted.is_empty() { 0.0 } else { (failed + 0.5) / (all + 1.0) };
        let share = share.clamp(1e-6, 1.0 - 1e-6);
        let bias = (share / (1.0 - share)).ln();
        let logits = vec![bias; samples.len()];
        Shapes { bins, counted, logits, tables: [[0.0; BINS]; INPUT_COUNT], bias }
    }

    /// One Newton step of one table, then the nearest table that does not fall.
    fn improve(&mut self, input: usize) {
        let (mut slopes, mut weights) = ([0.0; BINS], [0.0; BINS]);
        for (at, failed, weight) in &self.counted {
            let bin = usize::from(self.bins[*at][input]);
            let risk = 1.0 / (1.0 + (-self.logits[*at]).exp());
            slopes[bin] += weight * (f64::from(u8::from(*failed)) - risk);
            weights[bin] += weight * risk * (1.0 - risk);
        }
        let before = self.tables[input];
        let mut table: [f64; BINS] = std::array::from_fn(|bin| {
            let pull = slopes[bin] - PRIOR * before[bin] * 0.05;
            before[bin] + RATE * pull / (weights[bin] + PRIOR * 0.05 + 1e-9)
        });
        rise(&mut table, &weights.map(|weight| weight + 1e-6));
        // What says nothing adds nothing: the bias has it.
        let zero = table[0];
        self.bias += zero;
        table.iter_mut().for_each(|logit| *logit = (*logit - zero).clamp(0.0, LOGIT_MAX));
        let added: [f64; BINS] = std::array::from_fn(|bin| table[bin] + zero - before[bin]);
        self.tables[input] = table;
        for (logit, bins) in self.logits.iter_mut().zip(self.bins) {
            *logit += added[usize::from(bins[input])];
        }
    }
}

/// The nearest sequence that does not fall, in weighted least squares: pool adjacent violators.
fn rise(values: &mut [f64; BINS], weights: &[f64; BINS]) {
    let mut pools: Vec<(f64, f64, usize)> = Vec::with_capacity(BINS);
    for (value, weight) in values.iter().zip(weights) {
        pools.push((*value, *weight, 1));
        while let [.., (before, before_weight, _), (last, last_weight, count)] = pools[..] {
            if before <= last {
                break;
            }
            pools.pop();
            let pool = pools.last_mut().expect("there were two");
            let weight = before_weight + last_weight;
            *pool = ((before * before_weight + last * last_weight) / weight, weight, pool.2 + count);
        }
    }
    let pooled = pools.into_iter().flat_map(|(value, _, count)| std::iter::repeat_n(value, count));
    values.iter_mut().zip(pooled).for_each(|(value, pooled)| *value = pooled);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(sign: f32, useless: f32, failed: bool) -> Sample {
        let mut inputs = [0.0; INPUT_COUNT];
        inputs[3] = sign;
        inputs[5] = useless;
        Sample { inputs, failed: [None, Some(failed), Some(failed), Some(failed)], harm: 0.0, run: 0 }
    }

    #[test]
    fn the_input_that_tells_is_found_and_risk_is_calibrated() {
        let samples: Vec<Sample> = (0..8_000_u32)
            .map(|at| {
                let sign = (at % 100) as f32 / 10.0;
                // Beyond 8 half of them fail.
                sample(sign, (at * 7_919 % 97) as f32, sign > 8.0 && at / 100 % 2 == 0)
            })
            .collect();
        let hazard = fit(&samples);
        assert!(hazard.is_monotone());
        let risk = |sign: f32| hazard.risk(&sample(sign, 50.0, false).inputs, 0.0)[2];
        assert!(risk(1.0) < 0.02 && (0.35..0.65).contains(&risk(9.5)), "{} {}", risk(1.0), risk(9.5));
        assert!(hazard.contribution(3, 2, 9.5) > 3.0 && hazard.contribution(5, 2, 90.0) < 0.5);
        assert_eq!(fit(&samples), hazard, "the same again");
    }

    #[test]
    fn a_sequence_that_falls_is_pooled() {
        let mut values: [f64; BINS] = std::array::from_fn(|at| at as f64);
        (values[3], values[4]) = (9.0, 1.0);
        rise(&mut values, &[1.0; BINS]);
        assert!(values.is_sorted(), "{values:?}");
        assert_eq!(&values[..3], &[0.0, 1.0, 2.0]);
        assert_eq!(values[15], 15.0);
    }
}
