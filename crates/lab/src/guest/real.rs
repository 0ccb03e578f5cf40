//! The guest against a real qemu-storage-daemon.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::*;
use crate::common::qsd::{Aio, Qsd, Running};

/// A backend, its image and a guest; the directory goes with it.
struct Bench {
    guest: Guest,
    backend: Running,
    qsd: Qsd,
    directory: PathBuf,
}

impl Bench {
    fn new(name: &str, mut options: Options) -> Self {
        let directory = std::env::temp_dir().join(format!("lab-guest-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("directory");
        let image = directory.join("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("image");
        let qsd = Qsd { image, queues: options.queues, aio: Aio::Threads, direct: false, throttle: None };
        let socket = directory.join("socket");
        let backend = qsd.spawn(&socket).expect("qemu-storage-daemon (Debian package qemu-utils) is needed");
        options.socket = socket;
        let mut guest = Guest::new(options).expect("guest");
        guest.connect().expect("connect");
        Bench { guest, backend, qsd, directory }
    }

    fn fill(&self, queue: usize, slot: Slot, value: u64) {
        let data = self.guest.queues[queue].data(slot);
        for (index, word) in data.mapping.words(data.start, data.length).iter().enumerate() {
            word.store(value.wrapping_add(index as u64), Ordering::Relaxed);
        }
    }

    fn check(&self, queue: usize, slot: Slot, value: u64) {
        let data = self.guest.queues[queue].data(slot);
        for (index, word) in data.mapping.words(data.start, data.length).iter().enumerate() {
            assert_eq!(word.load(Ordering::Relaxed), value.wrapping_add(index as u64), "word {index} of slot {slot}");
        }
    }

    /// Submits one request and waits for it by interrupt.
    fn run(&mut self, queue: usize, slot: Slot, request: Request) -> Completion {
        let queue = &mut self.guest.queues[queue];
        assert!(queue.submit(slot, request));
        queue.kick();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(done) = queue.pop().expect("no fault") {
                assert_eq!((done.status, done.len, done.slot), (Status::OK, request.used_bytes(), slot));
                return done;
            }
            assert!(Instant::now() < deadline, "{request:?} was not completed: {}", queue.vring().describe());
            queue.wait_for_call(Duration::from_millis(2000)).expect("poll");
        }
    }

    fn write_and_read(&mut self, rounds: u64) {
        let queues = self.guest.queues.len();
        for round in 0..rounds {
            let queue = round as usize % queues;
            let request =
                Request { segments: 1 + (round % 4) as u16, direct: round % 3 == 0, ..Request::write(round * 2, 2) };
            self.fill(queue, 0, round << 20);
            self.run(queue, 0, request);
            self.fill(queue, 1, 0);
            self.run(queue, 1, Request { kind: Kind::Read, ..request });
            self.check(queue, 1, round << 20);
        }
        self.run(0, 2, Request::flush());
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.backend.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn shape(start: u16) -> QueueShape {
    QueueShape { size: 64, depth: 16, blocks_max: 2, segments_max: 4, start }
}

#[test]
fn written_data_is_read_back_across_the_index_wrap() {
    for (name, event_idx, indirect) in [("plain", false, false), ("event", true, false), ("indirect", true, true)] {
        let options = Options { queues: 2, event_idx, indirect, shape: shape(65500), ..Options::default() };
        let mut bench = Bench::new(name, options);
        bench.guest.start().expect("start");
        bench.write_and_read(100);
    }
}

#[test]
fn every_request_type_the_device_offers_is_served() {
    let mut bench = Bench::new("types", Options { shape: shape(0), ..Options::default() });
    bench.guest.start().expect("start");
    bench.fill(0, 0, 77);
    bench.run(0, 0, Request::write(10, 2));
    bench.run(0, 1, Request { kind: Kind::WriteZeroes, ..Request::write(11, 1) });
    bench.run(0, 2, Request { kind: Kind::Discard, ..Request::write(100, 1) });
    bench.run(0, 3, Request::read(10, 2));
    let data = bench.guest.queues[0].data(3);
    assert_eq!(data.mapping.u64(data.start).load(Ordering::Relaxed), 77);
    assert_eq!(data.mapping.u64(data.start + BLOCK).load(Ordering::Relaxed), 0);
}

#[test]
fn a_guest_lives_through_what_its_vmm_does() {
    for memory_slots in [false, true] {
        let options =
            Options { queues: 2, shape: shape(65530), memory_slots, memory_bytes: 4 << 30, ..Options::default() };
        let mut bench = Bench::new(if memory_slots { "slots" } else { "table" }, options);
        bench.guest.start().expect("start");
        bench.write_and_read(8);
        let region = bench.guest.plug_memory(16 << 20).expect("plug");
        let dimm = bench.guest.memory_mut().allocate(region, 2 * BLOCK, 4096).expect("room");
        let old = bench.guest.queues[0].replace_data(1, dimm);
        bench.write_and_read(8);
        bench.guest.queues[0].replace_data(1, old);
        bench.guest.unplug_memory().expect("unplug");
        bench.guest.mask(1).expect("mask");
        bench.guest.unmask(1).expect("unmask");
        bench.guest.replace_call(0).expect("another call descriptor");
        bench.write_and_read(8);
        let bases = bench.guest.stop().expect("stop");
        assert_eq!(bases, [bench.guest.queues[0].vring().used_idx(), bench.guest.queues[1].vring().used_idx()]);
        bench.guest.start_from(&bases).expect("resume");
        bench.write_and_read(8);
        bench.guest.stop().expect("stop");
        bench.guest.disconnect();
        bench.guest.connect().expect("reconnect");
        bench.guest.start().expect("boot again");
        bench.write_and_read(8);
        assert_eq!(bench.guest.memory().stray_pages().expect("seek"), 0);
    }
}

#[test]
fn a_killed_backend_is_replaced_behind_the_same_socket() {
    let mut bench = Bench::new("respawn", Options { shape: shape(0), ..Options::default() });
    bench.guest.start().expect("start");
    bench.write_and_read(8);
    bench.backend.kill().expect("kill");
    bench.guest.disconnect();
    std::fs::remove_file(bench.directory.join("socket")).expect("left behind");
    bench.backend = bench.qsd.spawn(&bench.directory.join("socket")).expect("respawn");
    bench.guest.connect().expect("reconnect");
    let bases = [bench.guest.queues[0].vring().used_idx()];
    bench.guest.start_from(&bases).expect("go on");
    bench.write_and_read(8);
}

#[test]
#[ignore = "a measurement: cargo test --release -p lab -- --ignored --nocapture full_speed"]
fn full_speed() {
    for (depth, polling) in [(1, true), (1, false), (32, true), (32, false)] {
        let shape = QueueShape { size: 256, depth: 32, blocks_max: 1, segments_max: 1, start: 0 };
        let mut bench = Bench::new("speed", Options { shape, ..Options::default() });
        bench.guest.start().expect("start");
        let queue = &mut bench.guest.queues[0];
        let mut latencies = Latencies::new();
        if polling {
            queue.disable_calls();
        }
        for slot in 0..depth {
            queue.submit(slot, Request::read(slot.into(), 1));
        }
        queue.kick();
        let end = now_ns() + 2_000_000_000;
        while now_ns() < end {
            if !polling {
                queue.wait_for_call(Duration::from_millis(100)).expect("poll");
                queue.disable_calls();
            }
            loop {
                while let Some(done) = queue.pop().expect("no fault") {
                    latencies.record(done.submitted_ns, done.completed_ns);
                    queue.submit(done.slot, Request::read(u64::from(done.head) * 7 % 1000, 1));
                }
                if polling || queue.enable_calls() {
                    break;
                }
            }
            queue.kick();
        }
        let histogram = latencies.histogram();
        println!(
            "depth {depth} polling {polling}: {} IOPS, p50 {} us, p99 {} us, longest gap {} us",
            histogram.len() / 2,
            histogram.value_at_quantile(0.5) / 1000,
            histogram.value_at_quantile(0.99) / 1000,
            latencies.longest_gap_ns() / 1000,
        );
    }
}
