//! `lab bench blackout`: how long the guest's disk is silent, guarded and unguarded, alternating in one run.
//!
//! Every sample starts from rest: the pair is whole, no other sample runs. Load for a few milliseconds, then the failure. The
//! order of the kinds within a round is random. [`super::guarded`] and [`super::cold`] say what exactly is measured.

use std::collections::BTreeMap;

use anyhow::ensure;
use serde::Serialize;
use serde_json::{Value, json};

use super::backend::{self, Engine};
use super::broker::Broker;
use super::cold::{Reconnect, Restart, Unguarded};
use super::driver::Shape;
use super::guarded::{Blackout, Guarded};
use super::report::Report;
use super::spread::{Samples, Spread, header, line, rounded};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;
use crate::rig::unguarded::{self, Rule};

/// A blackout beyond this is shown with the broker's report.
const SLOW_NS: u64 = 20_000_000;
/// Load before a failure: shortest and longest.
const LOAD_NS: (u64, u64) = (4_000_000, 12_000_000);
/// Kills per rule for `lost_by_rule`.
const RULE_KILLS: u64 = 15;
/// Phases of the broker's report.
const PHASES: [&str; 6] = ["Draining", "Fencing", "Collecting", "Handing", "Resuming", "Confirming"];

/// Options of `lab bench blackout`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Samples of each kind.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
    /// Guest RAM in MiB for the main figures.
    #[arg(long, default_value_t = 1024)]
    guest_mib: u64,
    /// Guest RAM in MiB for the table by memory.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 512, 2048, 8192])]
    memory: Vec<u64>,
    /// Samples of each kind for each row of that table.
    #[arg(long, default_value_t = 40)]
    memory_samples: u32,
    /// Requests in flight.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128))]
    depth: u16,
    /// The backend's I/O engine.
    #[arg(long, value_enum, default_value_t = Engine::Threads)]
    engine: Engine,
    #[command(flatten)]
    common: super::Common,
}

/// A kind of sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Planned,
    Crash,
    Cold,
    Timer,
}

/// Failovers of one guarded device.
#[derive(Debug, Default)]
struct Felt {
    planned: Samples,
    planned_drained: Samples,
    crash: Samples,
    crash_ended: Samples,
    crash_rest: Samples,
    planned_fenced: u32,
    phases: BTreeMap<(&'static str, &'static str), Samples>,
    survivors: u64,
    waited_for_observer: u32,
}

/// Restarts of the unguarded device.
#[derive(Debug, Default)]
struct Restarts {
    cold: Samples,
    timer: Samples,
    steps: [Samples; 4],
    damage: Damage,
}

/// What QEMU's rule did in the restarts that were measured.
#[derive(Debug, Default, Serialize)]
struct Damage {
    restarts: u64,
    inflight: u64,
    lost: u64,
    duplicated: u64,
}

/// One row of the table by memory.
#[derive(Debug, Serialize)]
struct MemoryRow {
    mib: u64,
    planned_us: Spread,
    crash_us: Spread,
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.memory.iter().chain([&args.guest_mib]).all(|mib| *mib >= 32), "a guest needs 32 MiB");
    let workspace = Workspace::new(&args.common.image_dir, "bench")?;
    let (felt, restarts) = side_by_side(args, &workspace)?;
    let memory = by_memory(args, &workspace)?;
    let lost_by_rule = lost_by_rule(args, &workspace)?;
    let report = report(args, &felt, &restarts, &memory, &lost_by_rule)?;
    report.print(args.common.json, || table(&report.fields));
    Ok(())
}

fn side_by_side(args: &Args, workspace: &Workspace) -> anyhow::Result<(Felt, Restarts)> {
    let mut guarded = guarded(args, workspace, args.guest_mib)?;
    let mut unguarded = unguarded(args, workspace)?;
    let mut choices = Rng::new(args.common.seed, 1);
    let (mut felt, mut restarts) = (Felt::default(), Restarts::default());
    for round in 0..args.samples {
        let mut kinds = [Kind::Planned, Kind::Crash, Kind::Cold, Kind::Timer];
        shuffle(&mut kinds, &mut choices);
        for kind in kinds {
            let load = choices.between(LOAD_NS.0, LOAD_NS.1);
            // A shadow that starts takes a processor: also what is unguarded is measured without one.
            guarded.wait_until_whole()?;
            match kind {
                Kind::Planned => felt.add_planned(&guarded.planned(load)?),
                Kind::Crash => felt.add_crash(&guarded.crash(load)?),
                Kind::Cold => restarts.add_cold(&unguarded.restart(load, Reconnect::AtOnce)?),
                Kind::Timer => restarts.add_timer(&unguarded.restart(load, Reconnect::Timer)?),
            }
        }
        if (round + 1) % 20 == 0 {
            eprintln!(
                "round {}: planned p50 {} us, crash {} us, cold restart {} us, with QEMU's timer {} us",
                round + 1,
                felt.planned.spread().p50,
                felt.crash.spread().p50,
                restarts.cold.spread().p50,
                restarts.timer.spread().p50
            );
        }
    }
    guarded.shut_down()?;
    felt.waited_for_observer = guarded.inexact;
    Ok((felt, restarts))
}

fn by_memory(args: &Args, workspace: &Workspace) -> anyhow::Result<Vec<MemoryRow>> {
    let mut choices = Rng::new(args.common.seed, 2);
    let mut rows = Vec::new();
    for mib in &args.memory {
        let mut guarded = guarded(args, workspace, *mib)?;
        let mut felt = Felt::default();
        for _ in 0..args.memory_samples {
            let load = choices.between(LOAD_NS.0, LOAD_NS.1);
            felt.add_planned(&guarded.planned(load)?);
            felt.add_crash(&guarded.crash(load)?);
        }
        guarded.shut_down()?;
        let row = MemoryRow { mib: *mib, planned_us: felt.planned.spread(), crash_us: felt.crash.spread() };
        eprintln!("{mib} MiB: planned p50 {} us, crash {} us", row.planned_us.p50, row.crash_us.p50);
        rows.push(row);
    }
    Ok(rows)
}

fn lost_by_rule(args: &Args, workspace: &Workspace) -> anyhow::Result<Value> {
    let directory = workspace.directory("rules")?;
    let measure = |rule| unguarded::measure(rule, RULE_KILLS, RULE_KILLS, args.common.seed, &directory);
    Ok(json!({ "qemu": measure(Rule::Qemu)?, "cloud_hypervisor": measure(Rule::CloudHypervisor)? }))
}

fn guarded(args: &Args, workspace: &Workspace, memory_mib: u64) -> anyhow::Result<Guarded> {
    let directory = workspace.directory("guarded")?;
    let image = directory.join("image");
    backend::make_image(&image)?;
    let qsd = backend::on_file(image, 1, args.engine);
    let broker = Broker::start(&directory, &[], &qsd.command_line("{socket}"))?;
    let shape = Shape { memory_mib, depth: args.depth, ..Shape::at(broker.socket()) };
    Guarded::boot(broker, &shape, Rng::new(args.common.seed, 3))
}

fn unguarded(args: &Args, workspace: &Workspace) -> anyhow::Result<Unguarded> {
    let directory = workspace.directory("unguarded")?;
    let image = directory.join("image");
    backend::make_image(&image)?;
    let qsd = backend::on_file(image, 1, args.engine);
    let socket = directory.join("backend.sock");
    let shape = Shape { memory_mib: args.guest_mib, depth: args.depth, ..Shape::at(socket) };
    Unguarded::boot(qsd, &shape, &Rng::new(args.common.seed, 4))
}

fn shuffle(kinds: &mut [Kind], choices: &mut Rng) {
    for last in (1..kinds.len()).rev() {
        kinds.swap(last, choices.below(last as u64 + 1) as usize);
    }
}

impl Felt {
    fn add_planned(&mut self, blackout: &Blackout) {
        note_slow("planned", blackout);
        self.planned.push_ns(blackout.felt_ns);
        if blackout.is_drained() {
            self.planned_drained.push_ns(blackout.felt_ns);
        } else {
            self.planned_fenced += 1;
        }
        self.add_phases("planned", blackout);
    }

    fn add_crash(&mut self, blackout: &Blackout) {
        note_slow("crash", blackout);
        self.crash.push_ns(blackout.felt_ns);
        self.crash_ended.push_ns(blackout.ended_ns);
        self.crash_rest.push_ns(blackout.felt_ns - blackout.ended_ns);
        self.survivors += blackout.report["survivors"].as_u64().unwrap_or(0);
        self.add_phases("crash", blackout);
    }

    fn add_phases(&mut self, kind: &'static str, blackout: &Blackout) {
        for phase in PHASES {
            let spent = blackout.report["phases_us"][phase].as_f64().unwrap_or(0.0);
            self.phases.entry((kind, phase)).or_default().push(spent);
        }
        let own = blackout.report["blackout_us"].as_f64().unwrap_or(0.0);
        self.phases.entry((kind, "blackout")).or_default().push(own);
    }

    fn phases(&self, kind: &str) -> Value {
        let of_kind = self.phases.iter().filter(|((its, _), _)| *its == kind);
        of_kind.map(|((_, phase), samples)| ((*phase).to_owned(), json!(samples.spread()))).collect()
    }
}

impl Restarts {
    fn add_cold(&mut self, restart: &Restart) {
        self.cold.push_ns(restart.first_ns);
        let instants = [restart.reaped_ns, restart.started_ns, restart.connected_ns, restart.first_ns];
        let mut before = 0;
        for (samples, instant) in self.steps.iter_mut().zip(instants) {
            samples.push_ns(instant - before);
            before = instant;
        }
        self.damage.add(restart);
    }

    fn add_timer(&mut self, restart: &Restart) {
        self.timer.push_ns(restart.first_ns);
        self.damage.add(restart);
    }

    fn steps(&self) -> Value {
        let names = ["reaped", "executed", "connected", "first_completion"];
        names.iter().zip(&self.steps).map(|(name, samples)| ((*name).to_owned(), json!(samples.spread()))).collect()
    }
}

impl Damage {
    fn add(&mut self, restart: &Restart) {
        self.restarts += 1;
        self.inflight += restart.inflight;
        self.lost += restart.lost;
        self.duplicated += restart.duplicated;
    }
}

fn report(
    args: &Args,
    felt: &Felt,
    restarts: &Restarts,
    memory: &[MemoryRow],
    lost_by_rule: &Value,
) -> anyhow::Result<Report> {
    let (planned, crash, cold) = (felt.planned.spread(), felt.crash.spread(), restarts.cold.spread());
    let mut report = Report::new("blackout", &args.common);
    report.set("planned_us", &planned)?;
    report.set("crash_us", &crash)?;
    report.set("cold_restart_us", &cold)?;
    report.set("vmm_reconnect_us", &restarts.timer.spread())?;
    report.set("cold_over_crash", &rounded(cold.p50 / crash.p50, 2))?;
    report.set("cold_over_planned", &rounded(cold.p50 / planned.p50, 2))?;
    report.set("planned_drained_us", &felt.planned_drained.spread())?;
    report.set("planned_fenced", &felt.planned_fenced)?;
    report.set("crash_waited_for_observer", &felt.waited_for_observer)?;
    report.set("crash_survivors", &felt.survivors)?;
    report.set("phases_us", &json!({ "planned": felt.phases("planned"), "crash": felt.phases("crash") }))?;
    let crash_steps = json!({ "ended": felt.crash_ended.spread(), "first_completion": felt.crash_rest.spread() });
    report.set("crash_steps_us", &crash_steps)?;
    report.set("cold_steps_us", &restarts.steps())?;
    report.set("memory", &memory)?;
    report.set("lost_by_rule", lost_by_rule)?;
    report.set("lost_here", &restarts.damage)?;
    report.set("depth", &args.depth)?;
    report.set("guest_mib", &args.guest_mib)?;
    report.set("engine", &format!("{:?}", args.engine))?;
    Ok(report)
}

/// Says what the broker thinks of one that took unusually long.
fn note_slow(kind: &str, blackout: &Blackout) {
    if blackout.felt_ns > SLOW_NS {
        let felt = blackout.felt_ns / 1000;
        eprintln!(
            "a slow {kind}: {felt} us, {} us of it until the old primary was gone; {}",
            blackout.ended_ns / 1000,
            blackout.report
        );
    }
}

/// The report for people.
fn table(report: &Value) -> String {
    let mut text = header("silence of the disk, us");
    text += &line("warmswap, planned", &report["planned_us"]);
    text += &line("warmswap, crash", &report["crash_us"]);
    text += &line("cold restart, reconnect at once", &report["cold_restart_us"]);
    text += &line("cold restart, reconnect-ms=100", &report["vmm_reconnect_us"]);
    for kind in ["planned", "crash"] {
        for phase in PHASES {
            text += &line(&format!("  {kind}: {phase}"), &report["phases_us"][kind][phase]);
        }
    }
    for step in ["ended", "first_completion"] {
        text += &line(&format!("  crash: {step}"), &report["crash_steps_us"][step]);
    }
    for step in ["reaped", "executed", "connected", "first_completion"] {
        text += &line(&format!("  cold: {step}"), &report["cold_steps_us"][step]);
    }
    for row in report["memory"].as_array().into_iter().flatten() {
        text += &line(&format!("  planned, {} MiB", row["mib"]), &row["planned_us"]);
        text += &line(&format!("  crash, {} MiB", row["mib"]), &row["crash_us"]);
    }
    text += &format!(
        "cold / crash {} (p50), cold / planned {}; planned but fenced: {}; crashes put off because the observer was inexact: {}\n",
        report["cold_over_crash"],
        report["cold_over_planned"],
        report["planned_fenced"],
        report["crash_waited_for_observer"]
    );
    text += &format!("lost by rule: {}\nlost in these restarts: {}\n", report["lost_by_rule"], report["lost_here"]);
    text
}
