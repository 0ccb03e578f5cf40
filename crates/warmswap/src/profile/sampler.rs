//! The sampler: a thread that measures every component ten times a second and follows some of its requests closely.
//!
//! It runs beside the control thread and never makes it wait: what it needs to know of devices it is told over a bounded channel, what is
//! counted of rings it reads from [`RingFeed`]s, and guest memory it reads through mappings of its own. A component on which nothing
//! happens is not measured at every tick but once a window, so that a thousand idle ones cost next to nothing.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use warmswap_core::{Nanos, Sampled};
use warmswap_predict::{Feature, Measure, Profiler};
use warmswap_wire::DeviceType;

use super::feed::RingFeed;
use super::group::Group;
use super::historian::{Noted, Notes};
use super::host::{Pressure, Store};
use super::page::Page;
use super::prober::{Probed, Prober};
use super::process::Process;
use super::rings::{Ring, Rings};
use super::source::{Effort, Image, Resting, Source, Subject};
use crate::driver::now;
use crate::shm::View;

/// What may be told before the sampler has read any of it.
const TOLD_MAX: usize = 256;
/// What is costly to know is looked for this often.
const DEEP_TICKS: u32 = 100;

/// Components of whose backends everything is kept open that is read of them, some fifteen descriptors each. Where there are more, one that
/// has been at rest for [`REST_TICKS`] is looked into every [`DEEP_RESTING_TICKS`] only, and has nothing open in between; and of those that are
/// busy so many are looked into at a time.
const KEPT_OPEN_MAX: usize = 48;
/// See `KEPT_OPEN_MAX`. To open everything, read it and close it takes half a millisecond.
const DEEP_RESTING_TICKS: u32 = 6 * DEEP_TICKS;
/// See `KEPT_OPEN_MAX`.
const REST_TICKS: u32 = 20;

/// What the control thread tells of one device besides its rings.
#[derive(Debug, Default)]
pub(crate) struct DeviceFeed {
    /// Nanoseconds until the primary's last sign of life that was asked for. 0: none yet.
    pub(crate) round_trip_ns: AtomicU64,
    /// Nanoseconds of the shadow's last canary. 0: none yet.
    pub(crate) canary_ns: AtomicU64,
    /// What is mapped of the guest, and whether both sides use event indices. Only the last counts: a view keeps guest memory mapped.
    view: Mutex<Option<(View, bool)>>,
    views: AtomicU64,
}

impl DeviceFeed {
    /// Puts another view in the place of the last. False if that has to be tried again: nobody is waited for.
    pub(crate) fn show(&self, view: View, event_idx: bool) -> bool {
        let Ok(mut slot) = self.view.try_lock() else { return false };
        *slot = Some((view, event_idx));
        self.views.fetch_add(1, Ordering::Release);
        true
    }
}

/// How a component is to be measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Time between two ticks.
    pub(crate) tick: Nanos,
    /// Ticks in a window.
    pub(crate) window: u32,
}

/// What the sampler is told.
#[derive(Debug)]
pub(crate) enum Told {
    /// There is a device.
    Device { number: u16, name: Arc<str>, device: DeviceType, feed: Arc<DeviceFeed> },
    /// It has a ring.
    Ring { number: u16, index: u32, feed: Arc<RingFeed> },
    /// This backend serves it now, or none that can be looked at.
    Serving { number: u16, backend: u64, subject: Option<Subject>, files: Vec<OwnedFd> },
    /// Something has happened that what was measured lately should be kept for.
    Freeze { number: u16, reason: String },
}

/// Tells the sampler. What finds no room is kept and told later, in its order.
#[derive(Debug)]
pub(crate) struct Teller {
    told: Sender<Told>,
    waiting: std::collections::VecDeque<Told>,
}

impl Clone for Teller {
    fn clone(&self) -> Self {
        Teller { told: self.told.clone(), waiting: std::collections::VecDeque::new() }
    }
}

impl Teller {
    /// Tells, now or as soon as there is room. Never waits.
    pub(crate) fn tell(&mut self, told: Told) {
        // Of what waits only the last counts, but for rings, of which there are not many.
        let same = std::mem::discriminant(&told);
        if !matches!(told, Told::Ring { .. }) {
            self.waiting.retain(|waiting| std::mem::discriminant(waiting) != same);
        }
        self.waiting.push_back(told);
        self.retry();
    }

    /// Tells what had to wait.
    pub(crate) fn retry(&mut self) {
        while let Some(told) = self.waiting.pop_front() {
            match self.told.try_send(told) {
                Ok(()) => {}
                Err(crossbeam_channel::TrySendError::Full(told)) => return self.waiting.push_front(told),
                // It has ended; nobody measures any more.
                Err(crossbeam_channel::TrySendError::Disconnected(_)) => self.waiting.clear(),
            }
        }
    }
}

/// What a component does its work with, while one backend serves it.
struct Served {
    subject: Arc<Subject>,
    process: Process,
    group: Group,
    store: Store,
    page: Page,
}

/// A device as the sampler knows it.
struct Component {
    number: u16,
    name: Arc<str>,
    feed: Arc<DeviceFeed>,
    view: Option<View>,
    event_idx: bool,
    /// Number of the view.
    views: u64,
    /// As the prober sees it.
    probed: Arc<Probed>,
    rings: Rings,
    /// Generation of the backend that serves.
    backend: u64,
    served: Option<Served>,
    /// The backend that serves, while nothing of it is kept open.
    resting: Option<Resting>,
    /// Ticks since something happened.
    idle_ticks: u32,
    profiler: Profiler,
    measure: Measure,
    /// When it was measured last, and ticks since.
    measured_at: Nanos,
    ticks: u32,
    lost: u32,
    /// Ticks in all, for what is done rarely.
    age: u32,
    records_lost: u64,
    /// Requests completed since the processor time was known last.
    completed: u64,
}

/// See the module.
pub(crate) struct Sampler {
    told: Receiver<Told>,
    notes: Notes,
    pace: Pace,
    components: Vec<Component>,
    pressure: Pressure,
    /// Whom the prober is told of.
    prober: Sender<Arc<Probed>>,
    next_tick: Nanos,
}

/// Starts it, on `cpus` if any are named. It ends when nobody can tell it anything any more.
pub(crate) fn start(pace: Pace, cpus: Vec<usize>, notes: Notes) -> std::io::Result<Teller> {
    let (sender, told) = crossbeam_channel::bounded(TOLD_MAX);
    let prober = Prober::start(pace.tick, cpus.clone())?;
    let mut sampler = Sampler {
        told,
        notes,
        pace,
        components: Vec::new(),
        pressure: Pressure::default(),
        prober,
        next_tick: now() + pace.tick,
    };
    std::thread::Builder::new().name("sampler".to_owned()).stack_size(256 * 1024).spawn(move || {
        super::keep_to(&cpus);
        sampler.run();
    })?;
    Ok(Teller { told: sender, waiting: std::collections::VecDeque::new() })
}

impl Sampler {
    fn run(&mut self) {
        loop {
            let wait = self.next_tick.since(now());
            match self.told.recv_timeout(Duration::from_nanos(wait.0)) {
                Ok(told) => {
                    self.learn(told);
                    while let Ok(told) = self.told.try_recv() {
                        self.learn(told);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let now = now();
            if now >= self.next_tick {
                self.tick(now);
            }
        }
    }

    fn learn(&mut self, told: Told) {
        let many = self.components.len() > KEPT_OPEN_MAX;
        let find = |components: &mut Vec<Component>, number| components.iter().position(|it| it.number == number);
        match told {
            Told::Device { number, name, device, feed } => {
                let probed = Arc::new(Probed::new(device));
                // Without a prober nothing is sampled, and what it would tell is missing.
                let _ended = self.prober.send(Arc::clone(&probed));
                self.components.push(Component::new(number, name, feed, probed, self.pace.window));
            }
            Told::Ring { number, index, feed } => {
                if let Some(at) = find(&mut self.components, number) {
                    let component = &mut self.components[at];
                    component.probed.add_ring(index, Arc::clone(&feed));
                    let rings = &mut component.rings.rings;
                    rings.retain(|ring| ring.index != index);
                    rings.push(Ring::new(index, feed));
                    rings.sort_by_key(|ring| ring.index);
                }
            }
            Told::Serving { number, backend, subject, files } => {
                let subject = subject.map(|subject| Subject { images: images_of(&files), ..subject });
                drop(files);
                if let Some(at) = find(&mut self.components, number) {
                    self.components[at].serve(backend, subject, many);
                }
            }
            Told::Freeze { number, reason } => {
                if let Some(at) = find(&mut self.components, number) {
                    let component = &mut self.components[at];
                    // What has happened since the last tick is what it is kept for.
                    component.measure(Effort::Full, Nanos(0), &self.pressure, unix_ns(), &self.notes);
                    component.note(&self.notes, Noted::Freeze(Arc::clone(&component.name), reason, unix_ns()));
                }
            }
        }
    }

    /// Measures every component that is due.
    fn tick(&mut self, now: Nanos) {
        let late = now.since(self.next_tick);
        let missed = late.0 / self.pace.tick.0.max(1);
        self.next_tick = self.next_tick + Nanos(self.pace.tick.0.saturating_mul(missed + 1));
        let missed = u32::try_from(missed).unwrap_or(u32::MAX);
        self.pressure.read(self.pace.tick.0 as f64 / 1e9 * f64::from(missed + 1), Effort::Full);
        let end_unix_ns = unix_ns();
        let many = self.components.len() > KEPT_OPEN_MAX;
        let mut awake = self.components.iter().filter(|it| it.served.is_some()).count();
        for component in &mut self.components {
            component.see();
            let was_awake = component.served.is_some();
            let room = was_awake || awake < KEPT_OPEN_MAX;
            component.tick(missed, late, &self.pressure, end_unix_ns, &self.notes, (many, room));
            awake = awake + usize::from(component.served.is_some()) - usize::from(was_awake);
        }
    }
}

impl Component {
    fn new(number: u16, name: Arc<str>, feed: Arc<DeviceFeed>, probed: Arc<Probed>, window: u32) -> Self {
        Component {
            number,
            name,
            feed,
            view: None,
            event_idx: false,
            views: 0,
            rings: Rings::new(probed.device()),
            probed,
            backend: 0,
            served: None,
            resting: None,
            idle_ticks: 0,
            profiler: Profiler::new(window),
            measure: Measure::default(),
            measured_at: now(),
            ticks: 0,
            lost: 0,
            // Those that begin together do not do what is costly together.
            age: u32::from(number) % DEEP_RESTING_TICKS,
            records_lost: 0,
            completed: 0,
        }
    }

    fn serve(&mut self, backend: u64, subject: Option<Subject>, many: bool) {
        self.backend = backend;
        (self.served, self.resting) = (None, None);
        if many {
            self.resting = subject.map(|subject| subject.rest());
        } else {
            self.served = subject.map(Served::new);
        }
        // What was measured of the last one is not mixed with what this one does.
        self.rings.forget();
        (self.ticks, self.lost, self.measured_at) = (0, 0, now());
        self.measure.clear();
        self.probed.forget();
    }

    /// Takes the last view.
    fn see(&mut self) {
        let views = self.feed.views.load(Ordering::Acquire);
        if views == self.views {
            return;
        }
        self.views = views;
        if let Some((view, event_idx)) = self.feed.view.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.probed.show(view.clone(), event_idx);
            (self.view, self.event_idx) = (Some(view), event_idx);
        }
    }

    /// A tick has passed.
    fn tick(
        &mut self,
        missed: u32,
        late: Nanos,
        pressure: &Pressure,
        end_unix_ns: u64,
        notes: &Notes,
        (many, room): (bool, bool),
    ) {
        self.ticks += 1 + missed;
        self.lost += missed;
        self.age = self.age.wrapping_add(1 + missed);
        let idle = self.rings.are_idle();
        if idle && self.ticks < self.profiler.ticks_left() {
            self.rings.rest();
            return;
        }
        let deep_ticks = if self.resting.is_some() { DEEP_RESTING_TICKS } else { DEEP_TICKS };
        let deep = self.age % deep_ticks < self.ticks;
        let at_rest = self.rings.are_at_rest();
        self.idle_ticks = if at_rest { self.idle_ticks.saturating_add(self.ticks) } else { 0 };
        if room && (!at_rest || deep) {
            self.wake();
        }
        let effort = if deep { Effort::Deep } else { Effort::Full };
        self.measure(effort, late, pressure, end_unix_ns, notes);
        if many && self.idle_ticks >= REST_TICKS {
            self.rest();
        }
    }

    fn measure(&mut self, effort: Effort, late: Nanos, pressure: &Pressure, end_unix_ns: u64, notes: &Notes) {
        let now = now();
        let span = now.since(self.measured_at);
        self.measured_at = now;
        let span_s = span.0 as f64 / 1e9;
        let rings = self.rings.completed();
        let page_tells =
            self.served.as_mut().is_some_and(|served| served.measure(span_s, effort, rings, &mut self.measure));
        let mut sampled = self.probed.take();
        match &self.view {
            // Guest memory has vanished: what was sampled there may be made of nothing.
            Some(view) if !view.is_whole() => sampled = Sampled::default(),
            Some(view) if self.event_idx => self.rings.look_for_overdue(view, now, &mut self.measure),
            _ => {}
        }
        self.rings.measure(span_s, &sampled, page_tells, &mut self.measure);
        pressure.add(&mut self.measure);
        self.add_own(late, notes);
        let span_us = u32::try_from(span.0 / 1_000).unwrap_or(u32::MAX);
        let recorded = self.profiler.tick(&mut self.measure, self.backend, end_unix_ns, span_us, self.ticks, self.lost);
        (self.ticks, self.lost) = (0, 0);
        self.measure.clear();
        self.note(notes, Noted::Tick(Arc::clone(&self.name), recorded.tick));
        if let Some(window) = recorded.window {
            self.note(notes, Noted::Window(Arc::clone(&self.name), window));
        }
    }

    /// Closes what is read of the backend.
    fn rest(&mut self) {
        if let Some(served) = self.served.take() {
            self.resting = Some(served.subject.rest());
        }
    }

    /// Opens it again. What is counted between two readings begins anew.
    fn wake(&mut self) {
        if let Some(resting) = self.resting.take() {
            self.served = Some(Served::new(resting.wake()));
        }
    }

    /// What is known of the control connection and of the measurement itself.
    fn add_own(&mut self, late: Nanos, notes: &Notes) {
        let told = |feed: &AtomicU64| Some(feed.load(Ordering::Relaxed)).filter(|ns| *ns > 0).map(|ns| ns as f64 / 1e3);
        if let Some(us) = told(&self.feed.round_trip_ns) {
            self.measure.note(Feature::ControlRoundTrip, us);
        }
        if let Some(us) = told(&self.feed.canary_ns) {
            self.measure.note(Feature::Canary, us);
        }
        self.measure.note(Feature::SamplerDelay, late.as_micros());
        let lost = notes.lost();
        self.measure.note(Feature::StreamLost, (lost - self.records_lost) as f64);
        self.records_lost = lost;
        self.completed += self.rings.rings.iter().map(|ring| ring.completions).sum::<u64>();
        if let Some(cpu) = self.served.as_ref().and_then(|served| served.process.last_cpu()) {
            // It covers the time since it was told last.
            let completed = std::mem::take(&mut self.completed);
            self.measure.add(Feature::CpuPerRequest, cpu.as_secs_f64() * 1e6, completed as f64);
        }
    }

    fn note(&self, notes: &Notes, noted: Noted) {
        // What finds no room is counted there.
        let _lost = notes.send(noted);
    }
}

impl Served {
    fn new(subject: Subject) -> Self {
        let subject = Arc::new(subject);
        Served {
            // Marking pages as unused, to see which are used, makes the backend fault: it is not for us to slow it.
            process: Process::new(Arc::clone(&subject), false),
            group: Group::new(Arc::clone(&subject)),
            store: Store::new(Arc::clone(&subject)),
            page: Page::new(Arc::clone(&subject)),
            subject,
        }
    }

    /// Whether the backend itself tells what it is asked for.
    fn measure(&mut self, span_s: f64, effort: Effort, rings: (u64, u64), into: &mut Measure) -> bool {
        self.process.measure(span_s, effort, into);
        self.group.measure(span_s, effort, into);
        self.store.measure(span_s, effort, into);
        self.page.compare(rings.0, rings.1);
        self.page.measure(span_s, effort, into);
        self.page.tells()
    }
}

/// Takes hold of what a backend does its I/O on, so that whatever goes with the descriptors that were told ends with them.
fn images_of(files: &[OwnedFd]) -> Vec<Image> {
    let path = |file: &OwnedFd| format!("/proc/self/fd/{}", file.as_raw_fd());
    files.iter().filter_map(|file| Image::at(path(file).as_ref()).ok()).collect()
}

/// Nanoseconds since the Unix epoch.
fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
