//! Rings that no driver should write: the guest harms itself at most. The back-end lives, its connection stays, the ring can be
//! stopped, and when the guest has set it up anew it is served.

use std::time::Duration;

use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor};
use warmswap_wire::{ProtocolFeatures, VirtioFeatures, VringFd};

use super::{Check, For};
use crate::conform::job::{CHAIN, Jobs, header};
use crate::conform::outcome::{Checked, Miss};
use crate::conform::ring::{Ring, write_descriptor};
use crate::conform::stage::{Bench, Choice, SIZE, Stage};
use crate::guest::GuestMemory;

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "guest-head",
        name: "an available head beyond the ring",
        clause: RING,
        devices: For::Requests,
        run: |stage| play(stage, head),
    },
    Check {
        id: "guest-next",
        name: "a chain that goes on beyond the table",
        clause: CHAIN_CLAUSE,
        devices: For::Requests,
        run: |stage| play(stage, next),
    },
    Check {
        id: "guest-loop",
        name: "a chain that runs in a circle",
        clause: CHAIN_CLAUSE,
        devices: For::Requests,
        run: |stage| play(stage, circle),
    },
    Check {
        id: "guest-outside",
        name: "a buffer outside guest memory",
        clause: MEMORY,
        devices: For::Requests,
        run: |stage| play(stage, outside),
    },
    Check {
        id: "guest-wrap",
        name: "a buffer that wraps around the address space",
        clause: MEMORY,
        devices: For::Requests,
        run: |stage| play(stage, wrap),
    },
    Check {
        id: "guest-ahead",
        name: "an available index that is further ahead than the ring has entries",
        clause: RING,
        devices: For::Requests,
        run: |stage| play(stage, ahead),
    },
    Check {
        id: "guest-indirect",
        name: "indirect tables of 4 GiB, of half an entry, and within each other",
        clause: INDIRECT,
        devices: For::Requests,
        run: |stage| play_all(stage, &[indirect_huge, indirect_odd, indirect_nested]),
    },
    Check {
        id: "guest-empty",
        name: "a chain of buffers of no length",
        clause: MEMORY,
        devices: For::Requests,
        run: |stage| play(stage, empty),
    },
    Check {
        id: "guest-unwritable",
        name: "requests without room for their answer",
        clause: "Virtio 1.3 §2.7.5: the device MUST NOT write to a device-readable buffer",
        devices: For::Blk,
        run: |stage| play_all(stage, &[unwritable, headless]),
    },
];

const RING: &str = "Virtio 1.3 §2.7.13: heads and indices; the guest is not trusted (needed for takeover)";
const CHAIN_CLAUSE: &str = "Virtio 1.3 §2.7.5.2: drivers MUST NOT have loops in the descriptor chain; the guest is not trusted (needed for takeover)";
const MEMORY: &str = "Memory access: guest addresses map to the memory region containing them; the guest is not trusted (needed for takeover)";
const INDIRECT: &str =
    "Virtio 1.3 §2.7.5.3: the device MUST handle indirect chains; the guest is not trusted (needed for takeover)";

/// Writes something hostile into a ring and offers it.
type Deed = fn(&Bench, &mut Ring, &Jobs);

/// How long a hostile request is given to do its harm.
const HARM: Duration = Duration::from_millis(150);

fn play(stage: &mut Stage<'_>, deed: Deed) -> Checked {
    let mut bench = stage.ready_with(Choice::and(VirtioFeatures::INDIRECT_DESC, ProtocolFeatures::empty()))?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    let fd = Some(warmswap_wire::FdSlot(0));
    bench.tell(&warmswap_wire::Request::SetVringErr(VringFd { index: ring.index, fd }), &ring.fds()[2..])?;
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..2)?;
    deed(&bench, &mut ring, &jobs);
    let from = ring.used_idx();
    ring.kick.signal();
    std::thread::sleep(HARM);
    let guest = |miss| match miss {
        Miss::Closed(when) => Miss::Closed(format!("{when}: a guest can end it")),
        Miss::Timeout(what) => Miss::Timeout(format!("{what}: a guest can hang it")),
        other => other,
    };
    bench.settle().map_err(guest)?;
    let what = match (ring.err.take(), ring.used_idx() != from) {
        (true, _) => "the guest's error descriptor is written",
        (false, true) => "it is completed",
        (false, false) => "it is left alone",
    };
    bench.stop(&ring).map_err(guest)?;
    ring.reset(0);
    ring.kick.take();
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 2..4).map_err(|miss| match miss {
        Miss::Fail(why) => Miss::Fail(format!("the ring, set up anew, is not served: {why}")),
        other => other,
    })?;
    // Some let nobody else have their image.
    bench.process.borrow_mut().kill()?;
    Ok(what.to_owned())
}

fn play_all(stage: &mut Stage<'_>, deeds: &[Deed]) -> Checked {
    let found = deeds.iter().map(|deed| play(stage, *deed)).collect::<Result<Vec<_>, _>>()?;
    Ok(if found.iter().all(|it| *it == found[0]) { found[0].clone() } else { found.join("; ") })
}

/// The chain of a good request, in the slot of that number, to be spoilt.
fn good(ring: &Ring, jobs: &Jobs, slot: u16) -> Vec<Descriptor> {
    let chain = jobs.chain(slot);
    ring.lay(Jobs::head(slot), &chain);
    chain
}

fn head(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    good(ring, jobs, 2);
    ring.offer(SIZE + 7);
}

fn next(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    let first = good(ring, jobs, 2)[0];
    ring.describe(Jobs::head(2), Descriptor { flags: first.flags | DESC_F_NEXT, next: 60_000, ..first });
    ring.offer(Jobs::head(2));
}

fn circle(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    let chain = good(ring, jobs, 2);
    let last = chain.len() as u16 - 1;
    let descriptor = chain[usize::from(last)];
    let flags = descriptor.flags | DESC_F_NEXT;
    ring.describe(Jobs::head(2) + last, Descriptor { flags, next: Jobs::head(2), ..descriptor });
    ring.offer(Jobs::head(2));
}

/// The largest buffer of a good request, at another place.
fn elsewhere(ring: &mut Ring, jobs: &Jobs, addr: u64) {
    let chain = good(ring, jobs, 2);
    let at = (0..chain.len()).max_by_key(|at| chain[*at].len).unwrap_or(0);
    let mut spoilt = chain;
    spoilt[at].addr = addr;
    ring.lay(Jobs::head(2), &spoilt);
    ring.offer(Jobs::head(2));
}

fn outside(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    elsewhere(ring, jobs, GuestMemory::unmapped_address());
}

fn wrap(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    elsewhere(ring, jobs, u64::MAX - 15);
}

fn ahead(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    good(ring, jobs, 2);
    ring.publish(ring.avail_idx().wrapping_add(SIZE * 10));
}

/// An indirect descriptor of that length, whose table holds a good chain.
fn indirect(ring: &mut Ring, jobs: &Jobs, length: u32, extra: u16) {
    let chain = jobs.chain(2);
    let table = jobs.window(3);
    for (at, descriptor) in chain.iter().enumerate() {
        let more = at + 1 < chain.len();
        let flags = descriptor.flags | extra | if more { DESC_F_NEXT } else { 0 };
        write_descriptor(&table, at * 16, Descriptor { flags, next: at as u16 + u16::from(more), ..*descriptor });
    }
    let head = Jobs::head(2);
    ring.describe(head, Descriptor { addr: table.guest, len: length, flags: DESC_F_INDIRECT, next: 0 });
    ring.offer(head);
}

fn indirect_huge(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    indirect(ring, jobs, 0xffff_fff0, 0);
}

fn indirect_odd(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    indirect(ring, jobs, 24, 0);
}

fn indirect_nested(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    indirect(ring, jobs, u32::from(CHAIN) * 16, DESC_F_INDIRECT);
}

fn empty(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    let mut chain = good(ring, jobs, 2);
    chain.iter_mut().for_each(|descriptor| descriptor.len = 0);
    ring.lay(Jobs::head(2), &chain);
    ring.offer(Jobs::head(2));
}

fn unwritable(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    let mut chain = good(ring, jobs, 2);
    chain.iter_mut().for_each(|descriptor| descriptor.flags &= !DESC_F_WRITE);
    ring.lay(Jobs::head(2), &chain);
    ring.offer(Jobs::head(2));
}

/// A header of eight bytes and nothing else.
fn headless(_: &Bench, ring: &mut Ring, jobs: &Jobs) {
    let chain = good(ring, jobs, 2);
    let window = jobs.window(2);
    window.mapping.write(window.start, &header(0, 0));
    ring.lay(Jobs::head(2), &[Descriptor { len: 8, ..chain[0] }]);
    ring.offer(Jobs::head(2));
}
