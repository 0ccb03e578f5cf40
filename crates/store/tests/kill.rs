//! A process that writes a history is killed at any moment: the file opens again, with all that was said to be on the disk.

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use support::{Random, Scratch, busy};
use warmswap_predict::Grain;
use warmswap_store::{FlightRecorder, History, Reader, Retention};

const PATH: &str = "WARMSWAP_STORE_KILL_PATH";
const ROUNDS: u64 = 16;

/// The process that is killed: this very test in a process of its own. Says the number of each window that is on the disk.
#[test]
fn a_process_that_writes() {
    let Some(path) = std::env::var_os(PATH) else { return };
    let mut history = History::open(Path::new(&path), "disk", Retention::default()).expect("it opens again");
    let first = history.reader().and_then(|reader| reader.windows()).expect("it can be read");
    println!("begun {first}");
    let mut random = Random(7);
    let mut recorder = FlightRecorder::default();
    for number in (first..).step_by(10) {
        let windows: Vec<_> = (number..number + 10).map(|number| busy(&mut random, Grain::Window, number)).collect();
        history.append(&windows).expect("it can be written");
        windows.iter().for_each(|window| recorder.push(window));
        if number % 30 < 10 {
            history.record(&recorder.freeze("a test", windows[9].end_unix_ns)).expect("it can be written");
            println!("durable {}", number + 9);
        }
        if number % 70 < 10 {
            history.prune(windows[9].end_unix_ns).expect("it can be written");
            println!("durable {}", number + 9);
        }
    }
}

#[test]
fn a_kill_at_any_moment_loses_nothing_that_was_on_the_disk() {
    let scratch = Scratch::new("kill");
    let path = scratch.path("disk.redb");
    let mut random = Random(11);
    for round in 0..ROUNDS {
        let program = std::env::current_exe().expect("it has a path");
        let mut child = Command::new(program)
            .args(["--exact", "a_process_that_writes", "--nocapture"])
            .env(PATH, &path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("it has an output"));
        let reader = std::thread::spawn(move || {
            let numbers = lines.lines().map_while(Result::ok);
            numbers.filter_map(|line| line.split_once("durable ")?.1.trim().parse::<u64>().ok()).last()
        });
        // The first ones are killed while they begin the file.
        std::thread::sleep(Duration::from_micros(random.next() % (3_000 << round.min(7))));
        child.kill().expect("it can be killed");
        child.wait().expect("it has ended");
        let durable = reader.join().expect("it does not panic");
        if !path.exists() {
            assert_eq!(durable, None);
            continue;
        }
        let left = Reader::open(&path).expect("it opens again");
        let windows: Vec<_> =
            left.range(0, u64::MAX).expect("it can be read").map(|it| it.expect("it is whole")).collect();
        let last = windows.last().map(|window| window.number);
        assert!(last >= durable, "round {round}: {durable:?} was on the disk, {last:?} is there");
        assert!(windows.iter().zip(0..).all(|(window, number)| window.number == number));
        for unix_ns in left.recordings().expect("it can be read") {
            let recording = left.recording(unix_ns).expect("it can be read").expect("it is there");
            assert!(recording.ticks().all(|tick| tick.is_ok()));
        }
        drop(left);
        drop(History::open(&path, "disk", Retention::default()).expect("it opens again"));
    }
    let left = Reader::open(&path).and_then(|reader| reader.windows()).expect("it can be read");
    println!("{left} windows after {ROUNDS} kills");
}
