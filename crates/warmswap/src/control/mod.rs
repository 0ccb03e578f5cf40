//! The control socket: one JSON object per line each way, on a Unix socket whose file mode is the permission.

mod client;
pub(crate) mod history;
pub(crate) mod json;
mod server;
#[cfg(test)]
pub(crate) mod testing;

pub use client::{Client, ClientError};
pub(crate) use server::{exit_code, serve};

use std::path::{Path, PathBuf};

/// What a control socket's name ends in: sockets of VMMs and backends in the same directory are never talked to.
const ENDING: &str = "ctl";

/// Path of a device's control socket.
#[must_use]
pub fn socket_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.{ENDING}"))
}

/// The devices that have a control socket in a directory, by name.
pub(crate) fn devices_in(dir: &Path) -> std::io::Result<Vec<String>> {
    let paths = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let sockets = paths.filter(|path| path.extension().is_some_and(|extension| extension == ENDING));
    let mut names: Vec<String> = sockets.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}
