//! What a load counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::vm::orders::Line;

/// An answer that takes longer is late.
pub(super) const LATE: Duration = Duration::from_millis(100);

/// The counts of one load. Requests are whatever the load makes: a datagram that comes back, a read, a file replaced.
#[derive(Debug)]
pub(super) struct Tally {
    name: &'static str,
    origin: Instant,
    begun: AtomicU64,
    done: AtomicU64,
    late: AtomicU64,
    lost: AtomicU64,
    repeated: AtomicU64,
    wrong: AtomicU64,
    errors: AtomicU64,
    longest_us: AtomicU64,
    /// Longest of the second that has not been reported yet.
    worst_us: AtomicU64,
    /// Since when the load waits, in microseconds after `origin`; 0 if it does not.
    waiting_since_us: AtomicU64,
}

fn us(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

impl Tally {
    pub(super) fn new(name: &'static str) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            name,
            origin: Instant::now(),
            begun: zero(),
            done: zero(),
            late: zero(),
            lost: zero(),
            repeated: zero(),
            wrong: zero(),
            errors: zero(),
            longest_us: zero(),
            worst_us: zero(),
            waiting_since_us: zero(),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// A request is made.
    pub(super) fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// Its answer has come.
    pub(super) fn end(&self, took: Duration) {
        self.done.fetch_add(1, Ordering::Relaxed);
        self.late.fetch_add(u64::from(took > LATE), Ordering::Relaxed);
        self.longest_us.fetch_max(us(took), Ordering::Relaxed);
        self.worst_us.fetch_max(us(took), Ordering::Relaxed);
    }

    /// Requests were given up: no answer came.
    pub(super) fn lose(&self, count: u64) {
        self.lost.fetch_add(count, Ordering::Relaxed);
    }

    /// The answer to one that was given up has come after all.
    pub(super) fn find(&self, took: Duration) {
        self.lost.fetch_sub(1, Ordering::Relaxed);
        self.end(took);
    }

    /// An answer came once more.
    pub(super) fn repeat(&self) {
        self.repeated.fetch_add(1, Ordering::Relaxed);
    }

    /// An answer was not what it must be.
    pub(super) fn mistake(&self) {
        self.wrong.fetch_add(1, Ordering::Relaxed);
    }

    /// The system refused.
    pub(super) fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// The load waits from now on, or no longer.
    pub(super) fn wait(&self, waiting: bool) {
        let since = if waiting { us(self.origin.elapsed()).max(1) } else { 0 };
        self.waiting_since_us.store(since, Ordering::Relaxed);
    }

    /// Makes one request and waits for its answer.
    pub(super) fn timed<T>(&self, request: impl FnOnce() -> T) -> T {
        self.begin();
        self.wait(true);
        let begin = Instant::now();
        let answer = request();
        self.wait(false);
        self.end(begin.elapsed());
        answer
    }

    /// The counts as a line for the host. `last`: the load has ended.
    pub(super) fn line(&self, last: bool) -> Line {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waiting_us = match count(&self.waiting_since_us) {
            0 => 0,
            since => us(self.origin.elapsed()).saturating_sub(since),
        };
        Line::new("load")
            .with("name", self.name)
            .with("last", u8::from(last))
            .with("begun", count(&self.begun))
            .with("done", count(&self.done))
            .with("late", count(&self.late))
            .with("lost", count(&self.lost))
            .with("repeated", count(&self.repeated))
            .with("wrong", count(&self.wrong))
            .with("errors", count(&self.errors))
            .with("longest_us", count(&self.longest_us).max(waiting_us))
            .with("worst_us", self.worst_us.swap(0, Ordering::Relaxed).max(waiting_us))
            .with("waiting_us", waiting_us)
    }
}
