//! What a campaign holds, by kind: what failed, how much time there was to see it coming, and what moved most in the profiles.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};
use warmswap_predict::{Feature, Record, Role};

use super::kind::KINDS;
use super::runs::{Run, read};
use crate::common::commit::commit;

/// Features that are named of a kind.
const NAMED: usize = 5;
/// Windows of the time before a failure that are held against the healthy ones.
const LAST: usize = 10;
/// A healthy guest whose p99 becomes so many times as long was harmed, or had bad neighbours.
const HARMED: f64 = 10.0;

/// What is known of a kind.
#[derive(Debug, Default)]
struct Row {
    runs: usize,
    failed: usize,
    /// From onset to failure, in seconds.
    leads: Vec<f64>,
    failures: BTreeMap<String, usize>,
    windows: usize,
    /// How often a feature was among those that moved most.
    moved: BTreeMap<&'static str, usize>,
    /// Runs in which one of the causes was among those.
    named: usize,
    /// Runs with a guest whose p99 rose.
    harmed: usize,
}

/// Prints what a campaign holds.
pub(super) fn print(out: &Path, json: bool) -> anyhow::Result<()> {
    let runs = read(out)?;
    let felt = read_felt(out)?;
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    for run in &runs {
        rows.entry(&run.label.kind).or_default().add(run, felt.get(&run.label.name));
    }
    let windows = |fault: bool| runs.iter().filter(|it| it.label.fault == fault).map(|it| it.windows.len()).sum();
    let (faulty, clean): (usize, usize) = (windows(true), windows(false));
    if json {
        let kinds: BTreeMap<&str, Value> = rows.iter().map(|(kind, row)| (*kind, row.json())).collect();
        let words: Vec<String> = std::env::args().skip(1).collect();
        let report = json!({
            "command": format!("cargo run -rq -p lab -- {}", words.join(" ")), "commit": commit(), "runs": runs.len(), "windows_faulty": faulty,
            "windows_clean": clean, "kinds": kinds,
        });
        println!("{report:#}");
        return Ok(());
    }
    println!("{} runs, {faulty} windows of faulty ones and {clean} of others", runs.len());
    println!(
        "{:<18}{:>5}{:>8}{:>8}{:>16}{:>7}{:>8}  moved most",
        "kind", "runs", "failed", "harmed", "lead s", "named", "windows"
    );
    for (kind, row) in &rows {
        print!("{}", row.line(kind));
    }
    Ok(())
}

/// The kinds there are.
pub(super) fn kinds() -> String {
    let mut text = String::new();
    for kind in KINDS {
        let forms: Vec<&str> = kind.forms.iter().map(|form| form.name()).collect();
        let backends: Vec<&str> = kind.backends.iter().map(|it| it.name()).collect();
        let what = if kind.is_fault() { "fault" } else { "harmless" };
        // A string takes what it is given.
        let _written = writeln!(text, "{:<18}{what:<10}{:<32}{}", kind.name, forms.join(","), backends.join(","));
    }
    text
}

/// What guests felt, by the name of the run.
fn read_felt(out: &Path) -> anyhow::Result<BTreeMap<String, Value>> {
    let path = out.join("guests.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter_map(|line| Some((line["name"].as_str()?.to_owned(), line))).collect())
}

impl Row {
    fn add(&mut self, run: &Run, felt: Option<&Value>) {
        let label = &run.label;
        self.runs += 1;
        self.windows += run.windows.len();
        if let Some(failure) = label.failure_unix_ns {
            self.failed += 1;
            self.leads.extend(label.onset_unix_ns.map(|onset| (failure as f64 - onset as f64) / 1e9));
        }
        if let Some(what) = &label.failure {
            *self.failures.entry(what.clone()).or_default() += 1;
        }
        let p99 = |when: &str| felt.and_then(|felt| felt[when]["p99_us"].as_f64());
        self.harmed +=
            usize::from(p99("before").zip(p99("after")).is_some_and(|(before, after)| after > HARMED * before));
        let moved = moved(run);
        self.named += usize::from(moved.iter().any(|feature| label.causes.iter().any(|cause| cause == feature)));
        for feature in moved {
            *self.moved.entry(feature).or_default() += 1;
        }
    }

    /// Least, median and greatest time from onset to failure.
    fn lead(&self) -> Option<[f64; 3]> {
        let mut leads = self.leads.clone();
        leads.sort_by(f64::total_cmp);
        Some([*leads.first()?, leads[leads.len() / 2], *leads.last()?])
    }

    fn most_moved(&self) -> Vec<&'static str> {
        let mut moved: Vec<(&&str, &usize)> = self.moved.iter().collect();
        moved.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), **name));
        moved.into_iter().take(NAMED).map(|(name, _)| *name).collect()
    }

    fn line(&self, kind: &str) -> String {
        let lead =
            self.lead().map_or("-".to_owned(), |[least, median, most]| format!("{least:.1} {median:.1} {most:.1}"));
        let moved = self.most_moved().join(" ");
        let Row { runs, failed, harmed, named, windows, .. } = self;
        format!("{kind:<18}{runs:>5}{failed:>8}{harmed:>8}{lead:>16}{named:>7}{windows:>8}  {moved}\n")
    }

    fn json(&self) -> Value {
        let [least, median, most] = self.lead().map_or([None; 3], |lead| lead.map(Some));
        json!({
            "runs": self.runs, "failed": self.failed, "harmed": self.harmed, "lead_s": {"least": least, "median": median, "most": most},
            "named": self.named, "windows": self.windows, "failures": self.failures, "moved": self.most_moved(),
        })
    }
}

/// The features that differ most between the healthy windows and those before the failure (or the last ones), by the distance of their
/// medians in spreads of the healthy ones. No model: only whether there is something to be seen at all.
fn moved(run: &Run) -> Vec<&'static str> {
    let onset = run.label.onset_unix_ns.unwrap_or(u64::MAX);
    let failure = run.label.failure_unix_ns.unwrap_or(u64::MAX);
    // The first windows are those of a start.
    let healthy: Vec<&Record> = run.windows.iter().skip(5).filter(|it| it.end_unix_ns < onset).collect();
    let bad: Vec<&Record> =
        run.windows.iter().filter(|it| it.end_unix_ns > onset && it.end_unix_ns <= failure).collect();
    let bad = &bad[bad.len().saturating_sub(LAST)..];
    let looked_at = |feature: &Feature| matches!(feature.spec().role, Role::Outcome | Role::Limit);
    let mut distances: Vec<(f64, &'static str)> = Feature::ALL
        .into_iter()
        .filter(looked_at)
        .filter_map(|feature| {
            let values = |windows: &[&Record]| windows.iter().filter_map(|it| it.get(feature)).map(f64::from).collect();
            let ([_, was, _], [_, is, _]) = (quartiles(values(&healthy))?, quartiles(values(bad))?);
            let [low, _, high] = quartiles(values(&healthy))?;
            // A feature that never moved is held against a part of itself.
            let spread = (high - low).max(0.02 * was.abs()).max(1e-3);
            Some(((is - was).abs() / spread, feature.name()))
        })
        .collect();
    distances.sort_by(|one, other| other.0.total_cmp(&one.0));
    distances.into_iter().filter(|(distance, _)| *distance > 3.0).take(NAMED).map(|(_, name)| name).collect()
}

/// Quartiles of what there is of it.
fn quartiles(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some([last / 4, last / 2, last * 3 / 4].map(|at| values[at]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::runs::Label;
    use warmswap_predict::Grain;

    #[test]
    fn what_moved_is_found_and_what_always_moves_is_not() {
        let windows = (0..100_u64).map(|number| {
            let mut window = Record::new(Grain::Window, number, 1, number * 1_000, 200_000);
            let bad = number >= 60;
            window.set(Feature::LatencyP50, Some(if bad { 500.0 } else { 100.0 + (number % 7) as f32 }));
            window.set(Feature::LatencyP99, Some(if number % 2 == 0 { 100.0 } else { 1_000.0 }));
            window.set(Feature::Arrivals, Some(if bad { 9_000.0 } else { 1.0 }));
            window
        });
        let text = r#"{"name":"00000","kind":"latency","form":"ramp","fault":true,"precursor":true,"backend":"blk","workload":"x",
            "seed":1,"window_ms":200,"onset_unix_ns":60000,"failure_unix_ns":90000,"failure":"x","exhausts":null,
            "exhaustion_unix_ns":null,"causes":["latency_p50_us"]}"#;
        let label: Label = serde_json::from_str(text).expect("a label");
        let run = Run { label, windows: windows.collect() };
        assert_eq!(moved(&run), ["latency_p50_us"]);
        let mut row = Row::default();
        row.add(&run, None);
        assert_eq!((row.named, row.failed), (1, 1));
        let least = row.lead().expect("it failed")[0];
        assert!((least - 30e-6).abs() < 1e-9, "{least}");
    }
}
