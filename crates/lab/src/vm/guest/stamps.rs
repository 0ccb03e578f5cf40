//! The stamp load: one request at a time, each block stamped and checked, each request timed.
//!
//! It is both a witness (what was acknowledged must be found again) and the probe that measures how long the disk stands
//! still. It runs at depth 1, so it does not notice a reordering; fio does.

use std::thread;
use std::time::{Duration, Instant};

use super::{Shared, disk};
use crate::vm::layout::{BLOCK, STAMP};
use crate::vm::orders::Line;
use crate::vm::rng::Rng;
use crate::vm::stamp::{BLOCKS, Block, table_digest};

/// Pause between probes: bounds both the load and what a probe may overlook.
const PAUSE: Duration = Duration::from_millis(2);

/// Counts of the load.
#[derive(Debug, Default)]
struct Tally {
    writes: u64,
    reads: u64,
    errors: u64,
    mismatches: u64,
}

/// Stamps and checks random blocks until told to stop, then checks all of them.
pub(crate) fn run(shared: &Shared) -> anyhow::Result<()> {
    let disk = disk::open()?;
    let seed = shared.orders.seed;
    let mut rng = Rng::new(seed, 1);
    let mut promised = vec![0_u64; usize::try_from(BLOCKS)?];
    let mut tally = Tally::default();
    let mut block = Block::zeroed();
    while !shared.stopping() {
        let index = rng.range(0, BLOCKS);
        let slot = usize::try_from(index)?;
        if rng.range(0, 3) == 0 {
            check(shared, &disk, &mut block, index, promised[slot], &mut tally);
        } else {
            block.stamp(seed, index, promised[slot] + 1);
            tally.writes += 1;
            match timed(shared, || rustix::io::pwrite(&disk, &block.0, at(index))) {
                Ok(_) => promised[slot] += 1,
                Err(why) => complain(shared, &mut tally.errors, &format!("write of block {index}: {why}")),
            }
        }
        thread::sleep(PAUSE);
    }
    // Blocks never written are left to the host, which compares the whole table with the image.
    for (index, &generation) in (0..BLOCKS).zip(&promised).filter(|(_, generation)| **generation > 0) {
        check(shared, &disk, &mut block, index, generation, &mut tally);
    }
    let line = Line::new("stamp")
        .with("writes", tally.writes)
        .with("reads", tally.reads)
        .with("errors", tally.errors)
        .with("mismatches", tally.mismatches)
        .with("longest_us", shared.meter.longest_us())
        .with("table", format!("{:016x}", table_digest(&promised)));
    shared.port.say(&line);
    Ok(())
}

fn at(index: u64) -> u64 {
    STAMP.offset + index * BLOCK
}

/// Does one request and tells the meter how long it took.
fn timed<T>(shared: &Shared, request: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    shared.meter.probe_begins();
    let begin = Instant::now();
    let outcome = request();
    shared.meter.probe_ends(u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX));
    outcome
}

/// Reads a block and compares its generation with what the disk has acknowledged.
fn check(
    shared: &Shared,
    disk: &impl std::os::fd::AsFd,
    block: &mut Block,
    index: u64,
    promised: u64,
    tally: &mut Tally,
) {
    tally.reads += 1;
    if let Err(why) = timed(shared, || rustix::io::pread(disk, &mut block.0, at(index))) {
        return complain(shared, &mut tally.errors, &format!("read of block {index}: {why}"));
    }
    match block.generation(shared.orders.seed, index) {
        Ok(found) if found == promised => {}
        Ok(found) => {
            complain(shared, &mut tally.mismatches, &format!("block {index}: generation {found}, not {promised}"));
        }
        Err(why) => complain(shared, &mut tally.mismatches, &why),
    }
}

/// Counts a finding and names it to the host (only the first few: the count says the rest).
fn complain(shared: &Shared, count: &mut u64, why: &str) {
    const NAMED_MAX: u64 = 20;
    *count += 1;
    if *count <= NAMED_MAX {
        shared.port.say(&Line::new("note").with("stamp", why));
    }
}
