//! Signals that ask the instrument to end: noted, so that the usual way out clears everything up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Notes SIGINT, SIGTERM and SIGHUP from now on.
pub(super) fn note_signals() {
    let handler: extern "C" fn(libc::c_int) = note;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler does nothing but store into an atomic.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Sleeps. Fails if the instrument was asked to end.
pub(super) fn pause(time: Duration) -> anyhow::Result<()> {
    std::thread::sleep(time);
    ensure!(!ASKED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}
