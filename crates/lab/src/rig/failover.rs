//! One injection: what is done, what must follow.

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;

use super::control::{Answer, BackendStatus, DeviceStatus, Failover};
use super::kind::Kind;
use super::load::Pace;
use super::sys::make_it_spin;
use super::tally::{Seen, Tally};
use super::vmm;
use super::world::World;
use crate::common::process::Target;
use crate::guest::{self, now_ns};

/// The load runs at full pace for up to this long before an injection: the instant is uniform in it.
const LOAD_BEFORE_NS: u64 = 3_000_000;
/// Of 100 failovers, in how many nothing is submitted from the injection on: then no later kick or call can heal a lost
/// one.
const QUIET_PERCENT: u64 = 40;
/// Of 100 crashes, how many come between a completion and its call.
const SWALLOW_PERCENT: u64 = 30;
/// How long a process may take to stop.
const STOPPED_NS: u64 = 5_000_000;
/// How often a status may name a process that is gone.
const STALE_MAX: usize = 1000;
/// Of 100 planned failovers, how many are asked for without waiting for the shadow.
const IMPATIENT_PERCENT: u64 = 5;

/// A prediction is acted upon or withheld by then.
const PREDICTED_MAX_NS: u64 = 3_000_000_000;
/// Steps of a failover before one of which a backend is killed: more than a failover of four queues takes.
const STEPS_MAX: u64 = 56;
/// The same for the broker itself, which counts more of them.
const BROKER_STEPS_MAX: u64 = 90;
/// For so long the guest's waits are looked at before a broker is killed, and at least after that.
const GAP_NS: u64 = 20_000_000;
/// Whom it hits.
const VICTIMS: [&str; 3] = ["primary", "shadow", "both"];
/// Alarms that are made up.
const ALARMS: [&str; 3] = ["harm", "law", "exhaustion"];

/// The pair before an injection.
#[derive(Debug)]
struct Before {
    primary: Target,
    shadow: Target,
    status: DeviceStatus,
}

/// Waits until the device is protected: a primary that serves and a shadow that is ready.
fn wait_until_protected(world: &mut World) -> anyhow::Result<DeviceStatus> {
    world.run_until_status("a protected device", |status| {
        let ready = status.shadow.as_ref().is_some_and(|shadow| shadow.state == "ready");
        status.state == "protected" && ready && status.primary.as_ref().is_some_and(|primary| primary.pid.is_some())
    })
}

/// The pair, once the device is protected.
fn wait_for_pair(world: &mut World) -> anyhow::Result<Before> {
    for _ in 0..STALE_MAX {
        let status = wait_until_protected(world)?;
        let primary = Target::open(process_of(status.primary.as_ref())?);
        let shadow = Target::open(process_of(status.shadow.as_ref())?);
        // A process that has just ended may still be in a status.
        if let (Ok(primary), Ok(shadow)) = (primary, shadow) {
            return Ok(Before { primary, shadow, status });
        }
        world.run_for(1_000_000)?;
    }
    bail!("the status goes on naming processes that are gone")
}

/// Waits, after a reset, until the device is protected and serves.
pub(crate) fn serves_again(world: &mut World) -> anyhow::Result<()> {
    wait_until_protected(world)?;
    let before = world.load.completed;
    world.run_until("a completion after the reset", false, |world| Ok(world.load.completed > before))
}

/// The primary's process.
pub(crate) fn primary(world: &mut World) -> anyhow::Result<Target> {
    Ok(wait_for_pair(world)?.primary)
}

/// Waits until another primary serves than `old`.
pub(crate) fn wait_for_another_primary(world: &mut World, old: &Target) -> anyhow::Result<()> {
    let old = old.pid();
    let another = |status: &DeviceStatus| status.primary.as_ref().is_some_and(|primary| primary.pid != Some(old));
    world.run_until_status("another primary", another).map(drop)
}

fn process_of(backend: Option<&BackendStatus>) -> anyhow::Result<u32> {
    backend.and_then(|backend| backend.pid).context("a protected device without a process")
}

/// The program of a process, as it was executed.
fn program_of(pid: u32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let program = words.next().unwrap_or_default();
    if words.next().as_deref() == Some("blk") { "blk".into() } else { program.rsplit('/').next().unwrap_or("").into() }
}

/// Injects one failure of `kind` and waits for all that must follow.
pub(crate) fn inject(world: &mut World, kind: Kind, tally: &mut Tally) -> anyhow::Result<()> {
    world.pace = Pace::Trickle;
    let waiting = now_ns();
    let before = wait_for_pair(world)?;
    tally.waited("protected", now_ns() - waiting);
    let status = &before.status;
    // A failover in the course of something the VMM did is that thing's consequence.
    let known = if std::mem::take(&mut world.resynchronise) { status.failovers.settled } else { world.settled };
    let unasked = status.failovers.settled.saturating_sub(known);
    if unasked > 0 {
        tally.unexpected += unasked;
        eprintln!("  {unasked} failovers nobody asked for; {}", world.broker.last_events());
    }
    world.settled = status.failovers.settled;
    if matches!(kind, Kind::Stop | Kind::Spin | Kind::Poison) {
        // A masked guest takes no completions: it could not tell a hang from its own deafness.
        vmm::unmask(world)?;
    }
    let quiet = world.choices.percent(QUIET_PERCENT);
    let load_for = world.choices.below(LOAD_BEFORE_NS);
    let detail = world.choices.next();
    world.pace = Pace::Full;
    world.run_for(load_for)?;
    if world.programs.is_some() {
        upgrade_broker(world, tally)?;
    } else if world.kills_broker {
        kill_broker(world, detail, tally)?;
    }
    tally.injected(kind);
    strike(world, &before, kind, quiet, detail, tally)
}

/// Has the broker replaced by the other build under load.
fn upgrade_broker(world: &mut World, tally: &mut Tally) -> anyhow::Result<()> {
    world.programs.as_mut().context("the caller has seen them")?.swap()?;
    let asked = now_ns();
    world.load.start_gap(asked);
    world.broker.upgrade()?;
    let mut refused = None;
    world.run_until("the upgraded broker", false, |world| {
        if let Some(Answer::Refused(why)) = world.broker.take_answer() {
            refused = Some(why);
        }
        Ok(refused.is_some() || world.broker.has_readopted())
    })?;
    if let Some(why) = refused {
        bail!("the broker is not upgraded: {why}");
    }
    tally.upgrades += 1;
    tally.waited("upgrade", now_ns() - asked);
    tally.waited("gap-upgraded", world.load.longest_gap_ns());
    world.broker.take_readopted().into_iter().for_each(|took| tally.waited("readopt", took));
    follows_the_rings(world)
}

/// Rings that were busy are followed again when what was in flight then has come back.
fn follows_the_rings(world: &mut World) -> anyhow::Result<()> {
    let follows = |status: &DeviceStatus| status.state == "protected" && status.recovery_level != "refused";
    world.run_until_status("a broker that follows the rings", follows).map(drop)
}

/// Kills the broker at an instant under load, and waits for the next one; or has it die in the middle of the failover that comes.
fn kill_broker(world: &mut World, detail: u64, tally: &mut Tally) -> anyhow::Result<()> {
    if (detail / 3).is_multiple_of(2) {
        world.broker.set_failpoint(1 + detail / 6 % BROKER_STEPS_MAX, "broker")?;
        return wait_until_set(world);
    }
    // As long as the guest's own waits are looked at beside it.
    let start = now_ns();
    world.load.start_gap(start);
    world.run_for(GAP_NS)?;
    tally.waited("gap-before", world.load.longest_gap_ns());
    world.load.start_gap(now_ns());
    world.broker.kill()?;
    tally.broker_kills += 1;
    world.say("the broker is killed");
    let killed = now_ns();
    world.run_until("the next broker", false, |world| Ok(world.broker.is_connected() && now_ns() > killed + GAP_NS))?;
    tally.waited("gap-killed", world.load.longest_gap_ns());
    world.broker.take_readopted().into_iter().for_each(|took| tally.waited("readopt", took));
    follows_the_rings(world)
}

/// Does it, and follows it to its end.
fn strike(
    world: &mut World,
    before: &Before,
    kind: Kind,
    quiet: bool,
    detail: u64,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let start = now_ns();
    world.load.start_gap(start);
    let inflight = world.held_by_device();
    world.say(format_args!("{kind}: {inflight} in flight, primary {}", before.primary.pid()));
    tally.primary(&program_of(before.primary.pid()));
    let crash_too = detail.is_multiple_of(2);
    match kind {
        Kind::Planned | Kind::Now => world.broker.ask_failover(kind == Kind::Now)?,
        Kind::Point => {
            let whom = VICTIMS[(detail / 2 % VICTIMS.len() as u64) as usize];
            world.broker.set_failpoint(1 + detail / 6 % STEPS_MAX, whom)?;
            wait_until_set(world)?;
            match crash_too {
                true => hit(&before.primary, Signal::KILL, tally)?,
                false => world.broker.ask_failover(false)?,
            }
        }
        Kind::Predicted => world.broker.alarm(ALARMS[(detail / 7 % ALARMS.len() as u64) as usize])?,
        Kind::Crash => {
            if detail / 10_000 % 100 < SWALLOW_PERCENT && !vmm::any_masked(world) {
                swallow_calls(world, &before.primary, tally)?;
                tally.behaviour("swallow-calls");
            }
            hit(&before.primary, Signal::KILL, tally)?;
        }
        Kind::Stop => hit(&before.primary, Signal::STOP, tally)?,
        // A primary that is held still for so long that the broker takes it for hung, and kills it, has failed as well.
        Kind::Spin => match make_it_spin(before.primary.pid()) {
            Err(_) if !before.primary.is_alive() => tally.behaviour("killed-before-it-spun"),
            result => result.context("making the primary spin")?,
        },
        Kind::Shadow => {
            hit(&before.shadow, Signal::KILL, tally)?;
            if crash_too {
                world.run_for(detail / 2 % 300_000)?;
                hit(&before.primary, Signal::KILL, tally)?;
            }
        }
        Kind::Both => {
            let (first, second) =
                if crash_too { (&before.primary, &before.shadow) } else { (&before.shadow, &before.primary) };
            hit(first, Signal::KILL, tally)?;
            hit(second, Signal::KILL, tally)?;
        }
        Kind::Poison => return poison(world, before, inflight, tally),
    }
    // A hang shows only in requests that are not served: the load goes on until one waits.
    world.pace = if quiet && inflight > 0 { Pace::Quiet } else { Pace::Full };
    if kind == Kind::Shadow && !crash_too {
        return shadow_is_replaced(world, before, tally);
    }
    let asked = matches!(kind, Kind::Planned | Kind::Now) || (kind == Kind::Point && !crash_too);
    let raced = (asked || matches!(kind, Kind::Crash | Kind::Predicted)) && vmm::race(world, detail, tally)?;
    let ended = match kind {
        Kind::Predicted => wait_for_predicted(world, before, start)?,
        _ => wait_for_end(world, before, start, asked)?,
    };
    tally.waited("end", now_ns() - start);
    tally.points(world.broker.take_points());
    for took in world.broker.take_readopted() {
        tally.broker_kills += 1;
        tally.broker_kills_in_failover += 1;
        tally.waited("readopt", took);
    }
    let timed = !raced && !vmm::any_masked(world);
    after(world, Seen { kind, inflight, timed, blackout_ns: None, report: ended }, tally)
}

/// Sends a signal. A backend that the broker took for hung under load, and killed before the blow, has failed as well.
pub(crate) fn hit(target: &Target, signal: Signal, tally: &mut Tally) -> anyhow::Result<()> {
    match target.signal(signal) {
        Err(_) if !target.is_alive() => {
            tally.behaviour("ended-before-the-blow");
            Ok(())
        }
        result => result,
    }
}

/// Makes the primary die between publishing completions and calling: it is stopped first, and calls it has sent already are
/// taken away unseen.
fn swallow_calls(world: &mut World, primary: &Target, tally: &mut Tally) -> anyhow::Result<()> {
    hit(primary, Signal::STOP, tally)?;
    let deadline = now_ns() + STOPPED_NS;
    while primary.is_alive() && !primary.is_stopped() && now_ns() < deadline {
        std::hint::spin_loop();
    }
    for queue in &world.guest.queues {
        queue.call_fd().take();
    }
    Ok(())
}

/// Waits until the broker has set the failpoint.
fn wait_until_set(world: &mut World) -> anyhow::Result<()> {
    world.run_until("a failpoint", true, |world| {
        Ok(world.broker.take_answer().is_some() || world.broker.has_lost_answer())
    })
}

/// Waits until the broker says that the failover has ended.
fn wait_for_end(world: &mut World, before: &Before, start: u64, asked: bool) -> anyhow::Result<Failover> {
    let count = before.status.failovers.ended();
    let mut answer = None;
    let hang = world.pace == Pace::Quiet && !asked;
    let mut never_begun = false;
    world.run_until("the end of the failover", true, |world| {
        if let Some(came) = world.broker.take_answer() {
            answer = Some(came);
        }
        // What was in flight came back before the blow took effect: give the broker something to miss.
        if hang && world.held_by_device() == 0 {
            world.pace = Pace::Full;
        }
        let counted = world.broker.status_since(start).is_some_and(|status| status.failovers.ended() > count);
        // Nobody knows whether a broker that has died had begun with it: one that is at rest again had not. A blow is not forgotten.
        let lost = asked && world.broker.has_lost_answer();
        let at_rest = |status: &DeviceStatus| status.state == "protected" && status.phase == "Idle";
        never_begun = lost && !counted && world.broker.status_since(start).is_some_and(at_rest);
        Ok(if asked && !lost { answer.is_some() } else { counted || never_begun })
    })?;
    if never_begun {
        let message = Some("the broker died before it had begun".to_owned());
        return Ok(Failover { result: "refused".into(), message, ..Failover::default() });
    }
    match answer {
        Some(Answer::Ended(failover)) => Ok(failover),
        Some(Answer::Refused(message)) => {
            Ok(Failover { result: "refused".into(), message: Some(message), ..Failover::default() })
        }
        None => world
            .broker
            .status_since(start)
            .and_then(|status| status.last_failover.clone())
            .context("the broker counts a failover that it does not report"),
    }
}

/// Waits until a predicted failover has ended, or was withheld: a refusal.
fn wait_for_predicted(world: &mut World, before: &Before, start: u64) -> anyhow::Result<Failover> {
    let (ended, withheld) = (before.status.failovers.ended(), before.status.counters.withheld);
    let mut refusal = None;
    let (mut told, alarms) = (false, before.status.counters.alarms);
    world.run_until("the end of a predicted failover", true, |world| {
        told |= world.broker.take_answer().is_some();
        let Some(status) = world.broker.status_since(start).filter(|_| told) else { return Ok(false) };
        if status.counters.withheld > withheld {
            refusal = status.policy.withheld.clone();
        }
        // One that was overtaken by the loss of its primary, or by a failover under way, concerns nobody any more.
        let passed = status.counters.alarms > alarms && status.phase == "Idle" && status.state != "failing-over";
        Ok(status.failovers.ended() > ended || refusal.is_some() || (passed && now_ns() > start + PREDICTED_MAX_NS))
    })?;
    let status = world.broker.status_since(start).context("a status was just seen")?;
    if status.failovers.ended() > ended {
        return status.last_failover.clone().context("the broker counts a failover that it does not report");
    }
    let message = Some(refusal.map_or_else(|| "overtaken".to_owned(), |why| why.reason));
    Ok(Failover { result: "refused".into(), message, ..Failover::default() })
}

/// Everything in flight must come back; then the failover counts.
fn after(world: &mut World, mut seen: Seen, tally: &mut Tally) -> anyhow::Result<()> {
    match seen.report.result.as_str() {
        "settled" => {}
        "refused" => {
            let reason = seen.report.message.clone().unwrap_or_default();
            ensure!(!reason.is_empty(), "a refusal without a reason");
            tally.refusal(&reason);
            return come_back(world);
        }
        "halted" => {
            // The event says so as well, and ends the wait.
            return world.run_until("the broker's word that the device is halted", true, |_| Ok(false));
        }
        other => bail!("the failover ended as {other:?}: {}", seen.report.message.unwrap_or_default()),
    }
    world.load.generation += 1;
    world.settled += 1;
    let settled = now_ns();
    come_back(world)?;
    tally.waited("come-back", now_ns() - settled);
    if seen.timed && world.load.progressed_since_gap() {
        seen.blackout_ns = Some(world.load.longest_gap_ns());
    }
    tally.settled(&seen);
    Ok(())
}

/// All requests submitted up to now are completed: no later failover may heal what this one lost.
fn come_back(world: &mut World) -> anyhow::Result<()> {
    vmm::unmask(world)?;
    let settled = now_ns();
    world.run_until("the requests of before the failover", false, |world| {
        Ok(world.load.oldest_ns(&world.guest).is_none_or(|oldest| oldest > settled))
    })
}

/// Only the shadow died: no failover, another shadow.
fn shadow_is_replaced(world: &mut World, before: &Before, tally: &mut Tally) -> anyhow::Result<()> {
    let old = before.shadow.pid();
    let status = world.run_until_status("another shadow", |status| {
        status.shadow.as_ref().is_some_and(|shadow| shadow.pid != Some(old) && shadow.state == "ready")
    })?;
    if status.primary.as_ref().is_none_or(|primary| primary.pid != Some(before.primary.pid())) {
        // A machine under load may keep a primary from answering for so long that it counts as hung.
        let hangs = status.failovers.hang.saturating_sub(before.status.failovers.hang);
        ensure!(hangs > 0, "the primary changed though only the shadow was killed");
        tally.unexpected += hangs;
        eprintln!("  {hangs} primaries found hung while the shadow was replaced; {}", world.broker.last_events());
        world.settled = status.failovers.settled;
    }
    tally.shadows_replaced += 1;
    come_back(world)
}

/// A request that kills every backend it is given to: it gets an I/O error, everything else is served.
fn poison(world: &mut World, before: &Before, inflight: u64, tally: &mut Tally) -> anyhow::Result<()> {
    let queue = 0;
    let mut slot = None;
    world.run_until("room for the poisoned request", false, |world| {
        slot = world.load.submit_poison(&mut world.guest, queue);
        // Slots and descriptors are all in flight: let some come back.
        world.pace = Pace::Quiet;
        Ok(slot.is_some())
    })?;
    let slot = slot.context("run_until returned with it")?;
    world.pace = Pace::Full;
    let count = before.status.failovers.settled;
    world.run_until("the end of the poisoned request", true, |world| {
        let in_flight = world.guest.queues[queue].in_flight(slot);
        Ok(in_flight.is_none_or(|(request, _)| request.kind != guest::Kind::Poison))
    })?;
    let status = world.run_until_status("a device that serves again", |status| {
        status.failovers.settled > count && status.state != "failing-over"
    })?;
    // One backend after the other died of it; all of these failovers were asked for.
    world.settled = status.failovers.settled - 1;
    let report = status.last_failover.context("the broker counts a failover that it does not report")?;
    after(world, Seen { kind: Kind::Poison, inflight, timed: true, blackout_ns: None, report }, tally)
}

/// Asks for a failover without looking whether the shadow is ready: settled or refused with a reason, both are right.
pub(crate) fn impatient(world: &mut World, tally: &mut Tally) -> anyhow::Result<()> {
    if !world.choices.percent(IMPATIENT_PERCENT) {
        return Ok(());
    }
    world.pace = Pace::Full;
    let inflight = world.held_by_device();
    world.load.start_gap(now_ns());
    world.broker.ask_failover(false)?;
    let mut answer = None;
    world.run_until("the answer to an impatient failover", false, |world| {
        answer = world.broker.take_answer();
        Ok(answer.is_some() || world.broker.has_lost_answer())
    })?;
    if answer.is_none() {
        // It died with a broker that had a failpoint left; whether it was made the counts will tell.
        world.resynchronise = true;
        return Ok(());
    }
    let report = match answer.context("run_until returned with it")? {
        Answer::Ended(failover) => failover,
        Answer::Refused(message) => {
            Failover { result: "refused".into(), message: Some(message), ..Failover::default() }
        }
    };
    if report.result == "settled" {
        tally.injected(Kind::Planned);
    }
    after(world, Seen { kind: Kind::Planned, inflight, timed: true, blackout_ns: None, report }, tally)
}
