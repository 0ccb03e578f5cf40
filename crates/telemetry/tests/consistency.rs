//! Snapshots while a thread writes, and after one stopped in the middle.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use warmswap_telemetry::{Identity, Kind, Page, QueueSnapshot, QueueWriter, ReadError, Reader, bucket_bounds};

fn page(queues: u16) -> (Page, Vec<QueueWriter>, Reader) {
    let identity = Identity { device_type: 2, instance: 0, started_ns: 0 };
    let (page, writers) = Page::create(queues, identity).expect("the system has memory to give");
    let reader = Reader::open(page.as_fd().try_clone_to_owned().expect("a descriptor")).expect("a page");
    (page, writers, reader)
}

/// One update that keeps what `holds_together` checks, with values all over the section.
fn step(writer: &mut QueueWriter, n: u64, pending: &mut u64) {
    let mut update = writer.update(n);
    update.kick();
    let kind = Kind::ALL[(n % 7) as usize];
    if n.is_multiple_of(3) && *pending > 0 {
        *pending -= 1;
        update.completed(Kind::Other, 4096, *bucket_bounds((n % 118) as usize).start());
    } else {
        *pending += 1;
        update.submitted(Kind::Other);
    }
    update.submitted(kind);
    if n.is_multiple_of(2) {
        update.completed(kind, 4096, n);
    } else {
        update.failed(kind, n);
    }
    update.in_flight(*pending, (*pending > 0).then_some(n));
    update.polled();
}

/// What is true between any two updates of `step`.
fn holds_together(found: &QueueSnapshot) -> Result<(), String> {
    let total = |value: fn(&warmswap_telemetry::KindSnapshot) -> u64| found.kinds.iter().map(value).sum::<u64>();
    let answered = total(|kind| kind.completed);
    let checks = [
        ("sequence", found.sequence, 2 * found.kicks),
        ("time", found.updated_ns.unwrap_or(0), found.kicks),
        ("in flight", total(|kind| kind.submitted).wrapping_sub(answered), found.in_flight),
        ("oldest", found.oldest_ns.unwrap_or(found.kicks), found.kicks),
        ("histograms", total(|kind| kind.latency.total() as u64), answered),
        ("bytes", total(|kind| kind.bytes), 4096 * (answered - total(|kind| kind.errors).min(answered))),
        ("polls", found.polls, found.kicks),
    ];
    let wrong = checks.into_iter().find(|(_, left, right)| left != right);
    wrong.map_or(Ok(()), |(name, left, right)| Err(format!("{name}: {left} and {right}")))
}

/// Runs `body` while a thread makes updates, in bursts with rests that last from nothing to some microseconds.
fn under_a_writer(body: impl FnOnce(&Reader)) {
    let (_page, mut writers, reader) = page(2);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut n, mut pending) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                step(&mut writers[1], n, &mut pending);
                if n.is_multiple_of(4) {
                    (0..n % 512).for_each(|_| std::hint::spin_loop());
                }
            }
        });
        // The thread is told to stop also when the body fails, or the scope would wait for it.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&reader)));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_snapshot_under_a_writer_is_of_one_instant() {
    under_a_writer(|reader| {
        let (mut whole, mut last) = (0, 0);
        for _ in 0..1_000_000 {
            match reader.queue(1) {
                Ok(found) => {
                    holds_together(&found).expect("a snapshot of one instant");
                    assert!(found.whole && found.sequence >= last, "time goes one way");
                    whole += u32::from(found.sequence > last);
                    last = found.sequence;
                }
                // A writer that has no processor for a while looks like one that stopped.
                Err(ReadError::Busy { .. } | ReadError::MidUpdate { .. }) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
            if whole == 500 {
                return;
            }
        }
        panic!("{whole} snapshots, expected 500");
    });
}

/// The check above can fail: without the sequence, the same writer and the same check find values of different
/// instants.
#[test]
fn without_the_sequence_a_snapshot_is_of_several_instants() {
    under_a_writer(|reader| {
        for _ in 0..1_000_000 {
            let found = reader.read_anyway(1).expect("it can be read");
            let held = holds_together(&found);
            assert!(held.is_ok() || !found.whole, "{held:?} in what was called whole");
            if held.is_err() {
                return;
            }
        }
        panic!("a million reads without a single torn one");
    });
}

#[test]
fn queues_are_written_independently_of_each_other() {
    let (_page, mut writers, reader) = page(2);
    let [first, second] = writers.as_mut_slice() else { panic!("two queues") };
    let mut slow = first.update(1);
    slow.kick();
    second.update(2).kick();
    assert_eq!(reader.queue(1).expect("nobody writes here").kicks, 1);
    assert!(matches!(reader.queue(0), Err(ReadError::MidUpdate { index: 0, sequence: 1 })));
    drop(slow);
    assert_eq!(reader.queue(0).expect("nobody writes any more").kicks, 1);
}

#[test]
fn a_writer_that_stopped_in_the_middle_is_told_from_a_busy_one_and_its_values_can_be_read() {
    let (_page, mut writers, reader) = page(1);
    writers[0].update(10).submitted(Kind::Flush);
    let mut update = writers[0].update(20);
    update.submitted(Kind::Flush);
    std::mem::forget(update);

    let error = reader.queue(0).expect_err("it is in the middle");
    assert!(matches!(error, ReadError::MidUpdate { index: 0, sequence: 3 }), "{error}");
    let found = reader.read_anyway(0).expect("it can be read");
    assert!(!found.whole);
    assert_eq!((found.sequence, found.updated_ns, found.kind(Kind::Flush).submitted), (3, Some(20), 2));

    writers[0].update(30).kick();
    let found = reader.queue(0).expect("the next update ends what was left open");
    assert_eq!((found.sequence, found.kicks, found.kind(Kind::Flush).submitted), (4, 1, 2));
}

#[test]
fn a_writer_that_never_rests_is_busy_and_not_stopped() {
    let (_page, mut writers, reader) = page(1);
    let stop = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut update = writers[0].update(1);
                (0..200).for_each(|_| update.kick());
            }
        });
        let seen =
            (0..100_000).find_map(|_| reader.queue(0).err().filter(|error| matches!(error, ReadError::Busy { .. })));
        stop.store(true, Ordering::Relaxed);
        seen
    });
    let error = seen.expect("a reader gives up at some time");
    assert_eq!(error.to_string(), "telemetry page: queue 0 changed during each of 64 reads: read it again");
}
