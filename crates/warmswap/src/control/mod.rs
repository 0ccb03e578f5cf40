//! The control socket: one JSON object per line each way, on a Unix socket whose file mode is the permission.

mod client;
pub(crate) mod hex;
pub(crate) mod history;
pub(crate) mod json;
mod line;
mod places;
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

/// Whether a text can be the name of a device: it becomes part of paths, and of lines on terminals.
pub(crate) fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !text.is_empty() && text.len() <= 64 && !text.starts_with('.') && text.chars().all(fits)
}

/// The devices that have a control socket in a directory, by name. A file whose name no device can have was put there by somebody else,
/// and is passed over.
pub(crate) fn devices_in(dir: &Path) -> std::io::Result<Vec<String>> {
    let paths = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let sockets = paths.filter(|path| path.extension().is_some_and(|extension| extension == ENDING));
    let mut names: Vec<String> = sockets.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.retain(|name| is_name(name));
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    #[test]
    fn files_whose_names_no_device_can_have_are_passed_over() {
        let dir = std::env::temp_dir().join(format!("ws-names-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        let long = format!("{}.ctl", "x".repeat(65));
        for file in ["b.ctl", "a-1.ctl", "c.sock", "\u{1b}[2J.ctl", "\u{202e}x.ctl", "a b.ctl", "..ctl", &long] {
            std::fs::write(dir.join(file), "").expect("a file");
        }
        let names = super::devices_in(&dir);
        let _gone = std::fs::remove_dir_all(&dir);
        assert_eq!(names.expect("it can be read"), ["a-1", "b"]);
    }
}
