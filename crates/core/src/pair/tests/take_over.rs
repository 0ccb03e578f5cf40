//! Going on in another broker.

use super::harness::{Harness, config};
use crate::pair::PairState;

fn after(lines: &[&str]) -> Harness {
    let mut harness = Harness::new(config());
    lines.iter().for_each(|line| harness.quietly(line));
    harness
}

fn knowledge(harness: &Harness) -> &'static str {
    harness.pair.status(harness.now).rings[0].observer
}

#[test]
fn what_is_in_flight_is_known_if_the_pause_was_short_and_again_when_it_has_come_back_if_not() {
    let begun = ["ready 1", "submit 0 0 1 2", "take 0 2", "wait 1ms"];
    let short = after(&[&begun[..], &["another 20ms"]].concat());
    assert_eq!(knowledge(&short), "exact");
    let mut long = after(&[&begun[..], &["another 80ms"]].concat());
    assert_eq!(knowledge(&long), "inexact");
    for line in ["complete 0 1", "complete 0 0", "complete 0 2", "wait 20ms"] {
        long.quietly(line);
    }
    assert_eq!(knowledge(&long), "exact");
}

#[test]
fn a_failover_goes_on_in_each_of_its_phases() {
    let begun: &[&str] = &["ready 1", "submit 0 0 1", "take 0 1", "wait 1ms"];
    let phases: [(&str, &[&str]); 4] = [
        ("Draining", &["failover", "another 5ms", "complete 0 0", "complete 0 1"]),
        ("Fencing", &["exit 1", "another 5ms", "fenced 1", "complete 0 0", "complete 0 1"]),
        (
            "Handing",
            &["exit 2", "exit 1", "fenced 1", "another 5ms", "wait 100ms", "up 3", "complete 0 0", "complete 0 1"],
        ),
        ("Confirming", &["exit 1", "fenced 1", "another 5ms", "complete 0 0", "complete 0 1"]),
    ];
    for (phase, lines) in phases {
        let mut harness = after(begun);
        for line in lines {
            let before = harness.pair.status(harness.now).phase;
            assert!(!line.starts_with("another") || before.name() == phase, "{phase}: it is in {before:?}");
            harness.quietly(line);
        }
        harness.quietly("wait 2000ms");
        let status = harness.pair.status(harness.now);
        let serves = matches!(status.state, PairState::Protected | PairState::Unprotected);
        assert!(serves && status.counters.settled == 1 && status.counters.halted == 0, "{phase}: {status:?}");
    }
}

#[test]
fn nobody_is_blamed_for_a_time_in_which_nobody_listened() {
    let mut harness = after(&["ready 1", "wait 990ms"]);
    // A sign of life is about to be asked for, and what follows takes longer than a hang may.
    harness.quietly("another 3000ms");
    harness.quietly("wait 400ms");
    let status = harness.pair.status(harness.now);
    assert_eq!((status.counters.settled, status.counters.shadows_lost), (0, 0), "{status:?}");
    assert_eq!(status.counters.take_overs, 1);
}

#[test]
fn a_drain_under_which_the_primary_ran_away_is_undone_and_may_be_asked_for_again() {
    let mut harness = after(&["ready 1", "submit 0 0 1", "take 0 1", "wait 1ms", "failover", "another 80ms"]);
    // The answer to the diversion that the last broker had asked for.
    harness.quietly("wait 50ms");
    let status = harness.pair.status(harness.now);
    assert_eq!((status.phase.name(), status.counters.halted, status.counters.refused), ("Idle", 0, 1), "{status:?}");
    assert_eq!(status.primary.as_ref().map(|it| it.id.0), Some(1), "the primary goes on");
    for line in ["complete 0 1", "complete 0 0", "wait 20ms", "failover", "wait 100ms"] {
        harness.quietly(line);
    }
    let status = harness.pair.status(harness.now);
    assert_eq!((status.counters.settled, status.counters.halted), (1, 0), "{status:?}");
}
