//! The load: a driver that polls its rings and keeps each at its depth.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

use super::load::{Load, Stream};
use crate::common::rng::Rng;
use crate::guest::{Acks, BLOCK, Completion, Guest, GuestMemory, Options, QueueShape, Slot, Status, Window, now_ns};

/// Data buffers per guest. They lie all over its memory and every request takes another one, as a page cache does.
const BUFFERS_MAX: u64 = 4096;
/// Ring size, as `warmswap example` advises it.
const RING: u16 = 1024;
/// A guest that gets no completion for this long has lost its disk.
pub(super) const SILENCE_NS: u64 = 5_000_000_000;

/// What a guest of the bench looks like.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// The vhost-user socket.
    pub(super) socket: PathBuf,
    /// Guest RAM in MiB, all of it present.
    pub(super) memory_mib: u64,
    /// Queues.
    pub(super) queues: u16,
    /// Requests in flight per queue.
    pub(super) depth: u16,
    /// Entries of each ring.
    pub(super) ring: u16,
    /// Messages to have acknowledged.
    pub(super) acks: Acks,
    /// Memory region by region, not as a table.
    pub(super) memory_slots: bool,
    /// What it asks of its disk.
    pub(super) load: Load,
}

impl Shape {
    /// A guest with 256 MiB and one queue, sixteen requests deep, as QEMU makes it. Random 4 KiB reads and writes.
    pub(super) fn at(socket: PathBuf) -> Self {
        let (acks, load) = (Acks::Qemu, Load::MIXED);
        Shape { socket, memory_mib: 256, queues: 1, depth: 16, ring: RING, acks, memory_slots: true, load }
    }
}

/// An open loop: when requests are due, whatever has become of those before them.
#[derive(Debug)]
struct Pace {
    /// Mean time between two.
    interval_ns: f64,
    next_ns: f64,
    rng: Rng,
}

impl Pace {
    fn new(rate: f64, rng: Rng, now: u64) -> Self {
        Pace { interval_ns: 1e9 / rate, next_ns: now as f64, rng }
    }

    /// How many have become due, at most `most`. Times between them are anything up to twice the mean: a fixed beat might go along with
    /// that of whoever looks on.
    fn due(&mut self, now: u64, most: usize) -> usize {
        let mut due = 0;
        while due < most && self.next_ns <= now as f64 {
            due += 1;
            self.next_ns += self.interval_ns * 2.0 * self.rng.below(1 << 20) as f64 / f64::from(1 << 20);
        }
        due
    }
}

/// A guest under load.
#[derive(Debug)]
pub(super) struct Driver {
    /// The guest.
    pub(super) guest: Guest,
    /// Submit a new request for each that completes.
    pub(super) busy: bool,
    /// Completions of requests that were not outstanding: done twice, where that is what is looked for.
    pub(super) duplicated: u64,
    /// Kicks sent.
    pub(super) kicks: u64,
    /// Requests are sent at their times, not when others complete.
    pace: Option<Pace>,
    /// Broken rings are counted, not fatal: there is no broker.
    tolerant: bool,
    /// Requests may fail.
    failing: bool,
    stream: Stream,
    buffers: Vec<Window>,
    idle: Vec<Vec<Slot>>,
}

impl Driver {
    /// Boots a guest: connects, starts the rings. No load yet.
    pub(super) fn boot(shape: &Shape, rng: Rng) -> anyhow::Result<Self> {
        let mut guest = Guest::new(options(shape))?;
        populate(guest.memory())?;
        let buffers = scatter_buffers(guest.memory_mut(), shape.load.bytes())?;
        Driver::on(guest, buffers, shape, rng)
    }

    /// As [`Driver::boot`], in memory that is there already, and with these data buffers.
    pub(super) fn boot_in(
        memory: GuestMemory,
        mut buffers: Vec<Window>,
        shape: &Shape,
        rng: Rng,
    ) -> anyhow::Result<Self> {
        let mut guest = Guest::in_memory(options(shape), memory)?;
        for queue in &mut guest.queues {
            for slot in 0..shape.depth {
                queue.replace_data(slot, buffers.pop().context("there are fewer buffers than requests in flight")?);
            }
        }
        Driver::on(guest, buffers, shape, rng)
    }

    fn on(guest: Guest, buffers: Vec<Window>, shape: &Shape, rng: Rng) -> anyhow::Result<Self> {
        let stream = Stream::new(shape.load, shape.queues, rng);
        let idle = vec![(0..shape.depth).collect(); shape.queues.into()];
        let mut driver = Driver {
            guest,
            busy: false,
            duplicated: 0,
            kicks: 0,
            pace: None,
            tolerant: false,
            failing: false,
            stream,
            buffers,
            idle,
        };
        driver.guest.connect()?;
        driver.start()?;
        Ok(driver)
    }

    /// Counts what breaks the rules instead of failing.
    pub(super) fn tolerate(&mut self) {
        self.tolerant = true;
    }

    /// Requests may fail, and are counted as any other.
    pub(super) fn may_fail(&mut self) {
        self.failing = true;
    }

    /// From now on `rate` requests per second are sent, on all queues in turn, as long as there are slots: an open loop.
    pub(super) fn pace(&mut self, rate: f64, rng: Rng) {
        self.pace = Some(Pace::new(rate, rng, now_ns()));
    }

    /// Makes the rings new and starts them: the guest was connected anew and what it had in flight is forgotten.
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        self.guest.start()?;
        for (idle, queue) in self.idle.iter_mut().zip(&mut self.guest.queues) {
            *idle = (0..queue.shape().depth).collect();
            queue.disable_calls();
        }
        Ok(())
    }

    /// When the next request of an open loop is due.
    pub(super) fn next_due_ns(&self) -> Option<u64> {
        self.pace.as_ref().map(|pace| pace.next_ns as u64)
    }

    /// As [`Driver::poll`], and tells the first page of each buffer as well.
    pub(super) fn poll_with_pages(&mut self, seen: &mut impl FnMut(&Completion, u64)) -> anyhow::Result<usize> {
        self.poll_queues(seen)
    }

    /// Takes what completed and, if busy, submits as much. Returns the number of completions.
    pub(super) fn poll(&mut self, seen: &mut impl FnMut(&Completion)) -> anyhow::Result<usize> {
        self.poll_queues(&mut |done, _| seen(done))
    }

    fn poll_queues(&mut self, seen: &mut impl FnMut(&Completion, u64)) -> anyhow::Result<usize> {
        let mut taken = 0;
        for index in 0..self.guest.queues.len() {
            taken += self.take(index, seen)?;
            if self.busy && !self.idle[index].is_empty() {
                self.submit(index);
            }
        }
        Ok(taken)
    }

    fn take(&mut self, index: usize, seen: &mut impl FnMut(&Completion, u64)) -> anyhow::Result<usize> {
        let mut taken = 0;
        loop {
            match self.guest.queues[index].pop() {
                Ok(None) => return Ok(taken),
                Ok(Some(done)) => {
                    let failed = self.failing && done.status == Status::IO_ERROR;
                    ensure!(failed || done.status == Status::OK, "{:?} ended with {}", done.request, done.status);
                    let whole = done.len == done.request.used_bytes();
                    ensure!(failed || whole, "{:?} moved {} bytes", done.request, done.len);
                    seen(&done, self.guest.queues[index].data(done.slot).guest / BLOCK as u64);
                    self.idle[index].push(done.slot);
                    taken += 1;
                }
                Err(fault) if self.tolerant => {
                    self.duplicated += 1;
                    // An index that ran too far stays where it is.
                    if matches!(fault.0, crate::guest::VringFault::UsedIndex { .. }) {
                        return Ok(taken);
                    }
                }
                Err(fault) => bail!("the device broke ring {index}: {fault}"),
            }
        }
    }

    fn submit(&mut self, index: usize) {
        let most = self.idle[index].len();
        let due = self.pace.as_mut().map_or(most, |pace| pace.due(now_ns(), most));
        if due == 0 {
            return;
        }
        let queue = &mut self.guest.queues[index];
        for _ in 0..due {
            let slot = self.idle[index].pop().expect("no more are due than are idle");
            let (request, choice) = self.stream.next(index);
            let buffer = choice % self.buffers.len();
            let old = queue.replace_data(slot, self.buffers[buffer].clone());
            self.buffers[buffer] = old;
            // One descriptor per request: the ring is larger than the depth.
            assert!(queue.submit(slot, request), "the ring is full");
        }
        self.kicks += u64::from(queue.kick());
    }

    /// Runs the load for `nanoseconds`.
    pub(super) fn run_for(&mut self, nanoseconds: u64) -> anyhow::Result<()> {
        self.busy = true;
        let until = now_ns() + nanoseconds;
        while now_ns() < until {
            if self.poll(&mut |_| {})? == 0 {
                pause();
            }
        }
        Ok(())
    }

    /// Ends the load and waits until nothing is in flight.
    pub(super) fn rest(&mut self) -> anyhow::Result<()> {
        self.busy = false;
        let until = now_ns() + SILENCE_NS;
        while self.outstanding() > 0 {
            ensure!(now_ns() < until, "{} requests got no answer: {}", self.outstanding(), self.describe());
            if self.poll(&mut |_| {})? == 0 {
                pause();
            }
        }
        Ok(())
    }

    /// Requests in flight.
    pub(super) fn outstanding(&self) -> u64 {
        self.guest.queues.iter().map(|queue| u64::from(queue.vring().outstanding())).sum()
    }

    /// The rings, for reports of failures.
    pub(super) fn describe(&self) -> String {
        self.guest.queues.iter().map(|queue| queue.vring().describe()).collect::<Vec<_>>().join("; ")
    }
}

/// The guest's options.
fn options(shape: &Shape) -> Options {
    let (size, blocks_max) = (shape.ring, shape.load.blocks);
    Options {
        socket: shape.socket.clone(),
        memory_bytes: shape.memory_mib << 20,
        queues: shape.queues,
        shape: QueueShape { size, depth: shape.depth, blocks_max, segments_max: 1, start: 0 },
        acks: shape.acks,
        memory_slots: shape.memory_slots,
        ..Options::default()
    }
}

/// A turn without a completion. Others get the processor if they wait for it, as they would if this were a virtual one.
pub(super) fn pause() {
    std::thread::yield_now();
}

/// Makes all of a guest's memory present: a guest that runs for a while has touched all of it.
pub(super) fn populate(memory: &GuestMemory) -> anyhow::Result<()> {
    for (region, fd) in memory.table() {
        rustix::fs::fallocate(fd, rustix::fs::FallocateFlags::empty(), region.mmap_offset, region.size)?;
    }
    Ok(())
}

/// Data buffers of `bytes` at equal distances over all of a guest's memory, but for what was taken of it already.
pub(super) fn scatter_buffers(memory: &mut GuestMemory, bytes: usize) -> anyhow::Result<Vec<Window>> {
    let regions: Vec<u64> = memory.table().map(|(region, _)| region.size).collect();
    let whole: u64 = regions.iter().sum();
    let stride = (whole / BUFFERS_MAX).next_power_of_two().max(2 * bytes as u64);
    let mut buffers = Vec::new();
    for (index, size) in regions.into_iter().enumerate() {
        while let Ok(window) = memory.allocate(index, bytes, stride.min(size)) {
            buffers.push(window);
        }
    }
    ensure!(buffers.len() > 512, "only {} buffers fit into the guest's memory", buffers.len());
    Ok(buffers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_in_the_mean_and_what_found_no_slot_is_sent_later() {
        let mut pace = Pace::new(1_000.0, Rng::new(1, 1), 0);
        let sent: usize = (0..10_000_u64).map(|ms| pace.due(ms * 1_000_000, 64)).sum();
        assert!((9_500..10_500).contains(&sent), "{sent} in ten seconds");
        let mut pace = Pace::new(1_000.0, Rng::new(1, 2), 0);
        assert_eq!(pace.due(1_000_000_000, 3), 3, "more are due than there is room for");
        assert_eq!(pace.due(1_000_000_000, 3), 3);
    }
}
