//! What shall happen in a run, before anything of it does.

use anyhow::Context;

use super::form::{Form, Shape, between};
use super::guest::Event;
use super::harmless::{Timetable, timetable};
use super::hooks::{self, Span};
use super::kind::{Hook, Means, Outside};
use super::plan::{Plan, Spec};
use super::workload::{self, Phase};
use crate::common::rng::Rng;

/// Behind its time a fault may take so much longer, as a part of it, until the guest has seen it.
const MORE: f64 = 0.4;
/// And so many seconds.
const MORE_S: f64 = 2.5;
/// What runs out does so in so many windows at least: two minutes of a real device, so that half of it is still a forecast.
const EXHAUSTED_WINDOWS: u64 = 120;
/// Who cannot get a descriptor notices it when it needs one: the guest boots again so many milliseconds after the last.
const NEEDED_MS: u64 = 500;
/// Steps in which ever more kicks and interrupts are lost.
const LOSSES: u64 = 20;

/// Everything that chance and the plan decide of a run.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) times: Times,
    pub(super) shape: Shape,
    /// What the guest asks for.
    pub(super) phases: Vec<Phase>,
    /// What happens to it, and beside it.
    pub(super) table: Timetable,
    /// A plan of faults for our own backend.
    pub(super) fault: Option<String>,
}

impl Script {
    /// Draws what is left to chance.
    pub(super) fn draw(spec: &Spec, plan: &Plan) -> anyhow::Result<Self> {
        let mut rng = spec.chance(1);
        let times = Times::of(spec, plan, &mut rng);
        let shape = Shape::new(spec.form, &mut rng);
        let phases = workload::phases(spec.workload, &mut rng).context("there is no such workload")?;
        let fault = match spec.kind.means {
            Means::Hook(hook) => {
                let span = Span { from_ms: times.onset, for_ms: times.fault, window_ms: plan.window_ms };
                Some(hooks::plan(hook, spec.form, &shape, span, mean_rate(&phases)))
            }
            _ => None,
        };
        let table = table(spec, times, &mut rng);
        Ok(Script { times, shape, phases, table, fault })
    }
}

fn table(spec: &Spec, times: Times, rng: &mut Rng) -> Timetable {
    let guest = match spec.kind.means {
        Means::Harmless(what) => return timetable(what, times.onset, times.end, rng),
        Means::LostKicks => lost(spec.form, times, Event::LoseKicks),
        Means::LostCalls => lost(spec.form, times, Event::LoseCalls),
        Means::Outside(Outside::Descriptors) => vec![(times.onset + times.fault + NEEDED_MS, Event::Reboot)],
        _ => Vec::new(),
    };
    Timetable { guest, aside: Vec::new() }
}

/// The times of a run, in milliseconds since its guest was started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) onset: u64,
    /// From onset to collapse.
    pub(super) fault: u64,
    pub(super) end: u64,
}

impl Times {
    fn of(spec: &Spec, plan: &Plan, rng: &mut Rng) -> Self {
        let ms = |seconds: f64| (seconds * 1e3) as u64;
        // Not on the beat of anything.
        let onset = ms(plan.healthy_s) + rng.below(1_500);
        if !spec.kind.is_fault() {
            return Times { onset, fault: 0, end: onset.max(ms(plan.harmless_s)) };
        }
        if spec.kind.means == Means::Hook(Hook::Poison) {
            let fault = ms(hooks::poison_s(plan.window_ms));
            return Times { onset, fault, end: onset + fault + ms(MORE_S) };
        }
        let whole = EXHAUSTED_WINDOWS * plan.window_ms;
        let fault = if spec.kind.exhausts.is_some() { whole.max(ms(plan.fault_s)) } else { ms(plan.fault_s) };
        Times { onset, fault, end: onset + fault + (fault as f64 * MORE) as u64 + ms(MORE_S) }
    }
}

/// Requests per second while the disk takes no time, over all phases.
fn mean_rate(phases: &[Phase]) -> f64 {
    let whole: f64 = phases.iter().map(|phase| phase.seconds).sum();
    phases.iter().map(|phase| phase.seconds * phase.load.rate_most()).sum::<f64>() / whole
}

/// From one of a thousand to all of them.
fn lost(form: Form, times: Times, lose: fn(u64) -> Event) -> Vec<(u64, Event)> {
    if form == Form::Sudden {
        return vec![(times.onset, lose(300))];
    }
    let step = |at: u64| {
        let permille = between(1.0, 1_000.0, at as f64 / LOSSES as f64) as u64;
        (times.onset + at * times.fault / LOSSES, lose(permille))
    };
    (0..=LOSSES).map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scripts() -> Vec<(Spec, Script)> {
        let plan = Plan::parse(include_str!("../../plans/smoke.toml")).expect("it is right");
        let draw = |spec: Spec| {
            let script = Script::draw(&spec, &plan).expect("it can be drawn");
            (spec, script)
        };
        plan.specs().expect("it is right").into_iter().map(draw).collect()
    }

    #[test]
    fn a_script_is_the_same_every_time() {
        for ((_, one), (spec, other)) in scripts().iter().zip(scripts()) {
            assert_eq!(format!("{one:?}"), format!("{other:?}"), "{spec:?}");
        }
    }

    #[test]
    fn nothing_happens_before_a_healthy_part_and_every_fault_has_its_time() {
        for (spec, script) in scripts() {
            let Times { onset, fault, end } = script.times;
            assert!(onset >= 8_000 && end > onset + fault, "{spec:?}");
            // Of the longest such a run may be; it ends when the guest has seen a failure.
            let slow = spec.kind.exhausts.is_some() || spec.kind.means == Means::Hook(Hook::Poison);
            let healthy = if slow { 1 } else { 3 };
            assert!(!spec.kind.is_fault() || fault >= 8_000 && 10 * onset >= healthy * end, "{spec:?}");
            let guest = script.table.guest.iter().map(|(at, _)| *at);
            let first = guest.chain(script.table.aside.iter().map(|(at, _)| *at)).min();
            assert!(first.is_none_or(|first| first >= onset), "{spec:?}");
            assert_eq!(script.fault.is_some(), matches!(spec.kind.means, Means::Hook(_)), "{spec:?}");
        }
    }

    #[test]
    fn ever_more_kicks_are_lost_until_all_are() {
        let times = Times { onset: 1_000, fault: 2_000, end: 4_000 };
        let events = lost(Form::Ramp, times, Event::LoseKicks);
        assert_eq!((events[0], events[20]), ((1_000, Event::LoseKicks(1)), (3_000, Event::LoseKicks(1_000))));
        assert_eq!(lost(Form::Sudden, times, Event::LoseCalls), [(1_000, Event::LoseCalls(300))]);
    }
}
