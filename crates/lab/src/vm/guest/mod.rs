//! The part of `lab vm` that runs inside the guest: starts the loads, reports each second, checks everything at the end.
//!
//! The init script of the initramfs starts it as `lab vm --guest`; it speaks over the second serial port only.

mod disk;
mod files;
mod fio;
mod meter;
mod other;
mod port;
mod stamps;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context as _;

use super::device::Device;
use super::orders::{KERNEL_LOG_MARK, Line, Load, Orders};
use meter::Meter;
use port::Port;

/// What the loads share.
#[derive(Debug)]
struct Shared {
    orders: Orders,
    port: Port,
    meter: Meter,
    stop: AtomicBool,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Runs the loads until the host says stop, then reports what was found.
pub(crate) fn run() -> anyhow::Result<()> {
    let line = std::fs::read_to_string("/proc/cmdline").context("reading the kernel command line")?;
    let orders = Orders::from_command_line(&line)?;
    let port = Port::open()?;
    std::fs::write("/dev/kmsg", format!("<3>{KERNEL_LOG_MARK}\n")).context("writing to the kernel log")?;
    // A request that never comes back must show in the kernel log long before the run ends.
    let _ = std::fs::write("/proc/sys/kernel/hung_task_timeout_secs", "30");
    port.say(&Line::new("up").with("uptime_ms", meter::uptime_ms()?));
    match orders.device {
        Device::Blk => run_disk(orders, port),
        device => other::run(device, orders.seed, port),
    }
}

/// Loads and checks a disk.
fn run_disk(orders: Orders, port: Port) -> anyhow::Result<()> {
    let shared = Arc::new(Shared { orders, port, meter: Meter::default(), stop: AtomicBool::new(false) });
    let loads = start_loads(&shared);
    port::wait_for_stop()?;
    shared.stop.store(true, Ordering::Relaxed);
    for load in loads {
        load.join().map_err(|_| anyhow::anyhow!("a load panicked"))??;
    }
    disk::report_digests(&shared.port)?;
    shared.port.say(&Line::new("end"));
    Ok(())
}

type Running = thread::JoinHandle<anyhow::Result<()>>;

/// Starts every load on a thread of its own. The meter is not among the joined: it runs until the machine stops.
fn start_loads(shared: &Arc<Shared>) -> Vec<Running> {
    let start = |load: fn(&Shared) -> anyhow::Result<()>| {
        let shared = Arc::clone(shared);
        thread::spawn(move || load(&shared))
    };
    drop(start(meter::tick_for_ever));
    let fio = match shared.orders.load {
        Load::Rounds => fio::rounds,
        Load::Steady => fio::steady,
    };
    vec![start(stamps::run), start(files::run), start(fio)]
}
