//! What the storage proof costs when nothing is in flight: primaries of three kinds are killed in turn, unthrottled.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::backend::{Engine, command_line};
use super::broker::{Arm, Broker};
use super::disk::Disk;
use super::interrupt::pause;
use super::round::{boot, read_once};
use crate::guest::Guest;

/// A failover that takes longer does not work.
const FAILOVER_MAX: Duration = Duration::from_secs(10);

/// One failover in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// The phase Fencing: what of the proof was not done at the first look.
    pub(super) fencing: f64,
    /// All phases: the proof's own time is in the one that follows it.
    pub(super) blackout: f64,
}

/// Failovers of each kind, in turn.
#[derive(Debug, Default)]
pub(super) struct Cost {
    /// io_uring, locks watched.
    pub(super) locks: Vec<Sample>,
    /// io_uring, proof skipped.
    pub(super) unproved: Vec<Sample>,
    /// Threads.
    pub(super) threads: Vec<Sample>,
    /// The evidence of the last failover with locks.
    pub(super) evidence: String,
}

/// Kills `kills` primaries of each kind.
pub(super) fn measure(directory: &Path, kills: u64) -> anyhow::Result<Cost> {
    let mut locks = Subject::start(directory, "locks", Engine::IoUring, Arm::Guarded)?;
    let mut unproved = Subject::start(directory, "unproved", Engine::IoUring, Arm::Sabotaged)?;
    let mut threads = Subject::start(directory, "threads", Engine::Threads, Arm::Guarded)?;
    let mut cost = Cost::default();
    for _ in 0..kills {
        // In turn, so that whatever else the machine does is shared by all three.
        cost.locks.push(locks.kill()?);
        cost.unproved.push(unproved.kill()?);
        cost.threads.push(threads.kill()?);
    }
    cost.evidence = locks.evidence.clone();
    [locks, unproved, threads].into_iter().try_for_each(Subject::end)?;
    Ok(cost)
}

/// A guarded device whose primary is killed again and again.
struct Subject {
    // Gone in this order: the guest, the broker with its backends, the disk below them.
    guest: Guest,
    broker: Broker,
    _disk: Disk,
    evidence: String,
}

impl Subject {
    fn start(directory: &Path, name: &str, engine: Engine, arm: Arm) -> anyhow::Result<Self> {
        let directory = directory.join(name);
        std::fs::create_dir_all(&directory)?;
        let disk = Disk::new()?;
        let backend = command_line(disk.path(), engine, true);
        let broker = Broker::start(&directory, arm, &backend)?;
        let broker = broker.map_err(|refusal| anyhow::anyhow!("the broker ended: {}", refusal.log))?;
        let guest = boot(&broker, 1)?;
        Ok(Subject { guest, broker, _disk: disk, evidence: String::new() })
    }

    /// Kills an idle primary that has served, and returns how long the failover took.
    fn kill(&mut self) -> anyhow::Result<Sample> {
        let primary = self.broker.protected_primary()?;
        read_once(&mut self.guest.queues[0])?;
        let last = self.broker.status()?["last_failover"]["id"].take();
        primary.signal(Signal::KILL)?;
        let failover = self.next_failover(&last).with_context(|| self.broker.last_words())?;
        failover["evidence"].as_str().unwrap_or_default().clone_into(&mut self.evidence);
        Ok(Sample {
            fencing: failover["phases_us"]["Fencing"].as_f64().context("a failover without the phase Fencing")?,
            blackout: failover["blackout_us"].as_f64().context("a failover without its length")?,
        })
    }

    fn next_failover(&mut self, last: &Value) -> anyhow::Result<Value> {
        let deadline = Instant::now() + FAILOVER_MAX;
        loop {
            let failover = self.broker.status()?["last_failover"].take();
            if !failover.is_null() && failover["id"] != *last {
                ensure!(failover["result"] == "settled", "the failover did not settle: {failover}");
                return Ok(failover);
            }
            ensure!(Instant::now() < deadline, "there is no failover");
            pause(Duration::from_millis(1))?;
        }
    }

    fn end(self) -> anyhow::Result<()> {
        drop(self.guest);
        self.broker.end()
    }
}
