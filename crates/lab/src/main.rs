//! The laboratory: real processes, real kills, real guests. Never shipped.
//!
//! Each subcommand is one instrument; its module says what it checks and what it does not.

mod bench;
mod campaign;
mod common;
mod conform;
mod crash;
mod devices;
mod eval;
mod fence;
mod guest;
mod rig;
mod score;
mod sim;
mod train;
mod vm;
mod vus;
mod zoo;

use clap::{Parser, Subcommand};

/// Instruments that show what warmswap promises.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Args {
    #[command(subcommand)]
    instrument: Instrument,
}

/// The instruments.
#[derive(Debug, Subcommand)]
enum Instrument {
    /// An unmodified QEMU with a Linux guest on a guarded disk, failovers injected under verified load.
    Vm(vm::Args),
    /// Our own guest on a guarded device: real kills at random instants, judged by an independent oracle.
    Rig(rig::Args),
    /// One daemon that guards very many devices: what each costs, and what happens to all of them at once.
    Devices(devices::Args),
    /// What a failover costs, and what being guarded costs.
    Bench(bench::Args),
    /// The whole system simulated, one seed a run: real messages, rings and decisions, and every fault at every instant.
    Sim(sim::Args),
    /// Our own backend alone, killed before every store it makes into shared memory, and what the next one makes of it.
    Crash(crash::Args),
    /// The main job in three minutes: faults that are foreseen, and what would have been.
    Demo(campaign::end_to_end::demo::Args),
    /// Fault campaigns: real backends driven into failure, and healthy ones, with labels and profiles.
    Campaign(campaign::Args),
    /// Any vhost-user back-end, checked against what the specification asks for and a failover depends on.
    Conform(conform::Args),
    /// The late write of a killed backend, and the fence that holds it off.
    Fence(fence::Args),
    /// How unusual each row of a series is: the detector of the failure model on any table.
    Score(score::Args),
    /// Fits the model that components begin with to the runs of a campaign.
    Train(train::Args),
    /// What the failure model is worth, beside what others run.
    Eval(eval::Args),
    /// How well the scores of a detector agree with labels: VUS-PR.
    Vus(vus::Args),
    /// Known-bad variants of our own code, and what catches each.
    Zoo(zoo::Args),
}

fn main() -> std::process::ExitCode {
    // The broker under test is this very binary: `lab warmswap guard …` is a real warmswap process of the same build.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "warmswap") {
        return warmswap::cli::main(std::env::args_os().skip(1));
    }
    // Many devices in one process: a file with the options of `guard` for each, a JSON array of words per line.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "guard") {
        return common::together::main(std::env::args_os().nth(2));
    }
    // And so is the backend: `lab blk …` is `warmswap blk …`.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "blk") {
        return warmswap::cli::main(std::env::args_os());
    }
    // A backend of a pair, of which the first fails and the others do not.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == campaign::end_to_end::TURN) {
        return campaign::end_to_end::turn(std::env::args_os().skip(2));
    }
    // One known bug in the simulator, until a seed fails.
    #[cfg(feature = "zoo")]
    if std::env::args_os().nth(1).is_some_and(|verb| verb == zoo::HUNT) {
        return zoo::child(std::env::args_os().skip(2));
    }
    let outcome = match Args::parse().instrument {
        Instrument::Vm(args) => vm::run(&args),
        Instrument::Rig(args) => rig::run(&args),
        Instrument::Devices(args) => devices::run(&args),
        Instrument::Bench(args) => bench::run(&args),
        Instrument::Sim(args) => sim::run(&args),
        Instrument::Crash(args) => crash::run(&args),
        Instrument::Demo(args) => campaign::end_to_end::demo::run(&args),
        Instrument::Campaign(args) => campaign::run(&args),
        Instrument::Conform(args) => conform::run(&args),
        Instrument::Fence(args) => fence::run(&args),
        Instrument::Score(args) => score::run(&args),
        Instrument::Train(args) => train::run(&args),
        Instrument::Eval(args) => eval::run(&args),
        Instrument::Vus(args) => vus::run(&args),
        Instrument::Zoo(args) => zoo::run(&args),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:?}");
            std::process::ExitCode::FAILURE
        }
    }
}
