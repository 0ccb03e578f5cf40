//! The page as its backend makes it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::kind::Kind;
use crate::layout::{HEADER_BYTES, MAGIC, NAME, QUEUES_MAX, SECTION_BYTES, VERSION, header, page_bytes};
use crate::mapping::Mapping;
use crate::writer::QueueWriter;
use warmswap_histogram::BUCKETS;

/// What a backend says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Kind of device: the id of the virtio specification (2 is a block device).
    pub device_type: u32,
    /// What tells this instance from every other: the offset in bytes of a lock that it holds on its storage.
    pub instance: u64,
    /// When the backend started, `CLOCK_MONOTONIC` in nanoseconds.
    pub started_ns: u64,
}

/// Why a page could not be made. A backend can serve without one.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// No queue, or too many.
    #[error("telemetry page for {found} queues, expected 1 to {max}: not made", max = QUEUES_MAX)]
    Queues {
        /// Number asked for.
        found: u16,
    },
    /// The system refused a call.
    #[error("telemetry page of {bytes} bytes: {call}: {source}: not made")]
    System {
        /// The call.
        call: &'static str,
        /// Bytes the page needs.
        bytes: usize,
        /// Its error.
        source: io::Error,
    },
}

/// A page of this process. It can be found for as long as this value lives; its writers go on without it.
#[derive(Debug)]
#[must_use = "a page that is dropped cannot be found any more"]
pub struct Page {
    file: OwnedFd,
}

impl Page {
    /// Makes the page of a backend with `queues` queues, and the one writer of each in the order of the queues.
    ///
    /// A backend calls this once, in the process that will serve: the page carries its process id, and a child that is
    /// forked later shares the mapping and must not write.
    ///
    /// # Errors
    /// A number of queues that a page has no room for, or memory that the system does not give.
    pub fn create(queues: u16, identity: Identity) -> Result<(Page, Vec<QueueWriter>), CreateError> {
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(CreateError::Queues { found: queues });
        }
        let bytes = page_bytes(queues);
        let refuse = |call| move |source: io::Error| CreateError::System { call, bytes, source };

        let file = memfd().map_err(|error| refuse("memfd_create")(error.into()))?;
        // Allocated, not only made long: memory that is missing is an error here and would be SIGBUS in an update.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)
            .map_err(|error| refuse("fallocate")(error.into()))?;
        let mapping = Mapping::new(file.as_fd(), queues).map_err(refuse("mmap"))?;
        write_header(&mapping, queues, identity);
        // Last, because a reader takes the seals for the sign that the header is complete. FUTURE_WRITE spares the
        // mapping that exists, and keeps everybody who can open the file in /proc from changing it.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(|error| refuse("F_ADD_SEALS")(error.into()))?;

        let mapping = Arc::new(mapping);
        let writers = (0..queues).map(|queue| QueueWriter::new(Arc::clone(&mapping), queue)).collect();
        Ok((Page { file }, writers))
    }
}

impl AsFd for Page {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A memfd that can be sealed; never executable where the kernel knows of that (since 6.3), for some allow no other.
fn memfd() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create(NAME, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(NAME, flags),
        made => made,
    }
}

fn write_header(mapping: &Mapping, queues: u16, identity: Identity) {
    let words = [
        (header::MAGIC, MAGIC),
        (header::VERSION, VERSION.into()),
        (header::HEADER_BYTES, HEADER_BYTES as u64),
        (header::QUEUES, queues.into()),
        (header::SECTION_BYTES, SECTION_BYTES as u64),
        (header::KINDS, Kind::COUNT as u64),
        (header::BUCKETS, BUCKETS as u64),
        (header::PID, std::process::id().into()),
        (header::DEVICE_TYPE, identity.device_type.into()),
        (header::STARTED_NS, identity.started_ns),
        (header::INSTANCE, identity.instance),
    ];
    for (word, value) in words {
        mapping.header()[word].store(value, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { device_type: 2, instance: 0, started_ns: 0 };

    #[test]
    fn a_page_has_room_for_one_to_1024_queues() {
        for refused in [0, QUEUES_MAX + 1, u16::MAX] {
            let error = Page::create(refused, IDENTITY).expect_err("no room");
            assert_eq!(error.to_string(), format!("telemetry page for {refused} queues, expected 1 to 1024: not made"));
        }
        let (_page, writers) = Page::create(QUEUES_MAX, IDENTITY).expect("there is room");
        assert_eq!(writers.len(), 1024);
    }

    #[test]
    fn nothing_but_its_own_mapping_can_change_a_page() {
        let (page, _writers) = Page::create(1, IDENTITY).expect("a page");
        assert_eq!(rustix::io::pwrite(&page, &[0; 8], 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&page, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&page, 1 << 20), Err(Errno::PERM));
        assert_eq!(rustix::fs::fcntl_add_seals(&page, SealFlags::WRITE), Err(Errno::PERM));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(&page, hole, 0, 4096), Err(Errno::PERM));
        assert!(Mapping::new(page.as_fd(), 1).is_err(), "a second mapping that can be written");
    }

    #[test]
    fn a_page_is_not_inherited_by_a_program_that_is_started() {
        let (page, _writers) = Page::create(1, IDENTITY).expect("a page");
        let flags = rustix::io::fcntl_getfd(&page).expect("an open descriptor");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}
