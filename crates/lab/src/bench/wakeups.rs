//! What it costs to be woken by a timer, without anything to do then: the floor below every observer that looks in time.
//!
//! A thread sleeps as the broker's control thread does (the same call, the same scheduling class, the same timer slack), as often as
//! the broker looked, under the same load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{Timespec, epoll};
use rustix::time::{ClockId, clock_gettime};

/// What came out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bare {
    /// Per cent of a core.
    pub(super) core_percent: f64,
    /// Wake-ups per second that there were.
    pub(super) per_second: f64,
    /// Whether the thread had the priority that the broker asks for.
    pub(super) real_time: bool,
}

/// Wakes a thread every `period` while `work` runs.
pub(super) fn measure<T>(period: Duration, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(Bare, T)> {
    ensure!(!period.is_zero(), "a period of zero is no sleep");
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| wake(period, &end));
        let worked = work();
        end.store(true, Ordering::Relaxed);
        let bare = thread.join().expect("it does not panic")?;
        Ok((bare, worked?))
    })
}

fn wake(period: Duration, end: &AtomicBool) -> anyhow::Result<Bare> {
    let real_time = be_prompt();
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("epoll")?;
    let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
    let used = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).context("the thread's processor time");
    let (began, before) = (Instant::now(), used()?);
    let (mut due, mut count) = (began, 0_u64);
    while !end.load(Ordering::Relaxed) {
        // As the broker does: what was missed is not made up for.
        due = (due + period).max(Instant::now());
        let span = due.saturating_duration_since(Instant::now());
        let span = Timespec { tv_sec: 0, tv_nsec: span.subsec_nanos().into() };
        match epoll::wait(&epoll, &mut events, Some(&span)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => count += 1,
            Err(error) => return Err(error).context("epoll"),
        }
    }
    let (elapsed, used) = (began.elapsed().as_secs_f64(), (used()? - before).as_secs_f64());
    Ok(Bare { core_percent: used / elapsed * 100.0, per_second: count as f64 / elapsed, real_time })
}

/// What the broker's control thread asks for itself.
fn be_prompt() -> bool {
    // SAFETY: plain calls on the calling thread, without pointers that outlive them.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_000);
        let lowest = libc::sched_param { sched_priority: 1 };
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const lowest) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_woken_at_its_period_and_costs_something() {
        let sleep = || {
            std::thread::sleep(Duration::from_millis(100));
            Ok(7)
        };
        let (bare, result) = measure(Duration::from_millis(1), sleep).expect("epoll");
        assert_eq!(result, 7);
        // A loaded machine may wake it more rarely.
        assert!(bare.per_second > 10.0 && bare.per_second < 1100.0, "{bare:?}");
        assert!(bare.core_percent > 0.0 && bare.core_percent < 100.0, "{bare:?}");
    }
}
