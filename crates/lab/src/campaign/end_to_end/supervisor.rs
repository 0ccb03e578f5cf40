//! What is there without a broker: somebody who starts a backend again as soon as its process has ended.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::turns::Turns;
use crate::common::process::die_with_parent;
use crate::common::qsd::listens;

/// Whether the process has ended is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// A backend that ends at once is not started more often than this.
const START_EVERY: Duration = Duration::from_millis(100);
/// How long the first one may take until it listens.
const START_MAX: Duration = Duration::from_secs(10);

/// A supervisor and its backend. Both end on drop.
#[derive(Debug)]
pub(super) struct Supervisor {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
    /// The first backend.
    pub(super) pid: u32,
}

impl Supervisor {
    /// Starts the first backend, and waits until it listens. All of them listen at the same socket, one after the other.
    pub(super) fn start(turns: Turns, directory: &Path) -> anyhow::Result<Self> {
        let socket = directory.join("vmm.sock");
        let log = File::create(directory.join("backends.log"))?;
        let ended = Arc::new(AtomicBool::new(false));
        let (sender, first) = channel();
        let keeper = Keeper { turns, socket: socket.clone(), log, ended: Arc::clone(&ended) };
        // Its backends die with the thread that starts them.
        let thread = std::thread::Builder::new().name("supervisor".to_owned()).spawn(move || keeper.keep(&sender))?;
        let mut supervisor = Supervisor { ended, thread: Some(thread), socket, pid: 0 };
        supervisor.pid = first.recv().context("the supervisor ended")??;
        let until = Instant::now() + START_MAX;
        while !listens(&supervisor.socket) {
            ensure!(Instant::now() < until, "the backend does not listen on {}", supervisor.socket.display());
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(supervisor)
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to panic over.
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Keeper {
    turns: Turns,
    socket: PathBuf,
    log: File,
    ended: Arc<AtomicBool>,
}

impl Keeper {
    fn keep(&self, first: &Sender<anyhow::Result<u32>>) {
        for generation in 1.. {
            let began = Instant::now();
            let child = self.spawn(generation);
            let pid = child.as_ref().map(Child::id);
            if generation == 1 {
                // Whoever asked waits for it.
                let _ = first.send(pid.map_err(|error| anyhow::anyhow!("starting the backend: {error}")));
            }
            if let Ok(mut child) = child {
                self.watch(&mut child);
            }
            while began.elapsed() < START_EVERY && !self.is_over() {
                std::thread::sleep(LOOK_EVERY);
            }
            if self.is_over() {
                return;
            }
        }
    }

    fn is_over(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn spawn(&self, generation: u64) -> std::io::Result<Child> {
        // Left behind by the one before.
        let _ = std::fs::remove_file(&self.socket);
        let line = self.turns.line(generation, &self.socket.display().to_string());
        let mut command = Command::new(&line[0]);
        // An interrupt from the terminal is for the instrument.
        command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        command.stderr(self.log.try_clone()?);
        die_with_parent(&mut command).spawn()
    }

    /// Returns once the process has ended; it is killed when all is over.
    fn watch(&self, child: &mut Child) {
        while !self.is_over() {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}
