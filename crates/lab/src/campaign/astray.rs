//! Kicks and interrupts that go astray between a guest and its device.

use crate::common::rng::Rng;
use crate::guest::BlkQueue;

/// How many of a thousand do.
#[derive(Debug)]
pub(super) struct Astray {
    chance: Rng,
    /// Kicks.
    pub(super) kicks: u64,
    /// Interrupts.
    pub(super) calls: u64,
}

impl Astray {
    /// None yet.
    pub(super) fn new(chance: Rng) -> Self {
        Astray { chance, kicks: 0, calls: 0 }
    }

    /// Kicks, or loses the kick.
    pub(super) fn kick(&mut self, queue: &mut BlkQueue) {
        if self.chance.below(1_000) < self.kicks {
            // It was due, and went astray.
            let _due = queue.lose_kick();
            return;
        }
        queue.kick();
    }

    /// Whether an interrupt gets through.
    pub(super) fn call_arrives(&mut self) -> bool {
        self.chance.below(1_000) >= self.calls
    }
}
