//! A store that fails on purpose: a file system in user space with one file, which is slow, comes back short, fails or stands still.
//!
//! It speaks the kernel's FUSE protocol (version 7.31 and later, `linux/fuse.h`) over `/dev/fuse` itself: one directory with one file is all
//! there is, so a handful of requests suffice. Reads and writes go past the page cache (FOPEN_DIRECT_IO): every one of them comes here.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Threads that serve: as many requests are delayed at a time.
const THREADS: usize = 40;
/// Longest request: what is written at most, with its head.
const BUFFER: usize = (128 << 10) + 4096;
/// A delay is slept through in pieces, so that an end is noticed.
const PIECE: Duration = Duration::from_millis(10);
/// The name of the file.
const FILE: &str = "image";
/// Numbers of the directory and of the file.
const ROOT: u64 = 1;
const NODE: u64 = 2;

/// What the store does to requests. Shared by its threads and by whoever makes it worse.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Reads and writes take so much longer, in nanoseconds.
    pub(crate) delay_ns: AtomicU64,
    /// Flushes take so much longer, in nanoseconds.
    pub(crate) flush_ns: AtomicU64,
    /// So many reads of a million come back short.
    pub(crate) short: AtomicU64,
    /// So many reads and writes of a million fail with EIO.
    pub(crate) errors: AtomicU64,
    /// Nothing is answered.
    pub(crate) stopped: AtomicBool,
    ended: AtomicBool,
    turn: AtomicU64,
}

impl Faults {
    /// Whether it is this request's turn, where `part` of a million have one. By a sequence that visits all residues evenly.
    fn strikes(&self, part: u64) -> bool {
        part > 0 && self.turn.fetch_add(618_033, Ordering::Relaxed) % 1_000_000 < part
    }

    fn wait(&self, ns: u64) {
        let until = Instant::now() + Duration::from_nanos(ns);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let stopped = self.stopped.load(Ordering::Relaxed);
            if self.ended.load(Ordering::Relaxed) || left.is_zero() && !stopped {
                return;
            }
            std::thread::sleep(if stopped { PIECE } else { left.min(PIECE) });
        }
    }
}

/// The store. Unmounted on drop.
#[derive(Debug)]
pub(crate) struct Store {
    mount: PathBuf,
    faults: Arc<Faults>,
    threads: Vec<JoinHandle<()>>,
}

impl Store {
    /// Mounts a store at `mount`, an empty directory, whose file is `backing`.
    pub(crate) fn mount(backing: &Path, mount: &Path) -> anyhow::Result<Self> {
        let file = File::options().read(true).write(true).open(backing)?;
        let device = File::options().read(true).write(true).open("/dev/fuse").context("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_fd().as_raw_fd());
        let options = std::ffi::CString::new(options).expect("there is no zero in it");
        rustix::mount::mount(super::MOUNTS, mount, "fuse", MountFlags::NOSUID | MountFlags::NODEV, &*options)
            .with_context(|| format!("mounting a store in user space at {}", mount.display()))?;
        let faults = Arc::new(Faults::default());
        let mut store = Store { mount: mount.to_path_buf(), faults: Arc::clone(&faults), threads: Vec::new() };
        let shared = Arc::new(Server { file, device, faults });
        for _ in 0..THREADS {
            let server = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("store".to_owned()).spawn(move || server.serve())?;
            store.threads.push(thread);
        }
        Ok(store)
    }

    /// Its file.
    pub(crate) fn image(&self) -> PathBuf {
        self.mount.join(FILE)
    }

    /// What it does.
    pub(crate) fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.faults)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.faults.ended.store(true, Ordering::Relaxed);
        if let Err(error) = rustix::mount::unmount(&self.mount, UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.mount.display());
            return;
        }
        // They end once nobody has the file open any more, and are not waited for: a backend may be slow to go.
        self.threads.clear();
    }
}

struct Server {
    file: File,
    device: File,
    faults: Arc<Faults>,
}

/// The head of a request.
struct Head {
    opcode: u32,
    unique: u64,
    node: u64,
}

/// Opcodes (`enum fuse_opcode`).
mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// Bytes of `struct fuse_in_header`.
const HEAD: usize = 40;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |it| u32::from_le_bytes(it.try_into().expect("four bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |it| u64::from_le_bytes(it.try_into().expect("eight bytes")))
}

fn put(out: &mut Vec<u8>, words: &[u32]) {
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

fn put_long(out: &mut Vec<u8>, words: &[u64]) {
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

impl Server {
    fn serve(&self) {
        let mut buffer = vec![0; BUFFER];
        loop {
            match rustix::io::read(&self.device, &mut buffer) {
                Ok(length) => self.request(&buffer[..length]),
                // Interrupted, or the request was taken back.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => {}
                // Unmounted.
                Err(_) => return,
            }
        }
    }

    fn request(&self, bytes: &[u8]) {
        let head = Head { opcode: u32_at(bytes, 4), unique: u64_at(bytes, 8), node: u64_at(bytes, 16) };
        if matches!(head.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            return;
        }
        let answer = self.answer(&head, bytes.get(HEAD..).unwrap_or_default());
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error.raw_os_error(), Vec::new()),
        };
        let mut out = Vec::with_capacity(16 + body.len());
        put(&mut out, &[16 + body.len() as u32, error.cast_unsigned()]);
        put_long(&mut out, &[head.unique]);
        out.extend_from_slice(&body);
        // A request that was taken back needs no answer.
        let _unasked = rustix::io::write(&self.device, &out);
    }

    fn answer(&self, head: &Head, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut out = Vec::new();
        match head.opcode {
            op::INIT => put_init(&mut out, body),
            op::LOOKUP if head.node == ROOT && body == [FILE.as_bytes(), b"\0"].concat() => {
                put_long(&mut out, &[NODE, 0, 0, 0, 0]);
                self.put_attributes(&mut out, NODE)?;
            }
            op::LOOKUP => return Err(Errno::NOENT),
            op::GETATTR | op::SETATTR => {
                put_long(&mut out, &[0, 0]);
                self.put_attributes(&mut out, head.node)?;
            }
            op::OPEN => put(&mut out, &[0, 0, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES, 0]),
            op::OPENDIR => put(&mut out, &[0; 4]),
            op::READ => out = self.read(u64_at(body, 8), u32_at(body, 16) as usize)?,
            op::WRITE => {
                let written = self.write(u64_at(body, 8), body.get(40..).unwrap_or_default())?;
                put(&mut out, &[written, 0]);
            }
            op::FSYNC => self.faults.wait(self.faults.flush_ns.load(Ordering::Relaxed)),
            op::FLUSH | op::RELEASE | op::RELEASEDIR => {}
            op::STATFS => {
                put_long(&mut out, &[1 << 20, 1 << 19, 1 << 19, 2, 0]);
                put(&mut out, &[4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0]);
            }
            _ => return Err(Errno::NOSYS),
        }
        Ok(out)
    }

    fn suffer(&self) -> Result<(), Errno> {
        let faults = &self.faults;
        let ns = faults.delay_ns.load(Ordering::Relaxed);
        if ns > 0 || faults.stopped.load(Ordering::Relaxed) {
            faults.wait(ns);
        }
        if faults.strikes(faults.errors.load(Ordering::Relaxed)) { Err(Errno::IO) } else { Ok(()) }
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        self.suffer()?;
        // Half of it, in whole sectors.
        let short = length >= 1024 && self.faults.strikes(self.faults.short.load(Ordering::Relaxed));
        let mut data = vec![0; if short { length / 1024 * 512 } else { length }];
        let got =
            self.file.read_at(&mut data, offset).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        data.truncate(got);
        Ok(data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        self.suffer()?;
        self.file.write_all_at(data, offset).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(data.len() as u32)
    }

    /// `struct fuse_attr`.
    fn put_attributes(&self, out: &mut Vec<u8>, node: u64) -> Result<(), Errno> {
        let size = self.file.metadata().map_err(|_| Errno::IO)?.len();
        let (size, mode, links) = if node == ROOT { (0, 0o40_755, 2) } else { (size, 0o100_600, 1) };
        put_long(out, &[node, size, size / 512, 0, 0, 0]);
        put(out, &[0, 0, 0, mode, links, 0, 0, 0, 4096, 0]);
        Ok(())
    }
}

const FOPEN_DIRECT_IO: u32 = 1;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
/// FUSE_ASYNC_READ, FUSE_BIG_WRITES, FUSE_ASYNC_DIO, FUSE_MAX_PAGES.
const FLAGS: u32 = 1 | 1 << 5 | 1 << 15 | 1 << 22;

/// `struct fuse_init_out`.
fn put_init(out: &mut Vec<u8>, body: &[u8]) {
    let (minor, readahead, offered) = (u32_at(body, 4).min(36), u32_at(body, 8), u32_at(body, 12));
    let background = 64 | 48 << 16;
    put(out, &[7, minor, readahead, offered & FLAGS, background, 128 << 10, 1, 32]);
    put(out, &[0; 8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_strike_as_often_as_they_should() {
        let faults = Faults::default();
        for part in [0, 10_000, 500_000, 1_000_000] {
            let struck = (0..100_000).filter(|_| faults.strikes(part)).count() as u64;
            assert!(struck.abs_diff(part / 10) <= 50, "{struck} of 100000 for {part}");
        }
    }

    #[test]
    fn a_mounted_store_is_read_and_written_and_is_as_slow_as_it_is_told() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("not tested: only root mounts file systems");
            return;
        }
        let dir = std::env::temp_dir().join(format!("campaign-fuse-{}", std::process::id()));
        let mount = dir.join("mount");
        std::fs::create_dir_all(&mount).expect("a directory");
        std::fs::write(dir.join("backing"), vec![7; 1 << 20]).expect("a file");
        let store = Store::mount(&dir.join("backing"), &mount).expect("mounted");
        let file = File::options().read(true).write(true).open(store.image()).expect("there");
        let mut data = [0; 8192];
        file.read_exact_at(&mut data, 4096).expect("read");
        assert_eq!(data, [7; 8192]);
        file.write_all_at(&[9; 100], 1000).expect("written");
        file.sync_data().expect("flushed");
        file.read_exact_at(&mut data[..102], 999).expect("read");
        assert_eq!((data[0], data[1], data[100], data[101]), (7, 9, 9, 7));
        store.faults().delay_ns.store(30_000_000, Ordering::Relaxed);
        let began = Instant::now();
        file.read_exact_at(&mut data, 0).expect("read");
        assert!(began.elapsed() >= Duration::from_millis(30));
        store.faults().delay_ns.store(0, Ordering::Relaxed);
        store.faults().short.store(1_000_000, Ordering::Relaxed);
        assert_eq!(file.read_at(&mut data, 0).expect("read"), 4096, "half of it");
        store.faults().errors.store(1_000_000, Ordering::Relaxed);
        assert_eq!(file.read_at(&mut data, 0).expect_err("it fails").raw_os_error(), Some(libc::EIO));
        drop(file);
        drop(store);
        std::fs::remove_dir_all(&dir).expect("nothing is mounted there");
    }
}
