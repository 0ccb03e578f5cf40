//! The backends measured: qemu-storage-daemon on a file of a tmpfs, or on nothing at all.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::common::process::die_with_parent;
use crate::common::qsd::{Aio, Qsd, listens};
use crate::guest::BLOCK;

/// Blocks of an image: 64 MiB.
pub(super) const BLOCKS: u64 = 16_384;

/// How QSD does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Engine {
    /// A thread pool, QSD's default.
    Threads,
    /// io_uring.
    IoUring,
}

/// Makes an image with every block written, so that no write has to find space first.
pub(super) fn make_image(path: &Path) -> anyhow::Result<()> {
    let bytes = vec![0x5a; BLOCKS as usize * BLOCK];
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

/// QSD on a file.
pub(super) fn on_file(image: PathBuf, queues: u16, engine: Engine) -> Qsd {
    let aio = match engine {
        Engine::Threads => Aio::Threads,
        Engine::IoUring => Aio::IoUring,
    };
    Qsd { image, queues, aio, direct: false, throttle: None }
}

/// Command line of a QSD whose disk takes no time at all: what is left is the ring.
pub(super) fn on_nothing(queues: u16, socket: &str) -> Vec<String> {
    let size = BLOCKS * BLOCK as u64;
    vec![
        "qemu-storage-daemon".into(),
        "--blockdev".into(),
        format!("driver=null-co,node-name=disk,size={size},latency-ns=0,read-zeroes=off"),
        "--export".into(),
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues={queues}"
        ),
    ]
}

/// How long a backend may take until it listens.
const START_MAX: Duration = Duration::from_secs(10);

/// Starts a command line and returns at once. The child dies with us.
pub(super) fn start(line: &[String]) -> anyhow::Result<Bare> {
    start_telling(line, Stdio::inherit())
}

/// As [`start`]; what it says goes to `told`.
pub(super) fn start_telling(line: &[String], told: Stdio) -> anyhow::Result<Bare> {
    let mut command = Command::new(&line[0]);
    // An interrupt from the terminal is for the bench.
    command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(told).process_group(0);
    let child = die_with_parent(&mut command).spawn().with_context(|| format!("starting {}", line[0]))?;
    Ok(Bare(child))
}

/// A backend nobody guards. Killed on drop.
#[derive(Debug)]
pub(super) struct Bare(Child);

impl Bare {
    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Waits until it listens on `socket`.
    pub(super) fn wait_until_listening(&mut self, socket: &Path) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_MAX;
        while !listens(socket) {
            self.must_live()?;
            ensure!(Instant::now() < deadline, "the backend does not listen on {}", socket.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Sends SIGKILL and returns at once.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.0.kill().context("killing a backend")
    }

    /// Whether it has ended and was reaped.
    pub(super) fn is_reaped(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }

    /// Fails if it has ended by itself.
    pub(super) fn must_live(&mut self) -> anyhow::Result<()> {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the backend ended by itself: {status}"),
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
