//! `lab crash`: our own back-end, alone, killed before every single store it makes into memory that it shares.
//!
//! There is no broker. A front-end of our own does what QEMU does: it asks for an in-flight region once, keeps it, and
//! hands it to every back-end before it starts the ring. The back-end is killed before its first store, in the next run
//! before its second, and so on, until a run gets to its end: then there is no instant between two stores that was not
//! tried. The next back-end is given the region and the ring as they are. In two series with rings of two entries that
//! one is killed before each of its stores as well, and a third must finish; in the others at one of its stores for
//! every fourth of the first one's.
//!
//! The oracle is the driver: each request is completed exactly once over all lives, with status and length as they must
//! be, what is read is what was written last, a call comes where one was asked for, and in the end every block of the
//! image is as the last write left it. Buffers and descriptors are overwritten when their request is done, so that what
//! is done again shows.
//!
//! The control is the same without the region: the next back-end gets a new one, and goes on by the index alone. It
//! must go wrong.
//!
//! Not checked: stores that the kernel makes for the back-end (the data of reads), and more than one ring.

mod backend;
mod config;
mod life;
mod load;
mod report;
mod stamp;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::ensure;

use self::config::{Base, Chains, Config, Switch, Wanted};
use self::report::{Report, Row};
use crate::common::blk::Engine;
use crate::common::interrupt;
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// Most stores of a life: a run that is killed at every one of so many does not end.
const STORES_MAX: u64 = 2000;
/// Failures after which a series is given up.
const FAILURES_MAX: usize = 5;
/// In a series with few kills by design: how far they are apart.
const CONTROL_STRIDE: usize = 4;
/// Where not every second death is tried: one for so many of the first.
const SECOND_EVERY: u64 = 4;

/// Options of `lab crash`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Seed of the requests, and of the second deaths.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only rings of so many entries.
    #[arg(long, value_parser = ["2", "4", "8"])]
    queue_size: Option<String>,
    /// Only this engine.
    #[arg(long, value_enum)]
    engine: Option<Engine>,
    /// Only with EVENT_IDX, or without.
    #[arg(long, value_enum)]
    event_idx: Option<Switch>,
    /// Only requests that are described so.
    #[arg(long, value_enum)]
    chains: Option<Chains>,
    /// Only this rule of where the next back-end goes on.
    #[arg(long, value_enum)]
    base: Option<Base>,
    /// Only with reads that are overtaken, or without.
    #[arg(long, value_enum)]
    slow_reads: Option<Switch>,
    /// The first back-end dies before this store alone.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    store: Option<u64>,
    /// The second back-end dies before this store.
    #[arg(long, requires = "store", value_parser = clap::value_parser!(u64).range(1..))]
    again: Option<u64>,
    /// The region is not handed to the next back-end: a control.
    #[arg(long)]
    lose_region: bool,
    /// Directory for images and sockets.
    #[arg(long, default_value = "/dev/shm")]
    image_dir: PathBuf,
}

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    interrupt::note_signals();
    let began = Instant::now();
    let workspace = Workspace::new(&args.image_dir, "crash")?;
    let series = series(args);
    ensure!(!series.is_empty(), "there is no such series: rings of two entries have no room for direct chains");
    let rows = go_through(args, &series, &workspace)?;
    ensure!(!interrupt::is_asked(), "interrupted");
    let report = Report::new(rows, args.seed, began.elapsed());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    ensure!(report.is_ok(), "a death was not survived, or a control went well");
    Ok(())
}

/// Every series, in the order in which they are begun.
fn series(args: &Args) -> Vec<Config> {
    let wanted = Wanted {
        size: args.queue_size.as_deref().and_then(|size| size.parse().ok()),
        engine: args.engine,
        event_idx: args.event_idx,
        chains: args.chains,
        base: args.base,
        slow_reads: args.slow_reads,
    };
    let mut all = config::all(&wanted);
    // The longest first.
    all.sort_by_key(|config| !config.dies_twice_everywhere());
    if args.lose_region {
        all.iter_mut().for_each(|config| config.region = false);
    } else if args.store.is_none() {
        all.extend(config::controls());
    }
    all
}

/// Goes through the series, as many at a time as there are processors.
fn go_through(args: &Args, series: &[Config], workspace: &Workspace) -> anyhow::Result<Vec<Row>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(series.len());
    let left: Mutex<VecDeque<usize>> = Mutex::new((0..series.len()).collect());
    let rows: Mutex<Vec<(usize, Row)>> = Mutex::new(Vec::new());
    let work = |thread: usize| -> anyhow::Result<()> {
        let directory = workspace.directory(&thread.to_string())?;
        loop {
            let at = left.lock().expect("nobody panics with it").pop_front();
            let Some(at) = at.filter(|_| !interrupt::is_asked()) else { return Ok(()) };
            let row = one_series(args, &series[at], &directory)?;
            let mut rows = rows.lock().expect("nobody panics with it");
            rows.push((at, row));
            let row = &rows.last().expect("just pushed").1;
            eprintln!("[{}/{}] {}", rows.len(), series.len(), row.line());
        }
    };
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let threads: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("panics end the process"))
    })?;
    let mut rows = rows.into_inner().expect("nobody panics with it");
    rows.sort_by_key(|(at, _)| *at);
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// One series: every death of the first back-end, and of the second.
fn one_series(args: &Args, config: &Config, directory: &Path) -> anyhow::Result<Row> {
    let mut row = Row::new(*config);
    let began = Instant::now();
    if let Some(store) = args.store {
        let stores: Vec<u64> = [store].into_iter().chain(args.again).collect();
        row.note(&stores, life::run(config, &stores, args.seed, directory), args.seed);
        return Ok(row);
    }
    let stride = if config.region { 1 } else { CONTROL_STRIDE };
    for store in (1..STORES_MAX).step_by(stride) {
        let deaths = row.note(&[store], life::run(config, &[store], args.seed, directory), args.seed);
        let given_up = config.region && row.failures.len() >= FAILURES_MAX;
        if deaths == 0 || given_up || interrupt::is_asked() {
            row.took(began.elapsed());
            return Ok(row);
        }
        row.stores = store;
        if config.region {
            second_deaths(args, config, store, directory, &mut row);
        }
    }
    anyhow::bail!("{config}: more than {STORES_MAX} stores in one life")
}

/// Deaths of the second back-end, for one of the first.
fn second_deaths(args: &Args, config: &Config, store: u64, directory: &Path, row: &mut Row) {
    let mut die = |again: u64| {
        let stores = [store, again];
        row.note(&stores, life::run(config, &stores, args.seed, directory), args.seed)
    };
    if config.dies_twice_everywhere() {
        let _last = (1..STORES_MAX).find(|again| die(*again) < 2 || interrupt::is_asked());
    } else if store.is_multiple_of(SECOND_EVERY) {
        // The first stores of a life are those of the recovery.
        let most = 6 * u64::from(config.size);
        die(Rng::new(args.seed, config.stream() << 16 | store).between(1, most));
    }
}
