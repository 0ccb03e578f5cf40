//! The dirty log: pages of guest memory that the device has written, for a migration (`docs/interop/vhost-user.rst`, "Migration").

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use warmswap_wire::LogRegion;

use crate::memory::{Mapping, Window};

/// Bytes of guest memory that one bit stands for (`VHOST_LOG_PAGE`).
const PAGE: u64 = 4096;

/// One bit for each page, in memory shared with the front-end.
#[derive(Clone, Debug)]
pub(crate) struct DirtyLog {
    bits: Window,
}

impl DirtyLog {
    /// Maps a log.
    ///
    /// # Errors
    /// It does not fit into its file, or cannot be mapped.
    pub(crate) fn new(region: LogRegion, fd: BorrowedFd<'_>) -> Result<Self, String> {
        let end = region.offset.checked_add(region.size).ok_or("the dirty log's size and offset wrap around")?;
        let mapping = Mapping::new(fd, end).map_err(|error| format!("the dirty log cannot be mapped: {error}"))?;
        let bits = Arc::new(mapping).window(region.offset, region.size).ok_or("the dirty log lies outside its file")?;
        Ok(DirtyLog { bits })
    }

    /// Notes that a range was written. What lies beyond the log is nobody's to migrate.
    pub(crate) fn mark(&self, addr: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let last = addr.saturating_add(bytes - 1) / PAGE;
        for page in (addr / PAGE)..=last {
            if page / 8 >= self.bits.len() {
                return;
            }
            self.bits.set_bits(page / 8, 1 << (page % 8));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn every_page_that_is_touched_is_marked_and_nothing_beyond_the_log() {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&fd, 4096).expect("any size");
        let log = DirtyLog::new(LogRegion { size: 2, offset: 8 }, fd.as_fd()).expect("it fits");
        log.mark(4095, 2);
        log.mark(8 * 4096, 1);
        log.mark(15 * 4096, 1 << 40);
        log.mark(u64::MAX, 5);
        log.mark(3 * 4096, 0);
        let mut bytes = [0; 11];
        rustix::io::pread(&fd, &mut bytes, 0).expect("inside");
        assert_eq!(bytes[8..], [0b11, 0b1000_0001, 0]);
        DirtyLog::new(LogRegion { size: 4096, offset: 8 }, fd.as_fd()).expect_err("longer than its file");
        DirtyLog::new(LogRegion { size: 8, offset: u64::MAX }, fd.as_fd()).expect_err("it wraps around");
    }
}
