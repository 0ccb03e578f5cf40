//! How fast rings go: whether the broker could have followed them.

use std::collections::VecDeque;

use warmswap_core::Nanos;

use crate::world::World;

/// What is known of one ring's pace.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When each of the last entries of the available ring, and of the used ring, was published.
    times: [VecDeque<Nanos>; 2],
    /// More went by than the broker can be expected to follow.
    pub(crate) fast: bool,
}

impl World<'_> {
    /// The driver, or a device, has published so many entries.
    pub(crate) fn note_pace(&mut self, ring: u16, device: bool, entries: u16) {
        let size = self.options.ring_size;
        // The broker looks at least once while half of the ring passes at 100,000 requests a second, give or take a third, and not
        // more often than `observe_min`; and it may wake late.
        let reach = usize::from(size - (size / 4).max(1));
        let half = Nanos(u64::from(size) * 5_000);
        let limits = &self.options.limits;
        let period = half.clamp(limits.observe_min, limits.observe_max);
        // What a thread does before it was kept from its processor is told only afterwards.
        let preempted = if self.options.preempted { 1_600_000 } else { 0 };
        let window = Nanos(period.0 * 3 / 2 + 60_000 + preempted);
        let now = self.now;
        let pace = &mut self.paces[usize::from(ring)];
        let times = &mut pace.times[usize::from(device)];
        times.extend((0..entries).map(|_| now));
        while times.len() > reach {
            if let Some(first) = times.pop_front() {
                pace.fast |= now.since(first) < window;
            }
        }
    }

    pub(crate) fn forget_pace(&mut self, ring: u16) {
        self.paces[usize::from(ring)].fast = false;
    }

    /// Whether some ring went faster than the broker can be expected to follow.
    pub(crate) fn pace_was_fast(&self) -> bool {
        self.paces.iter().any(|pace| pace.fast)
    }
}
