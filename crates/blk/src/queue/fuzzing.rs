//! A hostile driver: any bytes become what it writes into its memory and when, what the storage answers, and what the front-end changes
//! meanwhile. After every step the queue is held against what must be true of it whatever the driver does.
//!
//! | what is watched | by whom |
//! |---|---|
//! | nothing outside of the device is read or written, and nothing that a read-only device refuses | [`storage::Recorder`], the image afterwards |
//! | memory that the kernel is given is the guest's, and stays mapped until it has answered | [`storage::Recorder`] |
//! | memory beside the guest's is not written | [`World::inspect`] |
//! | every request that was taken is in exactly one place; none is completed twice | [`Life::check`] |
//! | the used ring says what was completed, and nothing else | [`Life::publish`] |
//! | the in-flight region names exactly what is owed, at any time | [`Life::check_region`] |
//!
//! Used by the fuzzer (`fuzz/`) and by the tests; never in what is shipped.

mod driver;
mod life;
mod storage;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use warmswap_telemetry::{Identity, Page, QueueWriter};
use warmswap_wire::inflight::ring_bytes;
use warmswap_wire::{LogRegion, MemoryRegion};

use self::driver::{Driver, Script, Shape};
use self::life::Life;
use crate::image::{Direct, Image, SECTOR};
use crate::log::DirtyLog;
use crate::memory::{Mapping, MemoryMap};

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
