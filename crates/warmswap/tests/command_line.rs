//! The command line: what is refused, with which words and which exit code, and that nothing is left behind.

mod support;

use std::os::unix::net::UnixListener;
use std::process::Output;
use std::time::Duration;

use rustix::process::Signal;
use support::{Broker, Scratch, Vmm, storage_daemon, wait_for, warmswap};

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn guard(scratch: &Scratch, more: &[&str]) -> Output {
    let (socket, control) = (scratch.path("vmm.sock"), scratch.0.to_str().expect("plain text").to_owned());
    let socket = socket.to_str().expect("plain text").to_owned();
    let args = ["guard", "--name", "disk", "--quiet", "--socket", &socket, "--control", &control];
    warmswap(&[args.as_slice(), more].concat())
}

#[track_caller]
fn assert_says(output: &Output, code: i32, words: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn mistakes_of_usage_are_named_and_end_with_2() {
    let scratch = Scratch::new("usage");
    assert_says(&warmswap(&[]), 2, &["Usage"]);
    assert_says(&warmswap(&["guard"]), 2, &["--name", "--socket"]);
    assert_says(&warmswap(&["no-such-verb"]), 2, &["no-such-verb"]);
    assert_says(&guard(&scratch, &[]), 2, &["--primary-socket", "command line"]);
    assert_says(&guard(&scratch, &["--", "daemon", "--socket", "/tmp/one"]), 2, &["{socket}", "{fd}"]);
    assert_says(&guard(&scratch, &["--type", "gpu", "--", "daemon", "{socket}"]), 2, &["gpu", "blk, scsi"]);
    assert_says(&guard(&scratch, &["--drain", "hope", "--", "daemon", "{socket}"]), 2, &["private-kick"]);
    assert_says(&guard(&scratch, &["--fence", "target", "--", "daemon", "{socket}"]), 2, &["--fence-command"]);
    assert_says(&guard(&scratch, &["--shadow-socket", "/tmp/x"]), 2, &["--primary-socket"]);
    assert_says(&guard(&scratch, &["--primary-socket", "/tmp/x", "--", "daemon", "{socket}"]), 2, &["cannot be used"]);
    let names = warmswap(&["guard", "--name", "../etc", "--socket", "/tmp/x", "--", "daemon", "{socket}"]);
    assert_says(&names, 2, &["--name takes"]);
    assert_says(&warmswap(&["failover", "disk"]), 2, &["--reason"]);
}

#[test]
fn help_and_version_are_no_failures() {
    assert_says(
        &warmswap(&["--help"]),
        0,
        &["Exit codes: 0 done, 1 failed, 2 usage, 3 refused, 4 no warmswap answers"],
    );
    assert_says(&warmswap(&["--version"]), 0, &["warmswap"]);
}

#[test]
fn where_no_broker_answers_commands_end_with_4() {
    let scratch = Scratch::new("nobody");
    let control = scratch.0.to_str().expect("plain text");
    assert_says(&warmswap(&["status", "disk", "--control", control]), 4, &["disk.sock"]);
    assert_says(&warmswap(&["status", "--control", control]), 4, &["no warmswap runs"]);
    assert_says(&warmswap(&["failover", "disk", "--reason", "x", "--control", control]), 4, &["no warmswap answers"]);
    assert_says(&warmswap(&["events", "disk", "--control", control]), 4, &["no warmswap answers"]);
}

#[test]
fn a_backend_that_ends_at_once_is_quoted() {
    let scratch = Scratch::new("boom");
    let script = "echo the disk is on fire >&2; exit 7 # {socket}";
    let output = guard(&scratch, &["--", "/bin/sh", "-c", script]);
    assert_says(&output, 1, &["exit status: 7", "the disk is on fire"]);
    assert_says(&guard(&scratch, &["--", "/no/such/daemon", "{socket}"]), 1, &["/no/such/daemon", "No such file"]);
    assert_says(&guard(&scratch, &["--", "no-such-daemon", "{socket}"]), 1, &["there is no such program"]);
}

#[test]
fn a_socket_that_somebody_serves_is_left_to_him() {
    let scratch = Scratch::new("in-use");
    let _theirs = UnixListener::bind(scratch.path("vmm.sock")).expect("a socket");
    let output = guard(&scratch, &["--", "/bin/sh", "-c", "sleep 9 # {socket}"]);
    assert_says(&output, 1, &["another process listens there"]);
    assert!(scratch.path("vmm.sock").exists());
}

#[test]
fn a_socket_that_nobody_serves_any_more_is_taken_over() {
    let scratch = Scratch::new("stale");
    drop(UnixListener::bind(scratch.path("vmm.sock")).expect("a socket"));
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    // The stale file was there all along: what counts is that somebody answers.
    broker.wait_for_state("protected");
    drop(Vmm::connect(&broker.socket));
}

#[test]
fn a_directory_that_is_missing_is_named() {
    let scratch = Scratch::new("missing");
    let control = scratch.0.to_str().expect("plain text");
    let args = ["guard", "--name", "disk", "--socket", "/no/such/place/vmm.sock", "--control", control];
    let output = warmswap(&[args.as_slice(), &["--", "daemon", "{socket}"]].concat());
    assert_says(&output, 1, &["/no/such/place", "no such directory"]);
}

#[test]
fn a_second_broker_of_the_same_name_is_refused_and_harms_nobody() {
    let scratch = Scratch::new("second");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let output = guard(&scratch, &["--", "/bin/sh", "-c", "sleep 9 # {socket}"]);
    assert_says(&output, 1, &["another process listens there"]);
    broker.assert_serves();
}

#[test]
fn a_failover_that_cannot_be_made_is_refused_with_3_and_its_reason() {
    let scratch = Scratch::new("refused");
    let broker = Broker::start(&scratch, &["--no-shadow"], &storage_daemon(&scratch.image()));
    let control = scratch.0.to_str().expect("plain text");
    let output = warmswap(&["failover", "disk", "--reason", "test", "--control", control]);
    assert_says(&output, 3, &["refused", "no shadow"]);
    assert_eq!(broker.status()["state"], "unprotected");
}

#[test]
fn the_journal_tells_what_happened() {
    let scratch = Scratch::new("events");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let control = scratch.0.to_str().expect("plain text");
    let output = warmswap(&["events", "disk", "--json", "--control", control]);
    assert_says(&output, 0, &["BackendStarted", "PrimaryReady", "ShadowReady"]);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let _event: serde_json::Value = serde_json::from_str(line).expect("a JSON object per line");
    }
}

#[test]
fn a_signal_ends_the_broker_and_leaves_no_process_no_socket_and_no_group() {
    let scratch = Scratch::new("signal");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 9);
    let status = broker.status();
    let pids = ["primary", "shadow"].map(|role| status[role]["pid"].as_u64().expect("a process"));
    let groups = groups(&broker);
    broker.signal(Signal::TERM);
    assert!(broker.wait().success());
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
    }
    let left: Vec<String> = std::fs::read_dir(&scratch.0)
        .expect("our own directory")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "disk.img" && name != "journal")
        .collect();
    assert!(left.is_empty(), "{left:?}");
    for group in groups {
        assert!(!group.exists(), "{} is left", group.display());
    }
}

/// The control groups of a broker's backends, where the system has them.
fn groups(broker: &Broker) -> Vec<std::path::PathBuf> {
    let own = format!(".{}.", broker.child.id());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Some(mount) =
        mounts.lines().filter(|line| line.contains(" - cgroup2 ")).find_map(|line| line.split(' ').nth(4))
    else {
        return Vec::new();
    };
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_start_matches('/');
    let Ok(entries) = std::fs::read_dir(std::path::Path::new(mount).join(group)) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| path.to_string_lossy().contains(&own)).collect()
}

#[test]
fn a_signal_ends_the_broker_also_while_its_primary_is_stopped() {
    let scratch = Scratch::new("stopped");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let pid = broker.status()["primary"]["pid"].as_u64().expect("a process");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("small")).expect("a process");
    rustix::process::kill_process(pid, Signal::STOP).expect("a backend of ours");
    std::thread::sleep(Duration::from_millis(20));
    broker.signal(Signal::TERM);
    assert!(broker.wait().success());
    wait_for("the end of the stopped primary", || rustix::process::test_kill_process(pid).is_err());
}
