//! Guest memory made of plain bytes, for tests of this crate.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use warmswap_wire::ring::{Descriptor, Layout, UsedElem};
use warmswap_wire::{FdSlot, LogRegion, MemoryRegion};

use crate::memory::{GuestMemory, MemoryError, PRIVATE_SIZE, RingPlace};

/// Slots of memory of the broker's own lie above this number.
pub(crate) const PRIVATE_SLOTS: u32 = 100_000;

/// An in-flight region: its keeper goes on writing to it.
pub(crate) type RegionBytes = Rc<RefCell<Vec<u8>>>;

/// One ring's three parts.
#[derive(Clone, Debug)]
pub(crate) struct PlainRing {
    pub(crate) layout: Layout,
    pub(crate) avail_idx: u16,
    pub(crate) used_idx: u16,
    pub(crate) avail: Vec<u16>,
    pub(crate) used: Vec<u32>,
    pub(crate) used_flags: u16,
    pub(crate) avail_event: u16,
}

impl PlainRing {
    pub(crate) fn new(size: u16, start: u16) -> Self {
        PlainRing {
            layout: Layout::new(size).expect("a power of two"),
            avail_idx: start,
            used_idx: start,
            avail: vec![0; usize::from(size)],
            used: vec![0; usize::from(size)],
            used_flags: 0,
            avail_event: start,
        }
    }

    /// The driver submits a head.
    pub(crate) fn submit(&mut self, head: u16) {
        let slot = self.layout.slot(self.avail_idx);
        self.avail[usize::from(slot)] = head;
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// The device completes a head.
    pub(crate) fn complete(&mut self, head: u16) {
        let slot = self.layout.slot(self.used_idx);
        self.used[usize::from(slot)] = u32::from(head);
        self.used_idx = self.used_idx.wrapping_add(1);
    }
}

/// Guest memory of one device. Reads can be made to move the world on, as a live ring does.
#[derive(Default)]
pub(crate) struct PlainMemory {
    pub(crate) rings: HashMap<u32, PlainRing>,
    pub(crate) regions: Vec<MemoryRegion>,
    /// Rings that were forgotten: they read as zero.
    pub(crate) detached: HashSet<u32>,
    /// Memory of the broker's own by descriptor.
    pub(crate) private: HashMap<FdSlot, Vec<u8>>,
    pub(crate) privates: u32,
    pub(crate) faulted: bool,
    /// In-flight regions by descriptor.
    pub(crate) in_flight: HashMap<FdSlot, RegionBytes>,
    pub(crate) written: Vec<u64>,
    /// Called before each read.
    pub(crate) on_read: Option<RefCell<Hook>>,
    /// Rings as changed by the hook.
    pub(crate) live: RefCell<HashMap<u32, PlainRing>>,
}

/// Moves a ring on.
pub(crate) type Hook = Box<dyn FnMut(&mut PlainRing)>;

impl PlainMemory {
    pub(crate) fn ring(&mut self, ring: u32) -> &mut PlainRing {
        self.rings.get_mut(&ring).expect("the test has made this ring")
    }

    fn read<T>(&self, ring: u32, get: impl FnOnce(&PlainRing) -> T, none: T) -> T {
        if let Some(hook) = &self.on_read {
            let mut live = self.live.borrow_mut();
            if let Some(ring) = live.get_mut(&ring) {
                (hook.borrow_mut())(ring);
                return get(ring);
            }
        }
        self.rings.get(&ring).filter(|_| !self.detached.contains(&ring)).map_or(none, get)
    }

    fn write(&mut self, ring: u32, set: impl FnOnce(&mut PlainRing)) {
        if !self.detached.contains(&ring) {
            set(self.ring(ring));
        }
    }
}

impl GuestMemory for PlainMemory {
    fn map(&mut self, region: &MemoryRegion, _fd: FdSlot) -> Result<(), MemoryError> {
        let overlaps = |known: &MemoryRegion| {
            known.guest_addr < region.guest_addr + region.size && region.guest_addr < known.guest_addr + known.size
        };
        if self.regions.iter().any(overlaps) {
            let reason = "it overlaps another region".to_owned();
            return Err(MemoryError::Map { guest_addr: region.guest_addr, size: region.size, reason });
        }
        self.regions.push(*region);
        Ok(())
    }
    fn unmap(&mut self, guest_addr: u64) {
        self.regions.retain(|region| region.guest_addr != guest_addr);
    }
    fn set_log(&mut self, _log: Option<(LogRegion, FdSlot)>) -> Result<(), MemoryError> {
        Ok(())
    }
    fn attach(&mut self, ring: u32, place: &RingPlace) -> Result<(), MemoryError> {
        let inside = self.regions.iter().any(|region| region.offset_of_user(place.available, 1).is_some());
        if !inside {
            return Err(MemoryError::Ring { ring, part: "available ring", addr: place.available });
        }
        let plain = self.rings.entry(ring).or_insert_with(|| PlainRing::new(place.layout.size(), 0));
        if plain.layout != place.layout {
            plain.layout = place.layout;
            plain.avail.resize(usize::from(place.layout.size()), 0);
            plain.used.resize(usize::from(place.layout.size()), 0);
        }
        self.detached.remove(&ring);
        Ok(())
    }
    fn detach(&mut self, ring: u32) {
        self.detached.insert(ring);
    }
    fn faulted(&mut self) -> bool {
        std::mem::take(&mut self.faulted)
    }
    fn avail_idx(&self, ring: u32) -> u16 {
        self.read(ring, |it| it.avail_idx, 0)
    }
    fn used_idx(&self, ring: u32) -> u16 {
        self.read(ring, |it| it.used_idx, 0)
    }
    fn avail_slot(&self, ring: u32, slot: u16) -> u16 {
        self.read(ring, |it| it.avail[usize::from(slot)], 0)
    }
    fn used_slot(&self, ring: u32, slot: u16) -> UsedElem {
        UsedElem { id: self.read(ring, |it| it.used[usize::from(slot)], 0), len: 0 }
    }
    fn used_flags(&self, ring: u32) -> u16 {
        self.read(ring, |it| it.used_flags, 0)
    }
    fn avail_event(&self, ring: u32) -> u16 {
        self.read(ring, |it| it.avail_event, 0)
    }
    fn descriptor(&self, _ring: u32, _index: u16) -> Descriptor {
        Descriptor { addr: 0x1000, len: 1, flags: warmswap_wire::ring::DESC_F_WRITE, next: 0 }
    }
    fn read_guest(&self, _guest_addr: u64, _bytes: &mut [u8]) -> bool {
        true
    }
    fn set_avail_slot(&mut self, ring: u32, slot: u16, head: u16) {
        self.write(ring, |it| it.avail[usize::from(slot)] = head);
    }
    fn set_used_flags(&mut self, ring: u32, flags: u16) {
        self.write(ring, |it| it.used_flags = flags);
    }
    fn set_avail_event(&mut self, ring: u32, index: u16) {
        self.write(ring, |it| it.avail_event = index);
    }
    fn push_used(&mut self, ring: u32, index: u16, entry: UsedElem) {
        self.write(ring, |it| {
            let slot = it.layout.slot(index);
            it.used[usize::from(slot)] = entry.id;
            it.used_idx = index.wrapping_add(1);
        });
    }
    fn read_region(&self, fd: FdSlot, offset: u64, length: u64) -> Option<Vec<u8>> {
        let range = usize::try_from(offset).ok()?..usize::try_from(offset.checked_add(length)?).ok()?;
        match self.in_flight.get(&fd) {
            Some(region) => region.borrow().get(range).map(<[u8]>::to_vec),
            None => self.private.get(&fd)?.get(range).map(<[u8]>::to_vec),
        }
    }
    fn make_private(&mut self) -> Result<FdSlot, MemoryError> {
        self.privates += 1;
        let slot = FdSlot(PRIVATE_SLOTS + self.privates);
        self.private.insert(slot, vec![0; PRIVATE_SIZE as usize]);
        Ok(slot)
    }
    fn write_private(&mut self, memory: FdSlot, offset: u64, bytes: &[u8]) -> bool {
        let write = |memory: &mut Vec<u8>| {
            let place = memory.get_mut(offset as usize..).and_then(|it| it.get_mut(..bytes.len()));
            place.map(|place| place.copy_from_slice(bytes)).is_some()
        };
        match self.in_flight.get(&memory) {
            Some(region) => write(&mut region.borrow_mut()),
            None => self.private.get_mut(&memory).is_some_and(write),
        }
    }
    fn write_guest(&mut self, guest_addr: u64, _bytes: &[u8]) -> bool {
        self.written.push(guest_addr);
        true
    }
}

/// A small generator (xorshift64*), so that a seed means the same for ever.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}
