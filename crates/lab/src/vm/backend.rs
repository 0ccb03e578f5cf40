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

/// The command line of a storage daemon that serves `image` on `socket`.
pub(crate) fn command_line(qemu: &Qemu, image: &Path, socket: &str) -> Vec<OsString> {
    let image = image.display();
    vec![
        qemu.program("qemu-storage-daemon").into_os_string(),
        "--blockdev".into(),
        format!("driver=file,node-name=disk,filename={image},locking=on").into(),
        "--export".into(),
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues=2"
        )
        .into(),
    ]
}

/// A storage daemon nobody guards.
#[derive(Debug)]
pub(crate) struct Bare {
    qemu: Qemu,
    image: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    process: Process,
}

impl Bare {
    /// Starts the daemon on `socket`.
    pub(crate) fn start(qemu: &Qemu, workspace: &Workspace, socket: PathBuf) -> anyhow::Result<Self> {
        let (image, log) = (workspace.image(), workspace.path("backend.log"));
        let process = spawn(qemu, &image, &socket, &log)?;
        Ok(Self { qemu: qemu.clone(), image, socket, log, process })
    }

    /// Ends the daemon with `signal` and starts another one at once.
    pub(crate) fn replace(&mut self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal);
        anyhow::ensure!(self.process.wait(Duration::from_secs(10)).is_some(), "the daemon does not end");
        self.process = spawn(&self.qemu, &self.image, &self.socket, &self.log)?;
        Ok(())
    }

    /// Ends the daemon.
    pub(crate) fn end(&mut self) {
        self.process.end();
    }
}

/// Starts a daemon and returns once it listens.
fn spawn(qemu: &Qemu, image: &Path, socket: &Path, log: &Path) -> anyhow::Result<Process> {
    let _ = std::fs::remove_file(socket);
    let words = command_line(qemu, image, &socket.to_string_lossy());
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
