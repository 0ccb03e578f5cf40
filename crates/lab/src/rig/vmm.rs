//! What a VMM and its guest do between two failovers.

use std::fmt;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use rustix::process::Signal;

use super::failover;
use super::load::Pace;
use super::tally::Tally;
use super::world::World;

/// A thing a VMM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Behaviour {
    /// Nothing but I/O.
    Nothing,
    /// The interrupt's eventfd is replaced for good.
    ReplaceCall,
    /// The interrupt is masked over the next failover.
    Mask,
    /// The idle VM is paused and continued: rings stopped, started where they were.
    PauseIdle,
    /// As before, with requests in flight.
    PauseBusy,
    /// The idle guest is reset: rings stopped, made new, started.
    RebootIdle,
    /// As before, with requests in flight, which are forgotten.
    RebootBusy,
    /// The VMM ends in order and another one starts.
    Reconnect,
    /// The VMM is killed with requests in flight, and another one starts with new memory.
    VmmKilled,
    /// Memory is plugged, used, and taken away.
    Hotplug,
    /// The primary dies just after the rings were stopped.
    CrashAfterStop,
    /// The primary dies just before the rings are stopped.
    CrashBeforeStop,
    /// The interrupt's eventfd is replaced in the moment of the failover.
    RaceReplaceCall,
    /// Memory is plugged, used, and taken away in the moment of the failover.
    RaceHotplug,
}

impl Behaviour {
    /// All of them.
    pub(crate) const ALL: [Behaviour; 14] = [
        Behaviour::Nothing,
        Behaviour::ReplaceCall,
        Behaviour::Mask,
        Behaviour::PauseIdle,
        Behaviour::PauseBusy,
        Behaviour::RebootIdle,
        Behaviour::RebootBusy,
        Behaviour::Reconnect,
        Behaviour::VmmKilled,
        Behaviour::Hotplug,
        Behaviour::CrashAfterStop,
        Behaviour::CrashBeforeStop,
        Behaviour::RaceReplaceCall,
        Behaviour::RaceHotplug,
    ];

    /// The name on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Behaviour::Nothing => "nothing",
            Behaviour::ReplaceCall => "replace-call",
            Behaviour::Mask => "mask",
            Behaviour::PauseIdle => "pause-idle",
            Behaviour::PauseBusy => "pause-busy",
            Behaviour::RebootIdle => "reboot-idle",
            Behaviour::RebootBusy => "reboot-busy",
            Behaviour::Reconnect => "reconnect",
            Behaviour::VmmKilled => "vmm-killed",
            Behaviour::Hotplug => "hotplug",
            Behaviour::CrashAfterStop => "crash-after-stop",
            Behaviour::CrashBeforeStop => "crash-before-stop",
            Behaviour::RaceReplaceCall => "race-replace-call",
            Behaviour::RaceHotplug => "race-hotplug",
        }
    }

    /// Out of a hundred failovers, before how many it is played; for those that race, during how many.
    fn percent(self) -> u64 {
        match self {
            Behaviour::Nothing => 0,
            Behaviour::RaceReplaceCall => 10,
            Behaviour::ReplaceCall | Behaviour::Mask => 6,
            Behaviour::RaceHotplug => 4,
            Behaviour::Hotplug => 3,
            Behaviour::PauseIdle | Behaviour::RebootIdle | Behaviour::Reconnect | Behaviour::VmmKilled => 2,
            Behaviour::PauseBusy | Behaviour::RebootBusy | Behaviour::CrashAfterStop | Behaviour::CrashBeforeStop => 1,
        }
    }

    /// Whether it is played in the moment of a failover.
    fn races(self) -> bool {
        matches!(self, Behaviour::RaceReplaceCall | Behaviour::RaceHotplug)
    }

    /// The behaviour that `draw`, below a hundred, falls on.
    fn choose(allowed: &[Behaviour], races: bool, mut draw: u64) -> Option<Behaviour> {
        for behaviour in allowed.iter().filter(|behaviour| behaviour.races() == races) {
            if draw < behaviour.percent() {
                return Some(*behaviour);
            }
            draw -= behaviour.percent();
        }
        None
    }
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Plays one behaviour, or none.
pub(crate) fn between_failovers(world: &mut World, tally: &mut Tally) -> anyhow::Result<()> {
    let draw = world.choices.below(100);
    let detail = world.choices.next();
    let Some(behaviour) = Behaviour::choose(&world.behaviours, false, draw) else { return Ok(()) };
    tally.behaviour(behaviour.name());
    world.say(behaviour);
    play(world, behaviour, detail, tally).with_context(|| format!("the VMM's {behaviour}"))
}

/// What the VMM does in the very moment of a failover. True: something was done.
pub(crate) fn race(world: &mut World, detail: u64, tally: &mut Tally) -> anyhow::Result<bool> {
    let Some(behaviour) = Behaviour::choose(&world.behaviours, true, detail % 100) else { return Ok(false) };
    if any_masked(world) {
        return Ok(false);
    }
    tally.behaviour(behaviour.name());
    world.say(behaviour);
    play(world, behaviour, detail / 100, tally).with_context(|| format!("the VMM's {behaviour}"))?;
    Ok(true)
}

/// Whether an interrupt is masked.
pub(crate) fn any_masked(world: &World) -> bool {
    (0..world.guest.queues.len()).any(|queue| world.guest.is_masked(queue))
}

fn play(world: &mut World, behaviour: Behaviour, detail: u64, tally: &mut Tally) -> anyhow::Result<()> {
    let queue = (detail % world.guest.queues.len() as u64) as usize;
    match behaviour {
        Behaviour::Nothing => Ok(()),
        Behaviour::ReplaceCall => {
            world.pace = Pace::Full;
            world.run_for(500_000)?;
            world.guest.replace_call(queue)
        }
        Behaviour::RaceReplaceCall => world.guest.replace_call(queue),
        Behaviour::Mask => world.guest.mask(queue),
        Behaviour::PauseIdle => pause(world, false),
        Behaviour::PauseBusy => pause(world, true),
        Behaviour::RebootIdle => reboot(world, false),
        Behaviour::RebootBusy => reboot(world, true),
        Behaviour::Reconnect => {
            world.quiesce()?;
            stop(world)?;
            look(world)?;
            world.guest.disconnect();
            world.guest.connect()?;
            world.guest.start()
        }
        Behaviour::VmmKilled => killed(world),
        Behaviour::Hotplug | Behaviour::RaceHotplug => hotplug(world, queue),
        Behaviour::CrashAfterStop => crash_around_stop(world, true, tally),
        Behaviour::CrashBeforeStop => crash_around_stop(world, false, tally),
    }
}

/// Unmasks every interrupt that was masked over a failover.
pub(crate) fn unmask(world: &mut World) -> anyhow::Result<()> {
    (0..world.guest.queues.len()).try_for_each(|queue| world.guest.unmask(queue))
}

/// Looks at all memory while nothing is in flight.
pub(crate) fn look(world: &mut World) -> anyhow::Result<()> {
    world.load.look_everywhere(&world.guest)?;
    ensure!(world.load.verdict.is_clean(), "the oracle found something");
    Ok(())
}

/// Stops the rings. What the device took it must have completed by now; what it did not take stays in the ring.
///
/// A VMM is not kept waiting: a backend that does not stop in time is failed over, and that is not counted against anybody.
pub(crate) fn stop(world: &mut World) -> anyhow::Result<Vec<u16>> {
    world.resynchronise = true;
    let bases = world.guest.stop()?;
    for (queue, base) in world.guest.queues.iter().zip(&bases) {
        let used = queue.vring().used_idx();
        ensure!(used == *base, "queue {}: the stop says {base}, used.idx is {used}", queue.index());
    }
    Ok(bases)
}

/// The VM is paused, idle or in the middle of its work, and continued.
fn pause(world: &mut World, busy: bool) -> anyhow::Result<()> {
    if busy {
        world.pace = Pace::Full;
        world.run_for(500_000)?;
    } else {
        world.quiesce()?;
    }
    let bases = stop(world)?;
    world.guest.start_from(&bases)
}

/// The guest is reset, idle or in the middle of its work. What was in flight may have been executed or not.
fn reboot(world: &mut World, busy: bool) -> anyhow::Result<()> {
    world.pace = Pace::Full;
    world.run_for(300_000)?;
    if !busy {
        world.quiesce()?;
    }
    stop(world)?;
    // What was completed before the stop counts, seen by an interrupt or not.
    world.load.reap_all(&mut world.guest);
    world.load.abandon(&world.guest, true);
    look(world)?;
    world.pace = Pace::Trickle;
    world.guest.start()
}

/// The primary dies around the moment at which the VMM stops the idle rings; then they are started again.
fn crash_around_stop(world: &mut World, stop_first: bool, tally: &mut Tally) -> anyhow::Result<()> {
    let primary = failover::primary(world)?;
    world.quiesce()?;
    world.resynchronise = true;
    let bases = if stop_first {
        let bases = stop(world)?;
        failover::hit(&primary, Signal::KILL, tally)?;
        bases
    } else {
        failover::hit(&primary, Signal::KILL, tally)?;
        stop(world)?
    };
    failover::wait_for_another_primary(world, &primary)?;
    world.guest.start_from(&bases)
}

/// The VMM is killed. What was in flight may have been executed or not; what comes later must not change it again.
fn killed(world: &mut World) -> anyhow::Result<()> {
    world.pace = Pace::Full;
    world.run_for(300_000)?;
    world.guest.disconnect();
    world.load.abandon(&world.guest, false);
    world.pace = Pace::Trickle;
    world.boot_again()
}

/// Memory is plugged under load; half of a queue's buffers move there; they move back, and it is taken away.
fn hotplug(world: &mut World, queue: usize) -> anyhow::Result<()> {
    // A whole new table makes libvhost-user unmap what requests in flight still use: QEMU 10 sends it only to backends
    // without memory slots, and a guest is idle then only by luck.
    if !world.session.memory_slots {
        world.quiesce()?;
    }
    let shape = *world.guest.queues[queue].shape();
    let length = shape.blocks_max as usize * crate::guest::BLOCK;
    let slots = shape.depth / 2 + 1;
    let size = (length * usize::from(slots)).next_multiple_of(1 << 21) as u64;
    let region = world.guest.plug_memory(size)?;
    world.quiesce()?;
    let mut old = Vec::new();
    for slot in (0..shape.depth).take(slots.into()) {
        let data = world.guest.memory_mut().allocate(region, length, 4096)?;
        old.push((slot, world.guest.queues[queue].replace_data(slot, data)));
    }
    world.load.poison_idle(&world.guest);
    world.pace = Pace::Full;
    world.run_for(1_000_000)?;
    world.quiesce()?;
    look(world)?;
    for (slot, data) in old {
        world.guest.queues[queue].replace_data(slot, data);
    }
    world.load.poison_idle(&world.guest);
    if world.session.memory_slots {
        world.pace = Pace::Full;
        world.run_for(200_000)?;
    }
    world.guest.unplug_memory().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_behaviour_is_drawn_and_the_rest_is_none() {
        for races in [false, true] {
            let drawn: Vec<_> = (0..100).filter_map(|draw| Behaviour::choose(&Behaviour::ALL, races, draw)).collect();
            for behaviour in Behaviour::ALL.into_iter().filter(|behaviour| behaviour.races() == races) {
                let count = drawn.iter().filter(|drawn| **drawn == behaviour).count() as u64;
                assert_eq!(count, behaviour.percent(), "{behaviour}");
            }
        }
        assert_eq!(Behaviour::choose(&[Behaviour::Nothing], false, 0), None);
    }
}
