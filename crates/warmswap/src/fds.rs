//! The descriptor table: the core and the codec know descriptors only as slots of it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use warmswap_wire::FdSlot;

/// Owned descriptors by slot. Slots are never used twice.
#[derive(Debug, Default)]
pub(crate) struct FdTable {
    fds: HashMap<u32, OwnedFd>,
    next: u32,
}

impl FdTable {
    pub(crate) fn insert(&mut self, fd: OwnedFd) -> FdSlot {
        // Four billion descriptors in one process' life: at a thousand a second, fifty days.
        while self.fds.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let slot = self.next;
        self.next = self.next.wrapping_add(1);
        self.fds.insert(slot, fd);
        FdSlot(slot)
    }

    pub(crate) fn get(&self, slot: FdSlot) -> Option<BorrowedFd<'_>> {
        self.fds.get(&slot.0).map(AsFd::as_fd)
    }

    /// Closes a descriptor. Closing twice, or what was never open, does nothing.
    pub(crate) fn close(&mut self, slot: FdSlot) {
        self.fds.remove(&slot.0);
    }

    pub(crate) fn len(&self) -> usize {
        self.fds.len()
    }
}
