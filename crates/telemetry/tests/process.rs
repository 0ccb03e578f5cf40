//! A page of another process: this program, started again as a backend.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use warmswap_telemetry::{Identity, Kind, Page, ReadError, Reader, find_in_process};

/// Set in the environment of the process that plays the backend.
const ROLE: &str = "TELEMETRY_TEST_ROLE";

/// Not a test but the backend: it makes a page, stands in the middle of an update, says so, and waits to be killed.
#[test]
fn a_backend_of_its_own() {
    match std::env::var(ROLE).as_deref() {
        Ok("page") => {
            let identity = Identity { device_type: 2, instance: 12_345, started_ns: 1 };
            let (_page, mut writers) = Page::create(2, identity).expect("a page");
            writers[0].update(7).submitted(Kind::Read);
            let mut update = writers[1].update(8);
            update.submitted(Kind::Write);
            wait_for_the_end();
        }
        Ok("none") => wait_for_the_end(),
        _ => {}
    }
}

fn wait_for_the_end() {
    println!("\nready");
    let _end = std::io::stdin().read(&mut [0]);
}

fn start(role: &str) -> Child {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "a_backend_of_its_own", "--nocapture"])
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be started");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    assert!(lines.any(|line| line.expect("text") == "ready"), "the backend ended early");
    child
}

#[test]
fn a_page_is_found_in_its_process_and_can_be_read_when_that_was_killed_in_the_middle_of_an_update() {
    let mut backend = start("page");
    let file = find_in_process(backend.id()).expect("it is ours").expect("it has a page");
    let reader = Reader::open(file).expect("a page");
    assert_eq!((reader.header().pid, reader.header().instance), (backend.id(), 12_345));

    for round in ["it lives", "it was killed"] {
        assert_eq!(reader.queue(0).expect(round).kind(Kind::Read).submitted, 1);
        assert!(matches!(reader.queue(1), Err(ReadError::MidUpdate { index: 1, sequence: 1 })), "{round}");
        let found = reader.read_anyway(1).expect(round);
        assert_eq!((found.whole, found.updated_ns, found.kind(Kind::Write).submitted), (false, Some(8), 1), "{round}");
        backend.kill().expect("it is ours");
        backend.wait().expect("it is ours");
    }
    let gone = find_in_process(backend.id()).expect_err("it was waited for");
    assert_eq!(gone.kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn what_was_found_cannot_be_written() {
    let mut backend = start("page");
    let file = find_in_process(backend.id()).expect("it is ours").expect("it has a page");
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    assert_eq!(rustix::io::pwrite(&file, &[1], 0), Err(rustix::io::Errno::BADF));
    let again = std::fs::OpenOptions::new().write(true).open(path).expect("its mode does not forbid it");
    assert_eq!(rustix::io::pwrite(&again, &[1], 0), Err(rustix::io::Errno::PERM), "its seal does");
    backend.kill().expect("it is ours");
    backend.wait().expect("it is ours");
}

#[test]
fn a_process_without_a_page_has_none() {
    let mut backend = start("none");
    assert!(find_in_process(backend.id()).expect("it is ours").is_none());
    backend.kill().expect("it is ours");
    backend.wait().expect("it is ours");
}
