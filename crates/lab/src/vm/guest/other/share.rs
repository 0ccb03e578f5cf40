//! The loads of a shared file system: one file that stays open and is written and read all the time, and files that are replaced.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::mount::{MountFlags, UnmountFlags};

use super::Load;
use crate::vm::machine::SHARE_TAG;
use crate::vm::rng::Rng;

const MOUNT: &str = "/mnt";
/// The block that is written and read at a time through the file that stays open.
const BLOCK: usize = 4096;
/// Blocks of that file.
const BLOCKS: u64 = 256;
/// Files that are replaced.
const FILES: u64 = 16;
const FILE_BYTES_MAX: u64 = 64 << 10;
const PAUSE: Duration = Duration::from_millis(5);

/// Mounts the file system.
pub(super) fn mount() -> anyhow::Result<()> {
    fs::create_dir_all(MOUNT)?;
    rustix::mount::mount(SHARE_TAG, MOUNT, "virtiofs", MountFlags::empty(), None).context("mounting the share")
}

/// Unmounts it: everything that was written is then on the host.
pub(super) fn unmount() -> anyhow::Result<()> {
    rustix::mount::unmount(MOUNT, UnmountFlags::empty()).context("unmounting the share")
}

/// Writes to a file, and reads from it, that is opened once.
pub(super) fn hold_open(load: &Load) -> anyhow::Result<()> {
    let path = Path::new(MOUNT).join("held");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).context("opening")?;
    let mut rng = Rng::new(load.seed, 21);
    let mut promised = vec![None; usize::try_from(BLOCKS)?];
    while !load.stopping() {
        let index = rng.range(0, BLOCKS);
        let slot = &mut promised[usize::try_from(index)?];
        let reads = rng.range(0, 2) == 0;
        let answer = if let Some(content) = slot.filter(|_| reads) {
            load.tally.timed(|| read_block(&file, index)).map(|found| {
                if found != block(content) {
                    load.tally.mistake();
                    load.complain(&format!("block {index} has other content"));
                }
            })
        } else {
            let content = rng.next();
            load.tally.timed(|| write_block(&file, index, content)).map(|()| *slot = Some(content))
        };
        if let Err(why) = answer {
            load.complain(&format!("block {index}: {why}"));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Reads from the host, not from the guest's cache.
fn read_block(file: &File, index: u64) -> std::io::Result<Vec<u8>> {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut found = vec![0; BLOCK];
    file.read_exact_at(&mut found, index * BLOCK as u64)?;
    Ok(found)
}

fn write_block(file: &File, index: u64, content: u64) -> std::io::Result<()> {
    file.write_all_at(&block(content), index * BLOCK as u64)?;
    file.sync_data()
}

fn block(content: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    Rng::new(content, 0).fill(&mut bytes);
    bytes
}

/// Replaces files the careful way, and reads them back.
pub(super) fn replace(load: &Load) -> anyhow::Result<()> {
    let mut rng = Rng::new(load.seed, 22);
    let mut promised = vec![None; usize::try_from(FILES)?];
    while !load.stopping() {
        let index = rng.range(0, FILES);
        let slot = &mut promised[usize::try_from(index)?];
        let promise = (rng.next(), rng.range(1, FILE_BYTES_MAX));
        let answer = match *slot {
            Some(kept) if rng.range(0, 2) == 0 => load.tally.timed(|| read_file(index)).map(|found| {
                if found != content(kept) {
                    load.tally.mistake();
                    load.complain(&format!("file {index} has other content"));
                }
            }),
            _ => load.tally.timed(|| write_file(index, &content(promise))).map(|()| *slot = Some(promise)),
        };
        if let Err(why) = answer {
            load.complain(&format!("file {index}: {why}"));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn path(index: u64) -> PathBuf {
    Path::new(MOUNT).join(format!("file{index}"))
}

fn read_file(index: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path(index))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut found = Vec::new();
    file.read_to_end(&mut found)?;
    Ok(found)
}

fn write_file(index: u64, bytes: &[u8]) -> std::io::Result<()> {
    let new = Path::new(MOUNT).join("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path(index))
}

fn content((content, bytes): (u64, u64)) -> Vec<u8> {
    let mut found = vec![0; usize::try_from(bytes).expect("a file of this load fits in memory")];
    Rng::new(content, bytes).fill(&mut found);
    found
}
