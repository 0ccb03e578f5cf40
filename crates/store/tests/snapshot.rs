//! Health snapshots: what comes back, what is refused and how it is called, and what a crash leaves.

mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;
use support::{Random, START, Scratch, busy};
use warmswap_predict::{FEATURE_COUNT, Feature, Grain, MODEL_STATE_BYTES, Model, Record, SCHEMA_VERSION, Trained};
use warmswap_store::snapshot::{decode, encode, list, newest_valid, read};
use warmswap_store::{
    FlightRecorder, Newest, Recording, RecordingError, Refusal, RingPosition, SNAPSHOT_BYTES_MAX, SNAPSHOT_WINDOWS_MAX,
    Snapshot, SnapshotError, SnapshotRetention, SnapshotVerdict, Snapshots, rounded,
};

const SECOND: u64 = 1_000_000_000;
const PATH: &str = "WARMSWAP_STORE_SNAPSHOT_PATH";
const HEADER: usize = 14;
const ALL_KEPT: SnapshotRetention = SnapshotRetention { count_max: 1_000, bytes_max: 1 << 30, keep_ns: u64::MAX };

fn recording(ticks: u64) -> Recording {
    let (mut random, mut recorder) = (Random(5), FlightRecorder::default());
    (0..ticks).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
    recorder.freeze("an alarm", START)
}

/// One that has something of everything, and is small.
fn small(unix_ns: u64) -> Snapshot {
    let mut windows = Vec::new();
    for number in 0..3_u64 {
        let mut window = Record::new(Grain::Window, 7 + number, 2, START + number * SECOND, 1_000_000);
        window.set(Feature::Arrivals, Some(1_250.0 + 3.0 * number as f32));
        window.set(Feature::LatencyP99, Some(180.0));
        window.set(Feature::MemoryShare, (number > 0).then_some(0.25));
        windows.push(rounded(&window));
    }
    let mut recorder = FlightRecorder::default();
    windows.iter().for_each(|window| recorder.push(window));
    let text = str::to_owned;
    Snapshot {
        unix_ns,
        device: text("disk"),
        reason: text("an alarm: requests fail"),
        software: text("warmswap 0.1.0"),
        configuration: vec![(text("kind"), text("blk")), (text("größe"), text("1 GiB")), (text(""), text(""))],
        arguments: vec![text("warmswap"), text("guard"), text("disk")],
        session: vec![1, 2, 3, 0, 255],
        rings: vec![
            RingPosition { index: 0, size: 256, avail_idx: 65_535, used_idx: 65_530, in_flight: 5, exact: true },
            RingPosition { index: 1, size: 128, ..RingPosition::default() },
        ],
        windows,
        recording: Some(recorder.freeze("an alarm", START)),
        model: vec![9; 40],
        trained_digest: 0x1234_5678,
        verdict: Some(SnapshotVerdict {
            risk: [0.125, 0.25, 0.5, 0.75],
            harm: 0.0625,
            evidence: 1.0,
            alarm: Some(text("errors")),
            reason: None,
            causes: vec![(text("errors_per_s"), 0.5), (text("latency_p99_us"), 0.25)],
            learnt: 12_345,
        }),
        passed_over: Vec::new(),
    }
}

/// A header, these sections, and the checksum to them.
fn file(sections: &[u8]) -> Vec<u8> {
    let mut bytes = b"wsSn\x01\0".to_vec();
    bytes.extend_from_slice(&(sections.len() as u64).to_le_bytes());
    bytes.extend_from_slice(sections);
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn section(tag: u16, part: &[u8]) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &(part.len() as u32).to_le_bytes(), part].concat()
}

/// The sections of a snapshot, in their order.
fn sections(snapshot: &Snapshot) -> Vec<(u16, Vec<u8>)> {
    let bytes = encode(snapshot).expect("it is small");
    let (mut rest, mut all) = (&bytes[HEADER..bytes.len() - 4], Vec::new());
    while let Some((head, later)) = rest.split_first_chunk::<6>() {
        let len = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
        all.push((u16::from_le_bytes([head[0], head[1]]), later[..len].to_vec()));
        rest = &later[len..];
    }
    all
}

fn joined(sections: &[(u16, Vec<u8>)]) -> Vec<u8> {
    sections.iter().flat_map(|(tag, part)| section(*tag, part)).collect()
}

/// The one with another section in place of its own.
fn with(tag: u16, part: &[u8]) -> Result<Snapshot, Refusal> {
    let mut all = sections(&small(START));
    all.iter_mut().filter(|(other, _)| *other == tag).for_each(|(_, bytes)| *bytes = part.to_vec());
    decode(&file(&joined(&all)))
}

fn open(scratch: &Scratch, retention: SnapshotRetention) -> Snapshots {
    Snapshots::open(&scratch.0, "disk", retention).expect("it can be opened")
}

fn times(snapshots: &Snapshots) -> Vec<u64> {
    snapshots.list().expect("it can be read").iter().map(|listed| listed.unix_ns).collect()
}

fn found(newest: Newest) -> Option<u64> {
    newest.found.map(|(_, snapshot)| snapshot.unix_ns)
}

#[test]
fn what_was_written_is_read_and_nobody_else_may_read_it() {
    let scratch = Scratch::new("snapshot-written");
    let snapshots = open(&scratch, ALL_KEPT);
    assert!(snapshots.newest_valid().expect("it can be read").found.is_none());
    let path = snapshots.write(&small(START)).expect("it can be written");
    assert_eq!(path, scratch.path("disk.snapshots/01767225600000000000.wss"));
    assert_eq!(read(&path).expect("it was just written"), small(START));
    let mode = |path: &Path| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(snapshots.path())), (0o600, 0o700));
    let again = Snapshot { reason: "again".to_owned(), ..small(START) };
    snapshots.write(&again).expect("it is replaced");
    snapshots.write(&small(START - 1)).expect("it can be written");
    assert_eq!(times(&snapshots), [START - 1, START]);
    let newest = newest_valid(&scratch.0, "disk").expect("it can be read");
    assert_eq!(newest.found, Some((path, again)));
    assert!(newest.refused.is_empty() && list(&scratch.0, "disk").expect("it can be read").len() == 2);
    assert!(list(&scratch.0, "net").expect("there is nothing").is_empty() && !scratch.path("net.snapshots").exists());
}

#[test]
fn wherever_a_write_ends_what_was_there_before_can_be_read() {
    let scratch = Scratch::new("snapshot-cut");
    let snapshots = open(&scratch, ALL_KEPT);
    snapshots.write(&small(START)).expect("it can be written");
    let bytes = encode(&small(START + SECOND)).expect("it is small");
    let place = snapshots.path().join(format!("{:020}.wss", START + SECOND));
    let unfinished = place.with_extension("tmp");
    for cut in 0..=bytes.len() {
        // Before the rename: it does not count, and the next who opens takes it away.
        std::fs::write(&unfinished, &bytes[..cut]).expect("it can be written");
        let newest = snapshots.newest_valid().expect("it can be read");
        assert!(newest.refused.is_empty() && found(newest) == Some(START), "{cut} bytes unfinished");
        let snapshots = open(&scratch, ALL_KEPT);
        assert!(!unfinished.exists() && times(&snapshots) == [START], "{cut} bytes unfinished");
        // After it, on a disk that had written the name and not all of the bytes.
        std::fs::write(&place, &bytes[..cut]).expect("it can be written");
        let newest = snapshots.newest_valid().expect("it can be read");
        if cut < bytes.len() {
            let name = place.display().to_string();
            assert!(matches!(&newest.refused[..], [error] if error.to_string().starts_with(&name)), "{cut} bytes");
            assert_eq!(found(newest), Some(START), "{cut} bytes");
        } else {
            assert!(newest.refused.is_empty() && found(newest) == Some(START + SECOND));
        }
        std::fs::remove_file(&place).expect("it is there");
    }
    // One that is left does not stand in the way either while it is open.
    std::fs::write(&unfinished, &bytes[..100]).expect("it can be written");
    snapshots.write(&small(START + SECOND)).expect("it can be written");
    assert!(!unfinished.exists() && times(&snapshots) == [START, START + SECOND]);
}

#[test]
fn every_flipped_bit_is_refused_and_the_error_names_the_file() {
    let scratch = Scratch::new("snapshot-flipped");
    let path = scratch.path("00000000000000000001.wss");
    let bytes = encode(&small(START)).expect("it is small");
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        for bit in 0..8 {
            flipped[at] = bytes[at] ^ 1 << bit;
            decode(&flipped).expect_err("it is damaged");
        }
        std::fs::write(&path, &flipped).expect("it can be written");
        let error = read(&path).expect_err("it is damaged").to_string();
        let why = match at {
            0..4 => "does not begin as one",
            4..6 => "expected 1",
            6..HEADER => " bytes, ",
            _ => "the checksum is of other bytes",
        };
        assert!(error.starts_with(&path.display().to_string()) && error.contains(why), "byte {at}: {error}");
    }
}

#[test]
fn what_is_no_snapshot_or_not_of_this_device_or_format_says_so() {
    let bytes = encode(&small(START)).expect("it is small");
    let mut later = bytes.clone();
    later[4] = 2;
    let error = decode(&later).expect_err("it is of another format");
    assert_eq!(error, Refusal::Format { found: 2, expected: 1 });
    assert_eq!(error.to_string(), "health snapshot: format 2, expected 1: use the program that wrote it");
    assert_eq!(decode(&[]), Err(Refusal::Short));
    assert_eq!(decode(&recording(3).encode()), Err(Refusal::Magic));
    let mut claims = bytes.clone();
    claims[6..HEADER].fill(0xff);
    assert!(matches!(decode(&claims), Err(Refusal::Large { .. })));

    let scratch = Scratch::new("snapshot-foreign");
    let snapshots = open(&scratch, ALL_KEPT);
    let own = snapshots.write(&small(START)).expect("it can be written");
    let other = Snapshot { device: "net".to_owned(), ..small(START + SECOND) };
    let error = snapshots.write(&other).expect_err("it is of another");
    assert!(matches!(error, SnapshotError::Device { .. }), "{error}");
    let place = own.with_file_name(format!("{:020}.wss", START + SECOND));
    std::fs::write(&place, encode(&other).expect("it is small")).expect("it can be written");
    // Neither a directory nor other names count.
    std::fs::create_dir(own.with_file_name(format!("{:020}.wss", START + 5 * SECOND))).expect("it can be made");
    std::fs::write(own.with_file_name("notes.wss"), "mine").expect("it can be written");
    let newest = snapshots.newest_valid().expect("it can be read");
    let said: Vec<String> = newest.refused.iter().map(ToString::to_string).collect();
    assert_eq!(said, [format!("{} is a health snapshot of device net, not of disk: move it away", place.display())]);
    assert_eq!(found(newest), Some(START));
    for name in ["", ".", "..", "a/b", ".hidden", "a\0b"] {
        let error = Snapshots::open(&scratch.0, name, ALL_KEPT).expect_err("no file can have it");
        assert!(matches!(error, SnapshotError::Name { .. }), "{error}");
    }
    let missing = Snapshots::open(&scratch.path("missing"), "disk", ALL_KEPT).expect_err("it is not made");
    assert!(missing.to_string().starts_with(&scratch.path("missing/disk.snapshots").display().to_string()));
    let (error, directory) = (read(snapshots.path()).expect_err("it is none"), snapshots.path().display());
    assert_eq!(error.to_string(), format!("{directory}: it is no file"));
}

#[test]
fn sections_of_a_later_version_are_passed_over_and_those_that_must_be_there_are_missed_by_name() {
    let mut all = sections(&small(START));
    assert_eq!(all.len(), 13);
    for at in 0..=all.len() {
        let mut more = all.clone();
        more.insert(at, (900, b"of a later version".to_vec()));
        more.insert(at, (0, Vec::new()));
        assert_eq!(decode(&file(&joined(&more))), Ok(small(START)), "{at}");
    }
    all.reverse();
    assert_eq!(decode(&file(&joined(&all))), Ok(small(START)), "in any order");
    for (tag, part) in all.clone() {
        let less: Vec<_> = all.iter().filter(|(other, _)| *other != tag).cloned().collect();
        let decoded = decode(&file(&joined(&less)));
        match tag {
            1 => assert_eq!(decoded, Err(Refusal::Missing("time"))),
            2 => assert_eq!(decoded, Err(Refusal::Missing("device"))),
            _ => assert_eq!(decoded.expect("it may be missing").unix_ns, START),
        }
        let mut twice = all.clone();
        twice.push((tag, part));
        assert!(matches!(decode(&file(&joined(&twice))), Err(Refusal::Twice(_))), "{tag}");
    }
    assert_eq!(with(2, b""), Err(Refusal::Missing("device")));
    assert_eq!(encode(&Snapshot::default()), Err(Refusal::Missing("device")));
    for (tag, part, name) in [
        (1, &b"short"[..], "time"),
        (2, b"\xff", "device"),
        (3, b"\xff", "reason"),
        (5, b"\x01\0\0\0a", "configuration"),
        (6, b"\xff\xff\xff\xffa", "arguments"),
        (8, b"\0\0\0\0\0\x01\0\0\0\0\0\0\x02", "rings"),
        (9, b"\x01", "windows"),
        (12, b"", "trained model"),
        (13, b"\0", "verdict"),
    ] {
        assert_eq!(with(tag, part), Err(Refusal::Section(name)));
    }
    let unfinished = joined(&all);
    assert_eq!(decode(&file(&unfinished[..unfinished.len() - 1])), Err(Refusal::Short));
}

#[test]
fn windows_and_a_recording_of_another_version_of_the_profile_do_not_take_the_rest_with_them() {
    let windows = [(SCHEMA_VERSION + 1).to_le_bytes(), (FEATURE_COUNT as u16).to_le_bytes()].concat();
    let mut other = recording(3).encode();
    other[6] = 9;
    let mut all = sections(&small(START));
    for (tag, part) in &mut all {
        match tag {
            9 => part.clone_from(&windows),
            10 => part.clone_from(&other),
            _ => {}
        }
    }
    let read = decode(&file(&joined(&all))).expect("the rest of it is right");
    let (found, features) = (SCHEMA_VERSION + 1, FEATURE_COUNT as u16);
    let passed_over = vec![Refusal::Schema { found, features }, Refusal::Recording(RecordingError::Schema(9))];
    // In the order in which they are written.
    assert_eq!(read, Snapshot { windows: Vec::new(), recording: None, passed_over, ..small(START) });
    // What is wrong with them in another way is damage.
    assert!(matches!(with(10, b"wsFr"), Err(Refusal::Recording(RecordingError::Short))));
    let runs = [&SCHEMA_VERSION.to_le_bytes()[..], &(FEATURE_COUNT as u16).to_le_bytes(), &[16, 100, 0]].concat();
    assert_eq!(with(9, &runs), Err(Refusal::Section("windows")), "many windows from few bytes");
    assert!(matches!(with(9, &[&runs[..4], &[0xff]].concat()), Err(Refusal::Window(_))));
}

#[test]
fn too_much_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new("snapshot-large");
    let snapshots = open(&scratch, ALL_KEPT);
    let window = small(START).windows[0];
    let windows = |count| Snapshot { windows: vec![window; count], ..small(START) };
    assert_eq!(encode(&windows(SNAPSHOT_WINDOWS_MAX + 1)), Err(Refusal::Windows));
    assert_eq!(
        decode(&encode(&windows(SNAPSHOT_WINDOWS_MAX)).expect("so many may be")).map(|read| read.windows.len()),
        Ok(SNAPSHOT_WINDOWS_MAX)
    );
    let beside = encode(&small(START)).expect("it is small").len() - small(START).session.len();
    let of = |bytes: usize| Snapshot { session: vec![7; bytes - beside], ..small(START + SECOND) };
    let error = snapshots.write(&of(SNAPSHOT_BYTES_MAX + 1)).expect_err("it is too large");
    assert!(matches!(&error, SnapshotError::Refused { source: Refusal::Large { .. }, .. }), "{error}");
    assert_eq!(std::fs::read_dir(snapshots.path()).expect("it is there").count(), 0);
    let path = snapshots.write(&of(SNAPSHOT_BYTES_MAX)).expect("so much may be");
    assert_eq!(read(&path).expect("it was just written"), of(SNAPSHOT_BYTES_MAX));
    std::fs::File::options().write(true).open(&path).and_then(|file| file.set_len(1 << 40)).expect("a sparse file");
    let error = read(&path).expect_err("not all of that is read");
    assert!(error.to_string().contains("1099511627776 bytes, at most 1048576"), "{error}");
}

#[test]
fn what_is_beyond_the_retention_goes_and_the_last_one_always_stays() {
    let scratch = Scratch::new("snapshot-retention");
    let size = encode(&small(START)).expect("it is small").len() as u64;
    let write = |retention, unix_ns: u64| {
        let snapshots = open(&scratch, retention);
        snapshots.write(&small(unix_ns)).expect("it can be written");
        times(&snapshots)
    };
    let at = |second: u64| START + second * SECOND;
    let count = SnapshotRetention { count_max: 3, ..ALL_KEPT };
    (0..5).for_each(|second| drop(write(count, at(second))));
    assert_eq!(write(count, at(5)), [3, 4, 5].map(at));
    let bytes = SnapshotRetention { bytes_max: 2 * size + 1, ..ALL_KEPT };
    assert_eq!(write(bytes, at(6)), [5, 6].map(at));
    let age = SnapshotRetention { keep_ns: 2 * SECOND, ..ALL_KEPT };
    assert_eq!(write(age, at(8)), [6, 8].map(at), "of the very age it stays");
    let nothing = SnapshotRetention { count_max: 0, bytes_max: 0, keep_ns: 0 };
    assert_eq!(write(nothing, at(9)), [at(9)]);
    // A clock that was ahead: what it wrote goes first.
    assert_eq!(write(count, at(9_000)), [9, 9_000].map(at));
    assert_eq!(write(count, at(10)), [9, 10, 9_000].map(at));
    assert_eq!(write(count, at(11)), [9, 10, 11].map(at));
    // What others put there stays.
    std::fs::write(scratch.path("disk.snapshots/notes.txt"), "mine").expect("it can be written");
    assert_eq!(write(nothing, at(12)), [at(12)]);
    assert!(scratch.path("disk.snapshots/notes.txt").exists());
}

#[test]
fn a_typical_snapshot_is_small() {
    let (mut random, trained) = (Random(3), Trained::prior());
    let mut model = Model::new(&trained);
    let windows: Vec<Record> = (0..60).map(|number| busy(&mut random, Grain::Window, number)).collect();
    for window in &windows {
        model.predict(&trained, window);
        model.train(&trained);
    }
    let model = model.encode(&trained).to_vec();
    assert_eq!(model.len(), MODEL_STATE_BYTES);
    let (session, trained_digest) = (vec![7; 600], trained.digest());
    let without = Snapshot { windows, model, session, trained_digest, recording: None, ..small(START) };
    let with = Snapshot { recording: Some(recording(1_200)), ..without.clone() };
    let size = |snapshot: &Snapshot| encode(snapshot).expect("it is small").len();
    println!(
        "60 windows of {FEATURE_COUNT} values that waver by a tenth, and a model of {MODEL_STATE_BYTES}: {} bytes; with a recording of {} ticks: {}",
        size(&without),
        recording(1_200).len(),
        size(&with)
    );
    assert!(size(&without) <= 64 * 1024 && size(&with) <= 128 * 1024);
    let read = decode(&encode(&with).expect("it is small")).expect("it was just written");
    assert!(read.windows.iter().zip(&with.windows).all(|(read, exact)| *read == rounded(exact)));
    Model::decode(&trained, &read.model).expect("it was just written");
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/format-1.wss")
}

#[test]
#[ignore = "writes the file of format 1 anew: what is there is to be read for ever, and another one only added"]
fn write_the_fixture() {
    std::fs::write(fixture(), encode(&small(START)).expect("it is small")).expect("it can be written");
}

#[test]
fn a_file_of_format_1_is_read_as_what_it_was() {
    let read = read(&fixture()).expect("it can be read");
    // A program with another table of features reads all but the profile.
    let same = (SCHEMA_VERSION, FEATURE_COUNT) == (1, 88);
    assert_eq!(read.passed_over.len(), if same { 0 } else { 2 });
    let passed_over = read.passed_over.clone();
    let expected = if same {
        small(START)
    } else {
        Snapshot { windows: Vec::new(), recording: None, passed_over, ..small(START) }
    };
    assert_eq!(read, expected);
}

/// The process that is killed: this very test in a process of its own. Says the time of each snapshot that is on the disk.
#[test]
fn a_process_that_writes_snapshots() {
    let Some(path) = std::env::var_os(PATH) else { return };
    let retention = SnapshotRetention { count_max: 4, ..ALL_KEPT };
    let snapshots = Snapshots::open(Path::new(&path), "disk", retention).expect("it opens again");
    let first = times(&snapshots).last().map_or(START, |last| last + 1);
    for unix_ns in first.. {
        snapshots.write(&small(unix_ns)).expect("it can be written");
        println!("durable {unix_ns}");
    }
}

#[test]
fn a_kill_at_any_moment_leaves_what_was_written() {
    let scratch = Scratch::new("snapshot-kill");
    let mut random = Random(11);
    let mut written = 0;
    for round in 0..12_u64 {
        let mut child = Command::new(std::env::current_exe().expect("it has a path"))
            .args(["--exact", "a_process_that_writes_snapshots", "--nocapture"])
            .env(PATH, &scratch.0)
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("it has an output"));
        let reader = std::thread::spawn(move || {
            let lines = lines.lines().map_while(Result::ok);
            lines.filter_map(|line| line.split_once("durable ")?.1.trim().parse::<u64>().ok()).last()
        });
        std::thread::sleep(Duration::from_micros(random.next() % (8_000 << round.min(4))));
        child.kill().expect("it is ours");
        child.wait().expect("it has ended");
        let durable = reader.join().expect("it does not panic").unwrap_or(written);
        let newest = newest_valid(&scratch.0, "disk").expect("it can be read");
        assert!(newest.refused.is_empty(), "round {round}: {:?}", newest.refused);
        written = found(newest).unwrap_or(0);
        // The last one may have been finished without a word.
        assert!((durable..=durable + 1).contains(&written) || durable == 0, "round {round}: {written}, {durable} said");
    }
    println!("{} snapshots written by 12 processes that were killed", written.saturating_sub(START) + 1);
    assert!(written > START);
}

fn any_snapshot() -> impl Strategy<Value = Snapshot> {
    let texts = proptest::collection::vec(".{0,12}", 0..5);
    let pairs = proptest::collection::vec((".{0,12}", ".{0,12}"), 0..5);
    let ring = (any::<u32>(), any::<[u16; 4]>(), any::<bool>());
    let bytes = || proptest::collection::vec(any::<u8>(), 0..50);
    let verdict = (any::<[u16; 6]>(), proptest::option::of(".{0,9}"), proptest::option::of(".{0,9}"), any::<u64>());
    let windows = proptest::collection::vec((any::<[u64; 3]>(), any::<u32>(), any::<[Option<f32>; 4]>()), 0..6);
    let rest = (proptest::collection::vec(ring, 0..4), proptest::option::of(verdict), windows, 0..4_u64);
    (any::<u64>(), ".{1,20}", texts, pairs, bytes(), bytes(), rest).prop_map(
        |(unix_ns, device, arguments, configuration, session, model, (rings, verdict, windows, ticks))| Snapshot {
            unix_ns,
            reason: device.repeat(2),
            device,
            arguments,
            configuration,
            session,
            model,
            rings: rings
                .into_iter()
                .map(|(index, [size, avail_idx, used_idx, in_flight], exact)| RingPosition {
                    index,
                    size,
                    avail_idx,
                    used_idx,
                    in_flight,
                    exact,
                })
                .collect(),
            verdict: verdict.map(|(values, alarm, reason, learnt)| {
                let [one, two, three, four, harm, evidence] = values.map(f32::from);
                let causes = alarm.iter().map(|text| (text.clone(), harm)).collect();
                SnapshotVerdict { risk: [one, two, three, four], harm, evidence, alarm, reason, causes, learnt }
            }),
            windows: windows
                .into_iter()
                .map(|([number, backend, end], span, values)| {
                    let mut window = Record::new(Grain::Window, number, backend, end, span);
                    Feature::ALL.into_iter().zip(values).for_each(|(feature, value)| window.set(feature, value));
                    rounded(&window)
                })
                .collect(),
            recording: (ticks > 0).then(|| recording(ticks)),
            ..Snapshot::default()
        },
    )
}

proptest! {
    #[test]
    fn any_snapshot_comes_back(snapshot in any_snapshot()) {
        prop_assert_eq!(decode(&encode(&snapshot).expect("it is small")), Ok(snapshot));
    }

    #[test]
    fn any_bytes_are_a_snapshot_or_say_why(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _either = decode(&bytes);
        let _either = decode(&file(&bytes));
        for tag in 1..=13 {
            let _either = with(tag, &bytes);
        }
    }

    #[test]
    fn bytes_that_were_changed_and_summed_anew_are_a_snapshot_or_say_why(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<prop::sample::Index>(),
    ) {
        let mut all = joined(&sections(&small(START)));
        for (at, byte) in changes {
            let at = at.index(all.len());
            all[at] = byte;
        }
        let whole = decode(&file(&all));
        all.truncate(cut.index(all.len()));
        let _either = decode(&file(&all));
        if let Ok(read) = whole {
            let again = encode(&read).map(|bytes| decode(&bytes));
            prop_assert!(matches!(again, Ok(Ok(_))), "{again:?}");
        }
    }
}
