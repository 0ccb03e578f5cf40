//! Any guest memory, changing at will: observing never panics, and what the observer calls exact has the right count.

use std::cell::Cell;

use warmswap_core::{GuestMemory, MemoryError, Nanos, Observer, RingPlace};
use warmswap_wire::ring::{Descriptor, Layout, UsedElem};
use warmswap_wire::{FdSlot, LogRegion, MemoryRegion};

/// Every read takes the next bytes, so nothing reads the same twice.
struct Hostile<'a> {
    bytes: &'a [u8],
    at: Cell<usize>,
}

impl Hostile<'_> {
    fn next(&self) -> u16 {
        let at = self.at.get();
        self.at.set(at + 2);
        let byte = |at: usize| self.bytes.get(at).copied().unwrap_or(0);
        u16::from_le_bytes([byte(at), byte(at + 1)])
    }
}

/// Ring size and start come first, then what is read.
pub(crate) fn run(data: &[u8]) {
    let Some(([size, low, high], bytes)) = data.split_first_chunk::<3>() else { return };
    // Seldom a large one: it takes hundreds of times as long, and has nothing that a small one has not.
    let power = if *size < 250 { size % 8 } else { 8 + size % 8 };
    let layout = Layout::new(1 << power).expect("a power of two");
    let mut memory = Hostile { bytes, at: Cell::new(0) };
    let mut observer = Observer::new(layout, u16::from_le_bytes([*low, *high]), Nanos(0));
    let mut now = Nanos(0);
    while memory.at.get() < bytes.len() {
        now = now + Nanos(u64::from(memory.next()) * 2_000);
        observer.observe(now, 0, &mut memory);
        if let Ok(heads) = observer.survivors() {
            assert!(heads.iter().all(|head| *head < layout.size()));
            assert!(heads.len() <= usize::from(layout.size()));
        }
    }
}

impl GuestMemory for Hostile<'_> {
    fn map(&mut self, _region: &MemoryRegion, _fd: FdSlot) -> Result<(), MemoryError> {
        Ok(())
    }
    fn unmap(&mut self, _guest_addr: u64) {}
    fn set_log(&mut self, _log: Option<(LogRegion, FdSlot)>) -> Result<(), MemoryError> {
        Ok(())
    }
    fn attach(&mut self, _ring: u32, _place: &RingPlace) -> Result<(), MemoryError> {
        Ok(())
    }
    fn detach(&mut self, _ring: u32) {}
    fn faulted(&mut self) -> bool {
        self.next() == 77
    }
    fn avail_idx(&self, _ring: u32) -> u16 {
        self.next()
    }
    fn used_idx(&self, _ring: u32) -> u16 {
        self.next()
    }
    fn avail_slot(&self, _ring: u32, _slot: u16) -> u16 {
        self.next()
    }
    fn used_slot(&self, _ring: u32, _slot: u16) -> UsedElem {
        UsedElem { id: u32::from(self.next()), len: 0 }
    }
    fn used_flags(&self, _ring: u32) -> u16 {
        self.next()
    }
    fn avail_event(&self, _ring: u32) -> u16 {
        self.next()
    }
    fn descriptor(&self, _ring: u32, _index: u16) -> Descriptor {
        Descriptor { addr: 0, len: 0, flags: 0, next: 0 }
    }
    fn read_guest(&self, _guest_addr: u64, _bytes: &mut [u8]) -> bool {
        false
    }
    fn set_avail_slot(&mut self, _ring: u32, _slot: u16, _head: u16) {}
    fn set_used_flags(&mut self, _ring: u32, _flags: u16) {}
    fn set_avail_event(&mut self, _ring: u32, _index: u16) {}
    fn push_used(&mut self, _ring: u32, _index: u16, _entry: UsedElem) {}
    fn read_region(&self, _fd: FdSlot, _offset: u64, _length: u64) -> Option<Vec<u8>> {
        None
    }
    fn make_private(&mut self) -> Result<FdSlot, MemoryError> {
        Err(MemoryError::Log { reason: "there is none".to_owned() })
    }
    fn write_private(&mut self, _memory: FdSlot, _offset: u64, _bytes: &[u8]) -> bool {
        false
    }
    fn write_guest(&mut self, _guest_addr: u64, _bytes: &[u8]) -> bool {
        false
    }
}
