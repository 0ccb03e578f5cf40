//! `lab train`: fits the trained model that components begin with to the runs of a campaign. Deterministic: the same runs give the same file.
//!
//! Three things are fitted, each with the ones before it: how much outcomes vary in health (from windows without a fault), the hazard, and how
//! much risk is to be borne with (from the same windows). What it was fitted to is no evidence of what it is worth: that says `lab eval`.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde::Serialize;
use warmswap_predict::{INPUT_COUNT, OUTCOME_COUNT, Trained};

use crate::campaign::runs::{self, Run};
use crate::common::commit::commit;
use crate::eval::fit::{self, Sample};
use crate::eval::health;
use crate::eval::replay::samples;

/// Options of `lab train`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directories of campaigns.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    runs: Vec<PathBuf>,
    /// Where the model goes.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// A kind of fault that is left out; may be given several times.
    #[arg(long, value_name = "KIND")]
    exclude_kind: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    runs: usize,
    windows: usize,
    before_failures: usize,
    digest: String,
    bytes: usize,
    command: String,
    commit: String,
}

/// Fits a model and writes it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runs = read(&args.runs)?;
    let kept: Vec<&Run> = runs.iter().filter(|run| !args.exclude_kind.contains(&run.label.kind)).collect();
    ensure!(!kept.is_empty(), "there are no runs to be fitted to");
    let (trained, samples) = fit(&kept);
    let bytes = trained.encode();
    std::fs::write(&args.out, bytes).with_context(|| args.out.display().to_string())?;
    let directories: Vec<String> = args.runs.iter().map(|dir| dir.display().to_string()).collect();
    let report = Report {
        runs: kept.len(),
        windows: samples.len(),
        before_failures: samples.iter().filter(|sample| sample.failed[2] == Some(true)).count(),
        digest: format!("{:08x}", trained.digest()),
        bytes: bytes.len(),
        command: format!("cargo run -rq -p lab -- train --runs {} --out {}", directories.join(" "), args.out.display()),
        commit: commit(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{}: {} bytes, digest {}, of {} runs with {} windows, {} of them within a minute of windows before a failure",
            args.out.display(),
            report.bytes,
            report.digest,
            report.runs,
            report.windows,
            report.before_failures
        );
    }
    Ok(())
}

/// Reads the runs of several campaigns.
pub(crate) fn read(directories: &[PathBuf]) -> anyhow::Result<Vec<Run>> {
    let mut all = Vec::new();
    for directory in directories {
        all.extend(runs::read(directory).with_context(|| format!("campaign {}", directory.display()))?);
    }
    Ok(all)
}

/// Fits a model to runs; with it the samples.
pub(crate) fn fit(runs: &[&Run]) -> (Trained, Vec<Sample>) {
    fit_without(runs, &[false; INPUT_COUNT])
}

/// The same without some of the signs.
pub(crate) fn fit_without(runs: &[&Run], left_out: &[bool; INPUT_COUNT]) -> (Trained, Vec<Sample>) {
    let prior = Trained::prior();
    let floors: [f32; OUTCOME_COUNT] = health::floors(&prior, runs);
    let mut trained = Trained { floors, weights: health::weights(&prior, runs), ..prior };
    let mut samples: Vec<Sample> =
        runs.iter().enumerate().flat_map(|(number, run)| samples(&trained, run, number)).collect();
    for sample in &mut samples {
        sample.inputs.iter_mut().zip(left_out).filter(|(_, out)| **out).for_each(|(input, _)| *input = 0.0);
    }
    trained.hazard = fit::fit(&samples);
    trained.tolerances = health::tolerances(&trained, &samples);
    (trained, samples)
}
