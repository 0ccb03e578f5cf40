//! Backends as the shell has them: process, link, back-end request channel, and what they have open.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use warmswap_core::{BackendId, Nanos};

use super::keeping::StorageRecord;
use crate::process::{self, Process};
use crate::storage::Storage;
use warmswap_socket::Connection;

/// Time between two attempts to connect to a backend that is starting.
pub(crate) const CONNECT_EVERY: Nanos = Nanos::from_micros(400);

/// One backend.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) id: BackendId,
    pub(crate) process: Option<Process>,
    pub(crate) path: PathBuf,
    pub(crate) link: Option<Connection>,
    /// Our end of its back-end request channel.
    pub(crate) requests: Option<Connection>,
    /// What it has open; none while the inspector is looking.
    pub(crate) storage: Option<Storage>,
    /// What it had open when that was last looked at, for the next broker.
    pub(crate) recorded: StorageRecord,
    /// Names of `link` and `requests` in the descriptor store.
    pub(crate) kept: (Option<u32>, Option<u32>),
    /// Connected, and waiting for the first look before it is used.
    pub(crate) pending: Option<Connection>,
    /// It serves the guest, or is to.
    pub(crate) primary: bool,
    /// When it was first given a ring in its role; as a shadow, that of the canary.
    pub(crate) given_at: Option<Nanos>,
    pub(crate) connect_at: Option<Nanos>,
    /// What the last attempt to connect said.
    pub(crate) connect_error: String,
}

impl Backend {
    /// A backend that is about to listen at `path`.
    pub(crate) fn new(id: BackendId, path: PathBuf, connect_at: Option<Nanos>) -> Self {
        Backend {
            id,
            process: None,
            path,
            link: None,
            requests: None,
            storage: Some(Storage::default()),
            recorded: StorageRecord::default(),
            kept: (None, None),
            pending: None,
            primary: false,
            given_at: None,
            connect_at,
            connect_error: String::new(),
        }
    }
}

/// The one of two external sockets that no other backend uses.
pub(crate) fn external_path(primary: &Path, shadow: Option<&Path>, taken: &[PathBuf]) -> Result<PathBuf, String> {
    let free = [Some(primary), shadow].into_iter().flatten().find(|path| !taken.iter().any(|used| used == path));
    free.map(Path::to_path_buf).ok_or_else(|| "both sockets of the pair are in use".to_owned())
}

pub(crate) fn listen(path: &Path) -> Result<OwnedFd, String> {
    let fail = |error: rustix::io::Errno| format!("{}: {error}", path.display());
    let address = SocketAddrUnix::new(path).map_err(fail)?;
    // The backend inherits it by number, so close-on-exec is taken off in the child alone.
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail)?;
    rustix::net::bind(&socket, &address).map_err(fail)?;
    rustix::net::listen(&socket, 1).map_err(fail)?;
    Ok(socket)
}

impl Backend {
    /// Takes note of its role.
    pub(crate) fn assign(&mut self, primary: bool) {
        if primary && !self.primary {
            // The rings of the guest come after this.
            self.given_at = None;
        }
        self.primary = primary;
    }

    /// Tries to connect. `None`: not listening yet. `others` are the processes of the pair's other backends.
    pub(crate) fn connect(&mut self, now: Nanos, others: &[u32]) -> Result<Option<Connection>, String> {
        match try_connect(&self.path) {
            Ok(socket) => {
                self.connect_at = None;
                self.identify(&socket, others)?;
                Connection::new(socket).map(Some).map_err(|error| error.to_string())
            }
            Err(error) => {
                self.connect_error = format!("{}: {error}", self.path.display());
                self.connect_at = Some(now + CONNECT_EVERY);
                Ok(None)
            }
        }
    }

    /// Finds the process behind an external socket, and makes sure it is alive: a connect can succeed into a dying listener.
    fn identify(&mut self, socket: &OwnedFd, others: &[u32]) -> Result<(), String> {
        if self.process.is_none() {
            let path = self.path.display();
            let (pid, pidfd) = process::peer(socket.as_fd())
                .map_err(|error| format!("the process behind {path} is unknown: {error}"))?;
            if let Some(refusal) = process::refusal(pid) {
                return Err(format!("{path}: {refusal}"));
            }
            if others.contains(&pid) {
                return Err(format!(
                    "{path}: process {pid} listens there, which is the other backend of this pair already: primary and shadow must \
                     be two processes, for one of them is killed"
                ));
            }
            let adopted =
                Process::adopt(pid, pidfd).map_err(|error| format!("process {pid} cannot be watched: {error}"))?;
            self.process = Some(adopted);
        }
        let process = self.process.as_mut().expect("set above");
        if let Some(how) = process.reap() {
            return Err(how.to_owned());
        }
        Ok(())
    }
}

fn try_connect(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}
