//! Looking at what backends have open, on a thread of its own: `/proc` takes its time, and the control thread has none.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use warmswap_core::BackendId;

use super::{Command, Commander};
use crate::storage::{self, Mark, Storage, Subject};

/// Looks that may wait.
const LOOKS_MAX: usize = 1024;

/// A backend to be looked at. What is known of its storage travels along and comes back with the answer.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) device: u16,
    pub(crate) backend: BackendId,
    pub(crate) subject: Subject,
    pub(crate) process: Arc<OwnedFd>,
    pub(crate) storage: Storage,
}

/// A mark that outlives its backend; who holds it?
#[derive(Debug)]
pub(crate) struct Search {
    pub(crate) device: u16,
    pub(crate) backend: BackendId,
    pub(crate) mark: Mark,
}

#[derive(Debug)]
enum Task {
    Look(Box<Look>),
    Search(Search),
}

/// Hands looks to the inspector's thread.
#[derive(Clone, Debug)]
pub(crate) struct Inspector {
    tasks: Sender<Task>,
}

impl Inspector {
    /// Starts the thread. The results come back as commands.
    pub(crate) fn start(commander: Commander) -> std::io::Result<Self> {
        let (sender, tasks) = crossbeam_channel::bounded(LOOKS_MAX);
        std::thread::Builder::new().name("inspector".to_owned()).spawn(move || run(&tasks, &commander))?;
        Ok(Inspector { tasks: sender })
    }

    /// Hands one over; gives it back if too many wait.
    pub(crate) fn look(&self, look: Look) -> Result<(), Box<Look>> {
        self.tasks.try_send(Task::Look(Box::new(look))).map_err(|error| match error.into_inner() {
            Task::Look(look) => look,
            Task::Search(_) => unreachable!("a look was sent"),
        })
    }

    /// Hands a search over. If too many wait there is no answer.
    pub(crate) fn search(&self, search: Search) {
        let _unknown = self.tasks.try_send(Task::Search(search));
    }
}

fn run(tasks: &Receiver<Task>, commander: &Commander) {
    for task in tasks {
        let command = match task {
            Task::Look(look) => {
                let Look { device, backend, subject, process, mut storage } = *look;
                storage.inspect(&subject, process.as_fd(), super::now());
                Command::Inspected { device, backend, storage }
            }
            Task::Search(Search { device, backend, mark }) => {
                let holder = match storage::holder(&mark) {
                    Some(pid) => {
                        let name = storage::process_name(pid);
                        format!("{name} has it open too; end it, or give the backend a description of its own")
                    }
                    None => "no living process was found to have it open".to_owned(),
                };
                Command::HolderFound { device, backend, holder }
            }
        };
        if !commander.send(command) {
            return;
        }
    }
}
