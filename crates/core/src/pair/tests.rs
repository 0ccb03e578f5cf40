//! Scripts of events in, expected actions out.
//!
//! A script is one thing per line: what the VMM, the guest, the backends, the operator and the clock do (see `harness`). The
//! expectation is what the pair did about it. Lines that start with `~` happen without being shown. Whatever the script says, the
//! harness checks that at most one backend holds rings, that every descriptor is used while it is open and closed exactly once, that
//! a ring is handed over with exactly what is owed, and that nothing spins.

mod canaries;
mod exhaustive;
mod failovers;
mod foresee;
mod harness;
mod isolation;
mod keeper;
mod random;
mod regions;
mod start;
mod stops;
mod transfer;
mod vmm;
#[cfg(feature = "zoo")]
mod zoo;

use expect_test::Expect;

use crate::policy::PairConfig;
use harness::{Harness, config};

/// Runs a script and compares what came of it.
fn check(script: &str, expected: &Expect) {
    check_with(config(), script, expected);
}

/// Runs a script under another configuration.
fn check_with(config: PairConfig, script: &str, expected: &Expect) {
    let mut harness = Harness::new(config);
    script.lines().map(str::trim).filter(|line| !line.is_empty()).for_each(|line| harness.line(line));
    let shown = harness.shown();
    harness.finish();
    expected.assert_eq(&shown);
}
