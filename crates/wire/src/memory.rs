//! The guest's memory as the VMM describes it.

use crate::Error;
use crate::bytes::{Put, Reader};
use serde::{Deserialize, Serialize};

/// Most regions of one SET_MEM_TABLE (`VHOST_MEMORY_BASELINE_NREGIONS`). More come one by one with ADD_MEM_REG.
pub const REGIONS_MAX: usize = 8;

/// One contiguous piece of guest memory. The descriptor that backs it travels beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// Guest-physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// The VMM's own (user) address of the first byte; ring addresses are given in this space.
    pub user_addr: u64,
    /// Offset of the first byte in the descriptor.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    pub(crate) fn decode_fields(reader: &mut Reader<'_>) -> Result<Self, Error> {
        Ok(MemoryRegion {
            guest_addr: reader.u64()?,
            size: reader.u64()?,
            user_addr: reader.u64()?,
            mmap_offset: reader.u64()?,
        })
    }

    /// Rejects regions that are empty or that wrap around in any of their three address spaces.
    pub(crate) fn check(self, request: &'static str) -> Result<Self, Error> {
        let wraps = |start: u64| start.checked_add(self.size).is_none();
        if self.size == 0 {
            return Err(Error::Value { request, field: "region size", found: 0, expected: "more than 0" });
        }
        if wraps(self.guest_addr) || wraps(self.user_addr) || wraps(self.mmap_offset) {
            return Err(Error::Value {
                request,
                field: "region size",
                found: self.size,
                expected: "a region that does not wrap around",
            });
        }
        Ok(self)
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u64(self.guest_addr);
        out.put_u64(self.size);
        out.put_u64(self.user_addr);
        out.put_u64(self.mmap_offset);
    }

    /// Offset of `user_addr..user_addr+length` in this region, if it lies wholly inside.
    #[must_use]
    pub fn offset_of_user(&self, user_addr: u64, length: u64) -> Option<u64> {
        inside(self.user_addr, self.size, user_addr, length)
    }

    /// Offset of the guest-physical range in this region, if it lies wholly inside.
    #[must_use]
    pub fn offset_of_guest(&self, guest_addr: u64, length: u64) -> Option<u64> {
        inside(self.guest_addr, self.size, guest_addr, length)
    }
}

fn inside(start: u64, size: u64, addr: u64, length: u64) -> Option<u64> {
    let offset = addr.checked_sub(start)?;
    (offset.checked_add(length)? <= size).then_some(offset)
}

/// The table: regions in the order in which they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable {
    /// The regions.
    pub regions: Vec<MemoryRegion>,
}

impl MemoryTable {
    /// Index of the region and offset in it of a range of the VMM's address space.
    #[must_use]
    pub fn find_user(&self, user_addr: u64, length: u64) -> Option<(usize, u64)> {
        find(&self.regions, |region| region.offset_of_user(user_addr, length))
    }

    /// Index of the region and offset in it of a guest-physical range.
    #[must_use]
    pub fn find_guest(&self, guest_addr: u64, length: u64) -> Option<(usize, u64)> {
        find(&self.regions, |region| region.offset_of_guest(guest_addr, length))
    }
}

fn find(regions: &[MemoryRegion], offset: impl Fn(&MemoryRegion) -> Option<u64>) -> Option<(usize, u64)> {
    regions.iter().enumerate().find_map(|(index, region)| Some((index, offset(region)?)))
}
