//! The broker: the real `Pair`, and around it what the program does around it.
//!
//! Checked here: no ring is given to a backend while another one may still write; what lies in a ring that is handed over is exactly
//! what is owed, in the order of its submission; descriptors are used while they are open and closed once; a failover ends with a
//! report, and one that halts has a reason the simulation knows of, too.

use std::collections::VecDeque;

use warmswap_core::{
    Action, Actions, BackendId, Entry, Event as Happened, FenceLevel, Kind, Nanos, Outcome, PRIVATE_ADDR, Pair,
    PairConfig, PairState, PrivateEvents, Report, Value,
};
use warmswap_wire::{HEADER_SIZE, Header, Request, VringFd};

use crate::backend::Backend;
use crate::memory::{Obj, Object, Owner, Thread};
use crate::options::{Keeping, Sabotage};
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
    watched: Vec<Option<Obj>>,
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
    unproved: Option<u64>,
    /// Started and not ended.
    running: Option<u64>,
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
            running: None,
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
        while let Some(event) = self.broker.events.pop_front() {
            self.hand(event);
        }
        if self.broker.pair.is_closing() || !self.broker.pair.is_open() {
            self.vmm.excused_until = self.now;
        }
        self.read_vmm();
        for id in 1..=self.backends.len() as u64 {
            self.read_link(id);
        }
        if self.broker.pair.next_timeout().is_some_and(|due| due <= self.now) {
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
        while self.broker.has_vmm && self.broker.pair.wants_request() && self.failure.is_none() {
            match self.vmm.to_broker.receive(now) {
                Ok(Some(message)) => {
                    let slots: Vec<_> = message.fds.iter().map(|obj| self.mem.insert(*obj)).collect();
                    let (header, need_reply) = (message.header, message.header.needs_reply());
                    let event = match Request::decode(&header, &message.payload, &slots) {
                        Ok(request) => {
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
        if self.broker.has_vmm && self.vmm.to_broker.is_over(now) {
            self.lose_vmm("the connection was closed");
        }
    }

    fn lose_vmm(&mut self, reason: &str) {
        self.broker.has_vmm = false;
        self.vmm.to_broker = crate::stream::Stream::default();
        self.hand(Happened::VmmGone { reason: reason.to_owned() });
        self.vmm_dropped();
    }

    fn read_link(&mut self, id: u64) {
        let now = self.now;
        while self.failure.is_none() {
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
        if backend.to_broker.is_over(now) {
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
        self.broker.actions = actions;
        self.bury();
        self.act();
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

    fn carry_out(&mut self, action: Action) {
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
    fn objects(&mut self, fds: &[warmswap_wire::FdSlot]) -> Vec<Obj> {
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

    // --- backends ----------------------------------------------------------------------------------------------------------

    fn spawn(&mut self, id: u64) {
        assert_eq!(id, self.backends.len() as u64 + 1, "generations count up");
        let thread = {
            let mut threads = self.mem.threads.borrow_mut();
            threads.push(Thread::new(Owner::Backend(id)));
            threads.len() - 1
        };
        let class = self.options.class_of(id);
        self.backends.push(Backend::new(id, class, self.options.keeping, thread));
        self.stats.backends += 1;
        let takes = self.random.around(self.options.start_takes);
        self.after(takes, Event::Started(id));
    }

    pub(crate) fn backend_started(&mut self, id: u64) {
        if self.backend(id).retired {
            return;
        }
        // The first two have to come, or there is no device at all.
        let fails = self.unsafe_phase && id > 2 && self.options.faults.start_fails && self.random.one_in(3);
        if self.ending || fails {
            self.count_fault("start fails");
            self.backend(id).retired = true;
            return self.tell_broker(Happened::Exited {
                backend: BackendId(id),
                reason: "it could not be started".to_owned(),
            });
        }
        let backend = self.backend(id);
        (backend.alive, backend.connected) = (true, true);
        let kick = self.mem.make_event();
        let call = self.mem.make_event();
        let probe = self.mem.make_event();
        let channel = self.mem.make(Object::Channel);
        let [kick, call, probe] = [kick, call, probe].map(|obj| self.mem.insert(obj));
        let backend_req = Some(self.mem.insert(channel));
        let private = PrivateEvents { kick, call, probe };
        self.note(|| format!("#{id} starts"));
        self.tell_broker(Happened::LinkUp { backend: BackendId(id), backend_req, private });
    }

    fn send_link(&mut self, id: u64, bytes: &[u8], fds: &[warmswap_wire::FdSlot]) {
        let objects = self.objects(fds);
        self.check_message(id, bytes, &objects);
        let at = self.latency();
        let backend = self.backend(id);
        if !backend.connected || backend.retired {
            return;
        }
        backend.from_broker.send(bytes, objects, at);
        self.wake_control(id, at);
    }

    /// A process dies: its threads stop at once, its link a moment later.
    pub(crate) fn kill(&mut self, id: u64, why: &str) {
        let backend = self.backend(id);
        if !backend.alive {
            return;
        }
        backend.alive = false;
        let thread = backend.thread;
        if !(self.options.sabotage == Sabotage::LivesOn && self.backends[id as usize - 1].fencing) {
            let mut threads = self.mem.threads.borrow_mut();
            threads[thread].runs = false;
            threads[thread].queue.clear();
        }
        self.note(|| format!("#{id} dies {why}"));
        self.orphan_operations(id);
        let cut = self.options.faults.cut && self.random.one_in(2);
        let lost = if cut { self.random.between(1, 30) as usize } else { 0 };
        self.backend(id).to_broker.close(lost);
        let hangs_up = Nanos(self.random.between(10_000, 800_000));
        let exits = Nanos(self.random.between(10_000, 1_500_000));
        self.after(hangs_up, Event::HungUp(id));
        self.after(exits, Event::Exited(id));
        if self.backend(id).fencing {
            let takes = self.random.around(self.options.fence_takes);
            self.after(takes, Event::Reaped(id));
        }
    }

    pub(crate) fn backend_exited(&mut self, id: u64) {
        let backend = self.backend(id);
        if !backend.retired && !backend.fencing && !backend.exit_told {
            backend.exit_told = true;
            self.tell_broker(Happened::Exited { backend: BackendId(id), reason: "killed by signal 9".to_owned() });
        }
    }

    fn raise_fence(&mut self, id: u64) {
        self.note(|| format!("broker: fences #{id}"));
        self.broker.fences += 1;
        let backend = self.backend(id);
        backend.retired = true;
        backend.fencing = true;
        if !backend.connected {
            return self.prove(id, "it was never connected to");
        }
        let takes = self.random.around(self.options.fence_takes);
        if self.backends[id as usize - 1].alive {
            // The signal takes a moment to arrive: it goes on until then.
            let signal = Nanos(self.random.between(1_000, 50_000));
            self.after(signal, Event::Killed(id));
        } else {
            self.after(takes, Event::Reaped(id));
        }
        self.after(Nanos::from_millis(10), Event::FenceOverdue(id));
    }

    pub(crate) fn reaped(&mut self, id: u64) {
        self.backend(id).reaped = true;
        self.look_at_fence(id);
    }

    /// The proof: the process is gone, and what it had at the disk is over.
    pub(crate) fn look_at_fence(&mut self, id: u64) {
        let early = self.options.sabotage == Sabotage::FencesEarly;
        let backend = self.backend(id);
        if backend.fencing && backend.reaped && !backend.fenced && (backend.at_disk == 0 || early) {
            self.prove(id, "reaped, its storage is closed");
        }
    }

    fn prove(&mut self, id: u64, evidence: &str) {
        let backend = self.backend(id);
        backend.fenced = true;
        let thread = backend.thread;
        self.mem.threads.borrow_mut()[thread].fenced = true;
        if self.options.sabotage == Sabotage::LivesOn {
            // Its worker was never stopped.
            let mut stores = 0;
            while stores < 3 && self.mem.store_next(thread) {
                stores += 1;
            }
        }
        let (backend, evidence) = (BackendId(id), evidence.to_owned());
        self.broker.fences -= 1;
        self.tell_broker(Happened::Fenced { backend, level: FenceLevel::Reaped, evidence });
    }

    pub(crate) fn fence_overdue(&mut self, id: u64) {
        if !self.backend(id).fenced {
            let reason = "I/O is under way".to_owned();
            self.tell_broker(Happened::FenceWaiting { backend: BackendId(id), reason });
        }
    }

    fn retire(&mut self, id: u64) {
        let backend = self.backend(id);
        backend.retired = true;
        if self.backends[id as usize - 1].alive {
            let signal = Nanos(self.random.between(1_000, 50_000));
            self.after(signal, Event::Killed(id));
        }
    }

    // --- checks ------------------------------------------------------------------------------------------------------------

    /// Whoever is given a ring of the guest's must be alone with it, and find what is owed.
    fn check_message(&mut self, id: u64, bytes: &[u8], objects: &[Obj]) {
        let Some((head, payload)) = bytes.split_first_chunk::<HEADER_SIZE>() else { return };
        let Ok(header) = Header::decode(head) else {
            return self.fail("messages", "the broker sends no header".to_owned());
        };
        let slots: Vec<_> = objects.iter().map(|obj| warmswap_wire::FdSlot(*obj)).collect();
        let request = match Request::decode(&header, payload, &slots) {
            Ok(request) => request,
            Err(error) => {
                return self.fail("messages", format!("what the broker says to #{id} cannot be decoded: {error}"));
            }
        };
        self.note(|| format!("broker: #{id} <- {}", request_in_words(&request)));
        if let Request::SetVringAddr(addr) = &request
            && addr.descriptor < PRIVATE_ADDR
        {
            self.check_alone(id, addr.index);
        }
        if let Request::SetVringKick(VringFd { index, fd: Some(fd) }) = &request {
            let guests = self.guest.rings.get(*index as usize).is_some_and(|ring| ring.kick == fd.0);
            if guests && !self.backends[id as usize - 1].rings[*index as usize].started {
                self.check_handed(id, *index as u16);
            }
        }
    }

    fn check_alone(&mut self, id: u64, index: u32) {
        let others = self.backends.iter().filter(|other| other.id != id && other.may_write());
        let others: Vec<String> = others.map(|other| format!("#{}", other.id)).collect();
        if !others.is_empty() {
            let detail = format!("#{id} is given ring {index} while {} may still write", others.join(", "));
            self.fail("one writer", detail);
        }
    }

    /// A ring whose stop is answered is at rest: its indices stand still, and its slots hold what is owed.
    fn check_stopped(&mut self, index: u16, base: u16, proved: bool) {
        let used = self.guest.used_idx(index, &self.mem);
        if base != used {
            return self.fail("stopped ring", format!("ring {index} is stopped at base {base}, used.idx is {used}"));
        }
        let writes = |backend: &&Backend| backend.may_write() && backend.rings[usize::from(index)].is_busy();
        if let Some(backend) = self.backends.iter().find(writes).filter(|_| proved) {
            let detail = format!("ring {index} is said to be stopped while #{} may still write to it", backend.id);
            self.fail("stopped ring", detail);
        }
    }

    fn check_handed(&mut self, id: u64, index: u16) {
        let (owed, slots) = (self.guest.owed(index, &self.mem), self.guest.slots(index, &self.mem));
        self.note(|| format!("ring {index} goes to #{id} with {owed:?}"));
        if owed != slots {
            let detail = format!("ring {index} goes to #{id} with heads {slots:?}; owed are {owed:?}");
            self.fail("ring handed over", detail);
        }
    }

    fn journal(&mut self, entry: &Entry) {
        self.note(|| format!("journal: {}", entry_in_words(entry)));
        let text = |name: &str| {
            entry.properties.iter().find_map(|(known, value)| match value {
                Value::Text(text) if *known == name => Some(text.as_str()),
                _ => None,
            })
        };
        let number = |name: &str| {
            entry.properties.iter().find_map(|(known, value)| match value {
                Value::Number(number) if *known == name => Some(*number),
                _ => None,
            })
        };
        match entry.event {
            "FailoverStarted" => self.broker.running = number("id"),
            "FailoverSettled" => {
                self.broker.running = None;
                let kind = text("kind").unwrap_or_default();
                *self.stats.kinds.entry(kind.to_owned()).or_default() += 1;
                let inflight = number("inflight").unwrap_or(0);
                self.stats.failovers += 1;
                self.stats.failovers_inflight += u64::from(inflight > 0);
                let bucket = (u64::BITS - inflight.leading_zeros()) as usize;
                self.stats.inflight[bucket.min(9)] += 1;
                self.stats.survivors += number("survivors").unwrap_or(0);
            }
            "FailoverRefused" => {
                if number("id").is_some() {
                    self.broker.running = None;
                }
                let reason = text("reason").or(text("message")).unwrap_or_default();
                *self.stats.refused.entry(generic(reason)).or_default() += 1;
            }
            "FailoverHalted" => {
                self.broker.running = None;
                self.broker.needs_reset = true;
                let reason = text("message").unwrap_or_default();
                *self.stats.halts.entry(generic(reason)).or_default() += 1;
                self.judge_halt(&reason.to_owned());
            }
            "FailoverWithheld" => {
                *self.stats.withheld.entry(text("why").unwrap_or_default().to_owned()).or_default() += 1;
            }
            "AnsweredFromRecord" if text("request") == Some("GET_VRING_BASE") => {
                self.stats.stops_unproved += 1;
                self.broker.unproved = number("ring");
            }
            "MessageRefused" if text("request").is_some_and(|name| name.starts_with("SET_VRING")) => {
                self.broker.needs_reset = true;
            }
            "RingStarted" => self.forget_pace(number("ring").unwrap_or(0) as u16),
            "RequestIsolated" => {
                let (ring, head) = (number("ring").unwrap_or(0) as u16, number("head").unwrap_or(0) as u16);
                self.guest.isolated.push((ring, head));
            }
            "RingStopped" => {
                self.stats.stops += 1;
                let proved = self.broker.unproved.take() != number("ring");
                self.check_stopped(number("ring").unwrap_or(0) as u16, number("base").unwrap_or(0) as u16, proved);
            }
            _ => {}
        }
        if self.broker.needs_reset {
            let takes = Nanos(self.random.between(100_000, 2_000_000));
            self.after(takes, Event::Operator);
        }
    }

    fn refused(&mut self, report: &Report) {
        if report.kind != Kind::Planned && report.kind != Kind::Crash {
            self.fail("report", format!("a {} failover was refused to an asker", report.kind.name()));
        }
    }

    /// A halt needs a reason that the simulation knows of.
    fn judge_halt(&mut self, reason: &str) {
        let options = &self.options;
        let late = self.stats.faults.contains_key("late broker");
        // What a request was in flight at so many deaths of speaks against it, whatever they died of.
        let deaths = u64::from(options.limits.isolate_after) <= self.stats.backends;
        let excused = if reason.contains("in-flight region marks head") {
            // The region lies, and was asked.
            matches!(options.keeping, Keeping::NeverCleared)
        } else if reason.contains("switched off") {
            options.survivors == warmswap_core::Survivors::Refuse
        } else if reason.contains("not known exactly") {
            late || self.pace_was_fast()
        } else if reason.contains("cannot be isolated") {
            deaths
        } else {
            false
        };
        if !excused {
            let detail = format!("a failover halted although what is owed could be known: {reason}");
            self.fail("needless halt", detail);
        }
    }

    pub(crate) fn broker_is_whole(&self) -> bool {
        let status = self.broker.pair.status(self.now);
        status.state == PairState::Protected && self.broker.fences == 0
    }

    pub(crate) fn broker_in_words(&self) -> String {
        let status = self.broker.pair.status(self.now);
        let backend = |it: &Option<warmswap_core::BackendStatus>| {
            it.as_ref().map_or("none".to_owned(), |it| format!("{} {}", it.id, it.state.name()))
        };
        let mut words = format!(
            "the device is {}, phase {}, primary {}, shadow {} ({})",
            status.state.name(),
            status.phase.name(),
            backend(&status.primary),
            backend(&status.shadow),
            status.shadow_note
        );
        if let Some(halted) = status.halted {
            words.push_str(&format!(", halted: {halted}"));
        }
        for ring in status.rings {
            words.push_str(&format!(", ring {} {} in flight {}", ring.index, ring.observer, ring.inflight));
        }
        if self.broker.commands != self.broker.answered {
            words.push_str(", a command has no answer");
        }
        words
    }

    /// Everybody leaves: nothing may be left open, and what was flushed must be on the medium.
    pub(crate) fn end(&mut self) {
        self.broker.pair.end();
        self.vmm_disconnects(0);
        self.until(self.now + Nanos::from_millis(300), |_| false);
        self.ending = true;
        for id in 1..=self.backends.len() as u64 {
            self.kill(id, "in the end");
        }
        self.until(self.now + Nanos::from_millis(100), |_| false);
        if self.mem.open > 0 {
            let detail = format!("left open: {:?}", self.mem.open_slots());
            return self.fail("descriptors", detail);
        }
        if self.failure.is_some() {
            return;
        }
        self.disk.fail_power(&mut self.random);
        for lba in 0..self.options.blocks {
            if let Err(wrong) = self.guest.ledger.check_durable(lba, &self.disk.read(lba)) {
                return self.fail("flush", wrong);
            }
        }
    }
}

fn in_words(event: &Happened) -> String {
    match event {
        Happened::VmmConnected => "the VMM connects".to_owned(),
        Happened::VmmRequest { request, .. } => format!("VMM: {}", request_in_words(request)),
        Happened::VmmRefused { request, reason, .. } => format!("VMM: request {request}: {reason}"),
        Happened::VmmGone { reason } => format!("the VMM is gone: {reason}"),
        Happened::LinkUp { backend, .. } => format!("{backend} is connected"),
        Happened::LinkMessage { backend, header, .. } => {
            let name =
                warmswap_wire::RequestCode::from_id(header.request).map_or("?", warmswap_wire::RequestCode::name);
            format!("{backend} answers {name}")
        }
        Happened::BackendRequest { backend, .. } => format!("{backend} asks"),
        Happened::LinkDown { backend, reason } | Happened::Exited { backend, reason } => format!("{backend}: {reason}"),
        Happened::Fenced { backend, evidence, .. } => format!("{backend} is fenced: {evidence}"),
        Happened::FenceWaiting { backend, reason } => format!("{backend} is not fenced yet: {reason}"),
        Happened::Kicked { ring } => format!("ring {ring} is kicked"),
        Happened::FailoverRequested { now, .. } => {
            format!("the operator wants a failover{}", if *now { " now" } else { "" })
        }
        Happened::FailurePredicted(foresight) => format!("alarm: {}", foresight.alarm.name()),
        Happened::StateOpened { backend, .. } | Happened::StateMoved { backend, .. } => format!("state of {backend}"),
        Happened::Tick => "tick".to_owned(),
    }
}

pub(crate) fn request_in_words(request: &Request) -> String {
    let name = request.code().name();
    match request {
        Request::SetVringNum(it)
        | Request::SetVringBase(it)
        | Request::SetVringEnable(it)
        | Request::GetVringBase(it) => {
            format!("{name} {}={}", it.index, it.value)
        }
        Request::SetVringKick(it) | Request::SetVringCall(it) | Request::SetVringErr(it) => {
            format!("{name} {}", it.index)
        }
        Request::SetVringAddr(it) => format!("{name} {} at {:#x}", it.index, it.descriptor),
        Request::AddMemReg { region, .. } | Request::RemMemReg(region) => format!("{name} at {:#x}", region.guest_addr),
        _ => name.to_owned(),
    }
}

fn entry_in_words(entry: &Entry) -> String {
    let mut words = entry.event.to_owned();
    for (name, value) in &entry.properties {
        let value = match value {
            Value::Number(value) => value.to_string(),
            Value::Micros(value) => format!("{value:.0}"),
            Value::Text(value) => format!("{value:?}"),
            Value::Flag(value) => value.to_string(),
        };
        words.push_str(&format!(" {name}={value}"));
    }
    words
}

/// A reason without its numbers.
fn generic(reason: &str) -> String {
    let mut words = String::with_capacity(reason.len());
    let mut digits = false;
    for letter in reason.chars() {
        if letter.is_ascii_digit() {
            if !digits {
                words.push('N');
            }
            digits = true;
        } else {
            digits = false;
            words.push(letter);
        }
    }
    words
}
