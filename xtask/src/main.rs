//! Project chores: `cargo xtask setup`, `cargo xtask test`, `cargo xtask demo`, `cargo xtask mutants`.

mod apt;
mod backends;
mod demo;
mod mutants;
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
        /// Get the backends of other kinds of devices as well, which others have written: DPDK's testpmd from Debian, vhost-device-rng,
        /// vhost-device-scsi and virtiofsd from the crate registry, built into the cache. About three minutes on two cores.
        #[arg(long)]
        backends: bool,
    },
    /// Check everything: format, lints, tests, and short runs of the instruments with real processes. About ten minutes
    /// on two cores.
    Test,
    /// Show the main job: a disk under load whose backend fails in six ways, most of them foreseen. About three minutes, and two more to
    /// build it the first time.
    Demo {
        /// Under an unmodified QEMU: a Linux guest whose disk is swapped, killed and hung.
        #[arg(long)]
        vm: bool,
    },
    /// Change one thing in `wire` or `core` after the other and see whether a test notices. Needs cargo-mutants and cargo-nextest, and
    /// most of a day for all of it.
    Mutants {
        /// About so many, spread over all of them.
        #[arg(long)]
        sample: Option<usize>,
        /// Which ones of a sample.
        #[arg(long, default_value_t = 0)]
        seed: usize,
        /// Only in files that match these patterns.
        #[arg(long = "file", value_name = "GLOB")]
        files: Vec<String>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let passed = match Chore::parse() {
        Chore::Setup { dry_run, backends } => {
            setup::run(dry_run)?;
            if backends {
                backends::make_missing(&backends::ALL, dry_run)?;
            }
            Ok(true)
        }
        Chore::Test => test::run(),
        Chore::Demo { vm } => demo::run(vm).map(|()| true),
        Chore::Mutants { sample, seed, files } => mutants::run(sample, seed, &files).map(|()| true),
    }?;
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
