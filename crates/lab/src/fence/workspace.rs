//! Where sockets and logs lie: a directory of its own, gone when the instrument ends.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Name of the directories, followed by the process id of their instrument.
const PREFIX: &str = "lab-fence-";

/// The directory. Removed on drop.
#[derive(Debug)]
pub(super) struct Workspace(PathBuf);

impl Workspace {
    /// Makes one under `parent`, and removes those of instruments that were killed.
    pub(super) fn new(parent: &Path) -> anyhow::Result<Self> {
        remove_abandoned(parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Workspace(path))
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn remove_abandoned(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.strip_prefix(PREFIX).is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whatever cannot be removed is in nobody's way.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
