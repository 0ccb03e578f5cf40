//! What a driver measured of its own device, to be held against what was told of it.
//!
//! Every request is written down with its times, every kick with its own, and calls as often as they were read. What is true of any span of
//! time is reckoned from that afterwards, so that it can be the very span that somebody else tells of. A request begins when it was made
//! available and ended between the driver's last look and the one that found it; the middle is taken. To a driver that polls that is mostly
//! less than a microsecond, but ever so often it has no processor for a while; to one that sleeps it is a wake-up.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::os::fd::AsFd;

use anyhow::ensure;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::driver::{Driver, SILENCE_NS, pause};
use super::throughput::Waiting;
use crate::guest::{BLOCK, Kind, Status, now_ns};

/// Calls are read this often by a driver that polls.
const CALLS_EVERY_NS: u64 = 2_000_000;

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) submitted: u64,
    /// The driver's last look at which it had not ended, and the one that found it.
    pub(super) looked: u64,
    pub(super) taken: u64,
    /// What is taken for its end.
    pub(super) completed: u64,
    pub(super) kind: Kind,
    /// First block on the disk.
    pub(super) block: u64,
    pub(super) blocks: u32,
    /// First page of its buffer.
    pub(super) page: u64,
    pub(super) failed: bool,
}

/// Everything that a driver did, in the order in which it ended.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) done: Vec<Done>,
    /// Kicks so far, whenever there were more.
    kicks: Vec<(u64, u64)>,
    /// Calls so far, whenever they were read.
    calls: Vec<(u64, u64)>,
}

impl Log {
    /// Runs the driver's load for `seconds`, or without any until nothing is in flight. Says when that was.
    fn turns(
        &mut self,
        driver: &mut Driver,
        waiting: Waiting,
        mut go_on: impl FnMut(&Driver, u64) -> bool,
    ) -> anyhow::Result<Range<u64>> {
        let began = now_ns();
        let (mut last, mut now, mut calls_at) = (began, began, began);
        while go_on(driver, now) {
            let (done, before, looked) = (&mut self.done, driver.kicks, now);
            let taken = driver.poll_with_pages(&mut |it, page| {
                last = it.completed_ns;
                let looked = looked.max(it.submitted_ns);
                done.push(Done {
                    submitted: it.submitted_ns,
                    looked,
                    taken: it.completed_ns,
                    completed: u64::midpoint(looked, it.completed_ns),
                    kind: it.request.kind,
                    block: it.request.block,
                    blocks: it.request.blocks,
                    page,
                    failed: it.status != Status::OK,
                });
            })?;
            now = now_ns();
            if driver.kicks != before {
                self.kicks.push((now, driver.kicks));
            }
            if now >= calls_at {
                self.read_calls(driver, now);
                calls_at = now + CALLS_EVERY_NS;
            }
            if taken == 0 {
                ensure!(now < last + SILENCE_NS, "the disk is silent: {}", driver.describe());
                match waiting {
                    Waiting::Poll => pause(),
                    Waiting::Interrupt => {
                        wait_for_call(driver)?;
                        self.read_calls(driver, now_ns());
                    }
                }
            }
        }
        Ok(began..now)
    }

    /// Runs the driver's load for `seconds` and says when that was. It goes on afterwards.
    pub(super) fn run(&mut self, driver: &mut Driver, waiting: Waiting, seconds: f64) -> anyhow::Result<Range<u64>> {
        driver.busy = true;
        let until = now_ns() + (seconds * 1e9) as u64;
        self.turns(driver, waiting, |_, now| now < until)
    }

    /// Ends the load, and takes what is in flight.
    pub(super) fn rest(&mut self, driver: &mut Driver) -> anyhow::Result<()> {
        driver.busy = false;
        self.turns(driver, Waiting::Poll, |driver, _| driver.outstanding() > 0).map(drop)
    }

    fn read_calls(&mut self, driver: &Driver, now: u64) {
        let more: u64 = driver.guest.queues.iter().map(|queue| queue.call_fd().take_count()).sum();
        let so_far = self.calls.last().map_or(0, |(_, count)| *count);
        if more > 0 || self.calls.is_empty() {
            self.calls.push((now, so_far + more));
        }
    }

    /// What is true of `span`, by the name of the feature that tells of it. What there was none of is not there.
    pub(super) fn truth(&self, span: &Range<u64>) -> BTreeMap<&'static str, f64> {
        let mut truth = BTreeMap::new();
        let seconds = (span.end - span.start) as f64 / 1e9;
        let ended: Vec<&Done> = self.done.iter().filter(|it| span.contains(&it.completed)).collect();
        let arrivals = self.done.iter().filter(|it| span.contains(&it.submitted)).count();
        truth.insert("arrivals_per_s", arrivals as f64 / seconds);
        truth.insert("completions_per_s", ended.len() as f64 / seconds);
        let depth: u64 = self.done.iter().map(|it| overlap(&(it.submitted..it.completed), span)).sum();
        truth.insert("depth_mean", depth as f64 / 1e9 / seconds);
        let (kicks, calls) = (grown(&self.kicks, span) as f64, grown(&self.calls, span) as f64);
        truth.insert("kicks_per_s", kicks / seconds);
        truth.insert("calls_per_s", calls / seconds);
        truth.insert("calls_suppressed_per_s", (ended.len() as f64 - calls).max(0.0) / seconds);
        if ended.is_empty() {
            return truth;
        }
        let count = |of: &dyn Fn(&Done) -> bool| ended.iter().filter(|it| of(it)).count() as f64;
        let all = ended.len() as f64;
        // Of those that arrived, what failed moved nothing; that is how the telemetry page counts as well.
        let bytes = |of: &dyn Fn(&Done) -> bool| -> f64 {
            ended.iter().filter(|it| of(it)).map(|it| f64::from(it.blocks) * BLOCK as f64).sum()
        };
        truth.insert("bytes_per_s", bytes(&|it| !it.failed) / seconds);
        truth.insert("size_mean_bytes", bytes(&|_| true) / all);
        truth.insert("read_share", count(&|it| it.kind == Kind::Read) / all);
        truth.insert("device_write_share", bytes(&|it| it.kind == Kind::Read) / bytes(&|_| true));
        truth.insert("error_share", count(&|it| it.failed) / all);
        if let Some(share) = sequential_share(&ended) {
            truth.insert("sequential_share", share);
        }
        let latencies = |of: &dyn Fn(&Done) -> bool| {
            let mut latencies: Vec<u64> =
                ended.iter().filter(|it| of(it)).map(|it| it.completed - it.submitted).collect();
            latencies.sort_unstable();
            latencies
        };
        let every = latencies(&|_| true);
        truth.insert("latency_mean_us", every.iter().sum::<u64>() as f64 / 1e3 / all);
        let quantiles =
            [("latency_p50_us", 0.5), ("latency_p90_us", 0.9), ("latency_p99_us", 0.99), ("latency_p999_us", 0.999)];
        truth.extend(quantiles.map(|(name, share)| (name, quantile_us(&every, share))));
        truth.insert("latency_max_us", quantile_us(&every, 1.0));
        for (kind, names) in [
            (Kind::Read, ["read_latency_p50_us", "read_latency_p99_us"]),
            (Kind::Write, ["write_latency_p50_us", "write_latency_p99_us"]),
        ] {
            let latencies = latencies(&|it| it.kind == kind);
            if !latencies.is_empty() {
                truth.insert(names[0], quantile_us(&latencies, 0.5));
                truth.insert(names[1], quantile_us(&latencies, 0.99));
            }
        }
        truth.insert("completion_gap_max_us", self.longest_gap_ns(span) as f64 / 1e3);
        truth
    }

    /// The same as if every request had ended as early, and as late, as it can have.
    pub(super) fn bounds(&self, span: &Range<u64>) -> [BTreeMap<&'static str, f64>; 2] {
        let ended = |at: fn(&Done) -> u64| {
            let done = self.done.iter().map(|it| Done { completed: at(it), ..*it }).collect();
            Log { done, kicks: Vec::new(), calls: Vec::new() }.truth(span)
        };
        [ended(|it| it.looked), ended(|it| it.taken)]
    }

    /// Pages that buffers lay in, and how often one of them was touched.
    pub(super) fn pages(&self) -> (f64, f64) {
        let mut pages = HashSet::new();
        let mut touches = 0_u64;
        for it in &self.done {
            pages.extend(it.page..it.page + u64::from(it.blocks));
            touches += u64::from(it.blocks);
        }
        (pages.len() as f64, touches as f64 / pages.len().max(1) as f64)
    }

    /// The longest time without a completion while something was in flight, of those that ended in `span`.
    fn longest_gap_ns(&self, span: &Range<u64>) -> u64 {
        let mut submissions: Vec<u64> = self.done.iter().map(|it| it.submitted).collect();
        submissions.sort_unstable();
        let (mut longest, mut last) = (0, 0_u64);
        // When `index` requests have ended, the next one that was submitted is the earliest that can be in flight.
        for (index, it) in self.done.iter().enumerate() {
            let begin = last.max(submissions[index]);
            last = it.completed;
            if span.contains(&it.completed) {
                longest = longest.max(it.completed.saturating_sub(begin));
            }
        }
        longest
    }
}

/// Sleeps until any queue calls or a request is due, at most 10 ms. What was called is left to be read.
fn wait_for_call(driver: &mut Driver) -> anyhow::Result<()> {
    let due = driver.next_due_ns().map_or(10_000_000, |due| due.saturating_sub(now_ns()).min(10_000_000));
    let queues = &mut driver.guest.queues;
    let mut quiet = true;
    for queue in queues.iter_mut() {
        quiet &= queue.enable_calls();
    }
    if quiet {
        let mut fds: Vec<PollFd<'_>> =
            queues.iter().map(|queue| PollFd::from_borrowed_fd(queue.call_fd().as_fd(), PollFlags::IN)).collect();
        let timeout = Timespec { tv_sec: 0, tv_nsec: due.cast_signed() };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for queue in queues {
        queue.disable_calls();
    }
    Ok(())
}

fn overlap(one: &Range<u64>, two: &Range<u64>) -> u64 {
    one.end.min(two.end).saturating_sub(one.start.max(two.start))
}

/// By how much a counter grew in `span`.
fn grown(series: &[(u64, u64)], span: &Range<u64>) -> u64 {
    let at = |time: u64| match series.partition_point(|(when, _)| *when <= time) {
        0 => series.first().map_or(0, |(_, count)| *count),
        after => series[after - 1].1,
    };
    at(span.end) - at(span.start)
}

/// The nearest rank of what is sorted.
fn quantile_us(sorted: &[u64], share: f64) -> f64 {
    let rank = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len()) - 1;
    sorted[rank] as f64 / 1e3
}

/// Requests that begin where the one submitted before them ended.
fn sequential_share(ended: &[&Done]) -> Option<f64> {
    let mut order: Vec<&&Done> = ended.iter().collect();
    order.sort_by_key(|it| it.submitted);
    let follows = order.windows(2).filter(|two| two[0].block + u64::from(two[0].blocks) == two[1].block).count();
    (order.len() > 1).then(|| follows as f64 / (order.len() - 1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(submitted: u64, completed: u64, block: u64) -> Done {
        let (looked, taken) = (completed, completed);
        Done {
            submitted,
            looked,
            taken,
            completed,
            kind: Kind::Read,
            block,
            blocks: 2,
            page: block,
            failed: block == 2,
        }
    }

    #[test]
    fn what_is_true_of_a_span_is_reckoned_from_what_was_in_it() {
        let ms = 1_000_000;
        let log = Log {
            done: vec![done(ms, 3 * ms, 0), done(2 * ms, 5 * ms, 2), done(7 * ms, 9 * ms, 10)],
            kicks: vec![(ms, 1), (2 * ms, 2), (7 * ms, 3)],
            calls: vec![(0, 0), (9 * ms, 2)],
        };
        let truth = log.truth(&(2 * ms..10 * ms));
        let near =
            |name: &str, expected: f64| assert!((truth[name] - expected).abs() < 1e-6, "{name}: {}", truth[name]);
        near("arrivals_per_s", 250.0);
        near("completions_per_s", 375.0);
        near("depth_mean", (1.0 + 3.0 + 2.0) / 8.0);
        near("kicks_per_s", 125.0);
        near("calls_per_s", 250.0);
        near("latency_mean_us", 7_000.0 / 3.0);
        near("latency_p50_us", 2_000.0);
        near("latency_max_us", 3_000.0);
        near("sequential_share", 0.5);
        near("error_share", 1.0 / 3.0);
        near("completion_gap_max_us", 2_000.0);
        near("read_share", 1.0);
        assert!(!truth.contains_key("write_latency_p50_us"));
        assert_eq!(log.pages(), (6.0, 1.0));
    }

    #[test]
    fn of_a_span_without_a_request_there_are_rates_and_nothing_else() {
        let truth = Log::default().truth(&(0..1_000));
        assert_eq!(truth["arrivals_per_s"], 0.0);
        assert!(!truth.contains_key("latency_p50_us") && !truth.contains_key("read_share"));
    }

    #[test]
    fn a_gap_begins_with_work() {
        let log = Log { done: vec![done(0, 10, 0), done(100, 150, 2), done(120, 300, 4)], ..Log::default() };
        assert_eq!(log.longest_gap_ns(&(0..1_000)), 150);
        assert_eq!(log.longest_gap_ns(&(0..200)), 50);
    }
}
