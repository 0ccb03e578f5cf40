//! Any bytes as an in-flight region: reading never panics, and what it names lies in the ring, each head once.

use warmswap_wire::inflight::read_split;

/// Ring size and used index come first, then the region.
pub(crate) fn run(data: &[u8]) {
    let Some(([size, used_low, used_high], region)) = data.split_first_chunk::<3>() else { return };
    let size = 1_u16 << (size % 16);
    let Ok(ring) = read_split(region, size, u16::from_le_bytes([*used_low, *used_high])) else { return };
    let mut heads: Vec<u16> = ring.heads.iter().chain(&ring.repaired).copied().collect();
    heads.sort_unstable();
    assert!(heads.windows(2).all(|pair| pair[0] != pair[1]), "a head is named twice: {heads:?}");
    assert!(heads.iter().all(|head| *head < size), "a head beyond the ring: {heads:?}");
}
