//! The storage daemon's command line, and the daemon without warmswap: killed and started again at once, while QEMU
//! connects again by its own rule.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::cache::Qemu;
use super::process::Process;
use super::workspace::Workspace;

/// What the storage daemon puts between the guest and the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Limits {
    /// Limits on reads and on writes, as a cloud gives its disks: requests wait inside the daemon, and reads and writes
    /// overtake each other. An emulated guest on an image in memory leaves next to nothing in flight otherwise, and a
    /// kill would have nothing to lose.
    Cloud,
    /// No limits: as fast as the image.
    None,
}

impl Limits {
    fn words(self) -> Vec<OsString> {
        const READS_PER_SECOND: u32 = 600;
        const WRITES_PER_SECOND: u32 = 1000;
        let (group, node) = match self {
            Self::None => return vec!["--blockdev".into(), "driver=raw,node-name=disk,file=image".into()],
            Self::Cloud => (
                format!(
                    "throttle-group,id=limits,limits.iops-read={READS_PER_SECOND},limits.iops-write={WRITES_PER_SECOND}"
                ),
                "driver=throttle,node-name=disk,throttle-group=limits,file=image",
            ),
        };
        vec!["--object".into(), group.into(), "--blockdev".into(), node.into()]
    }
}

/// The command line of a storage daemon that serves `image` on `socket`.
pub(crate) fn command_line(qemu: &Qemu, limits: Limits, image: &Path, socket: &str) -> Vec<OsString> {
    let image = image.display();
    let mut words = vec![
        qemu.program("qemu-storage-daemon").into_os_string(),
        "--blockdev".into(),
        format!("driver=file,node-name=image,filename={image},locking=on").into(),
    ];
    words.extend(limits.words());
    words.push("--export".into());
    words.push(
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues=2"
        )
        .into(),
    );
    words
}

/// A storage daemon nobody guards.
#[derive(Debug)]
pub(crate) struct Bare {
    qemu: Qemu,
    limits: Limits,
    image: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    process: Process,
}

impl Bare {
    /// Starts the daemon on `socket`.
    pub(crate) fn start(qemu: &Qemu, limits: Limits, workspace: &Workspace, socket: PathBuf) -> anyhow::Result<Self> {
        let (image, log) = (workspace.image(), workspace.path("backend.log"));
        let process = spawn(qemu, limits, &image, &socket, &log)?;
        Ok(Self { qemu: qemu.clone(), limits, image, socket, log, process })
    }

    /// Ends the daemon with `signal` and starts another one at once.
    pub(crate) fn replace(&mut self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal);
        anyhow::ensure!(self.process.wait(Duration::from_secs(10)).is_some(), "the daemon does not end");
        self.process = spawn(&self.qemu, self.limits, &self.image, &self.socket, &self.log)?;
        Ok(())
    }

    /// Ends the daemon.
    pub(crate) fn end(&mut self) {
        self.process.end();
    }
}

/// Starts a daemon and returns once it listens.
fn spawn(qemu: &Qemu, limits: Limits, image: &Path, socket: &Path, log: &Path) -> anyhow::Result<Process> {
    let _ = std::fs::remove_file(socket);
    let words = command_line(qemu, limits, image, &socket.to_string_lossy());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).envs(qemu.environment()).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::options().create(true).append(true).open(log)?);
    let mut process = Process::start("the storage daemon", &mut command)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    // Looking at the socket must not take the one connection the daemon serves at a time.
    while !listens(socket) {
        let said = || std::fs::read_to_string(log).unwrap_or_default();
        anyhow::ensure!(process.ended().is_none(), "{}: {}", process.obituary(), said());
        anyhow::ensure!(Instant::now() < deadline, "the storage daemon does not listen: {}", said());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(process)
}

/// Whether a socket at `path` is in the kernel's table of listening sockets.
fn listens(path: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    table.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(7).is_some_and(|found| Path::new(found) == path) && words.get(3) == Some(&ACCEPTS)
    })
}
