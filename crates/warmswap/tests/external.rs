//! Backends that somebody else started, storage that outlives its backend, and images that are guarded already.

mod support;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal};
use support::{Broker, PATIENCE, Scratch, Vmm, storage_daemon, wait_for};

/// A process of the test's own. Killed on drop.
struct Running(Child);

impl Running {
    fn start(command: &[String]) -> Self {
        let mut process = Command::new(&command[0]);
        process.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Running(process.spawn().unwrap_or_else(|error| panic!("{}: {error}", command[0])))
    }

    /// A storage daemon, once it listens.
    fn daemon(image: &Path, socket: &Path, more: &[&str]) -> Self {
        let mut command: Vec<String> =
            storage_daemon(image).iter().map(|word| word.replace("{socket}", text(socket))).collect();
        command.extend(more.iter().map(|word| (*word).to_owned()));
        let daemon = Running::start(&command);
        wait_for("the daemon's socket", || socket.exists());
        daemon
    }

    fn kill(&mut self) {
        self.0.kill().expect("our own child");
        self.0.wait().expect("our own child");
    }

    fn is_alive(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("plain text")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A guard that is expected to end by itself.
fn refused(scratch: &Scratch, name: &str, args: &[&str]) -> String {
    let (socket, control) = (scratch.path(&format!("{name}-vmm")), text(&scratch.0).to_owned());
    let first = ["guard", "--name", name, "--quiet", "--socket", text(&socket), "--control", &control];
    // One that is not refused would serve for ever.
    let mut guard = Command::new("timeout");
    guard.arg("30").arg(env!("CARGO_BIN_EXE_warmswap")).args(first).args(args).stdin(Stdio::null());
    let output = guard.output().expect("the program starts");
    assert!(matches!(output.status.code(), Some(1 | 2)), "{output:?}");
    said(&output)
}

fn sockets(scratch: &Scratch) -> [PathBuf; 2] {
    [scratch.path("one.qsd"), scratch.path("two.qsd")]
}

#[test]
fn backends_that_somebody_else_started_fail_over_like_any_other() {
    let scratch = Scratch::new("external");
    let image = scratch.image();
    let [one, two] = sockets(&scratch);
    let monitor = format!("socket,id=monitor,path={},server=on,wait=off", text(&scratch.path("monitor")));
    let primary = Running::daemon(&image, &one, &["--chardev", &monitor, "--monitor", "chardev=monitor"]);
    let shadow = Running::daemon(&image, &two, &[]);
    // A client of the backend's own monitor is no storage.
    let _client = std::os::unix::net::UnixStream::connect(scratch.path("monitor")).expect("the monitor listens");
    let options = ["--primary-socket", text(&one), "--shadow-socket", text(&two)];
    let mut broker = Broker::start(&scratch, &options, &[]);
    broker.wait_for_state("protected");
    let status = broker.status();
    assert_eq!(status["primary"]["pid"], primary.0.id(), "{status}");
    assert_eq!(status["shadow"]["pid"], shadow.0.id(), "{status}");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 5, 0x5a);
    // Whichever was ready for the guest first serves it.
    let is_first = broker.status()["primary"]["pid"] == primary.0.id();
    let (mut victim, heir, place) = if is_first { (primary, shadow, &one) } else { (shadow, primary, &two) };
    victim.kill();
    assert_eq!(disk.read(&mut vmm, 5), vec![0x5a; 512]);
    let mut status = broker.status();
    wait_for("the report", || {
        status = broker.status();
        status["last_failover"]["result"] == "settled"
    });
    assert_eq!(status["primary"]["pid"], heir.0.id(), "{status}");
    let evidence = status["last_failover"]["evidence"].as_str().unwrap_or_default().to_owned();
    assert!(evidence.contains("its 1 storage descriptions closed"), "{evidence}");
    // Its supervisor starts it again, at the same socket.
    let _stale = std::fs::remove_file(place);
    let _again = Running::daemon(&image, place, &[]);
    broker.wait_for_state("protected");
    assert_eq!(disk.read(&mut vmm, 5), vec![0x5a; 512]);
}

#[test]
fn one_process_is_never_both_backends_of_a_pair() {
    let scratch = Scratch::new("external-same");
    let image = scratch.image();
    let [one, two] = sockets(&scratch);
    let same = refused(&scratch, "same", &["--primary-socket", text(&one), "--shadow-socket", text(&one)]);
    assert!(same.contains("the same socket"), "{same}");
    let disk = format!("driver=file,node-name=more,filename={},locking=on", text(&image));
    let export =
        format!("type=vhost-user-blk,id=more,node-name=more,addr.type=unix,addr.path={},writable=on", text(&two));
    let mut both = Running::daemon(&image, &one, &["--blockdev", &disk, "--export", &export]);
    let journal = scratch.path("journal");
    let options = ["--primary-socket", text(&one), "--shadow-socket", text(&two)];
    let mut broker = Broker::start(&scratch, &options, &[]);
    let pid = both.0.id().to_string();
    wait_for("the refusal", || {
        let noted = std::fs::read_to_string(&journal).unwrap_or_default();
        noted.lines().any(|line| line.contains(&pid) && line.contains("must be two processes"))
    });
    broker.assert_alive();
    assert!(both.is_alive(), "it serves the guest, and was not killed for the shadow's sake");
    assert_eq!(broker.status()["primary"]["pid"], both.0.id());
}

#[test]
fn our_ancestors_are_never_backends() {
    let scratch = Scratch::new("external-ancestor");
    let socket = scratch.path("listener");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let said = refused(&scratch, "ancestor", &["--primary-socket", text(&socket)]);
    assert!(said.contains("which warmswap descends from") && said.contains(&std::process::id().to_string()), "{said}");
}

#[test]
fn a_second_guard_on_an_image_is_refused_and_harms_nobody() {
    let scratch = Scratch::new("rival");
    let image = scratch.image();
    let [one, two] = sockets(&scratch);
    let (mut primary, mut shadow) = (Running::daemon(&image, &one, &[]), Running::daemon(&image, &two, &[]));
    let options = ["--primary-socket", text(&one), "--shadow-socket", text(&two)];
    let mut broker = Broker::start(&scratch, &options, &[]);
    broker.wait_for_state("protected");
    let guard = broker.child.id();
    let command = storage_daemon(&image);
    let command: Vec<&str> = std::iter::once("--").chain(command.iter().map(String::as_str)).collect();
    let words = format!("guarded by another warmswap, pid {guard}");
    let refusal = refused(&scratch, "second", &command);
    assert!(refusal.contains(&words), "{refusal}");
    let refusal = refused(&scratch, "third", &options);
    assert!(refusal.contains(&words), "{refusal}");
    assert!(primary.is_alive() && shadow.is_alive(), "backends of the other guard are not killed");
    broker.wait_for_state("protected");
    // The claim goes with the guard, also when its backends live on.
    broker.child.kill().expect("our own child");
    broker.child.wait().expect("our own child");
    drop(broker);
    let mut next = Broker::start(&scratch, &options, &[]);
    next.wait_for_state("protected");
}

#[test]
fn storage_behind_a_server_of_somebody_elses_is_refused() {
    let scratch = Scratch::new("nbd");
    let (image, socket) = (scratch.image(), scratch.path("nbd"));
    let program = "/usr/bin/qemu-nbd";
    assert!(Path::new(program).exists(), "{program} is not installed: run `cargo xtask setup`");
    let server = [program, "-t", "-e", "8", "-f", "raw", "-k", text(&socket), text(&image)];
    let _server = Running::start(&server.map(str::to_owned));
    wait_for("the server's socket", || socket.exists());
    let mut command = storage_daemon(&image);
    command[2] = format!("driver=nbd,node-name=disk,server.type=unix,server.path={}", text(&socket));
    let command: Vec<&str> = std::iter::once("--").chain(command.iter().map(String::as_str)).collect();
    let refusal = refused(&scratch, "nbd", &command);
    assert!(refusal.contains("connected to the server at") && refusal.contains(text(&socket)), "{refusal}");
}

/// The same until the first backend serves: whichever is ready for the guest first does.
#[test]
fn a_description_that_another_process_holds_is_named_with_its_holder() {
    let served = (0..20).any(|attempt| holder_is_named(&Scratch::new(&format!("holder-{attempt}"))));
    assert!(served, "the other backend was ready first, twenty times");
}

/// Says whether the backend whose description somebody else holds was the one that served, and so was killed.
fn holder_is_named(scratch: &Scratch) -> bool {
    let image = scratch.image();
    let [one, two] = sockets(scratch);
    // Both inherit one description of a file, as children of one shell would.
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(scratch.path("shared"));
    let file = file.expect("a file");
    let mut command = Command::new("sleep");
    command.arg("600").stdin(file.try_clone().expect("a copy")).stdout(Stdio::null());
    let mut holder = Running(command.spawn().expect("it starts"));
    drop(command);
    let words: Vec<String> = storage_daemon(&image).iter().map(|word| word.replace("{socket}", text(&one))).collect();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).arg0("daemon").stdin(file).stdout(Stdio::null()).stderr(Stdio::null());
    let mut primary = Running(command.spawn().expect("it starts"));
    drop(command);
    wait_for("the daemon's socket", || one.exists());
    let _shadow = Running::daemon(&image, &two, &[]);
    let mut broker = Broker::start(scratch, &["--primary-socket", text(&one), "--shadow-socket", text(&two)], &[]);
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 1);
    if broker.status()["primary"]["pid"] != primary.0.id() {
        return false;
    }
    primary.kill();
    let until = Instant::now() + PATIENCE;
    let pid = holder.0.id();
    loop {
        let noted = std::fs::read_to_string(scratch.path("journal")).unwrap_or_default();
        if noted.lines().any(|line| line.contains("FenceWaiting") && line.contains(&format!("process {pid} (sleep)"))) {
            break;
        }
        assert!(Instant::now() < until, "{noted}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    holder.kill();
    // Now it is proved.
    assert_eq!(disk.read(&mut vmm, 1), vec![1; 512]);
    true
}

#[test]
fn a_backend_behind_a_wrapper_is_killed_and_proved_as_a_whole() {
    let scratch = Scratch::new("wrapper");
    let image = scratch.image();
    let daemon = storage_daemon(&image).join(" ");
    let wrapper = ["sh".to_owned(), "-c".to_owned(), format!("{daemon}; true")];
    let mut broker = Broker::start(&scratch, &[], &wrapper);
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 2, 7);
    let pid = broker.status()["primary"]["pid"].as_i64().expect("a process");
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("not zero");
    rustix::process::kill_process(pid, Signal::KILL).expect("it lives");
    assert_eq!(disk.read(&mut vmm, 2), vec![7; 512]);
    let mut evidence = String::new();
    wait_for("the report", || {
        evidence = broker.status()["last_failover"]["evidence"].as_str().unwrap_or_default().to_owned();
        !evidence.is_empty()
    });
    assert!(evidence.contains("its 1 storage descriptions closed"), "{evidence}");
}
