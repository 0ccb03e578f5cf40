//! The load: a driver that polls its rings and keeps each at its depth with random 4 KiB reads and writes.

use std::path::PathBuf;

use anyhow::{bail, ensure};

use super::backend::BLOCKS;
use crate::common::rng::Rng;
use crate::guest::{Acks, BLOCK, Completion, Guest, Options, QueueShape, Request, Slot, Status, Window, now_ns};

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
}

impl Shape {
    /// A guest with 256 MiB and one queue, sixteen requests deep, as QEMU makes it.
    pub(super) fn at(socket: PathBuf) -> Self {
        Shape { socket, memory_mib: 256, queues: 1, depth: 16, ring: RING, acks: Acks::Qemu, memory_slots: true }
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
    /// Broken rings are counted, not fatal: there is no broker.
    tolerant: bool,
    rng: Rng,
    buffers: Vec<Window>,
    idle: Vec<Vec<Slot>>,
}

impl Driver {
    /// Boots a guest: connects, starts the rings. No load yet.
    pub(super) fn boot(shape: &Shape, rng: Rng) -> anyhow::Result<Self> {
        let queue = QueueShape { size: shape.ring, depth: shape.depth, blocks_max: 1, segments_max: 1, start: 0 };
        let options = Options {
            socket: shape.socket.clone(),
            memory_bytes: shape.memory_mib << 20,
            queues: shape.queues,
            shape: queue,
            acks: shape.acks,
            memory_slots: shape.memory_slots,
            ..Options::default()
        };
        let mut guest = Guest::new(options)?;
        populate(&guest)?;
        let buffers = scatter_buffers(&mut guest)?;
        let idle = vec![(0..shape.depth).collect(); shape.queues.into()];
        let mut driver = Driver { guest, busy: false, duplicated: 0, tolerant: false, rng, buffers, idle };
        driver.guest.connect()?;
        driver.start()?;
        Ok(driver)
    }

    /// Counts what breaks the rules instead of failing.
    pub(super) fn tolerate(&mut self) {
        self.tolerant = true;
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

    /// Takes what completed and, if busy, submits as much. Returns the number of completions.
    pub(super) fn poll(&mut self, seen: &mut impl FnMut(&Completion)) -> anyhow::Result<usize> {
        let mut taken = 0;
        for index in 0..self.guest.queues.len() {
            taken += self.take(index, seen)?;
            if self.busy && !self.idle[index].is_empty() {
                self.fill(index);
            }
        }
        Ok(taken)
    }

    fn take(&mut self, index: usize, seen: &mut impl FnMut(&Completion)) -> anyhow::Result<usize> {
        let mut taken = 0;
        loop {
            match self.guest.queues[index].pop() {
                Ok(None) => return Ok(taken),
                Ok(Some(done)) => {
                    ensure!(done.status == Status::OK, "{:?} ended with {}", done.request, done.status);
                    ensure!(done.len == done.request.used_bytes(), "{:?} moved {} bytes", done.request, done.len);
                    seen(&done);
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

    fn fill(&mut self, index: usize) {
        let queue = &mut self.guest.queues[index];
        while let Some(slot) = self.idle[index].pop() {
            let choice = self.rng.next();
            let buffer = (choice >> 1) as usize % self.buffers.len();
            let old = queue.replace_data(slot, self.buffers[buffer].clone());
            self.buffers[buffer] = old;
            let block = (choice >> 32) % BLOCKS;
            let request = if choice & 1 == 0 { Request::read(block, 1) } else { Request::write(block, 1) };
            // One descriptor per request: the ring is larger than the depth.
            assert!(queue.submit(slot, request), "the ring is full");
        }
        queue.kick();
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

/// A turn without a completion. Others get the processor if they wait for it, as they would if this were a virtual one.
pub(super) fn pause() {
    std::thread::yield_now();
}

/// Makes all of the guest's memory present: a guest that runs for a while has touched all of it.
fn populate(guest: &Guest) -> anyhow::Result<()> {
    for (region, fd) in guest.memory().table() {
        rustix::fs::fallocate(fd, rustix::fs::FallocateFlags::empty(), region.mmap_offset, region.size)?;
    }
    Ok(())
}

/// Data buffers at equal distances over all of the guest's memory, but for what rings need at the start of each region.
fn scatter_buffers(guest: &mut Guest) -> anyhow::Result<Vec<Window>> {
    let regions: Vec<u64> = guest.memory().table().map(|(region, _)| region.size).collect();
    let whole: u64 = regions.iter().sum();
    let stride = (whole / BUFFERS_MAX).next_power_of_two().max(2 * BLOCK as u64);
    let mut buffers = Vec::new();
    for (index, size) in regions.into_iter().enumerate() {
        while let Ok(window) = guest.memory_mut().allocate(index, BLOCK, stride.min(size)) {
            buffers.push(window);
        }
    }
    ensure!(buffers.len() > 512, "only {} buffers fit into the guest's memory", buffers.len());
    Ok(buffers)
}
