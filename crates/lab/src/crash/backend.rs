//! `lab blk` as a child that kills itself at a store that is known.

use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::config::Config;
use crate::common::blk::Blk;
use crate::common::process::die_with_parent;
use crate::guest::Guest;

/// How long a back-end may take to listen, and to be gone once its socket is.
const TURN_MAX: Duration = Duration::from_secs(20);

/// One life of a back-end. Killed on drop.
#[derive(Debug)]
pub(super) struct Backend {
    child: Child,
    log: PathBuf,
}

impl Backend {
    /// Starts one on `image` that ends before that store.
    pub(super) fn start(config: &Config, store: Option<u64>, image: &Path, socket: &Path) -> anyhow::Result<Self> {
        let blk = Blk { image: image.to_path_buf(), queues: 1, engine: config.engine, direct: false };
        let mut line = blk.command_line(&socket.display().to_string());
        // A worker that looks on takes bursts apart.
        line.extend(["--look-us".to_owned(), "0".to_owned()]);
        if let Some(faults) = config.faults(store) {
            line.extend(["--fault".to_owned(), faults]);
        }
        let log = socket.with_extension("log");
        let mut command = Command::new("/proc/self/exe");
        command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let child = die_with_parent(command.process_group(0)).spawn().context("starting the back-end")?;
        Ok(Backend { child, log })
    }

    /// Connects the guest once the back-end listens. False: it has died.
    pub(super) fn connect(&mut self, guest: &mut Guest) -> anyhow::Result<bool> {
        let deadline = Instant::now() + TURN_MAX;
        loop {
            let Err(error) = guest.connect() else { return Ok(true) };
            let refused = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            let early = matches!(refused, Some(std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound));
            if !early || Instant::now() > deadline {
                return self.has_died(&error).map(|()| false);
            }
            if let Some(status) = self.child.try_wait()? {
                return self.is_killed(status).map(|()| false);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for its death by the fault; an error if `reason`, what the front-end saw of it, has another cause.
    pub(super) fn has_died(&mut self, reason: &anyhow::Error) -> anyhow::Result<()> {
        let deadline = Instant::now() + TURN_MAX / 10;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return self.is_killed(status).with_context(|| format!("{reason:#}"));
            }
            if Instant::now() > deadline {
                bail!("the back-end lives, and yet: {reason:#}; {}", self.words());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn is_killed(&self, status: ExitStatus) -> anyhow::Result<()> {
        match status.signal() {
            Some(libc::SIGKILL) => Ok(()),
            _ => bail!("the back-end ended with {status}, not by the kill that was ordered; {}", self.words()),
        }
    }

    /// What it wrote to its standard error.
    pub(super) fn words(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default().trim().replace('\n', " | ")
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
