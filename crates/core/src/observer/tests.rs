//! The observer against a driver and a device that know the truth.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::*;
use crate::testing::{PlainMemory, PlainRing, Random};

/// Driver and device with the true set of requests in flight, in the order of their submission.
struct World {
    random: Random,
    free: Vec<u16>,
    inflight: Vec<u16>,
    depth: usize,
    last_in_first_out: bool,
}

impl World {
    fn new(seed: u64, size: u16) -> Self {
        let mut random = Random(seed | 1);
        let depth = 1 + random.below(u64::from(size)) as usize;
        let last_in_first_out = random.below(2) == 0;
        World { random, free: (0..size).rev().collect(), inflight: Vec::new(), depth, last_in_first_out }
    }

    /// One submission or one completion, in any order of completions.
    fn step(&mut self, ring: &mut PlainRing) {
        let submits = self.inflight.is_empty() || (self.inflight.len() < self.depth && self.random.below(2) == 0);
        if submits {
            let at = if self.last_in_first_out {
                self.free.len() - 1
            } else {
                self.random.below(self.free.len() as u64) as usize
            };
            let head = self.free.remove(at);
            self.inflight.push(head);
            ring.submit(head);
        } else {
            let at = self.random.below(self.inflight.len() as u64) as usize;
            let head = self.inflight.remove(at);
            self.free.push(head);
            ring.complete(head);
        }
    }
}

fn memory_with(ring: PlainRing) -> PlainMemory {
    PlainMemory { rings: HashMap::from([(0, ring)]), ..PlainMemory::default() }
}

/// Words that are written one by one, until whoever writes them is killed.
struct Notes {
    words: Vec<u64>,
    left: usize,
}

impl Notes {
    fn write(&mut self, at: usize, word: u64) {
        if self.left > 0 {
            self.left -= 1;
            self.words[at] = word;
        }
    }
}

/// A broker's life: it looks and takes notes, is killed in the middle of that, and the next one reads an old record and the notes.
#[test]
fn whoever_reads_the_notes_knows_what_the_last_look_but_one_at_most_has_told() {
    let (mut later, mut torn) = (0, 0);
    for seed in 1..4_000_u64 {
        let size = [2, 8, 16, 64][(seed % 4) as usize];
        let mut world = World::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), size);
        let mut memory = memory_with(PlainRing::new(size, 65_500));
        let mut observer = Observer::new(Layout::new(size).expect("a power of two"), 65_500, Nanos(seed));
        let mut notes = Notes { words: vec![0; Observer::notes_len(size)], left: usize::MAX };
        for life in 0..4_u64 {
            let record = serde_json::to_string(&observer).expect("it can be written down");
            // What each look told, newest last.
            let mut told = vec![record.clone()];
            let looks = world.random.below(12);
            for look in 0..=looks {
                for _ in 0..world.random.below(u64::from(size)) {
                    world.step(memory.ring(0));
                }
                observer.observe(Nanos::from_micros(100 * life + look + 1), 0, &mut memory);
                told.push(serde_json::to_string(&observer).expect("it can be written down"));
                if look == looks {
                    notes.left = world.random.below(2 * u64::from(size) + 16) as usize;
                }
                observer.note(&mut |at, word| notes.write(at, word));
            }
            let mut next: Observer = serde_json::from_str(&record).expect("it can be read");
            next.recall(&|at| notes.words[at]);
            let knows = serde_json::to_string(&next).expect("it can be written down");
            let whole = notes.left > 0;
            let expected = if whole { told.len() - 1 } else { told.len() - 2 };
            // The last word may have been the last that was written.
            assert!(knows == told[expected] || knows == told[told.len() - 1], "seed {seed}, life {life}: {knows}");
            later += usize::from(knows != record);
            torn += usize::from(!whole);
            // It goes on from there, with what happened meanwhile.
            next.observe(Nanos::from_micros(100 * life + 90), 0, &mut memory);
            if let Ok(heads) = next.survivors() {
                assert_eq!(heads, world.inflight, "seed {seed}, life {life}");
            }
            notes.left = usize::MAX;
            next.note(&mut |at, word| notes.write(at, word));
            observer = next;
        }
    }
    assert!(later > 5_000 && torn > 2_000, "both happen: {later} went on from notes, {torn} from a torn copy");
}

#[test]
fn notes_of_another_ring_or_none_are_not_believed() {
    let mut memory = memory_with(PlainRing::new(8, 0));
    let mut before = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(1));
    memory.ring(0).submit(3);
    before.observe(Nanos(2), 0, &mut memory);
    let mut words = vec![0; Observer::notes_len(8)];
    before.note(&mut |at, word| words[at] = word);
    let mut after = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(5));
    after.recall(&|at| words[at]);
    assert_eq!(after.survivors(), Ok(vec![]));
    after.recall(&|_| 0);
    assert_eq!(after.survivors(), Ok(vec![]));
    let mut next = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(1));
    next.recall(&|at| words[at]);
    assert_eq!(next.survivors(), Ok(vec![3]));
}

#[test]
fn random_histories_between_observations_leave_no_wrong_exact_set() {
    let (mut exact, mut inexact) = (0, 0);
    for seed in 1..3_000_u64 {
        let size = [4, 8, 16, 64][(seed % 4) as usize];
        let start = [0, 65_530, 77][(seed % 3) as usize];
        let mut world = World::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), size);
        let mut memory = memory_with(PlainRing::new(size, start));
        let mut observer = Observer::new(Layout::new(size).expect("a power of two"), start, Nanos(0));
        for look in 1..60_u64 {
            // Now and then more passes than the ring holds.
            let steps =
                if world.random.below(12) == 0 { 4 * u64::from(size) } else { world.random.below(u64::from(size)) };
            for _ in 0..steps {
                world.step(memory.ring(0));
            }
            observer.observe(Nanos::from_micros(look), 0, &mut memory);
            match observer.survivors() {
                Ok(heads) => {
                    exact += 1;
                    assert_eq!(heads, world.inflight, "seed {seed}, look {look}");
                }
                Err(Knowledge::Violated(violation)) => panic!("seed {seed}, look {look}: {violation}"),
                Err(_) => inexact += 1,
            }
        }
    }
    assert!(exact > 50_000 && inexact > 5_000, "both happen: {exact} exact, {inexact} inexact");
}

#[test]
fn a_ring_that_moves_while_it_is_read_leaves_no_wrong_set_once_it_rests() {
    let mut exact = 0;
    for seed in 1..3_000_u64 {
        let size = [4, 8, 16, 64][(seed % 4) as usize];
        let world = Rc::new(RefCell::new(World::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), size)));
        let moves = Rc::new(RefCell::new(true));
        let mut memory = memory_with(PlainRing::new(size, 65_500));
        memory.live = RefCell::new(memory.rings.clone());
        let (mover, enabled) = (Rc::clone(&world), Rc::clone(&moves));
        memory.on_read = Some(RefCell::new(Box::new(move |ring| {
            let mut world = mover.borrow_mut();
            if *enabled.borrow() && world.random.below(3) == 0 {
                world.step(ring);
            }
        })));
        let mut observer = Observer::new(Layout::new(size).expect("a power of two"), 65_500, Nanos(0));
        for look in 1..40_u64 {
            // The fence: nothing moves any more.
            *moves.borrow_mut() = look % 4 != 0;
            observer.observe(Nanos::from_micros(look), 0, &mut memory);
            if look % 4 != 0 {
                continue;
            }
            if let Ok(heads) = observer.survivors() {
                exact += 1;
                assert_eq!(heads, world.borrow().inflight, "seed {seed}, look {look}");
            } else {
                assert!(
                    !matches!(observer.knowledge(), Knowledge::Violated(_)),
                    "seed {seed}: {:?}",
                    observer.knowledge()
                );
            }
        }
    }
    assert!(exact > 10_000, "{exact} exact");
}

/// A driver that fills slots of the available ring in batches and publishes a batch at once, as DPDK's does.
#[test]
fn what_is_written_ahead_of_the_index_leaves_no_wrong_exact_set() {
    for (size, batch) in [(16, 4), (64, 16), (128, 32), (256, 32)] {
        let mut random = Random(u64::from(size) * 77 + 1);
        let (mut exact, mut inexact) = (0, 0);
        let mut memory = memory_with(PlainRing::new(size, 65_500));
        let mut observer = Observer::new(Layout::new(size).expect("a power of two"), 65_500, Nanos(0));
        let (mut free, mut inflight): (Vec<u16>, Vec<u16>) = ((0..size).rev().collect(), Vec::new());
        for look in 1..20_000_u64 {
            // Batches and their completions, any number of them up to about a ring.
            for _ in 0..random.below(u64::from(size / batch) + 2) {
                let count = random.below(u64::from(batch) + 1).min(free.len() as u64);
                for _ in 0..count {
                    let head = free.remove(random.below(free.len() as u64) as usize);
                    memory.ring(0).submit(head);
                    inflight.push(head);
                }
                for _ in 0..random.below(inflight.len() as u64 + 1) {
                    let head = inflight.remove(random.below(inflight.len() as u64) as usize);
                    memory.ring(0).complete(head);
                    free.push(head);
                }
            }
            // And a batch that is written and not published.
            let ahead: Vec<u16> = free.iter().rev().take(usize::from(batch)).copied().collect();
            let ring = memory.ring(0);
            for (at, head) in (0_u16..).zip(&ahead) {
                let slot = ring.layout.slot(ring.avail_idx.wrapping_add(at));
                ring.avail[usize::from(slot)] = *head;
            }
            observer.observe(Nanos::from_micros(10 * look), 0, &mut memory);
            match observer.survivors() {
                Ok(heads) => {
                    assert_eq!(heads, inflight, "size {size}, batches of {batch}, look {look}");
                    exact += 1;
                }
                Err(Knowledge::Inexact(_)) => inexact += 1,
                Err(other) => panic!("size {size}, batches of {batch}, look {look}: {other:?}"),
            }
        }
        assert!(exact > 1_000 && inexact > 100, "size {size}: {exact} exact, {inexact} inexact: nothing was tried");
    }
}

#[test]
fn a_full_turn_of_the_indices_during_silence_is_never_called_exact() {
    let mut memory = memory_with(PlainRing::new(16, 0));
    let mut observer = Observer::new(Layout::new(16).expect("a power of two"), 0, Nanos(0));
    memory.ring(0).submit(3);
    observer.observe(Nanos::from_millis(1), 0, &mut memory);
    assert_eq!(observer.survivors(), Ok(vec![3]));
    // 65 536 submissions and completions later the indices are where they were, but another head is in flight.
    for _ in 0..65_536_u32 {
        memory.ring(0).complete(3);
        memory.ring(0).submit(3);
    }
    memory.ring(0).complete(3);
    memory.ring(0).submit(5);
    let seen = observer.observe(Nanos::from_millis(1) + SILENCE_MAX + Nanos::from_millis(1), 0, &mut memory);
    assert!(seen.lost.is_some() && observer.survivors().is_err());
}

#[test]
fn what_cannot_be_is_refused() {
    let look = |change: &dyn Fn(&mut PlainRing)| {
        let mut memory = memory_with(PlainRing::new(8, 0));
        let mut observer = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(0));
        change(memory.ring(0));
        observer.observe(Nanos(1), 0, &mut memory);
        observer.knowledge()
    };
    assert_eq!(look(&|ring| ring.submit(8)), Knowledge::Violated(Violation::HeadOutOfRange { head: 8 }));
    assert_eq!(
        look(&|ring| ring.avail_idx = 9),
        Knowledge::Violated(Violation::TooManyOutstanding { avail_idx: 9, used_idx: 0 })
    );
    assert_eq!(
        look(&|ring| (0..2).for_each(|_| ring.submit(3))),
        Knowledge::Violated(Violation::SubmittedTwice { head: 3 })
    );
    assert!(matches!(
        look(&|ring| {
            ring.submit(1);
            ring.complete(2);
        }),
        Knowledge::Violated(Violation::CompletedTwice { head: 2 })
    ));
}

#[test]
fn a_ring_that_fills_at_once_is_known_and_so_is_one_that_empties_at_once() {
    for size in [4, 8, 64, 256] {
        let mut memory = memory_with(PlainRing::new(size, 65_530));
        let mut observer = Observer::new(Layout::new(size).expect("a power of two"), 65_530, Nanos(0));
        for look in 0..40_u64 {
            (0..size).for_each(|head| memory.ring(0).submit(head));
            observer.observe(Nanos::from_micros(2 * look), 0, &mut memory);
            assert_eq!(observer.survivors(), Ok((0..size).collect()), "size {size}, look {look}");
            (0..size).rev().for_each(|head| memory.ring(0).complete(head));
            observer.observe(Nanos::from_micros(2 * look + 1), 0, &mut memory);
            assert_eq!(observer.survivors(), Ok(vec![]), "size {size}, look {look}");
        }
    }
}

#[test]
fn a_stall_between_the_reads_of_the_two_indices_is_a_gap_and_not_a_broken_ring() {
    let mut memory = memory_with(PlainRing::new(8, 0));
    memory.live = RefCell::new(memory.rings.clone());
    let reads = RefCell::new(0);
    memory.on_read = Some(RefCell::new(Box::new(move |ring| {
        *reads.borrow_mut() += 1;
        // used.idx has been read; before avail.idx is, more passes than the ring holds.
        if *reads.borrow() == 2 {
            for _ in 0..20 {
                ring.submit(3);
                ring.complete(3);
            }
            ring.submit(3);
        }
    })));
    let mut observer = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(0));
    observer.observe(Nanos(1), 0, &mut memory);
    assert!(matches!(observer.knowledge(), Knowledge::Inexact(_)), "{:?}", observer.knowledge());
}

#[test]
fn a_ring_at_rest_may_be_looked_at_as_rarely_as_one_likes() {
    let day = Nanos(86_400_000_000_000);
    let mut memory = memory_with(PlainRing::new(16, 0));
    let mut observer = Observer::new(Layout::new(16).expect("a power of two"), 0, Nanos(0));
    for head in [3, 7, 2, 9, 1, 3, 4, 11, 5, 3, 8, 0, 6, 12, 13, 14, 15] {
        memory.ring(0).submit(head);
        observer.observe(Nanos(1), 0, &mut memory);
        memory.ring(0).complete(head);
        observer.observe(Nanos(2), 0, &mut memory);
    }
    observer.remember(0, &memory);
    // The first request after a day.
    memory.ring(0).submit(5);
    observer.observe(day, 0, &mut memory);
    assert_eq!(observer.survivors(), Ok(vec![5]));
    memory.ring(0).complete(5);
    observer.observe(day + Nanos(1), 0, &mut memory);
    observer.remember(0, &memory);
    // Indices that stand as if one request had come, after 65 537.
    for turn in 0..=65_536_u32 {
        let head = (turn * 7 % 16) as u16;
        memory.ring(0).submit(head);
        memory.ring(0).complete(head);
    }
    let seen = observer.observe(day + day, 0, &mut memory);
    assert_eq!(seen.lost, Some(Gap::Silence));
}

#[test]
fn latencies_that_span_looks_are_all_told_and_told_well() {
    const LOOK_US: u64 = 100;
    let mut checked = 0;
    for seed in 1..40_u64 {
        let mut world = World::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), 64);
        let mut memory = memory_with(PlainRing::new(64, 65_500));
        let mut observer = Observer::new(Layout::new(64).expect("a power of two"), 65_500, Nanos(0));
        let (mut submitted, mut truth, mut told) = (HashMap::new(), Vec::new(), Vec::new());
        for us in 1..20_000_u64 {
            let before = world.inflight.clone();
            // Few enough that no look is torn.
            if world.random.below(20) == 0 {
                world.step(memory.ring(0));
            }
            for head in world.inflight.iter().filter(|head| !before.contains(head)) {
                submitted.insert(*head, us);
            }
            let unseen = us > 20_000 - LOOK_US;
            for head in before.iter().filter(|head| !world.inflight.contains(head)) {
                if !unseen {
                    truth.push(us - submitted[head]);
                }
            }
            if us % LOOK_US == 0 {
                observer.observe(Nanos::from_micros(us), 0, &mut memory);
                let [long, _] = observer.take_latencies();
                told.extend(long.map(|latency| latency.0 / 1_000));
                let oldest = world.inflight.iter().map(|head| submitted[head]).min();
                match (observer.oldest_age(), oldest) {
                    (Some(told), Some(oldest)) => {
                        let (told, age) = (told.0 / 1_000, us - oldest);
                        assert!(told <= age && told + LOOK_US >= age, "{told} for {age}");
                    }
                    (told, oldest) => assert_eq!((told, oldest), (None, None)),
                }
            }
        }
        assert!(told.iter().all(|us| *us >= 4 * LOOK_US));
        // Those near the bound may fall on either side of it; what is not completed or not looked at yet is not told.
        let above = |latencies: &[u64], us: u64| latencies.iter().filter(|it| **it >= us).count();
        for us in [500, 1_000, 4_000] {
            // What has come since the last look is not told yet.
            let (least, most) = (above(&truth, us + LOOK_US), above(&truth, us - LOOK_US));
            let told = above(&told, us);
            assert!(told >= least && told <= most, "seed {seed}: {told} of {least} to {most} from {us} us on");
            checked += told;
        }
    }
    assert!(checked > 1_000, "{checked}");
}

#[test]
fn a_request_that_wakes_a_ring_is_timed_from_its_kick() {
    let mut memory = memory_with(PlainRing::new(8, 0));
    let mut observer = Observer::new(Layout::new(8).expect("a power of two"), 0, Nanos(0));
    observer.remember(0, &memory);
    observer.woken(Nanos::from_millis(500));
    memory.ring(0).submit(3);
    observer.observe(Nanos::from_micros(500_010), 0, &mut memory);
    observer.observe(Nanos::from_micros(500_110), 0, &mut memory);
    memory.ring(0).complete(3);
    memory.ring(0).submit(3);
    observer.observe(Nanos::from_micros(500_210), 0, &mut memory);
    let [long, woken] = observer.take_latencies();
    assert_eq!((long.count(), woken.collect::<Vec<_>>()), (0, vec![Nanos::from_micros(155)]));
    assert_eq!(observer.oldest_age(), Some(Nanos(0)), "its head is in flight again, since this look");
}

/// A driver that uses every head and a device that completes in the other order, from every index there is.
#[test]
fn from_every_start_the_indices_run_over_their_end_and_the_set_stays_exact() {
    for size in [1_u16, 2, 4] {
        for start in 0..=u16::MAX {
            let mut memory = memory_with(PlainRing::new(size, start));
            let mut observer = Observer::new(Layout::new(size).expect("a power of two"), start, Nanos(0));
            let mut look = 0;
            let mut survivors = |memory: &mut PlainMemory| {
                look += 1;
                observer.observe(Nanos::from_micros(look), 0, memory);
                observer.survivors().unwrap_or_else(|known| panic!("ring of {size} from {start}: {known:?}"))
            };
            let heads: Vec<u16> = (0..size).rev().collect();
            for turn in 0..2 {
                heads.iter().for_each(|head| memory.ring(0).submit(*head));
                assert_eq!(survivors(&mut memory), heads, "ring of {size} from {start}, turn {turn}");
                for owed in (0..heads.len()).rev() {
                    memory.ring(0).complete(heads[owed]);
                    assert_eq!(survivors(&mut memory), heads[..owed], "ring of {size} from {start}, turn {turn}");
                }
            }
        }
    }
}

/// Every history of so many steps (submit, complete the oldest, complete the newest, look) across the end of the indices: what is called exact
/// is right.
#[test]
fn every_short_history_across_the_end_of_the_indices_leaves_no_wrong_exact_set() {
    const STEPS: u32 = 8;
    let (mut exact, mut inexact) = (0, 0);
    for (size, start) in [(1_u16, 65_535_u16), (2, 65_534), (2, 65_533), (4, 65_533)] {
        for history in 0..4_u32.pow(STEPS) {
            let mut memory = memory_with(PlainRing::new(size, start));
            let mut observer = Observer::new(Layout::new(size).expect("a power of two"), start, Nanos(0));
            let (mut free, mut inflight): (Vec<u16>, Vec<u16>) = ((0..size).collect(), Vec::new());
            for step in 0..STEPS {
                match history >> (2 * step) & 3 {
                    0 if !free.is_empty() => {
                        let head = free.remove(0);
                        inflight.push(head);
                        memory.ring(0).submit(head);
                    }
                    1 | 2 if !inflight.is_empty() => {
                        let at = if history >> (2 * step) & 3 == 1 { 0 } else { inflight.len() - 1 };
                        let head = inflight.remove(at);
                        free.push(head);
                        memory.ring(0).complete(head);
                    }
                    3 => {
                        observer.observe(Nanos::from_micros(u64::from(step) + 1), 0, &mut memory);
                    }
                    _ => {}
                }
            }
            observer.observe(Nanos::from_micros(100), 0, &mut memory);
            match observer.survivors() {
                Ok(heads) => {
                    exact += 1;
                    assert_eq!(heads, inflight, "ring of {size} from {start}, history {history:#x}");
                }
                Err(Knowledge::Violated(violation)) => panic!("history {history:#x}: {violation}"),
                Err(_) => inexact += 1,
            }
        }
    }
    assert!(exact > 100_000 && inexact > 100, "both happen: {exact} exact, {inexact} inexact");
}
