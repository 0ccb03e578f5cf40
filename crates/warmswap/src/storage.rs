//! What a backend does its I/O on, told from `/proc`, and whether its storage descriptions are closed.
//!
//! A reaped process is not quiet: I/O that it had submitted through io_uring goes on after its exit, into guest memory and onto
//! the disk, and neither its control group nor the device's counters show it. What does show it is a lock on the very open file
//! description the I/O was submitted on: requests in flight hold the description, and its locks go with its last reference.
//! Threads (`aio=threads`) and Linux AIO (`aio=native`) are waited for by the exit itself.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

use rustix::net::AddressFamily;
use rustix::process::PidfdGetfdFlags;

/// An open file or block device of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) fd: RawFd,
    pub(crate) path: String,
    /// `major:minor:inode` as the kernel's lock tables write it.
    pub(crate) inode: String,
    /// Number of locks this description holds on it.
    pub(crate) locks: usize,
}

/// What a backend does its I/O on, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) descriptions: Vec<Description>,
    pub(crate) io_uring: bool,
    pub(crate) remote: bool,
}

/// What makes a dead backend's I/O provably over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FenceBasis {
    /// The exit of the process waits for its I/O.
    Exit,
    /// Its locks on these inodes go when its descriptions are closed.
    Locks,
    /// Nothing that can be observed; the reason in words.
    Unprovable(String),
}

impl Storage {
    /// Looks at a living process.
    pub(crate) fn inspect(pid: u32, process: BorrowedFd<'_>) -> io::Result<Self> {
        let mut storage = Storage::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let Ok(fd) = entry.file_name().to_string_lossy().parse::<RawFd>() else { continue };
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy().into_owned();
            if target == "anon_inode:[io_uring]" {
                storage.io_uring = true;
            } else if target.starts_with("socket:[") {
                storage.remote |= is_connected_inet(process, fd);
            } else if target.starts_with('/') && !target.starts_with("/memfd:") {
                storage.descriptions.extend(describe(pid, fd, target));
            }
        }
        Ok(storage)
    }

    /// What its death would prove.
    pub(crate) fn basis(&self) -> FenceBasis {
        if self.remote {
            return FenceBasis::Unprovable(
                "it has network connections: data already sent to a storage target cannot be called back from here"
                    .to_owned(),
            );
        }
        if !self.io_uring {
            return FenceBasis::Exit;
        }
        match self.descriptions.iter().find(|description| description.locks == 0) {
            Some(unlocked) => FenceBasis::Unprovable(format!(
                "it does I/O through io_uring, which outlives the process, and holds no lock on {} whose end could be seen",
                unlocked.path
            )),
            None => FenceBasis::Locks,
        }
    }
}

fn describe(pid: u32, fd: RawFd, path: String) -> Option<Description> {
    let stat = fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let kind = std::os::unix::fs::MetadataExt::mode(&stat) & libc::S_IFMT;
    if kind != libc::S_IFREG && kind != libc::S_IFBLK {
        return None;
    }
    let device = std::os::unix::fs::MetadataExt::dev(&stat);
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let inode = format!("{major:02x}:{minor:02x}:{}", std::os::unix::fs::MetadataExt::ino(&stat));
    // The device number of stat and of the lock tables differ on some file systems (btrfs, overlay); what the process holds
    // says how the tables write it.
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    let mut locks = info.lines().filter_map(|line| line.strip_prefix("lock:")).filter_map(lock_inode).peekable();
    let inode = locks.peek().map_or(inode, |held| (*held).to_owned());
    Some(Description { fd, path, inode, locks: locks.count() })
}

/// The inode of a line such as `1: OFDLCK ADVISORY READ -1 fe:00:1234 100 100`.
fn lock_inode(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip(1);
    let word = words.next()?;
    // A waiting lock has an arrow in front.
    if word == "->" {
        return None;
    }
    words.nth(3)
}

/// Whether a descriptor of the process is a socket of the internet family that is connected: storage behind it is remote.
fn is_connected_inet(process: BorrowedFd<'_>, fd: RawFd) -> bool {
    // A process we may not look into is not one we start; it counts as remote, so that somebody has to decide.
    let Ok(copy) = rustix::process::pidfd_getfd(process, fd, PidfdGetfdFlags::empty()) else { return true };
    match rustix::net::sockopt::socket_domain(&copy) {
        Ok(AddressFamily::INET | AddressFamily::INET6) => rustix::net::getpeername(&copy).is_ok(),
        _ => false,
    }
}

/// Waits for a dead backend's locks to go.
#[derive(Debug)]
pub(crate) struct LockWatch {
    inodes: Vec<String>,
    buffer: Vec<u8>,
}

impl LockWatch {
    pub(crate) fn new(storage: &Storage) -> Self {
        let mut inodes: Vec<String> = storage.descriptions.iter().map(|it| it.inode.clone()).collect();
        inodes.sort();
        inodes.dedup();
        LockWatch { inodes, buffer: Vec::with_capacity(4096) }
    }

    /// Whether every lock that is left on the inodes belongs to a living backend of ours.
    ///
    /// The living ones are asked before and after the kernel's table is read: a lock that one of them takes or drops in between
    /// would otherwise hide one of the dead.
    pub(crate) fn is_released(&mut self, living: &[(u32, Storage)]) -> Result<(), String> {
        let before = self.held_by(living);
        let total = self.held_in_all().map_err(|error| format!("/proc/locks cannot be read: {error}"))?;
        let after = self.held_by(living);
        if before != after {
            return Err("the shadow is changing its locks".to_owned());
        }
        for ((inode, total), known) in self.inodes.iter().zip(total).zip(before) {
            if total > known {
                return Err(format!(
                    "{} of {total} locks on inode {inode} belong to nobody alive in this pair: its I/O is still in flight, \
                     or another program has locked the image",
                    total - known
                ));
            }
        }
        Ok(())
    }

    fn held_in_all(&mut self) -> io::Result<Vec<usize>> {
        self.buffer.clear();
        read_all("/proc/locks", &mut self.buffer)?;
        let text = String::from_utf8_lossy(&self.buffer);
        Ok(self.count(text.lines().filter_map(lock_inode)))
    }

    fn held_by(&self, living: &[(u32, Storage)]) -> Vec<usize> {
        let mut sum = vec![0; self.inodes.len()];
        for (pid, storage) in living {
            for description in storage.descriptions.iter().filter(|it| self.inodes.contains(&it.inode)) {
                let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", description.fd)).unwrap_or_default();
                let held = info.lines().filter_map(|line| line.strip_prefix("lock:")).filter_map(lock_inode);
                for (sum, count) in sum.iter_mut().zip(self.count(held)) {
                    *sum += count;
                }
            }
        }
        sum
    }

    fn count<'a>(&self, held: impl Iterator<Item = &'a str>) -> Vec<usize> {
        let mut counts = vec![0; self.inodes.len()];
        for inode in held {
            if let Some(at) = self.inodes.iter().position(|known| known == inode) {
                counts[at] += 1;
            }
        }
        counts
    }
}

/// Reads a file of `/proc` whole.
fn read_all(path: &str, into: &mut Vec<u8>) -> io::Result<()> {
    let file = fs::File::open(path)?;
    let mut chunk = [0; 4096];
    loop {
        match rustix::io::read(file.as_fd(), &mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => into.extend_from_slice(&chunk[..count]),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_name_their_inode() {
        assert_eq!(lock_inode("\t1: OFDLCK ADVISORY READ -1 fe:00:1234 100 100"), Some("fe:00:1234"));
        assert_eq!(lock_inode("2: FLOCK  ADVISORY  WRITE 718 00:1a:99 0 EOF"), Some("00:1a:99"));
        assert_eq!(lock_inode("2: -> FLOCK  ADVISORY  WRITE 718 00:1a:99 0 EOF"), None);
    }

    #[test]
    fn what_a_death_proves_follows_from_engine_and_locks() {
        let file = |locks| Description { fd: 9, path: "/disk".into(), inode: "0:1:2".into(), locks };
        let of = |io_uring, remote, locks| Storage { descriptions: vec![file(locks)], io_uring, remote }.basis();
        assert_eq!(of(false, false, 0), FenceBasis::Exit);
        assert_eq!(of(true, false, 1), FenceBasis::Locks);
        assert!(matches!(of(true, false, 0), FenceBasis::Unprovable(_)));
        assert!(matches!(of(false, true, 1), FenceBasis::Unprovable(_)));
    }

    #[test]
    fn a_lock_of_a_dead_description_is_seen_until_it_goes() {
        let dir = std::env::temp_dir().join(format!("warmswap-locks-{}", std::process::id()));
        let file = fs::File::create(&dir).expect("a temporary file");
        file.lock().expect("nobody else knows the file");
        let process = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
        let process = process.expect("our own process");
        let own = Storage::inspect(std::process::id(), process.as_fd()).expect("our own descriptors");
        let mine = own.descriptions.into_iter().filter(|it| it.path == dir.display().to_string()).collect();
        let storage = Storage { descriptions: mine, io_uring: true, remote: false };
        assert_eq!(storage.basis(), FenceBasis::Locks);
        let mut watch = LockWatch::new(&storage);
        assert_eq!(watch.is_released(&[(std::process::id(), storage.clone())]), Ok(()));
        assert!(watch.is_released(&[]).is_err(), "held by nobody that is known");
        drop(file);
        assert_eq!(watch.is_released(&[]), Ok(()));
        let _removed = fs::remove_file(dir);
    }
}
