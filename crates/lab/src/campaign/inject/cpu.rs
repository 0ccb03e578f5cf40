//! Less and less processor time: a quota, and rivals on the same processor.

use std::process::{Child, Command, Stdio};

use anyhow::Context;

use super::Injector;
use crate::campaign::GROUPS;
use crate::campaign::form::between;
use crate::common::cgroup::Group;
use crate::common::process::die_with_parent;

/// The quota of CFS bandwidth control.
#[derive(Debug)]
pub(super) struct Quota {
    group: Group,
    last: (u64, i64),
}

/// From this level on there is hardly any left.
const COLLAPSE: f64 = 0.9;

impl Quota {
    /// Puts a process into a group without a quota.
    pub(super) fn new(name: &str, pid: u32) -> anyhow::Result<Self> {
        let group = Group::new("cpu", GROUPS, name)?;
        group.add(pid)?;
        Ok(Quota { group, last: (100_000, -1) })
    }
}

/// Period and quota, in microseconds. From half a processor down to a hundredth, then to a thousandth.
fn quota(level: f64) -> (u64, i64) {
    if level <= 0.0 {
        (100_000, -1)
    } else if level < COLLAPSE {
        (100_000, between(50_000.0, 1_000.0, level / COLLAPSE) as i64)
    } else {
        (1_000_000, 1_000)
    }
}

impl Injector for Quota {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let (period, allowed) = quota(level);
        // Every change begins a new period.
        let change = (allowed - self.last.1).abs() * 20 < self.last.1.abs();
        if period == self.last.0 && (allowed == self.last.1 || change && allowed > 0) {
            return Ok(());
        }
        self.last = (period, allowed);
        self.group.write("cpu.cfs_quota_us", "-1")?;
        self.group.write("cpu.cfs_period_us", &period.to_string())?;
        self.group.write("cpu.cfs_quota_us", &allowed.to_string())
    }
}

/// Rivals of growing weight on one processor.
#[derive(Debug)]
pub(super) struct Hogs {
    // Dropped first: rivals end before their group goes.
    rivals: Vec<Rival>,
    /// One that goes first, when it collapses.
    first: Option<Rival>,
    shares: Group,
    set: Group,
    last: u64,
}

/// Rivals.
const RIVALS: usize = 2;

/// Arguments of a shell that computes for ever.
const ENDLESS: [&str; 2] = ["-c", "while :; do :; done"];

/// A process that computes for ever. Killed on drop.
#[derive(Debug)]
pub(in crate::campaign) struct Rival(Child);

impl Rival {
    /// Starts one.
    pub(in crate::campaign) fn start() -> anyhow::Result<Self> {
        Rival::spawn(Command::new("/bin/sh").args(ENDLESS))
    }

    /// Starts one of real-time priority (SCHED_FIFO): others get the twentieth of the processor that the kernel keeps for them.
    fn start_first() -> anyhow::Result<Self> {
        Rival::spawn(Command::new("chrt").args(["--fifo", "1", "/bin/sh"]).args(ENDLESS))
    }

    fn spawn(command: &mut Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Rival(die_with_parent(command).spawn().context("starting a rival")?))
    }

    /// Its process.
    pub(in crate::campaign) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Hogs {
    /// Confines a process to one processor. There are no rivals yet.
    pub(super) fn new(name: &str, pid: u32, seed: u64) -> anyhow::Result<Self> {
        let shares = Group::new("cpu", GROUPS, name)?;
        let set = Group::new("cpuset", GROUPS, name)?;
        let processors = std::thread::available_parallelism()?.get() as u64;
        set.write("cpuset.cpus", &(seed % processors).to_string())?;
        set.write("cpuset.mems", "0")?;
        shares.add(pid)?;
        set.add(pid)?;
        Ok(Hogs { rivals: Vec::new(), first: None, shares, set, last: 1_024 })
    }
}

impl Hogs {
    /// Has a rival compete for the one processor.
    fn rival(&self, rival: Rival) -> anyhow::Result<Rival> {
        self.set.add(rival.pid())?;
        Ok(rival)
    }
}

impl Injector for Hogs {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        if level <= 0.0 {
            self.rivals.clear();
            self.first = None;
            return Ok(());
        }
        while self.rivals.len() < RIVALS {
            self.rivals.push(self.rival(Rival::start()?)?);
        }
        if level < COLLAPSE {
            self.first = None;
        } else if self.first.is_none() {
            self.first = Some(self.rival(Rival::start_first()?)?);
        }
        let shares = between(1_024.0, 2.0, level) as u64;
        if shares != self.last {
            self.last = shares;
            self.shares.write("cpu.shares", &shares.to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_shrink_to_nearly_nothing() {
        assert_eq!(quota(0.0), (100_000, -1));
        assert_eq!(quota(0.45).0, 100_000);
        assert!((6_000..8_000).contains(&quota(0.45).1), "{:?}", quota(0.45));
        assert_eq!(quota(1.0), (1_000_000, 1_000));
    }
}
