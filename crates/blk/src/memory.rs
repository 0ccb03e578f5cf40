//! Memory shared with the front-end: mappings, and windows into them that cannot be left.
//!
//! Everything that lies here may change at any time. A value is read once for each decision, by one load of its own width.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use warmswap_wire::MemoryRegion;

/// Most regions: as libvhost-user and rust-vmm have them.
pub(crate) const REGIONS_MAX: usize = 509;

/// A file of the front-end, mapped from its first byte on.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is shared with other processes anyway; it is only reached through atomic loads and stores, and by the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of `fd`, rounded up to whole pages of the file.
    pub(crate) fn new(fd: BorrowedFd<'_>, bytes: u64) -> io::Result<Self> {
        let stat = rustix::fs::fstat(fd)?;
        if u64::try_from(stat.st_size).unwrap_or(0) < bytes {
            let text = format!("the file has {} bytes, {bytes} are to be mapped", stat.st_size);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // Files of huge pages are mapped and unmapped by whole pages of theirs.
        let page = u64::try_from(stat.st_blksize).ok().filter(|it| it.is_power_of_two()).unwrap_or(4096).max(4096);
        let whole = bytes.max(1).checked_next_multiple_of(page).and_then(|it| usize::try_from(it).ok());
        let whole = whole.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice, unmapped when this value is dropped.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), whole, protection, flags, fd, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the whole mapping is ours. Guest memory has no place in a core file; that it cannot be kept out is no failure.
        let _kept = unsafe { rustix::mm::madvise(start.as_ptr().cast(), whole, Advice::LinuxDontDump) };
        Ok(Mapping { start, bytes: whole })
    }

    /// A part of it; none if it does not lie wholly inside.
    pub(crate) fn window(self: &Arc<Self>, at: u64, bytes: u64) -> Option<Window> {
        let end = at.checked_add(bytes)?;
        let inside = usize::try_from(end).is_ok_and(|end| end <= self.bytes);
        inside.then(|| Window { mapping: Arc::clone(self), at: at as usize, bytes: bytes as usize })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing can reach into it any more: windows keep it alive.
        let _gone = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A part of a mapping. Offsets are bytes from its start; one beyond its end is a mistake of ours and a panic.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    mapping: Arc<Mapping>,
    at: usize,
    bytes: usize,
}

macro_rules! access {
    ($load:ident, $store:ident, $atomic:ty, $value:ty) => {
        #[inline]
        pub(crate) fn $load(&self, at: u64, order: Ordering) -> $value {
            // SAFETY: `place` has checked that the value lies inside the mapping and is aligned; others may change it at any time, which
            // atomics allow.
            unsafe { <$atomic>::from_ptr(self.place(at, size_of::<$value>()).cast()) }.load(order)
        }

        #[inline]
        pub(crate) fn $store(&self, at: u64, value: $value, order: Ordering) {
            #[cfg(feature = "lab")]
            crate::faults::store();
            // SAFETY: as for loads.
            unsafe { <$atomic>::from_ptr(self.place(at, size_of::<$value>()).cast()) }.store(value, order);
        }
    };
}

#[allow(dead_code, reason = "one pair for each width")]
impl Window {
    access!(load_u8, store_u8, AtomicU8, u8);
    access!(load_u16, store_u16, AtomicU16, u16);
    access!(load_u32, store_u32, AtomicU32, u32);
    access!(load_u64, store_u64, AtomicU64, u64);

    #[inline]
    fn place(&self, at: u64, bytes: usize) -> *mut u8 {
        let at = at as usize;
        assert!(at <= self.bytes && bytes <= self.bytes - at, "offset {at} of {} bytes", self.bytes);
        // SAFETY: inside the mapping, which is longer than the window.
        let place = unsafe { self.mapping.start.as_ptr().add(self.at + at) };
        assert!(place.addr().is_multiple_of(bytes), "offset {at} is not aligned to {bytes}");
        place
    }

    /// Whether its start is aligned.
    pub(crate) fn is_aligned(&self, to: usize) -> bool {
        (self.mapping.start.as_ptr().addr() + self.at).is_multiple_of(to)
    }

    /// Sets bits of a byte, at once for everybody.
    pub(crate) fn set_bits(&self, at: u64, bits: u8) {
        // SAFETY: as for loads.
        unsafe { AtomicU8::from_ptr(self.place(at, 1)) }.fetch_or(bits, Ordering::AcqRel);
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.bytes as u64
    }
}

/// A piece of guest memory that the kernel reads or writes for us: the layout of `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Piece {
    addr: usize,
    /// Bytes.
    pub(crate) len: usize,
}

const _: () =
    assert!(size_of::<Piece>() == size_of::<libc::iovec>() && align_of::<Piece>() == align_of::<libc::iovec>());

impl Piece {
    /// Its address in this process.
    pub(crate) fn as_ptr(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.addr)
    }

    /// Address and length in one number, for questions of alignment.
    pub(crate) fn alignment(self) -> usize {
        self.addr | self.len
    }

    /// Without its first bytes.
    pub(crate) fn skip(self, bytes: usize) -> Piece {
        assert!(bytes <= self.len, "not more than there is");
        Piece { addr: self.addr + bytes, len: self.len - bytes }
    }

    /// Its first bytes.
    pub(crate) fn first(self, bytes: usize) -> Piece {
        assert!(bytes <= self.len, "not more than there is");
        Piece { addr: self.addr, len: bytes }
    }
}

/// Copies the first bytes out of pieces of a living [`MemoryMap`]. Returns how many there were.
pub(crate) fn copy_out(pieces: &[Piece], into: &mut [u8]) -> usize {
    let (mut done, wanted) = (0, into.len());
    for piece in pieces {
        let count = piece.len.min(into.len() - done);
        let into = &mut into[done..done + count];
        // Headers and descriptors are a few aligned words, as a rule.
        if (piece.addr | count).is_multiple_of(8) {
            let words: *mut u64 = std::ptr::with_exposed_provenance_mut(piece.addr);
            for (at, word) in into.chunks_exact_mut(8).enumerate() {
                // SAFETY: pieces come from the map alone, lie inside its mappings, and are used while it lives; this one is aligned.
                let value = unsafe { AtomicU64::from_ptr(words.add(at)) }.load(Ordering::Relaxed);
                word.copy_from_slice(&value.to_ne_bytes());
            }
        } else {
            for (at, byte) in into.iter_mut().enumerate() {
                // SAFETY: as above.
                *byte = unsafe { AtomicU8::from_ptr(piece.as_ptr().add(at)) }.load(Ordering::Relaxed);
            }
        }
        done += count;
        if done == wanted {
            break;
        }
    }
    done
}

/// Copies bytes into pieces of a living [`MemoryMap`]. Returns how many had room.
pub(crate) fn copy_in(pieces: &[Piece], from: &[u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let count = piece.len.min(from.len() - done);
        for (at, byte) in from[done..done + count].iter().enumerate() {
            #[cfg(feature = "lab")]
            crate::faults::store();
            // SAFETY: as in `copy_out`.
            unsafe { AtomicU8::from_ptr(piece.as_ptr().add(at)) }.store(*byte, Ordering::Release);
        }
        done += count;
        if done == from.len() {
            break;
        }
    }
    done
}

/// The guest's memory: a value that is replaced as a whole when it changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryMap {
    regions: Vec<(MemoryRegion, Arc<Mapping>)>,
}

impl MemoryMap {
    /// The map with one region more.
    ///
    /// # Errors
    /// Too many regions, one that overlaps another in the guest, or one that cannot be mapped.
    pub(crate) fn with(&self, region: MemoryRegion, fd: BorrowedFd<'_>) -> Result<Self, String> {
        let what = || format!("region of {} bytes at guest address {:#x}", region.size, region.guest_addr);
        if self.regions.len() >= REGIONS_MAX {
            return Err(format!("{}: more than {REGIONS_MAX} regions", what()));
        }
        let (start, end) = (region.guest_addr, region.guest_addr + region.size);
        let meets = |it: &MemoryRegion| it.guest_addr < end && start < it.guest_addr + it.size;
        if let Some((other, _)) = self.regions.iter().find(|(it, _)| meets(it)) {
            return Err(format!("{}: it overlaps the one at {:#x}", what(), other.guest_addr));
        }
        let bytes = region.mmap_offset + region.size;
        let mapping = Mapping::new(fd, bytes).map_err(|error| format!("{}: {error}", what()))?;
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|(it, _)| it.guest_addr < start);
        regions.insert(at, (region, Arc::new(mapping)));
        Ok(MemoryMap { regions })
    }

    /// The map without a region; none if there is no such one. The offset into its file is not compared: front-ends leave it out.
    pub(crate) fn without(&self, region: &MemoryRegion) -> Option<Self> {
        let same = |it: &MemoryRegion| {
            (it.guest_addr, it.size, it.user_addr) == (region.guest_addr, region.size, region.user_addr)
        };
        let at = self.regions.iter().position(|(it, _)| same(it))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Some(MemoryMap { regions })
    }

    /// A range of the front-end's own address space, as ring addresses are given.
    pub(crate) fn user_window(&self, user_addr: u64, bytes: u64) -> Option<Window> {
        self.regions.iter().find_map(|(region, mapping)| {
            let offset = region.offset_of_user(user_addr, bytes)?;
            mapping.window(region.mmap_offset + offset, bytes)
        })
    }

    /// Appends a range of guest memory to `pieces`, one for each region it lies in. False, and nothing appended, if some of it is no
    /// memory.
    #[inline]
    pub(crate) fn pieces(&self, guest_addr: u64, bytes: u32, pieces: &mut Vec<Piece>) -> bool {
        let before = pieces.len();
        let (mut at, mut left) = (guest_addr, u64::from(bytes));
        while left > 0 {
            let Some((piece, len)) = self.piece(at, left) else {
                pieces.truncate(before);
                return false;
            };
            pieces.push(piece);
            at = at.wrapping_add(len);
            left -= len;
        }
        true
    }

    /// As much of a range as lies in one region.
    #[inline]
    pub(crate) fn piece(&self, guest_addr: u64, bytes: u64) -> Option<(Piece, u64)> {
        let inside = |region: &MemoryRegion| guest_addr.wrapping_sub(region.guest_addr) < region.size;
        let (region, mapping) = self.regions.iter().find(|(region, _)| inside(region))?;
        let offset = guest_addr - region.guest_addr;
        let len = bytes.min(region.size - offset);
        let start = mapping.start.as_ptr().expose_provenance();
        let addr = start + usize::try_from(region.mmap_offset + offset).ok()?;
        Some((Piece { addr, len: usize::try_from(len).ok()? }, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use std::os::fd::{AsFd, OwnedFd};

    fn memory(bytes: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&fd, bytes).expect("a memfd has any size");
        fd
    }

    fn region(guest_addr: u64, size: u64, mmap_offset: u64) -> MemoryRegion {
        MemoryRegion { guest_addr, size, user_addr: guest_addr + 0x10_0000, mmap_offset }
    }

    fn lengths(map: &MemoryMap, at: u64, bytes: u32) -> Option<Vec<usize>> {
        let mut pieces = Vec::new();
        map.pieces(at, bytes, &mut pieces).then(|| pieces.iter().map(|it| it.len).collect())
    }

    #[test]
    fn a_range_may_cross_regions_but_no_hole() {
        let fd = memory(0x3000);
        let map = MemoryMap::default().with(region(0x1000, 0x1000, 0), fd.as_fd()).expect("it fits");
        let map = map.with(region(0x2000, 0x1000, 0x2000), fd.as_fd()).expect("it fits");
        assert_eq!(lengths(&map, 0x1ff0, 0x20), Some(vec![0x10, 0x10]));
        assert_eq!(lengths(&map, 0x2ff0, 0x11), None);
        assert_eq!(lengths(&map, 0xfff, 1), None);
        assert_eq!(lengths(&map, u64::MAX, 2), None);
        assert_eq!(lengths(&map, 0x1000, 0), Some(vec![]));
        let mut pieces = Vec::new();
        assert!(map.pieces(0x1ffe, 4, &mut pieces));
        assert_eq!(copy_in(&pieces, &[1, 2, 3, 4]), 4);
        let mut bytes = [0; 4];
        rustix::io::pread(&fd, &mut bytes[..2], 0xffe).expect("inside");
        rustix::io::pread(&fd, &mut bytes[2..], 0x2000).expect("inside");
        assert_eq!(bytes, [1, 2, 3, 4]);
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let fd = memory(0x2000);
        let map = MemoryMap::default().with(region(0x1000, 0x1000, 0), fd.as_fd()).expect("it fits");
        assert!(map.with(region(0x1800, 0x1000, 0), fd.as_fd()).expect_err("overlap").contains("overlaps"));
        assert!(map.with(region(0x4000, 0x3000, 0), fd.as_fd()).expect_err("beyond the file").contains("bytes"));
        assert!(map.without(&region(0x1000, 0x800, 0)).is_none());
        assert!(map.without(&region(0x1000, 0x1000, 7)).is_some_and(|map| lengths(&map, 0x1000, 1).is_none()));
        assert!(map.user_window(0x10_1800, 0x800).is_some() && map.user_window(0x10_1800, 0x801).is_none());
    }
}
