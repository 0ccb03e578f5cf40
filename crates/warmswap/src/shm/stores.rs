//! Stores into guest memory that must be written down before they are made.
//!
//! A step may make a ring say what it owes and let go of it: the VMM has its stop answered, or has gone. So what waits keeps the memory
//! that it is for, and says where that is, for the next broker, which does not have it mapped any more.

use serde::{Deserialize, Serialize};
use warmswap_core::{GuestMemory, RingPlace};
use warmswap_wire::ring::UsedElem;
use warmswap_wire::{FdSlot, LogRegion, MemoryRegion};

use super::{MemoryAccess, SharedMemory};
use crate::fds::FdTable;

/// A store into guest memory, or into memory of the broker's own, that is the same when it is made twice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Store {
    AvailSlot { ring: u32, slot: u16, head: u16 },
    UsedFlags { ring: u32, flags: u16 },
    AvailEvent { ring: u32, index: u16 },
    PushUsed { ring: u32, index: u16, id: u32, len: u32 },
    Private { memory: u32, offset: u64, bytes: Vec<u8> },
    Guest { guest_addr: u64, bytes: Vec<u8> },
}

/// Where memory lay that a step has let go of. Descriptors are slots.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Ground {
    regions: Vec<(MemoryRegion, u32)>,
    rings: Vec<(u32, RingPlace)>,
    log: Option<(LogRegion, u32)>,
}

/// Stores into the same memory, in their order.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Batch {
    stores: Vec<Store>,
    /// The memory they are for, where it is not the one that is mapped at the end of the step.
    ground: Option<Ground>,
    #[serde(skip)]
    memory: Option<SharedMemory>,
}

/// Stores of one step, in their order.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    left: Vec<Batch>,
    stores: Vec<Store>,
}

impl Waiting {
    /// All of them, to be written down and made.
    pub(crate) fn take(&mut self) -> Vec<Batch> {
        let mut batches = std::mem::take(&mut self.left);
        if !self.stores.is_empty() {
            batches.push(Batch { stores: std::mem::take(&mut self.stores), ..Batch::default() });
        }
        batches
    }

    pub(super) fn push(&mut self, store: Store) {
        self.stores.push(store);
    }

    /// What the last store says of something.
    fn says<T>(&self, says: impl Fn(&Store) -> Option<T>) -> Option<T> {
        let left = self.left.iter().flat_map(|batch| &batch.stores);
        left.chain(&self.stores).rev().find_map(says)
    }
}

impl SharedMemory {
    fn ground(&self) -> Ground {
        let rings = (0_u32..).zip(&self.view.rings);
        Ground {
            regions: self.view.regions.iter().map(|region| (region.described, region.fd.0)).collect(),
            rings: rings.filter_map(|(ring, parts)| Some((ring, parts.as_ref()?.place))).collect(),
            log: self.log.as_ref().map(|log| (log.described, log.fd.0)),
        }
    }

    /// Maps what a predecessor had mapped.
    fn on(ground: &Ground, fds: &mut FdTable) -> Result<Self, String> {
        let mut memory = SharedMemory::default();
        let mut access = MemoryAccess { memory: &mut memory, fds, waiting: None };
        let Ground { regions, rings, log } = ground;
        let mapped = regions.iter().try_for_each(|(region, fd)| access.map(region, FdSlot(*fd)));
        let attached = mapped.and_then(|()| rings.iter().try_for_each(|(ring, place)| access.attach(*ring, place)));
        let logged = attached.and_then(|()| access.set_log(log.map(|(region, fd)| (region, FdSlot(fd)))));
        logged.map(|()| memory).map_err(|error| error.to_string())
    }
}

impl MemoryAccess<'_> {
    /// Makes a store, or has it wait.
    pub(super) fn store(&mut self, store: Store) {
        match &mut self.waiting {
            Some(waiting) => waiting.push(store),
            None => _ = self.make(&store),
        }
    }

    /// What is mapped is about to change: what waits is for what is mapped now.
    pub(super) fn ground_moves(&mut self) {
        let Some(waiting) = self.waiting.as_mut().filter(|waiting| !waiting.stores.is_empty()) else { return };
        let stores = std::mem::take(&mut waiting.stores);
        waiting.left.push(Batch { stores, ground: Some(self.memory.ground()), memory: Some(self.memory.clone()) });
    }

    /// Makes stores that waited.
    ///
    /// # Errors
    /// A predecessor wrote them down, and memory that they are for cannot be mapped any more. Those before have been made.
    pub(crate) fn make_all(&mut self, batches: &[Batch]) -> Result<(), String> {
        for batch in batches {
            let mut theirs = match (&batch.memory, &batch.ground) {
                (Some(memory), _) => Some(memory.clone()),
                (None, Some(ground)) => Some(SharedMemory::on(ground, self.fds)?),
                (None, None) => None,
            };
            let memory = theirs.as_mut().unwrap_or(self.memory);
            let mut access = MemoryAccess { memory, fds: self.fds, waiting: None };
            for store in &batch.stores {
                access.make(store);
            }
        }
        Ok(())
    }

    /// Makes a store now; false if the place is gone.
    pub(super) fn make(&mut self, store: &Store) -> bool {
        match store {
            Store::AvailSlot { ring, slot, head } => self.memory.set_avail_slot(*ring, *slot, *head),
            Store::UsedFlags { ring, flags } => self.memory.set_used_flags(*ring, *flags),
            Store::AvailEvent { ring, index } => self.memory.set_avail_event(*ring, *index),
            Store::PushUsed { ring, index, id, len } => {
                self.memory.push_used(*ring, *index, UsedElem { id: *id, len: *len });
            }
            Store::Private { memory, offset, bytes } => {
                let Some(fd) = self.fds.get(FdSlot(*memory)) else { return false };
                return rustix::io::pwrite(fd, bytes, *offset).is_ok_and(|written| written == bytes.len());
            }
            Store::Guest { guest_addr, bytes } => return self.memory.write_guest(*guest_addr, bytes),
        }
        true
    }

    /// What the last waiting store says of something.
    pub(super) fn waits<T>(&self, says: impl Fn(&Store) -> Option<T>) -> Option<T> {
        self.waiting.as_ref()?.says(says)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::MemfdFlags;
    use warmswap_wire::ring::Layout;

    use super::*;

    const GUEST: u64 = 0x10_0000;
    const USER: u64 = 0x7000_0000;
    const SIZE: u64 = 0x1_0000;

    fn memfd(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&fd, size).expect("a memfd has any size");
        fd
    }

    fn place() -> RingPlace {
        let layout = Layout::new(8).expect("a power of two");
        RingPlace { layout, descriptor: USER, available: USER + 0x1000, used: USER + 0x2000 }
    }

    fn region() -> MemoryRegion {
        MemoryRegion { guest_addr: GUEST, size: SIZE, user_addr: USER, mmap_offset: 0 }
    }

    /// A guest's memory with one ring and a dirty log.
    fn guest() -> (SharedMemory, FdTable) {
        let (mut memory, mut fds) = (SharedMemory::default(), FdTable::default());
        let (ram, log) = (fds.insert(memfd(SIZE)), fds.insert(memfd(4096)));
        let mut access = MemoryAccess { memory: &mut memory, fds: &mut fds, waiting: None };
        access.map(&region(), ram).expect("it can be mapped");
        access.attach(0, &place()).expect("it lies inside");
        access.set_log(Some((LogRegion { size: 4096, offset: 0 }, log))).expect("it can be mapped");
        (memory, fds)
    }

    /// What a step does that places survivors, completes a request and then lets go of the ring, or of everything.
    fn step(memory: &mut SharedMemory, fds: &mut FdTable, everything: bool) -> Vec<Batch> {
        let mut waiting = Waiting::default();
        let mut access = MemoryAccess { memory, fds, waiting: Some(&mut waiting) };
        access.set_avail_slot(0, 3, 7);
        access.push_used(0, 0, UsedElem { id: 5, len: 512 });
        assert!(access.write_guest(GUEST + 0x3000, b"read"));
        assert_eq!((access.avail_slot(0, 3), access.used_idx(0)), (7, 1), "what waits is read as if it were made");
        access.detach(0);
        if everything {
            access.set_log(None).expect("that never fails");
            access.unmap(GUEST);
        }
        waiting.take()
    }

    /// What the guest finds, and which of its pages are marked.
    fn found(fds: &FdTable) -> (u16, u32, u16, [u8; 4], [u8; 33]) {
        let read = |slot: u32, at: u64, bytes: &mut [u8]| {
            let fd = fds.get(FdSlot(slot)).expect("it is open");
            assert_eq!(rustix::io::pread(fd, &mut *bytes, at), Ok(bytes.len()));
        };
        let (mut slot, mut id, mut index, mut bytes, mut log) = ([0; 2], [0; 4], [0; 2], [0; 4], [0; 33]);
        let (ram, dirty) = (0, 1);
        read(ram, 0x1000 + 4 + 2 * 3, &mut slot);
        read(ram, 0x2000 + 4, &mut id);
        read(ram, 0x2000 + 2, &mut index);
        read(ram, 0x3000, &mut bytes);
        read(dirty, 0, &mut log);
        (u16::from_le_bytes(slot), u32::from_le_bytes(id), u16::from_le_bytes(index), bytes, log)
    }

    fn expected() -> (u16, u32, u16, [u8; 4], [u8; 33]) {
        let mut log = [0; 33];
        // Pages 0x101, 0x102 and 0x103.
        log[32] = 0b1110;
        (7, 5, 1, *b"read", log)
    }

    #[test]
    fn stores_are_made_in_the_memory_they_are_for_though_the_step_lets_go_of_it() {
        for everything in [false, true] {
            let (mut memory, mut fds) = guest();
            let batches = step(&mut memory, &mut fds, everything);
            assert_ne!(found(&fds), expected(), "they are written down first");
            let mut access = MemoryAccess { memory: &mut memory, fds: &mut fds, waiting: None };
            access.make_all(&batches).expect("the memory is kept");
            assert_eq!(found(&fds), expected());
        }
    }

    #[test]
    fn the_next_broker_finds_the_memory_that_stores_are_for() {
        let (mut memory, mut fds) = guest();
        let batches = step(&mut memory, &mut fds, true);
        drop(memory);
        let written = serde_json::to_vec(&batches).expect("it can be written down");
        let batches: Vec<Batch> = serde_json::from_slice(&written).expect("and read");
        let mut memory = SharedMemory::default();
        let mut access = MemoryAccess { memory: &mut memory, fds: &mut fds, waiting: None };
        access.make_all(&batches).expect("the descriptors are there");
        assert_eq!(found(&fds), expected());
        fds.close(FdSlot(0));
        let mut access = MemoryAccess { memory: &mut memory, fds: &mut fds, waiting: None };
        assert!(access.make_all(&batches).expect_err("the memory is gone").contains("descriptor"));
    }
}
