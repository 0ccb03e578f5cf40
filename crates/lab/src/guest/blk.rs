//! Block requests on a ring: fixed slots, each with its header, status byte, indirect table and data buffer.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, ensure};
use warmswap_wire::ring::{DESC_F_WRITE, DESC_SIZE, Descriptor, Layout};

use super::clock::now_ns;
use super::memory::{GuestMemory, Window};
use super::notify::EventFd;
use super::vring::{Vring, VringFault};

/// Bytes of a block: the unit of all requests.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of a sector: the unit of the device.
const SECTOR: u64 = 512;

/// What the status byte holds until the device writes it.
const STATUS_UNWRITTEN: u8 = 0xee;

/// Entries of a table that any ring may have.
const INDIRECT_MAX: u16 = 4;

/// Offsets in a slot's control area.
const HEADER: usize = 0;
const STATUS: usize = 24;
const RANGE: usize = 32;
const TABLE: usize = 64;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// A read into an address no memory region holds. Kills backends that trust their guest.
    Poison,
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Kind::Read | Kind::Poison => 0,
            Kind::Write => 1,
            Kind::Flush => 4,
            Kind::Discard => 11,
            Kind::WriteZeroes => 13,
        }
    }
}

/// A request for `blocks` blocks from `block` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// What to do.
    pub(crate) kind: Kind,
    /// First block.
    pub(crate) block: u64,
    /// Number of blocks; zero for a flush.
    pub(crate) blocks: u32,
    /// Into how many descriptors the data is cut.
    pub(crate) segments: u16,
    /// Use a direct chain even where indirect descriptors were negotiated.
    pub(crate) direct: bool,
}

impl Request {
    /// A read into one segment.
    pub(crate) fn read(block: u64, blocks: u32) -> Self {
        Request { kind: Kind::Read, block, blocks, segments: 1, direct: false }
    }

    /// A write from one segment.
    pub(crate) fn write(block: u64, blocks: u32) -> Self {
        Request { kind: Kind::Write, ..Request::read(block, blocks) }
    }

    /// A flush.
    pub(crate) fn flush() -> Self {
        Request { kind: Kind::Flush, ..Request::read(0, 0) }
    }

    /// Bytes of data the request moves through its buffer.
    pub(crate) fn data_bytes(&self) -> usize {
        match self.kind {
            Kind::Read | Kind::Write | Kind::Poison => self.blocks as usize * BLOCK,
            Kind::Flush | Kind::Discard | Kind::WriteZeroes => 0,
        }
    }

    /// Bytes a device reports as written: the data of a read, and the status byte.
    pub(crate) fn used_bytes(&self) -> u32 {
        match self.kind {
            Kind::Read => self.blocks * BLOCK as u32 + 1,
            _ => 1,
        }
    }
}

/// The status byte of a completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u8);

impl Status {
    /// VIRTIO_BLK_S_OK.
    pub(crate) const OK: Status = Status(0);
    /// VIRTIO_BLK_S_IOERR.
    pub(crate) const IO_ERROR: Status = Status(1);
    /// The device completed the request without a status.
    pub(crate) const UNWRITTEN: Status = Status(STATUS_UNWRITTEN);
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Status::OK => f.write_str("OK"),
            Status::IO_ERROR => f.write_str("IOERR"),
            Status(2) => f.write_str("UNSUPP"),
            Status::UNWRITTEN => f.write_str("unwritten"),
            Status(other) => write!(f, "{other:#x}"),
        }
    }
}

/// Number of a slot, below the queue's depth.
pub(crate) type Slot = u16;

/// A completed request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    /// Its slot, free again.
    pub(crate) slot: Slot,
    /// The head of its chain, free again.
    pub(crate) head: u16,
    /// The request.
    pub(crate) request: Request,
    /// Status byte.
    pub(crate) status: Status,
    /// Length in the used entry.
    pub(crate) len: u32,
    /// When it was submitted.
    pub(crate) submitted_ns: u64,
    /// When it was popped.
    pub(crate) completed_ns: u64,
}

/// Something the device did that no device may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault(pub(crate) VringFault);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            VringFault::NotOutstanding { id, used_idx } => {
                write!(f, "used entry {used_idx} names head {id}, which is not outstanding")
            }
            VringFault::UsedIndex { found, taken, outstanding } => {
                write!(f, "used.idx is {found} after {taken} entries with {outstanding} outstanding")
            }
        }
    }
}

impl std::error::Error for Fault {}

/// Size and layout of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueShape {
    /// Entries of the ring, a power of two.
    pub(crate) size: u16,
    /// Slots: most requests in flight.
    pub(crate) depth: u16,
    /// Largest request in blocks.
    pub(crate) blocks_max: u32,
    /// Most data segments of a request.
    pub(crate) segments_max: u16,
    /// Index both rings start at.
    pub(crate) start: u16,
}

#[derive(Debug)]
struct SlotState {
    control: Window,
    data: Window,
    /// The request in flight, and when it was submitted.
    busy: Option<(Request, u64)>,
    head: u16,
}

/// One queue of a block device with everything it needs. See the module's page for its use.
#[derive(Debug)]
pub(crate) struct BlkQueue {
    index: u16,
    shape: QueueShape,
    vring: Vring,
    slots: Vec<SlotState>,
    slot_of_head: Vec<Slot>,
    indirect: bool,
    chain: Vec<Descriptor>,
    kick: EventFd,
    /// What the device signals, unless it is masked.
    call: EventFd,
}

impl BlkQueue {
    /// A queue in `memory`: ring and control areas in region 0, data buffers in the last region.
    pub(crate) fn new(memory: &mut GuestMemory, index: u16, shape: QueueShape) -> anyhow::Result<Self> {
        let layout = Layout::new(shape.size).context("the queue size must be a power of two up to 32768")?;
        let chain_max = shape.segments_max + 2;
        // A table takes one entry of the ring. Drivers make tables that are longer than a small ring, and devices take
        // them.
        ensure!(
            chain_max <= shape.size.max(INDIRECT_MAX),
            "{} segments do not fit into a ring of {}",
            shape.segments_max,
            shape.size
        );
        let ring = memory.allocate(0, Vring::bytes(layout), 4096)?;
        let control_bytes = TABLE + usize::from(chain_max) * DESC_SIZE as usize;
        let data_region = memory.regions() - 1;
        let mut slots = Vec::with_capacity(shape.depth.into());
        for _ in 0..shape.depth {
            let control = memory.allocate(0, control_bytes, 64)?;
            let data = memory.allocate(data_region, shape.blocks_max as usize * BLOCK, BLOCK as u64)?;
            slots.push(SlotState { control, data, busy: None, head: 0 });
        }
        Ok(BlkQueue {
            index,
            shape,
            vring: Vring::new(ring, layout, false, shape.start),
            slots,
            slot_of_head: vec![0; shape.size.into()],
            indirect: false,
            chain: Vec::with_capacity(chain_max.into()),
            kick: EventFd::new()?,
            call: EventFd::new()?,
        })
    }

    /// Makes the ring new for the negotiated features. Requests in flight are forgotten, as a guest that reboots does.
    pub(crate) fn reset(&mut self, event_idx: bool, indirect: bool, start: u16) {
        self.indirect = indirect;
        self.vring.reset(event_idx, start);
        self.slots.iter_mut().for_each(|slot| slot.busy = None);
        self.kick.take();
        self.call.take();
    }

    /// Index of the queue in its device.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Size and layout.
    pub(crate) fn shape(&self) -> &QueueShape {
        &self.shape
    }

    /// The ring.
    pub(crate) fn vring(&self) -> &Vring {
        &self.vring
    }

    /// The descriptor by which the device is kicked.
    pub(crate) fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The descriptor by which the device calls.
    pub(crate) fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// Puts another call descriptor in place and returns the old one.
    pub(crate) fn replace_call_fd(&mut self, call: EventFd) -> EventFd {
        std::mem::replace(&mut self.call, call)
    }

    /// Data buffer of a slot.
    pub(crate) fn data(&self, slot: Slot) -> &Window {
        &self.slots[usize::from(slot)].data
    }

    /// Indirect table of a slot.
    pub(crate) fn table(&self, slot: Slot) -> Window {
        let control = &self.slots[usize::from(slot)].control;
        control.part(TABLE, control.length - TABLE)
    }

    /// Gives an idle slot another data buffer (hotplugged memory) and returns the old one.
    pub(crate) fn replace_data(&mut self, slot: Slot, data: Window) -> Window {
        let state = &mut self.slots[usize::from(slot)];
        assert!(state.busy.is_none(), "the buffer of a busy slot belongs to the device");
        assert!(data.length >= self.shape.blocks_max as usize * BLOCK, "the buffer is too small");
        std::mem::replace(&mut state.data, data)
    }

    /// The request in flight in a slot, and when it was submitted.
    pub(crate) fn in_flight(&self, slot: Slot) -> Option<(Request, u64)> {
        self.slots[usize::from(slot)].busy
    }

    /// Head of the request in flight in a slot.
    pub(crate) fn head(&self, slot: Slot) -> u16 {
        self.slots[usize::from(slot)].head
    }

    /// Publishes `request` from `slot`. False: the ring has too few free descriptors now.
    ///
    /// The data of a write must be in the slot's buffer already. Kick afterwards, once for any number of requests.
    pub(crate) fn submit(&mut self, slot: Slot, request: Request) -> bool {
        assert!(self.slots[usize::from(slot)].busy.is_none(), "slot {slot} is busy");
        assert!(request.blocks <= self.shape.blocks_max || request.data_bytes() == 0, "{request:?} is too large");
        self.write_control(slot, &request);
        self.build_chain(slot, &request);
        let Some(head) = self.publish(slot, &request) else { return false };
        self.slot_of_head[usize::from(head)] = slot;
        let state = &mut self.slots[usize::from(slot)];
        state.head = head;
        state.busy = Some((request, now_ns()));
        true
    }

    fn write_control(&self, slot: Slot, request: &Request) {
        let control = &self.slots[usize::from(slot)].control;
        let at = control.start;
        let memory = &control.mapping;
        let ranged = matches!(request.kind, Kind::Discard | Kind::WriteZeroes);
        let sector = request.block * (BLOCK as u64 / SECTOR);
        memory.u32(at + HEADER).store(request.kind.code(), Ordering::Relaxed);
        memory.u32(at + HEADER + 4).store(0, Ordering::Relaxed);
        memory.u64(at + HEADER + 8).store(if ranged { 0 } else { sector }, Ordering::Relaxed);
        memory.u8(at + STATUS).store(STATUS_UNWRITTEN, Ordering::Relaxed);
        if ranged {
            memory.u64(at + RANGE).store(sector, Ordering::Relaxed);
            memory.u32(at + RANGE + 8).store(request.blocks * (BLOCK as u32 / SECTOR as u32), Ordering::Relaxed);
            memory.u32(at + RANGE + 12).store(0, Ordering::Relaxed);
        }
    }

    /// Fills `self.chain` with header, data or range, and status.
    fn build_chain(&mut self, slot: Slot, request: &Request) {
        let state = &self.slots[usize::from(slot)];
        let control = state.control.guest;
        let descriptor = |addr: u64, len: u32, flags: u16| Descriptor { addr, len, flags, next: 0 };
        self.chain.clear();
        self.chain.push(descriptor(control + HEADER as u64, 16, 0));
        match request.kind {
            Kind::Flush => {}
            Kind::Discard | Kind::WriteZeroes => self.chain.push(descriptor(control + RANGE as u64, 16, 0)),
            Kind::Poison => self.chain.push(descriptor(GuestMemory::unmapped_address(), 4096, DESC_F_WRITE)),
            Kind::Read | Kind::Write => {
                let flags = if request.kind == Kind::Read { DESC_F_WRITE } else { 0 };
                let segments = u32::from(request.segments.clamp(1, self.shape.segments_max));
                let whole = request.blocks * BLOCK as u32;
                let each = (whole / segments).next_multiple_of(SECTOR as u32);
                let mut done = 0;
                while done < whole {
                    let len = each.min(whole - done);
                    self.chain.push(descriptor(state.data.guest + u64::from(done), len, flags));
                    done += len;
                }
            }
        }
        self.chain.push(descriptor(control + STATUS as u64, 1, DESC_F_WRITE));
    }

    fn publish(&mut self, slot: Slot, request: &Request) -> Option<u16> {
        if !self.indirect || request.direct {
            return self.vring.add(&self.chain);
        }
        let control = &self.slots[usize::from(slot)].control;
        let entries = self.chain.len() as u16;
        for (index, descriptor) in self.chain.iter().enumerate() {
            let last = index + 1 == self.chain.len();
            let (more, next) = if last { (0, 0) } else { (warmswap_wire::ring::DESC_F_NEXT, index as u16 + 1) };
            write_descriptor(control, index, Descriptor { flags: descriptor.flags | more, next, ..*descriptor });
        }
        self.vring.add_indirect(control.guest + TABLE as u64, entries)
    }

    /// Kicks the device if it asked for it, once for all that was submitted since. True: the kick was sent.
    pub(crate) fn kick(&mut self) -> bool {
        let needed = self.vring.needs_kick();
        if needed {
            self.kick.signal();
        }
        needed
    }

    /// As [`BlkQueue::kick`], but the kick goes astray. True: it was due.
    pub(crate) fn lose_kick(&mut self) -> bool {
        self.vring.needs_kick()
    }

    /// Takes the next completed request.
    ///
    /// # Errors
    /// The device broke the ring. The faulty entry is skipped where that is possible.
    pub(crate) fn pop(&mut self) -> Result<Option<Completion>, Fault> {
        let Some(used) = self.vring.pop().map_err(Fault)? else { return Ok(None) };
        let slot = self.slot_of_head[usize::from(used.head)];
        let state = &mut self.slots[usize::from(slot)];
        let (request, submitted_ns) = state.busy.take().expect("an outstanding head belongs to a busy slot");
        let status = Status(state.control.mapping.u8(state.control.start + STATUS).load(Ordering::Relaxed));
        let completed_ns = now_ns();
        Ok(Some(Completion { slot, head: used.head, request, status, len: used.len, submitted_ns, completed_ns }))
    }

    /// Waits until the device calls, at most `timeout`, and takes the call.
    #[allow(dead_code, reason = "part of the interface: instruments with many descriptors poll them together instead")]
    pub(crate) fn wait_for_call(&self, timeout: Duration) -> std::io::Result<bool> {
        Ok(self.call.wait(timeout)? && self.call.take())
    }

    /// Tells the device that calls are not wanted (while popping, or when polling).
    pub(crate) fn disable_calls(&mut self) {
        self.vring.disable_calls();
    }

    /// Wants the next completion to call. False: something was used meanwhile, pop again before waiting.
    pub(crate) fn enable_calls(&mut self) -> bool {
        self.vring.enable_calls()
    }
}

/// Writes entry `index` of the indirect table in a control area.
fn write_descriptor(control: &Window, index: usize, descriptor: Descriptor) {
    let bytes = descriptor.to_le_bytes();
    let at = control.start + TABLE + index * DESC_SIZE as usize;
    let word = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().expect("eight bytes"));
    control.mapping.u64(at).store(word(0), Ordering::Relaxed);
    control.mapping.u64(at + 8).store(word(8), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(indirect: bool) -> BlkQueue {
        let mut memory = GuestMemory::new(16 << 20).expect("memory");
        let shape = QueueShape { size: 16, depth: 4, blocks_max: 8, segments_max: 6, start: 65533 };
        let mut queue = BlkQueue::new(&mut memory, 0, shape).expect("queue");
        queue.reset(true, indirect, shape.start);
        queue
    }

    #[test]
    fn a_request_is_cut_into_segments_of_whole_sectors() {
        let mut queue = queue(false);
        queue.build_chain(0, &Request { segments: 3, ..Request::write(0, 2) });
        let lengths: Vec<u32> = queue.chain.iter().map(|descriptor| descriptor.len).collect();
        assert_eq!(lengths, [16, 3072, 3072, 2048, 1]);
    }

    #[test]
    fn direct_chains_take_descriptors_and_indirect_ones_take_one() {
        for (indirect, expected) in [(false, 16 - 5), (true, 15)] {
            let mut queue = queue(indirect);
            assert!(queue.submit(1, Request { segments: 3, ..Request::read(5, 2) }));
            assert_eq!(queue.vring().free_descriptors(), expected);
            assert!(queue.in_flight(1).is_some());
            assert!(queue.kick());
            assert!(queue.kick_fd().take());
        }
    }

    #[test]
    fn a_full_ring_refuses_without_a_trace() {
        let mut queue = queue(false);
        assert!(queue.submit(0, Request { segments: 6, ..Request::read(0, 8) }));
        assert!(queue.submit(1, Request { segments: 6, ..Request::read(8, 8) }));
        assert!(!queue.submit(2, Request::read(16, 1)));
        assert!(queue.in_flight(2).is_none());
    }
}
