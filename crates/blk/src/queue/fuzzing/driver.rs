//! The driver: bytes become what it writes into its memory.

use warmswap_wire::VringAddr;
use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, Layout};

use super::{BYTES, FILE_SECTORS, GUEST, GUEST_BYTES, QUEUE, USER};
use crate::image::SECTOR;
use crate::memory::{MemoryMap, Piece, copy_in};
use crate::request::Limits;

/// Where the driver has what, if it keeps its things apart: descriptors, available and used ring; then, with one for each head, headers,
/// segments and statuses; indirect tables; and data, which lies in both regions.
pub(super) const PARTS: [u64; 3] = [0, 0x1000, 0x1400];
pub(super) const HEADERS: u64 = 0x1d00;
pub(super) const SEGMENTS: u64 = 0x2d00;
pub(super) const STATUSES: u64 = 0x3d00;
pub(super) const TABLES: u64 = 0x3e00;
pub(super) const DATA: u64 = 0x4a00;
pub(super) const DATA_BYTES: u64 = 0x3000;

/// The bytes, read from the front; zeroes behind their end.
pub(super) struct Script<'a>(pub(super) &'a [u8]);

impl Script<'_> {
    pub(super) fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    pub(super) fn below(&mut self, bound: u16) -> u16 {
        if bound > 256 { self.u16() % bound } else { u16::from(self.u8()) % bound }
    }

    pub(super) fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// A place in the guest's memory.
    pub(super) fn place(&mut self) -> u64 {
        u64::from(self.u16()) % GUEST_BYTES
    }

    /// A guest address, of memory as a rule.
    pub(super) fn addr(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => GUEST + BYTES[0] - u64::from(self.u8()),
            1 => GUEST + GUEST_BYTES - u64::from(self.u8()),
            2 => [0, GUEST - 8, GUEST + GUEST_BYTES, u64::MAX, u64::MAX - 15, 0x4_0000][usize::from(self.u8()) % 6],
            _ => GUEST + self.place(),
        }
    }

    pub(super) fn len(&mut self) -> u32 {
        match self.u8() % 8 {
            0 => [0, 1, u32::MAX, 1 << 31, 0x1_0000, 15][usize::from(self.u8()) % 6],
            1 => u32::from(self.u8()),
            2 => u32::from(self.u16()),
            3 => 16,
            4 => 513,
            _ => 512 * u32::from(self.u8() % 36),
        }
    }

    pub(super) fn sector(&mut self) -> u64 {
        match self.u8() {
            at @ 0..=250 => u64::from(at) % FILE_SECTORS,
            251 => u64::MAX,
            252 => u64::MAX / SECTOR,
            253 => u64::MAX / SECTOR + 1,
            254 => 1 << 63,
            255 => u64::from(self.u32()),
        }
    }

    pub(super) fn kind(&mut self) -> u32 {
        [0, 1, 0, 1, 4, 8, 11, 13, 2, u32::MAX][usize::from(self.u8()) % 10]
    }

    pub(super) fn limits(&mut self, told: u64) -> Limits {
        let bits = self.u8();
        Limits {
            sectors: if bits & 8 == 0 { told } else { told / 2 - 1 },
            read_only: bits & 0x30 == 0x30,
            write_through: bits & 1 != 0,
            block_sectors: if bits & 2 == 0 { 1 } else { 8 },
        }
    }
}

/// What was negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) size: u16,
    pub(super) base: u16,
    pub(super) used_idx: u16,
    pub(super) event_idx: bool,
    pub(super) indirect: bool,
    pub(super) has_log: bool,
    pub(super) has_region: bool,
    pub(super) region_bytes: usize,
    pub(super) has_call: bool,
    /// Places of the three parts.
    pub(super) parts: [u64; 3],
}

impl Shape {
    pub(super) fn read(script: &mut Script<'_>) -> Self {
        // Mostly rings that have room for what is asked for.
        let size = [256, 128, 64, 64, 32, 32, 16, 16, 16, 8, 8, 4, 4, 2, 1, 1][usize::from(script.u8()) % 16];
        let bits = script.u8();
        let base = script.u16();
        let mut shape = Shape {
            size,
            base,
            used_idx: base,
            event_idx: bits & 1 != 0,
            indirect: bits & 2 == 0,
            has_log: bits & 4 != 0,
            has_region: bits & 8 != 0,
            region_bytes: 0,
            has_call: bits & 16 != 0,
            parts: PARTS,
        };
        match bits >> 5 {
            3 => shape.used_idx = script.u16(),
            5 => shape.region_bytes = usize::from(script.u8()),
            // They may lie in each other.
            7 => shape.parts = Self::parts(script),
            _ => {}
        }
        shape
    }

    pub(super) fn parts(script: &mut Script<'_>) -> [u64; 3] {
        [16, 2, 4].map(|align| script.place() / align * align)
    }

    pub(super) fn addr(&self) -> VringAddr {
        let [descriptor, available, used] = self.parts.map(user);
        let flags = u32::from(self.has_log);
        VringAddr { index: u32::from(QUEUE), flags, descriptor, available, used, log: GUEST + self.parts[2] }
    }
}

/// The driver's side.
pub(super) struct Driver {
    pub(super) memory: MemoryMap,
    pub(super) shape: Shape,
    pub(super) layout: Layout,
    pub(super) avail_idx: u16,
    /// Where the descriptors begin that the next request uses.
    pub(super) next_head: u16,
    pub(super) limits: Limits,
    /// What the last back-end owed when it was killed, if it kept a region.
    pub(super) owed: Option<Vec<u16>>,
    /// Used again.
    pub(super) pieces: Vec<Piece>,
}

impl Driver {
    pub(super) fn new(memory: &MemoryMap, shape: Shape, limits: Limits) -> Self {
        let layout = Layout::new(shape.size).expect("a power of two");
        let (memory, avail_idx, next_head, owed, pieces) = (memory.clone(), shape.base, 0, None, Vec::new());
        let mut driver = Driver { memory, shape, layout, avail_idx, next_head, limits, owed, pieces };
        driver.put(shape.parts[1] + 2, &shape.base.to_le_bytes());
        driver.put(shape.parts[2] + 2, &shape.used_idx.to_le_bytes());
        driver
    }

    /// The next back-end goes on at that index.
    pub(super) fn restart(&mut self, at: u16) {
        (self.shape.used_idx, self.shape.base) = (at, at);
        self.put(self.shape.parts[1] + 2, &self.avail_idx.to_le_bytes());
        // Last: it may be the same place.
        self.put(self.shape.parts[2] + 2, &at.to_le_bytes());
    }

    /// Writes to a place of its memory; what does not fit is left out.
    pub(super) fn put(&mut self, place: u64, bytes: &[u8]) {
        let len = GUEST_BYTES.saturating_sub(place).min(bytes.len() as u64);
        self.pieces.clear();
        if self.memory.pieces(GUEST + place, len as u32, &mut self.pieces) {
            copy_in(&self.pieces, &bytes[..len as usize]);
        }
    }

    pub(super) fn descriptor(&mut self, table: u64, index: u16, descriptor: Descriptor) {
        self.put(table + 16 * u64::from(index), &descriptor.to_le_bytes());
    }

    pub(super) fn submit(&mut self, head: u16) {
        let slot = self.layout.slot(self.avail_idx);
        self.put(self.shape.parts[1] + self.layout.available_slot(slot), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put(self.shape.parts[1] + 2, &self.avail_idx.to_le_bytes());
    }

    /// A request as a driver makes it, with something wrong here and there.
    pub(super) fn request(&mut self, script: &mut Script<'_>) {
        let size = self.shape.size;
        let (kind, sector, bits, wrong) = (script.kind(), script.sector(), script.u8(), script.u8());
        // Its lower bits say what is wrong, if anything is.
        const WRONG_FROM: u8 = 0xc0;
        let is_wrong = |what: u8| wrong >= WRONG_FROM && wrong & what != 0;
        let head = if is_wrong(1) { script.below(size) } else { self.next_head % size };
        let own = u64::from(head);
        let header_at = if is_wrong(2) { script.place() } else { HEADERS + 16 * own };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(header_at, &header);
        let mut chain = [Descriptor { addr: GUEST + header_at, len: 16, flags: 0, next: 0 }; 6];
        let flags = if matches!(kind, 0 | 8) { DESC_F_WRITE } else { 0 };
        let mut count = usize::from(bits & 3);
        for descriptor in &mut chain[1..=count] {
            let addr = if is_wrong(4) { script.addr() } else { GUEST + DATA + u64::from(script.u16()) % DATA_BYTES };
            let len = if is_wrong(8) { script.len() } else { 512 * u32::from(1 + script.u8() % 12) };
            *descriptor = Descriptor { addr, len, flags, next: 0 };
        }
        if matches!(kind, 11 | 13) {
            let at = SEGMENTS + 16 * own;
            let (sector, sectors, flags) = (script.sector(), script.sector() as u32, u32::from(script.u8() % 3));
            self.put(at, &[sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat());
            chain[1] = Descriptor { addr: GUEST + at, len: 16, flags: 0, next: 0 };
            count = 1 + usize::from(is_wrong(8));
        }
        let status_at = if is_wrong(16) { script.addr() } else { GUEST + STATUSES + own };
        chain[count + 1] = Descriptor { addr: status_at, len: 1, flags: DESC_F_WRITE, next: 0 };
        let is_indirect = bits & 4 != 0;
        let table = match (is_indirect, is_wrong(32)) {
            (false, _) => self.shape.parts[0],
            (true, false) => TABLES + 96 * (own % 32),
            (true, true) => script.place(),
        };
        for (at, descriptor) in (0_u16..).zip(&mut chain[..count + 2]) {
            let index = if is_indirect { at } else { (head + at) % size };
            if usize::from(at) <= count {
                descriptor.flags |= DESC_F_NEXT;
                descriptor.next = if is_indirect { index + 1 } else { (index + 1) % size };
            }
            self.descriptor(table, index, *descriptor);
        }
        if is_indirect {
            let len = 16 * (count as u32 + 2) + u32::from(is_wrong(33));
            let outer = Descriptor { addr: GUEST + table, len, flags: DESC_F_INDIRECT, next: 0 };
            self.descriptor(self.shape.parts[0], head, outer);
        }
        self.next_head = head.wrapping_add(if is_indirect { 1 } else { count as u16 + 2 });
        self.submit(head);
    }
}

/// Where the front-end has that place of the guest's memory.
pub(super) fn user(place: u64) -> u64 {
    if place < BYTES[0] { USER[0] + place } else { USER[1] + place - BYTES[0] }
}
