//! Scripts of events in, expected actions out.
//!
//! A script is one thing per line: what the VMM, the guest, the backends, the operator and the clock do (see `harness`). The
//! expectation is what the pair did about it. Lines that start with `~` happen without being shown. Whatever the script says, the
//! harness checks that at most one backend holds rings, that every descriptor is used while it is open and closed exactly once, that
//! a ring is handed over with exactly what is owed, and that nothing spins.
//!
//! Harness and random histories are also what the fuzzer runs (`fuzz/`, feature `fuzzing`).

#![cfg_attr(not(test), allow(dead_code, reason = "the fuzzer uses a part of it"))]

#[cfg(test)]
mod canaries;
#[cfg(test)]
mod exhaustive;
#[cfg(test)]
mod failovers;
#[cfg(test)]
mod foresee;
mod harness;
#[cfg(test)]
mod isolation;
mod keeper;
mod random;
#[cfg(test)]
mod regions;
#[cfg(test)]
mod start;
#[cfg(test)]
mod stops;
#[cfg(test)]
mod take_over;
#[cfg(test)]
mod transfer;
#[cfg(test)]
mod vmm;
#[cfg(feature = "zoo")]
mod zoo;

#[cfg(test)]
use expect_test::Expect;

#[cfg(test)]
use crate::policy::PairConfig;
#[cfg(test)]
use harness::{Harness, config};

pub use random::run;

/// Runs a script and compares what came of it.
#[cfg(test)]
fn check(script: &str, expected: &Expect) {
    check_with(config(), script, expected);
}

/// Runs a script under another configuration.
#[cfg(test)]
fn check_with(config: PairConfig, script: &str, expected: &Expect) {
    let mut harness = Harness::new(config);
    script.lines().map(str::trim).filter(|line| !line.is_empty()).for_each(|line| harness.line(line));
    let shown = harness.shown();
    harness.finish();
    expected.assert_eq(&shown);
}
