//! The prober: a thread that looks at rings closely now and then ([`warmswap_core::Probe`]), of all components in turn.
//!
//! It runs only where a processor would otherwise have nothing to do (`SCHED_IDLE`, sched(7)): a thread that looks without a pause would keep
//! the backend or the driver waiting where there are as many of them as processors, and would then see what it did itself. Where no
//! processor has time to spare nothing is sampled, and what samples tell is missing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use warmswap_core::{Nanos, Next, Probe, Sampled, Trail};
use warmswap_predict::Counter;
use warmswap_wire::DeviceType;

use super::feed::RingFeed;
use crate::driver::now;
use crate::shm::View;

/// Time between two probes of one component, at most.
const PROBE_EVERY: Nanos = Nanos::from_millis(10);
/// A probe takes requests for at least this long.
const COLLECT_MIN: Nanos = Nanos::from_micros(30);
/// And for at most that long where it looks without a pause.
const COLLECT_MAX: Nanos = Nanos::from_micros(400);
/// The same where it sleeps between two looks.
const COLLECT_SLEEPING_MAX: Nanos = Nanos::from_millis(10);
/// Requests that take longer than this are waited for in sleep.
const SHORT: Nanos = Nanos::from_micros(240);
/// Requests that a probe hopes to meet.
const COLLECT_REQUESTS: f64 = 10.0;
/// So many probes in a row that sampled nothing, and what a request takes is asked of the broker's counters, which are of all requests
/// but, where few are in flight, rough.
const FRUITLESS_MAX: u32 = 8;
/// After a probe so many times its cost pass until the next, of any component: what probes cost is bounded by that.
const PROBE_PAUSE: u64 = 40;
/// Probes under way.
const PROBES_MAX: usize = 64;

/// A component as the prober sees it. The sampler writes what is to be looked at and takes what was sampled; neither waits for the other.
#[derive(Debug)]
pub(crate) struct Probed {
    device: DeviceType,
    seen: Mutex<Seen>,
    /// Changes whenever what was sampled before is of no use any more.
    epoch: AtomicU64,
    sampled: Mutex<Sampled>,
}

/// What is to be looked at.
#[derive(Debug, Default)]
struct Seen {
    view: Option<(View, bool)>,
    rings: Vec<(u32, Arc<RingFeed>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probed {
    pub(crate) fn new(device: DeviceType) -> Self {
        Probed { device, seen: Mutex::default(), epoch: AtomicU64::new(0), sampled: Mutex::default() }
    }

    pub(crate) fn device(&self) -> DeviceType {
        self.device
    }

    /// Guest memory is mapped anew. With it, whether both sides use event indices.
    pub(crate) fn show(&self, view: View, event_idx: bool) {
        lock(&self.seen).view = Some((view, event_idx));
        self.forget();
    }

    pub(crate) fn add_ring(&self, index: u32, feed: Arc<RingFeed>) {
        let rings = &mut lock(&self.seen).rings;
        rings.retain(|(other, _)| *other != index);
        rings.push((index, feed));
    }

    /// Whatever has been sampled until now is not wanted.
    pub(crate) fn forget(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
        if let Ok(mut sampled) = self.sampled.try_lock() {
            *sampled = Sampled::default();
        }
    }

    /// Takes what has been sampled since the last call. What is being added at this moment is left for the next one.
    pub(crate) fn take(&self) -> Sampled {
        self.sampled.try_lock().map(|mut sampled| std::mem::take(&mut *sampled)).unwrap_or_default()
    }

    fn add(&self, epoch: u64, sampled: &Sampled) {
        let mut all = lock(&self.sampled);
        if self.epoch.load(Ordering::Acquire) == epoch {
            all.merge(sampled);
        }
    }
}

/// What is remembered of one ring.
#[derive(Debug, Default)]
struct Known {
    trail: Trail,
    submitted: Counter,
    completed: Counter,
    depth: Counter,
    at: Nanos,
    /// Requests per second between the last two times that it was asked.
    rate: f64,
    /// What a request takes, of late.
    expected: Nanos,
    /// Requests completed and requests in flight times nanoseconds since the last probe that sampled anything, and probes since.
    work: (u64, u64),
    fruitless: u32,
}

impl Known {
    /// Reads what the broker has counted. True if there is anything to look at.
    fn read(&mut self, feed: &RingFeed, now: Nanos) -> bool {
        let elapsed_s = now.since(self.at).0 as f64 / 1e9;
        self.at = now;
        let (completed, depth) = feed.work();
        let arrivals = self.submitted.since(feed.submitted()).unwrap_or(0);
        let (completed, depth) = (self.completed.since(completed).unwrap_or(0), self.depth.since(depth).unwrap_or(0));
        self.work = (self.work.0 + completed, self.work.1 + depth);
        self.rate = arrivals as f64 / elapsed_s.max(1e-6);
        arrivals > 0
    }

    /// A probe is done.
    fn learn(&mut self, sampled: &Sampled) {
        let count = u64::try_from(sampled.latencies[0].total()).unwrap_or(u64::MAX);
        match sampled.latency_ns.checked_div(count) {
            Some(mean) => self.expected = Nanos((self.expected.0.saturating_mul(3) + mean) / 4),
            None if self.fruitless < FRUITLESS_MAX => return self.fruitless += 1,
            None => self.expected = Nanos(self.work.1.checked_div(self.work.0).unwrap_or(self.expected.0)),
        }
        (self.work, self.fruitless) = ((0, 0), 0);
    }
}

/// A component and what is remembered of it.
struct Component {
    probed: Arc<Probed>,
    known: Vec<Known>,
    /// Rings are probed in turn.
    turn: usize,
    /// It had something to look at when it was asked last.
    busy: bool,
    epoch: u64,
}

/// A probe under way.
struct Running {
    component: usize,
    view: View,
    probe: Probe,
    sampled: Sampled,
    epoch: u64,
    at: Nanos,
}

/// See the module.
pub(crate) struct Prober {
    told: Receiver<Arc<Probed>>,
    tick: Nanos,
    components: Vec<Component>,
    probes: Vec<Running>,
    next_probe: Nanos,
    /// Components are probed in turn.
    turn: usize,
}

impl Prober {
    /// Starts it, on `cpus` if any are named. It ends when nobody can tell it of a component any more.
    pub(crate) fn start(tick: Nanos, cpus: Vec<usize>) -> std::io::Result<Sender<Arc<Probed>>> {
        let (sender, told) = crossbeam_channel::unbounded();
        let mut prober = Prober { told, tick, components: Vec::new(), probes: Vec::new(), next_probe: now(), turn: 0 };
        std::thread::Builder::new().name("prober".to_owned()).stack_size(256 * 1024).spawn(move || {
            super::keep_to(&cpus);
            super::run_where_nobody_else_does();
            prober.run();
        })?;
        Ok(sender)
    }

    fn run(&mut self) {
        loop {
            let due = self.probes.iter().map(|running| running.at).fold(self.next_probe, Nanos::min);
            match self.told.recv_timeout(Duration::from_nanos(due.since(now()).0)) {
                Ok(probed) => {
                    let component = Component { probed, known: Vec::new(), turn: 0, busy: false, epoch: 0 };
                    self.components.push(component);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.follow();
            if now() >= self.next_probe {
                self.begin();
            }
        }
    }

    /// Begins a probe of the next busy component.
    fn begin(&mut self) {
        let began = now();
        self.next_probe = began + self.tick;
        let count = self.components.len();
        if count == 0 || self.probes.len() >= PROBES_MAX {
            return;
        }
        for step in 1..=count {
            let at = (self.turn + step) % count;
            let Some((probe, view)) = self.components[at].probe(began) else { continue };
            self.turn = at;
            let busy = self.components.iter().filter(|it| it.busy).count().max(1) as u64;
            self.next_probe = began + Nanos(PROBE_EVERY.0 / busy);
            let epoch = self.components[at].epoch;
            self.probes.push(Running { component: at, view, probe, sampled: Sampled::default(), epoch, at: began });
            return self.follow();
        }
    }

    /// Looks where probes want to.
    fn follow(&mut self) {
        let mut at = 0;
        while at < self.probes.len() {
            let running = &mut self.probes[at];
            if now() < running.at {
                at += 1;
                continue;
            }
            let before = spent();
            let done = self.components[running.component].look(running);
            // What probes cost is that part of the time at most, however many components are busy and whatever they do.
            let cost = spent().since(before);
            self.next_probe = self.next_probe.max(now()) + Nanos(cost.0.saturating_mul(PROBE_PAUSE));
            if done {
                let running = self.probes.swap_remove(at);
                self.components[running.component].finish(&running);
            } else {
                at += 1;
            }
        }
    }
}

impl Component {
    /// A probe of the next busy ring.
    fn probe(&mut self, now: Nanos) -> Option<(Probe, View)> {
        let seen = lock(&self.probed.seen);
        let epoch = self.probed.epoch.load(Ordering::Acquire);
        if self.epoch != epoch {
            // Where memory has changed the rings may be other ones.
            self.known.iter_mut().for_each(|known| known.trail = Trail::default());
            self.epoch = epoch;
        }
        let (view, event_idx) = seen.view.as_ref()?;
        let count = seen.rings.len();
        self.known.resize_with(count, Known::default);
        let mut next = None;
        for step in 1..=count {
            let at = (self.turn + step) % count;
            if self.known[at].read(&seen.rings[at].1, now) && next.is_none() {
                next = Some(at);
            }
        }
        self.busy = next.is_some();
        self.turn = next?;
        let known = &self.known[self.turn];
        let max = if known.expected > SHORT { COLLECT_SLEEPING_MAX } else { COLLECT_MAX };
        let collect = Nanos((COLLECT_REQUESTS / known.rate * 1e9) as u64).clamp(COLLECT_MIN, max);
        let what = (self.probed.device, *event_idx);
        let probe = Probe::begin(seen.rings[self.turn].0, what, (collect, known.expected), view, now)?;
        Some((probe, view.clone()))
    }

    /// What is known of the ring of a probe.
    fn known_of(&mut self, running: &Running) -> Option<&mut Known> {
        let ring = running.probe.ring();
        let at = lock(&self.probed.seen).rings.iter().position(|(index, _)| *index == ring)?;
        self.known.get_mut(at)
    }

    /// A probe is done.
    fn finish(&mut self, running: &Running) {
        if let Some(known) = self.known_of(running) {
            known.learn(&running.sampled);
        }
        self.probed.add(running.epoch, &running.sampled);
    }

    /// Looks as long as a probe wants to at once. True if it is done.
    fn look(&mut self, running: &mut Running) -> bool {
        if self.probed.epoch.load(Ordering::Acquire) != running.epoch {
            return true;
        }
        let Some(known) = self.known_of(running) else { return true };
        let trail = &mut known.trail;
        loop {
            match running.probe.look(&running.view, trail, now, &mut running.sampled) {
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

/// Processor time of this thread so far: what a probe costs is not what others did while it was kept from its processor.
fn spent() -> Nanos {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Nanos(seconds.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64))
}
