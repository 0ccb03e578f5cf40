//! The command line: what is refused, with which words and which exit code, and that nothing is left behind.

mod support;

use std::io::{BufRead, Read};
use std::os::unix::net::UnixListener;
use std::process::Output;
use std::time::Duration;

use rustix::process::Signal;
use support::{Broker, Scratch, Vmm, storage_daemon, wait_for, warmswap};
use warmswap_wire::Request;

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
    assert_says(&warmswap(&["failover", "disk", "--reason", ""]), 2, &["--reason"]);
    assert_says(&guard(&scratch, &["--primary-socket", "/tmp/x", "--shadow-socket", "/tmp/x"]), 2, &["are the same"]);
    assert_says(&guard(&scratch, &["--socket-mode", "999", "--", "daemon", "{socket}"]), 2, &["octal"]);
    assert_says(&guard(&scratch, &["--socket-group", "no such", "--", "daemon", "{socket}"]), 2, &["/etc/group"]);
    assert_says(&warmswap(&["example", "qemu", "my disk"]), 2, &["--name takes"]);
    assert_says(&warmswap(&["example", "qemu", "disk", "--socket", "relative"]), 2, &["absolute"]);
    assert_says(&warmswap(&["example", "qemu", "disk"]), 0, &["--socket /run/disk.sock"]);
}

#[test]
fn paths_that_cannot_work_are_named_with_their_option_before_anything_starts() {
    let scratch = Scratch::new("paths");
    let control = scratch.0.to_str().expect("plain text").to_owned();
    let run = |args: &[&str]| {
        let head = ["guard", "--name", "disk", "--control", &control];
        warmswap(&[head.as_slice(), args, &["--", "/no/such/daemon", "{socket}"]].concat())
    };
    let socket = scratch.path("vmm.sock").to_str().expect("plain text").to_owned();
    let journal = run(&["--socket", &socket, "--journal", "/no/such/place/journal"]);
    assert_says(&journal, 1, &["--journal", "/no/such/place/journal", "No such file"]);
    std::fs::write(scratch.path("plain"), "somebody's").expect("a file");
    let plain = scratch.path("plain").to_str().expect("plain text").to_owned();
    assert_says(&run(&["--socket", &plain]), 1, &["--socket", "is a file, not a socket"]);
    let long = format!("/tmp/{}", "x".repeat(120));
    assert_says(&run(&["--socket", &long]), 2, &["--socket", "125 bytes", "at most 107"]);
    assert_says(&run(&["--socket", &socket, "--run-dir", &long]), 2, &["--run-dir", "at most 107"]);
    let output = guard(&scratch, &["--primary-socket", "/no/such/backend.sock"]);
    assert_says(&output, 1, &["--primary-socket", "/no/such/backend.sock", "No such file"]);
}

#[test]
fn help_and_version_are_no_failures() {
    assert_says(
        &warmswap(&["--help"]),
        0,
        &["Exit codes: 0 done, 1 failed, 2 usage, 3 refused, 4 no warmswap answers, 5 not protected"],
    );
    assert_says(&warmswap(&["status", "--help"]), 0, &["halted ", "dead ", "unprovable", "exact (", "--check"]);
    assert_says(&warmswap(&["--version"]), 0, &["warmswap"]);
}

#[test]
fn where_no_broker_answers_commands_end_with_4() {
    let scratch = Scratch::new("nobody");
    let control = scratch.0.to_str().expect("plain text");
    for verb in [vec!["status"], vec!["status", "disk"], vec!["failover", "disk", "--reason", "x"], vec!["events"]] {
        assert_says(&warmswap(&[verb.as_slice(), &["--control", control]].concat()), 4, &["no warmswap runs", control]);
    }
    // A socket that is no control socket is never talked to.
    let _vmm = UnixListener::bind(scratch.path("disk.sock")).expect("a socket");
    assert_says(&warmswap(&["status", "--control", control]), 4, &["no warmswap runs"]);
    // One that nobody serves is a dead broker's.
    drop(UnixListener::bind(scratch.path("gone.ctl")).expect("a socket"));
    assert_says(&warmswap(&["status", "--control", control]), 4, &["gone", "dead", "gone.ctl"]);
    assert_says(&warmswap(&["status", "--json", "--control", control]), 4, &[r#""state":"dead""#]);
    assert_says(&warmswap(&["events", "--control", control]), 4, &["no warmswap answers"]);
    assert_says(&warmswap(&["failover", "gone", "--reason", "x", "--control", control]), 4, &["no warmswap answers"]);
}

#[test]
fn one_dead_broker_hides_nobody_and_unknown_names_are_told_from_known_ones() {
    let scratch = Scratch::new("dead");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    drop(UnixListener::bind(scratch.path("gone.ctl")).expect("a socket"));
    assert_says(&broker.ask(&["status"]), 0, &["disk         protected", "gone         dead"]);
    assert_says(&broker.ask(&["status", "--check"]), 5, &["protected"]);
    assert_says(&broker.ask(&["status", "--check", "disk"]), 0, &["protected"]);
    assert_says(&broker.ask(&["events"]), 0, &["ShadowReady"]);
    for verb in [vec!["status", "nope"], vec!["events", "nope"], vec!["failover", "nope", "--reason", "x"]] {
        assert_says(&broker.ask(&verb), 4, &["no device \"nope\"", "disk, gone"]);
    }
}

#[test]
fn a_backend_that_ends_at_once_is_quoted() {
    let scratch = Scratch::new("boom");
    let script = "echo the disk is on fire >&2; exit 7 # {socket}";
    let output = guard(&scratch, &["--", "/bin/sh", "-c", script]);
    assert_says(&output, 1, &["exit status: 7", "the disk is on fire"]);
    // Aloud as well, and once.
    let (socket, control) = (scratch.path("vmm.sock"), scratch.0.to_str().expect("plain text").to_owned());
    let args = ["guard", "--name", "disk", "--socket", socket.to_str().expect("plain text"), "--control", &control];
    let output = warmswap(&[args.as_slice(), &["--", "/bin/sh", "-c", script]].concat());
    assert_eq!(said(&output).matches("the disk is on fire").count(), 1, "{}", said(&output));
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
    assert_says(&broker.ask(&["failover", "disk", "--reason", "test"]), 3, &["refused", "started with --no-shadow"]);
    assert_says(&broker.ask(&["failover", "disk", "--reason", "test", "--fresh"]), 3, &["started with --no-shadow"]);
    assert_eq!(broker.status()["state"], "unprotected");
    assert_eq!(broker.status()["shadow_wanted"], false);
    assert_says(&broker.ask(&["status"]), 0, &["shadow: none, as chosen (it was started with --no-shadow)"]);
    assert_says(&broker.ask(&["status", "--check"]), 5, &["unprotected"]);
}

#[test]
fn a_failover_right_after_a_failover_waits_for_the_shadow() {
    let scratch = Scratch::new("again");
    // One that takes its time, so that it is certainly asked for too early.
    let slow = ["/bin/sh", "-c", "sleep 0.3; exec \"$0\" \"$@\""].map(str::to_owned).to_vec();
    let mut broker = Broker::start(&scratch, &[], &[slow, storage_daemon(&scratch.image())].concat());
    broker.wait_for_state("protected");
    let failover = ["failover", "disk", "--reason", "test"];
    assert_says(&broker.ask(&failover), 0, &["settled: disk"]);
    let output = broker.ask(&[failover.as_slice(), &["--wait", "0"]].concat());
    assert_says(&output, 3, &["refused: ", "shadow"]);
    assert_says(&broker.ask(&failover), 0, &["settled: disk"]);
    assert_says(&broker.ask(&failover), 0, &["settled: disk"]);
    assert_says(&broker.ask(&["status"]), 0, &["3, 1 refused; last ", " s ago: planned "]);
    let last = &broker.status()["last_failover"];
    assert!(last["seconds_ago"].is_u64() && last["ended"].is_string(), "{last}");
}

#[test]
fn a_fresh_failover_puts_a_newly_started_backend_into_service() {
    let scratch = Scratch::new("fresh");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 2, 7);
    broker.wait_for_state("protected");
    let before = broker.status();
    let fresh = ["failover", "disk", "--reason", "new version", "--fresh"];
    assert_says(&broker.ask(&[fresh.as_slice(), &["--wait", "0"]].concat()), 2, &["--wait"]);
    assert_says(&broker.ask(&fresh), 0, &["settled: disk"]);
    let after = broker.status();
    let generation = |status: &serde_json::Value, role: &str| status[role]["generation"].as_u64().expect("a backend");
    let newest = generation(&before, "primary").max(generation(&before, "shadow"));
    assert!(generation(&after, "primary") > newest, "{before} {after}");
    assert_eq!(disk.read(&mut vmm, 2), vec![7; 512]);
}

#[test]
fn a_ring_that_was_refused_is_shown_until_one_starts() {
    let scratch = Scratch::new("refused-ring");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let disk = support::Disk::new();
    let size = warmswap_wire::VringState { index: 7, value: 16 };
    assert_eq!(vmm.ask(&Request::SetVringNum(size), &[]).expect("an answer"), warmswap_wire::Reply::U64(1));
    let why = broker.status()["misconfigured"].to_string();
    assert!(why.contains("SET_VRING_NUM was refused") && why.contains("backends serve 2"), "{why}");
    assert_says(&broker.ask(&["status"]), 0, &["misconfigured: SET_VRING_NUM was refused"]);
    vmm.start(&disk).expect("the right ring is taken");
    assert!(broker.status()["misconfigured"].is_null());
}

#[test]
fn guest_memory_that_the_vmm_maps_privately_is_named_and_shared_memory_is_not() {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let scratch = Scratch::new("private");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    for (flags, wrong) in [(MapFlags::SHARED, false), (MapFlags::PRIVATE, true)] {
        broker.wait_for_state("protected");
        let disk = support::Disk::new();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping that nobody reads or writes.
        let mapped = unsafe { mmap(std::ptr::null_mut(), 1 << 20, protection, flags, &disk.memory, 0) };
        let mut vmm = Vmm::connect(&broker.socket);
        vmm.start(&disk).expect("private memory looks like any other");
        if wrong {
            wait_for("the entry", || said(&broker.ask(&["events"])).contains("ERROR: GuestMemoryPrivate"));
            assert!(broker.status()["misconfigured"].to_string().contains("share=on"));
            assert_eq!(said(&broker.ask(&["events"])).matches("GuestMemoryPrivate").count(), 1);
        } else {
            std::thread::sleep(Duration::from_millis(50));
            assert!(broker.status()["misconfigured"].is_null(), "{}", broker.status());
        }
        drop(vmm);
        // SAFETY: the mapping made above.
        unsafe { munmap(mapped.expect("a mapping"), 1 << 20) }.expect("it is ours");
    }
}

#[test]
fn a_broker_that_was_killed_is_named_by_the_next_one_and_its_directory_removed() {
    let scratch = Scratch::new("killed");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let pid = broker.child.id();
    let directory = scratch.path(&format!("disk.{pid}"));
    assert!(directory.is_dir());
    broker.signal(Signal::KILL);
    broker.wait();
    assert_says(&broker.ask(&["status"]), 4, &["disk         dead"]);
    // Its backends die with it, but not at once.
    let mut next = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    next.wait_for_state("protected");
    assert!(!directory.exists());
    assert_eq!(next.status()["after_crash_of"], pid);
    assert_says(&next.ask(&["events"]), 0, &[&format!("warning: BrokerDied pid={pid}"), "file system"]);
    assert_says(&next.ask(&["status"]), 0, &["did not end in order"]);
}

#[test]
fn the_socket_gets_the_mode_and_the_group_that_were_asked_for() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new("mode");
    let group = rustix::process::getegid().as_raw().to_string();
    let options = ["--socket-mode", "660", "--socket-group", &group];
    let broker = Broker::start(&scratch, &options, &storage_daemon(&scratch.image()));
    let found = std::fs::metadata(&broker.socket).expect("the socket");
    assert_eq!((found.mode() & 0o777, found.gid().to_string()), (0o660, group));
}

#[test]
fn events_of_all_are_followed_as_the_broker_prints_them() {
    let scratch = Scratch::new("follow");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut follower = broker.follow();
    let mut lines = std::io::BufReader::new(follower.stdout.take().expect("it is piped"));
    let mut seen = String::new();
    lines.read_line(&mut seen).expect("plain text");
    assert_says(&broker.ask(&["failover", "disk", "--reason", "test"]), 0, &["settled"]);
    broker.wait_for_state("protected");
    broker.signal(Signal::TERM);
    assert!(broker.wait().success());
    lines.read_to_string(&mut seen).expect("plain text");
    assert!(follower.wait().expect("our own child").success());
    let settled = seen.lines().find(|line| line.contains("FailoverSettled")).expect("it was followed");
    let order: Vec<_> = ["id=", "kind=", "blackout="].iter().map(|name| settled.find(name)).collect();
    assert!(order.iter().all(Option::is_some) && !settled.contains("Isolating"), "{settled}");
    assert!(seen.contains(" Ended at_rest=true rings=0"), "{seen}");
}

#[test]
fn an_end_with_a_guest_says_that_its_rings_came_to_rest() {
    let scratch = Scratch::new("rest");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 9);
    broker.signal(Signal::TERM);
    assert!(broker.wait().success());
    let journal = std::fs::read_to_string(scratch.path("journal")).expect("a journal");
    assert!(journal.contains(r#""event":"Ended","level":"info","properties":{"at_rest":true,"rings":1"#), "{journal}");
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

#[test]
fn an_end_at_which_the_primary_cannot_be_proved_quiet_is_a_failure_that_says_so() {
    let scratch = Scratch::new("restless");
    let options = ["--fence-command", "sleep 6", "--drain-ms", "100"];
    let mut broker = Broker::start(&scratch, &options, &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 9);
    let pid = broker.status()["primary"]["pid"].as_u64().expect("a process");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("small")).expect("a process");
    rustix::process::kill_process(pid, Signal::STOP).expect("a backend of ours");
    broker.signal(Signal::TERM);
    assert_eq!(broker.wait().code(), Some(1));
    let journal = std::fs::read_to_string(scratch.path("journal")).expect("a journal");
    assert!(journal.contains(r#""event":"Ended","level":"error","properties":{"at_rest":false"#), "{journal}");
}
