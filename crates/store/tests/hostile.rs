//! Any bytes as snapshots and recordings. The same functions run under the fuzzer (`fuzz/`).

mod support;

#[path = "../../../fuzz/src/allocation.rs"]
mod allocation;
#[path = "../../../fuzz/src/recording.rs"]
mod recording;
#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;
#[path = "../../../fuzz/src/snapshot.rs"]
mod snapshot;

use proptest::prelude::*;
use support::{Random, START, busy, idle};
use warmswap_predict::{Grain, Model, Trained};
use warmswap_store::snapshot::encode;
use warmswap_store::{FlightRecorder, Recording, RingPosition, Snapshot, SnapshotVerdict};

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

fn remembered(ticks: u64, rests: u64) -> Recording {
    let (mut random, mut recorder) = (Random(5), FlightRecorder::default());
    (0..ticks).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
    // A run of idle ticks, of which some have an entry and some have none yet.
    (ticks..ticks + rests).for_each(|number| {
        let mut tick = idle(&mut Random(7), Grain::Tick, number);
        tick.end_unix_ns = START + number * 100_000_000;
        tick.span_us = 100_000;
        recorder.push(&tick);
    });
    recorder.freeze("an alarm", START)
}

/// One that has something of everything.
fn whole(model: Vec<u8>) -> Snapshot {
    let mut random = Random(3);
    let text = str::to_owned;
    Snapshot {
        unix_ns: START,
        device: text("disk"),
        reason: text("asked for"),
        software: text("warmswap 0.1.0"),
        configuration: vec![(text("kind"), text("blk")), (text(""), text(""))],
        arguments: vec![text("warmswap"), text("guard"), text("disk")],
        session: vec![1, 2, 3],
        rings: vec![RingPosition { index: 0, size: 8, avail_idx: 2, used_idx: 65_535, in_flight: 3, exact: true }],
        windows: (0..2).map(|number| busy(&mut random, Grain::Window, number)).collect(),
        recording: Some(remembered(1, 150)),
        model,
        trained_digest: 7,
        verdict: Some(SnapshotVerdict {
            risk: [0.125, 0.25, 0.5, 0.75],
            harm: 0.5,
            evidence: 1.0,
            alarm: Some(text("errors")),
            reason: None,
            causes: vec![(text("errors_per_s"), 0.5)],
            learnt: 9,
        }),
        passed_over: Vec::new(),
    }
}

#[test]
fn the_seeds_of_snapshot_are_those_of_our_encoders() {
    let trained = Trained::prior();
    let least = Snapshot { unix_ns: 1, device: "d".to_owned(), ..Snapshot::default() };
    let made = [
        ("whole", encode(&whole(Vec::new())).expect("it is small")),
        ("least", encode(&least).expect("it is small")),
        (
            "learnt",
            encode(&Snapshot { model: Model::new(&trained).encode(&trained).to_vec(), ..least }).expect("small"),
        ),
    ];
    seeds::check("snapshot", &made, snapshot::run);
}

#[test]
fn the_seeds_of_recording_are_those_of_our_encoders() {
    let made = [
        ("busy", remembered(3, 0).encode()),
        ("idle", remembered(1, 250).encode()),
        ("empty", FlightRecorder::default().freeze("", 0).encode()),
    ];
    seeds::check("recording", &made, recording::run);
}

/// Bytes, and where they are put: at any place, or instead of a part, or taken out.
fn changed(mut whole: Vec<u8>, changes: &[(usize, u8, Vec<u8>)]) -> Vec<u8> {
    for (at, way, bytes) in changes {
        let at = at % (whole.len() + 1);
        let end = (at + bytes.len()).min(whole.len());
        match way % 3 {
            0 => drop(whole.splice(at..end, bytes.iter().copied())),
            1 => drop(whole.splice(at..at, bytes.iter().copied())),
            _ => drop(whole.drain(at..end)),
        }
    }
    whole
}

fn changes() -> impl Strategy<Value = Vec<(usize, u8, Vec<u8>)>> {
    let bytes = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..6),
        proptest::collection::vec(prop_oneof![Just(0_u8), Just(0xff), Just(0x80), Just(1)], 1..12)
    ];
    proptest::collection::vec((any::<usize>(), any::<u8>(), bytes), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_snapshots_come_back_or_are_refused_by_name_in_bounded_memory(changes in changes()) {
        snapshot::run(&changed(encode(&whole(Vec::new())).expect("it is small"), &changes));
    }

    #[test]
    fn changed_recordings_come_back_or_are_refused_by_name_in_bounded_memory(changes in changes(), rests in 0..300_u64) {
        recording::run(&changed(remembered(2, rests).encode(), &changes));
    }
}
