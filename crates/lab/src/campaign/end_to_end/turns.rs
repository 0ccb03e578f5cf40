//! Command lines that differ from one backend of a pair to the next: the first is the one that fails.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};

/// The verb under which this program becomes the backend whose turn it is.
pub(crate) const VERB: &str = "turn";

/// Command lines with `{socket}` in them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Turns {
    /// Of the first backend.
    pub(super) first: Vec<String>,
    /// Of all that come behind it.
    pub(super) later: Vec<String>,
}

impl Turns {
    /// Writes them to a file, and returns the one command line by which a broker starts either.
    pub(super) fn command_line(&self, file: &Path) -> anyhow::Result<Vec<String>> {
        std::fs::write(file, serde_json::to_string(self)?).with_context(|| file.display().to_string())?;
        let program = std::env::current_exe()?.display().to_string();
        Ok([&program, VERB, &file.display().to_string(), "{socket}"].map(str::to_owned).to_vec())
    }

    /// The command line of the backend of that generation, counted from one.
    pub(super) fn line(&self, generation: u64, socket: &str) -> Vec<String> {
        let line = if generation <= 1 { &self.first } else { &self.later };
        line.iter().map(|word| word.replace("{socket}", socket)).collect()
    }
}

/// The generation of the backend that shall listen at `socket`: a broker names it `backend-N.sock`.
fn generation(socket: &str) -> Option<u64> {
    socket.rsplit_once("backend-")?.1.strip_suffix(".sock")?.parse().ok()
}

/// Becomes the backend whose turn it is: `lab turn FILE SOCKET`. The process stays the one that the broker started.
pub(crate) fn main(mut words: impl Iterator<Item = OsString>) -> ExitCode {
    let mut become_it = || -> anyhow::Result<std::io::Error> {
        let (file, socket) = (words.next().context("a file is missing")?, words.next().context("a socket is missing")?);
        let socket = socket.to_str().context("the socket's path is no text")?;
        let turns: Turns = serde_json::from_str(&std::fs::read_to_string(file)?)?;
        let generation = generation(socket).with_context(|| format!("{socket}: expected backend-N.sock"))?;
        let line = turns.line(generation, socket);
        ensure!(!line.is_empty(), "the command line is empty");
        Ok(Command::new(&line[0]).args(&line[1..]).exec())
    };
    let error = become_it().map_or_else(|error| format!("{error:#}"), |error| error.to_string());
    eprintln!("lab {VERB}: {error}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_backend_is_told_by_its_socket() {
        assert_eq!(generation("/run/backend-1.sock"), Some(1));
        assert_eq!(generation("/run/backend-x/disk/backend-17.sock"), Some(17));
        assert_eq!(generation("/run/backend.sock"), None);
        let line = |words: [&str; 2]| words.map(str::to_owned).to_vec();
        let turns = Turns { first: line(["bad", "{socket}"]), later: line(["good", "path={socket},x"]) };
        assert_eq!(turns.line(1, "/a"), ["bad", "/a"]);
        assert_eq!(turns.line(3, "/a"), ["good", "path=/a,x"]);
    }
}
