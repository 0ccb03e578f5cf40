//! Less and less memory.

use std::fs::File;
use std::path::Path;

use anyhow::Context;

use super::Injector;
use crate::campaign::GROUPS;
use crate::campaign::form::between;
use crate::common::cgroup::Group;

/// What the group may hold at first.
const WHOLE: f64 = (48 << 20) as f64;
/// What it may hold at last.
const NOTHING: f64 = (64 << 10) as f64;

/// The memory limit of a group comes down.
#[derive(Debug)]
pub(super) struct Squeeze {
    group: Group,
    last: u64,
}

impl Squeeze {
    /// Puts a process into a group. What it reads from now on counts against that group: the image leaves the page cache.
    pub(super) fn new(name: &str, pid: u32, image: &Path) -> anyhow::Result<Self> {
        let group = budget(name, pid, WHOLE as u64)?;
        drop_cache(image)?;
        Ok(Squeeze { group, last: WHOLE as u64 })
    }
}

/// A group for a process that may take so many bytes from now on.
pub(in crate::campaign) fn budget(name: &str, pid: u32, bytes: u64) -> anyhow::Result<Group> {
    let group = Group::new("memory", GROUPS, name)?;
    group.write("memory.limit_in_bytes", &bytes.to_string())?;
    group.add(pid)?;
    Ok(group)
}

/// Has the page cache forget a file.
pub(in crate::campaign) fn drop_cache(image: &Path) -> anyhow::Result<()> {
    let file = File::open(image).with_context(|| image.display().to_string())?;
    file.sync_data()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

impl Injector for Squeeze {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let bytes = between(WHOLE, NOTHING, level) as u64 / 4096 * 4096;
        let changed = bytes.abs_diff(self.last) * 50 > self.last;
        // Refused while the group holds more that cannot be given back just now; tried again until it can.
        if changed && self.group.write("memory.limit_in_bytes", &bytes.to_string()).is_ok() {
            self.last = bytes;
        }
        Ok(())
    }
}
