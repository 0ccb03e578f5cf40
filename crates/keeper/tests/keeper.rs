//! A keeper as a process, with a command that is killed, ends, or cannot be executed any more.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Longer than anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);
const PROBE: &str = env!("CARGO_BIN_EXE_warmswap-keeper-probe");

/// A keeper under test, and the place where its command connects.
struct Rig {
    dir: PathBuf,
    listener: UnixListener,
    keeper: Child,
}

/// One life of the command.
struct Life {
    orders: UnixStream,
    answers: BufReader<UnixStream>,
    pid: i32,
}

impl Rig {
    fn new() -> Self {
        Rig::with("1000", PROBE)
    }

    fn with(max: &str, program: &str) -> Self {
        Rig::start(max, |socket| vec![program.to_owned(), "command".to_owned(), socket.to_owned()])
    }

    fn start(max: &str, command: impl FnOnce(&str) -> Vec<String>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ws-keeper-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        let socket = dir.join("orders");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let keeper = Command::new(PROBE)
            .args(["keeper", max])
            .arg(&dir)
            .args(command(socket.to_str().expect("plain text")))
            .stdin(Stdio::null())
            .stderr(File::create(dir.join("said")).expect("a file"))
            .spawn()
            .expect("it starts");
        Rig { dir, listener, keeper }
    }

    /// The next life of the command.
    fn life(&self) -> Life {
        rustix::io::ioctl_fionbio(&self.listener, true).expect("it can be set");
        let orders = wait_for("the command to connect", || self.listener.accept().ok()).0;
        orders.set_nonblocking(false).expect("it can be set");
        orders.set_read_timeout(Some(PATIENCE)).expect("it can be set");
        let answers = BufReader::new(orders.try_clone().expect("a descriptor"));
        let mut life = Life { orders, answers, pid: 0 };
        life.pid = life.ask("pid").parse().expect("a number");
        life
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.dir.join("said")).expect("it can be read")
    }

    /// Waits until the keeper has said this.
    fn wait_said(&self, words: &str) {
        wait_for(words, || self.said().contains(words).then_some(()));
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.keeper)
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("it lives");
    }

    /// Waits for the end of the keeper.
    fn end(&mut self) -> ExitStatus {
        wait_for("the keeper to end", || self.keeper.try_wait().expect("it is ours"))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Most tests leave it running: it ends, and its command notices the end of its socket.
        let _ended = self.keeper.kill();
        let _reaped = self.keeper.wait();
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

impl Life {
    fn try_ask(&mut self, order: &str) -> Option<String> {
        writeln!(self.orders, "{order}").ok()?;
        let mut line = String::new();
        let count = self.answers.read_line(&mut line).ok()?;
        (count > 0).then(|| line.trim_end().to_owned())
    }

    #[track_caller]
    fn ask(&mut self, order: &str) -> String {
        self.try_ask(order).unwrap_or_else(|| panic!("the command died of: {order}"))
    }

    /// Waits for the end of this life, which is that of its socket.
    fn wait_end(&mut self) {
        let mut rest = Vec::new();
        // With an end or with a reset.
        let _ended = self.answers.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }

    fn kill(&mut self) {
        let pid = Pid::from_raw(self.pid).expect("a process");
        rustix::process::kill_process(pid, Signal::KILL).expect("it lives");
    }

    fn exit(&mut self, status: u8) {
        assert_eq!(self.try_ask(&format!("exit {status}")), None);
    }
}

#[track_caller]
fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lives(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[test]
fn a_command_that_was_killed_finds_the_very_same_descriptors_by_name() {
    let rig = Rig::new();
    let mut life = rig.life();
    assert_eq!(life.ask("count"), "0");
    // Nothing but the three ordinary ones is handed over.
    assert_eq!(life.ask("numbers"), "3");
    let event = life.ask("eventfd 41");
    let memory = life.ask("memfd what was written");
    let peer_path = rig.dir.join("peer");
    let peer = UnixListener::bind(&peer_path).expect("a socket");
    let stream = life.ask(&format!("connect {}", peer_path.display()));
    let (mut peer, _) = peer.accept().expect("it is connected");
    life.kill();

    for _ in 0..3 {
        let mut life = rig.life();
        assert_eq!(life.ask("count"), "3");
        assert_eq!(life.ask("numbers"), "6");
        assert_eq!(life.ask(&format!("eventfd? {event}")), "41");
        assert_eq!(life.ask(&format!("memfd? {memory}")), "what was written");
        assert_eq!(life.ask(&format!("say {stream} hello")), "done");
        let mut heard = [0; 5];
        peer.read_exact(&mut heard).expect("the connection stands");
        assert_eq!(&heard, b"hello");
        for name in [&event, &memory, &stream] {
            assert_eq!(life.ask(&format!("adopt {name}")), *name);
        }
        life.kill();
    }
}

#[test]
fn what_was_sent_in_the_last_moment_is_there_and_what_was_let_go_is_not() {
    let rig = Rig::new();
    let mut kept = Vec::new();
    for round in 0..50_u32 {
        let mut life = rig.life();
        assert_eq!(life.ask("count"), kept.len().to_string());
        for name in &kept {
            assert_eq!(life.ask(&format!("adopt {name}")), *name);
        }
        kept.push(life.ask(&format!("eventfd {round}")));
        if round % 3 == 2 {
            let gone = kept.remove(0);
            assert_eq!(life.ask(&format!("let-go {gone}")), "done");
        }
        // Nothing comes between the answer and the end: what was sent lies in the keeper's queue.
        // Restarts that are asked for are never delayed.
        if round % 10 == 9 { life.kill() } else { life.exit(75) }
    }
}

#[test]
fn twenty_thousand_descriptors_are_handed_over_and_found() {
    // Where the limit of descriptors is lower and may not be raised: as many as it allows.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let count = 20_000.min(usize::try_from(limit).expect("a number") - 300);
    let mut rig = Rig::with(&count.to_string(), PROBE);
    let mut life = rig.life();
    assert_eq!(life.ask("max"), format!("Some({count})"));
    assert_eq!(life.ask(&format!("many {count}")), "done");
    assert_eq!(life.ask("barrier"), "done");
    // One more is refused here, and what the keeper is sent all the same is refused there.
    assert!(life.ask("eventfd 1").contains("full"));
    assert_eq!(life.ask("raw 1 FDSTORE=1\\nFDNAME=more"), "done");
    life.kill();
    let mut life = rig.life();
    rig.wait_said("as many descriptors are held as may be");
    assert_eq!(life.ask("count"), count.to_string());
    assert_eq!(life.ask("many?"), count.to_string());
    // From the middle: others take its number, and every name keeps its descriptor.
    for name in ["0", "5k", "fj"] {
        assert_eq!(life.ask(&format!("discard {name}")), "done");
    }
    life.exit(75);
    let mut life = rig.life();
    assert_eq!(life.ask("count"), (count - 3).to_string());
    assert_eq!(life.ask("many?"), (count - 3).to_string());
    life.exit(0);
    assert!(rig.end().success());
    assert!(rig.said().contains("allocated 0 times"), "{}", rig.said());
}

#[test]
fn nothing_is_allocated_after_the_start_whatever_happens() {
    let mut rig = Rig::with("4", PROBE);
    for ending in ["kill", "3", "75", "kill", "kill", "kill", "kill"] {
        let mut life = rig.life();
        for order in [
            "eventfd 1",
            "eventfd 2",
            "raw 2 FDSTORE=1\\nFDNAME=many",
            "raw 4 FDSTORE=1\\nFDNAME=many",
            "raw 0 FDSTOREREMOVE=1\\nFDNAME=many",
            "raw 3 nonsense\\0\\n",
            "raw 1 BARRIER=1\\nREADY=1",
            "barrier",
            "ready",
            "child-raw",
            "orphan",
        ] {
            let answer = life.ask(order);
            if order == "orphan" {
                let pid = Pid::from_raw(answer.parse().expect("a number")).expect("a process");
                rustix::process::kill_process(pid, Signal::KILL).expect("it lives");
            }
        }
        match ending {
            "kill" => life.kill(),
            status => life.exit(status.parse().expect("a status")),
        }
    }
    rig.signal(Signal::HUP);
    // It died early several times, and is started with a delay now.
    rig.life().exit(0);
    assert_eq!(rig.end().code(), Some(0));
    assert!(rig.said().contains("allocated 0 times"), "{}", rig.said());
}

#[test]
fn an_orphan_is_reaped_as_soon_as_it_ends() {
    let rig = Rig::new();
    let mut life = rig.life();
    let orphan = life.ask("orphan");
    let pid = Pid::from_raw(orphan.parse().expect("a number")).expect("a process");
    // The keeper is its parent now, and not whoever adopts orphans otherwise.
    let parent = |line: &str| line.strip_prefix("PPid:").map(|parent| parent.trim().to_owned());
    let adopted = || {
        let status = std::fs::read_to_string(format!("/proc/{orphan}/status")).expect("it lives");
        let parent = status.lines().find_map(parent).expect("it is there");
        (parent == rig.keeper.id().to_string()).then_some(())
    };
    wait_for("the keeper to adopt it", adopted);
    rustix::process::kill_process(pid, Signal::KILL).expect("it lives");
    wait_for("the orphan to be reaped", || (!lives(&orphan)).then_some(()));
    assert_eq!(life.ask("count"), "0");
}

#[test]
fn a_command_that_ends_with_0_ends_the_keeper() {
    let mut rig = Rig::new();
    let mut life = rig.life();
    let path = life.ask("path");
    assert!(Path::new(&path).exists());
    life.exit(0);
    assert_eq!(rig.end().code(), Some(0));
    assert!(!Path::new(&path).exists(), "the socket is left behind");
}

#[test]
fn a_command_that_asks_for_it_is_started_again_and_never_delayed() {
    let mut rig = Rig::new();
    for _ in 0..30 {
        rig.life().exit(75);
    }
    rig.life().exit(0);
    assert_eq!(rig.end().code(), Some(0));
    assert_eq!(rig.said().matches("asked to be started again").count(), 30, "{}", rig.said());
}

#[test]
fn signals_are_passed_on_and_every_end_is_the_last_after_one_to_end() {
    let mut rig = Rig::new();
    let mut life = rig.life();
    // Only a reload, but this command dies of it: it is started again.
    rig.signal(Signal::HUP);
    life.wait_end();
    let mut life = rig.life();
    rig.signal(Signal::TERM);
    life.wait_end();
    assert_eq!(rig.end().code(), Some(128 + 15));
    assert!(rig.said().contains("was ended by signal 1 "), "{}", rig.said());
}

#[test]
fn a_program_that_cannot_be_executed_any_more_is_tried_until_it_can_be() {
    let program = std::env::temp_dir().join(format!("ws-keeper-program-{}", std::process::id()));
    std::fs::copy(PROBE, &program).expect("a copy");
    let rig = Rig::with("100", program.to_str().expect("plain text"));
    let mut life = rig.life();
    let name = life.ask("eventfd 7");
    // As a package manager does it: another file in the same place.
    let replace = |bytes: &[u8]| {
        let new = program.with_extension("new");
        std::fs::write(&new, bytes).expect("a file");
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
        std::fs::rename(&new, &program).expect("it can be replaced");
    };
    replace(b"\x7fELF and nothing that a kernel understands");
    life.exit(75);
    rig.wait_said("cannot execute");
    rig.wait_said("it is no program");
    std::fs::remove_file(&program).expect("it is there");
    rig.wait_said("it does not exist");
    replace(&std::fs::read(PROBE).expect("the probe"));
    let mut life = rig.life();
    assert_eq!(life.ask(&format!("eventfd? {name}")), "7");
    std::fs::remove_file(&program).expect("it is there");
}

#[test]
fn a_program_that_never_could_be_executed_is_an_error() {
    let file = std::env::temp_dir().join(format!("ws-keeper-no-program-{}", std::process::id()));
    std::fs::write(&file, "no program").expect("a file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    let mut rig = Rig::with("100", file.to_str().expect("plain text"));
    assert_eq!(rig.end().code(), Some(1));
    assert!(rig.said().contains("it is no program"), "{}", rig.said());
    std::fs::remove_file(&file).expect("it is there");
    let mut rig = Rig::with("100", "no-such-program-anywhere");
    assert_eq!(rig.end().code(), Some(1));
    assert!(rig.said().contains("no-such-program-anywhere in PATH"), "{}", rig.said());
}

#[test]
fn a_full_table_refuses_and_loses_nothing() {
    let rig = Rig::with("3", PROBE);
    let mut life = rig.life();
    let names = ["1", "2", "3"].map(|count| life.ask(&format!("eventfd {count}")));
    assert!(life.ask("eventfd 4").starts_with("error the descriptor store is full"));
    assert_eq!(life.ask("raw 200 FDSTORE=1\\nFDNAME=more"), "done");
    rig.wait_said("as many descriptors are held as may be");
    life.kill();
    let mut life = rig.life();
    assert_eq!(life.ask("names"), names.join(" "));
    for (name, count) in names.iter().zip(["1", "2", "3"]) {
        assert_eq!(life.ask(&format!("eventfd? {name}")), count);
    }
    assert_eq!(life.ask("numbers"), "6");
}

#[test]
fn hostile_datagrams_leave_no_descriptor_behind() {
    let rig = Rig::new();
    let mut life = rig.life();
    let name = life.ask("eventfd 9");
    assert_eq!(life.ask("barrier"), "done");
    let open = || std::fs::read_dir(format!("/proc/{}/fd", rig.keeper.id())).expect("it lives").count();
    let before = open();
    let long = "x".repeat(5000);
    let colon = format!("FDSTORE=1\\nFDNAME={}", "y".repeat(300));
    for text in [
        "FDSTORE=1\\nFDNAME=a\\0b",
        "FDSTOREREMOVE=1",
        "FDSTOREREMOVE=1\\nFDNAME=a:b",
        "BARRIER=1\\nFDSTORE=1",
        "READY=1",
        "MAINPID=1",
        "\\n\\n\\n",
        "no line of ours",
        &long,
    ] {
        for fds in [0, 1, 253] {
            assert_eq!(life.ask(&format!("raw {fds} {text}")), "done");
        }
    }
    assert_eq!(life.ask("barrier"), "done");
    assert_eq!(open(), before);
    // A name that none can have is as good as none.
    assert_eq!(life.ask(&format!("raw 2 {colon}")), "done");
    life.kill();
    let mut life = rig.life();
    assert_eq!(life.ask("count"), "2");
    assert_eq!(life.ask("numbers"), "6");
    assert_eq!(life.ask(&format!("eventfd? {name}")), "9");
    assert_eq!(life.ask("discard stored"), "done");
    life.kill();
    let mut life = rig.life();
    assert_eq!(life.ask("names"), name);
}

#[test]
fn nobody_but_the_command_may_send() {
    let rig = Rig::new();
    let mut life = rig.life();
    let name = life.ask("eventfd 5");
    let path = life.ask("path");
    // The test itself runs as the same user, and so does a child of the command.
    let stranger = UnixDatagram::unbound().expect("a socket");
    stranger.send_to(format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes(), &path).expect("it is sent");
    rig.wait_said("not from the command");
    assert_eq!(life.ask("child-raw"), "done");
    assert_eq!(life.ask("barrier"), "done");
    rig.wait_said("refused (number 2)");
    life.kill();
    let mut life = rig.life();
    assert_eq!(life.ask("names"), name);
    assert_eq!(life.ask(&format!("eventfd? {name}")), "5");
    let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// What the death of the keeper costs: nothing at that moment. Sending is an error from then on, and what only the keeper held
/// would be gone with the next death of the command.
#[test]
fn a_command_goes_on_when_its_keeper_is_killed() {
    let mut rig = Rig::new();
    let mut life = rig.life();
    life.ask("eventfd 5");
    rig.keeper.kill().expect("it lives");
    rig.keeper.wait().expect("it is ours");
    assert_eq!(life.ask("pid"), life.pid.to_string());
    assert!(life.ask("eventfd 6").starts_with("error the descriptor store: "));
    assert!(life.ask("barrier").starts_with("error"));
    life.exit(0);
}

#[test]
fn the_command_begins_with_signals_limits_and_descriptors_as_a_program_expects_them() {
    let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status >&2; ls /proc/self/fd >&2; ulimit -n >&2; \
                  echo \"$LISTEN_FDS|$WATCHDOG_USEC|$FDSTORE\" >&2; exit 0";
    // Something that the keeper itself inherits, and nobody must.
    let (inherited, _writer) = rustix::pipe::pipe().expect("a pipe");
    rustix::io::fcntl_setfd(inherited.as_fd(), rustix::io::FdFlags::empty()).expect("it is open");
    let mut rig = Rig::start("7", |_| ["sh", "-c", script].map(str::to_owned).to_vec());
    assert_eq!(rig.end().code(), Some(0));
    let said = rig.said();
    assert!(said.contains("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"), "{said}");
    // The fourth is the directory that ls looks at.
    assert!(said.contains("\n0\n1\n2\n3\n"), "{said}");
    assert!(!said.contains("\n4\n"), "{said}");
    assert!(said.contains("\n||7\n"), "{said}");
    let limit: u64 = said.lines().nth(6).expect("a line").parse().expect("a limit");
    assert!(limit >= rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.expect("a limit"), "{said}");
}
