//! The command line against control sockets, files and directories that were made to harm: a terminal is told nothing that it would obey,
//! memory has a bound, and nobody is waited for without end.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use support::{Scratch, warmswap};

/// Answers each line on a socket with what `answer` makes of it, in a directory of control sockets.
fn serve(scratch: &Scratch, name: &str, answer: impl Fn(&mut UnixStream, &str) + Send + Sync + 'static) {
    let listener = UnixListener::bind(scratch.path(&format!("{name}.ctl"))).expect("a socket");
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let reader = BufReader::new(stream.try_clone().expect("a descriptor"));
                reader.lines().map_while(Result::ok).for_each(|line| answer(&mut stream, &line));
            });
        }
    });
}

/// Whether a terminal could take it for more than a character.
fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[track_caller]
fn assert_clean(output: &Output) {
    for bytes in [&output.stdout, &output.stderr] {
        let text = std::str::from_utf8(bytes).expect("it is text");
        assert!(!text.chars().any(|c| is_hostile(c) && c != '\n'), "{text:?}");
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A status in which everything that can be a text is this one.
fn status(text: &str) -> Value {
    json!({"devices": [{
        "name": text, "type": text, "state": text, "vmm": text, "socket": text, "phase": text, "recovery_level": text,
        "fence_level": text, "primary": {"pid": 1, "state": text}, "shadow": {"pid": 2, "generation": 9, "state": text},
        "shadow_note": text, "misconfigured": text, "halted": text, "after_crash_of": 7, text: {text: text},
        "rings": [{"index": text, "size": {text: text}, "inflight": [text], "observer": text}],
        "failovers": {"settled": 1}, "last_failover": {"kind": text, "result": text, "seconds_ago": 1},
    }]})
}

/// What a hostile broker answers to a verb, in one of several ways.
fn answers(text: &str, way: u8, verb: &str) -> Vec<Value> {
    let error = json!({"error": {"code": 3, "message": text}});
    match (verb, way) {
        ("status", 0) => vec![error],
        ("status", 1) => vec![json!({"devices": [{"name": text, "state": text, "message": text}]})],
        ("status", _) => vec![status(text)],
        (_, 0) => vec![error],
        ("profile", _) => {
            vec![json!({"schema_version": text, "tick": {text: text}, "windows": [{"values": {text: 1}, "number": 1}]})]
        }
        ("events", _) => {
            vec![json!({"text": text, text: text}), json!({"timestamp": text, "event": [text]}), json!({"end": true})]
        }
        ("failover", 1) => vec![json!({"result": text, "message": text})],
        ("failover", _) => {
            vec![json!({"result": "settled", "survivors": {text: text}, "recovery": text, "fence": text})]
        }
        _ => vec![json!({"record": text})],
    }
}

#[test]
fn no_control_character_of_a_hostile_broker_reaches_the_terminal() {
    let scratch = Scratch::new("hostile-text");
    let now = Arc::new(Mutex::new((String::new(), 0)));
    let told = Arc::clone(&now);
    serve(&scratch, "disk", move |stream, line| {
        let (text, way) = told.lock().expect("no test has failed").clone();
        let asked: Value = serde_json::from_str(line).expect("JSON");
        for answer in answers(&text, way, asked["verb"].as_str().unwrap_or("")) {
            let _gone = writeln!(stream, "{answer}");
        }
    });
    let control = scratch.0.to_str().expect("plain text").to_owned();
    let output = scratch.path("recorded").to_str().expect("plain text").to_owned();
    let commands: [&[&str]; 11] = [
        &["status"],
        &["status", "--json"],
        &["show", "disk"],
        &["show", "disk", "--json"],
        &["events"],
        &["events", "--json"],
        &["failover", "disk", "--reason", "x", "--wait", "0"],
        &["failover", "disk", "--reason", "x", "--wait", "0", "--json"],
        &["export", "disk"],
        &["record", "disk", "--for", "1s", "--output", &output],
        &["top", "--once"],
    ];
    let check = |text: &str, way: u8| {
        *now.lock().expect("no test has failed") = (text.to_owned(), way);
        for command in commands {
            let _none = std::fs::remove_file(&output);
            let done = warmswap(&[command, &["--control", &control]].concat());
            assert_clean(&done);
            if command.last() == Some(&"--json") {
                for line in String::from_utf8_lossy(&done.stdout).lines() {
                    serde_json::from_str::<Value>(line).expect("it is JSON");
                }
            }
        }
    };
    for way in 0..3 {
        check("\u{1b}]0;x\u{7}\u{1b}[2J\r\n\u{9b}31m\u{202e}\u{2066}\u{200f}\u{7f}\u{2028}", way);
    }
    let texts = ("([a-z \u{0}-\u{1f}\u{7f}-\u{9f}\u{200b}-\u{206f}]){1,30}", 0..3_u8);
    let mut runner = TestRunner::new(Config { cases: 6, failure_persistence: None, ..Config::default() });
    runner
        .run(&texts, |(text, way)| {
            check(&text, way);
            Ok(())
        })
        .expect("everything is clean");
    // Programs read what was sent.
    *now.lock().expect("no test has failed") = ("\u{202e}\u{9b}".to_owned(), 2);
    let done = warmswap(&["status", "--json", "--control", &control]);
    let shown: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!(shown["devices"][0]["state"], "\u{202e}\u{9b}");
}

#[test]
fn names_of_files_and_devices_are_not_obeyed() {
    let scratch = Scratch::new("hostile-names");
    let control = scratch.0.to_str().expect("plain text");
    let hostile = "\u{1b}[2J\u{202e}";
    let _listener = UnixListener::bind(scratch.path(&format!("{hostile}.ctl"))).expect("a socket");
    for command in [vec!["status"], vec!["events"], vec!["status", hostile], vec!["top", "--once"]] {
        let done = warmswap(&[command.as_slice(), &["--control", control]].concat());
        assert_clean(&done);
        assert_eq!(done.status.code(), Some(4), "{}", said(&done));
    }
    let store = scratch.path("other.redb");
    drop(warmswap_store::History::open(&store, hostile, warmswap_store::Retention::default()).expect("a history"));
    let done = warmswap(&["export", "disk", "--store", store.to_str().expect("plain text")]);
    assert_clean(&done);
    assert!(said(&done).contains("is of device"), "{}", said(&done));
}

#[test]
fn brokers_that_hang_or_drip_cost_their_patience_once_and_hide_nobody() {
    let scratch = Scratch::new("hostile-hang");
    let control = scratch.0.to_str().expect("plain text");
    let _hangs: Vec<UnixListener> =
        (0..5).map(|it| UnixListener::bind(scratch.path(&format!("hang{it}.ctl"))).expect("a socket")).collect();
    serve(&scratch, "drips", |stream, _| {
        while stream.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    serve(&scratch, "disk", |stream, line| {
        let asked: Value = serde_json::from_str(line).expect("JSON");
        for answer in answers("fine", 2, asked["verb"].as_str().unwrap_or("")) {
            let _gone = writeln!(stream, "{answer}");
        }
    });
    let timed = |args: &[&str]| {
        let began = Instant::now();
        let done = warmswap(&[args, &["--control", control]].concat());
        assert!(began.elapsed() < Duration::from_secs(25), "{args:?} took {:?}", began.elapsed());
        done
    };
    let done = timed(&["status"]);
    let text = said(&done);
    assert_eq!((done.status.code(), text.matches("silent").count()), (Some(0), 6), "{text}");
    assert!(text.contains("has not answered within 5 s") && text.contains("fine"), "{text}");
    let done = timed(&["events"]);
    let text = said(&done);
    assert!(text.contains("fine") && text.contains("drips.ctl has not answered within 5 s"), "{text}");
    let output = scratch.path("out").to_str().expect("plain text").to_owned();
    for command in [
        vec!["show", "drips"],
        vec!["failover", "drips", "--reason", "x"],
        vec!["failover", "hang0", "--reason", "x", "--wait", "0"],
        vec!["export", "drips"],
        vec!["record", "drips", "--output", &output],
    ] {
        let done = timed(&command);
        assert_eq!(done.status.code(), Some(4), "{command:?}: {}", said(&done));
        assert!(said(&done).contains("has not answered within 5 s"), "{command:?}: {}", said(&done));
    }
}

#[test]
fn a_journal_without_end_is_given_up() {
    let scratch = Scratch::new("hostile-flood");
    let control = scratch.0.to_str().expect("plain text");
    serve(&scratch, "flood", |stream, _| while stream.write_all(b"{\"text\":\"x\"}\n").is_ok() {});
    serve(&scratch, "line", |stream, _| while stream.write_all(&[b' '; 65_536]).is_ok() {});
    let done = warmswap(&["events", "flood", "--control", control]);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("more than 65536 lines"));
    for more in [&[][..], &["--follow"]] {
        let done = warmswap(&[&["events", "line", "--control", control], more].concat());
        assert_eq!(done.status.code(), Some(1));
        assert!(said(&done).contains("an answer of more than 1048576 bytes"), "{}", said(&done));
    }
}

#[test]
fn a_recording_longer_than_time_is_a_mistake_of_usage() {
    let scratch = Scratch::new("hostile-for");
    let output = scratch.path("out").to_str().expect("plain text").to_owned();
    let done = warmswap(&["record", "disk", "--for", "200000000000000d", "--output", &output]);
    assert_eq!(done.status.code(), Some(2), "{}", said(&done));
    assert!(said(&done).contains("--for is longer than time can be told"), "{}", said(&done));
}
