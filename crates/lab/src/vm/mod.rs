//! `lab vm`: an unmodified QEMU with a Linux guest whose disk is taken away over and over.
//!
//! The guest loads its disk in three ways (fio with crc32c verify, stamped blocks, an ext4 with fsync) and checks what it
//! reads; the host injects failovers at seeded instants, and at the end checks the image by itself. A guest that notices
//! anything at all (an error, other content, a request that does not return) is a failed run.
//!
//! Not checked here: what one ring entry went through (`lab rig` does that) and times below a millisecond (the emulated
//! processors and the load on the host are in every number of the guest).

mod backend;
mod broker;
mod cache;
mod campaign;
mod checks;
mod cpio;
mod demo;
mod device;
mod guest;
mod initramfs;
mod kernel_log;
mod layout;
mod machine;
mod orders;
mod other;
mod plan;
mod process;
mod report;
mod rng;
mod sabotage;
mod stamp;
mod succession;
mod watch;
mod workspace;

use std::path::{Path, PathBuf};
use std::time::Duration;

use backend::{Backends, Limits};
use cache::{Qemu, QemuVersion};
use campaign::Settings;
use device::Device;
use orders::{Load, Orders};
use plan::{Kind, Plan};
use report::Report;
use sabotage::Sabotage;
use watch::Patience;

use crate::common::workspace as common;
use crate::common::{interrupt, systemd};

/// Options of `lab vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kind of device that is guarded. All but `blk` are served by a backend that others have written, if it is installed
    /// (`cargo xtask setup --backends`), and take `--failovers`, `--kinds`, `--seed`, `--qemu`, `--minutes`, `--json`, `--live`, `--logs`.
    #[arg(long, value_enum, default_value = "blk")]
    device: Device,
    /// How many failovers to inject.
    #[arg(long, default_value_t = 20)]
    failovers: u32,
    /// Seed of the guest's loads and of the instants.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the verdict as JSON.
    #[arg(long)]
    json: bool,
    /// Version of QEMU and of its storage daemon.
    #[arg(long, value_enum, default_value = "10.0")]
    qemu: QemuVersion,
    /// What serves the disk.
    #[arg(long, value_enum, default_value = "qsd")]
    backend: Backends,
    /// Which failovers to inject.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Planned, Kind::Crash, Kind::Hang])]
    kinds: Vec<Kind>,
    /// Limits of the guest's disk.
    #[arg(long, value_enum, default_value = "cloud")]
    limits: Limits,
    /// Stop injecting after so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Print a line for each second of the guest.
    #[arg(long)]
    live: bool,
    /// Start the broker under a keeper, and kill it once for each failover: of three times twice under load, and once in the middle of the
    /// failover.
    #[arg(long, conflicts_with = "no_guard")]
    kill_broker: bool,
    /// With systemd as the keeper: a real one, the first process of a namespace of its own, in which all of this runs. Needs root.
    #[arg(long, requires = "kill_broker")]
    systemd: bool,
    /// Without warmswap: the backend is replaced at once and QEMU connects again by its own rule. Shows what would have
    /// happened; with the storage daemon a failed run is expected. Our own backend gets the region of the one before it.
    #[arg(long)]
    no_guard: bool,
    /// Damage the image during the run: the run must then fail. Shows that the checks can.
    #[arg(long, value_enum)]
    sabotage: Option<Sabotage>,
    /// What the guest does.
    #[arg(long, value_enum, default_value = "rounds")]
    load: Load,
    /// Keep the logs of the run in this directory.
    #[arg(long)]
    logs: Option<PathBuf>,
    /// The main job in two minutes: a swap, a kill and a hang under load, then the same kill without warmswap.
    #[arg(long)]
    demo: bool,
    /// The part inside the guest.
    #[arg(long, hide = true)]
    guest: bool,
}

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.guest {
        return guest::run();
    }
    if args.demo {
        return demo::run(args.qemu, args.seed);
    }
    if args.device != Device::Blk {
        return other::run(&other_settings(args)?);
    }
    if args.systemd && !systemd::is_inside() {
        return under_systemd();
    }
    let settings = settings(args)?;
    let report = Report::new(&settings, campaign::run(&settings)?);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    anyhow::ensure!(report.ok, "the guest noticed, or something was not checked");
    Ok(())
}

/// Runs this very command again, as a service of a systemd of its own.
fn under_systemd() -> anyhow::Result<()> {
    interrupt::note_signals();
    let place = common::Workspace::new(Path::new("/dev/shm"), "systemd")?;
    let status = systemd::again(place.path())?;
    anyhow::ensure!(status == 0, "the run under systemd ended with status {status}");
    Ok(())
}

/// The settings the options stand for.
fn settings(args: &Args) -> anyhow::Result<Settings> {
    anyhow::ensure!(
        !(args.no_guard && args.kinds == [Kind::Hang]),
        "without warmswap nobody notices a hang: there is nothing to show"
    );
    anyhow::ensure!(
        !(args.no_guard && args.backend == Backends::Mixed),
        "without warmswap nobody gives the disk to another backend"
    );
    let mut kinds = args.kinds.clone();
    if args.no_guard {
        kinds.retain(|kind| *kind != Kind::Hang);
    }
    let mut plan = Plan::random(args.seed, args.failovers, &kinds);
    if args.kill_broker {
        plan = plan.with_broker_kills(args.seed);
    }
    Ok(Settings {
        kills_broker: args.kill_broker,
        backends: args.backend,
        guard: !args.no_guard,
        qemu: Qemu::find(args.qemu)?,
        limits: args.limits,
        plan,
        orders: Orders { seed: args.seed, device: Device::Blk, load: args.load },
        cap: Duration::from_secs(60 * minutes(args)),
        patience: PATIENCE,
        live: args.live,
        sabotage: args.sabotage,
        logs: args.logs.clone(),
    })
}

/// The longest time for injecting.
fn minutes(args: &Args) -> u64 {
    args.minutes.unwrap_or_else(|| 3 + u64::from(args.failovers) / 15)
}

/// The settings for a device that is no disk.
fn other_settings(args: &Args) -> anyhow::Result<other::Settings> {
    let about_disks = args.no_guard || args.kill_broker || args.sabotage.is_some() || args.backend != Backends::Qsd;
    anyhow::ensure!(!about_disks, "--no-guard, --kill-broker, --sabotage and --backend are for disks");
    Ok(other::Settings {
        device: args.device,
        qemu: Qemu::find(args.qemu)?,
        failovers: args.failovers,
        kinds: args.kinds.clone(),
        seed: args.seed,
        cap: Duration::from_secs(60 * minutes(args)),
        json: args.json,
        live: args.live,
        logs: args.logs.clone(),
    })
}

/// When a guest under a campaign counts as lost: far beyond what a loaded host does to it.
const PATIENCE: Patience =
    Patience { silence: Duration::from_secs(60), probe: Duration::from_secs(30), fio: Duration::from_secs(240) };
