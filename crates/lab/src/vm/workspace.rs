//! The directory of one run: image, sockets, logs. Removed at the end.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::layout::{BLOCK, DISK_BYTES, EXT4, MIB, master_boot_record};
use super::process;
use crate::common::systemd;

const PREFIX: &str = "warmswap-vm-";

/// A private temporary directory.
#[derive(Debug)]
pub(crate) struct Workspace(PathBuf);

impl Workspace {
    /// Makes the directory: in `TMPDIR` if set, else in memory if the machine has a shared-memory file system.
    pub(crate) fn make() -> anyhow::Result<Self> {
        let memory = Path::new("/dev/shm");
        let base = match std::env::var_os("TMPDIR") {
            Some(chosen) => PathBuf::from(chosen),
            None if memory.is_dir() => memory.to_owned(),
            None => std::env::temp_dir(),
        };
        let base = systemd::place(&base);
        remove_abandoned(&base);
        let path = base.join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        // A socket's path must fit in 108 bytes.
        anyhow::ensure!(path.as_os_str().len() < 80, "{} is too long for sockets: set TMPDIR", path.display());
        Ok(Self(path))
    }

    /// A path inside.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The directory itself.
    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    /// The guest's disk.
    pub(crate) fn image(&self) -> PathBuf {
        self.path("disk.img")
    }

    /// Makes the guest's disk: partition table and an empty ext4.
    pub(crate) fn make_image(&self) -> anyhow::Result<()> {
        let image = File::create_new(self.image()).context("making the image")?;
        image.set_len(DISK_BYTES)?;
        let made = Command::new("/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b"])
            .arg(BLOCK.to_string())
            .args(["-E", &format!("offset={},lazy_itable_init=0,lazy_journal_init=0", EXT4.offset)])
            .arg(self.image())
            .arg((EXT4.bytes / BLOCK).to_string())
            .output()
            .context("running mke2fs")?;
        anyhow::ensure!(made.status.success(), "mke2fs failed: {}", String::from_utf8_lossy(&made.stderr));
        image.write_all_at(&master_boot_record(), 0)?;
        anyhow::ensure!(image.metadata()?.len() == DISK_BYTES, "the image is not {} MiB", DISK_BYTES / MIB);
        Ok(())
    }

    /// Copies the run's logs to `target`.
    pub(crate) fn save_logs(&self, target: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(target)?;
        for entry in std::fs::read_dir(&self.0)?.flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                std::fs::copy(entry.path(), target.join(entry.file_name()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Removes what runs that were killed could not remove: directories named after a process that is gone.
fn remove_abandoned(base: &Path) {
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new(&format!("/proc/{owner}")).exists() {
            let _ = process::end_strays(&entry.path());
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_workspace_is_removed() {
        let path = {
            let workspace = super::Workspace::make().expect("a temporary directory");
            workspace.make_image().expect("mke2fs is installed");
            assert!(workspace.image().exists());
            workspace.root().to_owned()
        };
        assert!(!path.exists());
    }
}
