//! A device that is no disk, served by a backend that others have written (rust-vmm's `vhost-device-rng`): its profile is measured as that
//! of any other, without a line of code for it.
//!
//! `cargo xtask test` says where the backend is; without that there is nothing to test.

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::mm::{MapFlags, ProtFlags};
use support::{AVAILABLE, Broker, DESCRIPTORS, Disk, PATIENCE, RING_SIZE, Scratch, USED, Vmm, wait_for};
use warmswap_wire::ring::{DESC_F_WRITE, Descriptor, Layout};

/// The variable that names the backend's program.
const PROGRAM: &str = "WARMSWAP_RNG_BACKEND";
/// Bytes that are asked for at a time.
const BYTES: u32 = 256;
/// Buffers, each in a page of its own.
const PAGES: u16 = 16;
const BUFFERS: u64 = 0x1_0000;
const PAGE: usize = 4096;

/// A process of the test's own. Killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// `avail.idx`, mapped. Written through the file, as the rest is, its two bytes may come one after the other: a device that looks between
/// them sees an index that never was, and this backend's thread ends then.
struct Index(*mut u8);

impl Index {
    fn of(device: &Disk) -> Self {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping where the kernel likes it, unmapped when this value is dropped.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGE, protection, flags, &device.memory, AVAILABLE) };
        Index(start.expect("it is mapped").cast())
    }

    fn publish(&self, next: u16) {
        // SAFETY: inside the mapping, aligned, and only ever accessed atomically through it.
        let index = unsafe { AtomicU16::from_ptr(self.0.add(2).cast()) };
        index.store(next.to_le(), Ordering::Release);
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this length; nothing refers to it any more.
        let _unmapped = unsafe { rustix::mm::munmap(self.0.cast(), PAGE) };
    }
}

/// What the backend's threads and event descriptors are doing, for a failed test.
fn state_of(backend: &Child, device: &Disk) -> String {
    let layout = Layout::new(RING_SIZE).expect("a power of two");
    let index = |at| u16::from_le_bytes(device.get(at));
    let mut text = format!(
        "avail.idx {}, used.idx {}, avail_event {}, avail.flags {}, used.flags {}\n",
        index(AVAILABLE + 2),
        index(USED + 2),
        index(USED + layout.avail_event()),
        index(AVAILABLE),
        index(USED)
    );
    let process = PathBuf::from(format!("/proc/{}", backend.id()));
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    for task in std::fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
        let words =
            ["comm", "wchan", "syscall", "schedstat"].map(|name| read(task.path().join(name)).trim().to_owned());
        text += &format!("thread {}: {}\n", task.file_name().display(), words.join(", "));
    }
    for entry in std::fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten() {
        let count = read(entry.path())
            .lines()
            .filter(|it| it.starts_with("eventfd-") || it.starts_with("tfd"))
            .collect::<Vec<_>>()
            .join("; ");
        if !count.is_empty() {
            text += &format!("descriptor {}: {count}\n", entry.file_name().display());
        }
    }
    text
}

fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs_f64() * 1e3
}

/// Asks for random bytes again and again until it is told to stop, and notes when each came.
fn load(backend: &Child, device: &Disk, stop: &AtomicBool) -> Vec<f64> {
    let layout = Layout::new(RING_SIZE).expect("a power of two");
    let index = Index::of(device);
    let (mut next, mut came) = (0_u16, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let head = next % PAGES;
        let addr = BUFFERS + u64::from(head) * 4096;
        let descriptor = Descriptor { addr, len: BYTES, flags: DESC_F_WRITE, next: 0 };
        device.put(DESCRIPTORS + 16 * u64::from(head), &descriptor.to_le_bytes());
        device.put(AVAILABLE + layout.available_slot(layout.slot(next)), &head.to_le_bytes());
        next = next.wrapping_add(1);
        index.publish(next);
        device.kick();
        let deadline = Instant::now() + PATIENCE;
        // Not slept for: what is measured is the device.
        while u16::from_le_bytes(device.get(USED + 2)) != next {
            assert!(Instant::now() < deadline, "random bytes do not come: {}", state_of(backend, device));
            std::thread::yield_now();
        }
        came.push(unix_ms());
        // Requests are only sampled where a processor has nothing to do.
        std::thread::sleep(Duration::from_micros(200));
    }
    assert_ne!(device.get::<16>(BUFFERS), [0; 16], "they are random");
    came
}

/// Values that a window of this device has, whatever else runs on the machine.
const MEASURED: [&str; 5] = ["completions_per_s", "latency_mean_us", "cpu_cores", "rss_bytes", "descriptors"];

/// Values that it has if a processor had nothing to do for some moments.
const SAMPLED: [&str; 6] =
    ["read_share", "device_write_share", "size_mean_bytes", "working_set_pages", "latency_p50_us", "kick_due_share"];

/// The last window, once there is one of nothing but load in which everything could be measured; if that takes too long, one in which nothing
/// was sampled.
fn whole_window(broker: &Broker, since_ms: f64) -> serde_json::Value {
    let mut window = serde_json::Value::Null;
    let until = Instant::now() + PATIENCE / 2;
    wait_for("a window in which everything was measured", || {
        let shown = broker.ask(&["show", "disk", "--json"]);
        let mut shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
        window = shown["profile"]["window"].take();
        let (Some(end), Some(span)) = (window["end_unix_ms"].as_f64(), window["span_ms"].as_f64()) else {
            return false;
        };
        let has = |names: &[&str]| names.iter().all(|name| window["values"][name].is_number());
        end - span > since_ms && has(&MEASURED) && (has(&SAMPLED) || Instant::now() > until)
    });
    window
}

#[test]
fn a_device_that_is_no_disk_has_a_profile() {
    let Some(program) = std::env::var_os(PROGRAM) else {
        eprintln!("skipped: {PROGRAM} does not say where vhost-device-rng is");
        return;
    };
    let scratch = Scratch::new("rng");
    let socket = scratch.path("rng.sock");
    let mut backend = Command::new(program);
    backend.arg("--socket-path").arg(&socket).stdin(Stdio::null());
    let backend = Running(backend.spawn().expect("it starts"));
    // It serves several sockets, and numbers them.
    let first = scratch.path("rng.sock0");
    wait_for("the backend's socket", || first.exists());
    // A backend that shares two processors with many may get none for half a second, and one that others started does not come back.
    let patience = ["--hang-ms", "20000"];
    let options = [&["--type", "rng", "--primary-socket", first.to_str().expect("plain text")], &patience[..]].concat();
    let broker = Broker::start(&scratch, &options, &[]);
    let mut vmm = Vmm::connect(&broker.socket);
    let device = Disk::new();
    vmm.start_with(&device, 0).expect("a VMM that keeps the rules is served");
    let stop = AtomicBool::new(false);
    let (window, came) = std::thread::scope(|scope| {
        let (backend, device, stop) = (&backend.0, &device, &stop);
        let began = unix_ms();
        let loading = scope.spawn(|| load(backend, device, stop));
        let window = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| whole_window(&broker, began)));
        stop.store(true, Ordering::Relaxed);
        let came = loading.join().unwrap_or_else(|_| panic!("the device does not serve: {}", broker.noted()));
        (window.unwrap_or_else(|_| panic!("{}", broker.noted())), came)
    });
    let value = |name: &str| window["values"][name].as_f64().expect("it was waited for");
    let (end, span) = (window["end_unix_ms"].as_f64().expect("a time"), window["span_ms"].as_f64().expect("a time"));
    let truth = came.iter().filter(|at| (end - span..end).contains(*at)).count() as f64 / span * 1e3;
    let told = value("completions_per_s");
    // What is told ends with the last look at the ring, which may have been kept from its processor as well.
    assert!((told / truth - 1.0).abs() < 0.5, "{told} per second, {truth} in truth");
    for name in ["latency_mean_us", "cpu_cores", "rss_bytes", "descriptors"] {
        assert!(value(name) > 0.0, "{name}");
    }
    assert!(window["values"]["error_share"].is_null(), "such requests have no status");
    if !SAMPLED.iter().all(|name| window["values"][name].is_number()) {
        eprintln!("samples not tested: no processor had a moment to spare");
        return;
    }
    // The backend writes into every buffer, and nothing else.
    assert_eq!(
        (value("read_share"), value("device_write_share"), value("size_mean_bytes")),
        (1.0, 1.0, f64::from(BYTES))
    );
    // Reckoned from some ten requests that were looked into, on a busy machine.
    let pages = value("working_set_pages");
    assert!((8.0..=32.0).contains(&pages), "{pages} pages, {PAGES} in truth");
    assert!(value("latency_p50_us") > 0.0 && value("kick_due_share") > 0.0);
}
