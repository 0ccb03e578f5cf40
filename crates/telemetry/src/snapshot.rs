//! A section as values. Every value is what the backend wrote, and nothing here depends on any of them being true.

use crate::kind::Kind;
use crate::layout::{SECTION_BYTES, WORD, kind as block, kind_word, section};
use warmswap_histogram::Histogram;

/// One queue at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSnapshot {
    /// All values are of one instant. Only [`Reader::read_anyway`](crate::Reader::read_anyway) returns others.
    pub whole: bool,
    /// Sequence of the section: it grows by two with every update, and is odd within one.
    pub sequence: u64,
    /// Time of the last update, `CLOCK_MONOTONIC` in nanoseconds. `None`: there was none.
    pub updated_ns: Option<u64>,
    /// Requests in flight.
    pub in_flight: u64,
    /// Submission of the oldest request in flight, `CLOCK_MONOTONIC` in nanoseconds.
    pub oldest_ns: Option<u64>,
    /// The ring is broken and no longer served.
    pub broken: bool,
    /// Kicks seen.
    pub kicks: u64,
    /// Calls sent.
    pub calls_sent: u64,
    /// Calls that were due but that the driver did not want.
    pub calls_suppressed: u64,
    /// Returns from sleep.
    pub wakes: u64,
    /// Polls that found work.
    pub polls: u64,
    /// I/O that came back short or interrupted and was gone on with.
    pub retries: u64,
    /// Requests too broken to have a kind.
    pub malformed: u64,
    /// One entry per kind, in the order of [`Kind::ALL`].
    pub kinds: [KindSnapshot; Kind::COUNT],
}

/// The requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindSnapshot {
    /// Taken from the ring.
    pub submitted: u64,
    /// Answered, whether well or with an error.
    pub completed: u64,
    /// Answered with an error.
    pub errors: u64,
    /// Bytes moved by those that were answered well.
    pub bytes: u64,
    /// Latencies of all that were answered.
    pub latency: Histogram,
}

impl QueueSnapshot {
    /// The requests of one kind.
    #[must_use]
    pub fn kind(&self, kind: Kind) -> &KindSnapshot {
        &self.kinds[kind as usize]
    }

    pub(crate) fn decode(bytes: &[u8; SECTION_BYTES], whole: bool) -> Self {
        let at = |index| word(bytes, index);
        let time = |index| Some(at(index)).filter(|&ns| ns != 0);
        QueueSnapshot {
            whole,
            sequence: at(section::SEQUENCE),
            updated_ns: time(section::UPDATED_NS),
            in_flight: at(section::IN_FLIGHT),
            oldest_ns: time(section::OLDEST_NS),
            broken: at(section::BROKEN) != 0,
            kicks: at(section::KICKS),
            calls_sent: at(section::CALLS_SENT),
            calls_suppressed: at(section::CALLS_SUPPRESSED),
            wakes: at(section::WAKES),
            polls: at(section::POLLS),
            retries: at(section::RETRIES),
            malformed: at(section::MALFORMED),
            kinds: Kind::ALL.map(|kind| {
                let start = kind_word(kind);
                KindSnapshot {
                    submitted: at(start + block::SUBMITTED),
                    completed: at(start + block::COMPLETED),
                    errors: at(start + block::ERRORS),
                    bytes: at(start + block::BYTES),
                    latency: Histogram { counts: std::array::from_fn(|bucket| at(start + block::BUCKETS + bucket)) },
                }
            }),
        }
    }
}

/// Word number `index` of a copy of a part of a page.
pub(crate) fn word(bytes: &[u8], index: usize) -> u64 {
    let (words, _) = bytes.as_chunks::<WORD>();
    u64::from_ne_bytes(words[index])
}
