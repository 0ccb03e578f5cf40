//! `lab bench predict`: what the failure model costs per window, beside a random cut forest on the same records.
//!
//! Records are those of a campaign if one is given, and of a steady load with noise otherwise. `ns_per_window` is of one model that stays in the
//! caches, `ns_per_window_many` of so many in turn that none does. Allocations are counted by the program's own allocator around the very
//! loop that is timed. The forest (crate `rcf3`: 50 trees of 256 points, shingles of 1) sees the same records as rows.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use warmswap_predict::{FEATURE_COUNT, Feature, Grain, Model, Record, TRAINED_BYTES, Trained, load_trained_model};

use super::Common;
use super::report::Report;
use crate::campaign::runs;
use crate::common::rng::Rng;
use crate::eval::baselines;

/// Windows of the steady load.
const WINDOWS: u64 = 5_000;
/// Windows that the forest sees: it is slow.
const FOREST_WINDOWS: usize = 2_000;

/// Options of `lab bench predict`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A campaign whose records are taken.
    #[arg(long, value_name = "DIR")]
    runs: Option<PathBuf>,
    /// Models in one process, in turn.
    #[arg(long, default_value_t = 10_000)]
    models: usize,
    /// Times that everything is measured; the medians are reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(flatten)]
    common: Common,
}

/// Counts what is allocated.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is done by the system's allocator; only a number is added beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What was measured in one round.
#[derive(Clone, Copy, Debug)]
struct Round {
    one_ns: f64,
    many_ns: f64,
    forest_ns: f64,
    allocations: u64,
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let records = records(args)?;
    let trained = load_trained_model();
    let mut rounds = Vec::new();
    for round in 0..args.rounds.max(1) {
        eprintln!("round {} of {}", round + 1, args.rounds.max(1));
        let (one_ns, allocations) = one(&trained, &records);
        let many_ns = many(&trained, &records, args.models.max(1));
        rounds.push(Round { one_ns, many_ns, forest_ns: forest(&records)?, allocations });
    }
    let median = |of: &dyn Fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_unstable_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (one, many, forest) =
        (median(&|round| round.one_ns), median(&|round| round.many_ns), median(&|round| round.forest_ns));
    let allocations = rounds.iter().map(|round| round.allocations).max().unwrap_or(0);
    let mut report = Report::new("predict", &args.common);
    report.set("ns_per_window", &one.round())?;
    report.set("ns_per_window_many", &many.round())?;
    report.set("models", &args.models)?;
    report.set("bytes_per_component", &size_of::<Model>())?;
    report.set("bytes_shared", &TRAINED_BYTES)?;
    report.set("allocations", &allocations)?;
    report.set("windows", &records.len())?;
    report.set("rcf_ns_per_window", &forest.round())?;
    report.set("rcf_over_model", &(forest / one).round())?;
    report.print(args.common.json, || {
        format!(
            "predict and train: {one:.0} ns per window, {many:.0} ns with {} models in turn; {} bytes per component, {allocations} allocations\n\
             random cut forest: {forest:.0} ns per window, {:.0} times as much\n",
            args.models,
            size_of::<Model>(),
            forest / one
        )
    });
    Ok(())
}

fn records(args: &Args) -> anyhow::Result<Vec<Record>> {
    match &args.runs {
        Some(dir) => Ok(runs::read(dir)?.into_iter().flat_map(|run| run.windows).collect()),
        None => Ok(steady(args.common.seed)),
    }
}

/// Every feature present, each a tenth up or down.
fn steady(seed: u64) -> Vec<Record> {
    let mut rng = Rng::new(seed, 0);
    let mut noise = |value: f32| value * (0.9 + rng.below(2_000) as f32 / 10_000.0);
    (0..WINDOWS)
        .map(|number| {
            let mut record = Record::new(Grain::Window, number, 1, number * 1_000_000_000, 1_000_000);
            for (at, feature) in Feature::ALL.into_iter().enumerate() {
                record.set(feature, Some(noise(0.1 + at as f32 / 100.0)));
            }
            record
        })
        .collect()
}

/// Nanoseconds per window of one model, and allocations of all of them.
fn one(trained: &Trained, records: &[Record]) -> (f64, u64) {
    let mut model = Model::new(trained);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let began = Instant::now();
    for record in records {
        black_box(model.predict(trained, record));
        model.train(trained);
    }
    let ns = began.elapsed().as_nanos() as f64 / records.len() as f64;
    (ns, ALLOCATIONS.load(Ordering::Relaxed) - before)
}

/// The same of many models in turn, each of which has learnt.
fn many(trained: &Trained, records: &[Record], count: usize) -> f64 {
    let mut model = Model::new(trained);
    for record in records.iter().take(1_000) {
        black_box(model.predict(trained, record));
        model.train(trained);
    }
    let mut models = vec![model; count];
    let rounds = (2 * WINDOWS as usize).div_ceil(count).clamp(8, records.len().max(8));
    let began = Instant::now();
    for record in records.iter().cycle().take(rounds) {
        for model in &mut models {
            black_box(model.predict(trained, record));
            model.train(trained);
        }
    }
    began.elapsed().as_nanos() as f64 / (rounds * count) as f64
}

fn forest(records: &[Record]) -> anyhow::Result<f64> {
    let mut forest =
        rcf3::Forest::builder(FEATURE_COUNT).num_trees(50).capacity(256).shingle_size(1).seed(1).build()?;
    let rows: Vec<[f32; FEATURE_COUNT]> = records
        .iter()
        .take(FOREST_WINDOWS)
        .map(|record| baselines::row(record).map(|value| if value.is_finite() { value } else { 0.0 }))
        .collect();
    let began = Instant::now();
    for row in &rows {
        black_box(forest.update_and_score(row)?);
    }
    Ok(began.elapsed().as_nanos() as f64 / rows.len().max(1) as f64)
}
