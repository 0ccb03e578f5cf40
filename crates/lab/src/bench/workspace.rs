//! Where a bench keeps images and sockets: a directory of its own on a tmpfs, gone when the bench ends.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Name of the directories, followed by the process id of their bench.
const PREFIX: &str = "lab-bench-";

/// The directory. Removed on drop.
#[derive(Debug)]
pub(super) struct Workspace(PathBuf);

impl Workspace {
    /// Makes one under `parent`, and removes those of benches that were killed.
    pub(super) fn new(parent: &Path) -> anyhow::Result<Self> {
        remove_abandoned(parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Workspace(path))
    }

    /// A directory of that name inside.
    pub(super) fn directory(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(path)
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
        let abandoned = name.strip_prefix(PREFIX).is_some_and(|pid| !Path::new("/proc").join(pid).exists());
        if abandoned {
            // Whatever cannot be removed is in nobody's way.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_the_dead_are_removed_and_ours_ends_with_us() {
        let parent = std::env::temp_dir().join(format!("workspace-test-{}", std::process::id()));
        let abandoned = parent.join(format!("{PREFIX}4999999"));
        std::fs::create_dir_all(abandoned.join("inside")).expect("mkdir");
        let workspace = Workspace::new(&parent).expect("workspace");
        let inside = workspace.directory("a").expect("mkdir");
        assert!(inside.is_dir() && !abandoned.exists());
        drop(workspace);
        assert!(!inside.exists());
        std::fs::remove_dir_all(parent).expect("rmdir");
    }
}
