//! `lab rig`: real broker, real backends, real kills, an independent oracle. No VM.
//!
//! A user-space guest ([`crate::guest`]) drives a device guarded by a real broker process with real qemu-storage-daemons,
//! which are killed, stopped, made to spin or fed poison at random instants under load. The oracle knows what every block
//! must hold, which heads are outstanding, and what memory nobody may write. A seed repeats options and injections; time
//! does not repeat, so a seed is a description of a run, not a recording.
//!
//! What is checked: each request is completed exactly once, in bounded time, with the right status and length, and with an
//! interrupt; each read returns what the last acknowledged write left; the whole image agrees at the end; no completed
//! buffer or recycled descriptor is used again; the broker holds no more descriptors, processes or memory than before;
//! each failover settles or is refused with a reason. A device that the broker halts with a reason counts as refused; the
//! guest is reset and the run goes on ([`halt`]). What is not: network storage, packed rings, guests other than ours.
//!
//! The control ([`unguarded`]) runs the same oracle without a broker, by the reconnect rules of QEMU and Cloud Hypervisor.
//! It must find losses.

pub(crate) mod block;
mod broker;
mod control;
mod epoch;
mod failover;
mod halt;
mod kind;
pub(crate) mod ledger;
mod load;
mod options;
mod process;
mod programs;
mod progress;
mod sys;
mod tally;
mod trap;
pub(crate) mod unguarded;
mod verdict;
mod vmm;
mod world;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use self::epoch::Plan;
use self::kind::Kind;
use self::options::{Backends, Fixed};
use self::progress::Progress;
use self::tally::Tally;
use self::unguarded::{Damage, Rule};
use self::vmm::Behaviour;
use crate::common::commit::commit;
use crate::common::interrupt;
use crate::common::systemd;
use crate::common::workspace::Workspace;

/// Kills per rule in the control.
const CONTROL_KILLS: u64 = 15;

/// Most kills per rule until the control must have shown something.
const CONTROL_KILLS_MAX: u64 = 150;

/// Options of `lab rig`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Failovers to settle.
    #[arg(long, default_value_t = 1000)]
    failovers: u64,
    /// Seed of all choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Kinds of failures.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = ALL_KINDS)]
    kinds: Vec<Kind>,
    /// What the VMM may do besides.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Behaviour::ALL)]
    vmm: Vec<Behaviour>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Backends of the pair.
    #[arg(long, value_enum, default_value = "qsd")]
    backend: Backends,
    /// Number of queues, for all guests.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4))]
    queues: Option<u16>,
    /// Ring size, for all guests: a power of two from 32 on.
    #[arg(long)]
    size: Option<u16>,
    /// Requests in flight per queue, for all guests.
    #[arg(long)]
    depth: Option<u16>,
    /// Directory for images and sockets; a tmpfs by default.
    #[arg(long, default_value = "/dev/shm")]
    image_dir: PathBuf,
    /// Failovers of one broker, before the next epoch begins with other options.
    #[arg(long, default_value_t = EPOCH_FAILOVERS, value_parser = clap::value_parser!(u64).range(1..))]
    epoch_failovers: u64,
    /// First epoch, to repeat one of a longer run.
    #[arg(long, default_value_t = 0)]
    first_epoch: u64,
    /// Start the broker under a keeper, and kill it once for each failover: in turns at some instant under load, and between any two things
    /// that it does, which is in the middle of the failover more often than not
    #[arg(long)]
    kill_broker: bool,
    /// With systemd as the keeper: a real one, the first process of a namespace of its own, in which all of this runs. Needs root
    #[arg(long, requires = "kill_broker")]
    systemd: bool,
    /// Start the broker under a keeper, and upgrade it under load before each failover: from this other build of `lab` to this one and back
    #[arg(long, value_name = "PROGRAM", conflicts_with = "kill_broker")]
    upgrade: Option<PathBuf>,
    /// Only the control: no broker, kills, reconnect by the VMMs' rules.
    #[arg(long)]
    no_guard: bool,
    /// Print the options of every guest and everything that is done.
    #[arg(long, short)]
    verbose: bool,
    /// One more option for `warmswap guard`; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    guard: Vec<String>,
}

const EPOCH_FAILOVERS: u64 = 250;

const ALL_KINDS: [Kind; 8] =
    [Kind::Planned, Kind::Now, Kind::Crash, Kind::Stop, Kind::Spin, Kind::Shadow, Kind::Both, Kind::Poison];

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(
        args.size.is_none_or(|size| size.is_power_of_two() && size >= 32),
        "--size must be a power of two from 32 on"
    );
    interrupt::note_signals();
    if args.systemd && !systemd::is_inside() {
        let workspace = Workspace::new(&args.image_dir, "systemd")?;
        let status = systemd::again(workspace.path())?;
        ensure!(status == 0, "the run under systemd ended with status {status}");
        return Ok(());
    }
    let workspace = Workspace::new(&systemd::place(&args.image_dir), "rig")?;
    let lost_by_rule = control(args, &workspace)?;
    let started = Instant::now();
    let mut tally = Tally::default();
    let ended = if args.no_guard { Ok(()) } else { epochs(args, &workspace, &mut tally) };
    let seconds = started.elapsed().as_secs_f64();
    let complete = ended.is_ok() && !interrupt::is_asked();
    let report = report(args, &tally, &lost_by_rule, seconds, complete);
    if args.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    ended?;
    ensure!(tally.is_clean(), "the oracle found something");
    ensure!(complete, "interrupted after {} of {} failovers", tally.failovers, args.failovers);
    Ok(())
}

/// What plain reconnecting does, judged by the same oracle.
fn control(args: &Args, workspace: &Workspace) -> anyhow::Result<Value> {
    let kills = if args.no_guard { args.failovers } else { CONTROL_KILLS };
    let kills_max = kills.max(CONTROL_KILLS_MAX);
    let measure = |rule| -> anyhow::Result<Damage> {
        let damage = unguarded::measure(rule, kills, kills_max, args.seed, workspace.path())
            .with_context(|| format!("the control by the rule of {rule:?}"))?;
        ensure!(
            damage.is_seen() || interrupt::is_asked(),
            "the oracle has no teeth: {kills} kills by the rule of {rule:?} showed nothing",
            kills = damage.kills
        );
        Ok(damage)
    };
    Ok(json!({ "qemu": measure(Rule::Qemu)?, "cloud_hypervisor": measure(Rule::CloudHypervisor)? }))
}

fn epochs(args: &Args, workspace: &Workspace, tally: &mut Tally) -> anyhow::Result<()> {
    process::adopt_orphans()?;
    let direct_possible = epoch::has_direct(workspace.path())?;
    let possible = |kind: &Kind| *kind != Kind::Poison || args.backend.can_be_poisoned();
    let kinds: Vec<Kind> = args.kinds.iter().copied().filter(possible).collect();
    ensure!(!kinds.is_empty(), "no request poisons this backend: name other kinds");
    let mut progress = Progress::new(args.failovers);
    let mut epoch = args.first_epoch;
    while tally.failovers < args.failovers && !interrupt::is_asked() {
        let directory = workspace.path().join(format!("epoch-{epoch}"));
        std::fs::create_dir_all(&directory)?;
        let plan = Plan {
            seed: args.seed,
            epoch,
            failovers: args.epoch_failovers.min(args.failovers - tally.failovers),
            kinds: &kinds,
            behaviours: &args.vmm,
            fixed: Fixed { queues: args.queues, size: args.size, depth: args.depth, backends: args.backend },
            directory: &directory,
            direct_possible,
            guard: &args.guard,
            kills_broker: args.kill_broker,
            upgrade: args.upgrade.as_deref(),
            verbose: args.verbose,
        };
        let started = Instant::now();
        let before = tally.failovers;
        let ended = epoch::run(&plan, tally, &mut progress);
        let done = tally.failovers - before;
        if ended.is_err() || !tally.is_clean() {
            explain_failure(args, epoch, tally);
            ended?;
            bail!("the oracle found something in epoch {epoch}");
        }
        std::fs::remove_dir_all(&directory)?;
        tally.rig_rss.note(progress::rss_bytes()?);
        let seconds = started.elapsed().as_secs_f64();
        eprintln!(
            "epoch {epoch}: {done} failovers in {seconds:.1} s ({:.0}/s), {} in all, {} with requests in flight",
            done as f64 / seconds,
            tally.failovers,
            tally.with_inflight
        );
        epoch += 1;
    }
    Ok(())
}

fn explain_failure(args: &Args, epoch: u64, tally: &Tally) {
    eprintln!("FAILED: seed {}, epoch {epoch}, commit {}", args.seed, commit());
    eprintln!("repeat: {} --first-epoch {epoch}", command(args));
    for finding in &tally.verdict.findings {
        eprintln!("finding: {finding}");
    }
}

fn report(args: &Args, tally: &Tally, lost_by_rule: &Value, seconds: f64, ended: bool) -> Value {
    let mut report = tally.json();
    let fields = report.as_object_mut().expect("the tally is an object");
    fields.insert("lost_by_rule".into(), lost_by_rule.clone());
    fields.insert("backend".into(), json!(args.backend.name()));
    fields.insert("seed".into(), json!(args.seed));
    fields.insert("commit".into(), json!(commit()));
    fields.insert("command".into(), json!(command(args)));
    fields.insert("seconds".into(), json!(seconds));
    fields.insert("failovers_per_second".into(), json!(tally.failovers as f64 / seconds));
    fields.insert("complete".into(), json!(ended));
    if !ended {
        // A run that was cut short by a failure bounds nothing.
        fields.insert("bound_95".into(), Value::Null);
    }
    report
}

/// The command that repeats the run.
fn command(args: &Args) -> String {
    let kinds: Vec<&str> = args.kinds.iter().map(|kind| kind.name()).collect();
    let mut command = format!(
        "cargo run -rq -p lab -- rig --failovers {} --seed {} --kinds {} --json",
        args.failovers,
        args.seed,
        kinds.join(",")
    );
    if args.backend != Backends::Qsd {
        command.push_str(&format!(" --backend {}", args.backend.name()));
    }
    for (name, value) in [("queues", args.queues), ("size", args.size), ("depth", args.depth)] {
        if let Some(value) = value {
            command.push_str(&format!(" --{name} {value}"));
        }
    }
    if args.vmm != Behaviour::ALL {
        let behaviours: Vec<&str> = args.vmm.iter().map(|behaviour| behaviour.name()).collect();
        command.push_str(&format!(" --vmm {}", behaviours.join(",")));
    }
    if args.epoch_failovers != EPOCH_FAILOVERS {
        command.push_str(&format!(" --epoch-failovers {}", args.epoch_failovers));
    }
    if args.kill_broker {
        command.push_str(" --kill-broker");
    }
    if args.systemd {
        command.push_str(" --systemd");
    }
    if let Some(program) = &args.upgrade {
        command.push_str(&format!(" --upgrade {}", program.display()));
    }
    if args.no_guard {
        command.push_str(" --no-guard");
    }
    for option in &args.guard {
        command.push_str(&format!(" --guard={option}"));
    }
    command
}
