//! `lab sim`: a device, its guest, its VMM and its backends simulated as a whole, on the real `wire` and `core`.
//!
//! A shell around `warmswap_sim`, whose documentation says what is simulated, what is checked and what is not. A seed means the same
//! run on every machine; a run that fails is printed with its options and the command that tells it step by step.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use warmswap_sim::{Failure, Options, Stats};

use crate::common::commit::commit;
use crate::common::interrupt;

/// Seeds a thread takes at a time.
const SEEDS_AT_ONCE: u64 = 32;
/// Failures that are told; of more only the number.
const TOLD_MAX: usize = 16;

/// Options of `lab sim`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seeds to run, from the first up to, but not including, the second.
    #[arg(long, default_value = "0..1000", value_parser = range, conflicts_with = "seed")]
    seeds: Range<u64>,
    /// Run one seed only, and print its options.
    #[arg(long)]
    seed: Option<u64>,
    /// Tell that run step by step.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Print the report as JSON.
    #[arg(long, conflicts_with = "trace")]
    json: bool,
    /// Threads; one for each processor if it is not given.
    #[arg(long)]
    jobs: Option<usize>,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// Append the counts as one line of JSON to this file.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

fn range(text: &str) -> anyhow::Result<Range<u64>> {
    let (from, to) =
        text.split_once("..").context("expected two numbers with two dots between them, such as 0..1000")?;
    let range = from.parse()?..to.parse()?;
    ensure!(!range.is_empty(), "there is no seed in {text}");
    Ok(range)
}

/// A seed that failed.
#[derive(Clone, Debug, Serialize)]
struct Failed {
    seed: u64,
    at_us: f64,
    check: &'static str,
    detail: String,
    command: String,
    options: Vec<String>,
}

impl Failed {
    fn new(seed: u64, options: &Options, failure: Failure) -> Self {
        Failed {
            seed,
            at_us: failure.at.as_micros(),
            check: failure.check,
            detail: failure.detail,
            command: format!("lab sim --seed {seed} --trace"),
            options: options.to_string().lines().map(str::to_owned).collect(),
        }
    }
}

/// What all runs together came to.
#[derive(Debug, Default)]
struct Tally {
    seeds: u64,
    failed: u64,
    told: Vec<Failed>,
    stats: Stats,
    options: BTreeMap<&'static str, BTreeMap<String, u64>>,
}

impl Tally {
    fn run(&mut self, seed: u64) {
        let options = Options::from_seed(seed);
        let outcome = warmswap_sim::run(seed, &options);
        self.seeds += 1;
        self.stats.add(&outcome.stats);
        self.count(&options);
        if let Some(failure) = outcome.failure {
            self.failed += 1;
            if self.told.len() < TOLD_MAX {
                self.told.push(Failed::new(seed, &options, failure));
            }
        }
    }

    fn count(&mut self, options: &Options) {
        let Options { vmm, primary, shadow, keeping, drain, region, fence, survivors, ring_size, rings, .. } = options;
        let drawn: [(&'static str, String); 11] = [
            ("vmm", format!("{vmm:?}")),
            ("primary", format!("{primary:?}")),
            ("shadow", format!("{shadow:?}")),
            ("keeping", format!("{keeping:?}")),
            ("drain", drain.name().to_owned()),
            ("region", format!("{region:?}")),
            ("fence", fence.name().to_owned()),
            ("survivors", format!("{survivors:?}")),
            ("ring_size", ring_size.to_string()),
            ("rings", rings.to_string()),
            ("event_idx", options.event_idx.to_string()),
        ];
        for (name, value) in drawn {
            *self.options.entry(name).or_default().entry(value).or_default() += 1;
        }
    }

    fn add(&mut self, other: Tally) {
        self.seeds += other.seeds;
        self.failed += other.failed;
        self.told.extend(other.told);
        self.stats.add(&other.stats);
        for (name, values) in other.options {
            for (value, count) in values {
                *self.options.entry(name).or_default().entry(value).or_default() += count;
            }
        }
    }
}

/// A line of a record: what many nights add up.
#[derive(Debug, Serialize)]
struct Line<'a> {
    commit: &'a str,
    first_seed: u64,
    end_seed: u64,
    seeds: u64,
    failed: u64,
    failed_seeds: Vec<u64>,
    failovers: u64,
    failovers_inflight: u64,
    requests: u64,
    seconds: f64,
    seeds_per_second: f64,
    trace_hash: &'a str,
}

/// The report.
#[derive(Debug, Serialize)]
struct Report {
    commit: String,
    seeds: u64,
    first_seed: u64,
    end_seed: u64,
    failed: u64,
    failovers: u64,
    failovers_inflight: u64,
    /// By the rule of three; none where something failed.
    failure_rate_bound_95: Option<f64>,
    seeds_per_second: f64,
    seeds_per_second_per_job: f64,
    jobs: usize,
    seconds: f64,
    simulated_seconds: f64,
    steps: u64,
    trace_hash: String,
    requests: u64,
    completed: u64,
    abandoned: u64,
    survivors: u64,
    /// Failovers that began with so many requests in flight: 0, 1, 2 to 3, 4 to 7, and so on.
    inflight_at_failover: [u64; 10],
    kinds: BTreeMap<String, u64>,
    refused: BTreeMap<String, u64>,
    halts: BTreeMap<String, u64>,
    withheld: BTreeMap<String, u64>,
    faults: BTreeMap<&'static str, u64>,
    backends: u64,
    connections: u64,
    stops: u64,
    stops_unproved: u64,
    memory_changes: u64,
    resets: u64,
    answer_max_us: f64,
    options: BTreeMap<&'static str, BTreeMap<String, u64>>,
    failures: Vec<Failed>,
}

impl Report {
    fn new(tally: Tally, seeds: &Range<u64>, jobs: usize, took: Duration) -> Self {
        let Tally { seeds: count, failed, mut told, stats, options } = tally;
        told.sort_by_key(|failed| failed.seed);
        let rate = count as f64 / took.as_secs_f64().max(1e-9);
        let clean = failed == 0 && stats.failovers_inflight > 0;
        Report {
            commit: commit(),
            seeds: count,
            first_seed: seeds.start,
            end_seed: seeds.end,
            failed,
            failovers: stats.failovers,
            failovers_inflight: stats.failovers_inflight,
            failure_rate_bound_95: clean.then(|| 3.0 / stats.failovers_inflight as f64),
            seeds_per_second: rate,
            seeds_per_second_per_job: rate / jobs as f64,
            jobs,
            seconds: took.as_secs_f64(),
            simulated_seconds: stats.elapsed.as_duration().as_secs_f64(),
            steps: stats.steps,
            trace_hash: format!("{:016x}", stats.trace_hash),
            requests: stats.requests,
            completed: stats.completed,
            abandoned: stats.abandoned,
            survivors: stats.survivors,
            inflight_at_failover: stats.inflight,
            kinds: stats.kinds,
            refused: stats.refused,
            halts: stats.halts,
            withheld: stats.withheld,
            faults: stats.faults,
            backends: stats.backends,
            connections: stats.connections,
            stops: stats.stops,
            stops_unproved: stats.stops_unproved,
            memory_changes: stats.memory_changes,
            resets: stats.resets,
            answer_max_us: stats.answer_max.as_micros(),
            options,
            failures: told,
        }
    }

    fn record(&self, file: &Path) -> anyhow::Result<()> {
        let line = Line {
            commit: &self.commit,
            first_seed: self.first_seed,
            end_seed: self.end_seed,
            seeds: self.seeds,
            failed: self.failed,
            failed_seeds: self.failures.iter().map(|failed| failed.seed).collect(),
            failovers: self.failovers,
            failovers_inflight: self.failovers_inflight,
            requests: self.requests,
            seconds: self.seconds,
            seeds_per_second: self.seeds_per_second,
            trace_hash: &self.trace_hash,
        };
        let line = serde_json::to_string(&line)? + "\n";
        let mut out =
            OpenOptions::new().create(true).append(true).open(file).with_context(|| file.display().to_string())?;
        out.write_all(line.as_bytes()).with_context(|| file.display().to_string())
    }

    /// The report for people.
    fn text(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::new();
        _ = writeln!(out, "commit {}, seeds {}..{}", self.commit, self.first_seed, self.end_seed);
        _ = writeln!(
            out,
            "{} seeds in {:.1} s: {:.0} a second with {} jobs, {:.0} a second and job; {:.0} s were simulated",
            self.seeds,
            self.seconds,
            self.seeds_per_second,
            self.jobs,
            self.seeds_per_second_per_job,
            self.simulated_seconds
        );
        _ = writeln!(
            out,
            "{} failovers, {} of them with requests in flight; {} requests, {} handed over as survivors",
            self.failovers, self.failovers_inflight, self.requests, self.survivors
        );
        _ = writeln!(out, "requests in flight at a failover (0, 1, 2-3, 4-7, …): {:?}", self.inflight_at_failover);
        for (title, counts) in
            [("kinds", &self.kinds), ("halted", &self.halts), ("refused", &self.refused), ("withheld", &self.withheld)]
        {
            _ = writeln!(out, "{title}:");
            counts.iter().for_each(|(name, count)| _ = writeln!(out, "  {count:>9}  {name}"));
        }
        _ = writeln!(out, "faults:");
        self.faults.iter().for_each(|(name, count)| _ = writeln!(out, "  {count:>9}  {name}"));
        match self.failure_rate_bound_95 {
            Some(bound) => {
                _ = writeln!(
                    out,
                    "nothing failed: the rate of failures is below {bound:.1e} a failover with requests in flight (95 %, of the model)"
                );
            }
            None => _ = writeln!(out, "{} seeds failed", self.failed),
        }
        for failed in &self.failures {
            _ = writeln!(out, "\nseed {} failed after {:.3} ms: {}", failed.seed, failed.at_us / 1e3, failed.check);
            _ = writeln!(out, "  {}", failed.detail);
            _ = writeln!(out, "  told step by step by: {}", failed.command);
            failed.options.iter().for_each(|line| _ = writeln!(out, "    {line}"));
        }
        out
    }
}

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(seed) = args.seed.filter(|_| !args.json) {
        return run_one(seed, args.trace);
    }
    let seeds = args.seed.map_or_else(|| args.seeds.clone(), |seed| seed..seed + 1);
    interrupt::note_signals();
    let jobs = match args.jobs {
        Some(0) => bail!("--jobs must be at least 1"),
        Some(jobs) => jobs,
        None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    };
    let began = Instant::now();
    let tally = run_all(&seeds, jobs, args.keep_going);
    let report = Report::new(tally, &seeds, jobs, began.elapsed());
    // A range that was not finished is no count.
    if let Some(file) = args.record.as_ref().filter(|_| !interrupt::is_asked()) {
        report.record(file)?;
    }
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() };
    // Whoever reads may have read enough.
    let _closed = std::io::stdout().write_all(text.as_bytes());
    ensure!(!interrupt::is_asked(), "interrupted after {} seeds", report.seeds);
    ensure!(report.failed == 0, "{} seeds failed", report.failed);
    Ok(())
}

fn run_one(seed: u64, trace: bool) -> anyhow::Result<()> {
    let options = Options::from_seed(seed);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    writeln!(out, "seed {seed}\n{options}")?;
    let outcome = if trace {
        let mut closed = false;
        warmswap_sim::replay(seed, &options, &mut |at, text| {
            // Whoever reads may have read enough.
            closed = closed || writeln!(out, "{:>14} {text}", at.to_string()).is_err();
        })
    } else {
        warmswap_sim::run(seed, &options)
    };
    let stats = &outcome.stats;
    let _closed = writeln!(
        out,
        "{} failovers, {} requests, {} of them completed, {} simulated, {} steps, trace {:016x}",
        stats.failovers, stats.requests, stats.completed, stats.elapsed, stats.steps, stats.trace_hash
    );
    let _closed = out.flush();
    match outcome.failure {
        Some(failure) => bail!("after {}: {}: {}", failure.at, failure.check, failure.detail),
        None => Ok(()),
    }
}

fn run_all(seeds: &Range<u64>, jobs: usize, keep_going: bool) -> Tally {
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let all = Mutex::new(Tally::default());
    let stops = || interrupt::is_asked() || (failed.load(Ordering::Relaxed) && !keep_going);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|_| {
                scope.spawn(|| {
                    let mut tally = Tally::default();
                    while !stops() {
                        let from = next.fetch_add(SEEDS_AT_ONCE, Ordering::Relaxed);
                        for seed in from..seeds.end.min(from.saturating_add(SEEDS_AT_ONCE)) {
                            if stops() {
                                break;
                            }
                            tally.run(seed);
                            failed.fetch_or(tally.failed > 0, Ordering::Relaxed);
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        if from >= seeds.end {
                            break;
                        }
                    }
                    all.lock().expect("no thread panics with it").add(tally);
                })
            })
            .collect();
        show_progress(&done, seeds, || workers.iter().all(std::thread::ScopedJoinHandle::is_finished));
    });
    all.into_inner().expect("no thread panics with it")
}

/// How far it is, on standard error.
fn show_progress(done: &AtomicU64, seeds: &Range<u64>, is_over: impl Fn() -> bool) {
    let (began, all) = (Instant::now(), seeds.end - seeds.start);
    let live = std::io::stderr().is_terminal();
    let every = if live { Duration::from_millis(500) } else { Duration::from_secs(30) };
    let mut said = Instant::now();
    while !is_over() {
        std::thread::sleep(Duration::from_millis(5));
        if said.elapsed() < every {
            continue;
        }
        said = Instant::now();
        let count = done.load(Ordering::Relaxed);
        let rate = count as f64 / began.elapsed().as_secs_f64();
        let left = (all - count) as f64 / rate.max(1e-9);
        let (start, end) = if live { ("\r", "  ") } else { ("", "\n") };
        eprint!("{start}{count} of {all} seeds, {rate:.0} a second, {left:.0} s left{end}");
    }
    if live {
        eprint!("\r{:60}\r", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_understood_and_nonsense_is_refused() {
        assert_eq!(range("3..17").expect("a range"), 3..17);
        for text in ["", "3", "3..", "..3", "a..b", "5..5", "7..3"] {
            assert!(range(text).is_err(), "{text:?} is taken for a range");
        }
    }

    #[test]
    fn as_many_jobs_as_one_likes_come_to_the_same() {
        let [one, three] = [1, 3].map(|jobs| run_all(&(40..80), jobs, true));
        assert_eq!((one.seeds, one.failed, one.stats), (40, 0, three.stats));
        assert_eq!(one.options, three.options);
    }
}
