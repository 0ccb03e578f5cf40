//! A file system that fills up.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::Injector;

/// Bytes of the small file system.
const SIZE: u64 = 160 << 20;
/// What the filler takes in one step.
const STEP: u64 = 256 << 10;

/// A small file system in memory. Unmounted on drop.
#[derive(Debug)]
pub(in crate::campaign) struct Small(PathBuf);

impl Small {
    /// Mounts one at an empty directory.
    pub(in crate::campaign) fn mount(path: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(path)?;
        let options = std::ffi::CString::new(format!("size={SIZE}")).expect("there is no zero in it");
        rustix::mount::mount(crate::campaign::MOUNTS, path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, &*options)
            .with_context(|| format!("mounting a small file system at {}", path.display()))?;
        Ok(Small(path.to_path_buf()))
    }

    /// Where it is.
    pub(in crate::campaign) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}

/// Somebody else's file, which grows.
#[derive(Debug)]
pub(super) struct Filler {
    path: PathBuf,
    file: Option<File>,
    taken: u64,
    /// Free when it began.
    room: u64,
    full: bool,
}

impl Filler {
    /// Nothing is taken yet.
    pub(super) fn new(small: &Small) -> Self {
        Filler { path: small.path().join("filler"), file: None, taken: 0, room: 0, full: false }
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        let room = rustix::fs::statvfs(self.path.parent().expect("it has one"))?;
        self.room = room.f_bfree * room.f_frsize;
        self.file = Some(File::create(&self.path).with_context(|| self.path.display().to_string())?);
        Ok(())
    }
}

impl Injector for Filler {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        if level <= 0.0 {
            return Ok(());
        }
        if self.file.is_none() {
            self.begin()?;
        }
        let file = self.file.as_ref().expect("it was made");
        let wanted = if level >= 1.0 { SIZE } else { (level * self.room as f64) as u64 };
        while self.taken < wanted {
            match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), self.taken, STEP) {
                Ok(()) => self.taken += STEP,
                // Full.
                Err(Errno::NOSPC) => {
                    self.full = true;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).with_context(|| self.path.display().to_string()),
            }
        }
        Ok(())
    }

    fn is_exhausted(&self) -> bool {
        self.full
    }
}
