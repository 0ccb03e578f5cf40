//! The writer: the thread that puts what the historian keeps onto a disk. A disk that hangs keeps it, and nobody else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use warmswap_core::Entry;
use warmswap_predict::{Model, Record};
use warmswap_store::{History, Recording, StoreError};

use super::historian::{Shared, StoreConfig, history_path, unix_ns};
use super::predictor::Predictor;
use super::windows::WINDOWS_MAX;
use crate::journal::JournalSender;

/// Things to be written that may wait, and so many for each device: its windows of some minutes.
const QUEUE_MAX: usize = 64;
const QUEUE_PER_DEVICE: usize = 8;
/// Windows that wait for the disk: well before they go from memory they are there.
const PENDING_MAX: usize = WINDOWS_MAX / 2;
/// Windows go to the disk this often.
const FLUSH_EVERY: Duration = Duration::from_secs(10);
/// A history that somebody else reads is tried again this often.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// A health snapshot is taken this often, if nothing else makes one.
const SNAPSHOT_EVERY: Duration = Duration::from_secs(600);
/// Of so many times, once it is made sure that they are there, and what is too old goes.
const FLUSHES_PER_PRUNE: u32 = 6;
/// What is too old goes at least this often, in flushes: of a device at rest nothing is written.
const FLUSHES_PER_PRUNE_MAX: u32 = 360;

/// Something to be written.
#[derive(Debug)]
enum Work {
    /// A window of a device.
    Window(Arc<str>, Box<Record>),
    /// Its last minutes; the windows before them belong to them.
    Recording(Arc<str>, Recording),
    /// A health snapshot: why, and what led to it.
    Snapshot(Arc<str>, String, Option<Recording>),
}

/// The historian's end.
#[derive(Debug)]
pub(super) struct Writing {
    queue: Sender<Work>,
    shared: Arc<Shared>,
    journal: JournalSender,
}

impl Writing {
    /// Has a window written. One that finds no room is taken from memory later.
    pub(super) fn window(&self, device: &Arc<str>, record: &Record) {
        if self.queue.try_send(Work::Window(Arc::clone(device), Box::new(*record))).is_err()
            && let Some(device) = self.shared.lock().get_mut(device)
        {
            device.behind = true;
        }
    }

    /// Has the last minutes of a device written.
    pub(super) fn recording(&self, device: &Arc<str>, recording: Recording) {
        if self.queue.try_send(Work::Recording(Arc::clone(device), recording)).is_err() {
            let next = "this recording of its last minutes is kept in memory only";
            self.say_full("HistoryBehind", device, next);
        }
    }

    /// Has a health snapshot taken, where there is a directory for them.
    pub(super) fn snapshot(&self, device: &Arc<str>, reason: &str, recording: Option<Recording>) {
        let work = Work::Snapshot(Arc::clone(device), reason.to_owned(), recording);
        if self.shared.snapshotter.is_some() && self.queue.try_send(work).is_err() {
            self.say_full("SnapshotFailed", device, "the one before it is kept; the next is tried as usual");
        }
    }

    fn say_full(&self, event: &'static str, device: &str, next: &str) {
        let entry = Entry::warning(event).with("reason", "the disk does not keep up: too much waits to be written");
        self.journal.entry(device, entry.with("next", next));
    }
}

/// What goes to a device's file; gone after the first error.
#[derive(Debug)]
struct Kept {
    history: History,
    /// Windows that are not in it yet.
    pending: Vec<Record>,
    /// End of the last window that is.
    written: Option<u64>,
    flushes: u32,
    appended: bool,
}

struct Writer {
    shared: Arc<Shared>,
    store: Option<StoreConfig>,
    kept: BTreeMap<Arc<str>, Kept>,
    /// Devices whose file somebody else reads at the moment.
    waiting: Vec<Arc<str>>,
    journal: JournalSender,
}

/// Starts the thread. It ends when [`Writing`] is gone and everything is written.
pub(super) fn start(
    shared: Arc<Shared>,
    store: Option<StoreConfig>,
    models: BTreeMap<String, (Model, String)>,
    journal: JournalSender,
    cpus: Vec<usize>,
) -> std::io::Result<(Writing, JoinHandle<()>)> {
    let devices = shared.lock().len();
    let (queue, work) = crossbeam_channel::bounded(QUEUE_MAX + QUEUE_PER_DEVICE * devices);
    let writing = Writing { queue, shared: Arc::clone(&shared), journal: journal.clone() };
    let writer = Writer { shared, store, kept: BTreeMap::new(), waiting: Vec::new(), journal };
    let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
        super::keep_to(&cpus);
        writer.restore(models);
        writer.run(&work);
    })?;
    Ok((writing, thread))
}

impl Writer {
    fn run(mut self, work: &Receiver<Work>) {
        let devices: Vec<Arc<str>> = self.shared.lock().keys().cloned().collect();
        devices.iter().for_each(|device| self.open(device));
        let mut due = Instant::now() + FLUSH_EVERY;
        // One after the other: of many devices all at once would keep it from its records.
        let snapshot_every = SNAPSHOT_EVERY / u32::try_from(devices.len().max(1)).unwrap_or(u32::MAX);
        let (mut snapshot_due, mut turn) = (Instant::now() + snapshot_every, devices.iter().cycle());
        let mut retry = Instant::now() + RETRY_EVERY;
        loop {
            let next = if self.waiting.is_empty() { due } else { due.min(retry) };
            match work.recv_deadline(next) {
                Ok(work) => self.take(work),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let now = Instant::now();
            if now >= retry {
                self.waiting.clone().iter().for_each(|device| self.open(device));
                retry = now + RETRY_EVERY;
            }
            if now >= due {
                self.flush_all(false);
                due = now + FLUSH_EVERY;
            }
            if now >= snapshot_due {
                turn.next().into_iter().for_each(|device| self.snapshot(device, "periodic", None));
                snapshot_due = now + snapshot_every;
            }
        }
        self.flush_all(true);
        // One that was refused, or never measured anything, has nothing to go on from.
        let measured =
            |device: &&Arc<str>| self.shared.lock().get(*device).is_some_and(|it| it.windows.iter().next().is_some());
        devices.iter().filter(measured).for_each(|device| self.snapshot(device, "the broker ends", None));
        // The files are closed when the last one who reads them is done.
        self.shared.lock().values_mut().for_each(|device| device.reader = None);
    }

    fn take(&mut self, work: Work) {
        match work {
            Work::Window(device, record) => {
                let Some(kept) = self.kept.get_mut(&device) else { return };
                kept.pending.push(*record);
                if kept.pending.len() >= PENDING_MAX {
                    self.flush(&device, false, None);
                }
            }
            Work::Recording(device, recording) => self.flush(&device, false, Some(&recording)),
            Work::Snapshot(device, reason, recording) => self.snapshot(&device, &reason, recording),
        }
    }

    /// Has each device go on with what it learnt before: with what was named for it, or else with its newest snapshot.
    fn restore(&self, mut named: BTreeMap<String, (Model, String)>) {
        let devices: Vec<Arc<str>> = self.shared.lock().keys().cloned().collect();
        for name in devices {
            let found = named.remove(&*name).or_else(|| self.newest_model(&name));
            let Some((model, from)) = found else { continue };
            let entry = Entry::info("ModelRestored").with("windows_learnt", model.windows()).with("from", from);
            if let Some(device) = self.shared.lock().get_mut(&name) {
                device.consumer.set_predictor(Predictor::with(model));
            }
            self.journal.entry(&name, entry);
        }
    }

    fn newest_model(&self, device: &Arc<str>) -> Option<(Model, String)> {
        let (found, refused) = match self.shared.snapshotter.as_ref()?.newest_model(device) {
            Ok(newest) => (newest.found, newest.refused),
            Err(error) => (None, vec![error]),
        };
        for error in refused {
            let entry = Entry::warning("SnapshotRefused").with("reason", error.to_string());
            self.journal.entry(device, entry.with("next", "an older one is taken, or the model begins anew"));
        }
        found.map(|(path, model)| (model, path.display().to_string()))
    }

    /// Takes a health snapshot, where there is a directory for them. What goes wrong is said.
    fn snapshot(&self, device: &str, reason: &str, recording: Option<Recording>) {
        if self.shared.snapshotter.is_none() {
            return;
        }
        if let Err(error) = self.shared.snapshot(device, reason, recording) {
            let entry = Entry::warning("SnapshotFailed").with("reason", error);
            self.journal.entry(device, entry.with("next", "the one before it is kept; the next is tried as usual"));
        }
    }

    fn open(&mut self, device: &Arc<str>) {
        let Some(store) = &self.store else { return };
        let path = history_path(&store.dir, device);
        let opened = std::fs::create_dir_all(&store.dir)
            .map_err(|source| StoreError::Io { path: store.dir.clone(), source })
            .and_then(|()| History::open(&path, device, store.retention))
            .and_then(|history| {
                let reader = history.reader()?;
                Ok((reader.last_window()?, reader, history))
            });
        match opened {
            Ok((last, reader, history)) => {
                let last = last.map(|last| last.end_unix_ns);
                let mut pending = Vec::new();
                if let Some(device) = self.shared.lock().get_mut(device) {
                    // What has come while it was waited for.
                    pending.extend(device.windows.iter().filter(|window| Some(window.end_unix_ns) > last));
                    device.reader = Some(reader);
                }
                self.kept
                    .insert(Arc::clone(device), Kept { history, pending, written: last, flushes: 0, appended: false });
                self.waiting.retain(|waiting| waiting != device);
            }
            Err(error @ StoreError::InUse { .. }) => {
                if !self.waiting.contains(device) {
                    self.waiting.push(Arc::clone(device));
                    let next = "its profile is kept in memory only until then; tried again every second";
                    self.say("HistoryWaits", device, &error, next);
                }
            }
            Err(error) => {
                self.waiting.retain(|waiting| waiting != device);
                self.give_up(device, &error);
            }
        }
    }

    /// Says why a history is not written any more.
    fn give_up(&self, device: &str, error: &StoreError) {
        let next = "its profile is kept in memory only, until the program is started again";
        self.say("HistoryGivenUp", device, error, next);
    }

    fn say(&self, event: &'static str, device: &str, error: &StoreError, next: &str) {
        let entry = Entry::warning(event).with("reason", error.to_string()).with("next", next);
        self.journal.entry(device, entry);
    }

    fn flush_all(&mut self, last: bool) {
        let devices: Vec<Arc<str>> = self.kept.keys().cloned().collect();
        devices.iter().for_each(|device| self.flush(device, last, None));
    }

    /// Writes what there is to be written of a device. The first error ends its history on disk.
    fn flush(&mut self, device: &Arc<str>, last: bool, recording: Option<&Recording>) {
        #[cfg(test)]
        drop(self.shared.disk.lock());
        let Some(kept) = self.kept.get_mut(device) else { return };
        if let Some(device) = self.shared.lock().get_mut(device).filter(|device| device.behind) {
            device.behind = false;
            kept.pending = device.windows.iter().filter(|window| Some(window.end_unix_ns) > kept.written).collect();
        }
        if let Err(error) = kept.flush(last, recording) {
            self.kept.remove(device);
            if let Some(device) = self.shared.lock().get_mut(device) {
                device.reader = None;
            }
            self.give_up(device, &error);
        }
    }
}

impl Kept {
    fn flush(&mut self, last: bool, recording: Option<&Recording>) -> Result<(), StoreError> {
        let history = &mut self.history;
        self.written = self.pending.last().map(|window| window.end_unix_ns).or(self.written);
        self.appended |= history.append(&std::mem::take(&mut self.pending))? > 0;
        if let Some(recording) = recording {
            return history.record(recording);
        }
        self.flushes += 1;
        if last {
            return history.sync();
        }
        if self.flushes >= FLUSHES_PER_PRUNE_MAX || (self.flushes >= FLUSHES_PER_PRUNE && self.appended) {
            (self.flushes, self.appended) = (0, false);
            history.prune(unix_ns())?;
        }
        Ok(())
    }
}
