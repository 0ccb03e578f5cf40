//! `lab vm --demo`: the main job in two minutes, and what would have happened without.

use std::time::Duration;

use super::backend::{Backends, Limits};
use super::cache::{Qemu, QemuVersion};
use super::campaign::{self, Injected, Outcome, Settings, to_ms};
use super::device::Device;
use super::orders::{Load, Orders};
use super::plan::{Kind, Plan};
use super::report::Report;
use super::watch::Patience;

/// In the order in which a failover goes through them, as in the broker's report.
const PHASES: [&str; 7] = ["Draining", "Fencing", "Collecting", "Isolating", "Handing", "Resuming", "Confirming"];

/// How often the unguarded daemon is killed, if the guest lives that long.
const BARE_KILLS: usize = 12;

/// Runs the demonstration.
pub(crate) fn run(version: QemuVersion, seed: u64) -> anyhow::Result<()> {
    let guarded = settings(version, seed, true)?;
    println!("\n1. A guest under load; its disk is swapped, killed and hung. warmswap guards it.\n");
    let with = campaign::run(&guarded)?;
    println!(
        "\n2. The same guest and the same kill, up to 12 times. QEMU's own reconnect, the daemon restarted at once, no warmswap.\n"
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
        // One kill often goes well by luck: what was in flight happened to complete in order.
        Plan::steady(&[Kind::Crash; BARE_KILLS], Duration::from_secs(2), Duration::from_secs(2))
    };
    Ok(Settings {
        backends: Backends::Qsd,
        guard,
        kills_broker: false,
        qemu: Qemu::find(version)?,
        limits: Limits::Cloud,
        plan,
        orders: Orders { seed, device: Device::Blk, load: Load::Steady },
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
    println!(
        "\nfailovers (times in µs; the last two are the guest's longest wait for one block, before and around it)"
    );
    print!("  {:<8} {:<8}", "kind", "result");
    PHASES.iter().for_each(|phase| print!(" {phase:>10}"));
    println!(" {:>10} {:>9} {:>10} {:>10}", "blackout", "in flight", "before", "around");
    for Injected { kind, failover, guest_before_us, guest_worst_us, .. } in &outcome.injected {
        let Some(failover) = failover else { continue };
        print!("  {:<8} {:<8}", kind.word(), failover.result);
        let number = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| us.to_string());
        PHASES.iter().for_each(|phase| print!(" {:>10}", number(failover.phases_us.get(*phase).copied())));
        let blackout = number(failover.blackout_us);
        println!(" {blackout:>10} {:>9} {guest_before_us:>10} {guest_worst_us:>10}", failover.inflight);
    }
}

/// The two runs side by side; an error if the guarded guest noticed anything.
fn print_comparison(guarded: &Settings, with: Outcome, bare: &Settings, without: Outcome) -> anyhow::Result<()> {
    let longest = |outcome: &Outcome| {
        let kills = outcome.injected.iter().filter(|one| one.kind == Kind::Crash);
        format!("{:.1} ms", to_ms(kills.map(|one| one.guest_worst_us).max().unwrap_or(0)))
    };
    let (longest_with, longest_without) = (longest(&with), longest(&without));
    let given_up = without.trouble.clone();
    let (with, without) = (Report::new(guarded, with), Report::new(bare, without));
    println!("\n  {:<40} {:>12} {:>12}", "what the guest saw", "warmswap", "without");
    let row = |name: &str, left: String, right: String| println!("  {name:<40} {left:>12} {right:>12}");
    row("failovers", with.failovers.to_string(), without.failovers.to_string());
    row("longest wait for one block at a kill", longest_with, longest_without);
    row("I/O errors and kernel complaints", with.guest_io_errors.to_string(), without.guest_io_errors.to_string());
    row("blocks or files with wrong content", with.verify_errors.to_string(), without.verify_errors.to_string());
    row("everything held", yes(with.ok).to_owned(), yes(without.ok).to_owned());
    if let Some(why) = given_up {
        println!("\n  without warmswap the guest's disk was lost at kill {}: {why}", without.failovers);
    }
    anyhow::ensure!(with.ok, "the guarded guest noticed, or something was not checked");
    Ok(())
}

fn yes(held: bool) -> &'static str {
    if held { "yes" } else { "NO" }
}
