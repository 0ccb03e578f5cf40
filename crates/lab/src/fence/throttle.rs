//! A slow disk for one process: a control group of the version 1 blkio controller.
//!
//! The limit is the group's, so that the shadow, which is not in it, is as fast as ever while what the primary has submitted
//! trickles on. What a process had submitted stays in the group when the process is gone.

use anyhow::ensure;

use crate::common::cgroup::{Group, hierarchy};

/// Name of the groups, followed by the process id of their instrument.
const PREFIX: &str = "lab-fence-";

/// A group with a limit.
#[derive(Debug)]
pub(super) struct Throttle {
    group: Group,
    /// `major:minor` of the limited device.
    device: String,
}

impl Throttle {
    /// Has `pid`, with all its threads, read and write `device` at no more than `bytes_per_second` each.
    pub(super) fn new(name: &str, device: String, bytes_per_second: u64, pid: u32) -> anyhow::Result<Self> {
        let mount = hierarchy("blkio")?;
        let throttles = mount.join("blkio.throttle.read_bps_device").exists();
        ensure!(throttles, "the blkio controller at {} cannot throttle", mount.display());
        let throttle = Throttle { group: Group::new("blkio", PREFIX, name)?, device };
        throttle.limit(bytes_per_second)?;
        throttle.group.add(pid)?;
        Ok(throttle)
    }

    fn limit(&self, bytes_per_second: u64) -> anyhow::Result<()> {
        let rule = format!("{} {bytes_per_second}", self.device);
        self.group.write("blkio.throttle.read_bps_device", &rule)?;
        self.group.write("blkio.throttle.write_bps_device", &rule)
    }

    /// Bytes that came to the limit so far, those that still wait included.
    pub(super) fn arrived(&self) -> anyhow::Result<u64> {
        let table = self.group.read("blkio.throttle.io_service_bytes")?;
        // `7:0 Total 65536`; the line is missing until the first request.
        let total = table.lines().find_map(|line| line.strip_prefix(&self.device)?.strip_prefix(" Total "));
        Ok(total.map_or(Ok(0), str::parse)?)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // What still waits is let go at once.
        if let Err(error) = self.limit(0) {
            eprintln!("the limit of a disk could not be lifted: {error:#}");
        }
    }
}
