//! The one clock of all time stamps.

/// CLOCK_MONOTONIC in nanoseconds (read through the vDSO: some 25 ns, no system call).
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
