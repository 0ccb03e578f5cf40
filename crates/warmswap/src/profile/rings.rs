//! The rings of a component as sources: what the broker's following of them tells, and what probes sample.

use std::sync::Arc;

use warmswap_core::{Asked, Nanos, RingReader, Sampled};
use warmswap_histogram::{BUCKETS, Histogram, bucket_of};
use warmswap_predict::{Counter, Feature, LatencyKind, Measure, Pages};
use warmswap_wire::DeviceType;
use warmswap_wire::ring::crosses_event;

use super::feed::{RingFeed, RingReading};
use super::page::longest_ns;

/// The working set is of so many ticks that were measured, and of as many before them.
const PAGES_TICKS: u32 = 100;

/// Where more requests are completed in a tick probes meet some of them, and resolve better than looks what woke a ring.
const WOKEN_MAX: u64 = 10;

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
    /// Since when a kick, and an interrupt, was due without effect, and what would show one.
    overdue: [Option<(Nanos, [u16; 3])>; 2],
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
            overdue: [None; 2],
        }
    }

    /// Looks for notifications that were due and have had no effect since the last look. Only event indices tell who wants which.
    fn look_for_overdue(&mut self, memory: &dyn RingReader, now: Nanos, into: &mut Measure) {
        let Some(layout) = memory.layout(self.index) else { return };
        let (used, avail) = (memory.used_idx(self.index), memory.avail_idx(self.index));
        let (avail_event, used_event) = (memory.avail_event(self.index), memory.used_event(self.index));
        // Neither side has moved since the other should have been told.
        let kick_due = avail != used && crosses_event(avail_event, avail, used);
        // A driver that wants none parks the index at zero.
        let call_due = used_event != 0 && (1..=layout.size()).contains(&used.wrapping_sub(used_event));
        let dues = [
            (Feature::KickOverdue, kick_due, [used, avail_event, 0]),
            (Feature::CallOverdue, call_due, [used, used_event, avail]),
        ];
        for ((feature, due, sign), overdue) in dues.into_iter().zip(&mut self.overdue) {
            let known = overdue.filter(|(_, then)| due && *then == sign);
            *overdue = due.then(|| known.unwrap_or((now, sign)));
            into.note(feature, overdue.map_or(0.0, |(since, _)| now.since(since).as_micros()));
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

    /// Forgets what has happened since the last tick: it was another backend's.
    pub(crate) fn forget(&mut self) {
        for ring in &mut self.rings {
            let reading = ring.feed.take();
            ring.looks = reading.looks;
            ring.outstanding = reading.outstanding;
            ring.so_far = reading.submitted;
            ring.count(&reading);
            ring.new_latencies();
            (ring.arrivals, ring.completions, ring.overdue) = (0, 0, [None; 2]);
        }
        self.latencies = Latencies::default();
        self.unsampled = [Unsampled::default(); 4];
    }

    /// A tick has passed in which nothing happened.
    pub(crate) fn rest(&mut self) {
        self.rings.iter_mut().for_each(|ring| ring.arrivals = 0);
    }

    /// Whether nothing has happened on any ring since the last tick.
    pub(crate) fn are_idle(&self) -> bool {
        self.rings.iter().all(|ring| ring.outstanding == 0 && ring.feed.looks() == ring.looks)
    }

    /// Looks for notifications without effect, where event indices tell which were due.
    pub(crate) fn look_for_overdue(&mut self, memory: &dyn RingReader, now: Nanos, into: &mut Measure) {
        let device = self.device;
        let rings = self.rings.iter_mut().filter(|ring| device.carries_requests(ring.index));
        rings.for_each(|ring| ring.look_for_overdue(memory, now, into));
    }

    /// Whether nothing was in flight at the last tick or has been submitted since. It may have been looked at.
    pub(crate) fn are_at_rest(&self) -> bool {
        self.rings.iter().all(|ring| ring.outstanding == 0 && ring.feed.submitted() == ring.so_far)
    }

    /// Requests completed so far on all rings that carry them, and how many can be in flight.
    pub(crate) fn completed(&self) -> (u64, u64) {
        let rings = self.rings.iter().filter(|ring| self.device.carries_requests(ring.index));
        let add = |(sum, room), (completed, size)| (sum + completed, room + u64::from(size));
        rings.map(|ring| ring.feed.completed()).fold((0_u64, 0_u64), add)
    }

    /// Adds what came since the last tick. `page_tells`: the backend's own page has told kinds, bytes and latencies of each kind, which is
    /// better than samples.
    pub(crate) fn measure(&mut self, span_s: f64, sampled: &Sampled, page_tells: bool, into: &mut Measure) {
        let (mut completed, mut submitted, mut busy) = (0, 0, 0);
        let (mut depth_ns, mut sightings) = (Some(0), 0.0);
        for ring in &mut self.rings {
            let reading = ring.feed.take();
            let looks = reading.looks.saturating_sub(std::mem::replace(&mut ring.looks, reading.looks));
            ring.so_far = reading.submitted;
            ring.outstanding = reading.outstanding;
            let requests = self.device.carries_requests(ring.index);
            let depth = ring.measure(&reading, requests, into);
            if requests {
                depth_ns = depth_ns.zip(depth).map(|(sum, depth)| sum + depth);
                sightings += looks as f64 * depth.unwrap_or(0) as f64 / 1e9 / span_s;
                completed += ring.completions;
                submitted += ring.arrivals;
                busy += u32::from(ring.completions > 0);
                let is_new = ring.before.is_none();
                let latencies = if is_new || ring.completions > 0 { ring.new_latencies() } else { None };
                if let Some(mut latencies) = latencies {
                    if ring.completions > WOKEN_MAX {
                        latencies[1] = Histogram::default();
                    }
                    self.latencies.add(&latencies, &reading);
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
            add_mean(depth_ns, completed, sightings, sampled, into);
        }
        self.add_sampled(sampled, submitted, completed, page_tells, span_s, into);
        self.latencies.put(sampled, completed, page_tells, into);
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
    /// Counts on from the last reading: requests in flight times nanoseconds, nanoseconds, those of them in which it was not known what was in
    /// flight.
    fn count(&mut self, reading: &RingReading) -> (Option<u64>, Option<u64>, Option<u64>) {
        // A ring that was only just heard of has no past: what it had counted before is nobody's.
        self.arrivals = self.submitted.since(reading.submitted).unwrap_or(0);
        self.completions = self.completed.since(reading.completed).unwrap_or(0);
        let depth = self.depth.since(reading.depth_ns);
        (depth, self.metered.since(reading.metered_ns), self.inexact.since(reading.inexact_ns))
    }

    /// Latencies since the last call: those told by looks, and those of requests that woke the ring. None at the first.
    fn new_latencies(&mut self) -> Option<[Histogram; 2]> {
        let is_known = self.before.is_some();
        let before = self.before.get_or_insert_with(|| Box::new([[0; BUCKETS]; 2]));
        let latencies = self.feed.latencies(before);
        is_known.then_some(latencies)
    }

    /// The exact part.
    /// Returns the requests in flight times nanoseconds, unless the ring was only just heard of.
    fn measure(&mut self, reading: &RingReading, requests: bool, into: &mut Measure) -> Option<u64> {
        let (depth, metered, inexact) = self.count(reading);
        if !requests {
            return depth;
        }
        if let (Some(metered), Some(inexact)) = (metered, inexact) {
            into.add(Feature::Inexact, inexact as f64, metered as f64);
        }
        into.note(Feature::DepthMax, reading.depth_max.into());
        if reading.size > 0 {
            into.note(Feature::RingShare, f64::from(reading.depth_max) / f64::from(reading.size));
        }
        into.note(Feature::Gap, reading.gap_max.as_micros());
        if reading.oldest_max.is_some() || (reading.outstanding == 0 && reading.depth_max == 0) {
            into.note(Feature::OldestAge, reading.oldest_max.unwrap_or_default().as_micros());
        }
        depth
    }
}

/// The mean latency by Little's law, which is of all requests but knows only of what looks have seen in flight; where that is little, samples
/// count as well, each as much as a request that was seen.
fn add_mean(depth_ns: u64, completed: u64, sightings: f64, sampled: &Sampled, into: &mut Measure) {
    let samples = sampled.latencies[0].total() as f64;
    if completed == 0 || sightings + samples == 0.0 {
        // In flight and not completed: that is latency of requests to come.
        return into.add(Feature::LatencyMean, depth_ns as f64 / 1e3, completed as f64);
    }
    let little_us = depth_ns as f64 / 1e3 / completed as f64;
    let sampled_us = if samples > 0.0 { sampled.latency_ns as f64 / 1e3 / samples } else { 0.0 };
    let mean_us = (sightings * little_us + samples * sampled_us) / (sightings + samples);
    into.add(Feature::LatencyMean, mean_us * completed as f64, completed as f64);
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
    fn add(&mut self, [long, woken]: &[Histogram; 2], reading: &RingReading) {
        self.long.merge(long);
        self.short.merge(woken);
        self.longest_ns = self.longest_ns.max(longest_ns(woken).unwrap_or(0));
        self.floor = self.floor.max(reading.floor_max);
    }

    /// Puts both together: what is sampled below the floor stands for every request that is not among the long ones.
    fn put(&mut self, sampled: &Sampled, completed: u64, page_tells: bool, into: &mut Measure) {
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
        if self.completed == 0 {
            return;
        }
        if of_short > 0 && short.total() == 0 {
            if of_short * 2 >= self.completed {
                return;
            }
            // The median and what is above it lie among the long ones, wherever below the floor these few are.
            short.record_many(self.floor.0, of_short);
        }
        into.sampled(LatencyKind::All, &short, of_short);
        into.sampled(LatencyKind::All, &long, of_long);
        into.note(Feature::LatencyMax, longest_ns(&long).unwrap_or(0).max(self.longest_ns) as f64 / 1e3);
        let kinds = [(LatencyKind::Reads, 1), (LatencyKind::Writes, 2), (LatencyKind::Flushes, 3)];
        for (kind, at) in kinds.into_iter().filter(|_| !page_tells) {
            let latencies = &sampled.latencies[at];
            into.sampled(kind, latencies, u64::try_from(latencies.total()).unwrap_or(0));
        }
        *self = Latencies::default();
    }
}

#[cfg(test)]
mod tests {
    use warmswap_core::RingMeter;

    use super::*;

    /// A disk with one ring, and the meter that the control thread would publish of it.
    struct Disk {
        rings: Rings,
        feed: Arc<RingFeed>,
        meter: RingMeter,
    }

    impl Disk {
        fn new() -> Self {
            let feed = Arc::new(RingFeed::default());
            let mut rings = Rings::new(DeviceType::Blk);
            rings.rings.push(Ring::new(0, Arc::clone(&feed)));
            let mut disk = Disk { rings, feed, meter: RingMeter::default() };
            disk.meter.size = 256;
            // Nothing is known of what was before the first tick.
            disk.tick(0, &mut Sampled::default());
            disk
        }

        /// A tick of 100 ms in which `completed` requests came and went.
        fn tick(&mut self, completed: u64, sampled: &mut Sampled) -> Measure {
            self.meter.looks += 1;
            self.meter.submitted += completed;
            self.meter.completed += completed;
            self.feed.publish(&self.meter);
            let mut measure = Measure::default();
            self.rings.measure(0.1, sampled, false, &mut measure);
            measure
        }
    }

    fn sampled(ns: u64, count: u64) -> Sampled {
        let mut sampled = Sampled { requests: count, longest: ns, ..Sampled::default() };
        sampled.asked[Asked::Read as usize] = count;
        sampled.bytes = 4096 * count;
        sampled.latencies.iter_mut().take(2).for_each(|it| it.record_many(ns, count));
        sampled
    }

    #[test]
    fn samples_stand_for_all_that_were_not_long_and_long_ones_for_themselves() {
        let mut disk = Disk::new();
        disk.meter.long_floor = Nanos::from_millis(4);
        disk.meter.long.record_many(20_000_000, 5);
        let measure = disk.tick(1_000, &mut sampled(100_000, 10));
        let value = |feature| measure.value(feature).expect("it was measured");
        assert!((90.0..130.0).contains(&value(Feature::LatencyP50)), "{}", value(Feature::LatencyP50));
        assert!(value(Feature::LatencyP99) < 130.0, "5 of 1000 are less than 1 %");
        assert!(value(Feature::LatencyP999) > 16_000.0, "and more than 0.1 %");
        assert_eq!(
            (value(Feature::Arrivals), value(Feature::ReadShare), value(Feature::Size)),
            (10_000.0, 1.0, 4096.0)
        );
        assert_eq!(value(Feature::Bytes), 4096.0 * 10_000.0);
    }

    #[test]
    fn long_latencies_alone_are_never_taken_for_all() {
        let mut disk = Disk::new();
        disk.meter.long_floor = Nanos::from_millis(4);
        disk.meter.long.record_many(20_000_000, 5);
        let measure = disk.tick(1_000, &mut Sampled::default());
        assert_eq!(measure.value(Feature::LatencyP50), None, "nobody knows how long the others took");
        let measure = disk.tick(0, &mut sampled(100_000, 10));
        let p999 = measure.value(Feature::LatencyP999).expect("now it is known");
        assert!(p999 > 16_000.0, "{p999}");
    }

    #[test]
    fn what_was_another_backends_is_forgotten() {
        let mut disk = Disk::new();
        disk.meter.looks += 1;
        disk.meter.completed += 5_000;
        disk.meter.long_floor = Nanos::from_millis(4);
        disk.meter.gap = Nanos::from_millis(300);
        disk.meter.long.record_many(20_000_000, 900);
        disk.feed.publish(&disk.meter);
        disk.rings.forget();
        (disk.meter.gap, disk.meter.long_floor) = (Nanos(0), Nanos(0));
        let measure = disk.tick(10, &mut sampled(100_000, 10));
        let value = |feature| measure.value(feature).expect("it was measured");
        assert_eq!((value(Feature::Completions), value(Feature::Gap)), (100.0, 0.0));
        assert!(value(Feature::LatencyP999) < 130.0, "{}", value(Feature::LatencyP999));
    }

    #[test]
    fn a_request_that_wakes_a_resting_ring_has_a_latency_although_no_probe_met_it() {
        let mut disk = Disk::new();
        disk.meter.woken.record(3_000_000);
        let measure = disk.tick(1, &mut Sampled::default());
        let [median, max] =
            [Feature::LatencyP50, Feature::LatencyMax].map(|it| measure.value(it).expect("it is known"));
        assert!((2_000.0..4_000.0).contains(&median) && max >= median, "{median} {max}");
    }

    #[test]
    fn few_short_ones_that_nobody_sampled_do_not_hide_the_many_long_ones() {
        let mut disk = Disk::new();
        disk.meter.long_floor = Nanos::from_millis(4);
        disk.meter.long.record_many(20_000_000, 900);
        let measure = disk.tick(1_000, &mut Sampled::default());
        let median = measure.value(Feature::LatencyP50).expect("nine in ten are long");
        assert!((16_000.0..21_000.0).contains(&median), "{median}");
    }

    #[test]
    fn what_a_page_tells_is_not_sampled_as_well() {
        let mut disk = Disk::new();
        disk.meter.looks += 1;
        disk.meter.completed += 10;
        disk.feed.publish(&disk.meter);
        let mut measure = Measure::default();
        disk.rings.measure(0.1, &sampled(100_000, 10), true, &mut measure);
        let values = [Feature::ReadP50, Feature::ReadShare, Feature::Bytes, Feature::Kicks].map(|it| measure.value(it));
        assert_eq!(values, [None; 4]);
        // How long they waited in the ring it does not know.
        assert!(measure.value(Feature::LatencyP50).is_some());
        assert_eq!(measure.value(Feature::Completions), Some(100.0));
    }

    #[test]
    fn a_ring_that_is_only_just_known_has_no_past() {
        let feed = Arc::new(RingFeed::default());
        let mut meter = RingMeter::default();
        (meter.looks, meter.submitted, meter.completed) = (9, 1_000_000, 1_000_000);
        feed.publish(&meter);
        let mut rings = Rings::new(DeviceType::Blk);
        rings.rings.push(Ring::new(0, feed));
        let mut measure = Measure::default();
        rings.measure(0.1, &Sampled::default(), false, &mut measure);
        assert_eq!(measure.value(Feature::Arrivals), Some(0.0));
        assert_eq!(measure.value(Feature::Depth), None);
    }
}
