//! `cargo xtask demo`: the main job, from a fresh checkout.

use super::{setup, shell};

/// Sets up, builds, runs `lab vm --demo`.
pub(crate) fn run() -> anyhow::Result<()> {
    setup::run(false)?;
    println!("demo: building");
    shell::run(&mut shell::cargo(&["build", "--release", "--quiet", "--package", "lab"]))?;
    shell::run(&mut shell::cargo(&["run", "--release", "--quiet", "--package", "lab", "--", "vm", "--demo"]))
}
