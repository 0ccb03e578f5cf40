//! The world: one clock, one queue of what happens next, and everybody in it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use warmswap_core::Nanos;

use crate::backend::Backend;
use crate::broker::Broker;
use crate::disk::Disk;
use crate::guest::Guest;
use crate::memory::{Memory, Obj, Owner, Thread};
use crate::options::Options;
use crate::outcome::{Failure, Outcome, Stats};
use crate::pace::Pace;
use crate::random::Random;
use crate::vmm::Vmm;
use crate::worker::Operation;

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The broker's control thread wakes.
    Broker,
    /// A processor of the guest goes on.
    Driver(u16),
    /// The VMM goes on.
    Vmm,
    /// A backend's control path goes on.
    Control(u64),
    /// A backend's data path goes on.
    Work(u64),
    /// A request goes on at the disk.
    Disk(u32),
    /// A backend's process has been started.
    Started(u64),
    /// A signal has reached a process.
    Killed(u64),
    /// The broker sees the end of a link; the end of a process.
    HungUp(u64),
    /// See `HungUp`.
    Exited(u64),
    /// A process that is fenced has been reaped.
    Reaped(u64),
    /// A fence is looked at for too long.
    FenceOverdue(u64),
    /// Something goes wrong.
    Fault,
    /// What went wrong for a while is over.
    Recovered(u64),
    /// The operator looks after a device that is halted.
    Operator,
}

/// Most steps of a run: beyond it somebody spins.
const STEPS_MAX: u64 = 5_000_000;

/// Who is told what happens.
type Trace<'t> = &'t mut dyn FnMut(Nanos, &str);

type Queued = Reverse<(u64, u64)>;

/// Everybody.
pub(crate) struct World<'t> {
    pub(crate) options: Options,
    pub(crate) now: Nanos,
    queue: BinaryHeap<(Queued, EventAt)>,
    order: u64,
    pub(crate) random: Random,
    pub(crate) mem: Memory,
    pub(crate) guest: Guest,
    pub(crate) vmm: Vmm,
    pub(crate) broker: Broker,
    pub(crate) backends: Vec<Backend>,
    pub(crate) operations: Vec<Operation>,
    pub(crate) disk: Disk,
    pub(crate) paces: Vec<Pace>,
    /// Everybody leaves: nobody can be started any more.
    pub(crate) ending: bool,
    pub(crate) stats: Stats,
    pub(crate) failure: Option<Failure>,
    /// Faults occur.
    pub(crate) unsafe_phase: bool,
    trace: Option<Trace<'t>>,
}

/// An event in the queue: its order is the queue's, not its own.
#[derive(Clone, Copy, Debug)]
struct EventAt(Event);

impl PartialEq for EventAt {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for EventAt {}
impl PartialOrd for EventAt {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for EventAt {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

impl<'t> World<'t> {
    pub(crate) fn new(seed: u64, options: &Options, trace: Option<Trace<'t>>) -> Self {
        let mut mem = Memory::new(options.torn_looks, seed);
        let guest = Guest::new(options, &mut mem);
        for _ in 0..options.rings {
            mem.threads.borrow_mut().push(Thread::new(Owner::Driver));
        }
        World {
            now: Nanos(0),
            queue: BinaryHeap::new(),
            order: 0,
            random: Random::new(seed),
            vmm: Vmm::new(options),
            broker: Broker::new(options.config()),
            backends: Vec::new(),
            operations: Vec::new(),
            disk: Disk::new(options.blocks),
            paces: (0..options.rings).map(|_| Pace::default()).collect(),
            ending: false,
            stats: Stats::default(),
            failure: None,
            unsafe_phase: true,
            trace,
            options: options.clone(),
            mem,
            guest,
        }
    }

    /// Something happens at `at`.
    pub(crate) fn at(&mut self, at: Nanos, event: Event) {
        self.order += 1;
        self.queue.push((Reverse((at.0, self.order)), EventAt(event)));
    }

    pub(crate) fn after(&mut self, span: Nanos, event: Event) {
        self.at(self.now + span, event);
    }

    /// When a message that is sent now arrives.
    pub(crate) fn latency(&mut self) -> Nanos {
        self.now + Nanos(self.random.between(1_000, 15_000))
    }

    /// Tells the trace, if anybody listens.
    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace(self.now, &text());
        }
    }

    /// What has happened goes into the number that stands for the whole run.
    pub(crate) fn steps(&mut self, kind: u64, value: u64) {
        self.stats.steps += 1;
        let mixed = self.stats.trace_hash ^ self.now.0.wrapping_mul(31) ^ (kind << 56) ^ value;
        self.stats.trace_hash = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }

    /// A promise was not kept. The first one counts.
    pub(crate) fn fail(&mut self, check: &'static str, detail: String) {
        if self.failure.is_none() {
            self.note(|| format!("FAILURE: {check}: {detail}"));
            self.failure = Some(Failure { at: self.now, check, detail });
        }
    }

    /// Runs the whole life.
    pub(crate) fn run(mut self) -> Outcome {
        self.begin();
        let safety = self.options.safety;
        self.until(safety, |_| false);
        self.heal();
        let deadline = self.now + self.options.liveness;
        self.until(deadline, |world| world.is_done());
        if self.failure.is_none() && !self.is_done() {
            let detail = self.what_is_left();
            self.fail("liveness", detail);
        }
        if self.failure.is_none() {
            self.end();
        }
        self.stats.elapsed = self.now;
        Outcome { stats: self.stats, failure: self.failure }
    }

    pub(crate) fn until(&mut self, deadline: Nanos, is_done: impl Fn(&World<'t>) -> bool) {
        while self.failure.is_none() {
            let Some((Reverse((at, _)), EventAt(event))) = self.queue.pop() else { break };
            if at > deadline.0 {
                self.order += 1;
                self.queue.push((Reverse((at, 0)), EventAt(event)));
                break;
            }
            self.now = Nanos(at);
            self.happen(event);
            self.bury();
            if let Some((check, detail)) = self.mem.wrong.take() {
                self.fail(check, detail);
            }
            if self.stats.steps > STEPS_MAX {
                self.fail("progress", format!("{STEPS_MAX} steps in {}: somebody spins", self.now));
            }
            if is_done(self) {
                return;
            }
        }
        if self.failure.is_none() {
            self.now = self.now.max(deadline);
        }
    }

    fn happen(&mut self, event: Event) {
        let (kind, value) = match event {
            Event::Broker => (10, 0),
            Event::Driver(ring) => (11, u64::from(ring)),
            Event::Vmm => (12, 0),
            Event::Control(id) => (13, id),
            Event::Work(id) => (14, id),
            Event::Disk(number) => (15, u64::from(number)),
            Event::Started(id) => (16, id),
            Event::Killed(id) => (17, id),
            Event::HungUp(id) => (18, id),
            Event::Exited(id) => (19, id),
            Event::Reaped(id) => (20, id),
            Event::FenceOverdue(id) => (21, id),
            Event::Fault => (22, 0),
            Event::Recovered(id) => (23, id),
            Event::Operator => (24, 0),
        };
        self.steps(kind, value);
        match event {
            Event::Broker => self.broker_wakes(),
            Event::Driver(ring) => self.driver_goes_on(ring),
            Event::Vmm => self.vmm_goes_on(),
            Event::Control(id) => self.control(id),
            Event::Work(id) => self.work(id),
            Event::Disk(number) => self.disk_step(number),
            Event::Started(id) => self.backend_started(id),
            Event::Killed(id) => self.kill(id, "by the broker"),
            Event::HungUp(id) => self.wake_broker_for(id),
            Event::Exited(id) => self.backend_exited(id),
            Event::Reaped(id) => self.reaped(id),
            Event::FenceOverdue(id) => self.fence_overdue(id),
            Event::Fault => self.inject_fault(),
            Event::Recovered(id) => self.recover(id),
            Event::Operator => self.operator_looks(),
        }
    }

    /// Processes that have died between two of their own stores.
    pub(crate) fn bury(&mut self) {
        loop {
            let Some(id) = self.mem.died.borrow_mut().pop() else { return };
            self.kill(id, "between two stores");
        }
    }

    /// Writes an eventfd: whoever listens wakes.
    pub(crate) fn signal(&mut self, obj: Obj) {
        let Some(event) = self.mem.event(obj) else { return };
        event.set(true);
        for index in 0..self.guest.rings.len() {
            if self.guest.rings[index].calls.contains(&obj) {
                self.mem.take_event(obj);
                self.interrupt(index as u16);
            }
        }
        for at in 0..self.backends.len() {
            let backend = &self.backends[at];
            if backend.works() && backend.rings.iter().any(|ring| ring.started && ring.kick == Some(obj)) {
                self.wake_worker(at as u64 + 1);
            }
        }
        self.broker_sees_kick(obj);
    }

    // --- the guest ---------------------------------------------------------------------------------------------------------

    pub(crate) fn interrupt(&mut self, ring: u16) {
        let takes = Nanos(self.random.between(500, 6_000));
        let at = self.now + takes;
        let it = &mut self.guest.rings[usize::from(ring)];
        if at < it.interrupt_at {
            it.interrupt_at = at;
            self.wake_driver(ring, at);
        }
    }

    pub(crate) fn wake_driver(&mut self, ring: u16, at: Nanos) {
        let at = at.max(self.now + Nanos(1));
        let it = &mut self.guest.rings[usize::from(ring)];
        if at < it.wake_at {
            it.wake_at = at;
            self.at(at, Event::Driver(ring));
        }
    }

    pub(crate) fn driver_goes_on(&mut self, index: u16) {
        let thread = usize::from(index);
        if self.guest.rings[thread].wake_at != self.now {
            return;
        }
        self.guest.rings[thread].wake_at = Nanos(u64::MAX);
        if !self.guest.runs {
            return;
        }
        if self.mem.threads.borrow()[thread].queue.is_empty() {
            let ring = &mut self.guest.rings[thread];
            if ring.interrupt_at <= self.now {
                ring.interrupt_at = Nanos(u64::MAX);
                self.take_completions(index);
            }
            if self.guest.issues && self.now >= self.guest.rings[thread].submit_at {
                self.issue(index);
            }
        } else {
            for _ in 0..self.random.between(1, 4) {
                if !self.run_effect(thread, None) {
                    break;
                }
            }
        }
        if !self.mem.threads.borrow()[thread].queue.is_empty() {
            let pause = self.step_pause();
            return self.wake_driver(index, self.now + pause);
        }
        let ring = &self.guest.rings[thread];
        let submit = if self.guest.issues { ring.submit_at } else { Nanos(u64::MAX) };
        let next = ring.interrupt_at.min(submit);
        if next.0 < u64::MAX {
            self.wake_driver(index, next);
        }
    }

    fn issue(&mut self, index: u16) {
        let pause = self.random.around(self.options.pause);
        let ring = &mut self.guest.rings[usize::from(index)];
        ring.submit_at = self.now + pause;
        let room = self.options.depth - ring.inflight.min(self.options.depth);
        // No more is written ahead of `avail.idx` than the broker allows for.
        let most = self.options.burst.min((self.options.ring_size / 4).max(1));
        let count = self.random.between(1, u64::from(most)) as u16;
        let (issued, effects) =
            self.guest.issue(index, count.min(room), self.stats.failovers, self.now, &self.mem, &mut self.random);
        self.stats.requests += u64::from(issued);
        if issued > 0 {
            self.mem.threads.borrow_mut()[usize::from(index)].queue.extend(effects);
        }
    }

    fn take_completions(&mut self, index: u16) {
        let event_idx = self.vmm.has_event_idx();
        let mut taken = 0;
        loop {
            match self.guest.complete(index, &self.mem) {
                Ok(Some(completed)) => {
                    taken += 1;
                    self.stats.completed += 1;
                    self.steps(30, u64::from(completed.head));
                    let (now, request) = (self.now, &completed.request);
                    let what = crate::guest::describe(request);
                    let took = now.since(request.at);
                    self.note(|| format!("ring {index}: head {} is done, a {what}, after {took}", completed.head));
                }
                Ok(None) => {
                    self.guest.ask_for_call(index, event_idx, &self.mem);
                    // What came before that comes without an interrupt.
                    if self.guest.used_idx(index, &self.mem) == self.guest.rings[usize::from(index)].used {
                        break;
                    }
                }
                Err((check, detail)) => return self.fail(check, detail),
            }
        }
        if taken > 0 && self.guest.issues && self.random.one_in(2) {
            // A closed loop: the next ones at once.
            self.guest.rings[usize::from(index)].submit_at = self.now;
        }
    }

    pub(crate) fn kick_if_wanted(&mut self, ring: u16, old: u16, new: u16) {
        self.guest.rings[usize::from(ring)].published = new;
        self.note_pace(ring, false, new.wrapping_sub(old));
        let event_idx = self.vmm.has_event_idx();
        let wanted = self.guest.wants_kick(ring, old, new, event_idx, &self.mem);
        self.note(|| format!("ring {ring}: submits {old}..{new}, {}", if wanted { "kicks" } else { "no kick wanted" }));
        if wanted {
            let kick = self.guest.rings[usize::from(ring)].kick;
            self.signal(kick);
        }
    }

    /// The guest's processors go on.
    pub(crate) fn run_guest(&mut self) {
        self.guest.runs = true;
        for index in 0..self.options.rings {
            self.wake_driver(index, self.now + Nanos(1_000));
        }
    }

    // --- the ends ----------------------------------------------------------------------------------------------------------

    fn begin(&mut self) {
        let due = self.random.around(self.options.fault_every);
        self.at(due, Event::Fault);
        if self.options.faults.poison {
            self.guest.killer_at = Some(Nanos(self.random.below(self.options.safety.0)));
        }
        self.start_pair();
        self.wake_vmm(Nanos(1_000));
    }

    /// No more faults: what is stuck for a while goes on, nothing new is asked for.
    fn heal(&mut self) {
        self.note(|| "--- no more faults".to_owned());
        self.unsafe_phase = false;
        self.guest.issues = true;
        self.guest.killer_at = None;
        for id in 1..=self.backends.len() as u64 {
            self.recover(id);
        }
        self.vmm.finishes = true;
        self.wake_vmm(self.now + Nanos(1_000));
        self.after(Nanos(1_000), Event::Operator);
    }

    /// Whether everything that was issued has come to its end and the device is whole again.
    fn is_done(&self) -> bool {
        let quiet = self.vmm.is_idle() && self.guest.runs && self.broker.is_settled();
        if quiet && self.now > self.options.safety + Nanos::from_millis(3) {
            return self.guest.inflight() == 0 && self.broker_is_whole();
        }
        false
    }

    fn what_is_left(&self) -> String {
        let mut left = Vec::new();
        for ring in &self.guest.rings {
            let index = ring.index;
            let (used, avail) = (self.guest.used_idx(index, &self.mem), self.guest.avail_idx(index, &self.mem));
            if ring.inflight > 0 {
                let unseen = used.wrapping_sub(ring.used);
                left.push(format!(
                    "ring {index}: {} in flight, {unseen} of them completed without an interrupt (avail {avail}, used {used})",
                    ring.inflight
                ));
            }
        }
        if !self.vmm.is_idle() {
            left.push(format!("the VMM {}", self.vmm.what_it_does()));
        }
        if !self.guest.runs {
            left.push("the guest is stopped".to_owned());
        }
        left.push(self.broker_in_words());
        left.join("; ")
    }
}
