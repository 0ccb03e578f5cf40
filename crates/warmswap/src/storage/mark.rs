//! A lock of our own on somebody else's open file description.
//!
//! A lock of the open-file-description kind (`F_OFD_SETLK`) belongs to the description, not to a process: it lives until the last
//! reference to the description is gone, and I/O in flight holds one. So the broker borrows a backend's descriptor for a moment,
//! locks one byte far beyond any content, a different byte for each description, and gives the descriptor back. Whether that byte
//! is still locked, asked through a description of the broker's own, tells exactly whether that description is still open.
//! One such question costs about a microsecond; `/proc/locks` would cost milliseconds and could not tell who holds what.
//!
//! Through the same description of its own the broker *claims* what its backends write: one more byte, one for each broker, locked
//! for as long as the broker lives. Another broker's claim on the same file means two guards on one image.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::driver::MarkRecord;

/// First byte used for marks: beyond the size of any file or device.
const FIRST_BYTE: i64 = 1 << 61;
/// Marks of one broker lie apart from those of another by this much.
const BROKER_BITS: u32 = 28;
/// First byte used for claims, beyond all marks.
const FIRST_CLAIM: i64 = 1 << 62;
/// Bits of a process id, and bits that tell process namespaces apart: two containers may each have a broker of the same id.
const PID_BITS: u32 = 22;
const NAMESPACE_BITS: u32 = 10;

/// A mark on one description.
#[derive(Debug)]
pub(crate) struct Mark {
    /// What the description is open on.
    pub(crate) path: String,
    byte: i64,
    /// The broker's own description of the same file, to ask through.
    probe: OwnedFd,
    /// It is claimed through that.
    claimed: std::cell::Cell<bool>,
}

impl Mark {
    /// Marks the description behind `borrowed`.
    pub(crate) fn set(borrowed: BorrowedFd<'_>, path: &str) -> io::Result<Self> {
        static NEXT: AtomicI64 = AtomicI64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed) & ((1 << BROKER_BITS) - 1);
        let byte = FIRST_BYTE + (identity() << BROKER_BITS) + number;
        let link = format!("/proc/self/fd/{}", borrowed.as_raw_fd());
        let probe = std::fs::File::options().read(true).open(link)?;
        let probe = OwnedFd::from(probe);
        // A description that may only be written cannot be given a read lock.
        let kinds = [libc::F_RDLCK, libc::F_WRLCK];
        let locked = kinds.iter().any(|kind| lock(borrowed, libc::F_OFD_SETLK, *kind, byte).is_ok());
        let mark = Mark { path: path.to_owned(), byte, probe, claimed: std::cell::Cell::new(false) };
        if locked && mark.is_held()? {
            Ok(mark)
        } else {
            Err(io::Error::other("its open file description takes no lock"))
        }
    }

    /// The mark as the next broker has to know it.
    pub(crate) fn record(&self) -> Option<MarkRecord> {
        let stat = rustix::fs::fstat(&self.probe).ok()?;
        let (device, inode, claimed) = (stat.st_dev, stat.st_ino, self.claimed.get());
        Some(MarkRecord { path: self.path.clone(), device, inode, byte: self.byte, claimed })
    }

    /// A mark that a broker before this one has set.
    ///
    /// # Errors
    /// The file does not lie at its path any more, or cannot be opened.
    pub(crate) fn recall(record: &MarkRecord) -> io::Result<Self> {
        let probe = OwnedFd::from(std::fs::File::options().read(true).open(&record.path)?);
        let stat = rustix::fs::fstat(&probe)?;
        if (stat.st_dev, stat.st_ino) != (record.device, record.inode) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "another file lies there now"));
        }
        let claimed = std::cell::Cell::new(false);
        let mark = Mark { path: record.path.clone(), byte: record.byte, probe, claimed };
        if record.claimed {
            // Whoever else claims it was there before; this broker goes on with what was allowed.
            let _rival = mark.claim()?;
        }
        Ok(mark)
    }

    /// Takes the mark off again.
    pub(crate) fn lift(self, borrowed: BorrowedFd<'_>) {
        // Closed in the meantime: then it is gone anyway.
        let _gone = lock(borrowed, libc::F_OFD_SETLK, libc::F_UNLCK, self.byte);
    }

    /// The same mark, to ask for it elsewhere.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let claimed = self.claimed.clone();
        Ok(Mark { path: self.path.clone(), byte: self.byte, probe: self.probe.try_clone()?, claimed })
    }

    /// The same file, through the broker's own description. Its claim lives as long, so it is to be closed soon.
    pub(crate) fn file(&self) -> Option<OwnedFd> {
        self.probe.try_clone().ok()
    }

    /// Whether the marked description is still open somewhere.
    pub(crate) fn is_held(&self) -> io::Result<bool> {
        Ok(lock(self.probe.as_fd(), libc::F_OFD_GETLK, libc::F_WRLCK, self.byte)? != libc::F_UNLCK)
    }

    /// Whether `borrowed` is the marked description: its own lock is no obstacle to it.
    pub(crate) fn is_on(&self, borrowed: BorrowedFd<'_>) -> bool {
        self.is_on_fd(borrowed.as_raw_fd())
    }

    fn is_on_fd(&self, fd: RawFd) -> bool {
        let own = lock_range(fd, libc::F_OFD_GETLK, libc::F_WRLCK, self.byte, 1);
        own.is_ok_and(|range| libc::c_int::from(range.l_type) == libc::F_UNLCK) && self.is_held().unwrap_or(false)
    }

    /// Whether the broker itself has the marked description, besides `borrowed`: then it is the VMM's (guest memory in a file), or
    /// was inherited from whoever started the broker. It is not closed by the backend's end.
    pub(crate) fn is_shared_with_us(&self, borrowed: BorrowedFd<'_>) -> bool {
        let Ok(here) = rustix::fs::fstat(&self.probe) else { return false };
        let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return false };
        let fds = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
        let others = fds.filter(|fd| *fd != borrowed.as_raw_fd() && *fd != self.probe.as_raw_fd());
        let same_file = |fd: &RawFd| {
            rustix::fs::stat(format!("/proc/self/fd/{fd}"))
                .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (here.st_dev, here.st_ino))
        };
        others.filter(same_file).any(|fd| self.is_on_fd(fd))
    }

    /// Claims the file for this broker, and says who else claims it.
    pub(crate) fn claim(&self) -> io::Result<Option<Rival>> {
        let ours = FIRST_CLAIM + identity();
        let end = FIRST_CLAIM + (1 << (PID_BITS + NAMESPACE_BITS));
        lock(self.probe.as_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, ours)?;
        self.claimed.set(true);
        for (from, to) in [(FIRST_CLAIM, ours), (ours + 1, end)] {
            if from == to {
                continue;
            }
            let found = lock_range(self.probe.as_raw_fd(), libc::F_OFD_GETLK, libc::F_WRLCK, from, to - from)?;
            if libc::c_int::from(found.l_type) != libc::F_UNLCK {
                return Ok(Some(Rival(found.l_start - FIRST_CLAIM)));
            }
        }
        Ok(None)
    }
}

/// Another broker that claims the same file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rival(i64);

impl std::fmt::Display for Rival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pid = self.0 & ((1 << PID_BITS) - 1);
        if self.0 >> PID_BITS == identity() >> PID_BITS {
            write!(f, "another warmswap, pid {pid}")
        } else {
            write!(f, "another warmswap, pid {pid} in another process namespace")
        }
    }
}

/// What tells this broker from others on the same host.
fn identity() -> i64 {
    static IDENTITY: OnceLock<i64> = OnceLock::new();
    *IDENTITY.get_or_init(|| {
        use std::os::unix::fs::MetadataExt;
        let namespace = std::fs::metadata("/proc/self/ns/pid").map_or(0, |it| it.ino()) & ((1 << NAMESPACE_BITS) - 1);
        let pid = u64::from(std::process::id()) & ((1 << PID_BITS) - 1);
        i64::try_from(namespace << PID_BITS | pid).expect("32 bits")
    })
}

/// Asks for or about a lock on one byte. Returns the kind of lock that the kernel put into the structure.
fn lock(fd: BorrowedFd<'_>, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<libc::c_int> {
    lock_range(fd.as_raw_fd(), command, kind, byte, 1).map(|range| libc::c_int::from(range.l_type))
}

/// Asks for or about a lock on a range.
fn lock_range(fd: RawFd, command: libc::c_int, kind: libc::c_int, start: i64, bytes: i64) -> io::Result<libc::flock> {
    // SAFETY: zero is valid for every field of this plain structure.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    range.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    range.l_start = start;
    range.l_len = bytes;
    // SAFETY: the structure outlives the call, which fails on a descriptor that is not open.
    let result = unsafe { libc::fcntl(fd, command, &raw mut range) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(range) }
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
        Mark::set(copy.as_fd(), "test").expect("an ordinary file takes a mark")
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

    #[test]
    fn a_description_the_broker_has_itself_is_known() {
        let file = file();
        let copy = file.try_clone().expect("a copy of the descriptor");
        let mark = Mark::set(copy.as_fd(), "test").expect("an ordinary file takes a mark");
        assert!(mark.is_shared_with_us(copy.as_fd()), "through the first descriptor");
        drop(file);
        assert!(!mark.is_shared_with_us(copy.as_fd()), "only the borrowed copy is left");
    }

    #[test]
    fn the_claim_of_another_broker_is_found_and_goes_with_it() {
        let image = file();
        let mark = mark(&image);
        assert!(mark.claim().expect("asked").is_none());
        for other in [1, (1 << (PID_BITS + NAMESPACE_BITS)) - 1] {
            let path = format!("/proc/self/fd/{}", image.as_raw_fd());
            let theirs = std::fs::File::open(path).expect("open again");
            lock(theirs.as_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, FIRST_CLAIM + other).expect("a lock");
            let rival = mark.claim().expect("asked").expect("there is another claim");
            assert_eq!(rival.0, other);
            drop(theirs);
            assert!(mark.claim().expect("asked").is_none(), "it went with its owner");
        }
    }
}
