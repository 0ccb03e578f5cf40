//! What one side does wrong costs that side, not the broker and not what else runs on the machine.

mod support;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::{Broker, Disk, Ended, Scratch, Vmm, storage_daemon, warmswap};
use warmswap_wire::{FdSlot, Reply, Request, VringFd};

fn noted(scratch: &Scratch) -> String {
    std::fs::read_to_string(scratch.path("journal")).expect("a journal")
}

#[test]
fn a_standard_error_that_cannot_be_written_ends_nothing() {
    let scratch = Scratch::new("full-stderr");
    let full = std::fs::File::options().write(true).open("/dev/full").expect("everybody has one");
    let mut broker = Broker::start_with(&scratch, &[], &storage_daemon(&scratch.image()), |it| {
        it.stderr(full);
    });
    broker.assert_serves();
    drop(broker);
    // Not even the thread that could not print has ended.
    assert!(noted(&scratch).contains("FailoverSettled"), "{}", noted(&scratch));

    let scratch = Scratch::new("closed-stderr");
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    let mut broker = Broker::start_with(&scratch, &[], &storage_daemon(&scratch.image()), |it| {
        it.stderr(writer);
    });
    drop(reader);
    broker.assert_serves();
    drop(broker);
    assert!(noted(&scratch).contains("FailoverSettled"), "{}", noted(&scratch));
}

#[test]
fn a_blocking_eventfd_that_is_full_stops_nobody() {
    let scratch = Scratch::new("full-call");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = Disk::new();
    disk.call = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd that blocks");
    rustix::io::write(&disk.call, &(u64::MAX - 1).to_ne_bytes()).expect("it has room");
    // The backend may well be stopped by it.
    let _harmed = vmm.start(&disk);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(broker.status()["name"], "disk", "the control thread answers");
    drop((vmm, disk));
    broker.assert_serves();
}

#[test]
fn a_pipe_is_refused_where_an_eventfd_belongs() {
    let scratch = Scratch::new("pipe-call");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let mut vmm = Vmm::connect(&broker.socket);
    let (_reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    let call = Request::SetVringCall(VringFd { index: 0, fd: Some(FdSlot(0)) });
    // Without protocol features there are no acknowledgements yet; the record can always be asked.
    let Ok(Reply::U64(protocol)) = vmm.ask(&Request::GetProtocolFeatures, &[]) else { panic!("protocol features") };
    assert!(vmm.tell(&Request::SetProtocolFeatures(protocol), &[], false));
    assert_eq!(vmm.ask(&call, &[writer.as_fd()]).expect("an answer"), Reply::U64(1), "refused");
    assert_eq!(vmm.ask(&call, &[vmm.stream.try_clone().expect("a copy").as_fd()]).expect("an answer"), Reply::U64(1));
    vmm.start(&Disk::new()).map_err(|ended: Ended| format!("{ended:?}")).expect("the connection goes on");
    drop(vmm);
    broker.assert_serves();
}

#[test]
fn a_file_at_the_place_of_the_socket_is_refused_and_left_alone() {
    let scratch = Scratch::new("precious");
    let (precious, started) = (scratch.path("vmm.sock"), scratch.path("started"));
    std::fs::write(&precious, "data").expect("a file");
    let [socket, control] = [&precious, &scratch.0].map(|path| path.to_str().expect("plain text").to_owned());
    let script = format!("touch {} # {{socket}}", started.display());
    let args = ["guard", "--name", "disk", "--socket", &socket, "--control", &control, "--", "/bin/sh", "-c", &script];
    let output = warmswap(&args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(matches!(output.status.code(), Some(1 | 2)) && said.contains("not a socket"), "{said}");
    assert_eq!(std::fs::read(&precious).expect("it is still there"), b"data");
    assert!(!started.exists(), "nothing was started");
}

#[test]
fn a_socket_of_another_broker_is_not_removed_at_the_end() {
    let scratch = Scratch::new("taken-over");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    std::fs::remove_file(&broker.socket).expect("it is there");
    let _other = std::os::unix::net::UnixListener::bind(&broker.socket).expect("the path is free");
    broker.signal(rustix::process::Signal::TERM);
    assert!(broker.wait().success());
    assert!(broker.socket.exists(), "somebody else listens there");
}

#[test]
fn a_device_that_cannot_start_leaves_a_stale_socket_alone() {
    let scratch = Scratch::new("stale");
    let socket = scratch.path("vmm.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("a socket"));
    let [place, control] = [&socket, &scratch.0].map(|path| path.to_str().expect("plain text").to_owned());
    let args = ["guard", "--name", "disk", "--socket", &place, "--control", &control, "--", "/bin/false", "{socket}"];
    assert_eq!(warmswap(&args).status.code(), Some(1));
    assert!(socket.exists(), "this broker never listened there");
}

/// Ticks of processor time that a process has used so far. A second has a hundred.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
    fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}

#[test]
fn a_broker_without_descriptors_left_does_not_spin_and_accepts_when_it_has_some() {
    let scratch = Scratch::new("no-descriptors");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let pid = rustix::process::Pid::from_child(&broker.child);
    let resource = rustix::process::Resource::Nofile;
    let before = rustix::process::getrlimit(resource);
    let none = rustix::process::Rlimit { current: Some(3), ..before };
    rustix::process::prlimit(Some(pid), resource, none).expect("our own child");
    let vmm = Vmm::connect(&broker.socket);
    let used = ticks(broker.child.id());
    std::thread::sleep(Duration::from_secs(1));
    let used = ticks(broker.child.id()) - used;
    assert!(used < 30, "{used} ticks in a second");
    rustix::process::prlimit(Some(pid), resource, before).expect("our own child");
    drop(vmm);
    assert!(noted(&scratch).contains("it cannot be accepted"), "{}", noted(&scratch));
    broker.assert_serves();
}

#[test]
fn a_dead_backend_that_a_tracer_keeps_from_being_collected_costs_no_time() {
    let scratch = Scratch::new("traced");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 1);
    broker.wait_for_state("protected");
    let primary = broker.status()["primary"]["pid"].as_u64().expect("a process") as i32;
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: a plain call without pointers.
    if unsafe { libc::ptrace(libc::PTRACE_SEIZE, primary, nothing, nothing) } != 0 {
        eprintln!("not tested: this system lets nobody trace");
        return;
    }
    // SAFETY: as above. Nobody else has this process id: its exit is not collected.
    assert_eq!(unsafe { libc::kill(primary, libc::SIGKILL) }, 0);
    std::thread::sleep(Duration::from_millis(300));
    let used = ticks(broker.child.id());
    std::thread::sleep(Duration::from_secs(1));
    let used = ticks(broker.child.id()) - used;
    assert!(used < 30, "{used} ticks in a second");
    // SAFETY: as above; the status is not asked for.
    unsafe { libc::waitpid(primary, std::ptr::null_mut(), libc::__WALL) };
    assert_eq!(disk.read(&mut vmm, 1), vec![1; 512], "the shadow serves once the end is proved");
    drop(vmm);
    broker.assert_serves();
}

/// Processes that have this parent and wait to be collected.
fn zombies(parent: u32) -> usize {
    let processes = std::fs::read_dir("/proc").expect("everybody has one").flatten();
    let stats = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let starts = format!("Z {parent} ");
    stats.filter(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(&starts))).count()
}

/// A shell script that runs the backend, with something before and after it.
fn wrapped(before: &str, backend: Vec<String>, after: &str) -> Vec<String> {
    let script = format!("{before}\n\"$0\" \"$@\"\n{after}");
    ["/bin/sh".to_owned(), "-c".to_owned(), script].into_iter().chain(backend).collect()
}

#[test]
fn orphans_of_backends_are_collected_and_what_is_known_is_left_to_its_owner() {
    let scratch = Scratch::new("orphans");
    let backend = wrapped("for i in 1 2 3; do ( (sleep 0.1) & ); done", storage_daemon(&scratch.image()), "");
    // A command whose exit the broker itself must see.
    let options = ["--quiet", "--fence-command", "sleep 0.1; exit 0"];
    let mut broker = Broker::start_with(&scratch, &options, &backend, |_| {});
    for _ in 0..2 {
        broker.wait_for_state("protected");
        broker.assert_serves();
    }
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 1);
    broker.wait_for_state("protected");
    let primary = broker.status()["primary"]["pid"].as_i64().expect("a process") as i32;
    let primary = rustix::process::Pid::from_raw(primary).expect("a process");
    rustix::process::kill_process(primary, rustix::process::Signal::KILL).expect("it lives");
    assert_eq!(disk.read(&mut vmm, 1), vec![1; 512]);
    let proved = || noted(&scratch).contains("the operator's fence command succeeded");
    support::wait_for("the exit of the fence command", proved);
    support::wait_for("the last orphan", || zombies(broker.child.id()) == 0);
}

/// Processes whose command line names this.
fn running(words: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("everybody has one").flatten();
    let lines = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| line.contains(words)).collect()
}

#[test]
fn what_a_killed_broker_left_running_ends_before_the_next_one_starts_anything() {
    let scratch = Scratch::new("left-behind");
    // A shell between the broker and the daemon: only the shell dies with the broker.
    let backend = wrapped("", storage_daemon(&scratch.image()), ":");
    // A name of its own: what is left of a device is ended by the next broker of its name, be it another test's.
    let own = ["--name", "left-behind"];
    let mut broker = Broker::start(&scratch, &own, &backend);
    broker.wait_for_state("protected");
    let sockets = format!("{}.{}/", scratch.path("left-behind").display(), broker.child.id());
    let primary = broker.status()["primary"]["pid"].as_u64().expect("a process");
    let group = std::fs::read_to_string(format!("/proc/{primary}/cgroup")).expect("it lives");
    broker.child.kill().and_then(|()| broker.child.wait()).expect("our own child");
    std::thread::sleep(Duration::from_millis(200));
    let left = running(&sockets);
    let mut broker = Broker::start(&scratch, &own, &backend);
    if left.is_empty() || !group.contains("warmswap.left-behind") {
        eprintln!("not tested: nothing lived on, or there are no control groups");
        return;
    }
    assert!(noted(&scratch).contains("LeftoversKilled"), "{}", noted(&scratch));
    assert!(running(&sockets).is_empty(), "{left:?}");
    broker.assert_serves();
}

#[test]
fn a_flood_of_requests_is_read_to_its_end_and_keeps_nobody_waiting() {
    let scratch = Scratch::new("flood");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let mut vmm = Vmm::connect(&broker.socket);
    let mut bytes = Vec::new();
    Request::SetOwner.encode(warmswap_wire::HeaderFlags::empty(), &mut bytes, &mut Vec::new());
    // Sent in one piece: the event queue tells once that something came.
    let many = bytes.repeat(5_000);
    assert!(vmm.send(&many, &[]));
    assert!(vmm.ask(&Request::GetFeatures, &[]).is_ok(), "what comes after the flood is answered");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut taken = true;
            while taken && !stop.load(Ordering::Relaxed) {
                taken = vmm.send(&many, &[]);
            }
        });
        std::thread::sleep(Duration::from_millis(300));
        let began = Instant::now();
        assert_eq!(broker.status()["name"], "disk");
        assert!(began.elapsed() < Duration::from_secs(2), "an answer took {:?}", began.elapsed());
        stop.store(true, Ordering::Relaxed);
    });
    drop(vmm);
    broker.assert_serves();
}

#[test]
fn a_backend_that_prints_without_end_keeps_nobody_waiting() {
    let scratch = Scratch::new("printing");
    let backend = wrapped("( sleep 0.3; exec yes '' >&2 ) &", storage_daemon(&scratch.image()), "");
    let mut broker = Broker::start(&scratch, &[], &backend);
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    assert_eq!(broker.status()["name"], "disk");
    assert!(began.elapsed() < Duration::from_secs(2), "an answer took {:?}", began.elapsed());
    broker.assert_serves();
}
