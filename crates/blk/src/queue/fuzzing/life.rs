//! One back-end: what it is made to do, and what must be true of it.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};

use warmswap_telemetry::QueueWriter;
use warmswap_wire::inflight::{read_split, ring_bytes};
use warmswap_wire::ring::Descriptor;

use super::driver::{Driver, Script, Shape};
use super::storage::{Manner, Recorder, learn};
use super::{NOTHING, QUEUE, REGION_BYTES, World, write};
use crate::log::DirtyLog;
use crate::memory::{Mapping, MemoryMap, Window};
use crate::queue::{Queue, Region, Served, Start};
use crate::request::ID_BYTES;
use crate::ring::{Broken, Place};

/// Steps of one life.
const STEPS_MAX: usize = 400;

/// One back-end's life.
pub(super) struct Life<'a> {
    pub(super) driver: &'a mut Driver,
    pub(super) maps: &'a [MemoryMap; 4],
    pub(super) log: Arc<DirtyLog>,
    pub(super) call: &'a OwnedFd,
    pub(super) region_file: &'a OwnedFd,
    pub(super) is_still: bool,
    pub(super) queue: Queue,
    pub(super) engine: Recorder,
    /// Requests that were begun.
    pub(super) begun: u64,
    pub(super) published: u64,
    /// Heads that could not even be answered.
    pub(super) lost: Vec<u16>,
}

impl<'a> Life<'a> {
    pub(super) fn start(world: &'a mut World, driver: &'a mut Driver, touched: u64) -> Option<Self> {
        let shape = driver.shape;
        let memory = Arc::new(driver.memory.clone());
        let place = Place::find(&memory, shape.size, &shape.addr()).ok()?;
        let region = window_of(&world.region, shape.size);
        let mut engine = Recorder {
            image: Arc::clone(&world.image),
            limits: driver.limits,
            manner: Manner::Later,
            pending: Vec::new(),
            memory: Weak::new(),
            inside: Vec::new(),
            touched,
        };
        learn(&mut engine, &memory, 0);
        let start = Start {
            index: QUEUE,
            place,
            memory,
            base: shape.base,
            region: shape.has_region.then(|| Region(region)),
            event_idx: shape.event_idx,
            indirect: shape.indirect,
            enabled: true,
            kick: None,
            call: shape.has_call.then(|| world.call.try_clone().expect("a descriptor")),
            err: None,
            log: shape.has_log.then(|| Arc::clone(&world.log)),
        };
        let served = Served { image: Arc::clone(&world.image), limits: driver.limits, id: [b'i'; ID_BYTES] };
        let meter = world.meter.take().expect("it comes back");
        let queue = match Queue::new(start, served, meter) {
            Ok(queue) => queue,
            Err((reason, meter)) => {
                assert!(driver.owed.is_none() || !world.is_still, "what the last one has kept is refused: {reason}");
                world.meter = Some(meter);
                return None;
            }
        };
        if let (Some(owed), true) = (driver.owed.take(), world.is_still) {
            let mut resubmit: Vec<u16> = queue.resubmit.iter().copied().collect();
            resubmit.sort_unstable();
            assert_eq!(resubmit, owed, "what the last one owed is submitted again, and nothing else");
        }
        Some(Life {
            driver,
            maps: &world.maps,
            log: Arc::clone(&world.log),
            call: &world.call,
            region_file: &world.region_file,
            is_still: world.is_still,
            queue,
            engine,
            begun: 0,
            published: 0,
            lost: Vec::new(),
        })
    }

    /// Until it ends or is killed. Returns whether there shall be another, the meter, and the sectors that may have changed.
    pub(super) fn live(mut self, script: &mut Script<'_>, told: u64) -> (bool, QueueWriter, u64) {
        self.check();
        let mut goes_on = false;
        for _ in 0..STEPS_MAX {
            if script.0.is_empty() {
                break;
            }
            let step = script.u8();
            if step == 255 {
                self.check_region();
                return self.die();
            }
            // A ring that is broken is good for little, until its driver resets it.
            goes_on = step == 254 || self.queue.broken.is_some() && step.is_multiple_of(4);
            if goes_on {
                break;
            }
            self.step(step, script, told);
        }
        self.check_region();
        self.end(goes_on)
    }

    /// In order: what was taken is completed.
    pub(super) fn end(mut self, goes_on: bool) -> (bool, QueueWriter, u64) {
        self.begin(|queue, engine| _ = queue.begin_owed(engine));
        self.queue.stopping = true;
        self.queue.begin_round();
        self.retry();
        while !self.engine.pending.is_empty() {
            self.answer(0, Manner::Truly);
        }
        self.publish();
        assert!(self.queue.is_at_rest(), "everything is answered");
        self.check_region();
        let touched = self.engine.touched;
        let taken = self.queue.ring.taken();
        let (base, meter) = self.queue.end();
        assert_eq!(base, taken);
        if goes_on {
            // The driver resets the device, and begins anew.
            write(self.region_file, &NOTHING[..ring_bytes(self.driver.shape.size) as usize]);
            self.driver.restart(self.driver.avail_idx);
        }
        (goes_on, meter, touched)
    }

    /// Killed: whoever comes next finds what was owed.
    pub(super) fn die(self) -> (bool, QueueWriter, u64) {
        let used = self.queue.ring.unpublished();
        self.driver.owed = self.driver.shape.has_region.then(|| self.owed());
        let touched = self.engine.touched;
        // Only an end gives the meter back; that it asks for kicks changes nothing for the next one.
        let (_, meter) = self.queue.end();
        // The next one reads the index in the ring, where only this one has written, as we shall have it.
        self.driver.restart(used);
        (true, meter, touched)
    }

    pub(super) fn step(&mut self, step: u8, script: &mut Script<'_>, told: u64) {
        match step {
            0..=99 => self.driver.request(script),
            215..=224 => {
                let (place, len) = (script.place(), usize::from(script.u8() % 32));
                let mut bytes = [0; 32];
                bytes[..len].fill_with(|| script.u8());
                self.driver.put(place, &bytes[..len]);
            }
            225..=230 => {
                let flags = u16::from(script.u8() % 9);
                let index = script.below(self.driver.shape.size);
                let next = script.below(self.driver.shape.size + 1);
                let descriptor = Descriptor { addr: script.addr(), len: script.len(), flags, next };
                self.driver.descriptor(self.driver.shape.parts[0], index, descriptor);
            }
            231..=233 => {
                let head = script.below(self.driver.shape.size + 1);
                self.driver.submit(head);
            }
            234..=236 => {
                let at = [self.driver.avail_idx, script.u16()][usize::from(script.u8() & 1)];
                self.driver.put(self.driver.shape.parts[1] + 2, &at.to_le_bytes());
            }
            237..=240 => {
                let event = script.u16();
                let at = self.driver.shape.parts[1] + self.driver.layout.used_event();
                self.driver.put(at, &event.to_le_bytes());
                self.driver.put(self.driver.shape.parts[1], &[script.u8() & 1]);
            }
            100..=159 => {
                self.engine.manner = Manner::of(script.u8());
                self.take();
            }
            160..=184 if !self.engine.pending.is_empty() => {
                let at = usize::from(script.u8()) % self.engine.pending.len();
                let manner = Manner::of(script.u8() | 2);
                self.answer(at, manner);
            }
            160..=204 => self.publish(),
            205..=214 => {
                let byte = script.u8();
                self.engine.manner = Manner::of(byte);
                if byte & 0x80 == 0 {
                    self.queue.begin_round();
                }
                self.retry();
            }
            241..=244 => self.move_memory(script),
            245..=247 => {
                let log = script.flag().then(|| Arc::clone(&self.log));
                self.queue.set_log(log);
            }
            248..=250 => {
                let limits = script.limits(told);
                self.engine.limits = limits;
                self.driver.limits = limits;
                self.queue.set_limits(limits);
            }
            251..=252 => {
                let bits = script.u8();
                self.queue.enabled = bits & 3 != 0;
                if bits & 4 != 0 {
                    self.queue.set_call((bits & 8 != 0).then(|| self.call.try_clone().expect("a descriptor")));
                }
            }
            _ => {
                let found = self.queue.arm();
                assert!(!self.is_still || !found || self.queue.ring.has_pending());
                // Both only look.
                let _work = (self.queue.has_work(), self.queue.has_parked());
            }
        }
    }

    pub(super) fn take(&mut self) {
        self.begin(|queue, engine| _ = queue.take(engine));
    }

    /// Takes requests, or what the last back-end owed.
    pub(super) fn begin(&mut self, some: impl FnOnce(&mut Queue, &mut Recorder)) {
        let (taken, owed, used) = self.indices();
        some(&mut self.queue, &mut self.engine);
        let (taken_now, owed_now, used_now) = self.indices();
        self.begun += u64::from(taken_now.wrapping_sub(taken)) + (owed - owed_now) as u64;
        self.published += u64::from(used_now.wrapping_sub(used));
        // It may have been broken before: then nothing was taken.
        if taken_now != taken || owed_now != owed {
            match self.queue.broken {
                // Taken from the ring; but there is a request at that head, which is not begun again.
                Some(Broken::InFlight { .. }) => self.begun -= 1,
                Some(Broken::NoStatus { head, .. }) => self.lost.push(head),
                _ => {}
            }
        }
        self.check();
    }

    pub(super) fn indices(&self) -> (u16, usize, u16) {
        (self.queue.ring.taken(), self.queue.resubmit.len(), self.queue.ring.unpublished())
    }

    pub(super) fn answer(&mut self, at: usize, manner: Manner) {
        let (head, result) = self.engine.answer_one(at, manner);
        self.queue.answer(head, result);
        self.check();
    }

    pub(super) fn retry(&mut self) {
        let waiting = self.queue.waiting.clone();
        self.queue.retry(&mut self.engine);
        assert!(self.queue.waiting.is_empty(), "it was their last chance");
        let slots = &self.queue.slots;
        self.lost.extend(waiting.into_iter().filter(|head| slots[usize::from(*head)].token.is_none()));
        self.check();
    }

    /// Publishes, and reads what the driver would.
    pub(super) fn publish(&mut self) {
        let count = self.queue.batch.len();
        let before = self.queue.ring.unpublished();
        let answered: Vec<(u16, u32)> = self.queue.batch.iter().map(|it| (it.head, it.written)).collect();
        self.queue.publish();
        let after = self.queue.ring.unpublished();
        assert_eq!(usize::from(after.wrapping_sub(before)), count);
        self.published += count as u64;
        if self.is_still && count > 0 {
            assert_eq!(self.queue.ring.place.used_idx(), after);
            let used = self.driver.memory.user_window(self.driver.shape.addr().used, self.driver.layout.used_bytes());
            let used = used.expect("it lies in memory");
            for (at, (head, written)) in answered.into_iter().enumerate() {
                let slot = self.driver.layout.slot(before.wrapping_add(at as u16));
                let slot = self.driver.layout.used_slot(slot);
                assert_eq!((used.load_u32(slot, Relaxed), used.load_u32(slot + 4, Relaxed)), (head.into(), written));
            }
        }
        self.check();
    }

    /// The front-end changes the memory, or where the ring lies.
    pub(super) fn move_memory(&mut self, script: &mut Script<'_>) {
        let number = usize::from(script.u8()) % self.maps.len();
        let mut shape = self.driver.shape;
        if script.u8() & 3 == 3 {
            shape.parts = Shape::parts(script);
        }
        let memory = Arc::new(self.maps[number].clone());
        let Ok(place) = Place::find(&memory, shape.size, &shape.addr()) else { return };
        self.driver.shape = shape;
        learn(&mut self.engine, &memory, number);
        self.queue.move_to(memory, place);
        self.check();
    }

    /// What is true after every step.
    pub(super) fn check(&self) {
        let queue = &self.queue;
        let tokens = queue.slots.iter().filter(|slot| slot.token.is_some()).count();
        assert_eq!(usize::from(queue.in_flight), tokens);
        assert_eq!(
            tokens,
            queue.parked.len() + queue.waiting.len() + self.engine.pending.len() + queue.batch.len(),
            "every request in flight waits for memory, for the storage or to be published"
        );
        assert_eq!(self.begun, tokens as u64 + self.published + self.lost.len() as u64);
        let has_token = |head: u16| queue.slots[usize::from(head)].token.is_some();
        assert!(queue.parked.iter().chain(&queue.waiting).all(|head| has_token(*head)));
        assert!(queue.order.len() <= 2 * queue.slots.len(), "what is kept of requests has a bound");
        assert!(queue.batch.iter().all(|it| has_token(it.head)));
        assert!(self.engine.pending.iter().all(|it| has_token(it.tag.head)));
        if tokens == 0 {
            assert!(queue.is_at_rest());
        }
    }

    /// What the next back-end would find.
    pub(super) fn check_region(&self) {
        if self.queue.tracker.is_none() {
            return;
        }
        let size = self.driver.shape.size;
        let mut bytes = [0; REGION_BYTES];
        let bytes = &mut bytes[..ring_bytes(size) as usize];
        assert_eq!(rustix::io::pread(self.region_file, &mut *bytes, 0).expect("memory"), bytes.len());
        let found = read_split(bytes, size, self.queue.ring.unpublished()).expect("it was kept");
        assert!(found.repaired.is_empty(), "nothing is half done");
        let mut found = found.heads;
        found.sort_unstable();
        assert_eq!(found, self.owed(), "the region names what is owed, and nothing else");
    }

    /// Requests that were taken, by us or before us, and not completed.
    pub(super) fn owed(&self) -> Vec<u16> {
        let slots = (0..).zip(&self.queue.slots).filter(|(_, slot)| slot.token.is_some());
        let begun = slots.map(|(head, _)| head);
        let mut owed: Vec<u16> = begun.chain(self.lost.iter().chain(&self.queue.resubmit).copied()).collect();
        owed.sort_unstable();
        owed
    }
}

/// The in-flight region of a ring of that size, not a byte more: an offset beyond it is seen.
pub(super) fn window_of(region: &Arc<Mapping>, size: u16) -> Window {
    region.window(0, ring_bytes(size)).expect("the mapping is for the largest ring")
}
