//! Runs, some at a time, until all are there.

use std::collections::HashSet;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::make::{Made, make};
use super::plan::{Plan, Spec};
use super::runs;
use super::scene::Place;
use super::{Args, MOUNTS};
use crate::common::interrupt;
use crate::common::workspace::Workspace;
use crate::guest::Latencies;

/// A run that cannot be made is tried this often.
const TRIES: u32 = 2;
/// When so many cannot be made, something is wrong with the machine.
const FAILURES_MAX: usize = 20;
/// What is waited for is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What the threads share.
struct Pool<'a> {
    args: &'a Args,
    plan: &'a Plan,
    left: Vec<&'a Spec>,
    next: AtomicUsize,
    failed: AtomicUsize,
    until: Instant,
    out: &'a Path,
    workspace: Workspace,
    /// Held while a run is added.
    adding: Mutex<()>,
}

/// Makes the runs that are not there yet.
pub(super) fn run(args: &Args, plan: &Plan, specs: &[Spec], out: &Path) -> anyhow::Result<()> {
    interrupt::note_signals();
    let done = repair(out)?;
    let left: Vec<&Spec> = specs.iter().filter(|spec| !done.contains(&spec.name)).collect();
    eprintln!("campaign: {} runs, {} to be made, {} at a time", specs.len(), left.len(), args.jobs);
    let parent = args.work_dir.clone().unwrap_or_else(std::env::temp_dir);
    unmount_abandoned();
    let pool = Pool {
        args,
        plan,
        left,
        next: AtomicUsize::new(0),
        failed: AtomicUsize::new(0),
        until: Instant::now() + Duration::from_secs(args.within),
        out,
        workspace: Workspace::new(&parent, "campaign")?,
        adding: Mutex::new(()),
    };
    std::thread::scope(|scope| {
        let pool = &pool;
        for worker in 0..args.jobs {
            scope.spawn(move || pool.work(worker));
        }
    });
    let failed = pool.failed.into_inner();
    ensure!(failed == 0, "{failed} runs could not be made; they are tried again when the campaign is gone on with");
    Ok(())
}

/// Unmounts what campaigns that were killed have left mounted in their directories.
pub(super) fn unmount_abandoned() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for path in mounts.lines().filter_map(|line| line.strip_prefix(MOUNTS)?.trim_start().split(' ').next()) {
        let owner = path.split("/lab-campaign-").nth(1).and_then(|rest| rest.split('/').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whatever cannot be unmounted is in nobody's way.
            let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// Drops a label that was being written when a campaign was killed. Returns the names of the runs that are there.
fn repair(out: &Path) -> anyhow::Result<HashSet<String>> {
    if !out.join("runs.jsonl").exists() {
        return Ok(HashSet::new());
    }
    let (void, labels): (Vec<_>, Vec<_>) = runs::read_labels(out)?.into_iter().partition(runs::Label::is_void);
    void.iter().try_for_each(|label| runs::note_void(out, label))?;
    runs::write_labels(out, &labels)?;
    Ok(labels.into_iter().map(|label| label.name).collect())
}

impl Pool<'_> {
    fn work(&self, worker: u16) {
        let image = self.workspace.path().join(format!("image-{worker}"));
        while let Some(spec) = self.take() {
            let mut result = self.make(spec, &image);
            for _ in 1..TRIES {
                if let Err(error) = &result
                    && !interrupt::is_asked()
                {
                    eprintln!("{} {}: {error:#}; once more", spec.name, spec.kind.name);
                    result = self.make(spec, &image);
                }
            }
            match result.and_then(|made| self.add(spec, &made)) {
                Ok(()) => {}
                Err(error) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    eprintln!("{} {}: {error:#}", spec.name, spec.kind.name);
                }
            }
        }
    }

    /// The next run, unless the campaign ends.
    fn take(&self) -> Option<&Spec> {
        while self.args.hold.as_ref().is_some_and(|path| path.exists()) && !interrupt::is_asked() {
            std::thread::sleep(LOOK_EVERY);
        }
        let over = interrupt::is_asked() || Instant::now() >= self.until;
        if over || self.failed.load(Ordering::Relaxed) >= FAILURES_MAX {
            return None;
        }
        self.left.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }

    fn make(&self, spec: &Spec, image: &Path) -> anyhow::Result<Made> {
        let directory = self.workspace.directory(&spec.name)?;
        let made = make(spec, self.plan, Place { directory: &directory, image });
        // What is mounted there was unmounted; what is left is in nobody's way.
        let _ = std::fs::remove_dir_all(&directory);
        let made = made?;
        let label = &made.run.label;
        if label.is_void() {
            let _one = self.adding.lock().expect("nobody panics with it");
            runs::note_void(self.out, label)?;
            bail!("void: {} with no fault yet", label.failure.as_deref().unwrap_or_default());
        }
        Ok(made)
    }

    fn add(&self, spec: &Spec, made: &Made) -> anyhow::Result<()> {
        if made.run.windows.is_empty() {
            bail!("the broker told of no window");
        }
        let _one = self.adding.lock().expect("nobody panics with it");
        runs::add(self.out, &made.run, &made.ticks)?;
        let [before, after] = [0, 1].map(|at| felt(&made.felt.latencies[at]));
        let line = json!({"name": spec.name, "before": before, "after": after, "records_lost": made.lost});
        let path = self.out.join("guests.jsonl");
        let mut file = std::fs::File::options().create(true).append(true).open(&path)?;
        file.write_all(format!("{line}\n").as_bytes()).with_context(|| path.display().to_string())?;
        let label = &made.run.label;
        let lead = label.failure_unix_ns.zip(label.onset_unix_ns).map(|(end, begin)| (end as f64 - begin as f64) / 1e9);
        let lead = lead.map_or_else(String::new, |lead| format!(" after {lead:.1} s"));
        eprintln!(
            "{} of {}: {} {} {} {}: {}{lead}",
            spec.name,
            self.left.len(),
            label.kind,
            label.form,
            label.backend,
            label.workload,
            label.failure.as_deref().unwrap_or("nothing failed")
        );
        Ok(())
    }
}

/// Latencies for people and programs, in microseconds.
fn felt(latencies: &Latencies) -> serde_json::Value {
    let histogram = latencies.histogram();
    let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
    json!({
        "completed": histogram.len(), "p50_us": at(0.5), "p99_us": at(0.99), "p999_us": at(0.999),
        "max_us": histogram.max() as f64 / 1e3,
    })
}
