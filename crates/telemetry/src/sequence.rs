//! The sequence lock of a section, apart from where its words are: the same code runs over the page and under `loom`.
//!
//! ```text
//! writer   odd (relaxed) │ release fence │ values (relaxed) │ next even (release)
//! reader   sequence │ acquire fence │ values, the sequence among them │ acquire fence │ sequence again
//! ```

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::{AtomicU64, Ordering};

/// An atomic word.
pub(crate) trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn fence(order: Ordering);
}

impl Word for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        AtomicU64::load(self, order)
    }
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        AtomicU64::store(self, value, order);
    }
    #[inline]
    fn fence(order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

/// Begins an update. Gives the even number that ends it.
#[inline]
pub(crate) fn begin<W: Word>(sequence: &W) -> u64 {
    // Odd already if an update was leaked. What it had stored becomes part of this one.
    let odd = sequence.load(Relaxed) | 1;
    sequence.store(odd, Relaxed);
    // A reader that sees a store of what follows, sees the odd number as well.
    W::fence(Release);
    odd.wrapping_add(1)
}

/// Ends the update that [`begin`] gave this number for.
#[inline]
pub(crate) fn end<W: Word>(sequence: &W, even: u64) {
    sequence.store(even, Release);
}

pub(crate) fn is_even(sequence: u64) -> bool {
    sequence.is_multiple_of(2)
}

/// Whether what was copied is of one instant: the sequence before, within the copy, and after. Each must have been read before an acquire
/// fence, and that before the next.
pub(crate) fn is_whole(before: u64, within: u64, after: u64) -> bool {
    is_even(before) && within == before && after == before
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Acquire;

    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64, fence};

    use super::*;

    impl Word for AtomicU64 {
        fn load(&self, order: Ordering) -> u64 {
            AtomicU64::load(self, order)
        }
        fn store(&self, value: u64, order: Ordering) {
            AtomicU64::store(self, value, order);
        }
        fn fence(order: Ordering) {
            fence(order);
        }
    }

    /// A section of a sequence and two values, that are equal between any two updates.
    type Section = [AtomicU64; 3];

    /// A read, as `pread` and the fence behind it are: with plain loads in any order.
    fn read<const N: usize>(section: &Section, words: [usize; N]) -> [u64; N] {
        let read = words.map(|word| section[word].load(Relaxed));
        fence(Acquire);
        read
    }

    // Not found is a missing release on the even number: what a thread stores behind a release fence, loom takes for published with it.

    /// Every interleaving, and every value that memory may show, of a writer that makes `updates` and a reader that tries once.
    fn explore(updates: u64, begin: fn(&AtomicU64) -> u64) {
        loom::model(move || {
            let section: Arc<Section> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
            let written = Arc::clone(&section);
            let writer = loom::thread::spawn(move || {
                for number in 1..=updates {
                    let even = begin(&written[0]);
                    written[1].store(number, Relaxed);
                    written[2].store(number, Relaxed);
                    end(&written[0], even);
                }
            });
            let [before] = read(&section, [0]);
            // The sequence last: the worst order for a copy to have.
            let [one, other, within] = read(&section, [1, 2, 0]);
            let [after] = read(&section, [0]);
            if is_whole(before, within, after) {
                assert_eq!((one, other), (before / 2, before / 2), "a snapshot of several instants");
            }
            writer.join().expect("it does not panic");
        });
    }

    #[test]
    fn a_snapshot_that_is_called_whole_is_of_one_instant_in_every_interleaving() {
        explore(1, begin);
        explore(2, begin);
    }

    #[test]
    #[should_panic = "a snapshot of several instants"]
    fn without_the_fence_behind_the_odd_number_a_torn_snapshot_is_found() {
        let begin = |sequence: &AtomicU64| {
            let odd = sequence.load(Relaxed) | 1;
            sequence.store(odd, Relaxed);
            odd.wrapping_add(1)
        };
        explore(1, begin);
    }
}
