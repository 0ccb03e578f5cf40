//! The observer: which requests of a split ring are in flight, told from the ring alone.
//!
//! Every submission is an entry of the available ring and every completion one of the used ring, so
//! `in_flight(head) = submissions(head) - completions(head)`. Following both rings entry by entry keeps that count exact, for
//! any backend, without its help. One look at two frozen rings is never enough: nothing orders the two rings against each
//! other, and equal counts prove nothing.
//!
//! ```text
//!            gap, silence, torn read
//!   Exact ───────────────────────────▶ Inexact { unknown: not yet counted }
//!     ▲                                     │ a cut: unknown = avail.idx - used.idx
//!     │ unknown reaches 0                   ▼
//!     └──────────────────────────── Inexact { unknown: n }   (each completion of a head that was not
//!                                                              submitted since the cut takes one off)
//!   any state ── impossible entry ──▶ Violated (until the ring is started again)
//! ```
//!
//! An observation reads `used.idx`, then `avail.idx`, applies the new entries of both, and re-reads both: if either moved so
//! far that a slot just read may have been overwritten, the observation is torn. If `used.idx` has not moved when it is read
//! again after `avail.idx`, the observation is a *cut*: every head then has a balance of 0 or 1.

use serde::{Deserialize, Serialize};
use warmswap_wire::ring::Layout;
use warmswap_zoo::{Animal, loose};

use crate::memory::GuestMemory;
use crate::time::Nanos;

/// Longest silence between two observations after which the sixteen-bit indices may have gone all the way round unnoticed:
/// 65 536 entries in this time are 1.3 million requests per second.
pub const SILENCE_MAX: Nanos = Nanos::from_millis(50);

/// A latency of so many times between looks is told by them: two of them are uncertain.
const LONG_WIDTHS: u64 = 4;

/// A submission is known precisely if the time in which it can have been made is no longer.
const PRECISE_MAX: Nanos = Nanos::from_micros(50);

/// Tries to find an instant without a completion.
const CUT_TRIES: u32 = 16;

/// How far the observer's knowledge goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// The in-flight set is known.
    Exact,
    /// Something was missed; the set is unknown until the next resynchronisation.
    Inexact(Gap),
    /// The ring holds something that cannot be; nothing is known any more.
    Violated(Violation),
}

impl Knowledge {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Knowledge::Exact => "exact",
            Knowledge::Inexact(_) => "inexact",
            Knowledge::Violated(_) => "violated",
        }
    }
}

/// Why knowledge was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gap {
    /// More entries passed between two observations than the rings still hold.
    Overrun {
        /// Entries of the available ring that passed.
        avail: u16,
        /// Entries of the used ring that passed.
        used: u16,
    },
    /// So much time passed that the indices may have wrapped unnoticed.
    Silence,
    /// The entries that were followed do not add up to what the indices say.
    Mismatch,
}

/// What cannot be in a ring that driver and device use as they must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Violation {
    /// A head beyond the ring's size.
    HeadOutOfRange {
        /// The head found.
        head: u32,
    },
    /// `avail.idx - used.idx` exceeds the ring's size.
    TooManyOutstanding {
        /// `avail.idx`.
        avail_idx: u16,
        /// `used.idx`.
        used_idx: u16,
    },
    /// A head was completed that was not in flight.
    CompletedTwice {
        /// The head.
        head: u16,
    },
    /// A head is in flight twice.
    SubmittedTwice {
        /// The head.
        head: u16,
    },
    /// The guest's memory behind the ring is gone (the VMM truncated it).
    MemoryGone,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Violation::HeadOutOfRange { head } => write!(f, "the ring names head {head}, which is beyond its size"),
            Violation::TooManyOutstanding { avail_idx, used_idx } => {
                write!(f, "avail.idx {avail_idx} is further ahead of used.idx {used_idx} than the ring is long")
            }
            Violation::CompletedTwice { head } => write!(f, "head {head} was completed without being in flight"),
            Violation::SubmittedTwice { head } => write!(f, "head {head} is in flight twice"),
            Violation::MemoryGone => f.write_str("the guest memory that holds the ring is gone"),
        }
    }
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Gap::Overrun { avail, used } => {
                write!(f, "{avail} submissions and {used} completions passed between two observations")
            }
            Gap::Mismatch => f.write_str("the entries that were followed do not add up to what the indices say"),
            Gap::Silence => f.write_str("the ring was not observed for so long that its indices may have wrapped"),
        }
    }
}

/// What one observation saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// New entries of the available ring.
    pub submitted: u16,
    /// New entries of the used ring.
    pub completed: u16,
    /// `avail.idx - used.idx` as read.
    pub outstanding: u16,
    /// Knowledge was lost in this observation.
    pub lost: Option<Gap>,
    /// Knowledge came back in this observation.
    pub regained: bool,
}

/// Follows one split ring.
#[derive(Clone, Debug)]
pub struct Observer {
    layout: Layout,
    avail_seen: u16,
    used_seen: u16,
    /// Submissions minus completions since the anchor, per head.
    balance: Vec<i16>,
    /// Number of the last submission, per head: the order in which survivors are replayed.
    submission: Vec<u64>,
    submissions: u64,
    completions: u64,
    /// Heads whose balance is neither 0 nor 1; none at a cut.
    odd: u16,
    /// Sum of all balances.
    sum: u32,
    /// Requests in flight whose heads are not known; `None` until a cut has counted them.
    unknown: Option<u16>,
    gap: Option<Gap>,
    violation: Option<Violation>,
    observed_at: Nanos,
    /// What both rings held when the ring came to rest.
    rest: Option<Rest>,
    times: Times,
    /// Tells it from any other that ever follows the same ring.
    born: u64,
    /// How often it has looked, or was told of something: what it knows is the later, the more.
    looks: u64,
    unnoted: notes::Unnoted,
}

/// When requests were submitted, and what came of it: as well as looks tell.
#[derive(Clone, Debug)]
struct Times {
    /// Middle of the time in which the request in flight was submitted, per head.
    submitted: Vec<Nanos>,
    /// The look in which it was seen first: it was submitted before.
    seen: Vec<Nanos>,
    /// Its time is known as well as a kick tells it.
    precise: Vec<bool>,
    /// Everything new in this look happened between these two.
    from: Nanos,
    to: Nanos,
    /// The head that has been in flight longest, and the number of its submission.
    oldest: Option<(u16, u64)>,
    /// Latencies since they were taken last.
    long: Vec<Nanos>,
    /// The same of requests whose submission is known precisely.
    woken: Vec<Nanos>,
}

impl Times {
    fn middle(&self) -> Nanos {
        Nanos(self.from.0 / 2 + self.to.0 / 2)
    }

    fn width(&self) -> Nanos {
        self.to.since(self.from)
    }

    /// From here on a latency is told well, and none is missed.
    fn long_floor(&self) -> Nanos {
        Nanos(self.width().0.saturating_mul(LONG_WIDTHS))
    }
}

/// The slots of both rings, and where their indices stood.
#[derive(Clone, Debug)]
struct Rest {
    avail_idx: u16,
    used_idx: u16,
    avail: Vec<u16>,
    used: Vec<u32>,
}

impl Observer {
    /// An observer of a ring that is about to be started at index `start`: what lies in `[start, avail.idx)` is in flight from
    /// the backend's first look on, and everything before has been completed.
    #[must_use]
    pub fn new(layout: Layout, start: u16, now: Nanos) -> Self {
        Observer {
            layout,
            avail_seen: start,
            used_seen: start,
            balance: vec![0; usize::from(layout.size())],
            submission: vec![0; usize::from(layout.size())],
            submissions: 0,
            completions: 0,
            odd: 0,
            sum: 0,
            unknown: Some(0),
            gap: None,
            violation: None,
            observed_at: now,
            rest: None,
            times: Times {
                submitted: vec![now; usize::from(layout.size())],
                seen: vec![now; usize::from(layout.size())],
                precise: vec![false; usize::from(layout.size())],
                from: now,
                to: now,
                oldest: None,
                long: Vec::new(),
                woken: Vec::new(),
            },
            born: now.0,
            looks: 0,
            unnoted: notes::Unnoted::default(),
        }
    }

    /// How far knowledge goes.
    #[must_use]
    pub fn knowledge(&self) -> Knowledge {
        match (self.violation, self.gap) {
            (Some(violation), _) => Knowledge::Violated(violation),
            (None, Some(gap)) if !loose(Animal::InexactBelieved) => Knowledge::Inexact(gap),
            (None, _) => Knowledge::Exact,
        }
    }

    /// Size and offsets of the ring.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// `avail.idx` at the last observation.
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        self.avail_seen
    }

    /// `used.idx` at the last observation.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.used_seen
    }

    /// Requests in flight at the last observation.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.avail_seen.wrapping_sub(self.used_seen)
    }

    /// Requests seen submitted since the start.
    #[must_use]
    pub fn submissions(&self) -> u64 {
        self.submissions
    }

    /// Whether a `used.idx` of zero is where this ring has got to since the last look, and not where another one begins. Nothing can have
    /// been completed but what was in flight then, for nobody submits to a ring that is stopped; and `avail.idx` has gone on, if at all.
    pub(crate) fn has_wrapped_to_zero(&self, avail: u16) -> bool {
        let got_there = match self.used_seen {
            0 => self.completions > 0,
            used => 0_u16.wrapping_sub(used) <= self.outstanding(),
        };
        got_there && avail.wrapping_sub(self.avail_seen) <= self.layout.size()
    }

    /// Requests seen completed since the start.
    #[must_use]
    pub fn completions(&self) -> u64 {
        self.completions
    }

    /// Entries that may pass between two observations where nothing else bounds them. Both sides write slots ahead of the index they
    /// publish: Linux and libvhost-user one, others a batch (DPDK's driver 32, our own back-end 16). As many are kept as distance, for what
    /// was overwritten ahead would be taken for what was there: a quarter of the ring.
    fn reach(&self) -> u16 {
        self.layout.size() - self.ahead()
    }

    /// Slots that may be written ahead of the index.
    fn ahead(&self) -> u16 {
        (self.layout.size() / if loose(Animal::WrittenAheadIgnored) { 16 } else { 4 }).max(1)
    }

    /// Whether a slot from `avail_from` or `used_from` on may have been overwritten, by indices that were read after the slots.
    ///
    /// Entry `i` of the available ring is overwritten by entry `i + size`, which needs a free head, so what lies from `used.idx` on is
    /// intact however much of it there is. Entry `i` of the used ring is overwritten by entry `i + size`, which must have been
    /// submitted, so it is intact while `avail.idx` is not beyond that.
    fn overtaken(&self, avail_from: u16, used_from: u16, avail: u16, used: u16) -> bool {
        let submitted = avail.wrapping_sub(avail_from);
        let all_owed = submitted <= avail.wrapping_sub(used);
        let none_ahead = avail.wrapping_sub(used_from) <= self.layout.size();
        let overtaken =
            (submitted > self.reach() && !all_owed) || (used.wrapping_sub(used_from) > self.reach() && !none_ahead);
        overtaken && !loose(Animal::OverrunIgnored)
    }

    /// Whether somebody who writes half a ring ahead may have overwritten a slot that was read. One that holds what cannot be is no proof
    /// of a broken ring then.
    fn may_be_overwritten(&self, avail_from: u16, used_from: u16, avail: u16, used: u16) -> bool {
        let half = self.layout.size() / 2;
        let (submitted, completed) = (avail.wrapping_sub(avail_from), used.wrapping_sub(used_from));
        let available = submitted > half && submitted > avail.wrapping_sub(used);
        available || (completed > half && avail.wrapping_sub(used_from) > self.layout.size())
    }

    /// Reads the ring once.
    pub fn observe(&mut self, now: Nanos, ring: u32, memory: &mut dyn GuestMemory) -> Observation {
        let mut seen = Observation::default();
        if self.violation.is_some() {
            return seen;
        }
        self.looks += 1;
        let used = memory.used_idx(ring);
        let avail = memory.avail_idx(ring);
        seen.submitted = avail.wrapping_sub(self.avail_seen);
        seen.completed = used.wrapping_sub(self.used_seen);
        seen.outstanding = avail.wrapping_sub(used);
        let silent = now.since(self.observed_at) > SILENCE_MAX && !loose(Animal::SilenceIgnored);
        self.observed_at = now;
        (self.times.from, self.times.to) = (self.times.to, now);
        if seen.outstanding > self.layout.size() {
            // Impossible at one instant; but between the two reads the reader may have been kept from its processor.
            let used_again = memory.used_idx(ring);
            if used_again == used {
                return self.violate(seen, Violation::TooManyOutstanding { avail_idx: avail, used_idx: used });
            }
            let gap = Gap::Overrun { avail: seen.submitted, used: used_again.wrapping_sub(self.used_seen) };
            let avail_again = memory.avail_idx(ring);
            return self.lose(seen, gap, avail_again, used_again, ring, memory);
        }
        // While nothing at all moved a wrap is told from rest by the ring being idle on both sides of the silence.
        let rested = seen.submitted == 0 && seen.completed == 0 && self.sum == 0;
        if self.overtaken(self.avail_seen, self.used_seen, avail, used) {
            return self.lose(
                seen,
                Gap::Overrun { avail: seen.submitted, used: seen.completed },
                avail,
                used,
                ring,
                memory,
            );
        }
        if silent && !rested && !self.holds_still(seen, ring, memory) {
            return self.lose(seen, Gap::Silence, avail, used, ring, memory);
        }
        if self.unknown.is_none() {
            // Nothing that was followed before a cut would count.
            self.count_again(&mut seen, ring, memory);
            return seen;
        }
        self.follow(seen, avail, used, ring, memory)
    }

    /// Keeps what the rings of a ring at rest hold. From then on it may be looked at as rarely as one likes: see
    /// [`Observer::observe`].
    pub fn remember(&mut self, ring: u32, memory: &dyn GuestMemory) {
        if self.outstanding() != 0 || self.gap.is_some() {
            return;
        }
        let slots = 0..self.layout.size();
        self.rest = Some(Rest {
            avail_idx: self.avail_seen,
            used_idx: self.used_seen,
            avail: slots.clone().map(|slot| memory.avail_slot(ring, slot)).collect(),
            used: slots.map(|slot| memory.used_slot(ring, slot).id).collect(),
        });
    }

    /// Whether every slot that cannot have been written since the ring came to rest, if the indices have not gone all the way round,
    /// holds what it held. Going round writes each of them many times, and leaves them alike only where the requests come in such a
    /// regular order that it leaves the same set in flight, too.
    fn holds_still(&self, seen: Observation, ring: u32, memory: &dyn GuestMemory) -> bool {
        let Some(rest) =
            self.rest.as_ref().filter(|it| it.avail_idx == self.avail_seen && it.used_idx == self.used_seen)
        else {
            return false;
        };
        let (size, layout) = (self.layout.size(), self.layout);
        // The slots right behind the new ones may be written ahead.
        let ahead = self.ahead();
        let kept = |seen: u16, moved: u16| {
            let from = seen.wrapping_add(moved).wrapping_add(ahead);
            let count = size.saturating_sub(moved).saturating_sub(ahead);
            (0..count).map(move |at| layout.slot(from.wrapping_add(at)))
        };
        let avail = kept(self.avail_seen, seen.submitted)
            .all(|slot| memory.avail_slot(ring, slot) == rest.avail[usize::from(slot)]);
        avail
            && kept(self.used_seen, seen.completed)
                .all(|slot| memory.used_slot(ring, slot).id == rest.used[usize::from(slot)])
    }

    fn follow(
        &mut self,
        mut seen: Observation,
        avail: u16,
        used: u16,
        ring: u32,
        memory: &mut dyn GuestMemory,
    ) -> Observation {
        let (avail_from, used_from) = (self.avail_seen, self.used_seen);
        for step in 0..seen.submitted {
            let slot = self.layout.slot(avail_from.wrapping_add(step));
            let head = memory.avail_slot(ring, slot);
            if let Err(violation) = self.submit(head) {
                return self.torn_or_violated(seen, violation, (avail_from, used_from), ring, memory);
            }
        }
        for step in 0..seen.completed {
            let slot = self.layout.slot(used_from.wrapping_add(step));
            let head = memory.used_slot(ring, slot).id;
            if let Err(violation) = self.complete(head) {
                return self.torn_or_violated(seen, violation, (avail_from, used_from), ring, memory);
            }
        }
        self.avail_seen = avail;
        self.used_seen = used;
        let (used_again, avail_again) = (memory.used_idx(ring), memory.avail_idx(ring));
        let overrun =
            Gap::Overrun { avail: avail_again.wrapping_sub(avail_from), used: used_again.wrapping_sub(used_from) };
        if self.overtaken(avail_from, used_from, avail_again, used_again) {
            return self.lose(seen, overrun, avail_again, used_again, ring, memory);
        }
        if memory.faulted() {
            return self.violate(seen, Violation::MemoryGone);
        }
        if used_again == used {
            self.at_cut(&mut seen, avail, used);
        } else {
            // Whatever was counted as unknown has been completed, at a cut or not.
            self.regain(&mut seen);
        }
        seen
    }

    /// An impossible entry is either a slot that was overwritten while it was read, or a ring that is driven wrongly.
    fn torn_or_violated(
        &mut self,
        seen: Observation,
        violation: Violation,
        (avail_from, used_from): (u16, u16),
        ring: u32,
        memory: &mut dyn GuestMemory,
    ) -> Observation {
        let (used, avail) = (memory.used_idx(ring), memory.avail_idx(ring));
        if memory.faulted() {
            return self.violate(seen, Violation::MemoryGone);
        }
        if self.overtaken(avail_from, used_from, avail, used)
            || self.may_be_overwritten(avail_from, used_from, avail, used)
        {
            let gap = Gap::Overrun { avail: avail.wrapping_sub(avail_from), used: used.wrapping_sub(used_from) };
            return self.lose(seen, gap, avail, used, ring, memory);
        }
        self.violate(seen, violation)
    }

    fn submit(&mut self, head: u16) -> Result<(), Violation> {
        if head >= self.layout.size() {
            return Err(Violation::HeadOutOfRange { head: u32::from(head) });
        }
        let at = usize::from(head);
        // A head may come up several times: it was completed in between, which the used ring is about to tell.
        if self.balance[at] <= 0 {
            self.times.submitted[at] = self.times.middle();
            self.times.seen[at] = self.times.to;
            self.times.precise[at] = self.times.width() <= PRECISE_MAX;
        }
        self.shift(at, 1);
        self.submissions += 1;
        self.submission[at] = self.submissions;
        Ok(())
    }

    fn complete(&mut self, id: u32) -> Result<(), Violation> {
        let head = u16::try_from(id).map_err(|_| Violation::HeadOutOfRange { head: id })?;
        if head >= self.layout.size() {
            return Err(Violation::HeadOutOfRange { head: id });
        }
        let at = usize::from(head);
        self.completions += 1;
        if self.balance[at] > 0 {
            self.shift(at, -1);
            self.time(at);
            return Ok(());
        }
        match self.unknown {
            // Not submitted since the cut: it was one of those the cut counted.
            Some(unknown) if unknown > 0 => self.unknown = Some(unknown - 1),
            _ => return Err(Violation::CompletedTwice { head }),
        }
        Ok(())
    }

    /// A request was completed whose submission was seen.
    fn time(&mut self, at: usize) {
        let times = &mut self.times;
        let (submitted, completed) = (times.submitted[at], times.middle());
        // Its head may be in flight again, since this look.
        times.submitted[at] = completed;
        times.seen[at] = times.to;
        let precise = std::mem::replace(&mut times.precise[at], false);
        let latency = completed.since(submitted);
        if times.width() == Nanos(0) {
            // The look that a kick brought: what has come and gone since the kick took some time, and nobody knows which.
            return;
        }
        if latency >= times.long_floor() {
            times.long.push(latency);
        }
        if precise && Nanos(latency.0 * 2) >= times.width() {
            times.woken.push(latency);
        }
    }

    /// Tells the observer that a kick has woken the ring: what is submitted in the next look was submitted now.
    pub fn woken(&mut self, now: Nanos) {
        self.times.to = now;
    }

    /// For how long at least the request has been in flight that has been it longest, at the last look, if that is known.
    pub fn oldest_age(&mut self) -> Option<Nanos> {
        if self.outstanding() == 0 || self.knowledge() != Knowledge::Exact {
            self.times.oldest = None;
            return None;
        }
        let in_flight = |head: u16, balance: i16, number: u64| (balance > 0).then_some((number, head));
        let known = self.times.oldest.filter(|(head, number)| {
            let at = usize::from(*head);
            self.balance[at] > 0 && self.submission[at] == *number
        });
        let (head, _) = known.or_else(|| {
            let heads = (0..self.layout.size()).filter_map(|head| {
                let at = usize::from(head);
                in_flight(head, self.balance[at], self.submission[at])
            });
            heads.min().map(|(number, head)| (head, number))
        })?;
        self.times.oldest = Some((head, self.submission[usize::from(head)]));
        Some(self.times.to.since(self.times.seen[usize::from(head)]))
    }

    /// Between the last look and the one before.
    #[must_use]
    pub fn look_width(&self) -> Nanos {
        self.times.width()
    }

    /// From this latency on, as the last look was, every one is told by [`Observer::take_latencies`].
    #[must_use]
    pub fn long_floor(&self) -> Nanos {
        self.times.long_floor()
    }

    /// Latencies that ended since they were taken last: those that were long against the time between looks, and those of requests that
    /// woke the ring. The latter are told within half of what they are, as long as the next look comes no later.
    pub fn take_latencies(&mut self) -> [std::vec::Drain<'_, Nanos>; 2] {
        [self.times.long.drain(..), self.times.woken.drain(..)]
    }

    fn shift(&mut self, at: usize, by: i16) {
        let odd = |balance: i16| u16::from(!(0..=1).contains(&balance));
        self.odd -= odd(self.balance[at]);
        // Only a driver that breaks the rules gets anywhere near the bounds.
        self.balance[at] = self.balance[at].saturating_add(by);
        self.odd += odd(self.balance[at]);
        self.unnoted.touch(at as u16, self.layout.size());
        self.sum = self.sum.saturating_add_signed(i32::from(by));
    }

    /// `used.idx` did not move while `avail.idx` was read: balances are now 0 or 1 and their sum is what is outstanding.
    fn at_cut(&mut self, seen: &mut Observation, avail: u16, used: u16) {
        let outstanding = u32::from(avail.wrapping_sub(used));
        if outstanding > u32::from(self.layout.size()) {
            // Read at two instants. The next look counts.
            return;
        }
        let Some(unknown) = self.unknown else {
            // The first cut after a gap: whatever is outstanding now is unknown, and counting starts here.
            self.clear();
            self.unknown = Some(avail.wrapping_sub(used));
            self.regain(seen);
            return;
        };
        if self.odd > 0 {
            let at = self.balance.iter().position(|balance| *balance > 1).unwrap_or(0);
            let head = u16::try_from(at).expect("a ring has at most 32768 entries");
            *seen = self.violate(*seen, Violation::SubmittedTwice { head });
            return;
        }
        if self.sum + u32::from(unknown) != outstanding {
            // What was followed is not what the indices say: it is given up, and counting starts anew.
            self.clear();
            self.unknown = Some(avail.wrapping_sub(used));
            self.gap = Some(Gap::Mismatch);
            seen.lost = Some(Gap::Mismatch);
            self.regain(seen);
            return;
        }
        self.regain(seen);
    }

    fn regain(&mut self, seen: &mut Observation) {
        if self.unknown == Some(0) && self.gap.take().is_some() {
            seen.regained = true;
        }
    }

    fn clear(&mut self) {
        self.unnoted.touch_all();
        self.balance.fill(0);
        self.odd = 0;
        self.sum = 0;
    }

    fn lose(
        &mut self,
        mut seen: Observation,
        gap: Gap,
        avail: u16,
        used: u16,
        ring: u32,
        memory: &mut dyn GuestMemory,
    ) -> Observation {
        if memory.faulted() {
            return self.violate(seen, Violation::MemoryGone);
        }
        self.forget_latencies();
        self.clear();
        self.unknown = None;
        self.gap = Some(gap);
        self.avail_seen = avail;
        self.used_seen = used;
        seen.lost = Some(gap);
        self.count_again(&mut seen, ring, memory);
        seen
    }

    /// Tries to find a cut from which counting can start: on a busy ring an instant without a completion takes a few tries.
    fn count_again(&mut self, seen: &mut Observation, ring: u32, memory: &dyn GuestMemory) {
        for _ in 0..CUT_TRIES {
            let used = memory.used_idx(ring);
            let avail = memory.avail_idx(ring);
            if memory.used_idx(ring) == used {
                self.avail_seen = avail;
                self.used_seen = used;
                return self.at_cut(seen, avail, used);
            }
        }
    }

    fn violate(&mut self, seen: Observation, violation: Violation) -> Observation {
        self.violation = Some(violation);
        self.forget_latencies();
        seen
    }

    /// What was read was not what it seemed.
    fn forget_latencies(&mut self) {
        self.times.long.clear();
        self.times.woken.clear();
    }

    /// Tells the observer that the memory behind the ring cannot be reached any more.
    pub fn memory_gone(&mut self) {
        self.violation = Some(Violation::MemoryGone);
    }

    /// The requests in flight at the last observation, in the order of their submission. Only a ring that no backend serves
    /// gives an answer that stays true.
    ///
    /// # Errors
    /// The state of knowledge, where it is not exact.
    pub fn survivors(&self) -> Result<Vec<u16>, Knowledge> {
        if self.knowledge() != Knowledge::Exact {
            return Err(self.knowledge());
        }
        let mut heads: Vec<u16> =
            (0..self.layout.size()).filter(|head| self.balance[usize::from(*head)] == 1).collect();
        if !loose(Animal::SurvivorsByHead) {
            heads.sort_unstable_by_key(|head| self.submission[usize::from(*head)]);
        }
        Ok(heads)
    }

    /// Number of the submission that put `head` into flight: tells one request from the next that uses the same head.
    #[must_use]
    pub fn submission_of(&self, head: u16) -> u64 {
        self.submission.get(usize::from(head)).copied().unwrap_or(0)
    }

    /// Whether it was looked at so shortly before this moment that no wrap can have been missed in between.
    pub(crate) fn was_looked_at_near(&self, at: Nanos) -> bool {
        at.since(self.observed_at) <= SILENCE_MAX
    }

    /// Tells the observer that no backend has served the ring since the last observation, so that its indices cannot have gone round.
    pub fn forgive_silence(&mut self, now: Nanos) {
        self.observed_at = now;
    }

    /// Tells the observer that the broker itself completed `head` (a request that was isolated), with `used.idx` now `used`.
    pub fn completed_by_broker(&mut self, head: u16, used: u16) {
        let at = usize::from(head);
        if self.balance.get(at) == Some(&1) {
            self.shift(at, -1);
        }
        self.completions += 1;
        self.looks += 1;
        self.used_seen = used;
    }
}

mod notes;
mod saved;
#[cfg(test)]
mod tests;
