//! What is done to a backend from outside, more or less of it.

mod cpu;
mod disk;
mod fill;
mod memory;
mod pause;
mod qmp;
mod store;

use anyhow::Context;

pub(super) use cpu::Rival;
pub(super) use fill::Small;
pub(super) use memory::{budget, drop_cache};
pub(super) use qmp::{monitor, throttled};
pub(super) use store::delay_ns;

use super::kind::Outside;
use super::scene::Scene;

/// Something that can be made worse, from nothing at level 0 to collapse at 1, and that is undone on drop.
pub(super) trait Injector: Send {
    /// Sets how bad it is. Called a hundred times a second.
    fn set(&mut self, level: f64) -> anyhow::Result<()>;

    /// Whether a resource is used up, as far as that can be seen from outside.
    fn is_exhausted(&self) -> bool {
        false
    }
}

/// The injector of a kind for a scene.
pub(super) fn injector(outside: Outside, scene: &Scene) -> anyhow::Result<Box<dyn Injector>> {
    let (name, pid) = (scene.name.as_str(), scene.pid);
    Ok(match outside {
        Outside::Quota => Box::new(cpu::Quota::new(name, pid)?),
        Outside::Hogs => Box::new(cpu::Hogs::new(name, pid, scene.seed)?),
        Outside::Pause => Box::new(pause::Pause::new(pid)?),
        Outside::Abort => Box::new(pause::Abort::new(pid, scene.seed)?),
        Outside::Kill => Box::new(pause::Kill::new(pid)?),
        Outside::Squeeze => Box::new(memory::Squeeze::new(name, pid, &scene.image)?),
        Outside::Throttle => Box::new(qmp::Throttle::new(&scene.monitor())?),
        Outside::Descriptors => Box::new(qmp::Descriptors::new(&scene.monitor(), pid, &scene.image)?),
        Outside::Disk => Box::new(disk::Disk::new(name, pid, &scene.image)?),
        Outside::Fill => Box::new(fill::Filler::new(scene.small.as_ref().context("no small file system")?)),
        Outside::Store(fault) => {
            let store = scene.store.as_ref().context("no store in user space")?;
            Box::new(store::Failing::new(fault, store.faults()))
        }
    })
}
