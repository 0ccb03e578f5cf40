//! Backends that answer garbage never end the broker, and honest ones that follow are taken in.
//!
//! The backend is this test program, started again with its socket in the environment: the broker kills what it fences, so it
//! must be a process of its own.

mod support;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::{Broker, Random, Scratch, Vmm, random_time, receive, wait_for};
use warmswap_wire::{ConfigSpace, HEADER_SIZE, Header, Reply, Request, RequestCode, VringState};

const SOCKET: &str = "WARMSWAP_TEST_BACKEND";
const SEED: &str = "WARMSWAP_TEST_SEED";

/// Messages that every backend answers honestly, so that the pair gets started at all.
const HONEST: u32 = 10;

/// Not a test: the backend, when started as one.
#[test]
fn the_backend_itself() {
    let Some(path) = std::env::var_os(SOCKET) else { return };
    let seed = std::env::var(SEED).expect("set together").parse().expect("a number");
    let mut random = Random(seed);
    let path = PathBuf::from(path);
    let _stale = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    for stream in listener.incoming().flatten() {
        serve(&stream, seed != 1, &mut random);
    }
}

fn serve(stream: &UnixStream, hostile: bool, random: &mut Random) {
    for count in 0.. {
        let mut head = [0; HEADER_SIZE];
        if fill(stream, &mut head).is_none() {
            return;
        }
        let Ok(header) = Header::decode(&head) else { return };
        let mut payload = vec![0; header.size as usize];
        if fill(stream, &mut payload).is_none() {
            return;
        }
        let mut reply = answer(&header, &payload);
        if hostile && count > HONEST && random.below(6) == 0 {
            reply = garbage(reply, random);
            if reply.is_empty() && random.below(2) == 0 {
                return;
            }
        }
        let file = std::fs::File::open("/dev/null").expect("everybody has one");
        let fds = if hostile && count > HONEST && random.below(20) == 0 { 1 + random.below(40) as usize } else { 0 };
        let fds = vec![std::os::fd::AsFd::as_fd(&file); fds];
        if !reply.is_empty() && !support::send(stream, &reply, &fds) {
            return;
        }
    }
}

fn fill(stream: &UnixStream, into: &mut [u8]) -> Option<()> {
    let mut filled = 0;
    while filled < into.len() {
        match receive(stream, &mut into[filled..]) {
            Ok(0) | Err(_) => return None,
            Ok(count) => filled += count,
        }
    }
    Some(())
}

/// What an honest backend answers; nothing where no answer is due.
fn answer(header: &Header, payload: &[u8]) -> Vec<u8> {
    use RequestCode as C;
    let Some(code) = RequestCode::from_id(header.request) else { return Vec::new() };
    let reply = match code {
        C::GetFeatures => Reply::U64(1 << 30 | 1 << 32 | 1 << 9),
        // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS.
        C::GetProtocolFeatures => Reply::U64(1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15),
        C::GetQueueNum => Reply::U64(2),
        C::GetMaxMemSlots => Reply::U64(32),
        C::GetVringBase => {
            let Ok(Request::GetVringBase(state)) = Request::decode(header, payload, &[]) else { return Vec::new() };
            Reply::VringState(VringState { value: 0, ..state })
        }
        C::GetConfig => {
            let Ok(Request::GetConfig(config)) = Request::decode(header, payload, &[]) else { return Vec::new() };
            Reply::Config(Some(ConfigSpace { bytes: vec![8; config.bytes.len()], ..config }))
        }
        _ if header.needs_reply() => Reply::U64(0),
        _ => return Vec::new(),
    };
    let mut bytes = Vec::new();
    reply.encode(header.request, &mut bytes, &mut Vec::new());
    bytes
}

fn garbage(mut reply: Vec<u8>, random: &mut Random) -> Vec<u8> {
    match random.below(8) {
        0 => (0..random.below(200)).map(|_| random.below(256) as u8).collect(),
        1 => reply.repeat(1 + random.below(20) as usize),
        2 => Vec::new(),
        3 => {
            reply.truncate(random.below(reply.len() as u64 + 1) as usize);
            reply
        }
        4 if !reply.is_empty() => {
            let at = random.below(reply.len() as u64) as usize;
            reply[at] ^= 1 << random.below(8);
            reply
        }
        5 => [1_u32, 5, u32::MAX].map(u32::to_ne_bytes).concat(),
        6 => [random.below(50) as u32, 5, 8, 1, 0].map(u32::to_ne_bytes).concat(),
        _ => {
            std::thread::sleep(Duration::from_millis(random.below(30)));
            reply
        }
    }
}

fn spawn(path: &Path, seed: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "the_backend_itself", "--nocapture"]).env(SOCKET, path).env(SEED, seed.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts")
}

/// Backends at both sockets, started again whenever they are killed. All are gone with the value.
struct Backends {
    children: Vec<(PathBuf, Child)>,
    seed: u64,
}

impl Backends {
    fn start(paths: [PathBuf; 2]) -> Self {
        let mut seed = 1;
        let children = paths.map(|path| {
            seed += 1;
            let child = spawn(&path, seed);
            wait_for("the backend's socket", || path.exists());
            (path, child)
        });
        Backends { children: children.into(), seed }
    }

    /// Replaces what has ended. Only seed 1 is honest.
    fn keep_up(&mut self, honest: bool) {
        for (path, child) in &mut self.children {
            if matches!(child.try_wait(), Ok(Some(_))) {
                self.seed += 1;
                *child = spawn(path, if honest { 1 } else { self.seed });
            }
        }
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// Ends the other threads of a test, also when it fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn backends_that_answer_garbage_never_end_the_broker() {
    let scratch = Scratch::new("fuzzed-backend");
    let paths = [scratch.path("one.sock"), scratch.path("two.sock")];
    let [one, two] = paths.clone().map(|path| path.to_str().expect("plain text").to_owned());
    let mut backends = Backends::start(paths);
    let options = ["--primary-socket", &one, "--shadow-socket", &two, "--hang-ms", "100"];
    let mut broker = Broker::start(&scratch, &options, &[]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A VMM that comes and goes meanwhile; whatever the backends do, it is answered.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut vmm = Vmm::connect(&broker.socket);
                let disk = support::Disk::new();
                let started = vmm.start(&disk);
                if started.is_ok() {
                    let state = VringState { index: 0, value: 0 };
                    let _ended = vmm.ask(&Request::GetVringBase(state), &[]);
                }
            }
        });
        let _stops = Stop(&stop);
        let until = Instant::now() + random_time();
        while Instant::now() < until {
            backends.keep_up(false);
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    broker.assert_alive();
    assert!(backends.seed > 5, "the backends did misbehave: {}", backends.seed);
    // Honest ones are taken in.
    for (_, child) in &mut backends.children {
        child.kill().expect("our own child");
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                backends.keep_up(true);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let _stops = Stop(&stop);
        broker.wait_for_state("protected");
    });
    let mut vmm = Vmm::connect(&broker.socket);
    vmm.start(&support::Disk::new()).expect("the next VMM is served");
}
