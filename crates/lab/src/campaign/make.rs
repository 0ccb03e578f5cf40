//! One run from its beginning to its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::json;
use warmswap::control::Client;
use warmswap_predict::{Grain, Record};

use super::form::Shape;
use super::guest::{Driver, Event, Felt};
use super::harmless::{Aside, Neighbour};
use super::inject::{Injector, injector};
use super::kind::Means;
use super::plan::{Plan, Spec};
use super::runs::{Label, Run};
use super::scene::{DEVICE, Place, Scene};
use super::script::Script;
use crate::common::process::Target;
use crate::guest::now_ns;

/// How often an injector is told how bad it shall be.
pub(super) const SET_EVERY: Duration = Duration::from_millis(10);

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

/// Makes a run at a place.
pub(super) fn make(spec: &Spec, plan: &Plan, place: Place<'_>) -> anyhow::Result<Made> {
    let script = Script::draw(spec, plan)?;
    let scene = Scene::new(spec, plan, place, script.fault.clone())?;
    let monitor = scene.monitor();
    let injector = spec.kind.outside().map(|outside| injector(outside, &scene.subject(&monitor))).transpose()?;
    let records = follow(&scene, spec.ticks)?;
    let played = play(spec, plan, &script, &scene, injector).with_context(|| scene.last_words())?;
    if played.felt.failure.is_none() {
        // The last window may still be on its way.
        std::thread::sleep(Duration::from_millis(plan.window_ms / 2));
    }
    drop(scene);
    let Followed { windows, ticks, lost } = records.join().expect("it does not panic");
    let unix = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 - now_ns();
    let label = label(spec, plan, &played, unix);
    Ok(Made { run: Run { label, windows }, felt: played.felt, ticks, lost })
}

/// What came of a script, by the clock of the guest.
struct Played {
    felt: Felt,
    onset: Option<u64>,
    /// When a resource was used up, if the injector knows.
    exhausted: Option<u64>,
}

/// Boots the guest and lets happen what shall happen.
fn play(
    spec: &Spec,
    plan: &Plan,
    script: &Script,
    scene: &Scene,
    injector: Option<Box<dyn Injector>>,
) -> anyhow::Result<Played> {
    let backend = Target::open(scene.pid)?;
    let (disk, chances) = ((script.phases.clone(), scene.blocks), [spec.chance(2), spec.chance(3)]);
    let driver = Driver::boot(scene.socket(), backend, disk, Duration::from_millis(plan.timeout_ms), chances)?;
    let began = now_ns();
    let ns = |ms: u64| began + ms * 1_000_000;
    let Script { times, table, .. } = script;
    let events: Vec<(u64, Event)> = table.guest.iter().map(|(at, event)| (ns(*at), *event)).collect();
    let ended = AtomicBool::new(false);
    let (felt, injected, besides) = std::thread::scope(|scope| {
        let (shape, sham) = (script.shape.clone(), matches!(spec.kind.means, Means::Sham(_)));
        let worse = Worse { shape, sham, onset: ns(times.onset), fault_ms: times.fault };
        let ended = &ended;
        let injecting = scope.spawn(move || inject(injector, &worse, ended));
        let besides = scope.spawn(|| beside(scene, &table.aside, began, ended));
        let felt = driver.run(began, ns(times.onset), ns(times.end), &events);
        ended.store(true, Ordering::Relaxed);
        (felt, injecting.join().expect("it does not panic"), besides.join().expect("it does not panic"))
    });
    let felt = felt?;
    // Nothing can be done any more to a backend that is dead.
    let exhausted = match injected {
        Err(error) if felt.failure.is_none() => return Err(error),
        injected => injected.ok().flatten(),
    };
    if felt.failure.is_none() {
        besides?;
    }
    let first = table.guest.iter().map(|it| it.0).chain(table.aside.iter().map(|it| it.0)).min();
    let onset = if matches!(spec.kind.means, Means::Harmless(_)) { first } else { Some(times.onset) };
    Ok(Played { felt, onset: onset.map(ns), exhausted })
}

/// The label, with `unix` added to the clock of the guest.
fn label(spec: &Spec, plan: &Plan, played: &Played, unix: u64) -> Label {
    let failure = played.felt.failure.as_ref();
    let failure_unix_ns = failure.map(|failure| failure.at_ns + unix);
    // Who runs into a bound inside a backend is dead, or has told the guest, at that moment.
    let exhaustion = played.exhausted.map(|at| at + unix).or(failure_unix_ns);
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
        onset_unix_ns: played.onset.map(|at| at + unix),
        failure_unix_ns,
        failure: failure.map(|failure| failure.what.clone()),
        exhausts: spec.kind.exhausts.map(|feature| feature.name().to_owned()),
        exhaustion_unix_ns: spec.kind.exhausts.and(exhaustion),
        causes: spec.kind.causes.iter().map(|feature| feature.name().to_owned()).collect(),
    }
}

/// How an injector is driven.
struct Worse {
    shape: Shape,
    sham: bool,
    /// By the clock of the guest.
    onset: u64,
    fault_ms: u64,
}

/// Makes it worse until the run has ended. Returns when a resource was used up, if the injector knows.
fn inject(injector: Option<Box<dyn Injector>>, worse: &Worse, ended: &AtomicBool) -> anyhow::Result<Option<u64>> {
    let Some(mut injector) = injector else { return Ok(None) };
    let mut exhausted = None;
    while !ended.load(Ordering::Relaxed) {
        let now = now_ns();
        let since = (now as f64 - worse.onset as f64) / 1e6;
        let level = worse.shape.level(since / (worse.fault_ms as f64).max(1.0));
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
