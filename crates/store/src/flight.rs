//! The flight recorder: the last minutes of one device, tick by tick.

use std::collections::VecDeque;

use warmswap_predict::Record;

use crate::codec::{Decoder, ENTRY_MAX, RUN_MAX, State};
use crate::idle::idle_like;
use crate::recording::Recording;

/// Most bytes a recorder takes, unless it is told otherwise.
pub const FLIGHT_BYTES_MAX: usize = 48 * 1024;
/// How long it remembers, unless it is told otherwise: two minutes.
pub const FLIGHT_KEEP_NS: u64 = 120_000_000_000;
/// It grows by this much.
const STEP: usize = 4 * 1024;

/// The last minutes of one device, tick by tick, in bounded bytes: where more happens than has room, the oldest ticks go.
///
/// Values are rounded to nine significant bits. Of ticks that are [idle](idle_like) only the first is kept, and how many there were; their
/// times are then evenly spread.
#[derive(Clone, Debug)]
pub struct FlightRecorder {
    keep_ns: u64,
    /// Room for entries.
    room: usize,
    bytes: VecDeque<u8>,
    /// Before the first entry.
    oldest: State,
    /// After the last entry.
    newest: State,
    /// The last tick that has an entry of its own.
    anchor: Option<Record>,
    /// Idle ticks since then without an entry, and the end of the last one.
    run: u64,
    end_unix_ns: u64,
    entry: Vec<u8>,
}

impl Default for FlightRecorder {
    fn default() -> Self {
        FlightRecorder::new(FLIGHT_KEEP_NS, FLIGHT_BYTES_MAX)
    }
}

impl FlightRecorder {
    /// Remembers ticks for `keep_ns`, in `bytes_max` in all. The least that it takes is a few KiB.
    #[must_use]
    pub fn new(keep_ns: u64, bytes_max: usize) -> Self {
        let room = bytes_max.saturating_sub(size_of::<FlightRecorder>() + ENTRY_MAX).max(2 * ENTRY_MAX);
        FlightRecorder {
            keep_ns,
            room,
            bytes: VecDeque::new(),
            oldest: State::default(),
            newest: State::default(),
            anchor: None,
            run: 0,
            end_unix_ns: 0,
            entry: Vec::with_capacity(ENTRY_MAX),
        }
    }

    /// Takes a tick.
    pub fn push(&mut self, tick: &Record) {
        if self.goes_on_idle(tick) {
            self.run += 1;
            self.end_unix_ns = tick.end_unix_ns;
        } else {
            self.end_run();
            self.newest.put(tick, &mut self.entry);
            self.keep_entry();
            self.anchor = Some(*tick);
            self.end_unix_ns = tick.end_unix_ns;
        }
        if self.run == RUN_MAX {
            self.end_run();
        }
        let since = self.since();
        while !self.bytes.is_empty() && self.first_entry().end_unix_ns() < since {
            self.drop_first();
        }
    }

    fn goes_on_idle(&self, tick: &Record) -> bool {
        let Some(anchor) = &self.anchor else { return false };
        let next = self.newest.record().number.wrapping_add(self.run + 1);
        let (span, apart) = (u64::from(anchor.span_us) * 1_000, tick.end_unix_ns.wrapping_sub(self.end_unix_ns));
        // Ticks that are spread evenly must have come so.
        tick.number == next && apart.abs_diff(span) <= span / 2 && idle_like(anchor, tick)
    }

    /// Gives the idle ticks so far an entry.
    fn end_run(&mut self) {
        if self.run > 0 {
            self.newest.put_run(self.run, self.end_unix_ns, &mut self.entry);
            self.run = 0;
            self.keep_entry();
        }
    }

    fn keep_entry(&mut self) {
        while self.bytes.len() + self.entry.len() > self.room {
            self.drop_first();
        }
        let wanted = self.bytes.len() + self.entry.len();
        if wanted > self.bytes.capacity() {
            let more = wanted.next_multiple_of(STEP).min(self.room) - self.bytes.len();
            self.bytes.reserve_exact(more);
        }
        self.bytes.extend(self.entry.drain(..));
    }

    /// The state after the first entry.
    fn first_entry(&self) -> State {
        let mut state = self.oldest.clone();
        // What is in here was written here.
        let _entry = state.take(&mut self.bytes.iter().copied());
        state
    }

    fn drop_first(&mut self) {
        let mut rest = self.bytes.iter().copied();
        let had = rest.len();
        let _entry = self.oldest.take(&mut rest);
        let used = had - rest.len();
        self.bytes.drain(..used);
    }

    /// What ended before is not remembered.
    fn since(&self) -> u64 {
        self.end_unix_ns.saturating_sub(self.keep_ns)
    }

    /// The ticks it remembers, the oldest first. The oldest may be part of a run that began a little earlier.
    pub fn ticks(&self) -> impl Iterator<Item = Record> + '_ {
        let ticks = Decoder::new(self.oldest.clone(), self.bytes.iter().copied().chain(self.open_run()));
        ticks.map_while(Result::ok)
    }

    /// The entry of the idle ticks that have none yet.
    fn open_run(&self) -> Vec<u8> {
        let mut run = Vec::new();
        if self.run > 0 {
            self.newest.clone().put_run(self.run, self.end_unix_ns, &mut run);
        }
        run
    }

    /// What it remembers, to be kept: `reason` says why, `unix_ns` when.
    #[must_use]
    pub fn freeze(&self, reason: &str, unix_ns: u64) -> Recording {
        let count = u32::try_from(self.ticks().count()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(self.bytes.len() + ENTRY_MAX);
        bytes.extend(&self.bytes);
        bytes.extend(self.open_run());
        Recording::new(reason, unix_ns, count, self.oldest.clone(), bytes)
    }

    /// Bytes it takes now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of::<FlightRecorder>() + self.bytes.capacity() + self.entry.capacity()
    }
}
