//! What looks at rings have told, in a ledger's memory: written by the broker that lives, read by the one that follows it.
//! See `warmswap_core::Observer::note` for what stands there.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use warmswap_core::Observer;
use warmswap_wire::RINGS_MAX;

const WORD: usize = size_of::<u64>();
/// Bytes of a ledger that each ring has. What is not written takes no memory.
const STRIDE: u64 = ((Observer::notes_len(1 << 15) * WORD).next_multiple_of(4096)) as u64;
/// Bytes of a ledger that all rings have.
pub(super) const NOTES: u64 = STRIDE * RINGS_MAX as u64;

/// The mapped notes of one ring.
#[derive(Debug)]
struct Ring {
    words: NonNull<AtomicU64>,
    len: usize,
}

impl Ring {
    fn map(file: BorrowedFd<'_>, at: u64, len: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address the kernel chooses; nothing else refers to it.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len * WORD, access, MapFlags::SHARED | MapFlags::NORESERVE, file, at)
        }?;
        let words = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Ring { words, len })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.len, "an observer notes no more than its ring has words");
        // SAFETY: inside the mapping, as was just seen, which lives as long as `self`, and which others may only read and write as words.
        unsafe { self.words.add(at).as_ref() }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length; references into it end with `self`. Failure would only leak it.
        let _unmapped = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), self.len * WORD) };
    }
}

/// The notes of one device's rings, behind what else is in its ledger.
#[derive(Debug)]
pub(crate) struct Notes {
    file: OwnedFd,
    begin: u64,
    rings: Vec<Option<Ring>>,
}

impl Notes {
    /// Notes that begin at this byte of a file.
    pub(super) fn new(file: OwnedFd, begin: u64) -> Self {
        Notes { file, begin, rings: Vec::new() }
    }

    fn ring(&mut self, ring: u32, size: u16) -> Option<&Ring> {
        use std::os::fd::AsFd;
        let (at, len) = (ring as usize, Observer::notes_len(size));
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, || None);
        }
        let known = &mut self.rings[at];
        if known.as_ref().is_none_or(|it| it.len < len) {
            // Without room for its notes a ring is followed all the same.
            *known = Ring::map(self.file.as_fd(), self.begin + STRIDE * u64::from(ring), len).ok();
        }
        known.as_ref()
    }

    /// Writes a word of a ring of that size. What is written before is seen before.
    pub(crate) fn write(&mut self, ring: u32, size: u16, at: usize, word: u64) {
        if let Some(ring) = self.ring(ring, size) {
            ring.word(at).store(word, Ordering::Release);
        }
    }

    /// A word of a ring of that size.
    pub(crate) fn read(&mut self, ring: u32, size: u16, at: usize) -> u64 {
        self.ring(ring, size).map_or(0, |ring| ring.word(at).load(Ordering::Acquire))
    }
}
