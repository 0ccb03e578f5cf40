//! Where everything lies, as word numbers. The crate's documentation has the same in bytes.

use crate::kind::Kind;
use warmswap_histogram::BUCKETS;

/// First word of a page: `warmtele` read as a big-endian number. A number and not a text, so that a page from a machine
/// of the other byte order is refused.
pub const MAGIC: u64 = u64::from_be_bytes(*b"warmtele");
/// Version of the layout.
pub const VERSION: u16 = 1;
/// Name of the memfd.
pub const NAME: &str = "warmswap-telemetry";
/// Most queues that a page has sections for.
pub const QUEUES_MAX: u16 = 1024;

/// Bytes of the header.
pub const HEADER_BYTES: usize = HEADER_WORDS * WORD;
/// Bytes of the section of one queue.
pub const SECTION_BYTES: usize = SECTION_WORDS * WORD;

/// Bytes of a word.
pub(crate) const WORD: usize = 8;
pub(crate) const HEADER_WORDS: usize = 16;
pub(crate) const SECTION_WORDS: usize = section::KINDS + Kind::COUNT * kind::WORDS;

/// Words of the header.
pub(crate) mod header {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 1;
    pub(crate) const HEADER_BYTES: usize = 2;
    pub(crate) const QUEUES: usize = 3;
    pub(crate) const SECTION_BYTES: usize = 4;
    pub(crate) const KINDS: usize = 5;
    pub(crate) const BUCKETS: usize = 6;
    pub(crate) const PID: usize = 7;
    pub(crate) const DEVICE_TYPE: usize = 8;
    pub(crate) const STARTED_NS: usize = 9;
    pub(crate) const INSTANCE: usize = 10;
}

/// Words of a section.
pub(crate) mod section {
    pub(crate) const SEQUENCE: usize = 0;
    pub(crate) const UPDATED_NS: usize = 1;
    pub(crate) const IN_FLIGHT: usize = 2;
    pub(crate) const OLDEST_NS: usize = 3;
    pub(crate) const BROKEN: usize = 4;
    pub(crate) const KICKS: usize = 5;
    pub(crate) const CALLS_SENT: usize = 6;
    pub(crate) const CALLS_SUPPRESSED: usize = 7;
    pub(crate) const WAKES: usize = 8;
    pub(crate) const POLLS: usize = 9;
    pub(crate) const RETRIES: usize = 10;
    pub(crate) const MALFORMED: usize = 11;
    /// The first block of a kind.
    pub(crate) const KINDS: usize = 16;
}

/// Words of the block of a kind.
pub(crate) mod kind {
    pub(crate) const SUBMITTED: usize = 0;
    pub(crate) const COMPLETED: usize = 1;
    pub(crate) const ERRORS: usize = 2;
    pub(crate) const BYTES: usize = 3;
    pub(crate) const BUCKETS: usize = 8;
    pub(crate) const WORDS: usize = 128;
}

/// Word of a section at which the block of `kind` begins.
#[inline]
pub(crate) const fn kind_word(kind: Kind) -> usize {
    section::KINDS + kind as usize * kind::WORDS
}

/// Byte of the file at which the section of `queue` begins.
pub(crate) const fn section_offset(queue: u16) -> usize {
    HEADER_BYTES + queue as usize * SECTION_BYTES
}

/// Bytes of a page for `queues` queues.
pub(crate) const fn page_bytes(queues: u16) -> usize {
    section_offset(queues)
}

// Cache lines: two writers never share one, and the counters of a kind lie in one.
const _: () = {
    assert!(HEADER_BYTES.is_multiple_of(64) && SECTION_BYTES.is_multiple_of(64));
    assert!((section::KINDS * WORD).is_multiple_of(64) && (kind::WORDS * WORD).is_multiple_of(64));
    assert!((kind::BUCKETS * WORD).is_multiple_of(64));
};

// Everything has room.
const _: () = {
    assert!(header::INSTANCE < HEADER_WORDS);
    assert!(section::MALFORMED < section::KINDS);
    assert!(kind::BYTES < kind::BUCKETS && kind::BUCKETS + BUCKETS <= kind::WORDS);
};

// What version 1 has fixed for good: a change of any of it is another version.
const _: () = {
    assert!(MAGIC == 0x7761_726d_7465_6c65 && VERSION == 1);
    assert!(HEADER_BYTES == 128 && SECTION_BYTES == 7296 && SECTION_BYTES == 114 * 64);
    assert!(Kind::COUNT == 7 && BUCKETS == 118);
    assert!(page_bytes(QUEUES_MAX) == 128 + 1024 * 7296);
};
