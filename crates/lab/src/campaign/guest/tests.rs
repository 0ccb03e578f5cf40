//! The guest against a real qemu-storage-daemon.

use super::*;
use crate::campaign::workload::{BLOCKS, phases};
use crate::common::process::die_with_parent;
use crate::common::qsd::{Aio, Qsd, listens};
use crate::guest::BLOCK;
use rustix::process::Signal;
use std::process::{Child, Command, Stdio};

/// A backend nobody guards. Its directory goes with it.
struct Bare {
    directory: std::path::PathBuf,
    child: Child,
}

impl Bare {
    fn start(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("campaign-guest-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let image = directory.join("image");
        std::fs::write(&image, vec![0; BLOCKS as usize * BLOCK]).expect("an image");
        let socket = directory.join("socket");
        let qsd = Qsd { image, queues: 1, aio: Aio::Threads, direct: false, throttle: None };
        let line = qsd.command_line(&socket.display().to_string());
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        let child =
            die_with_parent(&mut command).spawn().expect("qemu-storage-daemon (Debian package qemu-utils) is needed");
        let bare = Bare { directory, child };
        while !listens(&socket) {
            std::thread::sleep(Duration::from_millis(1));
        }
        bare
    }

    /// Runs a guest for a second and a half; `events` come half a second after its start, and `signal` as well.
    fn run(&self, workload: &str, events: &[Event], signal: Option<Signal>) -> (u64, Felt) {
        let backend = || Target::open(self.child.id()).expect("it lives");
        let phases = phases(workload, &mut Rng::new(1, 1)).expect("it is listed");
        let rng = [Rng::new(1, 2), Rng::new(1, 3)];
        let timeout = Duration::from_millis(300);
        let driver = Driver::boot(self.directory.join("socket"), backend(), (phases, BLOCKS), timeout, rng);
        let driver = driver.expect("it boots");
        let began = now_ns();
        let turn = began + 500_000_000;
        let events: Vec<(u64, Event)> = events.iter().map(|event| (turn, *event)).collect();
        let target = backend();
        let signalling = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_nanos(turn.saturating_sub(now_ns())));
            signal.map(|signal| target.signal(signal)).transpose().expect("it lives");
        });
        let felt = driver.run(began, turn, began + 1_500_000_000, &events).expect("the guest runs");
        signalling.join().expect("it ends");
        (turn, felt)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What failed, and how long after the turn, in milliseconds.
fn failure((turn, felt): (u64, Felt)) -> (String, u64) {
    let failure = felt.failure.expect("the disk was lost");
    (failure.what, (failure.at_ns - turn) / 1_000_000)
}

#[test]
fn a_healthy_disk_is_kept_through_all_that_is_harmless() {
    let bare = Bare::start("healthy");
    let events =
        [Event::Mask, Event::Speed(2.0), Event::Writes(50), Event::Reboot, Event::PlugMemory, Event::ReplaceCall];
    let (_, felt) = bare.run("mixed-qd8", &events, None);
    assert_eq!(felt.failure, None);
    assert!(felt.latencies.iter().all(|it| it.histogram().len() > 100), "{:?}", felt.latencies);
}

#[test]
fn a_disk_that_stands_still_is_lost_when_a_request_has_waited_long_enough() {
    let (what, after) = failure(Bare::start("stopped").run("mixed-qd8", &[], Some(Signal::STOP)));
    assert_eq!(what, "a request has had no answer for 300 ms");
    assert!((290..600).contains(&after), "{after} ms");
}

#[test]
fn a_dead_backend_is_noticed_at_once() {
    let (what, after) = failure(Bare::start("dead").run("read-qd1", &[], Some(Signal::KILL)));
    assert_eq!(what, "the backend is dead");
    assert!(after < 200, "{after} ms");
}

#[test]
fn lost_kicks_and_interrupts_are_lost_to_the_guest_as_well() {
    for (name, event) in [("kicks", Event::LoseKicks(1_000)), ("calls", Event::LoseCalls(1_000))] {
        let (what, _) = failure(Bare::start(name).run("read-qd1", &[event], None));
        assert_eq!(what, "a request has had no answer for 300 ms", "{name}");
    }
}
