//! Any bytes as a telemetry page: a reader agrees with a second one that is written after the table in the documentation of the crate, says
//! what is wrong where it refuses, and gives the very words that are in the page.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use warmswap_telemetry::{
    HEADER_BYTES, Header, Identity, Kind, OpenError, Page, QueueSnapshot, ReadError, Reader, SECTION_BYTES,
};

const LARGEST: usize = HEADER_BYTES + 2 * SECTION_BYTES;
/// Sizes of the files: complete pages, and ones that end too early.
const SIZES: [usize; 8] =
    [LARGEST, LARGEST, LARGEST, HEADER_BYTES + SECTION_BYTES, LARGEST - 1, HEADER_BYTES, HEADER_BYTES - 1, 0];

/// The first byte picks a file and whether its bytes are laid over a good page, two say where, the rest are the bytes.
pub(crate) fn run(data: &[u8]) {
    thread_local! {
        static WORLD: World = World::new();
    }
    WORLD.with(|world| world.run(data));
}

struct World {
    files: [OwnedFd; 8],
    good: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let identity = Identity { device_type: 2, instance: 4096, started_ns: 5 };
        let (page, mut writers) = Page::create(2, identity).expect("the system has memory to give");
        writers[0].update(6).completed(Kind::Read, 512, 9_000);
        let mut good = vec![0; LARGEST];
        assert_eq!(rustix::io::pread(&page, &mut *good, 0), Ok(LARGEST));
        World { files: SIZES.map(sealed), good }
    }

    fn run(&self, data: &[u8]) {
        let Some(([what, low, high], rest)) = data.split_first_chunk::<3>() else { return };
        let mut bytes = if what & 8 == 0 { self.good.clone() } else { vec![0; LARGEST] };
        let at = usize::from(u16::from_le_bytes([*low, *high])) % LARGEST;
        let fits = rest.len().min(LARGEST - at);
        bytes[at..at + fits].copy_from_slice(&rest[..fits]);
        let (file, size) = (&self.files[usize::from(what % 8)], SIZES[usize::from(what % 8)]);
        bytes.truncate(size);
        assert_eq!(rustix::io::pwrite(file, &bytes, 0), Ok(size));
        check(Reader::open(file.as_fd().try_clone_to_owned().expect("a descriptor")), &bytes);
    }
}

fn sealed(size: usize) -> OwnedFd {
    let file = rustix::fs::memfd_create("warmswap-telemetry", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let file = file.expect("a memfd");
    rustix::fs::ftruncate(&file, size as u64).expect("it has any size");
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).expect("no seal is missing");
    file
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// What a page says of itself, by the table; or what its refusal must name.
fn expected(bytes: &[u8]) -> Result<Header, String> {
    if bytes.len() < 128 {
        return Err(format!("{} bytes, expected at least 128", bytes.len()));
    }
    let fields = [
        ("magic", 0, 0x7761_726d_7465_6c65, 0x7761_726d_7465_6c65),
        ("version", 8, 1, 1),
        ("the size of the header", 16, 128, 128),
        ("the size of a section", 32, 7296, 7296),
        ("the number of request kinds", 40, 7, 7),
        ("the number of buckets", 48, 118, 118),
        ("the number of queues", 24, 1, 1024),
        ("the process id", 56, 1, u64::from(u32::MAX)),
        ("the device type", 64, 0, u64::from(u32::MAX)),
    ];
    for (name, at, least, most) in fields {
        if !(least..=most).contains(&word(bytes, at)) {
            return Err(name.to_owned());
        }
    }
    let (queues, pid, device_type) = (word(bytes, 24) as u16, word(bytes, 56) as u32, word(bytes, 64) as u32);
    let needed = 128 + 7296 * usize::from(queues);
    if bytes.len() < needed {
        return Err(format!("{} bytes, expected at least {needed}", bytes.len()));
    }
    Ok(Header { queues, pid, device_type, started_ns: word(bytes, 72), instance: word(bytes, 80) })
}

fn check(opened: Result<Reader, OpenError>, bytes: &[u8]) {
    let reader = match (opened, expected(bytes)) {
        (Ok(reader), Ok(header)) => {
            assert_eq!(*reader.header(), header);
            reader
        }
        (Err(error), Err(named)) => {
            let said = error.to_string();
            assert!(said.contains(&named) && said.contains("not read"), "{said}, expected {named}");
            return;
        }
        (opened, expected) => panic!("{opened:?}, expected {expected:?}"),
    };
    let queues = reader.header().queues;
    for index in 0..queues {
        let section = &bytes[128 + 7296 * usize::from(index)..][..7296];
        let sequence = word(section, 0);
        let anyway = reader.read_anyway(index).expect("it can be read");
        assert_eq!(anyway.whole, sequence.is_multiple_of(2));
        says(&anyway, section);
        match reader.queue(index) {
            Ok(found) => {
                assert!(found.whole && sequence.is_multiple_of(2));
                assert_eq!(found, anyway);
            }
            Err(ReadError::MidUpdate { index: named, sequence: odd }) => {
                assert_eq!((named, odd, sequence % 2), (index, sequence, 1));
            }
            Err(other) => panic!("{other}: nobody writes"),
        }
    }
    assert!(matches!(reader.queue(queues), Err(ReadError::NoSuchQueue { .. })));
}

/// The snapshot has the words that the table puts there.
fn says(found: &QueueSnapshot, section: &[u8]) {
    let time = |at| Some(word(section, at)).filter(|ns| *ns != 0);
    assert_eq!((found.sequence, found.updated_ns, found.oldest_ns), (word(section, 0), time(8), time(24)));
    assert_eq!((found.in_flight, found.broken), (word(section, 16), word(section, 32) != 0));
    let counters = [
        found.kicks,
        found.calls_sent,
        found.calls_suppressed,
        found.wakes,
        found.polls,
        found.retries,
        found.malformed,
    ];
    assert_eq!(counters, [40, 48, 56, 64, 72, 80, 88].map(|at| word(section, at)));
    for (kind, at) in found.kinds.iter().zip((128..).step_by(1024)) {
        let numbers = [kind.submitted, kind.completed, kind.errors, kind.bytes];
        assert_eq!(numbers, [0, 8, 16, 24].map(|offset| word(section, at + offset)));
        for (bucket, count) in kind.latency.counts.iter().enumerate() {
            assert_eq!(*count, word(section, at + 64 + 8 * bucket));
        }
        // Counts that no histogram has must not end who asks for a quantile.
        let quantiles = [0.0, 0.5, 0.99, 1.0].map(|share| kind.latency.quantile(share));
        assert!(quantiles.iter().flatten().is_sorted(), "{quantiles:?}");
    }
}
