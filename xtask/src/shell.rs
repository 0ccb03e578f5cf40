//! Running other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    // Cargo says at run time where it runs us from; a binary started by hand knows where it was built.
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let here = PathBuf::from(here);
    here.parent().map_or_else(|| here.clone(), Path::to_owned)
}

/// Cargo, in the repository's root.
pub(crate) fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words).current_dir(root());
    command
}

/// The command as one would type it.
pub(crate) fn spelled(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs a command; anything but success is an error.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = spelled(command);
    let status = command.status().with_context(|| format!("starting `{name}`"))?;
    anyhow::ensure!(status.success(), "`{name}` failed ({status})");
    Ok(())
}

/// Runs a command and returns what it printed; none if it cannot be run or fails.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program is found on the search path, or beside the system's administrative programs.
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrative = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    std::env::split_paths(&path).chain(administrative).any(|directory| directory.join(program).is_file())
}
