//! The historian: a thread that keeps what profiles were. The last minutes tick by tick and the last windows in memory, and, where there
//! is a directory for it, windows and recordings on disk.
//!
//! Times are those of the records. Where the clock is set forward by more than it remembers, the flight recorder begins anew.
//!
//! Who hands records over never waits: what finds no room is counted. Who asks holds a lock for as long as a copy takes, and reads from
//! disk without it.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use warmswap_core::{BackendId, Entry, Foresight};
use warmswap_predict::{Alarm, Grain, Model, Record};
use warmswap_store::{
    FLIGHT_BYTES_MAX, FLIGHT_KEEP_NS, FlightRecorder, History, Reader, Recording, Retention, StoreError,
};

use super::consumer::Consumer;
use super::neighbours::Neighbours;
use super::predictor::{self, Predicted, Predictor};
use super::snapshots::{Behaviour, Described, Snapshotter};
use super::windows::{LastWindows, WINDOWS_MAX};
use crate::driver::{Command, Commander};
use crate::journal::JournalSender;

/// Notes on their way to the historian: more than a minute of one device.
const QUEUE_MAX: usize = 1_024;
/// Windows of many devices end at the same time, each with its last tick.
const QUEUE_PER_DEVICE: usize = 4;
/// Bytes of flight recorders of all devices together, as long as each gets what is enough for an idle one and a minute of a busy one.
const FLIGHT_BYTES_ALL: usize = 16 << 20;
/// Bytes of one, at most: two minutes of a device of which everything changes at every tick.
const FLIGHT_BYTES_ONE: usize = 160 << 10;
/// Windows that wait for the disk: well before they go from memory they are there.
const PENDING_MAX: usize = WINDOWS_MAX / 2;
/// Recordings of a device that are kept in memory.
const RECORDINGS_MAX: usize = 4;
/// Records on their way to one who follows a device: half a minute.
const FOLLOWED_MAX: usize = 320;
/// How long the end of the program waits for what is not on the disk yet.
const JOIN_MAX: Duration = Duration::from_secs(3);
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

/// Path of a device's history in a directory of histories.
pub(crate) fn history_path(dir: &Path, device: &str) -> PathBuf {
    dir.join(format!("{device}.redb"))
}

/// Removes what a device's alarms left in a directory.
pub(crate) fn forget_alarms(dir: &Path, device: &str) {
    super::neighbours::forget(dir, device);
}

/// What the historian is to know.
#[derive(Debug)]
pub(crate) enum Noted {
    /// A tick of a device.
    Tick(Arc<str>, Record),
    /// A window of a device.
    Window(Arc<str>, Record),
    /// Keep the last minutes of a device: why, and when in nanoseconds since the Unix epoch.
    Freeze(Arc<str>, String, u64),
}

/// The sampler's end.
#[derive(Clone, Debug)]
pub(crate) struct Notes {
    queue: Sender<Noted>,
    lost: Arc<AtomicU64>,
}

impl Notes {
    /// What found no room so far.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Hands something over; never waits. Says whether there was room; what finds none is counted.
    pub(crate) fn send(&self, noted: Noted) -> bool {
        let sent = self.queue.try_send(noted).is_ok();
        if !sent {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        sent
    }
}

/// What histories and health snapshots begin with.
#[derive(Debug, Default)]
pub(crate) struct Beginning {
    /// What each device was told.
    pub(crate) described: BTreeMap<String, Described>,
    /// Models that devices go on with, and where they are from.
    pub(crate) models: BTreeMap<String, (Model, String)>,
}

/// Where histories are kept, and how much of them.
#[derive(Clone, Debug)]
pub(crate) struct StoreConfig {
    /// Directory, made if need be.
    pub(crate) dir: PathBuf,
    /// What is kept of each device.
    pub(crate) retention: Retention,
}

/// One who follows a device.
#[derive(Debug)]
struct Follower {
    queue: Sender<Record>,
    lost: Arc<AtomicU64>,
}

/// What is kept of a device in memory.
#[derive(Debug, Default)]
struct Device {
    recorder: FlightRecorder,
    windows: LastWindows,
    recordings: VecDeque<Recording>,
    consumer: Consumer,
    followers: Vec<Follower>,
    /// What is kept on disk.
    reader: Option<Reader>,
}

/// Who is told of alarms.
#[derive(Debug)]
struct Acting {
    commander: Commander,
    neighbours: Neighbours,
}

#[derive(Debug, Default)]
struct Shared {
    devices: Mutex<BTreeMap<Arc<str>, Device>>,
    /// Who is told of alarms, once there is somebody.
    acting: OnceLock<Acting>,
    /// Where there is a directory for them.
    snapshotter: Option<Snapshotter>,
    ended: AtomicBool,
}

impl Shared {
    /// Takes a health snapshot of a device.
    fn snapshot(&self, device: &str, reason: &str, recording: Option<Recording>) -> Result<PathBuf, String> {
        let Some(snapshotter) = &self.snapshotter else {
            return Err("there is no directory for health snapshots: start the broker with --store".to_owned());
        };
        let behaviour = {
            let devices = self.lock();
            let device = devices.get(device).ok_or_else(|| format!("{device} is not a device of this broker"))?;
            let predictor = device.consumer.predictor().cloned();
            Behaviour { windows: device.windows.iter().collect(), predictor, recording }
        };
        let commander = self.acting.get().map(|acting| &acting.commander);
        snapshotter.take(device, (reason, unix_ns()), behaviour, commander)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Device>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The asking end.
#[derive(Clone, Debug)]
pub(crate) struct HistoryHandle {
    shared: Arc<Shared>,
    lost: Arc<AtomicU64>,
}

/// What one who follows a device receives.
#[derive(Debug)]
pub(crate) struct Followed {
    pub(crate) records: Receiver<Record>,
    lost: Arc<AtomicU64>,
}

impl Followed {
    /// Records that found no room since the last time.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }
}

impl HistoryHandle {
    fn of<T: Default>(&self, device: &str, what: impl FnOnce(&Device) -> T) -> T {
        self.shared.lock().get(device).map(what).unwrap_or_default()
    }

    /// Takes a health snapshot of a device now. Returns where it is.
    pub(crate) fn snapshot(&self, device: &str, reason: &str) -> Result<PathBuf, String> {
        self.shared.snapshot(device, reason, None)
    }

    /// Has the failure model of a device go on with what this one knows, for this reason.
    ///
    /// # Errors
    /// There is no such device; or it has begun, but that cannot be kept, and the next broker would go on with what was known before.
    pub(crate) fn set_predictor(&self, device: &str, predictor: Predictor, reason: &str) -> Result<(), String> {
        match self.shared.lock().get_mut(device) {
            Some(device) => device.consumer.set_predictor(predictor),
            None => return Err(format!("{device} is not a device of this broker")),
        }
        if self.shared.snapshotter.is_none() {
            return Ok(());
        }
        let kept = self.shared.snapshot(device, reason, None);
        kept.map(drop).map_err(|why| format!("{reason}, until the broker ends: it cannot be kept: {why}"))
    }

    /// Has the control thread told of every alarm from now on. Alarms of other brokers are noted in `dir`.
    pub(crate) fn tell_of_alarms(&self, commander: Commander, dir: &Path) {
        let acting = Acting { commander, neighbours: Neighbours::new(dir) };
        assert!(self.shared.acting.set(acting).is_ok(), "there is one control thread");
    }

    /// Records that the historian never got.
    pub(crate) fn records_lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The last windows, the oldest first.
    pub(crate) fn last_windows(&self, device: &str, count: usize) -> Vec<Record> {
        self.of(device, |device| device.windows.last(count))
    }

    /// The last tick, exactly.
    pub(crate) fn last_tick(&self, device: &str) -> Option<Record> {
        self.of(device, |device| device.consumer.latest(Grain::Tick).copied())
    }

    /// What `what` makes of the failure model of a device, once there was a window.
    pub(crate) fn predictor<T>(&self, device: &str, what: impl FnOnce(&Predictor) -> T) -> Option<T> {
        self.of(device, |device| device.consumer.predictor().map(what))
    }

    /// The ticks of the last minutes, the oldest first, as the flight recorder has them.
    pub(crate) fn last_ticks(&self, device: &str) -> Vec<Record> {
        // Decoded without the lock.
        let recorder = self.of(device, |device| Some(device.recorder.clone()));
        recorder.map(|recorder| recorder.ticks().collect()).unwrap_or_default()
    }

    /// Calls `each` with every window that ended from `from_unix_ns` to `to_unix_ns`, the oldest first: those on disk, and those that are
    /// only in memory yet. Ends with the first error.
    ///
    /// # Errors
    /// The history cannot be read, or what `each` says.
    pub(crate) fn windows<E: From<StoreError>>(
        &self,
        device: &str,
        (from_unix_ns, to_unix_ns): (u64, u64),
        each: &mut dyn FnMut(&Record) -> Result<(), E>,
    ) -> Result<(), E> {
        // Memory first: a window goes to the disk long before it goes from memory.
        let (newest, reader) = {
            let devices = self.shared.lock();
            let Some(device) = devices.get(device) else { return Ok(()) };
            (device.windows.clone(), device.reader.clone())
        };
        let mut last = None;
        if let Some(reader) = reader {
            for window in reader.range(from_unix_ns, to_unix_ns)? {
                let window = window?;
                last = Some(window.end_unix_ns);
                each(&window)?;
            }
        }
        let asked = |end: u64| (from_unix_ns..=to_unix_ns).contains(&end);
        newest.iter().filter(|it| asked(it.end_unix_ns) && Some(it.end_unix_ns) > last).try_for_each(|it| each(&it))
    }

    /// The same of ticks: those of recordings, and those of the last minutes.
    ///
    /// # Errors
    /// As [`HistoryHandle::windows`].
    pub(crate) fn ticks<E: From<StoreError>>(
        &self,
        device: &str,
        (from_unix_ns, to_unix_ns): (u64, u64),
        each: &mut dyn FnMut(&Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let newest = self.last_ticks(device);
        let mut last = None;
        let mut give = |tick: &Record| {
            // Recordings overlap.
            if !(from_unix_ns..=to_unix_ns).contains(&tick.end_unix_ns) || Some(tick.end_unix_ns) <= last {
                return Ok(());
            }
            last = Some(tick.end_unix_ns);
            each(tick)
        };
        for unix_ns in self.recordings(device)?.into_iter().filter(|it| *it >= from_unix_ns) {
            let Some(recording) = self.recording(device, unix_ns)? else { continue };
            // What lies behind damage is not known; what lies before it is.
            recording.ticks().map_while(Result::ok).try_for_each(|tick| give(&tick))?;
        }
        newest.iter().try_for_each(give)
    }

    /// Times of the recordings, the oldest first.
    ///
    /// # Errors
    /// The history cannot be read.
    pub(crate) fn recordings(&self, device: &str) -> Result<Vec<u64>, StoreError> {
        let (mut times, reader) = self.of(device, |device| {
            let times: Vec<u64> = device.recordings.iter().map(|recording| recording.unix_ns).collect();
            (times, device.reader.clone())
        });
        if let Some(reader) = reader {
            times.extend(reader.recordings()?);
        }
        times.sort_unstable();
        times.dedup();
        Ok(times)
    }

    /// The recording of that time, if there is one.
    ///
    /// # Errors
    /// The history cannot be read.
    pub(crate) fn recording(&self, device: &str, unix_ns: u64) -> Result<Option<Recording>, StoreError> {
        let (found, reader) = self.of(device, |device| {
            let found = device.recordings.iter().find(|recording| recording.unix_ns == unix_ns).cloned();
            (found, device.reader.clone())
        });
        match (found, reader) {
            (Some(found), _) => Ok(Some(found)),
            (None, Some(reader)) => reader.recording(unix_ns),
            (None, None) => Ok(None),
        }
    }

    /// Every record of a device from now on. `None` if there is no such device, or the historian has ended.
    pub(crate) fn follow(&self, device: &str) -> Option<Followed> {
        let (queue, records) = crossbeam_channel::bounded(FOLLOWED_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let mut devices = self.shared.lock();
        // Looked at under the lock under which the last followers are let go.
        if self.shared.ended.load(Ordering::Acquire) {
            return None;
        }
        devices.get_mut(device)?.followers.push(Follower { queue, lost: Arc::clone(&lost) });
        Some(Followed { records, lost })
    }
}

/// The historian's thread, to be waited for once every [`Notes`] is gone.
#[derive(Debug)]
pub(crate) struct HistorianThread(std::thread::JoinHandle<()>);

impl HistorianThread {
    /// Waits until it has ended, but not for a disk or a process that hangs. Says whether it has.
    pub(crate) fn join(self) -> bool {
        let deadline = Instant::now() + JOIN_MAX;
        while !self.0.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // One that panicked has said so on stderr.
        let _panicked = self.0.join();
        true
    }
}

/// What goes to a device's file; gone after the first error.
#[derive(Debug)]
struct Kept {
    history: History,
    /// Windows that are not in it yet.
    pending: Vec<Record>,
    flushes: u32,
    appended: bool,
}

struct Historian {
    shared: Arc<Shared>,
    store: Option<StoreConfig>,
    kept: BTreeMap<Arc<str>, Kept>,
    /// Devices whose file somebody else reads at the moment.
    waiting: Vec<Arc<str>>,
    journal: JournalSender,
}

/// Bytes of each of so many flight recorders.
fn flight_bytes(devices: usize) -> usize {
    (FLIGHT_BYTES_ALL / devices.max(1)).clamp(FLIGHT_BYTES_MAX, FLIGHT_BYTES_ONE)
}

/// Starts the historian's thread for these devices. Histories are opened by it: one that cannot be is said to the journal, and the device's
/// profile is then kept in memory alone. The thread keeps to `cpus`, if any are named.
pub(crate) fn start(
    devices: &[Arc<str>],
    store: Option<StoreConfig>,
    beginning: Beginning,
    journal: JournalSender,
    cpus: Vec<usize>,
) -> std::io::Result<(Notes, HistoryHandle, HistorianThread)> {
    let (queue, notes) = crossbeam_channel::bounded(QUEUE_MAX.max(QUEUE_PER_DEVICE * devices.len()));
    let Beginning { described, models } = beginning;
    let snapshotter = store.as_ref().map(|store| Snapshotter::new(&store.dir, described));
    let shared = Arc::new(Shared { snapshotter, ..Shared::default() });
    let lost = Arc::new(AtomicU64::new(0));
    let recorder = FlightRecorder::new(FLIGHT_KEEP_NS, flight_bytes(devices.len()));
    let device = |name| (Arc::clone(name), Device { recorder: recorder.clone(), ..Device::default() });
    shared.lock().extend(devices.iter().map(device));
    let historian =
        Historian { shared: Arc::clone(&shared), store, kept: BTreeMap::new(), waiting: Vec::new(), journal };
    let thread = std::thread::Builder::new().name("historian".to_owned()).spawn(move || {
        super::keep_to(&cpus);
        historian.restore(models);
        historian.run(&notes);
    })?;
    Ok((Notes { queue, lost: Arc::clone(&lost) }, HistoryHandle { shared, lost }, HistorianThread(thread)))
}

impl Historian {
    fn run(mut self, notes: &Receiver<Noted>) {
        let devices: Vec<Arc<str>> = self.shared.lock().keys().cloned().collect();
        devices.iter().for_each(|device| self.open(device));
        let mut due = Instant::now() + FLUSH_EVERY;
        // One after the other: of many devices all at once would keep it from its records.
        let snapshot_every = SNAPSHOT_EVERY / u32::try_from(devices.len().max(1)).unwrap_or(u32::MAX);
        let (mut snapshot_due, mut turn) = (Instant::now() + snapshot_every, devices.iter().cycle());
        let mut retry = Instant::now() + RETRY_EVERY;
        loop {
            let next = if self.waiting.is_empty() { due } else { due.min(retry) };
            match notes.recv_deadline(next) {
                Ok(noted) => self.take(noted),
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
        let mut devices = self.shared.lock();
        self.shared.ended.store(true, Ordering::Release);
        for device in devices.values_mut() {
            device.followers.clear();
            // The file is closed when the last one who reads it is done.
            device.reader = None;
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
                self.kept.insert(Arc::clone(device), Kept { history, pending, flushes: 0, appended: false });
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

    fn take(&mut self, noted: Noted) {
        match noted {
            Noted::Tick(device, record) => self.record(&device, &record),
            Noted::Window(device, record) => {
                self.record(&device, &record);
                if let Some(kept) = self.kept.get_mut(&device) {
                    kept.pending.push(record);
                    if kept.pending.len() >= PENDING_MAX {
                        self.flush(&device, false, None);
                    }
                }
            }
            Noted::Freeze(device, reason, unix_ns) => self.freeze(&device, &reason, unix_ns),
        }
    }

    fn record(&self, name: &Arc<str>, record: &Record) {
        let mut devices = self.shared.lock();
        let device = devices.entry(Arc::clone(name)).or_default();
        let alarm = device.consumer.feed(record);
        match record.grain {
            Grain::Tick => device.recorder.push(record),
            Grain::Window => {
                device.windows.push(record);
            }
        }
        device.followers.retain(|follower| match follower.queue.try_send(*record) {
            Ok(()) => true,
            Err(crossbeam_channel::TrySendError::Full(_)) => {
                follower.lost.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(crossbeam_channel::TrySendError::Disconnected(_)) => false,
        });
        drop(devices);
        if let Some(predicted) = alarm {
            self.predicted(name, record, &predicted);
        }
    }

    /// A failure is imminent: that is told, and what led to it is kept.
    fn predicted(&self, device: &Arc<str>, record: &Record, predicted: &Predicted) {
        let Predicted { verdict, is_news } = predicted;
        let Some(alarm) = verdict.alarm else { return };
        if *is_news {
            self.say_predicted(device, record, predicted);
        }
        // Whoever has to act is told first.
        self.tell(device, record, predicted, alarm);
        if *is_news {
            let recording =
                self.shared.lock().get(device).map(|it| it.recorder.freeze(alarm.name(), record.end_unix_ns));
            self.snapshot(device, &format!("alarm: {}", alarm.name()), recording);
        }
    }

    /// Tells the control thread of an alarm.
    fn tell(&self, device: &Arc<str>, record: &Record, predicted: &Predicted, alarm: Alarm) {
        let verdict = &predicted.verdict;
        let Some(Acting { commander, neighbours }) = self.shared.acting.get() else { return };
        neighbours.note(device);
        let foresight = Foresight {
            backend: BackendId(record.backend),
            alarm,
            risk: verdict.risk[verdict.risk.len() - 1],
            harm: verdict.harm,
            cause: verdict.causes[0].filter(|cause| cause.share > 0.5).map(|cause| cause.feature),
            causes: predictor::causes(verdict),
            others: neighbours.others(device),
        };
        // Where there is no room the next alarm is told: as long as it lasts there is one with every window.
        let _told = commander.try_send(Command::Predicted { device: Arc::clone(device), foresight });
    }

    fn say_predicted(&self, device: &str, record: &Record, predicted: &Predicted) {
        let verdict = &predicted.verdict;
        let Some(alarm) = verdict.alarm else { return };
        let mut entry = Entry::warning("FailurePredicted")
            .with("backend", record.backend)
            .with("alarm", alarm.name())
            .with("reason", alarm.to_string())
            .with("causes", predictor::causes(verdict));
        if let Some(windows) = verdict.lead_windows() {
            let lead = u64::from(windows) * u64::from(record.span_us) / 1_000_000;
            entry = entry.with("expected_within_s", lead);
        }
        self.journal.entry(device, entry.with("next", "a failover, or FailoverWithheld with the reason"));
    }

    fn freeze(&mut self, name: &Arc<str>, reason: &str, unix_ns: u64) {
        let recording = {
            let mut devices = self.shared.lock();
            let device = devices.entry(Arc::clone(name)).or_default();
            let recording = device.recorder.freeze(reason, unix_ns);
            if device.recordings.len() == RECORDINGS_MAX {
                device.recordings.pop_front();
            }
            device.recordings.push_back(recording.clone());
            recording
        };
        // The windows before it belong to it.
        self.flush(name, false, Some(&recording));
        self.snapshot(name, reason, None);
    }

    fn flush_all(&mut self, last: bool) {
        let devices: Vec<Arc<str>> = self.kept.keys().cloned().collect();
        devices.iter().for_each(|device| self.flush(device, last, None));
    }

    /// Writes what there is to be written of a device. The first error ends its history on disk.
    fn flush(&mut self, device: &Arc<str>, last: bool, recording: Option<&Recording>) {
        let Some(kept) = self.kept.get_mut(device) else { return };
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

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
