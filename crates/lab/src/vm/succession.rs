//! Brokers that die and are followed by others: each is watched from its first answer to its death, and how long nobody answered is noted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::lines::Lines;
use crate::common::process::Target;

/// How long one answer is waited for before the question is asked again.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How often an answer is looked for.
const LOOK: Duration = Duration::from_micros(500);
/// How often a broker that lives is asked whether it is still to be watched.
const WATCH: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// What was seen so far.
#[derive(Debug, Default)]
struct Seen {
    /// The broker that answers; none between a death and the next one's first answer.
    broker: Option<u32>,
    /// When it was killed by us, until it is dead.
    killed: Option<Instant>,
    deaths: u64,
    readopted_us: Vec<u64>,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    ended: AtomicBool,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// Watches the brokers of one keeper, one after the other, from a thread of its own.
#[derive(Debug)]
pub(crate) struct Succession {
    shared: Arc<Shared>,
    control: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Succession {
    /// Watches those that answer at the control socket.
    pub(crate) fn watch(control: PathBuf) -> Self {
        let shared = Arc::new(Shared::default());
        let (theirs, socket) = (shared.clone(), control.clone());
        let thread = Some(thread::spawn(move || follow(&theirs, &socket)));
        Self { shared, control, thread }
    }

    /// Kills the broker that answers now. One that has died meanwhile is as dead.
    pub(crate) fn kill(&self) {
        let mut seen = self.shared.seen();
        let Some(broker) = seen.broker.and_then(|pid| Target::open(pid).ok()) else { return };
        seen.killed = Some(Instant::now());
        let _gone = broker.signal(Signal::KILL);
    }

    /// Has the broker kill itself before it does the `step`th thing from now on.
    pub(crate) fn die_before(&self, step: u64, device: &str) -> anyhow::Result<()> {
        let command = json!({"verb": "failpoint", "device": device, "step": step, "whom": "broker"});
        let answer: Value = serde_json::from_str(&ask(&self.control, &command)?)?;
        anyhow::ensure!(answer.get("error").is_none(), "the broker sets no failpoint: {answer}");
        Ok(())
    }

    /// Brokers that have died.
    pub(crate) fn deaths(&self) -> u64 {
        self.shared.seen().deaths
    }

    /// Whether each that has died was followed by one that answers.
    pub(crate) fn is_answered(&self) -> bool {
        let seen = self.shared.seen();
        seen.broker.is_some() && seen.killed.is_none()
    }

    /// Stops watching, because the broker is about to end in order. Says how many have died, and how long it took until the next one
    /// answered.
    pub(crate) fn end(&mut self) -> (u64, Vec<u64>) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        let mut seen = self.shared.seen();
        (seen.deaths, std::mem::take(&mut seen.readopted_us))
    }
}

impl Drop for Succession {
    fn drop(&mut self) {
        self.end();
    }
}

/// One broker after the other.
fn follow(shared: &Shared, control: &Path) {
    let mut died = None;
    while !shared.has_ended() {
        let Ok(pid) = broker_of(control) else {
            thread::sleep(LOOK);
            continue;
        };
        let mut seen = shared.seen();
        seen.readopted_us.extend(died.take().map(microseconds_since));
        // Dead already: the next one is asked.
        let Ok(broker) = Target::open(pid) else { continue };
        seen.broker = Some(pid);
        drop(seen);
        if !outlive(shared, &broker) {
            return;
        }
        let mut seen = shared.seen();
        seen.broker = None;
        seen.deaths += 1;
        died = seen.killed.take().or_else(|| Some(Instant::now()));
    }
}

/// Waits until it is dead. False: it need not be watched any more.
fn outlive(shared: &Shared, broker: &Target) -> bool {
    while !shared.has_ended() {
        let mut fds = [PollFd::new(broker, PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&WATCH)).is_ok_and(|ready| ready > 0) {
            return true;
        }
    }
    false
}

fn microseconds_since(instant: Instant) -> u64 {
    u64::try_from(instant.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The process that answers.
fn broker_of(control: &Path) -> anyhow::Result<u32> {
    let status: Value = serde_json::from_str(&ask(control, &json!({"verb": "status"}))?)?;
    let pid = status["devices"][0]["broker"]["pid"].as_u64().context("the broker does not say who it is")?;
    Ok(u32::try_from(pid)?)
}

/// One question and its answer.
fn ask(control: &Path, command: &Value) -> anyhow::Result<String> {
    let mut lines = Lines::connect(control)?;
    lines.send(command)?;
    let deadline = Instant::now() + ANSWER_MAX;
    while Instant::now() < deadline {
        if let Some(line) = lines.next()? {
            return Ok(line);
        }
        thread::sleep(LOOK);
    }
    anyhow::bail!("the broker does not answer")
}
