//! What health is like over all components: how much outcomes vary in it, and how much risk it seems to have.

use warmswap_predict::{CONTEXT_COUNT, OUTCOME_COUNT, Trained, WARM_AFTER, context, outcome};

use super::fit::Sample;
use crate::campaign::runs::Run;

/// Windows of which a block is made.
const BLOCK: usize = 5;
/// Part of all blocks in health whose risk is borne with.
const BORNE: f64 = 0.999;
/// Bounds of what is borne with.
const TOLERANCES: (f32, f32) = (0.02, 0.5);

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

fn is_alike(one: &[f32; CONTEXT_COUNT], other: &[f32; CONTEXT_COUNT]) -> bool {
    one.iter().zip(other).all(|(one, other)| (one - other).abs() < 0.2)
}

/// The risk that is borne with: almost all blocks of windows that no failure followed seem to have less.
pub(crate) fn tolerance(trained: &Trained, samples: &[Sample]) -> f32 {
    let calm: Vec<&Sample> =
        samples.iter().filter(|sample| sample.failed.iter().all(|failed| *failed == Some(false))).collect();
    let mut blocks: Vec<f32> = calm
        .chunk_by(|one, other| one.run == other.run)
        .flat_map(|run| run.chunks_exact(BLOCK))
        .map(|block| block.iter().map(|sample| trained.hazard.risk(&sample.inputs, 0.0)[2]).sum::<f32>() / BLOCK as f32)
        .collect();
    blocks.sort_unstable_by(f32::total_cmp);
    let at = (blocks.len() as f64 * BORNE) as usize;
    let borne = blocks.get(at).or(blocks.last()).copied().unwrap_or(TOLERANCES.1);
    borne.clamp(TOLERANCES.0, TOLERANCES.1)
}
