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
use warmswap_core::{Nanos, Next, Probe, Sampled, Trail};
use warmswap_predict::{Feature, Measure, Profiler};
use warmswap_wire::DeviceType;

use super::feed::RingFeed;
use super::group::Group;
use super::historian::{Noted, Notes};
use super::host::{Pressure, Store};
use super::page::Page;
use super::process::Process;
use super::rings::{Ring, Rings};
use super::source::{Effort, Image, Resting, Source, Subject};
use crate::driver::now;
use crate::shm::View;

/// What may be told before the sampler has read any of it.
const TOLD_MAX: usize = 256;
/// Time between two probes of one component, at most.
const PROBE_EVERY: Nanos = Nanos::from_millis(20);
/// A probe takes requests for at least this long, and at most that long.
const COLLECT_MIN: Nanos = Nanos::from_micros(30);
/// See `COLLECT_MIN`.
const COLLECT_MAX: Nanos = Nanos::from_micros(200);
/// Requests that a probe hopes to meet.
const COLLECT_REQUESTS: f64 = 10.0;
/// After a probe so many times its length pass until the next, of any component: what probes cost is bounded by that.
const PROBE_PAUSE: u64 = 100;
/// Probes under way.
const PROBES_MAX: usize = 64;
/// What is costly to know is looked for this often.
const DEEP_TICKS: u32 = 100;

/// Components of whose backends everything is kept open that is read of them, some fifteen descriptors each. Where there are more, one that
/// has been at rest for [`REST_TICKS`] is looked into every [`DEEP_TICKS`] only, and has nothing open in between; and of those that are
/// busy so many are looked into at a time.
const KEPT_OPEN_MAX: usize = 48;
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
    device: DeviceType,
    feed: Arc<DeviceFeed>,
    view: Option<View>,
    event_idx: bool,
    /// Number of the view.
    views: u64,
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
    sampled: Sampled,
    trails: Vec<Trail>,
    /// When it was measured last, and ticks since.
    measured_at: Nanos,
    ticks: u32,
    lost: u32,
    /// Ticks in all, for what is done rarely.
    age: u32,
    /// Rings are probed in turn.
    turn: usize,
    records_lost: u64,
    /// Requests completed since the processor time was known last.
    completed: u64,
}

/// A probe under way.
struct Running {
    component: usize,
    probe: Probe,
    at: Nanos,
}

/// See the module.
pub(crate) struct Sampler {
    told: Receiver<Told>,
    notes: Notes,
    pace: Pace,
    components: Vec<Component>,
    pressure: Pressure,
    probes: Vec<Running>,
    next_tick: Nanos,
    next_probe: Nanos,
    /// Components are probed in turn.
    turn: usize,
}

/// Starts it, on `cpus` if any are named. It ends when nobody can tell it anything any more.
pub(crate) fn start(pace: Pace, cpus: Vec<usize>, notes: Notes) -> std::io::Result<Teller> {
    let (sender, told) = crossbeam_channel::bounded(TOLD_MAX);
    let mut sampler = Sampler {
        told,
        notes,
        pace,
        components: Vec::new(),
        pressure: Pressure::default(),
        probes: Vec::new(),
        next_tick: now() + pace.tick,
        next_probe: now(),
        turn: 0,
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
            let wait = self.next_due().since(now());
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
            self.follow();
            let now = now();
            if now >= self.next_tick {
                self.tick(now);
            }
            if now >= self.next_probe {
                self.begin_probe();
            }
        }
    }

    fn next_due(&self) -> Nanos {
        let probes = self.probes.iter().map(|running| running.at);
        let begin = self.components.iter().any(Component::is_busy).then_some(self.next_probe);
        probes.chain(begin).chain([self.next_tick]).min().expect("there is always a next tick")
    }

    fn learn(&mut self, told: Told) {
        let many = self.components.len() > KEPT_OPEN_MAX;
        let find = |components: &mut Vec<Component>, number| components.iter().position(|it| it.number == number);
        match told {
            Told::Device { number, name, device, feed } => {
                self.components.push(Component::new(number, name, device, feed, self.pace.window));
            }
            Told::Ring { number, index, feed } => {
                if let Some(at) = find(&mut self.components, number) {
                    let rings = &mut self.components[at].rings.rings;
                    rings.retain(|ring| ring.index != index);
                    rings.push(Ring::new(index, feed));
                    rings.sort_by_key(|ring| ring.index);
                }
            }
            Told::Serving { number, backend, subject, files } => {
                let subject = subject.map(|subject| Subject { images: images_of(&files), ..subject });
                drop(files);
                if let Some(at) = find(&mut self.components, number) {
                    // What they follow was asked of another.
                    self.probes.retain(|running| running.component != at);
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
        for (at, component) in self.components.iter_mut().enumerate() {
            if component.see() {
                self.probes.retain(|running| running.component != at);
            }
            let was_awake = component.served.is_some();
            let room = was_awake || awake < KEPT_OPEN_MAX;
            component.tick(missed, late, &self.pressure, end_unix_ns, &self.notes, (many, room));
            awake = awake + usize::from(component.served.is_some()) - usize::from(was_awake);
        }
    }

    /// Begins a probe of the next busy component.
    fn begin_probe(&mut self) {
        let busy = self.components.iter().filter(|it| it.is_busy()).count() as u64;
        let began = now();
        self.next_probe = began + self.pace.tick;
        if busy == 0 || self.probes.len() >= PROBES_MAX {
            return;
        }
        let count = self.components.len();
        let Some(at) = (1..=count).map(|step| (self.turn + step) % count).find(|at| self.components[*at].is_busy())
        else {
            return;
        };
        self.turn = at;
        let component = &mut self.components[at];
        component.see();
        let tick_s = self.pace.tick.0 as f64 / 1e9;
        let Some(probe) = component.probe(tick_s, began) else { return };
        self.next_probe = began + Nanos(PROBE_EVERY.0 / busy);
        self.probes.push(Running { component: at, probe, at: began });
        self.follow();
    }

    /// Looks where probes want to.
    fn follow(&mut self) {
        let mut at = 0;
        while at < self.probes.len() {
            let running = &mut self.probes[at];
            let (began, before) = (now(), spent());
            if began < running.at {
                at += 1;
                continue;
            }
            let component = &mut self.components[running.component];
            // Where memory has changed the ring may be another one.
            let done = component.see() || component.look(running);
            // What probes cost is that part of the time at most, however many components are busy and whatever they do.
            let cost = spent().since(before);
            self.next_probe = self.next_probe.max(began) + Nanos(cost.0.saturating_mul(PROBE_PAUSE));
            if done {
                self.probes.swap_remove(at);
            } else {
                at += 1;
            }
        }
    }
}

impl Component {
    fn new(number: u16, name: Arc<str>, device: DeviceType, feed: Arc<DeviceFeed>, window: u32) -> Self {
        Component {
            number,
            name,
            device,
            feed,
            view: None,
            event_idx: false,
            views: 0,
            rings: Rings::new(device),
            backend: 0,
            served: None,
            resting: None,
            idle_ticks: 0,
            profiler: Profiler::new(window),
            measure: Measure::default(),
            sampled: Sampled::default(),
            trails: Vec::new(),
            measured_at: now(),
            ticks: 0,
            lost: 0,
            // Those that begin together do not do what is costly together.
            age: u32::from(number) % DEEP_TICKS,
            turn: 0,
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
        self.sampled = Sampled::default();
    }

    /// Takes the last view. True if it is another one.
    fn see(&mut self) -> bool {
        let views = self.feed.views.load(Ordering::Acquire);
        if views == self.views {
            return false;
        }
        self.views = views;
        if let Some((view, event_idx)) = self.feed.view.lock().unwrap_or_else(PoisonError::into_inner).take() {
            (self.view, self.event_idx) = (Some(view), event_idx);
            self.trails.clear();
        }
        true
    }

    fn is_busy(&self) -> bool {
        self.view.is_some() && self.rings.rings.iter().any(|ring| ring.arrivals > 0)
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
        let deep = self.age % DEEP_TICKS < self.ticks;
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
        match &self.view {
            // Guest memory has vanished: what was sampled there may be made of nothing.
            Some(view) if !view.is_whole() => self.sampled = Sampled::default(),
            Some(view) if self.event_idx => self.rings.look_for_overdue(view, now, &mut self.measure),
            _ => {}
        }
        self.rings.measure(span_s, &mut self.sampled, page_tells, &mut self.measure);
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

    /// A probe of the next busy ring.
    fn probe(&mut self, tick_s: f64, now: Nanos) -> Option<Probe> {
        let view = self.view.as_ref()?;
        let rings = &self.rings.rings;
        let count = rings.len();
        let at = (1..=count).map(|step| (self.turn + step) % count).find(|at| rings[*at].arrivals > 0)?;
        self.turn = at;
        let rate = rings[at].arrivals as f64 / tick_s;
        let collect = Nanos((COLLECT_REQUESTS / rate * 1e9) as u64).clamp(COLLECT_MIN, COLLECT_MAX);
        Probe::begin(rings[at].index, self.device, self.event_idx, collect, view, now)
    }

    /// Looks as long as a probe wants to at once. True if it is done.
    fn look(&mut self, running: &mut Running) -> bool {
        let Some(view) = &self.view else { return true };
        let ring = running.probe.ring() as usize;
        if self.trails.len() <= ring {
            self.trails.resize(ring + 1, Trail::default());
        }
        let trail = &mut self.trails[ring];
        loop {
            match running.probe.look(view, trail, now(), &mut self.sampled) {
                Next::Now => std::hint::spin_loop(),
                Next::At(at) => {
                    running.at = at;
                    return false;
                }
                Next::Done => return true,
            }
        }
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

/// Processor time of this thread so far: what a probe costs is not what others did while it was kept from its processor.
fn spent() -> Nanos {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Nanos(seconds.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64))
}

/// Nanoseconds since the Unix epoch.
fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
