//! What the control thread asks of the system for itself: signals as a descriptor, promptness, orphans, who a peer is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Takes SIGTERM and SIGINT over into a descriptor, and becomes the parent of orphaned descendants. Called before any thread is
/// started, for a thread that does not block a signal would take it the old way.
pub(crate) fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: plain calls on local values; the descriptor that signalfd returns is new and owned by nobody else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Whether a signal has arrived.
pub(super) fn signal_waits(signals: &OwnedFd) -> bool {
    let mut info = [0; 128];
    matches!(rustix::io::read(signals.as_fd(), &mut info), Ok(count) if count > 0)
}

/// The process that connected to a socket of ours; none if it lives where processes have numbers of their own.
pub(super) fn peer_pid(socket: &OwnedFd) -> Option<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("twelve bytes");
    // SAFETY: the kernel writes at most `len` bytes into `peer`, which is that long and of plain integers: unlike a process id in a
    // type of its own it may be zero.
    let result = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut peer).cast(), &raw mut len)
    };
    u32::try_from(peer.pid).ok().filter(|pid| result == 0 && *pid != 0)
}

/// Asks to be woken on time: a control thread that waits behind the load it watches would lose sight of the rings. It runs for a
/// few microseconds at a time; without the privilege it runs as everybody else does.
pub(super) fn be_prompt() {
    // SAFETY: plain calls without pointers that outlive them.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_000);
        let lowest = libc::sched_param { sched_priority: 1 };
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const lowest);
    }
}
