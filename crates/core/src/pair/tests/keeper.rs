//! Models of backends that keep an in-flight region, as one of ours does: every store of [`Tracker`], in its order.
//!
//! Whatever a script says: a region is all zero when it is set, it is not set under a read or a ring, a ring is given only to a backend
//! that has the guest's region, with room for it, and a canary's reads are kept in the canary's own.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use warmswap_wire::inflight::{RegionMemory, Tracker, ring_bytes};
use warmswap_wire::{FdSlot, InflightDescription, ProtocolFeatures, Request, VringFd, VringState};

use super::harness::{Driver, Harness, later};
use crate::canary;
use crate::testing::RegionBytes;

/// The region that is in force at one backend.
#[derive(Clone)]
pub(super) struct InForce {
    description: InflightDescription,
    bytes: RegionBytes,
}

impl InForce {
    /// Where the part of a ring begins, as backends and the broker reckon it.
    fn part(&self, ring: u32) -> usize {
        let stride = self.description.mmap_size / u64::from(self.description.num_queues);
        (self.description.mmap_offset + stride * u64::from(ring)) as usize
    }

    fn is_the_canarys(&self) -> bool {
        self.description.queue_size == canary::RING_SIZE
    }

    fn is_fresh(&self) -> bool {
        self.bytes.borrow().iter().all(|byte| *byte == 0)
    }
}

/// One ring's part, until its keeper dies.
pub(super) struct Part {
    bytes: RegionBytes,
    at: usize,
    dead: Rc<Cell<bool>>,
}

impl Part {
    fn store(&mut self, at: u64, value: &[u8]) {
        if !self.dead.get() {
            self.bytes.borrow_mut()[self.at + at as usize..][..value.len()].copy_from_slice(value);
        }
    }
}

impl RegionMemory for Part {
    fn read(&self, at: u64, into: &mut [u8]) {
        into.copy_from_slice(&self.bytes.borrow()[self.at + at as usize..][..into.len()]);
    }
    fn store_u8(&mut self, at: u64, value: u8) {
        self.store(at, &[value]);
    }
    fn store_u16(&mut self, at: u64, value: u16) {
        self.store(at, &value.to_ne_bytes());
    }
    fn store_u64(&mut self, at: u64, value: u64) {
        self.store(at, &value.to_ne_bytes());
    }
}

/// A backend's account of one ring.
pub(super) struct Kept {
    tracker: Tracker<Part>,
    taken: BTreeSet<u16>,
    dead: Rc<Cell<bool>>,
}

impl Kept {
    /// Begins with a ring; a region that does not describe it is refused, as by a backend.
    fn start(region: &InForce, ring: u32, size: u16, used: u16) -> Result<Kept, String> {
        let dead = Rc::new(Cell::new(false));
        let part = Part { bytes: Rc::clone(&region.bytes), at: region.part(ring), dead: Rc::clone(&dead) };
        let (tracker, start) = Tracker::start(part, size, used, used).map_err(|error| error.to_string())?;
        if !start.resubmit.is_empty() {
            return Err(format!("it marks {:?} although nothing was taken", start.resubmit));
        }
        Ok(Kept { tracker, taken: BTreeSet::new(), dead })
    }
}

/// Every region that is kept.
#[derive(Default)]
pub(super) struct Keepers {
    in_force: BTreeMap<u64, InForce>,
    kept: BTreeMap<(u64, u32), Kept>,
}

impl Harness {
    /// A backend has made the region it was asked for: all zero, as the specification has it.
    pub(super) fn make_region(&mut self, id: u64, description: &InflightDescription) -> FdSlot {
        let name = if description.queue_size == canary::RING_SIZE { "canary-region" } else { "region" };
        let slot = self.fresh_slot(&format!("#{id}.{name}"));
        let bytes = vec![0; (description.mmap_offset + description.mmap_size) as usize];
        self.memory.in_flight.insert(slot, Rc::new(RefCell::new(bytes)));
        slot
    }

    /// What a message means for regions.
    pub(super) fn note_regions(&mut self, id: u64, request: &Request) {
        let Some(backend) = self.backends.get(&id) else { return };
        if backend.acked & ProtocolFeatures::INFLIGHT_SHMFD.bits() == 0 {
            return;
        }
        let reading = backend.reading;
        match request {
            Request::SetInflightFd { region, fd } => {
                let what = region.num_queues > 0 && region.queue_size > 0;
                assert!(what, "#{id} is given a region for no ring\n{}", self.shown());
                let bytes = Rc::clone(&self.memory.in_flight[fd]);
                let region = InForce { description: *region, bytes };
                assert!(!reading, "#{id} is given another region in the middle of a canary read\n{}", self.shown());
                let serves = self.kept.kept.keys().any(|(keeper, _)| *keeper == id);
                assert!(!serves, "#{id} is given another region while it serves\n{}", self.shown());
                assert!(region.is_fresh(), "#{id} is given a region that is not fresh\n{}", self.shown());
                self.kept.in_force.insert(id, region);
            }
            Request::SetVringEnable(VringState { value: 1, .. }) if reading => self.reads_with_region(id),
            Request::SetVringKick(VringFd { index, fd: Some(_) }) if !reading => self.begins_with_ring(id, *index),
            _ => {}
        }
    }

    /// A canary read leaves its traces in the region that is in force.
    fn reads_with_region(&mut self, id: u64) {
        let region = self.kept.in_force.get(&id).unwrap_or_else(|| panic!("#{id} reads without a region"));
        assert!(region.is_the_canarys(), "#{id} reads with the guest's region\n{}", self.shown());
        let mut kept = Kept::start(region, 0, canary::RING_SIZE, 0)
            .unwrap_or_else(|why| panic!("#{id} cannot read: {why}\n{}", self.shown()));
        kept.tracker.taken(3);
        kept.tracker.taken(0);
        kept.tracker.complete(&[3], 1, |_| {});
    }

    fn begins_with_ring(&mut self, id: u64, index: u32) {
        if self.anything_goes || self.kept.kept.contains_key(&(id, index)) {
            return;
        }
        let region = self.kept.in_force.get(&id);
        let region = region.unwrap_or_else(|| panic!("#{id} is given ring {index} without a region\n{}", self.shown()));
        assert!(!region.is_the_canarys(), "#{id} is given ring {index} with the canary's region\n{}", self.shown());
        let size = self.memory.rings[&index].layout.size();
        let end = region.part(index) + ring_bytes(size) as usize;
        assert!(end <= region.bytes.borrow().len(), "#{id} has no room for ring {index}\n{}", self.shown());
        let kept = Kept::start(region, index, size, self.memory.rings[&index].used_idx)
            .unwrap_or_else(|why| panic!("#{id} cannot begin with ring {index}: {why}\n{}", self.shown()));
        self.kept.kept.insert((id, index), kept);
    }

    /// A ring is stopped, with nothing taken and not completed.
    pub(super) fn keeper_stopped(&mut self, id: u64, ring: u32) {
        self.kept.kept.remove(&(id, ring));
    }

    /// A backend is proved harmless: nothing of its region changes any more.
    pub(super) fn keeper_ended(&mut self, id: u64) {
        self.kept.in_force.remove(&id);
        self.kept.kept.retain(|(keeper, _), _| *keeper != id);
    }

    /// The holder has taken these heads, and whatever lies before them in the available ring.
    pub(super) fn take(&mut self, ring: u32, heads: &[u16]) {
        let Some(holder) = self.holder(ring) else { return };
        let Some(driver) = self.drivers.get_mut(&ring) else { return };
        let kept = self.kept.kept.get_mut(&(holder, ring));
        let Some(last) = heads.iter().filter_map(|head| driver.positions.get(head)).copied().reduce(later) else {
            return;
        };
        driver.popped = later(driver.popped, last.wrapping_add(1));
        let Some(kept) = kept else { return };
        for head in not_after(driver, last) {
            if kept.taken.insert(head) {
                kept.tracker.taken(head);
            }
        }
    }

    /// The device completes these heads as one batch. With `dies` its backend goes no further than the publication: what the region
    /// says of that batch stays as it was.
    pub(super) fn complete_batch(&mut self, ring: u32, heads: &[u16], dies: bool) {
        self.take(ring, heads);
        let holder = self.holder(ring);
        let plain = self.memory.ring(ring);
        let used = plain.used_idx.wrapping_add(heads.len() as u16);
        let mut publish = || heads.iter().for_each(|head| plain.complete(*head));
        match holder.and_then(|id| self.kept.kept.get_mut(&(id, ring))) {
            Some(kept) if heads.iter().all(|head| kept.taken.contains(head)) => {
                let dead = Rc::clone(&kept.dead);
                kept.tracker.complete(heads, used, |_| {
                    publish();
                    dead.set(dies);
                });
                kept.taken.retain(|head| !heads.contains(head));
            }
            _ => publish(),
        }
    }

    /// Damages what a backend's region says of a ring.
    pub(super) fn spoil(&mut self, id: u64, ring: u32, what: &str, values: &[u32]) {
        let region = self.kept.in_force.get(&id).expect("the backend has a region").clone();
        let part = region.part(ring);
        let mut bytes = region.bytes.borrow_mut();
        let mut store = |at: usize, value: &[u8]| bytes[part + at..][..value.len()].copy_from_slice(value);
        match what {
            "version" => store(8, &(values[0] as u16).to_ne_bytes()),
            "size" => store(10, &(values[0] as u16).to_ne_bytes()),
            "used" => store(14, &(values[0] as u16).to_ne_bytes()),
            "marks" => {
                let entry = 16 + 16 * values[0] as usize;
                store(entry, &[1]);
                store(entry + 8, &u64::from(values[1]).to_ne_bytes());
            }
            "gone" => bytes.clear(),
            other => panic!("a region cannot be spoilt that way: {other}"),
        }
    }
}

/// Heads that stand at this position or before it, oldest first.
fn not_after(driver: &Driver, last: u16) -> Vec<u16> {
    let behind = |at: u16| last.wrapping_sub(at);
    let mut heads: Vec<(u16, u16)> = driver.positions.iter().map(|(head, at)| (behind(*at), *head)).collect();
    heads.retain(|(behind, _)| *behind < 1 << 15);
    heads.sort_unstable_by(|left, right| right.cmp(left));
    heads.into_iter().map(|(_, head)| head).collect()
}
