//! Eventfds: kicks and calls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// An eventfd. Non-blocking, as libvhost-user makes it for everybody anyway.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, at zero.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(EventFd(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Adds one. A full counter means that it is signalled already.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes what was signalled: whether there was anything.
    pub(crate) fn take(&self) -> bool {
        self.take_count() > 0
    }

    /// Takes what was signalled: how often it was.
    pub(crate) fn take_count(&self) -> u64 {
        let mut count = [0; 8];
        if rustix::io::read(&self.0, &mut count).is_ok() { u64::from_ne_bytes(count) } else { 0 }
    }

    /// Waits until it is signalled, at most `timeout`. Does not take the signal.
    #[allow(dead_code, reason = "part of the interface: instruments with many descriptors poll them together instead")]
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let timeout = Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
