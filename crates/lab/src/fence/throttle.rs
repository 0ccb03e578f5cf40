//! A slow disk for one process: a control group of the version 1 blkio controller.
//!
//! The limit is the group's, so that the shadow, which is not in it, is as fast as ever while what the primary has submitted
//! trickles on. What a process had submitted stays in the group when the process is gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};

/// Name of the groups, followed by the process id of their instrument.
const PREFIX: &str = "lab-fence-";
/// Removing a group is tried this often: processes that have just ended stay in it for a moment.
const REMOVE_TRIES: u32 = 200;

/// A group with a limit.
#[derive(Debug)]
pub(super) struct Throttle {
    path: PathBuf,
    /// `major:minor` of the limited device.
    device: String,
}

impl Throttle {
    /// Has `pid`, with all its threads, read and write `device` at no more than `bytes_per_second` each.
    pub(super) fn new(name: &str, device: String, bytes_per_second: u64, pid: u32) -> anyhow::Result<Self> {
        let parent = hierarchy()?;
        remove_abandoned(&parent);
        let path = parent.join(format!("{PREFIX}{}.{name}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        let throttle = Throttle { path, device };
        throttle.limit(bytes_per_second)?;
        throttle.write("cgroup.procs", &pid.to_string())?;
        Ok(throttle)
    }

    fn limit(&self, bytes_per_second: u64) -> anyhow::Result<()> {
        let rule = format!("{} {bytes_per_second}", self.device);
        self.write("blkio.throttle.read_bps_device", &rule)?;
        self.write("blkio.throttle.write_bps_device", &rule)
    }

    fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path.join(file);
        fs::write(&path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
    }

    /// Bytes that came to the limit so far, those that still wait included.
    pub(super) fn arrived(&self) -> anyhow::Result<u64> {
        let path = self.path.join("blkio.throttle.io_service_bytes");
        let table = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // `7:0 Total 65536`; the line is missing until the first request.
        let total = table.lines().find_map(|line| line.strip_prefix(&self.device)?.strip_prefix(" Total "));
        Ok(total.map_or(Ok(0), str::parse)?)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // What still waits is let go at once. A group that cannot be removed is named, and removed by the next run.
        let lifted = self.limit(0);
        for _ in 0..REMOVE_TRIES {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        eprintln!("control group {} is left over ({lifted:?})", self.path.display());
    }
}

/// Where the blkio controller is mounted.
fn hierarchy() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let has_blkio = system.starts_with("cgroup ") && system.split([' ', ',']).any(|option| option == "blkio");
        has_blkio.then(|| mount.split(' ').nth(4)).flatten()
    });
    let mount =
        PathBuf::from(mount.context("this instrument needs the version 1 blkio controller to slow a disk down")?);
    let throttles = mount.join("blkio.throttle.read_bps_device").exists();
    ensure!(throttles, "the blkio controller at {} cannot throttle", mount.display());
    Ok(mount)
}

fn remove_abandoned(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('.').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whatever cannot be removed is in nobody's way.
            let _ = fs::remove_dir(entry.path());
        }
    }
}
