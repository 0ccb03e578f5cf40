//! The driver half of a split ring, as Linux' `drivers/virtio/virtio_ring.c` behaves.

use std::sync::atomic::{Ordering, fence};

use warmswap_wire::ring::{
    self, AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, Descriptor, Layout, USED_F_NO_NOTIFY, crosses_event,
};

use super::memory::Window;

/// A completed head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// Head of the chain.
    pub(crate) head: u16,
    /// Bytes the device says it wrote.
    pub(crate) len: u32,
}

/// What the device did wrong with the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VringFault {
    /// A used id that is not the head of an outstanding chain: completed twice, or invented. The entry is skipped.
    NotOutstanding {
        /// The id found.
        id: u32,
        /// Index of the used entry.
        used_idx: u16,
    },
    /// `used.idx` ran further than there are outstanding chains, or backwards.
    UsedIndex {
        /// `used.idx` as found.
        found: u16,
        /// Entries taken so far.
        taken: u16,
        /// Chains outstanding.
        outstanding: u16,
    },
}

/// A split ring, driver side. Heads are recycled last-in first-out, as Linux does.
#[derive(Debug)]
pub(crate) struct Vring {
    window: Window,
    layout: Layout,
    available: usize,
    used: usize,
    event_idx: bool,
    /// Free list through `next`; private, for the device can write the table.
    next: Vec<u16>,
    free_head: u16,
    free: u16,
    /// Descriptors of the chain by head; zero where the head is not outstanding.
    chain: Vec<u16>,
    outstanding: u16,
    available_idx: u16,
    /// Entries published since the last decision about a kick.
    added: u16,
    taken: u16,
    calls_disabled: bool,
}

impl Vring {
    /// Bytes a ring of `size` entries needs; its window must be aligned to 4096 (any alignment of 16 would do).
    pub(crate) fn bytes(layout: Layout) -> usize {
        let used = (layout.descriptor_bytes() + layout.available_bytes()).next_multiple_of(4096);
        usize::try_from(used + layout.used_bytes()).expect("a ring is less than a megabyte")
    }

    /// A ring in `window`, reset to start at `start`.
    pub(crate) fn new(window: Window, layout: Layout, event_idx: bool, start: u16) -> Self {
        let size = usize::from(layout.size());
        let available = usize::try_from(layout.descriptor_bytes()).expect("fits");
        let used = usize::try_from((layout.descriptor_bytes() + layout.available_bytes()).next_multiple_of(4096))
            .expect("fits");
        let mut vring = Vring {
            window,
            layout,
            available,
            used,
            event_idx,
            next: vec![0; size],
            free_head: 0,
            free: 0,
            chain: vec![0; size],
            outstanding: 0,
            available_idx: 0,
            added: 0,
            taken: 0,
            calls_disabled: false,
        };
        vring.reset(event_idx, start);
        vring
    }

    /// Makes the ring new, as a driver does after a device reset: all entries zero, both indices at `start`.
    pub(crate) fn reset(&mut self, event_idx: bool, start: u16) {
        let size = self.layout.size();
        let window = &self.window;
        for word in window.mapping.words(window.start, window.length & !7) {
            word.store(0, Ordering::Relaxed);
        }
        self.event_idx = event_idx;
        for (index, next) in self.next.iter_mut().enumerate() {
            *next = (index + 1) as u16;
        }
        self.chain.fill(0);
        (self.free_head, self.free, self.outstanding) = (0, size, 0);
        (self.available_idx, self.added, self.taken, self.calls_disabled) = (start, 0, start, false);
        self.store(self.used + ring::IDX as usize, start);
        self.store(self.used + self.layout.avail_event() as usize, start);
        self.store(self.available + self.layout.used_event() as usize, start);
        self.window
            .mapping
            .u16(self.window.start + self.available + ring::IDX as usize)
            .store(start, Ordering::Release);
    }

    fn store(&self, offset: usize, value: u16) {
        self.window.mapping.u16(self.window.start + offset).store(value, Ordering::Relaxed);
    }

    fn load(&self, offset: usize, order: Ordering) -> u16 {
        self.window.mapping.u16(self.window.start + offset).load(order)
    }

    /// Number of entries.
    pub(crate) fn size(&self) -> u16 {
        self.layout.size()
    }

    /// Addresses in this process: descriptor table, available ring, used ring.
    pub(crate) fn user_addresses(&self) -> (u64, u64, u64) {
        let user = self.window.user();
        (user, user + self.available as u64, user + self.used as u64)
    }

    /// Guest-physical address of the used ring.
    pub(crate) fn used_guest(&self) -> u64 {
        self.window.guest + self.used as u64
    }

    /// Descriptors not in use.
    #[cfg(test)]
    pub(crate) fn free_descriptors(&self) -> u16 {
        self.free
    }

    /// Chains the device has not given back.
    pub(crate) fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Whether `head` is outstanding.
    pub(crate) fn is_outstanding(&self, head: u16) -> bool {
        self.chain.get(usize::from(head)).is_some_and(|length| *length > 0)
    }

    /// `avail.idx`.
    pub(crate) fn available_idx(&self) -> u16 {
        self.available_idx
    }

    /// `used.idx` as the device last wrote it.
    pub(crate) fn used_idx(&self) -> u16 {
        self.load(self.used + ring::IDX as usize, Ordering::Acquire)
    }

    /// `used.idx` up to which entries were taken.
    pub(crate) fn taken_idx(&self) -> u16 {
        self.taken
    }

    /// Requests the device holds at this very instant: `avail.idx - used.idx`.
    pub(crate) fn held_by_device(&self) -> u16 {
        self.available_idx.wrapping_sub(self.used_idx())
    }

    /// Writes a chain and publishes it. `None` where the table has too few free entries; nothing was changed then.
    ///
    /// `descriptors` come with their WRITE flags; NEXT is ours.
    pub(crate) fn add(&mut self, descriptors: &[Descriptor]) -> Option<u16> {
        let count = u16::try_from(descriptors.len()).ok()?;
        if count == 0 || self.free < count {
            return None;
        }
        let head = self.free_head;
        let mut at = head;
        for (index, descriptor) in descriptors.iter().enumerate() {
            let next = self.next[usize::from(at)];
            let more = index + 1 < descriptors.len();
            let flags = descriptor.flags & !DESC_F_NEXT | if more { DESC_F_NEXT } else { 0 };
            self.write_descriptor(at, Descriptor { flags, next: if more { next } else { 0 }, ..*descriptor });
            at = next;
        }
        self.free_head = at;
        self.free -= count;
        self.publish(head, count);
        Some(head)
    }

    /// Publishes an indirect table of `entries` descriptors at `guest`.
    pub(crate) fn add_indirect(&mut self, guest: u64, entries: u16) -> Option<u16> {
        let len = u32::from(entries) * ring::DESC_SIZE as u32;
        self.add(&[Descriptor { addr: guest, len, flags: DESC_F_INDIRECT, next: 0 }])
    }

    fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        let at = self.window.start + usize::from(index) * ring::DESC_SIZE as usize;
        let bytes = descriptor.to_le_bytes();
        let word = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().expect("eight bytes"));
        self.window.mapping.u64(at).store(word(0), Ordering::Relaxed);
        self.window.mapping.u64(at + 8).store(word(8), Ordering::Relaxed);
    }

    fn publish(&mut self, head: u16, count: u16) {
        self.chain[usize::from(head)] = count;
        self.outstanding += 1;
        let slot = self.layout.slot(self.available_idx);
        self.store(self.available + self.layout.available_slot(slot) as usize, head);
        self.available_idx = self.available_idx.wrapping_add(1);
        self.added = self.added.wrapping_add(1);
        // Release: the descriptors and the slot are visible before the index that names them.
        let idx = self.window.start + self.available + ring::IDX as usize;
        self.window.mapping.u16(idx).store(self.available_idx, Ordering::Release);
    }

    /// Whether the device wants a kick for what was published since the last call.
    pub(crate) fn needs_kick(&mut self) -> bool {
        if self.added == 0 {
            return false;
        }
        // The index must be visible before the device's wish is read, or both sides wait for the other.
        fence(Ordering::SeqCst);
        let (new, old) = (self.available_idx, self.available_idx.wrapping_sub(self.added));
        self.added = 0;
        if self.event_idx {
            let event = self.load(self.used + self.layout.avail_event() as usize, Ordering::Relaxed);
            crosses_event(event, new, old)
        } else {
            self.load(self.used + ring::FLAGS as usize, Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
        }
    }

    /// Takes the next used entry.
    pub(crate) fn pop(&mut self) -> Result<Option<Used>, VringFault> {
        // Acquire: the entry, and the data the device wrote, are read after the index.
        let found = self.used_idx();
        if found == self.taken {
            return Ok(None);
        }
        if found.wrapping_sub(self.taken) > self.outstanding {
            return Err(VringFault::UsedIndex { found, taken: self.taken, outstanding: self.outstanding });
        }
        let slot = self.layout.slot(self.taken);
        let at = self.window.start + self.used + self.layout.used_slot(slot) as usize;
        let id = self.window.mapping.u32(at).load(Ordering::Relaxed);
        let len = self.window.mapping.u32(at + 4).load(Ordering::Relaxed);
        let used_idx = self.taken;
        self.taken = self.taken.wrapping_add(1);
        if self.event_idx && !self.calls_disabled {
            self.ask_for_call_at(self.taken);
        }
        let head = u16::try_from(id).ok().filter(|head| self.is_outstanding(*head));
        let Some(head) = head else { return Err(VringFault::NotOutstanding { id, used_idx }) };
        self.release(head);
        Ok(Some(Used { head, len }))
    }

    /// Gives the descriptors of a chain back to the free list.
    fn release(&mut self, head: u16) {
        let count = std::mem::take(&mut self.chain[usize::from(head)]);
        let mut last = head;
        for _ in 1..count {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += count;
        self.outstanding -= 1;
    }

    /// Overwrites the free entry `head` (just released), so that a device that executes it again runs into it.
    pub(crate) fn poison(&self, head: u16, descriptor: Descriptor) {
        debug_assert!(!self.is_outstanding(head), "only free entries may be poisoned");
        self.write_descriptor(head, descriptor);
    }

    /// Asks the device not to call. A hint: it may call all the same.
    pub(crate) fn disable_calls(&mut self) {
        if self.calls_disabled {
            return;
        }
        self.calls_disabled = true;
        if self.event_idx {
            // Linux: "a hack": the far side of the index space, where used.idx will not be for a while.
            self.store(self.available + self.layout.used_event() as usize, self.taken.wrapping_sub(0x8000));
        } else {
            self.store(self.available + ring::FLAGS as usize, AVAIL_F_NO_INTERRUPT);
        }
    }

    /// Asks for a call on the next completion. False: there is one already, go on popping.
    pub(crate) fn enable_calls(&mut self) -> bool {
        self.calls_disabled = false;
        if self.event_idx {
            self.ask_for_call_at(self.taken);
        } else {
            self.store(self.available + ring::FLAGS as usize, 0);
            fence(Ordering::SeqCst);
        }
        self.used_idx() == self.taken
    }

    fn ask_for_call_at(&self, index: u16) {
        self.store(self.available + self.layout.used_event() as usize, index);
        // The wish must be visible before used.idx is read again, or the last completion stays unseen.
        fence(Ordering::SeqCst);
    }

    /// The ring as numbers, for reports of failures.
    pub(crate) fn describe(&self) -> String {
        let read = |offset: usize| self.load(offset, Ordering::Relaxed);
        format!(
            "size {} avail.idx {} (shared {}) used.idx {} taken {} outstanding {} avail.flags {} used.flags {} used_event {} avail_event {}",
            self.size(),
            self.available_idx,
            read(self.available + ring::IDX as usize),
            self.used_idx(),
            self.taken,
            self.outstanding,
            read(self.available + ring::FLAGS as usize),
            read(self.used + ring::FLAGS as usize),
            read(self.available + self.layout.used_event() as usize),
            read(self.used + self.layout.avail_event() as usize),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::GuestMemory;
    use super::*;

    /// The device half, as simple as it can be.
    struct Device<'a>(&'a Vring);

    impl Device<'_> {
        fn use_head(&self, used_idx: u16, id: u32, len: u32) {
            let vring = self.0;
            let slot = vring.layout.slot(used_idx);
            let at = vring.window.start + vring.used + vring.layout.used_slot(slot) as usize;
            vring.window.mapping.u32(at).store(id, Ordering::Relaxed);
            vring.window.mapping.u32(at + 4).store(len, Ordering::Relaxed);
            let idx = vring.window.start + vring.used + ring::IDX as usize;
            vring.window.mapping.u16(idx).store(used_idx.wrapping_add(1), Ordering::Release);
        }

        fn set_avail_event(&self, value: u16) {
            self.0.store(self.0.used + self.0.layout.avail_event() as usize, value);
        }

        fn used_event(&self) -> u16 {
            self.0.load(self.0.available + self.0.layout.used_event() as usize, Ordering::Relaxed)
        }
    }

    fn vring(size: u16, event_idx: bool, start: u16) -> Vring {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        let layout = Layout::new(size).expect("power of two");
        let window = memory.allocate(0, Vring::bytes(layout), 4096).expect("fits");
        Vring::new(window, layout, event_idx, start)
    }

    fn chain(length: usize) -> Vec<Descriptor> {
        (0..length).map(|index| Descriptor { addr: index as u64, len: 1, flags: 0, next: 0 }).collect()
    }

    #[test]
    fn heads_go_round_across_the_wrap() {
        let mut vring = vring(4, true, 65534);
        for step in 0..10_u16 {
            let head = vring.add(&chain(2)).expect("room");
            Device(&vring).use_head(65534_u16.wrapping_add(step), head.into(), 7);
            assert_eq!(vring.pop(), Ok(Some(Used { head, len: 7 })));
            assert_eq!(vring.pop(), Ok(None));
        }
        assert_eq!((vring.available_idx(), vring.free_descriptors(), vring.outstanding()), (8, 4, 0));
    }

    #[test]
    fn a_full_table_refuses_and_stays_whole() {
        let mut vring = vring(4, false, 0);
        assert_eq!(vring.add(&chain(3)), Some(0));
        assert_eq!(vring.add(&chain(2)), None);
        assert_eq!(vring.add(&chain(1)), Some(3));
        assert_eq!(vring.add(&chain(1)), None);
    }

    #[test]
    fn completing_twice_is_a_fault() {
        let mut vring = vring(4, false, 0);
        let (first, second) = (vring.add(&chain(1)).expect("room"), vring.add(&chain(1)).expect("room"));
        Device(&vring).use_head(0, first.into(), 0);
        Device(&vring).use_head(1, first.into(), 0);
        assert_eq!(vring.pop(), Ok(Some(Used { head: first, len: 0 })));
        assert_eq!(vring.pop(), Err(VringFault::NotOutstanding { id: first.into(), used_idx: 1 }));
        assert!(vring.is_outstanding(second));
        Device(&vring).use_head(8, 0, 0);
        assert!(matches!(vring.pop(), Err(VringFault::UsedIndex { .. })));
    }

    #[test]
    fn kicks_follow_avail_event() {
        let mut vring = vring(8, true, 0);
        vring.add(&chain(1));
        assert!(vring.needs_kick(), "the first entry crosses event 0");
        assert!(!vring.needs_kick(), "nothing new");
        vring.add(&chain(1));
        assert!(!vring.needs_kick(), "event 0 is behind");
        Device(&vring).set_avail_event(3);
        vring.add(&chain(1));
        assert!(!vring.needs_kick());
        vring.add(&chain(1));
        assert!(vring.needs_kick());
    }

    #[test]
    fn calls_are_asked_for_at_the_next_entry() {
        let mut vring = vring(8, true, 65535);
        let head = vring.add(&chain(1)).expect("room");
        assert_eq!(Device(&vring).used_event(), 65535);
        vring.disable_calls();
        Device(&vring).use_head(65535, head.into(), 0);
        assert!(!vring.enable_calls(), "an entry is waiting");
        assert!(vring.pop().is_ok_and(|used| used.is_some()));
        assert!(vring.enable_calls());
        assert_eq!(Device(&vring).used_event(), 0);
    }
}
