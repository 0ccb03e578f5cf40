//! The backend's mapping of its page. The only file with `unsafe`: it is where memory is shared with other processes.
//!
//! Others can only read it, but at any time, so it is never anything but atomic words.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use crate::layout::{HEADER_WORDS, SECTION_WORDS, WORD, page_bytes};

/// The words of one section.
pub(crate) type Section = [AtomicU64; SECTION_WORDS];

/// A shared mapping of a whole page.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the mapping is memory owned by this value, and it is handed out as atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the page of `queues` queues, which must be allocated as well as sealed against shrinking before
    /// [`Mapping::words`] is called: a word that has no memory behind it would raise SIGBUS.
    pub(crate) fn new(fd: BorrowedFd<'_>, queues: u16) -> io::Result<Self> {
        let bytes = page_bytes(queues);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Populated, because the first update of a queue is as much on the way of a request as any other.
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a fresh mapping at an address the kernel chooses; nothing else refers to it.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) }?;
        let start = NonNull::new(start.cast::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, bytes })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `bytes` bytes are mapped at `start`, aligned to a page, until `self` is dropped. Any bytes are valid
        // atomics, and no reference to them is ever anything else.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes / WORD) }
    }

    /// The words of the header.
    pub(crate) fn header(&self) -> &[AtomicU64] {
        &self.words()[..HEADER_WORDS]
    }

    /// The words of the section of `queue`.
    ///
    /// # Panics
    /// If the page has no such queue.
    #[inline]
    pub(crate) fn section(&self, queue: u16) -> &Section {
        let start = HEADER_WORDS + usize::from(queue) * SECTION_WORDS;
        let words = &self.words()[start..start + SECTION_WORDS];
        words.try_into().expect("the slice has the length of a section")
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and every reference into it borrows from `self`. Failure would only
        // leak it.
        let _unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
