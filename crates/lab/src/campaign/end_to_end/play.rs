//! One run: a case in a mode, from the boot of its guest to the last answer.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::cases::{Case, Mode, Variant};
use super::events::{self, Told, What};
use super::guest::{Endured, Enduring};
use super::stall::{first_beyond, stalled_ns};
use super::world::World;
use crate::campaign::harmless::{Aside, Neighbour};
use crate::campaign::hooks;
use crate::campaign::inject::{Injector, injector};
use crate::campaign::kind::Means;
use crate::campaign::make::SET_EVERY;
use crate::campaign::plan::Plan;
use crate::campaign::script::Script;
use crate::common::interrupt;
use crate::common::process::Target;
use crate::guest::now_ns;

/// A run ends so many milliseconds behind the collapse.
const BEHIND_MS: u64 = 6_000;
/// A pair is set up so often until the one that will fail is the one that serves.
const SET_UP_TRIES: u32 = 20;
/// With the fault gone, everything must be answered within this time.
const SETTLE: Duration = Duration::from_secs(3);
/// A failover that a prediction asked for is looked at for so long.
const AFTER_NS: u64 = 3_000_000_000;
/// With so much stall in that time it was of no use.
const USELESS_NS: u64 = 1_000_000_000;
/// A stall of this length is felt.
const FELT_NS: u64 = 100_000_000;

/// What came of a run. Times by the clock of the guest.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) endured: Endured,
    pub(super) told: Vec<Told>,
    pub(super) began_ns: u64,
    /// When the fault began; none was there in a harmless run.
    pub(super) onset_ns: Option<u64>,
    /// When it had become all that it becomes.
    pub(super) collapse_ns: u64,
}

impl Outcome {
    /// How long the guest stood still, in seconds.
    pub(super) fn stall_s(&self) -> f64 {
        stalled_ns(&self.endured.stalls, 0, u64::MAX) as f64 / 1e9
    }

    /// The same before anything was done to it.
    pub(super) fn stall_before_s(&self) -> f64 {
        stalled_ns(&self.endured.stalls, 0, self.onset_ns.unwrap_or(u64::MAX)) as f64 / 1e9
    }

    /// Failovers that a prediction asked for: when each settled.
    pub(super) fn foresights(&self) -> impl Iterator<Item = u64> {
        self.told.iter().filter(|told| told.what.is_foresight()).map(|told| told.at_ns)
    }

    /// Of these, those with nothing to foresee: no fault had begun.
    pub(super) fn needless(&self) -> usize {
        self.foresights().filter(|at| self.onset_ns.is_none_or(|onset| *at < onset)).count()
    }

    /// Of these, those that a stall went on after.
    pub(super) fn useless(&self) -> usize {
        let stalled = |at: u64| stalled_ns(&self.endured.stalls, at, at + AFTER_NS);
        self.foresights().filter(|at| stalled(*at) > USELESS_NS).count()
    }

    /// The first failover after the onset that a prediction asked for, since the onset.
    pub(super) fn foreseen(&self) -> Option<u64> {
        let onset = self.onset_ns?;
        self.foresights().find(|at| *at >= onset).map(|at| at - onset)
    }

    /// When the guest first stood still for a while, after the onset.
    pub(super) fn first_felt_ns(&self) -> Option<u64> {
        first_beyond(&self.endured.stalls, FELT_NS, self.onset_ns?)
    }

    /// When the failure was there, since the onset: the collapse, or the first stall that was felt if that came sooner.
    pub(super) fn failed(&self) -> Option<u64> {
        let onset = self.onset_ns?;
        let felt = first_beyond(&self.endured.stalls, FELT_NS, onset);
        Some(felt.map_or(self.collapse_ns, |felt| felt.min(self.collapse_ns)).saturating_sub(onset))
    }

    /// Failovers of all kinds and halts, by their names.
    pub(super) fn failovers(&self) -> impl Iterator<Item = &str> {
        self.told.iter().filter_map(|told| match &told.what {
            What::Settled(kind) => Some(kind.as_str()),
            What::Halted => Some("halted"),
            What::Predicted | What::Withheld | What::Lost => None,
        })
    }
}

/// Makes a run in an empty directory.
pub(super) fn play(case: &Case, mode: Mode, plan: &Plan, directory: &Path) -> anyhow::Result<Outcome> {
    let mut script = Script::draw(&case.spec, plan)?;
    if case.spec.kind.is_fault() {
        script.times.end = script.times.onset + script.times.fault + BEHIND_MS;
    }
    let fault = script.fault.as_deref().map(|fault| hooks::until(fault, script.times.end));
    let (mut world, guest) = set_up(case, mode, plan, directory, &script, fault.as_deref())?;
    let told = world.control().map(|control| events::follow(&control)).transpose()?;
    let (endured, began) = endure(case, &script, &world, guest).with_context(|| world.last_words())?;
    world.must_live().with_context(|| world.last_words())?;
    ensure!(!interrupt::is_asked(), "interrupted");
    drop(world);
    let told = told.map(|thread| thread.join().expect("it does not panic")).unwrap_or_default();
    let ns = |ms: u64| began + ms * 1_000_000;
    let times = script.times;
    let onset_ns = case.spec.kind.is_fault().then(|| ns(times.onset));
    Ok(Outcome { endured, told, began_ns: began, onset_ns, collapse_ns: ns(times.onset + times.fault) })
}

/// Sets up a world in which the backend that will fail is the one that serves, and boots its guest.
fn set_up(
    case: &Case,
    mode: Mode,
    plan: &Plan,
    directory: &Path,
    script: &Script,
    fault: Option<&str>,
) -> anyhow::Result<(World, Enduring)> {
    for _ in 0..SET_UP_TRIES {
        let world = World::new(case, mode, plan, directory, fault.map(str::to_owned))?;
        let disk = (script.phases.clone(), world.blocks);
        let chances = [case.spec.chance(2), case.spec.chance(3)];
        let guest = Enduring::boot(world.socket(), disk, chances).with_context(|| world.last_words())?;
        if world.is_served_by_the_first().with_context(|| world.last_words())? {
            return Ok((world, guest));
        }
    }
    bail!("the other backend of the pair was ready first {SET_UP_TRIES} times")
}

/// Lets happen what shall happen, and puts an end to it. Returns as well when the run began.
fn endure(case: &Case, script: &Script, world: &World, mut guest: Enduring) -> anyhow::Result<(Endured, u64)> {
    let spec = &case.spec;
    let first = Target::open(world.pid)?;
    let monitor = world.monitor();
    let injector = spec.kind.outside().map(|outside| injector(outside, &world.subject(&monitor))).transpose()?;
    let began = now_ns();
    let events: Vec<_> = script.table.guest.iter().map(|(at, event)| (began + at * 1_000_000, *event)).collect();
    let ended = AtomicBool::new(false);
    let (ran, injected, besides) = std::thread::scope(|scope| {
        let ended = &ended;
        // What lies in the backend is gone with it.
        let until = matches!(case.variant, Variant::Backend).then_some(&first);
        let sham = matches!(spec.kind.means, Means::Sham(_));
        let injecting = scope.spawn(move || inject(injector, script, sham, began, until, ended));
        let besides = scope.spawn(|| beside(world, &script.table.aside, began, ended));
        let ran = guest.run(began, began + script.times.end * 1_000_000, &events);
        ended.store(true, Ordering::Relaxed);
        (ran, injecting.join().expect("it does not panic"), besides.join().expect("it does not panic"))
    });
    ran.and(injected).and(besides)?;
    world.make_room();
    Ok((guest.settle(SETTLE)?, began))
}

/// Makes it worse until the run has ended, or the process `until` has; then it is undone.
fn inject(
    injector: Option<Box<dyn Injector>>,
    script: &Script,
    sham: bool,
    began: u64,
    until: Option<&Target>,
    ended: &AtomicBool,
) -> anyhow::Result<()> {
    let Some(mut injector) = injector else { return Ok(()) };
    let gone = || until.is_some_and(|target| !target.is_alive());
    let onset = began + script.times.onset * 1_000_000;
    while !ended.load(Ordering::Relaxed) && !gone() {
        let since = (now_ns() as f64 - onset as f64) / 1e6;
        let level = script.shape.level(since / (script.times.fault as f64).max(1.0));
        if let Err(error) = injector.set(if sham { 0.0 } else { level }) {
            // Nothing can be done any more to a process that is gone.
            if gone() {
                break;
            }
            return Err(error.context("making it worse"));
        }
        std::thread::sleep(SET_EVERY);
    }
    // Where the process is gone there is nothing to be undone but what goes with the injector.
    let _ = injector.set(0.0);
    Ok(())
}

/// Does what happens beside the guest, at its time, until the run has ended. That is of harmless runs, which have a broker.
fn beside(world: &World, table: &[(u64, Aside)], began: u64, ended: &AtomicBool) -> anyhow::Result<()> {
    let Some(broker) = world.broker() else { return Ok(()) };
    let mut neighbour = Neighbour::new(world.name(), &world.image, broker);
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

#[cfg(test)]
mod tests {
    use super::super::stall::Stall;
    use super::*;

    const S: u64 = 1_000_000_000;

    fn outcome(onset_ns: Option<u64>, stalls: Vec<Stall>, foreseen: &[u64]) -> Outcome {
        let settled = |at: &u64| Told { at_ns: *at, what: What::Settled("predicted".to_owned()), why: String::new() };
        let endured = Endured { stalls, ..Endured::default() };
        let told = foreseen.iter().map(settled).collect();
        Outcome { endured, told, began_ns: 0, onset_ns, collapse_ns: 20 * S }
    }

    #[test]
    fn a_failover_is_needless_before_a_fault_and_useless_where_the_stall_goes_on() {
        let stall = |from: u64, until: u64| Stall { from_ns: from * S, until_ns: until * S };
        let good = outcome(Some(10 * S), vec![stall(13, 14)], &[14 * S]);
        assert_eq!((good.needless(), good.useless()), (0, 0));
        assert_eq!((good.foreseen(), good.failed()), (Some(4 * S), Some(3 * S)));
        let common = outcome(Some(10 * S), vec![stall(13, 26)], &[9 * S, 14 * S]);
        assert_eq!((common.needless(), common.useless()), (1, 1));
        let harmless = outcome(None, vec![], &[5 * S]);
        assert_eq!((harmless.needless(), harmless.useless(), harmless.failed()), (1, 0, None));
    }
}
