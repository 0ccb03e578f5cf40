//! A slow block device below the image, for one process: the version 1 blkio controller. It slows direct I/O only.

use std::path::Path;

use anyhow::Context;

use super::Injector;
use crate::campaign::GROUPS;
use crate::campaign::form::between;
use crate::common::cgroup::Group;

/// Requests per second that are no limit, and those that are none.
const MOST: f64 = 8_000.0;

/// A limit of requests per second.
#[derive(Debug)]
pub(super) struct Disk {
    group: Group,
    device: String,
    last: u64,
}

impl Disk {
    /// Puts a process into a group without a limit.
    pub(super) fn new(name: &str, pid: u32, image: &Path) -> anyhow::Result<Self> {
        let device = device_of(image)?;
        let group = Group::new("blkio", GROUPS, name)?;
        group.add(pid)?;
        Ok(Disk { group, device, last: 0 })
    }
}

/// The block device of the file system that holds a file, as control groups name it.
fn device_of(image: &Path) -> anyhow::Result<String> {
    let number = rustix::fs::stat(image).with_context(|| image.display().to_string())?.st_dev;
    Ok(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number)))
}

impl Injector for Disk {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let rate = if level <= 0.0 { 0 } else { between(MOST, 1.0, level) as u64 };
        if rate == self.last || rate > 0 && rate.abs_diff(self.last) * 20 < self.last {
            return Ok(());
        }
        self.last = rate;
        for file in ["blkio.throttle.read_iops_device", "blkio.throttle.write_iops_device"] {
            self.group.write(file, &format!("{} {rate}", self.device))?;
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What still waits is let go.
        let _ = self.set(0.0);
    }
}
