//! `warmswap blk` under a driver that others have written: the `virtio-driver` crate, which is what libblkio speaks vhost-user with.
//! What it reads is what it wrote, and so is the image.

mod support;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::{MapFlags, ProtFlags};
use support::blk::Backend;
use support::{PATIENCE, Random, Scratch};
use virtio_driver::{VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags, iovec};

/// The image is cut into as many parts as requests may be in flight, each with a buffer of its own.
const PARTS: usize = 32;
const PART: usize = 16 << 10;
const IMAGE: usize = PARTS * PART;
const QUEUES: usize = 4;
/// Room for every part in one queue, each cut into eight, with header and status.
const QUEUE_SIZE: u16 = 512;

/// A driver, its queues and its buffers.
struct Driver {
    // In the order in which they are to go: the queues lie in memory of the transport's.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    buffers: Buffers,
}

/// Memory shared with the device.
struct Buffers {
    start: *mut u8,
}

impl Buffers {
    fn new(transport: &mut VirtioBlkTransport) -> Self {
        let fd = rustix::fs::memfd_create("buffers", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&fd, IMAGE as u64).expect("any size");
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping where the kernel likes it, unmapped when this value is dropped.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), IMAGE, protection, flags, &fd, 0) };
        let start = start.expect("it is mapped").cast::<u8>();
        transport.map_mem_region(start.addr(), IMAGE, fd.as_raw_fd(), 0).expect("the device takes it");
        Buffers { start }
    }

    /// A part's buffer. The device must not be using it.
    fn part(&mut self, part: usize) -> &mut [u8] {
        assert!(part < PARTS);
        // SAFETY: inside the mapping; nobody else uses it while no request of that part is in flight.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(part * PART), PART) }
    }

    /// A part's buffer, cut anywhere.
    fn pieces(&mut self, part: usize, bytes: usize, random: &mut Random) -> Vec<iovec> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < bytes {
            let most = (bytes - at) as u64;
            let len = if random.below(3) == 0 { most } else { 1 + random.below(most) };
            let len = if pieces.len() == 7 { most } else { len } as usize;
            pieces.push(iovec { iov_base: (&raw mut self.part(part)[at]).cast(), iov_len: len });
            at += len;
        }
        pieces
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: mapped with this length; the driver that used it is gone.
        let _gone = unsafe { rustix::mm::munmap(self.start.cast(), IMAGE) };
    }
}

impl Driver {
    fn connect(socket: &Path, features: VirtioFeatureFlags) -> Self {
        let device = VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES
            | VirtioBlkFeatureFlags::RO;
        let features = (VirtioFeatureFlags::VERSION_1 | features).bits() | device.bits();
        let path = socket.to_str().expect("plain text");
        let transport = VhostUser::new(path, features).expect("it is served");
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let config = transport.get_config().expect("the configuration space");
        assert_eq!(u64::from(config.capacity), (IMAGE / 512) as u64);
        assert_eq!(usize::from(u16::from(config.num_queues)), QUEUES);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, QUEUES, QUEUE_SIZE).expect("queues");
        // Without that it wants no calls at all.
        queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
        let buffers = Buffers::new(&mut *transport);
        Driver { queues, transport, buffers }
    }

    /// Tells the device of what a queue was given, if it wants to be told.
    fn kick(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().expect("an eventfd");
        }
    }

    /// Waits until everything of a queue is completed; each must be so with `expected`. Returns which parts they were.
    fn complete(&mut self, queue: usize, count: usize, expected: i32) -> Vec<usize> {
        let call = self.transport.get_completion_fd(queue);
        let mut parts = Vec::new();
        loop {
            for completion in self.queues[queue].completions() {
                assert_eq!(completion.ret, expected, "queue {queue}, part {}", completion.context);
                parts.push(completion.context);
            }
            if parts.len() >= count {
                return parts;
            }
            let mut fds = [PollFd::from_borrowed_fd(call.as_fd(), PollFlags::IN)];
            let wait = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
            let ready = rustix::event::poll(&mut fds, Some(&wait)).expect("descriptors that are open");
            assert!(ready > 0, "queue {queue} was not called: {} of {count} requests are completed", parts.len());
            // It does not block, for the device shares it.
            let _taken = call.read();
        }
    }

    /// One request on the first queue, to its end.
    fn one(&mut self, expected: i32, request: impl FnOnce(&mut VirtioBlkQueue<'static, usize>, &mut [u8])) {
        request(&mut self.queues[0], self.buffers.part(0));
        self.kick(0);
        self.complete(0, 1, expected);
    }
}

/// What a part was asked for.
enum Asked {
    Read { at: usize, bytes: usize },
    Write { at: usize, bytes: usize },
    Zeroes { at: usize, bytes: usize },
    Nothing,
}

/// Random requests, many at a time, for that long. `model` is what the image holds.
fn work(driver: &mut Driver, model: &mut [u8], random: &mut Random, time: Duration) -> usize {
    let until = Instant::now() + time;
    let mut requests = 0;
    while Instant::now() < until {
        let mut counts = [0; QUEUES];
        let mut asked = Vec::new();
        for part in 0..PARTS {
            let queue = random.below(QUEUES as u64) as usize;
            asked.push(ask(driver, model, random, part, queue));
            counts[queue] += 1;
            if random.below(4) == 0 {
                driver.kick(queue);
            }
        }
        for (queue, count) in counts.into_iter().enumerate() {
            driver.kick(queue);
            requests += count;
            driver.complete(queue, count, 0);
        }
        for (part, asked) in asked.into_iter().enumerate() {
            match asked {
                Asked::Read { at, bytes } => {
                    assert!(driver.buffers.part(part)[..bytes] == model[at..at + bytes], "{bytes} bytes at {at}");
                }
                Asked::Write { at, bytes } => {
                    model[at..at + bytes].copy_from_slice(&driver.buffers.part(part)[..bytes]);
                }
                Asked::Zeroes { at, bytes } => model[at..at + bytes].fill(0),
                Asked::Nothing => {}
            }
        }
    }
    requests
}

/// Asks for something in one part.
fn ask(driver: &mut Driver, model: &[u8], random: &mut Random, part: usize, queue: usize) -> Asked {
    let first = random.below((PART / 512) as u64) as usize;
    let bytes = 512 * (1 + random.below((PART / 512 - first) as u64) as usize);
    let at = part * PART + 512 * first;
    let (offset, len) = (at as u64, bytes as u64);
    let kind = random.below(16);
    if kind < 12 {
        let fill = random.below(256) as u8;
        let buffer = &mut driver.buffers.part(part)[..bytes];
        buffer.iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = fill.wrapping_add((at >> 4) as u8));
    }
    let pieces = driver.buffers.pieces(part, bytes, random);
    let queue = &mut driver.queues[queue];
    let (result, asked) = match kind {
        // SAFETY: the pieces lie in the part's buffer, which nobody looks at until the request is completed.
        0..6 => (unsafe { queue.readv(offset, pieces.as_ptr(), pieces.len(), part) }, Asked::Read { at, bytes }),
        // SAFETY: as above.
        6..12 => (unsafe { queue.writev(offset, pieces.as_ptr(), pieces.len(), part) }, Asked::Write { at, bytes }),
        12 => (queue.write_zeroes(offset, len, true, part), Asked::Zeroes { at, bytes }),
        13 => (queue.write_zeroes(offset, len, false, part), Asked::Zeroes { at, bytes }),
        // What was discarded may read as anything: only what is zero already is known afterwards.
        14 if model[at..at + bytes].iter().all(|it| *it == 0) => (queue.discard(offset, len, part), Asked::Nothing),
        _ => (queue.flush(part), Asked::Nothing),
    };
    result.expect("there is room for it");
    asked
}

fn image(scratch: &Scratch) -> std::path::PathBuf {
    let path = scratch.path("foreign.img");
    File::create(&path).and_then(|file| file.set_len(IMAGE as u64)).expect("an image");
    path
}

/// One driver after another, each with what the last has left.
fn a_driver_reads_what_it_wrote(name: &str, options: &[&str]) {
    let scratch = Scratch::new(name);
    let image = image(&scratch);
    let queues = QUEUES.to_string();
    let mut backend = Backend::start(&scratch, &image, &[&["--num-queues", &queues], options].concat());
    let mut model = vec![0; IMAGE];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for features in [VirtioFeatureFlags::empty(), VirtioFeatureFlags::RING_EVENT_IDX] {
        let mut driver = Driver::connect(&backend.socket, features);
        let requests = work(&mut driver, &mut model, &mut random, support::random_time() / 4);
        println!("{name}: {requests} requests");
        drop(driver);
        backend.assert_alive();
    }
    assert!(std::fs::read(&image).expect("the image") == model, "the image is another");
    backend.end();
}

#[test]
fn a_foreign_driver_reads_what_it_wrote_by_plain_calls() {
    a_driver_reads_what_it_wrote("foreign-sync", &["--engine", "sync", "--direct", "off", "--workers", "2"]);
}

#[test]
fn a_foreign_driver_reads_what_it_wrote_by_io_uring() {
    a_driver_reads_what_it_wrote("foreign-uring", &["--engine", "uring"]);
}

#[test]
fn a_foreign_driver_reads_what_it_wrote_without_a_write_cache_and_without_looking_on() {
    a_driver_reads_what_it_wrote("foreign-cautious", &["--write-cache", "off", "--look-us", "0", "--workers", "4"]);
}

#[test]
fn a_foreign_driver_hears_of_what_cannot_be_done() {
    let scratch = Scratch::new("foreign-errors");
    let image = image(&scratch);
    std::fs::write(&image, vec![7; IMAGE]).expect("the image");
    let queues = QUEUES.to_string();
    let backend = Backend::start(&scratch, &image, &["--read-only", "--num-queues", &queues]);
    let mut driver = Driver::connect(&backend.socket, VirtioFeatureFlags::empty());
    let end = IMAGE as u64;
    let failed = -libc::EIO;
    driver.one(0, |queue, buffer| queue.read(end - 512, &mut buffer[..512], 0).expect("there is room"));
    assert_eq!(driver.buffers.part(0)[..512], [7; 512]);
    driver.one(failed, |queue, buffer| queue.read(end, &mut buffer[..512], 0).expect("there is room"));
    driver.one(failed, |queue, buffer| queue.read(end - 512, &mut buffer[..1024], 0).expect("there is room"));
    driver.one(failed, |queue, buffer| queue.read(0, &mut buffer[..513], 0).expect("there is room"));
    driver.one(failed, |queue, buffer| queue.write(0, &buffer[..512], 0).expect("there is room"));
    driver.one(failed, |queue, _| queue.discard(0, 512, 0).expect("there is room"));
    driver.one(failed, |queue, _| queue.write_zeroes(0, 512, true, 0).expect("there is room"));
    drop(driver);
    backend.end();
    assert!(std::fs::read(&image).expect("the image").iter().all(|it| *it == 7), "nothing was written");
}
