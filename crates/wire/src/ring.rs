//! Layout of split virtqueues (virtio 1.3 §2.7): offsets and index arithmetic, no memory.

use serde::{Deserialize, Serialize};
use warmswap_zoo::{Animal, loose};

/// `VIRTQ_USED_F_NO_NOTIFY`: the device does not want kicks.
pub const USED_F_NO_NOTIFY: u16 = 1;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver does not want interrupts.
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_DESC_F_NEXT`.
pub const DESC_F_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes this buffer.
pub const DESC_F_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const DESC_F_INDIRECT: u16 = 4;
/// Bytes of one descriptor.
pub const DESC_SIZE: u64 = 16;
/// Largest split ring.
pub const SIZE_MAX: u16 = 32768;

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedElem {
    /// Head of the completed chain.
    pub id: u32,
    /// Bytes the device wrote.
    pub len: u32,
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// `DESC_F_*`.
    pub flags: u16,
    /// Next descriptor, with [`DESC_F_NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// Decodes the sixteen bytes of a table entry (little-endian, virtio 1.0).
    #[must_use]
    pub fn from_le_bytes(bytes: [u8; 16]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Descriptor {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// The sixteen bytes of a table entry.
    #[must_use]
    pub fn to_le_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Sizes and offsets of a ring with `size` entries. All offsets are bytes from the start of the part they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Layout {
    size: u16,
}

impl TryFrom<u16> for Layout {
    type Error = &'static str;

    fn try_from(size: u16) -> Result<Self, &'static str> {
        Layout::new(size).ok_or("a ring's size is a power of two, at most 32768")
    }
}

impl From<Layout> for u16 {
    fn from(layout: Layout) -> Self {
        layout.size
    }
}

impl Layout {
    /// The layout of a ring of `size` entries: a power of two, at most [`SIZE_MAX`].
    #[must_use]
    pub fn new(size: u16) -> Option<Self> {
        (size.is_power_of_two() && size <= SIZE_MAX).then_some(Layout { size })
    }

    /// Number of entries.
    #[must_use]
    pub fn size(self) -> u16 {
        self.size
    }

    /// Slot of a free-running index.
    #[must_use]
    pub fn slot(self, index: u16) -> u16 {
        index & (self.size - 1)
    }

    /// Bytes of the descriptor table.
    #[must_use]
    pub fn descriptor_bytes(self) -> u64 {
        DESC_SIZE * u64::from(self.size)
    }

    /// Bytes of the available ring, `used_event` included.
    #[must_use]
    pub fn available_bytes(self) -> u64 {
        6 + 2 * u64::from(self.size)
    }

    /// Bytes of the used ring, `avail_event` included.
    #[must_use]
    pub fn used_bytes(self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    /// Offset of an available slot.
    #[must_use]
    pub fn available_slot(self, slot: u16) -> u64 {
        4 + 2 * u64::from(slot)
    }

    /// Offset of `used_event` in the available ring.
    #[must_use]
    pub fn used_event(self) -> u64 {
        4 + 2 * u64::from(self.size)
    }

    /// Offset of a used slot.
    #[must_use]
    pub fn used_slot(self, slot: u16) -> u64 {
        4 + 8 * u64::from(slot)
    }

    /// Offset of `avail_event` in the used ring.
    #[must_use]
    pub fn avail_event(self) -> u64 {
        4 + 8 * u64::from(self.size)
    }
}

/// Offset of `flags` in both rings.
pub const FLAGS: u64 = 0;
/// Offset of `idx` in both rings.
pub const IDX: u64 = 2;

/// Whether moving an index from `old` to `new` crosses `event` (virtio 1.3 §2.7.10, `vring_need_event`).
#[must_use]
pub fn crosses_event(event: u16, new: u16, old: u16) -> bool {
    if loose(Animal::EventWithoutWrap) {
        return (old..new).contains(&event);
    }
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_specification() {
        let layout = Layout::new(256).expect("a power of two");
        assert_eq!((layout.descriptor_bytes(), layout.available_bytes(), layout.used_bytes()), (4096, 518, 2054));
        assert_eq!((layout.used_event(), layout.avail_event()), (516, 2052));
        assert_eq!(layout.slot(65535), 255);
        assert_eq!([0, 3, 32769].map(Layout::new), [None; 3]);
    }

    #[test]
    fn a_descriptor_lies_in_its_table_as_the_specification_says() {
        let descriptor = Descriptor { addr: 0x1122_3344_5566_7788, len: 0x99aa_bbcc, flags: 0xddee, next: 0xff01 };
        let bytes = *b"\x88\x77\x66\x55\x44\x33\x22\x11\xcc\xbb\xaa\x99\xee\xdd\x01\xff";
        assert_eq!((descriptor.to_le_bytes(), Descriptor::from_le_bytes(bytes)), (bytes, descriptor));
    }

    #[test]
    fn event_crossing_wraps() {
        assert!(crosses_event(65535, 1, 65534));
        assert!(!crosses_event(5, 5, 4));
        assert!(crosses_event(4, 5, 4));
    }
}
