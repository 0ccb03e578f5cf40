//! The canary: a read of the broker's own that a shadow carries out.
//!
//! ```text
//! Resting ─begin─▶ Reading ─completed─▶ Stopping ─reply─▶ Resting
//! ```
//! A backend that mirrors the session has still done nothing. Its first request pays for everything that a backend puts off until
//! then: worker threads, an io_uring, page tables, the way to the storage. The canary pays it while nobody waits, proves that the
//! shadow reaches the storage, and keeps what would go cold warm. It reads into memory of the broker's own, never writes to the
//! device, and never touches guest memory.

use warmswap_wire::ring::{AVAIL_F_NO_INTERRUPT, DESC_F_NEXT, DESC_F_WRITE, Descriptor};
use warmswap_wire::{FdSlot, VringAddr};

use crate::memory::{GuestMemory, PRIVATE_ADDR};
use crate::time::Nanos;

/// Entries of the canary's ring.
pub(crate) const RING_SIZE: u16 = 16;
/// Sector size of the virtio block device, whatever its block size.
const SECTOR: u64 = 512;
/// Bytes that are read where the device has them: a page.
const READ: u64 = 4096;
/// Largest block size that is read.
const READ_MAX: u64 = 16_384;

// Where things lie in memory of the broker's own; the upper half belongs to trials.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x3010;
const DATA: u64 = 0x4000;

/// `VIRTIO_BLK_T_IN`.
const BLK_IN: u32 = 0;
/// A status no device writes.
const UNWRITTEN: u8 = 0xff;

/// Where a canary stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CanaryState {
    Resting,
    Reading,
    Stopping,
}

/// The canary of one backend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Canary {
    pub(crate) state: CanaryState,
    pub(crate) began: Nanos,
    /// How long it had been under way at the last look.
    pub(crate) waited: Nanos,
    pub(crate) poll_at: Nanos,
    /// The backend still has the memory for it.
    pub(crate) possible: bool,
    /// Reads that were completed.
    pub(crate) reads: u64,
    /// How long the last one took, from the first message to the look that found it done.
    pub(crate) took: Option<Nanos>,
}

impl Canary {
    pub(crate) fn new(now: Nanos) -> Self {
        Canary {
            state: CanaryState::Resting,
            began: now,
            waited: Nanos(0),
            poll_at: now,
            possible: true,
            reads: 0,
            took: None,
        }
    }
}

/// Where and how much a canary reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CanaryRead {
    pub(crate) sector: u64,
    pub(crate) bytes: u32,
}

/// The read of that number on a block device with this configuration space; none if the device is too small for one. The first is
/// at the start, the others all over the device.
pub(crate) fn read_of(number: u64, config: &[u8]) -> Option<CanaryRead> {
    let field =
        |at: usize| config.get(at..at + 4).map(|it| u64::from(u32::from_le_bytes(it.try_into().expect("four"))));
    let capacity = config.first_chunk().map(|it| u64::from_le_bytes(*it))?;
    // `virtio_blk_config.blk_size`.
    let block = field(20).filter(|size| size.is_power_of_two() && (SECTOR..=READ_MAX).contains(size)).unwrap_or(SECTOR);
    let whole = if capacity >= READ / SECTOR { READ } else { SECTOR };
    let bytes = whole.max(block);
    let places = capacity / (bytes / SECTOR);
    if places == 0 {
        return None;
    }
    // Fibonacci hashing spreads consecutive numbers evenly.
    let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % places;
    Some(CanaryRead { sector: place * (bytes / SECTOR), bytes: u32::try_from(bytes).expect("at most READ_MAX") })
}

/// Puts the read into memory of the broker's own as the only request of a fresh ring. No backend serves that ring.
pub(crate) fn write_ring(memory: &mut dyn GuestMemory, private: FdSlot, read: CanaryRead) -> bool {
    let at = |offset: u64| PRIVATE_ADDR + offset;
    let chain = [
        Descriptor { addr: at(HEADER), len: 16, flags: DESC_F_NEXT, next: 1 },
        Descriptor { addr: at(DATA), len: read.bytes, flags: DESC_F_NEXT | DESC_F_WRITE, next: 2 },
        Descriptor { addr: at(STATUS), len: 1, flags: DESC_F_WRITE, next: 0 },
    ];
    let table: Vec<u8> = chain.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    let mut header = [0; 17];
    header[..4].copy_from_slice(&BLK_IN.to_le_bytes());
    header[8..16].copy_from_slice(&read.sector.to_le_bytes());
    header[16] = UNWRITTEN;
    // Flags, idx = 1, slot 0 = head 0 and, behind the slots, a used_event that is far from where used.idx goes.
    let mut available = [0; 4 + 2 * RING_SIZE as usize + 2];
    available[..2].copy_from_slice(&AVAIL_F_NO_INTERRUPT.to_le_bytes());
    available[2..4].copy_from_slice(&1_u16.to_le_bytes());
    let event = available.len() - 2;
    available[event..].copy_from_slice(&0x8000_u16.to_le_bytes());
    let used = [0; 4 + 8 * RING_SIZE as usize + 2];
    [(USED, &used[..]), (TABLE, &table), (HEADER, &header), (AVAILABLE, &available)]
        .into_iter()
        .all(|(offset, bytes)| memory.write_private(private, offset, bytes))
}

/// Where the canary's ring lies, for a backend.
pub(crate) fn ring_addr(index: u32) -> VringAddr {
    let at = |offset: u64| PRIVATE_ADDR + offset;
    VringAddr { index, flags: 0, descriptor: at(TABLE), used: at(USED), available: at(AVAILABLE), log: 0 }
}

/// The status byte of the read, once it is completed.
pub(crate) fn status(memory: &dyn GuestMemory, private: FdSlot) -> Option<u8> {
    let used = memory.read_region(private, USED, 4)?;
    if used[2..4] == [0, 0] {
        return None;
    }
    memory.read_region(private, STATUS, 1).map(|byte| byte[0])
}

/// What a backend writes when it completes the read: for the models of backends in tests.
#[cfg(test)]
pub(crate) fn complete(memory: &mut dyn GuestMemory, private: FdSlot, result: u8) {
    memory.write_private(private, STATUS, &[result]);
    memory.write_private(private, USED, &[0, 0, 1, 0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(capacity: u64, block: u32) -> Vec<u8> {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&capacity.to_le_bytes());
        config[20..24].copy_from_slice(&block.to_le_bytes());
        config
    }

    #[test]
    fn reads_stay_inside_the_device_and_on_its_blocks() {
        for (capacity, block) in [(1, 512), (7, 512), (8, 512), (9, 4096), (1000, 4096), (1 << 40, 16_384), (64, 3)] {
            for number in 0..100 {
                let read = read_of(number, &config(capacity, block)).expect("it has room");
                assert!(read.sector + u64::from(read.bytes) / SECTOR <= capacity, "{capacity} {block} {read:?}");
                if block.is_power_of_two() {
                    assert_eq!(read.sector * SECTOR % u64::from(block), 0);
                    assert_eq!(read.bytes % block, 0);
                }
            }
        }
    }

    #[test]
    fn a_device_without_room_for_a_block_has_no_canary() {
        assert_eq!(read_of(0, &config(0, 512)), None);
        assert_eq!(read_of(0, &config(7, 4096)), None);
        assert_eq!(read_of(0, &[]), None);
    }
}
