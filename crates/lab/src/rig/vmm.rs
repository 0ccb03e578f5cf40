//! What a VMM and its guest do between two failovers.

use anyhow::ensure;

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
}

impl Behaviour {
    const ALL: [(Behaviour, u64, &'static str); 7] = [
        (Behaviour::ReplaceCall, 6, "replace-call"),
        (Behaviour::Mask, 6, "mask"),
        (Behaviour::Pause, 3, "pause"),
        (Behaviour::Reboot, 3, "reboot"),
        (Behaviour::Reconnect, 2, "reconnect"),
        (Behaviour::Killed, 2, "vmm-killed"),
        (Behaviour::Hotplug, 3, "hotplug"),
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
        Behaviour::Pause => pause(world),
        Behaviour::Reboot => {
            world.quiesce()?;
            world.guest.stop()?;
            look(world)?;
            world.guest.start()
        }
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

fn pause(world: &mut World) -> anyhow::Result<()> {
    world.quiesce()?;
    let bases = world.guest.stop()?;
    for (queue, base) in world.guest.queues.iter().zip(&bases) {
        let used = queue.vring().used_idx();
        ensure!(used == *base, "queue {}: the stop says {base}, used.idx is {used}", queue.index());
    }
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
