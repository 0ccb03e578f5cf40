//! `lab bench blk`: our own backend beside QSD in its best mode, and beside what the storage gives without any of them.
//!
//! For each cell ([`cell`]) `warmswap blk` and QSD serve the same image, each to a guest of its own with the same load, from and
//! into the same memory ([`memory`]). Both are alive all the time; only one of them is loaded at a time. A pair is one run of
//! each in random order, each after a warm-up, and one of the limit: the lab's own loop on the same image, without virtio
//! ([`limit`]). A figure is the median of the ratios of the pairs, beside its range.
//!
//! *QSD's best mode* is found for each cell: all its ways of I/O, each with and without a thread of the export's own, are tried
//! in turn in short runs. The mode with the most requests per second is what blk is compared with. Where another mode does more
//! requests per second of processor time, it takes part in the pairs, too.
//!
//! *Processor time* is that of the backend's process by its own clock: threads that have ended and the workers of its io_urings
//! are in it, interrupts and threads of the kernel's own are not. What backends used while another one ran is reported as well.
//!
//! *Another backend* takes part in the pairs where `--peer` says how it is started. It is stopped (SIGSTOP) while others run, for it
//! may poll without end.
//!
//! What it does not check: that the data is right, and that the machine is otherwise quiet, as it must be. `--stand-in` runs a
//! second QSD in blk's place, in the very mode of the first: what comes out then is what this machine makes of no difference at
//! all.

mod cell;
mod image;
mod limit;
mod memory;
mod pairs;
mod side;
mod table;

use std::path::PathBuf;

use anyhow::ensure;
use serde_json::Value;

use self::cell::{Cell, Medium};
use self::image::Image;
use self::limit::Limit;
use self::memory::Memory;
use self::pairs::{Figures, Measured, Pair, Turn};
use self::side::{Candidates, Guests, Side};
use super::report::Report;
use super::throughput::Waiting;
use crate::common::blk::{Blk, Engine};
use crate::common::interrupt;
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;
use crate::guest::now_ns;

/// Part of a run before it is measured.
const WARM_UP: f64 = 0.15;
/// Part of a run for which each of QSD's modes is tried.
const TRIAL: f64 = 0.3;
/// How often it is.
const TRIALS: usize = 2;
/// No run and no warm-up is shorter: a busy machine may complete nothing in less.
const SECONDS_MIN: f64 = 0.1;

/// Options of `lab bench blk`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Pairs of runs per cell.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pairs: u32,
    /// Length of a measured run in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Only cells with this in their name, such as "disk read 4k" or "qd32 q1". May be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Where the image lies.
    #[arg(long, value_enum, default_value_t = Media::Both)]
    media: Media,
    /// Directory for the image on disk; where the lab's program lies by default.
    #[arg(long)]
    disk_dir: Option<PathBuf>,
    /// Size of the image in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    image_mib: u64,
    /// How the driver learns of completions: it polls, or it sleeps until an interrupt as Linux does.
    #[arg(long, value_enum, default_value_t = Waiting::Poll)]
    driver: Waiting,
    /// blk's I/O engine.
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    engine: Engine,
    /// A second QSD in blk's place: what this machine makes of no difference.
    #[arg(long)]
    stand_in: bool,
    /// Shell line of another vhost-user-blk backend that takes part, with `{socket}`, `{image}` and `{queues}` in it.
    #[arg(long)]
    peer: Option<String>,
    #[command(flatten)]
    common: super::Common,
}

/// Which media are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Media {
    /// A tmpfs.
    Tmpfs,
    /// A file system that is none, with O_DIRECT.
    Disk,
    /// One after the other.
    Both,
}

impl Media {
    fn has(self, medium: Medium) -> bool {
        match self {
            Media::Tmpfs => medium == Medium::Tmpfs,
            Media::Disk => medium == Medium::Disk,
            Media::Both => true,
        }
    }
}

/// A bench that runs.
struct Bench<'a> {
    args: &'a Args,
    /// Sockets are here.
    workspace: Workspace,
    /// Order of turns.
    choices: Rng,
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!((SECONDS_MIN..=3600.0).contains(&args.seconds), "--seconds must be {SECONDS_MIN} to 3600");
    let cells: Vec<Cell> = cell::chosen(&args.only)?.into_iter().filter(|cell| args.media.has(cell.medium)).collect();
    ensure!(!cells.is_empty(), "--only and --media leave no cell");
    interrupt::note_signals();
    let workspace = Workspace::new(&args.common.image_dir, "bench")?;
    let mut bench = Bench { args, workspace, choices: Rng::new(args.common.seed, 1) };
    let mut rows = Vec::new();
    for medium in [Medium::Tmpfs, Medium::Disk] {
        rows.extend(bench.medium(medium, cells.iter().filter(|cell| cell.medium == medium))?);
    }
    let mut report = Report::new("blk", &args.common);
    report.set("cells", &rows)?;
    report.set("seconds", &args.seconds)?;
    report.set("image_mib", &args.image_mib)?;
    report.set("driver", &format!("{:?}", args.driver))?;
    report.set("engine", &format!("{:?}", args.engine))?;
    report.set("stand_in", &args.stand_in)?;
    report.print(args.common.json, || table::of(&report.fields));
    Ok(())
}

impl Bench<'_> {
    /// Measures the cells of one medium, on one image.
    fn medium<'a>(&mut self, medium: Medium, cells: impl Iterator<Item = &'a Cell>) -> anyhow::Result<Vec<Value>> {
        let mut cells = cells.peekable();
        if cells.peek().is_none() {
            return Ok(Vec::new());
        }
        let args = self.args;
        let directory = match medium {
            Medium::Tmpfs => args.common.image_dir.clone(),
            Medium::Disk => args.disk_dir.clone().map_or_else(image::default_directory, Ok)?,
        };
        let image = Image::new(medium, &directory, args.image_mib, &mut Rng::new(args.common.seed, 2))?;
        cells.map(|cell| self.cell(&image, cell)).collect()
    }

    fn cell(&mut self, image: &Image, cell: &Cell) -> anyhow::Result<Value> {
        eprintln!("{cell}:");
        let row = self.measure(image, cell)?.row(cell);
        eprintln!("  {}", table::progress(&row));
        Ok(row)
    }

    fn measure(&mut self, image: &Image, cell: &Cell) -> anyhow::Result<Measured> {
        let args = self.args;
        let trial = (args.seconds * TRIAL).max(SECONDS_MIN);
        let directory = self.workspace.directory("sockets")?;
        let memory = Memory::new(cell.asked.load(image.bytes).bytes(), &mut Rng::new(args.common.seed, 4))?;
        let mut guests = Guests { directory, cell: *cell, image, memory, seed: args.common.seed };
        let mut candidates = Candidates::start(&mut guests)?;
        candidates.try_all(args.driver, trial, &mut self.choices)?;
        let (best, frugal, tried) = candidates.decide();
        eprintln!("  QSD: {} does most, {} per processor time", best.name, frugal.as_ref().unwrap_or(&best).name);
        let blk = if args.stand_in {
            guests.start_qsd("stand-in", best.mode.expect("it is a QSD"))?
        } else {
            let (queues, direct) = (cell.queues, cell.medium.direct());
            guests.start_blk(&Blk { image: image.path.clone(), queues, engine: args.engine, direct })?
        };
        let peer = args.peer.as_ref().map(|line| guests.start_peer(line)).transpose()?;
        let mut limit = Limit::new(image, cell, guests.memory.buffers(), args.common.seed)?;
        let limit_tried = limit.choose(trial)?;
        let sides = [Some(blk), Some(best), frugal, peer];
        let mut stage = Stage { sides, limit, seconds: args.seconds, waiting: args.driver };
        let mut pairs = Vec::new();
        for _ in 0..args.pairs {
            pairs.push(stage.pair(&mut self.choices)?);
        }
        let blk_engine = stage.sides[Turn::Blk as usize].as_ref().and_then(Side::engine);
        Ok(Measured { names: stage.names(), tried, limit_tried, blk_engine, pairs })
    }
}

/// What takes part in the pairs of a cell.
struct Stage {
    /// In the order of `Turn`.
    sides: [Option<Side>; 4],
    limit: Limit,
    seconds: f64,
    waiting: Waiting,
}

impl Stage {
    /// One run of each, in random order.
    fn pair(&mut self, choices: &mut Rng) -> anyhow::Result<Pair> {
        let takes_part = |turn: &Turn| turn.side().is_none_or(|side| self.sides[side].is_some());
        let mut turns: Vec<Turn> = Turn::ALL.into_iter().filter(takes_part).collect();
        shuffle(&mut turns, choices);
        let mut pair = Pair::default();
        for turn in turns {
            ensure!(!interrupt::is_asked(), "asked to end");
            let (before, began) = (self.others_ns(turn)?, now_ns());
            let figures = self.run(turn)?;
            let idle_cores = (self.others_ns(turn)? - before) as f64 / (now_ns() - began) as f64;
            pair.add(turn, figures, idle_cores);
        }
        Ok(pair)
    }

    fn run(&mut self, turn: Turn) -> anyhow::Result<Figures> {
        let (warm_up, seconds) = (warm_up(self.seconds), self.seconds);
        let Some(side) = turn.side() else {
            self.limit.run(warm_up)?;
            return self.limit.run(seconds);
        };
        let side = self.sides[side].as_mut().expect("only who takes part has a turn");
        side.wake()?;
        side.run(self.waiting, warm_up)?;
        let figures = side.run(self.waiting, seconds)?;
        side.driver.rest()?;
        side.suspend()?;
        Ok(figures)
    }

    /// Processor time so far of every backend whose turn it is not.
    fn others_ns(&self, turn: Turn) -> anyhow::Result<u64> {
        let others = self.sides.iter().enumerate().filter(|(index, _)| turn.side() != Some(*index));
        others.filter_map(|(_, side)| side.as_ref()).map(Side::processor_ns).sum()
    }

    /// What takes each turn.
    fn names(&self) -> [Option<String>; 5] {
        let [blk, qsd, frugal, peer] = self.sides.each_ref().map(|side| side.as_ref().map(|side| side.name.clone()));
        [blk, qsd, frugal, peer, Some(self.limit.name().to_owned())]
    }
}

/// How long is run before a run of `seconds` is measured.
fn warm_up(seconds: f64) -> f64 {
    (seconds * WARM_UP).max(SECONDS_MIN)
}

/// Any order is as likely as another.
fn shuffle<T>(items: &mut [T], choices: &mut Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, choices.below(last as u64 + 1) as usize);
    }
}
