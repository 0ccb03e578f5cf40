//! The loads of devices that are no disk, and the second hand that reports them.

mod net;
mod random;
mod scsi;
mod share;
mod stream;
mod tally;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::port::{self, Port};
use crate::vm::device::Device;
use crate::vm::orders::Line;
use tally::Tally;

/// What a load works with.
#[derive(Debug)]
struct Load {
    seed: u64,
    port: Arc<Port>,
    tally: Tally,
    stop: Arc<AtomicBool>,
}

impl Load {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Counts what did not go well, and says so.
    fn complain(&self, what: &str) {
        self.tally.error();
        self.port.say(&Line::new("note").with(self.tally.name(), what));
    }
}

type Run = fn(&Load) -> anyhow::Result<()>;

/// Runs the loads of `device` until the host says stop.
pub(super) fn run(device: Device, seed: u64, port: Port) -> anyhow::Result<()> {
    let loads: &[(&'static str, Run)] = match device {
        Device::Blk => anyhow::bail!("a disk has loads of its own"),
        Device::Net => {
            net::set_up()?;
            &[("datagrams", net::run), ("stream", stream::run)]
        }
        Device::Rng => &[("random", random::run)],
        Device::Scsi => &[("reads-0", scsi::run), ("reads-1", scsi::run), ("reads-2", scsi::run)],
        Device::Fs => {
            share::mount()?;
            &[("held", share::hold_open), ("files", share::replace)]
        }
    };
    let (port, stop) = (Arc::new(port), Arc::new(AtomicBool::new(false)));
    let loads: Vec<(Arc<Load>, Run)> = loads
        .iter()
        .map(|(name, run)| {
            let (port, stop) = (Arc::clone(&port), Arc::clone(&stop));
            (Arc::new(Load { seed, port, tally: Tally::new(name), stop }), *run)
        })
        .collect();
    let shown: Vec<Arc<Load>> = loads.iter().map(|(load, _)| Arc::clone(load)).collect();
    let telling = Arc::clone(&port);
    // Not joined: it runs until the machine stops.
    thread::spawn(move || tick_for_ever(&telling, &shown));
    let running: Vec<_> = loads
        .iter()
        .map(|(load, run)| (Arc::clone(load), *run))
        .map(|(load, run)| thread::spawn(move || run(&load)))
        .collect();
    port::wait_for_stop()?;
    stop.store(true, Ordering::Relaxed);
    for load in running {
        load.join().map_err(|_| anyhow::anyhow!("a load panicked"))??;
    }
    if device == Device::Fs {
        share::unmount()?;
    }
    loads.iter().for_each(|(load, _)| port.say(&load.tally.line(true)));
    port.say(&Line::new("end"));
    Ok(())
}

/// Reports every load each second.
fn tick_for_ever(port: &Port, loads: &[Arc<Load>]) {
    let mut next = Instant::now();
    for second in 0_u64.. {
        next += Duration::from_secs(1);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        loads.iter().for_each(|load| port.say(&load.tally.line(false)));
        port.say(&Line::new("tick").with("n", second));
    }
}
