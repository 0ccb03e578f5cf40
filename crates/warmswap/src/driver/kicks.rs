//! Seeing the kicks of others without taking them away.
//!
//! A backend reads its kick descriptor, which resets it. `epoll` looks at a descriptor once more before it tells of it, so a kick that the
//! backend has read by then is never told. A one-shot poll of an io_uring keeps what woke it (`io_poll_wake` stores the mask), so no kick
//! is missed, however fast the backend is. This is one of the few files with `unsafe`: entries go into a ring shared with the kernel.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};

/// Watches that may be asked for between two submissions; each is submitted at once.
const ENTRIES: u32 = 64;
/// What a removal completes with; no token has this value.
const REMOVED: u64 = u64::MAX;

/// One-shot watches.
pub(super) struct Kicks {
    ring: IoUring,
}

impl std::fmt::Debug for Kicks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kicks").finish_non_exhaustive()
    }
}

impl Kicks {
    /// None where io_uring is forbidden or absent.
    pub(super) fn new() -> Option<Self> {
        IoUring::new(ENTRIES).ok().map(|ring| Kicks { ring })
    }

    /// The descriptor that is readable when a kick was seen.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the ring, which is borrowed as long.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Tells once, with `token`, when `fd` is signalled. The kernel keeps the file until then, or until [`Kicks::remove`].
    pub(super) fn add(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let events = u32::try_from(libc::POLLIN).expect("a small constant");
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).build().user_data(token);
        self.submit(&entry)
    }

    /// Ends the watch with this token. What it has seen already is still told.
    pub(super) fn remove(&mut self, token: u64) {
        // Without room for it the watch tells once more than is wanted, which its receiver bears.
        let _full = self.submit(&opcode::PollRemove::new(token).build().user_data(REMOVED));
    }

    fn submit(&mut self, entry: &io_uring::squeue::Entry) -> io::Result<()> {
        // SAFETY: a poll entry names no memory, and its descriptor is open now: it is submitted before this returns.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        self.ring.submit().map(drop)
    }

    /// Takes what was seen.
    pub(super) fn take(&mut self, mut seen: impl FnMut(u64)) {
        for completion in self.ring.completion() {
            if completion.user_data() != REMOVED && completion.result() > 0 {
                seen(completion.user_data());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

    #[test]
    fn a_kick_is_seen_although_it_was_read_before() {
        let Some(mut kicks) = Kicks::new() else { return };
        let kick = eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd");
        for round in 1..100_u64 {
            kicks.add(kick.as_fd(), round).expect("room for one");
            rustix::io::write(&kick, &1_u64.to_ne_bytes()).expect("room for a kick");
            let mut value = [0; 8];
            rustix::io::read(&kick, &mut value).expect("what was just written");
            let mut fds = [PollFd::from_borrowed_fd(kicks.as_fd(), PollFlags::IN)];
            let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
            while let Err(rustix::io::Errno::INTR) = poll(&mut fds, Some(&timeout)) {}
            let mut seen = Vec::new();
            kicks.take(|token| seen.push(token));
            assert_eq!(seen, [round]);
        }
    }

    #[test]
    fn a_watch_that_was_ended_tells_nothing() {
        let Some(mut kicks) = Kicks::new() else { return };
        let kick = eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd");
        kicks.add(kick.as_fd(), 7).expect("room for one");
        kicks.remove(7);
        rustix::io::write(&kick, &1_u64.to_ne_bytes()).expect("room for a kick");
        let mut seen = Vec::new();
        kicks.take(|token| seen.push(token));
        assert!(seen.is_empty(), "{seen:?}");
    }
}
