//! `lab fence`: the late write, and the fence that holds it off.
//!
//! A killed process is not a quiet one: what it had submitted through io_uring goes on, into guest memory and onto the disk,
//! after it was reaped. Here qemu-storage-daemon serves a loop block device, throttled for the primary alone, and is killed
//! with reads and writes in flight. The shadow, which is not throttled, serves them again; the guest gives the buffers of
//! completed requests another content and writes some blocks anew. Every buffer and block has a stamp of its generation, and
//! the memory of both is watched: a stamp of the past is a late write.
//!
//! Two arms in one run: the broker as shipped, which must show none, and the broker without its storage proof, which must
//! show some, or the instrument has no teeth and fails. Besides: engines whose exit waits; a backend that locks
//! nothing, and one behind a shell, which are fenced all the same; the cost of the proof when nothing is in flight.
//!
//! Not shown: network storage, file systems, other kernels than the one it runs on.

mod backend;
mod broker;
mod disk;
mod interrupt;
mod loop_device;
mod oracle;
mod probe;
mod report;
mod round;
mod stamp;
mod throttle;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;

use self::backend::Engine;
use self::broker::Arm;
use self::probe::Cost;
use self::report::Report;
use self::round::{Plan, Round};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// Rounds of the engines whose exit waits.
const EXIT_WAITS_ROUNDS: u64 = 1;

/// Options of `lab fence`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rounds of each arm.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Seed of all choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// How long a primary serves before it gets the requests it dies with, in milliseconds.
    #[arg(long, default_value_t = 0)]
    age_ms: u64,
    /// Idle primaries of each kind to kill for the cost of the proof.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    probes: u64,
    /// Directory for sockets and logs.
    #[arg(long, default_value = "/dev/shm")]
    run_dir: PathBuf,
}

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    crate::common::interrupt::note_signals();
    let workspace = Workspace::new(&args.run_dir, "fence")?;
    let report = Report {
        guarded: rounds(args, &workspace, Kind::PLAIN, args.rounds)?,
        sabotaged: rounds(args, &workspace, Kind { arm: Arm::Sabotaged, ..Kind::PLAIN }, args.rounds)?,
        unlocked: rounds(args, &workspace, Kind { locking: false, ..Kind::PLAIN }, args.rounds)?,
        wrapped: rounds(args, &workspace, Kind { wrapped: true, ..Kind::PLAIN }, args.rounds)?,
        native: rounds(args, &workspace, Kind { engine: Engine::Native, ..Kind::PLAIN }, EXIT_WAITS_ROUNDS)?,
        threads: rounds(args, &workspace, Kind { engine: Engine::Threads, ..Kind::PLAIN }, EXIT_WAITS_ROUNDS)?,
        cost: cost(args, &workspace)?,
    };
    report.print(args);
    report.verdict()
}

/// What rounds differ in.
#[derive(Clone, Copy, Debug)]
struct Kind {
    engine: Engine,
    arm: Arm,
    locking: bool,
    wrapped: bool,
}

impl Kind {
    /// io_uring, the broker as shipped.
    const PLAIN: Kind = Kind { engine: Engine::IoUring, arm: Arm::Guarded, locking: true, wrapped: false };
}

fn rounds(args: &Args, workspace: &Workspace, kind: Kind, count: u64) -> anyhow::Result<Vec<Round>> {
    let Kind { engine, arm, locking, wrapped } = kind;
    let age = Duration::from_millis(args.age_ms);
    (0..count)
        .map(|number| {
            let locks = if wrapped {
                "wrapped"
            } else if locking {
                "locked"
            } else {
                "unlocked"
            };
            let name = format!("{}-{locks}-{arm:?}-{number}", engine.name()).to_lowercase();
            let directory = workspace.path().join(&name);
            // Both arms draw the same requests.
            let mut rng = Rng::new(args.seed, number);
            let round = round::run(Plan { directory: &directory, engine, arm, locking, wrapped, age }, &mut rng)?;
            eprintln!("{name}: {}", report::line(&round));
            Ok(round)
        })
        .collect()
}

fn cost(args: &Args, workspace: &Workspace) -> anyhow::Result<Cost> {
    let cost = probe::measure(&workspace.path().join("probe"), args.probes)?;
    ensure!(!cost.locks.is_empty(), "no primary was killed");
    Ok(cost)
}
