//! The historian: a thread that keeps what profiles were, the last minutes tick by tick and the last windows in memory, and has the failure
//! model judge them. What goes to disk goes by the writer, a thread of its own: no disk can keep an alarm back.
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

use crossbeam_channel::{Receiver, Sender};
use warmswap_core::{BackendId, Entry, Foresight};
use warmswap_predict::{Alarm, Grain, Model, Record};
use warmswap_store::{FLIGHT_BYTES_MAX, FLIGHT_KEEP_NS, FlightRecorder, Reader, Recording, Retention, StoreError};

use super::consumer::Consumer;
use super::neighbours::Neighbours;
use super::predictor::{self, Predicted, Predictor};
use super::snapshots::{Behaviour, Described, Snapshotter};
use super::windows::LastWindows;
use super::writer::{self, Writing};
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
/// Recordings of a device that are kept in memory.
const RECORDINGS_MAX: usize = 4;
/// Records on their way to one who follows a device: half a minute.
const FOLLOWED_MAX: usize = 320;
/// How long the end of the program waits for what is not on the disk yet.
const JOIN_MAX: Duration = Duration::from_secs(3);

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
pub(super) struct Device {
    pub(super) recorder: FlightRecorder,
    pub(super) windows: LastWindows,
    recordings: VecDeque<Recording>,
    pub(super) consumer: Consumer,
    followers: Vec<Follower>,
    /// What is kept on disk.
    pub(super) reader: Option<Reader>,
    /// A window found no room on its way to the disk.
    pub(super) behind: bool,
}

/// Who is told of alarms.
#[derive(Debug)]
struct Acting {
    commander: Commander,
    neighbours: Neighbours,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    devices: Mutex<BTreeMap<Arc<str>, Device>>,
    /// Who is told of alarms, once there is somebody.
    acting: OnceLock<Acting>,
    /// Where there is a directory for them.
    pub(super) snapshotter: Option<Snapshotter>,
    /// A disk that hangs, as long as a test holds it.
    #[cfg(test)]
    pub(super) disk: Mutex<()>,
    ended: AtomicBool,
}

impl Shared {
    /// Takes a health snapshot of a device.
    pub(super) fn snapshot(&self, device: &str, reason: &str, recording: Option<Recording>) -> Result<PathBuf, String> {
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

    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Device>> {
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
    /// Has the disk hang.
    #[cfg(test)]
    pub(crate) fn hang_disk(&self) -> MutexGuard<'_, ()> {
        self.shared.disk.lock().expect("nobody panics with it")
    }

    /// Windows of a device that are on disk.
    #[cfg(test)]
    pub(crate) fn on_disk(&self, device: &str) -> usize {
        let reader = self.of(device, |device| device.reader.clone());
        reader.and_then(|reader| reader.range(0, u64::MAX).ok()).map_or(0, Iterator::count)
    }

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

/// The threads of the historian and of its writer, to be waited for once every [`Notes`] is gone.
#[derive(Debug)]
pub(crate) struct HistorianThread([std::thread::JoinHandle<()>; 2]);

impl HistorianThread {
    /// Waits until they have ended, but not for a disk or a process that hangs. Says whether they have.
    pub(crate) fn join(self) -> bool {
        let deadline = Instant::now() + JOIN_MAX;
        while !self.0.iter().all(std::thread::JoinHandle::is_finished) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // One that panicked has said so on stderr.
        self.0.into_iter().for_each(|thread| _ = thread.join());
        true
    }
}

struct Historian {
    shared: Arc<Shared>,
    writer: Writing,
    journal: JournalSender,
}

/// Bytes of each of so many flight recorders.
fn flight_bytes(devices: usize) -> usize {
    (FLIGHT_BYTES_ALL / devices.max(1)).clamp(FLIGHT_BYTES_MAX, FLIGHT_BYTES_ONE)
}

/// Starts the historian's thread for these devices, and its writer's. Histories are opened by that: one that cannot be is said to the journal,
/// and the device's profile is then kept in memory alone. The threads keep to `cpus`, if any are named.
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
    let (writer, writer_thread) = writer::start(Arc::clone(&shared), store, models, journal.clone(), cpus.clone())?;
    let historian = Historian { shared: Arc::clone(&shared), writer, journal };
    let thread = std::thread::Builder::new().name("historian".to_owned()).spawn(move || {
        super::keep_to(&cpus);
        historian.run(&notes);
    })?;
    let threads = HistorianThread([thread, writer_thread]);
    Ok((Notes { queue, lost: Arc::clone(&lost) }, HistoryHandle { shared, lost }, threads))
}

impl Historian {
    fn run(mut self, notes: &Receiver<Noted>) {
        while let Ok(noted) = notes.recv() {
            self.take(noted);
        }
        let mut devices = self.shared.lock();
        self.shared.ended.store(true, Ordering::Release);
        devices.values_mut().for_each(|device| device.followers.clear());
    }

    fn take(&mut self, noted: Noted) {
        match noted {
            Noted::Tick(device, record) => self.record(&device, &record),
            Noted::Window(device, record) => {
                self.record(&device, &record);
                self.writer.window(&device, &record);
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
            self.writer.snapshot(device, &format!("alarm: {}", alarm.name()), recording);
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
        self.writer.recording(name, recording);
        self.writer.snapshot(name, reason, None);
    }
}

pub(super) fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
