//! What is done to a backend from outside, more or less of it.

mod cpu;
mod disk;
mod fill;
mod memory;
mod pause;
mod qmp;
mod store;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;

pub(super) use cpu::Rival;
pub(super) use fill::Small;
pub(super) use memory::{budget, drop_cache};
pub(super) use qmp::{monitor, throttled};
pub(super) use store::delay_ns;

use super::fuse::Faults;
use super::kind::Outside;

/// Something that can be made worse, from nothing at level 0 to collapse at 1, and that is undone on drop.
pub(super) trait Injector: Send {
    /// Sets how bad it is. Called a hundred times a second.
    fn set(&mut self, level: f64) -> anyhow::Result<()>;

    /// Whether a resource is used up, as far as that can be seen from outside.
    fn is_exhausted(&self) -> bool {
        false
    }
}

/// What an injector acts on.
#[derive(Clone, Debug)]
pub(super) struct Subject<'a> {
    /// Name of the run.
    pub(super) name: &'a str,
    pub(super) seed: u64,
    /// The backend's process.
    pub(super) pid: u32,
    /// The image, as the backend sees it.
    pub(super) image: &'a Path,
    /// The monitor of a qemu-storage-daemon.
    pub(super) monitor: &'a Path,
    pub(super) small: Option<&'a Small>,
    /// Of the store in user space, if there is one.
    pub(super) faults: Option<Arc<Faults>>,
}

/// The injector of a kind for a subject.
pub(super) fn injector(outside: Outside, subject: &Subject<'_>) -> anyhow::Result<Box<dyn Injector>> {
    let Subject { name, seed, pid, image, monitor, small, ref faults } = *subject;
    Ok(match outside {
        Outside::Quota => Box::new(cpu::Quota::new(name, pid)?),
        Outside::Hogs => Box::new(cpu::Hogs::new(name, pid, seed)?),
        Outside::Pause => Box::new(pause::Pause::new(pid)?),
        Outside::Abort => Box::new(pause::Abort::new(pid, seed)?),
        Outside::Kill => Box::new(pause::Kill::new(pid)?),
        Outside::Squeeze => Box::new(memory::Squeeze::new(name, pid, image)?),
        Outside::Throttle => Box::new(qmp::Throttle::new(monitor)?),
        Outside::Descriptors => Box::new(qmp::Descriptors::new(monitor, pid, image)?),
        Outside::Disk => Box::new(disk::Disk::new(name, pid, image)?),
        Outside::Fill => Box::new(fill::Filler::new(small.context("no small file system")?)),
        Outside::Store(fault) => {
            let faults = faults.clone().context("no store in user space")?;
            Box::new(store::Failing::new(fault, faults))
        }
    })
}
