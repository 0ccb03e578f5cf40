//! The image everybody works on: written all over with what cannot be compressed, on the medium its cells are named after.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{Advice, FallocateFlags};

use super::cell::Medium;
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// `f_type` of a ramfs, which libc has no name for.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// An image. Gone on drop.
#[derive(Debug)]
pub(super) struct Image {
    /// Its file.
    pub(super) path: PathBuf,
    /// Bytes.
    pub(super) bytes: u64,
    _workspace: Workspace,
}

impl Image {
    /// Makes one of `mib` MiB in `directory`.
    pub(super) fn new(medium: Medium, directory: &Path, mib: u64, rng: &mut Rng) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
        check_medium(medium, directory)?;
        let workspace = Workspace::new(directory, &format!("image-{medium}"))?;
        let path = workspace.path().join("image");
        eprintln!("writing {mib} MiB of {}", path.display());
        write(&path, mib, rng).with_context(|| format!("writing {}", path.display()))?;
        Ok(Image { path, bytes: mib << 20, _workspace: workspace })
    }
}

/// Where the lab's program lies: beside what was built, which is rarely a tmpfs.
pub(super) fn default_directory() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program.parent().context("a program lies in a directory")?.to_owned())
}

/// Fails where a cell's name would be wrong.
fn check_medium(medium: Medium, directory: &Path) -> anyhow::Result<()> {
    let kind = rustix::fs::statfs(directory).with_context(|| format!("asking for {}", directory.display()))?.f_type;
    let in_memory = kind == libc::TMPFS_MAGIC || kind == RAMFS_MAGIC;
    let directory = directory.display();
    match (medium, in_memory) {
        (Medium::Tmpfs, false) => bail!("{directory} is no tmpfs; give one with --image-dir, or --media disk"),
        (Medium::Disk, true) => {
            bail!("{directory} is a tmpfs, no disk; give another with --disk-dir, or --media tmpfs")
        }
        (Medium::Tmpfs, true) | (Medium::Disk, false) => Ok(()),
    }
}

/// Space is allocated in one piece first. Afterwards all of it is on the medium and none of it in a cache.
fn write(path: &Path, mib: u64, rng: &mut Rng) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, mib << 20).context("allocating its space")?;
    let mut part = vec![0; 1 << 20];
    for _ in 0..mib {
        part.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rng.next().to_ne_bytes()));
        file.write_all(&part)?;
    }
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tmpfs_is_no_disk_and_the_other_way_round() {
        // Every Linux has these two: a tmpfs or devtmpfs, and a file system that is certainly none.
        for (directory, wrong) in [("/dev/shm", Medium::Disk), ("/proc", Medium::Tmpfs)] {
            let refused = check_medium(wrong, Path::new(directory)).expect_err(directory);
            assert!(refused.to_string().contains("tmpfs"), "{refused}");
        }
    }
}
