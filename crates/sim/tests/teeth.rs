//! The checks have teeth: whatever is broken on purpose, and cannot be survived, is found by the check that is meant for it.

use std::collections::BTreeSet;

use warmswap_core::{DrainMethod, Nanos};
use warmswap_sim::{Class, Options, Sabotage, run};

/// Seeds within which a sabotage must be found.
const SEEDS: u64 = 150;

/// The checks that find a sabotage.
fn found(sabotage: Sabotage, change: impl Fn(&mut Options)) -> BTreeSet<&'static str> {
    let mut checks = BTreeSet::new();
    let mut first = None;
    for seed in 0..SEEDS {
        let mut options = Options { sabotage, ..Options::from_seed(seed) };
        change(&mut options);
        if let Some(failure) = run(seed, &options).failure {
            first.get_or_insert(seed);
            checks.insert(failure.check);
        }
    }
    println!("{sabotage:?}: first seed {first:?}, {checks:?}");
    checks
}

fn is_found(sabotage: Sabotage, by: &[&str]) {
    let checks = found(sabotage, |_| {});
    assert!(by.iter().any(|check| checks.contains(check)), "{sabotage:?} is found by {checks:?} only, expected {by:?}");
}

#[test]
fn a_request_completed_twice_is_found() {
    is_found(Sabotage::CompletesTwice, &["completed once"]);
}

#[test]
fn a_write_that_was_not_made_is_found() {
    is_found(Sabotage::LosesWrite, &["contents"]);
}

#[test]
fn a_flush_that_was_not_made_is_found() {
    is_found(Sabotage::LosesFlush, &["flush"]);
}

/// This one is survived: a primary that stands still is failed over, and what it owed is carried out by the next.
#[test]
fn a_request_that_is_never_completed_is_carried_out_by_another_backend() {
    let mut hangs = 0;
    for seed in 0..SEEDS {
        let options = Options { sabotage: Sabotage::LosesRequest, ..Options::from_seed(seed) };
        let outcome = run(seed, &options);
        assert_eq!(outcome.failure, None, "seed {seed}\n{options}");
        hangs += outcome.stats.kinds.get("hang").unwrap_or(&0);
    }
    assert!(hangs > SEEDS / 4, "{hangs} failovers of primaries that stood still");
}

#[test]
fn an_interrupt_that_is_left_out_is_found() {
    is_found(Sabotage::LosesCall, &["liveness"]);
}

#[test]
fn wrong_contents_are_found() {
    is_found(Sabotage::ReadsWrong, &["contents"]);
}

#[test]
fn a_request_that_fails_is_found() {
    is_found(Sabotage::FailsRequest, &["status"]);
}

/// The proof of a death that comes while its I/O is under way: a stamped write after it.
#[test]
fn a_write_after_the_fence_is_found() {
    let slow = |options: &mut Options| {
        options.late_writes = true;
        options.service = Nanos::from_millis(2);
        options.fence_takes = Nanos::from_micros(50);
        options.faults.kill = true;
    };
    let checks = found(Sabotage::FencesEarly, slow);
    assert!(checks.contains("a fenced backend writes"), "{checks:?}");
}

#[test]
fn a_store_after_the_fence_is_found() {
    let checks = found(Sabotage::LivesOn, |options| {
        options.preempted = true;
        options.faults.drop_link = true;
        options.fault_every = Nanos::from_millis(1);
    });
    assert!(checks.contains("a fenced backend writes"), "{checks:?}");
}

/// A backend that claims a drain it has not made, where nothing but the ring could tell.
#[test]
fn a_drain_that_is_believed_and_was_not_made_is_found() {
    let checks = found(Sabotage::LiesAboutBase, |options| {
        (options.primary, options.shadow, options.drain) = (Class::Draining, Class::Draining, DrainMethod::Stop);
        options.service = Nanos::from_micros(500);
        options.faults.planned = true;
        options.stops = true;
    });
    let expected = ["one writer", "stopped ring", "request handed over", "completed once", "contents"];
    assert!(expected.iter().any(|check| checks.contains(check)), "{checks:?}");
}
