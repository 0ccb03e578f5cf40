//! The conformance suite on real back-ends: ours passes, what is wrong with others is found, and so is what is broken on purpose.

use std::process::{Command, Stdio};

use serde_json::Value;

const LAB: &str = env!("CARGO_BIN_EXE_lab");

/// The built-in back-end on the suite's image.
const BUILT_IN: [&str; 8] = [LAB, "blk", "--socket-path", "{socket}", "--blk-file", "{image}", "--num-queues", "2"];

/// What the suite says of a back-end, and whether it is content with it.
fn conform(options: &[&str], backend: &[&str]) -> (Value, bool) {
    let mut command = Command::new(LAB);
    command.args(["conform", "--json"]).args(options).arg("--").args(backend).stdin(Stdio::null());
    let output = command.output().expect("the suite starts");
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (report, output.status.success())
}

fn result<'a>(report: &'a Value, id: &str) -> &'a str {
    let checks = report["checks"].as_array().expect("checks");
    let check = checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("the check {id} was not made"));
    check["result"].as_str().expect("a word")
}

/// Whether the image can be made slow: as root, where the kernel has FUSE.
fn can_be_slow(report: &Value) -> bool {
    result(report, "stop-drains") != "not-applicable"
}

#[test]
fn the_built_in_back_end_does_what_the_specification_asks_for() {
    let (report, content) = conform(&["--strict"], &BUILT_IN);
    let bad: Vec<&Value> = report["checks"]
        .as_array()
        .expect("checks")
        .iter()
        .filter(|check| !matches!(check["result"].as_str(), Some("pass" | "not-applicable")))
        .collect();
    assert!(content && bad.is_empty(), "{bad:#?}");
    assert_eq!(report["complete"], true);
    assert!(report["counts"]["pass"].as_u64() >= Some(75), "{}", report["counts"]);
    if can_be_slow(&report) {
        assert_eq!(report["drain"]["first"], "stop");
    } else {
        eprintln!("not shown: what needs requests in flight, for only root can make the image slow");
    }
}

#[test]
fn what_is_known_of_the_storage_daemon_is_found_again() {
    let checks = [
        "features",
        "reply-ack",
        "serves",
        "no-kick",
        "kick-before-enable",
        "disable-running",
        "base",
        "restart",
        "wrap",
        "takeover",
        "takeover-killed",
        "mem-table-running",
        "stop-drains",
        "private-kick-drains",
        "disable-drains",
    ];
    let node = "driver=file,node-name=disk,filename={image},locking=on";
    let export =
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues=2";
    let only = checks.join(",");
    let (report, content) =
        conform(&["--only", &only], &["qemu-storage-daemon", "--blockdev", node, "--export", export]);
    assert!(content, "without --strict what is found is no error");
    for id in checks {
        let expected = match id {
            // It keeps the flag, and serves the ring all the same.
            "disable-running" => "fail",
            // It answers at once, and completes later.
            "stop-drains" | "disable-drains" if can_be_slow(&report) => "fail",
            "stop-drains" | "private-kick-drains" | "disable-drains" if !can_be_slow(&report) => "not-applicable",
            _ => "pass",
        };
        assert_eq!(result(&report, id), expected, "{id}: {report:#}");
    }
    if can_be_slow(&report) {
        assert_eq!(report["drain"]["first"], "private-kick", "which is what guard chooses for it");
    }
}

#[test]
fn what_is_broken_on_purpose_is_found() {
    for (fault, id, expected) in [
        ("lose-completion:every=5", "serves", "fail"),
        ("errors:every=5", "serves", "fail"),
        ("lose-interrupt:every=5", "call", "fail"),
        ("lose-interrupt:every=3", "event-call", "fail"),
        ("kill:store=5", "serves", "crash"),
        ("spin", "base", "timeout"),
    ] {
        let backend = [&BUILT_IN[..], &["--fault", fault]].concat();
        let (report, content) = conform(&["--strict", "--only", id, "--patience-ms", "1000"], &backend);
        assert_eq!(result(&report, id), expected, "{fault}: {report:#}");
        assert!(!content, "{fault}: with --strict that is an error");
    }
}

#[test]
fn a_check_that_is_not_there_and_a_back_end_that_does_not_start_are_errors() {
    let fails = |options: &[&str], backend: &[&str], why: &str| {
        let mut command = Command::new(LAB);
        command.arg("conform").args(options).arg("--").args(backend).stdin(Stdio::null());
        let output = command.output().expect("the suite starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(why), "{said}");
    };
    fails(&["--only", "nothing"], &BUILT_IN, "there is no check nothing");
    fails(&["--only", "base"], &["true"], "needs {socket}");
    fails(&["--only", "base"], &["/nowhere/backend", "{socket}"], "starting /nowhere/backend");
}
