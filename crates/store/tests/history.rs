//! The history of a device: what is kept, what is left out, what goes, and which files are refused.

mod support;

use std::io::Write;
use std::path::Path;

use support::{Random, START, Scratch, busy, idle};
use warmswap_predict::{Grain, Record};
use warmswap_store::{FlightRecorder, History, Reader, Retention, StoreError};

const SECOND: u64 = 1_000_000_000;

fn open(path: &Path) -> History {
    History::open(path, "disk", Retention::default()).expect("it can be opened")
}

fn windows(reader: &Reader, from: u64, to: u64) -> Vec<Record> {
    let windows = reader.range(from, to).expect("it can be read");
    windows.map(|window| window.expect("it is whole")).collect()
}

fn busy_windows(count: u64) -> Vec<Record> {
    let mut random = Random(1);
    (0..count).map(|number| busy(&mut random, Grain::Window, number)).collect()
}

#[test]
fn what_was_appended_is_there_again_and_only_what_was_asked_for() {
    let scratch = Scratch::new("appended");
    let (path, made) = (scratch.path("disk.redb"), busy_windows(100));
    let mut history = open(&path);
    let reader = history.reader().expect("it can be read");
    assert_eq!(history.append(&made[..60]).expect("it can be written"), 60);
    assert_eq!(windows(&reader, 0, u64::MAX), made[..60], "also while it is written");
    history.append(&made[60..]).expect("it can be written");
    drop((history, reader));
    let reader = open(&path).reader().expect("it can be read");
    assert_eq!(windows(&reader, 0, u64::MAX), made);
    assert_eq!(windows(&reader, made[10].end_unix_ns, made[20].end_unix_ns), made[10..=20]);
    assert_eq!(windows(&reader, 10, 5), []);
    drop(reader);
    let outlives = Reader::open(&path).and_then(|reader| reader.range(0, u64::MAX)).expect("nobody has it open");
    assert_eq!(outlives.filter_map(Result::ok).count(), 100);
    let left = Reader::open(&path).expect("nobody has it open");
    assert_eq!((left.device(), windows(&left, 0, u64::MAX)), ("disk", made));
}

#[test]
fn of_idle_windows_one_a_minute_is_stored() {
    let scratch = Scratch::new("idle");
    let (path, mut random) = (scratch.path("disk.redb"), Random(1));
    let mut history = open(&path);
    let made: Vec<Record> = (0..3_600).map(|number| idle(&mut random, Grain::Window, number)).collect();
    let stored: usize = made.chunks(10).map(|some| history.append(some).expect("it can be written")).sum();
    assert!((60..=61).contains(&stored), "{stored}");
    drop(history);
    // The one that was stored last is remembered by the file.
    let next = idle(&mut random, Grain::Window, 3_600);
    assert_eq!(open(&path).append(&[next]).expect("it can be written"), 0);
    let busy = busy(&mut random, Grain::Window, 3_601);
    assert_eq!(open(&path).append(&[busy, next]).expect("it can be written"), 2);
}

#[test]
fn what_is_too_old_or_too_much_goes_the_oldest_first() {
    let scratch = Scratch::new("pruned");
    let made = busy_windows(1_000);
    let age = Retention { windows_ns: 100 * SECOND, recordings: 2, bytes: 1 << 30 };
    let mut history = History::open(&scratch.path("age.redb"), "disk", age).expect("it can be opened");
    history.append(&made).expect("it can be written");
    let mut recorder = FlightRecorder::default();
    made.iter().for_each(|window| recorder.push(window));
    for at in 1..=4 {
        history.record(&recorder.freeze(&format!("reason {at}"), at)).expect("it can be written");
    }
    let gone = history.prune(START + 1_000 * SECOND).expect("it can be written");
    let reader = history.reader().expect("it can be read");
    // What is too much has gone with each recording.
    assert_eq!((gone, reader.windows().expect("it can be read")), ((900, 0), 100));
    assert_eq!(windows(&reader, 0, u64::MAX), made[900..]);
    assert_eq!(reader.recordings().expect("it can be read"), [3, 4]);
    let recording = reader.recording(4).expect("it can be read").expect("it is there");
    assert_eq!((recording.reason.as_str(), recording.len()), ("reason 4", recorder.ticks().count()));
    assert_eq!(reader.recording(1).expect("it can be read"), None);

    let small = Retention { bytes: 100_000, ..Retention::default() };
    let mut history = History::open(&scratch.path("bytes.redb"), "disk", small).expect("it can be opened");
    history.append(&made).expect("it can be written");
    history.record(&recorder.freeze("large", 1)).expect("it can be written");
    history.record(&recorder.freeze("large", 2)).expect("it can be written");
    history.prune(START).expect("it can be written");
    let left = windows(&history.reader().expect("it can be read"), 0, u64::MAX);
    assert!((20..120).contains(&left.len()), "{}", left.len());
    assert_eq!(left, made[1_000 - left.len()..]);
}

#[test]
fn a_day_of_a_busy_device_has_room() {
    let scratch = Scratch::new("day");
    let path = scratch.path("disk.redb");
    let retention = Retention { windows_ns: 2_000 * SECOND, recordings: 4, bytes: 80 << 20 };
    let mut history = History::open(&path, "disk", retention).expect("it can be opened");
    let made = busy_windows(6_000);
    let (mut minute, mut largest) = (0, 0);
    for ten in made.chunks(10) {
        history.append(ten).expect("it can be written");
        let end = ten[9].end_unix_ns;
        if end / SECOND / 60 != minute {
            minute = end / SECOND / 60;
            history.prune(end).expect("it can be written");
            largest = largest.max(std::fs::metadata(&path).expect("it is there").len());
        }
    }
    println!("{largest} bytes for at most 2060 windows, {} a window", largest / 2_060);
    assert!(largest < 4 << 20, "{largest}");
}

#[test]
fn what_is_no_history_is_refused_by_name_and_left_alone() {
    let scratch = Scratch::new("refused");
    let says = |path: &Path, words: &[&str]| {
        let before = std::fs::read(path).unwrap_or_default();
        for error in [
            History::open(path, "disk", Retention::default()).map(drop).expect_err("it is refused"),
            Reader::open(path).map(drop).expect_err("it is refused"),
        ] {
            let text = error.to_string();
            assert!(text.contains(path.to_str().expect("plain text")), "{text}");
            assert!(words.iter().any(|word| text.contains(word)), "{text}");
        }
        assert_eq!(std::fs::read(path).unwrap_or_default(), before);
    };
    std::fs::write(scratch.path("text"), "a letter to somebody, long enough to be a file").expect("it can be written");
    says(&scratch.path("text"), &["is no profile history"]);
    std::fs::create_dir(scratch.path("dir")).expect("it can be made");
    says(&scratch.path("dir"), &["is no profile history"]);
    let other = redb::Database::create(scratch.path("other")).expect("it can be made");
    drop(other);
    says(&scratch.path("other"), &["is no profile history"]);
    let path = scratch.path("disk.redb");
    drop(open(&path));
    let error = History::open(&path, "net", Retention::default()).map(drop).expect_err("it is another's");
    assert!(error.to_string().contains("of device disk, not of net"), "{error}");
    {
        let database = redb::Database::open(&path).expect("it can be opened");
        let write = database.begin_write().expect("it can be written");
        let table = redb::TableDefinition::<'_, &str, &[u8]>::new("meta");
        write
            .open_table(table)
            .expect("it is there")
            .insert("format", &9_u16.to_le_bytes()[..])
            .expect("it can be written");
        write.commit().expect("it can be written");
    }
    let error = Reader::open(&path).map(drop).expect_err("it is newer");
    assert!(error.to_string().contains("format 9 with schema 1, this program reads 1 with schema 1"), "{error}");
    assert!(matches!(Reader::open(&scratch.path("nothing")), Err(StoreError::Io { .. })));
}

#[test]
fn one_that_is_open_is_said_to_be() {
    let scratch = Scratch::new("open");
    let path = scratch.path("disk.redb");
    let history = open(&path);
    assert!(matches!(History::open(&path, "disk", Retention::default()), Err(StoreError::InUse { .. })));
    let error = Reader::open(&path).map(drop).expect_err("it is open");
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    drop(history);
    drop(open(&path));
}

#[test]
fn damage_is_an_error_wherever_it_is_and_nothing_panics() {
    let scratch = Scratch::new("damage");
    let (path, broken) = (scratch.path("disk.redb"), scratch.path("broken.redb"));
    let mut history = open(&path);
    let mut recorder = FlightRecorder::default();
    busy_windows(50).iter().for_each(|window| recorder.push(window));
    history.append(&busy_windows(50)).expect("it can be written");
    history.record(&recorder.freeze("a test", 1)).expect("it can be written");
    drop(history);
    let whole = std::fs::read(&path).expect("it is there");
    let (mut random, mut refused) = (Random(3), 0);
    for round in 0..300 {
        let mut bytes = whole.clone();
        if round % 10 == 0 {
            bytes.truncate(random.next() as usize % bytes.len());
        } else {
            // Most of what matters is at the beginning.
            let within = if round % 2 == 0 { bytes.len() } else { 8_192 };
            for _ in 0..1 + round % 4 {
                bytes[random.next() as usize % within] ^= 1 << (random.next() % 8);
            }
        }
        std::fs::File::create(&broken).and_then(|mut file| file.write_all(&bytes)).expect("it can be written");
        match Reader::open(&broken) {
            Ok(reader) => {
                let _read = reader.range(0, u64::MAX).map(|windows| windows.filter(Result::is_ok).count());
                let _read = reader.recording(1);
            }
            Err(_) => refused += 1,
        }
        if let Ok(mut history) = History::open(&broken, "disk", Retention::default()) {
            let _written = history.append(&busy_windows(60));
            let _pruned = history.prune(START + 10 * SECOND);
        }
    }
    println!("{refused} of 300 were refused");
    assert!(refused > 30, "{refused}");
}

#[test]
fn a_storm_of_recordings_stays_within_its_bounds() {
    let scratch = Scratch::new("storm");
    let path = scratch.path("disk.redb");
    let retention = Retention { recordings: 8, bytes: 2 << 20, ..Retention::default() };
    let mut history = History::open(&path, "disk", retention).expect("it can be opened");
    let reader = history.reader().expect("it can be read");
    let (made, mut random) = (busy_windows(3_000), Random(2));
    let mut recorder = FlightRecorder::new(u64::MAX, 160 << 10);
    (0..3_000).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
    let (mut largest, mut bytes) = (0, 0);
    for (at, ten) in (1..).zip(made.chunks(10)) {
        history.append(ten).expect("it can be written");
        let recording = recorder.freeze("a storm", at);
        bytes = recording.encode().len();
        history.record(&recording).expect("it can be written");
        assert!(reader.recordings().expect("it can be read").len() <= 8);
        largest = largest.max(std::fs::metadata(&path).expect("it is there").len());
    }
    println!("{largest} bytes for 300 recordings of {bytes}");
    assert_eq!(reader.recordings().expect("it can be read").last(), Some(&300));
    assert!(largest < 2 * retention.bytes, "{largest}");
    // Windows alone, that nobody prunes, too.
    let path = scratch.path("windows.redb");
    let mut history =
        History::open(&path, "disk", Retention { bytes: 1 << 20, ..retention }).expect("it can be opened");
    for ten in made.chunks(10) {
        history.append(ten).expect("it can be written");
    }
    let left = windows(&history.reader().expect("it can be read"), 0, u64::MAX);
    assert!(left.len() < 2_000 && left == made[3_000 - left.len()..], "{}", left.len());
}
