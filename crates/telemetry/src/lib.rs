//! A telemetry page: counters that a vhost-user backend publishes and any other process reads.
//!
//! The page is a memfd named `warmswap-telemetry`. A backend makes it with [`Page::create`] and gives each thread that
//! serves a queue its [`QueueWriter`]. A reader finds it in `/proc/PID/fd` ([`find_in_process`]) and takes a
//! [`QueueSnapshot`] of a queue from a [`Reader`]. Neither knows the other: no socket, no message, no lock, and a
//! reader that hangs costs a backend nothing. This crate knows nothing of warmswap, so any backend can embed it; what
//! follows is enough to write one without it.
//!
//! # The file
//!
//! A memfd with the seals `F_SEAL_SHRINK` and `F_SEAL_GROW`, without which a reader refuses it. [`Page::create`] adds
//! `F_SEAL_FUTURE_WRITE` and `F_SEAL_SEAL`: from then on nothing but the mapping of the backend itself can change it.
//!
//! The file is an array of 64-bit words in the byte order of the machine, each aligned to 8 bytes. A narrower value,
//! such as the version, takes a whole word, and a reader refuses one that does not fit. What is not named is zero. The
//! header comes first, then one section per queue; both are whole cache lines (64 bytes).
//!
//! ## Header: 128 bytes at 0
//!
//! | offset | range | meaning |
//! |---:|---|---|
//! | 0 | `0x7761726d74656c65` | magic, [`MAGIC`] |
//! | 8 | u16 | version, [`VERSION`] |
//! | 16 | 128 | bytes of the header, [`HEADER_BYTES`] |
//! | 24 | 1 to 1024 | number of queues |
//! | 32 | 7296 | bytes of one section, [`SECTION_BYTES`] |
//! | 40 | 7 | request kinds per section, [`Kind::COUNT`] |
//! | 48 | 118 | buckets per histogram, [`BUCKETS`] |
//! | 56 | u32 | process id of the backend, as itself sees it |
//! | 64 | u32 | device type, the id of the virtio specification |
//! | 72 | u64 | start of the backend, `CLOCK_MONOTONIC` in nanoseconds |
//! | 80 | u64 | instance: the offset in bytes of a lock that the backend holds on its storage |
//! | 88 | 0 | reserved, 5 words |
//!
//! The header is complete before the file is sealed, and never changes after that.
//!
//! ## Section of queue *q*: 7296 bytes at 128 + 7296 *q*
//!
//! | offset | meaning |
//! |---:|---|
//! | 0 | sequence: odd while the section is being written |
//! | 8 | time of the last update, `CLOCK_MONOTONIC` in nanoseconds; 0: never |
//! | 16 | requests in flight |
//! | 24 | submission of the oldest request in flight, `CLOCK_MONOTONIC` in nanoseconds; 0: none |
//! | 32 | not 0: the ring is broken and no longer served |
//! | 40 | kicks seen |
//! | 48 | calls sent |
//! | 56 | calls suppressed, because the driver asked for none |
//! | 64 | wake-ups: returns from sleep |
//! | 72 | polls that found work |
//! | 80 | retries: I/O that came back short or interrupted and was gone on with |
//! | 88 | malformed requests, which have no kind and are counted nowhere else |
//! | 96 | reserved, 4 words |
//! | 128 + 1024 *k* | block of request kind *k*: read 0, write 1, flush 2, discard 3, zeroes 4, get id 5, other 6 |
//!
//! ## Block of a request kind: 1024 bytes
//!
//! | offset | meaning |
//! |---:|---|
//! | 0 | submitted: requests taken from the ring |
//! | 8 | completed: requests answered, whether well or with an error |
//! | 16 | errors: those of them that were answered with an error |
//! | 24 | bytes moved by requests that were answered well |
//! | 32 | reserved, 4 words |
//! | 64 | 118 words: the latency histogram, whose sum is `completed`; see [`Histogram`] |
//! | 1008 | reserved, 2 words |
//!
//! Counters begin at zero and wrap around.
//!
//! # Writing and reading
//!
//! Every section has exactly one writer, a thread, and a sequence lock of its own. The writer makes the sequence odd,
//! puts a release fence behind it, stores the values (relaxed), and stores the next even number with release ordering.
//!
//! A reader does not map the file but copies it with `pread`: in a mapping a page that cannot be had (a hole and no
//! memory to fill it, a memory error) is SIGBUS, in `pread` it is an error. It reads the sequence, then the section,
//! then the sequence again, each with a system call of its own and an acquire fence behind it. If all three, the copy's
//! included, are the same and even, the values are of one instant: whatever changes during the copy begins and ends
//! with a change of the sequence, so no order and no atomicity within a copy is needed. Only the sequence itself has to
//! be copied whole. Kernels copy aligned words so, but promise it nowhere. If one did not: only a step from odd to even
//! carries into another byte, so a mixture is odd and refused, or an earlier number that ends in a zero byte. It
//! deceives if that very number was read before, 128 updates ago.
//!
//! The number of tries is bounded ([`TRIES_MAX`]). What then failed has two names: [`ReadError::Busy`] if the sequence
//! moved, and [`ReadError::MidUpdate`] if it stood still at an odd number. The latter is final once the process is
//! known to have ended, and may be a thread without a processor otherwise. A try takes about a microsecond, so a queue
//! with an update more often than that is busy. [`Reader::read_anyway`] returns the values all the same, marked as not
//! [`whole`].
//!
//! [`whole`]: QueueSnapshot::whole

mod find;
mod kind;
mod layout;
mod mapping;
mod page;
mod reader;
mod sequence;
mod snapshot;
mod writer;

pub use find::{FDS_MAX, find_in_process};
pub use kind::Kind;
pub use layout::{HEADER_BYTES, MAGIC, NAME, QUEUES_MAX, SECTION_BYTES, VERSION};
pub use page::{CreateError, Identity, Page};
pub use reader::{Header, OpenError, ReadError, Reader, TRIES_MAX};
pub use snapshot::{KindSnapshot, QueueSnapshot};
pub use warmswap_histogram::{BUCKETS, Histogram, bucket_bounds, bucket_of};
pub use writer::{QueueWriter, Update};
