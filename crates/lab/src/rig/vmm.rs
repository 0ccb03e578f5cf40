//! What a VMM and its guest do between two failovers.

use anyhow::ensure;
use rustix::process::Signal;

use super::failover;
use super::load::Pace;
use super::tally::Tally;
use super::world::World;

/// A thing a VMM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    /// The interrupt's eventfd is replaced for good.
    ReplaceCall,
    /// The interrupt is masked over the next failover.
    Mask,
    /// The VM is paused and continued: rings stopped, started where they were.
    Pause,
    /// The guest reboots: rings stopped, made new, started.
    Reboot,
    /// The VMM ends in order and another one starts.
    Reconnect,
    /// The VMM is killed with requests in flight, and another one starts with new memory.
    Killed,
    /// Memory is plugged, used, and taken away.
    Hotplug,
    /// The primary dies while the VMM has the rings stopped.
    CrashWhileStopped,
}

impl Behaviour {
    const ALL: [(Behaviour, u64, &'static str); 8] = [
        (Behaviour::ReplaceCall, 6, "replace-call"),
        (Behaviour::Mask, 6, "mask"),
        (Behaviour::Pause, 3, "pause"),
        (Behaviour::Reboot, 3, "reboot"),
        (Behaviour::Reconnect, 2, "reconnect"),
        (Behaviour::Killed, 2, "vmm-killed"),
        (Behaviour::Hotplug, 3, "hotplug"),
        (Behaviour::CrashWhileStopped, 2, "crash-while-stopped"),
    ];
}

/// Plays one behaviour, or none.
pub(crate) fn between_failovers(world: &mut World, tally: &mut Tally) -> anyhow::Result<()> {
    let mut draw = world.choices.below(100);
    let detail = world.choices.next();
    for (behaviour, weight, name) in Behaviour::ALL {
        if draw < weight {
            tally.behaviour(name);
            return play(world, behaviour, detail);
        }
        draw -= weight;
    }
    Ok(())
}

fn play(world: &mut World, behaviour: Behaviour, detail: u64) -> anyhow::Result<()> {
    let queue = (detail % world.guest.queues.len() as u64) as usize;
    match behaviour {
        Behaviour::ReplaceCall => {
            world.pace = Pace::Full;
            world.run_for(500_000)?;
            world.guest.replace_call(queue)
        }
        Behaviour::Mask => world.guest.mask(queue),
        Behaviour::Pause => pause(world, detail.is_multiple_of(2)),
        Behaviour::Reboot => reboot(world, detail.is_multiple_of(2)),
        Behaviour::Reconnect => {
            world.quiesce()?;
            world.guest.stop()?;
            look(world)?;
            world.guest.disconnect();
            world.guest.connect()?;
            world.guest.start()
        }
        Behaviour::Killed => killed(world),
        Behaviour::Hotplug => hotplug(world, queue),
        Behaviour::CrashWhileStopped => crash_while_stopped(world, detail.is_multiple_of(2)),
    }
}

/// Unmasks every interrupt that was masked over a failover.
pub(crate) fn unmask(world: &mut World) -> anyhow::Result<()> {
    (0..world.guest.queues.len()).try_for_each(|queue| world.guest.unmask(queue))
}

/// Looks at all memory while nothing is in flight.
fn look(world: &mut World) -> anyhow::Result<()> {
    world.load.look_everywhere(&world.guest)?;
    ensure!(world.load.verdict.is_clean(), "the oracle found something");
    Ok(())
}

/// Stops the rings. What the device took it must have completed by now; what it did not take stays in the ring.
fn stop(world: &mut World) -> anyhow::Result<Vec<u16>> {
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
    if !busy || !world.load.may_abandon(&world.guest) {
        world.quiesce()?;
    }
    stop(world)?;
    // What was completed before the stop counts, seen by an interrupt or not.
    world.load.reap_all(&mut world.guest);
    world.load.abandon(&world.guest);
    look(world)?;
    world.pace = Pace::Trickle;
    world.guest.start()
}

/// The primary dies around the moment at which the VMM stops the idle rings; then they are started again.
fn crash_while_stopped(world: &mut World, stop_first: bool) -> anyhow::Result<()> {
    let primary = failover::primary(world)?;
    world.quiesce()?;
    world.resynchronise = true;
    let bases = if stop_first {
        let bases = stop(world)?;
        primary.signal(Signal::KILL)?;
        bases
    } else {
        primary.signal(Signal::KILL)?;
        stop(world)?
    };
    failover::wait_for_another_primary(world, &primary)?;
    world.guest.start_from(&bases)
}

/// The VMM is killed. What was in flight may have been executed or not; what comes later must not change it again.
fn killed(world: &mut World) -> anyhow::Result<()> {
    world.pace = Pace::Full;
    world.run_for(300_000)?;
    if !world.load.may_abandon(&world.guest) {
        world.quiesce()?;
    }
    world.guest.disconnect();
    world.load.abandon(&world.guest);
    world.pace = Pace::Trickle;
    world.boot_again()
}

/// What a VMM may be doing in the very moment of a failover. True: something was done.
pub(crate) fn race(world: &mut World, detail: u64, tally: &mut Tally) -> anyhow::Result<bool> {
    let queue = (detail / 100 % world.guest.queues.len() as u64) as usize;
    match detail % 100 {
        0..10 if !world.guest.is_masked(queue) => {
            tally.behaviour("race-replace-call");
            world.guest.replace_call(queue)?;
        }
        10..14 if !any_masked(world) => {
            tally.behaviour("race-hotplug");
            hotplug(world, queue)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Whether an interrupt is masked.
pub(crate) fn any_masked(world: &World) -> bool {
    (0..world.guest.queues.len()).any(|queue| world.guest.is_masked(queue))
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
