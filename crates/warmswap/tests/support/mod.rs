//! A broker under test, its backends, and a VMM that can behave or not.
//!
//! Guest memory is written and read through its descriptor, which is the same memory the broker and the backends have mapped.

#![allow(dead_code, reason = "every test file uses a part of it")]

pub(crate) mod blk;

use std::fs::File;
use std::io::{BufRead, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::process::Signal;
use warmswap_wire::ring::{DESC_F_NEXT, DESC_F_WRITE, Descriptor, Layout};
use warmswap_wire::{
    FDS_MAX, FdSlot, HEADER_SIZE, Header, HeaderFlags, MemoryRegion, Reply, Request, VringAddr, VringFd, VringState,
};

/// Longer than anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How long a random test goes on: a few seconds, or as many as `WARMSWAP_TEST_SECONDS` says.
pub(crate) fn random_time() -> Duration {
    let asked = std::env::var("WARMSWAP_TEST_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(asked.unwrap_or(4))
}

/// A directory of one test's own, gone with the value.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ws-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Scratch(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A disk of one mebibyte.
    pub(crate) fn image(&self) -> PathBuf {
        let path = self.path("disk.img");
        File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("an image");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

/// The command line of a storage daemon that serves an image.
pub(crate) fn storage_daemon(image: &Path) -> Vec<String> {
    let program = "/usr/bin/qemu-storage-daemon";
    assert!(Path::new(program).exists(), "{program} is not installed: run `cargo xtask setup`");
    let image = image.display();
    let disk = format!("driver=file,node-name=disk,filename={image},aio=threads,locking=on");
    let export =
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues=2";
    [program, "--blockdev", &disk, "--export", export].map(str::to_owned).to_vec()
}

/// Runs the program to its end.
pub(crate) fn warmswap(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warmswap")).args(args).stdin(Stdio::null()).output().expect("the program starts")
}

/// Signals a process.
pub(crate) fn kill(pid: u64, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process");
    rustix::process::kill_process(pid, signal).expect("it lives");
}

/// Waits until `done` says so.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what} has not come within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A running `warmswap guard`. Killed on drop.
pub(crate) struct Broker {
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
    name: String,
    control: PathBuf,
    journal: PathBuf,
}

impl Broker {
    /// Starts one and waits until the VMM may connect.
    pub(crate) fn start(scratch: &Scratch, options: &[&str], backend: &[String]) -> Self {
        Self::start_with(scratch, &[&["--quiet"], options].concat(), backend, |_| {})
    }

    /// The same, not quiet, and with something about the process changed.
    pub(crate) fn start_with(
        scratch: &Scratch,
        options: &[&str],
        backend: &[String],
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_warmswap"));
        Self::start_by(command, scratch, options, backend, change)
    }

    /// Starts one under a keeper, which is the child then.
    pub(crate) fn start_kept(scratch: &Scratch, options: &[&str], backend: &[String]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_warmswap"));
        command.args(["keeper", "--run-dir"]).arg(&scratch.0).arg("--").arg(env!("CARGO_BIN_EXE_warmswap"));
        Self::start_by(command, scratch, &[&["--quiet"], options].concat(), backend, |_| {})
    }

    fn start_by(
        mut command: Command,
        scratch: &Scratch,
        options: &[&str],
        backend: &[String],
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let (socket, journal) = (scratch.path("vmm.sock"), scratch.path("journal"));
        let named = options.windows(2).find(|pair| pair[0] == "--name");
        let name = named.map_or("disk", |pair| pair[1]);
        command.args(["guard", "--socket"]).arg(&socket);
        if named.is_none() {
            command.args(["--name", name]);
        }
        command.arg("--control").arg(&scratch.0).arg("--journal").arg(&journal).args(options);
        if !backend.is_empty() {
            command.arg("--").args(backend);
        }
        change(&mut command);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the program starts");
        let mut ready = String::new();
        let stdout = child.stdout.as_mut().expect("it is piped");
        std::io::BufReader::new(stdout).read_line(&mut ready).expect("plain text");
        let broker = Broker { child, socket, name: name.to_owned(), control: scratch.0.clone(), journal };
        assert!(ready.starts_with(&format!("ready: {name}")), "{ready}{}", broker.noted());
        broker
    }

    /// What it has noted, for a failed test.
    pub(crate) fn noted(&self) -> String {
        let journal = std::fs::read_to_string(&self.journal).unwrap_or_default();
        let lines: Vec<&str> = journal.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub(crate) fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("our own child") {
            panic!("the broker ended: {status}\n{}", self.noted());
        }
    }

    /// Runs a verb with this broker's control directory.
    pub(crate) fn ask(&self, args: &[&str]) -> Output {
        let control = self.control.to_str().expect("plain text");
        warmswap(&[args, &["--control", control]].concat())
    }

    /// Starts to follow the events of all devices; what it prints is piped.
    pub(crate) fn follow(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_warmswap"));
        command.args(["events", "--follow", "--control"]).arg(&self.control).stdout(Stdio::piped());
        command.spawn().expect("the program starts")
    }

    pub(crate) fn status(&self) -> serde_json::Value {
        let control = self.control.to_str().expect("plain text");
        let output = warmswap(&["status", &self.name, "--json", "--control", control]);
        let text = String::from_utf8_lossy(&output.stdout);
        let status: serde_json::Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{error} in {text:?}, {}", String::from_utf8_lossy(&output.stderr)));
        status["devices"][0].clone()
    }

    pub(crate) fn wait_for_state(&mut self, state: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            self.assert_alive();
            let status = self.status();
            if status["state"] == state {
                return;
            }
            assert!(Instant::now() < until, "it is not {state}: {status}\n{}", self.noted());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The process that guards, where a keeper is the child.
    pub(crate) fn pid(&self) -> u64 {
        self.status()["broker"]["pid"].as_u64().expect("a broker has a process")
    }

    /// Kills that process and waits until another one answers.
    pub(crate) fn replace(&self) {
        let old = self.pid();
        kill(old, Signal::KILL);
        self.wait_for_another(old);
    }

    pub(crate) fn wait_for_another(&self, old: u64) {
        let control = self.control.to_str().expect("plain text");
        wait_for("the next broker", || {
            let output = warmswap(&["status", &self.name, "--json", "--control", control]);
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            status["devices"][0]["broker"]["pid"].as_u64().is_some_and(|pid| pid != old)
        });
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("our own child");
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the end of the broker", || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        });
        status.expect("just seen")
    }

    /// The device still does its work: a VMM that keeps the rules writes a block and reads it back, across a failover.
    pub(crate) fn assert_serves(&mut self) {
        self.wait_for_state("protected");
        let mut vmm = Vmm::connect(&self.socket);
        let mut disk = vmm.boot();
        disk.write(&mut vmm, 3, 0xa5);
        self.wait_for_state("protected");
        let control = self.control.to_str().expect("plain text");
        let output = warmswap(&["failover", &self.name, "--reason", "test", "--control", control]);
        assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), self.noted());
        assert_eq!(disk.read(&mut vmm, 3), vec![0xa5; 512]);
        drop(vmm);
        self.assert_alive();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Asked first, so that it takes its backends with it. It may have ended.
        let _gone = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), Signal::TERM);
        let until = Instant::now() + Duration::from_secs(8);
        while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The front-end's end of a connection.
pub(crate) struct Vmm {
    pub(crate) stream: UnixStream,
}

/// Why a conversation ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The connection was closed.
    Closed,
    /// This was refused.
    Refused(Request),
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // A process that another test is just starting has a copy of the socket until it is there; the end is not to wait for it.
        let _gone = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Vmm {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("the broker listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket has a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket has a timeout");
        Vmm { stream }
    }

    /// Sends bytes with descriptors; false if nobody takes them.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        send(&self.stream, bytes, fds)
    }

    /// Sends a request whose slots are positions in `fds`.
    pub(crate) fn tell(&self, request: &Request, fds: &[BorrowedFd<'_>], need_reply: bool) -> bool {
        let flags = if need_reply { HeaderFlags::NEED_REPLY } else { HeaderFlags::empty() };
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        request.encode(flags, &mut bytes, &mut slots);
        let fds: Vec<BorrowedFd<'_>> = slots.iter().map(|slot| fds[slot.0 as usize]).collect();
        self.send(&bytes, &fds)
    }

    /// Sends a request and reads its reply.
    pub(crate) fn ask(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, Ended> {
        if !self.tell(request, fds, !request.code().always_replies()) {
            return Err(Ended::Closed);
        }
        let mut head = [0; HEADER_SIZE];
        self.stream.read_exact(&mut head).map_err(|_| Ended::Closed)?;
        let header = Header::decode(&head).expect("the broker's header is right");
        let mut payload = vec![0; header.size as usize];
        self.stream.read_exact(&mut payload).map_err(|_| Ended::Closed)?;
        let code = request.code();
        Ok(Reply::decode(code as u32, code.name(), code.reply_kind(), &header, &payload, &[])
            .expect("the broker's reply is right"))
    }

    /// Negotiates and starts one ring, as a VMM does.
    pub(crate) fn boot(&mut self) -> Disk {
        let disk = Disk::new();
        self.start(&disk).expect("a VMM that keeps the rules is served");
        disk
    }

    pub(crate) fn start(&mut self, disk: &Disk) -> Result<(), Ended> {
        // Flush.
        self.start_with(disk, 1 << 9)
    }

    /// The same for a device that offers these features of its own.
    pub(crate) fn start_with(&mut self, disk: &Disk, own: u64) -> Result<(), Ended> {
        let Reply::U64(features) = self.ask(&Request::GetFeatures, &[])? else { panic!("features") };
        let Reply::U64(protocol) = self.ask(&Request::GetProtocolFeatures, &[])? else { panic!("protocol features") };
        let state = |value| VringState { index: 0, value };
        let ring = |slot| VringFd { index: 0, fd: Some(FdSlot(slot)) };
        // Protocol features, version 1.
        let wanted = 1 << 30 | 1 << 32 | own;
        assert_eq!(features & wanted, wanted, "such a device offers them");
        let fds = [disk.memory.as_fd(), disk.kick.as_fd(), disk.call.as_fd()];
        for request in [
            Request::SetProtocolFeatures(protocol),
            Request::SetOwner,
            Request::SetFeatures(wanted),
            Request::SetMemTable(vec![(disk.region(), FdSlot(0))]),
            Request::SetVringNum(state(u32::from(RING_SIZE))),
            Request::SetVringBase(state(0)),
            Request::SetVringAddr(disk.addr()),
            Request::SetVringCall(ring(2)),
            Request::SetVringKick(ring(1)),
            Request::SetVringEnable(state(1)),
        ] {
            if self.ask(&request, &fds)? != Reply::U64(0) {
                return Err(Ended::Refused(request));
            }
        }
        Ok(())
    }
}

/// Entries of the ring.
pub(crate) const RING_SIZE: u16 = 16;
/// Where guest memory lies in the VMM.
pub(crate) const USER: u64 = 0x7000_0000;
const MEMORY_SIZE: u64 = 1 << 20;
/// Guest-physical places.
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;

/// Guest memory with one ring in it, and the driver's place in the ring.
pub(crate) struct Disk {
    pub(crate) memory: File,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    next: u16,
}

impl Disk {
    pub(crate) fn new() -> Self {
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let memory = File::from(memory);
        memory.set_len(MEMORY_SIZE).expect("guest memory");
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        Disk { memory, kick: event(), call: event(), next: 0 }
    }

    pub(crate) fn region(&self) -> MemoryRegion {
        MemoryRegion { guest_addr: 0, size: MEMORY_SIZE, user_addr: USER, mmap_offset: 0 }
    }

    pub(crate) fn addr(&self) -> VringAddr {
        VringAddr {
            index: 0,
            flags: 0,
            descriptor: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
            log: 0,
        }
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).expect("guest memory");
    }

    pub(crate) fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, at).expect("guest memory");
        bytes
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).expect("an eventfd that is not full");
    }

    /// One virtio-blk request, to its completion.
    fn request(&mut self, kind: u32, sector: u64, flags: u16) {
        self.submit(kind, sector, flags);
        wait_for("the completion of a request", || self.used_idx() == self.next);
        assert_eq!(self.get::<1>(STATUS), [0], "VIRTIO_BLK_S_OK");
    }

    /// How many requests the device has completed.
    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.get(USED + 2))
    }

    /// One virtio-blk request. Nobody waits for it.
    pub(crate) fn submit(&mut self, kind: u32, sector: u64, flags: u16) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xff]);
        let chain = [
            Descriptor { addr: HEADER, len: 16, flags: DESC_F_NEXT, next: 1 },
            Descriptor { addr: DATA, len: 512, flags: DESC_F_NEXT | flags, next: 2 },
            Descriptor { addr: STATUS, len: 1, flags: DESC_F_WRITE, next: 0 },
        ];
        for (at, descriptor) in (0..).zip(chain) {
            self.put(DESCRIPTORS + 16 * at, &descriptor.to_le_bytes());
        }
        let layout = Layout::new(RING_SIZE).expect("a power of two");
        self.put(AVAILABLE + layout.available_slot(layout.slot(self.next)), &0_u16.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.next.to_le_bytes());
        self.kick();
    }

    pub(crate) fn write(&mut self, _vmm: &mut Vmm, sector: u64, byte: u8) {
        self.put(DATA, &[byte; 512]);
        self.request(1, sector, 0);
    }

    pub(crate) fn read(&mut self, _vmm: &mut Vmm, sector: u64) -> Vec<u8> {
        self.put(DATA, &[0; 512]);
        self.request(0, sector, DESC_F_WRITE);
        self.get::<512>(DATA).to_vec()
    }
}

/// Sends bytes with descriptors; false if nobody takes them.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "room for 64");
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
        .is_ok_and(|sent| sent == bytes.len())
}

/// Receives bytes and closes what comes along.
pub(crate) fn receive(stream: &UnixStream, bytes: &mut [u8]) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fds.for_each(drop);
        }
    }
    Ok(received.bytes)
}

/// A small generator (xorshift64*), so that a seed means the same for ever.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}
