//! What a backend is told when it starts.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::image::{Direct, Identity};
use crate::sandbox;

/// How I/O is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// By plain calls on an image in memory, else by io_uring where the system allows it, else by plain calls.
    #[default]
    Auto,
    /// By io_uring, or not at all.
    Uring,
    /// By plain calls, one after the other.
    Sync,
}

impl EngineKind {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Auto => "auto",
            EngineKind::Uring => "uring",
            EngineKind::Sync => "sync",
        }
    }
}

/// Where the front-end comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// It connects to a socket at this path, which is made.
    Path(PathBuf),
    /// A socket that whoever started the process has left open: one that listens, or is connected already.
    Inherited(RawFd),
}

/// Everything a backend is told.
#[derive(Debug)]
pub struct Options {
    /// Where the front-end comes from.
    pub endpoint: Endpoint,
    /// The image.
    pub image: PathBuf,
    /// Which file that must be, if it matters: its path may lead to another one by now.
    pub identity: Option<Identity>,
    /// Nothing is written to it.
    pub read_only: bool,
    /// Page cache or not.
    pub direct: Direct,
    /// How I/O is done.
    pub engine: EngineKind,
    /// Queues of the device: 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Threads that serve them, at least one; more than there are queues are not made.
    pub workers: u16,
    /// Name of the device, of which 20 bytes are told.
    pub serial: String,
    /// The device begins with a write cache: what was not flushed may be lost with the host. Without one every write is durable.
    pub write_cache: bool,
    /// Longest time for which a worker that has nothing to do looks on before it sleeps. Zero: it sleeps at once.
    pub look_max: Duration,
    /// How the process confines itself.
    pub sandbox: sandbox::Policy,
}

/// Most queues.
pub const QUEUES_MAX: u16 = 256;
/// What is looked on for at most if nothing else is said: about what it costs to fall asleep and be woken.
pub const LOOK_MAX: Duration = Duration::from_micros(32);
