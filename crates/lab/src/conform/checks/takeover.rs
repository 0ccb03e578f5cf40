//! A second process that goes on where the first one ended, and what an in-flight region is worth then.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use warmswap_wire::inflight::{ENTRY_BYTES, HEADER_BYTES, InflightRing, read_split};
use warmswap_wire::{FdSlot, InflightDescription, ProtocolFeatures, Reply, Request, VirtioFeatures, VringState};

use super::{Check, For, TAKEOVER};
use crate::conform::job::Jobs;
use crate::conform::outcome::{Checked, Miss, expect, failed, lacks, passed};
use crate::conform::ring::Ring;
use crate::conform::stage::{Bench, Choice, QUIET, SIZE, Stage};
use crate::guest::Mapping;

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "takeover",
        name: "a second process goes on where the first one stopped",
        clause: TAKEOVER,
        devices: For::Requests,
        run: takeover,
    },
    Check {
        id: "takeover-killed",
        name: "a second process completes what the first one owed when it was killed",
        clause: TAKEOVER,
        devices: For::Requests,
        run: takeover_killed,
    },
    Check {
        id: "takeover-unkicked",
        name: "a request that waits in the ring is served when the ring is started and kicked, not twice",
        clause: TAKEOVER,
        devices: For::Requests,
        run: takeover_unkicked,
    },
    Check {
        id: "inflight-region",
        name: "GET_INFLIGHT_FD gives memory for all rings, in which nothing is marked",
        clause: "Inflight I/O tracking: the back-end allocates an extra buffer … and shares it with the front-end",
        devices: For::Any,
        run: region,
    },
    Check {
        id: "inflight-marks",
        name: "the region marks what is in flight, and nothing when all is done",
        clause: "Inflight I/O tracking: set desc[i].inflight to 1 … set the inflight field of each entry in the batch to 0",
        devices: For::Slow,
        run: marks,
    },
    Check {
        id: "inflight-resubmit",
        name: "after a kill what the region marks is completed, each once",
        clause: "Inflight I/O tracking: when reconnecting, resubmit inflight entries in order of their counter value",
        devices: For::Slow,
        run: resubmit,
    },
    Check {
        id: "inflight-unordered",
        name: "the same after completions out of order",
        clause: "Inflight I/O tracking: it can't work when we process descriptors out-of-order … to solve this problem",
        devices: For::Slow,
        run: unordered,
    },
    Check {
        id: "inflight-fresh",
        name: "a fresh region does not keep a ring from going on in the middle",
        clause: TAKEOVER,
        devices: For::Requests,
        run: fresh,
    },
];

/// So much longer a slow request takes, and so many are in flight.
const SLOW: Duration = Duration::from_millis(300);
const HELD: u16 = 6;

/// A second process that serves the memory of the first one, which is killed.
fn succeed(stage: &mut Stage<'_>, first: Bench, choice: Choice) -> Result<Bench, Miss> {
    first.process.borrow_mut().kill()?;
    stage.subject.slow(Duration::ZERO);
    let mut second = stage.open_with(first.memory)?;
    second.negotiate(choice)?;
    second.share_memory()?;
    Ok(second)
}

/// Requires that nothing more is completed.
fn no_more(bench: &Bench, ring: &Ring) -> Result<(), Miss> {
    expect(!ring.moves(QUIET), || format!("more is completed than was offered ({})", ring.words()))?;
    bench.settle()
}

fn takeover(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    let (mut ring, jobs) = (bench.ring(100)?, bench.jobs()?);
    bench.start(&ring, 100)?;
    bench.serve(&mut ring, &jobs, 0..5)?;
    let base = bench.stop(&ring)?;
    let second = succeed(stage, bench, Choice::default())?;
    second.start(&ring, base)?;
    second.serve(&mut ring, &jobs, 5..9)?;
    no_more(&second, &ring)?;
    passed()
}

fn takeover_killed(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..5)?;
    // Whatever of these is completed by then was completed in order: they are not slow, or all as slow.
    stage.subject.slow(SLOW);
    bench.offer(&mut ring, &jobs, 5..11);
    ring.kick.signal();
    std::thread::sleep(SLOW / 4);
    let second = succeed(stage, bench, Choice::default())?;
    let base = ring.used_idx();
    let left: Vec<u16> = (5..11).skip(usize::from(base - 5)).collect();
    second.start(&ring, base)?;
    ring.kick.signal();
    second.served(&ring, &jobs, base, &left)?;
    no_more(&second, &ring)?;
    Ok(format!("{} were owed", left.len()))
}

fn takeover_unkicked(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    let (mut ring, jobs) = (bench.ring(77)?, bench.jobs()?);
    bench.offer(&mut ring, &jobs, 0..3);
    bench.start(&ring, 77)?;
    // As a broker does: once for each ring, whoever has kicked before.
    ring.kick.signal();
    ring.kick.signal();
    bench.served(&ring, &jobs, 77, &[0, 1, 2])?;
    ring.kick.signal();
    no_more(&bench, &ring)?;
    passed()
}

/// A region of a back-end, and our view of it.
struct Region {
    /// As the back-end says it.
    description: InflightDescription,
    /// For how many rings it was asked for.
    rings: u16,
    fd: OwnedFd,
    mapping: Mapping,
}

fn choice() -> Choice {
    Choice::and(VirtioFeatures::empty(), ProtocolFeatures::INFLIGHT_SHMFD)
}

/// Rings that a region is made for: those up to the one that requests go to.
fn rings(bench: &Bench) -> u16 {
    bench.kind.ring() as u16 + 1
}

fn get_region(bench: &Bench) -> Result<Region, Miss> {
    bench.needs(ProtocolFeatures::INFLIGHT_SHMFD)?;
    for index in 0..rings(bench) {
        bench.tell(&Request::SetVringNum(VringState { index: index.into(), value: SIZE.into() }), &[])?;
    }
    let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: rings(bench), queue_size: SIZE };
    let (reply, fds) = bench.ask(&Request::GetInflightFd(wanted))?;
    let Reply::Inflight { region: description, fd: Some(_) } = reply else {
        return failed(format!("GET_INFLIGHT_FD is answered with {reply:?}"));
    };
    let Some(fd) = fds.into_iter().next() else { return failed("there is no descriptor") };
    let least = (HEADER_BYTES + ENTRY_BYTES * u64::from(SIZE)) * u64::from(rings(bench));
    expect(description.mmap_size >= least, || {
        format!("{} bytes, {least} are needed for {} rings of {SIZE}", description.mmap_size, rings(bench))
    })?;
    let end = description.mmap_offset + description.mmap_size;
    let length = usize::try_from(end).map_err(|_| Miss::Fail(format!("{end} bytes of region")))?;
    let mapping = Mapping::new(&fd, 0, length.next_multiple_of(8))
        .map_err(|error| Miss::Fail(format!("it cannot be mapped: {error}")))?;
    Ok(Region { description, rings: rings(bench), fd, mapping })
}

impl Region {
    fn set(&self, bench: &Bench) -> Result<(), Miss> {
        // As QEMU does: place and size are the back-end's, the numbers of rings and entries the front-end's.
        let region = InflightDescription { num_queues: self.rings, queue_size: SIZE, ..self.description };
        bench.tell(&Request::SetInflightFd { region, fd: FdSlot(0) }, &[self.fd.as_fd()])
    }

    fn bytes(&self, at: u64, length: u64) -> Vec<u8> {
        let at = (self.description.mmap_offset + at) as usize;
        (at..at + length as usize).map(|at| self.mapping.u8(at).load(Ordering::Acquire)).collect()
    }

    /// What it says of the ring that requests go to.
    fn says(&self, ring: &Ring) -> Result<InflightRing, Miss> {
        let stride = self.description.mmap_size / u64::from(self.rings);
        let bytes = self.bytes(stride * u64::from(ring.index), stride);
        read_split(&bytes, SIZE, ring.used_idx())
            .map_err(|error| Miss::Fail(format!("the region cannot be read: {error}")))
    }
}

fn region(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready_with(choice())?;
    let region = get_region(&bench)?;
    let InflightDescription { num_queues, queue_size, mmap_size, .. } = region.description;
    let as_asked = |said: u16, asked: u16| said == asked || said == 0;
    expect(as_asked(num_queues, rings(&bench)) && as_asked(queue_size, SIZE), || {
        format!("{} rings of {SIZE} were asked for, it is for {num_queues} of {queue_size}", rings(&bench))
    })?;
    // Some give it a version at once. What matters is that nothing is marked.
    let zero = region.bytes(0, mmap_size).iter().all(|byte| *byte == 0);
    if !zero {
        let marked = region.says(&bench.ring(0)?)?.heads;
        expect(marked.is_empty(), || format!("a new region marks {marked:?}"))?;
    }
    region.set(&bench)?;
    bench.settle()?;
    let said = if num_queues == 0 || queue_size == 0 { ", which it does not say" } else { "" };
    let version = if zero { "" } else { ", not all zero" };
    Ok(format!("{mmap_size} bytes for {} rings of {SIZE}{said}{version}", rings(&bench)))
}

/// A ring with a region and slow requests in flight.
fn loaded(stage: &mut Stage<'_>) -> Result<(Bench, Ring, Jobs, Region), Miss> {
    let mut bench = stage.ready_with(choice())?;
    let region = get_region(&bench)?;
    region.set(&bench)?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..2)?;
    stage.subject.slow(SLOW);
    bench.offer(&mut ring, &jobs, 2..2 + HELD);
    ring.kick.signal();
    std::thread::sleep(SLOW / 4);
    Ok((bench, ring, jobs, region))
}

fn marks(stage: &mut Stage<'_>) -> Checked {
    let (bench, ring, jobs, region) = loaded(stage)?;
    let marked = region.says(&ring)?.heads;
    // Who takes one request at a time has one in flight.
    let offered: Vec<u16> = (2..2 + HELD).map(Jobs::head).collect();
    expect(!marked.is_empty() && offered.starts_with(&marked), || {
        format!("heads {offered:?} are in flight, in this order; {marked:?} are marked")
    })?;
    stage.subject.slow(Duration::ZERO);
    bench.served(&ring, &jobs, 2, &(2..2 + HELD).collect::<Vec<_>>())?;
    bench.stop(&ring)?;
    let after = region.says(&ring)?;
    expect(after.heads.is_empty(), || format!("all is done, {:?} are marked", after.heads))?;
    expect(after.used_idx == ring.used_idx(), || {
        format!("used_idx is {}, used.idx {}", after.used_idx, ring.used_idx())
    })?;
    Ok(format!("{} of {HELD} at once", marked.len()))
}

fn resubmit(stage: &mut Stage<'_>) -> Checked {
    let (bench, ring, jobs, region) = loaded(stage)?;
    let base = ring.used_idx();
    let second = succeed(stage, bench, choice())?;
    let done = ring.used_idx() - 2;
    region.set(&second)?;
    second.start(&ring, ring.used_idx())?;
    ring.kick.signal();
    let left: Vec<u16> = (2 + done..2 + HELD).collect();
    second.served(&ring, &jobs, 2 + done, &left)?;
    no_more(&second, &ring)?;
    let after = region.says(&ring)?;
    expect(after.heads.is_empty(), || format!("all is done, {:?} are marked", after.heads))?;
    Ok(format!("{} were owed, used.idx was {base}", left.len()))
}

fn unordered(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready_with(choice())?;
    let region = get_region(&bench)?;
    region.set(&bench)?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    stage.subject.slow(SLOW * 4);
    bench.offer(&mut ring, &jobs, 0..2);
    ring.kick.signal();
    std::thread::sleep(SLOW / 4);
    // The first two are on their slow way; these pass them.
    stage.subject.slow(Duration::ZERO);
    bench.offer(&mut ring, &jobs, 2..6);
    ring.kick.signal();
    if !ring.reaches(4, SLOW) {
        return lacks("it does not complete requests out of order");
    }
    let second = succeed(stage, bench, choice())?;
    expect(ring.used_idx() == 4, || format!("the first process was killed too late ({})", ring.words()))?;
    region.set(&second)?;
    second.start(&ring, 4)?;
    ring.kick.signal();
    second.served(&ring, &jobs, 4, &[0, 1])?;
    no_more(&second, &ring)?;
    second.serve(&mut ring, &jobs, 6..9)?;
    passed()
}

fn fresh(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready_with(choice())?;
    let region = get_region(&bench)?;
    region.set(&bench)?;
    let (mut ring, jobs) = (bench.ring(500)?, bench.jobs()?);
    bench.start(&ring, 500)?;
    bench.serve(&mut ring, &jobs, 0..5)?;
    let base = bench.stop(&ring)?;
    expect(base == 505, || format!("the base is {base}, 505 are done"))?;
    let second = succeed(stage, bench, choice())?;
    get_region(&second)?.set(&second)?;
    second.start(&ring, base)?;
    second.serve(&mut ring, &jobs, 5..9)?;
    no_more(&second, &ring)?;
    passed()
}
