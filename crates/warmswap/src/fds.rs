//! The descriptor table: the core and the codec know descriptors only as slots of it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FileType;
use warmswap_wire::{FdSlot, Request};

/// Owned descriptors by slot. Slots are never used twice.
#[derive(Debug, Default)]
pub(crate) struct FdTable {
    fds: HashMap<u32, OwnedFd>,
    next: u32,
    /// Names of those that lie in the descriptor store as well.
    kept: HashMap<u32, u32>,
}

impl FdTable {
    pub(crate) fn insert(&mut self, fd: OwnedFd) -> FdSlot {
        // Four billion descriptors in one process' life: at a thousand a second, fifty days.
        while self.fds.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let slot = self.next;
        self.next = self.next.wrapping_add(1);
        self.fds.insert(slot, fd);
        FdSlot(slot)
    }

    pub(crate) fn get(&self, slot: FdSlot) -> Option<BorrowedFd<'_>> {
        self.fds.get(&slot.0).map(AsFd::as_fd)
    }

    /// Closes a descriptor. Closing twice, or what was never open, does nothing.
    pub(crate) fn close(&mut self, slot: FdSlot) {
        self.fds.remove(&slot.0);
        self.kept.remove(&slot.0);
    }

    /// Slot and name of every descriptor; those that have no name yet are given one by `put`. Sorted by slot.
    pub(crate) fn keep(
        &mut self,
        put: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<u32>,
    ) -> io::Result<Vec<(u32, u32)>> {
        for (slot, fd) in &self.fds {
            if !self.kept.contains_key(slot) {
                self.kept.insert(*slot, put(fd.as_fd())?);
            }
        }
        let mut names: Vec<(u32, u32)> = self.kept.iter().map(|(slot, name)| (*slot, *name)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Closes every descriptor but some.
    pub(crate) fn retain(&mut self, keep: impl Fn(FdSlot) -> bool) {
        self.fds.retain(|slot, _| keep(FdSlot(*slot)));
        self.kept.retain(|slot, _| keep(FdSlot(*slot)));
    }

    /// The slot that is given next.
    pub(crate) fn next_slot(&self) -> u32 {
        self.next
    }

    /// A table that goes on where another one ended: slot, name, descriptor.
    pub(crate) fn resume(next: u32, kept: Vec<(u32, u32, OwnedFd)>) -> Self {
        let names = kept.iter().map(|(slot, name, _)| (*slot, *name)).collect();
        FdTable { fds: kept.into_iter().map(|(slot, _, fd)| (slot, fd)).collect(), next, kept: names }
    }

    pub(crate) fn len(&self) -> usize {
        self.fds.len()
    }

    /// Refuses a request of the VMM whose descriptors are not what the message is for, in words. `vmm` is our end of its connection.
    ///
    /// Notifications are written by the control thread, which must not wait: only of an eventfd it can be told beforehand whether a
    /// write would. And a socket that is kept here might be the VMM's own end, whose death would then never be seen.
    pub(crate) fn check(&self, request: &Request, vmm: BorrowedFd<'_>) -> Result<(), String> {
        let (slot, fits, expected): (_, fn(_, _) -> bool, _) = match request {
            Request::SetVringKick(ring) | Request::SetVringCall(ring) | Request::SetVringErr(ring) => {
                (ring.fd, |fd, _| is_eventfd(fd), "an eventfd")
            }
            Request::SetLogFd(fd) => (Some(*fd), |fd, _| is_eventfd(fd), "an eventfd"),
            Request::SetLogBase { fd, .. } => (*fd, |fd, _| is_file(fd), "a file that can be mapped"),
            Request::SetBackendReqFd(fd) => (Some(*fd), is_other_stream, "a stream socket that does not lead here"),
            _ => return Ok(()),
        };
        match slot.and_then(|slot| self.get(slot)) {
            Some(fd) if !fits(fd, vmm) => {
                let name = request.code().name();
                Err(format!("the descriptor of {name} is {}, expected {expected}", describe(fd)))
            }
            _ => Ok(()),
        }
    }

    /// Writes an eventfd once, unless its counter is full: then it is signalled already, and a write could wait.
    ///
    /// Between the look and the write whoever shares the eventfd can fill it. A VMM that does so with a blocking eventfd stops the
    /// control thread until it reads it: its own device, and no other.
    pub(crate) fn signal(&self, slot: FdSlot) {
        let Some(fd) = self.get(slot) else { return };
        let mut room = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if matches!(rustix::event::poll(&mut room, Some(&at_once)), Ok(1)) && room[0].revents().contains(PollFlags::OUT)
        {
            // What cannot be written now was filled in this very moment.
            let _full = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }
}

/// What the kernel calls the file behind a descriptor.
fn describe(fd: BorrowedFd<'_>) -> String {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or_else(|error| format!("unknown ({error})"), |link| link.display().to_string())
}

fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    describe(fd) == "anon_inode:[eventfd]"
}

fn is_file(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}

/// Whether a descriptor is a stream socket, and not the peer of `ours`, which would have the address that `ours` was reached at.
fn is_other_stream(fd: BorrowedFd<'_>, ours: BorrowedFd<'_>) -> bool {
    let stream = rustix::net::sockopt::socket_type(fd).is_ok_and(|kind| kind == rustix::net::SocketType::STREAM);
    let (peer, reached) = (rustix::net::getpeername(fd), rustix::net::getsockname(ours));
    stream && !matches!((peer, reached), (Ok(Some(peer)), Ok(reached)) if peer == reached)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::EventfdFlags;
    use std::os::unix::net::{UnixListener, UnixStream};
    use warmswap_wire::{LogRegion, VringFd};

    #[test]
    fn a_full_eventfd_that_blocks_is_not_waited_for() {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd that blocks");
        let mut fds = FdTable::default();
        rustix::io::write(&event, &(u64::MAX - 2).to_ne_bytes()).expect("it has room");
        let slot = fds.insert(event);
        fds.signal(slot);
        // The last one that fits. The next would wait for ever.
        fds.signal(slot);
        let mut count = [0; 8];
        rustix::io::read(fds.get(slot).expect("kept"), &mut count).expect("it is full");
        assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1);
    }

    #[test]
    fn descriptors_that_are_not_what_the_message_is_for_are_refused_in_words() {
        let path = std::env::temp_dir().join(format!("ws-fds-{}.sock", std::process::id()));
        let _stale = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let vmm_end = UnixStream::connect(&path).expect("it listens");
        let (ours, _) = listener.accept().expect("it connects");
        std::fs::remove_file(&path).expect("it is there");
        let (channel, _other) = UnixStream::pair().expect("a pair");
        let (pipe, _writer) = rustix::pipe::pipe().expect("a pipe");
        let memory = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");

        let mut fds = FdTable::default();
        let [vmm_end, channel] = [vmm_end, channel].map(|socket| fds.insert(socket.into()));
        let [pipe, memory, event] = [pipe, memory, event].map(|fd| fds.insert(fd));
        let check = |request: &Request| fds.check(request, ours.as_fd());
        let ring = |fd| VringFd { index: 0, fd: Some(fd) };
        let log = |fd| Request::SetLogBase { region: LogRegion { size: 4096, offset: 0 }, fd: Some(fd) };
        for wrong in [vmm_end, channel, pipe, memory] {
            for request in [
                Request::SetVringKick(ring(wrong)),
                Request::SetVringCall(ring(wrong)),
                Request::SetVringErr(ring(wrong)),
                Request::SetLogFd(wrong),
            ] {
                let said = check(&request).expect_err("it is no eventfd");
                assert!(said.contains(request.code().name()) && said.contains("expected an eventfd"), "{said}");
            }
        }
        for wrong in [vmm_end, channel, pipe, event] {
            assert!(check(&log(wrong)).is_err());
        }
        for wrong in [vmm_end, pipe, memory, event] {
            assert!(check(&Request::SetBackendReqFd(wrong)).is_err());
        }
        for right in [
            Request::SetVringCall(ring(event)),
            Request::SetVringKick(VringFd { index: 0, fd: None }),
            log(memory),
            Request::SetBackendReqFd(channel),
        ] {
            assert_eq!(check(&right), Ok(()), "{right:?}");
        }
    }
}
