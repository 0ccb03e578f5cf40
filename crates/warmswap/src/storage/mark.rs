//! A lock of our own on somebody else's open file description.
//!
//! A lock of the open-file-description kind (`F_OFD_SETLK`) belongs to the description, not to a process: it lives until the last
//! reference to the description is gone, and I/O in flight holds one. So the broker borrows a backend's descriptor for a moment,
//! locks one byte far beyond any content, a different byte for each description, and gives the descriptor back. Whether that byte
//! is still locked, asked through a description of the broker's own, tells exactly whether that description is still open.
//! One such question costs about a microsecond; `/proc/locks` would cost milliseconds and could not tell who holds what.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI64, Ordering};

/// First byte used for marks: beyond the size of any file or device.
const FIRST_BYTE: i64 = 1 << 61;
/// Marks of one broker lie apart from those of another by this much.
const BROKER_BITS: u32 = 28;

/// A mark on one description.
#[derive(Debug)]
pub(crate) struct Mark {
    /// What the description is open on.
    pub(crate) path: String,
    byte: i64,
    /// The broker's own description of the same file, to ask through.
    probe: OwnedFd,
}

impl Mark {
    /// Marks the description behind `borrowed`, which is descriptor `fd` of process `pid`.
    pub(crate) fn set(borrowed: BorrowedFd<'_>, pid: u32, fd: RawFd, path: &str) -> io::Result<Self> {
        static NEXT: AtomicI64 = AtomicI64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed) & ((1 << BROKER_BITS) - 1);
        let byte = FIRST_BYTE + (i64::from(std::process::id()) << BROKER_BITS) + number;
        let link = format!("/proc/{pid}/fd/{fd}");
        let probe = std::fs::File::options().read(true).open(link)?;
        let probe = OwnedFd::from(probe);
        // A description that may only be written cannot be given a read lock.
        let kinds = [libc::F_RDLCK, libc::F_WRLCK];
        let locked = kinds.iter().any(|kind| lock(borrowed, libc::F_OFD_SETLK, *kind, byte).is_ok());
        let mark = Mark { path: path.to_owned(), byte, probe };
        if locked && mark.is_held()? {
            Ok(mark)
        } else {
            Err(io::Error::other("its open file description takes no lock"))
        }
    }

    /// Whether the marked description is still open somewhere.
    pub(crate) fn is_held(&self) -> io::Result<bool> {
        Ok(lock(self.probe.as_fd(), libc::F_OFD_GETLK, libc::F_WRLCK, self.byte)? != libc::F_UNLCK)
    }

    /// Whether `borrowed` is the marked description: its own lock is no obstacle to it.
    pub(crate) fn is_on(&self, borrowed: BorrowedFd<'_>) -> bool {
        let own = lock(borrowed, libc::F_OFD_GETLK, libc::F_WRLCK, self.byte);
        own.is_ok_and(|kind| kind == libc::F_UNLCK) && self.is_held().unwrap_or(false)
    }
}

/// Asks for or about a lock on one byte. Returns the kind of lock that the kernel put into the structure.
fn lock(fd: BorrowedFd<'_>, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<libc::c_int> {
    // SAFETY: zero is valid for every field of this plain structure.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    range.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    range.l_start = byte;
    range.l_len = 1;
    // SAFETY: the descriptor is open and the structure outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut range) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(libc::c_int::from(range.l_type)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> std::fs::File {
        let path = std::env::temp_dir().join(format!(
            "warmswap-mark-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.expect("a temporary file");
        std::fs::remove_file(path).expect("the file is there");
        file
    }

    fn mark(file: &std::fs::File) -> Mark {
        let copy = file.try_clone().expect("a copy of the descriptor");
        Mark::set(copy.as_fd(), std::process::id(), file.as_raw_fd(), "test").expect("an ordinary file takes a mark")
    }

    #[test]
    fn a_mark_lasts_as_long_as_any_copy_of_the_description() {
        let file = file();
        let mark = mark(&file);
        let copy = file.try_clone().expect("a copy of the descriptor");
        drop(file);
        assert!(mark.is_held().expect("asked"), "the copy is still open");
        drop(copy);
        assert!(!mark.is_held().expect("asked"), "nobody holds it any more");
    }

    #[test]
    fn marks_tell_descriptions_of_one_file_apart() {
        let first = file();
        let path = format!("/proc/self/fd/{}", first.as_raw_fd());
        let second = std::fs::File::options().read(true).write(true).open(path).expect("open again");
        let (on_first, on_second) = (mark(&first), mark(&second));
        assert!(on_first.is_on(first.as_fd()) && !on_first.is_on(second.as_fd()));
        drop(first);
        assert_eq!((on_first.is_held().ok(), on_second.is_held().ok()), (Some(false), Some(true)));
    }
}
