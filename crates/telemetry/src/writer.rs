//! Updates of one queue, as the thread that serves it makes them: a few plain loads and stores each, for they run with
//! every request. There is one writer, so adding is a load and a store and needs no locked instruction.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::kind::Kind;
use crate::layout::{kind as block, kind_word, section};
use crate::mapping::{Mapping, Section};
use crate::sequence;
use warmswap_histogram::bucket_of;

/// The one writer of the section of one queue. It keeps the mapping alive, and moves to the thread that serves the
/// queue.
#[derive(Debug)]
pub struct QueueWriter {
    mapping: Arc<Mapping>,
    queue: u16,
}

impl QueueWriter {
    pub(crate) fn new(mapping: Arc<Mapping>, queue: u16) -> Self {
        QueueWriter { mapping, queue }
    }

    /// Number of the queue.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Begins an update at `now_ns` (`CLOCK_MONOTONIC`). Readers see all of it or nothing, once it is dropped.
    ///
    /// Until then no reader gets a snapshot of this queue: nothing that waits belongs inside. A reader needs about a
    /// microsecond between two updates, so one for a batch of requests is better than one for each. Where they never
    /// are so far apart, a reader finds the queue busy and has to do with values of nearly one instant.
    #[inline]
    pub fn update(&mut self, now_ns: u64) -> Update<'_> {
        let section = self.mapping.section(self.queue);
        let update = Update { section, even: sequence::begin(&section[section::SEQUENCE]) };
        update.set(section::UPDATED_NS, now_ns);
        update
    }
}

/// An update under way. Dropping it makes it visible.
#[derive(Debug)]
#[must_use = "an update without changes only tells the time"]
pub struct Update<'a> {
    section: &'a Section,
    even: u64,
}

impl Update<'_> {
    #[inline]
    fn set(&self, word: usize, value: u64) {
        self.section[word].store(value, Relaxed);
    }

    #[inline]
    fn add(&self, word: usize, more: u64) {
        self.set(word, self.section[word].load(Relaxed).wrapping_add(more));
    }

    /// A request was taken from the ring.
    #[inline]
    pub fn submitted(&mut self, kind: Kind) {
        self.add(kind_word(kind) + block::SUBMITTED, 1);
    }

    /// A request was answered well, after it moved `bytes` bytes in `latency_ns`.
    #[inline]
    pub fn completed(&mut self, kind: Kind, bytes: u64, latency_ns: u64) {
        self.add(kind_word(kind) + block::BYTES, bytes);
        self.answered(kind, latency_ns);
    }

    /// A request was answered with an error.
    #[inline]
    pub fn failed(&mut self, kind: Kind, latency_ns: u64) {
        self.add(kind_word(kind) + block::ERRORS, 1);
        self.answered(kind, latency_ns);
    }

    #[inline]
    fn answered(&self, kind: Kind, latency_ns: u64) {
        self.add(kind_word(kind) + block::COMPLETED, 1);
        self.add(kind_word(kind) + block::BUCKETS + bucket_of(latency_ns), 1);
    }

    /// I/O came back short or interrupted `times` times and was gone on with.
    #[inline]
    pub fn retried(&mut self, times: u64) {
        self.add(section::RETRIES, times);
    }

    /// A request was too broken to have a kind. It is counted nowhere else.
    #[inline]
    pub fn malformed(&mut self) {
        self.add(section::MALFORMED, 1);
    }

    /// A kick was seen.
    #[inline]
    pub fn kick(&mut self) {
        self.add(section::KICKS, 1);
    }

    /// A call was due, and was sent or not because the driver asked for none.
    #[inline]
    pub fn call(&mut self, sent: bool) {
        self.add(if sent { section::CALLS_SENT } else { section::CALLS_SUPPRESSED }, 1);
    }

    /// The thread returned from sleep.
    #[inline]
    pub fn woke(&mut self) {
        self.add(section::WAKES, 1);
    }

    /// A poll of the ring found work.
    #[inline]
    pub fn polled(&mut self) {
        self.add(section::POLLS, 1);
    }

    /// How many requests are in flight now, and when the oldest of them was submitted (`CLOCK_MONOTONIC`).
    #[inline]
    pub fn in_flight(&mut self, count: u64, oldest_ns: Option<u64>) {
        self.set(section::IN_FLIGHT, count);
        self.set(section::OLDEST_NS, oldest_ns.unwrap_or(0));
    }

    /// Whether the ring is broken and no longer served.
    #[inline]
    pub fn broken(&mut self, broken: bool) {
        self.set(section::BROKEN, broken.into());
    }
}

impl Drop for Update<'_> {
    #[inline]
    fn drop(&mut self) {
        sequence::end(&self.section[section::SEQUENCE], self.even);
    }
}
