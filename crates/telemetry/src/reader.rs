//! Reading a page of another process, which may have written anything into it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::fence;

use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::kind::Kind;
use crate::layout::{
    HEADER_BYTES, MAGIC, QUEUES_MAX, SECTION_BYTES, VERSION, WORD, header, page_bytes, section, section_offset,
};
use crate::sequence::{is_even, is_whole};
use crate::snapshot::{QueueSnapshot, word};
use warmswap_histogram::BUCKETS;

/// Tries after which [`Reader::queue`] gives up.
pub const TRIES_MAX: usize = 64;

/// What the backend says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of queues.
    pub queues: u16,
    /// Process id of the backend, as itself sees it: another one in a PID namespace.
    pub pid: u32,
    /// Kind of device: the id of the virtio specification.
    pub device_type: u32,
    /// When the backend started, `CLOCK_MONOTONIC` in nanoseconds.
    pub started_ns: u64,
    /// What tells this instance from every other: the offset in bytes of a lock that it holds on its storage.
    pub instance: u64,
}

/// Why a file is not read as a telemetry page.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It may still change its size. A backend seals its page last, so this may be one that is being made.
    #[error("telemetry page: not sealed against shrinking and growing: not read, it may not be complete yet")]
    Unsealed,
    /// It is shorter than its header, or than what the header describes.
    #[error("telemetry page: {found} bytes, expected at least {expected}: not read")]
    Short {
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
    /// It is something else, or from a machine of the other byte order.
    #[error("telemetry page: magic {found:#018x}, expected {expected:#018x}: not read", expected = MAGIC)]
    Magic {
        /// First word.
        found: u64,
    },
    /// It has a layout that this reader does not know.
    #[error("telemetry page: version {found}, expected {expected}: not read", expected = VERSION)]
    Version {
        /// Version found.
        found: u64,
    },
    /// A field of the header has a value that it cannot have in this version.
    #[error("telemetry page: {field} is {found}, expected {least} to {most}: not read")]
    Field {
        /// The field.
        field: &'static str,
        /// Value found.
        found: u64,
        /// Smallest value it can have.
        least: u64,
        /// Largest value it can have.
        most: u64,
    },
    /// It cannot be read.
    #[error("telemetry page: cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Why there is no snapshot of a queue.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The page has no such queue.
    #[error("telemetry page: queue {index}, expected one of {queues}")]
    NoSuchQueue {
        /// Queue asked for.
        index: u16,
        /// Queues there are.
        queues: u16,
    },
    /// The backend made updates during every try, about a microsecond each. It is alive.
    #[error("telemetry page: queue {index} changed during each of {tries} reads: read it again", tries = TRIES_MAX)]
    Busy {
        /// The queue.
        index: u16,
    },
    /// An update was under way and did not get on. If the process has ended, it never will; if not, its thread has no
    /// processor, or hangs.
    #[error(
        "telemetry page: queue {index} stands in the middle of an update (sequence {sequence}): not of one instant"
    )]
    MidUpdate {
        /// The queue.
        index: u16,
        /// The odd number that the sequence stands at.
        sequence: u64,
    },
    /// It cannot be read.
    #[error("telemetry page: queue {index} cannot be read: {source}")]
    Io {
        /// The queue.
        index: u16,
        /// The error.
        source: io::Error,
    },
}

/// A page of some process. It can be read for as long as this value lives, also when the process has ended.
#[derive(Debug)]
pub struct Reader {
    file: OwnedFd,
    header: Header,
}

impl Reader {
    /// Takes a descriptor that can be read and checks that it is a page.
    ///
    /// Only a memfd has seals, so what passes has its size for good and never makes a reader wait for anybody.
    ///
    /// # Errors
    /// A file that is not a page of this version.
    pub fn open(file: OwnedFd) -> Result<Self, OpenError> {
        let seals = match rustix::fs::fcntl_get_seals(&file) {
            Err(Errno::INVAL) => SealFlags::empty(),
            seals => seals.map_err(io::Error::from)?,
        };
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(OpenError::Unsealed);
        }
        let size = u64::try_from(rustix::fs::fstat(&file).map_err(io::Error::from)?.st_size).unwrap_or(0);
        require(size, HEADER_BYTES)?;
        let mut bytes = [0; HEADER_BYTES];
        read_exactly(&file, &mut bytes, 0)?;
        let header = decode_header(&bytes)?;
        require(size, page_bytes(header.queues))?;
        Ok(Reader { file, header })
    }

    /// What the backend says of itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The values of queue `index` at one instant.
    ///
    /// It never waits, but makes up to [`TRIES_MAX`] times three system calls: a microsecond or two as a rule, and some
    /// hundred where it fails.
    ///
    /// # Errors
    /// No instant could be had, or the queue or the page cannot be read.
    pub fn queue(&self, index: u16) -> Result<QueueSnapshot, ReadError> {
        // The odd number that every try so far has found.
        let mut stuck_at = None;
        let mut moved = false;
        for _ in 0..TRIES_MAX {
            let before = self.sequence(index)?;
            if is_even(before) {
                let snapshot = self.read_since(index, before)?;
                if snapshot.whole {
                    return Ok(snapshot);
                }
                moved = true;
            } else {
                moved |= *stuck_at.get_or_insert(before) != before;
            }
        }
        match stuck_at {
            Some(sequence) if !moved => Err(ReadError::MidUpdate { index, sequence }),
            _ => Err(ReadError::Busy { index }),
        }
    }

    /// The values of queue `index` as they are found, with [`QueueSnapshot::whole`] if they happen to be of one
    /// instant.
    ///
    /// Others are good for a display and for what a backend left behind: each is true of some moment of this call, but
    /// nothing that relates two of them is certain.
    ///
    /// # Errors
    /// The queue or the page cannot be read.
    pub fn read_anyway(&self, index: u16) -> Result<QueueSnapshot, ReadError> {
        let before = self.sequence(index)?;
        self.read_since(index, before)
    }

    /// Reads a section whose sequence was `before`, and the sequence again.
    fn read_since(&self, index: u16, before: u64) -> Result<QueueSnapshot, ReadError> {
        let mut bytes = [0; SECTION_BYTES];
        self.read(index, &mut bytes)?;
        let after = self.sequence(index)?;
        let whole = is_whole(before, word(&bytes, section::SEQUENCE), after);
        Ok(QueueSnapshot::decode(&bytes, whole))
    }

    fn sequence(&self, index: u16) -> Result<u64, ReadError> {
        let mut bytes = [0; WORD];
        self.read(index, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Reads the beginning of a section, before anything that is read later.
    fn read(&self, index: u16, bytes: &mut [u8]) -> Result<(), ReadError> {
        let queues = self.header.queues;
        if index >= queues {
            return Err(ReadError::NoSuchQueue { index, queues });
        }
        let done = read_exactly(&self.file, bytes, section_offset(index) as u64);
        // The kernel copies with plain loads on this processor, which the fence orders like any others. A system call
        // alone promises no order.
        fence(Acquire);
        done.map_err(|source| ReadError::Io { index, source })
    }
}

fn require(found: u64, expected: usize) -> Result<(), OpenError> {
    let expected = expected as u64;
    if found < expected { Err(OpenError::Short { expected, found }) } else { Ok(()) }
}

fn read_exactly(file: &OwnedFd, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pread(file, &mut *bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, OpenError> {
    let at = |index| word(bytes, index);
    if at(header::MAGIC) != MAGIC {
        return Err(OpenError::Magic { found: at(header::MAGIC) });
    }
    if at(header::VERSION) != u64::from(VERSION) {
        return Err(OpenError::Version { found: at(header::VERSION) });
    }
    let within = |field, index, least: u64, most: u64| {
        let found = at(index);
        if (least..=most).contains(&found) { Ok(found) } else { Err(OpenError::Field { field, found, least, most }) }
    };
    let exactly = |field, index, value: usize| within(field, index, value as u64, value as u64);
    exactly("the size of the header", header::HEADER_BYTES, HEADER_BYTES)?;
    exactly("the size of a section", header::SECTION_BYTES, SECTION_BYTES)?;
    exactly("the number of request kinds", header::KINDS, Kind::COUNT)?;
    exactly("the number of buckets", header::BUCKETS, BUCKETS)?;
    Ok(Header {
        queues: within("the number of queues", header::QUEUES, 1, QUEUES_MAX.into())? as u16,
        pid: within("the process id", header::PID, 1, u32::MAX.into())? as u32,
        device_type: within("the device type", header::DEVICE_TYPE, 0, u32::MAX.into())? as u32,
        started_ns: at(header::STARTED_NS),
        instance: at(header::INSTANCE),
    })
}
