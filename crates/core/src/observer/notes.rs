//! An observer's notes: where it stands after every look, in memory that outlives the broker.
//!
//! A record of the pair is written when something is to be done, which on a busy ring may be thousands of requests ago. If the broker and
//! the backend die at the same moment, what the last look saw is all that is ever known of what was in flight. So it is noted down: two
//! copies in turn, each of which says when it is whole, and in each only what has changed since it was written last.
//!
//! ```text
//! word  0      1      2                              3            4            5            6    7      8 + head
//!       look   born   avail_seen used_seen unknown   submissions  completions  observed_at  gap  look   balance, number of its last submission
//! ```

use super::{Gap, Observer};
use crate::time::Nanos;

/// Words before those of the heads.
const HEAD: usize = 8;
/// The last word of what is written before the heads count.
const WHOLE: usize = 7;
/// Bits of the number of a submission that are kept beside the balance: at a million a second, nine years of them.
const NUMBER_BITS: u32 = 48;

/// What has changed since a copy was written last.
#[derive(Clone, Debug, Default)]
struct Copy {
    heads: Vec<u16>,
    all: bool,
}

/// What is still to be noted.
#[derive(Clone, Debug, Default)]
pub(super) struct Unnoted {
    /// Nobody wants notes until the first are taken.
    copies: Option<[Copy; 2]>,
    /// The look that was noted last.
    noted: u64,
    /// The copy that is written next: never the newer one.
    next: usize,
}

impl Unnoted {
    /// Something has changed of a head.
    pub(super) fn touch(&mut self, head: u16, size: u16) {
        for copy in self.copies.iter_mut().flatten().filter(|copy| !copy.all) {
            copy.heads.push(head);
            // Looking for doubles would cost more than to write everything now and then.
            copy.all = copy.heads.len() > usize::from(size);
        }
    }

    /// Something has changed of all of them.
    pub(super) fn touch_all(&mut self) {
        self.copies.iter_mut().flatten().for_each(|copy| copy.all = true);
    }
}

impl Observer {
    /// Words that the notes of a ring of this size take.
    #[must_use]
    pub const fn notes_len(size: u16) -> usize {
        2 * Self::copy_len(size)
    }

    const fn copy_len(size: u16) -> usize {
        HEAD + size as usize
    }

    /// Notes down where it stands, if it has looked since it did so last: `write` is given the place of a word and its value, and keeps
    /// their order. The ring is one that can be followed: of one that is violated nothing is noted any more.
    pub fn note(&mut self, write: &mut dyn FnMut(usize, u64)) {
        if self.unnoted.noted == self.looks || self.violation.is_some() {
            return;
        }
        self.unnoted.noted = self.looks;
        let which = self.unnoted.next;
        self.unnoted.next = 1 - which;
        let base = which * Self::copy_len(self.layout.size());
        let all = || Copy { heads: Vec::new(), all: true };
        let copies = self.unnoted.copies.get_or_insert_with(|| [all(), all()]);
        let Copy { heads, all } = std::mem::take(&mut copies[which]);
        write(base + WHOLE, 0);
        write(base, self.looks);
        write(base + 1, self.born);
        let unknown = self.unknown.map_or(0, |unknown| u64::from(unknown) + 1);
        write(base + 2, u64::from(self.avail_seen) | u64::from(self.used_seen) << 16 | unknown << 32);
        write(base + 3, self.submissions);
        write(base + 4, self.completions);
        write(base + 5, self.observed_at.0);
        write(base + 6, encode_gap(self.gap));
        let mut head = |head: u16| write(base + HEAD + usize::from(head), self.head_word(head));
        match all {
            true => (0..self.layout.size()).for_each(&mut head),
            false => heads.iter().for_each(|it| head(*it)),
        }
        write(base + WHOLE, self.looks);
        // Its room is used again.
        if let Some(copies) = &mut self.unnoted.copies {
            copies[which].heads = heads;
            copies[which].heads.clear();
        }
    }

    fn head_word(&self, head: u16) -> u64 {
        let at = usize::from(head);
        let number = self.submission[at] & ((1 << NUMBER_BITS) - 1);
        u64::from(self.balance[at].cast_unsigned()) << NUMBER_BITS | number
    }

    /// Goes on from its predecessor's notes, if they are later than what it knows. `read` gives the word at a place.
    pub(crate) fn recall(&mut self, read: &dyn Fn(usize) -> u64) {
        let size = self.layout.size();
        let whole = |base: usize| {
            let (look, born) = (read(base), read(base + 1));
            (look != 0 && read(base + WHOLE) == look && born == self.born && look > self.looks).then_some((look, base))
        };
        let Some((look, base)) = [0, Self::copy_len(size)].into_iter().filter_map(whole).max() else { return };
        self.unnoted.next = usize::from(base == 0);
        let word = |at: usize| read(base + at);
        self.looks = look;
        (self.avail_seen, self.used_seen) = (word(2) as u16, (word(2) >> 16) as u16);
        self.unknown = (word(2) >> 32).checked_sub(1).map(|unknown| unknown as u16);
        (self.submissions, self.completions) = (word(3), word(4));
        self.observed_at = Nanos(word(5));
        self.gap = decode_gap(word(6));
        self.clear();
        for head in 0..size {
            let (word, at) = (word(HEAD + usize::from(head)), usize::from(head));
            self.shift(at, ((word >> NUMBER_BITS) as u16).cast_signed());
            self.submission[at] = word & ((1 << NUMBER_BITS) - 1);
        }
    }
}

fn encode_gap(gap: Option<Gap>) -> u64 {
    match gap {
        None => 0,
        Some(Gap::Silence) => 1,
        Some(Gap::Mismatch) => 2,
        Some(Gap::Overrun { avail, used }) => 3 | u64::from(avail) << 16 | u64::from(used) << 32,
    }
}

fn decode_gap(word: u64) -> Option<Gap> {
    match word as u16 {
        0 => None,
        1 => Some(Gap::Silence),
        3 => Some(Gap::Overrun { avail: (word >> 16) as u16, used: (word >> 32) as u16 }),
        _ => Some(Gap::Mismatch),
    }
}
