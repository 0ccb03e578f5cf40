//! One animal in the simulator: seeds are run until one fails.
//!
//! Each hunt is a process of its own. An assertion that an animal trips would end the process, and a run that never ends would hold up
//! everything: both are catches.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use warmswap_sim::Options;
use warmswap_zoo::{Animal, VARIABLE};

use crate::common::process::die_with_parent;

/// The word that makes the program a hunt.
pub(crate) const HUNT: &str = "zoo-hunt";
/// A single seed that takes so long has no end.
const SEED_MAX: Duration = Duration::from_secs(30);
/// Seeds between two starts.
const APART: u64 = 1_000_000;

/// How a hunt ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Hunt {
    /// The first seed.
    pub(super) from: u64,
    /// Seeds that were run, the one that failed among them.
    pub(super) seeds: u64,
    /// What failed, if anything did.
    pub(super) catch: Option<Catch>,
}

/// A seed that failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Catch {
    /// The check that noticed.
    pub(super) check: String,
    /// What it said.
    pub(super) detail: String,
}

/// The first seed of a start.
pub(super) fn first_seed(start: u64) -> u64 {
    start * APART + 1
}

/// Hunts one animal, or none, from a start, in a process of its own.
pub(super) fn hunt(animal: Option<Animal>, start: u64, seeds_max: u64) -> anyhow::Result<Hunt> {
    let from = first_seed(start);
    let mut command = Command::new("/proc/self/exe");
    command.arg(HUNT).args([from.to_string(), seeds_max.to_string()]);
    command.env(VARIABLE, animal.map_or("", Animal::id)).stdin(Stdio::null());
    let output = die_with_parent(&mut command).output().context("starting a hunt")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "a hunt ended with {}: {}", output.status, words.trim());
    serde_json::from_str(said.trim()).with_context(|| format!("a hunt said {said:?}"))
}

/// The seed that is being run.
static SEED: AtomicU64 = AtomicU64::new(0);

/// The process of a hunt: first seed, most seeds.
pub(crate) fn child(mut words: impl Iterator<Item = OsString>) -> ExitCode {
    let mut number = || words.next().and_then(|word| word.to_str()?.parse::<u64>().ok());
    let (Some(from), Some(seeds_max)) = (number(), number()) else { return ExitCode::FAILURE };
    SEED.store(from, Ordering::Relaxed);
    std::panic::set_hook(Box::new(move |panic| tell(from, "assertion", &panic.to_string())));
    std::thread::spawn(move || watch(from));
    for seed in from..from + seeds_max {
        SEED.store(seed, Ordering::Relaxed);
        if let Some(failure) = warmswap_sim::run(seed, &Options::from_seed(seed)).failure {
            tell(from, failure.check, &failure.detail);
        }
    }
    say(&Hunt { from, seeds: seeds_max, catch: None })
}

/// Ends a run that does not end.
fn watch(from: u64) {
    loop {
        let before = SEED.load(Ordering::Relaxed);
        std::thread::sleep(SEED_MAX);
        if SEED.load(Ordering::Relaxed) == before {
            tell(from, "end", "the run has no end");
        }
    }
}

/// Says what was caught, and ends the process.
fn tell(from: u64, check: &str, detail: &str) -> ! {
    let seeds = SEED.load(Ordering::Relaxed) - from + 1;
    let _said = say(&Hunt { from, seeds, catch: Some(Catch { check: check.to_owned(), detail: detail.to_owned() }) });
    std::process::exit(0)
}

fn say(hunt: &Hunt) -> ExitCode {
    let line = serde_json::to_string(hunt).expect("numbers and texts");
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
