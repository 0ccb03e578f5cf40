//! A VMM that breaks every rule never ends the broker, which afterwards serves one that keeps them.

mod support;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use support::{AVAILABLE, Broker, DESCRIPTORS, Disk, Random, Scratch, USED, Vmm, random_time, storage_daemon};
use warmswap_wire::{
    ConfigSpace, FdSlot, HEADER_SIZE, HeaderFlags, InflightDescription, LogRegion, MemoryRegion, Request, RequestCode,
    VringAddr, VringFd, VringState,
};

/// A request with fields that are right, nearly right or wild.
fn request(disk: &Disk, random: &mut Random) -> Request {
    let index = [0, 0, 0, 1, 2, 255][random.below(6) as usize];
    let value = [0, 1, 2, 16, 17, 256, 32_768, 65_535, u32::MAX][random.below(9) as usize];
    let state = VringState { index, value };
    let ring = VringFd { index, fd: (random.below(4) > 0).then_some(FdSlot(1)) };
    let wild = [0, 1, 4095, 1 << 20, 1 << 47, u64::MAX - 4096][random.below(6) as usize];
    let region = match random.below(4) {
        0 => MemoryRegion {
            guest_addr: wild & (1 << 40),
            size: 1 + wild % (1 << 21),
            user_addr: wild & 0xffff_ffff,
            mmap_offset: wild % 8192,
        },
        1 => MemoryRegion { mmap_offset: 4096, ..disk.region() },
        _ => disk.region(),
    };
    let addr = match random.below(3) {
        0 => VringAddr { index, descriptor: wild, used: wild, available: wild, ..disk.addr() },
        _ => VringAddr { index, ..disk.addr() },
    };
    let fd = FdSlot(random.below(3) as u32);
    match random.below(24) {
        0 => Request::GetFeatures,
        1 => Request::SetFeatures(if random.below(2) == 0 { 1 << 30 | 1 << 32 } else { wild }),
        2 => Request::SetMemTable((0..random.below(4)).map(|_| (region, FdSlot(0))).collect()),
        3 => Request::AddMemReg { region, fd: (random.below(3) > 0).then_some(FdSlot(0)) },
        4 => Request::RemMemReg(region),
        5 => Request::SetVringNum(state),
        6 => Request::SetVringAddr(addr),
        7 => Request::SetVringBase(state),
        8 => Request::GetVringBase(state),
        9 | 10 => Request::SetVringKick(ring),
        11 => Request::SetVringCall(ring),
        12 => Request::SetVringErr(ring),
        13 => Request::SetVringEnable(state),
        14 => {
            Request::GetConfig(ConfigSpace { offset: value, flags: value, bytes: vec![0; random.below(300) as usize] })
        }
        15 => Request::SetConfig(ConfigSpace { offset: index, flags: 0, bytes: vec![1; random.below(300) as usize] }),
        16 => Request::SetLogBase { region: LogRegion { size: wild, offset: wild }, fd: Some(fd) },
        17 => Request::SetLogFd(fd),
        18 => Request::SetBackendReqFd(fd),
        19 => Request::GetInflightFd(InflightDescription {
            mmap_size: wild,
            mmap_offset: 0,
            num_queues: 1,
            queue_size: 1,
        }),
        20 => Request::SetProtocolFeatures(wild),
        21 => Request::SetOwner,
        22 => Request::ResetDevice,
        _ => Request::GetProtocolFeatures,
    }
}

/// The bytes and descriptors of a message that is wrong in one way or another.
fn mangle(bytes: &mut Vec<u8>, fds: &mut Vec<FdSlot>, random: &mut Random) {
    match random.below(9) {
        0 => {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        1 => bytes[0] = random.below(256) as u8,
        2 => fds.extend(vec![FdSlot(1); random.below(40) as usize]),
        3 => fds.clear(),
        // A length that does not fit: the stream is out of step from here on.
        4 => bytes[8..HEADER_SIZE].copy_from_slice(&(random.below(5_000) as u32).to_ne_bytes()),
        5 => bytes.truncate(random.below(bytes.len() as u64) as usize + 1),
        6 => bytes.extend_from_slice(&[7; 33]),
        _ => {}
    }
}

#[test]
fn random_messages_never_end_the_broker_and_the_next_vmm_is_served() {
    let scratch = Scratch::new("fuzzed-vmm");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let until = Instant::now() + random_time();
    for seed in (1..u64::MAX).take_while(|_| Instant::now() < until) {
        println!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut vmm = Vmm::connect(&broker.socket);
        let disk = Disk::new();
        let fds = [disk.memory.as_fd(), disk.kick.as_fd(), disk.call.as_fd()];
        // Half of them behave until they do not.
        if random.below(2) == 0 {
            let _ended = vmm.start(&disk);
        }
        for _ in 0..random.below(60) {
            let (mut bytes, mut slots) = (Vec::new(), Vec::new());
            let flags = if random.below(2) == 0 { HeaderFlags::NEED_REPLY } else { HeaderFlags::empty() };
            request(&disk, &mut random).encode(flags, &mut bytes, &mut slots);
            if random.below(4) == 0 {
                mangle(&mut bytes, &mut slots, &mut random);
            }
            let fds: Vec<BorrowedFd<'_>> = slots.iter().map(|slot| fds[slot.0 as usize]).collect();
            if !vmm.send(&bytes, &fds) {
                break;
            }
        }
        drop(vmm);
        broker.assert_alive();
    }
    broker.assert_serves();
}

#[test]
fn a_header_of_any_kind_is_answered_or_ends_only_its_own_connection() {
    let scratch = Scratch::new("headers");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let mut header = |request: u32, flags: u32, size: u32| {
        let vmm = Vmm::connect(&broker.socket);
        let words = [request, flags, size].map(u32::to_ne_bytes).concat();
        // It may be refused before it is read to the end.
        let _taken = vmm.send(&words, &[]) && vmm.send(&[0; 4096], &[]);
        drop(vmm);
        broker.assert_alive();
    };
    header(1, 1, u32::MAX);
    header(1, 0, 0);
    header(1, 3, 0);
    header(u32::MAX, 1 | 8, 4096);
    header(44, 1 | 8, 0);
    header(RequestCode::PostcopyAdvise as u32, 1, 0);
    header(RequestCode::CreateCryptoSession as u32, 1, 16);
    header(1, 1 | 4, 0);
    broker.assert_serves();
}

#[test]
fn guest_memory_that_is_truncated_under_the_broker_is_survived() {
    let scratch = Scratch::new("truncated");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 1);
    disk.memory.set_len(0).expect("the VMM truncates its own descriptor");
    disk.kick();
    // The backends die of it as well; the broker looks at the ring all the while.
    std::thread::sleep(Duration::from_millis(300));
    broker.assert_alive();
    let state = VringState { index: 0, value: 0 };
    assert!(vmm.ask(&Request::GetVringBase(state), &[]).is_ok(), "a stop is answered");
    drop(vmm);
    broker.assert_serves();
}

#[test]
fn memory_shorter_than_it_is_said_to_be_is_refused_and_the_right_table_is_taken_afterwards() {
    let scratch = Scratch::new("short");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let mut vmm = Vmm::connect(&broker.socket);
    let disk = Disk::new();
    let short = Disk::new();
    short.memory.set_len(4096).expect("a memfd");
    let second = MemoryRegion { guest_addr: 1 << 32, user_addr: 1 << 40, ..disk.region() };
    let table = Request::SetMemTable(vec![(disk.region(), FdSlot(0)), (second, FdSlot(1))]);
    let reply = vmm.ask(&table, &[disk.memory.as_fd(), short.memory.as_fd()]).expect("an answer");
    assert_eq!(reply, warmswap_wire::Reply::U64(1), "refused");
    vmm.start(&disk).expect("nothing of the refused table is left");
    drop(vmm);
    broker.assert_serves();
}

#[test]
fn a_guest_that_writes_nonsense_into_its_rings_harms_only_itself() {
    let scratch = Scratch::new("hostile-ring");
    let mut broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let until = Instant::now() + random_time();
    for seed in (1..u64::MAX).take_while(|_| Instant::now() < until) {
        println!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut vmm = Vmm::connect(&broker.socket);
        let disk = vmm.boot();
        for _ in 0..400 {
            let word = (random.below(65_536) as u16).to_le_bytes();
            let small = (random.below(40) as u16).to_le_bytes();
            match random.below(6) {
                0 => disk.put(AVAILABLE + 2, &word),
                1 => disk.put(AVAILABLE + 2, &small),
                2 => disk.put(USED + 2, if seed % 2 == 0 { &word } else { &small }),
                3 => disk.put(AVAILABLE + 4 + 2 * random.below(16), &word),
                4 => disk.put(USED + 4 + 4 * random.below(32), &word),
                _ => disk.put(DESCRIPTORS + 2 * random.below(128), &word),
            }
            if random.below(8) == 0 {
                disk.kick();
            }
            if random.below(20) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        broker.assert_alive();
        let state = VringState { index: 0, value: 0 };
        assert!(vmm.ask(&Request::GetVringBase(state), &[]).is_ok(), "a stop is answered");
    }
    broker.assert_serves();
}
