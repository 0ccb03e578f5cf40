//! `lab vm --demo`: the main job in two minutes, and what would have happened without.

use std::time::Duration;

use super::backend::Limits;
use super::cache::{Qemu, QemuVersion};
use super::campaign::{self, Injected, Outcome, Settings, to_ms};
use super::orders::{Load, Orders};
use super::plan::{Kind, Plan};
use super::report::Report;
use super::watch::Patience;

/// In the order of DESIGN and of the broker's report.
const PHASES: [&str; 7] = ["Draining", "Fencing", "Collecting", "Isolating", "Handing", "Resuming", "Confirming"];

/// Runs the demonstration.
pub(crate) fn run(version: QemuVersion, seed: u64) -> anyhow::Result<()> {
    let guarded = settings(version, seed, true)?;
    println!("\n1. A guest under load; its disk is swapped, killed and hung. warmswap guards it.\n");
    let with = campaign::run(&guarded)?;
    println!(
        "\n2. The same guest and the same kill. QEMU's own reconnect, the daemon restarted at once, no warmswap.\n"
    );
    let bare = settings(version, seed, false)?;
    let without = campaign::run(&bare)?;
    print_failovers(&with);
    print_comparison(&guarded, with, &bare, without)
}

fn settings(version: QemuVersion, seed: u64, guard: bool) -> anyhow::Result<Settings> {
    let plan = if guard {
        Plan::steady(&[Kind::Planned, Kind::Crash, Kind::Hang], Duration::from_secs(5), Duration::from_secs(4))
    } else {
        Plan::steady(&[Kind::Crash], Duration::from_secs(5), Duration::from_secs(8))
    };
    Ok(Settings {
        guard,
        qemu: Qemu::find(version)?,
        limits: Limits::Cloud,
        plan,
        orders: Orders { seed, load: Load::Steady },
        cap: Duration::from_secs(90),
        // A request lost for good need not be watched for longer than it takes to be sure.
        patience: Patience {
            silence: Duration::from_secs(30),
            probe: Duration::from_secs(if guard { 30 } else { 10 }),
            fio: Duration::from_secs(if guard { 90 } else { 25 }),
        },
        live: true,
        sabotage: None,
        logs: None,
    })
}

/// One row for each failover.
fn print_failovers(outcome: &Outcome) {
    println!("\nfailovers (phases in µs)");
    print!("  {:<8} {:<8}", "kind", "result");
    PHASES.iter().for_each(|phase| print!(" {phase:>10}"));
    println!(" {:>10} {:>9} {:>14}", "blackout", "in flight", "guest's worst");
    for Injected { kind, failover, guest_worst_us, .. } in &outcome.injected {
        let Some(failover) = failover else { continue };
        print!("  {:<8} {:<8}", kind.word(), failover.result);
        let number = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| us.to_string());
        PHASES.iter().for_each(|phase| print!(" {:>10}", number(failover.phases_us.get(*phase).copied())));
        let blackout = number(failover.blackout_us);
        println!(" {blackout:>10} {:>9} {:>11.1} ms", failover.inflight, to_ms(*guest_worst_us));
    }
}

/// The two runs side by side; an error if the guarded guest noticed anything.
fn print_comparison(guarded: &Settings, with: Outcome, bare: &Settings, without: Outcome) -> anyhow::Result<()> {
    let last = |outcome: &Outcome, kind| {
        outcome.injected.iter().filter(|one| one.kind == kind).map(|one| one.guest_worst_us).max().unwrap_or(0)
    };
    let (kill_with, kill_without) = (last(&with, Kind::Crash), last(&without, Kind::Crash));
    let given_up = without.trouble.clone().unwrap_or_else(|| "-".to_owned());
    let (with, without) = (Report::new(guarded, with), Report::new(bare, without));
    println!("\n  {:<36} {:>16} {:>16}", "the kill, as the guest saw it", "warmswap", "without");
    let row = |name: &str, left: String, right: String| println!("  {name:<36} {left:>16} {right:>16}");
    row("longest wait for one block", format!("{:.1} ms", to_ms(kill_with)), format!("{:.1} ms", to_ms(kill_without)));
    row("I/O errors, kernel complaints", with.guest_io_errors.to_string(), without.guest_io_errors.to_string());
    row("blocks or files with wrong content", with.verify_errors.to_string(), without.verify_errors.to_string());
    row("file system check", clean(&with), clean(&without));
    row("everything held", with.ok.to_string(), without.ok.to_string());
    if given_up != "-" {
        println!("\n  without warmswap, the guest was given up: {given_up}");
    }
    anyhow::ensure!(with.ok, "the guarded guest noticed, or something was not checked");
    Ok(())
}

fn clean(report: &Report) -> String {
    if report.fsck_clean { "clean" } else { "not clean" }.to_owned()
}
