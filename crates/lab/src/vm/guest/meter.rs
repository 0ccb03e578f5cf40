//! The guest's second hand: once a second, how many requests completed and how long the slowest probe took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::Shared;
use crate::vm::orders::Line;

/// Counters the loads write and the meter reads.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    worst_us: AtomicU64,
    longest_us: AtomicU64,
    probe_started_us: AtomicU64,
    fio_started_us: AtomicU64,
}

impl Meter {
    /// A probe (one request of the stamp load) begins.
    pub(crate) fn probe_begins(&self) {
        self.probe_started_us.store(now_us().max(1), Ordering::Relaxed);
    }

    /// The probe came back after `us`.
    pub(crate) fn probe_ends(&self, us: u64) {
        self.probe_started_us.store(0, Ordering::Relaxed);
        self.worst_us.fetch_max(us, Ordering::Relaxed);
        self.longest_us.fetch_max(us, Ordering::Relaxed);
    }

    /// The longest probe of the run.
    pub(crate) fn longest_us(&self) -> u64 {
        self.longest_us.load(Ordering::Relaxed)
    }

    /// A round of fio begins.
    pub(crate) fn fio_begins(&self) {
        self.fio_started_us.store(now_us().max(1), Ordering::Relaxed);
    }

    /// No fio runs.
    pub(crate) fn fio_ends(&self) {
        self.fio_started_us.store(0, Ordering::Relaxed);
    }
}

/// Reports each second until the machine stops.
pub(crate) fn tick_for_ever(shared: &Shared) -> anyhow::Result<()> {
    let mut before = DiskStat::read()?;
    let mut next = Instant::now();
    for second in 0_u64.. {
        next += Duration::from_secs(1);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let stat = DiskStat::read()?;
        let meter = &shared.meter;
        let probe_age_us = age_us(&meter.probe_started_us);
        let worst_us = meter.worst_us.swap(0, Ordering::Relaxed).max(probe_age_us);
        let line = Line::new("tick")
            .with("n", second)
            .with("iops", stat.completed.saturating_sub(before.completed))
            .with("worst_us", worst_us)
            .with("inflight", stat.inflight)
            .with("probe_age_us", probe_age_us)
            .with("fio_age_us", age_us(&meter.fio_started_us));
        shared.port.say(&line);
        before = stat;
    }
    Ok(())
}

/// How long ago the instant in `started` was; 0 if nothing is running.
fn age_us(started: &AtomicU64) -> u64 {
    match started.load(Ordering::Relaxed) {
        0 => 0,
        at => now_us().saturating_sub(at),
    }
}

/// Microseconds on the monotonic clock.
fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1_000
}

/// Milliseconds since the kernel started.
pub(crate) fn uptime_ms() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/uptime").context("reading the uptime")?;
    let (seconds, rest) = text.split_once('.').context("an uptime without a point")?;
    let hundredths: u64 = rest.chars().take(2).collect::<String>().parse()?;
    Ok(seconds.parse::<u64>()? * 1000 + hundredths * 10)
}

/// The kernel's counters of the disk.
#[derive(Debug)]
struct DiskStat {
    completed: u64,
    inflight: u64,
}

impl DiskStat {
    fn read() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/sys/block/vda/stat").context("reading the disk's counters")?;
        let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
        Ok(Self { completed: at(0) + at(4) + at(15), inflight: at(8) })
    }
}
