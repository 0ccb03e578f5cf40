//! The broker: the real `Pair`, and around it what the program does around it.
//!
//! Checked here: descriptors are used while they are open and closed once. The rest is in `verdict`.

use std::collections::VecDeque;

use warmswap_core::{Action, Actions, BackendId, Event as Happened, Nanos, Outcome, Pair, PairConfig};
use warmswap_wire::Request;

use crate::backend::written_writeback;
use crate::death::Left;
use crate::memory::Obj;
use crate::words::in_words;
use crate::world::{Event, World};

/// The control thread.
pub(crate) struct Broker {
    pub(crate) pair: Pair,
    actions: Actions,
    pub(crate) events: VecDeque<Happened>,
    wakes_at: Nanos,
    /// It is kept from its processor until then.
    pub(crate) late_until: Nanos,
    /// Rings whose kick is watched, and the eventfd.
    pub(crate) watched: Vec<Option<Obj>>,
    /// A VMM is connected.
    pub(crate) has_vmm: bool,
    /// Backends the shadow's links come from, in the order of their start.
    pub(crate) commands: u64,
    pub(crate) answered: u64,
    /// Fences that are raised.
    pub(crate) fences: u32,
    /// The device is halted, or a ring is refused: somebody has to reset the guest.
    pub(crate) needs_reset: bool,
    /// A ring whose stop is about to be answered although its backend is not proved quiet.
    pub(crate) unproved: Option<u64>,
    /// It dies in the step after so many.
    pub(crate) dies_in: Option<u32>,
    /// What one that has died has left.
    pub(crate) left: Option<Left>,
    /// When a backend was last killed to be fenced.
    pub(crate) killed_at: Option<Nanos>,
    /// Started and not ended.
    pub(crate) running: Option<u64>,
    /// What this VMM has had written to the configuration space, as far as the broker has read.
    pub(crate) writeback: Option<u8>,
}

impl Broker {
    pub(crate) fn new(config: PairConfig) -> Self {
        Broker {
            pair: Pair::new(config),
            actions: Actions::default(),
            events: VecDeque::new(),
            wakes_at: Nanos(u64::MAX),
            late_until: Nanos(0),
            watched: vec![None; 8],
            has_vmm: false,
            commands: 0,
            answered: 0,
            fences: 0,
            needs_reset: false,
            unproved: None,
            dies_in: None,
            left: None,
            killed_at: None,
            running: None,
            writeback: None,
        }
    }

    /// A VMM that has gone is not done with.
    pub(crate) fn is_busy_with_the_last(&self) -> bool {
        self.has_vmm || self.fences > 0 || self.pair.is_closing()
    }

    /// Nothing is under way.
    pub(crate) fn is_settled(&self) -> bool {
        self.running.is_none() && self.commands == self.answered && !self.needs_reset && !self.pair.is_closing()
    }
}

impl World<'_> {
    pub(crate) fn start_pair(&mut self) {
        let mut actions = std::mem::take(&mut self.broker.actions);
        self.broker.pair.start(self.now, &mut actions);
        self.broker.actions = actions;
        self.act();
        self.schedule_broker();
    }

    pub(crate) fn wake_broker(&mut self, at: Nanos) {
        let at = at.max(self.now).max(self.broker.late_until);
        if at < self.broker.wakes_at {
            self.broker.wakes_at = at;
            self.at(at, Event::Broker);
        }
    }

    pub(crate) fn wake_broker_for(&mut self, _backend: u64) {
        self.wake_broker(self.now);
    }

    /// Something for the broker that it notices soon.
    pub(crate) fn tell_broker(&mut self, event: Happened) {
        self.broker.events.push_back(event);
        let at = self.now + Nanos(self.random.between(1_000, 20_000));
        self.wake_broker(at);
    }

    pub(crate) fn broker_wakes(&mut self) {
        if self.broker.wakes_at != self.now {
            return;
        }
        self.broker.wakes_at = Nanos(u64::MAX);
        if self.now < self.broker.late_until {
            return self.wake_broker(self.broker.late_until);
        }
        self.broker_takes_over();
        let was_closing = self.broker.pair.is_closing();
        while let Some(event) = self.broker.events.pop_front() {
            self.hand(event);
            if self.broker.left.is_some() {
                return;
            }
        }
        if was_closing || self.broker.pair.is_closing() || !self.broker.pair.is_open() {
            self.vmm.excused_until = self.now;
        }
        self.read_vmm();
        for id in 1..=self.backends.len() as u64 {
            if self.broker.left.is_some() {
                return;
            }
            self.read_link(id);
        }
        if self.broker.left.is_none() && self.broker.pair.next_timeout().is_some_and(|due| due <= self.now) {
            self.hand(Happened::Tick);
        }
        self.schedule_broker();
    }

    /// The next wake-up: a timer, or something that arrives.
    fn schedule_broker(&mut self) {
        let mut next = self.broker.pair.next_timeout().map(|due| due.max(self.now + Nanos(1_000)));
        let mut sooner = |at: Option<Nanos>| {
            if let Some(at) = at {
                next = Some(next.map_or(at, |known| known.min(at)));
            }
        };
        if self.broker.pair.wants_request() {
            sooner(self.vmm.to_broker.next_arrival());
        }
        for backend in &self.backends {
            if backend.connected && !backend.retired {
                sooner(backend.to_broker.next_arrival());
            }
        }
        if let Some(at) = next {
            self.wake_broker(at.max(self.now + Nanos(200)));
        }
    }

    fn read_vmm(&mut self) {
        let now = self.now;
        if !self.broker.has_vmm {
            if self.vmm.connecting && self.broker.pair.is_open() {
                self.vmm.connecting = false;
                self.broker.has_vmm = true;
                self.stats.connections += 1;
                self.hand(Happened::VmmConnected);
            } else {
                return;
            }
        }
        while self.broker.has_vmm && self.is_whole() && self.broker.pair.wants_request() {
            match self.vmm.to_broker.receive(now) {
                Ok(Some(message)) => {
                    let slots: Vec<_> = message.fds.iter().map(|obj| self.mem.insert(*obj)).collect();
                    let (header, need_reply) = (message.header, message.header.needs_reply());
                    let event = match Request::decode(&header, &message.payload, &slots) {
                        Ok(request) => {
                            if let Request::SetConfig(write) = &request {
                                self.broker.writeback = written_writeback(write).or(self.broker.writeback);
                            }
                            if let Request::RemMemReg(_) = request {
                                slots.into_iter().for_each(|slot| self.mem.close(slot));
                            }
                            Happened::VmmRequest { request, need_reply }
                        }
                        Err(error) => {
                            slots.into_iter().for_each(|slot| self.mem.close(slot));
                            Happened::VmmRefused { request: header.request, reason: error.to_string(), need_reply }
                        }
                    };
                    self.hand(event);
                }
                Ok(None) => break,
                Err(error) => return self.lose_vmm(&error),
            }
        }
        if self.is_whole() && self.broker.has_vmm && self.vmm.to_broker.is_over(now) {
            self.lose_vmm("the connection was closed");
        }
    }

    fn lose_vmm(&mut self, reason: &str) {
        self.broker.has_vmm = false;
        self.broker.writeback = None;
        self.vmm.to_broker = crate::stream::Stream::default();
        self.hand(Happened::VmmGone { reason: reason.to_owned() });
        self.vmm_dropped();
    }

    fn read_link(&mut self, id: u64) {
        let now = self.now;
        while self.is_whole() {
            let backend = &mut self.backends[id as usize - 1];
            if !backend.connected || backend.retired {
                return;
            }
            match backend.to_broker.receive(now) {
                Ok(Some(message)) => {
                    let fds = message.fds.iter().map(|obj| self.mem.insert(*obj)).collect();
                    let (header, payload) = (message.header, message.payload);
                    self.hand(Happened::LinkMessage { backend: BackendId(id), header, payload, fds });
                }
                Ok(None) => break,
                Err(error) => return self.fail("simulation", format!("#{id}: {error}")),
            }
        }
        let backend = &mut self.backends[id as usize - 1];
        if self.broker.left.is_none() && backend.to_broker.is_over(now) {
            backend.retired = true;
            self.hand(Happened::LinkDown { backend: BackendId(id), reason: "its link ended".to_owned() });
        }
    }

    fn hand(&mut self, event: Happened) {
        if self.failure.is_some() {
            return;
        }
        self.note(|| format!("broker: {}", in_words(&event)));
        let mut actions = std::mem::take(&mut self.broker.actions);
        self.broker.pair.handle(self.now, event, &mut self.mem, &mut actions);
        self.bury();
        if self.broker_dies_now() {
            let wanted = actions.drain().collect();
            self.broker.actions = actions;
            return self.broker_dies(wanted);
        }
        self.broker.actions = actions;
        self.act();
    }

    /// Nothing has gone wrong, and the broker lives.
    fn is_whole(&self) -> bool {
        self.failure.is_none() && self.broker.left.is_none()
    }

    fn act(&mut self) {
        let mut actions = std::mem::take(&mut self.broker.actions);
        for action in actions.drain() {
            if self.failure.is_some() {
                break;
            }
            self.carry_out(action);
        }
        self.broker.actions = actions;
    }

    pub(crate) fn carry_out(&mut self, action: Action) {
        match action {
            Action::OpenState { .. } => unreachable!("a block device is its rings and its image"),
            Action::SendVmm { bytes, fds } => {
                let fds = self.objects(&fds);
                let at = self.latency();
                self.vmm.from_broker.send(&bytes, fds, at);
                self.wake_vmm(at);
            }
            Action::SendVmmBackend { channel, .. } => _ = self.objects(&[channel]),
            Action::DropVmm => {
                if self.broker.has_vmm {
                    self.broker.has_vmm = false;
                    self.vmm.to_broker = crate::stream::Stream::default();
                    self.broker
                        .events
                        .push_back(Happened::VmmGone { reason: "it sent what cannot be answered".to_owned() });
                    self.vmm_dropped();
                    self.wake_broker(self.now);
                }
            }
            Action::SendLink { backend, bytes, fds } => self.send_link(backend.0, &bytes, &fds),
            Action::SendLinkBackend { .. } => {}
            Action::Close(fd) => self.mem.close(fd),
            Action::Signal(fd) => {
                if let [obj] = self.objects(&[fd])[..] {
                    self.signal(obj);
                }
            }
            Action::Start { backend } => self.spawn(backend.0),
            Action::Fence { backend } => self.raise_fence(backend.0),
            Action::Retire { backend } => self.retire(backend.0),
            Action::WatchKick { ring, kick } => {
                if let [obj] = self.objects(&[kick])[..] {
                    self.broker.watched[ring as usize] = Some(obj);
                    if self.mem.event(obj).is_some_and(std::cell::Cell::get) {
                        self.broker_sees_kick(obj);
                    }
                }
            }
            Action::UnwatchKick { ring } => self.broker.watched[ring as usize] = None,
            Action::Assign { backend, primary } => {
                self.note(|| format!("broker: {backend} is {}", if primary { "primary" } else { "shadow" }));
            }
            Action::Journal(entry) => self.journal(&entry),
            Action::Answer { report, .. } => {
                self.broker.answered += 1;
                if report.outcome == Outcome::Refused {
                    self.refused(&report);
                }
            }
        }
    }

    /// What descriptors stand for. They must be open.
    pub(crate) fn objects(&mut self, fds: &[warmswap_wire::FdSlot]) -> Vec<Obj> {
        let known: Vec<Obj> = fds.iter().filter_map(|fd| self.mem.get(*fd)).collect();
        if known.len() < fds.len() {
            self.fail("descriptors", format!("one of {fds:?} is used although it is closed"));
        }
        known
    }

    pub(crate) fn broker_sees_kick(&mut self, obj: Obj) {
        for ring in 0..self.broker.watched.len() {
            if self.broker.watched[ring] == Some(obj) {
                self.broker.watched[ring] = None;
                self.tell_broker(Happened::Kicked { ring: ring as u32 });
            }
        }
    }
}
