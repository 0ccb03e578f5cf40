//! Everything that is shared: memory by object, descriptors of the broker, and stores that are on their way.
//!
//! A store of a backend or of the driver becomes visible when its thread gets to it, one at a time. While the broker reads,
//! others may go on: with torn looks switched on, stores become visible between two of its loads.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use warmswap_core::{GuestMemory, MemoryError, PRIVATE_SIZE, RingPlace};
use warmswap_wire::ring::{Descriptor, FLAGS, IDX, Layout, UsedElem};
use warmswap_wire::{FdSlot, LogRegion, MemoryRegion};

use crate::random::Random;

/// Something that descriptors stand for: memory, an eventfd, a socket.
pub(crate) type Obj = u32;

/// What an object is.
#[derive(Debug)]
pub(crate) enum Object {
    /// Bytes; what was never written takes no room and reads as zero.
    Bytes { bytes: RefCell<Vec<u8>>, size: u64, guest: bool },
    /// An eventfd, and whether it was written since it was last read.
    Event(Cell<bool>),
    /// A socket.
    Channel,
}

/// Something a thread does next.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    Store {
        obj: Obj,
        at: u64,
        len: u8,
        bytes: [u8; 16],
    },
    /// The driver looks whether the device wants a kick.
    Kick {
        ring: u16,
        old: u16,
        new: u16,
    },
    /// The device looks whether the driver wants an interrupt.
    Call {
        ring: u16,
        old: Option<u16>,
        new: u16,
    },
    /// A request goes to the disk.
    Submit(u32),
}

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Driver,
    Backend(u64),
}

/// A thread of the guest or of a backend.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) owner: Owner,
    pub(crate) queue: VecDeque<Effect>,
    /// It may make a step now.
    pub(crate) runs: bool,
    /// Its process dies before so many more stores are visible.
    pub(crate) dies_in: Option<u32>,
    /// It was proved that it writes no more.
    pub(crate) fenced: bool,
}

impl Thread {
    pub(crate) fn new(owner: Owner) -> Self {
        Thread { owner, queue: VecDeque::new(), runs: true, dies_in: None, fenced: false }
    }
}

/// One ring as the broker has it.
#[derive(Clone, Copy, Debug)]
struct Attached {
    layout: Layout,
    descriptor: (Obj, u64),
    available: (Obj, u64),
    used: (Obj, u64),
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Memory {
    objects: Vec<Object>,
    /// The broker's descriptors.
    slots: Vec<Option<Obj>>,
    pub(crate) open: usize,
    maps: Vec<(MemoryRegion, Obj)>,
    attached: Vec<Option<Attached>>,
    pub(crate) threads: RefCell<Vec<Thread>>,
    /// Backends that have died between two of the broker's loads.
    pub(crate) died: RefCell<Vec<u64>>,
    /// What should not have been written.
    pub(crate) wrong: RefCell<Option<(&'static str, String)>>,
    torn: bool,
    random: RefCell<Random>,
}

impl Memory {
    pub(crate) fn new(torn: bool, seed: u64) -> Self {
        Memory {
            objects: Vec::new(),
            slots: Vec::new(),
            open: 0,
            maps: Vec::new(),
            attached: vec![None; 4],
            threads: RefCell::new(Vec::new()),
            died: RefCell::new(Vec::new()),
            wrong: RefCell::new(None),
            torn,
            random: RefCell::new(Random::new(seed ^ 0x746f_726e)),
        }
    }

    // --- objects -----------------------------------------------------------------------------------------------------------

    pub(crate) fn make(&mut self, object: Object) -> Obj {
        self.objects.push(object);
        (self.objects.len() - 1) as Obj
    }

    pub(crate) fn make_bytes(&mut self, size: u64, guest: bool) -> Obj {
        let bytes = if guest { vec![0; size as usize] } else { Vec::new() };
        self.make(Object::Bytes { bytes: RefCell::new(bytes), size, guest })
    }

    pub(crate) fn make_event(&mut self) -> Obj {
        self.make(Object::Event(Cell::new(false)))
    }

    pub(crate) fn size(&self, obj: Obj) -> u64 {
        if let Some(Object::Bytes { size, .. }) = self.objects.get(obj as usize) { *size } else { 0 }
    }

    pub(crate) fn read(&self, obj: Obj, at: u64, into: &mut [u8]) -> bool {
        let Some(Object::Bytes { bytes, size, .. }) = self.objects.get(obj as usize) else { return false };
        let (at, end) = (at as usize, at as usize + into.len());
        if end as u64 > *size {
            return false;
        }
        let bytes = bytes.borrow();
        if end <= bytes.len() {
            into.copy_from_slice(&bytes[at..end]);
        } else {
            into.fill(0);
            let there = bytes.len().saturating_sub(at);
            into[..there].copy_from_slice(&bytes[at.min(bytes.len())..]);
        }
        true
    }

    pub(crate) fn read_u16(&self, obj: Obj, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(obj, at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, obj: Obj, at: u64, from: &[u8]) -> bool {
        let Some(Object::Bytes { bytes, size, .. }) = self.objects.get(obj as usize) else { return false };
        let (at, end) = (at as usize, at as usize + from.len());
        if end as u64 > *size {
            return false;
        }
        let mut bytes = bytes.borrow_mut();
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        bytes[at..end].copy_from_slice(from);
        true
    }

    pub(crate) fn is_guest(&self, obj: Obj) -> bool {
        matches!(self.objects.get(obj as usize), Some(Object::Bytes { guest: true, .. }))
    }

    pub(crate) fn event(&self, obj: Obj) -> Option<&Cell<bool>> {
        if let Some(Object::Event(written)) = self.objects.get(obj as usize) { Some(written) } else { None }
    }

    /// Reads an eventfd.
    pub(crate) fn take_event(&self, obj: Obj) -> bool {
        self.event(obj).is_some_and(|written| written.replace(false))
    }

    // --- descriptors of the broker -----------------------------------------------------------------------------------------

    pub(crate) fn insert(&mut self, obj: Obj) -> FdSlot {
        self.slots.push(Some(obj));
        self.open += 1;
        FdSlot(self.slots.len() as u32 - 1)
    }

    pub(crate) fn get(&self, fd: FdSlot) -> Option<Obj> {
        self.slots.get(fd.0 as usize).copied().flatten()
    }

    pub(crate) fn close(&mut self, fd: FdSlot) {
        match self.slots.get_mut(fd.0 as usize).map(Option::take) {
            Some(Some(_)) => self.open -= 1,
            _ => self.report("descriptors", || format!("slot {} is closed although it is not open", fd.0)),
        }
    }

    pub(crate) fn open_slots(&self) -> Vec<(u32, String)> {
        let named = |obj: Obj| match &self.objects[obj as usize] {
            Object::Bytes { guest: true, .. } => "guest memory",
            Object::Bytes { .. } => "memory",
            Object::Event(_) => "an eventfd",
            Object::Channel => "a channel",
        };
        (0..)
            .zip(&self.slots)
            .filter_map(|(slot, obj)| Some((slot, format!("{} ({})", named((*obj)?), (*obj)?))))
            .collect()
    }

    /// Nothing is mapped: another process begins.
    pub(crate) fn forget_maps(&mut self) {
        self.maps.clear();
        self.attached.fill(None);
    }

    pub(crate) fn report(&self, check: &'static str, detail: impl FnOnce() -> String) {
        let mut wrong = self.wrong.borrow_mut();
        if wrong.is_none() {
            *wrong = Some((check, detail()));
        }
    }

    // --- threads -----------------------------------------------------------------------------------------------------------

    /// Makes the next store of a thread visible, if a store is what comes next. Its process may die instead.
    pub(crate) fn store_next(&self, thread: usize) -> bool {
        let mut threads = self.threads.borrow_mut();
        let it = &mut threads[thread];
        let Some(Effect::Store { obj, at, len, bytes }) = it.queue.front().cloned() else { return false };
        if let Some(left) = it.dies_in {
            if left == 0 {
                it.dies_in = None;
                it.runs = false;
                it.queue.clear();
                if let Owner::Backend(id) = it.owner {
                    self.died.borrow_mut().push(id);
                }
                return false;
            }
            it.dies_in = Some(left - 1);
        }
        it.queue.pop_front();
        if it.fenced && self.is_guest(obj) {
            self.report("a fenced backend writes", || format!("{:?} stores to guest memory at {at:#x}", it.owner));
        }
        if !self.write(obj, at, &bytes[..usize::from(len)]) {
            self.report("simulation", || format!("{:?} stores beyond object {obj} at {at:#x}", it.owner));
        }
        true
    }

    /// Others go on between two loads of the broker.
    fn between_loads(&self) {
        if !self.torn {
            return;
        }
        let mut random = self.random.borrow_mut();
        if !random.one_in(8) {
            return;
        }
        let count = self.threads.borrow().len();
        if count == 0 {
            return;
        }
        let thread = random.below(count as u64) as usize;
        if self.threads.borrow()[thread].runs {
            for _ in 0..random.between(1, 4) {
                if !self.store_next(thread) {
                    break;
                }
            }
        }
    }

    // --- the broker's rings ------------------------------------------------------------------------------------------------

    fn user(&self, addr: u64, length: u64) -> Option<(Obj, u64)> {
        self.maps
            .iter()
            .find_map(|(region, obj)| Some((*obj, region.mmap_offset + region.offset_of_user(addr, length)?)))
    }

    fn guest(&self, addr: u64, length: u64) -> Option<(Obj, u64)> {
        let place = |(region, obj): &(MemoryRegion, Obj)| {
            Some((*obj, region.mmap_offset + region.offset_of_guest(addr, length)?))
        };
        self.maps.iter().find_map(place)
    }

    fn ring(&self, ring: u32) -> Option<Attached> {
        self.attached.get(ring as usize).copied().flatten()
    }

    fn load_u16(&self, ring: u32, part: impl FnOnce(&Attached) -> ((Obj, u64), u64)) -> u16 {
        self.between_loads();
        let Some(attached) = self.ring(ring) else { return 0 };
        let ((obj, base), at) = part(&attached);
        self.read_u16(obj, base + at)
    }

    fn store(&self, ring: u32, bytes: &[u8], part: impl FnOnce(&Attached) -> ((Obj, u64), u64)) {
        if let Some(attached) = self.ring(ring) {
            let ((obj, base), at) = part(&attached);
            self.write(obj, base + at, bytes);
        }
    }
}

impl GuestMemory for Memory {
    fn map(&mut self, region: &MemoryRegion, fd: FdSlot) -> Result<(), MemoryError> {
        let fail = |reason: &str| {
            Err(MemoryError::Map { guest_addr: region.guest_addr, size: region.size, reason: reason.to_owned() })
        };
        let Some(obj) = self.get(fd) else { return fail("the descriptor is closed") };
        if region.mmap_offset + region.size > self.size(obj) {
            return fail("the descriptor is too short");
        }
        let overlaps = |(known, _): &(MemoryRegion, Obj)| {
            known.guest_addr < region.guest_addr + region.size && region.guest_addr < known.guest_addr + known.size
        };
        if self.maps.iter().any(overlaps) {
            return fail("it overlaps another region");
        }
        self.maps.push((*region, obj));
        Ok(())
    }

    fn unmap(&mut self, guest_addr: u64) {
        self.maps.retain(|(region, _)| region.guest_addr != guest_addr);
    }

    fn set_log(&mut self, _log: Option<(LogRegion, FdSlot)>) -> Result<(), MemoryError> {
        Ok(())
    }

    fn attach(&mut self, ring: u32, place: &RingPlace) -> Result<(), MemoryError> {
        let part = |part: &'static str, addr: u64, length: u64| {
            self.user(addr, length).ok_or(MemoryError::Ring { ring, part, addr })
        };
        let attached = Attached {
            layout: place.layout,
            descriptor: part("descriptor table", place.descriptor, place.layout.descriptor_bytes())?,
            available: part("available ring", place.available, place.layout.available_bytes())?,
            used: part("used ring", place.used, place.layout.used_bytes())?,
        };
        self.attached[ring as usize] = Some(attached);
        Ok(())
    }

    fn detach(&mut self, ring: u32) {
        self.attached[ring as usize] = None;
    }

    fn faulted(&mut self) -> bool {
        false
    }

    fn avail_idx(&self, ring: u32) -> u16 {
        self.load_u16(ring, |it| (it.available, IDX))
    }

    fn used_idx(&self, ring: u32) -> u16 {
        self.load_u16(ring, |it| (it.used, IDX))
    }

    fn avail_slot(&self, ring: u32, slot: u16) -> u16 {
        self.load_u16(ring, |it| (it.available, it.layout.available_slot(slot)))
    }

    fn used_slot(&self, ring: u32, slot: u16) -> UsedElem {
        self.between_loads();
        let Some(attached) = self.ring(ring) else { return UsedElem { id: 0, len: 0 } };
        let mut bytes = [0; 8];
        self.read(attached.used.0, attached.used.1 + attached.layout.used_slot(slot), &mut bytes);
        let [i0, i1, i2, i3, l0, l1, l2, l3] = bytes;
        UsedElem { id: u32::from_le_bytes([i0, i1, i2, i3]), len: u32::from_le_bytes([l0, l1, l2, l3]) }
    }

    fn used_flags(&self, ring: u32) -> u16 {
        self.load_u16(ring, |it| (it.used, FLAGS))
    }

    fn avail_event(&self, ring: u32) -> u16 {
        self.load_u16(ring, |it| (it.used, it.layout.avail_event()))
    }

    fn descriptor(&self, ring: u32, index: u16) -> Descriptor {
        let mut bytes = [0; 16];
        if let Some(attached) = self.ring(ring) {
            self.read(attached.descriptor.0, attached.descriptor.1 + 16 * u64::from(index), &mut bytes);
        }
        Descriptor::from_le_bytes(bytes)
    }

    fn read_guest(&self, guest_addr: u64, bytes: &mut [u8]) -> bool {
        self.guest(guest_addr, bytes.len() as u64).is_some_and(|(obj, at)| self.read(obj, at, bytes))
    }

    fn set_avail_slot(&mut self, ring: u32, slot: u16, head: u16) {
        self.store(ring, &head.to_le_bytes(), |it| (it.available, it.layout.available_slot(slot)));
    }

    fn set_used_flags(&mut self, ring: u32, flags: u16) {
        self.store(ring, &flags.to_le_bytes(), |it| (it.used, FLAGS));
    }

    fn set_avail_event(&mut self, ring: u32, index: u16) {
        self.store(ring, &index.to_le_bytes(), |it| (it.used, it.layout.avail_event()));
    }

    fn push_used(&mut self, ring: u32, index: u16, entry: UsedElem) {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&entry.id.to_le_bytes());
        bytes[4..].copy_from_slice(&entry.len.to_le_bytes());
        self.store(ring, &bytes, |it| (it.used, it.layout.used_slot(it.layout.slot(index))));
        self.store(ring, &index.wrapping_add(1).to_le_bytes(), |it| (it.used, IDX));
    }

    fn read_region(&self, fd: FdSlot, offset: u64, length: u64) -> Option<Vec<u8>> {
        let obj = self.get(fd)?;
        let mut bytes = vec![0; usize::try_from(length).ok().filter(|it| *it as u64 <= self.size(obj))?];
        self.read(obj, offset, &mut bytes).then_some(bytes)
    }

    fn make_private(&mut self) -> Result<FdSlot, MemoryError> {
        let obj = self.make_bytes(PRIVATE_SIZE, false);
        Ok(self.insert(obj))
    }

    fn write_private(&mut self, memory: FdSlot, offset: u64, bytes: &[u8]) -> bool {
        self.get(memory).is_some_and(|obj| self.write(obj, offset, bytes))
    }

    fn write_guest(&mut self, guest_addr: u64, bytes: &[u8]) -> bool {
        self.guest(guest_addr, bytes.len() as u64).is_some_and(|(obj, at)| self.write(obj, at, bytes))
    }
}
