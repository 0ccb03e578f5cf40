//! One round: a primary is killed with throttled requests in flight, and everything it touches afterwards is watched.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::backend::{Engine, command_line, wrapped};
use super::broker::{Arm, Broker};
use super::disk::{Disk, EXTENT, EXTENT_BLOCKS};
use super::interrupt::pause;
use super::oracle::{Findings, Oracle, request};
use super::throttle::Throttle;
use crate::common::process::Target;
use crate::common::rng::Rng;
use crate::guest::{BlkQueue, Guest, Kind, Options, QueueShape, Status};

/// Bytes per second of the primary's disk, for reads and for writes.
const RATE: u64 = 192 << 10;
/// Fewest and most reads, and as many writes, that the primary dies with.
const EACH: (u64, u64) = (4, 6);
/// Most of what the guest lets pass between the last submission and the kill.
const KILL_DELAY_MAX_US: u64 = 150_000;
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// The watch goes on this long after the throttled requests must be through.
const WATCH_MARGIN: Duration = Duration::from_millis(800);
/// A failover that takes longer does not work.
const ROUND_MAX: Duration = Duration::from_secs(20);

/// What a round is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    /// Directory for sockets and logs.
    pub(super) directory: &'a Path,
    /// The backends' engine.
    pub(super) engine: Engine,
    /// With or without the storage proof.
    pub(super) arm: Arm,
    /// The backends lock their image.
    pub(super) locking: bool,
    /// The backends are behind a shell.
    pub(super) wrapped: bool,
    /// How long the primary serves before it gets the requests it dies with.
    pub(super) age: Duration,
}

/// What it showed.
#[derive(Debug)]
pub(super) struct Round {
    /// The oracle's findings.
    pub(super) findings: Findings,
    /// Requests in flight at the kill.
    pub(super) in_flight: usize,
    /// When the primary had ended, after the kill.
    pub(super) exit_ms: f64,
    /// The broker's report of the failover.
    pub(super) failover: Value,
}

impl Round {
    /// How long the fence waited after the primary had ended.
    pub(super) fn fence_wait_ms(&self) -> f64 {
        let fencing_ms = self.failover["phases_us"]["Fencing"].as_f64().unwrap_or_default() / 1e3;
        (fencing_ms - self.exit_ms).max(0.0)
    }

    /// All of it.
    pub(super) fn json(&self) -> Value {
        let findings = &self.findings;
        json!({
            "in_flight": self.in_flight,
            "late_writes": findings.late.len(),
            "late": findings.late,
            "wrong": findings.wrong,
            "exit_ms": tenths(self.exit_ms),
            "fence_wait_ms": tenths(self.fence_wait_ms()),
            "landed_before_completion": findings.landed,
            "last_landing_ms": tenths(findings.last_landing_ms),
            "guest_blackout_ms": findings.first_completion_ms.map(tenths),
            "failover": self.failover,
        })
    }
}

/// Runs it.
pub(super) fn run(plan: Plan<'_>, rng: &mut Rng) -> anyhow::Result<Round> {
    std::fs::create_dir_all(plan.directory)?;
    let disk = Disk::new()?;
    let backend = command_line(disk.path(), plan.engine, plan.locking);
    let backend = if plan.wrapped { wrapped(&backend) } else { backend };
    let started = Broker::start(plan.directory, plan.arm, &backend)?;
    let mut broker =
        started.map_err(|refusal| anyhow::anyhow!("the broker ended: {}\n{}", refusal.status, refusal.log))?;
    let outcome = kill_and_watch(plan, &disk, &mut broker, rng);
    let outcome = outcome.with_context(|| broker.last_words());
    // In any case, so that the throttle's group is empty when it is removed.
    let ended = broker.end();
    let (round, throttle) = outcome?;
    drop(throttle);
    ended?;
    Ok(round)
}

fn kill_and_watch(
    plan: Plan<'_>,
    disk: &Disk,
    broker: &mut Broker,
    rng: &mut Rng,
) -> anyhow::Result<(Round, Throttle)> {
    let each = rng.between(EACH.0, EACH.1) as u16;
    let mut guest = boot(broker, Oracle::slots(each))?;
    let primary = broker.protected_primary()?;
    read_once(&mut guest.queues[0])?;
    pause(plan.age)?;
    let name = plan.directory.file_name().context("a directory without a name")?.to_string_lossy();
    let throttle = Throttle::new(&name, disk.number()?, RATE, serving(primary.pid())?)?;
    let oracle = Oracle::new(disk, each, rng);
    let drain = Duration::from_secs_f64(f64::from(each) * EXTENT as f64 / RATE as f64);
    let mut watch = Watch { queue: &mut guest.queues[0], oracle, primary, drain };
    let expected = if plan.engine.submits_at_once() { watch.oracle.bytes() } else { EXTENT as u64 };
    watch.load(&throttle, expected)?;
    pause(Duration::from_micros(rng.below(KILL_DELAY_MAX_US)))?;
    let round = watch.kill(broker)?;
    Ok((round, throttle))
}

/// The process that does the I/O: a shell waits for its child.
fn serving(pid: u32) -> anyhow::Result<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    children.split_ascii_whitespace().next().map_or(Ok(pid), |child| Ok(child.parse()?))
}

/// Connects a guest and starts it.
pub(super) fn boot(broker: &Broker, depth: u16) -> anyhow::Result<Guest> {
    let shape = QueueShape { size: 256, depth, blocks_max: EXTENT_BLOCKS, segments_max: 1, start: 0 };
    let mut guest =
        Guest::new(Options { socket: broker.socket(), memory_bytes: 64 << 20, shape, ..Options::default() })?;
    guest.connect()?;
    guest.start()?;
    Ok(guest)
}

/// Reads one extent nobody else uses.
pub(super) fn read_once(queue: &mut BlkQueue) -> anyhow::Result<()> {
    ensure!(queue.submit(0, request(Kind::Read, 0)), "the ring is full");
    queue.kick();
    let deadline = Instant::now() + ROUND_MAX;
    loop {
        if let Some(completion) = queue.pop()? {
            ensure!(completion.status == Status::OK, "a read ended with {}", completion.status);
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "a read is not answered");
        pause(Duration::from_micros(100))?;
    }
}

/// Everything that is looked at around the kill.
struct Watch<'a> {
    queue: &'a mut BlkQueue,
    oracle: Oracle<'a>,
    primary: Target,
    /// How long the throttled requests take.
    drain: Duration,
}

impl Watch<'_> {
    /// Submits everything and waits until `expected` bytes of it are in the kernel, behind the throttle.
    fn load(&mut self, throttle: &Throttle, expected: u64) -> anyhow::Result<()> {
        ensure!(self.oracle.submit(self.queue), "the ring is full");
        let deadline = Instant::now() + ROUND_MAX;
        while throttle.arrived()? < expected {
            self.oracle.step(self.queue, 0.0)?;
            ensure!(Instant::now() < deadline, "only {} bytes came to the throttle", throttle.arrived()?);
            pause(LOOK_EVERY)?;
        }
        Ok(())
    }

    fn kill(mut self, broker: &mut Broker) -> anyhow::Result<Round> {
        self.oracle.step(self.queue, 0.0)?;
        let in_flight = self.oracle.in_flight();
        ensure!(in_flight > 0, "nothing was in flight: the disk is too fast");
        self.oracle.begin_silence();
        self.primary.signal(Signal::KILL)?;
        let killed = Instant::now();
        let exit_ms = self.watch(killed)?;
        let findings = self.oracle.finish(millis(killed));
        let failover = settled(broker)?;
        Ok(Round { findings, in_flight, exit_ms, failover })
    }

    /// Watches until everything is completed and nothing can be on its way any more. Returns when the primary had ended.
    fn watch(&mut self, killed: Instant) -> anyhow::Result<f64> {
        let mut exit_ms = None;
        let end = killed + self.drain + WATCH_MARGIN;
        loop {
            if exit_ms.is_none() && has_ended(&self.primary)? {
                exit_ms = Some(millis(killed));
            }
            self.oracle.step(self.queue, millis(killed))?;
            match exit_ms {
                Some(exit_ms) if self.oracle.in_flight() == 0 && Instant::now() > end => return Ok(exit_ms),
                _ => {}
            }
            if killed.elapsed() > ROUND_MAX {
                bail!("{} requests are still in flight {ROUND_MAX:?} after the kill", self.oracle.in_flight());
            }
            pause(LOOK_EVERY)?;
        }
    }
}

fn settled(broker: &mut Broker) -> anyhow::Result<Value> {
    let mut status = broker.status()?;
    let failover = status["last_failover"].take();
    ensure!(failover["result"] == "settled", "the failover did not settle: {failover}");
    Ok(failover)
}

fn has_ended(process: &Target) -> anyhow::Result<bool> {
    let none = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&none))? > 0)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Rounded to what is worth printing.
pub(super) fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
