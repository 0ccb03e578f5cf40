//! Guest memory over shared mappings. One of the few files with `unsafe`: it is where memory is shared with a guest.
//!
//! The guest, the backends and the VMM change this memory at any time, so every access is a single atomic load or store of the
//! field's own width and nothing is ever borrowed from it. A VMM may also truncate the descriptor under a mapping; reading it
//! then raises SIGBUS. The handler puts an empty page in the place and marks the region, so the reader sees zeros and is told.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags};
use warmswap_core::{GuestMemory, MemoryError, PRIVATE_ADDR, PRIVATE_SIZE, RingPlace, RingReader};
use warmswap_wire::ring::{Descriptor, FLAGS, IDX, Layout, UsedElem};
use warmswap_wire::{FdSlot, LogRegion, MemoryRegion};

use crate::fds::FdTable;

mod stores;
use self::stores::Store;
pub(crate) use self::stores::{Batch, Waiting};

/// Page size of the dirty log (`VHOST_LOG_PAGE`).
const LOG_PAGE: u64 = 4096;

/// A shared mapping of a part of a descriptor.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    /// Bytes that were asked for.
    len: usize,
    /// Bytes that are mapped: whole pages.
    mapped: usize,
    watch: usize,
}

// SAFETY: the mapping is memory owned by this value; all access goes through atomics, or reads byte by byte what others may write.
unsafe impl Send for Mapping {}
// SAFETY: as above: nothing in it is changed through a shared reference but by atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, offset: u64, size: u64) -> Result<Self, String> {
        let stat = rustix::fs::fstat(fd).map_err(|error| format!("its descriptor cannot be examined: {error}"))?;
        let end = offset.checked_add(size).ok_or("it wraps around")?;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        if regular && u64::try_from(stat.st_size).unwrap_or(0) < end {
            return Err(format!("its descriptor has {} bytes, the region ends at {end}", stat.st_size));
        }
        let page = page_size(fd)?;
        let len = usize::try_from(size).map_err(|_| "it is larger than the address space")?;
        // Huge pages are mapped whole: a length between two of them could not be unmapped again.
        let mapped = len.checked_next_multiple_of(page).ok_or("it is larger than the address space")?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address the kernel chooses; nothing else refers to it.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped,
                protection,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset,
            )
        }
        .map_err(|error| format!("mmap: {error}"))?;
        let start = NonNull::new(start.cast::<u8>()).ok_or("mmap returned null")?;
        match sigbus::watch(start.as_ptr() as usize, mapped, page) {
            Ok(watch) => Ok(Mapping { start, len, mapped, watch }),
            Err(reason) => {
                // SAFETY: made just above and known to nobody else.
                let _unmapped = unsafe { rustix::mm::munmap(start.as_ptr().cast(), mapped) };
                Err(reason)
            }
        }
    }

    /// Pointer to `len` bytes at `offset`, if they lie inside and are aligned.
    fn at(&self, offset: u64, len: u64, align: u64) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len)?;
        if end > self.len as u64 || !offset.is_multiple_of(align) {
            return None;
        }
        // SAFETY: `offset` lies within the mapping, as just checked.
        Some(unsafe { self.start.add(usize::try_from(offset).ok()?) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        sigbus::unwatch(self.watch);
        // SAFETY: the mapping was made by `new` with this length, and pointers into it are only in views,
        // each of which keeps it. Failure would only leak it.
        let _unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

/// Size of the pages that a descriptor is mapped with: those of its file system where that is made of huge pages.
fn page_size(fd: BorrowedFd<'_>) -> Result<usize, String> {
    const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
    let system = rustix::fs::fstatfs(fd).map_err(|error| format!("its file system cannot be examined: {error}"))?;
    if system.f_type as u32 != HUGETLBFS_MAGIC {
        return Ok(rustix::param::page_size());
    }
    let size = usize::try_from(system.f_bsize).ok().filter(|size| size.is_power_of_two());
    size.ok_or_else(|| format!("its file system claims pages of {} bytes", system.f_bsize))
}

#[derive(Debug)]
struct Region {
    described: MemoryRegion,
    fd: FdSlot,
    mapping: Mapping,
}

/// The VMM's dirty log.
#[derive(Debug)]
struct Log {
    described: LogRegion,
    fd: FdSlot,
    mapping: Mapping,
}

/// A ring's parts as pointers into a mapping that outlives them.
#[derive(Clone, Copy, Debug)]
struct RingParts {
    layout: Layout,
    place: RingPlace,
    descriptor: NonNull<u8>,
    available: NonNull<u8>,
    used: NonNull<u8>,
}

/// What is mapped of one device's guest, and where its rings lie in it, at some time. A copy keeps everything mapped that it knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    regions: Vec<Arc<Region>>,
    rings: Vec<Option<RingParts>>,
}

// SAFETY: the pointers of `rings` lead into `regions`, which the same value keeps.
unsafe impl Send for View {}

/// Guest memory of one device. A copy keeps everything mapped that it knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedMemory {
    view: View,
    log: Option<Arc<Log>>,
    /// Changes of the view.
    changes: u64,
}

/// Guest memory together with the table that its descriptors live in, for one step of the core.
pub(crate) struct MemoryAccess<'a> {
    pub(crate) memory: &'a mut SharedMemory,
    pub(crate) fds: &'a mut FdTable,
    /// Where stores wait that must be written down before they are made. What waits is read as if it had been made.
    pub(crate) waiting: Option<&'a mut Waiting>,
}

impl SharedMemory {
    /// What is mapped now, for another thread to read.
    pub(crate) fn view(&self) -> View {
        self.view.clone()
    }

    /// Number of changes of what is mapped.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    fn ring(&self, ring: u32) -> Option<&RingParts> {
        self.view.ring(ring)
    }

    fn find_user(&self, user_addr: u64, len: u64, align: u64) -> Option<NonNull<u8>> {
        self.view.regions.iter().find_map(|region| {
            let offset = region.described.offset_of_user(user_addr, len)?;
            region.mapping.at(offset, len, align)
        })
    }

    /// Marks the pages of a write to the VMM's address range in the dirty log.
    fn mark_user(&self, user_addr: u64, len: u64) {
        let guest = self.view.regions.iter().find_map(|region| {
            let offset = region.described.offset_of_user(user_addr, len)?;
            Some(region.described.guest_addr + offset)
        });
        if let Some(guest) = guest {
            self.mark_guest(guest, len);
        }
    }

    fn mark_guest(&self, guest_addr: u64, len: u64) {
        let Some(log) = &self.log else { return };
        for page in guest_addr / LOG_PAGE..=(guest_addr + len.max(1) - 1) / LOG_PAGE {
            if let Some(byte) = log.mapping.at(page / 8, 1, 1) {
                // SAFETY: one byte inside the log's mapping; other writers set bits atomically as well.
                let byte = unsafe { std::sync::atomic::AtomicU8::from_ptr(byte.as_ptr()) };
                byte.fetch_or(1 << (page % 8), Ordering::AcqRel);
            }
        }
    }
}

impl View {
    fn ring(&self, ring: u32) -> Option<&RingParts> {
        self.rings.get(ring as usize)?.as_ref()
    }

    fn find_guest(&self, guest_addr: u64, len: u64) -> Option<NonNull<u8>> {
        self.regions.iter().find_map(|region| {
            let offset = region.described.offset_of_guest(guest_addr, len)?;
            region.mapping.at(offset, len, 1)
        })
    }
}

/// Loads a little-endian u16 at a pointer that is inside a mapping and aligned to 2.
fn load_u16(base: NonNull<u8>, offset: u64, order: Ordering) -> u16 {
    // SAFETY: callers pass offsets of `Layout` within a part that `attach` has checked for size and alignment.
    let field = unsafe { AtomicU16::from_ptr(base.as_ptr().add(offset as usize).cast()) };
    u16::from_le(field.load(order))
}

fn store_u16(base: NonNull<u8>, offset: u64, value: u16, order: Ordering) {
    // SAFETY: as in `load_u16`.
    let field = unsafe { AtomicU16::from_ptr(base.as_ptr().add(offset as usize).cast()) };
    field.store(value.to_le(), order);
}

fn load_u32(base: NonNull<u8>, offset: u64) -> u32 {
    // SAFETY: as in `load_u16`, with parts aligned to 4.
    let field = unsafe { AtomicU32::from_ptr(base.as_ptr().add(offset as usize).cast()) };
    u32::from_le(field.load(Ordering::Relaxed))
}

fn load_u64(base: NonNull<u8>, offset: u64) -> u64 {
    // SAFETY: as in `load_u16`, with parts aligned to 16.
    let field = unsafe { AtomicU64::from_ptr(base.as_ptr().add(offset as usize).cast()) };
    u64::from_le(field.load(Ordering::Relaxed))
}

impl View {
    /// Whether no page of it has vanished so far: the VMM truncated its descriptor then, and what was read is not to be believed.
    pub(crate) fn is_whole(&self) -> bool {
        !self.regions.iter().any(|region| sigbus::has_faulted(region.mapping.watch))
    }
}

impl RingReader for View {
    fn layout(&self, ring: u32) -> Option<Layout> {
        Some(self.ring(ring)?.layout)
    }

    fn avail_idx(&self, ring: u32) -> u16 {
        // What was read before stays before: an index tells whether slots read earlier were still intact.
        fence(Ordering::Acquire);
        self.ring(ring).map_or(0, |parts| load_u16(parts.available, IDX, Ordering::Acquire))
    }

    fn used_idx(&self, ring: u32) -> u16 {
        fence(Ordering::Acquire);
        self.ring(ring).map_or(0, |parts| load_u16(parts.used, IDX, Ordering::Acquire))
    }

    fn avail_flags(&self, ring: u32) -> u16 {
        self.ring(ring).map_or(0, |parts| load_u16(parts.available, FLAGS, Ordering::Relaxed))
    }

    fn used_flags(&self, ring: u32) -> u16 {
        self.ring(ring).map_or(0, |parts| load_u16(parts.used, FLAGS, Ordering::Relaxed))
    }

    fn used_event(&self, ring: u32) -> u16 {
        let load = |parts: &RingParts| load_u16(parts.available, parts.layout.used_event(), Ordering::Relaxed);
        self.ring(ring).map_or(0, load)
    }

    fn avail_event(&self, ring: u32) -> u16 {
        let load = |parts: &RingParts| load_u16(parts.used, parts.layout.avail_event(), Ordering::Relaxed);
        self.ring(ring).map_or(0, load)
    }

    fn avail_slot(&self, ring: u32, slot: u16) -> u16 {
        let load = |parts: &RingParts| load_u16(parts.available, parts.layout.available_slot(slot), Ordering::Relaxed);
        self.ring(ring).map_or(0, load)
    }

    fn used_slot(&self, ring: u32, slot: u16) -> UsedElem {
        self.ring(ring).map_or(UsedElem { id: 0, len: 0 }, |parts| {
            let at = parts.layout.used_slot(slot);
            UsedElem { id: load_u32(parts.used, at), len: load_u32(parts.used, at + 4) }
        })
    }

    fn descriptor(&self, ring: u32, index: u16) -> Descriptor {
        let empty = Descriptor { addr: 0, len: 0, flags: 0, next: 0 };
        self.ring(ring).filter(|parts| index < parts.layout.size()).map_or(empty, |parts| {
            let at = u64::from(index) * 16;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&load_u64(parts.descriptor, at).to_le_bytes());
            bytes[8..].copy_from_slice(&load_u64(parts.descriptor, at + 8).to_le_bytes());
            Descriptor::from_le_bytes(bytes)
        })
    }

    fn read_guest(&self, guest_addr: u64, bytes: &mut [u8]) -> bool {
        let Some(from) = self.find_guest(guest_addr, bytes.len() as u64) else { return false };
        for (at, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `find_guest` has checked the whole range; bytes are read one by one, as others write them.
            *byte = unsafe { std::ptr::read_volatile(from.as_ptr().add(at)) };
        }
        true
    }
}

impl SharedMemory {
    fn set_avail_slot(&mut self, ring: u32, slot: u16, head: u16) {
        if let Some(parts) = self.ring(ring) {
            let at = parts.layout.available_slot(slot);
            store_u16(parts.available, at, head, Ordering::Release);
            self.mark_user(parts.place.available + at, 2);
        }
    }

    fn set_used_flags(&mut self, ring: u32, flags: u16) {
        if let Some(parts) = self.ring(ring) {
            store_u16(parts.used, FLAGS, flags, Ordering::Release);
            self.mark_user(parts.place.used, 2);
        }
    }

    fn set_avail_event(&mut self, ring: u32, index: u16) {
        if let Some(parts) = self.ring(ring) {
            let at = parts.layout.avail_event();
            store_u16(parts.used, at, index, Ordering::Release);
            self.mark_user(parts.place.used + at, 2);
            // The driver reads this after it has published its index; we read its index after this.
            fence(Ordering::SeqCst);
        }
    }

    fn push_used(&mut self, ring: u32, index: u16, entry: UsedElem) {
        if let Some(parts) = self.ring(ring) {
            let at = parts.layout.used_slot(parts.layout.slot(index));
            for (field, value) in [(at, entry.id), (at + 4, entry.len)] {
                // SAFETY: a used slot of the ring, aligned to 4 as the used ring is.
                let field = unsafe { AtomicU32::from_ptr(parts.used.as_ptr().add(field as usize).cast()) };
                field.store(value.to_le(), Ordering::Relaxed);
            }
            store_u16(parts.used, IDX, index.wrapping_add(1), Ordering::Release);
            self.mark_user(parts.place.used, parts.layout.used_bytes());
        }
    }

    fn write_guest(&mut self, guest_addr: u64, bytes: &[u8]) -> bool {
        let Some(to) = self.view.find_guest(guest_addr, bytes.len() as u64) else { return false };
        for (at, byte) in bytes.iter().enumerate() {
            // SAFETY: `find_guest` has checked the whole range.
            unsafe { std::ptr::write_volatile(to.as_ptr().add(at), *byte) };
        }
        self.mark_guest(guest_addr, bytes.len() as u64);
        true
    }
}

impl GuestMemory for MemoryAccess<'_> {
    fn map(&mut self, region: &MemoryRegion, fd: FdSlot) -> Result<(), MemoryError> {
        let refuse = |reason: String| MemoryError::Map { guest_addr: region.guest_addr, size: region.size, reason };
        let overlaps = |known: &Region| {
            let known = &known.described;
            let meet = |left: u64, right: u64| left < right + region.size && right < left + known.size;
            meet(known.guest_addr, region.guest_addr) || meet(known.user_addr, region.user_addr)
        };
        if self.memory.view.regions.iter().any(|region| overlaps(region)) {
            return Err(refuse("it overlaps another region".to_owned()));
        }
        if region.guest_addr + region.size > PRIVATE_ADDR || region.user_addr + region.size > PRIVATE_ADDR {
            return Err(refuse("it lies where the broker keeps memory of its own".to_owned()));
        }
        let file = self.fds.get(fd).ok_or_else(|| refuse("its descriptor is missing".to_owned()))?;
        let mapping = Mapping::new(file, region.mmap_offset, region.size).map_err(refuse)?;
        self.memory.view.regions.push(Arc::new(Region { described: *region, fd, mapping }));
        self.memory.changes += 1;
        Ok(())
    }

    fn unmap(&mut self, guest_addr: u64) {
        let Some(at) = self.memory.view.regions.iter().position(|region| region.described.guest_addr == guest_addr)
        else {
            return;
        };
        self.ground_moves();
        let region = self.memory.view.regions[at].described;
        for ring in &mut self.memory.view.rings {
            let inside = |addr: u64| region.offset_of_user(addr, 1).is_some();
            let lost = |parts: &RingParts| {
                inside(parts.place.descriptor) || inside(parts.place.available) || inside(parts.place.used)
            };
            if ring.as_ref().is_some_and(lost) {
                *ring = None;
            }
        }
        self.memory.view.regions.remove(at);
        self.memory.changes += 1;
    }

    fn set_log(&mut self, log: Option<(LogRegion, FdSlot)>) -> Result<(), MemoryError> {
        self.ground_moves();
        self.memory.log = None;
        let Some((region, fd)) = log else { return Ok(()) };
        let refuse = |reason: String| MemoryError::Log { reason };
        let file = self.fds.get(fd).ok_or_else(|| refuse("its descriptor is missing".to_owned()))?;
        let mapping = Mapping::new(file, region.offset, region.size).map_err(refuse)?;
        self.memory.log = Some(Arc::new(Log { described: region, fd, mapping }));
        Ok(())
    }

    fn attach(&mut self, ring: u32, place: &RingPlace) -> Result<(), MemoryError> {
        let layout = place.layout;
        let find = |part, addr, len, align| {
            self.memory.find_user(addr, len, align).ok_or(MemoryError::Ring { ring, part, addr })
        };
        let parts = RingParts {
            layout,
            place: *place,
            descriptor: find("descriptor table", place.descriptor, layout.descriptor_bytes(), 16)?,
            available: find("available ring", place.available, layout.available_bytes(), 2)?,
            used: find("used ring", place.used, layout.used_bytes(), 4)?,
        };
        self.ground_moves();
        let at = ring as usize;
        let rings = &mut self.memory.view.rings;
        if rings.len() <= at {
            rings.resize(at + 1, None);
        }
        rings[at] = Some(parts);
        self.memory.changes += 1;
        Ok(())
    }

    fn detach(&mut self, ring: u32) {
        self.ground_moves();
        if let Some(parts) = self.memory.view.rings.get_mut(ring as usize) {
            *parts = None;
            self.memory.changes += 1;
        }
    }

    fn faulted(&mut self) -> bool {
        // Every mark is taken, so that one fault is reported once.
        self.memory.view.regions.iter().filter(|region| sigbus::take(region.mapping.watch)).count() > 0
    }

    fn avail_idx(&self, ring: u32) -> u16 {
        self.memory.view.avail_idx(ring)
    }

    fn used_idx(&self, ring: u32) -> u16 {
        let said = self.waits(|store| match store {
            Store::PushUsed { ring: of, index, .. } if *of == ring => Some(index.wrapping_add(1)),
            _ => None,
        });
        said.unwrap_or_else(|| self.memory.view.used_idx(ring))
    }

    fn avail_slot(&self, ring: u32, slot: u16) -> u16 {
        let said = self.waits(|store| match store {
            Store::AvailSlot { ring: of, slot: at, head } if (*of, *at) == (ring, slot) => Some(*head),
            _ => None,
        });
        said.unwrap_or_else(|| self.memory.view.avail_slot(ring, slot))
    }

    fn used_slot(&self, ring: u32, slot: u16) -> UsedElem {
        let layout = RingReader::layout(&self.memory.view, ring);
        let said = self.waits(|store| match store {
            Store::PushUsed { ring: of, index, id, len } if *of == ring => {
                layout.filter(|layout| layout.slot(*index) == slot).map(|_| UsedElem { id: *id, len: *len })
            }
            _ => None,
        });
        said.unwrap_or_else(|| self.memory.view.used_slot(ring, slot))
    }

    fn used_flags(&self, ring: u32) -> u16 {
        let said = self.waits(|store| match store {
            Store::UsedFlags { ring: of, flags } if *of == ring => Some(*flags),
            _ => None,
        });
        said.unwrap_or_else(|| self.memory.view.used_flags(ring))
    }

    fn avail_event(&self, ring: u32) -> u16 {
        let said = self.waits(|store| match store {
            Store::AvailEvent { ring: of, index } if *of == ring => Some(*index),
            _ => None,
        });
        said.unwrap_or_else(|| self.memory.view.avail_event(ring))
    }

    fn descriptor(&self, ring: u32, index: u16) -> Descriptor {
        self.memory.view.descriptor(ring, index)
    }

    fn read_guest(&self, guest_addr: u64, bytes: &mut [u8]) -> bool {
        self.memory.view.read_guest(guest_addr, bytes)
    }

    fn set_avail_slot(&mut self, ring: u32, slot: u16, head: u16) {
        self.store(Store::AvailSlot { ring, slot, head });
    }

    fn set_used_flags(&mut self, ring: u32, flags: u16) {
        self.store(Store::UsedFlags { ring, flags });
    }

    fn set_avail_event(&mut self, ring: u32, index: u16) {
        self.store(Store::AvailEvent { ring, index });
    }

    fn push_used(&mut self, ring: u32, index: u16, entry: UsedElem) {
        self.store(Store::PushUsed { ring, index, id: entry.id, len: entry.len });
    }

    fn read_region(&self, fd: FdSlot, offset: u64, length: u64) -> Option<Vec<u8>> {
        // Read, not mapped: a copy cannot change under the reader.
        let fd = self.fds.get(fd)?;
        let mut bytes = vec![0; usize::try_from(length).ok()?];
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pread(fd, &mut bytes[done..], offset + done as u64) {
                Ok(0) | Err(_) => return None,
                Ok(count) => done += count,
            }
        }
        Some(bytes)
    }

    fn make_private(&mut self) -> Result<FdSlot, MemoryError> {
        let refuse = |error: rustix::io::Errno| MemoryError::Map {
            guest_addr: PRIVATE_ADDR,
            size: PRIVATE_SIZE,
            reason: error.to_string(),
        };
        let fd = rustix::fs::memfd_create("warmswap-private", rustix::fs::MemfdFlags::CLOEXEC).map_err(refuse)?;
        rustix::fs::ftruncate(&fd, PRIVATE_SIZE).map_err(refuse)?;
        Ok(self.fds.insert(fd))
    }

    fn write_private(&mut self, memory: FdSlot, offset: u64, bytes: &[u8]) -> bool {
        let store = Store::Private { memory: memory.0, offset, bytes: bytes.to_vec() };
        match &mut self.waiting {
            Some(waiting) if self.fds.get(memory).is_some() => {
                waiting.push(store);
                true
            }
            Some(_) => false,
            None => self.make(&store),
        }
    }

    fn write_guest(&mut self, guest_addr: u64, bytes: &[u8]) -> bool {
        let store = Store::Guest { guest_addr, bytes: bytes.to_vec() };
        match &mut self.waiting {
            Some(waiting) if self.memory.view.find_guest(guest_addr, bytes.len() as u64).is_some() => {
                waiting.push(store);
                true
            }
            Some(_) => false,
            None => self.make(&store),
        }
    }
}

/// Survives the truncation of a descriptor under a mapping.
mod sigbus {
    use super::{AtomicBool, AtomicUsize, Ordering};

    /// Most mappings of a process.
    const MAPPINGS_MAX: usize = 4096;

    struct Watched {
        start: AtomicUsize,
        len: AtomicUsize,
        /// Size of its pages, a power of two: only whole ones can be replaced.
        page: AtomicUsize,
        faulted: AtomicBool,
        /// The same, never taken.
        spoiled: AtomicBool,
    }

    impl Watched {
        const fn none() -> Self {
            let (start, len, page) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
            Watched { start, len, page, faulted: AtomicBool::new(false), spoiled: AtomicBool::new(false) }
        }
    }

    static WATCHED: [Watched; MAPPINGS_MAX] = [const { Watched::none() }; MAPPINGS_MAX];

    /// Registers a mapping and returns its number.
    pub(super) fn watch(start: usize, len: usize, page: usize) -> Result<usize, String> {
        install();
        for (index, watched) in WATCHED.iter().enumerate() {
            if watched.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                watched.faulted.store(false, Ordering::Relaxed);
                watched.spoiled.store(false, Ordering::Relaxed);
                watched.page.store(page, Ordering::Relaxed);
                watched.len.store(len, Ordering::Release);
                return Ok(index);
            }
        }
        Err(format!("more than {MAPPINGS_MAX} regions are mapped"))
    }

    pub(super) fn unwatch(index: usize) {
        WATCHED[index].len.store(0, Ordering::Release);
        WATCHED[index].start.store(0, Ordering::Release);
    }

    /// Whether the mapping has ever lost a page.
    pub(super) fn has_faulted(index: usize) -> bool {
        WATCHED[index].spoiled.load(Ordering::Acquire)
    }

    /// Whether the mapping lost a page since the last call.
    pub(super) fn take(index: usize) -> bool {
        WATCHED[index].faulted.load(Ordering::Relaxed) && WATCHED[index].faulted.swap(false, Ordering::AcqRel)
    }

    fn install() {
        static INSTALLED: AtomicBool = AtomicBool::new(false);
        if INSTALLED.swap(true, Ordering::AcqRel) {
            return;
        }
        // SAFETY: a zeroed sigaction is valid; the handler only uses atomics and mmap, both async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        }
    }

    extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid siginfo with the faulting address for SIGBUS.
        let at = unsafe { (*info).si_addr() } as usize;
        let hit = WATCHED.iter().find(|watched| {
            let start = watched.start.load(Ordering::Acquire);
            start != 0 && at.wrapping_sub(start) < watched.len.load(Ordering::Acquire)
        });
        // SAFETY: the thread's own errno, which the interrupted code may be about to read.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let kept = unsafe { *errno };
        match hit {
            Some(watched) if replace(at, watched.page.load(Ordering::Acquire)) => {
                watched.faulted.store(true, Ordering::Release);
                watched.spoiled.store(true, Ordering::Release);
            }
            // SAFETY: not ours: back to the default, and the same access ends the process as it should.
            _ => unsafe {
                libc::signal(signal, libc::SIG_DFL);
            },
        }
        // SAFETY: as above.
        unsafe { *errno = kept };
    }

    /// Puts an empty page in the place of one whose memory is gone.
    fn replace(at: usize, page: usize) -> bool {
        let start = at & !(page - 1);
        // SAFETY: the page lies in a mapping of ours, which begins and ends at one of its pages.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        mapped != libc::MAP_FAILED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use std::os::fd::{AsFd, OwnedFd};

    const HUGE: u64 = 2 << 20;

    /// The table of mappings is one for the process: a test that fills it is alone.
    static TABLE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn alone() -> std::sync::MutexGuard<'static, ()> {
        TABLE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn memory(flags: MemfdFlags, size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC | flags).expect("a memfd");
        rustix::fs::ftruncate(&fd, size).expect("a memfd has any size");
        fd
    }

    fn first_and_last(mapping: &Mapping, size: u64) -> [u16; 2] {
        [0, size - 2].map(|at| load_u16(mapping.at(at, 2, 2).expect("inside"), 0, Ordering::Acquire))
    }

    #[test]
    fn pages_that_were_truncated_away_read_as_zero_and_are_reported() {
        let _alone = alone();
        let fd = memory(MemfdFlags::empty(), 8192);
        rustix::io::pwrite(&fd, &[0xff; 8192], 0).expect("room");
        let mapping = Mapping::new(fd.as_fd(), 0, 8192).expect("it can be mapped");
        assert_eq!(first_and_last(&mapping, 8192), [0xffff; 2]);
        assert!(!sigbus::take(mapping.watch));
        rustix::fs::ftruncate(&fd, 4096).expect("it is ours");
        // SAFETY: the thread's own errno, which nothing between here and the check may change.
        unsafe { *libc::__errno_location() = 77 };
        let found = first_and_last(&mapping, 8192);
        // SAFETY: as above.
        assert_eq!(unsafe { *libc::__errno_location() }, 77, "the handler leaves errno alone");
        assert_eq!(found, [0xffff, 0]);
        assert!(sigbus::take(mapping.watch));
        assert!(!sigbus::take(mapping.watch), "once");
    }

    /// Where the system has huge pages to give, this reads memory; where it has none every access is a fault. Both are survived.
    #[test]
    fn huge_pages_that_do_not_exist_read_as_zero() {
        let _alone = alone();
        let fd = memory(MemfdFlags::HUGETLB, 2 * HUGE);
        assert_eq!(page_size(fd.as_fd()), Ok(HUGE as usize));
        // The second page alone, and not to its end.
        let mapping = Mapping::new(fd.as_fd(), HUGE, 8192).expect("it can be mapped");
        assert_eq!(first_and_last(&mapping, 8192), [0; 2]);
        drop(mapping);
        let mapping = Mapping::new(fd.as_fd(), 0, 2 * HUGE).expect("it can be mapped");
        assert_eq!(first_and_last(&mapping, 2 * HUGE), [0; 2]);
        rustix::fs::ftruncate(&fd, 0).expect("it is ours");
        assert_eq!(first_and_last(&mapping, 2 * HUGE), [0; 2]);
        assert!(sigbus::take(mapping.watch));
    }

    fn mapped_ranges() -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("everybody has one");
        maps.lines().filter(|line| line.contains("memfd:watch-table")).count()
    }

    #[test]
    fn a_region_that_cannot_be_watched_is_not_left_mapped() {
        let _alone = alone();
        // Not a page: what lies here is never looked at, for nothing faults in it.
        let full: Vec<usize> = std::iter::from_fn(|| sigbus::watch(1, 0, 4096).ok()).collect();
        let fd = rustix::fs::memfd_create("watch-table", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&fd, 4096).expect("a memfd has any size");
        let refused = Mapping::new(fd.as_fd(), 0, 4096).map(drop);
        full.into_iter().for_each(sigbus::unwatch);
        assert!(refused.expect_err("the table is full").contains("regions are mapped"));
        assert_eq!(mapped_ranges(), 0);
        let mapping = Mapping::new(fd.as_fd(), 0, 4096).expect("the table has room again");
        assert_eq!(mapped_ranges(), 1);
        drop(mapping);
        assert_eq!(mapped_ranges(), 0);
    }
}
