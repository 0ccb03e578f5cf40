//! The in-flight region of split rings (`docs/interop/vhost-user.rst`, "Inflight I/O tracking").
//!
//! Per ring: a header of sixteen bytes (features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16), then one
//! entry of sixteen bytes per descriptor (inflight u8, five bytes of padding, next u16, counter u64).
//!
//! The region is private to one implementation: strides and repair differ between back-ends, so it is read as a witness and
//! never handed to another implementation. [`read_split`] is the witness, [`Tracker`] keeps a region of our own.

mod track;

use warmswap_zoo::{Animal, loose};

pub use track::{RegionMemory, Start, Tracker};

use crate::ring::SIZE_MAX;

/// Bytes of a ring's header.
pub const HEADER_BYTES: u64 = 16;
/// Bytes of one descriptor's entry.
pub const ENTRY_BYTES: u64 = 16;

/// Bytes one ring takes in the layout of DPDK, SPDK and libvhost-user: aligned to 64.
#[must_use]
pub fn ring_bytes(queue_size: u16) -> u64 {
    (HEADER_BYTES + ENTRY_BYTES * u64::from(queue_size)).next_multiple_of(64)
}

/// Why a region could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// The slice is shorter than the ring needs.
    #[error("in-flight region of {found} bytes, expected at least {expected}")]
    Short {
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
    /// The version is not 1.
    #[error("in-flight region version {found}, expected 1")]
    Version {
        /// Version found.
        found: u16,
    },
    /// `desc_num` is not the ring's size.
    #[error("in-flight region for {found} descriptors, expected {expected}")]
    Size {
        /// Ring size.
        expected: u16,
        /// Size found.
        found: u16,
    },
    /// The list of the last batch leaves the table or runs in a circle.
    #[error("in-flight region: the last batch's list is broken at entry {at}")]
    Batch {
        /// Entry at which it broke.
        at: u16,
    },
}

/// What a region says about one ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InflightRing {
    /// Heads in flight, in the order of their counters (submission order).
    pub heads: Vec<u16>,
    /// `used_idx` of the region before repair.
    pub used_idx: u16,
    /// Heads of the last batch that the repair took as completed: their used index was published, the mark not yet cleared.
    pub repaired: Vec<u16>,
}

/// Reads one ring from a copy of its part of the region.
///
/// `used_idx` is the index in the used ring itself. Where it differs from the region's, the last batch was published and
/// its marks are stale: the whole batch is walked, as the specification has it (SPDK issue 3766 is a bug in exactly this).
///
/// # Errors
/// A region that does not describe a split ring of `queue_size` entries. Nothing in it is trusted.
pub fn read_split(bytes: &[u8], queue_size: u16, used_idx: u16) -> Result<InflightRing, RegionError> {
    assert!(queue_size <= SIZE_MAX, "ring sizes are checked on SET_VRING_NUM");
    let expected = HEADER_BYTES + ENTRY_BYTES * u64::from(queue_size);
    if (bytes.len() as u64) < expected {
        return Err(RegionError::Short { expected, found: bytes.len() as u64 });
    }
    let version = u16_at(bytes, 8);
    if version != 1 {
        return Err(RegionError::Version { found: version });
    }
    let desc_num = u16_at(bytes, 10);
    if desc_num != queue_size {
        return Err(RegionError::Size { expected: queue_size, found: desc_num });
    }
    let region_used = u16_at(bytes, 14);
    let batch = used_idx.wrapping_sub(region_used);
    let batch = if loose(Animal::BatchHalfRepaired) { batch.min(1) } else { batch };
    let repaired = last_batch(bytes, queue_size, u16_at(bytes, 12), batch)?;
    let mut marked: Vec<(u64, u16)> = (0..queue_size)
        .filter(|head| bytes[entry(*head)] == 1 && !repaired.contains(head))
        .map(|head| (u64_at(bytes, entry(head) + 8), head))
        .collect();
    if !loose(Animal::ResubmittedByHead) {
        marked.sort_unstable();
    }
    Ok(InflightRing { heads: marked.into_iter().map(|(_, head)| head).collect(), used_idx: region_used, repaired })
}

/// The `count` heads that start at `head`, following `next`.
fn last_batch(bytes: &[u8], queue_size: u16, head: u16, count: u16) -> Result<Vec<u16>, RegionError> {
    let mut heads = Vec::new();
    let mut at = head;
    for _ in 0..count {
        if at >= queue_size || heads.contains(&at) {
            return Err(RegionError::Batch { at });
        }
        heads.push(at);
        at = u16_at(bytes, entry(at) + 6);
    }
    Ok(heads)
}

fn entry(head: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * u64::from(head)) as usize
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(size: u16, last_batch_head: u16, used_idx: u16, entries: &[(u16, u64, u16)]) -> Vec<u8> {
        let mut bytes = vec![0; ring_bytes(size) as usize];
        bytes[8..10].copy_from_slice(&1_u16.to_ne_bytes());
        bytes[10..12].copy_from_slice(&size.to_ne_bytes());
        bytes[12..14].copy_from_slice(&last_batch_head.to_ne_bytes());
        bytes[14..16].copy_from_slice(&used_idx.to_ne_bytes());
        for (head, counter, next) in entries {
            let at = entry(*head);
            bytes[at] = 1;
            bytes[at + 6..at + 8].copy_from_slice(&next.to_ne_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&counter.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn heads_come_in_the_order_of_their_counters() {
        let bytes = region(8, 0, 7, &[(5, 30, 0), (1, 10, 0), (3, 20, 0)]);
        assert_eq!(read_split(&bytes, 8, 7).expect("valid").heads, [1, 3, 5]);
    }

    #[test]
    fn the_whole_last_batch_is_repaired_also_when_nothing_had_completed_before() {
        let bytes = region(8, 5, 0, &[(5, 1, 2), (2, 2, 0), (7, 3, 0)]);
        let ring = read_split(&bytes, 8, 2).expect("valid");
        assert_eq!((ring.heads, ring.repaired), (vec![7], vec![5, 2]));
    }

    #[test]
    fn a_broken_list_or_header_is_refused() {
        assert_eq!(read_split(&region(8, 9, 0, &[]), 8, 1), Err(RegionError::Batch { at: 9 }));
        assert_eq!(read_split(&region(8, 5, 0, &[(5, 1, 5)]), 8, 2), Err(RegionError::Batch { at: 5 }));
        assert_eq!(read_split(&region(8, 0, 0, &[]), 16, 0), Err(RegionError::Short { expected: 272, found: 192 }));
        assert_eq!(read_split(&[0; 192], 8, 0), Err(RegionError::Version { found: 0 }));
    }
}
