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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_found_where_it_lies_wholly_inside_one_region() {
        let region = |at: u64, size| MemoryRegion { guest_addr: at, size, user_addr: at + 0x1000_0000, mmap_offset: 7 };
        // The first two touch: what lies across both is in neither. The last ends where addresses end.
        let last = MemoryRegion { guest_addr: u64::MAX - 0x10, size: 0x10, user_addr: 0x7000_0000, mmap_offset: 0 };
        let table = MemoryTable { regions: vec![region(0x1000, 0x1000), region(0x2000, 0x800), last] };
        for (at, length, found) in [
            (0x1000, 0x1000, Some((0, 0))),
            (0x1001, 0xfff, Some((0, 1))),
            (0x1001, 0x1000, None),
            (0x1fff, 1, Some((0, 0xfff))),
            (0x1fff, 2, None),
            (0x2000, 0x800, Some((1, 0))),
            (0x2345, 1, Some((1, 0x345))),
            (0x2800, 1, None),
            (0xfff, 1, None),
            (0xfff, 2, None),
            (0x1800, u64::MAX, None),
        ] {
            assert_eq!(table.find_guest(at, length), found, "guest {at:#x}, {length:#x} bytes");
            assert_eq!(table.find_user(at + 0x1000_0000, length), found, "user {at:#x}, {length:#x} bytes");
            assert_eq!(table.find_user(at, length), None, "{at:#x} is no address of the VMM's");
        }
        assert_eq!(table.find_guest(u64::MAX - 0x10, 0x10), Some((2, 0)));
        assert_eq!(table.find_user(0x7000_000f, 1), Some((2, 0xf)));
    }
}
