//! What a driver asks of its disk: which requests, how large, in what order. No I/O here.

use super::backend::BLOCKS;
use crate::common::rng::Rng;
use crate::guest::{BLOCK, Request};

/// Which requests there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    /// Reads.
    Reads,
    /// Writes.
    Writes,
    /// As many of both, by chance.
    Both,
}

/// Where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Anywhere, at multiples of their size.
    Random,
    /// One after the other, each queue in a part of the disk of its own, over and over.
    Sequential,
}

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    /// Blocks of the disk.
    pub(super) disk_blocks: u64,
    /// Blocks of a request.
    pub(super) blocks: u32,
    /// Which requests.
    pub(super) mix: Mix,
    /// Where they go.
    pub(super) order: Order,
}

impl Load {
    /// Random 4 KiB reads and writes all over an image of the benches.
    pub(super) const MIXED: Load = Load { disk_blocks: BLOCKS, blocks: 1, mix: Mix::Both, order: Order::Random };

    /// Bytes of a request.
    pub(super) fn bytes(&self) -> usize {
        self.blocks as usize * BLOCK
    }
}

/// The requests of a load, one after the other.
#[derive(Debug)]
pub(super) struct Stream {
    load: Load,
    rng: Rng,
    /// How many requests find place on the disk, and in each queue's part of it.
    places: u64,
    part: u64,
    /// Where in its part each queue goes on.
    next: Vec<u64>,
}

impl Stream {
    /// A stream for `queues` queues.
    pub(super) fn new(load: Load, queues: u16, rng: Rng) -> Self {
        let places = load.disk_blocks / u64::from(load.blocks);
        let part = places / u64::from(queues);
        assert!(part > 0, "{load:?} has no place for {queues} queues");
        Stream { load, rng, places, part, next: vec![0; queues.into()] }
    }

    /// The next request of a queue, and a number by which its buffer may be chosen.
    pub(super) fn next(&mut self, queue: usize) -> (Request, usize) {
        let choice = self.rng.next();
        let place = match self.load.order {
            Order::Random => (choice >> 32) % self.places,
            Order::Sequential => {
                let next = &mut self.next[queue];
                let at = *next;
                *next = if at + 1 < self.part { at + 1 } else { 0 };
                queue as u64 * self.part + at
            }
        };
        let is_read = match self.load.mix {
            Mix::Reads => true,
            Mix::Writes => false,
            Mix::Both => choice & 1 == 0,
        };
        let block = place * u64::from(self.load.blocks);
        let request = if is_read { Request::read } else { Request::write };
        (request(block, self.load.blocks), (choice >> 1) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Kind;

    fn stream(load: Load, queues: u16) -> Stream {
        Stream::new(load, queues, Rng::new(1, 1))
    }

    #[test]
    fn random_requests_lie_within_the_disk_at_multiples_of_their_size() {
        let load = Load { disk_blocks: 100, blocks: 32, mix: Mix::Writes, order: Order::Random };
        let mut stream = stream(load, 2);
        let blocks: Vec<u64> = (0..100).map(|turn| stream.next(turn % 2).0.block).collect();
        assert!(blocks.iter().all(|block| [0, 32, 64].contains(block)), "{blocks:?}");
        assert!([0, 32, 64].iter().all(|block| blocks.contains(block)), "{blocks:?}");
    }

    #[test]
    fn sequential_queues_have_a_part_each_and_come_back_to_its_start() {
        let load = Load { disk_blocks: 12, blocks: 2, mix: Mix::Reads, order: Order::Sequential };
        let mut stream = stream(load, 2);
        for expected in [[0, 6], [2, 8], [4, 10], [0, 6]] {
            assert_eq!([0, 1].map(|queue| stream.next(queue).0.block), expected);
        }
    }

    #[test]
    fn a_mix_is_what_its_name_says() {
        let kinds = |mix| {
            let mut stream = stream(Load { mix, ..Load::MIXED }, 1);
            let reads = (0..1000).filter(|_| stream.next(0).0.kind == Kind::Read).count();
            (reads > 400, reads < 600)
        };
        assert_eq!(kinds(Mix::Reads), (true, false));
        assert_eq!(kinds(Mix::Writes), (false, true));
        assert_eq!(kinds(Mix::Both), (true, true));
    }
}
