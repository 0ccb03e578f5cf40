//! A backend process: its data path. Every store into shared memory is a step of its own, and the process may die before any.

use warmswap_core::Nanos;
use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, FLAGS, IDX, crosses_event};

use crate::backend::{Done, RINGS};
use crate::guest::{FLUSH, IN, KILLER, OUT, kind_name};
use crate::ledger::BLOCK;
use crate::memory::{Effect, Obj};
use crate::options::{Class, Sabotage};
use crate::world::{Event, World};

/// Requests a backend takes in a turn.
const BATCH: u16 = 8;

/// A request at the disk.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    backend: u64,
    ring: usize,
    epoch: u32,
    head: u16,
    kind: u32,
    lba: u64,
    /// Where each block lies.
    places: Vec<(Obj, u64)>,
    status: (Obj, u64),
    /// Blocks that are through.
    done: usize,
    /// The disk has it.
    begun: bool,
    /// It was given up when its process died.
    cancelled: bool,
    over: bool,
}

impl World<'_> {
    /// Has a backend's worker go on, if it can.
    pub(crate) fn wake_worker(&mut self, id: u64) {
        let backend = self.backend(id);
        if backend.works() && !backend.work_due {
            backend.work_due = true;
            let pause = self.step_pause();
            self.at(self.now + pause, Event::Work(id));
        }
    }

    /// Time between two steps of a thread.
    pub(crate) fn step_pause(&mut self) -> Nanos {
        if self.options.preempted && self.random.one_in(60) {
            return Nanos(self.random.between(20_000, 1_500_000));
        }
        Nanos(self.random.between(50, 1_500))
    }

    pub(crate) fn work(&mut self, id: u64) {
        let backend = self.backend(id);
        backend.work_due = false;
        if !backend.works() {
            return;
        }
        let thread = backend.thread;
        // A few steps at a time; others go on in between.
        for _ in 0..self.random.between(1, 6) {
            if !self.backend(id).works() {
                return;
            }
            if self.mem.threads.borrow()[thread].queue.is_empty() {
                if self.backend(id).worker_waits || !self.take_work(id) {
                    return;
                }
                continue;
            }
            if !self.run_effect(thread, Some(id)) {
                return;
            }
        }
        self.wake_worker(id);
    }

    /// The next step of a thread. False: there was none, or its process has died.
    pub(crate) fn run_effect(&mut self, thread: usize, backend: Option<u64>) -> bool {
        if self.mem.store_next(thread) {
            self.steps(3, thread as u64);
            return true;
        }
        self.bury();
        let Some(effect) = self.mem.threads.borrow_mut()[thread].queue.pop_front() else { return false };
        match (effect, backend) {
            (Effect::Kick { ring, old, new }, _) => self.kick_if_wanted(ring, old, new),
            (Effect::Call { ring, old, new }, Some(id)) => self.call_if_wanted(id, ring, old, new),
            (Effect::Submit(operation), Some(_)) => self.submit(operation),
            _ => {}
        }
        true
    }

    /// Finds something for a worker to do. False: it rests until it is woken.
    fn take_work(&mut self, id: u64) -> bool {
        let first = self.random.below(RINGS as u64) as usize;
        let polls = self.backend(id).class == Class::Spdk;
        let mut found = false;
        for at in 0..RINGS {
            let at = (first + at) % RINGS;
            let ring = &self.backends[id as usize - 1].rings[at];
            if !ring.done.is_empty() {
                self.complete_batch(id, at);
                return true;
            }
            if !ring.started {
                continue;
            }
            let kicked = ring.kick.is_some_and(|kick| self.mem.event(kick).is_some_and(std::cell::Cell::get));
            let enabled = ring.enabled || self.backends[id as usize - 1].class == Class::LibvhostUser;
            if kicked && (enabled || self.backends[id as usize - 1].class != Class::RustVmm) {
                let kick = ring.kick.expect("just seen");
                self.mem.take_event(kick);
                self.backend(id).rings[at].look = true;
            }
            let ring = &self.backends[id as usize - 1].rings[at];
            if (ring.look || polls || !ring.again.is_empty()) && enabled {
                found |= self.take_requests(id, at);
            }
        }
        if !found && polls && self.backends[id as usize - 1].rings.iter().any(|ring| ring.started) {
            // A polling backend looks again by itself.
            let backend = self.backend(id);
            if !backend.work_due {
                backend.work_due = true;
                let pause = Nanos(self.random.between(4_000, 30_000));
                self.at(self.now + pause, Event::Work(id));
            }
            return false;
        }
        found
    }

    /// Takes requests from a ring. True: there was something to do.
    fn take_requests(&mut self, id: u64, at: usize) -> bool {
        let ring = &self.backends[id as usize - 1].rings[at];
        let layout = ring.layout();
        let avail = self.mem.read_u16(ring.available.0, ring.available.1 + IDX);
        let mut pending = avail.wrapping_sub(ring.next);
        if pending > layout.size() {
            let (next, used) = (ring.next, ring.used);
            let detail = format!("#{id} ring {at}: avail.idx is {avail}, it stands at {next} (used {used})");
            self.fail("ring handed over", detail);
            return false;
        }
        let mut effects = Vec::new();
        let mut count = 0;
        let most = self.random.between(1, u64::from(BATCH)) as u16;
        while count < most {
            let backend = &mut self.backends[id as usize - 1];
            let ring = &mut backend.rings[at];
            let head = if let Some(head) = ring.again.pop_front() {
                head
            } else if pending > 0 {
                let slot = layout.available_slot(layout.slot(ring.next));
                let head = self.mem.read_u16(ring.available.0, ring.available.1 + slot);
                ring.next = ring.next.wrapping_add(1);
                pending -= 1;
                head
            } else {
                break;
            };
            count += 1;
            let Some(operation) = self.parse(id, at, head) else { return false };
            let ring = &mut self.backends[id as usize - 1].rings[at];
            if let Some(keeper) = &mut ring.keeper {
                effects.extend(keeper.taken(head));
            }
            ring.taken.push(head);
            self.operations.push(operation);
            effects.push(Effect::Submit(self.operations.len() as u32 - 1));
        }
        let event_idx = self.backends[id as usize - 1].has_event_idx();
        let ring = &mut self.backends[id as usize - 1].rings[at];
        if pending == 0 {
            // Once more after this: what is published before `avail_event` is stored comes without a kick.
            ring.look = count > 0;
        }
        if event_idx && count > 0 {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&ring.next.to_le_bytes());
            let (obj, place) = ring.used_ring;
            effects.push(Effect::Store { obj, at: place + layout.avail_event(), len: 2, bytes });
        }
        let thread = self.backends[id as usize - 1].thread;
        self.mem.threads.borrow_mut()[thread].queue.extend(effects);
        count > 0
    }

    /// Reads a chain. None: the run has failed, or the backend has died.
    fn parse(&mut self, id: u64, at: usize, head: u16) -> Option<Operation> {
        match self.read_chain(id, at, head) {
            Ok(operation) if operation.kind == KILLER => {
                self.kill(id, "of a request");
                None
            }
            Ok(operation) => Some(operation),
            Err(reason) => {
                if self.backends[id as usize - 1].from_broker.has_some() {
                    // It has not heard of a change of memory yet, and the VMM has been answered from the record.
                    self.kill(id, &reason);
                } else {
                    self.fail("request handed over", format!("#{id} ring {at} head {head}: {reason}"));
                }
                None
            }
        }
    }

    fn read_chain(&self, id: u64, at: usize, head: u16) -> Result<Operation, String> {
        let backend = &self.backends[id as usize - 1];
        let ring = &backend.rings[at];
        let size = ring.layout().size();
        if head >= size {
            return Err("the head is beyond the ring".to_owned());
        }
        if ring.taken.contains(&head) {
            return Err("it has been taken already".to_owned());
        }
        let load = |(obj, place): (Obj, u64), index: u16| {
            let mut bytes = [0; 16];
            self.mem.read(obj, place + 16 * u64::from(index), &mut bytes);
            Descriptor::from_le_bytes(bytes)
        };
        let mut table = ring.descriptors;
        let mut descriptor = load(table, head);
        if descriptor.flags & DESC_F_INDIRECT != 0 {
            table =
                backend.find_guest(descriptor.addr, u64::from(descriptor.len)).ok_or("its table lies in no region")?;
            descriptor = load(table, 0);
        }
        let mut pieces = Vec::with_capacity(4);
        loop {
            let place = backend.find_guest(descriptor.addr, u64::from(descriptor.len));
            let place = place.ok_or_else(|| format!("a buffer at {:#x} lies in no region", descriptor.addr))?;
            pieces.push((place, descriptor.len, descriptor.flags & DESC_F_WRITE != 0));
            if descriptor.flags & DESC_F_NEXT == 0 || pieces.len() > 8 {
                break;
            }
            descriptor = load(table, descriptor.next);
        }
        let (Some((first, 16, false)), Some((status, 1, true))) = (pieces.first().copied(), pieces.last().copied())
        else {
            return Err("it is no block request".to_owned());
        };
        let mut header = [0; 16];
        self.mem.read(first.0, first.1, &mut header);
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four"));
        let lba = u64::from_le_bytes(header[8..].try_into().expect("eight"));
        let mut places = Vec::new();
        for ((obj, place), len, _) in &pieces[1..pieces.len() - 1] {
            places.extend((0..u64::from(*len) / BLOCK as u64).map(|at| (*obj, place + at * BLOCK as u64)));
        }
        if ![IN, OUT, FLUSH, KILLER].contains(&kind) || lba + places.len() as u64 > self.options.blocks {
            return Err(format!("it has type {kind:#x}, block {lba}"));
        }
        let epoch = ring.epoch;
        let (done, begun, cancelled, over) = (0, false, false, false);
        Ok(Operation { backend: id, ring: at, epoch, head, kind, lba, places, status, done, begun, cancelled, over })
    }

    fn submit(&mut self, operation: u32) {
        let it = &mut self.operations[operation as usize];
        it.begun = true;
        let (id, kind, blocks) = (it.backend, it.kind, it.places.len());
        self.backend(id).at_disk += 1;
        let takes = self.random.around(self.options.service);
        let first = if kind != FLUSH && blocks > 1 { Nanos(takes.0 / 2) } else { takes };
        self.at(self.now + first, Event::Disk(operation));
        self.note(|| format!("#{id} starts a {}", kind_name(kind)));
    }

    /// A request goes on at the disk, whether or not its process is still there.
    pub(crate) fn disk_step(&mut self, number: u32) {
        let it = &self.operations[number as usize];
        if it.cancelled || it.over {
            return;
        }
        let (id, kind, lba, blocks, from) = (it.backend, it.kind, it.lba, it.places.len(), it.done);
        let guest = self.mem.is_guest(it.status.0) || it.places.iter().any(|(obj, _)| self.mem.is_guest(*obj));
        let fenced = self.backends[id as usize - 1].fenced;
        if fenced && guest && kind != FLUSH {
            return self
                .fail("a fenced backend writes", format!("#{id}: a {} of {blocks} blocks at {lba}", kind_name(kind)));
        }
        let to = if from == 0 && blocks > 1 { blocks / 2 } else { blocks };
        let sabotage = self.options.sabotage;
        let lost = sabotage == Sabotage::LosesWrite && kind == OUT && self.random.one_in(20);
        let garbled = sabotage == Sabotage::ReadsWrong && kind == IN && self.random.one_in(20);
        for at in from..to {
            let (obj, place) = self.operations[number as usize].places[at];
            let target = lba + at as u64;
            if kind == IN {
                let from = if garbled { (target + 1) % self.options.blocks } else { target };
                let block = self.disk.read(from);
                self.mem.write(obj, place, &block);
            } else if !lost {
                let mut block = [0; BLOCK];
                self.mem.read(obj, place, &mut block);
                self.disk.write(target, &block);
            }
        }
        if kind == FLUSH && !(sabotage == Sabotage::LosesFlush) {
            self.disk.flush();
        }
        self.operations[number as usize].done = to;
        if to < blocks {
            let takes = self.random.around(Nanos(self.options.service.0 / 2));
            return self.at(self.now + takes, Event::Disk(number));
        }
        self.disk_done(number);
    }

    fn disk_done(&mut self, number: u32) {
        self.operations[number as usize].over = true;
        let it = self.operations[number as usize].clone();
        let id = it.backend;
        let backend = self.backend(id);
        backend.at_disk -= 1;
        if !backend.alive {
            return self.look_at_fence(id);
        }
        let ring = &mut backend.rings[it.ring];
        if ring.epoch != it.epoch {
            return;
        }
        if self.options.sabotage == Sabotage::LosesRequest && self.random.one_in(50) {
            return;
        }
        let fails = self.options.sabotage == Sabotage::FailsRequest && self.random.one_in(50);
        let len = 1 + if it.kind == IN { (it.places.len() * BLOCK) as u32 } else { 0 };
        let ring = &mut self.backends[id as usize - 1].rings[it.ring];
        ring.done.push_back(Done { head: it.head, status: it.status, value: u8::from(fails), len });
        self.wake_worker(id);
    }

    /// Completes what the disk is through with, as one batch.
    fn complete_batch(&mut self, id: u64, at: usize) {
        let twice = self.options.sabotage == Sabotage::CompletesTwice && self.random.one_in(30);
        let most = self.random.between(1, u64::from(BATCH)) as usize;
        let backend = &mut self.backends[id as usize - 1];
        let ring = &mut backend.rings[at];
        let layout = ring.layout();
        // No more is written ahead of `used.idx` than the broker allows for.
        let most = most.min(usize::from((layout.size() / 4).max(1)));
        let count = ring.done.len().min(most);
        let batch: Vec<Done> = ring.done.drain(..count).collect();
        let mut effects = Vec::new();
        let mut heads = Vec::new();
        let old = ring.signalled;
        for done in &batch {
            let mut bytes = [0; 16];
            bytes[0] = done.value;
            effects.push(Effect::Store { obj: done.status.0, at: done.status.1, len: 1, bytes });
        }
        for done in batch.iter().chain(batch.first().filter(|_| twice)) {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&u32::from(done.head).to_le_bytes());
            bytes[4..8].copy_from_slice(&done.len.to_le_bytes());
            let slot = layout.used_slot(layout.slot(ring.used));
            effects.push(Effect::Store { obj: ring.used_ring.0, at: ring.used_ring.1 + slot, len: 8, bytes });
            ring.used = ring.used.wrapping_add(1);
        }
        for done in &batch {
            heads.push(done.head);
            ring.taken.retain(|head| *head != done.head);
        }
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&ring.used.to_le_bytes());
        let publish = Effect::Store { obj: ring.used_ring.0, at: ring.used_ring.1 + IDX, len: 2, bytes };
        match &mut ring.keeper {
            Some(keeper) => effects.extend(keeper.complete(&heads, ring.used, publish)),
            None => effects.push(publish),
        }
        effects.push(Effect::Call { ring: at as u16, old, new: ring.used });
        ring.signalled = Some(ring.used);
        let thread = backend.thread;
        self.mem.threads.borrow_mut()[thread].queue.extend(effects);
    }

    fn call_if_wanted(&mut self, id: u64, ring: u16, old: Option<u16>, new: u16) {
        if self.backends[id as usize - 1].rings[usize::from(ring)].is_the_guests() {
            self.note_pace(ring, true, old.map_or(BATCH, |old| new.wrapping_sub(old)));
        }
        let backend = &self.backends[id as usize - 1];
        let it = &backend.rings[usize::from(ring)];
        let layout = it.layout();
        let wanted = if backend.has_event_idx() {
            let event = self.mem.read_u16(it.available.0, it.available.1 + layout.used_event());
            old.is_none_or(|old| crosses_event(event, new, old))
        } else {
            self.mem.read_u16(it.available.0, it.available.1 + FLAGS) & 1 == 0
        };
        if !wanted || (self.options.sabotage == Sabotage::LosesCall && self.random.one_in(20)) {
            return;
        }
        match it.call {
            Some(call) => self.signal(call),
            None if backend.class == Class::LibvhostUser => self.kill(id, "of a completion without a call descriptor"),
            None => {}
        }
    }

    /// What a process had at the disk when it died: given up, or still under way for a while.
    pub(crate) fn orphan_operations(&mut self, id: u64) {
        for number in 0..self.operations.len() {
            let it = &self.operations[number];
            if it.backend != id || it.over || it.cancelled {
                continue;
            }
            if !it.begun {
                self.operations[number].cancelled = true;
            } else if !self.options.late_writes || self.random.one_in(2) {
                self.operations[number].cancelled = true;
                self.backend(id).at_disk -= 1;
            }
        }
    }
}
