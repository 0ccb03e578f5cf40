//! The canary: a few reads of the broker's own that a shadow carries out.
//!
//! ```text
//! Resting ─begin─▶ Reading ─completed─▶ Stopping ─reply─▶ Resting
//! ```
//! A backend that mirrors the session has still done nothing. Its first request pays for everything that a backend puts off until
//! then: worker threads, an io_uring, page tables, the way to the storage. The canary pays it while nobody waits, proves that the
//! shadow reaches the storage, and keeps what would go cold warm. It reads into memory of the broker's own, never writes to the
//! device, and never touches guest memory.

use serde::{Deserialize, Serialize};
use warmswap_wire::ring::{AVAIL_F_NO_INTERRUPT, DESC_F_NEXT, DESC_F_WRITE, Descriptor};
use warmswap_wire::{FdSlot, VringAddr};

use crate::memory::{GuestMemory, PRIVATE_ADDR};
use crate::time::Nanos;

/// Entries of the canary's ring: three descriptors for each read.
pub(crate) const RING_SIZE: u16 = 64;
/// Reads at once the first time: as many as a busy guest keeps in flight, so that a backend makes all the threads it will want.
const READS_FIRST: u16 = 16;
/// Reads at once every other time: enough to keep the threads of a pool from being given up (qemu's are after 10 s without work).
const READS_AGAIN: u16 = 4;
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
const HEADERS: u64 = 0x3000;
const STATUS: u64 = 0x3800;
/// One buffer for all reads: nobody looks at what was read.
const DATA: u64 = 0x4000;

/// `VIRTIO_BLK_T_IN`.
const BLK_IN: u32 = 0;
/// A status no device writes.
const UNWRITTEN: u8 = 0xff;

/// Where a canary stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CanaryState {
    Resting,
    Reading,
    Stopping,
}

/// The canary of one backend.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Canary {
    pub(crate) state: CanaryState,
    pub(crate) began: Nanos,
    /// How long it had been under way at the last look.
    pub(crate) waited: Nanos,
    pub(crate) poll_at: Nanos,
    /// The backend still has the memory for it.
    pub(crate) possible: bool,
    /// Canaries that were completed.
    pub(crate) number: u64,
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
            number: 0,
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

/// How many reads the canary of that number makes at once.
pub(crate) fn reads_at_once(number: u64) -> u16 {
    if number == 0 { READS_FIRST } else { READS_AGAIN }
}

/// A read on a block device with this configuration space; none if the device is too small for one. The first is at the start, the
/// others all over the device.
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

/// Puts the canary of that number into memory of the broker's own as the only requests of a fresh ring; false if the device has nothing
/// to read. No backend serves that ring.
pub(crate) fn write_ring(memory: &mut dyn GuestMemory, private: FdSlot, number: u64, config: &[u8]) -> bool {
    let at = |offset: u64| PRIVATE_ADDR + offset;
    let reads = reads_at_once(number);
    let (mut table, mut headers) = (Vec::new(), Vec::new());
    for index in 0..reads {
        let Some(read) = read_of(number * u64::from(READS_FIRST) + u64::from(index), config) else { return false };
        let first = 3 * index;
        let header = at(HEADERS) + 16 * u64::from(index);
        let status = at(STATUS) + u64::from(index);
        table.extend(Descriptor { addr: header, len: 16, flags: DESC_F_NEXT, next: first + 1 }.to_le_bytes());
        let flags = DESC_F_NEXT | DESC_F_WRITE;
        table.extend(Descriptor { addr: at(DATA), len: read.bytes, flags, next: first + 2 }.to_le_bytes());
        table.extend(Descriptor { addr: status, len: 1, flags: DESC_F_WRITE, next: 0 }.to_le_bytes());
        headers.extend(BLK_IN.to_le_bytes());
        headers.extend([0; 4]);
        headers.extend(read.sector.to_le_bytes());
    }
    // Flags, idx, the heads and, behind the slots, a used_event that is far from where used.idx goes.
    let mut available = [0; 4 + 2 * RING_SIZE as usize + 2];
    available[..2].copy_from_slice(&AVAIL_F_NO_INTERRUPT.to_le_bytes());
    available[2..4].copy_from_slice(&reads.to_le_bytes());
    for index in 0..reads {
        let slot = 4 + 2 * usize::from(index);
        available[slot..slot + 2].copy_from_slice(&(3 * index).to_le_bytes());
    }
    let event = available.len() - 2;
    available[event..].copy_from_slice(&0x8000_u16.to_le_bytes());
    let used = [0; 4 + 8 * RING_SIZE as usize + 2];
    let status = [UNWRITTEN; READS_FIRST as usize];
    [(USED, &used[..]), (TABLE, &table), (HEADERS, &headers), (STATUS, &status), (AVAILABLE, &available)]
        .into_iter()
        .all(|(offset, bytes)| memory.write_private(private, offset, bytes))
}

/// Where the canary's ring lies, for a backend.
pub(crate) fn ring_addr(index: u32) -> VringAddr {
    let at = |offset: u64| PRIVATE_ADDR + offset;
    VringAddr { index, flags: 0, descriptor: at(TABLE), used: at(USED), available: at(AVAILABLE), log: 0 }
}

/// The worst status of the reads, once all are completed.
pub(crate) fn status(memory: &dyn GuestMemory, private: FdSlot, number: u64) -> Option<u8> {
    let reads = reads_at_once(number);
    let used = memory.read_region(private, USED, 4)?;
    if used[2..4] != reads.to_le_bytes() {
        return None;
    }
    memory.read_region(private, STATUS, u64::from(reads)).and_then(|bytes| bytes.into_iter().max())
}

/// What a backend writes when it completes the reads: for the models of backends in tests.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn complete(memory: &mut dyn GuestMemory, private: FdSlot, result: u8) {
    let reads = memory.read_region(private, AVAILABLE + 2, 2).expect("it is there");
    memory.write_private(private, STATUS, &[result; READS_FIRST as usize]);
    memory.write_private(private, USED + 2, &reads);
}

/// Whether everything that was asked for is completed: for the models of backends in tests.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn is_complete(memory: &dyn GuestMemory, private: FdSlot) -> bool {
    memory.read_region(private, AVAILABLE + 2, 2) == memory.read_region(private, USED + 2, 2)
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
