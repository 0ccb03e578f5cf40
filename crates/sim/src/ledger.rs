//! What every block may hold, and what a block says of itself.
//!
//! Two requests on a block are never in flight together unless both read, as a guest's page cache sees to it. So what a read must
//! return is known when it is submitted: what the last acknowledged write left, or what a write left that a reset gave up. In the
//! end the power fails: what a flush has made durable must be there.

/// Bytes of a block.
pub(crate) const BLOCK: usize = 512;

const MAGIC: u64 = 0x7773_696d_626c_6f63;
/// What a buffer holds before and after its request.
pub(crate) const POISON: [u8; BLOCK] = [0xdb; BLOCK];

/// Identity of one write of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) lba: u64,
    /// Never used twice in a run; zero is a block that was never written.
    pub(crate) sequence: u64,
    /// Failovers before it was submitted.
    pub(crate) generation: u64,
}

fn mix(stamp: &Stamp) -> u64 {
    let mut key = MAGIC;
    for part in [stamp.lba, stamp.sequence, stamp.generation] {
        key = (key ^ part).wrapping_mul(0xc4ce_b9fe_1a85_ec53).rotate_left(29);
    }
    key
}

impl Stamp {
    /// Device, place, number, writer and a checksum in front, and the checksum once more at the end: half a block is no block.
    pub(crate) fn block(&self) -> [u8; BLOCK] {
        let mut block = [0x5a; BLOCK];
        let sum = mix(self);
        for (at, word) in [MAGIC, self.lba, self.sequence, self.generation, sum].into_iter().enumerate() {
            block[8 * at..8 * at + 8].copy_from_slice(&word.to_le_bytes());
        }
        block[BLOCK - 8..].copy_from_slice(&sum.to_le_bytes());
        block
    }

    /// What a block says it is.
    pub(crate) fn of(block: &[u8; BLOCK]) -> Result<Stamp, String> {
        let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
        if block.iter().all(|byte| *byte == 0) {
            return Ok(Stamp { lba: u64::MAX, sequence: 0, generation: 0 });
        }
        if *block == POISON {
            return Err("what its buffer held before".to_owned());
        }
        let stamp = Stamp { lba: word(8), sequence: word(16), generation: word(24) };
        if word(0) != MAGIC || word(32) != mix(&stamp) || word(BLOCK - 8) != mix(&stamp) {
            return Err(format!("no block of ours: {:#x} {:#x} {:#x}", word(0), word(8), word(16)));
        }
        Ok(stamp)
    }
}

#[derive(Clone, Debug, Default)]
struct Cell {
    /// Number of the last acknowledged write.
    acknowledged: u64,
    /// Numbers of writes that were given up and may be there.
    others: Vec<u64>,
    /// The write under way.
    writing: Option<u64>,
    readers: u16,
    /// Number of the write that a flush has made durable.
    durable: u64,
}

/// The record of one disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    cells: Vec<Cell>,
    sequence: u64,
}

impl Ledger {
    pub(crate) fn new(blocks: u64) -> Self {
        Ledger { cells: vec![Cell::default(); blocks as usize], sequence: 0 }
    }

    fn range(lba: u64, blocks: u16) -> std::ops::Range<usize> {
        lba as usize..lba as usize + usize::from(blocks)
    }

    /// Reserves blocks for a read; false: somebody writes one of them.
    pub(crate) fn begin_read(&mut self, lba: u64, blocks: u16) -> bool {
        let cells = &mut self.cells[Self::range(lba, blocks)];
        let free = cells.iter().all(|cell| cell.writing.is_none());
        if free {
            cells.iter_mut().for_each(|cell| cell.readers += 1);
        }
        free
    }

    /// Reserves blocks for a write, and numbers it; none: somebody is there.
    pub(crate) fn begin_write(&mut self, lba: u64, blocks: u16) -> Option<u64> {
        let cells = &mut self.cells[Self::range(lba, blocks)];
        if cells.iter().any(|cell| cell.writing.is_some() || cell.readers > 0) {
            return None;
        }
        let first = self.sequence + 1;
        for (cell, sequence) in cells.iter_mut().zip(first..) {
            cell.writing = Some(sequence);
        }
        self.sequence += u64::from(blocks);
        Some(first)
    }

    /// What a flush that is submitted now makes durable.
    pub(crate) fn begin_flush(&self) -> Vec<u64> {
        self.cells.iter().map(|cell| cell.acknowledged).collect()
    }

    /// A read ends.
    pub(crate) fn end_read(&mut self, lba: u64, blocks: u16) {
        self.cells[Self::range(lba, blocks)].iter_mut().for_each(|cell| cell.readers -= 1);
    }

    /// A write ends: acknowledged, or given up.
    pub(crate) fn end_write(&mut self, lba: u64, blocks: u16, acknowledged: bool) {
        for cell in &mut self.cells[Self::range(lba, blocks)] {
            let Some(sequence) = cell.writing.take() else { continue };
            if acknowledged {
                cell.acknowledged = sequence;
                cell.others.clear();
            } else {
                cell.others.push(sequence);
            }
        }
    }

    /// A flush ends.
    pub(crate) fn end_flush(&mut self, durable: &[u64]) {
        for (cell, sequence) in self.cells.iter_mut().zip(durable) {
            cell.durable = cell.durable.max(*sequence);
        }
    }

    /// Checks what was read. What was seen once stays.
    pub(crate) fn check(&mut self, lba: u64, block: &[u8; BLOCK]) -> Result<(), String> {
        let cell = &mut self.cells[lba as usize];
        let stamp = Stamp::of(block).map_err(|what| format!("block {lba} holds {what}"))?;
        let there = stamp.sequence;
        let admissible = there == cell.acknowledged || cell.others.contains(&there);
        if !admissible || (there != 0 && stamp.lba != lba) {
            let Stamp { lba: other, generation, .. } = stamp;
            return Err(format!(
                "block {lba} holds write {there} of block {other} (generation {generation}); expected write {} or {:?}",
                cell.acknowledged, cell.others
            ));
        }
        cell.acknowledged = there;
        cell.others.clear();
        Ok(())
    }

    /// Checks what is left after a power failure: nothing older than what a flush made durable.
    pub(crate) fn check_durable(&self, lba: u64, block: &[u8; BLOCK]) -> Result<(), String> {
        let cell = &self.cells[lba as usize];
        let stamp = Stamp::of(block).map_err(|what| format!("block {lba} holds {what} after a power failure"))?;
        if stamp.sequence < cell.durable || (stamp.sequence != 0 && stamp.lba != lba) {
            return Err(format!(
                "block {lba} holds write {} after a power failure; a flush made write {} durable",
                stamp.sequence, cell.durable
            ));
        }
        Ok(())
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.cells.len() as u64
    }
}
