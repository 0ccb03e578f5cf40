//! One run from its beginning to its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::json;
use warmswap::control::Client;
use warmswap_predict::{Grain, Record};

use super::form::{Form, Shape};
use super::guest::{Driver, Event, Felt};
use super::harmless::{Aside, Neighbour, Timetable, timetable};
use super::hooks::{self, Span};
use super::inject::{Injector, injector};
use super::kind::{Hook, Means};
use super::plan::{Plan, Spec};
use super::runs::{Label, Run};
use super::scene::{DEVICE, Place, Scene};
use super::workload;
use crate::common::process::Target;
use crate::common::rng::Rng;
use crate::guest::now_ns;

/// How often an injector is told how bad it shall be.
const SET_EVERY: Duration = Duration::from_millis(10);
/// Behind its time a fault may take so much longer, as a part of it, until the guest has seen it.
const MORE: f64 = 0.4;
/// And so many seconds.
const MORE_S: f64 = 2.5;

/// A run, and what its guest felt.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) run: Run,
    pub(super) felt: Felt,
    /// Its ticks, if they are wanted.
    pub(super) ticks: Vec<Record>,
    /// Records that did not get through.
    pub(super) lost: u64,
}

/// The times of a run, in milliseconds since its guest was started.
#[derive(Clone, Copy, Debug)]
struct Times {
    onset: u64,
    /// From onset to collapse.
    fault: u64,
    end: u64,
}

impl Times {
    fn of(spec: &Spec, plan: &Plan, rng: &mut Rng) -> Self {
        let ms = |seconds: f64| (seconds * 1e3) as u64;
        // Not on the beat of anything.
        let onset = ms(plan.healthy_s) + rng.below(1_500);
        if !spec.kind.is_fault() {
            return Times { onset, fault: 0, end: onset.max(ms(plan.harmless_s)) };
        }
        if spec.kind.means == Means::Hook(Hook::Poison) {
            let fault = ms(hooks::poison_s(plan.window_ms));
            return Times { onset, fault, end: onset + fault + ms(MORE_S) };
        }
        let fault = ms(plan.fault_s);
        Times { onset, fault, end: onset + fault + ms(plan.fault_s * MORE + MORE_S) }
    }
}

/// Makes a run at a place.
pub(super) fn make(spec: &Spec, plan: &Plan, place: Place<'_>) -> anyhow::Result<Made> {
    let mut rng = spec.chance(1);
    let times = Times::of(spec, plan, &mut rng);
    let shape = Shape::new(spec.form, &mut rng);
    let phases = workload::phases(spec.workload, &mut rng).context("there is no such workload")?;
    let rate = mean_rate(&phases);
    let fault = match spec.kind.means {
        Means::Hook(hook) => {
            let span = Span { from_ms: times.onset, for_ms: times.fault, window_ms: plan.window_ms };
            Some(hooks::plan(hook, spec.form, &shape, span, rate))
        }
        _ => None,
    };
    let scene = Scene::new(spec, plan, place, fault)?;
    let injector = spec.kind.outside().map(|outside| injector(outside, &scene)).transpose()?;
    let records = follow(&scene, spec.ticks)?;
    let table = match spec.kind.means {
        Means::Harmless(what) => timetable(what, times.onset, times.end, &mut rng),
        Means::LostKicks => Timetable { guest: lost(spec.form, times, Event::LoseKicks), aside: Vec::new() },
        Means::LostCalls => Timetable { guest: lost(spec.form, times, Event::LoseCalls), aside: Vec::new() },
        Means::Outside(super::kind::Outside::Descriptors) => {
            // Who cannot get a descriptor notices it when it needs one.
            let at = times.onset + times.fault + 500;
            Timetable { guest: vec![(at, Event::Reboot)], aside: Vec::new() }
        }
        _ => Timetable::default(),
    };
    let backend = Target::open(scene.pid)?;
    let guest_rng = [spec.chance(2), spec.chance(3)];
    let timeout = Duration::from_millis(plan.timeout_ms);
    let driver = Driver::boot(scene.socket(), backend, (phases, scene.blocks), timeout, guest_rng)
        .with_context(|| scene.last_words())?;
    let began = now_ns();
    let ns = |ms: u64| began + ms * 1_000_000;
    let ended = AtomicBool::new(false);
    let events: Vec<(u64, Event)> = table.guest.iter().map(|(at, event)| (ns(*at), *event)).collect();
    let first = events.iter().map(|it| it.0).chain(table.aside.iter().map(|it| ns(it.0))).min();
    let (felt, injected) = std::thread::scope(|scope| {
        let worse = Worse { shape, sham: matches!(spec.kind.means, Means::Sham(_)), onset: ns(times.onset), times };
        let ended = &ended;
        let injecting = scope.spawn(move || inject(injector, &worse, ended));
        let besides = scope.spawn(|| beside(&scene, &table.aside, began, ended));
        let felt = driver.run(began, ns(times.onset), ns(times.end), &events);
        ended.store(true, Ordering::Relaxed);
        let injected = injecting.join().expect("it does not panic");
        let besides = besides.join().expect("it does not panic");
        (felt, injected.and_then(|it| besides.map(|()| it)))
    });
    let felt = felt.with_context(|| scene.last_words())?;
    if felt.failure.is_none() {
        injected.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        // The last window may still be on its way.
        std::thread::sleep(Duration::from_millis(plan.window_ms / 2));
    }
    drop(scene);
    let Followed { windows, ticks, lost } = records.join().expect("it does not panic");
    let unix = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 - now_ns();
    let onset = match spec.kind.means {
        Means::Harmless(_) => first,
        _ => Some(ns(times.onset)),
    };
    let label = label(spec, plan, &felt, onset.map(|at| at + unix), injected.ok().flatten(), unix);
    Ok(Made { run: Run { label, windows }, felt, ticks, lost })
}

fn label(spec: &Spec, plan: &Plan, felt: &Felt, onset: Option<u64>, exhausted: Option<u64>, unix: u64) -> Label {
    let failure_unix_ns = felt.failure.as_ref().map(|failure| failure.at_ns + unix);
    // Who runs into a bound inside a backend is dead, or has told the guest, at that moment.
    let exhaustion = exhausted.map(|at| at + unix).or(failure_unix_ns);
    Label {
        name: spec.name.clone(),
        kind: spec.kind.name.to_owned(),
        form: spec.form.name().to_owned(),
        fault: spec.kind.is_fault(),
        precursor: spec.kind.precursor,
        backend: spec.backend.name().to_owned(),
        workload: spec.workload.to_owned(),
        seed: spec.seed,
        window_ms: plan.window_ms,
        onset_unix_ns: onset,
        failure_unix_ns,
        failure: felt.failure.as_ref().map(|failure| failure.what.clone()),
        exhausts: spec.kind.exhausts.map(|feature| feature.name().to_owned()),
        exhaustion_unix_ns: spec.kind.exhausts.and(exhaustion),
        causes: spec.kind.causes.iter().map(|feature| feature.name().to_owned()).collect(),
    }
}

/// Requests per second while the disk takes no time, over all phases.
fn mean_rate(phases: &[workload::Phase]) -> f64 {
    let whole: f64 = phases.iter().map(|phase| phase.seconds).sum();
    phases.iter().map(|phase| phase.seconds * phase.load.rate_most()).sum::<f64>() / whole
}

/// From one of a thousand to all of them.
fn lost(form: Form, times: Times, lose: fn(u64) -> Event) -> Vec<(u64, Event)> {
    if form == Form::Sudden {
        return vec![(times.onset, lose(300))];
    }
    let steps = 20;
    let step = |at: u64| {
        let permille = super::form::between(1.0, 1_000.0, at as f64 / f64::from(steps as u32)) as u64;
        (times.onset + at * times.fault / steps, lose(permille))
    };
    (0..=steps).map(step).collect()
}

/// How an injector is driven.
struct Worse {
    shape: Shape,
    sham: bool,
    /// By the clock of the guest.
    onset: u64,
    times: Times,
}

/// Makes it worse until the run has ended. Returns when a resource was used up, if the injector knows.
fn inject(injector: Option<Box<dyn Injector>>, worse: &Worse, ended: &AtomicBool) -> anyhow::Result<Option<u64>> {
    let Some(mut injector) = injector else { return Ok(None) };
    let mut exhausted = None;
    while !ended.load(Ordering::Relaxed) {
        let now = now_ns();
        let since = (now as f64 - worse.onset as f64) / 1e6;
        let level = worse.shape.level(since / (worse.times.fault as f64).max(1.0));
        injector.set(if worse.sham { 0.0 } else { level })?;
        if exhausted.is_none() && injector.is_exhausted() {
            exhausted = Some(now_ns());
        }
        std::thread::sleep(SET_EVERY);
    }
    Ok(exhausted)
}

/// Does what happens beside the guest, at its time, until the run has ended.
fn beside(scene: &Scene, table: &[(u64, Aside)], began: u64, ended: &AtomicBool) -> anyhow::Result<()> {
    let mut neighbour = Neighbour::new(&scene.name, &scene.image, scene.broker());
    for (at, aside) in table {
        while now_ns() < began + at * 1_000_000 {
            if ended.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(SET_EVERY);
        }
        neighbour.act(*aside)?;
    }
    Ok(())
}

/// What was told of a device.
#[derive(Debug, Default)]
struct Followed {
    windows: Vec<Record>,
    ticks: Vec<Record>,
    /// Records that did not get through.
    lost: u64,
}

/// Collects what is told of a device until its broker ends; ticks where they are wanted.
fn follow(scene: &Scene, ticks: bool) -> anyhow::Result<JoinHandle<Followed>> {
    let mut client = Client::connect(&scene.control())?;
    client.tell(&json!({"verb": "stream", "device": DEVICE}))?;
    Ok(std::thread::Builder::new().name("records".to_owned()).spawn(move || {
        let mut followed = Followed::default();
        while let Ok(line) = client.line() {
            if line.get("end").is_some() {
                break;
            }
            followed.lost += line["lost"].as_u64().unwrap_or(0);
            match line["record"].as_str().and_then(bytes_of).and_then(|bytes| Record::decode(&bytes).ok()) {
                Some(record) if record.grain == Grain::Window => followed.windows.push(record),
                Some(record) if ticks => followed.ticks.push(record),
                _ => {}
            }
        }
        followed
    })?)
}

fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    let digits = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
    (0..hex.len()).step_by(2).map(digits).collect()
}
