//! One memory for all guests of a cell, and for the limit.
//!
//! How long a transfer of 128 KiB takes depends on how the pages of its buffer happen to lie in the machine: a disk is told of each
//! run of pages by itself. So all of them get their data from and into the same buffers. Each guest has rings of its own.

use std::sync::atomic::Ordering;

use crate::bench::driver::{populate, scatter_buffers};
use crate::common::rng::Rng;
use crate::guest::{GuestMemory, Window};

/// Memory over which the buffers are scattered.
const BUFFERS_BYTES: u64 = 256 << 20;
/// What a guest needs for itself: its rings, and one buffer for each request in flight, which it does not use.
const OWN_BYTES: usize = 16 << 20;
/// Most guests at a time: one for each of QSD's modes, and blk.
const GUESTS_MAX: u64 = 8;

/// The memory.
#[derive(Debug)]
pub(super) struct Memory {
    /// Of guests to come.
    own: Vec<GuestMemory>,
    buffers: Vec<Window>,
}

impl Memory {
    /// Memory with buffers of `bytes`, filled with what cannot be compressed.
    pub(super) fn new(bytes: usize, rng: &mut Rng) -> anyhow::Result<Self> {
        let mut shared = GuestMemory::new(BUFFERS_BYTES + GUESTS_MAX * OWN_BYTES as u64)?;
        populate(&shared)?;
        let own = (0..GUESTS_MAX).map(|_| shared.share(OWN_BYTES)).collect::<anyhow::Result<_>>()?;
        let buffers = scatter_buffers(&mut shared, bytes)?;
        for buffer in &buffers {
            for word in buffer.mapping.words(buffer.start, buffer.length) {
                word.store(rng.next(), Ordering::Relaxed);
            }
        }
        Ok(Memory { own, buffers })
    }

    /// For one more guest.
    pub(super) fn for_guest(&mut self) -> GuestMemory {
        self.own.pop().expect("a cell has no more guests")
    }

    /// The buffers.
    pub(super) fn buffers(&self) -> Vec<Window> {
        self.buffers.clone()
    }
}
