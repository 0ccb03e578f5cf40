//! How fast the VMM is answered while the primary is stopped.
//!
//! The primary gets SIGSTOP under load, so it holds requests and answers nothing. The broker is told to take nothing for a
//! hang, so nothing rescues it: what answers is the broker's own record. The VMM goes through its requests, each with an
//! acknowledgement, in the order of a guest's life: interrupts masked and unmasked, memory plugged, rings stopped and started
//! again. Then the primary goes on, and every request that was in flight must complete.
//!
//! Two guests, for a VMM gives memory either as a table or region by region. A table is only given to a device that holds no
//! requests: QSD unmaps what it uses.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::backend;
use super::broker::Broker;
use super::driver::{Driver, Shape};
use super::spread::{Samples, Spread};
use crate::common::process::Target;
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;
use crate::guest::{Acks, now_ns};

/// Bytes of memory plugged.
const PLUG_BYTES: u64 = 2 << 20;
/// Load before a stop.
const LOAD_NS: u64 = 3_000_000;
/// How long the broker's status may take.
const STATUS_NS: u64 = 10_000_000_000;

/// Times by request.
#[derive(Debug, Default)]
pub(super) struct Answers {
    requests: BTreeMap<&'static str, Samples>,
    every: Samples,
    /// Failovers the broker made although it was told not to take silence for a hang.
    pub(super) failovers: u64,
}

impl Answers {
    /// Over all requests.
    pub(super) fn all(&self) -> Spread {
        self.every.spread()
    }

    /// By request.
    pub(super) fn by_request(&self) -> BTreeMap<&'static str, Spread> {
        self.requests.iter().map(|(name, samples)| (*name, samples.spread())).collect()
    }

    fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let began = now_ns();
        let result = work().with_context(|| format!("{name} to a stopped primary"))?;
        let took = now_ns() - began;
        self.requests.entry(name).or_default().push_ns(took);
        self.every.push_ns(took);
        Ok(result)
    }
}

/// Stops a primary `stops` times.
pub(super) fn measure(workspace: &Workspace, stops: u32, seed: u64) -> anyhow::Result<Answers> {
    let directory = workspace.directory("answers")?;
    let image = directory.join("image");
    backend::make_image(&image)?;
    let line = backend::on_file(image, 1, backend::Engine::Threads).command_line("{socket}");
    let patient = ["--hang-ms", "600000", "--stall-ms", "3600000"];
    let mut broker = Broker::start(&directory, &patient, &line)?;
    let mut answers = Answers::default();
    for memory_slots in [true, false] {
        let shape = Shape { memory_mib: 128, depth: 16, acks: Acks::All, memory_slots, ..Shape::at(broker.socket()) };
        let mut driver = Driver::boot(&shape, Rng::new(seed, 5)).with_context(|| broker.last_words())?;
        for _ in 0..stops.div_ceil(2) {
            one_stop(&mut broker, &mut driver, memory_slots, &mut answers).with_context(|| broker.last_words())?;
        }
        driver.guest.stop()?;
    }
    let status = wait_until_whole(&mut broker)?;
    answers.failovers = status["failovers"]["settled"].as_u64().unwrap_or(0);
    Ok(answers)
}

fn one_stop(broker: &mut Broker, driver: &mut Driver, memory_slots: bool, answers: &mut Answers) -> anyhow::Result<()> {
    let status = wait_until_whole(broker)?;
    let pid = status["primary"]["pid"].as_u64().context("the primary has no process")?;
    driver.run_for(LOAD_NS)?;
    if memory_slots {
        driver.busy = false;
    } else {
        driver.rest()?;
    }
    let stopped = Stopped::stop(u32::try_from(pid)?)?;
    requests(driver, answers)?;
    drop(stopped);
    driver.rest()
}

/// The VMM's requests, in the order of a guest's life.
fn requests(driver: &mut Driver, answers: &mut Answers) -> anyhow::Result<()> {
    let guest = &mut driver.guest;
    answers.time("GET_FEATURES", || guest.front()?.synchronise())?;
    answers.time("GET_CONFIG", || guest.front()?.config().map(drop))?;
    answers.time("SET_VRING_CALL", || guest.mask(0))?;
    answers.time("SET_VRING_CALL", || guest.unmask(0))?;
    let table = if guest.options().memory_slots { "ADD_MEM_REG" } else { "SET_MEM_TABLE" };
    answers.time(table, || guest.plug_memory(PLUG_BYTES).map(drop))?;
    let table = if guest.options().memory_slots { "REM_MEM_REG" } else { "SET_MEM_TABLE" };
    answers.time(table, || guest.unplug_memory().map(drop))?;
    answers.time("SET_VRING_ENABLE", || guest.front()?.enable_ring(0, false))?;
    let base = answers.time("GET_VRING_BASE", || guest.front()?.stop_ring(0))?;
    let front = guest.front()?;
    answers.time("SET_FEATURES", || front.set_features())?;
    // NUM, BASE, ADDR, KICK and CALL together: none of them takes longer than all.
    let queue = std::mem::take(&mut guest.queues);
    let started = answers.time("SET_VRING_* (all five)", || guest.front()?.start_ring(&queue[0], base));
    guest.queues = queue;
    started?;
    answers.time("SET_VRING_ENABLE", || guest.front()?.enable_ring(0, true))
}

fn wait_until_whole(broker: &mut Broker) -> anyhow::Result<Value> {
    let deadline = now_ns() + STATUS_NS;
    broker.ask_status()?;
    loop {
        if let Some(status) = broker.status()? {
            if status["state"] == "protected" && status["phase"] == "Idle" && status["shadow"]["state"] == "ready" {
                return Ok(status);
            }
            ensure!(now_ns() < deadline, "the pair does not become whole: {status}");
            broker.ask_status()?;
        }
        ensure!(now_ns() < deadline, "the broker does not answer");
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
}

/// A process that is stopped. Goes on when dropped.
struct Stopped(Target);

impl Stopped {
    fn stop(pid: u32) -> anyhow::Result<Self> {
        let target = Target::open(pid)?;
        target.signal(Signal::STOP)?;
        let stopped = Stopped(target);
        let deadline = now_ns() + STATUS_NS;
        while !every_thread_is_stopped(pid)? {
            ensure!(now_ns() < deadline, "process {pid} does not stop");
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // The broker may have killed it.
        let _ = self.0.signal(Signal::CONT);
    }
}

fn every_thread_is_stopped(pid: u32) -> anyhow::Result<bool> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let stat = std::fs::read_to_string(task?.path().join("stat")).unwrap_or_else(|_| ") T".into());
        if !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_stopped_and_goes_on() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let stopped = Stopped::stop(child.id()).expect("stop");
        assert!(every_thread_is_stopped(child.id()).expect("proc"));
        drop(stopped);
        let deadline = now_ns() + STATUS_NS;
        while every_thread_is_stopped(child.id()).expect("proc") {
            assert!(now_ns() < deadline, "it does not go on");
        }
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
