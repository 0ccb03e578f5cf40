//! `lab eval series`: our detector and the baselines on public series with labels, by VUS-PR: one causal pass, the first rows as burn-in.
//!
//! A series is a file `NAME_test.csv` or `.csv.gz` with a column of labels; all other columns are scored. Nothing else is read. The window of the
//! measure is, as in TSB-AD, the period of the first column. Differences are paired, series by series; their interval is a bootstrap over series
//! (10,000 resamples), which is too narrow where series are not independent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::baselines::{BASELINES, Scorer, baseline};
use super::causes::{self, Named};
use super::period::period;
use super::table::Table;
use super::vus;
use crate::common::commit::commit;
use crate::common::rng::Rng;
use crate::score::{COLUMNS_MAX, detector};

/// Our own, among the baselines.
const OURS: &str = "warmswap";

/// Options of `lab eval series`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directories with series.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Rows at the beginning that say what is usual.
    #[arg(long, default_value_t = 500, value_name = "ROWS")]
    burn_in: usize,
    /// A file that names the anomalous columns of each anomaly: columns server, start, end, columns. Whether one of the three causes that are
    /// named is among them is compared with principal components and with chance.
    #[arg(long, value_name = "FILE")]
    causes: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What a detector reached.
#[derive(Debug, Default, Serialize)]
struct Reached {
    mean: f64,
    us_per_row: f64,
    per_series: BTreeMap<String, f64>,
    /// How much better ours is in the mean, and the 95 % interval of that.
    ours_better_by: f64,
    ours_better_by_95: [f64; 2],
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    mean: f64,
    detectors: BTreeMap<&'static str, Reached>,
    causes: Option<Named>,
    command: String,
    commit: String,
}

/// A series.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) rows: Vec<Vec<f32>>,
    labels: Vec<bool>,
}

/// Judges the detectors and prints what they reached.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut files = Vec::new();
    for directory in &args.data {
        files.extend(series_in(directory)?);
    }
    ensure!(!files.is_empty(), "there is no file NAME_test.csv or NAME_test.csv.gz");
    let mut detectors: BTreeMap<&'static str, Reached> = BTreeMap::new();
    for (number, path) in files.iter().enumerate() {
        let series = read(path)?;
        eprintln!("{} of {}: {}, {} rows", number + 1, files.len(), series.name, series.rows.len());
        for name in BASELINES.into_iter().filter(|name| !is_ours(name) && *name != "static").chain([OURS]) {
            let (score, us) = judge(name, &series, args.burn_in)?;
            let reached = detectors.entry(name).or_default();
            reached.us_per_row += us / files.len() as f64;
            reached.mean += score / files.len() as f64;
            reached.per_series.insert(series.name.clone(), score);
        }
    }
    compare(&mut detectors);
    let causes = args.causes.as_deref().map(|path| causes::judge(path, &files, args.burn_in)).transpose()?;
    let directories: Vec<String> = args.data.iter().map(|dir| dir.display().to_string()).collect();
    let report = Report {
        mean: detectors[OURS].mean,
        detectors,
        causes,
        command: format!(
            "cargo run -rq -p lab -- eval series --data {} --burn-in {} --json",
            directories.join(" "),
            args.burn_in
        ),
        commit: commit(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(())
}

/// Ours on rows of a profile is a baseline there: load and kinds of outcome are unknown to it.
fn is_ours(name: &str) -> bool {
    name == "exponentially weighted z"
}

fn series_in(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut files: Vec<PathBuf> =
        entries.collect::<Result<Vec<_>, _>>()?.into_iter().map(|entry| entry.path()).collect();
    files.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.ends_with("_test.csv") || name.ends_with("_test.csv.gz")
    });
    files.sort();
    Ok(files)
}

pub(super) fn read(path: &Path) -> anyhow::Result<Series> {
    let mut table = Table::open(path)?;
    let label = table.find("label")?;
    let mut places: Vec<usize> = (0..table.names().len()).filter(|place| *place != label).collect();
    ensure!(places.len() <= COLUMNS_MAX, "{}: {} columns, at most {COLUMNS_MAX}", path.display(), places.len());
    places.push(label);
    let (mut rows, mut labels, mut values) = (Vec::new(), Vec::new(), Vec::new());
    while table.next(&places, &mut values)? {
        let label = values.pop().expect("the label is the last");
        ensure!(label == 0.0 || label == 1.0, "{}: expected a label, 0 or 1, found {label}", path.display());
        labels.push(label == 1.0);
        rows.push(values.clone());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Series { name, rows, labels })
}

/// VUS-PR of a detector, and microseconds per row.
fn judge(name: &str, series: &Series, burn_in: usize) -> anyhow::Result<(f64, f64)> {
    let columns = series.rows.first().map_or(0, Vec::len);
    let mut scorer: Box<dyn Scorer> = if name == OURS {
        Box::new(Ours(detector(columns, u32::try_from(burn_in)?, false)))
    } else {
        baseline(name, columns, burn_in)
    };
    let began = Instant::now();
    let scores: Vec<Option<f32>> = series.rows.iter().map(|row| scorer.step(row)).collect();
    let us = began.elapsed().as_secs_f64() * 1e6 / series.rows.len().max(1) as f64;
    let least = scores.iter().flatten().copied().fold(f32::INFINITY, f32::min);
    let scores: Vec<f64> = scores.into_iter().map(|score| f64::from(score.unwrap_or(least))).collect();
    let first: Vec<f64> = series.rows.iter().map(|row| f64::from(row[0])).collect();
    let judged = vus::Series::new(&series.labels, &scores).with_context(|| series.name.clone())?;
    Ok((judged.volume(period(&first)).pr, us))
}

struct Ours(Box<warmswap_predict::SeriesDetector<COLUMNS_MAX>>);

impl Scorer for Ours {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        Some(self.0.step(row, &[]).score)
    }
}

/// How much better ours is than each of the others.
fn compare(detectors: &mut BTreeMap<&'static str, Reached>) {
    let ours: Vec<f64> = detectors[OURS].per_series.values().copied().collect();
    for reached in detectors.values_mut() {
        let differences: Vec<f64> =
            ours.iter().zip(reached.per_series.values()).map(|(ours, other)| ours - other).collect();
        reached.ours_better_by = differences.iter().sum::<f64>() / differences.len() as f64;
        reached.ours_better_by_95 = interval(&differences);
    }
}

/// A bootstrap interval of a mean, 95 %.
fn interval(differences: &[f64]) -> [f64; 2] {
    const RESAMPLES: usize = 10_000;
    let (mut rng, count) = (Rng::new(1, 0), differences.len());
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| (0..count).map(|_| differences[rng.below(count as u64) as usize]).sum::<f64>() / count as f64)
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    [means[RESAMPLES / 40], means[RESAMPLES - 1 - RESAMPLES / 40]]
}

fn table(report: &Report) -> String {
    let mut text = format!("{:<24} {:>8} {:>9}  {:<26}\n", "detector", "VUS-PR", "us/row", "ours better by (95 %)");
    let mut rows: Vec<_> = report.detectors.iter().collect();
    rows.sort_by(|one, two| two.1.mean.total_cmp(&one.1.mean));
    for (name, Reached { mean, us_per_row, ours_better_by, ours_better_by_95: [low, high], .. }) in rows {
        text += &format!("{name:<24} {mean:>8.4} {us_per_row:>9.2}  {ours_better_by:+.3} ({low:+.3} to {high:+.3})\n");
    }
    if let Some(Named { anomalies, ours, components, chance }) = &report.causes {
        text += &format!(
            "one of three causes right, {anomalies} anomalies: ours {ours:.2}, principal components {components:.2}, chance {chance:.2}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_mean_and_is_narrow_where_all_are_alike() {
        assert_eq!(interval(&[0.5; 8]), [0.5, 0.5]);
        let [low, high] = interval(&[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert!(low > 0.1 && low < 0.4 && high > 0.6 && high < 0.9, "{low} {high}");
    }

    #[test]
    fn a_series_whose_anomaly_is_plain_is_found_by_every_detector() {
        let mut rng = Rng::new(3, 0);
        let mut noise = || rng.below(1_000) as f32 / 1_000.0;
        let rows: Vec<Vec<f32>> = (0..2_000)
            .map(|at| (0..5).map(|_| noise() + if (1_500..1_540).contains(&at) { 9.0 } else { 0.0 }).collect())
            .collect();
        let labels: Vec<bool> = (0..2_000).map(|at| (1_500..1_540).contains(&at)).collect();
        let series = Series { name: "plain".to_owned(), rows, labels };
        for name in BASELINES.into_iter().filter(|name| !is_ours(name) && *name != "static").chain([OURS]) {
            let (score, _) = judge(name, &series, 500).expect("it can be judged");
            assert!(score > 0.5, "{name}: {score}");
        }
    }
}
