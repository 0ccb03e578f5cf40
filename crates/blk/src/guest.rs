//! A guest for tests: two regions of memory side by side, each a file of its own, a ring, and whatever is written there.

use std::os::fd::AsFd;

use rustix::fs::MemfdFlags;
use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Descriptor};
use warmswap_wire::{MemoryRegion, VringAddr};

use crate::memory::{MemoryMap, Piece, copy_in, copy_out};
use crate::ring::Place;

/// Bytes of each region. The first begins at guest address zero.
pub(crate) const REGION: u64 = 0x1_0000;
/// First address behind the guest's memory.
pub(crate) const END: u64 = 2 * REGION;
/// Where the front-end has the guest's first byte.
pub(crate) const USER: u64 = 0x7000_0000;
/// Parts of a ring of at most 1024 entries.
pub(crate) const TABLE: u64 = 0;
pub(crate) const AVAILABLE: u64 = 0x4000;
pub(crate) const USED: u64 = 0x5000;
/// What is left of the first region.
pub(crate) const FREE: u64 = 0x8000;

#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) memory: MemoryMap,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let region = |memory: MemoryMap, at: u64| {
            let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
            rustix::fs::ftruncate(&fd, REGION).expect("any size");
            let region = MemoryRegion { guest_addr: at, size: REGION, user_addr: USER + at, mmap_offset: 0 };
            memory.with(region, fd.as_fd()).expect("it fits")
        };
        Guest { memory: region(region(MemoryMap::default(), 0), REGION) }
    }

    fn pieces(&self, addr: u64, len: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        assert!(self.memory.pieces(addr, len as u32, &mut pieces), "{addr:#x} is memory");
        pieces
    }

    pub(crate) fn put(&self, addr: u64, bytes: &[u8]) {
        copy_in(&self.pieces(addr, bytes.len()), bytes);
    }

    pub(crate) fn get<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        copy_out(&self.pieces(addr, N), &mut bytes);
        bytes
    }

    pub(crate) fn u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.get(addr))
    }

    pub(crate) fn put_u16(&self, addr: u64, value: u16) {
        self.put(addr, &value.to_le_bytes());
    }

    /// Writes a table.
    pub(crate) fn table(&self, addr: u64, descriptors: &[Descriptor]) {
        for (at, descriptor) in (addr..).step_by(DESC_SIZE as usize).zip(descriptors) {
            self.put(at, &descriptor.to_le_bytes());
        }
    }

    /// Writes a chain: a table whose descriptors follow each other.
    pub(crate) fn chain(&self, addr: u64, descriptors: &[Descriptor]) {
        let mut chain = descriptors.to_vec();
        let last = chain.len() - 1;
        for (descriptor, next) in chain[..last].iter_mut().zip(1..) {
            descriptor.flags |= DESC_F_NEXT;
            descriptor.next = next;
        }
        self.table(addr, &chain);
    }

    /// The ring of that size.
    pub(crate) fn place(&self, size: u16) -> Place {
        Place::find(&self.memory, size, &addr()).expect("it lies in memory")
    }
}

/// Addresses of the ring.
pub(crate) fn addr() -> VringAddr {
    let [descriptor, available, used] = [TABLE, AVAILABLE, USED].map(|at| USER + at);
    VringAddr { index: 0, flags: 0, descriptor, available, used, log: 0 }
}

/// A buffer that the device reads.
pub(crate) fn readable(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr, len, flags: 0, next: 0 }
}

/// One that it writes.
pub(crate) fn writable(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr, len, flags: DESC_F_WRITE, next: 0 }
}

/// A table of its own.
pub(crate) fn indirect(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr, len, flags: DESC_F_INDIRECT, next: 0 }
}
