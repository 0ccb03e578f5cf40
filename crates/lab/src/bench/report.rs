//! What every bench prints: its figures, and what is needed to repeat them.

use std::process::Command;

use serde::Serialize;
use serde_json::{Value, json};

use super::Common;

/// A report: one JSON object.
#[derive(Debug)]
pub(super) struct Report {
    /// The object.
    pub(super) fields: Value,
}

impl Report {
    /// A report with seed, commit and command.
    pub(super) fn new(bench: &str, common: &Common) -> Self {
        let words: Vec<String> = std::env::args().skip(1).collect();
        let fields = json!({
            "bench": bench,
            "seed": common.seed,
            "commit": commit(),
            "command": format!("cargo run -rq -p lab -- {}", words.join(" ")),
        });
        Report { fields }
    }

    /// Adds a field.
    pub(super) fn set(&mut self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        self.fields[name] = serde_json::to_value(value)?;
        Ok(())
    }

    /// Prints it: the object on one line, or what `table` makes of it.
    pub(super) fn print(&self, as_json: bool, table: impl FnOnce() -> String) {
        if as_json {
            println!("{}", self.fields);
        } else {
            print!("{}", table());
            let text = |name: &str| self.fields[name].as_str().unwrap_or_default().to_owned();
            println!("seed {}, commit {}\n{}", self.fields["seed"], text("commit"), text("command"));
        }
    }
}

/// The commit the sources are at, with a mark where they differ from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(commit) if git(&["status", "--porcelain"]).is_some_and(|changes| changes.is_empty()) => commit,
        Some(commit) => format!("{commit}+changes"),
        None => "unknown".into(),
    }
}
