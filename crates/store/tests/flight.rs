//! The flight recorder: what comes back, what is forgotten, and what it takes.

mod support;

use proptest::prelude::*;
use support::{Random, START, busy, idle};
use warmswap_predict::{Feature, Grain, Record, Role, Source, Summary};
use warmswap_store::{FLIGHT_BYTES_MAX, FlightRecorder, Recording, idle_like, rounded};

const SECOND: u64 = 1_000_000_000;

/// Any ticks: numbers, backends and times that jump, values that come and go.
fn ticks() -> impl Strategy<Value = Vec<Record>> {
    let value = prop_oneof![
        3 => Just(None),
        2 => any::<f32>().prop_map(Some),
        3 => (-100.0_f32..100.0).prop_map(Some),
        2 => Just(Some(0.0)),
    ];
    let values = proptest::collection::vec((0..Feature::ALL.len(), value), 0..40);
    let tick =
        (values, 0..20_u64, 0..3_u64, any::<bool>(), prop_oneof![9 => 99_000_000..101_000_000_u64, 1 => any::<u64>()]);
    proptest::collection::vec(tick, 0..60).prop_map(|ticks| {
        let (mut number, mut end) = (0_u64, START);
        let mut record = Record::new(Grain::Tick, 0, 0, 0, 0);
        let made = ticks.into_iter().map(|(values, skip, backend, window, apart)| {
            number += if skip < 18 { 1 } else { skip };
            end = end.wrapping_add(apart);
            let grain = if window && skip == 3 { Grain::Window } else { Grain::Tick };
            let (span, last) = ((apart / 1_000) as u32, record);
            record = Record::new(grain, number, backend / 2, end, span);
            Feature::ALL.into_iter().for_each(|feature| record.set(feature, last.get(feature)));
            values.into_iter().for_each(|(at, value)| record.set(Feature::ALL[at], value));
            record
        });
        made.collect()
    })
}

proptest! {
    #[test]
    fn every_tick_comes_back_rounded_or_as_one_of_a_run_of_idle_ones(ticks in ticks()) {
        let mut recorder = FlightRecorder::new(u64::MAX, 1 << 20);
        ticks.iter().for_each(|tick| recorder.push(tick));
        let back: Vec<Record> = recorder.ticks().collect();
        prop_assert_eq!(back.len(), ticks.len());
        let same = |one: &Record, two: &Record| one.values().eq(two.values());
        for (at, (tick, back)) in ticks.iter().zip(&back).enumerate() {
            let exact = rounded(tick) == *back;
            // The first of the run is one of those before.
            let of_run = || ticks[..at].iter().any(|first| same(&rounded(first), back) && idle_like(first, tick));
            prop_assert!(exact || of_run(), "{tick:?} came back as {back:?}");
            prop_assert_eq!((tick.number, tick.backend, tick.grain), (back.number, back.backend, back.grain));
            prop_assert!(exact || tick.end_unix_ns.abs_diff(back.end_unix_ns) < 100 * SECOND / 10, "{} {}", tick.end_unix_ns, back.end_unix_ns);
        }
        let recording = recorder.freeze("a test", 7);
        let read = Recording::decode(&recording.encode()).expect("it was just written");
        prop_assert_eq!(&read, &recording);
        prop_assert_eq!(read.len(), ticks.len());
        let read: Vec<Record> = read.ticks().map(|tick| tick.expect("it was just written")).collect();
        prop_assert_eq!(read, back);
    }

    #[test]
    fn where_room_ends_the_oldest_go_and_the_rest_is_whole(ticks in ticks(), bytes_max in 0..12_000_usize) {
        let mut recorder = FlightRecorder::new(u64::MAX, bytes_max);
        let all: Vec<Record> = {
            let mut all = FlightRecorder::new(u64::MAX, 1 << 20);
            ticks.iter().for_each(|tick| all.push(tick));
            all.ticks().collect()
        };
        for tick in &ticks {
            recorder.push(tick);
            prop_assert!(recorder.bytes() <= bytes_max.max(8_192), "{} of {bytes_max}", recorder.bytes());
        }
        let kept: Vec<Record> = recorder.ticks().collect();
        prop_assert!(kept.len() <= all.len());
        prop_assert_eq!(&kept[..], &all[all.len() - kept.len()..]);
        prop_assert!(ticks.is_empty() || !kept.is_empty());
    }

    #[test]
    fn damaged_recordings_are_read_up_to_the_damage_or_refused(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let (mut random, mut recorder) = (Random(1), FlightRecorder::default());
        (0..40).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
        let mut bytes = recorder.freeze("a test", 7).encode();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok(recording) = Recording::decode(&bytes) {
            let read = recording.ticks().flatten().inspect(|tick| assert!(tick.values().all(|(_, value)| value.is_finite())));
            prop_assert!(read.count() <= 100 * bytes.len());
        }
    }
}

#[test]
fn what_is_older_than_it_remembers_is_forgotten() {
    let (mut random, mut recorder) = (Random(1), FlightRecorder::new(2 * SECOND, 1 << 20));
    (0..100).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
    let numbers: Vec<u64> = recorder.ticks().map(|tick| tick.number).collect();
    assert!((20..=21).contains(&numbers.len()), "{numbers:?}");
    assert_eq!(numbers.last(), Some(&99));
}

#[test]
fn a_device_at_rest_takes_next_to_nothing_and_its_ticks_are_all_there() {
    let (mut random, mut recorder) = (Random(1), FlightRecorder::default());
    (0..100_000).for_each(|number| recorder.push(&idle(&mut random, Grain::Tick, number)));
    let ticks: Vec<Record> = recorder.ticks().collect();
    println!("idle: {} bytes for {} ticks", recorder.bytes(), ticks.len());
    assert!((1_200..=1_301).contains(&ticks.len()), "{}", ticks.len());
    assert!(recorder.bytes() < 10_000, "{}", recorder.bytes());
    for (tick, next) in ticks.iter().zip(&ticks[1..]) {
        assert_eq!(next.number, tick.number + 1);
        assert!((99_000_000..101_000_000).contains(&(next.end_unix_ns - tick.end_unix_ns)));
    }
    let recording = recorder.freeze("a test", 7).encode();
    println!("idle recording: {} bytes", recording.len());
    assert!(recording.len() < 1_000, "{}", recording.len());
}

/// What moves from tick to tick of a backend without a telemetry page; bounds and memory stand still for a while.
fn moves(feature: Feature) -> bool {
    let spec = feature.spec();
    spec.source != Source::Page && spec.role != Role::Limit && spec.summary != Summary::Last
}

#[test]
fn of_a_busy_device_without_a_telemetry_page_a_minute_has_room() {
    let (mut random, mut recorder) = (Random(1), FlightRecorder::default());
    let usual = busy(&mut random, Grain::Tick, 0);
    let moving = Feature::ALL.into_iter().filter(|feature| moves(*feature)).count();
    for number in 0..5_000 {
        let mut tick = busy(&mut random, Grain::Tick, number);
        for feature in Feature::ALL.into_iter().filter(|feature| !moves(*feature)) {
            let page = feature.spec().source == Source::Page;
            tick.set(feature, usual.get(feature).filter(|_| !page));
        }
        recorder.push(&tick);
    }
    let ticks = recorder.ticks().count();
    println!(
        "busy, {moving} values waver by a tenth: {} bytes for {ticks} ticks, {} a tick",
        recorder.bytes(),
        recorder.bytes() / ticks
    );
    assert!(ticks >= 600, "{ticks}");
}

#[test]
fn a_busy_device_stays_within_its_bytes() {
    let (mut random, mut recorder) = (Random(1), FlightRecorder::default());
    (0..5_000).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
    let ticks = recorder.ticks().count();
    println!(
        "busy, everything wavers by a tenth: {} bytes for {ticks} ticks, {} a tick",
        recorder.bytes(),
        recorder.bytes() / ticks
    );
    assert!(recorder.bytes() <= FLIGHT_BYTES_MAX, "{}", recorder.bytes());
    assert!(ticks > 300, "{ticks}");
}
