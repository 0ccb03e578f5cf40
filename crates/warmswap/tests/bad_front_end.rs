//! A front-end that breaks every rule never ends `warmswap blk`, which afterwards serves one that keeps them.

mod support;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use support::blk::Backend;
use support::{AVAILABLE, DESCRIPTORS, Disk, Random, Scratch, USED, Vmm, random_time};
use warmswap_wire::{
    ConfigSpace, FdSlot, HEADER_SIZE, HeaderFlags, InflightDescription, LogRegion, MemoryRegion, Reply, Request,
    VringAddr, VringFd, VringState,
};

/// What may come along with a message.
struct Fds {
    disk: Disk,
    others: Vec<OwnedFd>,
}

impl Fds {
    fn new() -> Self {
        let memory = |bytes: u64| {
            let fd = rustix::fs::memfd_create("small", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
            rustix::fs::ftruncate(&fd, bytes).expect("any size");
            fd
        };
        let (socket, _gone) = UnixStream::pair().expect("a pair");
        let (pipe, _closed) = rustix::pipe::pipe().expect("a pipe");
        let null = File::open("/dev/null").expect("it is everywhere");
        let directory = File::open("/").expect("it is everywhere");
        let others = vec![memory(0), memory(1 << 16), socket.into(), pipe, null.into(), directory.into()];
        Fds { disk: Disk::new(), others }
    }

    fn get(&self, slot: u32) -> BorrowedFd<'_> {
        match slot {
            0 => self.disk.memory.as_fd(),
            1 => self.disk.kick.as_fd(),
            2 => self.disk.call.as_fd(),
            other => self.others[other as usize - 3].as_fd(),
        }
    }
}

/// A descriptor: the one that belongs there, as a rule.
fn slot(right: u32, random: &mut Random) -> FdSlot {
    FdSlot(if random.below(4) > 0 { right } else { random.below(9) as u32 })
}

/// A request with fields that are right, nearly right or wild.
fn request(disk: &Disk, random: &mut Random) -> Request {
    let index = [0, 0, 0, 1, 2, 255][random.below(6) as usize];
    let value = [0, 1, 2, 16, 16, 256, 32_768, 65_535, u32::MAX][random.below(9) as usize];
    let state = VringState { index, value };
    let wild = [0, 1, 8, 4095, 4096, 1 << 20, 1 << 47, u64::MAX - 4096, u64::MAX][random.below(9) as usize];
    let region = match random.below(5) {
        0 => MemoryRegion { guest_addr: wild, size: 1 + wild % (1 << 21), user_addr: wild, mmap_offset: wild % 8192 },
        1 => MemoryRegion { mmap_offset: 4096, ..disk.region() },
        2 => MemoryRegion { guest_addr: 1 << 32, user_addr: 1 << 40, size: 4096, mmap_offset: wild % (1 << 20) },
        _ => disk.region(),
    };
    let addr = match random.below(4) {
        0 => VringAddr { index, descriptor: wild, used: wild, available: wild, flags: 1, log: wild },
        1 => VringAddr { index, used: disk.addr().used + wild % 65_536, flags: 1, ..disk.addr() },
        _ => VringAddr { index, ..disk.addr() },
    };
    let inflight = InflightDescription {
        mmap_size: [wild, 1 << 16][random.below(2) as usize],
        mmap_offset: [0, wild][random.below(2) as usize],
        num_queues: [1, 2, value as u16][random.below(3) as usize],
        queue_size: [16, value as u16][random.below(2) as usize],
    };
    let config = |len: u64| ConfigSpace { offset: value, flags: index, bytes: vec![1; len as usize] };
    let log = LogRegion { size: [32, wild][random.below(2) as usize], offset: [0, wild][random.below(2) as usize] };
    match random.below(31) {
        0 => Request::GetFeatures,
        1 => Request::SetFeatures([1 << 30 | 1 << 32, 1 << 26 | 1 << 29 | 1 << 32, wild][random.below(3) as usize]),
        2 => Request::SetMemTable((0..random.below(4)).map(|_| (region, slot(0, random))).collect()),
        3 => Request::AddMemReg { region, fd: (random.below(3) > 0).then(|| slot(0, random)) },
        4 => Request::RemMemReg(region),
        5 => Request::SetVringNum(state),
        6 | 7 => Request::SetVringAddr(addr),
        8 => Request::SetVringBase(state),
        9 | 10 => Request::GetVringBase(state),
        11 | 12 => Request::SetVringKick(VringFd { index, fd: (random.below(4) > 0).then(|| kick(random)) }),
        13 => Request::SetVringCall(VringFd { index, fd: (random.below(4) > 0).then(|| slot(2, random)) }),
        14 => Request::SetVringErr(VringFd { index, fd: (random.below(4) > 0).then(|| slot(2, random)) }),
        15 => Request::SetVringEnable(state),
        16 => Request::GetConfig(config(random.below(300))),
        17 => Request::SetConfig(config(random.below(300))),
        18 => Request::SetConfig(ConfigSpace { offset: 32, flags: 0, bytes: vec![value as u8] }),
        19 => Request::SetLogBase { region: log, fd: (random.below(4) > 0).then(|| slot(0, random)) },
        20 => Request::SetLogFd(slot(2, random)),
        21 => Request::SetBackendReqFd(slot(5, random)),
        22 => Request::GetInflightFd(inflight),
        23 | 24 => Request::SetInflightFd { region: inflight, fd: slot(4, random) },
        25 => Request::SetProtocolFeatures(wild),
        26 => Request::SetOwner,
        27 => Request::ResetDevice,
        28 => Request::GetQueueNum,
        29 => Request::GetMaxMemSlots,
        _ => Request::GetProtocolFeatures,
    }
}

/// What can be waited for: eventfds, a socket, a pipe.
fn kick(random: &mut Random) -> FdSlot {
    FdSlot([1, 1, 1, 2, 5, 6][random.below(6) as usize])
}

/// The bytes and descriptors of a message that is wrong in one way or another.
fn mangle(bytes: &mut Vec<u8>, fds: &mut Vec<FdSlot>, random: &mut Random) {
    match random.below(9) {
        0 => {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        1 => bytes[0] = random.below(256) as u8,
        2 => fds.extend((0..random.below(40)).map(|_| slot(1, random))),
        3 => fds.clear(),
        // A length that does not fit: the stream is out of step from here on.
        4 => bytes[8..HEADER_SIZE].copy_from_slice(&(random.below(5_000) as u32).to_ne_bytes()),
        5 => bytes.truncate(random.below(bytes.len() as u64) as usize + 1),
        6 => bytes.extend_from_slice(&[7; 33]),
        _ => {}
    }
}

/// A guest that writes nonsense into its ring now and then.
fn scribble(disk: &Disk, random: &mut Random) {
    let word = (random.below(65_536) as u16).to_le_bytes();
    let small = (random.below(40) as u16).to_le_bytes();
    match random.below(6) {
        0 => disk.put(AVAILABLE + 2, &word),
        1 => disk.put(AVAILABLE + 2, &small),
        2 => disk.put(USED + 2, &small),
        3 => disk.put(AVAILABLE + 4 + 2 * random.below(16), &small),
        4 => disk.put(USED + 4 + 4 * random.below(32), &word),
        _ => disk.put(DESCRIPTORS + 2 * random.below(128), &word),
    }
    if random.below(2) == 0 {
        disk.kick();
    }
}

fn random_messages(name: &str, options: &[&str]) {
    let scratch = Scratch::new(name);
    let image = scratch.image();
    let mut backend = Backend::start(&scratch, &image, &[&["--num-queues", "2"], options].concat());
    let until = Instant::now() + random_time();
    let mut count = 0;
    for seed in (1..u64::MAX).take_while(|_| Instant::now() < until) {
        println!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut vmm = Vmm::connect(&backend.socket);
        let fds = Fds::new();
        // Half of them behave until they do not.
        if random.below(2) == 0 {
            let _ended = vmm.start(&fds.disk);
        }
        for _ in 0..random.below(60) {
            let (mut bytes, mut slots) = (Vec::new(), Vec::new());
            let flags = if random.below(4) > 0 { HeaderFlags::NEED_REPLY } else { HeaderFlags::empty() };
            request(&fds.disk, &mut random).encode(flags, &mut bytes, &mut slots);
            if random.below(4) == 0 {
                mangle(&mut bytes, &mut slots, &mut random);
            }
            let sent: Vec<BorrowedFd<'_>> = slots.iter().map(|slot| fds.get(slot.0)).collect();
            if !vmm.send(&bytes, &sent) {
                break;
            }
            scribble(&fds.disk, &mut random);
            count += 1;
        }
        drop(vmm);
        if seed % 8 == 0 {
            backend.assert_serves(seed as u8);
        }
        backend.assert_alive();
    }
    println!("{count} messages");
    backend.assert_serves(0xa5);
    assert_eq!(std::fs::metadata(&image).expect("the image").len(), 1 << 20, "it has its size");
    backend.end();
}

#[test]
fn random_messages_never_end_the_back_end_and_the_next_front_end_is_served() {
    random_messages("front-end-sync", &["--engine", "sync"]);
}

#[test]
fn random_messages_never_end_the_back_end_with_io_uring() {
    random_messages("front-end-uring", &["--engine", "uring", "--workers", "2"]);
}

#[test]
fn a_header_of_any_kind_is_answered_or_ends_only_its_own_connection() {
    let scratch = Scratch::new("front-end-headers");
    let mut backend = Backend::start(&scratch, &scratch.image(), &[]);
    let mut header = |request: u32, flags: u32, size: u32| {
        let vmm = Vmm::connect(&backend.socket);
        let words = [request, flags, size].map(u32::to_ne_bytes).concat();
        // It may be refused before it is read to the end.
        let _taken = vmm.send(&words, &[]) && vmm.send(&[0; 4096], &[]);
        drop(vmm);
        backend.assert_alive();
    };
    header(1, 1, u32::MAX);
    header(1, 0, 0);
    header(1, 3, 0);
    header(u32::MAX, 1 | 8, 4096);
    (0..50).for_each(|code| header(code, 1 | 8, 0));
    header(1, 1 | 4, 0);
    backend.assert_serves(1);
    backend.end();
}

/// Descriptors that cannot be waited for, in the place of a ring's kick.
fn a_kick_of_another_kind(name: &str, options: &[&str]) {
    let scratch = Scratch::new(name);
    let mut backend = Backend::start(&scratch, &scratch.image(), options);
    for other in 0..6 {
        let mut vmm = Vmm::connect(&backend.socket);
        let fds = Fds::new();
        vmm.start(&fds.disk).expect("so far it keeps the rules");
        let kick = Request::SetVringKick(VringFd { index: 0, fd: Some(FdSlot(0)) });
        let answer = vmm.ask(&kick, &[fds.get(3 + other)]);
        println!("kick {other}: {answer:?}");
        // The ring is served as without one, or the front-end has been told.
        let _answer = vmm.ask(&Request::GetVringBase(VringState { index: 0, value: 0 }), &[]);
        drop(vmm);
        backend.assert_serves(other as u8);
    }
    backend.end();
}

#[test]
fn a_kick_that_cannot_be_waited_for_harms_only_its_own_ring() {
    a_kick_of_another_kind("front-end-kick-sync", &["--engine", "sync"]);
}

#[test]
fn a_kick_that_cannot_be_waited_for_harms_only_its_own_ring_with_io_uring() {
    a_kick_of_another_kind("front-end-kick-uring", &["--engine", "uring"]);
}

#[test]
fn a_front_end_that_does_not_read_its_answers_holds_nobody_up_for_ever() {
    let scratch = Scratch::new("front-end-deaf");
    let mut backend = Backend::start(&scratch, &scratch.image(), &[]);
    let vmm = Vmm::connect(&backend.socket);
    vmm.stream.set_write_timeout(Some(std::time::Duration::from_millis(300))).expect("a socket has a timeout");
    // More than its socket holds answers to.
    let sent = (0..100_000).take_while(|_| vmm.tell(&Request::GetFeatures, &[], false)).count();
    println!("{sent} requests were taken");
    drop(vmm);
    backend.assert_serves(2);
    // Nor the end of the process.
    let vmm = Vmm::connect(&backend.socket);
    vmm.stream.set_write_timeout(Some(std::time::Duration::from_millis(300))).expect("a socket has a timeout");
    let _sent = (0..100_000).take_while(|_| vmm.tell(&Request::GetFeatures, &[], false)).count();
    backend.end();
}

#[test]
fn memory_that_is_refused_leaves_what_there_was() {
    let scratch = Scratch::new("front-end-memory");
    let mut backend = Backend::start(&scratch, &scratch.image(), &[]);
    let mut vmm = Vmm::connect(&backend.socket);
    let fds = Fds::new();
    vmm.start(&fds.disk).expect("it keeps the rules");
    let region = MemoryRegion { guest_addr: 1 << 32, user_addr: 1 << 40, ..fds.disk.region() };
    // An empty file, a short one, no file at all, one that overlaps, and the one that the ring lies in.
    for (region, fd) in [(region, 3), (region, 4), (region, 5), (region, 7), (region, 8), (fds.disk.region(), 0)] {
        let add = Request::AddMemReg { region, fd: Some(FdSlot(0)) };
        assert_eq!(vmm.ask(&add, &[fds.get(fd)]).expect("an answer"), Reply::U64(1), "{region:?} in {fd}");
    }
    let remove = Request::RemMemReg(fds.disk.region());
    assert_eq!(vmm.ask(&remove, &[]).expect("an answer"), Reply::U64(1), "a running ring lies there");
    let mut disk = fds.disk;
    disk.write(&mut vmm, 1, 9);
    assert_eq!(disk.read(&mut vmm, 1), vec![9; 512]);
    drop(vmm);
    backend.assert_serves(3);
    backend.end();
}

#[test]
fn answers_come_however_many_are_waited_for_at_once() {
    let scratch = Scratch::new("front-end-burst");
    let backend = Backend::start(&scratch, &scratch.image(), &[]);
    let mut vmm = Vmm::connect(&backend.socket);
    vmm.stream.set_read_timeout(Some(std::time::Duration::from_secs(3))).expect("a socket has a timeout");
    // More than its socket holds answers to, and fewer than are kept.
    assert!((0..2_000).all(|_| vmm.tell(&Request::GetFeatures, &[], false)));
    let mut answers = vec![0; 2_000 * 20];
    let mut count = 0;
    while count < answers.len() {
        match vmm.stream.read(&mut answers[count..]) {
            Ok(bytes) if bytes > 0 => count += bytes,
            other => panic!("{} of 2000 answers have come, then {other:?}", count / 20),
        }
    }
    drop(vmm);
    backend.end();
}
