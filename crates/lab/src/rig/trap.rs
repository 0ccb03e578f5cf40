//! What a device finds when it executes a request that is over: a request of its own, whose traces are looked for.

use std::sync::atomic::Ordering;

use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Descriptor};

use super::block;
use crate::guest::{BLOCK, GuestMemory, Window};

/// Offsets in the trap's first page.
const STATUS: usize = 24;
const TABLE: usize = 64;
/// What the status byte holds until the trap springs.
const ARMED: u8 = 0x5a;

/// A complete read request into a page of its own. Heads and tables of completed requests point at it.
#[derive(Debug)]
pub(crate) struct Trap {
    control: Window,
    data: Window,
}

impl Trap {
    /// Sets a trap in guest memory.
    pub(crate) fn new(memory: &mut GuestMemory) -> anyhow::Result<Self> {
        let trap = Trap { control: memory.allocate(0, BLOCK, 4096)?, data: memory.allocate(0, BLOCK, 4096)? };
        // Header: VIRTIO_BLK_T_IN, sector 0.
        trap.control.mapping.words(trap.control.start, 16).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        trap.write_table(&trap.control, TABLE);
        trap.arm();
        Ok(trap)
    }

    fn arm(&self) {
        self.control.mapping.u8(self.control.start + STATUS).store(ARMED, Ordering::Relaxed);
        block::poison(self.data.mapping.words(self.data.start, BLOCK));
    }

    fn entries(&self) -> [Descriptor; 3] {
        let at = |offset: usize| self.control.guest + offset as u64;
        [
            Descriptor { addr: at(0), len: 16, flags: DESC_F_NEXT, next: 1 },
            Descriptor { addr: self.data.guest, len: BLOCK as u32, flags: DESC_F_WRITE | DESC_F_NEXT, next: 2 },
            Descriptor { addr: at(STATUS), len: 1, flags: DESC_F_WRITE, next: 0 },
        ]
    }

    fn write_table(&self, window: &Window, offset: usize) {
        for (index, entry) in self.entries().into_iter().enumerate() {
            window.mapping.write(window.start + offset + index * DESC_SIZE as usize, &entry.to_le_bytes());
        }
    }

    /// Puts the trap into the indirect table of a completed request.
    pub(crate) fn set_in_table(&self, table: &Window) {
        self.write_table(table, 0);
    }

    /// What the head of a completed request holds. Without indirect descriptors one entry cannot hold a request; it holds
    /// an address outside memory then, at which a backend fails loudly.
    pub(crate) fn head(&self, indirect: bool) -> Descriptor {
        if indirect {
            let len = 3 * DESC_SIZE as u32;
            Descriptor { addr: self.control.guest + TABLE as u64, len, flags: DESC_F_INDIRECT, next: 0 }
        } else {
            Descriptor { addr: GuestMemory::unmapped_address(), len: 16, flags: 0, next: 0 }
        }
    }

    /// Whether somebody executed the trap since the last look; arms it again.
    pub(crate) fn has_sprung(&self) -> bool {
        let status = self.control.mapping.u8(self.control.start + STATUS).load(Ordering::Relaxed);
        let sprung = status != ARMED || !block::is_poisoned(self.data.mapping.words(self.data.start, BLOCK));
        if sprung {
            self.arm();
        }
        sprung
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trap_springs_by_status_or_by_data() {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        let trap = Trap::new(&mut memory).expect("room");
        assert!(!trap.has_sprung());
        trap.control.mapping.u8(trap.control.start + STATUS).store(0, Ordering::Relaxed);
        assert!(trap.has_sprung());
        assert!(!trap.has_sprung());
        trap.data.mapping.u64(trap.data.start).store(0, Ordering::Relaxed);
        assert!(trap.has_sprung());
    }
}
