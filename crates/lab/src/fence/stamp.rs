//! What a piece of memory or disk holds: every word says which generation wrote it and for which place it was meant.

use std::sync::atomic::Ordering;

use crate::guest::{BLOCK, Window};

/// Marks a word as a stamp.
const MARK: u64 = 0x5741_524d << 32;

/// When the content came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Generation {
    /// The disk as the round found it.
    Original = 1,
    /// A buffer that waits for what is read into it.
    Pending = 2,
    /// What the requests in flight write.
    Written = 3,
    /// A buffer whose request was completed and that holds something else since.
    Recycled = 4,
    /// What a later request wrote over [`Generation::Written`], acknowledged.
    Newer = 5,
}

impl Generation {
    const ALL: [Generation; 5] =
        [Generation::Original, Generation::Pending, Generation::Written, Generation::Recycled, Generation::Newer];
}

/// Content of one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// When it was written.
    pub(super) generation: Generation,
    /// The extent of the disk it belongs to.
    pub(super) extent: u16,
}

impl Stamp {
    fn word(self) -> u64 {
        MARK | (self.generation as u64) << 16 | u64::from(self.extent)
    }

    /// Fills `window`.
    pub(super) fn fill(self, window: &Window) {
        for word in window.mapping.words(window.start, window.length) {
            word.store(self.word(), Ordering::Relaxed);
        }
    }

    /// Whether the first and last words of every block of `window` hold this stamp. What does not is returned.
    pub(super) fn glance(self, window: &Window) -> Option<u64> {
        let words = window.mapping.words(window.start, window.length);
        let foreign = |word: u64| (word != self.word()).then_some(word);
        words.chunks(BLOCK / 8).find_map(|block| {
            let ends = [block.first(), block.last()].into_iter().flatten();
            ends.map(|word| word.load(Ordering::Relaxed)).find_map(foreign)
        })
    }

    /// Number of words of `window` that do not hold this stamp.
    pub(super) fn foreign_words(self, window: &Window) -> usize {
        let words = window.mapping.words(window.start, window.length);
        words.iter().filter(|word| word.load(Ordering::Relaxed) != self.word()).count()
    }
}

/// A word in words.
pub(super) fn explain(word: u64) -> String {
    let generation = Generation::ALL.into_iter().find(|generation| *generation as u64 == word >> 16 & 0xffff);
    match generation {
        Some(generation) if word & !0xffff_ffff == MARK => {
            format!("{generation:?} of extent {}", word & 0xffff).to_lowercase()
        }
        _ => format!("{word:#018x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestMemory;

    #[test]
    fn a_foreign_word_is_found_and_named() {
        let mut memory = GuestMemory::new(1 << 20).expect("memory");
        let window = memory.allocate(0, 4 * BLOCK, 4096).expect("fits");
        let stamp = Stamp { generation: Generation::Recycled, extent: 7 };
        stamp.fill(&window);
        assert_eq!((stamp.glance(&window), stamp.foreign_words(&window)), (None, 0));
        let old = Stamp { generation: Generation::Original, extent: 3 };
        old.fill(&window.part(2 * BLOCK, BLOCK));
        assert_eq!(stamp.foreign_words(&window), BLOCK / 8);
        let found = stamp.glance(&window).expect("a whole block is foreign");
        assert_eq!(explain(found), "original of extent 3");
        assert_eq!(explain(0), "0x0000000000000000");
    }
}
