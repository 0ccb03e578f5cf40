//! The threads of a process: what each has run and waited, and how often it was switched.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags};
use warmswap_predict::Counter;

use super::source::Time;
use super::text::{self, Buffer, Reread};

/// Most threads that are followed one by one. Of a process with more, only what the kernel sums up is known.
pub(super) const THREADS_MAX: usize = 128;

/// The threads of one process.
#[derive(Debug, Default)]
pub(super) struct Threads {
    list: Vec<Thread>,
    /// How many there were when they were listed.
    listed: Option<u64>,
    /// One has ended since, and another may have its place.
    stale: bool,
    /// There are more than are followed.
    many: bool,
    times_s: Option<f64>,
    switches_s: Option<f64>,
}

#[derive(Debug)]
struct Thread {
    tid: u32,
    schedstat: Reread,
    ran: Counter,
    waited: Counter,
    voluntary: Counter,
    involuntary: Counter,
}

impl Thread {
    fn open(directory: &OwnedFd, tid: u32, is_new: bool) -> Option<Self> {
        let schedstat = Reread::open(directory, format!("task/{tid}/schedstat"))?;
        let mut counters = [Counter::default(); 4];
        if is_new {
            // It began after the last look: all it has done belongs to the time since.
            for counter in &mut counters {
                let _first = counter.since(0);
            }
        }
        let [ran, waited, voluntary, involuntary] = counters;
        Some(Thread { tid, schedstat, ran, waited, voluntary, involuntary })
    }
}

/// Sums over threads since the last reading.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Times {
    /// The time in which it was, in seconds.
    pub(super) seconds: f64,
    /// Nanoseconds that they ran.
    pub(super) ran_ns: u64,
    /// Nanoseconds that they could have run and had no processor.
    pub(super) waited_ns: u64,
    /// Nanoseconds that the busiest one ran.
    pub(super) busiest_ns: u64,
}

/// Sums over threads since the last reading.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Switches {
    /// The time in which it was, in seconds.
    pub(super) seconds: f64,
    /// Sleeps.
    pub(super) voluntary: u64,
    /// Losses of the processor.
    pub(super) involuntary: u64,
}

impl Threads {
    /// Lists them again if there may be others: their number is not what it was, or one of them has ended.
    pub(super) fn list(&mut self, directory: &OwnedFd, count: u64) {
        if self.listed == Some(count) && !self.stale {
            return;
        }
        let is_new = self.listed.is_some() && !self.many;
        self.listed = Some(count);
        self.stale = false;
        self.many = usize::try_from(count).is_ok_and(|count| count > THREADS_MAX)
            || self.list_from(directory, is_new).is_none_or(|count| count > THREADS_MAX);
        if self.many {
            self.list.clear();
            (self.times_s, self.switches_s) = (None, None);
        }
    }

    fn list_from(&mut self, directory: &OwnedFd, is_new: bool) -> Option<usize> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let tasks = rustix::fs::openat(directory, "task", flags, Mode::empty()).ok()?;
        let mut count = 0;
        for entry in Dir::new(tasks).ok()?.take(THREADS_MAX + 3) {
            let tid = text::number(entry.ok()?.file_name().to_bytes()).and_then(|tid| u32::try_from(tid).ok());
            let Some(tid) = tid else { continue };
            count += 1;
            if !self.list.iter().any(|thread| thread.tid == tid) {
                self.list.extend(Thread::open(directory, tid, is_new));
            }
        }
        Some(count)
    }

    /// Reads what each has run and waited. What one did between the last reading and its end is lost. None the first time, and where
    /// nothing is known of single threads.
    pub(super) fn times(&mut self, time: Time, buffer: &mut Buffer) -> Option<Times> {
        let seconds = time.now_s() - self.times_s.unwrap_or(0.0);
        if self.list.is_empty() || (self.times_s.is_some() && seconds <= 0.0) {
            return None;
        }
        let mut sum = Times { seconds, ..Times::default() };
        let before = self.list.len();
        self.list.retain_mut(|thread| {
            // Fails for good when the thread has ended, even if another one has its number.
            let Some([ran, waited]) = thread.schedstat.read(buffer).and_then(text::numbers) else { return false };
            let ran = thread.ran.since(ran).unwrap_or(0);
            sum.ran_ns = sum.ran_ns.saturating_add(ran);
            sum.waited_ns = sum.waited_ns.saturating_add(thread.waited.since(waited).unwrap_or(0));
            sum.busiest_ns = sum.busiest_ns.max(ran);
            true
        });
        self.stale |= self.list.len() < before;
        self.times_s.replace(time.now_s()).map(|_| sum)
    }

    /// Reads how often each was switched. The same is lost and missing.
    pub(super) fn switches(&mut self, time: Time, directory: &impl AsFd, buffer: &mut Buffer) -> Option<Switches> {
        let seconds = time.now_s() - self.switches_s.unwrap_or(0.0);
        if self.list.is_empty() || (self.switches_s.is_some() && seconds <= 0.0) {
            return None;
        }
        let mut sum = Switches { seconds, ..Switches::default() };
        for thread in &mut self.list {
            let status = Reread::open(directory, format!("task/{}/status", thread.tid));
            let Some(text) = status.as_ref().and_then(|status| status.read(buffer)) else { continue };
            let (voluntary, involuntary) = switches_of(text);
            let since = |counter: &mut Counter, now: Option<u64>| now.and_then(|now| counter.since(now)).unwrap_or(0);
            sum.voluntary = sum.voluntary.saturating_add(since(&mut thread.voluntary, voluntary));
            sum.involuntary = sum.involuntary.saturating_add(since(&mut thread.involuntary, involuntary));
        }
        self.switches_s.replace(time.now_s()).map(|_| sum)
    }
}

fn switches_of(status: &[u8]) -> (Option<u64>, Option<u64>) {
    let [voluntary, involuntary] =
        text::values(status, [b"voluntary_ctxt_switches:".as_slice(), b"nonvoluntary_ctxt_switches:"]);
    (voluntary, involuntary)
}
