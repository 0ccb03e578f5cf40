//! Where an instrument keeps images, sockets and logs: a directory of its own, gone when the instrument ends.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// The directory. Removed on drop.
#[derive(Debug)]
pub(crate) struct Workspace(PathBuf);

impl Workspace {
    /// Makes one under `parent` for the instrument of that name, and removes those of its runs that were killed.
    pub(crate) fn new(parent: &Path, instrument: &str) -> anyhow::Result<Self> {
        let prefix = format!("lab-{instrument}-");
        // In a process namespace of our own the processes of other runs look as if they were gone.
        if !super::systemd::is_inside() {
            remove_abandoned(parent, &prefix)?;
        }
        let path = parent.join(format!("{prefix}{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Workspace(path))
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A directory of that name inside.
    pub(crate) fn directory(&self, name: &str) -> anyhow::Result<PathBuf> {
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

fn remove_abandoned(parent: &Path, prefix: &str) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(parent).with_context(|| format!("reading {}", parent.display()))? {
        let entry = entry?;
        let owner = entry.file_name().to_string_lossy().strip_prefix(prefix).and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Whatever cannot be removed is in nobody's way.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workspaces_of_dead_runs_go_and_those_of_living_ones_stay() {
        let parent = std::env::temp_dir().join(format!("workspace-test-{}", std::process::id()));
        // No process has a number beyond the kernel's limit of 2^22.
        let (dead, living) = (parent.join("lab-test-99999999"), parent.join("lab-test-1"));
        let other = parent.join("lab-other-99999999");
        for directory in [&dead.join("inside"), &living, &other] {
            std::fs::create_dir_all(directory).expect("directories");
        }
        let workspace = Workspace::new(&parent, "test").expect("workspace");
        let inside = workspace.directory("a").expect("directory");
        assert!(!dead.exists() && living.exists() && other.exists() && inside.starts_with(workspace.path()));
        drop(workspace);
        assert!(!inside.exists());
        std::fs::remove_dir_all(&parent).expect("clean up");
    }
}
