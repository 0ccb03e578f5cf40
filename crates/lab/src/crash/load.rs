//! The driver: a few bursts of requests, and the book that every completion is held against.

use std::path::Path;

use anyhow::Context as _;
use warmswap_wire::ring::Descriptor;

use super::config::{Chains, Config};
use super::stamp::{self, WORDS};
use crate::common::rng::Rng;
use crate::guest::{BLOCK, BlkQueue, Completion, GuestMemory, Kind, QueueShape, Request, Slot, Status, VringFault};

/// Blocks of the image: few, so that most are written more than once.
pub(super) const BLOCKS: u64 = 24;
/// Bursts of a run.
const BURSTS: u32 = 2;

/// What went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Requests that were never completed.
    pub(super) lost: u64,
    /// Completions of what was not in flight, or more of them than there were requests.
    pub(super) duplicated: u64,
    /// Blocks with other contents than they must have, read by the driver or found in the image.
    pub(super) corrupted: u64,
    /// Completions with another status or length than is right.
    pub(super) wrong: u64,
    /// Completions that the driver asked to be called for and was not.
    pub(super) uncalled: u64,
    /// In words, the first few.
    pub(super) words: Vec<String>,
}

impl Damage {
    /// Whether there is any.
    pub(super) fn is_seen(&self) -> bool {
        self.lost + self.duplicated + self.corrupted + self.wrong + self.uncalled > 0
    }

    /// Notes one in words.
    pub(super) fn say(&mut self, words: String) {
        if self.words.len() < 4 {
            self.words.push(words);
        }
    }
}

/// Bursts that are submitted and completed.
#[derive(Debug)]
pub(super) struct Load {
    rng: Rng,
    /// Number of the last completed write of each block.
    written: Vec<u64>,
    /// Blocks that a request in flight uses.
    busy: Vec<bool>,
    /// What write is in flight in each slot.
    writing: Vec<u64>,
    sequence: u64,
    bursts: u32,
    left: u32,
    next: Option<Request>,
    direct_percent: u64,
    /// Requests submitted.
    pub(super) submitted: u64,
    /// Completions taken.
    pub(super) completed: u64,
    /// What went wrong.
    pub(super) damage: Damage,
}

impl Load {
    /// The ring of a series.
    pub(super) fn shape(config: &Config, rng: &mut Rng) -> QueueShape {
        // Some pass the end of the indices' range.
        let start = rng.choose(&[0, 65_533]);
        QueueShape { size: config.size, depth: config.size, blocks_max: 2, segments_max: 2, start }
    }

    /// A load for the series.
    pub(super) fn new(config: &Config, rng: Rng) -> Self {
        Load {
            rng,
            written: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            writing: vec![0; config.size.into()],
            sequence: 0,
            bursts: BURSTS,
            left: 0,
            next: None,
            direct_percent: if config.chains == Chains::Direct || config.size < 4 { 0 } else { 25 },
            submitted: 0,
            completed: 0,
            damage: Damage::default(),
        }
    }

    /// Whether everything is submitted and completed.
    pub(super) fn is_done(&self, queue: &BlkQueue) -> bool {
        self.bursts == 0 && self.left == 0 && queue.vring().outstanding() == 0
    }

    /// Takes what is completed.
    pub(super) fn take(&mut self, queue: &mut BlkQueue) {
        loop {
            match queue.pop() {
                Ok(Some(done)) => self.judge(queue, &done),
                Ok(None) => return,
                Err(fault) => {
                    self.damage.duplicated += 1;
                    self.damage.say(format!("{fault}"));
                    // The index leads nowhere.
                    if let VringFault::UsedIndex { .. } = fault.0 {
                        return;
                    }
                }
            }
        }
    }

    /// Submits what there is room for: a burst begins when most of the one before is completed. True if there was
    /// anything.
    pub(super) fn submit(&mut self, queue: &mut BlkQueue) -> bool {
        let (size, before) = (queue.vring().size(), self.submitted);
        if self.left == 0 && self.bursts > 0 && queue.vring().outstanding() <= size / 4 {
            self.bursts -= 1;
            // The last one alone leaves room in the ring.
            self.left = if self.bursts == 0 { u32::from(size / 2 + 1) } else { u32::from(size) };
        }
        while self.left > 0 {
            let Some(slot) = (0..queue.shape().depth).find(|slot| queue.in_flight(*slot).is_none()) else { break };
            let request = self.next.take().unwrap_or_else(|| self.draw());
            let sequence = self.prepare(queue, slot, &request);
            if !queue.submit(slot, request) {
                self.next = Some(request);
                break;
            }
            self.writing[usize::from(slot)] = sequence;
            self.blocks(&request).for_each(|at| self.busy[at] = true);
            self.left -= 1;
            self.submitted += 1;
        }
        self.submitted > before
    }

    fn draw(&mut self) -> Request {
        if self.rng.percent(15) {
            return Request { direct: self.rng.percent(self.direct_percent), ..Request::flush() };
        }
        let blocks = self.rng.between(1, 2) as u32;
        // Two requests in flight never have a block in common: what they do to it would be up to chance.
        let first = loop {
            let first = self.rng.below(BLOCKS - u64::from(blocks) + 1);
            if (first..first + u64::from(blocks)).all(|at| !self.busy[at as usize]) {
                break first;
            }
        };
        let request = if self.rng.percent(50) { Request::read(first, blocks) } else { Request::write(first, blocks) };
        let segments = if blocks == 2 && self.rng.percent(50) { 2 } else { 1 };
        Request { segments, direct: segments == 1 && self.rng.percent(self.direct_percent), ..request }
    }

    fn blocks(&self, request: &Request) -> std::ops::Range<usize> {
        request.block as usize..request.block as usize + request.blocks as usize
    }

    fn prepare(&mut self, queue: &BlkQueue, slot: Slot, request: &Request) -> u64 {
        let data = queue.data(slot);
        let words = data.mapping.words(data.start, data.length);
        if request.kind != Kind::Write {
            stamp::poison(words);
            return 0;
        }
        self.sequence += 1;
        for (at, block) in words.chunks_exact(WORDS).zip(request.block..) {
            stamp::fill(at, block, self.sequence);
        }
        self.sequence
    }

    fn judge(&mut self, queue: &BlkQueue, done: &Completion) {
        self.completed += 1;
        let request = done.request;
        let data = queue.data(done.slot);
        let words = data.mapping.words(data.start, data.length);
        if (done.status, done.len) != (Status::OK, request.used_bytes()) {
            self.damage.wrong += 1;
            let (status, len, right) = (done.status, done.len, request.used_bytes());
            self.damage.say(format!("{request:?}: status {status}, {len} bytes, expected OK and {right}"));
        }
        for (words, at) in words.chunks_exact(WORDS).zip(self.blocks(&request)) {
            self.busy[at] = false;
            let right = self.written[at];
            match request.kind {
                Kind::Read if !stamp::matches(words, at as u64, right) => {
                    self.damage.corrupted += 1;
                    self.damage.say(format!("block {at} was read and is not as write {right} left it"));
                }
                Kind::Write => self.written[at] = self.writing[usize::from(done.slot)],
                _ => {}
            }
        }
        // Whoever does it again writes this, or does not find out what to do.
        stamp::poison(words);
        let table = queue.table(done.slot);
        stamp::poison(table.mapping.words(table.start, table.length & !7));
        let nowhere = Descriptor { addr: GuestMemory::unmapped_address(), len: 16, flags: 0, next: 0 };
        queue.vring().poison(done.head, nowhere);
    }

    /// Nothing more comes: what is in flight is lost, and the image is what it is.
    pub(super) fn conclude(&mut self, queue: &BlkQueue, image: &Path) -> anyhow::Result<()> {
        let vring = queue.vring();
        self.damage.lost += u64::from(vring.outstanding());
        if vring.outstanding() > 0 {
            self.damage.say(format!("never completed: {}", vring.describe()));
        }
        let used = u64::from(vring.used_idx().wrapping_sub(queue.shape().start));
        if used > self.submitted & 0xffff {
            self.damage.duplicated += 1;
            self.damage.say(format!("{used} entries in the used ring for {} requests", self.submitted));
        }
        let bytes = std::fs::read(image).context("reading the image")?;
        for (at, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
            // A write that was lost may or may not have been done.
            if !self.busy[at] && !stamp::bytes_match(bytes, at as u64, self.written[at]) {
                self.damage.corrupted += 1;
                self.damage.say(format!("block {at} of the image is not as write {} left it", self.written[at]));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::config::{Wanted, all};

    fn queue(config: &Config) -> (Load, BlkQueue) {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        let mut rng = Rng::new(1, config.stream());
        let shape = Load::shape(config, &mut rng);
        let mut queue = BlkQueue::new(&mut memory, 0, shape).expect("queue");
        queue.reset(config.event_idx, config.chains == Chains::Indirect, shape.start);
        (Load::new(config, rng), queue)
    }

    #[test]
    fn every_ring_has_several_in_flight_where_it_has_room() {
        for config in all(&Wanted::default()) {
            let (mut load, mut queue) = queue(&config);
            assert!(load.submit(&mut queue) && !load.submit(&mut queue), "{config}");
            let in_flight = queue.vring().outstanding();
            let least = if config.chains == Chains::Indirect { config.size / 2 } else { config.size / 4 };
            assert!(in_flight >= least, "{config}: {in_flight} in flight");
        }
    }

    #[test]
    fn what_is_not_completed_is_lost() {
        let (mut load, mut queue) = queue(&all(&Wanted::default())[0]);
        load.submit(&mut queue);
        let image = std::env::temp_dir().join(format!("lab-crash-test-{}", std::process::id()));
        std::fs::write(&image, vec![0; BLOCKS as usize * BLOCK]).expect("image");
        load.conclude(&queue, &image).expect("readable");
        assert_eq!(load.damage.lost, u64::from(queue.vring().outstanding()));
        assert_eq!((load.damage.duplicated, load.damage.corrupted), (0, 0));
        load.written[0] = 1;
        load.busy[0] = false;
        load.conclude(&queue, &image).expect("readable");
        assert_eq!(load.damage.corrupted, 1);
        std::fs::remove_file(&image).expect("clean up");
    }
}
