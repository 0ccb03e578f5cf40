//! What std and glibc would do behind one's back.

use super::SandboxError;

/// Fails unless the calling thread is the only one of its process. Threads of an io_uring count.
pub(super) fn alone() -> Result<(), SandboxError> {
    let uncounted = |source| SandboxError::Uncounted { source };
    match std::fs::read_dir("/proc/self/task").map_err(uncounted)?.count() {
        1 => Ok(()),
        found => Err(SandboxError::NotAlone { found }),
    }
}

/// Makes std and glibc leave the file system alone from now on. To be called while the calling thread is [`alone`].
///
/// * A panic with `RUST_BACKTRACE` reads the program file for the names of functions. The message comes before, but the
///   panic would end in SIGSYS.
/// * glibc's allocator reads `/proc/sys/vm/overcommit_memory` when it first shrinks an arena that is not the first one.
///   So there is one arena. Small blocks come from the threads' own caches as before.
pub(super) fn keep_away_from_files() {
    for variable in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
        // SAFETY: no other thread can be reading the environment: there is none, as the caller guarantees.
        unsafe { std::env::remove_var(variable) };
    }
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the call takes two numbers and changes only the allocator's own parameters, under its lock.
        let _always_accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}
