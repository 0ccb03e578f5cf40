//! A probe: a ring looked at so closely for a moment that single requests can be followed from submission to completion.
//!
//! ```text
//! begin ──▶ Collecting ──────────▶ Following ──────────▶ done
//!           looks without a pause,   looks at growing distances,
//!           new requests are taken   until those taken are completed
//! ```
//! The broker's own following of a ring ([`crate::Observer`]) is exact and cheap because it looks rarely, so it resolves no latency below the
//! time between two looks. A probe resolves a few microseconds, of a sample; or, where requests are known to take long, a sixteenth of what
//! they take, and sleeps between two looks. What it samples are requests that arrive while it looks, so a short request is as likely to be
//! taken as a long one. A request whose submission or completion fell into a pause, because the prober was
//! kept from its processor, is not known: then every request that is younger than the pause is given up, whether it has been completed or not,
//! for to keep those alone that outlived it would make all of them long. In an ordinary distance of two looks its middle is taken.
//!
//! Whatever it reads comes from a hostile guest and may be stale: every value is checked, nothing it finds does harm, and a ring that makes
//! no sense ends the probe.

use warmswap_histogram::Histogram;
use warmswap_predict::Pages;
use warmswap_wire::DeviceType;
use warmswap_wire::ring::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, Layout, USED_F_NO_NOTIFY, UsedElem,
    crosses_event,
};

use crate::time::Nanos;

/// Requests that one probe follows at most.
pub const FOLLOWED_MAX: usize = 32;
/// What happened between two looks that are farther apart than this is not known well enough, unless requests take long.
const PRECISE_MAX: Nanos = Nanos::from_micros(8);
/// Looks in the time that a request is expected to take, at least.
const LOOKS_PER_REQUEST: u64 = 16;
/// After the time in which it takes requests it looks without a pause for this long at most.
const SPIN_MAX: Nanos = Nanos::from_micros(100);
/// A distance of two looks that is not worth a sleep, which takes some fifty microseconds more than it was asked for.
const SLEEP_MIN: Nanos = Nanos::from_micros(15);
/// A look that comes later than it was asked for by this, and by as much as it was to wait, was kept from its processor.
const LATE_MAX: Nanos = Nanos::from_micros(200);
/// Descriptors of a chain that are read at most.
const CHAIN_MAX: usize = 130;
/// Longest distance of two looks while requests are followed.
const LOOK_MAX: Nanos = Nanos::from_millis(20);
/// How long requests are followed. Longer ones are seen by the observer.
const FOLLOW_MAX: Nanos = Nanos::from_millis(400);

/// Read access to a ring and to guest memory. A ring that is gone reads as zero.
pub trait RingReader {
    /// Its layout, if it is there.
    fn layout(&self, ring: u32) -> Option<Layout>;
    /// `avail.idx`.
    fn avail_idx(&self, ring: u32) -> u16;
    /// `used.idx`.
    fn used_idx(&self, ring: u32) -> u16;
    /// `avail.flags`.
    fn avail_flags(&self, ring: u32) -> u16;
    /// `used.flags`.
    fn used_flags(&self, ring: u32) -> u16;
    /// `used_event`, at the end of the available ring.
    fn used_event(&self, ring: u32) -> u16;
    /// `avail_event`, at the end of the used ring.
    fn avail_event(&self, ring: u32) -> u16;
    /// Head in an available slot.
    fn avail_slot(&self, ring: u32, slot: u16) -> u16;
    /// Entry in a used slot.
    fn used_slot(&self, ring: u32, slot: u16) -> UsedElem;
    /// An entry of the descriptor table.
    fn descriptor(&self, ring: u32, index: u16) -> Descriptor;
    /// Copies guest-physical memory; false if the range is not mapped.
    fn read_guest(&self, guest_addr: u64, bytes: &mut [u8]) -> bool;
}

/// What a request asks for, as far as its buffers tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The device writes into guest memory.
    Read,
    /// The device reads from guest memory.
    Write,
    /// Flush.
    Flush,
    /// Discard or write-zeroes.
    Discard,
    /// Anything else, or not known.
    Other,
}

impl Asked {
    const COUNT: usize = 5;
}

/// A request as its chain describes it.
#[derive(Clone, Copy, Debug)]
struct Request {
    asked: Asked,
    /// Bytes of data.
    bytes: u64,
    /// Bytes the device writes.
    written: u64,
    /// First byte on the disk.
    at: Option<u64>,
    /// Where its status will be.
    status: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Followed {
    head: u16,
    submitted: Nanos,
    request: Option<Request>,
}

/// What probes have sampled. Sums, so that samples add up.
#[derive(Clone, Debug, Default)]
pub struct Sampled {
    /// Requests that were looked into.
    pub requests: u64,
    /// The same by what they ask for, in the order of [`Asked`].
    pub asked: [u64; Asked::COUNT],
    /// Bytes of their data.
    pub bytes: u64,
    /// Bytes of them that the device writes into guest memory.
    pub written: u64,
    /// Reads and writes that had one before them on their ring, and those that began where it ended, or would have ended with as many
    /// of its length as came between.
    pub successors: u64,
    /// See `successors`.
    pub sequential: u64,
    /// Buffers that had one before them, and those that began in the page in which it ended, or the next.
    pub neighbours: u64,
    /// See `neighbours`.
    pub local: u64,
    /// Requests whose status was seen, and those with an error.
    pub statuses: u64,
    /// See `statuses`.
    pub errors: u64,
    /// Latencies: all, reads, writes, flushes.
    pub latencies: [Histogram; 4],
    /// Their sum in nanoseconds.
    pub latency_ns: u64,
    /// Longest of them in nanoseconds.
    pub longest: u64,
    /// Submissions, and those for which a kick was due.
    pub submissions: u64,
    /// See `submissions`.
    pub kicks: u64,
    /// Completions, and those for which an interrupt was due.
    pub completions: u64,
    /// See `completions`.
    pub calls: u64,
    /// Kicks that were due and after which the backend showed a sign, and the sum of nanoseconds until then.
    pub pickups: u64,
    /// See `pickups`.
    pub pickup_ns: u64,
    /// Interrupts that were due and after which the driver showed a sign, the sum of nanoseconds until then, and the longest.
    pub reactions: u64,
    /// See `reactions`.
    pub reaction_ns: u64,
    /// See `reactions`.
    pub reaction_max_ns: u64,
    /// Pages of guest memory in which their buffers lie.
    pub pages: Pages,
}

impl Sampled {
    /// Adds what another probe has sampled.
    pub fn merge(&mut self, other: &Sampled) {
        let pairs = [
            (&mut self.requests, other.requests),
            (&mut self.bytes, other.bytes),
            (&mut self.written, other.written),
            (&mut self.successors, other.successors),
            (&mut self.sequential, other.sequential),
            (&mut self.neighbours, other.neighbours),
            (&mut self.local, other.local),
            (&mut self.statuses, other.statuses),
            (&mut self.errors, other.errors),
            (&mut self.latency_ns, other.latency_ns),
            (&mut self.submissions, other.submissions),
            (&mut self.kicks, other.kicks),
            (&mut self.completions, other.completions),
            (&mut self.calls, other.calls),
            (&mut self.pickups, other.pickups),
            (&mut self.pickup_ns, other.pickup_ns),
            (&mut self.reactions, other.reactions),
            (&mut self.reaction_ns, other.reaction_ns),
        ];
        pairs.into_iter().chain(self.asked.iter_mut().zip(other.asked)).for_each(|(sum, more)| *sum += more);
        self.latencies.iter_mut().zip(&other.latencies).for_each(|(all, more)| all.merge(more));
        self.longest = self.longest.max(other.longest);
        self.reaction_max_ns = self.reaction_max_ns.max(other.reaction_max_ns);
        self.pages.merge(&other.pages);
    }
}

/// When a probe wants to look again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once.
    Now,
    /// At this time.
    At(Nanos),
    /// Never: it is done.
    Done,
}

/// What is remembered of a ring between probes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trail {
    /// The last read or write: its place in the available ring, where it ended on the disk, and its length.
    last: Option<(u16, u64, u64)>,
    /// Page in which the last buffer ended.
    page: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Probe {
    ring: u32,
    layout: Layout,
    event_idx: bool,
    is_disk: bool,
    began: Nanos,
    collect_until: Nanos,
    /// Distance of two looks while requests are taken; zero: without a pause.
    step: Nanos,
    /// What happened between two looks that are no farther apart than this is known well enough.
    precise_max: Nanos,
    looked_at: Nanos,
    /// When it was to look again.
    next_at: Nanos,
    avail: u16,
    used: u16,
    avail_event: u16,
    used_event: u16,
    avail_flags: u16,
    used_flags: u16,
    followed: [Option<Followed>; FOLLOWED_MAX],
    following: usize,
    /// Since when a kick was due without a sign of the backend, and at which `used.idx` and `avail_event`.
    kicked: Option<(Nanos, u16, u16)>,
    /// Since when an interrupt was due without a sign of the driver, and at which `used_event` and `avail.idx`.
    called: Option<(Nanos, u16, u16)>,
}

impl Probe {
    /// Begins a probe of a ring, which takes requests for `collect`. `None` if there is no such ring. `expected`: what a request takes in
    /// the mean, as far as that is known.
    #[must_use]
    pub fn begin(
        ring: u32,
        (device, event_idx): (DeviceType, bool),
        (collect, expected): (Nanos, Nanos),
        memory: &dyn RingReader,
        now: Nanos,
    ) -> Option<Self> {
        let layout = memory.layout(ring)?;
        let step = Nanos(expected.0 / LOOKS_PER_REQUEST).min(LOOK_MAX);
        let step = if step < SLEEP_MIN { Nanos(0) } else { step };
        Some(Probe {
            ring,
            layout,
            event_idx,
            is_disk: device == DeviceType::Blk,
            began: now,
            collect_until: now + collect,
            step,
            precise_max: PRECISE_MAX.max(Nanos(expected.0 / 4)),
            looked_at: now,
            next_at: now,
            used: memory.used_idx(ring),
            avail: memory.avail_idx(ring),
            avail_event: memory.avail_event(ring),
            used_event: memory.used_event(ring),
            avail_flags: memory.avail_flags(ring),
            used_flags: memory.used_flags(ring),
            followed: [None; FOLLOWED_MAX],
            following: 0,
            kicked: None,
            called: None,
        })
    }

    /// Ring that is probed.
    #[must_use]
    pub fn ring(&self) -> u32 {
        self.ring
    }

    /// Looks once. The clock is read before and after the indices: a prober may be kept from its processor between the two as well.
    pub fn look(
        &mut self,
        memory: &dyn RingReader,
        trail: &mut Trail,
        mut clock: impl FnMut() -> Nanos,
        sampled: &mut Sampled,
    ) -> Next {
        let ring = self.ring;
        let before = clock();
        let (used, avail) = (memory.used_idx(ring), memory.avail_idx(ring));
        let now = clock();
        let (came, went) = (avail.wrapping_sub(self.avail), used.wrapping_sub(self.used));
        let size = self.layout.size();
        if came > size || went > size || avail.wrapping_sub(used) > size {
            // More has passed than the ring holds, or this is no ring any more.
            return Next::Done;
        }
        let pause = now.since(self.looked_at);
        let middle = Nanos(self.looked_at.0 + pause.0 / 2);
        let precise = pause <= self.precise_max;
        let collecting = now < self.collect_until;
        if precise {
            self.notice_kick(memory, avail, used, middle, now, sampled);
        }
        if now.since(self.next_at) > LATE_MAX + self.next_at.since(self.looked_at) {
            self.give_up_young(pause);
        }
        self.complete(memory, went, middle, precise, sampled);
        if came > 0 && collecting && precise {
            self.take(memory, (came, went), (middle, pause), trail, sampled);
        }
        if precise {
            self.notice_call(memory, avail, used, middle, now, sampled);
        } else {
            self.skip(memory);
        }
        (self.avail, self.used, self.looked_at) = (avail, used, before);
        let next = self.next(now, collecting);
        self.next_at = if let Next::At(at) = next { at } else { now };
        next
    }

    fn next(&self, now: Nanos, collecting: bool) -> Next {
        if collecting {
            return if self.step == Nanos(0) { Next::Now } else { Next::At(now + self.step) };
        }
        let Some(since) = self.followed.iter().flatten().map(|it| it.submitted).max() else { return Next::Done };
        if now.since(self.began) > FOLLOW_MAX {
            return Next::Done;
        }
        // The youngest decides: every latency is told within an eighth.
        let distance = Nanos(now.since(since).0 / 8).min(LOOK_MAX);
        let spins = self.step == Nanos(0) && now < self.collect_until + SPIN_MAX;
        if spins && distance < SLEEP_MIN { Next::Now } else { Next::At(now + distance.max(SLEEP_MIN)) }
    }

    /// New requests.
    fn take(
        &mut self,
        memory: &dyn RingReader,
        (came, went): (u16, u16),
        (at, pause): (Nanos, Nanos),
        trail: &mut Trail,
        sampled: &mut Sampled,
    ) {
        for step in 0..came {
            let place = self.avail.wrapping_add(step);
            let head = memory.avail_slot(self.ring, self.layout.slot(place));
            if head >= self.layout.size() || self.followed.iter().flatten().any(|it| it.head == head) {
                continue;
            }
            let completions = (0..went).filter(|step| self.used_head(memory, *step) == u32::from(head)).count();
            // The first of them is of the request before with this head, if that was in flight.
            let is_done = completions > usize::from(completions > 0 && self.was_in_flight(memory, head));
            let Some(free) = self.followed.iter().position(Option::is_none) else { return };
            let request = self.read(memory, head, place, trail, sampled);
            let followed = Followed { head, submitted: at, request };
            if is_done {
                // It came and went in one pause: two instants at random are a third of it apart in the mean.
                self.finish(memory, &followed, Nanos(pause.0 / 3), true, sampled);
            } else {
                self.followed[free] = Some(followed);
                self.following += 1;
            }
        }
    }

    /// Whether a head was in flight at the last look, as far as the last submissions tell: most devices do not leave a request behind for
    /// long.
    fn was_in_flight(&self, memory: &dyn RingReader, head: u16) -> bool {
        let outstanding = self.avail.wrapping_sub(self.used);
        let back = outstanding.saturating_mul(2).min(self.layout.size());
        let head_before = |back| memory.avail_slot(self.ring, self.layout.slot(self.avail.wrapping_sub(back)));
        (1..=back).any(|back| head_before(back) == head)
    }

    /// Head of the entry so many after the last that has been seen in the used ring.
    fn used_head(&self, memory: &dyn RingReader, step: u16) -> u32 {
        memory.used_slot(self.ring, self.layout.slot(self.used.wrapping_add(step))).id
    }

    fn complete(&mut self, memory: &dyn RingReader, went: u16, at: Nanos, precise: bool, sampled: &mut Sampled) {
        if self.following == 0 {
            return;
        }
        for step in 0..went {
            let id = self.used_head(memory, step);
            let found = self.followed.iter_mut().find(|it| it.is_some_and(|it| u32::from(it.head) == id));
            let Some(followed) = found.and_then(Option::take) else { continue };
            self.following -= 1;
            self.finish(memory, &followed, at.since(followed.submitted), precise, sampled);
        }
    }

    /// A request that was followed has been completed.
    fn finish(
        &self,
        memory: &dyn RingReader,
        followed: &Followed,
        latency: Nanos,
        precise: bool,
        sampled: &mut Sampled,
    ) {
        sampled.latencies[0].record(latency.0);
        sampled.latency_ns += latency.0;
        sampled.longest = sampled.longest.max(latency.0);
        let Some(request) = followed.request else { return };
        match request.asked {
            Asked::Read => sampled.latencies[1].record(latency.0),
            Asked::Write => sampled.latencies[2].record(latency.0),
            Asked::Flush => sampled.latencies[3].record(latency.0),
            Asked::Discard | Asked::Other => {}
        }
        // A driver may use the buffer again as soon as it has seen the completion: only a status seen at once is one.
        let mut status = [0xff];
        if precise && request.status.is_some_and(|addr| memory.read_guest(addr, &mut status)) && status[0] <= 2 {
            sampled.statuses += 1;
            sampled.errors += u64::from(status[0] != 0);
        }
    }

    /// Remembers where both sides stand. What happened in a pause happened in an order that nobody knows.
    fn skip(&mut self, memory: &dyn RingReader) {
        (self.kicked, self.called) = (None, None);
        self.avail_event = memory.avail_event(self.ring);
        self.used_event = memory.used_event(self.ring);
        self.avail_flags = memory.avail_flags(self.ring);
        self.used_flags = memory.used_flags(self.ring);
    }

    /// Gives up requests that were younger than the pause that has been, completed or not: what their latency was nobody can tell.
    fn give_up_young(&mut self, pause: Nanos) {
        let before = self.looked_at;
        for followed in &mut self.followed {
            if followed.is_some_and(|it| before.since(it.submitted) < pause) {
                *followed = None;
                self.following -= 1;
            }
        }
    }

    fn notice_kick(
        &mut self,
        memory: &dyn RingReader,
        avail: u16,
        used: u16,
        middle: Nanos,
        now: Nanos,
        sampled: &mut Sampled,
    ) {
        let came = avail.wrapping_sub(self.avail);
        let due = if self.event_idx {
            crosses_event(self.avail_event, avail, self.avail)
        } else {
            self.used_flags & USED_F_NO_NOTIFY == 0
        };
        let event = memory.avail_event(self.ring);
        if let Some((since, used_then, event_then)) = self.kicked
            && (used != used_then || event != event_then)
        {
            sampled.pickups += 1;
            sampled.pickup_ns += now.since(since).0;
            self.kicked = None;
        }
        // What came in a pause may have been many submissions, each with a kick.
        if came == 1 || came > 0 && now.since(self.looked_at) <= PRECISE_MAX {
            sampled.submissions += u64::from(came);
            if due {
                // One kick, however many requests it is for.
                sampled.kicks += 1;
                self.kicked.get_or_insert((middle, self.used, self.avail_event));
            }
        }
        self.avail_event = event;
        self.used_flags = memory.used_flags(self.ring);
    }

    fn notice_call(
        &mut self,
        memory: &dyn RingReader,
        avail: u16,
        used: u16,
        middle: Nanos,
        now: Nanos,
        sampled: &mut Sampled,
    ) {
        let went = used.wrapping_sub(self.used);
        let event = memory.used_event(self.ring);
        let due = if self.event_idx {
            // A driver that asked for one since the last look had seen everything until then: what it asked for has come.
            crosses_event(self.used_event, used, self.used) || crosses_event(event, used, self.used)
        } else {
            self.avail_flags & AVAIL_F_NO_INTERRUPT == 0
        };
        if let Some((since, event_then, avail_then)) = self.called
            && (event != event_then || avail != avail_then)
        {
            let took = now.since(since).0;
            sampled.reactions += 1;
            sampled.reaction_ns += took;
            sampled.reaction_max_ns = sampled.reaction_max_ns.max(took);
            self.called = None;
        }
        if went == 1 || went > 0 && now.since(self.looked_at) <= PRECISE_MAX {
            sampled.completions += u64::from(went);
            if due {
                sampled.calls += 1;
                self.called.get_or_insert((middle, event, avail));
            }
        }
        self.used_event = event;
        self.avail_flags = memory.avail_flags(self.ring);
    }

    /// Reads a chain. `None` if it makes no sense.
    fn read(
        &self,
        memory: &dyn RingReader,
        head: u16,
        place: u16,
        trail: &mut Trail,
        sampled: &mut Sampled,
    ) -> Option<Request> {
        let mut chain = Chain::new(memory, self.ring, self.layout.size(), head);
        let mut request = Request { asked: Asked::Other, bytes: 0, written: 0, at: None, status: None };
        let mut pieces = [(0_u64, 0_u32); CHAIN_MAX];
        let mut count = 0;
        let mut last = None;
        while let Some(descriptor) = chain.next()? {
            if count == 0 && self.is_disk {
                self.read_header(memory, &descriptor, &mut request);
            }
            pieces[count] = (descriptor.addr, descriptor.len);
            count += 1;
            let len = u64::from(descriptor.len);
            request.bytes += len;
            if descriptor.flags & DESC_F_WRITE != 0 {
                request.written += len;
            }
            last = Some(descriptor);
        }
        let mut data = 0..count;
        if self.is_disk {
            // Header and status are no data. The status is the last byte that the device writes.
            let last = last.filter(|it| it.flags & DESC_F_WRITE != 0 && it.len > 0)?;
            request.status = last.addr.checked_add(u64::from(last.len) - 1);
            request.bytes = request.bytes.checked_sub(HEADER_BYTES + 1)?;
            request.written -= 1;
            data = usize::from(pieces[0].1 as u64 == HEADER_BYTES)..count - usize::from(last.len == 1);
        } else if request.written > 0 {
            request.asked = Asked::Read;
        } else {
            request.asked = Asked::Write;
        }
        self.count(&request, place, pieces.get(data).unwrap_or_default(), trail, sampled);
        Some(request)
    }

    /// A disk's header: type (u32), reserved (u32), sector (u64) (virtio 1.3 §5.2.6).
    fn read_header(&self, memory: &dyn RingReader, descriptor: &Descriptor, request: &mut Request) {
        let mut header = [0; HEADER_BYTES as usize];
        if u64::from(descriptor.len) < HEADER_BYTES || !memory.read_guest(descriptor.addr, &mut header) {
            return;
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        request.asked = match u32::from_le_bytes([t0, t1, t2, t3]) {
            0 => Asked::Read,
            1 => Asked::Write,
            4 => Asked::Flush,
            11 | 13 => Asked::Discard,
            _ => Asked::Other,
        };
        if matches!(request.asked, Asked::Read | Asked::Write) {
            request.at = u64::from_le_bytes(sector).checked_mul(512);
        }
    }

    fn count(&self, request: &Request, place: u16, data: &[(u64, u32)], trail: &mut Trail, sampled: &mut Sampled) {
        sampled.requests += 1;
        sampled.asked[request.asked as usize] += 1;
        sampled.bytes += request.bytes;
        sampled.written += request.written;
        if let Some(at) = request.at {
            if let Some((before, end, bytes)) = trail.last {
                // Others have passed in between, mostly: where all are of one length, a stream has gone on by as many of it.
                let between = u64::from(place.wrapping_sub(before).wrapping_sub(1));
                // One that lies before it may have begun anew at the front of the disk.
                if between == 0 || (bytes == request.bytes && at >= end) {
                    sampled.successors += 1;
                    sampled.sequential += u64::from(end.checked_add(between * bytes) == Some(at));
                }
            }
            trail.last = at.checked_add(request.bytes).map(|end| (place, end, request.bytes));
        }
        // A request of any length is bounded in what it costs.
        let mut room = PAGES_PER_REQUEST;
        for &(addr, len) in data.iter().filter(|(_, len)| *len > 0) {
            let (first, last) = (addr / PAGE, addr.saturating_add(u64::from(len) - 1) / PAGE);
            for page in (first..=last).take(room) {
                sampled.pages.touch(page);
                room -= 1;
            }
            if let Some(page) = trail.page.replace(last) {
                sampled.neighbours += 1;
                sampled.local += u64::from(first == page || first == page + 1);
            }
        }
    }
}

/// Bytes of a disk's request header.
const HEADER_BYTES: u64 = 16;
/// Bytes of a page of guest memory, as it is counted here.
const PAGE: u64 = 4096;
/// Pages of one request that are counted at most.
const PAGES_PER_REQUEST: usize = 256;

/// Walks a chain of descriptors, into an indirect table if there is one.
struct Chain<'a> {
    memory: &'a dyn RingReader,
    ring: u32,
    /// Address of the indirect table, if in one.
    table: Option<u64>,
    size: u16,
    next: Option<u16>,
    left: usize,
}

impl<'a> Chain<'a> {
    fn new(memory: &'a dyn RingReader, ring: u32, size: u16, head: u16) -> Self {
        Chain { memory, ring, table: None, size, next: Some(head), left: CHAIN_MAX }
    }

    /// The next descriptor; `Some(None)` at the end, `None` if the chain makes no sense or is too long.
    #[expect(clippy::option_option, reason = "an end and an error are two things, and neither says more")]
    fn next(&mut self) -> Option<Option<Descriptor>> {
        let Some(index) = self.next else { return Some(None) };
        if index >= self.size || self.left == 0 {
            return None;
        }
        self.left -= 1;
        let descriptor = match self.table {
            None => self.memory.descriptor(self.ring, index),
            Some(table) => {
                let mut bytes = [0; 16];
                let addr = table.checked_add(u64::from(index) * 16)?;
                if !self.memory.read_guest(addr, &mut bytes) {
                    return None;
                }
                Descriptor::from_le_bytes(bytes)
            }
        };
        if descriptor.flags & DESC_F_INDIRECT != 0 {
            let entries = u16::try_from(descriptor.len / 16).ok().filter(|entries| *entries > 0)?;
            if self.table.replace(descriptor.addr).is_some() {
                return None;
            }
            (self.size, self.next) = (entries, Some(0));
            return self.next();
        }
        self.next = (descriptor.flags & DESC_F_NEXT != 0).then_some(descriptor.next);
        Some(Some(descriptor))
    }
}

#[cfg(test)]
mod tests;
