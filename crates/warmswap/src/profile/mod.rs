//! The profile of a device: what is measured of its backend and its rings, where it goes and what is made of it.
//!
//! ```text
//! control thread ── feed (rings: exact) ──┐
//! guest memory ──── probe (samples) ──────┼─▶ sampler ─▶ historian ─▶ memory, disk, consumer
//! /proc, groups, host, page ──────────────┘
//! ```

pub(crate) mod consumer;
pub(crate) mod feed;
pub(crate) mod group;
pub(crate) mod historian;
pub(crate) mod host;
mod neighbours;
pub(crate) mod page;
pub(crate) mod predictor;
pub(crate) mod prober;
mod process;
mod rings;
pub(crate) mod sampler;
pub(crate) mod snapshots;
pub(crate) mod source;
pub(crate) mod stream;
mod text;
mod threads;
mod windows;
mod writer;

#[cfg(test)]
mod costs;
#[cfg(test)]
mod hostile;

/// Keeps the calling thread to these processors, if any are named. Where that is not allowed it goes on where it is.
fn keep_to(cpus: &[usize]) {
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    if set.count() > 0 {
        let _refused = rustix::thread::sched_setaffinity(None, &set);
    }
}

/// The calling thread runs from now on only where a processor would otherwise have nothing to do, and wakes when it asked to.
fn run_where_nobody_else_does() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters outlive the call, which changes this thread alone.
    let _refused = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    let _refused = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1_000));
}
