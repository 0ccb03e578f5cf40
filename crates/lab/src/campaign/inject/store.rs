//! A store in user space that becomes worse.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Injector;
use crate::campaign::form::between;
use crate::campaign::fuse::Faults;
use crate::campaign::kind::StoreFault;

/// Delays, in nanoseconds: what nobody notices, and what nobody waits for.
const DELAYS: [f64; 2] = [40_000.0, 1_600_000_000.0];
/// From this level on what came back short fails.
const COLLAPSE: f64 = 0.95;

/// A store with a fault.
#[derive(Debug)]
pub(super) struct Failing {
    fault: StoreFault,
    faults: Arc<Faults>,
}

impl Failing {
    /// Nothing is wrong yet.
    pub(super) fn new(fault: StoreFault, faults: Arc<Faults>) -> Self {
        Failing { fault, faults }
    }
}

/// How much longer a request takes, in nanoseconds.
pub(in crate::campaign) fn delay_ns(level: f64) -> u64 {
    if level <= 0.0 { 0 } else { between(DELAYS[0], DELAYS[1], level) as u64 }
}

impl Injector for Failing {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let faults = &self.faults;
        match self.fault {
            StoreFault::Slow => faults.delay_ns.store(delay_ns(level), Ordering::Relaxed),
            StoreFault::SlowFlush => faults.flush_ns.store(delay_ns(level), Ordering::Relaxed),
            StoreFault::Short => {
                let errors = if level >= COLLAPSE { 20_000 } else { 0 };
                let short = if level <= 0.0 { 0.0 } else { between(1_000.0, 600_000.0, level) };
                faults.short.store(short as u64, Ordering::Relaxed);
                faults.errors.store(errors, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
