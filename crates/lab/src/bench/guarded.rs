//! Blackouts of a guarded device, as the guest feels them.
//!
//! *Planned*: the new primary's first completion minus the last completion of the old one, both at the instant the polling
//! driver saw them. Everything between is counted: noticing that the old primary rests, its stop and the proof of it, the
//! handover, the first request. The driver cannot see who completed a request, so it takes the longest silence between the
//! command and the report. The true one is among these, so what is taken is never shorter.
//!
//! *Crash*: the new primary's first completion minus the instant just before the call that sent SIGKILL. A dying process may
//! complete a few requests more; they are told apart by its end: a pidfd becomes readable when no thread of it is left, and
//! the broker has much to do after that. Should the driver be so late to look that the new primary has begun, the completion
//! it takes for the first comes later than the true one.

use std::os::fd::AsFd;

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use serde_json::Value;

use super::broker::Broker;
use super::driver::{Driver, SILENCE_NS, Shape, pause};
use crate::common::process::Target;
use crate::common::rng::Rng;
use crate::guest::now_ns;

/// How long the pair may take to be whole again.
const WHOLE_NS: u64 = 15_000_000_000;
/// Time between two questions for the status.
const ASK_EVERY_NS: u64 = 1_000_000;

/// A guarded device with its guest.
#[derive(Debug)]
pub(super) struct Guarded {
    // Dropped first: the VMM goes before the broker.
    driver: Driver,
    broker: Broker,
    /// Crashes that had to wait until the observer was exact.
    pub(super) inexact: u32,
}

/// One failover.
#[derive(Debug)]
pub(super) struct Blackout {
    /// What the guest felt.
    pub(super) felt_ns: u64,
    /// Of this, until the last thread of a killed primary was gone.
    pub(super) ended_ns: u64,
    /// The broker's report.
    pub(super) report: Value,
}

impl Blackout {
    /// Whether the old primary was drained, not killed.
    pub(super) fn is_drained(&self) -> bool {
        self.report["fence"] == "stopped"
    }
}

impl Guarded {
    /// Boots a guest of `shape` on the device of `broker`.
    pub(super) fn boot(broker: Broker, shape: &Shape, rng: Rng) -> anyhow::Result<Self> {
        let driver = Driver::boot(shape, rng).with_context(|| broker.last_words())?;
        Ok(Guarded { driver, broker, inexact: 0 })
    }

    /// Waits, without load, until there is a shadow that is ready. Returns the device's status.
    pub(super) fn wait_until_whole(&mut self) -> anyhow::Result<Value> {
        self.driver.rest()?;
        let deadline = now_ns() + WHOLE_NS;
        loop {
            let status = self.status()?;
            if status["state"] == "protected" && status["shadow"]["state"] == "ready" && status["phase"] == "Idle" {
                return Ok(status);
            }
            ensure!(now_ns() < deadline, "the pair did not become whole: {status}\n{}", self.broker.last_words());
            std::thread::sleep(std::time::Duration::from_nanos(ASK_EVERY_NS));
        }
    }

    /// Asks for the status; the guest is served meanwhile.
    fn status(&mut self) -> anyhow::Result<Value> {
        self.broker.ask_status()?;
        let deadline = now_ns() + WHOLE_NS;
        loop {
            if let Some(status) = self.broker.status()? {
                return Ok(status);
            }
            ensure!(now_ns() < deadline, "the broker does not answer\n{}", self.broker.last_words());
            self.turn(&mut |_| {})?;
        }
    }

    /// Keeps up the load until the observer knows what is in flight: a primary that dies before is not failed over, by design,
    /// and that is another figure. Counted, for it should be rare.
    fn wait_until_exact(&mut self) -> anyhow::Result<()> {
        let deadline = now_ns() + WHOLE_NS;
        let mut status = self.status()?;
        self.inexact += u32::from(!is_exact(&status));
        while !is_exact(&status) {
            ensure!(now_ns() < deadline, "the observer stays inexact: {status}\n{}", self.broker.last_words());
            status = self.status()?;
        }
        Ok(())
    }

    fn turn(&mut self, seen: &mut impl FnMut(u64)) -> anyhow::Result<()> {
        if self.driver.poll(&mut |done| seen(done.completed_ns)).with_context(|| self.broker.last_words())? == 0 {
            pause();
        }
        Ok(())
    }

    /// A planned failover after `load_ns` of load.
    pub(super) fn planned(&mut self, load_ns: u64) -> anyhow::Result<Blackout> {
        self.wait_until_whole()?;
        self.driver.run_for(load_ns)?;
        let asked = now_ns();
        self.broker.ask_failover()?;
        let mut silence = Silence::from(asked);
        let report = loop {
            self.turn(&mut |at| silence.broken(at))?;
            if let Some(report) = self.broker.report()? {
                break report;
            }
            ensure!(now_ns() < asked + SILENCE_NS, "no report\n{}", self.broker.last_words());
        };
        self.must_be_settled(&report, "planned")?;
        // The broker sees the completion it waits for in the ring; here it may not be taken yet.
        while silence.longest_ns < handed_ns(&report) {
            self.turn(&mut |at| silence.broken(at))?;
            ensure!(now_ns() < asked + SILENCE_NS, "no completion\n{}", self.broker.last_words());
        }
        Ok(Blackout { felt_ns: silence.longest_ns, ended_ns: 0, report })
    }

    /// A primary that is killed after `load_ns` of load.
    pub(super) fn crash(&mut self, load_ns: u64) -> anyhow::Result<Blackout> {
        let before = self.wait_until_whole()?;
        let pid = before["primary"]["pid"].as_u64().context("the primary has no process")?;
        let primary = Target::open(u32::try_from(pid)?)?;
        self.driver.run_for(load_ns)?;
        self.wait_until_exact()?;
        let killed = now_ns();
        primary.signal(Signal::KILL)?;
        while !has_ended(&primary)? {
            self.turn(&mut |_| {})?;
            ensure!(now_ns() < killed + SILENCE_NS, "process {pid} survives SIGKILL");
        }
        let ended_ns = now_ns() - killed;
        // What it completed last.
        self.driver.poll(&mut |_| {})?;
        let mut first = None;
        while first.is_none() {
            self.turn(&mut |at| first = first.or(Some(at)))?;
            if now_ns() > killed + SILENCE_NS {
                bail!("the disk is silent: {}\n{}", self.driver.describe(), self.broker.last_words());
            }
        }
        let report = self.report_after(&before)?;
        self.must_be_settled(&report, "crash")?;
        let felt_ns = first.expect("the loop waited for it") - killed;
        Ok(Blackout { felt_ns, ended_ns, report })
    }

    /// The report of the failover that ended since the status `before`.
    fn report_after(&mut self, before: &Value) -> anyhow::Result<Value> {
        let deadline = now_ns() + WHOLE_NS;
        loop {
            let mut status = self.status()?;
            let ended = |status: &Value| {
                ["settled", "refused", "halted"]
                    .map(|how| status["failovers"][how].as_u64().unwrap_or(0))
                    .iter()
                    .sum::<u64>()
            };
            if ended(&status) > ended(before) {
                return Ok(status["last_failover"].take());
            }
            ensure!(now_ns() < deadline, "the failover does not end: {status}\n{}", self.broker.last_words());
        }
    }

    fn must_be_settled(&self, report: &Value, kind: &str) -> anyhow::Result<()> {
        let settled = report["result"] == "settled" && report["kind"] == kind;
        ensure!(settled, "not a settled {kind} failover: {report}\n{}", self.broker.last_words());
        Ok(())
    }

    /// Shuts the guest down in order.
    pub(super) fn shut_down(&mut self) -> anyhow::Result<()> {
        self.driver.rest()?;
        self.driver.guest.stop()?;
        self.driver.guest.disconnect();
        Ok(())
    }
}

/// Between the stop of the old primary and the start of the new one nobody served, by the broker's own clock.
fn handed_ns(report: &Value) -> u64 {
    let phase = |name: &str| report["phases_us"][name].as_f64().unwrap_or(0.0);
    ((phase("Collecting") + phase("Handing")) * 1e3) as u64
}

fn is_exact(status: &Value) -> bool {
    status["rings"].as_array().is_some_and(|rings| rings.iter().all(|ring| ring["observer"] == "exact"))
}

fn has_ended(process: &Target) -> anyhow::Result<bool> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)], Some(&now)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The longest time without a completion.
#[derive(Debug)]
struct Silence {
    last_ns: u64,
    longest_ns: u64,
}

impl Silence {
    fn from(now: u64) -> Self {
        Silence { last_ns: now, longest_ns: 0 }
    }

    fn broken(&mut self, at: u64) {
        self.longest_ns = self.longest_ns.max(at.saturating_sub(self.last_ns));
        self.last_ns = at;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_silence_is_kept() {
        let mut silence = Silence::from(100);
        [130, 190, 200, 200].into_iter().for_each(|at| silence.broken(at));
        assert_eq!((silence.longest_ns, silence.last_ns), (60, 200));
    }

    #[test]
    fn a_living_process_has_not_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let target = Target::open(child.id()).expect("pidfd");
        assert!(!has_ended(&target).expect("poll"));
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert!(has_ended(&target).expect("poll"));
    }
}
