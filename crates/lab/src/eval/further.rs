//! What more is asked of the failure model: what it is worth without each of its parts, when little was seen of a component before the fault, on
//! a fault so slow that every step of it is usual, and what the shipped model is worth on runs that nobody had when it was fitted.
//!
//! Alarms are taken away afterwards, by their kind; a sign is taken away before the fit, by making it 0 everywhere. A component that is new is a
//! run that begins a few windows before the fault.

use std::collections::BTreeMap;

use serde::Serialize;
use warmswap_predict::{Alarm, Feature, INPUT_COUNT, INPUTS, Input, Record, Trained, load_trained_model};

use super::protocol::{DAY, mean, poisson_upper, share};
use super::replay::{Said, alarms, replay};
use crate::campaign::runs::Run;
use crate::train;

/// Windows before the fault that are left of a component that is new.
const NEW: [usize; 4] = [0, 5, 20, 45];
/// Poison makes requests so many times as slow with each window.
const POISON_GROWTH: f64 = 1.01;
/// Kind of run that is poisoned.
const POISON: &str = "poison";
/// What load is, for the model.
const LOAD: [Feature; 7] = [
    Feature::Depth,
    Feature::WriteShare,
    Feature::FlushShare,
    Feature::DiscardShare,
    Feature::Size,
    Feature::SequentialShare,
    Feature::HostCpuPressure,
];

/// What a model is worth on runs.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Worth {
    /// Share of failures with a precursor that were predicted in time.
    pub(super) recall: Option<f64>,
    /// The same as a mean over kinds.
    pub(super) recall_of_kinds: Option<f64>,
    pub(super) false_alarms: usize,
    pub(super) false_alarms_per_component_day: f64,
    pub(super) false_alarm_upper_95: f64,
}

/// What is printed.
#[derive(Debug, Serialize)]
pub(super) struct Further {
    /// The shipped model, on all runs. It says something if none of them is among those it was fitted to.
    pub(super) shipped: Worth,
    /// Its digest.
    pub(super) shipped_digest: String,
    /// Fitted to one half and judged on the other: all of it, and without each part.
    pub(super) ablation: BTreeMap<String, Worth>,
    /// Recall by the number of windows that were seen before the fault.
    pub(super) cold_start: BTreeMap<usize, Option<f64>>,
    /// How many times as slow a component was at its first alarm where it became slower by a hundredth with each window: least, median, greatest;
    /// and how many of so many runs had one.
    pub(super) poison: Option<[f64; 3]>,
    pub(super) poison_found: [usize; 2],
}

/// What is judged.
struct Judge<'a> {
    runs: &'a [Run],
    lead_ns: u64,
}

/// Asks it all. A prediction counts if it comes `lead_ns` before the failure.
pub(super) fn ask(runs: &[Run], lead_ns: u64) -> Further {
    let judge = Judge { runs, lead_ns };
    let shipped = load_trained_model();
    let halves = judge.halves(&|_| false, runs);
    eprintln!("the shipped model");
    let of_shipped: Vec<Vec<Said>> = runs.iter().map(|run| replay(&shipped, run)).collect();
    let mut ablation = BTreeMap::from([("nothing".to_owned(), judge.worth(&halves, None))]);
    for alarm in ["law", "exhaustion", "harm", "errors", "drift", "risk"] {
        ablation.insert(format!("alarm {alarm}"), judge.worth(&halves, Some(alarm)));
    }
    for (name, is_of) in signs() {
        eprintln!("without {name}");
        ablation.insert(format!("sign {name}"), judge.worth(&judge.halves(&is_of, runs), None));
    }
    eprintln!("without load");
    let blind: Vec<Run> = runs.iter().map(without_load).collect();
    ablation.insert("load".to_owned(), judge.worth(&judge.halves(&|_| false, &blind), None));
    let (poison, poison_found) = judge.poison(&halves);
    Further {
        shipped: judge.worth(&of_shipped, None),
        shipped_digest: format!("{:08x}", shipped.digest()),
        ablation,
        cold_start: NEW.iter().map(|windows| (*windows, judge.new_components(*windows))).collect(),
        poison,
        poison_found,
    }
}

/// A group of signs: its name, and whether one is of it.
type Group = (&'static str, fn(Input) -> bool);

/// Groups of signs.
fn signs() -> [Group; 9] {
    [
        ("scores", |it| matches!(it, Input::Score(_))),
        ("slow sums", |it| matches!(it, Input::Sum(_))),
        ("fast sums", |it| matches!(it, Input::Burst(_))),
        ("slowdown", |it| matches!(it, Input::Slowdown | Input::Trend)),
        ("joint", |it| it == Input::Joint),
        ("drift", |it| it == Input::Drift),
        ("resources", |it| matches!(it, Input::Share | Input::Full10 | Input::Full60)),
        ("stalls", |it| matches!(it, Input::Oldest | Input::Stall | Input::Unanswered)),
        ("errors, throttling", |it| matches!(it, Input::Errors | Input::Throttled)),
    ]
}

/// A run of which it is not known what was asked for.
fn without_load(run: &Run) -> Run {
    let blind = |window: &Record| {
        let mut window = *window;
        LOAD.into_iter().for_each(|feature| window.set(feature, None));
        window
    };
    Run { label: run.label.clone(), windows: run.windows.iter().map(blind).collect() }
}

impl Judge<'_> {
    /// What is said of each run by a model that was fitted to the other half, without some signs.
    fn halves(&self, is_left_out: &dyn Fn(Input) -> bool, runs: &[Run]) -> Vec<Vec<Said>> {
        let left_out: [bool; INPUT_COUNT] = std::array::from_fn(|at| is_left_out(INPUTS[at]));
        let fitted: [Trained; 2] = std::array::from_fn(|half| {
            let others: Vec<&Run> = runs.iter().filter(|run| run.label.seed % 2 != half as u64).collect();
            train::fit_without(&others, &left_out).0
        });
        runs.iter().map(|run| replay(&fitted[(run.label.seed % 2) as usize], run)).collect()
    }

    /// What it is worth, without alarms of a kind.
    fn worth(&self, said: &[Vec<Said>], left_out: Option<&str>) -> Worth {
        let mut kinds: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
        let (mut windows, mut false_alarms) = (0, 0);
        for (run, said) in self.runs.iter().zip(said) {
            let said = without(said, left_out);
            let found = alarms(run, &said);
            windows += found.healthy_windows;
            false_alarms += found.false_ones.len();
            if let Some(failure) = run.label.failure_unix_ns.filter(|_| run.label.fault && run.label.precursor) {
                let predicted = found.first.is_some_and(|(at, _)| failure.saturating_sub(at) >= self.lead_ns);
                kinds.entry(&run.label.kind).or_default().push(predicted);
            }
        }
        let days = windows as f64 / DAY;
        Worth {
            recall: share(kinds.values().flatten().copied()),
            recall_of_kinds: mean(kinds.values().filter_map(|these| share(these.iter().copied()))),
            false_alarms,
            false_alarms_per_component_day: false_alarms as f64 / days,
            false_alarm_upper_95: poisson_upper(u32::try_from(false_alarms).unwrap_or(u32::MAX)) / days,
        }
    }

    /// Recall of the shipped model where a component was seen for so many windows before the fault.
    fn new_components(&self, windows: usize) -> Option<f64> {
        let shipped = load_trained_model();
        share(self.runs.iter().filter(|run| run.label.fault && run.label.precursor).filter_map(|run| {
            let failure = run.label.failure_unix_ns?;
            let onset = run.label.onset_unix_ns?;
            let at = run.windows.iter().position(|window| window.end_unix_ns >= onset)?;
            let late = run.windows[at.saturating_sub(windows)..].to_vec();
            let said = replay(&shipped, &Run { label: run.label.clone(), windows: late });
            let first = alarms(run, &said).first;
            Some(first.is_some_and(|(at, _)| failure.saturating_sub(at) >= self.lead_ns))
        }))
    }

    /// How slow a poisoned component was at its first alarm, and how many had one.
    fn poison(&self, said: &[Vec<Said>]) -> (Option<[f64; 3]>, [usize; 2]) {
        let runs = self.runs.iter().zip(said).filter(|(run, _)| run.label.kind == POISON);
        let (mut factors, mut count) = (Vec::new(), 0);
        for (run, said) in runs {
            count += 1;
            let found = alarms(run, said).first.zip(run.label.onset_unix_ns);
            factors.extend(found.map(|((at, _), onset)| {
                let windows = at.saturating_sub(onset) as f64 / (run.label.window_ms * 1_000_000) as f64;
                POISON_GROWTH.powf(windows)
            }));
        }
        factors.sort_unstable_by(f64::total_cmp);
        let three = factors.first().zip(factors.last()).map(|(low, high)| [*low, factors[factors.len() / 2], *high]);
        (three, [factors.len(), count])
    }
}

fn without(said: &[Said], left_out: Option<&str>) -> Vec<Said> {
    let mut said = said.to_vec();
    for one in &mut said {
        one.verdict.alarm = one.verdict.alarm.filter(|alarm| Some(Alarm::name(*alarm)) != left_out);
    }
    said
}

/// For people.
pub(super) fn table(further: &Further) -> String {
    let percent = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
    let mut text = format!("\n{:<28} {:>7} {:>9} {:>6}\n", "without", "recall", "of kinds", "false");
    for (name, worth) in &further.ablation {
        text += &format!(
            "{name:<28} {:>7} {:>9} {:>6}\n",
            percent(worth.recall),
            percent(worth.recall_of_kinds),
            worth.false_alarms
        );
    }
    let shipped = &further.shipped;
    text += &format!(
        "\nthe shipped model {}: recall {}, of kinds {}, false alarms {}: {:.2} a component-day, at most {:.2} (95 %)\n",
        further.shipped_digest,
        percent(shipped.recall),
        percent(shipped.recall_of_kinds),
        shipped.false_alarms,
        shipped.false_alarms_per_component_day,
        shipped.false_alarm_upper_95
    );
    let new: Vec<String> =
        further.cold_start.iter().map(|(windows, recall)| format!("{windows}: {}", percent(*recall))).collect();
    text += &format!("recall of the shipped model by windows seen before the fault: {}\n", new.join(", "));
    let [found, count] = further.poison_found;
    text += &format!("slow poison found in {found} of {count} runs");
    if let Some([low, middle, high]) = further.poison {
        text += &format!(", at {middle:.2} times as slow (median; {low:.2} to {high:.2})");
    }
    text + "\n"
}
