//! What the model says of a run of a campaign, window by window, exactly as it would have said it then.

use warmswap_predict::{Alarm, HORIZONS, INPUT_COUNT, Model, Trained, Verdict};

use super::fit::Sample;
use crate::campaign::runs::Run;

/// What was said of one window.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    /// End of the window.
    pub(crate) end_unix_ns: u64,
    /// The verdict.
    pub(crate) verdict: Verdict,
    /// The inputs of the hazard.
    pub(crate) inputs: [f32; INPUT_COUNT],
}

/// Everything that is said until the failure.
pub(crate) fn replay(trained: &Trained, run: &Run) -> Vec<Said> {
    let mut model = Model::new(trained);
    let failure = run.label.failure_unix_ns.unwrap_or(u64::MAX);
    let windows = run.windows.iter().take_while(|window| window.end_unix_ns < failure);
    windows
        .map(|window| {
            let verdict = model.predict(trained, window);
            let said = Said { end_unix_ns: window.end_unix_ns, verdict, inputs: *model.inputs() };
            model.train(trained);
            said
        })
        .collect()
}

/// The windows of a run as samples of the hazard. `run` is its number.
///
/// Until the injection began a failure cannot be known, and of a fault that harmed nobody it is not known whether it would have: both are
/// left out where they would count.
pub(crate) fn samples(trained: &Trained, run: &Run, number: usize) -> Vec<Sample> {
    let window_ns = run.label.window_ms * 1_000_000;
    let said = replay(trained, run);
    let sample = |said: &Said| Sample {
        inputs: said.inputs,
        failed: std::array::from_fn(|at| outcome(run, said.end_unix_ns, u64::from(HORIZONS[at]) * window_ns)),
        harm: said.verdict.harm,
        run: number,
    };
    said.iter().filter(|said| said.verdict.is_warm).map(sample).collect()
}

fn outcome(run: &Run, now: u64, horizon_ns: u64) -> Option<bool> {
    let began = run.label.onset_unix_ns.is_some_and(|onset| now >= onset);
    match run.label.failure_unix_ns {
        Some(failure) if failure.saturating_sub(now) <= horizon_ns => began.then_some(true),
        Some(_) => Some(false),
        None if run.label.fault && began => None,
        None => Some(false),
    }
}

/// The alarms of a run: those before the injection, which are false, and the first after it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Alarms {
    /// Alarms without a cause, of any number of windows each.
    pub(crate) false_ones: Vec<Alarm>,
    /// Windows in which nothing was wrong.
    pub(crate) healthy_windows: u64,
    /// The first after the injection began: when, why.
    pub(crate) first: Option<(u64, Alarm)>,
}

/// Finds the alarms. In a run without a fault every one is false.
pub(crate) fn alarms(run: &Run, said: &[Said]) -> Alarms {
    let mut alarms = Alarms::default();
    let mut quiet_until = 0;
    for said in said {
        let ill = run.label.fault && run.label.onset_unix_ns.is_some_and(|onset| said.end_unix_ns >= onset);
        if !ill {
            alarms.healthy_windows += 1;
        }
        let Some(alarm) = said.verdict.alarm else { continue };
        if ill {
            alarms.first.get_or_insert((said.end_unix_ns, alarm));
        } else if said.end_unix_ns >= quiet_until {
            alarms.false_ones.push(alarm);
            // A failover and what comes after it: more of the same is no other false alarm.
            quiet_until = said.end_unix_ns + 60 * run.label.window_ms * 1_000_000;
        }
    }
    alarms
}
