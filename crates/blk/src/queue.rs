//! One queue that is served: requests are taken, understood, started, answered and published.
//!
//! ```text
//! available ring ─take─▶ in-flight region marks it ─▶ engine ─▶ answered ─▶ batch ─publish─▶ used ring, region cleared, call
//! ```

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use warmswap_telemetry::{Kind, QueueWriter};
use warmswap_wire::inflight::{RegionMemory, Tracker};
use warmswap_zoo::{Animal, loose};

use crate::chain::{Chain, Malformed, total};
use crate::clock::now_ns;
use crate::engine::sync::perform;
use crate::engine::{Engine, Io, Op, Tag};
use crate::image::Image;
#[cfg(feature = "lab")]
use crate::image::SECTOR;
use crate::log::DirtyLog;
use crate::memory::{MemoryMap, Piece, Window, copy_in};
use crate::request::{self, ID_BYTES, Limits, Parsed, Status, Wish};
use crate::ring::{Broken, Place, Ring};
use crate::token::Token;

/// Requests taken in one turn: the answers to others must not wait for all of a long queue.
const TAKEN_PER_TURN: u16 = 64;
/// Completions are published after so many, or so many bytes, whichever comes first.
const PUBLISHED_AT_ONCE: usize = 16;
const BYTES_AT_ONCE: u64 = 64 << 10;

/// What a queue needs of the device.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) image: Arc<Image>,
    pub(crate) limits: Limits,
    pub(crate) id: [u8; ID_BYTES],
}

/// The part of an in-flight region that belongs to a queue.
#[derive(Debug)]
pub(crate) struct Region(pub(crate) Window);

impl RegionMemory for Region {
    fn read(&self, at: u64, into: &mut [u8]) {
        for (offset, byte) in (at..).zip(into) {
            *byte = self.0.load_u8(offset, Ordering::Relaxed);
        }
    }
    #[inline]
    fn store_u8(&mut self, at: u64, value: u8) {
        self.0.store_u8(at, value, Ordering::Release);
    }
    #[inline]
    fn store_u16(&mut self, at: u64, value: u16) {
        self.0.store_u16(at, value, Ordering::Release);
    }
    #[inline]
    fn store_u64(&mut self, at: u64, value: u64) {
        self.0.store_u64(at, value, Ordering::Release);
    }
}

/// How a queue begins.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) index: u16,
    pub(crate) place: Place,
    pub(crate) memory: Arc<MemoryMap>,
    pub(crate) base: u16,
    pub(crate) region: Option<Region>,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<OwnedFd>,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) err: Option<OwnedFd>,
    pub(crate) log: Option<Arc<DirtyLog>>,
}

/// A request in flight, and what is kept to be used again for the next at the same head.
#[derive(Debug, Default)]
struct Slot {
    token: Option<Token>,
    chain: Chain,
    kind: Option<Kind>,
    op: Option<Op>,
    offset: u64,
    len: u64,
    status: Option<Piece>,
    since_ns: u64,
    /// Which of the memory maps its pieces lie in.
    epoch: u64,
}

/// A request that is answered and not published yet.
#[derive(Clone, Copy, Debug)]
struct Answered {
    head: u16,
    written: u32,
    kind: Kind,
    bytes: u64,
    since_ns: u64,
    failed: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) index: u16,
    pub(crate) kick: Option<OwnedFd>,
    pub(crate) enabled: bool,
    /// It takes nothing more; the control thread waits until nothing is in flight.
    pub(crate) stopping: bool,
    /// Its kick descriptor is being watched.
    pub(crate) watched: bool,
    ring: Ring,
    served: Served,
    memory: Arc<MemoryMap>,
    epoch: u64,
    /// Maps that requests in flight still use, and up to which epoch.
    retired: Vec<(u64, Arc<MemoryMap>)>,
    tracker: Option<Tracker<Region>>,
    indirect: bool,
    log: Option<Arc<DirtyLog>>,
    slots: Vec<Slot>,
    in_flight: u16,
    /// In the order in which they were taken, answered ones among them.
    order: VecDeque<(u16, u64)>,
    /// Requests to be started before anything is taken: what the last back-end owed.
    resubmit: VecDeque<u16>,
    /// Requests in memory that is not known yet, and those of them that were there before the front-end's messages were last read.
    parked: Vec<u16>,
    waiting: Vec<u16>,
    batch: Vec<Answered>,
    heads: Vec<u16>,
    batch_bytes: u64,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// A call is due and there was no descriptor to make it through.
    call_due: bool,
    broken: Option<Broken>,
    meter: QueueWriter,
    taken_kinds: Vec<Kind>,
    /// The next publication is of something that a look without a kick has found.
    found_by_poll: bool,
    /// Requests that ended with an error.
    errors: u64,
    /// Answers that a fault keeps back: until when, head, result.
    #[cfg(feature = "lab")]
    held_back: Vec<(u64, u16, i64)>,
}

impl Queue {
    /// Begins to serve a ring.
    ///
    /// # Errors
    /// A region that does not describe it; the meter comes back.
    pub(crate) fn new(start: Start, served: Served, mut meter: QueueWriter) -> Result<Self, (String, QueueWriter)> {
        let size = start.place.size();
        let used_idx = start.place.used_idx();
        let (tracker, next_available, resubmit) = match start.region {
            None => (None, start.base, Vec::new()),
            Some(region) => match Tracker::start(region, size, used_idx, start.base) {
                Ok((tracker, begun)) => (Some(tracker), begun.next_available, begun.resubmit),
                Err(error) => return Err((format!("ring {}: {error}", start.index), meter)),
            },
        };
        #[cfg(feature = "lab")]
        crate::faults::begun();
        meter.update(now_ns()).broken(false);
        let mut queue = Queue {
            index: start.index,
            kick: start.kick,
            enabled: start.enabled,
            stopping: false,
            watched: false,
            ring: Ring::new(start.place, start.event_idx, next_available, used_idx),
            served,
            memory: start.memory,
            epoch: 0,
            retired: Vec::new(),
            tracker,
            indirect: start.indirect,
            log: start.log,
            slots: std::iter::repeat_with(Slot::default).take(usize::from(size)).collect(),
            in_flight: 0,
            order: VecDeque::with_capacity(usize::from(size)),
            resubmit: resubmit.into(),
            parked: Vec::new(),
            waiting: Vec::new(),
            batch: Vec::with_capacity(usize::from(size)),
            heads: Vec::with_capacity(usize::from(size)),
            batch_bytes: 0,
            call: start.call,
            err: start.err,
            // Nobody knows what the last back-end has told the driver.
            call_due: !loose(Animal::OwedCallForgotten),
            broken: None,
            meter,
            taken_kinds: Vec::with_capacity(usize::from(TAKEN_PER_TURN)),
            found_by_poll: false,
            errors: 0,
            #[cfg(feature = "lab")]
            held_back: Vec::new(),
        };
        // The last back-end may have published and died before it called. It may also be the only thing the driver
        // waits for.
        if queue.call.is_some() && queue.call_due {
            queue.send_call();
        }
        Ok(queue)
    }

    /// Requests that the last back-end owed and that are started again.
    pub(crate) fn recovered(&self) -> usize {
        self.resubmit.len()
    }

    /// Whether it takes requests.
    #[inline]
    fn takes(&self) -> bool {
        self.enabled && !self.stopping && self.broken.is_none()
    }

    /// Whether there is something to take.
    #[inline]
    pub(crate) fn has_work(&self) -> bool {
        self.takes() && (self.ring.has_pending() || !self.resubmit.is_empty())
    }

    /// Whether nothing is in flight and nothing waits to be published.
    pub(crate) fn is_at_rest(&self) -> bool {
        (self.in_flight == 0 && self.batch.is_empty()) || loose(Animal::StopUndrained)
    }

    /// Takes requests and starts them. Returns how many.
    #[inline]
    pub(crate) fn take<E: Engine>(&mut self, engine: &mut E) -> usize {
        if !self.takes() {
            return 0;
        }
        let now = now_ns();
        let mut count = self.begin_owed(engine);
        if self.broken.is_some() {
            return count;
        }
        match self.take_new(now, engine) {
            Ok(taken) => count += taken,
            Err(broken) => self.break_ring(broken),
        }
        count
    }

    /// Starts what the last back-end owed. Returns how many.
    pub(crate) fn begin_owed<E: Engine>(&mut self, engine: &mut E) -> usize {
        let mut count = 0;
        while let (None, Some(head)) = (&self.broken, self.resubmit.front().copied()) {
            self.resubmit.pop_front();
            count += 1;
            if let Err(broken) = self.begin(head, now_ns(), engine) {
                self.break_ring(broken);
            }
        }
        count
    }

    #[inline]
    fn take_new<E: Engine>(&mut self, now: u64, engine: &mut E) -> Result<usize, Broken> {
        let pending = self.ring.pending()?.min(TAKEN_PER_TURN);
        if pending == 0 {
            return Ok(0);
        }
        self.ring.disarm();
        for _ in 0..pending {
            let head = self.ring.take()?;
            if self.slots[usize::from(head)].token.is_some() {
                return Err(Broken::InFlight { head });
            }
            if let Some(tracker) = &mut self.tracker {
                tracker.taken(head);
            }
            self.begin(head, now, engine)?;
            if self.batch.len() >= PUBLISHED_AT_ONCE || self.batch_bytes >= BYTES_AT_ONCE {
                self.publish();
            }
        }
        Ok(usize::from(pending))
    }

    /// A request was taken from the ring, by us or by who served it before.
    #[inline]
    fn begin<E: Engine>(&mut self, head: u16, now: u64, engine: &mut E) -> Result<(), Broken> {
        let slot = &mut self.slots[usize::from(head)];
        slot.token = Some(Token::new(head));
        slot.since_ns = now;
        slot.epoch = self.epoch;
        self.in_flight += 1;
        if self.order.len() >= 2 * self.slots.len() {
            // What is answered is taken off the front as a rule, but not from behind one that takes long.
            let slots = &self.slots;
            self.order.retain(|(head, since_ns)| {
                let slot = &slots[usize::from(*head)];
                slot.token.is_some() && slot.since_ns == *since_ns
            });
        }
        self.order.push_back((head, now));
        self.understand(head, engine, false)
    }

    /// Follows a request's chain and does what it asks for. One that lies in memory nobody knows waits for the front-end's messages to be
    /// worked off, unless this is its `last` chance: a driver may use memory as soon as its front-end has sent word of it.
    #[inline]
    fn understand<E: Engine>(&mut self, head: u16, engine: &mut E, last: bool) -> Result<(), Broken> {
        let slot = &mut self.slots[usize::from(head)];
        let size = self.ring.place.size();
        let followed = slot.chain.follow(&self.ring.place.descriptors, size, &self.memory, head, self.indirect);
        if !last && (slot.chain.missing.is_some() || matches!(followed, Err(Malformed::Memory { .. }))) {
            self.parked.push(head);
            return Ok(());
        }
        let parsed = followed.and_then(|()| request::parse(&mut slot.chain, &self.served.limits));
        let Parsed { kind, wish, status } = match parsed {
            Ok(parsed) => parsed,
            Err(reason) => {
                // Nothing can be said to the driver, not even that it failed.
                slot.token.take().expect("just made").left_to_the_next();
                self.in_flight -= 1;
                return Err(Broken::NoStatus { head, reason });
            }
        };
        slot.kind = Some(kind);
        slot.status = Some(status);
        self.taken_kinds.push(kind);
        match wish {
            Wish::Io { op, offset, len } => {
                (slot.op, slot.offset, slot.len) = (Some(op), offset, len);
                if len == 0 && op != Op::Flush {
                    self.answer(head, 0);
                    return Ok(());
                }
                let pieces = if op == Op::Read { &slot.chain.writable } else { &slot.chain.readable };
                let io = Io { tag: Tag { queue: self.index, head }, op, offset, len, pieces };
                if let Some(result) = engine.start(&io) {
                    self.answer(head, result);
                }
            }
            Wish::Id => {
                slot.op = None;
                let written = copy_in(&slot.chain.writable, &self.served.id);
                self.finish(head, Status::Ok, written as u64);
            }
            Wish::No(status) => {
                slot.op = None;
                let missing = slot.chain.missing;
                self.tell_error(
                    head,
                    &match missing {
                        Some(missing) => format!("{missing}"),
                        None => format!(
                            "it is answered with {status:?}: it asks for what the device does not do, or does not have"
                        ),
                    },
                );
                self.finish(head, status, 0);
            }
        }
        Ok(())
    }

    /// Whether requests wait for the front-end's messages to be worked off.
    #[inline]
    pub(crate) fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// The front-end's messages are about to be read: what waits now is decided when they are worked off, what comes meanwhile is not.
    pub(crate) fn begin_round(&mut self) {
        self.waiting.append(&mut self.parked);
    }

    /// The front-end's messages are worked off: what waited for that is understood now or never.
    pub(crate) fn retry<E: Engine>(&mut self, engine: &mut E) {
        for head in std::mem::take(&mut self.waiting) {
            let slot = &mut self.slots[usize::from(head)];
            slot.epoch = self.epoch;
            if let Err(broken) = self.understand(head, engine, true) {
                self.break_ring(broken);
            }
        }
    }

    /// The engine has done what a request asked for.
    #[inline]
    pub(crate) fn answer(&mut self, head: u16, result: i64) {
        #[cfg(feature = "lab")]
        if self.holds_back(head, result) {
            return;
        }
        self.answer_now(head, result);
    }

    #[inline]
    fn answer_now(&mut self, head: u16, result: i64) {
        let slot = &self.slots[usize::from(head)];
        let (op, len) = (slot.op.expect("only I/O is answered"), slot.len);
        let whole = match op {
            Op::Read | Op::Write { .. } => len.cast_signed(),
            Op::Flush | Op::Discard | Op::Zeroes { .. } => 0,
        };
        let result = if result == whole { result } else { self.go_on(head, op, whole, result) };
        let result = match op {
            // A driver that does not flush has been promised that what is completed is durable. Rare enough to be done on the spot.
            Op::Zeroes { .. } if result == whole && self.served.limits.write_through => {
                let tag = Tag { queue: self.index, head };
                perform(&self.served.image, &Io { tag, op: Op::Flush, offset: 0, len: 0, pieces: &[] })
            }
            _ => result,
        };
        let status = if result == whole { Status::Ok } else { Status::IoError };
        if status != Status::Ok {
            let what = if result < 0 {
                io::Error::from_raw_os_error(-result as i32).to_string()
            } else {
                format!("only {result} bytes")
            };
            let offset = self.slots[usize::from(head)].offset;
            self.tell_error(head, &format!("{op:?} of {len} bytes at {offset}: {what}"));
        }
        let written = if op == Op::Read && status == Status::Ok { len } else { 0 };
        self.finish(head, status, written);
    }

    /// Tells of a request that ends with an error: the first, the second, the fourth, and so on, for a guest can make as many as it likes.
    #[cold]
    fn tell_error(&mut self, head: u16, what: &str) {
        self.errors += 1;
        if self.errors.is_power_of_two() {
            crate::tell(&format!("ring {}: error {}: the request at head {head}: {what}", self.index, self.errors));
        }
    }

    /// Something did not go through as it was asked. What came back short is gone on with, what the file system does not know is done
    /// in another way; both are rare, and are done on the spot.
    #[cold]
    fn go_on(&mut self, head: u16, op: Op, whole: i64, result: i64) -> i64 {
        self.meter.update(now_ns()).retried(1);
        let slot = &self.slots[usize::from(head)];
        let image = &self.served.image;
        let unsupported = [-i64::from(libc::EOPNOTSUPP), -i64::from(libc::ENOSYS)].contains(&result);
        match op {
            // It is advice.
            Op::Discard if unsupported => 0,
            Op::Zeroes { .. } if unsupported => write_zeroes(image, slot.offset, slot.len),
            Op::Read | Op::Write { .. } => {
                let pieces = if op == Op::Read { &slot.chain.writable } else { &slot.chain.readable };
                let (mut done, mut last) = (0, result);
                loop {
                    match last {
                        0 => return done,
                        more if more > 0 => done += more,
                        error if error == -i64::from(libc::EINTR) || error == -i64::from(libc::EAGAIN) => {}
                        error => return error,
                    }
                    if done >= whole {
                        return done;
                    }
                    let rest = skip(pieces, done.unsigned_abs());
                    let offset = slot.offset + done.unsigned_abs();
                    let tag = Tag { queue: self.index, head };
                    last = perform(image, &Io { tag, op, offset, len: total(&rest), pieces: &rest });
                }
            }
            _ => result,
        }
    }

    /// A request is answered: its status is written. It is published with the next batch.
    #[inline]
    fn finish(&mut self, head: u16, status: Status, written: u64) {
        #[cfg(feature = "lab")]
        let status = if crate::faults::fails() { Status::IoError } else { status };
        let slot = &mut self.slots[usize::from(head)];
        let place = slot.status.take().expect("every request that is answered has a place for its status");
        copy_in(&[place], &[status as u8]);
        if let Some(log) = &self.log {
            slot.chain.logged.iter().for_each(|(addr, bytes)| log.mark(*addr, u64::from(*bytes)));
        }
        let written = u32::try_from(written + 1).unwrap_or(u32::MAX);
        let kind = slot.kind.take().expect("set when it was understood");
        let failed = status != Status::Ok;
        let bytes = if slot.op.is_some() && !failed { slot.len } else { 0 };
        self.batch_bytes += bytes;
        self.batch.push(Answered { head, written, kind, bytes, since_ns: slot.since_ns, failed });
    }

    /// Publishes what is answered, and calls the driver if it wants to be called.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.batch.is_empty() {
            if !self.taken_kinds.is_empty() {
                self.tell_taken();
            }
            return;
        }
        self.heads.clear();
        if loose(Animal::PublishedBeforeWritten) {
            self.ring.publish(self.ring.unpublished().wrapping_add(self.batch.len() as u16));
        }
        for answered in &self.batch {
            self.ring.write_used(answered.head, answered.written);
            self.heads.push(answered.head);
        }
        let used_idx = self.ring.unpublished();
        match &mut self.tracker {
            Some(tracker) => tracker.complete(&self.heads, used_idx, |used_idx| self.ring.publish(used_idx)),
            None => self.ring.publish(used_idx),
        }
        self.log_ring();
        for head in &self.heads {
            let slot = &mut self.slots[usize::from(*head)];
            slot.token.take().expect("in flight until it is published").completed();
        }
        self.in_flight -= self.heads.len() as u16;
        self.batch_bytes = 0;
        if !self.retired.is_empty() {
            self.drop_retired();
        }
        let wanted = self.ring.wants_call() || self.call_due;
        if wanted {
            self.send_call();
        }
        self.tell_published(wanted);
        self.batch.clear();
    }

    fn tell_taken(&mut self) {
        let oldest = self.oldest();
        let mut update = self.meter.update(now_ns());
        self.taken_kinds.drain(..).for_each(|kind| update.submitted(kind));
        update.in_flight(u64::from(self.in_flight), oldest);
    }

    #[inline]
    fn tell_published(&mut self, called: bool) {
        let oldest = self.oldest();
        let now = now_ns();
        let mut update = self.meter.update(now);
        self.taken_kinds.drain(..).for_each(|kind| update.submitted(kind));
        for answered in &self.batch {
            let latency = now.saturating_sub(answered.since_ns);
            if answered.failed {
                update.failed(answered.kind, latency);
            } else {
                update.completed(answered.kind, answered.bytes, latency);
            }
        }
        update.call(called);
        if std::mem::take(&mut self.found_by_poll) {
            update.polled();
        }
        update.in_flight(u64::from(self.in_flight), oldest);
    }

    /// When the oldest request in flight was taken.
    #[inline]
    fn oldest(&mut self) -> Option<u64> {
        while let Some((head, since_ns)) = self.order.front() {
            let slot = &self.slots[usize::from(*head)];
            if slot.token.is_some() && slot.since_ns == *since_ns {
                return Some(*since_ns);
            }
            self.order.pop_front();
        }
        None
    }

    fn send_call(&mut self) {
        #[cfg(feature = "lab")]
        if crate::faults::loses_call() {
            return;
        }
        self.call_due = match &self.call {
            Some(call) => !signal(call),
            None => true,
        };
    }

    #[cold]
    fn break_ring(&mut self, broken: Broken) {
        crate::tell(&format!("ring {}: {broken}; it is served no further until it is started again", self.index));
        self.broken = Some(broken);
        self.err.iter().for_each(|err| _ = signal(err));
        let mut update = self.meter.update(now_ns());
        update.malformed();
        update.broken(true);
    }

    /// Asks the driver for kicks. True if something has come meanwhile.
    #[inline]
    pub(crate) fn arm(&mut self) -> bool {
        if !self.takes() {
            return false;
        }
        let found = self.ring.arm();
        self.log_ring();
        found
    }

    /// Marks the used ring as written, where that is logged.
    fn log_ring(&self) {
        if let (Some(log), Some((at, bytes))) = (&self.log, self.ring.place.logged()) {
            log.mark(at, bytes);
        }
    }

    /// The kick descriptor was readable.
    pub(crate) fn kicked(&mut self) {
        self.watched = false;
        let Some(kick) = &self.kick else { return };
        // Somebody else may have taken it: it does not block.
        let _taken = rustix::io::read(kick, &mut [0; 8]);
        self.meter.update(now_ns()).kick();
    }

    /// The worker has slept.
    pub(crate) fn woke(&mut self) {
        self.meter.update(now_ns()).woke();
    }

    /// A look at the ring without a kick found something.
    pub(crate) fn polled(&mut self) {
        self.found_by_poll = true;
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        // The last call through the old one may have come when nobody listened there any more. One too many does no harm.
        if self.call.is_some() {
            self.send_call();
        }
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) {
        self.err = err;
    }

    pub(crate) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.served.limits = limits;
    }

    /// The guest's memory has changed. Requests in flight go on in the old.
    pub(crate) fn move_to(&mut self, memory: Arc<MemoryMap>, place: Place) {
        let old = std::mem::replace(&mut self.memory, memory);
        if self.in_flight > 0 {
            self.retired.push((self.epoch, old));
        }
        self.epoch += 1;
        self.ring.move_to(place);
    }

    #[cold]
    fn drop_retired(&mut self) {
        let oldest = self.slots.iter().filter(|slot| slot.token.is_some()).map(|slot| slot.epoch).min();
        self.retired.retain(|(epoch, _)| oldest.is_some_and(|oldest| oldest <= *epoch));
    }

    /// Ends: what was not taken stays in the ring. Returns where the next one goes on, and the meter.
    pub(crate) fn end(mut self) -> (u16, QueueWriter) {
        self.ring.leave();
        self.log_ring();
        for slot in &mut self.slots {
            if let Some(token) = slot.token.take() {
                // Broken rings alone: at rest nothing is in flight.
                token.left_to_the_next();
            }
        }
        (self.ring.taken(), self.meter)
    }

    /// Faults that keep an answer back, for a while or for ever.
    #[cfg(feature = "lab")]
    fn holds_back(&mut self, head: u16, result: i64) -> bool {
        if crate::faults::loses_completion() {
            return true;
        }
        let slot = &self.slots[usize::from(head)];
        let ns = crate::faults::delay_ns(slot.kind.unwrap_or(Kind::Other), slot.offset / SECTOR);
        if ns > 0 {
            self.held_back.push((now_ns() + ns, head, result));
        }
        ns > 0
    }

    /// When the next answer that is kept back is due.
    #[cfg(feature = "lab")]
    pub(crate) fn next_due(&self) -> Option<u64> {
        self.held_back.iter().map(|(due, _, _)| *due).min()
    }

    /// Answers what was kept back and is due.
    #[cfg(feature = "lab")]
    pub(crate) fn release(&mut self) {
        let now = now_ns();
        while let Some(at) = self.held_back.iter().position(|(due, _, _)| *due <= now) {
            let (_, head, result) = self.held_back.remove(at);
            self.answer_now(head, result);
        }
    }
}

/// Without their first bytes.
fn skip(pieces: &[Piece], bytes: u64) -> Vec<Piece> {
    let mut left = usize::try_from(bytes).expect("bounded by a request");
    let mut rest = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let gone = left.min(piece.len);
        left -= gone;
        if gone < piece.len {
            rest.push(piece.skip(gone));
        }
    }
    rest
}

/// Zeroes by plain writes, for file systems that know no better.
fn write_zeroes(image: &Image, offset: u64, len: u64) -> i64 {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = offset;
    let file = image.files().last().expect("there is always one through the page cache");
    while at < offset + len {
        let count = (offset + len - at).min(ZEROES.len() as u64) as usize;
        match rustix::io::pwrite(file, &ZEROES[..count], at) {
            Ok(0) => return -i64::from(libc::EIO),
            Ok(done) => at += done as u64,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return -i64::from(error.raw_os_error()),
        }
    }
    0
}

/// Writes an eventfd. False only if it cannot be written at all.
fn signal(fd: &OwnedFd) -> bool {
    matches!(rustix::io::write(fd.as_fd(), &1_u64.to_ne_bytes()), Ok(_) | Err(rustix::io::Errno::AGAIN))
}
