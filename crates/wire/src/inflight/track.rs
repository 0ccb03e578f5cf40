//! Keeping a region: the steps of the specification, in an order in which a back-end may die after any of them.
//!
//! ```text
//! a request is taken      counter, then inflight = 1
//! a batch is completed    next and last_batch_head for each, then used.idx, then inflight = 0 for each, then used_idx
//! the next one starts     inflight = 0 for each of the last batch, then used_idx; what is still marked is submitted again
//! ```
//! Between any two of these stores the region, together with `used.idx` in guest memory, says which requests are owed: those that are
//! marked, less the last batch if `used.idx` has gone on without `used_idx`. The marks of that batch may be stale; the list that
//! starts at `last_batch_head` names it whole.

use warmswap_zoo::{Animal, loose};

use super::{ENTRY_BYTES, HEADER_BYTES, InflightRing, RegionError, read_split, u16_at, u64_at};

/// Offsets in a ring's header.
const VERSION_AT: u64 = 8;
const DESC_NUM_AT: u64 = 10;
const LAST_BATCH_HEAD_AT: u64 = 12;
const USED_IDX_AT: u64 = 14;
/// The only version there is; zero is a region that was never used.
const VERSION: u16 = 1;

/// One ring's part of a region, shared with whoever comes after us. Stores become visible in the order in which they are made.
///
/// Offsets are bytes from the start of the part and lie within [`super::ring_bytes`] of the ring's size; values are in the byte order of
/// the machine.
pub trait RegionMemory {
    /// Copies bytes out.
    fn read(&self, at: u64, into: &mut [u8]);
    /// Stores one byte.
    fn store_u8(&mut self, at: u64, value: u8);
    /// Stores two bytes at once.
    fn store_u16(&mut self, at: u64, value: u16);
    /// Stores eight bytes at once.
    fn store_u64(&mut self, at: u64, value: u64);
}

/// Where a ring goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The region had been kept by somebody before.
    pub recovered: bool,
    /// Requests to submit again, in the order in which they were taken.
    pub resubmit: Vec<u16>,
    /// Next index of the available ring to take.
    pub next_available: u16,
    /// Requests of the last batch whose marks were stale.
    pub repaired: Vec<u16>,
}

/// Keeps one ring's part of a region.
#[derive(Debug)]
pub struct Tracker<M> {
    memory: M,
    size: u16,
    counter: u64,
    last_batch_head: u16,
}

impl<M: RegionMemory> Tracker<M> {
    /// Begins with a ring of `size` entries whose `used.idx` is `used_idx`. A region that was never used is initialised and the ring goes
    /// on at `base`; another one is repaired, and what it marks is owed.
    ///
    /// A region that was kept knows better than any `base` where the available ring goes on, with nothing in flight as well: front-ends
    /// name their own rules' answer there, which may lie behind requests that nobody has taken. `used_idx` itself is where a region starts, never zero: a repair of a region that starts at zero would take
    /// requests that were never completed for completed ones.
    ///
    /// # Errors
    /// A region that does not describe this ring; it is left as it is.
    pub fn start(memory: M, size: u16, used_idx: u16, base: u16) -> Result<(Self, Start), RegionError> {
        let mut bytes = vec![0; (HEADER_BYTES + ENTRY_BYTES * u64::from(size)) as usize];
        memory.read(0, &mut bytes);
        let mut tracker = Tracker { memory, size, counter: 1, last_batch_head: 0 };
        if bytes[VERSION_AT as usize..][..2] == [0; 2] {
            tracker.initialise(used_idx);
            let start = Start { recovered: false, resubmit: Vec::new(), next_available: base, repaired: Vec::new() };
            return Ok((tracker, start));
        }
        let ring = read_split(&bytes, size, used_idx)?;
        tracker.repair(&ring, used_idx);
        tracker.last_batch_head = u16_at(&bytes, LAST_BATCH_HEAD_AT as usize);
        tracker.counter = ring.heads.last().map_or(1, |newest| counter_of(&bytes, *newest).wrapping_add(1));
        let in_flight = u16::try_from(ring.heads.len()).expect("at most as many as the ring has entries");
        let next_available = match in_flight {
            0 if loose(Animal::BaseOverRegion) => base,
            _ if loose(Animal::ResubmittedTwice) => used_idx,
            _ => used_idx.wrapping_add(in_flight),
        };
        let start = Start { recovered: true, resubmit: ring.heads, next_available, repaired: ring.repaired };
        Ok((tracker, start))
    }

    /// The version comes last: without it the next one begins anew.
    fn initialise(&mut self, used_idx: u16) {
        (0..self.size).for_each(|head| self.memory.store_u8(entry(head), 0));
        self.memory.store_u16(DESC_NUM_AT, self.size);
        self.memory.store_u16(LAST_BATCH_HEAD_AT, 0);
        self.memory.store_u16(USED_IDX_AT, if loose(Animal::RegionAtZero) { 0 } else { used_idx });
        self.memory.store_u16(VERSION_AT, VERSION);
    }

    fn repair(&mut self, ring: &InflightRing, used_idx: u16) {
        for head in &ring.repaired {
            self.memory.store_u8(entry(*head), 0);
        }
        if ring.used_idx != used_idx {
            self.memory.store_u16(USED_IDX_AT, used_idx);
        }
    }

    /// A request was taken from the available ring. Its head must be below the ring's size and not in flight.
    pub fn taken(&mut self, head: u16) {
        assert!(head < self.size, "heads are checked when they are taken");
        if loose(Animal::MarkedBeforeCounted) {
            self.memory.store_u8(entry(head), 1);
        }
        self.memory.store_u64(entry(head) + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.memory.store_u8(entry(head), 1);
    }

    /// Completes a batch: `publish` stores `used_idx` as the used ring's new index, behind whose slots the batch has been written.
    /// Once it has, the batch is completed whatever happens.
    pub fn complete(&mut self, batch: &[u16], used_idx: u16, publish: impl FnOnce(u16)) {
        for head in batch {
            self.memory.store_u16(entry(*head) + 6, self.last_batch_head);
            self.last_batch_head = *head;
            self.memory.store_u16(LAST_BATCH_HEAD_AT, *head);
        }
        if loose(Animal::ClearedBeforePublished) {
            batch.iter().for_each(|head| self.memory.store_u8(entry(*head), 0));
        }
        publish(used_idx);
        for head in batch.iter().filter(|_| !loose(Animal::MarksNeverCleared)) {
            self.memory.store_u8(entry(*head), 0);
        }
        self.memory.store_u16(USED_IDX_AT, used_idx);
    }
}

fn entry(head: u16) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(head)
}

fn counter_of(bytes: &[u8], head: u16) -> u64 {
    u64_at(bytes, entry(head) as usize + 8)
}

#[cfg(test)]
mod tests;
