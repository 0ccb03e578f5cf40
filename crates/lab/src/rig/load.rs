//! The load, and the oracle that judges every completion of it.

use std::sync::atomic::AtomicU64;

use crate::guest::{BLOCK, BlkQueue, Completion, Guest, Kind, Request, Slot, Status, VringFault, now_ns};

use super::block::{self, WORDS};
use super::ledger::Ledger;
use super::trap::Trap;
use super::verdict::Verdict;
use crate::common::rng::Rng;

/// A trickle submits one request per queue in this time.
const TRICKLE_NS: u64 = 1_000_000;
/// Draws before a slot stays idle because the blocks it wants are taken.
const DRAWS_MAX: usize = 4;

/// What the load consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Of 100 requests, how many read.
    pub(crate) reads_percent: u64,
    /// Of 100 requests, how many neither read nor write: flushes, discards, write-zeroes.
    pub(crate) others_percent: u64,
    /// Largest request in blocks.
    pub(crate) blocks_max: u32,
    /// Most segments of a request.
    pub(crate) segments_max: u16,
    /// Of 100 requests, how many use a direct chain in spite of indirect descriptors.
    pub(crate) direct_percent: u64,
    /// First blocks of the image, to which most requests go, so that they are rewritten soon.
    pub(crate) hot_blocks: u64,
    /// Whether discards and write-zeroes are offered.
    pub(crate) discards: bool,
    /// Poll the used rings instead of waiting for calls.
    pub(crate) polling: bool,
}

/// How much is submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As many requests as there are slots.
    Full,
    /// A request now and then: the machine's cores belong to somebody else.
    Trickle,
    /// Nothing: what is in flight comes back.
    Quiet,
}

#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    sequence: u64,
    generation: u64,
}

#[derive(Debug, Default)]
struct QueueLoad {
    idle: Vec<Slot>,
    pending: Vec<Pending>,
    last_submit_ns: u64,
}

/// The load of one image over all its guests.
#[derive(Debug)]
pub(crate) struct Load {
    ledger: Ledger,
    rng: Rng,
    mix: Mix,
    indirect: bool,
    queues: Vec<QueueLoad>,
    trap: Option<Trap>,
    /// Number of failovers so far: part of every stamp.
    pub(crate) generation: u64,
    /// What was found wrong.
    pub(crate) verdict: Verdict,
    /// Completions so far.
    pub(crate) completed: u64,
    last_completion_ns: u64,
    gap_start_ns: u64,
    longest_gap_ns: u64,
}

impl Load {
    /// A load on an image that holds zeroes.
    pub(crate) fn new(ledger: Ledger, rng: Rng, mix: Mix) -> Self {
        Load {
            ledger,
            rng,
            mix,
            indirect: false,
            queues: Vec::new(),
            trap: None,
            generation: 0,
            verdict: Verdict::default(),
            completed: 0,
            last_completion_ns: 0,
            gap_start_ns: 0,
            longest_gap_ns: 0,
        }
    }

    /// Blocks of the image.
    pub(crate) fn blocks(&self) -> u64 {
        self.ledger.blocks()
    }

    /// Changes what is submitted from now on.
    pub(crate) fn set_mix(&mut self, mix: Mix) {
        self.mix = mix;
    }

    /// Takes a new guest: poisons its buffers and sets a trap in its memory. Nothing of the guest before is in flight.
    pub(crate) fn attach(&mut self, guest: &mut Guest, indirect: bool) -> anyhow::Result<()> {
        self.trap = Some(Trap::new(guest.memory_mut())?);
        self.indirect = indirect;
        self.take_slots(guest);
        Ok(())
    }

    fn take_slots(&mut self, guest: &Guest) {
        self.queues.clear();
        for queue in &guest.queues {
            let depth = queue.shape().depth;
            (0..depth).for_each(|slot| poison_slot(queue, slot));
            let pending = vec![Pending::default(); depth.into()];
            self.queues.push(QueueLoad { idle: (0..depth).rev().collect(), pending, last_submit_ns: 0 });
        }
    }

    /// As [`Load::attach`] without a trap: what a real guest's recycled descriptors look like to a device that executes them
    /// again.
    pub(crate) fn attach_bare(&mut self, guest: &Guest) {
        self.trap = None;
        self.take_slots(guest);
    }

    /// Pops and judges what is complete, submits as `pace` says, kicks.
    pub(crate) fn service(&mut self, guest: &mut Guest, pace: Pace) {
        for index in 0..guest.queues.len() {
            if self.mix.polling || guest.queues[index].call_fd().take() {
                self.reap(&mut guest.queues[index]);
            }
            self.refill(&mut guest.queues[index], pace);
        }
    }

    /// Pops and judges what is complete on all queues, call or not.
    pub(crate) fn reap_all(&mut self, guest: &mut Guest) {
        guest.queues.iter_mut().for_each(|queue| self.reap(queue));
    }

    /// As Linux' `virtblk_done`: no calls while popping, then once more if something came in between.
    fn reap(&mut self, queue: &mut BlkQueue) {
        loop {
            queue.disable_calls();
            self.pop_all(queue);
            if self.mix.polling || queue.enable_calls() || !self.verdict.is_clean() {
                return;
            }
        }
    }

    fn pop_all(&mut self, queue: &mut BlkQueue) {
        loop {
            match queue.pop() {
                Ok(Some(done)) => self.judge(queue, &done),
                Ok(None) => return,
                Err(fault) => {
                    self.verdict.duplicated += 1;
                    self.verdict.note(|| format!("queue {}: {fault}; {}", queue.index(), queue.vring().describe()));
                    if matches!(fault.0, VringFault::UsedIndex { .. }) {
                        return;
                    }
                }
            }
        }
    }

    fn judge(&mut self, queue: &mut BlkQueue, done: &Completion) {
        self.completed += 1;
        self.longest_gap_ns = self.longest_gap_ns.max(done.completed_ns.saturating_sub(self.last_completion_ns));
        self.last_completion_ns = done.completed_ns;
        let Pending { sequence, generation } = self.queues[usize::from(queue.index())].pending[usize::from(done.slot)];
        let words = data_words(queue, done.slot, &done.request);
        self.judge_status(queue, done);
        match done.request.kind {
            Kind::Read => self.judge_read(&done.request, words),
            Kind::Write => self.judge_write_buffer(&done.request, words, sequence, generation),
            Kind::Flush | Kind::Discard | Kind::WriteZeroes | Kind::Poison => {}
        }
        self.ledger.acknowledge(&done.request, sequence, generation);
        self.spoil(queue, done);
        self.queues[usize::from(queue.index())].idle.push(done.slot);
    }

    fn judge_status(&mut self, queue: &BlkQueue, done: &Completion) {
        let expected = if done.request.kind == Kind::Poison { Status::IO_ERROR } else { Status::OK };
        let name = || format!("queue {} slot {} head {} {:?}", queue.index(), done.slot, done.head, done.request);
        if done.status != expected {
            self.verdict.io_errors += 1;
            self.verdict.note(|| format!("{}: status {}, expected {expected}", name(), done.status));
        }
        if done.len != done.request.used_bytes() {
            self.verdict.wrong_lengths += 1;
            self.verdict.note(|| format!("{}: length {}, expected {}", name(), done.len, done.request.used_bytes()));
        }
    }

    fn judge_read(&mut self, request: &Request, words: &[AtomicU64]) {
        for (lba, block) in (request.block..).zip(words.chunks_exact(WORDS)) {
            if let Err(found) = self.ledger.check(lba, block) {
                self.verdict.corrupted += 1;
                self.verdict.note(|| format!("read: {found}"));
            }
        }
    }

    /// A buffer the device only reads must be as it was.
    fn judge_write_buffer(&mut self, request: &Request, words: &[AtomicU64], sequence: u64, generation: u64) {
        for ((lba, sequence), block) in (request.block..).zip(sequence..).zip(words.chunks_exact(WORDS)) {
            if !self.ledger.stamp(lba, sequence, generation).matches(block) {
                self.verdict.late_writes += 1;
                self.verdict
                    .note(|| format!("the buffer of write {sequence} changed in flight: {}", block::explain(block)));
            }
        }
    }

    /// What is over must not be used again: poison for the buffer, a trap for the descriptors.
    fn spoil(&self, queue: &BlkQueue, done: &Completion) {
        block::poison(data_words(queue, done.slot, &done.request));
        if let Some(trap) = &self.trap {
            if self.indirect {
                trap.set_in_table(&queue.table(done.slot));
            }
            queue.vring().poison(done.head, trap.head(self.indirect));
        }
    }

    fn refill(&mut self, queue: &mut BlkQueue, pace: Pace) {
        let index = usize::from(queue.index());
        match pace {
            Pace::Quiet => return,
            Pace::Trickle => {
                let now = now_ns();
                if queue.vring().outstanding() > 0 || now - self.queues[index].last_submit_ns < TRICKLE_NS {
                    return;
                }
                self.queues[index].last_submit_ns = now;
                if let Some(slot) = self.queues[index].idle.pop()
                    && !self.submit(queue, slot)
                {
                    self.queues[index].idle.push(slot);
                }
            }
            Pace::Full => {
                while let Some(slot) = self.queues[index].idle.pop() {
                    if !self.submit(queue, slot) {
                        self.queues[index].idle.push(slot);
                        break;
                    }
                }
            }
        }
        queue.kick();
    }

    /// Draws a request and submits it. False: the ring is full, or every draw was in somebody's way.
    fn submit(&mut self, queue: &mut BlkQueue, slot: Slot) -> bool {
        let drawn = (0..DRAWS_MAX).find_map(|_| {
            let request = self.draw();
            self.ledger.begin(&request).then_some(request)
        });
        drawn.is_some_and(|request| self.submit_reserved(queue, slot, request))
    }

    /// Submits a request whose blocks are reserved.
    fn submit_reserved(&mut self, queue: &mut BlkQueue, slot: Slot, request: Request) -> bool {
        self.look_at_poison(queue, slot, request.data_bytes());
        let pending = Pending { sequence: self.ledger.next_sequence(&request), generation: self.generation };
        if request.kind == Kind::Write {
            let words = data_words(queue, slot, &request);
            for ((lba, sequence), block) in (request.block..).zip(pending.sequence..).zip(words.chunks_exact(WORDS)) {
                self.ledger.stamp(lba, sequence, pending.generation).write(block);
            }
        }
        let submitted = queue.submit(slot, request);
        if submitted {
            self.queues[usize::from(queue.index())].pending[usize::from(slot)] = pending;
        } else {
            self.ledger.withdraw(&request);
            block::poison(data_words(queue, slot, &request));
        }
        submitted
    }

    /// The first `length` bytes of a buffer that lay idle must hold their poison: nobody may write to it.
    fn look_at_poison(&mut self, queue: &BlkQueue, slot: Slot, length: usize) {
        let data = queue.data(slot);
        let words = data.mapping.words(data.start, length);
        if !block::is_poisoned(words) {
            self.verdict.late_writes += 1;
            let at = words.chunks_exact(WORDS).position(|block| !block::is_poisoned(block)).unwrap_or(0);
            let found = block::explain(&words[at * WORDS..(at + 1) * WORDS]);
            self.verdict.note(|| {
                format!("queue {} slot {slot}: the idle buffer was written, block {at}: {found}", queue.index())
            });
            poison_slot(queue, slot);
        }
    }

    fn draw(&mut self) -> Request {
        let kind = self.draw_kind();
        if kind == Kind::Flush {
            return Request::flush();
        }
        let largest = match self.rng.below(10) {
            0 => self.mix.blocks_max,
            1..4 => self.mix.blocks_max.min(8),
            _ => 1,
        };
        let blocks = self.rng.between(1, largest.into());
        let area = if self.rng.percent(70) { self.mix.hot_blocks } else { self.ledger.blocks() };
        let block = self.rng.below(area.max(blocks) - blocks + 1);
        let segments = self.rng.between(1, self.mix.segments_max.into()) as u16;
        Request { kind, block, blocks: blocks as u32, segments, direct: self.rng.percent(self.mix.direct_percent) }
    }

    fn draw_kind(&mut self) -> Kind {
        let draw = self.rng.below(100);
        if draw < self.mix.reads_percent {
            return Kind::Read;
        }
        if draw < 100 - self.mix.others_percent {
            return Kind::Write;
        }
        match self.rng.below(3) {
            1 if self.mix.discards => Kind::Discard,
            2 if self.mix.discards => Kind::WriteZeroes,
            _ => Kind::Flush,
        }
    }

    /// Submits the request that kills backends, and returns its slot. `None`: no slot or no room in the ring.
    pub(crate) fn submit_poison(&mut self, guest: &mut Guest, queue: usize) -> Option<Slot> {
        let slot = self.queues[queue].idle.pop()?;
        let request = Request { kind: Kind::Poison, ..Request::read(0, 1) };
        let submitted = self.submit_reserved(&mut guest.queues[queue], slot, request);
        if !submitted {
            self.queues[queue].idle.push(slot);
            return None;
        }
        guest.queues[queue].kick();
        Some(slot)
    }

    /// Requests submitted and not yet popped.
    pub(crate) fn outstanding(&self, guest: &Guest) -> u64 {
        guest.queues.iter().map(|queue| u64::from(queue.vring().outstanding())).sum()
    }

    /// When the oldest request in flight was submitted.
    pub(crate) fn oldest_ns(&self, guest: &Guest) -> Option<u64> {
        let busy = |queue: &BlkQueue| {
            (0..queue.shape().depth).filter_map(|slot| queue.in_flight(slot)).map(|(_, at)| at).min()
        };
        guest.queues.iter().filter_map(busy).min()
    }

    /// Looks at everything that must not have changed: the trap, idle buffers, pages never handed out.
    pub(crate) fn look_everywhere(&mut self, guest: &Guest) -> anyhow::Result<()> {
        self.look_at_trap();
        for (index, queue) in guest.queues.iter().enumerate() {
            for slot in self.queues[index].idle.clone() {
                self.look_at_poison(queue, slot, queue.data(slot).length);
            }
        }
        let stray = guest.memory().stray_pages()?;
        if stray > 0 {
            self.verdict.late_writes += stray;
            self.verdict.note(|| format!("{stray} pages of guest memory were written that no request ever named"));
        }
        Ok(())
    }

    /// Looks whether somebody executed a request that was over.
    pub(crate) fn look_at_trap(&mut self) {
        if self.trap.as_ref().is_some_and(Trap::has_sprung) {
            self.verdict.late_writes += 1;
            self.verdict.note(|| "a recycled descriptor was executed: the trap has sprung".into());
        }
    }

    /// Counts every request in flight as lost; their writes may have happened or not.
    pub(crate) fn give_up(&mut self, guest: &mut Guest, why: &str) {
        for index in 0..guest.queues.len() {
            let unseen = guest.queues[index].vring().used_idx().wrapping_sub(guest.queues[index].vring().taken_idx());
            if unseen > 0 {
                self.verdict.missed_calls += 1;
                self.verdict.note(|| format!("queue {index}: {unseen} completions without a call; {why}"));
                self.reap(&mut guest.queues[index]);
            }
            let queue = &guest.queues[index];
            let lost = queue.vring().outstanding();
            self.verdict.lost += u64::from(lost);
            for slot in (0..queue.shape().depth).filter(|slot| queue.in_flight(*slot).is_some()) {
                self.verdict.note(|| describe_lost(queue, slot, why));
            }
            if lost > 0 {
                self.verdict.note(|| format!("queue {index}: {}", queue.vring().describe()));
            }
        }
        self.abandon(guest, false);
    }

    /// Forgets every request in flight: its guest is shut off. What their writes would have left is possible from now on. Where the
    /// rings were `stopped`, nothing may be executed any more and the buffers are poisoned; a killed guest's memory stays as
    /// it is, for its requests may still be executed.
    pub(crate) fn abandon(&mut self, guest: &Guest, stopped: bool) {
        for (index, queue) in guest.queues.iter().enumerate() {
            for slot in 0..queue.shape().depth {
                if let Some((request, _)) = queue.in_flight(slot) {
                    let Pending { sequence, generation } = self.queues[index].pending[usize::from(slot)];
                    self.ledger.abandon(&request, sequence, generation);
                    self.queues[index].idle.push(slot);
                    if stopped {
                        poison_slot(queue, slot);
                    }
                }
            }
        }
    }

    /// Poisons the buffers of all idle slots again, after they were replaced or their guest was reset.
    pub(crate) fn poison_idle(&self, guest: &Guest) {
        for (index, queue) in guest.queues.iter().enumerate() {
            self.queues[index].idle.iter().for_each(|slot| poison_slot(queue, *slot));
        }
    }

    /// Compares the whole image with the ledger.
    pub(crate) fn check_image(&mut self, image: &std::path::Path) -> anyhow::Result<()> {
        use std::io::Read as _;
        let mut file = std::io::BufReader::with_capacity(1 << 20, std::fs::File::open(image)?);
        let mut bytes = [0; BLOCK];
        for lba in 0..self.ledger.blocks() {
            file.read_exact(&mut bytes)?;
            let words: Vec<AtomicU64> = bytes
                .chunks_exact(8)
                .map(|word| AtomicU64::new(u64::from_ne_bytes(word.try_into().expect("eight bytes"))))
                .collect();
            if let Err(found) = self.ledger.check(lba, &words) {
                self.verdict.corrupted += 1;
                self.verdict.note(|| format!("image: {found}"));
            }
        }
        Ok(())
    }

    /// Starts to look for the longest time without a completion.
    pub(crate) fn start_gap(&mut self, now: u64) {
        (self.gap_start_ns, self.last_completion_ns, self.longest_gap_ns) = (now, now, 0);
    }

    /// Longest time without a completion since [`Load::start_gap`].
    pub(crate) fn longest_gap_ns(&self) -> u64 {
        self.longest_gap_ns
    }

    /// Whether anything was completed since [`Load::start_gap`].
    pub(crate) fn progressed_since_gap(&self) -> bool {
        self.last_completion_ns > self.gap_start_ns
    }
}

/// The words of a slot's buffer that a request moves.
fn data_words<'a>(queue: &'a BlkQueue, slot: Slot, request: &Request) -> &'a [AtomicU64] {
    let data = queue.data(slot);
    let length = if request.kind == Kind::Poison { 0 } else { request.data_bytes() };
    data.mapping.words(data.start, length)
}

fn poison_slot(queue: &BlkQueue, slot: Slot) {
    let data = queue.data(slot);
    block::poison(data.mapping.words(data.start, data.length));
}

fn describe_lost(queue: &BlkQueue, slot: Slot, why: &str) -> String {
    let (request, submitted) = queue.in_flight(slot).expect("the caller looked");
    let age = now_ns().saturating_sub(submitted) / 1000;
    format!("lost: queue {} slot {slot} head {} {request:?}, {age} us old; {why}", queue.index(), queue.head(slot))
}
