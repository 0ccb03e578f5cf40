//! What a block holds: every word of it says which write of which block it belongs to.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest::BLOCK;

/// Words of a block.
pub(super) const WORDS: usize = BLOCK / 8;
/// What buffers and tables hold once their request is done: whoever works with them then is late.
pub(super) const POISON: u64 = 0xdead_0ff1_ce00_dead;

/// Word `index` of what write number `sequence` leaves in block `block`. Number zero is a block that was never written.
pub(super) fn word(block: u64, sequence: u64, index: usize) -> u64 {
    if sequence == 0 {
        return 0;
    }
    let key = (block << 48 ^ sequence << 16 ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (key ^ key >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Fills a buffer with a block.
pub(super) fn fill(words: &[AtomicU64], block: u64, sequence: u64) {
    for (index, place) in words.iter().enumerate() {
        place.store(word(block, sequence, index), Ordering::Relaxed);
    }
}

/// Whether a buffer holds exactly that block.
pub(super) fn matches(words: &[AtomicU64], block: u64, sequence: u64) -> bool {
    words.iter().enumerate().all(|(index, place)| place.load(Ordering::Relaxed) == word(block, sequence, index))
}

/// Whether bytes of the image are exactly that block.
pub(super) fn bytes_match(bytes: &[u8], block: u64, sequence: u64) -> bool {
    let words = bytes.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("eight bytes")));
    words.enumerate().all(|(index, found)| found == word(block, sequence, index))
}

/// Overwrites a buffer.
pub(super) fn poison(words: &[AtomicU64]) {
    words.iter().for_each(|place| place.store(POISON, Ordering::Relaxed));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_says_where_and_when() {
        let buffer: Vec<AtomicU64> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        assert!(matches(&buffer, 3, 0));
        fill(&buffer, 3, 7);
        let bytes: Vec<u8> = buffer.iter().flat_map(|it| it.load(Ordering::Relaxed).to_ne_bytes()).collect();
        assert!(matches(&buffer, 3, 7) && bytes_match(&bytes, 3, 7));
        assert!(!matches(&buffer, 3, 6) && !matches(&buffer, 2, 7) && !bytes_match(&bytes, 3, 8));
        for index in 0..WORDS {
            buffer[index].fetch_xor(1, Ordering::Relaxed);
            assert!(!matches(&buffer, 3, 7), "word {index} is not looked at");
            buffer[index].fetch_xor(1, Ordering::Relaxed);
        }
        poison(&buffer);
        assert!(!matches(&buffer, 3, 7) && !matches(&buffer, 3, 0));
    }
}
