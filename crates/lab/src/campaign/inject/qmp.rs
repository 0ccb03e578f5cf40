//! qemu-storage-daemon by its monitor: a throttle group that becomes tighter, files that are opened and never closed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Resource, Rlimit};
use serde_json::{Value, json};

use super::Injector;
use crate::campaign::form::between;

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Options of qemu-storage-daemon for a monitor at `path`.
pub(in crate::campaign) fn monitor(path: &Path) -> [String; 4] {
    let chardev = format!("socket,id=monitor,path={},server=on,wait=off", path.display());
    ["--chardev".to_owned(), chardev, "--monitor".to_owned(), "chardev=monitor".to_owned()]
}

/// Puts a throttle group that does not throttle yet between the disk and its export.
pub(in crate::campaign) fn throttled(line: &mut Vec<String>) {
    let export = line.len() - 2;
    let node = [
        "--object",
        "throttle-group,id=limits",
        "--blockdev",
        "driver=throttle,node-name=slow,throttle-group=limits,file=disk",
    ];
    line.splice(export..export, node.map(str::to_owned));
    let last = line.last_mut().expect("the export");
    *last = last.replace("node-name=disk", "node-name=slow");
}

/// A monitor that is connected.
#[derive(Debug)]
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("the monitor at {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        let mut monitor = Monitor { stream: BufReader::new(stream) };
        monitor.line().context("the greeting of the monitor")?;
        monitor.ask(&json!({"execute": "qmp_capabilities"}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("the monitor does not answer")?;
        serde_json::from_str(&line).with_context(|| format!("the monitor said {line:?}"))
    }

    fn ask(&mut self, command: &Value) -> anyhow::Result<()> {
        self.stream.get_mut().write_all(format!("{command}\n").as_bytes())?;
        self.answer(command)
    }

    fn answer(&mut self, command: &Value) -> anyhow::Result<()> {
        loop {
            let answer = self.line()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                bail!("the monitor refuses {command}: {error}");
            }
        }
    }
}

/// A throttle group.
#[derive(Debug)]
pub(super) struct Throttle {
    monitor: Monitor,
    last: u64,
}

impl Throttle {
    /// Connects. Nothing is limited yet.
    pub(super) fn new(path: &Path) -> anyhow::Result<Self> {
        Ok(Throttle { monitor: Monitor::connect(path)?, last: 0 })
    }
}

impl Injector for Throttle {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let rate = if level <= 0.0 { 0 } else { between(6_000.0, 1.0, level) as u64 };
        if rate == self.last || rate > 0 && rate.abs_diff(self.last) * 20 < self.last {
            return Ok(());
        }
        self.last = rate;
        // Not one second's worth at once, which is the default.
        let limits = json!({"iops-total": rate, "iops-total-max": rate, "iops-total-max-length": 1});
        let limits = if rate == 0 { json!({"iops-total": 0, "iops-total-max": 0}) } else { limits };
        self.monitor.ask(&json!({
            "execute": "qom-set",
            "arguments": {"path": "/objects/limits", "property": "limits", "value": limits},
        }))
    }
}

/// Files that are opened and never closed.
#[derive(Debug)]
pub(super) struct Descriptors {
    monitor: Monitor,
    file: PathBuf,
    kept: u64,
    full: bool,
}

/// Descriptors that the process may have beyond those it has.
const ROOM: u64 = 200;

impl Descriptors {
    /// Bounds a process' descriptors, a little above what it has.
    pub(super) fn new(path: &Path, pid: u32, image: &Path) -> anyhow::Result<Self> {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        let limit = Rlimit { current: Some(open + ROOM), maximum: Some(open + ROOM) };
        let process = Pid::from_raw(pid.cast_signed()).context("a backend without a process")?;
        rustix::process::prlimit(Some(process), Resource::Nofile, limit)?;
        let file = image.with_extension("small");
        std::fs::write(&file, [0; 4096])?;
        Ok(Descriptors { monitor: Monitor::connect(path)?, file, kept: 0, full: false })
    }

    fn hand_over(&mut self) {
        let arguments = json!({
            "driver": "file", "node-name": format!("kept-{}", self.kept), "filename": self.file, "read-only": true, "locking": "off",
        });
        self.kept += 1;
        // Where there is no descriptor left, it is refused.
        self.full |= self.monitor.ask(&json!({"execute": "blockdev-add", "arguments": arguments})).is_err();
    }
}

impl Injector for Descriptors {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let wanted = (level * (ROOM + 8) as f64) as u64;
        while self.kept < wanted && !self.full {
            self.hand_over();
        }
        Ok(())
    }

    fn is_exhausted(&self) -> bool {
        self.full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_throttle_stands_before_its_export() {
        let mut line: Vec<String> =
            ["qsd", "--blockdev", "driver=file,node-name=disk", "--export", "id=e,node-name=disk"]
                .map(str::to_owned)
                .to_vec();
        throttled(&mut line);
        assert_eq!(line[3..5], ["--object", "throttle-group,id=limits"]);
        assert!(line[6].starts_with("driver=throttle,node-name=slow") && line[6].ends_with("file=disk"), "{}", line[6]);
        assert_eq!(line[7..], ["--export", "id=e,node-name=slow"]);
    }
}
