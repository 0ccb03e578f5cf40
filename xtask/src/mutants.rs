//! `cargo xtask mutants`: whether the tests of `wire` and `core` notice when one thing in them is changed.
//!
//! `cargo-mutants` changes one operator, result or condition after the other and runs the crate's own tests. What is changed and how
//! the tests are built is in `.cargo/mutants.toml`. All of it takes most of a day; a sample is every n-th of the list.

use std::fs::read_to_string;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::shell::{self, cargo};

/// What is changed unless files are named.
const FILES: [&str; 2] = ["crates/wire/src/**", "crates/core/src/**"];

/// The end codes of cargo-mutants that are no trouble of its own: all caught, some missed, some endless.
const ENDS: [i32; 3] = [0, 2, 3];

/// Runs all mutants, or about `sample` of them, which the seed chooses.
pub(crate) fn run(sample: Option<usize>, seed: usize, files: &[String]) -> anyhow::Result<()> {
    ensure!(shell::has("cargo-mutants"), "cargo-mutants is not here: `cargo install cargo-mutants --locked`");
    ensure!(shell::has("cargo-nextest"), "cargo-nextest is not here: `cargo install cargo-nextest --locked`");
    let files: Vec<&str> = if files.is_empty() { FILES.to_vec() } else { files.iter().map(String::as_str).collect() };
    let listed = shell::output(mutants(&files).arg("--list")).context("cargo-mutants cannot list its mutants")?;
    let all = listed.lines().count();
    ensure!(all > 0, "there is nothing to change in {}", files.join(", "));
    let shards = sample.map_or(1, |sample| all.div_ceil(sample.max(1)));
    let output = shell::root().join("target");
    let mut command = mutants(&files);
    command
        .arg(format!("--shard={}/{shards}", seed % shards))
        .arg("--sharding=round-robin")
        .arg("--output")
        .arg(&output);
    // The depth that needs seconds: what a mutant breaks is seen there or nowhere.
    command.env("WARMSWAP_TEST_DEPTH", "1");
    println!("mutants: every {shards}. of {all}");
    let status = command.status().with_context(|| format!("starting `{}`", shell::spelled(&command)))?;
    ensure!(status.code().is_some_and(|code| ENDS.contains(&code)), "cargo-mutants: {status}");
    let results = output.join("mutants.out");
    let count = |end: &str| count(&results, end);
    let (caught, endless, missed, unviable) =
        (count("caught")?, count("timeout")?, count("missed")?, count("unviable")?);
    // One that never ends is noticed, too.
    let (killed, viable) = (caught + endless, caught + endless + missed);
    let [low, high] = interval(killed, viable).map(|part| part * 100.0);
    println!(
        "{killed} of {viable} viable mutants killed: {:.1} % (95 %: {low:.1} to {high:.1}); {missed} missed, {unviable} not viable; \
         named in {}",
        killed as f64 / viable.max(1) as f64 * 100.0,
        results.display()
    );
    Ok(())
}

fn mutants(files: &[&str]) -> Command {
    let mut command = cargo(&["mutants"]);
    files.iter().for_each(|file| _ = command.args(["--file", file]));
    command
}

/// How many mutants ended like this.
fn count(results: &Path, end: &str) -> anyhow::Result<usize> {
    let file = results.join(format!("{end}.txt"));
    let text = read_to_string(&file).with_context(|| file.display().to_string())?;
    Ok(text.lines().count())
}

/// Wilson's interval for a share, at 95 %.
fn interval(hits: usize, of: usize) -> [f64; 2] {
    const Z: f64 = 1.96;
    let (n, share) = (of.max(1) as f64, hits as f64 / of.max(1) as f64);
    let (middle, width) = (share + Z * Z / (2.0 * n), Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt());
    [middle - width, middle + width].map(|bound| bound / (1.0 + Z * Z / n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        for ((hits, of), [low, high]) in [((8, 10), [0.490, 0.943]), ((0, 20), [0.0, 0.161]), ((20, 20), [0.839, 1.0])]
        {
            let found = interval(hits, of);
            assert!((found[0] - low).abs() < 1e-3 && (found[1] - high).abs() < 1e-3, "{hits} of {of}: {found:?}");
        }
    }
}
