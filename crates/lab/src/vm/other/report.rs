//! The verdict on a run, for people and for programs.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Settings;
use super::account::Totals;
use super::backend::Program;
use super::demand::{Death, Demand};
use super::run::Outcome;
use crate::common::commit::commit;
use crate::vm::campaign::to_ms;
use crate::vm::plan::{Kind, Plan};
use crate::vm::report::{Times, row, show_times};

/// The verdict. Its field names are read by other programs.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether everything held that the device's type promises.
    pub(super) ok: bool,
    device: &'static str,
    backend: &'static str,
    /// Failovers that came to their end.
    failovers: usize,
    requested: usize,
    kinds: BTreeMap<&'static str, usize>,
    refused: usize,
    halted: usize,
    /// What a refusal or a halt said.
    reasons: Vec<String>,
    /// Requests that never were answered, of all loads.
    lost: u64,
    /// The most that the device's type allows to be lost in so many failovers.
    lost_max: u64,
    /// Answers after more than 100 ms.
    late: u64,
    /// Answers that came more than once.
    repeated: u64,
    /// Answers with other content than they must have.
    wrong: u64,
    /// Errors the guest was given, complaints of its kernel included.
    guest_errors: u64,
    longest_us: u64,
    loads: BTreeMap<String, Totals>,
    inflight: u64,
    survivors: u64,
    recovery: BTreeMap<String, usize>,
    fences: BTreeMap<String, usize>,
    blackout_us: BTreeMap<&'static str, Times>,
    incomplete: Vec<String>,
    trouble: Option<String>,
    leaks: Vec<String>,
    kernel_log: Vec<String>,
    notes: Vec<String>,
    guest_boot_ms: Option<u64>,
    guest_seconds: u64,
    seed: u64,
    qemu: String,
    guest_kernel: String,
    commit: String,
    command: String,
    seconds: u64,
}

impl Report {
    /// Judges an outcome.
    pub(super) fn new(settings: &Settings, demand: &Demand, plan: &Plan, outcome: Outcome) -> Self {
        let Outcome { injected, account, kernel_log, trouble, leaks, took, kernel } = outcome;
        let ended = |result: &str| injected.iter().filter(|(_, failover)| failover.result == result).count();
        let (failovers, refused, halted) = (ended("settled"), ended("refused"), ended("halted"));
        let count = |kind: Kind| injected.iter().filter(|(found, _)| *found == kind).count();
        let kinds = [Kind::Planned, Kind::Crash, Kind::Hang].map(|kind| (kind.word(), count(kind))).into();
        let settled = || injected.iter().filter(|(_, failover)| failover.result == "settled");
        let (mut recovery, mut fences) = (BTreeMap::new(), BTreeMap::new());
        let mut blackouts: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for (kind, failover) in settled() {
            *recovery.entry(failover.recovery.clone()).or_default() += 1;
            *fences.entry(failover.fence.clone()).or_default() += 1;
            blackouts.entry(kind.word()).or_default().extend(failover.blackout_us);
        }
        let reasons = injected.iter().filter(|(_, failover)| failover.result != "settled");
        let reasons = reasons.map(|(kind, failover)| format!("{}: {}", kind.word(), failover.message)).collect();
        let sum = |of: fn(&Totals) -> u64| account.loads.values().map(of).sum::<u64>();
        let (lost, wrong, errors) = (sum(|load| load.lost), sum(|load| load.wrong), sum(|load| load.errors));
        let lost_max = demand.lost_per_failover * failovers as u64;
        let longest_us = account.loads.values().map(|load| load.longest_us).max().unwrap_or(0);
        let guest_errors = errors + kernel_log.trouble.len() as u64;
        let died = plan.steps.iter().any(|step| step.kind != Kind::Planned);
        let halts_wanted = match demand.death {
            Death::Settles => 0..=0,
            Death::Halts => usize::from(died)..=usize::from(died),
            Death::HaltsIfOwed => 0..=usize::from(died),
        };
        let stands_still = halted > 0;
        let lacks = [
            (!kernel_log.marked, "the kernel log was not read"),
            (account.loads.is_empty(), "no load reported"),
            (!stands_still && !account.loads.values().all(|load| load.ended), "a load did not come to its end"),
            (injected.len() < plan.steps.len(), "not every failover was injected"),
            (halted < *halts_wanted.start(), "the device did not halt"),
            (halted > *halts_wanted.end(), "the device halted"),
            (!stands_still && longest_us > demand.longest_us, "the guest waited for too long"),
            (lost > lost_max, "more was lost than the type allows"),
        ];
        let incomplete: Vec<String> =
            lacks.into_iter().filter(|(lacking, _)| *lacking).map(|(_, what)| what.to_owned()).collect();
        let clean = wrong == 0 && guest_errors == 0 && trouble.is_none() && leaks.is_empty();
        let ok = clean && incomplete.is_empty() && failovers + halted == plan.steps.len();
        Self {
            ok,
            device: settings.device.name(),
            backend: Program::name(settings.device),
            failovers,
            requested: plan.steps.len(),
            kinds,
            refused,
            halted,
            reasons,
            lost,
            lost_max,
            late: sum(|load| load.late),
            repeated: sum(|load| load.repeated),
            wrong,
            guest_errors,
            longest_us,
            inflight: settled().map(|(_, failover)| failover.inflight).sum(),
            survivors: settled().map(|(_, failover)| failover.survivors).sum(),
            loads: account.loads,
            recovery,
            fences,
            blackout_us: blackouts.into_iter().map(|(kind, list)| (kind, Times::of(list))).collect(),
            incomplete,
            trouble,
            leaks,
            kernel_log: kernel_log.trouble,
            notes: account.notes,
            guest_boot_ms: account.boot_ms,
            guest_seconds: account.seconds,
            seed: settings.seed,
            qemu: settings.qemu.banner.clone(),
            guest_kernel: kernel,
            commit: commit(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            seconds: took.as_secs(),
        }
    }

    /// Prints the verdict as a table.
    pub(super) fn print(&self) {
        let kinds: Vec<String> = self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        println!(
            "guest {} on {}, guarded by warmswap, QEMU {}, Linux {}, seed {}",
            self.device, self.backend, self.qemu, self.guest_kernel, self.seed
        );
        row("failovers settled", format!("{} of {} (injected: {})", self.failovers, self.requested, kinds.join(", ")));
        row("refused, halted", format!("{}, {}", self.refused, self.halted));
        self.reasons.iter().take(8).for_each(|reason| row("because", reason));
        let levels: Vec<String> = self.recovery.iter().map(|(level, count)| format!("{count} {level}")).collect();
        row("recovery", levels.join(", "));
        row("in flight, survivors", format!("{}, {} in all", self.inflight, self.survivors));
        for (kind, times) in &self.blackout_us {
            row(&format!("blackout, {kind}"), show_times(times));
        }
        for (name, load) in &self.loads {
            let Totals { begun, done, late, lost, repeated, wrong, errors, longest_us, .. } = load;
            row(
                &format!("guest, {name}"),
                format!(
                    "{begun} begun, {done} done, {late} late, {lost} lost, {repeated} repeated, {wrong} wrong, {errors} errors, \
                     longest {:.1} ms",
                    to_ms(*longest_us)
                ),
            );
        }
        row("lost in all", format!("{}, allowed {}", self.lost, self.lost_max));
        row("guest errors", self.guest_errors.to_string());
        for (name, list) in [
            ("not as it must be", &self.incomplete),
            ("left over", &self.leaks),
            ("kernel log", &self.kernel_log),
            ("note", &self.notes),
        ] {
            list.iter().take(8).for_each(|line| row(name, line));
        }
        if let Some(why) = &self.trouble {
            row("given up", why);
        }
        row("commit, time", format!("{}, {} s", self.commit, self.seconds));
        println!("{}", if self.ok { "passed" } else { "FAILED" });
    }
}
