//! Project chores: `cargo xtask setup`, `cargo xtask test`, `cargo xtask demo`.

mod apt;
mod demo;
mod parts;
mod setup;
mod shell;
mod test;

use std::process::ExitCode;

use clap::Parser;

/// Project chores.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
enum Chore {
    /// Install the Debian packages that tests and demonstration need; only what is missing.
    Setup {
        /// Only say what is missing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Check everything: format, lints, tests, and short runs of the instruments with real processes. About seven minutes
    /// on two cores.
    Test,
    /// Show the main job: a disk under load whose backend fails in six ways, most of them foreseen. About three minutes, and two more to
    /// build it the first time.
    Demo {
        /// Under an unmodified QEMU: a Linux guest whose disk is swapped, killed and hung.
        #[arg(long)]
        vm: bool,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let passed = match Chore::parse() {
        Chore::Setup { dry_run } => setup::run(dry_run).map(|()| true),
        Chore::Test => test::run(),
        Chore::Demo { vm } => demo::run(vm).map(|()| true),
    }?;
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
