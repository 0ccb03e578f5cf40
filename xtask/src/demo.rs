//! `cargo xtask demo`: the main job, from a fresh checkout; with `--vm` under an unmodified QEMU.

use std::io::IsTerminal as _;

use super::{setup, shell};

/// Sets up, builds, runs `lab demo`, or `lab vm --demo`.
pub(crate) fn run(vm: bool) -> anyhow::Result<()> {
    setup::run(false)?;
    println!("demo: building, which takes two minutes or so the first time");
    // Somebody who watches sees it go on.
    let quiet: &[&str] = if std::io::stderr().is_terminal() { &[] } else { &["--quiet"] };
    shell::run(&mut shell::cargo(&[&["build", "--release", "--package", "lab"], quiet].concat()))?;
    let demo: &[&str] = if vm { &["vm", "--demo"] } else { &["demo"] };
    shell::run(&mut shell::cargo(&[&["run", "--release", "--quiet", "--package", "lab", "--"], demo].concat()))
}
