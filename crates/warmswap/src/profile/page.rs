//! The telemetry page of a backend that has one: exact numbers of everything it did, where others only have samples.
//!
//! A page may hold anything. It is used as a whole or not at all: a difference counts if every counter of every queue grew, by no more
//! than is possible, and the buckets of every histogram sum up to the requests that were completed. A page that does not is dropped after
//! a few times. While a queue cannot be read at one instant nothing is taken, and the next reading covers that time as well.

use std::sync::Arc;

use warmswap_predict::{Feature, LatencyKind, Measure};
use warmswap_telemetry::{BUCKETS, Histogram, Kind, QueueSnapshot, Reader, bucket_bounds};

use super::source::{Due, Effort, Source, Subject, Time};

/// Most queues of a page that is read: each costs a few microseconds.
const QUEUES_MAX: u16 = 256;
/// Requests per second of one backend that nobody reaches.
const REQUESTS_MAX_PER_S: f64 = 1e9;
/// Bytes per second that nobody reaches.
const BYTES_MAX_PER_S: f64 = 1e13;
/// The first search for a page is followed by another one after a second, then ever more rarely.
const SEARCH_MAX_S: f64 = 60.0;
/// A page that stands still for so long may not be the one that is written any more.
const STILL_MAX_S: f64 = 60.0;
/// A page that makes no sense so often is dropped.
const ABSURD_MAX: u32 = 3;
/// A page that could not be read for so long tells nothing about that time: others have been asked meanwhile.
const GAP_MAX_S: f64 = 5.0;
/// Distance of two looks at a ring, at most, and something for a late processor.
const LOOK_MAX_S: f64 = 0.05;
/// Most calls that are let pass after a page that was busy.
const PASSED_MAX: u32 = 16;

/// The telemetry page of one backend, or the lack of it.
#[derive(Debug)]
pub(crate) struct Page {
    subject: Arc<Subject>,
    ended: bool,
    reader: Option<Reader>,
    search: Due,
    search_s: f64,
    time: Time,
    /// The last reading, and when it was.
    last: Vec<QueueSnapshot>,
    read_s: Option<f64>,
    /// When it was seen to change.
    moved_s: f64,
    now: Vec<QueueSnapshot>,
    absurd: u32,
    /// Calls to let pass, and how many it were the last time.
    pass: u32,
    passed: u32,
    /// The last span between two calls: where calls are rare, so are readings.
    span_s: f64,
    /// Requests that the rings say are completed, and how many may be completed and not told of yet.
    rings: Option<(u64, u64)>,
    /// The former at the last reading, and how many more the page has told of since it is read.
    rings_then: Option<u64>,
    ahead: i64,
}

impl Page {
    /// Begins to look for the page of a process.
    pub(crate) fn new(subject: Arc<Subject>) -> Self {
        Page {
            subject,
            ended: false,
            reader: None,
            search: Due::default(),
            search_s: 1.0,
            time: Time::default(),
            last: Vec::new(),
            read_s: None,
            moved_s: 0.0,
            now: Vec::new(),
            absurd: 0,
            pass: 0,
            passed: 0,
            span_s: 0.0,
            rings: None,
            rings_then: None,
            ahead: 0,
        }
    }

    /// What the rings say so far: requests completed, and how many there may be in flight. A page that says otherwise is not believed.
    pub(crate) fn compare(&mut self, completed: u64, in_flight_max: u64) {
        self.rings = Some((completed, in_flight_max));
    }

    /// Whether the rings have seen as many requests completed as the page tells of, in all.
    fn agrees(&mut self, work: &Work, seconds: f64) -> bool {
        let Some((completed, in_flight_max)) = self.rings else { return true };
        let Some(since) = self.rings_then.and_then(|then| completed.checked_sub(then)) else { return true };
        let told: u64 = work.kinds.iter().map(|done| done.completed).fold(0, u64::saturating_add);
        let difference = i128::from(told) - i128::from(since) + i128::from(self.ahead);
        self.ahead = i64::try_from(difference).unwrap_or(i64::MAX);
        // The rings are looked at some milliseconds before or after.
        let late = since as f64 * (LOOK_MAX_S / seconds.max(LOOK_MAX_S));
        self.ahead.unsigned_abs() <= in_flight_max.saturating_add(late as u64)
    }

    /// Whether the page tells of bytes, kinds and the latencies of each kind of the time up to the last call, or will with its next reading: nobody else
    /// is to add theirs.
    pub(crate) fn tells(&self) -> bool {
        self.reader.is_some()
            && self.read_s.is_some_and(|at_s| self.time.now_s() - at_s <= GAP_MAX_S.max(2.0 * self.span_s))
    }

    fn search(&mut self) {
        if !self.search.is_due(self.time) {
            return;
        }
        self.search.in_s(self.time, self.search_s);
        self.search_s = (self.search_s * 2.0).min(SEARCH_MAX_S);
        // One that has no page, or does not let itself be looked into, has none.
        let file = warmswap_telemetry::find_in_process(self.subject.pid).ok().flatten();
        let reader = file.and_then(|file| Reader::open(file).ok()).filter(|page| page.header().queues <= QUEUES_MAX);
        let same = reader.as_ref().map(Reader::header) == self.reader.as_ref().map(Reader::header);
        if !same && !self.subject.has_ended() {
            self.take(reader);
        }
    }

    fn take(&mut self, reader: Option<Reader>) {
        self.reader = reader;
        self.last.clear();
        (self.read_s, self.absurd, self.pass, self.passed) = (None, 0, 0, 0);
    }

    /// The page is no good, and looked for again much later.
    fn drop_page(&mut self) {
        self.ahead = 0;
        self.take(None);
        self.search_s = SEARCH_MAX_S;
        self.search.in_s(self.time, SEARCH_MAX_S);
    }

    /// Reads every queue at one instant each. None: one of them could not be.
    fn read(&mut self) -> Option<()> {
        let reader = self.reader.as_ref()?;
        self.now.clear();
        for index in 0..reader.header().queues {
            match reader.queue(index) {
                Ok(queue) => self.now.push(queue),
                Err(_) => {
                    // Each try costs some hundred microseconds.
                    self.passed = (2 * self.passed + 1).min(PASSED_MAX);
                    self.pass = self.passed;
                    return None;
                }
            }
        }
        self.passed = 0;
        Some(())
    }
}

impl Source for Page {
    fn measure(&mut self, span_s: f64, effort: Effort, into: &mut Measure) {
        self.time.pass(span_s);
        self.span_s = span_s;
        if effort == Effort::Light || self.ended {
            return;
        }
        if self.reader.is_none() || self.time.now_s() - self.moved_s > STILL_MAX_S {
            self.search();
        }
        if self.pass > 0 {
            self.pass -= 1;
            return;
        }
        let seconds = self.time.now_s() - self.read_s.unwrap_or(0.0);
        if (self.read_s.is_some() && seconds <= 0.0) || self.read().is_none() {
            return;
        }
        if self.subject.has_ended() {
            self.ended = true;
            self.take(None);
            return;
        }
        let first = self.read_s.replace(self.time.now_s()).is_none();
        if !first && seconds <= GAP_MAX_S.max(2.0 * self.span_s) {
            let work = Work::between(&self.last, &self.now).filter(|work| work.is_possible_in(seconds));
            match work.filter(|work| self.agrees(work, seconds)) {
                Some(work) => {
                    self.absurd = 0;
                    work.add_to(seconds, into);
                }
                None => self.absurd += 1,
            }
        } else {
            self.ahead = 0;
        }
        self.rings_then = self.rings.map(|(completed, _)| completed);
        if let Some(ns) = age_ns(&self.now, now_ns()) {
            into.note(Feature::Backlog, ns as f64 / 1e3);
        }
        if !self.last.iter().map(|queue| queue.sequence).eq(self.now.iter().map(|queue| queue.sequence)) {
            self.moved_s = self.time.now_s();
        }
        std::mem::swap(&mut self.last, &mut self.now);
        if self.absurd >= ABSURD_MAX {
            self.drop_page();
        }
    }
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

/// How old the oldest last update of a queue is that has requests in flight. One that lies in the future is of another clock.
fn age_ns(queues: &[QueueSnapshot], now_ns: u64) -> Option<u64> {
    let busy = queues.iter().filter(|queue| queue.in_flight > 0);
    busy.filter_map(|queue| now_ns.checked_sub(queue.updated_ns?)).max()
}

/// What a backend did between two readings.
#[derive(Debug)]
struct Work {
    kinds: [Done; Kind::COUNT],
    kicks: u64,
    calls: u64,
    suppressed: u64,
    wakes: u64,
    polls: u64,
    retries: u64,
    malformed: u64,
    all: Histogram,
    reads: Histogram,
    writes: Histogram,
    flushes: Histogram,
}

/// What it did of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    completed: u64,
    errors: u64,
    bytes: u64,
}

/// Adds what a counter has grown by, if it has.
fn grow(sum: &mut u64, last: u64, now: u64) -> Option<()> {
    *sum = sum.checked_add(now.checked_sub(last)?)?;
    Some(())
}

impl Work {
    fn none() -> Self {
        Work {
            kinds: [Done::default(); Kind::COUNT],
            kicks: 0,
            calls: 0,
            suppressed: 0,
            wakes: 0,
            polls: 0,
            retries: 0,
            malformed: 0,
            all: Histogram::default(),
            reads: Histogram::default(),
            writes: Histogram::default(),
            flushes: Histogram::default(),
        }
    }

    /// None if it makes no sense.
    fn between(last: &[QueueSnapshot], now: &[QueueSnapshot]) -> Option<Self> {
        if last.len() != now.len() {
            return None;
        }
        let mut work = Work::none();
        for (last, now) in last.iter().zip(now) {
            if last.sequence != now.sequence {
                work.add_queue(last, now)?;
            }
        }
        Some(work)
    }

    fn add_queue(&mut self, last: &QueueSnapshot, now: &QueueSnapshot) -> Option<()> {
        grow(&mut self.kicks, last.kicks, now.kicks)?;
        grow(&mut self.calls, last.calls_sent, now.calls_sent)?;
        grow(&mut self.suppressed, last.calls_suppressed, now.calls_suppressed)?;
        grow(&mut self.wakes, last.wakes, now.wakes)?;
        grow(&mut self.polls, last.polls, now.polls)?;
        grow(&mut self.retries, last.retries, now.retries)?;
        grow(&mut self.malformed, last.malformed, now.malformed)?;
        for kind in Kind::ALL {
            let (last, now) = (last.kind(kind), now.kind(kind));
            let mut seen = Done::default();
            grow(&mut seen.completed, last.completed, now.completed)?;
            grow(&mut seen.errors, last.errors, now.errors)?;
            grow(&mut seen.bytes, last.bytes, now.bytes)?;
            if seen.errors > seen.completed || (seen.completed == seen.errors && seen.bytes > 0) {
                return None;
            }
            if seen.completed > 0 {
                self.add_latencies(kind, seen.completed, &last.latency, &now.latency)?;
            }
            let sum = &mut self.kinds[kind as usize];
            sum.completed = sum.completed.checked_add(seen.completed)?;
            sum.errors = sum.errors.checked_add(seen.errors)?;
            sum.bytes = sum.bytes.checked_add(seen.bytes)?;
        }
        Some(())
    }

    fn add_latencies(&mut self, kind: Kind, completed: u64, last: &Histogram, now: &Histogram) -> Option<()> {
        let Work { all, reads, writes, flushes, .. } = self;
        let mut of_kind = match kind {
            Kind::Read => Some(reads),
            Kind::Write => Some(writes),
            Kind::Flush => Some(flushes),
            Kind::Discard | Kind::WriteZeroes | Kind::GetId | Kind::Other => None,
        };
        let mut left = completed;
        for bucket in 0..BUCKETS {
            let count = now.counts[bucket].checked_sub(last.counts[bucket])?;
            if count > 0 {
                left = left.checked_sub(count)?;
                all.counts[bucket] = all.counts[bucket].checked_add(count)?;
                if let Some(of_kind) = &mut of_kind {
                    of_kind.counts[bucket] = of_kind.counts[bucket].checked_add(count)?;
                }
            }
        }
        (left == 0).then_some(())
    }

    fn sum(&self, kinds: &[Kind], of: impl Fn(&Done) -> u64) -> f64 {
        kinds.iter().map(|kind| of(&self.kinds[*kind as usize]) as f64).sum()
    }

    fn is_possible_in(&self, seconds: f64) -> bool {
        let events = [self.kicks, self.calls, self.suppressed, self.wakes, self.polls, self.retries, self.malformed];
        let events =
            events.into_iter().fold(self.sum(&Kind::ALL, |done| done.completed), |most, it| most.max(it as f64));
        // What was done at once, while nobody looked.
        let seconds = seconds.max(0.01);
        events <= REQUESTS_MAX_PER_S * seconds && self.sum(&MOVING, |done| done.bytes) <= BYTES_MAX_PER_S * seconds
    }

    fn add_to(&self, seconds: f64, into: &mut Measure) {
        let completed = |kinds: &[Kind]| self.sum(kinds, |done| done.completed);
        let (all, errors) = (completed(&Kind::ALL), self.sum(&Kind::ALL, |done| done.errors));
        let bytes = self.sum(&MOVING, |done| done.bytes);
        into.add(Feature::Bytes, bytes, seconds);
        into.add(Feature::Size, bytes, self.sum(&MOVING, |done| done.completed - done.errors));
        into.add(Feature::ReadShare, completed(&[Kind::Read]), all);
        into.add(Feature::WriteShare, completed(&[Kind::Write]), all);
        into.add(Feature::FlushShare, completed(&[Kind::Flush]), all);
        into.add(Feature::DiscardShare, completed(&[Kind::Discard, Kind::WriteZeroes]), all);
        into.add(Feature::ErrorShare, errors, all);
        into.add(Feature::Errors, errors, seconds);
        let counts = [
            (Feature::Retries, self.retries),
            (Feature::Malformed, self.malformed),
            (Feature::Kicks, self.kicks),
            (Feature::Calls, self.calls),
            (Feature::CallsSuppressed, self.suppressed),
            (Feature::Wakes, self.wakes),
            (Feature::Polls, self.polls),
        ];
        for (feature, count) in counts {
            into.add(feature, count as f64, seconds);
        }
        let kinds = [
            // What a request waits in the ring a page does not know: of all requests the rings and probes tell.
            (LatencyKind::Reads, &self.reads),
            (LatencyKind::Writes, &self.writes),
            (LatencyKind::Flushes, &self.flushes),
        ];
        for (kind, latencies) in kinds {
            into.sampled(kind, latencies, u64::try_from(latencies.total()).unwrap_or(u64::MAX));
        }
        if let Some(ns) = longest_ns(&self.all) {
            into.note(Feature::LatencyMax, ns as f64 / 1e3);
        }
    }
}

/// What moves bytes of the image.
const MOVING: [Kind; 2] = [Kind::Read, Kind::Write];

/// The longest latency can be so long; of the last bucket, which has no end, it is at least that.
pub(super) fn longest_ns(latencies: &Histogram) -> Option<u64> {
    let bucket = latencies.counts.iter().rposition(|count| *count > 0)?;
    let bounds = bucket_bounds(bucket);
    Some(if bucket == BUCKETS - 1 { *bounds.start() } else { *bounds.end() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::process::tests::{Told, subject_of};
    use proptest::prelude::*;
    use std::os::fd::{AsFd, AsRawFd};
    use warmswap_telemetry::{Identity, QueueWriter};

    const IDENTITY: Identity = Identity { device_type: 2, instance: 0, started_ns: 0 };

    /// A page of this process, and a source that has found it.
    fn found(queues: u16) -> (warmswap_telemetry::Page, Vec<QueueWriter>, Page) {
        let (page, writers) = warmswap_telemetry::Page::create(queues, IDENTITY).expect("a page");
        let mut source = Page::new(subject_of(std::process::id()));
        let file = std::fs::File::open(format!("/proc/self/fd/{}", page.as_fd().as_raw_fd())).expect("our own");
        source.take(Some(Reader::open(file.into()).expect("a page")));
        (page, writers, source)
    }

    fn measured(page: &mut Page, span_s: f64, effort: Effort) -> Measure {
        let mut measure = Measure::default();
        page.measure(span_s, effort, &mut measure);
        measure
    }

    fn snapshots(queues: u16) -> Vec<QueueSnapshot> {
        let (_page, _writers, mut source) = found(queues);
        source.read().expect("nobody writes");
        source.now
    }

    #[test]
    fn what_the_page_counts_is_measured_exactly_over_all_the_time_since() {
        let (_page, mut writers, mut page) = found(2);
        assert!(!page.tells());
        writers[0].update(1).completed(Kind::Read, 4096, 1_000);
        assert_eq!(measured(&mut page, 1.0, Effort::Full), Measure::default(), "the first reading");
        assert!(page.tells());
        for _ in 0..3 {
            writers[0].update(2).completed(Kind::Read, 4096, 1_100);
        }
        assert_eq!(measured(&mut page, 1.0, Effort::Light), Measure::default());
        let mut update = writers[1].update(now_ns());
        update.failed(Kind::Write, 1_000_000);
        update.completed(Kind::Write, 8192, 2_000_000);
        update.completed(Kind::Flush, 0, 1 << 40);
        update.completed(Kind::Discard, 1 << 40, 300);
        (0..4).for_each(|_| update.kick());
        (0..3).for_each(|_| update.call(true));
        (0..5).for_each(|_| update.call(false));
        update.woke();
        update.polled();
        update.retried(7);
        update.malformed();
        update.in_flight(1, Some(1));
        drop(update);
        let measure = measured(&mut page, 1.0, Effort::Full);
        let value = |feature: Feature| measure.value(feature).unwrap_or_else(|| panic!("{}", feature.name()));
        let exact = [
            (Feature::Bytes, (3.0 * 4096.0 + 8192.0) / 2.0),
            (Feature::Size, 5120.0),
            (Feature::ReadShare, 3.0 / 7.0),
            (Feature::WriteShare, 2.0 / 7.0),
            (Feature::FlushShare, 1.0 / 7.0),
            (Feature::DiscardShare, 1.0 / 7.0),
            (Feature::ErrorShare, 1.0 / 7.0),
            (Feature::Errors, 0.5),
            (Feature::Retries, 3.5),
            (Feature::Malformed, 0.5),
            (Feature::Kicks, 2.0),
            (Feature::Calls, 1.5),
            (Feature::CallsSuppressed, 2.5),
            (Feature::Wakes, 0.5),
            (Feature::Polls, 0.5),
            (Feature::LatencySamples, 0.0),
            (Feature::LatencyMax, (1_u64 << 37) as f64 / 1e3),
        ];
        for (feature, expected) in exact {
            assert_eq!(value(feature), expected, "{}", feature.name());
        }
        assert!((1.024..1.280).contains(&value(Feature::ReadP50)), "{}", value(Feature::ReadP50));
        assert!((1_835.0..2_100.0).contains(&value(Feature::WriteP99)), "{}", value(Feature::WriteP99));
        assert!((0.0..60e6).contains(&value(Feature::Backlog)));
        writers[1].update(now_ns()).in_flight(0, None);
        let idle = measured(&mut page, 1.0, Effort::Full);
        let values = [Feature::Bytes, Feature::Backlog, Feature::LatencyP50, Feature::ReadShare];
        assert_eq!(values.map(|feature| idle.value(feature)), [Some(0.0), None, None, None]);
    }

    #[test]
    fn a_queue_that_cannot_be_read_is_made_up_for() {
        let (_page, mut writers, mut page) = found(2);
        let _first = measured(&mut page, 1.0, Effort::Full);
        writers[1].update(1).completed(Kind::Read, 1_000, 1_000);
        let mut update = writers[0].update(1);
        update.completed(Kind::Read, 3_000, 1_000);
        assert_eq!(measured(&mut page, 1.0, Effort::Full), Measure::default(), "in the middle of an update");
        assert!(page.tells(), "they will come");
        drop(update);
        assert_eq!(measured(&mut page, 1.0, Effort::Full), Measure::default(), "it is let alone for a while");
        let measure = measured(&mut page, 2.0, Effort::Full);
        assert_eq!(measure.value(Feature::Bytes), Some(1_000.0), "4,000 bytes in 4 seconds");
        // After a longer time others have told of it.
        for _ in 0..7 {
            assert_eq!(measured(&mut page, 1.0, Effort::Light), Measure::default());
        }
        assert!(!page.tells());
        writers[0].update(1).completed(Kind::Read, 5_000, 1_000);
        assert_eq!(measured(&mut page, 1.0, Effort::Full), Measure::default());
        assert!(page.tells());
        assert_eq!(measured(&mut page, 1.0, Effort::Full).value(Feature::Bytes), Some(0.0));
    }

    #[test]
    fn a_page_that_makes_no_sense_is_missing_and_then_dropped() {
        let changes: [fn(&mut QueueSnapshot); 8] = [
            |queue| queue.kicks = 0,
            |queue| queue.polls = u64::MAX,
            |queue| queue.kinds[0].completed = 2,
            |queue| queue.kinds[0].errors = 4,
            |queue| queue.kinds[0].latency.counts[3] = 9,
            |queue| queue.kinds[0].latency.counts[3] = 0,
            |queue| queue.kinds[0].bytes = u64::MAX,
            |queue| queue.kinds[1].bytes = 1,
        ];
        let mut last = snapshots(1);
        last[0].kicks = 1;
        let mut now = last.clone();
        now[0].sequence += 2;
        now[0].kinds[0].completed = 1;
        now[0].kinds[0].latency.counts[3] = 1;
        assert!(Work::between(&last, &now).is_some_and(|work| work.is_possible_in(1.0)));
        for (number, change) in changes.into_iter().enumerate() {
            let mut wild = now.clone();
            change(&mut wild[0]);
            assert!(!Work::between(&last, &wild).is_some_and(|work| work.is_possible_in(1.0)), "change {number}");
        }
        let (_page, mut writers, mut page) = found(1);
        for _ in 0..=ABSURD_MAX {
            assert!(page.reader.is_some());
            let measure = measured(&mut page, 1.0, Effort::Full);
            assert_eq!(measure.value(Feature::Bytes), None);
            writers[0].update(1).retried(u64::MAX / 8);
        }
        assert!(page.reader.is_none() && !page.tells());
    }

    #[test]
    fn a_page_that_tells_of_other_requests_than_the_rings_is_dropped() {
        // Honest, looked at a little before or after the rings: it is believed, however long it goes on.
        let (_page, mut writers, mut page) = found(1);
        let mut completed = 0_u64;
        page.compare(0, 8);
        let _first = measured(&mut page, 1.0, Effort::Full);
        for round in 0..50_u64 {
            (0..100).for_each(|_| writers[0].update(1).completed(Kind::Read, 1_000, 512));
            completed += 100;
            page.compare(completed - [0, 5, 8, 2][round as usize % 4], 8);
            assert!(measured(&mut page, 1.0, Effort::Full).value(Feature::Bytes).is_some(), "round {round}");
        }
        // One that stands still while requests are completed, and one that makes them up.
        for (told, seen) in [(0_u64, 100_u64), (100, 0)] {
            let (_page, mut writers, mut page) = found(1);
            page.compare(0, 8);
            let _first = measured(&mut page, 1.0, Effort::Full);
            for round in 1..=u64::from(ABSURD_MAX) {
                assert!(page.tells(), "round {round}");
                (0..told).for_each(|_| writers[0].update(1).completed(Kind::Read, 1_000, 512));
                page.compare(seen * round, 8);
                assert_eq!(measured(&mut page, 1.0, Effort::Full).value(Feature::Bytes), None);
            }
            assert!(!page.tells(), "{told} told, {seen} seen");
        }
    }

    #[test]
    fn the_page_of_a_backend_is_found_in_it_and_is_gone_with_it() {
        let mut child = Told::start();
        let mut page = Page::new(subject_of(child.pid()));
        assert_eq!(measured(&mut page, 0.1, Effort::Full), Measure::default());
        assert!(!page.tells(), "it has none yet");
        child.tell("page", 1);
        assert_eq!(measured(&mut page, 0.1, Effort::Full), Measure::default());
        assert!(!page.tells(), "it is not searched for at every call");
        let _first = measured(&mut page, 1.0, Effort::Full);
        assert!(page.tells());
        child.tell("serve", 100);
        let measure = measured(&mut page, 2.0, Effort::Full);
        assert_eq!(measure.value(Feature::Bytes), Some(100.0 * 512.0 / 2.0));
        assert!(measure.value(Feature::ReadP50).is_some_and(|us| us > 0.0));
        child.tell("serve", 100);
        child.kill();
        assert_eq!(measured(&mut page, 1.0, Effort::Full), Measure::default());
        assert!(!page.tells());
        assert_eq!(measured(&mut page, 100.0, Effort::Deep), Measure::default());
    }

    #[test]
    fn the_page_that_a_backend_makes_in_place_of_another_is_found() {
        let mut child = Told::start();
        child.tell("page", 1);
        let mut page = Page::new(subject_of(child.pid()));
        let _first = measured(&mut page, 1.0, Effort::Full);
        child.tell("page", 2);
        child.tell("serve", 9);
        assert_eq!(measured(&mut page, 1.0, Effort::Full).value(Feature::Bytes), Some(0.0), "the old one");
        for _ in 0..10 {
            let _still = measured(&mut page, STILL_MAX_S, Effort::Full);
        }
        child.tell("serve", 10);
        assert_eq!(measured(&mut page, 1.0, Effort::Full).value(Feature::Bytes), Some(5_120.0));
    }

    #[test]
    fn an_age_in_the_future_is_none() {
        let mut queues = snapshots(2);
        assert_eq!(age_ns(&queues, 100), None, "nothing in flight");
        queues.iter_mut().for_each(|queue| queue.in_flight = 1);
        assert_eq!(age_ns(&queues, 100), None, "never updated");
        (queues[0].updated_ns, queues[1].updated_ns) = (Some(40), Some(101));
        assert_eq!(age_ns(&queues, 100), Some(60));
    }

    proptest! {
        #[test]
        fn no_counters_make_it_panic(wild in proptest::collection::vec((0..20_usize, 0..BUCKETS, any::<u64>(), 0..64_u32), 0..20)) {
            let last = snapshots(1);
            let mut now = last.clone();
            now[0].sequence += 2;
            for (place, bucket, value, shift) in wild {
                let value = value >> shift;
                let queue = &mut now[0];
                match place {
                    0 => queue.kicks = value,
                    1 => queue.retries = value,
                    2 => queue.updated_ns = Some(value),
                    3 => queue.in_flight = value,
                    4..10 => queue.kinds[place - 4].completed = value,
                    10..14 => queue.kinds[place - 10].bytes = value,
                    14..16 => queue.kinds[place - 14].errors = value,
                    _ => queue.kinds[place - 16].latency.counts[bucket] = value,
                }
            }
            let mut measure = Measure::default();
            for (one, two) in [(&last, &now), (&now, &last), (&now, &now)] {
                if let Some(work) = Work::between(one, two).filter(|work| work.is_possible_in(0.1)) {
                    work.add_to(0.1, &mut measure);
                }
                let _any = age_ns(two, 5);
            }
        }
    }
}
