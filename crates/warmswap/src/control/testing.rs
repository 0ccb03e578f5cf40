//! A control socket with a historian behind it, and no device.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use warmswap_core::{DrainMethod, FenceLevel, Limits, PairConfig, RegionUse, Survivors};
use warmswap_predict::{Feature, Grain, Record};
use warmswap_store::Retention;
use warmswap_wire::DeviceType;

use super::server::{Patience, serve_with};
use super::{Client, socket_path};
use crate::config::{DeviceConfig, Source};
use crate::driver::{Commander, listen};
use crate::journal::{Form, Journal, JournalThread};
use crate::profile::historian::{self, Beginning, HistorianThread, HistoryHandle, Noted, Notes, StoreConfig};

/// 2026-01-01.
pub(crate) const START: u64 = 1_767_225_600_000_000_000;
const TICK: u64 = 100_000_000;

/// A record whose values can be told from its number.
pub(crate) fn record(grain: Grain, number: u64) -> Record {
    let span = if grain == Grain::Tick { TICK } else { 10 * TICK };
    let mut record = Record::new(grain, number, 3, START + (number + 1) * span, (span / 1_000) as u32);
    record.set(Feature::Arrivals, Some(100.0 + (number % 400) as f32));
    record.set(Feature::LatencyP99, Some(12.5 * (number % 7) as f32));
    if number.is_multiple_of(3) {
        record.set(Feature::Cpu, Some(0.25));
    }
    record
}

/// The running parts, gone with the value.
pub(crate) struct Served {
    pub(crate) dir: PathBuf,
    pub(crate) notes: Option<Notes>,
    pub(crate) history: HistoryHandle,
    pub(crate) journal: Journal,
    threads: Option<(HistorianThread, JournalThread)>,
    device: Arc<str>,
}

impl Served {
    /// Of the device `disk`, in a directory of the test's own.
    pub(crate) fn start(test: &str, store: Option<&Path>) -> Self {
        Self::start_with(test, store, Patience::default())
    }

    pub(in crate::control) fn start_with(test: &str, store: Option<&Path>, patience: Patience) -> Self {
        let dir = std::env::temp_dir().join(format!("ws-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        let device: Arc<str> = "disk".into();
        let (journal, sender, journal_thread) = Journal::start(None, true, None).expect("a thread can be started");
        let store = store.map(|store| StoreConfig { dir: dir.join(store), retention: Retention::default() });
        let started = historian::start(&[Arc::clone(&device)], store, Beginning::default(), sender, Vec::new());
        let (notes, history, historian) = started.expect("a thread can be started");
        let config = config(&dir);
        let listener = listen(&config.control_socket()).expect("a socket can be made");
        let (commander, read, told) = (Commander::to_nobody(), journal.clone(), history.clone());
        serve_with(&config, listener, commander, read, told, patience).expect("it can be served");
        let threads = Some((historian, journal_thread));
        Served { dir, notes: Some(notes), history, journal, threads, device }
    }

    pub(crate) fn client(&self) -> Client {
        let mut client = Client::connect(&socket_path(&self.dir, "disk")).expect("somebody listens");
        client.set_patience(Some(Duration::from_secs(20)));
        client
    }

    /// Has records noted, and waits until they are.
    pub(crate) fn note(&self, grain: Grain, numbers: std::ops::Range<u64>) {
        let notes = self.notes.as_ref().expect("it has not ended");
        let last = numbers.end.checked_sub(1).map(|number| record(grain, number));
        for number in numbers {
            let (device, record) = (Arc::clone(&self.device), record(grain, number));
            let noted = || match grain {
                Grain::Tick => Noted::Tick(Arc::clone(&device), record),
                Grain::Window => Noted::Window(Arc::clone(&device), record),
            };
            wait_for("room", || notes.send(noted()));
        }
        wait_for("the last record", || match grain {
            Grain::Tick => self.history.last_tick("disk") == last,
            Grain::Window => self.history.last_windows("disk", 1).last().copied() == last,
        });
    }

    /// Has a recording made, and waits until it is there.
    pub(crate) fn freeze(&self, reason: &str, unix_ns: u64) {
        let notes = self.notes.as_ref().expect("it has not ended");
        let noted = || Noted::Freeze(Arc::clone(&self.device), reason.to_owned(), unix_ns);
        wait_for("room", || notes.send(noted()));
        wait_for("the recording", || self.history.recordings("disk").is_ok_and(|times| times.contains(&unix_ns)));
    }

    /// Ends the historian as the end of the program does.
    pub(crate) fn end(&mut self) {
        self.notes = None;
        if let Some((historian, journal)) = self.threads.take() {
            assert!(historian.join(), "it ends");
            journal.join();
        }
    }

    /// The journal so far.
    pub(crate) fn journal(&self) -> String {
        self.journal.read("disk", 0, Duration::ZERO, Form::Json).0.join("\n")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "{what} has not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn config(dir: &Path) -> DeviceConfig {
    DeviceConfig {
        name: "disk".to_owned(),
        socket: dir.join("vmm.sock"),
        socket_mode: None,
        socket_group: None,
        predecessor: None,
        source: Source::External { primary: dir.join("primary.sock"), shadow: None },
        pair: PairConfig {
            device: DeviceType::Blk,
            drain: DrainMethod::Stop,
            survivors: Survivors::Place,
            region: RegionUse::Witness,
            fence: FenceLevel::Stopped,
            shadow: false,
            canary: false,
            on_prediction: warmswap_core::OnPrediction::Act,
            limits: Limits::default(),
        },
        run_dir: dir.to_owned(),
        control_dir: dir.to_owned(),
        fence_command: None,
    }
}
