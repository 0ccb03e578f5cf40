//! `cargo xtask test`: everything a change must pass.

use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::Context as _;

use super::{backends, setup, shell};

/// Short runs of the instruments, all but the first with real processes: the words after `lab`.
const INSTRUMENTS: [&[&str]; 14] = [
    &["sim", "--seeds", "0..3000"],
    &["rig", "--failovers", "60", "--seed", "5", "--kinds", "point"],
    &["rig", "--failovers", "120", "--seed", "1"],
    &["rig", "--failovers", "60", "--seed", "2", "--backend", "mixed"],
    &["rig", "--failovers", "60", "--seed", "3", "--kinds", "predicted"],
    // The broker dies once for each failover.
    &["rig", "--failovers", "60", "--seed", "4", "--kinds", "planned,now,crash", "--kill-broker"],
    // A silent hang that is foreseen.
    &["eval", "end-to-end", "--kinds", "lost-completion", "--modes", "predictive", "--seeds", "1"],
    &["crash", "--queue-size", "4"],
    &["vm", "--failovers", "6", "--seed", "1"],
    &["vm", "--failovers", "4", "--seed", "2", "--backend", "blk"],
    // Devices of other kinds, on backends that others have written.
    &["vm", "--device", "net", "--failovers", "6", "--seed", "1", "--kinds", "planned,crash"],
    &["vm", "--device", "rng", "--failovers", "6", "--seed", "1", "--kinds", "planned,crash"],
    &["vm", "--device", "fs", "--failovers", "6", "--seed", "1", "--kinds", "planned,crash"],
    &["vm", "--device", "scsi", "--failovers", "4", "--seed", "1", "--kinds", "planned"],
];

/// What has passed and failed so far: a step counts as one, a test runner as many as it says.
#[derive(Debug, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    /// Checks that had nothing to run with.
    skipped: Vec<String>,
    /// The closing lines of the test runners, said again at the end.
    closing: Vec<String>,
    failures: Vec<String>,
}

/// Runs every check; goes on after a failure. Returns whether all passed.
pub(crate) fn run() -> anyhow::Result<bool> {
    setup::run(false)?;
    let rng = other_backends();
    let mut tally = Tally::default();
    tally.step(&mut shell::cargo(&["fmt", "--all", "--check"]))?;
    tally.step(&mut shell::cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    // What is shipped is built without the laboratory's switches.
    tally.step(&mut shell::cargo(&["clippy", "--package", "warmswap", "--quiet", "--", "-D", "warnings"]))?;
    if shell::output(&mut shell::cargo(&["nextest", "--version"])).is_some() {
        let words = ["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "fail"];
        tally.tests(shell::cargo(&words).envs(rng))?;
    } else {
        let words = ["test", "--workspace", "--bins", "--lib", "--tests", "--no-fail-fast"];
        tally.tests(shell::cargo(&words).envs(rng))?;
    }
    tally.tests(&mut shell::cargo(&["test", "--workspace", "--doc", "--quiet"]))?;
    // Known bugs, set loose: a checker that notices none of them is none.
    let zoo = ["warmswap-core/zoo", "warmswap-sim/zoo"].join(",");
    let words = ["test", "--quiet", "--package", "warmswap-core", "--package", "warmswap-sim", "--features", &zoo];
    tally.tests(shell::cargo(&words).args([
        "--lib",
        "--test",
        "zoo",
        "--",
        "known_bugs",
        "bugs_that_were_caught_soon",
    ]))?;
    for words in INSTRUMENTS {
        let mut command = shell::cargo(&["run", "--release", "--quiet", "--package", "lab", "--"]);
        tally.step(command.args(words))?;
    }
    Ok(tally.conclude())
}

/// Gets backends that others have written, and tells the tests where one of them is. What cannot be had is said, and skipped where it is
/// needed.
fn other_backends() -> Option<(&'static str, PathBuf)> {
    // Each has been named.
    let _missing = backends::make_missing(&backends::QUICK, false);
    backends::RNG.present().then(|| ("WARMSWAP_RNG_BACKEND", backends::RNG.path()))
}

impl Tally {
    /// Runs a command that passes or fails as a whole.
    fn step(&mut self, command: &mut Command) -> anyhow::Result<()> {
        let (passed, lines) = watched(command)?;
        match lines.iter().find(|line| line.starts_with("skipped: ")) {
            Some(line) if passed => self.skipped.push(line.clone()),
            _ => self.count(command, passed),
        }
        Ok(())
    }

    /// Runs a test runner and takes over its counts.
    fn tests(&mut self, command: &mut Command) -> anyhow::Result<()> {
        let (passed, lines) = watched(command)?;
        let closing: Vec<&String> = lines.iter().filter(|line| counts(line).is_some()).collect();
        let (mut good, mut bad) = (0, 0);
        for line in &closing {
            let (line_good, line_bad) = counts(line).unwrap_or((0, 0));
            good += line_good;
            bad += line_bad;
        }
        self.passed += good;
        self.failed += bad;
        self.closing.extend(closing.into_iter().filter(|line| line.contains("Summary")).cloned());
        // A runner that fails without a failed test did not build, or ran nothing.
        if !passed && bad == 0 {
            self.count(command, false);
        }
        Ok(())
    }

    fn count(&mut self, command: &Command, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failures.push(shell::spelled(command));
        }
    }

    /// Says what failed; the last line is the count.
    fn conclude(self) -> bool {
        println!();
        self.failures.iter().for_each(|failure| println!("failed: {failure}"));
        self.closing.iter().for_each(|line| println!("{}", line.trim()));
        self.skipped.iter().for_each(|line| println!("{line}"));
        let skipped = if self.skipped.is_empty() { String::new() } else { format!(", {} skipped", self.skipped.len()) };
        println!("{} passed, {} failed{skipped}", self.passed, self.failed);
        self.failed == 0
    }
}

/// Runs a command, showing what it prints; returns whether it succeeded, and its lines.
fn watched(command: &mut Command) -> anyhow::Result<(bool, Vec<String>)> {
    let name = shell::spelled(command);
    println!("== {name}");
    let begin = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting `{name}`"))?;
    let echo = |stream: Option<Box<dyn Read + Send>>| thread::spawn(move || stream.map(echoed).unwrap_or_default());
    let output = echo(child.stdout.take().map(|stream| Box::new(stream) as _));
    let errors = echo(child.stderr.take().map(|stream| Box::new(stream) as _));
    let status = child.wait()?;
    let mut lines = output.join().unwrap_or_default();
    lines.extend(errors.join().unwrap_or_default());
    let verdict = if status.success() { "passed" } else { "FAILED" };
    println!("== {verdict} in {:.1} s", begin.elapsed().as_secs_f64());
    Ok((status.success(), lines))
}

/// Copies a stream to our output, line by line, and keeps the lines.
fn echoed(stream: Box<dyn Read + Send>) -> Vec<String> {
    let mut lines = Vec::new();
    for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        println!("{line}");
        lines.push(line);
    }
    lines
}

/// Passed and failed of a runner's closing line: nextest's `Summary`, or `test result` of the standard one.
fn counts(line: &str) -> Option<(u64, u64)> {
    let line = line.trim();
    if !(line.starts_with("Summary") || line.starts_with("test result:")) {
        return None;
    }
    let before = |word: &str| {
        let words: Vec<&str> =
            line.split(|c: char| c.is_whitespace() || c == ',' || c == ';').filter(|w| !w.is_empty()).collect();
        let at = words.iter().position(|found| *found == word)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    Some((before("passed").unwrap_or(0), before("failed").unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_both_runners_are_read() {
        assert_eq!(
            counts("     Summary [   0.5s] 12 tests run: 11 passed (1 slow), 1 failed, 3 skipped"),
            Some((11, 1))
        );
        assert_eq!(counts("test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out"), Some((4, 0)));
        assert_eq!(counts("running 4 tests"), None);
    }
}
