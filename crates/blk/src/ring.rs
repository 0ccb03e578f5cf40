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
            let window = memory
                .user_window(at, bytes)
                .ok_or_else(|| format!("its {name} at {at:#x} does not lie in the memory that was shared"))?;
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
    /// Begins at `used.idx`, taking from `next_available` on. Kicks are not asked for yet.
    pub(crate) fn new(place: Place, event_idx: bool, next_available: u16) -> Self {
        let used = place.used_idx();
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
