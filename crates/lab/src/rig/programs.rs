//! Two builds of the program that take turns as the broker.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A link that the keeper executes, and what it leads to in turn.
#[derive(Debug)]
pub(crate) struct Programs {
    link: PathBuf,
    builds: [PathBuf; 2],
    turn: usize,
}

impl Programs {
    /// This program and another build of it. The link lies in `directory`, and leads to the other build first.
    pub(crate) fn new(directory: &Path, other: &Path) -> anyhow::Result<Self> {
        let other = other.canonicalize().with_context(|| format!("--upgrade {}", other.display()))?;
        let mut programs =
            Programs { link: directory.join("broker"), builds: [std::env::current_exe()?, other], turn: 0 };
        programs.swap()?;
        Ok(programs)
    }

    /// What is executed.
    pub(crate) fn path(&self) -> PathBuf {
        self.link.clone()
    }

    /// Puts the other one in the place of this one, as a package does: at no moment is there none.
    pub(crate) fn swap(&mut self) -> anyhow::Result<()> {
        self.turn = 1 - self.turn;
        let new = self.link.with_extension("new");
        // One that is left of an epoch that was broken off.
        let _none = std::fs::remove_file(&new);
        symlink(&self.builds[self.turn], &new)?;
        std::fs::rename(&new, &self.link).context("putting another program in the place of the broker's")
    }
}
