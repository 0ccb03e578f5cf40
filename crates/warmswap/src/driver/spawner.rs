//! Starting processes on a thread of its own: a fork takes milliseconds, in which the control thread would be blind.

use std::os::fd::AsFd;
use std::path::PathBuf;

use crossbeam_channel::{Receiver, Sender};
use warmswap_core::BackendId;

use super::backends::listen;
use super::offload::{Admission, own_memory};
use super::{Command, Commander};
use crate::cgroup::Janitor;
use crate::process::{Endpoint, Process};

/// Starts that may wait. A pair has two roles, so few ever do.
const STARTS_MAX: usize = 1024;

/// A backend to be started.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) device: u16,
    pub(crate) backend: BackendId,
    pub(crate) command: Vec<String>,
    /// Where it shall listen.
    pub(crate) path: PathBuf,
    /// Name of its control group.
    pub(crate) group: String,
    pub(crate) admission: Wanted,
}

/// Whether a backend is started whatever it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// Somebody waits for it.
    AtAnyCost,
    /// Only if there is room for it beside the primary, which is this process if it is there already.
    WhereThereIsRoom { primary: Option<u32> },
}

/// Hands starts to the spawner's thread.
#[derive(Clone, Debug)]
pub(crate) struct Spawner {
    starts: Sender<Start>,
}

impl Spawner {
    /// Starts the thread. The results come back as commands. What is started ends with the broker unless it is to `survive` it.
    pub(crate) fn start(
        commander: Commander,
        janitor: Janitor,
        cpus: Vec<usize>,
        survive: bool,
    ) -> std::io::Result<Self> {
        let (sender, starts) = crossbeam_channel::bounded(STARTS_MAX);
        let work = move || run(&starts, &commander, &janitor, &cpus, survive);
        std::thread::Builder::new().name("spawner".to_owned()).spawn(work)?;
        Ok(Spawner { starts: sender })
    }

    /// Hands one over; false if too many wait.
    pub(crate) fn spawn(&self, start: Start) -> bool {
        self.starts.try_send(start).is_ok()
    }
}

fn run(starts: &Receiver<Start>, commander: &Commander, janitor: &Janitor, cpus: &[usize], survive: bool) {
    let mut admission = Admission::default();
    for start in starts {
        let admitted = match start.admission {
            Wanted::WhereThereIsRoom { primary } => admission.admit(primary.map_or(0, own_memory), cpus),
            Wanted::AtAnyCost => Ok(()),
        };
        let process = admitted.and_then(|()| spawn(&start, janitor, survive));
        if !commander.send(Command::Spawned { device: start.device, backend: start.backend, process }) {
            return;
        }
    }
}

fn spawn(start: &Start, janitor: &Janitor, survive: bool) -> Result<Process, String> {
    let Start { command, path, group, .. } = start;
    let process = if command.iter().any(|argument| argument.contains("{fd}")) {
        let listener = listen(path)?;
        Process::spawn(command, &Endpoint::Listener(listener.as_fd()), group, janitor, survive)
    } else {
        Process::spawn(command, &Endpoint::Path(path), group, janitor, survive)
    };
    process.map_err(|error| format!("{}: {error}", command[0]))
}
