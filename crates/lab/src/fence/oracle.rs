//! Requests whose content is told apart by generation, and the watch for what arrives after their completion.
//!
//! A completed request belongs to the past: its buffer is the guest's again and gets a new stamp, its extent holds what was
//! acknowledged. Whatever else appears there later was written by somebody who had no right to any more.

use serde::Serialize;

use super::disk::{Disk, EXTENT, EXTENT_BLOCKS, EXTENTS};
use super::stamp::{Generation, Stamp, explain};
use crate::common::rng::Rng;
use crate::guest::{BLOCK, BlkQueue, Completion, Kind, Request, Slot, Status, Window};

/// Where a late write was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Place {
    /// A buffer of the guest.
    Memory,
    /// The disk.
    Disk,
}

/// A write that came after its request was over.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LateWrite {
    /// Where.
    place: Place,
    /// First seen, after the kill.
    after_kill_ms: f64,
    /// What had to be there.
    expected: String,
    /// What was there instead.
    found: String,
    /// How many bytes of it, at the end.
    bytes: usize,
}

/// A place that must not change any more.
#[derive(Debug)]
struct Settled {
    place: Place,
    window: Window,
    stamp: Stamp,
    late: Option<LateWrite>,
}

/// One of the requests the primary dies with.
#[derive(Clone, Copy, Debug)]
struct Item {
    kind: Kind,
    extent: u16,
    /// Its block is written again, by another request, as soon as it is completed.
    superseded: bool,
    done: bool,
    /// When its data was first seen to have arrived while it was still in flight.
    landed_ms: Option<f64>,
}

/// The requests of a round.
#[derive(Debug)]
pub(super) struct Oracle<'a> {
    disk: &'a Disk,
    items: Vec<Item>,
    settled: Vec<Settled>,
    /// Later writes that were not acknowledged yet.
    superseding: usize,
    wrong: Vec<String>,
    first_completion_ms: Option<f64>,
}

impl<'a> Oracle<'a> {
    /// Draws `each` reads and as many writes, to different extents.
    pub(super) fn new(disk: &'a Disk, each: u16, rng: &mut Rng) -> Self {
        let mut extents: Vec<u16> = (1..EXTENTS).collect();
        let mut items = Vec::new();
        for number in 0..2 * each {
            let extent = extents.swap_remove(rng.below(extents.len() as u64) as usize);
            let kind = if number < each { Kind::Read } else { Kind::Write };
            let superseded = kind == Kind::Write && number % 2 == 1;
            items.push(Item { kind, extent, superseded, done: false, landed_ms: None });
        }
        Oracle { disk, items, settled: Vec::new(), superseding: 0, wrong: Vec::new(), first_completion_ms: None }
    }

    /// Bytes of data of all requests.
    pub(super) fn bytes(&self) -> u64 {
        (self.items.len() * EXTENT) as u64
    }

    /// Slots a queue must have: each request may be followed by another.
    pub(super) fn slots(each: u16) -> u16 {
        4 * each
    }

    /// Stamps the buffers, submits everything and kicks.
    pub(super) fn submit(&self, queue: &mut BlkQueue) -> bool {
        let submitted = (0..).zip(&self.items).all(|(slot, item)| {
            let generation = if item.kind == Kind::Read { Generation::Pending } else { Generation::Written };
            Stamp { generation, extent: item.extent }.fill(queue.data(slot));
            queue.submit(slot, request(item.kind, item.extent))
        });
        queue.kick();
        submitted
    }

    /// Requests that were not completed yet.
    pub(super) fn in_flight(&self) -> usize {
        self.items.iter().filter(|item| !item.done).count() + self.superseding
    }

    /// Takes what was completed, then looks for what must not be.
    pub(super) fn step(&mut self, queue: &mut BlkQueue, after_kill_ms: f64) -> anyhow::Result<()> {
        while let Some(completion) = queue.pop()? {
            self.first_completion_ms.get_or_insert(after_kill_ms);
            self.complete(&completion, queue);
        }
        self.look_for_landings(queue, after_kill_ms);
        for settled in self.settled.iter_mut().filter(|settled| settled.late.is_none()) {
            if let Some(found) = settled.stamp.glance(&settled.window) {
                settled.late = Some(late(settled, after_kill_ms, found));
            }
        }
        Ok(())
    }

    /// What was completed or landed so far was so before the kill.
    pub(super) fn begin_silence(&mut self) {
        self.first_completion_ms = None;
        self.items.iter_mut().for_each(|item| item.landed_ms = None);
    }

    fn complete(&mut self, completion: &Completion, queue: &mut BlkQueue) {
        if completion.status != Status::OK {
            self.wrong.push(format!("{:?} ended with {}", completion.request, completion.status));
        }
        let slot = completion.slot;
        let count = self.items.len() as u16;
        match self.items.get_mut(usize::from(slot)) {
            Some(item) => {
                item.done = true;
                let item = *item;
                self.complete_first(item, slot, count, queue);
            }
            None => {
                self.superseding -= 1;
                let extent = self.items[usize::from(slot - count)].extent;
                self.settle(Place::Disk, self.disk.extent(extent), Stamp { generation: Generation::Newer, extent });
            }
        }
    }

    fn complete_first(&mut self, item: Item, slot: Slot, count: u16, queue: &mut BlkQueue) {
        let extent = item.extent;
        let of = |generation| Stamp { generation, extent };
        let buffer = queue.data(slot).clone();
        if item.kind == Kind::Read {
            if let Some(word) = of(Generation::Original).glance(&buffer) {
                self.wrong.push(format!("a read of extent {extent} returned {}", explain(word)));
            }
            self.settle_stamped(Place::Memory, buffer, of(Generation::Recycled));
        } else if item.superseded {
            // The old buffer stays as it was: a late write would bring the old block back.
            let later = slot + count;
            of(Generation::Newer).fill(queue.data(later));
            self.superseding += 1;
            if !queue.submit(later, request(Kind::Write, extent)) {
                self.wrong.push("the ring has no room for a later write".into());
            }
            queue.kick();
        } else {
            // The buffer is used for something else: a late write would bring that to the disk.
            self.settle(Place::Disk, self.disk.extent(extent), of(Generation::Written));
            self.settle_stamped(Place::Memory, buffer, of(Generation::Recycled));
        }
    }

    fn settle_stamped(&mut self, place: Place, window: Window, stamp: Stamp) {
        stamp.fill(&window);
        self.settle(place, window, stamp);
    }

    fn settle(&mut self, place: Place, window: Window, stamp: Stamp) {
        self.settled.push(Settled { place, window, stamp, late: None });
    }

    /// What arrives while its request is in flight is not late; the last of it is what the fence has to wait for.
    fn look_for_landings(&mut self, queue: &BlkQueue, after_kill_ms: f64) {
        if self.first_completion_ms.is_some() {
            return;
        }
        for (slot, item) in (0..).zip(&mut self.items) {
            if item.done || item.landed_ms.is_some() {
                continue;
            }
            let (generation, window) = match item.kind {
                Kind::Read => (Generation::Pending, queue.data(slot).clone()),
                _ => (Generation::Original, self.disk.extent(item.extent)),
            };
            let untouched = Stamp { generation, extent: item.extent };
            item.landed_ms = untouched.glance(&window).map(|_| after_kill_ms);
        }
    }

    /// Looks at every word once more, and at the extents nobody wrote, and says what was found.
    pub(super) fn finish(mut self, after_kill_ms: f64) -> Findings {
        for extent in 0..EXTENTS {
            if !self.items.iter().any(|item| item.extent == extent && item.kind == Kind::Write) {
                let stamp = Stamp { generation: Generation::Original, extent };
                self.settle(Place::Disk, self.disk.extent(extent), stamp);
            }
        }
        for settled in &mut self.settled {
            let words = settled.stamp.foreign_words(&settled.window);
            if words > 0 && settled.late.is_none() {
                let found = settled.stamp.glance(&settled.window).unwrap_or_default();
                settled.late = Some(late(settled, after_kill_ms, found));
            }
            if let Some(late) = &mut settled.late {
                late.bytes = words * 8;
            }
        }
        let landed: Vec<f64> = self.items.iter().filter_map(|item| item.landed_ms).collect();
        Findings {
            late: self.settled.into_iter().filter_map(|settled| settled.late).collect(),
            wrong: self.wrong,
            landed: landed.len(),
            last_landing_ms: landed.into_iter().fold(0.0, f64::max),
            first_completion_ms: self.first_completion_ms,
        }
    }
}

/// What a round showed.
#[derive(Debug)]
pub(super) struct Findings {
    /// Writes after the completion of their request.
    pub(super) late: Vec<LateWrite>,
    /// Other mistakes: statuses, contents of reads.
    pub(super) wrong: Vec<String>,
    /// Requests whose data was seen to arrive after the kill and before any completion. All of the dead primary's, where the
    /// fence holds; some of the shadow's are among them, for a look may fall between its data and its completion.
    pub(super) landed: usize,
    /// When the last of these arrived, after the kill.
    pub(super) last_landing_ms: f64,
    /// When the guest got the first completion after the kill.
    pub(super) first_completion_ms: Option<f64>,
}

fn late(settled: &Settled, after_kill_ms: f64, found: u64) -> LateWrite {
    let expected = explain_stamp(settled.stamp);
    LateWrite { place: settled.place, after_kill_ms, expected, found: explain(found), bytes: 0 }
}

fn explain_stamp(stamp: Stamp) -> String {
    format!("{:?} of extent {}", stamp.generation, stamp.extent).to_lowercase()
}

/// A request for a whole extent.
pub(super) fn request(kind: Kind, extent: u16) -> Request {
    let block = u64::from(extent) * (EXTENT / BLOCK) as u64;
    Request { kind, ..Request::read(block, EXTENT_BLOCKS) }
}
