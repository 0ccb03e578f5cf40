//! The guest of a run: it asks for what its workload says, sleeps until the device calls, and says when it has lost its disk.
//!
//! It takes completions when it is called and at no other time, as Linux' virtio-blk does: an interrupt that is lost is lost to it as well.
//! It has lost its disk when a request has had no answer for as long as it waits for one, when one is answered with an error, or when the
//! backend is dead. What whoever injects a fault knows of it does not count.

#[cfg(test)]
mod tests;

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::astray::Astray;
use super::demand::Demand;
use super::workload::{BLOCKS_MAX, DEPTH_MAX, Load, Phase};
use crate::common::process::Target;
use crate::common::rng::Rng;
use crate::guest::{Guest, Latencies, Options, QueueShape, Status, now_ns};

/// Entries of its ring.
const RING: u16 = 256;
/// Its memory: buffers for every request.
const MEMORY: u64 = 64 << 20;
/// It looks after its oldest request and its connection this often.
const LOOK_EVERY_NS: u64 = 5_000_000;
/// A guest that boots again is away for so long.
const AWAY: Duration = Duration::from_millis(150);

/// How the guest lost its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// When, by the clock of the guest.
    pub(super) at_ns: u64,
    /// What it saw.
    pub(super) what: String,
}

/// Something that happens to the guest itself, and that no backend may be blamed for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Event {
    /// It shuts its device down and boots again.
    Reboot,
    /// Its interrupt is masked for a moment.
    Mask,
    /// It sets up its interrupt anew.
    ReplaceCall,
    /// It gets more memory, and gives it back.
    PlugMemory,
    /// It asks for so many times as much from now on.
    Speed(f64),
    /// So many of a hundred of its reads are writes from now on.
    Writes(u64),
    /// Kicks are lost on their way from now on, this many of a thousand.
    LoseKicks(u64),
    /// Interrupts are lost on their way from now on, this many of a thousand.
    LoseCalls(u64),
}

/// What a run asked of its guest, and what it got.
#[derive(Debug)]
pub(super) struct Felt {
    /// How it lost its disk, if it did.
    pub(super) failure: Option<Failure>,
    /// Latencies before the fault or the first event, and from then on.
    pub(super) latencies: [Latencies; 2],
}

/// The guest.
#[derive(Debug)]
pub(super) struct Driver {
    guest: Guest,
    backend: Target,
    demand: Demand,
    astray: Astray,
    /// Whether each slot is in use.
    busy: Vec<bool>,
    timeout_ns: u64,
    /// From here on latencies are of the other kind.
    turn_ns: u64,
    felt: Felt,
}

impl Driver {
    /// Boots a guest on the device at `socket`, whose backend is `backend`, with a disk of `blocks`. A request may take `timeout`.
    pub(super) fn boot(
        socket: std::path::PathBuf,
        backend: Target,
        (phases, blocks): (Vec<Phase>, u64),
        timeout: Duration,
        rng: [Rng; 2],
    ) -> anyhow::Result<Self> {
        let shape = QueueShape { size: RING, depth: DEPTH_MAX, blocks_max: BLOCKS_MAX, segments_max: 1, start: 0 };
        let mut guest = Guest::new(Options { socket, memory_bytes: MEMORY, shape, ..Options::default() })?;
        guest.connect()?;
        guest.start()?;
        let [stream, chance] = rng;
        let slots = usize::from(DEPTH_MAX);
        let mut driver = Driver {
            guest,
            backend,
            demand: Demand::new(phases, blocks, stream),
            astray: Astray::new(chance),
            busy: vec![false; slots],
            timeout_ns: timeout.as_nanos() as u64,
            turn_ns: u64::MAX,
            felt: Felt { failure: None, latencies: [Latencies::new(), Latencies::new()] },
        };
        driver.begin();
        Ok(driver)
    }

    /// Every slot is idle, and due soon.
    fn begin(&mut self) {
        self.demand.begin(now_ns());
        self.busy.fill(false);
        self.guest.queues[0].enable_calls();
    }

    /// Runs from `began` until `end`, or until the disk is lost. Events come at their times, in order. Latencies are of the second kind from
    /// `turn` on.
    pub(super) fn run(mut self, began: u64, turn: u64, end: u64, events: &[(u64, Event)]) -> anyhow::Result<Felt> {
        self.turn_ns = turn;
        let mut events = events.iter().copied().peekable();
        let mut look_at = 0;
        loop {
            let now = now_ns();
            if now >= end {
                break;
            }
            while let Some((_, event)) = events.next_if(|(at, _)| *at <= now) {
                self.happen(event)?;
            }
            let load = self.demand.load(now.saturating_sub(began));
            let next = self.submit(&load, now);
            if now >= look_at {
                look_at = now + LOOK_EVERY_NS;
                self.look(now)?;
            }
            let until = [next, look_at, end, events.peek().map_or(u64::MAX, |(at, _)| *at)];
            self.sleep(until.into_iter().min().unwrap_or(now))?;
            if self.felt.failure.is_some() {
                break;
            }
        }
        // A device that has failed is left as it is: its guest is switched off.
        if self.felt.failure.is_none() {
            self.rest()?;
        }
        self.guest.disconnect();
        Ok(self.felt)
    }

    /// Submits what is due. Returns when the next request is.
    fn submit(&mut self, load: &Load, now: u64) -> u64 {
        let (mut any, mut next) = (false, u64::MAX);
        for slot in 0..usize::from(load.depth) {
            if self.busy[slot] {
                continue;
            }
            if let Err(due) = self.demand.is_due(slot, load, now) {
                next = next.min(due);
                continue;
            }
            let request = self.demand.next(load);
            if !self.guest.queues[0].submit(slot as u16, request) {
                break;
            }
            self.busy[slot] = true;
            any = true;
        }
        if any {
            self.astray.kick(&mut self.guest.queues[0]);
        }
        next
    }

    /// Sleeps until then, or until the device calls or its backend dies.
    fn sleep(&mut self, until: u64) -> anyhow::Result<()> {
        let left = until.saturating_sub(now_ns());
        let timeout =
            Timespec { tv_sec: (left / 1_000_000_000).cast_signed(), tv_nsec: (left % 1_000_000_000).cast_signed() };
        let call = self.guest.queues[0].call_fd().as_fd();
        let mut fds = [
            PollFd::from_borrowed_fd(call, PollFlags::IN),
            PollFd::from_borrowed_fd(self.backend.as_fd(), PollFlags::IN),
        ];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout)))?;
        let [called, died] = [0, 1].map(|at| !fds[at].revents().is_empty());
        if called {
            let _taken = self.guest.queues[0].call_fd().take();
            if self.astray.call_arrives() {
                self.take()?;
            }
        }
        if died {
            self.fail(now_ns(), "the backend is dead".to_owned());
        }
        Ok(())
    }

    /// Takes completions until there are none.
    fn take(&mut self) -> anyhow::Result<()> {
        loop {
            self.guest.queues[0].disable_calls();
            while let Some(done) = self.guest.queues[0].pop()? {
                let slot = usize::from(done.slot);
                self.busy[slot] = false;
                self.demand.answered(slot, done.completed_ns);
                let kind = usize::from(done.completed_ns >= self.turn_ns);
                self.felt.latencies[kind].record(done.submitted_ns, done.completed_ns);
                if done.status != Status::OK {
                    self.fail(done.completed_ns, format!("{:?} ended with {}", done.request.kind, done.status));
                }
            }
            if self.guest.queues[0].enable_calls() {
                return Ok(());
            }
        }
    }

    fn fail(&mut self, at_ns: u64, what: String) {
        self.felt.failure.get_or_insert(Failure { at_ns, what });
    }

    /// Looks after the oldest request and the connection.
    fn look(&mut self, now: u64) -> anyhow::Result<()> {
        let queue = &self.guest.queues[0];
        let oldest = (0..DEPTH_MAX).filter_map(|slot| Some(queue.in_flight(slot)?.1)).min();
        if let Some(oldest) = oldest.filter(|oldest| now >= oldest + self.timeout_ns) {
            let timeout = self.timeout_ns / 1_000_000;
            self.fail(oldest + self.timeout_ns, format!("a request has had no answer for {timeout} ms"));
        }
        if self.guest.is_hung_up()? {
            self.fail(now, "the device is gone".to_owned());
            return Ok(());
        }
        self.guest.front()?.serve_backend().map(drop)
    }

    fn happen(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Speed(factor) => self.demand.speed(factor),
            Event::Writes(percent) => self.demand.write(percent),
            Event::LoseKicks(permille) => self.astray.kicks = permille,
            Event::LoseCalls(permille) => self.astray.calls = permille,
            Event::Reboot => self.reboot()?,
            Event::Mask => {
                self.guest.mask(0)?;
                std::thread::sleep(Duration::from_millis(2));
                self.guest.unmask(0)?;
            }
            Event::ReplaceCall => self.guest.replace_call(0)?,
            Event::PlugMemory => {
                self.rest()?;
                self.guest.plug_memory(16 << 20)?;
                self.guest.unplug_memory()?;
            }
        }
        Ok(())
    }

    /// Waits until nothing is in flight, or the disk is lost.
    fn rest(&mut self) -> anyhow::Result<()> {
        while self.busy.contains(&true) && self.felt.failure.is_none() {
            let now = now_ns();
            self.look(now)?;
            self.sleep(now + LOOK_EVERY_NS)?;
        }
        Ok(())
    }

    fn reboot(&mut self) -> anyhow::Result<()> {
        self.rest()?;
        if self.felt.failure.is_some() {
            return Ok(());
        }
        let again = self.guest.stop().map(|_| std::thread::sleep(AWAY)).and_then(|()| self.guest.start());
        match again {
            Ok(()) => self.begin(),
            Err(error) => self.fail(now_ns(), format!("the device does not start again: {error:#}")),
        }
        Ok(())
    }
}
