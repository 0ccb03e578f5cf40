//! What every bench prints: its figures, and what is needed to repeat them.

use serde::Serialize;
use serde_json::{Value, json};

use super::Common;
use crate::common::commit::commit;

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
