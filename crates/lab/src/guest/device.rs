//! The whole guest: memory, queues and the connection, and what a VMM does to them during a VM's life.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use warmswap_wire::{MemoryRegion, VirtioFeatures};

use super::blk::{BlkQueue, QueueShape};
use super::channel::Acks;
use super::front_end::{BlkConfig, FrontEnd, InflightRegion, Wanted};
use super::memory::GuestMemory;
use super::notify::EventFd;

/// Shape of a guest.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The vhost-user socket: a backend's or the broker's.
    pub(crate) socket: PathBuf,
    /// Guest RAM in bytes.
    pub(crate) memory_bytes: u64,
    /// Number of queues.
    pub(crate) queues: u16,
    /// Shape of each queue.
    pub(crate) shape: QueueShape,
    /// Ask for EVENT_IDX.
    pub(crate) event_idx: bool,
    /// Ask for indirect descriptors.
    pub(crate) indirect: bool,
    /// Give memory region by region (ADD_MEM_REG) where the device can, instead of as a table.
    pub(crate) memory_slots: bool,
    /// Open the back-end's channel where the device has it.
    pub(crate) backend_channel: bool,
    /// Messages to have acknowledged.
    pub(crate) acks: Acks,
    /// Bound of every wait for the other side.
    pub(crate) timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            socket: PathBuf::new(),
            memory_bytes: 256 << 20,
            queues: 1,
            shape: QueueShape { size: 256, depth: 64, blocks_max: 1, segments_max: 4, start: 0 },
            event_idx: true,
            indirect: true,
            memory_slots: true,
            backend_channel: true,
            acks: Acks::Qemu,
            timeout: Duration::from_secs(5),
        }
    }
}

/// What the VMM does about in-flight regions.
#[derive(Debug)]
enum Inflight {
    /// It asks for none.
    Unwanted,
    /// It asks for one at the next start.
    Wanted,
    /// It hands this one to every back-end.
    Kept(InflightRegion),
}

/// A guest with its VMM.
#[derive(Debug)]
pub(crate) struct Guest {
    options: Options,
    memory: GuestMemory,
    /// The queues. May be taken out and moved to threads while nobody changes the connection.
    pub(crate) queues: Vec<BlkQueue>,
    front: Option<FrontEnd>,
    config: Option<BlkConfig>,
    inflight: Inflight,
    /// Where an interrupt goes while it is masked, per queue.
    masked: Vec<Option<EventFd>>,
}

impl Guest {
    /// Memory and queues; no connection yet.
    pub(crate) fn new(options: Options) -> anyhow::Result<Self> {
        let memory = GuestMemory::new(options.memory_bytes)?;
        Guest::in_memory(options, memory)
    }

    /// As [`Guest::new`], in memory that is there already.
    pub(crate) fn in_memory(options: Options, mut memory: GuestMemory) -> anyhow::Result<Self> {
        let queues = (0..options.queues)
            .map(|index| BlkQueue::new(&mut memory, index, options.shape))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let masked = queues.iter().map(|_| None).collect();
        Ok(Guest { options, memory, queues, front: None, config: None, inflight: Inflight::Unwanted, masked })
    }

    /// From the next connection on the VMM asks for an in-flight region, keeps it over all connections, and hands it to
    /// every back-end before it starts the rings. A region that it has is lost: the next back-end makes a new one.
    pub(crate) fn keep_inflight(&mut self) {
        self.inflight = Inflight::Wanted;
    }

    /// Connects, negotiates, reads the configuration space. A device that is there waits for [`Guest::start`].
    pub(crate) fn connect(&mut self) -> anyhow::Result<()> {
        let wanted = Wanted {
            event_idx: self.options.event_idx,
            indirect: self.options.indirect,
            memory_slots: self.options.memory_slots,
            backend_channel: self.options.backend_channel,
            inflight: !matches!(self.inflight, Inflight::Unwanted),
            acks: self.options.acks,
        };
        let mut front = FrontEnd::connect(&self.options.socket, wanted, self.options.timeout)?;
        ensure!(
            front.queues_max() >= self.options.queues.into(),
            "the device has {} queues, {} are wanted",
            front.queues_max(),
            self.options.queues
        );
        self.config = Some(front.config()?);
        self.front = Some(front);
        Ok(())
    }

    /// Makes the rings new and starts them: the driver's probe after a boot. Indices begin where the options say.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        self.start_at(self.options.shape.start)
    }

    /// As [`Guest::start`], with indices that begin at `start`; after a real reset that is 0.
    pub(crate) fn start_at(&mut self, start: u16) -> anyhow::Result<()> {
        let (event_idx, indirect) = (self.event_idx()?, self.indirect()?);
        for queue in &mut self.queues {
            queue.reset(event_idx, indirect, start);
        }
        let bases: Vec<u16> = self.queues.iter().map(|queue| queue.vring().used_idx()).collect();
        self.start_from(&bases)
    }

    /// Starts the rings as they are, from `bases`: after a pause with what the stop returned, after a reconnect with the
    /// VMM's own rule.
    pub(crate) fn start_from(&mut self, bases: &[u16]) -> anyhow::Result<()> {
        ensure!(bases.len() == self.queues.len(), "one base per ring");
        let front = self.front.as_mut().context("not connected")?;
        front.set_features()?;
        if front.has_inflight() {
            if let Inflight::Wanted = self.inflight {
                let shape = self.options.shape;
                self.inflight = Inflight::Kept(front.get_inflight(self.options.queues, shape.size)?);
            }
            if let Inflight::Kept(region) = &self.inflight {
                front.set_inflight(region)?;
            }
        }
        front.share_memory(&self.memory)?;
        for (queue, base) in self.queues.iter().zip(bases) {
            front.start_ring(queue, *base)?;
        }
        for queue in &self.queues {
            front.enable_ring(queue.index(), true)?;
        }
        Ok(())
    }

    /// Stops all rings and returns their bases. Completions may be waiting to be popped afterwards.
    pub(crate) fn stop(&mut self) -> anyhow::Result<Vec<u16>> {
        let front = self.front.as_mut().context("not connected")?;
        for queue in &self.queues {
            front.enable_ring(queue.index(), false)?;
        }
        self.queues.iter().map(|queue| front.stop_ring(queue.index())).collect()
    }

    /// Closes the connection without a word.
    pub(crate) fn disconnect(&mut self) {
        self.front = None;
        for index in 0..self.masked.len() {
            self.unmask_locally(index);
        }
    }

    /// Masks a queue's interrupt as QEMU does: calls go to another descriptor that interrupts nobody.
    pub(crate) fn mask(&mut self, queue: usize) -> anyhow::Result<()> {
        if self.masked[queue].is_some() {
            return Ok(());
        }
        let masked = EventFd::new()?;
        self.front.as_mut().context("not connected")?.set_call(queue as u16, &masked)?;
        self.masked[queue] = Some(masked);
        Ok(())
    }

    /// Unmasks it: calls go to the old descriptor again, and one that came meanwhile is delivered.
    pub(crate) fn unmask(&mut self, queue: usize) -> anyhow::Result<()> {
        if self.masked[queue].is_none() {
            return Ok(());
        }
        let front = self.front.as_mut().context("not connected")?;
        front.set_call(queue as u16, self.queues[queue].call_fd())?;
        // The masked descriptor may be signalled until the device has taken the message.
        front.synchronise()?;
        self.unmask_locally(queue);
        Ok(())
    }

    fn unmask_locally(&mut self, queue: usize) {
        if self.masked[queue].take().is_some_and(|masked| masked.take()) {
            self.queues[queue].call_fd().signal();
        }
    }

    /// Whether a queue's interrupt is masked.
    pub(crate) fn is_masked(&self, queue: usize) -> bool {
        self.masked[queue].is_some()
    }

    /// Gives a queue a new call descriptor for good, as when its vector is set up anew. Signals of the old one are kept.
    pub(crate) fn replace_call(&mut self, queue: usize) -> anyhow::Result<()> {
        let call = EventFd::new()?;
        let front = self.front.as_mut().context("not connected")?;
        front.set_call(queue as u16, &call)?;
        front.synchronise()?;
        let old = self.queues[queue].replace_call_fd(call);
        if old.take() {
            self.queues[queue].call_fd().signal();
        }
        Ok(())
    }

    /// Hotplugs `size` bytes of memory and returns the region's index for [`GuestMemory::allocate`].
    ///
    /// Without CONFIGURE_MEM_SLOTS the whole table is sent again; some backends must be idle then.
    pub(crate) fn plug_memory(&mut self, size: u64) -> anyhow::Result<usize> {
        let region = self.memory.plug(size)?;
        self.front.as_mut().context("not connected")?.share_memory(&self.memory)?;
        Ok(region)
    }

    /// Removes the region that was plugged last. No request may use it any more.
    pub(crate) fn unplug_memory(&mut self) -> anyhow::Result<MemoryRegion> {
        let region = self.memory.unplug().context("nothing was plugged")?;
        self.front.as_mut().context("not connected")?.share_memory(&self.memory)?;
        Ok(region)
    }

    /// Guest memory, to allocate from.
    pub(crate) fn memory_mut(&mut self) -> &mut GuestMemory {
        &mut self.memory
    }

    /// Guest memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The connection, to be waited on.
    pub(crate) fn connection(&self) -> anyhow::Result<&FrontEnd> {
        self.front.as_ref().context("not connected")
    }

    /// The connection.
    pub(crate) fn front(&mut self) -> anyhow::Result<&mut FrontEnd> {
        self.front.as_mut().context("not connected")
    }

    /// Whether there is a connection.
    pub(crate) fn is_connected(&self) -> bool {
        self.front.is_some()
    }

    /// Whether there is a connection that the other side has closed.
    pub(crate) fn is_hung_up(&self) -> anyhow::Result<bool> {
        let Some(front) = &self.front else { return Ok(false) };
        let mut fds = [PollFd::new(front, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&now)))? > 0)
    }

    /// What the device said about itself at the last connect.
    pub(crate) fn config(&self) -> anyhow::Result<&BlkConfig> {
        self.config.as_ref().context("never connected")
    }

    /// The options.
    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    fn event_idx(&mut self) -> anyhow::Result<bool> {
        Ok(self.front()?.has(VirtioFeatures::EVENT_IDX.bits()))
    }

    fn indirect(&mut self) -> anyhow::Result<bool> {
        Ok(self.front()?.has(VirtioFeatures::INDIRECT_DESC.bits()))
    }
}
