//! What a backend does its I/O on, and whether its storage descriptions are closed.
//!
//! A reaped process is not quiet: I/O that it had submitted through io_uring goes on after its exit, into guest memory and onto
//! the disk, and neither its control group nor the device's counters show it. What does show it is the open file description the
//! I/O was submitted on: requests in flight hold it. Each is given a [`Mark`] while the backend lives, and the backend is harmless
//! when every mark is gone. This needs nothing from the backend, whatever its engine and whether or not it locks its image.

mod mark;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::AddressFamily;
use rustix::process::PidfdGetfdFlags;

use self::mark::Mark;

/// Most descriptions of one backend that are marked.
const MARKS_MAX: usize = 256;

/// What a backend does its I/O on, and how.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    marks: Vec<Mark>,
    /// A description that could not be marked, and why.
    unmarked: Option<String>,
    /// It has, or may make, an io_uring.
    ring: bool,
    /// It has a connection to another machine.
    remote: bool,
    /// It has been looked at.
    seen: bool,
}

/// What makes a dead backend's I/O provably over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FenceBasis {
    /// The marks on its storage descriptions go.
    Marks,
    /// The exit of the process waits for its I/O.
    Exit,
    /// Nothing that can be observed; the reason in words.
    Unprovable(String),
}

impl Storage {
    /// Looks at a living process and marks what it has opened since the last look. What was marked once is never forgotten: a
    /// process that is dying has no descriptors any more, its I/O may.
    pub(crate) fn inspect(&mut self, pid: u32, process: BorrowedFd<'_>) {
        match self.look(pid, process) {
            Ok(()) => self.seen = true,
            // One that is gone shows nothing; what is known of it stays.
            Err(error) if !self.seen => self.unmarked = Some(format!("it cannot be looked into: {error}")),
            Err(_) => {}
        }
    }

    fn look(&mut self, pid: u32, process: BorrowedFd<'_>) -> io::Result<()> {
        // A ring may be made with the first request, long after the start.
        self.ring |= fs::read(format!("/proc/{pid}/cmdline"))?.windows(8).any(|word| word == b"io_uring");
        let mut remote = false;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let Ok(fd) = entry.file_name().to_string_lossy().parse::<RawFd>() else { continue };
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy().into_owned();
            if target == "anon_inode:[io_uring]" {
                self.ring = true;
            } else if target.starts_with("socket:[") {
                remote |= borrow(process, fd).is_ok_and(|copy| is_connected_inet(&copy));
            } else if target.starts_with('/') && !target.starts_with("/memfd:") {
                self.mark(pid, process, fd, &target);
            }
        }
        self.remote |= remote;
        Ok(())
    }

    fn mark(&mut self, pid: u32, process: BorrowedFd<'_>, fd: RawFd, path: &str) {
        // Closed in the meantime, or the process is dying.
        let Ok(copy) = borrow(process, fd) else { return };
        if !is_storage(&copy) || self.marks.iter().any(|mark| mark.path == path && mark.is_on(copy.as_fd())) {
            return;
        }
        self.marks.retain(|mark| mark.is_held().unwrap_or(true));
        if self.marks.len() >= MARKS_MAX {
            self.unmarked = Some(format!("it has more than {MARKS_MAX} files open"));
            return;
        }
        match Mark::set(copy.as_fd(), pid, fd, path) {
            Ok(mark) => self.marks.push(mark),
            Err(error) => self.unmarked = Some(format!("{path} cannot be marked: {error}")),
        }
    }

    /// What its death would prove.
    pub(crate) fn basis(&self) -> FenceBasis {
        if self.remote {
            return FenceBasis::Unprovable(
                "it has network connections: data already sent to a storage target cannot be called back from here"
                    .to_owned(),
            );
        }
        match &self.unmarked {
            None if !self.seen => FenceBasis::Unprovable("it has not been looked into".to_owned()),
            None => FenceBasis::Marks,
            Some(_) if self.seen && !self.ring => FenceBasis::Exit,
            Some(reason) => FenceBasis::Unprovable(format!(
                "it does I/O through io_uring, which outlives the process, and its end could not be seen: {reason}"
            )),
        }
    }

    /// Whether every marked description is closed.
    ///
    /// # Errors
    /// What is still open, in words.
    pub(crate) fn is_closed(&self) -> Result<(), String> {
        for mark in &self.marks {
            match mark.is_held() {
                Ok(false) => {}
                Ok(true) => return Err(format!("I/O on {} is still in flight: its description is open", mark.path)),
                Err(error) => return Err(format!("the mark on {} cannot be asked for: {error}", mark.path)),
            }
        }
        Ok(())
    }

    /// Number of descriptions that are marked.
    pub(crate) fn marked(&self) -> usize {
        self.marks.len()
    }
}

fn borrow(process: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    Ok(rustix::process::pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?)
}

/// Regular files and block devices hold data; nothing else a backend has open is storage.
fn is_storage(copy: &OwnedFd) -> bool {
    use rustix::fs::FileType;
    rustix::fs::fstat(copy).is_ok_and(|stat| {
        matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::BlockDevice)
    })
}

/// Whether it is a socket of the internet family that is connected: storage behind it is remote.
fn is_connected_inet(copy: &OwnedFd) -> bool {
    match rustix::net::sockopt::socket_domain(copy) {
        Ok(AddressFamily::INET | AddressFamily::INET6) => rustix::net::getpeername(copy).is_ok(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(unmarked: bool, ring: bool, remote: bool, seen: bool) -> FenceBasis {
        let unmarked = unmarked.then(|| "a file".to_owned());
        Storage { marks: Vec::new(), unmarked, ring, remote, seen }.basis()
    }

    #[test]
    fn what_a_death_proves_follows_from_marks_and_engine() {
        assert_eq!(storage(false, false, false, true), FenceBasis::Marks);
        assert_eq!(storage(false, true, false, true), FenceBasis::Marks);
        assert_eq!(storage(true, false, false, true), FenceBasis::Exit);
        assert!(matches!(storage(true, true, false, true), FenceBasis::Unprovable(_)));
        assert!(matches!(storage(false, false, true, true), FenceBasis::Unprovable(_)));
        assert!(matches!(storage(false, false, false, false), FenceBasis::Unprovable(_)), "never looked at");
    }

    #[test]
    fn a_living_process_is_marked_once_and_its_marks_go_with_its_descriptions() {
        let path = std::env::temp_dir().join(format!("warmswap-storage-{}", std::process::id()));
        let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.expect("a temporary file");
        let process = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
        let process = process.expect("our own process");
        let ours =
            |storage: &Storage| storage.marks.iter().filter(|mark| mark.path == path.display().to_string()).count();
        let mut storage = Storage::default();
        storage.inspect(std::process::id(), process.as_fd());
        storage.inspect(std::process::id(), process.as_fd());
        assert!(storage.seen && ours(&storage) >= 1);
        drop(file);
        storage.marks.retain(|mark| mark.path == path.display().to_string());
        // The broker's own probes are descriptions of this very process, so only the first mark can be asked here.
        assert_eq!(storage.marks.first().and_then(|mark| mark.is_held().ok()), Some(false));
        fs::remove_file(path).expect("the file is there");
    }
}
