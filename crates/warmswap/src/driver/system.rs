//! What the control thread asks of the system for itself: signals as a descriptor, promptness, orphans, who a peer is.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::process::{WaitId, WaitIdOptions};

/// Orphans that are collected at once.
const ORPHANS_PER_STEP: usize = 64;

/// Takes SIGTERM, SIGINT, SIGHUP and SIGCHLD over into a descriptor, and becomes the parent of orphaned descendants. Called before any thread is
/// started, for a thread that does not block a signal would take it the old way.
pub(crate) fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: plain calls on local values; the descriptor that signalfd returns is new and owned by nobody else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGHUP);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// What signals have said since they were last taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Said {
    /// The program is asked to end.
    pub(super) end: bool,
    /// The configuration is to be read again, or a terminal is gone.
    pub(super) hangup: bool,
    /// A process has ended.
    pub(super) child: bool,
}

/// Takes the signals that have arrived.
pub(super) fn take_said(signals: &OwnedFd) -> Said {
    let mut said = Said::default();
    // A signal waits at most once, so there are four.
    for _ in 0..4 {
        // A `signalfd_siginfo`, which begins with the number.
        let mut info = [0; 128];
        let Ok(128) = rustix::io::read(signals.as_fd(), &mut info) else { break };
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        match i32::try_from(number) {
            Ok(libc::SIGCHLD) => said.child = true,
            Ok(libc::SIGHUP) => said.hangup = true,
            _ => said.end = true,
        }
    }
    said
}

/// Collects the exits of adopted orphans; true if there may be more. Only on the main thread, which they are given to: what other
/// threads have started, backends above all, stays theirs to collect. What the main thread has started itself would be taken for an
/// orphan, so it must not be called while that has not been collected.
pub(super) fn reap_orphans() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let own = options | WaitIdOptions::from_bits_retain(libc::__WNOTHREAD as u32);
    (0..ORPHANS_PER_STEP).all(|_| matches!(rustix::process::waitid(WaitId::All, own), Ok(Some(_))))
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
