//! `lab zoo`: known-bad variants of our own code, and what catches each.
//!
//! The animals are defined in `warmswap-zoo`. Each is first set loose in the simulator: seeds are run from several starts until one fails,
//! and the median of how many it took is printed. What the simulator does not catch within its bound, or cannot meet because it lives in
//! the program's shell, has a named checker: a test or an instrument, which is run with the animal loose and must fail, and is run
//! without it and must pass.
//!
//! Not shown: that a bug which is in no list would be found.

#[cfg(feature = "zoo")]
mod checkers;
#[cfg(feature = "zoo")]
mod hunt;
#[cfg(feature = "zoo")]
mod report;
#[cfg(feature = "zoo")]
mod show;

#[cfg(feature = "zoo")]
pub(crate) use hunt::{HUNT, child};
#[cfg(feature = "zoo")]
pub(crate) use show::run;

/// Options of `lab zoo`.
#[derive(Debug, clap::Args)]
#[cfg_attr(not(feature = "zoo"), allow(dead_code, reason = "they are read by the build that has the animals"))]
pub(crate) struct Args {
    /// Only these animals, by their names.
    #[arg(long, value_delimiter = ',')]
    animals: Vec<String>,
    /// Starts from which seeds are run, each until one fails.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u64).range(1..=1000))]
    starts: u64,
    /// Seeds from a start, at most.
    #[arg(long, default_value_t = 2_000)]
    seeds_max: u64,
    /// Only say which animals there are.
    #[arg(long)]
    list: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Print the table as it stands in the documents.
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
}

/// This laboratory has no animals: builds one that has, and runs it instead.
#[cfg(not(feature = "zoo"))]
pub(crate) fn run(_: &Args) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;

    let mut cargo = std::process::Command::new("cargo");
    cargo.args(["run", "--quiet", "--package", "lab", "--features", "zoo"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.arg("--manifest-path").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    cargo.arg("--").args(std::env::args_os().skip(1));
    eprintln!("lab: building with the animals");
    Err(anyhow::Error::new(cargo.exec()).context("running cargo, which builds the laboratory with the animals"))
}
