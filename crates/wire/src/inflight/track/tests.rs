//! A device that dies after any store of any history, and the one after it.
//!
//! Stores that come after the death are dropped, which is what a death is. Checked after each death: what is submitted again is
//! exactly what had been taken and was not in the used ring, in the order in which it was taken; the ring goes on right behind it; and
//! the device that starts then may die at any of its own steps as well. Not checked: what memory looks like to another processor.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::inflight::ring_bytes;

/// Memory that outlives a device, and how many more stores the device makes before it dies.
#[derive(Clone, Debug)]
struct Shared(Rc<RefCell<World>>);

#[derive(Clone, Debug)]
struct World {
    region: Vec<u8>,
    used_idx: u16,
    /// Heads in the used ring, oldest first.
    used: Vec<u16>,
    stores: usize,
    stores_max: usize,
}

impl World {
    /// Counts a store; false once the device is dead.
    fn lives(&mut self) -> bool {
        self.stores += 1;
        self.stores <= self.stores_max
    }
}

impl Shared {
    fn store(&self, at: u64, bytes: &[u8]) {
        let mut world = self.0.borrow_mut();
        if world.lives() {
            world.region[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn is_dead(&self) -> bool {
        let world = self.0.borrow();
        world.stores > world.stores_max
    }

    fn live_for(&self, stores: usize) {
        let mut world = self.0.borrow_mut();
        (world.stores, world.stores_max) = (0, stores);
    }
}

impl RegionMemory for Shared {
    fn read(&self, at: u64, into: &mut [u8]) {
        into.copy_from_slice(&self.0.borrow().region[at as usize..at as usize + into.len()]);
    }
    fn store_u8(&mut self, at: u64, value: u8) {
        self.store(at, &[value]);
    }
    fn store_u16(&mut self, at: u64, value: u16) {
        self.store(at, &value.to_ne_bytes());
    }
    fn store_u64(&mut self, at: u64, value: u64) {
        self.store(at, &value.to_ne_bytes());
    }
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    /// The driver submits this head.
    Submit(u16),
    /// The device takes the next one.
    Take,
    /// The device completes these, by their places among those in flight.
    Complete(Vec<usize>),
}

/// A driver, a ring and a device.
struct Run {
    size: u16,
    start: u16,
    memory: Shared,
    /// Everything the driver has submitted, oldest first.
    submitted: Vec<u16>,
    /// The device forgets requests before the driver can see that they are completed.
    forgetful: bool,
}

impl Run {
    fn new(size: u16, start: u16, forgetful: bool) -> Self {
        let world = World {
            region: vec![0; ring_bytes(size) as usize],
            used_idx: start,
            used: Vec::new(),
            stores: 0,
            stores_max: usize::MAX,
        };
        Run { size, start, memory: Shared(Rc::new(RefCell::new(world))), submitted: Vec::new(), forgetful }
    }

    /// Plays a history with a device that dies after `stores`. Returns how many it made, if it lived to the end.
    fn play(&mut self, steps: &[Step], stores: usize) -> Option<usize> {
        self.memory.live_for(stores);
        let (mut tracker, start) =
            Tracker::start(self.memory.clone(), self.size, self.start, self.start).expect("a region of ours");
        assert_eq!((start.recovered, &start.resubmit[..]), (false, &[][..]));
        let mut next = 0;
        let mut in_flight: Vec<u16> = Vec::new();
        for step in steps {
            match step {
                // The driver lives on, whatever the device does.
                Step::Submit(head) => self.submitted.push(*head),
                Step::Take => {
                    let head = self.submitted[next];
                    next += 1;
                    tracker.taken(head);
                    in_flight.push(head);
                }
                Step::Complete(places) => {
                    let batch: Vec<u16> = places.iter().map(|place| in_flight[*place]).collect();
                    in_flight.retain(|head| !batch.contains(head));
                    if self.forgetful {
                        batch.iter().for_each(|head| self.memory.store(entry(*head), &[0]));
                    }
                    self.complete(&mut tracker, &batch);
                }
            }
            if self.memory.is_dead() {
                return None;
            }
        }
        let made = self.memory.0.borrow().stores;
        Some(made)
    }

    fn complete(&self, tracker: &mut Tracker<Shared>, batch: &[u16]) {
        let used_idx = self.memory.0.borrow().used_idx.wrapping_add(batch.len() as u16);
        let memory = self.memory.clone();
        tracker.complete(batch, used_idx, |used_idx| {
            let mut world = memory.0.borrow_mut();
            if world.lives() {
                world.used_idx = used_idx;
                world.used.extend(batch);
            }
        });
    }

    /// What a driver would say is owed: everything it submitted that is not in the used ring, oldest first.
    fn owed(&self) -> Vec<u16> {
        let world = self.memory.0.borrow();
        let mut owed = self.submitted.clone();
        for head in &world.used {
            let at = owed.iter().position(|it| it == head).expect("nothing is completed that was not submitted");
            owed.remove(at);
        }
        owed
    }

    /// The next device starts, dies after every number of its stores, and at last lives. What it would do is checked each time.
    fn recover(&self) {
        let before = self.memory.0.borrow().clone();
        let owed = self.owed();
        for stores in 0.. {
            *self.memory.0.borrow_mut() = before.clone();
            self.memory.live_for(stores);
            // Front-ends name used.idx, avail.idx, or anything: a region that was kept knows better.
            let base =
                if before.region[8] == 0 { before.used_idx } else { before.used_idx.wrapping_add(stores as u16) };
            let started = Tracker::start(self.memory.clone(), self.size, before.used_idx, base);
            let dead = self.memory.is_dead();
            self.memory.live_for(usize::MAX);
            if dead {
                // The one after it finds a region that says the same.
                let (_, start) = Tracker::start(self.memory.clone(), self.size, before.used_idx, before.used_idx)
                    .expect("a region of ours");
                self.check(&start, &owed);
                continue;
            }
            let (mut tracker, start) = started.expect("a region of ours");
            self.check(&start, &owed);
            // And it can complete everything: the region is whole.
            if !start.resubmit.is_empty() {
                let mut batch = start.resubmit.clone();
                batch.reverse();
                self.complete(&mut tracker, &batch);
                let used_idx = self.memory.0.borrow().used_idx;
                let (_, start) = Tracker::start(self.memory.clone(), self.size, used_idx, used_idx).expect("ours");
                assert_eq!(start.resubmit, [0; 0], "everything was completed");
            }
            return;
        }
    }

    fn check(&self, start: &Start, owed: &[u16]) {
        let goes_on = start.next_available.wrapping_sub(self.start);
        let mut will_run = start.resubmit.clone();
        will_run.extend(&self.submitted[usize::from(goes_on)..]);
        assert_eq!(will_run, owed, "{start:?}, submitted {:?}, {:?}", self.submitted, self.memory);
    }
}

/// Every history of up to `depth` steps, each played once for every store at which its device may die.
struct Explorer {
    size: u16,
    start: u16,
    batch_max: usize,
    forgetful: bool,
    deaths: u64,
}

impl Explorer {
    fn explore(&mut self, steps: &mut Vec<Step>, waiting: usize, in_flight: &[u16], free: &[u16], depth: usize) {
        if depth == 0 {
            return self.die_everywhere(steps);
        }
        // The two heads freed longest ago and last: drivers reuse heads either way.
        for at in [0, free.len().saturating_sub(1)].into_iter().take(free.len().min(2)) {
            let mut rest = free.to_vec();
            let head = rest.remove(at);
            steps.push(Step::Submit(head));
            let mut queue = in_flight.to_vec();
            queue.push(head);
            self.explore(steps, waiting + 1, &queue, &rest, depth - 1);
            steps.pop();
        }
        if waiting > 0 {
            steps.push(Step::Take);
            self.explore(steps, waiting - 1, in_flight, free, depth - 1);
            steps.pop();
        }
        let taken = in_flight.len() - waiting;
        for batch in batches(taken, self.batch_max) {
            let mut rest = free.to_vec();
            rest.extend(batch.iter().map(|place| in_flight[*place]));
            let left: Vec<u16> =
                (0..in_flight.len()).filter(|place| !batch.contains(place)).map(|it| in_flight[it]).collect();
            steps.push(Step::Complete(batch));
            self.explore(steps, waiting, &left, &rest, depth - 1);
            steps.pop();
        }
    }

    fn die_everywhere(&mut self, steps: &[Step]) {
        self.die_from(steps, 0);
    }

    /// The first death is after so many stores.
    fn die_from(&mut self, steps: &[Step], first: usize) {
        for stores in first.. {
            let mut run = Run::new(self.size, self.start, self.forgetful);
            let lived = run.play(steps, stores);
            run.recover();
            self.deaths += 1;
            if lived.is_some() {
                return;
            }
        }
    }
}

/// All ordered choices of up to `max` of the first `count` places.
fn batches(count: usize, max: usize) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = Vec::new();
    let mut last: Vec<Vec<usize>> = vec![Vec::new()];
    for _ in 0..max.min(count) {
        last = last
            .iter()
            .flat_map(|batch| (0..count).filter(|it| !batch.contains(it)).map(|it| [&batch[..], &[it]].concat()))
            .collect();
        all.extend(last.iter().cloned());
    }
    all
}

fn explore(size: u16, start: u16, batch_max: usize, depth: usize, forgetful: bool) -> u64 {
    let mut explorer = Explorer { size, start, batch_max, forgetful, deaths: 0 };
    explorer.explore(&mut Vec::new(), 0, &[], &(0..size).collect::<Vec<u16>>(), depth);
    explorer.deaths
}

#[test]
fn a_death_after_any_store_of_any_short_history_loses_and_repeats_nothing() {
    let deaths: u64 = [(1, 3, 9), (2, 2, 9), (4, 3, 8), (8, 8, 7)]
        .into_iter()
        .map(|(size, batch_max, depth)| explore(size, 65_534, batch_max, depth, false))
        .sum();
    assert!(deaths > 100_000, "only {deaths} deaths");
}

#[test]
#[should_panic = "submitted"]
fn a_device_that_forgets_requests_too_early_is_found() {
    explore(2, 0, 1, 5, true);
}

/// Every set of requests in flight up to the whole ring, every batch of up to four of them in any order, and every death within it: all that a
/// device can leave in the region while it completes one batch.
#[test]
fn every_state_that_a_death_within_a_batch_can_leave_is_told_right_for_rings_up_to_eight() {
    let mut deaths = 0;
    for (size, start) in [(1, 65_535), (2, 65_535), (4, 65_533), (8, 65_530), (8, 0)] {
        let mut explorer = Explorer { size, start, batch_max: 4, forgetful: false, deaths: 0 };
        for taken in 1..=size {
            // Taken in an order that is not that of the heads.
            let order = (0..taken).map(|at| (at * 3 + 1) % size);
            let mut steps: Vec<Step> = order.flat_map(|head| [Step::Submit(head), Step::Take]).collect();
            // A region is begun with a store for each entry and four more; each request takes two.
            let before = usize::from(size) + 4 + 2 * usize::from(taken);
            for batch in batches(taken.into(), if size == 8 { 3 } else { 4 }) {
                steps.push(Step::Complete(batch));
                explorer.die_from(&steps, before);
                steps.pop();
            }
        }
        deaths += explorer.deaths;
    }
    assert!(deaths > 10_000, "only {deaths} deaths");
}

fn outliving(size: u16) -> Shared {
    let region = vec![0; ring_bytes(size) as usize];
    Shared(Rc::new(RefCell::new(World { region, used_idx: 0, used: Vec::new(), stores: 0, stores_max: usize::MAX })))
}

#[test]
fn what_is_taken_after_a_repair_comes_behind_what_was_in_flight_before() {
    let memory = outliving(8);
    let start = |memory: &Shared| Tracker::start(memory.clone(), 8, 0, 0).expect("it is ours");
    let (mut device, _) = start(&memory);
    // Heads fall, so that their order is not that of the table.
    let mut taken = Vec::new();
    for life in [&[7_u16, 6, 5][..], &[4, 3], &[2]] {
        life.iter().for_each(|head| device.taken(*head));
        taken.extend(life);
        let (next, begins) = start(&memory);
        assert_eq!(begins.resubmit, taken);
        device = next;
    }
}

#[test]
fn a_batch_that_was_repaired_is_not_repaired_again() {
    let memory = outliving(4);
    let (mut device, _) = Tracker::start(memory.clone(), 4, 0, 0).expect("a fresh one");
    device.taken(1);
    // It dies right behind the publication: the list is written, the mark is not cleared.
    memory.live_for(2);
    device.complete(&[1], 1, |_| {});
    assert!(memory.is_dead());
    memory.live_for(usize::MAX);
    let (mut device, start) = Tracker::start(memory.clone(), 4, 1, 0).expect("it is ours");
    assert_eq!((start.resubmit, start.repaired), (vec![], vec![1]));
    // The driver submits the same head again, and the device dies of it.
    device.taken(1);
    let (_, start) = Tracker::start(memory, 4, 1, 0).expect("it is ours");
    assert_eq!((start.resubmit, start.repaired), (vec![1], vec![]));
}
