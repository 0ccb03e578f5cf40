//! The rings of a component as sources: what the broker's following of them tells, and what probes sample.

use std::sync::Arc;

use warmswap_core::{Asked, Nanos, Sampled};
use warmswap_histogram::{BUCKETS, Histogram, bucket_bounds, bucket_of};
use warmswap_predict::{Counter, Feature, LatencyKind, Measure, Pages};
use warmswap_wire::DeviceType;

use super::feed::{RingFeed, RingReading};

/// The working set is of so many windows' time: those that are over and the one under way.
const PAGES_TICKS: u32 = 100;

/// What is kept of one ring between ticks.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) index: u32,
    pub(crate) feed: Arc<RingFeed>,
    looks: u64,
    /// Requests submitted by the last tick, since the device began.
    so_far: u64,
    submitted: Counter,
    completed: Counter,
    depth: Counter,
    metered: Counter,
    inexact: Counter,
    /// Latencies as they were read last; none until there were any.
    before: Option<Box<[[u32; BUCKETS]; 2]>>,
    /// Requests submitted in the last tick.
    pub(crate) arrivals: u64,
    /// Requests completed in it.
    pub(crate) completions: u64,
    pub(crate) outstanding: u32,
}

impl Ring {
    pub(crate) fn new(index: u32, feed: Arc<RingFeed>) -> Self {
        Ring {
            index,
            feed,
            looks: 0,
            so_far: 0,
            submitted: Counter::default(),
            completed: Counter::default(),
            depth: Counter::default(),
            metered: Counter::default(),
            inexact: Counter::default(),
            before: None,
            arrivals: 0,
            completions: 0,
            outstanding: 0,
        }
    }
}

/// All rings of one component.
#[derive(Debug)]
pub(crate) struct Rings {
    device: DeviceType,
    pub(crate) rings: Vec<Ring>,
    /// Pages touched lately, in two generations.
    pages: [Pages; 2],
    pages_ticks: u32,
    /// Latencies of ticks in which there was no sample of the short ones yet.
    latencies: Latencies,
    /// What waits for a sample of requests, of statuses, of submissions, of completions.
    unsampled: [Unsampled; 4],
}

/// Requests of ticks without a sample: what the next sample tells is taken for them as well, so that a rate is not that of sampled ticks
/// alone.
#[derive(Clone, Copy, Debug, Default)]
struct Unsampled {
    requests: u64,
    seconds: f64,
}

impl Unsampled {
    /// A tick has passed. All that have waited, if there is a sample now.
    fn pass(&mut self, requests: u64, seconds: f64, sampled: u64) -> Option<(f64, f64)> {
        self.requests += requests;
        self.seconds += seconds;
        (sampled > 0).then(|| {
            let all = std::mem::take(self);
            (all.requests as f64, all.seconds)
        })
    }
}

impl Rings {
    pub(crate) fn new(device: DeviceType) -> Self {
        Rings {
            device,
            rings: Vec::new(),
            pages: [Pages::default(), Pages::default()],
            pages_ticks: 0,
            latencies: Latencies::default(),
            unsampled: [Unsampled::default(); 4],
        }
    }

    /// Whether nothing has happened on any ring since the last tick.
    pub(crate) fn are_idle(&self) -> bool {
        self.rings.iter().all(|ring| ring.outstanding == 0 && ring.feed.looks() == ring.looks)
    }

    /// Whether nothing was in flight at the last tick or has been submitted since. It may have been looked at.
    pub(crate) fn are_at_rest(&self) -> bool {
        self.rings.iter().all(|ring| ring.outstanding == 0 && ring.feed.submitted() == ring.so_far)
    }

    /// Adds what came since the last tick. `page_tells`: the backend's own page has told latencies, kinds and bytes, which is better than
    /// samples.
    pub(crate) fn measure(
        &mut self,
        span_s: f64,
        now: Nanos,
        sampled: &mut Sampled,
        page_tells: bool,
        into: &mut Measure,
    ) {
        let (mut completed, mut submitted, mut busy) = (0, 0, 0);
        let mut depth_ns = Some(0);
        for ring in &mut self.rings {
            let reading = ring.feed.take();
            ring.looks = reading.looks;
            ring.so_far = reading.submitted;
            ring.outstanding = reading.outstanding;
            let requests = self.device.carries_requests(ring.index);
            let depth = ring.measure(&reading, requests, now, into);
            if requests {
                depth_ns = depth_ns.zip(depth).map(|(sum, depth)| sum + depth);
                completed += ring.completions;
                submitted += ring.arrivals;
                busy += u32::from(ring.completions > 0);
                if !page_tells && ring.completions > 0 {
                    self.latencies.add(ring, &reading);
                }
            }
        }
        if self.rings.is_empty() {
            return;
        }
        into.add(Feature::Arrivals, submitted as f64, span_s);
        into.add(Feature::Completions, completed as f64, span_s);
        into.note(Feature::RingsBusy, f64::from(busy));
        if let Some(depth_ns) = depth_ns {
            into.add(Feature::Depth, depth_ns as f64 / 1e9, span_s);
        }
        self.add_sampled(sampled, submitted, completed, page_tells, span_s, into);
        if !page_tells {
            self.latencies.put(sampled, completed, into);
        }
        *sampled = Sampled::default();
    }

    /// What probes have sampled of this tick's requests.
    fn add_sampled(
        &mut self,
        sampled: &Sampled,
        submitted: u64,
        completed: u64,
        page_tells: bool,
        span_s: f64,
        into: &mut Measure,
    ) {
        if page_tells {
            self.unsampled = [Unsampled::default(); 4];
        } else {
            self.add_samples_of_all(sampled, submitted, completed, span_s, into);
        }
        into.add(Feature::SequentialShare, sampled.sequential as f64, sampled.successors as f64);
        into.add(Feature::PageLocality, sampled.local as f64, sampled.neighbours as f64);
        into.add(Feature::DeviceWrites, sampled.written as f64, sampled.bytes as f64);
        into.add(Feature::KickShare, sampled.kicks as f64, sampled.submissions as f64);
        into.add(Feature::CallShare, sampled.calls as f64, sampled.completions as f64);
        into.add(Feature::Pickup, sampled.pickup_ns as f64 / 1e3, sampled.pickups as f64);
        into.add(Feature::Reaction, sampled.reaction_ns as f64 / 1e3, sampled.reactions as f64);
        if sampled.reactions > 0 {
            into.note(Feature::ReactionMax, sampled.reaction_max_ns as f64 / 1e3);
        }
        self.add_pages(sampled, into);
    }

    /// What samples tell of all requests, those of ticks without a sample among them.
    fn add_samples_of_all(
        &mut self,
        sampled: &Sampled,
        submitted: u64,
        completed: u64,
        span_s: f64,
        into: &mut Measure,
    ) {
        let per = |part: u64, whole: u64| part as f64 / whole as f64;
        let [requests, statuses, submissions, completions] = &mut self.unsampled;
        if let Some((all, seconds)) = requests.pass(completed, span_s, sampled.requests) {
            let kind = |asked: Asked| all * per(sampled.asked[asked as usize], sampled.requests);
            into.add(Feature::ReadShare, kind(Asked::Read), all);
            into.add(Feature::WriteShare, kind(Asked::Write), all);
            into.add(Feature::FlushShare, kind(Asked::Flush), all);
            into.add(Feature::DiscardShare, kind(Asked::Discard), all);
            into.add(Feature::Bytes, per(sampled.bytes, sampled.requests) * all, seconds);
            let sized = sampled.asked[Asked::Read as usize] + sampled.asked[Asked::Write as usize];
            into.add(Feature::Size, sampled.bytes as f64, sized as f64);
        } else if requests.requests == 0 {
            // Nothing was asked for: that much is known without a sample.
            into.add(Feature::Bytes, 0.0, std::mem::take(&mut requests.seconds));
        }
        if let Some((all, seconds)) = statuses.pass(completed, span_s, sampled.statuses) {
            into.add(Feature::ErrorShare, sampled.errors as f64, sampled.statuses as f64);
            into.add(Feature::Errors, per(sampled.errors, sampled.statuses) * all, seconds);
        }
        if let Some((all, seconds)) = submissions.pass(submitted, span_s, sampled.submissions) {
            into.add(Feature::Kicks, per(sampled.kicks, sampled.submissions) * all, seconds);
        }
        if let Some((all, seconds)) = completions.pass(completed, span_s, sampled.completions) {
            let calls = per(sampled.calls, sampled.completions) * all;
            into.add(Feature::Calls, calls, seconds);
            into.add(Feature::CallsSuppressed, all - calls, seconds);
        }
    }

    fn add_pages(&mut self, sampled: &Sampled, into: &mut Measure) {
        self.pages_ticks += 1;
        if self.pages_ticks >= PAGES_TICKS {
            self.pages_ticks = 0;
            self.pages.swap(0, 1);
            self.pages[0].clear();
        }
        self.pages[0].merge(&sampled.pages);
        if sampled.requests == 0 {
            return;
        }
        let mut pages = self.pages[1].clone();
        pages.merge(&self.pages[0]);
        if let (Some(working_set), Some(reuse)) = (pages.working_set(), pages.reuse()) {
            into.note(Feature::WorkingSet, working_set);
            into.note(Feature::PageReuse, reuse);
        }
    }
}

impl Ring {
    /// The exact part.
    /// Returns the requests in flight times nanoseconds, unless the ring was only just heard of.
    fn measure(&mut self, reading: &RingReading, requests: bool, now: Nanos, into: &mut Measure) -> Option<u64> {
        // A ring that was only just heard of has no past: what it had counted before is nobody's.
        self.arrivals = self.submitted.since(reading.submitted).unwrap_or(0);
        self.completions = self.completed.since(reading.completed).unwrap_or(0);
        let (depth, metered, inexact) = (
            self.depth.since(reading.depth_ns),
            self.metered.since(reading.metered_ns),
            self.inexact.since(reading.inexact_ns),
        );
        if !requests {
            return depth;
        }
        if let (Some(depth), Some(metered), Some(inexact)) = (depth, metered, inexact) {
            into.add(Feature::LatencyMean, depth as f64 / 1e3, self.completions as f64);
            into.add(Feature::Inexact, inexact as f64, metered as f64);
        }
        into.note(Feature::DepthMax, reading.depth_max.into());
        if reading.size > 0 {
            into.note(Feature::RingShare, f64::from(reading.depth_max) / f64::from(reading.size));
        }
        into.note(Feature::Gap, reading.gap_max.as_micros());
        let age = reading.oldest.map_or(Nanos(0), |oldest| now.since(oldest));
        if reading.oldest.is_some() || reading.outstanding == 0 {
            into.note(Feature::OldestAge, age.as_micros());
        }
        depth
    }
}

/// Latencies from two sources: all of those that were long against the time between looks, and samples of the others. They are kept until
/// both are there: the long ones alone would be taken for all.
#[derive(Debug, Default)]
struct Latencies {
    long: Histogram,
    short: Histogram,
    floor: Nanos,
    /// Requests that they are of.
    completed: u64,
    longest_ns: u64,
}

impl Latencies {
    fn add(&mut self, ring: &mut Ring, reading: &RingReading) {
        let before = ring.before.get_or_insert_with(|| Box::new([[0; BUCKETS]; 2]));
        let [long, woken] = ring.feed.latencies(before);
        self.long.merge(&long);
        self.short.merge(&woken);
        self.floor = self.floor.max(reading.floor_max);
    }

    /// Puts both together: what is sampled below the floor stands for every request that is not among the long ones.
    fn put(&mut self, sampled: &Sampled, completed: u64, into: &mut Measure) {
        self.short.merge(&sampled.latencies[0]);
        self.completed += completed;
        self.longest_ns = self.longest_ns.max(sampled.longest);
        // The bucket that the floor lies in is told by samples.
        let first = if self.floor > Nanos(0) { (bucket_of(self.floor.0) + 1).min(BUCKETS) } else { BUCKETS };
        let (mut long, mut short) = (self.long.clone(), self.short.clone());
        long.counts[..first].fill(0);
        short.counts[first..].fill(0);
        let of_long = u64::try_from(long.total()).unwrap_or(u64::MAX);
        let of_short = self.completed.saturating_sub(of_long);
        if self.completed == 0 || (of_short > 0 && short.total() == 0) {
            return;
        }
        into.sampled(LatencyKind::All, &short, of_short);
        into.sampled(LatencyKind::All, &long, of_long);
        let longest = long.counts.iter().rposition(|count| *count > 0).map_or(0, |at| *bucket_bounds(at).start());
        into.note(Feature::LatencyMax, longest.max(self.longest_ns) as f64 / 1e3);
        let kinds = [(LatencyKind::Reads, 1), (LatencyKind::Writes, 2), (LatencyKind::Flushes, 3)];
        for (kind, at) in kinds {
            let latencies = &sampled.latencies[at];
            into.sampled(kind, latencies, u64::try_from(latencies.total()).unwrap_or(0));
        }
        *self = Latencies::default();
    }
}
