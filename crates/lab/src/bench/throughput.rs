//! One run of load: requests per second and the tail of their latency.

use std::os::fd::AsFd;

use anyhow::ensure;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::driver::{Driver, SILENCE_NS, pause};
use crate::guest::{Latencies, now_ns};

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Waiting {
    /// It looks at the rings all the time.
    Poll,
    /// It sleeps until the device calls, as Linux' virtio-blk does.
    Interrupt,
}

/// What came out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Run {
    /// Completions.
    pub(super) completed: u64,
    /// Completions per second.
    pub(super) iops: f64,
    /// Median of the latency.
    pub(super) p50_us: f64,
    /// 99th percentile of the latency.
    pub(super) p99_us: f64,
    /// 99.9th percentile of the latency.
    pub(super) p999_us: f64,
}

/// Runs the load for `seconds`. It goes on afterwards; [`Driver::rest`] ends it.
pub(super) fn measure(driver: &mut Driver, waiting: Waiting, seconds: f64) -> anyhow::Result<Run> {
    let mut latencies = Latencies::new();
    driver.busy = true;
    let began = now_ns();
    let until = began + (seconds * 1e9) as u64;
    let mut last = began;
    while last < until {
        let taken = driver.poll(&mut |done| {
            latencies.record(done.submitted_ns, done.completed_ns);
            last = done.completed_ns;
        })?;
        if taken == 0 {
            let now = now_ns();
            ensure!(now < last.max(began) + SILENCE_NS, "the disk is silent: {}", driver.describe());
            match waiting {
                Waiting::Poll => pause(),
                Waiting::Interrupt => wait_for_call(driver)?,
            }
            if now >= until {
                break;
            }
        }
    }
    let elapsed = (now_ns() - began) as f64 / 1e9;
    let histogram = latencies.histogram();
    ensure!(!histogram.is_empty(), "nothing completed in {seconds} s: {}", driver.describe());
    let quantile_us = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
    Ok(Run {
        completed: histogram.len(),
        iops: histogram.len() as f64 / elapsed,
        p50_us: quantile_us(0.5),
        p99_us: quantile_us(0.99),
        p999_us: quantile_us(0.999),
    })
}

/// Sleeps until any queue calls, at most 10 ms.
fn wait_for_call(driver: &mut Driver) -> anyhow::Result<()> {
    let queues = &mut driver.guest.queues;
    let mut quiet = true;
    for queue in queues.iter_mut() {
        quiet &= queue.enable_calls();
    }
    if quiet {
        let mut fds: Vec<PollFd<'_>> =
            queues.iter().map(|queue| PollFd::from_borrowed_fd(queue.call_fd().as_fd(), PollFlags::IN)).collect();
        match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 })) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for queue in queues {
        queue.call_fd().take();
        queue.disable_calls();
    }
    Ok(())
}
