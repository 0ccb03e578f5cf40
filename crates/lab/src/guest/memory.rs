//! Guest RAM: sparse memfds at guest-physical addresses, as a VMM lays them out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, ensure};
use warmswap_wire::MemoryRegion;

use super::map::Mapping;

/// RAM below this guest-physical address; the rest starts at 4 GiB (QEMU's q35 leaves the hole for PCI).
const LOW_RAM_MAX: u64 = 2 << 30;
/// Where RAM above the hole starts.
const HIGH_RAM: u64 = 4 << 30;
/// Where hotplugged memory starts.
const HOTPLUG: u64 = 64 << 30;
/// The first page stays unused, so that address zero is never a valid buffer.
const RESERVED: u64 = 4096;

/// A piece of guest memory: the mapping that holds it, where it starts there, and its guest-physical address.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    /// The region's mapping.
    pub(crate) mapping: Arc<Mapping>,
    /// First byte in the mapping.
    pub(crate) start: usize,
    /// Length in bytes.
    pub(crate) length: usize,
    /// Guest-physical address of the first byte.
    pub(crate) guest: u64,
}

impl Window {
    /// Address of the first byte in this process, as SET_VRING_ADDR wants it.
    pub(crate) fn user(&self) -> u64 {
        self.mapping.address() + self.start as u64
    }

    /// A part of the window.
    pub(crate) fn part(&self, offset: usize, length: usize) -> Window {
        assert!(offset + length <= self.length, "part {offset:#x}+{length:#x} leaves the window");
        Window {
            mapping: Arc::clone(&self.mapping),
            start: self.start + offset,
            length,
            guest: self.guest + offset as u64,
        }
    }
}

/// One region of guest memory.
#[derive(Debug)]
struct Region {
    description: MemoryRegion,
    fd: Arc<OwnedFd>,
    mapping: Arc<Mapping>,
    /// Bytes handed out so far.
    allocated: u64,
    /// Up to where they are ours to hand out.
    end: u64,
}

/// The guest's memory. Pages nobody touched take no space.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// RAM of `size` bytes in one memfd: up to 2 GiB from address 0, the rest from 4 GiB on.
    pub(crate) fn new(size: u64) -> anyhow::Result<Self> {
        ensure!(size >= 1 << 20 && size.is_multiple_of(4096), "guest RAM must be at least 1 MiB and whole pages");
        let fd = Arc::new(memfd("guest-ram", size)?);
        let low = size.min(LOW_RAM_MAX);
        let mut memory = GuestMemory { regions: Vec::new() };
        memory.map(&fd, 0, 0, low)?;
        if size > low {
            memory.map(&fd, HIGH_RAM, low, size - low)?;
        }
        Ok(memory)
    }

    /// Adds `size` bytes of hotplugged memory and returns the region's index.
    pub(crate) fn plug(&mut self, size: u64) -> anyhow::Result<usize> {
        let end = |region: &Region| region.description.guest_addr + region.description.size;
        let guest = self.regions.iter().map(end).max().unwrap_or(0).max(HOTPLUG);
        let fd = Arc::new(memfd("guest-dimm", size)?);
        self.map(&fd, guest, 0, size)?;
        Ok(self.regions.len() - 1)
    }

    /// Forgets the last region, which must have come from [`GuestMemory::plug`]. Windows into it keep its memory alive.
    pub(crate) fn unplug(&mut self) -> Option<MemoryRegion> {
        let region = self.regions.pop_if(|region| region.description.guest_addr >= HOTPLUG)?;
        Some(region.description)
    }

    fn map(&mut self, fd: &Arc<OwnedFd>, guest_addr: u64, mmap_offset: u64, size: u64) -> anyhow::Result<()> {
        let length = usize::try_from(size).context("region larger than the address space")?;
        let mapping = Arc::new(Mapping::new(fd, mmap_offset, length).context("mapping guest memory")?);
        let description = MemoryRegion { guest_addr, size, user_addr: mapping.address(), mmap_offset };
        let allocated = if guest_addr == 0 { RESERVED } else { 0 };
        self.regions.push(Region { description, fd: Arc::clone(fd), mapping, allocated, end: size });
        Ok(())
    }

    /// Hands out `length` bytes of region `region`, aligned to `align`. Nothing is ever taken back but whole regions.
    pub(crate) fn allocate(&mut self, region: usize, length: usize, align: u64) -> anyhow::Result<Window> {
        let region = self.regions.get_mut(region).context("no such memory region")?;
        let start = region.allocated.next_multiple_of(align);
        let end = start + length as u64;
        ensure!(end <= region.end, "guest memory is too small for {length} more bytes");
        region.allocated = end;
        Ok(Window {
            mapping: Arc::clone(&region.mapping),
            start: usize::try_from(start)?,
            length,
            guest: region.description.guest_addr + start,
        })
    }

    /// The same memory for another guest, which may hand out the next `length` bytes of it. It must be one region.
    pub(crate) fn share(&mut self, length: usize) -> anyhow::Result<GuestMemory> {
        ensure!(self.regions.len() == 1, "only memory of one region is shared");
        let start = self.allocate(0, length, 4096)?.start as u64;
        let Region { description, fd, mapping, .. } = &self.regions[0];
        let (fd, mapping) = (Arc::clone(fd), Arc::clone(mapping));
        let end = start + length as u64;
        Ok(GuestMemory { regions: vec![Region { description: *description, fd, mapping, allocated: start, end }] })
    }

    /// Number of regions.
    pub(crate) fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The table as the front-end describes it, with the descriptor of each region.
    pub(crate) fn table(&self) -> impl Iterator<Item = (MemoryRegion, BorrowedFd<'_>)> {
        self.regions.iter().map(|region| (region.description, region.fd.as_fd()))
    }

    /// A guest-physical address that no region holds.
    pub(crate) fn unmapped_address() -> u64 {
        HOTPLUG << 4
    }

    /// Bytes written to pages that were never handed out, found without touching them: whoever wrote there was no driver.
    pub(crate) fn stray_pages(&self) -> anyhow::Result<u64> {
        let mut stray = 0;
        for region in &self.regions {
            let file = region.description.mmap_offset;
            let last = file + region.description.size;
            let mut at = file + region.allocated.next_multiple_of(4096);
            while at < last {
                // ENXIO: no data up to the end.
                let Ok(data) = rustix::fs::seek(&*region.fd, rustix::fs::SeekFrom::Data(at)) else { break };
                if data >= last {
                    break;
                }
                let hole = rustix::fs::seek(&*region.fd, rustix::fs::SeekFrom::Hole(data))?.min(last);
                stray += (hole - data) / 4096;
                at = hole;
            }
        }
        Ok(stray)
    }
}

fn memfd(name: &str, size: u64) -> anyhow::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).context("memfd_create")?;
    rustix::fs::ftruncate(&fd, size).context("sizing guest memory")?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn ram_is_split_around_the_hole() {
        let memory = GuestMemory::new(3 << 30).expect("sparse");
        let table: Vec<_> = memory.table().map(|(region, _)| region).collect();
        assert_eq!((table[0].guest_addr, table[0].size, table[0].mmap_offset), (0, 2 << 30, 0));
        assert_eq!((table[1].guest_addr, table[1].size, table[1].mmap_offset), (4 << 30, 1 << 30, 2 << 30));
    }

    #[test]
    fn allocation_is_bounded_and_plugging_undone() {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        memory.allocate(0, 1 << 20, 4096).expect_err("the first page is reserved");
        let region = memory.plug(1 << 20).expect("plug");
        assert_eq!(memory.allocate(region, 1 << 20, 4096).expect("fits").guest, HOTPLUG);
        assert!(memory.unplug().is_some());
        assert!(memory.unplug().is_none());
    }

    #[test]
    fn shared_memory_is_the_same_and_nothing_in_it_is_handed_out_twice() {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        let mut shared = memory.share(8192).expect("fits");
        let theirs = shared.allocate(0, 8192, 4096).expect("fits");
        shared.allocate(0, 1, 1).expect_err("the rest is not its own");
        let ours = memory.allocate(0, 4096, 4096).expect("fits");
        assert_eq!(ours.guest, theirs.guest + 8192);
        theirs.mapping.u64(theirs.start).store(7, Ordering::Relaxed);
        assert_eq!(ours.mapping.u64(theirs.start).load(Ordering::Relaxed), 7);
    }

    #[test]
    fn writes_outside_what_was_handed_out_are_found() {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        let window = memory.allocate(0, 100, 8).expect("fits");
        window.mapping.u64(window.start).store(1, Ordering::Relaxed);
        assert_eq!(memory.stray_pages().expect("seek"), 0);
        window.mapping.u64(0x8_0000).store(1, Ordering::Relaxed);
        assert_eq!(memory.stray_pages().expect("seek"), 1);
    }
}
