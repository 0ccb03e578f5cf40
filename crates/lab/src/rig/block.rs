//! What a block holds: who wrote it, where it belongs, and when.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest::BLOCK;

/// Words of a block.
pub(crate) const WORDS: usize = BLOCK / 8;
/// Words of a sector, the smallest unit a device transfers.
pub(crate) const SECTOR_WORDS: usize = 64;
/// First half of the first word of every block we wrote.
const MAGIC: u32 = 0x7773_5257;
/// What buffers and tables hold after their request is done.
pub(crate) const POISON: u64 = 0xdead_0ff1_ce00_dead;

/// Identity of one write of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Device the block belongs to.
    pub(crate) device: u32,
    /// Block number.
    pub(crate) lba: u64,
    /// Number of the write; never used twice in a run.
    pub(crate) sequence: u64,
    /// Number of failovers before the write was submitted.
    pub(crate) generation: u64,
}

impl Stamp {
    /// Word `index` of the block.
    fn word(&self, index: usize) -> u64 {
        match index {
            0 => u64::from(MAGIC) << 32 | u64::from(self.device),
            1 => self.lba,
            2 => self.sequence,
            3 => self.generation,
            // Every later sector is recognised by its own words, so a torn block is seen at its seam.
            _ if index == WORDS - 1 => self.checksum(),
            _ => self.key().wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        }
    }

    fn key(&self) -> u64 {
        let mut key = u64::from(self.device).wrapping_mul(0xff51_afd7_ed55_8ccd);
        for part in [self.lba, self.sequence, self.generation] {
            key = (key ^ part).wrapping_mul(0xc4ce_b9fe_1a85_ec53).rotate_left(29);
        }
        key
    }

    /// Checksum over the header. The words between header and checksum follow from it.
    fn checksum(&self) -> u64 {
        !self.key().rotate_left(32)
    }

    /// Fills a block.
    pub(crate) fn write(&self, block: &[AtomicU64]) {
        let key = self.key();
        for (index, word) in block.iter().enumerate() {
            word.store(key.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)), Ordering::Relaxed);
        }
        for index in [0, 1, 2, 3, WORDS - 1] {
            block[index].store(self.word(index), Ordering::Relaxed);
        }
    }

    /// Whether a block holds exactly this.
    pub(crate) fn matches(&self, block: &[AtomicU64]) -> bool {
        let key = self.key();
        let middle = block[4..WORDS - 1].iter().zip(4_u64..);
        let mut difference = 0;
        for (word, index) in middle {
            difference |= word.load(Ordering::Relaxed) ^ key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        difference == 0 && [0, 1, 2, 3, WORDS - 1].iter().all(|&at| block[at].load(Ordering::Relaxed) == self.word(at))
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { device, lba, sequence, generation } = self;
        write!(f, "write {sequence} of block {lba} on device {device} in generation {generation}")
    }
}

/// Whether a block is all zero.
pub(crate) fn is_zero(block: &[AtomicU64]) -> bool {
    block.iter().all(|word| word.load(Ordering::Relaxed) == 0)
}

/// Says in words what a block holds, for a report.
pub(crate) fn explain(block: &[AtomicU64]) -> String {
    let at = |index: usize| block[index].load(Ordering::Relaxed);
    if is_zero(block) {
        return "zeroes".into();
    }
    if block.iter().step_by(SECTOR_WORDS).all(|word| word.load(Ordering::Relaxed) == POISON) {
        return "poison of a completed buffer".into();
    }
    let first = at(0);
    if first >> 32 != u64::from(MAGIC) {
        return format!("no stamp: first words {:#x} {:#x} {:#x} {:#x}", first, at(1), at(2), at(3));
    }
    let stamp = Stamp { device: first as u32, lba: at(1), sequence: at(2), generation: at(3) };
    if stamp.matches(block) {
        return stamp.to_string();
    }
    let seam = (4..WORDS).find(|index| at(*index) != stamp.word(*index)).unwrap_or(WORDS);
    format!("torn: starts as {stamp}, differs from word {seam} on ({:#x})", at(seam))
}

/// Marks a buffer: one word per sector, for nothing writes less than a sector.
pub(crate) fn poison(words: &[AtomicU64]) {
    words.iter().step_by(SECTOR_WORDS).for_each(|word| word.store(POISON, Ordering::Relaxed));
}

/// Whether a marked buffer is untouched.
pub(crate) fn is_poisoned(words: &[AtomicU64]) -> bool {
    words.iter().step_by(SECTOR_WORDS).all(|word| word.load(Ordering::Relaxed) == POISON)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { device: 3, lba: 17, sequence: 99, generation: 4 };

    fn block() -> Vec<AtomicU64> {
        (0..WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn a_stamp_is_recognised_and_every_word_counts() {
        let block = block();
        STAMP.write(&block);
        assert!(STAMP.matches(&block));
        for index in 0..WORDS {
            let word = block[index].fetch_xor(1 << (index % 64), Ordering::Relaxed);
            assert!(!STAMP.matches(&block), "word {index} is not checked");
            block[index].store(word, Ordering::Relaxed);
        }
        for other in [Stamp { lba: 18, ..STAMP }, Stamp { sequence: 98, ..STAMP }, Stamp { generation: 3, ..STAMP }] {
            assert!(!other.matches(&block));
        }
    }

    #[test]
    fn what_is_found_is_said() {
        let block = block();
        assert_eq!(explain(&block), "zeroes");
        STAMP.write(&block);
        assert_eq!(explain(&block), STAMP.to_string());
        block[256].store(5, Ordering::Relaxed);
        assert!(explain(&block).contains("differs from word 256"));
        poison(&block);
        assert!(is_poisoned(&block));
        assert_eq!(explain(&block), "poison of a completed buffer");
        block[SECTOR_WORDS].store(0, Ordering::Relaxed);
        assert!(!is_poisoned(&block));
    }
}
