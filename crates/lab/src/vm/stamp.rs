//! The stamp on a block: enough to say, from the block alone, whose it is, how new it is and whether it is whole.

use super::layout::{BLOCK, STAMP};
use super::rng::{Rng, digest};

const MAGIC: u64 = 0x7761_726d_7374_6d70;
const HEADER_BYTES: usize = 40;

/// Number of blocks in the stamp region.
pub(crate) const BLOCKS: u64 = STAMP.bytes / BLOCK;

/// A block of memory aligned as direct I/O wants it.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
pub(crate) struct Block(pub(crate) [u8; BLOCK as usize]);

impl Block {
    /// A block of zeros.
    pub(crate) fn zeroed() -> Box<Self> {
        Box::new(Self([0; BLOCK as usize]))
    }

    /// Writes the stamp of `generation` for block `index`: header, then content that follows from both.
    pub(crate) fn stamp(&mut self, seed: u64, index: u64, generation: u64) {
        Rng::new(seed ^ index, generation).fill(&mut self.0[HEADER_BYTES..]);
        let words = [MAGIC, seed, index, generation];
        for (slot, word) in self.0.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let sum = self.sum();
        self.0[32..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    }

    /// The generation found on block `index`; 0 for a block never written; an explanation if it is not a whole stamp
    /// of this run and this place.
    pub(crate) fn generation(&self, seed: u64, index: u64) -> Result<u64, String> {
        if self.0.iter().all(|&byte| byte == 0) {
            return Ok(0);
        }
        let word = |at: usize| u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"));
        if word(0) != MAGIC || word(8) != seed {
            return Err(format!("block {index} holds no stamp of this run"));
        }
        if word(16) != index {
            return Err(format!("block {index} holds the stamp of block {}", word(16)));
        }
        if word(32) != self.sum() {
            return Err(format!("block {index} generation {} is torn or damaged", word(24)));
        }
        Ok(word(24))
    }

    /// Digest of everything but the digest's own field.
    fn sum(&self) -> u64 {
        digest(&self.0[..32]) ^ digest(&self.0[HEADER_BYTES..]).rotate_left(1)
    }
}

/// The digest of a table of generations: what the guest was promised, in one number.
pub(crate) fn table_digest(generations: &[u64]) -> u64 {
    let bytes: Vec<u8> = generations.iter().flat_map(|generation| generation.to_le_bytes()).collect();
    digest(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_read_back_and_each_kind_of_damage_is_named() {
        let mut block = Block::zeroed();
        assert_eq!(block.generation(1, 9), Ok(0));
        block.stamp(1, 9, 4);
        assert_eq!(block.generation(1, 9), Ok(4));
        assert!(block.generation(1, 8).is_err_and(|why| why.contains("stamp of block 9")));
        assert!(block.generation(2, 9).is_err_and(|why| why.contains("no stamp")));
        block.0[4000] ^= 1;
        assert!(block.generation(1, 9).is_err_and(|why| why.contains("torn")));
    }
}
