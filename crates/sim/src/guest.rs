//! The guest's driver: virtio-blk requests in real split rings, and what it makes of their completion.
//!
//! Checked here: every used id is in flight, once; status and length are right; what was read is admissible. Buffers, indirect tables
//! and descriptors of a request that is done are overwritten, so that whoever carries it out again shows.

use warmswap_core::Nanos;
use warmswap_wire::MemoryRegion;
use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, FLAGS, IDX, Layout, crosses_event};

use crate::ledger::{BLOCK, Ledger, POISON, Stamp};
use crate::memory::{Effect, Memory, Obj};
use crate::options::Options;
use crate::random::Random;

/// Where the VMM has the guest's memory in its own address space.
pub(crate) const USER: u64 = 0x7f00_0000_0000;
/// Where memory that is plugged in lies for the guest.
pub(crate) const HOT: u64 = 0x4000_0000;
/// Bytes of it.
pub(crate) const HOT_SIZE: u64 = 0x1_0000;
/// What descriptors of requests that are done point at.
pub(crate) const NOWHERE: u64 = 0xdead_0000_0000;

const RING_SPACE: u64 = 0x3000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOT: u64 = 3072;
const STATUS: u64 = 16;
const TABLE: u64 = 32;
const DATA: u64 = 512;
const HOT_SLOT: u64 = 2048;

/// Types of requests (virtio 1.3 §5.2.6).
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
/// One that no backend survives.
pub(crate) const KILLER: u32 = 0xdead;
/// A status no device writes.
const UNWRITTEN: u8 = 0xff;

/// A request in flight.
#[derive(Clone, Debug)]
pub(crate) struct Issued {
    pub(crate) kind: u32,
    pub(crate) lba: u64,
    pub(crate) blocks: u16,
    slot: u16,
    data: u64,
    hot: bool,
    descriptors: Vec<u16>,
    durable: Vec<u64>,
    pub(crate) order: u64,
    pub(crate) at: Nanos,
}

/// One ring as its driver has it.
#[derive(Debug)]
pub(crate) struct DriverRing {
    pub(crate) index: u16,
    pub(crate) layout: Layout,
    free: Vec<u16>,
    free_slots: Vec<u16>,
    /// By head.
    pub(crate) issued: Vec<Option<Issued>>,
    pub(crate) inflight: u16,
    /// The next index of the available ring, and what of it has been published.
    pub(crate) avail: u16,
    pub(crate) published: u16,
    /// The next index of the used ring.
    pub(crate) used: u16,
    pub(crate) kick: Obj,
    /// Call descriptors the VMM listens on; the last one is the current one.
    pub(crate) calls: Vec<Obj>,
    pub(crate) submit_at: Nanos,
    /// When the interrupt handler is to run; when its processor goes on.
    pub(crate) interrupt_at: Nanos,
    /// See `interrupt_at`.
    pub(crate) wake_at: Nanos,
}

/// The guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) memory: Obj,
    pub(crate) size: u64,
    /// What is plugged in, and whether the driver uses it.
    pub(crate) hot: Option<Obj>,
    pub(crate) uses_hot: bool,
    pub(crate) rings: Vec<DriverRing>,
    pub(crate) ledger: Ledger,
    /// Its processors run.
    pub(crate) runs: bool,
    /// It issues new requests.
    pub(crate) issues: bool,
    orders: u64,
    pub(crate) killer_at: Option<Nanos>,
    pub(crate) killers: u32,
    /// Requests that were answered with an error because backends died of them, as the broker says: rings and heads.
    pub(crate) isolated: Vec<(u16, u16)>,
    pub(crate) depth: u16,
    options: Options,
}

/// What the driver made of a completion.
#[derive(Debug)]
pub(crate) struct Completed {
    pub(crate) head: u16,
    pub(crate) request: Issued,
}

impl Guest {
    pub(crate) fn new(options: &Options, memory: &mut Memory) -> Self {
        let rings = u64::from(options.rings);
        let size = (rings * (RING_SPACE + u64::from(options.depth) * SLOT)).next_multiple_of(4096);
        let obj = memory.make_bytes(size, true);
        let layout = Layout::new(options.ring_size).expect("a power of two");
        let ring = |index: u16, memory: &mut Memory| DriverRing {
            index,
            layout,
            free: (0..options.ring_size).rev().collect(),
            free_slots: (0..options.depth).rev().collect(),
            issued: vec![None; usize::from(options.ring_size)],
            inflight: 0,
            avail: 0,
            published: 0,
            used: 0,
            kick: memory.make_event(),
            calls: Vec::new(),
            submit_at: Nanos(0),
            interrupt_at: Nanos(u64::MAX),
            wake_at: Nanos(u64::MAX),
        };
        let rings = (0..options.rings).map(|index| ring(index, memory)).collect();
        let ledger = Ledger::new(options.blocks);
        let mut guest = Guest {
            memory: obj,
            size,
            hot: None,
            uses_hot: false,
            rings,
            ledger,
            runs: false,
            issues: true,
            orders: 0,
            killer_at: None,
            killers: 0,
            isolated: Vec::new(),
            depth: options.depth,
            options: options.clone(),
        };
        for index in 0..options.rings {
            guest.set_up(index, options.start_index, memory);
        }
        guest
    }

    /// Regions of its memory and the objects behind them.
    pub(crate) fn regions(&self) -> Vec<(MemoryRegion, Obj)> {
        let main = MemoryRegion { guest_addr: 0, size: self.size, user_addr: USER, mmap_offset: 0 };
        let mut regions = vec![(main, self.memory)];
        regions.extend(self.hot.map(|hot| (hot_region(), hot)));
        regions
    }

    pub(crate) fn ring_addr(&self, ring: u16) -> [u64; 3] {
        let at = USER + u64::from(ring) * RING_SPACE;
        [at, at + AVAILABLE, at + USED]
    }

    fn base(ring: u16) -> u64 {
        u64::from(ring) * RING_SPACE
    }

    fn slot_at(&self, ring: u16, slot: u16) -> u64 {
        let rings = self.rings.len() as u64;
        rings * RING_SPACE + (u64::from(ring) * u64::from(self.depth) + u64::from(slot)) * SLOT
    }

    fn load(&self, ring: u16, at: u64, memory: &Memory) -> u16 {
        memory.read_u16(self.memory, Self::base(ring) + at)
    }

    fn store_effect(&self, ring: u16, at: u64, value: u16) -> Effect {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&value.to_le_bytes());
        Effect::Store { obj: self.memory, at: Self::base(ring) + at, len: 2, bytes }
    }

    /// `used.idx` as it is in memory.
    pub(crate) fn used_idx(&self, ring: u16, memory: &Memory) -> u16 {
        self.load(ring, USED + IDX, memory)
    }

    /// `avail.idx` as it is in memory.
    pub(crate) fn avail_idx(&self, ring: u16, memory: &Memory) -> u16 {
        self.load(ring, AVAILABLE + IDX, memory)
    }

    /// Sets a ring up as after a reset, with both indices at `start`. What was in flight is given up.
    pub(crate) fn set_up(&mut self, index: u16, start: u16, memory: &Memory) -> u64 {
        let mut given_up = 0;
        self.isolated.retain(|(ring, _)| *ring != index);
        for head in 0..self.rings[usize::from(index)].issued.len() {
            if let Some(issued) = self.rings[usize::from(index)].issued[head].take() {
                self.end(&issued, false);
                given_up += 1;
            }
        }
        let base = Self::base(index);
        memory.write(self.memory, base, &[0; RING_SPACE as usize]);
        let depth = self.depth;
        let ring = &mut self.rings[usize::from(index)];
        let size = ring.layout.size();
        ring.free = (0..size).rev().collect();
        ring.free_slots = (0..depth).rev().collect();
        ring.inflight = 0;
        (ring.avail, ring.published, ring.used) = (start, start, start);
        ring.interrupt_at = Nanos(u64::MAX);
        for at in [AVAILABLE + IDX, USED + IDX] {
            memory.write(self.memory, base + at, &start.to_le_bytes());
        }
        for at in [AVAILABLE + ring.layout.used_event(), USED + ring.layout.avail_event()] {
            memory.write(self.memory, base + at, &start.to_le_bytes());
        }
        given_up
    }

    fn end(&mut self, issued: &Issued, acknowledged: bool) {
        match issued.kind {
            IN => self.ledger.end_read(issued.lba, issued.blocks),
            OUT => self.ledger.end_write(issued.lba, issued.blocks, acknowledged),
            FLUSH if acknowledged => self.ledger.end_flush(&issued.durable),
            _ => {}
        }
    }

    /// Issues up to `count` requests: everything is written except `avail.idx`, whose store and what comes after it are effects.
    pub(crate) fn issue(
        &mut self,
        index: u16,
        count: u16,
        generation: u64,
        now: Nanos,
        memory: &Memory,
        random: &mut Random,
    ) -> (u16, Vec<Effect>) {
        let old = self.rings[usize::from(index)].avail;
        let mut effects = Vec::new();
        let mut issued = 0;
        for _ in 0..count {
            let Some(head) = self.issue_one(index, generation, now, memory, random) else { break };
            let ring = &mut self.rings[usize::from(index)];
            let slot = ring.layout.slot(ring.avail);
            ring.avail = ring.avail.wrapping_add(1);
            let at = AVAILABLE + ring.layout.available_slot(slot);
            effects.push(self.store_effect(index, at, head));
            issued += 1;
        }
        if issued > 0 {
            let new = self.rings[usize::from(index)].avail;
            effects.push(self.store_effect(index, AVAILABLE + IDX, new));
            effects.push(Effect::Kick { ring: index, old, new });
        }
        (issued, effects)
    }

    fn issue_one(
        &mut self,
        index: u16,
        generation: u64,
        now: Nanos,
        memory: &Memory,
        random: &mut Random,
    ) -> Option<u16> {
        let options = &self.options;
        let ring = &self.rings[usize::from(index)];
        let indirect = options.indirect && (ring.layout.size() < 8 || random.percent(70));
        let least = if indirect { 1 } else { 4 };
        if ring.free_slots.is_empty() || ring.free.len() < least {
            return None;
        }
        let kind = match random.below(100) {
            draw if draw < u64::from(options.reads) => IN,
            draw if draw < u64::from(options.reads) + u64::from(options.flushes) => FLUSH,
            _ => OUT,
        };
        let kind = if self.killer_at.take_if(|at| *at <= now).is_some() { KILLER } else { kind };
        let blocks =
            if kind == IN || kind == OUT { random.between(1, u64::from(options.request_blocks)) as u16 } else { 0 };
        let lba = random.below(self.ledger.blocks() - u64::from(blocks) + 1);
        let mut sequence = 0;
        match kind {
            IN if !self.ledger.begin_read(lba, blocks) => return None,
            OUT => sequence = self.ledger.begin_write(lba, blocks)?,
            _ => {}
        }
        self.killers += u32::from(kind == KILLER);
        let slot = self.rings[usize::from(index)].free_slots.pop()?;
        let place = self.slot_at(index, slot);
        let hot = self.uses_hot && slot < 8 && random.percent(50);
        let (data_obj, data, data_at) = match self.hot.filter(|_| hot) {
            Some(obj) => {
                let at = (u64::from(index) * 8 + u64::from(slot)) * HOT_SLOT;
                (obj, HOT + at, at)
            }
            None => (self.memory, place + DATA, place + DATA),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&lba.to_le_bytes());
        memory.write(self.memory, place, &header);
        memory.write(self.memory, place + STATUS, &[UNWRITTEN]);
        for at in 0..u64::from(blocks) {
            let block = match kind {
                OUT => Stamp { lba: lba + at, sequence: sequence + at, generation }.block(),
                _ => POISON,
            };
            memory.write(data_obj, data_at + at * BLOCK as u64, &block);
        }
        let mut chain = vec![Descriptor { addr: place, len: 16, flags: 0, next: 0 }];
        let write = if kind == IN { DESC_F_WRITE } else { 0 };
        let mut at = 0;
        while at < blocks {
            // In one piece or two.
            let piece = if at == 0 && blocks > 1 && random.one_in(2) { 1 } else { blocks - at };
            let addr = data + u64::from(at) * BLOCK as u64;
            chain.push(Descriptor { addr, len: u32::from(piece) * BLOCK as u32, flags: write, next: 0 });
            at += piece;
        }
        chain.push(Descriptor { addr: place + STATUS, len: 1, flags: DESC_F_WRITE, next: 0 });
        let mut descriptors = Vec::with_capacity(4);
        if indirect {
            let count = chain.len();
            for (at, descriptor) in chain.iter_mut().enumerate() {
                if at + 1 < count {
                    descriptor.flags |= DESC_F_NEXT;
                    descriptor.next = at as u16 + 1;
                }
                memory.write(self.memory, place + TABLE + 16 * at as u64, &descriptor.to_le_bytes());
            }
            let head = self.rings[usize::from(index)].free.pop()?;
            let len = 16 * count as u32;
            let table = Descriptor { addr: place + TABLE, len, flags: DESC_F_INDIRECT, next: 0 };
            self.write_descriptor(index, head, table, memory);
            descriptors.push(head);
        } else {
            for _ in 0..chain.len() {
                descriptors.push(self.rings[usize::from(index)].free.pop()?);
            }
            for (at, descriptor) in chain.into_iter().enumerate() {
                let mut descriptor = descriptor;
                if let Some(next) = descriptors.get(at + 1) {
                    descriptor.flags |= DESC_F_NEXT;
                    descriptor.next = *next;
                }
                self.write_descriptor(index, descriptors[at], descriptor, memory);
            }
        }
        let durable = if kind == FLUSH { self.ledger.begin_flush() } else { Vec::new() };
        let head = descriptors[0];
        self.orders += 1;
        let order = self.orders;
        let ring = &mut self.rings[usize::from(index)];
        ring.issued[usize::from(head)] =
            Some(Issued { kind, lba, blocks, slot, data: data_at, hot, descriptors, durable, order, at: now });
        ring.inflight += 1;
        Some(head)
    }

    fn write_descriptor(&self, ring: u16, index: u16, descriptor: Descriptor, memory: &Memory) {
        memory.write(self.memory, Self::base(ring) + 16 * u64::from(index), &descriptor.to_le_bytes());
    }

    /// Whether the device wants to be kicked for what has just been published.
    pub(crate) fn wants_kick(&self, index: u16, old: u16, new: u16, event_idx: bool, memory: &Memory) -> bool {
        let ring = &self.rings[usize::from(index)];
        if event_idx {
            crosses_event(self.load(index, USED + ring.layout.avail_event(), memory), new, old)
        } else {
            self.load(index, USED + FLAGS, memory) & 1 == 0
        }
    }

    /// The driver asks for an interrupt with the next completion.
    pub(crate) fn ask_for_call(&self, index: u16, event_idx: bool, memory: &Memory) {
        let ring = &self.rings[usize::from(index)];
        if event_idx {
            let at = Self::base(index) + AVAILABLE + ring.layout.used_event();
            memory.write(self.memory, at, &ring.used.to_le_bytes());
        }
    }

    /// Takes the next completion, if there is one.
    pub(crate) fn complete(
        &mut self,
        index: u16,
        memory: &Memory,
    ) -> Result<Option<Completed>, (&'static str, String)> {
        let used_idx = self.used_idx(index, memory);
        let ring = &mut self.rings[usize::from(index)];
        if used_idx == ring.used {
            return Ok(None);
        }
        if used_idx.wrapping_sub(ring.used) > ring.layout.size() {
            let detail = format!("ring {index}: used.idx goes from {} to {used_idx}", ring.used);
            return Err(("completed once", detail));
        }
        let mut bytes = [0; 8];
        let slot = ring.layout.slot(ring.used);
        memory.read(self.memory, Self::base(index) + USED + ring.layout.used_slot(slot), &mut bytes);
        let id = u32::from_le_bytes(bytes[..4].try_into().expect("four"));
        let len = u32::from_le_bytes(bytes[4..].try_into().expect("four"));
        let at = ring.used;
        ring.used = ring.used.wrapping_add(1);
        let issued = ring.issued.get_mut(id as usize).and_then(Option::take);
        let Some(issued) = issued else {
            return Err((
                "completed once",
                format!("ring {index}: used entry {at} names head {id}, which is not in flight"),
            ));
        };
        ring.inflight -= 1;
        let head = id as u16;
        self.judge(index, head, &issued, len, memory)?;
        self.forget(index, &issued, memory);
        Ok(Some(Completed { head, request: issued }))
    }

    fn judge(
        &mut self,
        index: u16,
        head: u16,
        issued: &Issued,
        len: u32,
        memory: &Memory,
    ) -> Result<(), (&'static str, String)> {
        let place = self.slot_at(index, issued.slot);
        let mut status = [0];
        memory.read(self.memory, place + STATUS, &mut status);
        let what = || format!("ring {index}: {} head {head}", describe(issued));
        // One that was found out is answered with an error; so is one whose trial's backend died of something else.
        let isolated = self.isolated.iter().position(|known| *known == (index, head));
        if let Some(at) = isolated {
            self.isolated.swap_remove(at);
        }
        if issued.kind == KILLER || isolated.is_some() {
            if isolated.is_none() || status[0] != 1 {
                return Err(("status", format!("{}: status {}, isolated: {}", what(), status[0], isolated.is_some())));
            }
            self.end(issued, false);
            return Ok(());
        }
        if status[0] != 0 {
            return Err(("status", format!("{}: status {}, expected 0", what(), status[0])));
        }
        let expected = 1 + if issued.kind == IN { u32::from(issued.blocks) * BLOCK as u32 } else { 0 };
        if len != expected {
            return Err(("length", format!("{}: {len} bytes written, expected {expected}", what())));
        }
        if issued.kind == IN {
            let obj = self.hot.filter(|_| issued.hot).unwrap_or(self.memory);
            for at in 0..u64::from(issued.blocks) {
                let mut block = [0; BLOCK];
                memory.read(obj, issued.data + at * BLOCK as u64, &mut block);
                let result = self.ledger.check(issued.lba + at, &block);
                result.map_err(|wrong| ("contents", format!("{}: {wrong}", what())))?;
            }
        }
        self.end(issued, true);
        Ok(())
    }

    /// Gives back what a request had, and overwrites it.
    fn forget(&mut self, index: u16, issued: &Issued, memory: &Memory) {
        let place = self.slot_at(index, issued.slot);
        memory.write(self.memory, place, &[0xee; 16]);
        let nothing = Descriptor { addr: NOWHERE, len: 16, flags: 0, next: 0 };
        for at in 0..4 {
            memory.write(self.memory, place + TABLE + 16 * at, &nothing.to_le_bytes());
        }
        let obj = self.hot.filter(|_| issued.hot).unwrap_or(self.memory);
        for at in 0..u64::from(issued.blocks) {
            memory.write(obj, issued.data + at * BLOCK as u64, &POISON);
        }
        for descriptor in &issued.descriptors {
            self.write_descriptor(index, *descriptor, nothing, memory);
        }
        let ring = &mut self.rings[usize::from(index)];
        ring.free.extend(issued.descriptors.iter().rev());
        ring.free_slots.push(issued.slot);
    }

    /// Heads that were published and whose completion is not, in the order of their submission: what is owed.
    pub(crate) fn owed(&self, index: u16, memory: &Memory) -> Vec<u16> {
        let ring = &self.rings[usize::from(index)];
        let (used, avail) = (self.used_idx(index, memory), self.avail_idx(index, memory));
        let mut heads: Vec<(u64, u16)> =
            (0..).zip(&ring.issued).filter_map(|(head, it)| Some((it.as_ref()?.order, head))).collect();
        heads.sort_unstable();
        // What is written and not published yet comes last.
        let unpublished = usize::from(ring.avail.wrapping_sub(avail));
        heads.truncate(heads.len().saturating_sub(unpublished));
        let mut completed = ring.used;
        while completed != used {
            let slot = ring.layout.slot(completed);
            let id = self.load(index, USED + ring.layout.used_slot(slot), memory);
            heads.retain(|(_, head)| *head != id);
            completed = completed.wrapping_add(1);
        }
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// What the slots of the available ring from `used.idx` to `avail.idx` hold.
    pub(crate) fn slots(&self, index: u16, memory: &Memory) -> Vec<u16> {
        let ring = &self.rings[usize::from(index)];
        let (used, avail) = (self.used_idx(index, memory), self.avail_idx(index, memory));
        let count = avail.wrapping_sub(used).min(ring.layout.size());
        let slot = |at| AVAILABLE + ring.layout.available_slot(ring.layout.slot(used.wrapping_add(at)));
        (0..count).map(|at| self.load(index, slot(at), memory)).collect()
    }

    pub(crate) fn inflight(&self) -> u64 {
        self.rings.iter().map(|ring| u64::from(ring.inflight)).sum()
    }

    /// Whether a request in flight lies in memory that was plugged in.
    pub(crate) fn hot_in_use(&self) -> bool {
        self.rings.iter().flat_map(|ring| &ring.issued).flatten().any(|issued| issued.hot)
    }
}

pub(crate) fn hot_region() -> MemoryRegion {
    MemoryRegion { guest_addr: HOT, size: HOT_SIZE, user_addr: USER + HOT, mmap_offset: 0 }
}

/// A request in words.
pub(crate) fn describe(issued: &Issued) -> String {
    let name = kind_name(issued.kind);
    if issued.blocks == 0 { name.to_owned() } else { format!("{name} of {} blocks at {}", issued.blocks, issued.lba) }
}

pub(crate) fn kind_name(kind: u32) -> &'static str {
    match kind {
        IN => "read",
        OUT => "write",
        FLUSH => "flush",
        KILLER => "killer",
        _ => "unknown request",
    }
}
