//! The file system load: files written, synced, renamed, read back past the cache, removed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::Advice;
use rustix::mount::{MountFlags, UnmountFlags};

use super::{Shared, disk};
use crate::vm::orders::Line;
use crate::vm::rng::Rng;

const MOUNT: &str = "/mnt";
const FILES: u64 = 64;
const FILE_BYTES_MAX: u64 = 192 << 10;
const PAUSE: Duration = Duration::from_millis(8);

/// What a file must contain: the first `bytes` of the stream `content`.
#[derive(Debug, Clone, Copy)]
struct Promise {
    bytes: u64,
    content: u64,
}

/// The load and what it found.
#[derive(Debug)]
struct Files<'a> {
    shared: &'a Shared,
    rng: Rng,
    promised: BTreeMap<u64, Promise>,
    operations: u64,
    syncs: u64,
    errors: u64,
    mismatches: u64,
}

/// Mounts the file system, works on it until told to stop, checks every file, unmounts.
pub(crate) fn run(shared: &Shared) -> anyhow::Result<()> {
    fs::create_dir_all(MOUNT)?;
    // A kernel that goes on after an error could hide it; read-only makes every later write fail too.
    rustix::mount::mount(disk::PARTITION, MOUNT, "ext4", MountFlags::empty(), Some(c"errors=remount-ro"))
        .context("mounting the file system")?;
    let rng = Rng::new(shared.orders.seed, 2);
    let mut files = Files { shared, rng, promised: BTreeMap::new(), operations: 0, syncs: 0, errors: 0, mismatches: 0 };
    while !shared.stopping() {
        files.step();
        thread::sleep(PAUSE);
    }
    for index in files.promised.keys().copied().collect::<Vec<_>>() {
        files.noted(|files| files.read_back(index));
    }
    files.noted(|_| Ok(rustix::mount::unmount(MOUNT, UnmountFlags::empty())?));
    let line = Line::new("files")
        .with("operations", files.operations)
        .with("syncs", files.syncs)
        .with("errors", files.errors)
        .with("mismatches", files.mismatches);
    shared.port.say(&line);
    Ok(())
}

impl Files<'_> {
    /// One random operation.
    fn step(&mut self) {
        let index = self.rng.range(0, FILES);
        match self.rng.range(0, 10) {
            0..6 => self.noted(|files| files.replace(index)),
            6..9 => self.noted(|files| files.read_back(index)),
            _ => self.noted(|files| files.remove(index)),
        }
    }

    /// Runs an operation; an error is counted and named, never fatal: the load goes on.
    fn noted(&mut self, operation: impl FnOnce(&mut Self) -> anyhow::Result<()>) {
        self.operations += 1;
        if let Err(why) = operation(self) {
            self.errors += 1;
            self.shared.port.say(&Line::new("note").with("files", format!("{why:#}")));
        }
    }

    /// Replaces a file the careful way: new file, sync, rename, sync of the directory.
    fn replace(&mut self, index: u64) -> anyhow::Result<()> {
        let promise = Promise { bytes: self.rng.range(1, FILE_BYTES_MAX), content: self.rng.next() };
        let new = Path::new(MOUNT).join("new");
        let mut file = File::create(&new).context("creating")?;
        file.write_all(&content(promise)).context("writing")?;
        file.sync_all().context("syncing")?;
        // Between rename and the directory's sync both contents are right; nothing reads the file in that time.
        fs::rename(&new, path(index)).context("renaming")?;
        File::open(MOUNT)?.sync_all().context("syncing the directory")?;
        self.syncs += 2;
        self.promised.insert(index, promise);
        Ok(())
    }

    /// Reads a file from the disk, not from the cache, and compares it.
    fn read_back(&mut self, index: u64) -> anyhow::Result<()> {
        let Some(&promise) = self.promised.get(&index) else { return Ok(()) };
        let mut file = File::open(path(index)).context("opening")?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).context("dropping the cache")?;
        let mut found = Vec::new();
        file.read_to_end(&mut found).context("reading")?;
        if found != content(promise) {
            self.mismatches += 1;
            self.shared.port.say(&Line::new("note").with("files", format!("file {index} has other content")));
        }
        Ok(())
    }

    /// Removes a file, if it exists.
    fn remove(&mut self, index: u64) -> anyhow::Result<()> {
        if self.promised.remove(&index).is_some() {
            fs::remove_file(path(index)).context("removing")?;
            File::open(MOUNT)?.sync_all().context("syncing the directory")?;
            self.syncs += 1;
        }
        Ok(())
    }
}

fn path(index: u64) -> PathBuf {
    Path::new(MOUNT).join(format!("file{index}"))
}

/// The bytes a promise stands for.
fn content(promise: Promise) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(promise.bytes).expect("a file of this load fits in memory")];
    Rng::new(promise.content, promise.bytes).fill(&mut bytes);
    bytes
}
