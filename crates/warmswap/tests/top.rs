//! `warmswap top` and `show` against control sockets that answer what a test wants.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use support::{Scratch, warmswap};

/// Answers of a broker, by verb; without one for `profile` it is a broker that does not know the verb.
fn serve(scratch: &Scratch, name: &str, profile: Option<Value>) {
    let listener = UnixListener::bind(scratch.path(&format!("{name}.ctl"))).expect("a socket");
    let status = json!({"devices": [{
        "name": name, "type": "blk", "state": "protected", "vmm": "connected", "socket": "/run/x.sock", "phase": "idle",
        "recovery_level": "exact", "fence_level": "reaped",
        "primary": {"pid": 4711, "generation": 1, "state": "active"},
        "shadow": {"pid": 4712, "generation": 2, "state": "ready"}, "shadow_note": "ready",
        "rings": [], "failovers": {"settled": 0}, "last_failover": null,
    }]});
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (status, profile) = (status.clone(), profile.clone());
            std::thread::spawn(move || converse(stream, &status, profile.as_ref()));
        }
    });
}

fn converse(mut stream: UnixStream, status: &Value, profile: Option<&Value>) {
    let reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    for line in reader.lines().map_while(Result::ok) {
        let asked: Value = serde_json::from_str(&line).expect("JSON");
        let answer = match (asked["verb"].as_str(), profile) {
            (Some("status"), _) => status.clone(),
            (Some("profile"), Some(profile)) => profile.clone(),
            (Some("events"), _) => json!({"end": true}),
            _ => json!({"error": {"code": 2, "message": "the command is not understood"}}),
        };
        if writeln!(stream, "{answer}").is_err() {
            return;
        }
    }
}

fn profile() -> Value {
    let window = |number: u64| {
        json!({"number": number, "backend": 1, "end_unix_ms": 1_790_000_000_000_u64, "span_ms": 10_000.0,
            "values": {"completions_per_s": 1_234.0, "latency_p99_us": 1_300.0, "rss_bytes": 35_651_584.0, "later_us": 1.0}})
    };
    json!({"device": "disk", "schema_version": 1, "windows": [window(7), window(8)], "tick": window(80), "records_lost": 0})
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn top(scratch: &Scratch, args: &[&str], columns: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warmswap"));
    command.arg("top").args(args).arg("--control").arg(&scratch.0).stdin(Stdio::null());
    command.env("COLUMNS", columns).env("LINES", "24").output().expect("the program starts")
}

#[track_caller]
fn assert_line(text: &str, name: &str, words: &[&str]) {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no line of {name}: {text}"));
    for word in words {
        assert!(line.contains(word), "{word:?} is not in {line:?}");
    }
}

#[test]
fn one_frame_shows_brokers_with_and_without_a_profile_and_dead_ones() {
    let scratch = Scratch::new("top");
    serve(&scratch, "disk", Some(profile()));
    serve(&scratch, "old", None);
    drop(UnixListener::bind(scratch.path("gone.ctl")).expect("a socket"));
    let output = top(&scratch, &["--once"], "170");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_eq!(text.lines().count(), 24);
    assert_line(&text, "disk ", &["protected", "4711", "ready", "1.2 k", "1.3 ms", "34 MiB"]);
    assert_line(&text, "old ", &["protected", "4711", "ready", " - "]);
    assert_line(&text, "gone ", &["dead"]);
    assert!(!text.contains('\u{1b}'), "{text}");
    // Its own page, of one that is named.
    let page = top(&scratch, &["disk", "--once"], "80");
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    assert!(page.contains("process 4711, generation 1") && page.contains("latency"), "{page}");
}

#[test]
fn where_nobody_answers_top_and_show_end_with_4() {
    let scratch = Scratch::new("top-none");
    assert_eq!(top(&scratch, &["--once"], "80").status.code(), Some(4));
    drop(UnixListener::bind(scratch.path("gone.ctl")).expect("a socket"));
    let output = top(&scratch, &["--once"], "80");
    assert_eq!(output.status.code(), Some(4), "{}", text(&output));
    assert_line(&text(&output), "gone", &["dead"]);
    let control = scratch.0.to_str().expect("plain text");
    let shown = warmswap(&["show", "gone", "--json", "--control", control]);
    assert_eq!(shown.status.code(), Some(4));
    let shown: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!((&shown["status"]["state"], &shown["profile"]), (&json!("dead"), &Value::Null));
}

#[test]
fn brokers_that_hang_or_talk_nonsense_hide_nobody() {
    let scratch = Scratch::new("top-bad");
    serve(
        &scratch,
        "disk",
        Some(json!({"windows": [{"values": {"cpu_cores": "all", "rss_bytes": 1e308}}], "tick": 7})),
    );
    let _hangs = UnixListener::bind(scratch.path("hangs.ctl")).expect("a socket");
    let nonsense = UnixListener::bind(scratch.path("nonsense.ctl")).expect("a socket");
    std::thread::spawn(move || {
        for mut stream in nonsense.incoming().flatten() {
            let _gone = stream.write_all(b"\x1b[2J{]\n");
        }
    });
    let output = top(&scratch, &["--once"], "120");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_line(&text, "disk ", &["protected", " - "]);
    assert_line(&text, "hangs ", &["silent"]);
    assert_line(&text, "nonsense ", &["silent"]);
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn without_a_terminal_top_says_what_to_do() {
    let scratch = Scratch::new("top-pipe");
    serve(&scratch, "disk", None);
    let output = top(&scratch, &[], "80");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("--once"), "{}", text(&output));
    assert_eq!(top(&scratch, &["--once", "--every", "0"], "80").status.code(), Some(2));
}

#[test]
fn show_prints_the_whole_profile_as_json_and_as_text() {
    let scratch = Scratch::new("show");
    serve(&scratch, "disk", Some(profile()));
    serve(&scratch, "old", None);
    let control = scratch.0.to_str().expect("plain text");
    let show = |args: &[&str]| {
        let output = warmswap(&[&["show"], args, &["--control", control]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        text(&output)
    };
    let shown: Value = serde_json::from_str(&show(&["disk", "--json"])).expect("JSON");
    let sent = profile();
    let (window, tick) = (&sent["windows"][1], &sent["tick"]);
    let expected = json!({"schema_version": 1, "window": window, "tick": tick, "verdict": null, "records_lost": 0});
    assert_eq!((&shown["name"], &shown["profile"]), (&json!("disk"), &expected));
    assert_eq!(shown["status"]["primary"]["pid"], 4711);
    let shown = show(&["disk"]);
    assert_line(&shown, "window", &["8 of backend 1", "over 10 s", "2026-"]);
    assert_line(&shown, "completions_per_s", &["1.2 k/s", "per second", "rings"]);
    assert_line(&shown, "cpu_cores", &[" - ", "processors", "process"]);
    assert!(shown.contains("this version does not know: 1;"), "{shown}");
    assert!(show(&["old"]).contains("no profile"));
    let shown: Value = serde_json::from_str(&show(&["old", "--json"])).expect("JSON");
    assert_eq!(shown["profile"], Value::Null);
    let output = warmswap(&["show", "nope", "--control", control]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output));
}
