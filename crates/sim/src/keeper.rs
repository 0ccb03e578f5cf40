//! How backends keep their in-flight region: by `wire`'s own [`Tracker`], or wrongly in a way that is known in public.
//!
//! Whatever the keeper stores goes through a log, so that each store becomes visible by itself, in its order.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use warmswap_wire::inflight::{ENTRY_BYTES, HEADER_BYTES, RegionMemory, Start, Tracker};

use crate::memory::{Effect, Memory, Obj};
use crate::options::Keeping;

/// Stores in their order.
pub(crate) type Log = Rc<RefCell<VecDeque<Effect>>>;

/// One ring's part of a region, as its keeper sees it.
#[derive(Debug)]
pub(crate) struct Part {
    obj: Obj,
    at: u64,
    bytes: Vec<u8>,
    log: Log,
    /// Marks are not cleared.
    never_cleared: bool,
    no_order: bool,
}

impl Part {
    fn store(&mut self, at: u64, value: &[u8]) {
        let mut bytes = [0; 16];
        bytes[..value.len()].copy_from_slice(value);
        self.bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
        let effect = Effect::Store { obj: self.obj, at: self.at + at, len: value.len() as u8, bytes };
        self.log.borrow_mut().push_back(effect);
    }
}

impl RegionMemory for Part {
    fn read(&self, at: u64, into: &mut [u8]) {
        into.copy_from_slice(&self.bytes[at as usize..at as usize + into.len()]);
    }
    fn store_u8(&mut self, at: u64, value: u8) {
        if self.never_cleared && value == 0 {
            return;
        }
        self.store(at, &[value]);
    }
    fn store_u16(&mut self, at: u64, value: u16) {
        self.store(at, &value.to_ne_bytes());
    }
    fn store_u64(&mut self, at: u64, value: u64) {
        let value = if self.no_order { 1 } else { value };
        self.store(at, &value.to_ne_bytes());
    }
}

/// A backend's account of one ring.
#[derive(Debug)]
pub(crate) struct Keeper {
    tracker: Tracker<Part>,
    log: Log,
    early: bool,
    obj: Obj,
    at: u64,
}

impl Keeper {
    /// Begins with a ring whose part of the region lies at `at`.
    pub(crate) fn start(
        keeping: Keeping,
        (obj, at): (Obj, u64),
        size: u16,
        used: u16,
        base: u16,
        memory: &Memory,
    ) -> Result<(Keeper, Start, VecDeque<Effect>), String> {
        let log = Log::default();
        let mut bytes = vec![0; (HEADER_BYTES + ENTRY_BYTES * u64::from(size)) as usize];
        if !memory.read(obj, at, &mut bytes) {
            return Err("the in-flight region has no room for the ring".to_owned());
        }
        let part = Part {
            obj,
            at,
            bytes,
            log: Rc::clone(&log),
            never_cleared: keeping == Keeping::NeverCleared,
            no_order: keeping == Keeping::NoOrder,
        };
        let (tracker, start) = Tracker::start(part, size, used, base).map_err(|error| error.to_string())?;
        let mut effects = log.take();
        if keeping == Keeping::StartsAtZero && !start.recovered {
            for effect in &mut effects {
                if let Effect::Store { at: place, bytes, len: 2, .. } = effect
                    && *place == at + 14
                {
                    *bytes = [0; 16];
                }
            }
        }
        let early = keeping == Keeping::ClearedEarly;
        Ok((Keeper { tracker, log, early, obj, at }, start, effects))
    }

    /// A request is taken.
    pub(crate) fn taken(&mut self, head: u16) -> VecDeque<Effect> {
        self.tracker.taken(head);
        self.log.take()
    }

    /// A batch is completed, up to `used`.
    pub(crate) fn complete(&mut self, batch: &[u16], used: u16, publish: Effect) -> VecDeque<Effect> {
        if self.early {
            for head in batch {
                let at = self.at + HEADER_BYTES + ENTRY_BYTES * u64::from(*head);
                let effect = Effect::Store { obj: self.obj, at, len: 1, bytes: [0; 16] };
                self.log.borrow_mut().push_back(effect);
            }
        }
        let log = Rc::clone(&self.log);
        self.tracker.complete(batch, used, |_| log.borrow_mut().push_back(publish));
        self.log.take()
    }
}
