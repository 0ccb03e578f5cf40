//! Signals: a process that stands still more and more of the time, and one that ends.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Injector;
use crate::common::process::Target;
use crate::common::rng::Rng;

/// Stopped for a part of each period.
#[derive(Debug)]
pub(super) struct Pause {
    process: Target,
    began: Instant,
    stopped: bool,
}

/// A period.
const PERIOD_MS: u64 = 200;
/// From this level on it is stopped for good.
const COLLAPSE: f64 = 0.95;

impl Pause {
    /// For a process, which runs on.
    pub(super) fn new(pid: u32) -> anyhow::Result<Self> {
        Ok(Pause { process: Target::open(pid)?, began: Instant::now(), stopped: false })
    }

    fn stop(&mut self, stopped: bool) -> anyhow::Result<()> {
        if self.stopped == stopped || !self.process.is_alive() {
            return Ok(());
        }
        self.stopped = stopped;
        self.process.signal(if stopped { Signal::STOP } else { Signal::CONT })
    }
}

impl Injector for Pause {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let at = self.began.elapsed().as_millis() as u64 % PERIOD_MS;
        self.stop(level >= COLLAPSE || (at as f64) < level * PERIOD_MS as f64)
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        // One that has ended needs nothing.
        let _ = self.stop(false);
    }
}

/// Stopped for moments, ever more and longer ones, as a process that spends its time on errors; and then it aborts.
#[derive(Debug)]
pub(super) struct Abort {
    pause: Pause,
    rng: Rng,
    until: Instant,
}

impl Abort {
    /// For a process, which runs on.
    pub(super) fn new(pid: u32, seed: u64) -> anyhow::Result<Self> {
        Ok(Abort { pause: Pause::new(pid)?, rng: Rng::new(seed, 11), until: Instant::now() })
    }
}

impl Injector for Abort {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        let now = Instant::now();
        if level >= 1.0 {
            self.pause.stop(false)?;
            // It may have gone meanwhile.
            let _ = self.pause.process.signal(Signal::ABORT);
            return Ok(());
        }
        if now >= self.until {
            self.pause.stop(false)?;
            // A moment of up to 80 ms in up to a fifth of the calls.
            if self.rng.below(1_000) < (200.0 * level) as u64 {
                self.until = now + Duration::from_millis(5 + self.rng.below(1 + (75.0 * level) as u64));
                self.pause.stop(true)?;
            }
        }
        Ok(())
    }
}

/// Killed.
#[derive(Debug)]
pub(super) struct Kill {
    process: Target,
}

impl Kill {
    /// For a process, which runs on.
    pub(super) fn new(pid: u32) -> anyhow::Result<Self> {
        Ok(Kill { process: Target::open(pid)? })
    }
}

impl Injector for Kill {
    fn set(&mut self, level: f64) -> anyhow::Result<()> {
        if level >= 1.0 {
            // It may have gone meanwhile.
            let _ = self.process.signal(Signal::KILL);
        }
        Ok(())
    }
}
