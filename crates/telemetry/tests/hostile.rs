//! Files that are no pages, or nearly. A reader refuses them with a sentence, and never panics.

#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;
#[path = "../../../fuzz/src/telemetry.rs"]
mod telemetry;

use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use warmswap_telemetry::{HEADER_BYTES, Identity, Kind, OpenError, Page, ReadError, Reader, SECTION_BYTES};

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

fn file(bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("warmswap-telemetry", flags).expect("a memfd");
    rustix::fs::ftruncate(&file, bytes.len() as u64).expect("a memfd has any size");
    for (chunk, offset) in bytes.chunks(4096).zip((0..).step_by(4096)) {
        assert_eq!(rustix::io::pwrite(&file, chunk, offset), Ok(chunk.len()));
    }
    rustix::fs::fcntl_add_seals(&file, seals).expect("no seal is missing");
    file
}

/// The bytes of a good page.
fn good(queues: u16) -> Vec<u8> {
    let identity = Identity { device_type: 2, instance: 4096, started_ns: 5 };
    let (page, mut writers) = Page::create(queues, identity).expect("the system has memory to give");
    writers[0].update(6).submitted(Kind::Read);
    let mut bytes = vec![0; HEADER_BYTES + usize::from(queues) * SECTION_BYTES];
    let read = rustix::io::pread(&page, &mut *bytes, 0).expect("a memfd can be read");
    assert_eq!(read, bytes.len());
    bytes
}

fn with(mut bytes: Vec<u8>, offset: usize, value: u64) -> Vec<u8> {
    bytes[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    Reader::open(file(bytes, SEALS)).expect_err("not a page").to_string()
}

#[test]
fn a_copy_of_a_page_is_a_page() {
    let reader = Reader::open(file(&good(3), SEALS)).expect("a page");
    assert_eq!(reader.queue(0).expect("nobody writes").kind(Kind::Read).submitted, 1);
}

#[test]
fn a_file_that_may_change_its_size_is_refused() {
    for seals in [SealFlags::empty(), SealFlags::SHRINK, SealFlags::GROW, SealFlags::WRITE] {
        let refused = Reader::open(file(&good(1), seals));
        assert!(matches!(refused, Err(OpenError::Unsealed)), "{seals:?}");
    }
}

#[test]
fn what_is_not_a_memfd_is_refused() {
    let (pipe, _other) = rustix::pipe::pipe().expect("a pipe");
    let here = std::fs::File::open(".").expect("a directory");
    let null = std::fs::File::open("/dev/null").expect("it is always there");
    for file in [pipe, here.into(), null.into()] {
        assert!(matches!(Reader::open(file), Err(OpenError::Unsealed)));
    }
}

#[test]
fn a_file_shorter_than_it_says_is_refused() {
    let bytes = good(2);
    for length in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + SECTION_BYTES, bytes.len() - 1] {
        let refused = Reader::open(file(&bytes[..length], SEALS));
        assert!(matches!(refused, Err(OpenError::Short { .. })), "{length} bytes: {refused:?}");
    }
    assert_eq!(refusal(&bytes[..500]), "telemetry page: 500 bytes, expected at least 14720: not read");
}

#[test]
fn another_layout_is_refused_and_the_difference_is_said() {
    let foreign = "telemetry page: magic 0x656c65746d726177, expected 0x7761726d74656c65: not read";
    let cases = [
        (0, 0x656c_6574_6d72_6177, foreign),
        (8, 2, "telemetry page: version 2, expected 1: not read"),
        (16, 192, "telemetry page: the size of the header is 192, expected 128 to 128: not read"),
        (24, 0, "telemetry page: the number of queues is 0, expected 1 to 1024: not read"),
        (24, 1025, "telemetry page: the number of queues is 1025, expected 1 to 1024: not read"),
        (24, 0x1_0001, "telemetry page: the number of queues is 65537, expected 1 to 1024: not read"),
        (32, 7304, "telemetry page: the size of a section is 7304, expected 7296 to 7296: not read"),
        (40, 8, "telemetry page: the number of request kinds is 8, expected 7 to 7: not read"),
        (48, 117, "telemetry page: the number of buckets is 117, expected 118 to 118: not read"),
        (56, 0, "telemetry page: the process id is 0, expected 1 to 4294967295: not read"),
        (64, 1 << 32, "telemetry page: the device type is 4294967296, expected 0 to 4294967295: not read"),
    ];
    for (offset, value, sentence) in cases {
        assert_eq!(refusal(&with(good(1), offset, value)), sentence);
    }
}

#[test]
fn a_queue_that_the_page_does_not_have_is_refused() {
    let reader = Reader::open(file(&good(2), SEALS)).expect("a page");
    for index in [2, u16::MAX] {
        assert!(matches!(reader.queue(index), Err(ReadError::NoSuchQueue { queues: 2, .. })));
        assert!(matches!(reader.read_anyway(index), Err(ReadError::NoSuchQueue { queues: 2, .. })));
    }
}

#[test]
fn a_descriptor_that_cannot_be_read_is_refused_with_the_error_of_the_system() {
    let page = file(&good(1), SEALS);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&page));
    let deaf = std::fs::OpenOptions::new().write(true).open(path).expect("it is ours");
    assert!(matches!(Reader::open(deaf.into()), Err(OpenError::Io(_))));
}

#[test]
fn a_hole_in_a_page_reads_as_zeros() {
    let page = file(&good(4), SEALS);
    let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    let reader = Reader::open(page.as_fd().try_clone_to_owned().expect("a descriptor")).expect("a page");
    rustix::fs::fallocate(&page, hole, 0, 1 << 20).expect("it is ours");
    assert_eq!(reader.queue(0).expect("all the same").sequence, 0);
}

/// Words that are near a limit more often than not.
fn any_word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..64_u32, 0..3_u64).prop_map(|(bit, off)| (1_u64 << bit).wrapping_add(off).wrapping_sub(1))
    ]
}

/// Opens a file and reads what it can of it.
fn exercise(bytes: &[u8]) -> Option<u16> {
    let reader = Reader::open(file(bytes, SEALS)).ok()?;
    let queues = reader.header().queues;
    for index in (0..queues).take(3).chain([queues - 1, queues, u16::MAX]) {
        let _any = reader.queue(index);
        if let Ok(found) = reader.read_anyway(index) {
            for kind in &found.kinds {
                let _any = kind.latency.quantile(0.99);
            }
        }
    }
    Some(queues)
}

#[test]
fn the_seeds_of_telemetry_are_words_of_a_page() {
    // The file, where, and the words.
    let laid = |what: u8, at: u16, words: &[u64]| {
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        [&[what][..], &at.to_le_bytes(), &words].concat()
    };
    // Of a process that is always the same one.
    let header = with(good(1), 56, 1)[..HEADER_BYTES].to_vec();
    let made = [
        ("header", [&[8, 0, 0][..], &header].concat()),
        ("queues", laid(0, 24, &[3])),
        ("odd", laid(0, HEADER_BYTES as u16, &[5, 6])),
        ("counts", laid(0, HEADER_BYTES as u16 + 128, &[u64::MAX; 20])),
        ("short", laid(5, 0, &[])),
    ];
    seeds::check("telemetry", &made, telemetry::run);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn words_laid_over_a_page_are_read_as_the_table_says(
        what in 0..16_u8, at in 0..2_000_u16, words in proptest::collection::vec(any_word(), 0..6)
    ) {
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        telemetry::run(&[&[what][..], &(8 * at).to_le_bytes(), &words].concat());
    }

    #[test]
    fn random_files_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..9_000)) {
        prop_assert_eq!(exercise(&bytes), None);
    }

    #[test]
    fn headers_with_random_words_never_panic(changes in proptest::collection::vec((0..16_usize, any_word()), 1..4)) {
        let bytes = changes.iter().fold(good(2), |bytes, &(word, value)| with(bytes, 8 * word, value));
        if let Some(queues) = exercise(&bytes) {
            prop_assert!(queues == 1 || queues == 2, "{} queues in a file of two", queues);
        }
    }

    #[test]
    fn sections_of_random_bytes_never_panic(random in proptest::collection::vec(any::<u8>(), SECTION_BYTES)) {
        let mut bytes = good(2);
        bytes[HEADER_BYTES + SECTION_BYTES..].copy_from_slice(&random);
        prop_assert_eq!(exercise(&bytes), Some(2));
    }
}
