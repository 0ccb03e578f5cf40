//! qemu-storage-daemon: its command line, and one as a child of ours.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::process::die_with_parent;

/// How QSD does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aio {
    /// A thread pool: completions come out of order.
    Threads,
    /// io_uring.
    IoUring,
    /// Linux' older asynchronous I/O, which QSD wants O_DIRECT for.
    Native,
}

/// A QSD that exports one raw image as vhost-user-blk.
#[derive(Clone, Debug)]
pub(crate) struct Qsd {
    /// The image.
    pub(crate) image: PathBuf,
    /// Queues of the export.
    pub(crate) queues: u16,
    /// I/O engine.
    pub(crate) aio: Aio,
    /// `cache.direct=on`: O_DIRECT, where the file system has it.
    pub(crate) direct: bool,
    /// Requests per second through a throttle filter, so that many are in flight at little cost.
    pub(crate) throttle: Option<u32>,
}

impl Qsd {
    /// The whole command line with `socket` as the export's address.
    pub(crate) fn command_line(&self, socket: &str) -> Vec<String> {
        let aio = match self.aio {
            Aio::Threads => "threads",
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
        };
        let direct = if self.direct { ",cache.direct=on" } else { "" };
        let image = self.image.display();
        let mut line = vec!["qemu-storage-daemon".to_owned()];
        line.push("--blockdev".into());
        line.push(format!("driver=file,node-name=disk,filename={image},aio={aio},locking=on,discard=unmap{direct}"));
        let mut node = "disk";
        if let Some(rate) = self.throttle {
            line.push("--object".into());
            line.push(format!("throttle-group,id=group,x-iops-total={rate},x-iops-total-max={rate}"));
            line.push("--blockdev".into());
            line.push("driver=throttle,node-name=slow,throttle-group=group,file=disk".into());
            node = "slow";
        }
        let queues = self.queues;
        line.push("--export".into());
        line.push(format!(
            "type=vhost-user-blk,id=export,node-name={node},addr.type=unix,addr.path={socket},writable=on,num-queues={queues}"
        ));
        line
    }

    /// The same with a thread of its own for the export. Without it the export runs in QSD's main thread.
    pub(crate) fn command_line_with_iothread(&self, socket: &str) -> Vec<String> {
        let mut line = self.command_line(socket);
        line.last_mut().expect("the export is the last word").push_str(",iothread=export-thread");
        line.splice(1..1, ["--object".to_owned(), "iothread,id=export-thread".to_owned()]);
        line
    }

    /// Starts one that listens on `socket`.
    pub(crate) fn spawn(&self, socket: &Path) -> anyhow::Result<Running> {
        let line = self.command_line(&socket.display().to_string());
        let mut command = Command::new(&line[0]);
        // An interrupt from the terminal is for the instrument.
        command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = die_with_parent(&mut command).spawn().with_context(|| format!("starting {}", line[0]))?;
        let mut running = Running { child };
        running.wait_for(socket)?;
        Ok(running)
    }
}

/// A QSD that runs. Killed on drop.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
}

impl Running {
    /// SIGKILL, and waits until it is reaped.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until somebody listens on `socket`. The probing connection would be QSD's one client, so it is not made: a
    /// socket that accepts is seen in the table of the kernel.
    fn wait_for(&mut self, socket: &Path) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !listens(socket) {
            if let Some(status) = self.child.try_wait()? {
                bail!("the backend ended at once: {status}");
            }
            if Instant::now() > deadline {
                bail!("the backend does not listen on {}", socket.display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Whether a socket at `path` is listening (flag `__SO_ACCEPTCON` in /proc/net/unix).
pub(crate) fn listens(path: &Path) -> bool {
    let Ok(table) = std::fs::read_to_string("/proc/net/unix") else { return UnixStream::connect(path).is_ok() };
    let path = path.as_os_str().to_string_lossy();
    table.lines().any(|line| line.ends_with(&*path) && line.split_whitespace().nth(3) == Some("00010000"))
}
