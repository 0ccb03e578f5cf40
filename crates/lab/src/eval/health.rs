//! What health is like over all components: how much outcomes vary in it, and how much risk it seems to have.

use warmswap_predict::{CONTEXT_COUNT, OUTCOME_COUNT, Trained, WARM_AFTER, context, outcome};

use super::fit::Sample;
use crate::campaign::runs::Run;

/// Windows worth what is thought without any run: a weight is drawn to that.
const DRAWN: f64 = 30.0;
/// No weight is greater.
const WEIGHT_MAX: f32 = 3.0;
/// Outcomes further from the run's mean count as that far.
const APART_MAX: f64 = 2.0;
/// Windows of a start, which are not like the others.
const STARTED: usize = 10;
/// Windows of which a block is made.
const BLOCK: usize = 5;
/// Part of all blocks in health whose risk is borne with.
const BORNE: f64 = 0.99;
/// Bounds of what is borne with of harm: 1.15 times as slow, and a half.
const HARM_BOUNDS: (f32, f32) = (0.1, 0.5);
/// The same of risk.
const RISK_BOUNDS: (f32, f32) = (0.02, 0.5);

/// The least deviation of each outcome: the median over runs of how much it varies from one window to the next while nothing is wrong and the
/// load stays, within a third and three times of what is thought without any run.
pub(crate) fn floors(prior: &Trained, runs: &[&Run]) -> [f32; OUTCOME_COUNT] {
    std::array::from_fn(|at| {
        let mut deviations: Vec<f32> = runs.iter().filter_map(|run| deviation(run, at)).collect();
        deviations.sort_unstable_by(f32::total_cmp);
        let median = deviations.get(deviations.len() / 2).copied().unwrap_or(prior.floors[at]);
        median.clamp(prior.floors[at] / 3.0, prior.floors[at] * 3.0)
    })
}

/// How much an outcome varies before the injection.
fn deviation(run: &Run, at: usize) -> Option<f32> {
    let until = run.label.onset_unix_ns.unwrap_or(u64::MAX);
    let healthy = run.windows.iter().take_while(|window| window.end_unix_ns < until);
    let seen: Vec<(f32, [f32; CONTEXT_COUNT])> =
        healthy.filter_map(|window| Some((outcome(window, at)?, context(window)))).collect();
    let mut steps: Vec<f32> =
        seen.windows(2).filter(|two| is_alike(&two[0].1, &two[1].1)).map(|two| two[1].0 - two[0].0).collect();
    if steps.len() < WARM_AFTER as usize / 2 {
        return None;
    }
    steps.iter_mut().for_each(|step| *step = step.abs());
    steps.sort_unstable_by(f32::total_cmp);
    // The median deviation of a normal distribution, and of the difference of two values.
    Some(steps[steps.len() / 2] * 1.4826 / std::f32::consts::SQRT_2)
}

/// The weights of context that regressions begin with: least squares over the healthy windows of all runs, each about its own means, drawn to what is
/// thought without any run.
pub(crate) fn weights(prior: &Trained, runs: &[&Run]) -> [[f32; CONTEXT_COUNT]; OUTCOME_COUNT] {
    std::array::from_fn(|at| {
        let mut normal = [[0.0; CONTEXT_COUNT]; CONTEXT_COUNT];
        let mut right = [0.0; CONTEXT_COUNT];
        for run in runs {
            add_centred(run, at, &mut normal, &mut right);
        }
        let before = prior.weights[at].map(f64::from);
        for term in 0..CONTEXT_COUNT {
            normal[term][term] += DRAWN;
            right[term] += DRAWN * before[term];
        }
        let mut weights = solve(normal, right).map(|weight| weight as f32);
        // The level is each component's own.
        weights[0] = prior.weights[at][0];
        // More depth, more misses, more pressure never make a request faster.
        weights.iter_mut().skip(1).for_each(|weight| *weight = weight.clamp(-WEIGHT_MAX, WEIGHT_MAX));
        [1, 7, 8].into_iter().for_each(|term| weights[term] = weights[term].max(0.0));
        weights[1] = weights[1].min(0.9);
        weights
    })
}

/// Adds the healthy windows of a run to the normal equations of an outcome.
fn add_centred(
    run: &Run,
    at: usize,
    normal: &mut [[f64; CONTEXT_COUNT]; CONTEXT_COUNT],
    right: &mut [f64; CONTEXT_COUNT],
) {
    let until = run.label.onset_unix_ns.filter(|_| run.label.fault).unwrap_or(u64::MAX);
    let healthy = run.windows.iter().skip(STARTED).take_while(|window| window.end_unix_ns < until);
    let seen: Vec<(f64, [f64; CONTEXT_COUNT])> = healthy
        .filter_map(|window| Some((f64::from(outcome(window, at)?), context(window).map(f64::from))))
        .filter(|(outcome, _)| outcome.is_finite())
        .collect();
    let count = seen.len().max(1) as f64;
    let mean = seen.iter().map(|(outcome, _)| outcome).sum::<f64>() / count;
    let means: [f64; CONTEXT_COUNT] =
        std::array::from_fn(|term| seen.iter().map(|(_, context)| context[term]).sum::<f64>() / count);
    for (outcome, context) in seen {
        let apart: [f64; CONTEXT_COUNT] = std::array::from_fn(|term| context[term] - means[term]);
        for (term, one) in apart.iter().enumerate() {
            right[term] += one * (outcome - mean).clamp(-APART_MAX, APART_MAX);
            normal[term].iter_mut().zip(apart).for_each(|(cell, other)| *cell += one * other);
        }
    }
}

/// Solves a positive definite system by elimination.
fn solve(mut normal: [[f64; CONTEXT_COUNT]; CONTEXT_COUNT], mut right: [f64; CONTEXT_COUNT]) -> [f64; CONTEXT_COUNT] {
    for step in 0..CONTEXT_COUNT {
        let pivot = normal[step];
        for row in step + 1..CONTEXT_COUNT {
            let part = normal[row][step] / pivot[step];
            normal[row].iter_mut().zip(pivot).skip(step).for_each(|(cell, above)| *cell -= part * above);
            right[row] -= part * right[step];
        }
    }
    for step in (0..CONTEXT_COUNT).rev() {
        let known: f64 = (step + 1..CONTEXT_COUNT).map(|at| normal[step][at] * right[at]).sum();
        right[step] = (right[step] - known) / normal[step][step];
    }
    right
}

fn is_alike(one: &[f32; CONTEXT_COUNT], other: &[f32; CONTEXT_COUNT]) -> bool {
    one.iter().zip(other).all(|(one, other)| (one - other).abs() < 0.2)
}

/// The harm and the risk that are borne with: almost all blocks of windows that no failure followed have less.
pub(crate) fn tolerances(trained: &Trained, samples: &[Sample]) -> [f32; 2] {
    let calm: Vec<&Sample> =
        samples.iter().filter(|sample| sample.failed.iter().all(|failed| *failed == Some(false))).collect();
    let harm = |sample: &Sample| sample.harm;
    let risk = |sample: &Sample| trained.hazard.risk(&sample.inputs, 0.0)[2];
    [borne(&calm, &harm, HARM_BOUNDS), borne(&calm, &risk, RISK_BOUNDS)]
}

fn borne(calm: &[&Sample], of: &dyn Fn(&Sample) -> f32, (least, most): (f32, f32)) -> f32 {
    let blocks = calm.chunk_by(|one, other| one.run == other.run).flat_map(|run| run.chunks_exact(BLOCK));
    let mut blocks: Vec<f32> =
        blocks.map(|block| block.iter().map(|sample| of(sample)).sum::<f32>() / BLOCK as f32).collect();
    blocks.sort_unstable_by(f32::total_cmp);
    let at = (blocks.len() as f64 * BORNE) as usize;
    blocks.get(at).or(blocks.last()).copied().unwrap_or(most).clamp(least, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_solved() {
        let mut normal = [[0.0; CONTEXT_COUNT]; CONTEXT_COUNT];
        for (row, cells) in normal.iter_mut().enumerate() {
            cells.iter_mut().enumerate().for_each(|(column, cell)| *cell = 1.0 / (1.0 + row as f64 + column as f64));
            cells[row] += 2.0;
        }
        let wanted: [f64; CONTEXT_COUNT] = std::array::from_fn(|at| at as f64 - 3.0);
        let right =
            std::array::from_fn(|row: usize| normal[row].iter().zip(wanted).map(|(cell, value)| cell * value).sum());
        let found = solve(normal, right);
        assert!(found.iter().zip(wanted).all(|(found, wanted)| (found - wanted).abs() < 1e-9), "{found:?}");
    }
}
