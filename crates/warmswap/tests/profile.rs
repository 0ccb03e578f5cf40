//! Profiles on the command line: what a running broker tells, what it leaves behind, and what is refused with which words.

mod support;

use std::process::Output;

use rustix::process::Signal;
use support::{Broker, Scratch, warmswap};

#[track_caller]
fn assert_says(output: &Output, code: i32, words: &[&str]) {
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn mistakes_are_named() {
    let scratch = Scratch::new("profile-usage");
    let (control, file) = (scratch.0.to_str().expect("plain text").to_owned(), scratch.path("file"));
    let file = file.to_str().expect("plain text");
    assert_says(&warmswap(&["export", "disk", "--last", "soon"]), 2, &["--last", "as 90s"]);
    assert_says(&warmswap(&["export", "disk", "--from", "yesterday"]), 2, &["--from", "2026-11-23"]);
    assert_says(&warmswap(&["export", "disk", "--last", "1h", "--to", "@5"]), 2, &["cannot be used with"]);
    assert_says(&warmswap(&["export", "disk", "--from", "@6", "--to", "@5"]), 2, &["nothing lies between"]);
    assert_says(&warmswap(&["export", "disk", "--format", "xls"]), 2, &["csv", "parquet"]);
    assert_says(&warmswap(&["export", "../disk"]), 2, &["--name takes"]);
    assert_says(&warmswap(&["export", "disk", "--control", &control]), 4, &["no warmswap runs in", &control]);
    assert_says(&warmswap(&["export", "disk", "--store", file]), 1, &[file, "guard with --store"]);
    assert_says(&warmswap(&["record", "disk"]), 2, &["--output"]);
    assert_says(&warmswap(&["replay", file]), 1, &[file, "No such file"]);
    std::fs::write(file, "a letter to somebody").expect("it can be written");
    assert_says(&warmswap(&["replay", file]), 1, &[file, "is no recorded stream"]);
    assert_says(&warmswap(&["export", "disk", "--store", file]), 1, &[file, "is no profile history"]);
    assert_says(&warmswap(&["schema"]), 0, &["arrivals_per_s", "microseconds"]);
    assert_says(&warmswap(&["schema", "--json"]), 0, &["\"schema_version\":1"]);
}

/// Rows of a table below its header.
fn rows(output: &Output) -> usize {
    String::from_utf8_lossy(&output.stdout).lines().count().saturating_sub(1)
}

#[test]
fn a_broker_keeps_a_history_that_outlives_it() {
    let scratch = Scratch::new("profile-kept");
    let (image, store) = (scratch.image(), scratch.path("store"));
    let (image, store) = (image.to_str().expect("plain text"), store.to_str().expect("plain text"));
    let (control, table) = (scratch.0.to_str().expect("plain text"), scratch.path("table"));
    let table = table.to_str().expect("plain text");
    let mut kept = 0;
    for signal in [Signal::TERM, Signal::KILL, Signal::TERM] {
        let mut broker = Broker::start(&scratch, &["--disk", image, "--store", store], &[]);
        broker.wait_for_state("protected");
        assert_says(&broker.ask(&["export", "disk"]), 0, &["end_time,grain,number"]);
        support::wait_for("a window", || rows(&broker.ask(&["export", "disk", "--last", "1m"])) > 0);
        assert_says(&broker.ask(&["export", "disk", "--format", "parquet", "--output", table]), 0, &["exported:"]);
        assert!(std::fs::read(table).expect("it was written").ends_with(b"PAR1"));
        support::wait_for("the history", || {
            let output = warmswap(&["export", "disk", "--store", store]);
            String::from_utf8_lossy(&output.stderr).contains("in use by another process")
        });
        let stream = scratch.path(&format!("stream-{}", broker.child.id()));
        let stream = stream.to_str().expect("plain text");
        let recorded = broker.ask(&["record", "disk", "--for", "200ms", "--output", stream]);
        assert_says(&recorded, 0, &["recorded:"]);
        assert_says(&warmswap(&["replay", stream]), 0, &["disk: "]);
        broker.signal(signal);
        broker.wait();
        // The first has stored a window; of those that are like it, of a disk at rest, not every one is.
        let stored = rows(&warmswap(&["export", "disk", "--store", store]));
        assert!(stored >= kept.max(1), "{stored} windows, {kept} before");
        kept = stored;
        // A broker that was killed leaves its socket.
        assert_says(&warmswap(&["export", "disk", "--control", control]), 4, &[]);
    }
}
