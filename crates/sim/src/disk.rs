//! The storage that all backends open: a medium behind a volatile cache.

use crate::ledger::BLOCK;
use crate::random::Random;

/// The disk.
#[derive(Debug)]
pub(crate) struct Disk {
    /// What reads return.
    cache: Vec<[u8; BLOCK]>,
    /// What is left when the power fails.
    durable: Vec<[u8; BLOCK]>,
    dirty: Vec<bool>,
}

impl Disk {
    pub(crate) fn new(blocks: u64) -> Self {
        let zeroes = vec![[0; BLOCK]; blocks as usize];
        Disk { cache: zeroes.clone(), durable: zeroes, dirty: vec![false; blocks as usize] }
    }

    pub(crate) fn read(&self, lba: u64) -> [u8; BLOCK] {
        self.cache[lba as usize]
    }

    pub(crate) fn write(&mut self, lba: u64, block: &[u8; BLOCK]) {
        self.cache[lba as usize] = *block;
        self.dirty[lba as usize] = true;
    }

    pub(crate) fn flush(&mut self) {
        for lba in 0..self.cache.len() {
            if std::mem::take(&mut self.dirty[lba]) {
                self.durable[lba] = self.cache[lba];
            }
        }
    }

    /// The power fails: of what was not flushed some blocks have been written back, others not.
    pub(crate) fn fail_power(&mut self, random: &mut Random) {
        for lba in 0..self.cache.len() {
            if std::mem::take(&mut self.dirty[lba]) && random.one_in(2) {
                self.durable[lba] = self.cache[lba];
            }
            self.cache[lba] = self.durable[lba];
        }
    }
}
