//! A guest that endures: it asks for what its workload says whatever becomes of it, never gives up, and notes for how long it stood still.
//!
//! As the guest of a campaign it takes completions when it is called and at no other time. Where its device goes away it connects again, has
//! the device reset and submits what was in flight once more; until then all of that waits. A Linux guest does no such thing by itself, so
//! this is more than those who only start their backend again can have.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::stall::{Stall, StallClock};
use crate::campaign::astray::Astray;
use crate::campaign::demand::Demand;
use crate::campaign::guest::Event;
use crate::campaign::workload::{BLOCKS_MAX, DEPTH_MAX, Load, Phase};
use crate::common::interrupt;
use crate::common::rng::Rng;
use crate::guest::{Completion, Guest, Kind, Options, QueueShape, Request, Slot, Status, VringFault, now_ns};
use crate::rig::block::WORDS;
use crate::rig::ledger::Ledger;

/// Entries of its ring.
const RING: u16 = 256;
/// Its memory: buffers for every request.
const MEMORY: u64 = 64 << 20;
/// It looks after its connection this often.
const LOOK_EVERY_NS: u64 = 5_000_000;
/// A device that is away is tried this often: `reconnect-ms=100` of QEMU.
const RETRY_EVERY_NS: u64 = 100_000_000;
/// A VMM waits so long for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// A guest that boots again is away for so long.
const AWAY: Duration = Duration::from_millis(150);
/// And it boots only once its requests are answered; with a disk that does not answer in this time it goes on as it is.
const REST_MAX_NS: u64 = 2_000_000_000;
/// Requests are drawn so often until one is in nobody's way.
const DRAWS_MAX: u32 = 16;
/// Number of the device in stamps.
const DEVICE: u32 = 1;

/// What a guest went through.
#[derive(Debug, Default)]
pub(super) struct Endured {
    pub(super) stalls: Vec<Stall>,
    /// Requests that were answered.
    pub(super) completed: u64,
    /// Requests that never were.
    pub(super) lost: u64,
    /// Answers to requests that had one.
    pub(super) duplicated: u64,
    /// Requests that were answered with an error.
    pub(super) io_errors: u64,
    /// Blocks that held what they could not hold.
    pub(super) corrupted: u64,
    /// How often it connected again.
    pub(super) reconnects: u64,
    /// What was wrong first.
    pub(super) first: Option<String>,
}

/// The guest.
#[derive(Debug)]
pub(super) struct Enduring {
    guest: Guest,
    demand: Demand,
    astray: Astray,
    ledger: Ledger,
    /// The request of each slot that is in use, and the number of its stamp.
    busy: Vec<Option<(Request, u64)>>,
    /// The rings run.
    up: bool,
    retry_at: u64,
    clock: StallClock,
    endured: Endured,
}

impl Enduring {
    /// Boots a guest on the device at `socket` with a disk of `blocks`, all zero.
    pub(super) fn boot(
        socket: PathBuf,
        (phases, blocks): (Vec<Phase>, u64),
        [stream, chance]: [Rng; 2],
    ) -> anyhow::Result<Self> {
        let shape = QueueShape { size: RING, depth: DEPTH_MAX, blocks_max: BLOCKS_MAX, segments_max: 1, start: 0 };
        let options = Options { socket, memory_bytes: MEMORY, shape, timeout: ANSWER_MAX, ..Options::default() };
        let mut guest = Guest::new(options)?;
        guest.connect()?;
        guest.start()?;
        let slots = usize::from(DEPTH_MAX);
        let mut enduring = Enduring {
            guest,
            demand: Demand::new(phases, blocks, stream),
            astray: Astray::new(chance),
            ledger: Ledger::new(DEVICE, blocks as usize),
            busy: vec![None; slots],
            up: true,
            retry_at: 0,
            clock: StallClock::default(),
            endured: Endured::default(),
        };
        enduring.begin();
        Ok(enduring)
    }

    /// Every idle slot is due soon.
    fn begin(&mut self) {
        self.demand.begin(now_ns());
        self.guest.queues[0].enable_calls();
    }

    /// Runs from `began` until `end`. Events come at their times, in order.
    pub(super) fn run(&mut self, began: u64, end: u64, events: &[(u64, Event)]) -> anyhow::Result<()> {
        let mut events = events.iter().copied().peekable();
        let mut look_at = 0;
        while now_ns() < end && !interrupt::is_asked() {
            let now = now_ns();
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
        }
        self.clock.close(now_ns());
        Ok(())
    }

    /// Waits until all is answered, at most for so long. Kicks and calls get through again, those that went astray as well.
    pub(super) fn settle(mut self, most: Duration) -> anyhow::Result<Endured> {
        (self.astray.kicks, self.astray.calls) = (0, 0);
        self.guest.queues[0].kick_fd().signal();
        let until = now_ns() + most.as_nanos() as u64;
        while self.waiting() && now_ns() < until && !interrupt::is_asked() {
            let now = now_ns();
            self.look(now)?;
            self.sleep(now + LOOK_EVERY_NS)?;
            if self.up {
                self.take()?;
            }
        }
        self.guest.disconnect();
        self.endured.lost = self.busy.iter().flatten().count() as u64;
        self.endured.stalls = self.clock.into_stalls();
        Ok(self.endured)
    }

    fn waiting(&self) -> bool {
        self.busy.iter().any(Option::is_some)
    }

    /// Submits what is due. Returns when the next request is.
    fn submit(&mut self, load: &Load, now: u64) -> u64 {
        let (mut any, mut next) = (false, u64::MAX);
        if !self.up {
            return next;
        }
        for slot in 0..usize::from(load.depth) {
            if self.busy[slot].is_some() {
                continue;
            }
            if let Err(due) = self.demand.is_due(slot, load, now) {
                next = next.min(due);
                continue;
            }
            if !self.submit_one(slot, load) {
                break;
            }
            any = true;
        }
        if any {
            self.clock.waits(now);
            self.astray.kick(&mut self.guest.queues[0]);
        }
        next
    }

    /// False: the ring is full, or all that was drawn is in the way of what is in flight.
    fn submit_one(&mut self, slot: usize, load: &Load) -> bool {
        let drawn = (0..DRAWS_MAX).find_map(|_| {
            let request = self.demand.next(load);
            self.ledger.begin(&request).then_some(request)
        });
        let Some(request) = drawn else { return false };
        let sequence = self.ledger.next_sequence(&request);
        if request.kind == Kind::Write {
            let words = self.words(slot, &request);
            for ((lba, sequence), block) in (request.block..).zip(sequence..).zip(words.chunks_exact(WORDS)) {
                self.ledger.stamp(lba, sequence, 0).write(block);
            }
        }
        let submitted = self.guest.queues[0].submit(slot as Slot, request);
        if submitted {
            self.busy[slot] = Some((request, sequence));
        } else {
            self.ledger.withdraw(&request);
        }
        submitted
    }

    /// What a request moves.
    fn words(&self, slot: usize, request: &Request) -> &[AtomicU64] {
        let data = self.guest.queues[0].data(slot as Slot);
        data.mapping.words(data.start, request.data_bytes())
    }

    /// Sleeps until then, or until the device calls.
    fn sleep(&mut self, until: u64) -> anyhow::Result<()> {
        let left = until.saturating_sub(now_ns());
        let timeout =
            Timespec { tv_sec: (left / 1_000_000_000).cast_signed(), tv_nsec: (left % 1_000_000_000).cast_signed() };
        let mut fds = [PollFd::from_borrowed_fd(self.guest.queues[0].call_fd().as_fd(), PollFlags::IN)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout)))?;
        if !fds[0].revents().is_empty() {
            let _taken = self.guest.queues[0].call_fd().take();
            if self.up && self.astray.call_arrives() {
                self.take()?;
            }
        }
        Ok(())
    }

    /// Takes completions until there are none.
    fn take(&mut self) -> anyhow::Result<()> {
        loop {
            self.guest.queues[0].disable_calls();
            loop {
                match self.guest.queues[0].pop() {
                    Ok(Some(done)) => self.complete(&done),
                    Ok(None) => break,
                    Err(fault) if matches!(fault.0, VringFault::NotOutstanding { .. }) => {
                        self.endured.duplicated += 1;
                        self.note(|| fault.to_string());
                    }
                    Err(fault) => return Err(fault.into()),
                }
            }
            if self.guest.queues[0].enable_calls() {
                return Ok(());
            }
        }
    }

    fn complete(&mut self, done: &Completion) {
        let slot = usize::from(done.slot);
        let Some((request, sequence)) = self.busy[slot].take() else { return };
        self.demand.answered(slot, done.completed_ns);
        self.endured.completed += 1;
        if done.status == Status::OK {
            if request.kind == Kind::Read {
                self.judge(slot, &request);
            }
            self.ledger.acknowledge(&request, sequence, 0);
        } else {
            // What a write has left behind that failed is anybody's guess.
            self.ledger.abandon(&request, sequence, 0);
            self.endured.io_errors += 1;
            self.note(|| format!("{:?} of block {} ended with {}", request.kind, request.block, done.status));
        }
        let wait = self.waiting();
        self.clock.completed(done.completed_ns, wait);
    }

    /// What was read must be what was written.
    fn judge(&mut self, slot: usize, request: &Request) {
        let data = self.guest.queues[0].data(slot as Slot);
        let words = data.mapping.words(data.start, request.data_bytes());
        let found: Vec<String> = (request.block..)
            .zip(words.chunks_exact(WORDS))
            .filter_map(|(lba, block)| self.ledger.check(lba, block).err())
            .collect();
        self.endured.corrupted += found.len() as u64;
        if let Some(found) = found.into_iter().next() {
            self.note(|| found);
        }
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        self.endured.first.get_or_insert_with(what);
    }

    /// Looks after the connection; where there is none, tries to get one.
    fn look(&mut self, now: u64) -> anyhow::Result<()> {
        if self.up {
            let gone = self.guest.is_hung_up()? || self.guest.front()?.serve_backend().is_err();
            if gone {
                self.go_down(now)?;
            }
            return Ok(());
        }
        self.clock.waits(now);
        if now >= self.retry_at {
            // Nobody listens yet, or not with all that it takes.
            if self.come_back().is_err() {
                self.guest.disconnect();
            }
            self.retry_at = now_ns() + RETRY_EVERY_NS;
        }
        Ok(())
    }

    /// The device is away. What it answered before it went counts, whether it called or not: the reset that comes would lose it.
    fn go_down(&mut self, now: u64) -> anyhow::Result<()> {
        self.take()?;
        self.guest.disconnect();
        (self.up, self.retry_at) = (false, now);
        self.clock.waits(now);
        Ok(())
    }

    /// Connects again, resets the device, and submits what was in flight.
    fn come_back(&mut self) -> anyhow::Result<()> {
        self.guest.connect()?;
        self.guest.start()?;
        for (slot, busy) in self.busy.iter().enumerate() {
            if let Some((request, _)) = busy {
                // The data of a write is in its buffer still.
                anyhow::ensure!(self.guest.queues[0].submit(slot as Slot, *request), "a new ring is full");
            }
        }
        self.up = true;
        self.endured.reconnects += 1;
        self.guest.queues[0].enable_calls();
        self.guest.queues[0].kick();
        if !self.waiting() {
            self.clock.close(now_ns());
        }
        Ok(())
    }

    fn happen(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Speed(factor) => self.demand.speed(factor),
            Event::Writes(percent) => self.demand.write(percent),
            Event::LoseKicks(permille) => self.astray.kicks = permille,
            Event::LoseCalls(permille) => self.astray.calls = permille,
            // These ask the device, which may be away at any instant.
            Event::Reboot | Event::Mask | Event::ReplaceCall | Event::PlugMemory => {
                if self.up && self.ask(event).is_err() {
                    self.go_down(now_ns())?;
                }
            }
        }
        Ok(())
    }

    fn ask(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Mask => {
                self.guest.mask(0)?;
                std::thread::sleep(Duration::from_millis(2));
                self.guest.unmask(0)?;
            }
            Event::ReplaceCall => self.guest.replace_call(0)?,
            Event::PlugMemory if self.rest()? => {
                self.guest.plug_memory(16 << 20)?;
                self.guest.unplug_memory()?;
            }
            Event::Reboot if self.rest()? => {
                self.guest.stop()?;
                std::thread::sleep(AWAY);
                self.guest.start()?;
                self.begin();
            }
            _ => {}
        }
        Ok(())
    }

    /// Waits until nothing is in flight. False: that took too long, or the device went away.
    fn rest(&mut self) -> anyhow::Result<bool> {
        let until = now_ns() + REST_MAX_NS;
        while self.waiting() && self.up && now_ns() < until && !interrupt::is_asked() {
            let now = now_ns();
            self.look(now)?;
            self.sleep(now + LOOK_EVERY_NS)?;
        }
        Ok(self.up && !self.waiting())
    }
}
