//! What the core needs of guest memory. The shell implements it over shared mappings, simulations over plain bytes.

use serde::{Deserialize, Serialize};
use warmswap_wire::ring::{Descriptor, Layout, UsedElem};
use warmswap_wire::{FdSlot, LogRegion, MemoryRegion};

/// Why guest memory could not be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A region could not be mapped.
    #[error("guest memory of {size} bytes at {guest_addr:#x} cannot be mapped: {reason}")]
    Map {
        /// Guest-physical address.
        guest_addr: u64,
        /// Size in bytes.
        size: u64,
        /// What the system said, or what is wrong with the descriptor.
        reason: String,
    },
    /// A part of a ring lies outside the memory table or is not aligned.
    #[error("ring {ring}: its {part} at {addr:#x} does not lie in the memory table, or is misaligned")]
    Ring {
        /// Ring index.
        ring: u32,
        /// Which part.
        part: &'static str,
        /// Its address in the VMM's address space.
        addr: u64,
    },
    /// The dirty log could not be mapped.
    #[error("the dirty log cannot be mapped: {reason}")]
    Log {
        /// What the system said.
        reason: String,
    },
}

/// Where the three parts of a ring lie, in the VMM's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPlace {
    /// Size and offsets.
    pub layout: Layout,
    /// Descriptor table.
    pub descriptor: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// Where memory of the broker's own lies for a backend, in the guest's address space and in the VMM's: above everything a guest or a
/// process can have.
pub const PRIVATE_ADDR: u64 = 1 << 62;
/// Its size. Only what is touched takes room.
pub const PRIVATE_SIZE: u64 = 1 << 20;

/// The region that memory of the broker's own is for a backend.
pub(crate) const fn private_region() -> MemoryRegion {
    MemoryRegion { guest_addr: PRIVATE_ADDR, size: PRIVATE_SIZE, user_addr: PRIVATE_ADDR, mmap_offset: 0 }
}

/// Guest memory and the rings in it.
///
/// Loads of an index have acquire order, stores of an index release order. A ring that is not attached reads as zero. Every
/// value comes from a hostile guest and may change between two reads. Stores are made only while no backend serves the ring,
/// and are marked in the dirty log where one is set.
pub trait GuestMemory {
    /// Maps a region.
    ///
    /// # Errors
    /// The descriptor is too short, not mappable or not shared memory.
    fn map(&mut self, region: &MemoryRegion, fd: FdSlot) -> Result<(), MemoryError>;
    /// Unmaps the region at this guest-physical address. Rings in it must have been detached.
    fn unmap(&mut self, guest_addr: u64);
    /// Sets or clears the dirty log.
    ///
    /// # Errors
    /// The descriptor cannot be mapped.
    fn set_log(&mut self, log: Option<(LogRegion, FdSlot)>) -> Result<(), MemoryError>;
    /// Resolves a ring's parts.
    ///
    /// # Errors
    /// A part lies outside the table.
    fn attach(&mut self, ring: u32, place: &RingPlace) -> Result<(), MemoryError>;
    /// Forgets a ring.
    fn detach(&mut self, ring: u32);
    /// Whether memory vanished under a read since the last call (the VMM truncated its descriptor).
    fn faulted(&mut self) -> bool;

    /// `avail.idx`.
    fn avail_idx(&self, ring: u32) -> u16;
    /// `used.idx`.
    fn used_idx(&self, ring: u32) -> u16;
    /// Head in an available slot.
    fn avail_slot(&self, ring: u32, slot: u16) -> u16;
    /// Entry in a used slot.
    fn used_slot(&self, ring: u32, slot: u16) -> UsedElem;
    /// `used.flags`.
    fn used_flags(&self, ring: u32) -> u16;
    /// `avail_event`, at the end of the used ring.
    fn avail_event(&self, ring: u32) -> u16;
    /// An entry of the descriptor table.
    fn descriptor(&self, ring: u32, index: u16) -> Descriptor;
    /// Copies guest-physical memory; false if the range is not mapped.
    fn read_guest(&self, guest_addr: u64, bytes: &mut [u8]) -> bool;

    /// Overwrites an available slot.
    fn set_avail_slot(&mut self, ring: u32, slot: u16, head: u16);
    /// Sets `used.flags`.
    fn set_used_flags(&mut self, ring: u32, flags: u16);
    /// Sets `avail_event`.
    fn set_avail_event(&mut self, ring: u32, index: u16);
    /// Appends an entry to the used ring at `index` and publishes `index + 1`.
    fn push_used(&mut self, ring: u32, index: u16, entry: UsedElem);
    /// Copies a part of an in-flight region, or of memory of the broker's own; none if it is not all there.
    fn read_region(&self, fd: FdSlot, offset: u64, length: u64) -> Option<Vec<u8>>;
    /// Makes [`PRIVATE_SIZE`] zeroed bytes of the broker's own and returns their descriptor, which the caller closes. What a backend
    /// writes there is read with [`GuestMemory::read_region`].
    ///
    /// # Errors
    /// The memory cannot be had.
    fn make_private(&mut self) -> Result<FdSlot, MemoryError>;
    /// Writes to memory of the broker's own; false if the descriptor is gone.
    fn write_private(&mut self, memory: FdSlot, offset: u64, bytes: &[u8]) -> bool;

    /// Writes guest-physical memory; false if the range is not mapped.
    fn write_guest(&mut self, guest_addr: u64, bytes: &[u8]) -> bool;
}
