//! What every block of the image may hold.
//!
//! Two requests that touch the same block are never in flight together unless both read, so what a read must return is
//! known when it is submitted: what the last acknowledged write left. A write that was never acknowledged (its guest was
//! shut off or reset) adds a possibility until the block is seen, or written again and acknowledged.

use std::sync::atomic::AtomicU64;

use super::block::{Stamp, explain, is_zero};
use crate::guest::{Kind, Request};

/// Contents a block may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    /// Number of the write; 0 means zeroes.
    sequence: u64,
    generation: u64,
}

const ZEROES: Version = Version { sequence: 0, generation: 0 };

#[derive(Clone, Debug)]
struct Cell {
    acknowledged: Version,
    /// What abandoned writes and discards may have put there instead.
    alternatives: Vec<Version>,
    readers: u16,
    writing: bool,
}

impl Cell {
    /// The block holds this and nothing else.
    fn is_now(&mut self, version: Version) {
        self.acknowledged = version;
        self.alternatives.clear();
    }

    /// The block may hold this as well.
    fn may_be(&mut self, version: Version) {
        if version != self.acknowledged && !self.alternatives.contains(&version) {
            self.alternatives.push(version);
        }
    }
}

/// The record of one image.
#[derive(Debug)]
pub(crate) struct Ledger {
    device: u32,
    cells: Vec<Cell>,
    sequence: u64,
}

impl Ledger {
    /// An image of `blocks` blocks, all zero.
    pub(crate) fn new(device: u32, blocks: usize) -> Self {
        let cell = Cell { acknowledged: ZEROES, alternatives: Vec::new(), readers: 0, writing: false };
        Ledger { device, cells: vec![cell; blocks], sequence: 0 }
    }

    /// Number of blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.cells.len() as u64
    }

    fn range(request: &Request) -> std::ops::Range<usize> {
        let first = request.block as usize;
        first..first + request.blocks as usize
    }

    /// Reserves the blocks of a request. False: another request is in the way.
    pub(crate) fn begin(&mut self, request: &Request) -> bool {
        let cells = &mut self.cells[Self::range(request)];
        match request.kind {
            Kind::Flush | Kind::Poison => true,
            Kind::Read => {
                let free = cells.iter().all(|cell| !cell.writing);
                if free {
                    cells.iter_mut().for_each(|cell| cell.readers += 1);
                }
                free
            }
            Kind::Write | Kind::Discard | Kind::WriteZeroes => {
                let free = cells.iter().all(|cell| !cell.writing && cell.readers == 0);
                if free {
                    cells.iter_mut().for_each(|cell| cell.writing = true);
                }
                free
            }
        }
    }

    /// A number for a write that begins. Block `n` of the request gets the stamp of `first + n`.
    pub(crate) fn next_sequence(&mut self, request: &Request) -> u64 {
        let first = self.sequence + 1;
        self.sequence += u64::from(request.blocks);
        first
    }

    /// The stamp of block `lba` for a write.
    pub(crate) fn stamp(&self, lba: u64, sequence: u64, generation: u64) -> Stamp {
        Stamp { device: self.device, lba, sequence, generation }
    }

    /// A request was acknowledged as done. `sequence` and `generation` are those it was submitted with.
    pub(crate) fn acknowledge(&mut self, request: &Request, sequence: u64, generation: u64) {
        self.release(request);
        let written = Self::range(request).zip(sequence..);
        match request.kind {
            Kind::Read | Kind::Flush | Kind::Poison => {}
            Kind::Write => written.for_each(|(lba, sequence)| {
                self.cells[lba].is_now(Version { sequence, generation });
            }),
            Kind::WriteZeroes => written.for_each(|(lba, _)| self.cells[lba].is_now(ZEROES)),
            // A device may ignore a discard.
            Kind::Discard => written.for_each(|(lba, _)| self.cells[lba].may_be(ZEROES)),
        }
    }

    /// A request will never be acknowledged: its guest is gone. It may have been executed or not.
    pub(crate) fn abandon(&mut self, request: &Request, sequence: u64, generation: u64) {
        self.release(request);
        for (lba, sequence) in Self::range(request).zip(sequence..) {
            let cell = &mut self.cells[lba];
            match request.kind {
                Kind::Write => cell.may_be(Version { sequence, generation }),
                Kind::Discard | Kind::WriteZeroes => cell.may_be(ZEROES),
                Kind::Read | Kind::Flush | Kind::Poison => {}
            }
        }
    }

    /// Takes back a reservation: the request was never submitted.
    pub(crate) fn withdraw(&mut self, request: &Request) {
        self.release(request);
    }

    fn release(&mut self, request: &Request) {
        for cell in &mut self.cells[Self::range(request)] {
            match request.kind {
                Kind::Read => cell.readers -= 1,
                Kind::Write | Kind::Discard | Kind::WriteZeroes => cell.writing = false,
                Kind::Flush | Kind::Poison => {}
            }
        }
    }

    /// Checks what was read from `lba`. What was seen once must stay: of several possibilities only that one is left.
    ///
    /// # Errors
    /// What is there and what should be.
    pub(crate) fn check(&mut self, lba: u64, block: &[AtomicU64]) -> Result<(), String> {
        let cell = &self.cells[lba as usize];
        let possible = std::iter::once(cell.acknowledged).chain(cell.alternatives.iter().copied());
        match possible.clone().find(|version| self.holds(lba, *version, block)) {
            Some(version) => {
                self.cells[lba as usize].is_now(version);
                Ok(())
            }
            None => {
                let expected: Vec<String> = possible.map(|version| self.describe(lba, version)).collect();
                Err(format!("block {lba} holds {}; expected {}", explain(block), expected.join(" or ")))
            }
        }
    }

    fn holds(&self, lba: u64, version: Version, block: &[AtomicU64]) -> bool {
        if version == ZEROES {
            return is_zero(block);
        }
        self.stamp(lba, version.sequence, version.generation).matches(block)
    }

    fn describe(&self, lba: u64, version: Version) -> String {
        if version == ZEROES {
            return "zeroes".into();
        }
        self.stamp(lba, version.sequence, version.generation).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::super::block::WORDS;
    use super::*;

    fn write(lba: u64, blocks: u32) -> Request {
        Request::write(lba, blocks)
    }

    fn block_of(stamp: Option<Stamp>) -> Vec<AtomicU64> {
        let block: Vec<_> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        if let Some(stamp) = stamp {
            stamp.write(&block);
        }
        block
    }

    #[test]
    fn writers_exclude_everybody_and_readers_exclude_writers() {
        let mut ledger = Ledger::new(1, 8);
        assert!(ledger.begin(&Request::read(0, 4)));
        assert!(ledger.begin(&Request::read(2, 4)));
        assert!(!ledger.begin(&write(3, 1)));
        assert!(ledger.begin(&write(6, 2)));
        assert!(!ledger.begin(&Request::read(5, 2)));
        ledger.acknowledge(&Request::read(0, 4), 0, 0);
        ledger.acknowledge(&Request::read(2, 4), 0, 0);
        assert!(ledger.begin(&write(3, 1)));
    }

    #[test]
    fn only_the_last_acknowledged_write_is_admitted() {
        let mut ledger = Ledger::new(1, 8);
        let request = write(2, 2);
        let first = ledger.next_sequence(&request);
        let second = ledger.next_sequence(&request);
        ledger.acknowledge(&request, first, 0);
        let old = block_of(Some(ledger.stamp(3, first + 1, 0)));
        assert_eq!(ledger.check(3, &old), Ok(()));
        ledger.acknowledge(&request, second, 5);
        assert!(ledger.check(3, &old).is_err_and(|found| found.contains("expected write 4 of block 3")));
        assert!(ledger.check(3, &block_of(None)).is_err());
        assert_eq!(ledger.check(3, &block_of(Some(ledger.stamp(3, second + 1, 5)))), Ok(()));
    }

    #[test]
    fn an_abandoned_write_leaves_two_possibilities_until_the_next_one() {
        let mut ledger = Ledger::new(1, 8);
        let request = write(0, 1);
        let sequence = ledger.next_sequence(&request);
        assert!(ledger.begin(&request));
        ledger.abandon(&request, sequence, 0);
        let abandoned = block_of(Some(ledger.stamp(0, sequence, 0)));
        assert_eq!(ledger.check(0, &abandoned), Ok(()));
        assert!(ledger.check(0, &block_of(None)).is_err(), "it was seen to be there");
        assert!(ledger.begin(&request));
        let sequence = ledger.next_sequence(&request);
        ledger.acknowledge(&request, sequence, 0);
        assert!(ledger.check(0, &abandoned).is_err(), "it came late");
    }

    #[test]
    fn every_abandoned_write_is_admitted_and_nothing_else() {
        let request = write(0, 1);
        let abandoned_twice = || {
            let mut ledger = Ledger::new(1, 8);
            for generation in 0..2 {
                let sequence = ledger.next_sequence(&request);
                assert!(ledger.begin(&request));
                ledger.abandon(&request, sequence, generation);
            }
            ledger
        };
        let (first, second) = (
            abandoned_twice().stamp(0, 1, 0),
            Stamp { sequence: 2, generation: 1, ..abandoned_twice().stamp(0, 1, 0) },
        );
        for possible in [None, Some(first), Some(second)] {
            assert_eq!(abandoned_twice().check(0, &block_of(possible)), Ok(()));
        }
        let other = Stamp { sequence: 3, ..second };
        assert!(
            abandoned_twice().check(0, &block_of(Some(other))).is_err_and(|found| found.matches(" or ").count() == 2)
        );
    }

    #[test]
    fn zeroes_and_discards() {
        let mut ledger = Ledger::new(1, 8);
        let request = write(0, 1);
        let sequence = ledger.next_sequence(&request);
        ledger.acknowledge(&request, sequence, 0);
        let written = block_of(Some(ledger.stamp(0, sequence, 0)));
        let discard = Request { kind: Kind::Discard, ..request };
        ledger.acknowledge(&discard, 0, 0);
        assert_eq!(ledger.check(0, &block_of(None)), Ok(()));
        assert!(ledger.check(0, &written).is_err(), "it was seen to be gone");
        ledger.acknowledge(&Request { kind: Kind::WriteZeroes, ..request }, 0, 0);
        assert!(ledger.check(0, &written).is_err());
    }
}
