//! The configuration in force, kept beside the devices.
//!
//! ```text
//!                       reload: written down, this process ends
//!   in force ───────────────────────────────────────────────────▶ in force + trial
//!      ▲  ▲                                                             │ the next process begins with the trial
//!      │  └──── every device has begun: the trial is in force ──── in force + trial, begun
//!      └─────── it did not come to that: the process after it goes by what was in force, and the trial is gone ──┘
//! ```
//! A broker that was killed is followed by one that goes by this, not by what has been written into the file since: nobody has said yet
//! that that is to be used.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};

use super::ledger::Keeping;

/// Where the configuration lies, by names in the store.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Configured {
    in_force: Option<u32>,
    trial: Option<Trial>,
    /// How many have been in force.
    number: u64,
    /// This process has undone one.
    #[serde(skip)]
    undone: bool,
}

/// A configuration that nobody knows to work.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Trial {
    text: u32,
    /// A process has begun with it.
    begun: bool,
}

/// The configuration that a process is to go by.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) text: String,
    /// A process before this one has begun with a newer one, and not got through.
    pub(crate) undone: bool,
}

impl Keeping {
    /// The configuration that a predecessor has left, if one has.
    ///
    /// # Errors
    /// The store does not take or give what it should.
    pub(crate) fn configuration(&mut self) -> io::Result<Option<Configuration>> {
        let before = self.configured().trial;
        let undone = before.is_some_and(|trial| trial.begun);
        if undone {
            // Nobody asks for its text any more.
            self.configured().trial = None;
            self.configured().undone = true;
        } else if let Some(trial) = &mut self.configured().trial {
            trial.begun = true;
        }
        let Configured { in_force, trial, .. } = *self.configured();
        let names = [in_force, trial.map(|trial| trial.text)];
        names.into_iter().flatten().try_for_each(|name| self.adopt(name).map(drop).ok_or_else(missing))?;
        if before.is_some() {
            self.write_directory()?;
        }
        let Some(name) = trial.map(|trial| trial.text).or(in_force) else { return Ok(None) };
        let text = read(&self.inherited(name).ok_or_else(missing)?)?;
        Ok(Some(Configuration { text, undone }))
    }

    /// The first process says what it goes by.
    pub(crate) fn set_configuration(&mut self, text: &str) -> io::Result<()> {
        let name = self.put_text(text)?;
        self.configured().in_force = Some(name);
        self.write_directory()
    }

    /// The next process is to try this configuration.
    pub(crate) fn try_configuration(&mut self, text: &str) -> io::Result<()> {
        let text = self.put_text(text)?;
        self.configured().trial = Some(Trial { text, begun: false });
        self.write_directory()
    }

    /// Whether it is not known yet that what this process goes by works.
    pub(crate) fn is_trial(&mut self) -> bool {
        self.configured().trial.is_some()
    }

    /// Every device has begun with it. The caller writes that down.
    pub(super) fn accept_configuration(&mut self) {
        let configured = self.configured();
        if configured.number == 0 {
            configured.number = 1;
        }
        let Some(trial) = configured.trial.take() else { return };
        configured.number += 1;
        let old = configured.in_force.replace(trial.text);
        old.into_iter().for_each(|name| self.let_go(name));
    }

    /// Nobody is to go by it any more. The caller writes that down.
    pub(crate) fn forget_configuration(&mut self) {
        let Configured { in_force, trial, .. } = std::mem::take(self.configured());
        let names = [in_force, trial.map(|trial| trial.text)];
        // What cannot be written down has been read by the next process before: it would find the text gone.
        let _unwritten = self.write_directory();
        names.into_iter().flatten().for_each(|name| self.let_go(name));
    }

    /// How many configurations have been in force, of which the last still is, none while the first is being tried; and whether this process
    /// has undone one.
    pub(crate) fn configuration_state(&mut self) -> (u64, bool) {
        (self.configured().number, self.configured().undone)
    }

    fn put_text(&mut self, text: &str) -> io::Result<u32> {
        let file = rustix::fs::memfd_create("warmswap-config", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut written = 0;
        while written < text.len() {
            written += rustix::io::pwrite(&file, &text.as_bytes()[written..], written as u64)?;
        }
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        self.put(file.as_fd())
    }
}

fn read(file: &OwnedFd) -> io::Result<String> {
    let size = usize::try_from(rustix::fs::fstat(file)?.st_size).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = vec![0; size];
    let mut done = 0;
    while done < size {
        match rustix::io::pread(file, &mut bytes[done..], done as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the configuration in force is not in the descriptor store")
}
