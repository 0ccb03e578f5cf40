//! `cargo xtask demo`: the main job, from a fresh checkout.

use std::io::IsTerminal as _;

use super::{setup, shell};

/// Sets up, builds, runs `lab vm --demo`.
pub(crate) fn run() -> anyhow::Result<()> {
    setup::run(false)?;
    println!("demo: building, which takes two minutes or so the first time");
    // Somebody who watches sees it go on.
    let quiet: &[&str] = if std::io::stderr().is_terminal() { &[] } else { &["--quiet"] };
    shell::run(&mut shell::cargo(&[&["build", "--release", "--package", "lab"], quiet].concat()))?;
    shell::run(&mut shell::cargo(&["run", "--release", "--quiet", "--package", "lab", "--", "vm", "--demo"]))
}
