//! `lab bench shadows`: what idle shadows cost somebody else's primary.
//!
//! One device under load, a qemu-storage-daemon that nobody guards, and beside it so many guarded devices whose guests do nothing: each with a
//! broker, a primary, and a shadow that reads its canary. They are frozen (SIGSTOP) and let go by turns, in random order within a pair, and the
//! figure is the median of the ratios of the pairs, awake over frozen. A second frozen run in each pair shows what this machine makes of no
//! difference at all (`same_…`). Frozen or not, they have the memory they have.

use anyhow::Context;
use rustix::process::{Pid, Signal};

use super::backend::{self, Engine};
use super::broker::Broker;
use super::driver::{Driver, Shape};
use super::overhead::{Pairs, Turn};
use super::report::Report;
use super::throughput::{self, Run, Waiting};
use crate::common::blk::{Blk, Engine as BlkEngine};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// Requests in flight of the device under load: for the tail, and for the rate.
const DEPTHS: [u16; 2] = [1, 32];
/// Guest RAM in MiB of an idle device.
const IDLE_MIB: u64 = 16;
/// Part of a run before it is measured.
const WARM_UP: f64 = 0.3;
/// Nobody who was frozen is taken for dead.
const PATIENT: [&str; 4] = ["--hang-ms", "600000", "--stall-ms", "3600000"];

/// Options of `lab bench shadows`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Idle guarded devices.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=200))]
    devices: u32,
    /// Pairs of runs per cell.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pairs: u32,
    /// Length of a measured run in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    #[command(flatten)]
    common: super::Common,
}

/// A guarded device whose guest does nothing.
struct Idle {
    // Dropped first: the VMM goes before the broker.
    _guest: Driver,
    broker: Broker,
}

impl Idle {
    fn start(workspace: &Workspace, number: u32) -> anyhow::Result<Self> {
        let directory = workspace.directory(&format!("idle-{number}"))?;
        let image = directory.join("image");
        backend::make_image(&image)?;
        let blk = Blk { image, queues: 1, engine: BlkEngine::Auto, direct: false };
        let broker = Broker::start(&directory, &PATIENT, &blk.command_line("{socket}"))?;
        let shape = Shape { memory_mib: IDLE_MIB, depth: 1, ..Shape::at(broker.socket()) };
        let mut guest = Driver::boot(&shape, Rng::new(u64::from(number), 3)).with_context(|| broker.last_words())?;
        guest.rest()?;
        Ok(Idle { _guest: guest, broker })
    }

    /// Broker and backends.
    fn processes(&self) -> anyhow::Result<Vec<Pid>> {
        let pid = self.broker.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        // The threads of the broker start backends, so children are those of any thread.
        let mut all: Vec<u32> = vec![pid];
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let children = std::fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            all.extend(children.split_ascii_whitespace().filter_map(|it| it.parse::<u32>().ok()));
        }
        all.extend(children.split_ascii_whitespace().filter_map(|it| it.parse::<u32>().ok()));
        all.sort_unstable();
        all.dedup();
        Ok(all.into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())).collect())
    }
}

fn signal(processes: &[Pid], signal: Signal) -> anyhow::Result<()> {
    processes.iter().try_for_each(|pid| rustix::process::kill_process(*pid, signal)).context("signalling the idle ones")
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let workspace = Workspace::new(&args.common.image_dir, "shadows")?;
    let mut idle = Vec::new();
    for number in 0..args.devices {
        idle.push(Idle::start(&workspace, number)?);
        eprint!("\r{} of {} idle devices", number + 1, args.devices);
    }
    eprintln!();
    let mut choices = Rng::new(args.common.seed, 1);
    let mut cells = Vec::new();
    let mut shadows: Vec<Pid> = Vec::new();
    for device in &idle {
        shadows.extend(device.processes()?);
    }
    for depth in DEPTHS {
        let directory = workspace.directory(&format!("loaded-{depth}"))?;
        let (image, socket) = (directory.join("image"), directory.join("backend.sock"));
        backend::make_image(&image)?;
        let line = backend::on_file(image, 1, Engine::Threads).command_line(&socket.display().to_string());
        let _backend = backend::start(&line)?;
        let mut driver = Driver::boot(&Shape { depth, ..Shape::at(socket) }, Rng::new(args.common.seed, 2))?;
        let mut pairs = Pairs::default();
        for _ in 0..args.pairs {
            let mut turns = [Turn::Direct, Turn::Guarded, Turn::Again];
            for last in [2, 1] {
                turns.swap(last, choices.below(last as u64 + 1) as usize);
            }
            let mut runs = [Run::default(); 3];
            for turn in turns {
                let awake = turn == Turn::Guarded;
                if !awake {
                    signal(&shadows, Signal::STOP)?;
                }
                let measured = throughput::measure(&mut driver, Waiting::Poll, args.seconds * WARM_UP)
                    .and_then(|_| throughput::measure(&mut driver, Waiting::Poll, args.seconds));
                signal(&shadows, Signal::CONT)?;
                runs[turn as usize] = measured?;
                driver.rest()?;
            }
            pairs.add(&runs);
        }
        let cell = pairs.cell(1, depth, args.pairs);
        eprintln!("depth {depth}: {} of the requests per second, {} of the p99.9", cell.iops_ratio, cell.p999_ratio);
        cells.push(cell);
        driver.guest.stop()?;
    }
    let mut report = Report::new("shadows", &args.common);
    report.set("devices", &args.devices)?;
    report.set("processes", &shadows.len())?;
    report.set("cells", &cells)?;
    report.print(args.common.json, || super::overhead::table(&report.fields));
    Ok(())
}
