//! The built-in back-end as a process: its command line, its sockets, its end, and what it tells of itself.

mod support;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use support::{Broker, Scratch, Vmm, wait_for, warmswap};
use warmswap_telemetry::{Kind, Reader, find_in_process};
use warmswap_wire::{ConfigSpace, Reply, Request, VringState};

const PROGRAM: &str = env!("CARGO_BIN_EXE_warmswap");

/// A back-end that runs. Killed on drop.
struct Blk {
    child: Child,
    socket: PathBuf,
    image: PathBuf,
}

impl Blk {
    fn start(scratch: &Scratch, options: &[&str]) -> Self {
        let (image, socket) = (scratch.image(), scratch.path("blk.sock"));
        Self::start_on(&image, &socket, options)
    }

    fn start_on(image: &Path, socket: &Path, options: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["blk", "--socket-path"]).arg(socket).arg("--blk-file").arg(image).args(options);
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut blk = Blk { child, socket: socket.to_path_buf(), image: image.to_path_buf() };
        wait_for("the back-end to listen", || {
            assert!(blk.child.try_wait().expect("our own child").is_none(), "it ended at once: {}", blk.said());
            blk.socket.exists() && UnixStream::connect(&blk.socket).is_ok()
        });
        blk
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a process has a number");
        rustix::process::kill_process(pid, signal).expect("our own child");
    }

    /// What it printed, once it has ended.
    fn said(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut text).expect("it prints text");
        }
        text
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn capacity(vmm: &mut Vmm) -> u64 {
    let wanted = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 60] };
    let Ok(Reply::Config(Some(config))) = vmm.ask(&Request::GetConfig(wanted), &[]) else { panic!("a configuration") };
    u64::from_le_bytes(config.bytes[..8].try_into().expect("eight bytes"))
}

#[test]
fn capabilities_are_printed_whatever_else_is_given() {
    for arguments in [&["blk", "--print-capabilities"][..], &["blk", "--nonsense", "--print-capabilities", "--fd"]] {
        let output = warmswap(arguments);
        assert!(output.status.success());
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(json["type"], "block");
    }
    let scratch = Scratch::new("blk-name");
    let link = scratch.path("warmswap-blk");
    std::os::unix::fs::symlink(PROGRAM, &link).expect("a link");
    let output = Command::new(link).arg("--print-capabilities").output().expect("it runs");
    assert!(output.status.success() && !output.stdout.is_empty(), "under its other name it needs no verb");
}

#[test]
fn what_cannot_be_served_ends_at_once_with_one_line() {
    let scratch = Scratch::new("blk-refusals");
    let (image, socket) = (scratch.image().display().to_string(), scratch.path("s").display().to_string());
    std::fs::write(scratch.path("file"), "x").expect("a file");
    let file = scratch.path("file").display().to_string();
    let cases: [(&[&str], &str); 5] = [
        (&["--socket-path", &socket, "--blk-file", "/nowhere"], "opening it"),
        (&["--socket-path", &socket, "--blk-file", "/dev/null"], "neither a regular file nor a block device"),
        (&["--socket-path", &socket, "--blk-file", &file], "no whole block"),
        (&["--socket-path", &file, "--blk-file", &image], "left alone"),
        (&["--fd", "77", "--blk-file", &image], "descriptor 77"),
    ];
    for (arguments, reason) in cases {
        let output = warmswap(&[&["blk"], arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(reason) && said.lines().count() == 1, "{arguments:?}: {said}");
    }
}

#[test]
fn it_reads_and_writes_and_tells_of_it_and_ends_fast() {
    let scratch = Scratch::new("blk-serves");
    let mut blk = Blk::start(&scratch, &["--num-queues", "2"]);
    let mut vmm = Vmm::connect(&blk.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 7, 0xa5);
    assert_eq!(disk.read(&mut vmm, 7), [0xa5; 512]);
    assert_eq!(std::fs::read(&blk.image).expect("the image")[7 * 512..8 * 512], [0xa5; 512]);

    let page = find_in_process(blk.pid()).expect("it can be looked into").expect("it has a page");
    let reader = Reader::open(page).expect("a page of this version");
    assert_eq!((reader.header().pid, reader.header().queues, reader.header().device_type), (blk.pid(), 2, 2));
    let queue = reader.queue(0).or_else(|_| reader.read_anyway(0)).expect("a snapshot");
    let done = |kind| (queue.kind(kind).submitted, queue.kind(kind).completed, queue.kind(kind).bytes);
    assert_eq!((done(Kind::Read), done(Kind::Write)), ((1, 1, 512), (1, 1, 512)));
    assert_eq!((queue.in_flight, queue.broken), (0, false));

    let began = Instant::now();
    blk.signal(Signal::TERM);
    let status = blk.child.wait().expect("our own child");
    assert!(status.success() && began.elapsed() < Duration::from_secs(1), "{status} after {:?}", began.elapsed());
}

#[test]
fn a_stop_names_where_the_ring_goes_on_and_a_start_there_does() {
    let scratch = Scratch::new("blk-stop");
    let blk = Blk::start(&scratch, &[]);
    let mut vmm = Vmm::connect(&blk.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 1);
    disk.write(&mut vmm, 2, 2);
    let stop = Request::GetVringBase(VringState { index: 0, value: 0 });
    let Ok(Reply::VringState(state)) = vmm.ask(&stop, &[]) else { panic!("a base") };
    assert_eq!(state.value, 2);
    drop(vmm);
    // The next front-end is served as well, and finds what was written.
    let mut vmm = Vmm::connect(&blk.socket);
    let mut disk = vmm.boot();
    assert_eq!(disk.read(&mut vmm, 2), [2; 512]);
}

#[test]
fn a_stop_is_answered_when_everything_that_was_taken_is_completed() {
    let scratch = Scratch::new("blk-drain");
    let blk = Blk::start(&scratch, &["--engine", "uring", "--write-cache", "off"]);
    let mut taken = 0;
    for round in 0..60_u64 {
        let mut vmm = Vmm::connect(&blk.socket);
        let mut disk = vmm.boot();
        disk.submit(1, 1, 0);
        // Now and then the stop comes before the request is taken, and now and then behind its end.
        std::thread::sleep(Duration::from_micros(5 * (round % 30)));
        let stop = Request::GetVringBase(VringState { index: 0, value: 0 });
        let Ok(Reply::VringState(state)) = vmm.ask(&stop, &[]) else { panic!("a base") };
        let used = disk.used_idx();
        assert_eq!(
            state.value,
            u32::from(used),
            "round {round}: it goes on behind a request that it has not completed"
        );
        taken += used;
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(disk.used_idx(), used, "round {round}: a stopped ring is written to");
    }
    assert!(taken > 0, "no stop has met a request");
}

#[test]
fn sockets_can_be_inherited_listening_or_connected() {
    let scratch = Scratch::new("blk-fd");
    let image = scratch.image();
    let spawn = |fd: std::os::fd::BorrowedFd<'_>| {
        let copy = rustix::io::dup(fd).expect("a descriptor");
        let number = copy.as_raw_fd().to_string();
        let mut command = Command::new(PROGRAM);
        command.args(["blk", "--fd", &number, "--blk-file"]).arg(&image).stderr(Stdio::null());
        // SAFETY: between fork and exec one call, on a descriptor that is open.
        unsafe {
            command.pre_exec(move || Ok(rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty())?));
        }
        command.spawn().expect("the program starts")
    };
    let path = scratch.path("listening");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut child = spawn(listener.as_fd());
    let mut vmm = Vmm::connect(&path);
    vmm.boot().write(&mut vmm, 3, 3);
    child.kill().expect("our own child");
    child.wait().expect("our own child");

    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let mut child = spawn(theirs.as_fd());
    drop(theirs);
    let mut vmm = Vmm { stream: ours };
    assert_eq!(vmm.boot().read(&mut vmm, 3), [3; 512]);
    drop(vmm);
    assert!(child.wait().expect("our own child").success(), "it ends with its front-end");
}

#[test]
fn a_disk_that_grows_is_told_to_the_guest_and_the_pair_stays_protected() {
    let scratch = Scratch::new("blk-grows");
    let image = scratch.image();
    let before = std::fs::metadata(&image).expect("the image").len();
    let image_text = image.display().to_string();
    let mut broker = Broker::start(&scratch, &["--disk", &image_text], &[]);
    let mut vmm = Vmm::connect(&scratch.path("vmm.sock"));
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 0, 9);
    assert_eq!(capacity(&mut vmm), before / 512);
    File::options().write(true).open(&image).and_then(|file| file.set_len(2 * before)).expect("it grows");
    wait_for("the new size", || capacity(&mut vmm) == 2 * before / 512);
    broker.wait_for_state("protected");
    disk.write(&mut vmm, 2 * before / 512 - 1, 8);
    assert_eq!(disk.read(&mut vmm, 0), [9; 512]);
}

#[test]
fn a_new_back_end_waits_for_the_lock_of_a_dead_one() {
    let scratch = Scratch::new("blk-dead");
    let image = scratch.image();
    // A description that outlives its process, as one with I/O in flight does: ours has it from the dead one.
    let orphan = File::options().read(true).write(true).open(&image).expect("the image");
    let mut gone = Command::new("true").spawn().expect("a process");
    let pid = i64::from(gone.id());
    let namespace = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata("/proc/self/ns/pid").expect("proc"));
    gone.wait().expect("our own child");
    let instance = pid | i64::try_from(namespace & 0x3ff).expect("ten bits") << 50;
    lock(&orphan, (1 << 60) + instance);
    let socket = scratch.path("blk.sock");
    let child = Command::new(PROGRAM)
        .args(["blk", "--socket-path"])
        .arg(&socket)
        .arg("--blk-file")
        .arg(&image)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut blk = Blk { child, socket, image };
    std::thread::sleep(Duration::from_millis(300));
    assert!(!blk.socket.exists(), "it serves nobody while I/O of a dead one may be in flight");
    drop(orphan);
    wait_for("the back-end to listen", || blk.socket.exists());
    blk.child.kill().expect("our own child");
    assert!(blk.said().contains(&format!("process {pid}, which is gone")));
}

fn lock(file: &File, byte: i64) {
    // SAFETY: zero is valid for every field of this plain structure.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::c_short::try_from(libc::F_RDLCK).expect("a small number");
    (range.l_start, range.l_len) = (byte, 1);
    // SAFETY: the structure outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    assert_eq!(result, 0, "a lock");
}
