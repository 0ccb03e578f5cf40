//! A split ring of which everything can be written, also what no driver would write.

use std::os::fd::AsFd as _;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use warmswap_wire::VringAddr;
use warmswap_wire::ring::{self, AVAIL_F_NO_INTERRUPT, Descriptor, Layout, USED_F_NO_NOTIFY, crosses_event};

use super::outcome::Miss;
use crate::guest::{EventFd, GuestMemory, Window};

/// Between two looks at an index.
const LOOK: Duration = Duration::from_micros(200);

/// The ring, its descriptors, and how far the driver is. Chains are laid by the caller.
#[derive(Debug)]
pub(super) struct Ring {
    /// Which of the device's rings.
    pub(super) index: u32,
    window: Window,
    layout: Layout,
    available: usize,
    used: usize,
    /// The driver's index: what is offered next.
    next: u16,
    /// Written by the driver.
    pub(super) kick: EventFd,
    /// Written by the device.
    pub(super) call: EventFd,
    /// Written by the device when it cannot go on.
    pub(super) err: EventFd,
}

impl Ring {
    /// A ring of `size` entries whose indices both stand at `start`.
    pub(super) fn new(memory: &mut GuestMemory, index: u32, size: u16, start: u16) -> Result<Self, Miss> {
        let layout = Layout::new(size).ok_or_else(|| anyhow::anyhow!("{size} is no ring size"))?;
        let offset =
            |bytes: u64| usize::try_from(bytes.next_multiple_of(4096)).expect("a ring is less than a megabyte");
        let available = offset(layout.descriptor_bytes());
        let used = available + offset(layout.available_bytes());
        let window = memory.allocate(0, used + offset(layout.used_bytes()), 4096)?;
        let (kick, call, err) = (EventFd::new()?, EventFd::new()?, EventFd::new()?);
        let mut ring = Ring { index, window, layout, available, used, next: start, kick, call, err };
        ring.reset(start);
        Ok(ring)
    }

    /// Makes it new: all zero, both indices at `start`.
    pub(super) fn reset(&mut self, start: u16) {
        for word in self.window.mapping.words(self.window.start, self.window.length) {
            word.store(0, Ordering::Relaxed);
        }
        self.next = start;
        self.store(self.used + ring::IDX as usize, start);
        self.set_avail_event(start);
        self.set_used_event(start);
        self.store(self.available + ring::IDX as usize, start);
    }

    fn store(&self, offset: usize, value: u16) {
        self.window.mapping.u16(self.window.start + offset).store(value, Ordering::Release);
    }

    fn load(&self, offset: usize) -> u16 {
        self.window.mapping.u16(self.window.start + offset).load(Ordering::Acquire)
    }

    /// Number of entries.
    pub(super) fn size(&self) -> u16 {
        self.layout.size()
    }

    /// Where it lies, as SET_VRING_ADDR says it. `logged`: writes to the used ring are.
    pub(super) fn addresses(&self, logged: bool) -> VringAddr {
        let user = self.window.user();
        VringAddr {
            index: self.index,
            flags: logged.into(),
            descriptor: user,
            available: user + self.available as u64,
            used: user + self.used as u64,
            log: self.used_guest(),
        }
    }

    /// Guest-physical address of the used ring.
    pub(super) fn used_guest(&self) -> u64 {
        self.window.guest + self.used as u64
    }

    /// Writes an entry of the descriptor table as it is.
    pub(super) fn describe(&self, index: u16, descriptor: Descriptor) {
        write_descriptor(&self.window, usize::from(index) * ring::DESC_SIZE as usize, descriptor);
    }

    /// Writes a chain from entry `head` on, with NEXT flags of its own.
    pub(super) fn lay(&self, head: u16, chain: &[Descriptor]) {
        for (at, descriptor) in chain.iter().enumerate() {
            let index = head + at as u16;
            let more = at + 1 < chain.len();
            let flags = descriptor.flags | if more { ring::DESC_F_NEXT } else { 0 };
            self.describe(index, Descriptor { flags, next: if more { index + 1 } else { 0 }, ..*descriptor });
        }
    }

    /// Offers a head and publishes it.
    pub(super) fn offer(&mut self, head: u16) {
        let slot = self.layout.slot(self.next);
        self.store(self.available + self.layout.available_slot(slot) as usize, head);
        self.publish(self.next.wrapping_add(1));
    }

    /// Publishes an index as it is.
    pub(super) fn publish(&mut self, index: u16) {
        self.next = index;
        self.store(self.available + ring::IDX as usize, index);
    }

    /// What is offered next: `avail.idx`.
    pub(super) fn avail_idx(&self) -> u16 {
        self.next
    }

    /// What the device has published.
    pub(super) fn used_idx(&self) -> u16 {
        self.load(self.used + ring::IDX as usize)
    }

    /// Head and length of the used entry of that index.
    pub(super) fn used(&self, index: u16) -> (u32, u32) {
        let at = self.window.start + self.used + self.layout.used_slot(self.layout.slot(index)) as usize;
        let load = |at: usize| self.window.mapping.u32(at).load(Ordering::Acquire);
        (load(at), load(at + 4))
    }

    /// Heads completed from index `from` on.
    pub(super) fn heads_since(&self, from: u16) -> Vec<u32> {
        let count = self.used_idx().wrapping_sub(from).min(self.size());
        (0..count).map(|at| self.used(from.wrapping_add(at)).0).collect()
    }

    /// Whether the device wants a kick for what was offered since `old`, as Linux' driver reads it.
    pub(super) fn wants_kick(&self, event_idx: bool, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if event_idx {
            crosses_event(self.load(self.used + self.layout.avail_event() as usize), self.next, old)
        } else {
            self.load(self.used + ring::FLAGS as usize) & USED_F_NO_NOTIFY == 0
        }
    }

    /// Writes `used.flags`, as a device before this one has left them.
    pub(super) fn set_used_flags(&self, flags: u16) {
        self.store(self.used + ring::FLAGS as usize, flags);
    }

    /// Writes `avail_event`, as a device before this one has left it.
    pub(super) fn set_avail_event(&self, index: u16) {
        self.store(self.used + self.layout.avail_event() as usize, index);
    }

    /// Wants interrupts, or does not (without EVENT_IDX).
    pub(super) fn want_calls(&self, wanted: bool) {
        self.store(self.available + ring::FLAGS as usize, if wanted { 0 } else { AVAIL_F_NO_INTERRUPT });
        fence(Ordering::SeqCst);
    }

    /// Wants an interrupt when `used.idx` goes beyond that index (with EVENT_IDX).
    pub(super) fn set_used_event(&self, index: u16) {
        self.store(self.available + self.layout.used_event() as usize, index);
        fence(Ordering::SeqCst);
    }

    /// Waits until `used.idx` is `index`, at most `within`. True: it is.
    pub(super) fn reaches(&self, index: u16, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        loop {
            if self.used_idx() == index {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until `used.idx` has stood still for `rest`, at most `within`.
    pub(super) fn rests(&self, rest: Duration, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let (mut seen, mut since) = (self.used_idx(), Instant::now());
        while since.elapsed() < rest {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK);
            if self.used_idx() != seen {
                (seen, since) = (self.used_idx(), Instant::now());
            }
        }
        true
    }

    /// Whether `used.idx` moves within `within`.
    pub(super) fn moves(&self, within: Duration) -> bool {
        let (seen, deadline) = (self.used_idx(), Instant::now() + within);
        while Instant::now() < deadline {
            if self.used_idx() != seen {
                return true;
            }
            std::thread::sleep(LOOK);
        }
        false
    }

    /// A copy of the part of the used ring that the device writes.
    pub(super) fn used_ring(&self) -> Vec<u64> {
        let (start, length) = (self.window.start + self.used, self.window.length - self.used);
        self.window.mapping.words(start, length).iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// The indices, for a report.
    pub(super) fn words(&self) -> String {
        format!("avail.idx {}, used.idx {}", self.next, self.used_idx())
    }

    /// Whether a call comes within `within`. Takes it.
    pub(super) fn is_called(&self, within: Duration) -> Result<bool, Miss> {
        Ok(self.call.wait(within)? && self.call.take())
    }

    /// Descriptors for a message: kick, call, err.
    pub(super) fn fds(&self) -> [std::os::fd::BorrowedFd<'_>; 3] {
        [self.kick.as_fd(), self.call.as_fd(), self.err.as_fd()]
    }
}

/// Writes a descriptor at that byte of a window.
pub(super) fn write_descriptor(window: &Window, at: usize, descriptor: Descriptor) {
    let bytes = descriptor.to_le_bytes();
    let word = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().expect("eight bytes"));
    let at = window.start + at;
    window.mapping.u64(at).store(word(0), Ordering::Relaxed);
    window.mapping.u64(at + 8).store(word(8), Ordering::Relaxed);
}
