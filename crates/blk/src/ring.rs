//! The device's side of a split ring (virtio 1.3 §2.7).

use std::sync::atomic::{Ordering, fence};

use warmswap_wire::VringAddr;
use warmswap_wire::ring::{AVAIL_F_NO_INTERRUPT, FLAGS, IDX, Layout, USED_F_NO_NOTIFY, crosses_event};

use crate::memory::{MemoryMap, Window};

/// `VHOST_VRING_F_LOG`: writes to the used ring go to the dirty log.
const F_LOG: u32 = 1;

/// What no driver does. The ring is served no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error("avail.idx is {avail_idx}, {taken} were taken, and the ring has {size} entries")]
    AvailIdx { avail_idx: u16, taken: u16, size: u16 },
    #[error("slot {slot} of the available ring names head {head}, and the ring has {size} entries")]
    Head { slot: u16, head: u16, size: u16 },
    #[error("head {head} was submitted while it is in flight")]
    InFlight { head: u16 },
    #[error("the request at head {head} has no place for its status: {reason}")]
    NoStatus { head: u16, reason: crate::chain::Malformed },
}

/// Where a ring lies.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    layout: Layout,
    pub(crate) descriptors: Window,
    available: Window,
    used: Window,
    /// Guest address of the used ring, where writes to it are logged.
    log: Option<u64>,
}

impl Place {
    /// Finds a ring in the guest's memory.
    ///
    /// # Errors
    /// Parts that do not lie in the memory, or are not aligned as the specification wants them.
    pub(crate) fn find(memory: &MemoryMap, size: u16, addr: &VringAddr) -> Result<Self, String> {
        let layout = Layout::new(size).ok_or_else(|| format!("its size {size} is no power of two"))?;
        let part = |name: &str, at: u64, bytes: u64, align: usize| {
            let window = memory.user_window(at, bytes).ok_or_else(|| {
                format!(
                    "its {name} at {at:#x} does not lie in the memory that was shared; is the guest's RAM shared \
                         (QEMU: memory-backend-memfd,share=on)?"
                )
            })?;
            if window.is_aligned(align) {
                Ok(window)
            } else {
                Err(format!("its {name} at {at:#x} is not aligned to {align} bytes"))
            }
        };
        Ok(Place {
            layout,
            descriptors: part("descriptor table", addr.descriptor, layout.descriptor_bytes(), 16)?,
            available: part("available ring", addr.available, layout.available_bytes(), 2)?,
            used: part("used ring", addr.used, layout.used_bytes(), 4)?,
            log: (addr.flags & F_LOG != 0).then_some(addr.log),
        })
    }

    /// Guest address and length of the used ring, where writes to it are logged.
    pub(crate) fn logged(&self) -> Option<(u64, u64)> {
        self.log.map(|at| (at, self.used.len()))
    }

    /// Number of entries.
    pub(crate) fn size(&self) -> u16 {
        self.layout.size()
    }

    /// `used.idx`.
    pub(crate) fn used_idx(&self) -> u16 {
        self.used.load_u16(IDX, Ordering::Acquire)
    }

    pub(crate) fn avail_idx(&self) -> u16 {
        self.available.load_u16(IDX, Ordering::Acquire)
    }
}

/// A ring that is served: where it lies and where we are in it.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) place: Place,
    event_idx: bool,
    /// Next index of the available ring to take.
    taken: u16,
    /// What `used.idx` will be when everything written is published.
    used: u16,
    /// `used.idx` when the driver was last looked at for whether it wants a call; none: it is called in any case.
    called: Option<u16>,
    /// The driver was asked for kicks.
    armed: bool,
}

impl Ring {
    /// Begins at `used`, which is `used.idx` as it was read once, taking from `next_available` on. Kicks are not asked for yet.
    pub(crate) fn new(place: Place, event_idx: bool, next_available: u16, used: u16) -> Self {
        let mut ring = Ring { place, event_idx, taken: next_available, used, called: None, armed: true };
        // What the last back-end left here may say anything.
        ring.disarm();
        ring
    }

    /// Next index of the available ring to take.
    pub(crate) fn taken(&self) -> u16 {
        self.taken
    }

    /// Whether there is something to take.
    #[inline]
    pub(crate) fn has_pending(&self) -> bool {
        self.place.avail_idx() != self.taken
    }

    /// Number of requests that wait to be taken.
    #[inline]
    pub(crate) fn pending(&self) -> Result<u16, Broken> {
        let (avail_idx, size) = (self.place.avail_idx(), self.place.size());
        match avail_idx.wrapping_sub(self.taken) {
            count if count > size => Err(Broken::AvailIdx { avail_idx, taken: self.taken, size }),
            count => Ok(count),
        }
    }

    /// Takes the next head. Only after [`Ring::pending`] has said that there is one.
    #[inline]
    pub(crate) fn take(&mut self) -> Result<u16, Broken> {
        let (slot, size) = (self.place.layout.slot(self.taken), self.place.size());
        let head = self.place.available.load_u16(self.place.layout.available_slot(slot), Ordering::Relaxed);
        if head >= size {
            return Err(Broken::Head { slot, head, size });
        }
        self.taken = self.taken.wrapping_add(1);
        Ok(head)
    }

    /// Writes a completion behind those that are published.
    #[inline]
    pub(crate) fn write_used(&mut self, head: u16, bytes: u32) {
        let slot = self.place.layout.used_slot(self.place.layout.slot(self.used));
        self.place.used.store_u32(slot, u32::from(head), Ordering::Relaxed);
        self.place.used.store_u32(slot + 4, bytes, Ordering::Relaxed);
        self.used = self.used.wrapping_add(1);
    }

    /// What `used.idx` becomes with the next publication.
    pub(crate) fn unpublished(&self) -> u16 {
        self.used
    }

    /// Stores `used.idx`.
    #[inline]
    pub(crate) fn publish(&self, used_idx: u16) {
        self.place.used.store_u16(IDX, used_idx, Ordering::Release);
    }

    /// Whether the driver wants a call for what was published since it was last asked (virtio 1.3 §2.7.7.2, §2.7.10).
    #[inline]
    pub(crate) fn wants_call(&mut self) -> bool {
        // The index must be visible before the driver's wish is read: it looks again after it has changed that.
        fence(Ordering::SeqCst);
        let old = self.called.replace(self.used);
        if self.event_idx {
            let event = self.place.available.load_u16(self.place.layout.used_event(), Ordering::Relaxed);
            old.is_none_or(|old| crosses_event(event, self.used, old))
        } else {
            self.place.available.load_u16(FLAGS, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks for kicks. True if something has come meanwhile, for which there may be none.
    #[inline]
    pub(crate) fn arm(&mut self) -> bool {
        if !self.armed {
            self.armed = true;
            if !self.event_idx {
                self.place.used.store_u16(FLAGS, 0, Ordering::Relaxed);
            }
        }
        if self.event_idx {
            self.place.used.store_u16(self.place.layout.avail_event(), self.taken, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read: the driver reads it after it has changed the index.
        fence(Ordering::SeqCst);
        self.has_pending()
    }

    /// Kicks are not needed: the ring is looked at anyway. With event indices the last wish just ages.
    #[inline]
    pub(crate) fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            if !self.event_idx {
                self.place.used.store_u16(FLAGS, USED_F_NO_NOTIFY, Ordering::Relaxed);
            }
        }
    }

    /// Leaves the ring as a driver expects it of nobody: it may kick.
    pub(crate) fn leave(&mut self) {
        self.arm();
    }

    /// The ring lies elsewhere now.
    pub(crate) fn move_to(&mut self, place: Place) {
        self.place = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{AVAILABLE, END, Guest, REGION, USED, USER, addr};

    const SIZE: u16 = 8;

    /// A ring of eight whose indices are both `at`.
    fn ring(guest: &Guest, at: u16, event_idx: bool) -> Ring {
        guest.put_u16(AVAILABLE + IDX, at);
        guest.put_u16(USED + IDX, at);
        Ring::new(guest.place(SIZE), event_idx, at, at)
    }

    fn submit(guest: &Guest, at: u16, heads: &[u16]) {
        for (index, head) in heads.iter().enumerate() {
            let slot = at.wrapping_add(index as u16) % SIZE;
            guest.put_u16(AVAILABLE + 4 + 2 * u64::from(slot), *head);
        }
        guest.put_u16(AVAILABLE + IDX, at.wrapping_add(heads.len() as u16));
    }

    fn complete(ring: &mut Ring, heads: &[u16]) {
        heads.iter().for_each(|head| ring.write_used(*head, 512 + u32::from(*head)));
        ring.publish(ring.unpublished());
    }

    fn used_flags(guest: &Guest) -> u16 {
        guest.u16(USED)
    }

    #[test]
    fn indices_run_over_their_end_and_slots_over_theirs() {
        for at in [0, 3, 65_530, 65_533, 65_535] {
            let guest = Guest::new();
            let mut ring = ring(&guest, at, false);
            assert_eq!((ring.pending(), ring.has_pending()), (Ok(0), false));
            submit(&guest, at, &[5, 0, 7, 2, 1]);
            assert_eq!((ring.pending(), ring.has_pending()), (Ok(5), true));
            assert_eq!([(); 5].map(|()| ring.take()), [5, 0, 7, 2, 1].map(Ok), "from {at}");
            assert_eq!((ring.pending(), ring.taken()), (Ok(0), at.wrapping_add(5)));
            complete(&mut ring, &[7, 5]);
            complete(&mut ring, &[1]);
            assert_eq!(guest.u16(USED + IDX), at.wrapping_add(3));
            for (index, head) in [7, 5, 1].into_iter().enumerate() {
                let slot = u64::from(at.wrapping_add(index as u16) % SIZE);
                let entry = [guest.get::<4>(USED + 4 + 8 * slot), guest.get(USED + 8 + 8 * slot)];
                assert_eq!(entry.map(u32::from_le_bytes), [head, 512 + head], "from {at}");
            }
        }
    }

    #[test]
    fn what_no_driver_does_breaks_the_ring() {
        let guest = Guest::new();
        let mut ring = ring(&guest, 65_535, false);
        let broken = |avail_idx| Err(Broken::AvailIdx { avail_idx, taken: 65_535, size: SIZE });
        for (avail_idx, expected) in
            [(65_535, Ok(0)), (7, Ok(8)), (8, broken(8)), (65_534, broken(65_534)), (32_767, broken(32_767))]
        {
            guest.put_u16(AVAILABLE + IDX, avail_idx);
            assert_eq!(ring.pending(), expected);
        }
        submit(&guest, 65_535, &[8]);
        assert_eq!(ring.take(), Err(Broken::Head { slot: 7, head: 8, size: SIZE }));
        assert_eq!(ring.taken(), 65_535, "it was not taken");
        submit(&guest, 65_535, &[7]);
        assert_eq!(ring.take(), Ok(7));
    }

    #[test]
    fn flags_ask_for_kicks_before_a_sleep_alone() {
        let guest = Guest::new();
        let mut ring = ring(&guest, 0, false);
        assert_eq!(used_flags(&guest), USED_F_NO_NOTIFY, "a ring that is looked at needs none");
        assert!(!ring.arm());
        assert_eq!(used_flags(&guest), 0);
        submit(&guest, 0, &[1]);
        assert!(ring.arm(), "it has come before the wish was visible");
        ring.disarm();
        assert_eq!(used_flags(&guest), USED_F_NO_NOTIFY);
        // What is as it should be is not written again: the line is the driver's as well.
        guest.put_u16(USED, 0xff);
        ring.disarm();
        assert_eq!(used_flags(&guest), 0xff);
        ring.leave();
        assert_eq!(used_flags(&guest), 0, "whoever comes next may sleep at once");
    }

    #[test]
    fn event_indices_ask_for_kicks_from_where_the_ring_is() {
        let guest = Guest::new();
        let avail_event = USED + 4 + 8 * u64::from(SIZE);
        guest.put_u16(USED, 0xff);
        let mut ring = ring(&guest, 65_535, true);
        assert!(!ring.arm());
        assert_eq!(guest.u16(avail_event), 65_535);
        submit(&guest, 65_535, &[3, 4]);
        assert!(ring.arm());
        ring.disarm();
        assert_eq!(guest.u16(avail_event), 65_535, "the last wish just ages");
        assert_eq!([ring.take(), ring.take()], [Ok(3), Ok(4)]);
        assert!(!ring.arm());
        assert_eq!(guest.u16(avail_event), 1);
        assert_eq!(used_flags(&guest), 0xff, "flags mean nothing with event indices");
    }

    #[test]
    fn a_driver_is_called_when_an_index_passes_the_one_it_named() {
        let guest = Guest::new();
        let used_event = AVAILABLE + 4 + 2 * u64::from(SIZE);
        let mut ring = ring(&guest, 65_533, true);
        let mut wants = |heads: &[u16], event: u16| {
            guest.put_u16(used_event, event);
            complete(&mut ring, heads);
            ring.wants_call()
        };
        // Whether the last back-end has called nobody knows: the first is made whatever the driver named.
        assert!(wants(&[0], 1000));
        assert!(!wants(&[1], 65_535), "65535 is not passed by going there");
        assert!(wants(&[2], 65_535));
        assert!(!wants(&[3], 65_535), "it was passed before");
        assert!(wants(&[4, 5, 6], 2), "in the middle of a batch");
        assert!(!wants(&[7], 9));
    }

    #[test]
    fn a_driver_without_event_indices_is_called_unless_its_flag_says_no() {
        let guest = Guest::new();
        let mut ring = ring(&guest, 0, false);
        for (flags, wanted) in [(0, true), (1, false), (2, true), (0xfffe, true), (0xffff, false)] {
            guest.put_u16(AVAILABLE + FLAGS, flags);
            complete(&mut ring, &[0]);
            assert_eq!(ring.wants_call(), wanted, "flags {flags:#x}");
        }
    }

    #[test]
    fn a_ring_that_moves_goes_on_where_it_was() {
        let guest = Guest::new();
        let mut ring = ring(&guest, 10, false);
        submit(&guest, 10, &[1, 2]);
        assert_eq!(ring.take(), Ok(1));
        let elsewhere = VringAddr { available: USER + REGION, used: USER + REGION + 0x100, ..addr() };
        let bytes: [u8; 22] = guest.get(AVAILABLE);
        guest.put(REGION, &bytes);
        ring.move_to(Place::find(&guest.memory, SIZE, &elsewhere).expect("it lies in memory"));
        assert_eq!((ring.pending(), ring.take()), (Ok(1), Ok(2)));
        complete(&mut ring, &[1]);
        assert_eq!((guest.u16(REGION + 0x102), guest.u16(USED + IDX)), (11, 10));
    }

    #[test]
    fn a_ring_lies_in_memory_and_aligned_or_not_at_all() {
        let guest = Guest::new();
        let find = |size, addr: VringAddr| Place::find(&guest.memory, size, &addr);
        for size in [0, 3, 7, 1000, 32_769, 65_535] {
            assert!(find(size, addr()).expect_err("no ring").contains("power of two"), "size {size}");
        }
        let last = END - 6 - 8 * 1024;
        for (wrong, what) in [
            (VringAddr { descriptor: USER + 8, ..addr() }, "not aligned to 16"),
            (VringAddr { available: USER + 1, ..addr() }, "not aligned to 2"),
            (VringAddr { used: USER + 2, ..addr() }, "not aligned to 4"),
            (VringAddr { descriptor: USER - 16, ..addr() }, "does not lie in the memory"),
            // One window is in one mapping: the regions are side by side for the guest alone.
            (VringAddr { descriptor: USER + REGION - 16, ..addr() }, "does not lie in the memory"),
            (VringAddr { available: USER + END - 2, ..addr() }, "does not lie in the memory"),
            (VringAddr { used: USER + last + 4, ..addr() }, "does not lie in the memory"),
            (VringAddr { used: u64::MAX - 3, ..addr() }, "does not lie in the memory"),
            (VringAddr { descriptor: 0, ..addr() }, "does not lie in the memory"),
        ] {
            let reason = find(1024, wrong).expect_err("no ring");
            assert!(reason.contains(what), "{reason}");
        }
        find(1024, VringAddr { used: USER + last / 4 * 4, ..addr() }).expect("up to the last byte");
        find(1, addr()).expect("the smallest");
        assert_eq!(find(8, addr()).expect("a ring").logged(), None);
        let logged = find(8, VringAddr { flags: 1, log: 77, ..addr() }).expect("a ring").logged();
        assert_eq!(logged, Some((77, 70)));
    }
}
