//! Looking at what backends have open, on a thread of its own: `/proc` takes its time, and the control thread has none.

use std::os::fd::{AsFd, OwnedFd};

use crossbeam_channel::{Receiver, Sender};
use warmswap_core::BackendId;

use super::{Command, Commander};
use crate::storage::Storage;

/// Looks that may wait.
const LOOKS_MAX: usize = 1024;

/// A process to be looked at. What is known of its storage travels along and comes back with the answer.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) device: u16,
    pub(crate) backend: BackendId,
    pub(crate) pid: u32,
    pub(crate) process: OwnedFd,
    pub(crate) storage: Storage,
}

/// Hands looks to the inspector's thread.
#[derive(Clone, Debug)]
pub(crate) struct Inspector {
    looks: Sender<Look>,
}

impl Inspector {
    /// Starts the thread. The results come back as commands.
    pub(crate) fn start(commander: Commander) -> std::io::Result<Self> {
        let (sender, looks) = crossbeam_channel::bounded(LOOKS_MAX);
        std::thread::Builder::new().name("inspector".to_owned()).spawn(move || run(&looks, &commander))?;
        Ok(Inspector { looks: sender })
    }

    /// Hands one over; gives it back if too many wait.
    pub(crate) fn look(&self, look: Look) -> Result<(), Look> {
        self.looks.try_send(look).map_err(crossbeam_channel::TrySendError::into_inner)
    }
}

fn run(looks: &Receiver<Look>, commander: &Commander) {
    for look in looks {
        let Look { device, backend, pid, process, mut storage } = look;
        storage.inspect(pid, process.as_fd());
        if !commander.send(Command::Inspected { device, backend, storage }) {
            return;
        }
    }
}
