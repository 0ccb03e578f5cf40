//! What another processor may see of a queue that is served, in every interleaving that the memory model allows for (`loom`).
//!
//! The in-flight region is kept by the real [`Tracker`], over words that are stored with release as the built-in back-end stores them
//! (`crates/blk/src/queue.rs`, `Region`). Used ring and notifications are a model after `crates/blk/src/ring.rs`, whose words lie in guest
//! memory and cannot be those of `loom`: `write_used` and `publish` store as here, `arm` and `wants_call` have the same fence.
//!
//! Each protocol is also run with one of its orders taken away, which must be found.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release, SeqCst};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};
use warmswap_wire::inflight::{ENTRY_BYTES, HEADER_BYTES, RegionMemory, Tracker};
use warmswap_wire::ring::crosses_event;

const USED_IDX_AT: u64 = 14;

fn inflight_at(head: u16) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(head)
}

/// A region of so many entries: what is stored at an offset, with its width.
#[derive(Clone)]
struct Region {
    words: Arc<BTreeMap<u64, (usize, AtomicU64)>>,
    order: Ordering,
}

impl Region {
    fn new(size: u16, order: Ordering) -> Self {
        let header = [(8, 2), (10, 2), (12, 2), (USED_IDX_AT, 2)];
        let entries = (0..size).map(inflight_at).flat_map(|at| [(at, 1), (at + 6, 2), (at + 8, 8)]);
        let words = header.into_iter().chain(entries).map(|(at, width)| (at, (width, AtomicU64::new(0))));
        Region { words: Arc::new(words.collect()), order }
    }

    fn load(&self, at: u64) -> u64 {
        self.words[&at].1.load(Acquire)
    }

    fn store(&self, at: u64, value: u64) {
        self.words[&at].1.store(value, self.order);
    }
}

impl RegionMemory for Region {
    fn read(&self, at: u64, into: &mut [u8]) {
        for (place, (width, word)) in self.words.iter() {
            let value = word.load(Relaxed).to_ne_bytes();
            into[(place - at) as usize..][..*width].copy_from_slice(&value[..*width]);
        }
    }
    fn store_u8(&mut self, at: u64, value: u8) {
        self.store(at, value.into());
    }
    fn store_u16(&mut self, at: u64, value: u16) {
        self.store(at, value.into());
    }
    fn store_u64(&mut self, at: u64, value: u64) {
        self.store(at, value);
    }
}

/// A back-end takes one request and completes it, while somebody looks at region and used index.
fn look_at_a_region(order: Ordering) {
    loom::model(move || {
        let (region, used_idx) = (Region::new(1, order), Arc::new(AtomicU64::new(0)));
        let (mut tracker, _) = Tracker::start(region.clone(), 1, 0, 0).expect("a region that was never used");
        let published = Arc::clone(&used_idx);
        let backend = loom::thread::spawn(move || {
            tracker.taken(0);
            tracker.complete(&[0], 1, |index| published.store(index.into(), order));
        });
        // From the last store back to the first: who sees one sees every one before it.
        let region_used = region.load(USED_IDX_AT);
        let marked = region.load(inflight_at(0)) == 1;
        let used = used_idx.load(Acquire);
        let marked_later = region.load(inflight_at(0)) == 1;
        let counter = region.load(inflight_at(0) + 8);
        if region_used == 1 {
            assert!(!marked && used == 1, "the region has completed what is marked, or not in the used ring");
        }
        if marked_later || used == 1 {
            assert_eq!(counter, 1, "a mark, or a completion, without its counter");
        }
        if used == 0 && marked {
            assert!(marked_later || used_idx.load(Acquire) == 1, "a mark is gone before its completion can be seen");
        }
        backend.join().expect("it does not panic");
    });
}

#[test]
fn whoever_looks_at_a_region_sees_its_stores_in_their_order() {
    look_at_a_region(Release);
}

#[test]
#[should_panic = "expected"]
fn a_region_without_release_is_found() {
    let found = std::panic::catch_unwind(|| look_at_a_region(Relaxed));
    let said = found.expect_err("the order is missing");
    let said =
        said.downcast_ref::<String>().cloned().or_else(|| said.downcast_ref::<&str>().map(|it| (*it).to_owned()));
    panic!("expected: {said:?}");
}

/// A back-end writes two used entries and publishes them; the driver follows the index.
fn follow_the_used_index(order: Ordering) {
    loom::model(move || {
        let ring: Arc<[AtomicU64; 3]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let theirs = Arc::clone(&ring);
        let backend = loom::thread::spawn(move || {
            for index in 1..=2 {
                theirs[index].store(70 + index as u64, Relaxed);
                theirs[0].store(index as u64, order);
            }
        });
        let index = ring[0].load(Acquire) as usize;
        for entry in 1..=index {
            assert_eq!(ring[entry].load(Relaxed), 70 + entry as u64, "an entry behind the index that is not there");
        }
        backend.join().expect("it does not panic");
    });
}

#[test]
fn whoever_sees_the_used_index_sees_what_is_behind_it() {
    follow_the_used_index(Release);
}

#[test]
#[should_panic = "an entry behind the index"]
fn a_used_index_without_release_is_found() {
    follow_the_used_index(Relaxed);
}

/// One side asks to be told of what comes and looks once more before it sleeps; the other brings something and looks whether it is to
/// tell. The same for kicks (`arm`) and for calls (`wants_call`).
fn sleep_and_tell(fences: bool) {
    loom::model(move || {
        let (event, index) = (Arc::new(AtomicU64::new(u16::MAX.into())), Arc::new(AtomicU64::new(0)));
        let (wish, brought) = (Arc::clone(&event), Arc::clone(&index));
        let brings = loom::thread::spawn(move || {
            brought.store(1, Release);
            if fences {
                fence(SeqCst);
            }
            crosses_event(wish.load(Relaxed) as u16, 1, 0)
        });
        event.store(0, Relaxed);
        if fences {
            fence(SeqCst);
        }
        let sleeps = index.load(Acquire) == 0;
        let told = brings.join().expect("it does not panic");
        assert!(told || !sleeps, "it sleeps and is not told");
    });
}

#[test]
fn nobody_sleeps_without_being_told() {
    sleep_and_tell(true);
}

#[test]
#[should_panic = "it sleeps and is not told"]
fn a_missing_fence_between_wish_and_look_is_found() {
    sleep_and_tell(false);
}
