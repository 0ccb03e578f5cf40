//! `lab eval end-to-end`: for how long a guest stands still while its backend fails, in three modes for the same fault: with a broker that acts
//! on what it foresees, with one that acts once something has failed, and without one.
//!
//! The faults are those of a campaign, in its compressed time; but here nobody stops at the first failure. A **run** is a healthy part, a fault
//! from its onset to its collapse, and six seconds in which it stays collapsed. Then the fault goes away, as far as anybody can take it away,
//! and what is not answered within three seconds is **lost**. **Stall** is time in which a request waits and none was completed for more than
//! ten milliseconds; only what is beyond those counts.
//!
//! A fault hits the first primary, wherever it is the backend's: whatever replaces it is healthy, and once its process is gone nothing more is
//! done to it. A store that fails is tried in two **variants**: `own-path`, where the shadow reaches the same image by another way, and `common`,
//! where it goes the same way, no backend can help, and a failover is **useless**. What is lost between guest and backend is common as well. A
//! predicted failover is **needless** where no fault has begun.
//!
//! Without a broker the fault is the same, and so is the guest, which connects again within a tenth of a second, resets its device and submits
//! what was in flight once more: more than a Linux guest does. A backend that hangs without dying is helped by nobody. Its way to the storage is
//! the first one's, for without a pair there is no other.

mod cases;
pub(crate) mod demo;
mod events;
mod guest;
mod play;
mod report;
mod stall;
mod supervisor;
mod turns;
mod world;

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

pub(crate) use turns::{VERB as TURN, main as turn};

use super::plan::Plan;
use super::pool::unmount_abandoned;
use crate::common::interrupt;
use crate::common::workspace::Workspace;
use cases::{Case, Mode};
use play::{Outcome, play};
use report::{Report, Tried};

/// Time before a fault begins: the model is warm by then.
const HEALTHY_S: f64 = 12.0;
/// What a run is longer than its healthy part and its fault.
const BEHIND_S: f64 = 6.0;

/// Options.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Kinds, as `lab campaign --kinds` tells them (default: all)
    #[arg(long, value_delimiter = ',', value_name = "KIND")]
    kinds: Vec<String>,
    /// Forms of a fault, each a case of its own (default: one for each seed, in turn)
    #[arg(long, value_delimiter = ',', value_name = "FORM")]
    forms: Vec<String>,
    /// Seeds
    #[arg(long, value_delimiter = ',', value_name = "SEED", default_value = "1")]
    seeds: Vec<u64>,
    /// Modes to be compared
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["predictive", "reactive", "reconnect"])]
    modes: Vec<Mode>,
    /// From the onset of a fault to its collapse; what runs out has 24 seconds at least, and poison takes the time it takes
    #[arg(long, value_name = "SECONDS", default_value_t = 9, value_parser = clap::value_parser!(u32).range(2..=3_600))]
    seconds: u32,
    /// Runs at a time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// Begin no run later than so many seconds from now
    #[arg(long, value_name = "SECONDS", default_value_t = 7 * 86_400)]
    within: u64,
    /// Write what is known of each run to this file, a JSON object per line
    #[arg(long, value_name = "FILE")]
    details: Option<PathBuf>,
    /// Where images and sockets are meanwhile (default: the directory for temporary files)
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Makes all runs, and says what came of them.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    interrupt::note_signals();
    let cases = cases::cases(&args.kinds, &args.forms, &args.seeds)?;
    let fits = |case: usize, mode: &Mode| cases[case].fits(*mode);
    let tasks: Vec<(usize, Mode)> = (0..cases.len())
        .flat_map(|case| args.modes.iter().filter(move |mode| fits(case, mode)).map(move |mode| (case, *mode)))
        .collect();
    eprintln!("end-to-end: {} cases, {} runs, {} at a time", cases.len(), tasks.len(), args.jobs);
    unmount_abandoned();
    let details = args.details.as_ref().map(|path| File::create(path).with_context(|| path.display().to_string()));
    let pool = Pool {
        cases: &cases,
        tasks,
        next: AtomicUsize::new(0),
        until: Instant::now() + Duration::from_secs(args.within),
        plan: plan(args.seconds)?,
        // Of a campaign: who comes next finds what was left by one that was killed.
        workspace: Workspace::new(&args.work_dir.clone().unwrap_or_else(std::env::temp_dir), "campaign")?,
        made: Mutex::new(Made { outcomes: Vec::new(), errors: 0, details: details.transpose()? }),
    };
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| pool.work());
        }
    });
    let Made { outcomes, errors, .. } = pool.made.into_inner().expect("nobody panics with it");
    let report = Report { modes: &args.modes, tried: gather(&cases, outcomes), errors };
    if args.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.text());
    }
    ensure!(!interrupt::is_asked(), "interrupted: what is above is of the runs that were made");
    let (lost, corrupted) = (report.lost(), report.corrupted());
    ensure!(
        lost + corrupted == 0,
        "a guarded guest lost {lost} requests, and {corrupted} blocks held what they could not hold"
    );
    ensure!(report.errors == 0, "{} runs could not be made", report.errors);
    Ok(())
}

/// The times of a campaign whose faults take so long.
fn plan(fault_s: u32) -> anyhow::Result<Plan> {
    let harmless_s = HEALTHY_S + f64::from(fault_s) + BEHIND_S;
    Plan::parse(&format!(
        "healthy_s = {HEALTHY_S:.1}\nfault_s = {fault_s}.0\nharmless_s = {harmless_s:.1}\ntimeout_ms = 1000\ntick_ms = 20\nwindow_ms = 200\n\
         shuffle = 0\nruns = []\n"
    ))
}

/// What was made of each case. Cases that nothing is known of are left out.
fn gather(cases: &[Case], outcomes: Vec<(usize, Mode, Outcome)>) -> Vec<Tried<'_>> {
    let mut tried: Vec<Tried<'_>> = cases.iter().map(|case| Tried { case, outcomes: [const { None }; 3] }).collect();
    for (case, mode, outcome) in outcomes {
        tried[case].outcomes[mode as usize] = Some(outcome);
    }
    tried.retain(|tried| tried.outcomes.iter().any(Option::is_some));
    tried
}

/// What the threads share.
struct Pool<'a> {
    cases: &'a [Case],
    tasks: Vec<(usize, Mode)>,
    next: AtomicUsize,
    until: Instant,
    plan: Plan,
    workspace: Workspace,
    made: Mutex<Made>,
}

/// What there is so far.
struct Made {
    outcomes: Vec<(usize, Mode, Outcome)>,
    errors: usize,
    details: Option<File>,
}

impl Pool<'_> {
    fn work(&self) {
        while !interrupt::is_asked() && Instant::now() < self.until {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((case, mode)) = self.tasks.get(at) else { return };
            let outcome = self.make(&self.cases[*case], *mode);
            if !interrupt::is_asked() {
                self.add(at, *case, *mode, outcome);
            }
        }
    }

    fn make(&self, case: &Case, mode: Mode) -> anyhow::Result<Outcome> {
        let directory = self.workspace.directory(&format!("{}-{}", case.spec.name, mode.name()))?;
        let outcome = play(case, mode, &self.plan, &directory);
        // What was mounted there was unmounted; what is left is in nobody's way.
        let _ = std::fs::remove_dir_all(&directory);
        outcome
    }

    fn add(&self, at: usize, case: usize, mode: Mode, outcome: anyhow::Result<Outcome>) {
        let mut made = self.made.lock().expect("nobody panics with it");
        let spec = &self.cases[case].spec;
        let what =
            [spec.kind.name, self.cases[case].variant.name(), spec.form.name(), spec.backend.name(), spec.workload];
        let head = format!("{} of {}: {} {}", at + 1, self.tasks.len(), what.join(" "), mode.name());
        match outcome {
            Ok(outcome) => {
                let failovers: Vec<&str> = outcome.failovers().collect();
                eprintln!("{head}: {:.2} s of stall {}", outcome.stall_s(), failovers.join(" "));
                made.write(&report::details(&self.cases[case], mode, &outcome));
                made.outcomes.push((case, mode, outcome));
            }
            Err(error) => {
                made.errors += 1;
                eprintln!("{head}: {error:#}");
            }
        }
    }
}

impl Made {
    fn write(&mut self, line: &serde_json::Value) {
        if let Some(file) = &mut self.details
            && let Err(error) = writeln!(file, "{line}")
        {
            eprintln!("details: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_are_right_for_a_campaign() {
        let plan = plan(9).expect("it is right");
        assert_eq!((plan.healthy_s, plan.fault_s, plan.harmless_s), (12.0, 9.0, 27.0));
    }
}
