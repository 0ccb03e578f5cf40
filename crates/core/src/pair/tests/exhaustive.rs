//! Small worlds, whole: every order of events up to a depth, from several beginnings, with one ring and two backends.
//!
//! After every event the harness checks the invariants (one backend serves a ring, what is handed over is what is owed, every descriptor is closed
//! once, nothing spins). At the end of every order everybody gets well, and then everything that was submitted must be completed, unless the
//! device says that it is halted.
//!
//! `WARMSWAP_TEST_DEPTH` goes deeper than the default; the number of orders grows about tenfold with each step.

use super::harness::{Harness, config};
use crate::drain::DrainMethod;
use crate::policy::PairConfig;

/// Events of an order.
const DEPTH: usize = 3;
/// Rounds in which everybody gets well: a backend may have to be found hung, fenced and replaced, and its successor as well.
const ROUNDS: usize = 12;

/// Where the orders begin: what has happened before.
const BEGINNINGS: [&[&str]; 6] = [
    &["ready 1"],
    &["ready 1", "submit 0 0 1 2", "take 0 2", "complete 0 1"],
    &["at 0 65534", "ready 1", "submit 0 0 1", "complete 0 0"],
    &["ready 1", "submit 0 0 1", "take 0 1", "failover"],
    &["ready 1", "submit 0 0 1", "take 0 0", "exit 1"],
    &["ready 1", "submit 0 0", "exit 2", "exit 1", "fenced 1"],
];

/// A world at the end of an order.
struct World {
    harness: Harness,
    connected: bool,
    /// Replies that were there when the VMM asked for the stop that it waits for.
    stopping: Option<usize>,
    running: bool,
}

impl World {
    fn new(config: PairConfig, beginning: &[&str]) -> Self {
        let mut harness = Harness::new(config);
        beginning.iter().for_each(|line| harness.quietly(line));
        World { harness, connected: true, stopping: None, running: true }
    }

    fn step(&mut self, line: &str) {
        match line {
            "vmm gone" => (self.connected, self.running, self.stopping) = (false, false, None),
            "boot 1" => (self.connected, self.running) = (true, true),
            "vmm GET_VRING_BASE 0" => self.stopping = Some(self.harness.replies),
            _ => {}
        }
        self.harness.quietly(line);
        if self.stopping.is_some_and(|before| self.harness.replies > before) {
            (self.stopping, self.running) = (None, false);
        }
    }

    /// What can happen next.
    fn choices(&self) -> Vec<String> {
        let harness = &self.harness;
        let mut choices =
            vec!["wait 1ms".to_owned(), "wait 600ms".to_owned(), "failover".to_owned(), "failover now".to_owned()];
        choices.push("another 60ms".to_owned());
        let driver = harness.drivers.get(&0);
        let broken = driver.is_some_and(|driver| driver.broken);
        let inflight = driver.map_or(&[][..], |driver| &driver.inflight);
        if self.running && !broken && self.stopping.is_none() && inflight.len() < 4 {
            let free = (0..8).find(|head| !inflight.contains(head));
            choices.extend(free.map(|head| format!("submit 0 {head}")));
        }
        if harness.holder(0).is_some() && !broken {
            let ends = [inflight.first(), inflight.last().filter(|_| inflight.len() > 1)];
            let held = ends.into_iter().flatten().filter(|head| harness.may_complete(0, **head));
            choices.extend(held.flat_map(|head| [format!("complete 0 {head}"), format!("take 0 {head}")]));
        }
        for (id, backend) in &harness.backends {
            choices.push(format!("exit {id}"));
            choices.push(format!("{} {id}", if backend.muted { "unmute" } else { "mute" }));
        }
        choices.extend(harness.fencing.iter().map(|id| format!("fenced {id}")));
        choices.extend(harness.starting.iter().map(|id| format!("up {id}")));
        if self.connected {
            choices.push("vmm gone".to_owned());
            let stops = self.running && self.stopping.is_none();
            choices.extend(stops.then(|| "vmm GET_VRING_BASE 0".to_owned()));
        } else {
            choices.extend(harness.pair.is_open().then(|| "boot 1".to_owned()));
        }
        choices
    }

    /// Everybody gets well.
    fn heal(&mut self) {
        for _ in 0..ROUNDS {
            let well = self.harness.backends.iter().filter(|(_, it)| it.muted).map(|(id, _)| format!("unmute {id}"));
            let fenced = self.harness.fencing.iter().map(|id| format!("fenced {id}"));
            let up = self.harness.starting.iter().map(|id| format!("up {id}"));
            let lines: Vec<String> = well.chain(fenced).chain(up).collect();
            // One may have been overtaken by the one before.
            let possible = |world: &World, line: &str| {
                let (verb, id) = line.split_once(' ').expect("a verb and a number");
                let id: u64 = id.parse().expect("a number");
                match verb {
                    "unmute" => world.harness.backends.contains_key(&id),
                    "fenced" => world.harness.fencing.contains(&id),
                    _ => world.harness.starting.contains(&id),
                }
            };
            for line in lines {
                if possible(self, &line) {
                    self.step(&line);
                }
            }
            self.serve();
            self.step("wait 700ms");
        }
    }

    /// Whoever holds the ring completes what it holds.
    fn serve(&mut self) {
        let heads = self.harness.drivers.get(&0).map_or(Vec::new(), |driver| driver.inflight.clone());
        for head in heads {
            if self.harness.holder(0).is_some() && self.harness.may_complete(0, head) {
                self.step(&format!("complete 0 {head}"));
            }
        }
    }

    /// Whether nothing is owed that could be given.
    fn is_well(&self) -> bool {
        let driver = self.harness.drivers.get(&0);
        let owes = driver.is_some_and(|driver| !driver.broken && !driver.inflight.is_empty());
        !(owes && self.connected && self.running)
    }
}

/// Goes through every order of so many more events. Returns how many there are.
fn every_order(config: &PairConfig, beginning: &[&str], order: &mut Vec<String>, depth: usize) -> u64 {
    let mut world = World::new(config.clone(), beginning);
    order.iter().for_each(|line| world.step(line));
    if depth == 0 {
        world.heal();
        assert!(
            world.is_well(),
            "{beginning:?} {order:?}: requests are left although everybody is well\n{}",
            world.harness.shown()
        );
        world.harness.finish();
        return 1;
    }
    let mut orders = 0;
    for choice in world.choices() {
        order.push(choice);
        orders += every_order(config, beginning, order, depth - 1);
        order.pop();
    }
    orders
}

fn depth() -> usize {
    std::env::var("WARMSWAP_TEST_DEPTH").ok().and_then(|depth| depth.parse().ok()).unwrap_or(DEPTH)
}

fn every_order_of(config: &PairConfig) {
    let mut orders = 0;
    for beginning in BEGINNINGS {
        orders += every_order(config, beginning, &mut Vec::new(), depth());
    }
    println!("{orders} orders of {} events", depth());
    assert!(orders > 10_u64.pow(u32::try_from(depth()).expect("few")), "{orders} orders: hardly anything was tried");
}

#[test]
fn every_order_of_events_with_a_private_kick() {
    every_order_of(&config());
}

#[test]
fn every_order_of_events_with_rings_that_are_disabled() {
    every_order_of(&PairConfig { drain: DrainMethod::Disable, ..config() });
}

#[test]
fn every_order_of_events_with_rings_that_drain_when_they_are_stopped() {
    every_order_of(&PairConfig { drain: DrainMethod::Stop, ..config() });
}
