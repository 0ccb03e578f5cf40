//! `lab vm --device net|rng|scsi|fs`: the same guest and the same failovers, with a device that is no disk, served by a backend that
//! others have written.
//!
//! The guest checks what it gets: datagrams and a stream that come back, random bytes, blocks, files. What is asked of a device depends on
//! its type, and is said in [`Demand`].

mod account;
mod backend;
mod demand;
pub(super) mod image;
mod report;
mod run;

use std::path::PathBuf;
use std::time::Duration;

use super::cache::Qemu;
use super::device::Device;
use super::plan::{Kind, Plan};
use backend::Program;
use demand::Demand;
use report::Report;

/// What to run.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The kind of device; no disk.
    pub(crate) device: Device,
    /// The programs of QEMU.
    pub(crate) qemu: Qemu,
    /// Failovers to inject.
    pub(crate) failovers: u32,
    /// Of which kinds.
    pub(crate) kinds: Vec<Kind>,
    /// Seed of loads and instants.
    pub(crate) seed: u64,
    /// The longest time for injecting.
    pub(crate) cap: Duration,
    /// Print the verdict as JSON.
    pub(crate) json: bool,
    /// Print a line for each second of the guest.
    pub(crate) live: bool,
    /// Keep the logs of the run in this directory.
    pub(crate) logs: Option<PathBuf>,
}

/// Runs the instrument. A backend that is not installed is said to be missing, and nothing is checked.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    let Some(program) = Program::find(settings.device) else {
        let missing = Program::name(settings.device);
        if settings.json {
            println!("{}", serde_json::json!({ "skipped": missing, "device": settings.device.name() }));
        }
        println!(
            "skipped: {missing} is not installed, and {} was not tested: `cargo xtask setup --backends`",
            settings.device.name()
        );
        return Ok(());
    };
    let demand = Demand::of(settings.device);
    let plan = demand.plan(Plan::in_turn(settings.seed, settings.failovers, &settings.kinds));
    let report = Report::new(settings, &demand, &plan, run::run(settings, &program, &demand, &plan)?);
    if settings.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    anyhow::ensure!(report.ok, "the guest noticed, or something was not checked");
    Ok(())
}
