//! A hostile driver: any bytes become what it writes into its memory and when, what the storage answers, and what the front-end changes
//! meanwhile. After every step the queue is held against what must be true of it whatever the driver does.
//!
//! | what is watched | by whom |
//! |---|---|
//! | nothing outside of the device is read or written, and nothing that a read-only device refuses | [`Recorder`], the image afterwards |
//! | memory that the kernel is given is the guest's, and stays mapped until it has answered | [`Recorder`] |
//! | memory beside the guest's is not written | [`World::inspect`] |
//! | every request that was taken is in exactly one place; none is completed twice | [`Life::check`] |
//! | the used ring says what was completed, and nothing else | [`Life::publish`] |
//! | the in-flight region names exactly what is owed, at any time | [`Life::check_region`] |
//!
//! Used by the fuzzer (`fuzz/`) and by the tests; never in what is shipped.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};

use rustix::fs::MemfdFlags;
use warmswap_telemetry::{Identity, Page, QueueWriter};
use warmswap_wire::inflight::{read_split, ring_bytes};
use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, Layout};
use warmswap_wire::{LogRegion, MemoryRegion, VringAddr};

use super::{Queue, Region, Served, Start};
use crate::chain::PIECES_MAX;
use crate::engine::sync::perform;
use crate::engine::{Answer, Engine, Io, Op, Tag, Watch};
use crate::image::{Direct, Image, SECTOR};
use crate::log::DirtyLog;
use crate::memory::{Mapping, MemoryMap, Piece, Window, copy_in};
use crate::request::{ID_BYTES, Limits, RANGE_SECTORS_MAX};
use crate::ring::{Broken, Place};

/// Sectors of the device, and of its image: those beyond the device must never change.
const SECTORS: u64 = 32;
const FILE_SECTORS: u64 = 40;

/// The guest has two regions, side by side: a range may cross from one into the other. Neither begins where its file does, nor ends where
/// its last page does.
const GUEST: u64 = 0x1_0000;
const USER: [u64; 2] = [0x7000_0000, 0x7100_0000];
const BYTES: [u64; 2] = [0x6f00, 0x1100];
const OFFSETS: [u64; 2] = [0x1000, 0x800];
const FILE_BYTES: [usize; 2] = [0x8000, 0x2000];
const GUEST_BYTES: u64 = BYTES[0] + BYTES[1];
/// The maps that the front-end may give: which regions, and where the guest has them.
const MAPS: [&[(usize, u64)]; 4] = [
    &[(0, GUEST), (1, GUEST + BYTES[0])],
    &[(0, GUEST)],
    &[(0, GUEST), (1, 0x4_0000)],
    &[(1, GUEST), (0, GUEST + BYTES[1])],
];
/// Where the driver has what, if it keeps its things apart: descriptors, available and used ring; then, with one for each head, headers,
/// segments and statuses; indirect tables; and data, which lies in both regions.
const PARTS: [u64; 3] = [0, 0x1000, 0x1400];
const HEADERS: u64 = 0x1d00;
const SEGMENTS: u64 = 0x2d00;
const STATUSES: u64 = 0x3d00;
const TABLES: u64 = 0x3e00;
const DATA: u64 = 0x4a00;
const DATA_BYTES: u64 = 0x3000;
/// What lies in the files beside the guest's memory.
const GUARD: u8 = 0xc3;

/// The queue's number. Any but zero.
const QUEUE: u16 = 3;
/// Largest ring.
const SIZE_MAX: u16 = 256;
/// An in-flight region for it, never used.
const NOTHING: [u8; REGION_BYTES] = [0; REGION_BYTES];
const REGION_BYTES: usize = (16 + 16 * SIZE_MAX as usize).next_multiple_of(64);
/// Back-ends of one run, one after the other.
const LIVES_MAX: usize = 8;
/// Steps of one of them.
const STEPS_MAX: usize = 400;

/// Runs one driver, made of these bytes.
///
/// # Panics
/// If it gets the queue to do what it must not.
pub fn run(data: &[u8]) {
    thread_local! {
        static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
    }
    WORLD.with_borrow_mut(|cell| {
        let mut world = cell.take().unwrap_or_else(World::new);
        world.play(data, SECTORS);
        *cell = Some(world);
    });
}

/// The bytes, read from the front; zeroes behind their end.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn below(&mut self, bound: u16) -> u16 {
        if bound > 256 { self.u16() % bound } else { u16::from(self.u8()) % bound }
    }

    fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// A place in the guest's memory.
    fn place(&mut self) -> u64 {
        u64::from(self.u16()) % GUEST_BYTES
    }

    /// A guest address, of memory as a rule.
    fn addr(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => GUEST + BYTES[0] - u64::from(self.u8()),
            1 => GUEST + GUEST_BYTES - u64::from(self.u8()),
            2 => [0, GUEST - 8, GUEST + GUEST_BYTES, u64::MAX, u64::MAX - 15, 0x4_0000][usize::from(self.u8()) % 6],
            _ => GUEST + self.place(),
        }
    }

    fn len(&mut self) -> u32 {
        match self.u8() % 8 {
            0 => [0, 1, u32::MAX, 1 << 31, 0x1_0000, 15][usize::from(self.u8()) % 6],
            1 => u32::from(self.u8()),
            2 => u32::from(self.u16()),
            3 => 16,
            4 => 513,
            _ => 512 * u32::from(self.u8() % 36),
        }
    }

    fn sector(&mut self) -> u64 {
        match self.u8() {
            at @ 0..=250 => u64::from(at) % FILE_SECTORS,
            251 => u64::MAX,
            252 => u64::MAX / SECTOR,
            253 => u64::MAX / SECTOR + 1,
            254 => 1 << 63,
            255 => u64::from(self.u32()),
        }
    }

    fn kind(&mut self) -> u32 {
        [0, 1, 0, 1, 4, 8, 11, 13, 2, u32::MAX][usize::from(self.u8()) % 10]
    }

    fn limits(&mut self, told: u64) -> Limits {
        let bits = self.u8();
        Limits {
            sectors: if bits & 8 == 0 { told } else { told / 2 - 1 },
            read_only: bits & 0x30 == 0x30,
            write_through: bits & 1 != 0,
            block_sectors: if bits & 2 == 0 { 1 } else { 8 },
        }
    }
}

/// How the storage answers.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Later, when it is asked to.
    Later,
    /// At once, and as it is.
    Truly,
    /// At once, not everything, or with an error.
    Badly(u8),
}

impl Manner {
    fn of(byte: u8) -> Self {
        match byte % 4 {
            0 | 1 => Manner::Later,
            2 => Manner::Truly,
            _ => Manner::Badly(byte / 4),
        }
    }
}

/// What was started and is not answered.
struct Pending {
    tag: Tag,
    op: Op,
    offset: u64,
    len: u64,
    pieces: Vec<Piece>,
    /// The map that its pieces lie in.
    memory: Weak<MemoryMap>,
}

impl Pending {
    fn io(&self) -> Io<'_> {
        Io { tag: self.tag, op: self.op, offset: self.offset, len: self.len, pieces: &self.pieces }
    }
}

/// An engine that believes nothing.
struct Recorder {
    image: Arc<Image>,
    limits: Limits,
    manner: Manner,
    pending: Vec<Pending>,
    memory: Weak<MemoryMap>,
    /// Addresses of the memory that the queue may use now.
    inside: Vec<(usize, usize)>,
    /// Sectors that something was allowed to change, a bit for each.
    touched: u64,
}

impl Recorder {
    fn examine(&mut self, io: &Io<'_>) {
        let Io { tag, op, offset, len, pieces } = *io;
        assert_eq!(tag.queue, QUEUE);
        assert!(self.pending.iter().all(|it| it.tag.head != tag.head), "head {} is started twice", tag.head);
        let end = offset.checked_add(len).expect("no offset wraps around");
        // Not the limits that the queue has: those of the file count.
        assert!(end <= SECTORS * SECTOR && end <= self.limits.sectors * SECTOR, "{op:?} of {len} bytes at {offset}");
        if op == Op::Flush {
            assert_eq!((offset, len), (0, 0));
            return;
        }
        assert!(len > 0 && len.is_multiple_of(SECTOR) && offset.is_multiple_of(SECTOR), "{len} bytes at {offset}");
        if op != Op::Read {
            assert!(!self.limits.read_only, "{op:?} on what is read-only");
            let sectors = len / SECTOR;
            self.touched |= (u64::MAX >> (64 - sectors)) << (offset / SECTOR);
        }
        match op {
            Op::Read | Op::Write { .. } => {
                assert!(pieces.len() <= PIECES_MAX);
                assert_eq!(pieces.iter().map(|it| it.len as u64).sum::<u64>(), len);
                for piece in pieces {
                    let start = piece.as_ptr().addr();
                    let end = start + piece.len;
                    let lies = self.inside.iter().any(|(from, to)| *from <= start && end <= *to);
                    assert!(lies && piece.len > 0, "{piece:?} lies in no memory of the guest's");
                }
            }
            Op::Discard | Op::Zeroes { .. } => {
                let block = self.limits.block_sectors * SECTOR;
                assert!(len <= u64::from(RANGE_SECTORS_MAX) * SECTOR);
                assert!(len.is_multiple_of(block) && offset.is_multiple_of(block));
            }
            Op::Flush => unreachable!("it was looked at"),
        }
        if let Op::Write { durable } = op {
            assert_eq!(durable, self.limits.write_through);
        }
    }

    /// What the storage says to it.
    fn result(&self, io: &Io<'_>, manner: Manner) -> i64 {
        let Manner::Badly(how) = manner else {
            let result = perform(&self.image, io);
            assert_ne!(result, -i64::from(libc::EFAULT), "the kernel finds no memory at {:?}", io.pieces);
            return result;
        };
        let errors = [libc::EIO, libc::EINTR, libc::EAGAIN, libc::EOPNOTSUPP, libc::ENOSPC];
        let moves = matches!(io.op, Op::Read | Op::Write { .. });
        match usize::from(how) % (errors.len() + 3) {
            at if at < errors.len() => -i64::from(errors[at]),
            _ if !moves => 0,
            5 => 0,
            6 => io.len.cast_signed() / 2 + 1,
            _ => io.len.cast_signed() - 1,
        }
    }

    /// Answers one, as the script will have it.
    fn answer_one(&mut self, at: usize, manner: Manner) -> (u16, i64) {
        let pending = self.pending.remove(at);
        assert!(pending.memory.strong_count() > 0, "the memory of head {} was given up before", pending.tag.head);
        (pending.tag.head, self.result(&pending.io(), manner))
    }
}

impl Engine for Recorder {
    fn start(&mut self, io: &Io<'_>) -> Option<i64> {
        self.examine(io);
        if !matches!(self.manner, Manner::Later) {
            return Some(self.result(io, self.manner));
        }
        let Io { tag, op, offset, len, pieces } = *io;
        let pieces = if op == Op::Flush { Vec::new() } else { pieces.to_vec() };
        self.pending.push(Pending { tag, op, offset, len, pieces, memory: Weak::clone(&self.memory) });
        None
    }

    fn submit(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn answer(&mut self) -> Option<Answer> {
        None
    }

    fn has_answer(&mut self) -> bool {
        false
    }

    fn watch(&mut self, _fd: std::os::fd::BorrowedFd<'_>, _watch: Watch) -> std::io::Result<()> {
        Ok(())
    }

    fn unwatch(&mut self, _fd: std::os::fd::BorrowedFd<'_>, _watch: Watch) -> std::io::Result<()> {
        Ok(())
    }

    fn sleep(&mut self, _at_most: Option<std::time::Duration>) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is made once: memory, image, meter.
struct World {
    files: [OwnedFd; 2],
    fresh: [Vec<u8>; 2],
    maps: [MemoryMap; 4],
    image: Arc<Image>,
    image_file: OwnedFd,
    image_fresh: Vec<u8>,
    region_file: OwnedFd,
    region: Arc<Mapping>,
    log: Arc<DirtyLog>,
    call: OwnedFd,
    meter: Option<QueueWriter>,
    _page: Page,
    /// Nobody else writes to the guest's memory.
    is_still: bool,
    scratch: Vec<u8>,
}

fn memfd(name: &str, bytes: &[u8]) -> OwnedFd {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, bytes.len() as u64).expect("any size");
    write(&fd, bytes);
    fd
}

fn write(fd: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::io::pwrite(fd, bytes, 0).expect("memory"), bytes.len());
}

fn region(number: usize, guest_addr: u64) -> MemoryRegion {
    let (size, user_addr, mmap_offset) = (BYTES[number], USER[number], OFFSETS[number]);
    MemoryRegion { guest_addr, size, user_addr, mmap_offset }
}

/// The in-flight region of a ring of that size, not a byte more: an offset beyond it is seen.
fn window_of(region: &Arc<Mapping>, size: u16) -> Window {
    region.window(0, ring_bytes(size)).expect("the mapping is for the largest ring")
}

/// Where the front-end has that place of the guest's memory.
fn user(place: u64) -> u64 {
    if place < BYTES[0] { USER[0] + place } else { USER[1] + place - BYTES[0] }
}

impl World {
    fn new() -> Self {
        let fresh = [0, 1].map(|number| {
            let mut bytes = vec![GUARD; FILE_BYTES[number]];
            bytes[OFFSETS[number] as usize..][..BYTES[number] as usize].fill(0);
            bytes
        });
        let files = [memfd("first", &fresh[0]), memfd("second", &fresh[1])];
        let map = |regions: &[(usize, u64)]| {
            regions.iter().fold(MemoryMap::default(), |map, (number, guest_addr)| {
                map.with(region(*number, *guest_addr), files[*number].as_fd()).expect("it fits")
            })
        };
        let maps = MAPS.map(map);
        let image_fresh: Vec<u8> =
            (0..FILE_SECTORS * SECTOR).map(|at| (at / SECTOR * 7 + at % 251) as u8 | 1).collect();
        let image_file = memfd("image", &image_fresh);
        let path = PathBuf::from(format!("/proc/self/fd/{}", image_file.as_raw_fd()));
        let image = Arc::new(Image::open(&path, false, Direct::Off).expect("a regular file"));
        let region_file = memfd("inflight", &NOTHING);
        let region = Arc::new(Mapping::new(region_file.as_fd(), REGION_BYTES as u64).expect("it is mapped"));
        // One bit for each page, of fewer pages than there are.
        let log_file = memfd("log", &[0; 16]);
        let log = DirtyLog::new(LogRegion { size: 3, offset: 8 }, log_file.as_fd()).expect("it fits");
        let (page, mut meters) =
            Page::create(QUEUE + 1, Identity { instance: 0, device_type: 2, started_ns: 0 }).expect("a page");
        let call = crate::worker::eventfd().expect("an eventfd");
        World {
            files,
            fresh,
            maps,
            image,
            image_file,
            image_fresh,
            region_file,
            region,
            log: Arc::new(log),
            call,
            meter: meters.pop(),
            _page: page,
            is_still: true,
            scratch: vec![0; FILE_BYTES[0].max((FILE_SECTORS * SECTOR) as usize)],
        }
    }

    /// One driver's whole life, and that of the back-ends that serve it. The device has so many sectors.
    fn play(&mut self, data: &[u8], told: u64) {
        for (file, fresh) in self.files.iter().zip(&self.fresh) {
            write(file, fresh);
        }
        let mut script = Script(data);
        let shape = Shape::read(&mut script);
        if shape.has_region {
            let bytes = ring_bytes(shape.size) as usize;
            write(&self.region_file, &NOTHING[..bytes]);
            if shape.region_bytes > 0 {
                // What somebody else has left there. Its version and size are right.
                let mut left = [0; 256];
                left[..shape.region_bytes].fill_with(|| script.u8());
                left[8..10].copy_from_slice(&[1, 0]);
                left[10..12].copy_from_slice(&shape.size.to_le_bytes());
                write(&self.region_file, &left[..bytes.min(256)]);
            }
        }
        let limits = script.limits(told);
        let mut touched = 0;
        let mut driver = Driver::new(&self.maps[0], shape, limits);
        for _ in 0..LIVES_MAX {
            let Some(life) = Life::start(self, &mut driver, touched) else { break };
            let (goes_on, meter, sectors) = life.live(&mut script, told);
            self.meter = Some(meter);
            touched = sectors;
            if !goes_on {
                break;
            }
        }
        self.inspect(touched);
    }

    /// Looks at everything that must not have changed.
    fn inspect(&mut self, touched: u64) {
        for (number, file) in self.files.iter().enumerate() {
            let bytes = &mut self.scratch[..FILE_BYTES[number]];
            assert_eq!(rustix::io::pread(file, &mut *bytes, 0).expect("memory"), bytes.len());
            let (start, end) = (OFFSETS[number] as usize, (OFFSETS[number] + BYTES[number]) as usize);
            let fresh = &self.fresh[number];
            let same = bytes[..start] == fresh[..start] && bytes[end..] == fresh[end..];
            assert!(same, "memory beside the guest's was written");
        }
        assert_eq!(self.image.bytes().expect("asked"), FILE_SECTORS * SECTOR, "the image has another size");
        let bytes = &mut self.scratch[..(FILE_SECTORS * SECTOR) as usize];
        assert_eq!(rustix::io::pread(&self.image_file, &mut *bytes, 0).expect("memory"), bytes.len());
        let sectors = bytes.chunks(SECTOR as usize).zip(self.image_fresh.chunks(SECTOR as usize));
        for (sector, (found, fresh)) in sectors.enumerate() {
            assert!(
                touched >> sector & 1 != 0 || found == fresh,
                "sector {sector} was written, and nobody asked for it"
            );
        }
        if touched != 0 {
            write(&self.image_file, &self.image_fresh);
        }
    }
}

/// What was negotiated.
#[derive(Clone, Copy, Debug)]
struct Shape {
    size: u16,
    base: u16,
    used_idx: u16,
    event_idx: bool,
    indirect: bool,
    has_log: bool,
    has_region: bool,
    region_bytes: usize,
    has_call: bool,
    /// Places of the three parts.
    parts: [u64; 3],
}

impl Shape {
    fn read(script: &mut Script<'_>) -> Self {
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

    fn parts(script: &mut Script<'_>) -> [u64; 3] {
        [16, 2, 4].map(|align| script.place() / align * align)
    }

    fn addr(&self) -> VringAddr {
        let [descriptor, available, used] = self.parts.map(user);
        let flags = u32::from(self.has_log);
        VringAddr { index: u32::from(QUEUE), flags, descriptor, available, used, log: GUEST + self.parts[2] }
    }
}

/// The driver's side.
struct Driver {
    memory: MemoryMap,
    shape: Shape,
    layout: Layout,
    avail_idx: u16,
    /// Where the descriptors begin that the next request uses.
    next_head: u16,
    limits: Limits,
    /// What the last back-end owed when it was killed, if it kept a region.
    owed: Option<Vec<u16>>,
    /// Used again.
    pieces: Vec<Piece>,
}

impl Driver {
    fn new(memory: &MemoryMap, shape: Shape, limits: Limits) -> Self {
        let layout = Layout::new(shape.size).expect("a power of two");
        let (memory, avail_idx, next_head, owed, pieces) = (memory.clone(), shape.base, 0, None, Vec::new());
        let mut driver = Driver { memory, shape, layout, avail_idx, next_head, limits, owed, pieces };
        driver.put(shape.parts[1] + 2, &shape.base.to_le_bytes());
        driver.put(shape.parts[2] + 2, &shape.used_idx.to_le_bytes());
        driver
    }

    /// The next back-end goes on at that index.
    fn restart(&mut self, at: u16) {
        (self.shape.used_idx, self.shape.base) = (at, at);
        self.put(self.shape.parts[1] + 2, &self.avail_idx.to_le_bytes());
        // Last: it may be the same place.
        self.put(self.shape.parts[2] + 2, &at.to_le_bytes());
    }

    /// Writes to a place of its memory; what does not fit is left out.
    fn put(&mut self, place: u64, bytes: &[u8]) {
        let len = GUEST_BYTES.saturating_sub(place).min(bytes.len() as u64);
        self.pieces.clear();
        if self.memory.pieces(GUEST + place, len as u32, &mut self.pieces) {
            copy_in(&self.pieces, &bytes[..len as usize]);
        }
    }

    fn descriptor(&mut self, table: u64, index: u16, descriptor: Descriptor) {
        self.put(table + 16 * u64::from(index), &descriptor.to_le_bytes());
    }

    fn submit(&mut self, head: u16) {
        let slot = self.layout.slot(self.avail_idx);
        self.put(self.shape.parts[1] + self.layout.available_slot(slot), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put(self.shape.parts[1] + 2, &self.avail_idx.to_le_bytes());
    }

    /// A request as a driver makes it, with something wrong here and there.
    fn request(&mut self, script: &mut Script<'_>) {
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

/// One back-end's life.
struct Life<'a> {
    driver: &'a mut Driver,
    maps: &'a [MemoryMap; 4],
    log: Arc<DirtyLog>,
    call: &'a OwnedFd,
    region_file: &'a OwnedFd,
    is_still: bool,
    queue: Queue,
    engine: Recorder,
    /// Requests that were begun.
    begun: u64,
    published: u64,
    /// Heads that could not even be answered.
    lost: Vec<u16>,
}

impl<'a> Life<'a> {
    fn start(world: &'a mut World, driver: &'a mut Driver, touched: u64) -> Option<Self> {
        let shape = driver.shape;
        let memory = Arc::new(driver.memory.clone());
        let place = Place::find(&memory, shape.size, &shape.addr()).ok()?;
        let region = window_of(&world.region, shape.size);
        let mut engine = Recorder {
            image: Arc::clone(&world.image),
            limits: driver.limits,
            manner: Manner::Later,
            pending: Vec::new(),
            memory: Weak::new(),
            inside: Vec::new(),
            touched,
        };
        learn(&mut engine, &memory, 0);
        let start = Start {
            index: QUEUE,
            place,
            memory,
            base: shape.base,
            region: shape.has_region.then(|| Region(region)),
            event_idx: shape.event_idx,
            indirect: shape.indirect,
            enabled: true,
            kick: None,
            call: shape.has_call.then(|| world.call.try_clone().expect("a descriptor")),
            err: None,
            log: shape.has_log.then(|| Arc::clone(&world.log)),
        };
        let served = Served { image: Arc::clone(&world.image), limits: driver.limits, id: [b'i'; ID_BYTES] };
        let meter = world.meter.take().expect("it comes back");
        let queue = match Queue::new(start, served, meter) {
            Ok(queue) => queue,
            Err((reason, meter)) => {
                assert!(driver.owed.is_none() || !world.is_still, "what the last one has kept is refused: {reason}");
                world.meter = Some(meter);
                return None;
            }
        };
        if let (Some(owed), true) = (driver.owed.take(), world.is_still) {
            let mut resubmit: Vec<u16> = queue.resubmit.iter().copied().collect();
            resubmit.sort_unstable();
            assert_eq!(resubmit, owed, "what the last one owed is submitted again, and nothing else");
        }
        Some(Life {
            driver,
            maps: &world.maps,
            log: Arc::clone(&world.log),
            call: &world.call,
            region_file: &world.region_file,
            is_still: world.is_still,
            queue,
            engine,
            begun: 0,
            published: 0,
            lost: Vec::new(),
        })
    }

    /// Until it ends or is killed. Returns whether there shall be another, the meter, and the sectors that may have changed.
    fn live(mut self, script: &mut Script<'_>, told: u64) -> (bool, QueueWriter, u64) {
        self.check();
        let mut goes_on = false;
        for _ in 0..STEPS_MAX {
            if script.0.is_empty() {
                break;
            }
            let step = script.u8();
            if step == 255 {
                self.check_region();
                return self.die();
            }
            // A ring that is broken is good for little, until its driver resets it.
            goes_on = step == 254 || self.queue.broken.is_some() && step.is_multiple_of(4);
            if goes_on {
                break;
            }
            self.step(step, script, told);
        }
        self.check_region();
        self.end(goes_on)
    }

    /// In order: what was taken is completed.
    fn end(mut self, goes_on: bool) -> (bool, QueueWriter, u64) {
        self.begin(|queue, engine| _ = queue.begin_owed(engine));
        self.queue.stopping = true;
        self.queue.begin_round();
        self.retry();
        while !self.engine.pending.is_empty() {
            self.answer(0, Manner::Truly);
        }
        self.publish();
        assert!(self.queue.is_at_rest(), "everything is answered");
        self.check_region();
        let touched = self.engine.touched;
        let taken = self.queue.ring.taken();
        let (base, meter) = self.queue.end();
        assert_eq!(base, taken);
        if goes_on {
            // The driver resets the device, and begins anew.
            write(self.region_file, &NOTHING[..ring_bytes(self.driver.shape.size) as usize]);
            self.driver.restart(self.driver.avail_idx);
        }
        (goes_on, meter, touched)
    }

    /// Killed: whoever comes next finds what was owed.
    fn die(self) -> (bool, QueueWriter, u64) {
        let used = self.queue.ring.unpublished();
        self.driver.owed = self.driver.shape.has_region.then(|| self.owed());
        let touched = self.engine.touched;
        // Only an end gives the meter back; that it asks for kicks changes nothing for the next one.
        let (_, meter) = self.queue.end();
        // The next one reads the index in the ring, where only this one has written, as we shall have it.
        self.driver.restart(used);
        (true, meter, touched)
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>, told: u64) {
        match step {
            0..=99 => self.driver.request(script),
            215..=224 => {
                let (place, len) = (script.place(), usize::from(script.u8() % 32));
                let mut bytes = [0; 32];
                bytes[..len].fill_with(|| script.u8());
                self.driver.put(place, &bytes[..len]);
            }
            225..=230 => {
                let flags = u16::from(script.u8() % 9);
                let index = script.below(self.driver.shape.size);
                let next = script.below(self.driver.shape.size + 1);
                let descriptor = Descriptor { addr: script.addr(), len: script.len(), flags, next };
                self.driver.descriptor(self.driver.shape.parts[0], index, descriptor);
            }
            231..=233 => {
                let head = script.below(self.driver.shape.size + 1);
                self.driver.submit(head);
            }
            234..=236 => {
                let at = [self.driver.avail_idx, script.u16()][usize::from(script.u8() & 1)];
                self.driver.put(self.driver.shape.parts[1] + 2, &at.to_le_bytes());
            }
            237..=240 => {
                let event = script.u16();
                let at = self.driver.shape.parts[1] + self.driver.layout.used_event();
                self.driver.put(at, &event.to_le_bytes());
                self.driver.put(self.driver.shape.parts[1], &[script.u8() & 1]);
            }
            100..=159 => {
                self.engine.manner = Manner::of(script.u8());
                self.take();
            }
            160..=184 if !self.engine.pending.is_empty() => {
                let at = usize::from(script.u8()) % self.engine.pending.len();
                let manner = Manner::of(script.u8() | 2);
                self.answer(at, manner);
            }
            160..=204 => self.publish(),
            205..=214 => {
                let byte = script.u8();
                self.engine.manner = Manner::of(byte);
                if byte & 0x80 == 0 {
                    self.queue.begin_round();
                }
                self.retry();
            }
            241..=244 => self.move_memory(script),
            245..=247 => {
                let log = script.flag().then(|| Arc::clone(&self.log));
                self.queue.set_log(log);
            }
            248..=250 => {
                let limits = script.limits(told);
                self.engine.limits = limits;
                self.driver.limits = limits;
                self.queue.set_limits(limits);
            }
            251..=252 => {
                let bits = script.u8();
                self.queue.enabled = bits & 3 != 0;
                if bits & 4 != 0 {
                    self.queue.set_call((bits & 8 != 0).then(|| self.call.try_clone().expect("a descriptor")));
                }
            }
            _ => {
                let found = self.queue.arm();
                assert!(!self.is_still || !found || self.queue.ring.has_pending());
                // Both only look.
                let _work = (self.queue.has_work(), self.queue.has_parked());
            }
        }
    }

    fn take(&mut self) {
        self.begin(|queue, engine| _ = queue.take(engine));
    }

    /// Takes requests, or what the last back-end owed.
    fn begin(&mut self, some: impl FnOnce(&mut Queue, &mut Recorder)) {
        let (taken, owed, used) = self.indices();
        some(&mut self.queue, &mut self.engine);
        let (taken_now, owed_now, used_now) = self.indices();
        self.begun += u64::from(taken_now.wrapping_sub(taken)) + (owed - owed_now) as u64;
        self.published += u64::from(used_now.wrapping_sub(used));
        // It may have been broken before: then nothing was taken.
        if taken_now != taken || owed_now != owed {
            match self.queue.broken {
                // Taken from the ring; but there is a request at that head, which is not begun again.
                Some(Broken::InFlight { .. }) => self.begun -= 1,
                Some(Broken::NoStatus { head, .. }) => self.lost.push(head),
                _ => {}
            }
        }
        self.check();
    }

    fn indices(&self) -> (u16, usize, u16) {
        (self.queue.ring.taken(), self.queue.resubmit.len(), self.queue.ring.unpublished())
    }

    fn answer(&mut self, at: usize, manner: Manner) {
        let (head, result) = self.engine.answer_one(at, manner);
        self.queue.answer(head, result);
        self.check();
    }

    fn retry(&mut self) {
        let waiting = self.queue.waiting.clone();
        self.queue.retry(&mut self.engine);
        assert!(self.queue.waiting.is_empty(), "it was their last chance");
        let slots = &self.queue.slots;
        self.lost.extend(waiting.into_iter().filter(|head| slots[usize::from(*head)].token.is_none()));
        self.check();
    }

    /// Publishes, and reads what the driver would.
    fn publish(&mut self) {
        let count = self.queue.batch.len();
        let before = self.queue.ring.unpublished();
        let answered: Vec<(u16, u32)> = self.queue.batch.iter().map(|it| (it.head, it.written)).collect();
        self.queue.publish();
        let after = self.queue.ring.unpublished();
        assert_eq!(usize::from(after.wrapping_sub(before)), count);
        self.published += count as u64;
        if self.is_still && count > 0 {
            assert_eq!(self.queue.ring.place.used_idx(), after);
            let used = self.driver.memory.user_window(self.driver.shape.addr().used, self.driver.layout.used_bytes());
            let used = used.expect("it lies in memory");
            for (at, (head, written)) in answered.into_iter().enumerate() {
                let slot = self.driver.layout.slot(before.wrapping_add(at as u16));
                let slot = self.driver.layout.used_slot(slot);
                assert_eq!((used.load_u32(slot, Relaxed), used.load_u32(slot + 4, Relaxed)), (head.into(), written));
            }
        }
        self.check();
    }

    /// The front-end changes the memory, or where the ring lies.
    fn move_memory(&mut self, script: &mut Script<'_>) {
        let number = usize::from(script.u8()) % self.maps.len();
        let mut shape = self.driver.shape;
        if script.u8() & 3 == 3 {
            shape.parts = Shape::parts(script);
        }
        let memory = Arc::new(self.maps[number].clone());
        let Ok(place) = Place::find(&memory, shape.size, &shape.addr()) else { return };
        self.driver.shape = shape;
        learn(&mut self.engine, &memory, number);
        self.queue.move_to(memory, place);
        self.check();
    }

    /// What is true after every step.
    fn check(&self) {
        let queue = &self.queue;
        let tokens = queue.slots.iter().filter(|slot| slot.token.is_some()).count();
        assert_eq!(usize::from(queue.in_flight), tokens);
        assert_eq!(
            tokens,
            queue.parked.len() + queue.waiting.len() + self.engine.pending.len() + queue.batch.len(),
            "every request in flight waits for memory, for the storage or to be published"
        );
        assert_eq!(self.begun, tokens as u64 + self.published + self.lost.len() as u64);
        let has_token = |head: u16| queue.slots[usize::from(head)].token.is_some();
        assert!(queue.parked.iter().chain(&queue.waiting).all(|head| has_token(*head)));
        assert!(queue.order.len() <= 2 * queue.slots.len(), "what is kept of requests has a bound");
        assert!(queue.batch.iter().all(|it| has_token(it.head)));
        assert!(self.engine.pending.iter().all(|it| has_token(it.tag.head)));
        if tokens == 0 {
            assert!(queue.is_at_rest());
        }
    }

    /// What the next back-end would find.
    fn check_region(&self) {
        if self.queue.tracker.is_none() || !self.is_still {
            return;
        }
        let size = self.driver.shape.size;
        let mut bytes = [0; REGION_BYTES];
        let bytes = &mut bytes[..ring_bytes(size) as usize];
        assert_eq!(rustix::io::pread(self.region_file, &mut *bytes, 0).expect("memory"), bytes.len());
        let found = read_split(bytes, size, self.queue.ring.unpublished()).expect("it was kept");
        assert!(found.repaired.is_empty(), "nothing is half done");
        let mut found = found.heads;
        found.sort_unstable();
        assert_eq!(found, self.owed(), "the region names what is owed, and nothing else");
    }

    /// Requests that were taken, by us or before us, and not completed.
    fn owed(&self) -> Vec<u16> {
        let slots = (0..).zip(&self.queue.slots).filter(|(_, slot)| slot.token.is_some());
        let begun = slots.map(|(head, _)| head);
        let mut owed: Vec<u16> = begun.chain(self.lost.iter().chain(&self.queue.resubmit).copied()).collect();
        owed.sort_unstable();
        owed
    }
}

/// The engine learns which memory may be used from now on: that of the map with that number.
fn learn(engine: &mut Recorder, memory: &Arc<MemoryMap>, number: usize) {
    engine.memory = Arc::downgrade(memory);
    engine.inside.clear();
    for (region, guest_addr) in MAPS[number] {
        let (piece, _) = memory.piece(*guest_addr, BYTES[*region]).expect("it is a region");
        let start = piece.as_ptr().addr();
        engine.inside.push((start, start + piece.len));
    }
}

#[cfg(test)]
mod tests;
