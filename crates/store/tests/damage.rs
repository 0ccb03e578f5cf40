//! A file that others change while it is open: what is read of it is right or an error, and nothing panics.

mod support;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Random, START, Scratch, busy};
use warmswap_predict::{Grain, Record};
use warmswap_store::{FlightRecorder, History, Reader, Recording, Retention, StoreError};

const PATH: &str = "WARMSWAP_STORE_DAMAGE_PATH";
const SECOND: u64 = 1_000_000_000;
/// Small enough that what is too much goes at times; more than redb keeps in memory.
const RETENTION: Retention = Retention { windows_ns: 1_500 * SECOND, recordings: 5, bytes: 2 << 20 };
const WAYS: u64 = 9;

fn open(path: &Path) -> History {
    History::open(path, "disk", RETENTION).expect("it can be opened")
}

fn windows(from: u64, count: u64) -> Vec<Record> {
    let mut random = Random(from + 1);
    (from..from + count).map(|number| busy(&mut random, Grain::Window, number)).collect()
}

fn recording(at: u64) -> Recording {
    let (mut random, mut recorder) = (Random(at + 1), FlightRecorder::default());
    (0..300).for_each(|number| recorder.push(&busy(&mut random, Grain::Tick, number)));
    recorder.freeze(&format!("reason {at}"), at)
}

/// Does something to a file. Whether another one is in its place.
fn damage(path: &Path, other: &Path, way: u64, random: &mut Random) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("it is there");
    let len = file.metadata().expect("it is there").len();
    let at = random.next() % len;
    match way {
        // Random bytes, zeroes, all of the rest.
        0 | 1 => {
            let bytes: Vec<u8> =
                (0..1 + random.next() % 9_000).map(|_| random.next() as u8 * (way == 0) as u8).collect();
            file.write_all_at(&bytes, at.min(len.saturating_sub(bytes.len() as u64))).expect("it can be written");
        }
        2 => {
            let zeroes = vec![0; (len - at) as usize];
            file.write_all_at(&zeroes, at).expect("it can be written");
        }
        // Flipped bits, many of them.
        3 => {
            for _ in 0..200 {
                let (mut byte, at) = ([0], random.next() % len);
                file.read_exact_at(&mut byte, at).expect("it is there");
                file.write_all_at(&[byte[0] ^ 1 << (random.next() % 8)], at).expect("it can be written");
            }
        }
        4 => file.set_len(at).expect("it can have any"),
        5 => file.set_len(len + 1 + random.next() % 100_000).expect("it can have any"),
        // The header.
        6 => file.write_all_at(&[random.next() as u8; 7], random.next() % 320).expect("it can be written"),
        // `cp`, `mv`.
        7 => {
            file.set_len(0).expect("it can have any");
            file.write_all_at(&std::fs::read(other).expect("it is there"), 0).expect("it can be written");
        }
        _ => {
            let copy = path.with_extension("copy");
            std::fs::copy(other, &copy).expect("it can be written");
            std::fs::rename(&copy, path).expect("it can be written");
            return true;
        }
    }
    false
}

/// What is to be in a history.
#[derive(Default)]
struct Model {
    windows: Vec<Record>,
    recordings: BTreeMap<u64, Recording>,
    next: u64,
}

impl Model {
    /// One step of what is done with a history, which is what is expected or an error.
    fn step(&mut self, history: &mut History, reader: &Reader, random: &mut Random) -> Result<(), StoreError> {
        match random.next() % 8 {
            0..=2 => {
                let news = windows(self.next, 1 + random.next() % 60);
                assert_eq!(history.append(&news)?, news.len());
                self.next += news.len() as u64;
                self.windows.extend(news);
                let there = reader.windows()? as usize;
                assert!(there <= self.windows.len());
                self.windows.drain(..self.windows.len() - there);
            }
            3 => {
                let made = recording(self.next);
                history.record(&made)?;
                self.recordings.insert(self.next, made);
                while self.recordings.len() > RETENTION.recordings as usize {
                    self.recordings.pop_first();
                }
                let there = reader.windows()? as usize;
                self.windows.drain(..self.windows.len() - there);
            }
            4 => {
                let (windows, recordings) = history.prune(START + self.next * SECOND)?;
                self.windows.drain(..windows as usize);
                assert_eq!(recordings, 0, "what is too much went before");
            }
            5 => history.sync()?,
            6 => {
                let all = reader.range(0, u64::MAX)?;
                let mut expected = self.windows.iter();
                for window in all {
                    assert_eq!(Some(&window?), expected.next());
                }
                assert_eq!(expected.next(), None);
            }
            _ => {
                assert_eq!(reader.recordings()?, self.recordings.keys().copied().collect::<Vec<_>>());
                for (at, expected) in &self.recordings {
                    assert_eq!(reader.recording(*at)?.as_ref(), Some(expected));
                }
            }
        }
        Ok(())
    }
}

#[test]
fn what_is_changed_while_it_is_open_is_an_error_and_all_else_is_right() {
    let scratch = Scratch::new("changed");
    let (template, other) = (scratch.path("template.redb"), scratch.path("other.redb"));
    let mut begun = Model { windows: windows(0, 1_200), next: 1_200, ..Model::default() };
    let mut history = open(&template);
    history.append(&begun.windows).expect("it can be written");
    for at in 1..=4 {
        history.record(&recording(at)).expect("it can be written");
        begun.recordings.insert(at, recording(at));
    }
    let kept = history.reader().and_then(|reader| reader.windows()).expect("it can be read") as usize;
    begun.windows.drain(..begun.windows.len() - kept);
    drop(history);
    let mut history = open(&other);
    history.append(&windows(50, 700)).expect("it can be written");
    history.record(&recording(9)).expect("it can be written");
    drop(history);
    let (mut found, mut replaced) = ([0; WAYS as usize], 0);
    let seeds = 40 * WAYS;
    for seed in 0..seeds {
        let (mut random, way) = (Random(seed + 1), seed % WAYS);
        let path = scratch.path("disk.redb");
        std::fs::copy(&template, &path).expect("it can be written");
        let mut history = open(&path);
        let reader = history.reader().expect("it can be read");
        let mut model =
            Model { windows: begun.windows.clone(), recordings: begun.recordings.clone(), next: begun.next };
        for _ in 0..random.next() % 8 {
            model.step(&mut history, &reader, &mut random).expect("nothing is wrong with it");
        }
        // One that has begun to read goes on.
        let mut reading = reader.range(0, u64::MAX).expect("it can be read");
        let some = random.next() as usize % model.windows.len();
        let before = model.windows.clone();
        assert!((&mut reading).take(some).zip(&before).all(|(window, expected)| window.expect("whole") == *expected));
        let elsewhere = damage(&path, &other, way, &mut random);
        let errors: Vec<StoreError> =
            (0..8).filter_map(|_| model.step(&mut history, &reader, &mut random).err()).collect();
        found[way as usize] += usize::from(!errors.is_empty());
        for error in &errors {
            let known = matches!(error, StoreError::Damaged { .. } | StoreError::Io { .. });
            assert!(known || (elsewhere && matches!(error, StoreError::Replaced { .. })), "seed {seed}: {error}");
        }
        for (window, expected) in reading.map_while(Result::ok).zip(&before[some..]) {
            assert_eq!(window, *expected);
        }
        if elsewhere {
            let error = history.append(&[]).expect_err("it is noticed even when nothing is written");
            assert!(matches!(error, StoreError::Replaced { .. }), "{error}");
            drop((history, reader));
            assert_eq!(std::fs::read(&path).expect("it is there"), std::fs::read(&other).expect("it is there"));
            replaced += 1;
            continue;
        }
        let last = history.record(&recording(model.next)).is_err();
        if way >= 4 {
            assert!(last, "seed {seed}: a wrong length or header is noticed by the next write");
            assert!(history.append(&[]).is_err() && history.sync().is_err() && history.prune(START).is_err());
        }
        drop((history, reader));
        if way == 7 {
            assert_eq!(std::fs::read(&path).expect("it is there"), std::fs::read(&other).expect("it is there"));
        }
        std::fs::remove_file(&path).expect("it is there");
    }
    println!("of {} each, by way: {found:?} noticed; {replaced} replaced", seeds / WAYS);
}

/// The process that must not end for it: this very test in a process of its own. Goes on until there is an error, as a broker does.
#[test]
fn a_process_whose_history_is_damaged() {
    let Some(path) = std::env::var_os(PATH) else { return };
    let mut history = open(Path::new(&path));
    let reader = history.reader().expect("it can be read");
    println!("begun");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok(all) = reader.range(0, u64::MAX) {
                if all.filter_map(Result::err).next().is_some() || reader.recording(1).is_err() {
                    break;
                }
            }
        });
        let error = (0..).find_map(|number| {
            let all = history.append(&windows(number * 10, 10)).map(drop);
            all.and_then(|()| if number % 3 == 0 { history.record(&recording(number)) } else { Ok(()) })
                .and_then(
                    |()| if number % 5 == 0 { history.prune(START + number * 10 * SECOND).map(drop) } else { Ok(()) },
                )
                .err()
        });
        println!("given up: {}", error.expect("it goes on until then"));
        // The reader ends too: it would find nothing wrong with a file that only has another name now.
        drop(history);
        std::process::exit(0);
    });
}

#[test]
fn a_process_that_has_it_open_goes_on_without_it() {
    let scratch = Scratch::new("child");
    let (path, other) = (scratch.path("disk.redb"), scratch.path("other.redb"));
    let mut history = open(&other);
    history.append(&windows(0, 500)).expect("it can be written");
    drop(history);
    let mut random = Random(17);
    for round in 0..4 * WAYS {
        let _begin_anew = std::fs::remove_file(&path);
        let mut child = Command::new(std::env::current_exe().expect("it has a path"))
            .args(["--exact", "a_process_whose_history_is_damaged", "--nocapture"])
            .env(PATH, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("it has an output")).lines().map_while(Result::ok);
        lines.find(|line| line.ends_with("begun")).expect("it begins");
        std::thread::sleep(Duration::from_micros(random.next() % 60_000));
        let deadline = Instant::now() + Duration::from_secs(20);
        // What nobody reads any more is not noticed: then again.
        while child.try_wait().expect("it is ours").is_none() {
            assert!(Instant::now() < deadline, "round {round}: it does not notice");
            damage(&path, &other, round % WAYS, &mut random);
            std::thread::sleep(Duration::from_millis(20));
        }
        let said: Vec<String> = lines.filter(|line| line.contains("given up")).collect();
        let ended = child.wait_with_output().expect("it has ended");
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && !stderr.contains("panicked"), "round {round}: {:?} {stderr}", ended.status);
        assert_eq!(said.len(), 1, "round {round}: {stderr}");
        if round < WAYS {
            println!("{}", said[0]);
        }
        let reason = if round % WAYS == 8 { "replaced" } else { "is damaged" };
        assert!(said[0].contains(reason), "round {round}: {}", said[0]);
    }
}

#[test]
fn a_file_that_was_taken_away_is_noticed() {
    let scratch = Scratch::new("away");
    let path = scratch.path("disk.redb");
    let mut history = open(&path);
    std::fs::remove_file(&path).expect("it is there");
    assert!(matches!(history.append(&windows(0, 1)), Err(StoreError::Replaced { .. })));
    drop(history);
    assert!(!path.exists(), "it is not made again");
}
