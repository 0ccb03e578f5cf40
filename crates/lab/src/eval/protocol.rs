//! `lab eval runs`: what the failure model is worth on a campaign, by runs that it was not fitted to.
//!
//! * *Seen kinds*: runs are divided by their seed; what is fitted to one half is judged on the other, and the other way round.
//! * *Left-out kinds*: for every kind of fault a model is fitted to the runs of all other kinds and judged on those of that kind. Recall is the
//!   mean over kinds.
//! * *A failure is predicted* if an alarm comes after the injection began and early enough before the guest had lost its disk, as it saw it: three times
//!   what a failover takes. Kinds without a precursor are reported apart, and so are faults that harmed nobody.
//! * *False alarms* are those in runs without a fault and before an injection, by the half that was not fitted to them. A window counts as a second.
//!   The upper bound is exact (Poisson, 95 %, one-sided).
//! * *Baselines* see the same records, and have a threshold that gives them as many false alarms as the model has. It is chosen on all runs, which
//!   favours them.
//!
//! Not shown here: anything about faults that nobody injected.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::ensure;
use serde::Serialize;
use warmswap_predict::{Alarm, FEATURE_COUNT, Feature, WINDOWS_PER_FALSE_ALARM};

use super::baselines::{self, BASELINES, BURN_IN};
use super::further::{self, Further};
use super::replay::{Said, alarms, replay};
use crate::campaign::runs::Run;
use crate::common::commit::commit;
use crate::train;

/// Seconds of a day, each a window.
pub(super) const DAY: f64 = 86_400.0;

/// Options of `lab eval runs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directories of campaigns.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    runs: Vec<PathBuf>,
    /// What a failover takes, in milliseconds: a prediction counts if it comes three times that before the failure.
    #[arg(long, default_value_t = 15, value_name = "MS")]
    failover_ms: u64,
    /// Leave the baselines out.
    #[arg(long)]
    no_baselines: bool,
    /// Judge further: without each part, new components, slow poison, the shipped model.
    #[arg(long)]
    further: bool,
    /// A file of labels of runs with what was said of each, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    details: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What came of one run.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    name: String,
    kind: String,
    form: String,
    backend: String,
    workload: String,
    fault: bool,
    precursor: bool,
    failed: bool,
    /// Windows without a fault, and false alarms in them.
    healthy_windows: u64,
    false_alarms: Vec<&'static str>,
    /// Seconds from the first alarm to the failure.
    lead_s: Option<f64>,
    predicted: bool,
    alarm: Option<&'static str>,
    causes: Vec<&'static str>,
    cause_right: Option<bool>,
    /// Forecast of the time to exhaustion at half of it over the truth.
    forecast_ratio: Option<f64>,
}

/// What is found of a kind.
#[derive(Clone, Debug, Default, Serialize)]
struct KindRow {
    runs: usize,
    failed: usize,
    precursor: bool,
    seen_recall: Option<f64>,
    left_out_recall: Option<f64>,
    lead_p50_s: Option<f64>,
    causes_right: Option<f64>,
    alarms: BTreeMap<&'static str, usize>,
    false_alarms: u32,
}

/// Quantiles.
#[derive(Clone, Debug, Default, Serialize)]
struct Quantiles {
    p10: Option<f64>,
    p50: Option<f64>,
    p90: Option<f64>,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    runs: usize,
    healthy_days: f64,
    seen_recall: Option<f64>,
    loko_recall: Option<f64>,
    best_baseline: Option<&'static str>,
    best_baseline_loko_recall: Option<f64>,
    baselines: BTreeMap<&'static str, f64>,
    lead_times_s: Quantiles,
    false_alarms: u32,
    false_alarms_per_component_day: f64,
    false_alarm_upper_95: f64,
    promised_rate: f64,
    causes_right: Option<f64>,
    exhaustion_error_p50: Option<f64>,
    calibration_error: f64,
    brier_skill: f64,
    per_kind: BTreeMap<String, KindRow>,
    further: Option<Further>,
    command: String,
    commit: String,
}

/// Judges the model and prints what it is worth.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runs = train::read(&args.runs)?;
    ensure!(runs.iter().any(|run| run.label.fault), "there is no run with a fault");
    eprintln!("{} runs", runs.len());
    let seen = seen(&runs, args);
    let left_out = left_out(&runs, args);
    if let Some(path) = &args.details {
        let lines: Vec<String> = seen.outcomes.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        std::fs::write(path, lines.join("\n") + "\n")?;
    }
    let mut report = report(&runs, &seen, &left_out, args);
    if !args.no_baselines {
        compare(&runs, &mut report, args);
    }
    if args.further {
        report.further = Some(further::ask(&runs, 3 * args.failover_ms * 1_000_000));
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", table(&report));
        report.further.iter().for_each(|it| print!("{}", further::table(it)));
    }
    Ok(())
}

/// What came of runs that were judged by a model fitted to others.
#[derive(Default)]
struct Judged {
    outcomes: Vec<Outcome>,
    /// Risk within a minute of windows, and whether it came true.
    risks: Vec<(f64, bool)>,
}

fn seen(runs: &[Run], args: &Args) -> Judged {
    let mut judged = Judged::default();
    for half in 0..2 {
        eprintln!("fitting half {}", half + 1);
        let fitted: Vec<&Run> = runs.iter().filter(|run| run.label.seed % 2 != half).collect();
        let (trained, _) = train::fit(&fitted);
        for run in runs.iter().filter(|run| run.label.seed % 2 == half) {
            let said = replay(&trained, run);
            judged.outcomes.push(outcome(run, &said, args));
            let truth = super::replay::samples(&trained, run, 0);
            judged.risks.extend(truth.iter().filter_map(|sample| {
                Some((f64::from(trained.hazard.risk(&sample.inputs, 0.0)[2]), sample.failed[2]?))
            }));
        }
    }
    judged
}

fn left_out(runs: &[Run], args: &Args) -> Judged {
    let mut kinds: Vec<&str> = runs.iter().filter(|run| run.label.fault).map(|run| run.label.kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut judged = Judged::default();
    for (number, kind) in kinds.iter().enumerate() {
        eprintln!("leaving out {} of {}: {kind}", number + 1, kinds.len());
        let fitted: Vec<&Run> = runs.iter().filter(|run| run.label.kind != *kind).collect();
        let (trained, _) = train::fit(&fitted);
        let of_kind = runs.iter().filter(|run| run.label.kind == *kind);
        judged.outcomes.extend(of_kind.map(|run| outcome(run, &replay(&trained, run), args)));
    }
    judged
}

fn outcome(run: &Run, said: &[Said], args: &Args) -> Outcome {
    let label = &run.label;
    let found = alarms(run, said);
    let lead_s =
        found.first.zip(label.failure_unix_ns).map(|((at, _), failure)| failure.saturating_sub(at) as f64 / 1e9);
    let at = found.first.and_then(|(at, _)| said.iter().find(|said| said.end_unix_ns == at));
    let causes: Vec<&'static str> =
        at.map_or(Vec::new(), |said| said.verdict.causes.iter().flatten().map(|cause| cause.feature.name()).collect());
    let right = (!label.causes.is_empty() && at.is_some())
        .then(|| causes.iter().any(|cause| label.causes.iter().any(|right| right == cause)));
    Outcome {
        name: label.name.clone(),
        kind: label.kind.clone(),
        form: label.form.clone(),
        backend: label.backend.clone(),
        workload: label.workload.clone(),
        fault: label.fault,
        precursor: label.precursor,
        failed: label.failure_unix_ns.is_some(),
        healthy_windows: found.healthy_windows,
        false_alarms: found.false_ones.into_iter().map(Alarm::name).collect(),
        lead_s,
        predicted: lead_s.is_some_and(|lead| lead >= 3.0 * args.failover_ms as f64 / 1e3),
        alarm: found.first.map(|(_, alarm)| Alarm::name(alarm)),
        causes,
        cause_right: right,
        forecast_ratio: forecast_ratio(run, said),
    }
}

/// What was forecast of a resource when half of its time was over, against the truth.
fn forecast_ratio(run: &Run, said: &[Said]) -> Option<f64> {
    let (onset, end) = run.label.onset_unix_ns.zip(run.label.exhaustion_unix_ns)?;
    let feature = Feature::from_name(run.label.exhausts.as_deref()?)?;
    let half = onset + end.saturating_sub(onset) / 2;
    let at = said.iter().find(|said| said.end_unix_ns >= half)?;
    let (found, forecast) = at.verdict.exhaustion?;
    let left = end.saturating_sub(at.end_unix_ns) as f64 / (run.label.window_ms * 1_000_000) as f64;
    (found == feature && left > 0.0).then(|| f64::from(forecast.windows) / left)
}

/// The share of predicted failures among those that could be predicted; nothing if there were none.
fn recall<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Option<f64> {
    share(outcomes.filter(|it| it.fault && it.failed).map(|it| it.predicted))
}

pub(super) fn share(these: impl Iterator<Item = bool>) -> Option<f64> {
    let (count, right) = these.fold((0_usize, 0_usize), |(count, right), it| (count + 1, right + usize::from(it)));
    (count > 0).then(|| right as f64 / count as f64)
}

pub(super) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0_usize, 0.0), |(count, sum), value| (count + 1, sum + value));
    (count > 0).then(|| sum / count as f64)
}

fn quantile(values: &mut [f64], part: f64) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(((values.len() as f64 * part) as usize).min(values.len().saturating_sub(1))).copied()
}

fn report(runs: &[Run], seen: &Judged, left_out: &Judged, args: &Args) -> Report {
    let mut per_kind: BTreeMap<String, KindRow> = BTreeMap::new();
    for outcome in &seen.outcomes {
        let row = per_kind.entry(outcome.kind.clone()).or_default();
        row.runs += 1;
        row.failed += usize::from(outcome.failed);
        row.precursor |= outcome.precursor;
        row.false_alarms += u32::try_from(outcome.false_alarms.len()).unwrap_or(u32::MAX);
        if let Some(alarm) = outcome.alarm {
            *row.alarms.entry(alarm).or_default() += 1;
        }
    }
    for (kind, row) in &mut per_kind {
        let of = |judged: &Judged| judged.outcomes.iter().filter(|it| it.kind == *kind).cloned().collect::<Vec<_>>();
        let (these, others) = (of(seen), of(left_out));
        row.seen_recall = recall(these.iter());
        row.left_out_recall = recall(others.iter());
        let mut leads: Vec<f64> = these.iter().filter(|it| it.predicted).filter_map(|it| it.lead_s).collect();
        row.lead_p50_s = quantile(&mut leads, 0.5);
        row.causes_right = share(these.iter().filter_map(|it| it.cause_right));
    }
    let with_precursor = |row: &&KindRow| row.precursor && row.failed > 0;
    let mut leads: Vec<f64> =
        seen.outcomes.iter().filter(|it| it.predicted && it.precursor).filter_map(|it| it.lead_s).collect();
    let mut errors: Vec<f64> =
        seen.outcomes.iter().filter_map(|it| it.forecast_ratio).map(|it| (it - 1.0).abs()).collect();
    let false_alarms = per_kind.values().map(|row| row.false_alarms).sum::<u32>();
    let healthy_days = seen.outcomes.iter().map(|it| it.healthy_windows).sum::<u64>() as f64 / DAY;
    let directories: Vec<String> = args.runs.iter().map(|dir| dir.display().to_string()).collect();
    Report {
        runs: runs.len(),
        healthy_days,
        seen_recall: recall(seen.outcomes.iter().filter(|it| it.precursor)),
        loko_recall: mean(per_kind.values().filter(with_precursor).filter_map(|row| row.left_out_recall)),
        best_baseline: None,
        best_baseline_loko_recall: None,
        baselines: BTreeMap::new(),
        lead_times_s: Quantiles {
            p10: quantile(&mut leads, 0.1),
            p50: quantile(&mut leads, 0.5),
            p90: quantile(&mut leads, 0.9),
        },
        false_alarms,
        false_alarms_per_component_day: f64::from(false_alarms) / healthy_days,
        false_alarm_upper_95: poisson_upper(false_alarms) / healthy_days,
        // Harm, risk, errors and drift each have their own evidence.
        promised_rate: 4.0 * DAY / f64::from(WINDOWS_PER_FALSE_ALARM),
        causes_right: share(seen.outcomes.iter().filter_map(|it| it.cause_right)),
        exhaustion_error_p50: quantile(&mut errors, 0.5),
        calibration_error: calibration_error(&seen.risks),
        brier_skill: brier_skill(&seen.risks),
        per_kind,
        further: None,
        command: format!(
            "cargo run -rq -p lab -- eval runs --runs {} --failover-ms {} --json",
            directories.join(" "),
            args.failover_ms
        ),
        commit: commit(),
    }
}

/// Baselines with as many false alarms as the model.
fn compare(runs: &[Run], report: &mut Report, args: &Args) {
    for name in BASELINES {
        eprintln!("baseline: {name}");
        let scored: Vec<Scored> = runs.iter().map(|run| score(name, run)).collect();
        let threshold = threshold(&scored, report.false_alarms);
        let mut per_kind: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
        for (run, scored) in runs.iter().zip(&scored).filter(|(run, _)| run.label.precursor) {
            if let Some(failure) = run.label.failure_unix_ns {
                let first = scored.ill.iter().find(|(_, score)| *score > threshold);
                let lead = first.map(|(at, _)| failure.saturating_sub(*at));
                let predicted = lead.is_some_and(|lead| lead >= 3 * args.failover_ms * 1_000_000);
                per_kind.entry(&run.label.kind).or_default().push(predicted);
            }
        }
        let macro_recall = mean(per_kind.values().filter_map(|these| share(these.iter().copied()))).unwrap_or(0.0);
        report.baselines.insert(name, macro_recall);
    }
    let best = report.baselines.iter().max_by(|one, two| one.1.total_cmp(two.1));
    (report.best_baseline, report.best_baseline_loko_recall) = (best.map(|it| *it.0), best.map(|it| *it.1));
}

/// Scores of a run: the greatest of each stretch of healthy windows, and those after the injection with their times.
struct Scored {
    healthy: Vec<f32>,
    ill: Vec<(u64, f32)>,
}

fn score(name: &str, run: &Run) -> Scored {
    let mut scorer = baselines::baseline(name, FEATURE_COUNT, BURN_IN);
    let (mut healthy, mut ill) = (Vec::new(), Vec::new());
    let failure = run.label.failure_unix_ns.unwrap_or(u64::MAX);
    let mut last = [f32::NAN; FEATURE_COUNT];
    for window in run.windows.iter().take_while(|window| window.end_unix_ns < failure) {
        // A value that is missing stays what it was.
        let row = baselines::row(window);
        last.iter_mut().zip(row).filter(|(_, value)| value.is_finite()).for_each(|(last, value)| *last = value);
        let Some(score) = scorer.step(&last) else { continue };
        let is_ill = run.label.fault && run.label.onset_unix_ns.is_some_and(|onset| window.end_unix_ns >= onset);
        if is_ill { ill.push((window.end_unix_ns, score)) } else { healthy.push(score) }
    }
    // One false alarm a minute of windows at most, as with the model.
    let healthy = healthy.chunks(60).map(|scores| scores.iter().copied().fold(f32::NEG_INFINITY, f32::max)).collect();
    Scored { healthy, ill }
}

/// The least threshold with no more false alarms than are allowed.
fn threshold(scored: &[Scored], allowed: u32) -> f32 {
    let mut healthy: Vec<f32> = scored.iter().flat_map(|scored| scored.healthy.iter().copied()).collect();
    healthy.sort_unstable_by(|one, two| two.total_cmp(one));
    healthy.get(allowed as usize).copied().unwrap_or(f32::NEG_INFINITY)
}

/// Upper bound of a Poisson mean at 95 %, one-sided, of so many events: where so few or fewer have a probability of 5 %.
pub(super) fn poisson_upper(events: u32) -> f64 {
    let below = |mean: f64| {
        let (mut term, mut sum) = ((-mean).exp(), 0.0);
        for event in 0..=events {
            sum += term;
            term *= mean / f64::from(event + 1);
        }
        sum
    };
    let (mut low, mut high) = (0.0, 10.0 + 3.0 * f64::from(events));
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if below(middle) > 0.05 { low = middle } else { high = middle }
    }
    high
}

/// Mean distance of risk and truth over ten bins of risk, by the number of windows in each.
fn calibration_error(risks: &[(f64, bool)]) -> f64 {
    let mut bins = [(0.0, 0.0, 0.0); 10];
    for (risk, failed) in risks {
        let bin = &mut bins[((risk * 10.0) as usize).min(9)];
        *bin = (bin.0 + 1.0, bin.1 + risk, bin.2 + f64::from(u8::from(*failed)));
    }
    bins.iter().map(|(_, risk, failed)| (risk - failed).abs()).sum::<f64>() / risks.len().max(1) as f64
}

/// How much better than always saying the base rate: 1 is perfect, 0 no better.
fn brier_skill(risks: &[(f64, bool)]) -> f64 {
    let count = risks.len().max(1) as f64;
    let rate = risks.iter().filter(|(_, failed)| *failed).count() as f64 / count;
    let brier = risks.iter().map(|(risk, failed)| (risk - f64::from(u8::from(*failed))).powi(2)).sum::<f64>() / count;
    1.0 - brier / (rate * (1.0 - rate)).max(1e-9)
}

fn table(report: &Report) -> String {
    let percent = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
    let seconds = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    let mut text = format!(
        "{:<18} {:>5} {:>7} {:>6} {:>9} {:>8} {:>7} {:>6}  first alarm\n",
        "kind", "runs", "failed", "seen", "left out", "lead s", "causes", "false"
    );
    for (kind, row) in &report.per_kind {
        let alarms: Vec<String> = row.alarms.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let name = if row.precursor || row.failed == 0 { kind.clone() } else { format!("{kind} *") };
        text += &format!(
            "{name:<18} {:>5} {:>7} {:>6} {:>9} {:>8} {:>7} {:>6}  {}\n",
            row.runs,
            row.failed,
            percent(row.seen_recall),
            percent(row.left_out_recall),
            seconds(row.lead_p50_s),
            percent(row.causes_right),
            row.false_alarms,
            alarms.join(", ")
        );
    }
    text += "* without a precursor: not in the figures below\n\n";
    text += &format!(
        "seen kinds {}, left-out kinds {}, lead p10 {} p50 {} p90 {} s, causes right {}\n",
        percent(report.seen_recall),
        percent(report.loko_recall),
        seconds(report.lead_times_s.p10),
        seconds(report.lead_times_s.p50),
        seconds(report.lead_times_s.p90),
        percent(report.causes_right)
    );
    text += &format!(
        "false alarms {} in {:.3} component-days of windows taken for seconds: {:.2} a day, at most {:.2} (95 %); promised {:.4}\n",
        report.false_alarms,
        report.healthy_days,
        report.false_alarms_per_component_day,
        report.false_alarm_upper_95,
        report.promised_rate
    );
    text += &format!("calibration error {:.3}, Brier skill {:.2}", report.calibration_error, report.brier_skill);
    if let Some(error) = report.exhaustion_error_p50 {
        text += &format!(", time to exhaustion off by {:.0} % at half of it (median)", error * 100.0);
    }
    text += "\n";
    for (name, recall) in &report.baselines {
        text += &format!("baseline {name:<26} {:.0} %\n", recall * 100.0);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_those_of_tables() {
        // Garwood, Biometrika 28, 1936.
        for (events, upper) in [(0, 2.996), (1, 4.744), (2, 6.296), (10, 16.962)] {
            assert!((poisson_upper(events) - upper).abs() < 2e-3, "{events}");
        }
    }

    #[test]
    fn calibration_and_skill_know_good_from_bad() {
        let good: Vec<(f64, bool)> =
            (0..1_000).map(|at| (if at % 10 == 0 { 0.95 } else { 0.05 }, at % 10 == 0)).collect();
        assert!(calibration_error(&good) < 0.06 && brier_skill(&good) > 0.9);
        let bad: Vec<(f64, bool)> = good.iter().map(|(risk, failed)| (1.0 - risk, *failed)).collect();
        assert!(calibration_error(&bad) > 0.5 && brier_skill(&bad) < 0.0);
    }

    #[test]
    fn a_threshold_lets_through_what_is_allowed() {
        let scored =
            [Scored { healthy: vec![1.0, 5.0, 3.0], ill: Vec::new() }, Scored { healthy: vec![4.0], ill: Vec::new() }];
        assert_eq!([0, 1, 9].map(|allowed| threshold(&scored, allowed)), [5.0, 4.0, f32::NEG_INFINITY]);
    }
}
