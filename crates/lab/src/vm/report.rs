//! The verdict on a run, for people and for programs.

use std::collections::BTreeMap;

use serde::Serialize;

use super::campaign::{Outcome, Settings, to_ms};
use super::checks::Findings;
use super::watch::{FioTotals, LoadTotals};
use crate::common::commit::commit;

/// Median, 99th percentile and maximum of a list of times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Times {
    /// Median.
    pub(crate) p50: u64,
    /// 99th percentile.
    pub(crate) p99: u64,
    /// Maximum.
    pub(crate) max: u64,
    /// How many.
    pub(crate) n: usize,
}

impl Times {
    /// Of a list of times.
    pub(crate) fn of(mut list: Vec<u64>) -> Self {
        list.sort_unstable();
        let rank = |percent: usize| list.get((list.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        let at = |percent| rank(percent).unwrap_or(0);
        Self { p50: at(50), p99: at(99), max: list.last().copied().unwrap_or(0), n: list.len() }
    }
}

/// The same in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Milliseconds {
    p50: f64,
    p99: f64,
    max: f64,
    n: usize,
}

impl Milliseconds {
    fn of(times: Times) -> Self {
        Self { p50: to_ms(times.p50), p99: to_ms(times.p99), max: to_ms(times.max), n: times.n }
    }
}

/// The verdict. Its field names are read by other programs.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Whether everything held.
    pub(crate) ok: bool,
    /// Failovers that came to their end.
    pub(crate) failovers: usize,
    requested: usize,
    kinds: BTreeMap<&'static str, usize>,
    refused: usize,
    halted: usize,
    with_inflight: usize,
    survivors: u64,
    fences: BTreeMap<String, usize>,
    /// Errors the guest was given, in whatever form it noticed them.
    pub(crate) guest_io_errors: u64,
    /// Contents that were not what had been acknowledged.
    pub(crate) verify_errors: u64,
    /// The file system check found nothing.
    pub(crate) fsck_clean: bool,
    incomplete: Vec<String>,
    trouble: Option<String>,
    leaks: Vec<String>,
    seed: u64,
    /// Upper bound of the failure rate the count supports, at 95 %; none if there was a failure.
    bound: Option<f64>,
    blackout_us: BTreeMap<String, Times>,
    phases_us: BTreeMap<String, Times>,
    guest_longest_us: u64,
    guest_boot_ms: Option<u64>,
    guest_iops_mean: u64,
    fio: FioTotals,
    files: LoadTotals,
    stamps: LoadTotals,
    image: Findings,
    kernel_log: Vec<String>,
    notes: Vec<String>,
    broker_rss_bytes_max: u64,
    /// Brokers that were killed, those of them in the middle of a failover, and how long it took until the next one answered.
    broker_kills: u64,
    broker_kills_in_failover: u64,
    readopt_ms: Option<Milliseconds>,
    refusals: BTreeMap<String, usize>,
    guard: bool,
    backend: &'static str,
    /// Requests that unguarded backends have submitted again for dead ones.
    resubmitted: u64,
    qemu: String,
    guest_kernel: String,
    commit: String,
    command: String,
    seconds: u64,
}

impl Report {
    /// Judges an outcome.
    pub(crate) fn new(settings: &Settings, outcome: Outcome) -> Self {
        let incomplete = incomplete(settings, &outcome);
        let Outcome { injected, account, kernel_log, findings, trouble, leaks, resubmitted, .. } = outcome;
        let Outcome { broker_rss_bytes_max, broker_kills, broker_kills_in_failover, readopted_us, .. } = outcome;
        let Outcome { took, kernel, .. } = outcome;
        let (files, stamps) = (account.files.unwrap_or_default(), account.stamps.unwrap_or_default());
        let guest_io_errors = kernel_log.trouble.len() as u64 + stamps.errors + files.errors + account.fio.cut_short;
        let verify_errors = account.fio.errors
            + stamps.mismatches
            + files.mismatches
            + findings.fio_bad
            + findings.stamps_bad
            + findings.digests_differ;
        let ended = |result: &str| {
            injected.iter().filter_map(|one| one.failover.as_ref()).filter(|failover| failover.result == result).count()
        };
        let bare = injected.iter().filter(|one| one.failover.is_none()).count();
        let (failovers, refused, halted) = (ended("settled") + bare, ended("refused"), ended("halted"));
        let mut refusals = BTreeMap::new();
        for one in injected.iter().filter_map(|one| one.failover.as_ref()).filter(|one| one.result == "refused") {
            *refusals.entry(one.message.clone()).or_default() += 1;
        }
        let mut kinds = BTreeMap::from([("planned", 0), ("crash", 0), ("hang", 0)]);
        let mut fences = BTreeMap::new();
        let mut blackouts: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let mut phases: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let (mut with_inflight, mut survivors) = (0, 0);
        for one in &injected {
            *kinds.entry(one.kind.word()).or_default() += 1;
            let Some(failover) = one.failover.as_ref().filter(|failover| failover.result == "settled") else {
                continue;
            };
            *fences.entry(failover.fence.clone()).or_default() += 1;
            with_inflight += usize::from(failover.inflight > 0);
            survivors += failover.survivors;
            blackouts.entry(one.kind.word().to_owned()).or_default().extend(failover.blackout_us);
            for (phase, us) in &failover.phases_us {
                phases.entry(phase.clone()).or_default().push(*us);
            }
        }
        let times =
            |lists: BTreeMap<String, Vec<u64>>| lists.into_iter().map(|(key, list)| (key, Times::of(list))).collect();
        let clean = guest_io_errors == 0 && verify_errors == 0 && findings.fsck_clean;
        let complete = incomplete.is_empty() && trouble.is_none() && leaks.is_empty() && halted == 0;
        let ok = clean && complete && failovers + refused == settings.plan.steps.len();
        Self {
            ok,
            failovers,
            requested: settings.plan.steps.len(),
            kinds,
            refused,
            halted,
            with_inflight,
            survivors,
            fences,
            guest_io_errors,
            verify_errors,
            fsck_clean: findings.fsck_clean,
            incomplete,
            trouble,
            leaks,
            seed: settings.orders.seed,
            bound: ok.then(|| bound(failovers)).flatten(),
            blackout_us: times(blackouts),
            phases_us: times(phases),
            guest_longest_us: account.longest_us(),
            guest_boot_ms: account.boot_ms,
            guest_iops_mean: mean(account.ticks.iter().map(|tick| tick.iops)),
            fio: account.fio,
            files,
            stamps,
            image: findings,
            kernel_log: kernel_log.trouble,
            notes: account.notes,
            broker_rss_bytes_max,
            broker_kills,
            broker_kills_in_failover,
            readopt_ms: (broker_kills > 0).then(|| Milliseconds::of(Times::of(readopted_us))),
            refusals,
            guard: settings.guard,
            backend: settings.backends.name(),
            resubmitted,
            qemu: settings.qemu.banner.clone(),
            guest_kernel: kernel,
            commit: commit(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            seconds: took.as_secs(),
        }
    }

    /// Prints the verdict as a table.
    pub(crate) fn print(&self) {
        let kinds: Vec<String> = self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let guard = if self.guard { "guarded by warmswap" } else { "unguarded" };
        println!(
            "guest disk on {}, {guard}, QEMU {}, Linux {}, seed {}",
            self.backend, self.qemu, self.guest_kernel, self.seed
        );
        row("failovers settled", format!("{} of {} (injected: {})", self.failovers, self.requested, kinds.join(", ")));
        row("refused, halted", format!("{}, {}", self.refused, self.halted));
        if self.guard {
            row("with requests in flight", format!("{}, {} survivors in all", self.with_inflight, self.survivors));
        } else {
            row("submitted again", format!("{} requests, by the next backend", self.resubmitted));
        }
        if let Some(readopt) = self.readopt_ms {
            let Milliseconds { p50, p99, max, .. } = readopt;
            let (kills, in_failover) = (self.broker_kills, self.broker_kills_in_failover);
            row("brokers killed", format!("{kills}, {in_failover} of them in a failover"));
            row("until the next answered", format!("p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms"));
        }
        for (name, times) in &self.blackout_us {
            row(&format!("blackout, {name}"), show_times(times));
        }
        for (phase, times) in &self.phases_us {
            row(&format!("  phase {phase}"), show_times(times));
        }
        row("guest I/O errors", self.guest_io_errors.to_string());
        row("verify errors", self.verify_errors.to_string());
        row("file system check", if self.fsck_clean { "clean".to_owned() } else { self.image.fsck_said.clone() });
        row("longest guest request", format!("{:.1} ms", to_ms(self.guest_longest_us)));
        row("guest load", self.load());
        for (name, list) in
            [("not checked", &self.incomplete), ("left over", &self.leaks), ("kernel log", &self.kernel_log)]
        {
            list.iter().take(8).for_each(|line| row(name, line.clone()));
        }
        self.notes.iter().take(8).for_each(|line| row("note", line.clone()));
        if let Some(why) = &self.trouble {
            row("given up", why.clone());
        }
        if let Some(bound) = self.bound {
            row("bound", format!("0 failures in {}: rate below {bound:.4} (95 %)", self.failovers));
        }
        row("commit, time", format!("{}, {} s", self.commit, self.seconds));
        println!("{}", if self.ok { "passed" } else { "FAILED" });
    }

    fn load(&self) -> String {
        format!(
            "{} fio rounds, {} fio requests, {} stamps, {} file operations, mean {} IOPS",
            self.fio.rounds, self.fio.requests, self.stamps.operations, self.files.operations, self.guest_iops_mean
        )
    }
}

/// What was not checked, and so cannot count as good.
fn incomplete(settings: &Settings, outcome: &Outcome) -> Vec<String> {
    let Outcome { account, kernel_log, findings, injected, .. } = outcome;
    let lacks = [
        (!kernel_log.marked, "the kernel log was not read"),
        (account.stamps.is_none(), "the stamp load did not report"),
        (account.files.is_none(), "the file system load did not report"),
        (account.fio.rounds == 0, "no round of fio ended"),
        (findings.digests_compared != account.digests.len() as u64, "the guest did not read its whole disk at the end"),
        (injected.len() < settings.plan.steps.len(), "not every failover was injected"),
    ];
    lacks.into_iter().filter(|(lacking, _)| *lacking).map(|(_, what)| what.to_owned()).collect()
}

/// The rule of three: 0 failures in `count` trials bound the rate by 3 / count at 95 %.
#[expect(clippy::cast_precision_loss, reason = "a count of failovers is small")]
fn bound(count: usize) -> Option<f64> {
    (count > 0).then(|| 3.0 / count as f64)
}

fn mean(values: impl Iterator<Item = u64>) -> u64 {
    let (sum, count) = values.fold((0_u64, 0_u64), |(sum, count), value| (sum + value, count + 1));
    sum.checked_div(count).unwrap_or(0)
}

/// The times in one line.
pub(crate) fn show_times(times: &Times) -> String {
    format!("p50 {} µs, p99 {} µs, max {} µs ({})", times.p50, times.p99, times.max, times.n)
}

/// Prints one row of a verdict.
pub(crate) fn row(name: &str, value: impl std::fmt::Display) {
    println!("  {name:<24} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_ranks_of_the_list() {
        assert_eq!(Times::of(Vec::new()), Times::default());
        assert_eq!(Times::of(vec![5]), Times { p50: 5, p99: 5, max: 5, n: 1 });
        assert_eq!(Times::of((1..=200).rev().collect()), Times { p50: 100, p99: 198, max: 200, n: 200 });
    }
}
