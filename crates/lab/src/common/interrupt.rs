//! Signals that ask an instrument to end: noted, so that the usual way out clears everything up.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Notes SIGINT, SIGTERM and SIGHUP from now on. System calls are restarted.
pub(crate) fn note_signals() {
    let handler: extern "C" fn(libc::c_int) = note;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler does nothing but store into an atomic.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether the instrument was asked to end.
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}
