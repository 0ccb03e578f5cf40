//! What a restricted process can and cannot do, seen from outside. Each restriction is shown with its counter-example:
//! the same action in a process that is free, or with the protection taken away.

mod child;
mod deeds;

use super::*;
use child::{Ended, Started, run, start};
use landlock::ABI;
use std::os::unix::process::ExitStatusExt;

/// Made by the child's filter in place of death: no system call of the kernel's answers with it.
const DENIED: i32 = 3999;

fn errno(number: i32) -> String {
    format!("errno {number}")
}

/// The same deed at each stage, and what it said there. Where nothing is expected the filter must have killed the
/// process.
#[track_caller]
fn at_each_stage(deed: &str, expected: &[(&str, Option<&str>)]) {
    for (stage, said) in expected {
        let ended = run(stage, deed);
        match said {
            Some(said) => {
                assert_eq!((ended.said(), ended.status.code()), (vec![*said], Some(0)), "{deed}, {stage}: {ended:?}");
            }
            None => assert!(ended.killed_by(libc::SIGSYS) && ended.said().is_empty(), "{deed}, {stage}: {ended:?}"),
        }
    }
}

/// The version of Landlock of this kernel. The tests need one.
fn landlock_version() -> i64 {
    // SAFETY: with this flag the call looks at no memory and only answers with a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    assert!(version >= 1, "these tests need a kernel with Landlock");
    version
}

fn since(version: i64, errno_since: i32) -> String {
    if landlock_version() >= version { errno(errno_since) } else { "ok".to_owned() }
}

#[test]
fn nothing_can_be_opened_by_path() {
    let denied = errno(libc::EACCES);
    let expected = [("free", Some("ok")), ("process", Some(denied.as_str())), ("worker", None), ("control", None)];
    at_each_stage("open", &expected);
    at_each_stage("make a file", &expected);
}

#[test]
fn nothing_can_be_executed() {
    let denied = errno(libc::EACCES);
    // A program that is executed says nothing and ends well.
    for deed in ["execute", "execute what is open"] {
        let free = run("free", deed);
        assert!(free.status.success() && free.said().is_empty(), "{free:?}");
        at_each_stage(deed, &[("process", Some(denied.as_str())), ("worker", None), ("control", None)]);
    }
}

#[test]
fn no_socket_can_be_made_and_nobody_reached() {
    at_each_stage("socket", &[("free", Some("ok")), ("process", Some("ok")), ("worker", None), ("control", None)]);
    let tcp = since(4, libc::EACCES);
    at_each_stage("connect to a TCP port", &[("free", Some("ok")), ("process", Some(tcp.as_str())), ("control", None)]);
    let outside = since(6, libc::EPERM);
    at_each_stage("signal the parent", &[("free", Some("ok")), ("process", Some(outside.as_str())), ("control", None)]);
}

#[test]
fn nothing_becomes_code() {
    for deed in ["map code", "turn memory into code"] {
        at_each_stage(deed, &[("free", Some("ok")), ("process", Some("ok")), ("worker", None), ("control", None)]);
    }
}

#[test]
fn no_thread_and_no_process_can_be_started() {
    for deed in ["start a thread", "start a process"] {
        at_each_stage(deed, &[("free", Some("ok")), ("process", Some("ok")), ("worker", None), ("control", None)]);
    }
}

#[test]
fn what_is_open_is_read_written_allocated_and_locked_as_before() {
    let all = "written, read, allocated, flushed, locked";
    at_each_stage("use what is open", &[("free", Some(all)), ("process", Some(all))]);
    at_each_stage("use the image", &[("free", Some("ok")), ("worker", Some("ok")), ("control", None)]);
    at_each_stage("lock the image", &[("free", Some("ok")), ("control", Some("ok")), ("worker", None)]);
}

#[test]
fn no_call_passes_that_the_table_does_not_name() {
    for profile in ["worker", "control"] {
        let ended = run(&format!("{profile} answers"), "try every number");
        assert_eq!(ended.said(), ["denied all but those of the table"], "{profile}: {ended:?}");
    }
    // Without the filter the first number that is not in the table is executed.
    let free = run("free", "try every number");
    assert_ne!(free.said(), ["denied all but those of the table"]);
}

#[test]
fn arguments_are_looked_at() {
    let asked = deeds::ARGUMENTS.iter().map(|(name, ..)| *name);
    let free = run("free", "try the arguments");
    let said: Vec<_> = asked.clone().map(|name| format!("{name}: passed")).collect();
    assert_eq!(free.said(), said, "{free:?}");
    for (index, profile) in ["worker", "control"].into_iter().enumerate() {
        let ended = run(&format!("{profile} answers"), "try the arguments");
        let word = |passes: bool| if passes { "passed" } else { "denied" };
        let said: Vec<_> =
            deeds::ARGUMENTS.iter().map(|(name, _, _, passes)| format!("{name}: {}", word(passes[index]))).collect();
        assert_eq!(ended.said(), said, "{profile}: {ended:?}");
    }
}

#[test]
fn calls_of_another_architecture_kill() {
    #[cfg(target_arch = "x86_64")]
    for (profile, died) in [("free", false), ("worker", true), ("control", true)] {
        let ended = run(profile, "call by the x32 numbers");
        assert_eq!(ended.killed_by(libc::SIGSYS), died, "{ended:?}");
    }
}

#[test]
fn a_panic_prints_its_message_and_aborts() {
    // With a filter, the message and the abort are those of a free process.
    for stage in ["free", "worker", "control", "worker with RUST_BACKTRACE", "control with RUST_BACKTRACE"] {
        let ended = run(stage, "panic");
        assert!(ended.killed_by(libc::SIGABRT), "{stage}: {ended:?}");
        assert!(ended.stderr.contains("panicked at") && ended.stderr.contains("on purpose"), "{stage}: {ended:?}");
    }
    // What the table and the preparations are for: without the signal's call, and with a backtrace, it is not.
    assert!(run("worker without tgkill", "panic").killed_by(libc::SIGSYS));
    let traced = run("worker unprepared with RUST_BACKTRACE", "panic");
    assert!(traced.killed_by(libc::SIGSYS) && traced.stderr.contains("on purpose"), "{traced:?}");
}

#[test]
fn a_stack_that_overflows_and_a_heap_that_is_damaged_are_still_told() {
    let told = [("overflow the stack", "has overflowed its stack"), ("free twice", "free(): double free detected")];
    for (deed, message) in told {
        if cfg!(not(target_env = "gnu")) && deed == "free twice" {
            continue;
        }
        for stage in ["free", "worker", "control"] {
            let ended = run(stage, deed);
            assert!(ended.killed_by(libc::SIGABRT) && ended.stderr.contains(message), "{deed}, {stage}: {ended:?}");
        }
    }
    let silent = run("worker without writev", "free twice");
    assert!(cfg!(not(target_env = "gnu")) || silent.killed_by(libc::SIGSYS), "{silent:?}");
}

#[test]
fn threads_made_before_keep_working_each_with_its_own_filter() {
    let said = [
        "spare: a socket, not being filtered yet",
        "workers: wrote, read, discarded, flushed, slept, grew, counted",
        "control: accepted, received a descriptor, answered, measured, made memory",
        "joined",
    ];
    for stage in ["threads", "threads before main"] {
        let ended = run(stage, "serve");
        assert_eq!((ended.said(), ended.status.code()), (said.to_vec(), Some(0)), "{stage}: {ended:?}");
    }
}

/// Each call whose absence the run above must not survive. The others of the table are for other machines and moments:
/// see their reasons.
#[test]
fn what_std_and_glibc_need_is_needed() {
    let needed = [
        "futex",
        "mmap",
        "munmap",
        "mremap",
        "madvise",
        "write",
        "close",
        "rt_sigprocmask",
        "sigaltstack",
        "exit",
        "exit_group",
        "clock_nanosleep",
    ];
    for name in needed {
        let ended = run(&format!("threads without {name}"), "serve");
        assert!(ended.killed_by(libc::SIGSYS), "{name}: {ended:?}");
    }
}

#[test]
fn an_allocator_that_shrinks_reads_no_file() {
    #[cfg(target_env = "gnu")]
    {
        for stage in ["free before main", "worker before main", "control before main"] {
            let ended = run(stage, "allocate in a thread");
            assert_eq!((ended.said(), ended.status.code()), (vec!["ok"], Some(0)), "{stage}: {ended:?}");
        }
        let unprepared = run("worker unprepared before main", "allocate in a thread");
        assert!(unprepared.killed_by(libc::SIGSYS), "{unprepared:?}");
    }
}

#[test]
fn a_filtered_thread_survives_that_its_process_is_stopped() {
    for (stage, survives) in
        [("free", true), ("worker", true), ("control", true), ("worker without restart_syscall", false)]
    {
        let child = start(stage, "wait a moment");
        child.await_state('S');
        child.signal(rustix::process::Signal::STOP);
        child.await_state('T');
        child.signal(rustix::process::Signal::CONT);
        let ended = child.end();
        let survived = ended.status.success() && ended.said() == ["waited"];
        assert_eq!((survived, ended.killed_by(libc::SIGSYS)), (survives, !survives), "{stage}: {ended:?}");
    }
}

/// Of `/proc/<pid>/status`: the capabilities of each set, no_new_privs, seccomp.
fn privileges_of(child: &Started) -> [u64; 7] {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
        .map(|name| u64::from_str_radix(&child.status_of(name), 16).unwrap())
        .into_iter()
        .chain(["NoNewPrivs", "Seccomp"].map(|name| child.status_of(name).parse().unwrap()))
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

fn core_limit_of(child: &Started) -> Vec<String> {
    let limits = child.read("limits");
    let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    line.split_whitespace().skip(4).take(2).map(str::to_owned).collect()
}

#[test]
fn no_privilege_is_left_and_none_can_be_gained() {
    let free = start("free", "wait for the end");
    let before = privileges_of(&free);
    assert_eq!(before[5], 0, "no_new_privs of a free process");
    assert_ne!(before[3], 0, "a free process has a bounding set");
    let privileged = before[2] >> 8 & 1 == 1;
    assert!(free.end().status.success());

    for (stage, seccomp) in [("process", before[6]), ("worker", 2), ("control", 2), ("control logs", 2)] {
        let child = start(stage, "wait for the end");
        let bounding = if privileged { 0 } else { before[3] };
        assert_eq!(privileges_of(&child), [0, 0, 0, bounding, 0, 1, seccomp], "{stage}");
        assert_eq!(core_limit_of(&child), ["1", "1"], "{stage}");
        assert!(child.end().status.success());
    }
}

/// It needs root to become somebody else.
#[test]
fn a_process_without_privileges_is_restricted_as_well() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let child = start("process as nobody", "wait for the end");
    let [inheritable, permitted, effective, bounding, ambient, no_new_privs, _] = privileges_of(&child);
    assert_eq!([inheritable, permitted, effective, ambient, no_new_privs], [0, 0, 0, 0, 1]);
    assert_ne!(bounding, 0, "only the privileged can drop it");
    let ended = child.end();
    assert!(ended.stderr.contains("privileges: in force (the bounding set stays"), "{ended:?}");
    let denied = errno(libc::EACCES);
    at_each_stage("open", &[("process as nobody", Some(denied.as_str())), ("worker as nobody", None)]);
}

#[test]
fn the_fence_can_still_look_into_the_process() {
    at_each_stage("tell whether it is dumpable", &[("free", Some("1")), ("process", Some("1"))]);
    let child = start("worker", "wait for the end");
    let path = format!("/proc/{}/fd/0", child.pid());
    std::fs::read_link(path).unwrap();
    assert!(child.end().status.success());
}

#[test]
fn the_report_is_a_line_for_the_log() {
    let known = landlock_version();
    let state = if known >= 10 { "in force" } else { "partially in force" };
    let ended = run("process", "nothing");
    let line = ended.stderr.lines().find(|line| line.contains("Landlock")).unwrap_or_else(|| panic!("{ended:?}"));
    assert!(line.starts_with("privileges: in force"), "{line}");
    assert!(line.contains("; core files: in force (suppressed); "), "{line}");
    assert!(line.contains(&format!("Landlock: {state} (version {}", known.min(10))), "{line}");
    assert!(line.ends_with(
        "; system calls: in force for each thread that has been set up (any other call kills the process by SIGSYS)"
    ));
}

#[test]
fn what_is_off_is_left_as_it_was() {
    let free = start("free", "wait for the end");
    let before = (privileges_of(&free), core_limit_of(&free));
    assert_ne!(before.1, ["1", "1"]);
    let child = start("worker off", "wait for the end");
    assert_eq!((privileges_of(&child), core_limit_of(&child)), before);
    assert!(free.end().status.success());
    let ended = child.end();
    let line = "privileges: off; core files: off; Landlock: off; system calls: off";
    assert!(ended.status.success() && ended.stderr.lines().any(|it| it == line), "{ended:?}");
    at_each_stage("open", &[("worker off", Some("ok"))]);
}

#[test]
fn a_filter_that_only_logs_lets_everything_pass() {
    at_each_stage("socket", &[("worker logs", Some("ok")), ("control logs", Some("ok"))]);
}

#[test]
fn a_missing_layer_is_told_and_is_an_error_if_it_is_required() {
    let without = run("process on a kernel without Landlock", "open");
    assert_eq!(without.said(), ["ok"], "the layer is really not there: {without:?}");
    assert!(without.stderr.contains("Landlock: not available (the kernel has no Landlock)"), "{without:?}");

    let required = run("process on a kernel without Landlock, required", "open");
    assert_eq!((required.status.code(), required.said()), (Some(child::NOT_RESTRICTED), vec![]), "{required:?}");
    assert!(
        required.stderr.contains("its layer \"Landlock\" is not available: the kernel has no Landlock"),
        "{required:?}"
    );

    // And not if it is there.
    let denied = errno(libc::EACCES);
    at_each_stage("open", &[("process, required", Some(denied.as_str()))]);
}

#[test]
fn a_process_with_another_thread_is_refused() {
    let ended = run("process beside a thread", "open");
    assert_eq!((ended.status.code(), ended.said()), (Some(child::NOT_RESTRICTED), vec![]), "{ended:?}");
    assert!(ended.stderr.contains("the sandbox found 2 threads, expected to be entered by the only one"), "{ended:?}");
}

#[test]
fn the_words_for_what_landlock_lacks_follow_its_versions() {
    assert_eq!(layers::uncovered(ABI::V10), [""; 0]);
    assert_eq!(layers::uncovered(ABI::V9), ["UDP"]);
    assert_eq!(layers::uncovered(ABI::V5), ["abstract sockets and signals", "named sockets", "UDP"]);
    assert_eq!(layers::uncovered(ABI::V1).len(), 6);
}

/// The child is seen to end as its deed did, whatever that was.
#[test]
fn the_tests_see_how_a_child_ends() {
    let fine: Ended = run("free", "nothing");
    assert!(fine.status.success() && fine.said() == ["ok"], "{fine:?}");
    assert_eq!(run("free", "no such deed").status.code(), Some(child::TEST_FAILED));
    assert_eq!(run("free", "be killed").status.signal(), Some(libc::SIGKILL));
}
