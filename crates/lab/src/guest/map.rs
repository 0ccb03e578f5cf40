//! Memory shared with another process, seen as atomics. The only `unsafe` of the guest.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping of a descriptor. The other side may change any byte at any time, so every access is atomic.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is plain memory that stays mapped until drop, and every access goes through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `fd` from `offset` on, readable and writable, without reserving swap.
    pub(crate) fn new(fd: impl AsFd, offset: u64, length: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset,
            )?
        };
        let start = NonNull::new(start.cast()).expect("mmap never succeeds with address zero");
        Ok(Mapping { start, length })
    }

    /// Address of the first byte: the "user address" of the front-end.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Checks that a `T` lies at `offset`, and returns its address.
    fn at<T>(&self, offset: usize) -> *mut T {
        let end = offset.checked_add(size_of::<T>());
        assert!(end.is_some_and(|end| end <= self.length), "offset {offset:#x} is outside the mapping");
        assert!(offset.is_multiple_of(align_of::<T>()), "offset {offset:#x} is not aligned");
        // SAFETY: `offset` plus the size of T is inside the mapping (checked above).
        unsafe { self.start.as_ptr().add(offset).cast::<T>() }
    }

    /// The byte at `offset`.
    pub(crate) fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `at` checked bounds and alignment; the mapping lives as long as `self`.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    /// The two bytes at `offset`.
    pub(crate) fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `at` checked bounds and alignment; the mapping lives as long as `self`.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    /// The four bytes at `offset`.
    pub(crate) fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `at` checked bounds and alignment; the mapping lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    /// The eight bytes at `offset`.
    pub(crate) fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: `at` checked bounds and alignment; the mapping lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    /// The words of `length` bytes at `offset`, both multiples of eight.
    pub(crate) fn words(&self, offset: usize, length: usize) -> &[AtomicU64] {
        assert!(length.is_multiple_of(8), "{length} bytes are not whole words");
        if length == 0 {
            return &[];
        }
        self.u64(offset + length - 8);
        let first: *mut AtomicU64 = self.at(offset);
        // SAFETY: the first and the last word are inside the mapping and aligned (checked above), and so is all between.
        unsafe { std::slice::from_raw_parts(first, length / 8) }
    }

    /// Copies bytes in, one by one. For small control structures; data goes by words.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.u8(offset + index).store(*byte, Ordering::Relaxed);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping `new` made, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Mapping {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&fd, 4096).expect("ftruncate");
        Mapping::new(&fd, 0, 4096).expect("mmap")
    }

    #[test]
    fn widths_see_the_same_memory() {
        let page = page();
        page.u64(8).store(0x0807_0605_0403_0201, Ordering::Relaxed);
        assert_eq!(page.u16(10).load(Ordering::Relaxed), 0x0403);
        assert_eq!(page.words(0, 16)[1].load(Ordering::Relaxed), 0x0807_0605_0403_0201);
    }

    #[test]
    #[should_panic(expected = "outside the mapping")]
    fn the_end_is_checked() {
        page().u16(4096);
    }

    #[test]
    #[should_panic(expected = "not aligned")]
    fn alignment_is_checked() {
        page().u32(6);
    }
}
