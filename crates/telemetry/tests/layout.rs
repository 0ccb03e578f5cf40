//! The layout as the crate's documentation has it, byte by byte: a page is written by way of the interface, and read as
//! raw bytes.

use std::os::fd::AsFd;

use warmswap_telemetry::{Identity, Kind, Page, Reader};

/// A page of two queues, and how to read a word of its file.
fn page() -> (Page, Vec<warmswap_telemetry::QueueWriter>) {
    let identity = Identity { device_type: 2, instance: 0x1234_5678_9abc_def0, started_ns: 77 };
    Page::create(2, identity).expect("the system has memory to give")
}

fn word(page: &Page, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(rustix::io::pread(page, &mut bytes, offset), Ok(8));
    u64::from_ne_bytes(bytes)
}

#[test]
fn the_header_lies_where_the_documentation_says() {
    let (page, _writers) = page();
    let expected = [
        (0, 0x7761_726d_7465_6c65),
        (8, 1),
        (16, 128),
        (24, 2),
        (32, 7296),
        (40, 7),
        (48, 118),
        (56, std::process::id().into()),
        (64, 2),
        (72, 77),
        (80, 0x1234_5678_9abc_def0),
        (88, 0),
        (120, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(word(&page, offset), value, "at {offset}");
    }
    assert_eq!(rustix::fs::fstat(&page).expect("an open file").st_size, 128 + 2 * 7296);
}

#[test]
fn every_value_of_a_section_lies_where_the_documentation_says() {
    let (page, mut writers) = page();
    let mut update = writers[1].update(1_000);
    update.in_flight(3, Some(900));
    update.broken(true);
    for (times, count) in [(4, 0), (5, 1), (6, 2), (7, 3), (8, 4), (9, 5)] {
        for _ in 0..times {
            match count {
                0 => update.kick(),
                1 => update.call(true),
                2 => update.call(false),
                3 => update.woke(),
                4 => update.polled(),
                _ => update.malformed(),
            }
        }
    }
    update.retried(10);
    drop(update);
    let section = 128 + 7296;
    let expected = [2, 1_000, 3, 900, 1, 4, 5, 6, 7, 8, 10, 9, 0, 0, 0, 0];
    for (offset, value) in (0..).step_by(8).zip(expected) {
        assert_eq!(word(&page, section + offset), value, "at {offset}");
    }
    assert_eq!(word(&page, 128), 0, "the section of queue 0");
}

#[test]
fn every_kind_of_request_has_its_block_where_the_documentation_says() {
    let (page, mut writers) = page();
    for (kind, n) in Kind::ALL.into_iter().zip(1..) {
        let mut update = writers[0].update(n);
        for _ in 0..n + 1 {
            update.submitted(kind);
        }
        update.completed(kind, 4096 * n, 255);
        for _ in 1..n {
            update.failed(kind, 256 << n);
        }
    }
    for (k, n) in (0..7).zip(1..) {
        let block = 128 + 128 + 1024 * k;
        assert_eq!([0, 8, 16, 24].map(|offset| word(&page, block + offset)), [n + 1, n, n - 1, 4096 * n], "kind {k}");
        assert_eq!(word(&page, block + 64), 1, "kind {k}: below 256 ns");
        assert_eq!(word(&page, block + 64 + 8 * (1 + 4 * n)), n - 1, "kind {k}: {n} powers of two above 256 ns");
        let sum: u64 = (0..118).map(|bucket| word(&page, block + 64 + 8 * bucket)).sum();
        assert_eq!(sum, n, "kind {k}: every answer is in the histogram");
        assert_eq!(word(&page, block + 1008), 0, "kind {k}: reserved");
    }
}

#[test]
fn a_reader_sees_what_a_writer_wrote() {
    let (page, mut writers) = page();
    let reader = Reader::open(page.as_fd().try_clone_to_owned().expect("a descriptor")).expect("a page");
    let header = reader.header();
    assert_eq!((header.queues, header.pid, header.device_type), (2, std::process::id(), 2));
    assert_eq!((header.started_ns, header.instance), (77, 0x1234_5678_9abc_def0));

    let untouched = reader.queue(1).expect("nobody writes");
    assert_eq!((untouched.sequence, untouched.updated_ns, untouched.oldest_ns), (0, None, None));

    let mut update = writers[1].update(5_000);
    update.submitted(Kind::Write);
    update.submitted(Kind::Write);
    update.failed(Kind::Write, 700);
    update.in_flight(1, Some(4_000));
    update.call(true);
    drop(update);
    let found = reader.queue(1).expect("nobody writes");
    assert!(found.whole && !found.broken);
    assert_eq!((found.sequence, found.updated_ns, found.in_flight, found.oldest_ns), (2, Some(5_000), 1, Some(4_000)));
    assert_eq!((found.calls_sent, found.calls_suppressed), (1, 0));
    let writes = found.kind(Kind::Write);
    assert_eq!((writes.submitted, writes.completed, writes.errors, writes.bytes), (2, 1, 1, 0));
    assert_eq!(writes.latency.quantile(0.5), Some(767));
    assert_eq!(found.kind(Kind::Read).latency.quantile(0.5), None);

    writers[1].update(6_000).in_flight(0, None);
    let later = reader.queue(1).expect("nobody writes");
    assert_eq!((later.sequence, later.in_flight, later.oldest_ns), (4, 0, None));
    assert_eq!(later.kind(Kind::Write).latency.since(&writes.latency).total(), 0);
}

#[test]
fn a_writer_goes_on_without_its_page() {
    let (page, mut writers) = page();
    let reader = Reader::open(page.as_fd().try_clone_to_owned().expect("a descriptor")).expect("a page");
    let mut writer = writers.pop().expect("two");
    drop((page, writers));
    writer.update(9).kick();
    assert_eq!(writer.queue(), 1);
    assert_eq!(reader.queue(1).expect("nobody writes").kicks, 1);
}
