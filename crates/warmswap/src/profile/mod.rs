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
pub(crate) mod page;
pub(crate) mod process;
mod rings;
pub(crate) mod sampler;
pub(crate) mod source;
pub(crate) mod stream;
mod text;
mod threads;

#[cfg(test)]
mod costs;

/// Keeps the calling thread to these processors, if any are named. Where that is not allowed it goes on where it is.
fn keep_to(cpus: &[usize]) {
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    if set.count() > 0 {
        let _refused = rustix::thread::sched_setaffinity(None, &set);
    }
}
