//! How a ring is stopped: the base, and whether what was taken from the ring is over.

use std::time::{Duration, Instant};

use warmswap_wire::{Request, VringState};

use super::{Check, For, TAKEOVER};
use crate::conform::job::Jobs;
use crate::conform::link::Heard;
use crate::conform::outcome::{Checked, Miss, expect, failed, lacks, passed};
use crate::conform::ring::Ring;
use crate::conform::stage::{Bench, QUIET, Stage};
use crate::guest::EventFd;

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "base",
        name: "GET_VRING_BASE names the ring and the next available index",
        clause: "GET_VRING_BASE: a vring state description with the next available index",
        devices: For::Requests,
        run: base,
    },
    Check {
        id: "base-unstarted",
        name: "GET_VRING_BASE of a ring that was never started is answered with what was set",
        clause: TAKEOVER,
        devices: For::Any,
        run: base_unstarted,
    },
    Check {
        id: "stopped-quiet",
        name: "a ring that was stopped is not served",
        clause: "Ring states: while a ring is stopped, the back-end must not process the ring at all",
        devices: For::Requests,
        run: stopped_quiet,
    },
    Check {
        id: STOP,
        name: "GET_VRING_BASE is answered when everything that was taken is completed",
        clause: "Suspended device state: the device must not write to any guest memory regions; needed for takeover: used.idx equals the base",
        devices: For::Slow,
        run: stop_drains,
    },
    Check {
        id: "stop-stalled",
        name: "a stop is not claimed while a request is stuck for ten seconds",
        clause: "Suspended device state: the device must not write to any guest memory regions; needed for takeover: used.idx equals the base",
        devices: For::Slow,
        run: stop_stalled,
    },
    Check {
        id: PRIVATE_KICK,
        name: "with another kick descriptor the ring comes to rest, and the stop holds",
        clause: TAKEOVER,
        devices: For::Slow,
        run: private_kick_drains,
    },
    Check {
        id: DISABLE,
        name: "disabled, the ring comes to rest, and the stop holds",
        clause: "Ring states: started and disabled: without causing any side effects",
        devices: For::Slow,
        run: disable_drains,
    },
    Check {
        id: "answers-loaded",
        name: "the control channel answers within a second while requests are in flight",
        clause: TAKEOVER,
        devices: For::Slow,
        run: answers_loaded,
    },
    Check {
        id: "restart",
        name: "a ring that was stopped goes on from its base",
        clause: "SET_VRING_BASE: sets the next index to use for descriptors in this vring",
        devices: For::Requests,
        run: restart,
    },
    Check {
        id: "restart-new",
        name: "a ring that the guest has set up anew begins at 0",
        clause: "SET_VRING_BASE: sets the next index to use for descriptors in this vring",
        devices: For::Requests,
        run: restart_new,
    },
    Check {
        id: "wrap",
        name: "the indices wrap at 65536",
        clause: "Virtio 1.3 §2.7.6: idx starts at 0, and increases; the ring is indexed modulo its size",
        devices: For::Requests,
        run: wrap,
    },
];

/// The checks whose results say how a back-end is drained.
pub(in crate::conform) const STOP: &str = "stop-drains";
pub(in crate::conform) const PRIVATE_KICK: &str = "private-kick-drains";
pub(in crate::conform) const DISABLE: &str = "disable-drains";

/// So much longer a slow request takes.
const SLOW: Duration = Duration::from_millis(150);
/// Slow requests in flight.
const HELD: u16 = 6;
/// Offered when new work is kept away already.
const LATER: u16 = 3;
/// A ring at rest has stood still so long, and comes to rest within that.
const REST: Duration = Duration::from_millis(500);
const REST_MAX: Duration = Duration::from_secs(5);

fn set_up(stage: &mut Stage<'_>, start: u16) -> Result<(Bench, Ring, Jobs), Miss> {
    let mut bench = stage.ready()?;
    let (ring, jobs) = (bench.ring(start)?, bench.jobs()?);
    bench.start(&ring, start)?;
    Ok((bench, ring, jobs))
}

fn base(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, 0)?;
    bench.serve(&mut ring, &jobs, 0..7)?;
    let base = bench.stop(&ring)?;
    expect(base == 7, || format!("after 7 requests the base is {base}"))?;
    passed()
}

fn base_unstarted(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    let ring = bench.ring(0)?;
    bench.describe(&ring, 12)?;
    let base = bench.stop(&ring)?;
    expect(base == 12, || format!("12 was set, the base is {base}"))?;
    passed()
}

fn stopped_quiet(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, 0)?;
    bench.serve(&mut ring, &jobs, 0..2)?;
    bench.stop(&ring)?;
    ring.call.take();
    bench.offer(&mut ring, &jobs, 2..4);
    ring.kick.signal();
    let moved = ring.moves(QUIET);
    expect(!moved && !jobs.is_touched(2) && !jobs.is_touched(3), || format!("it is served ({})", ring.words()))?;
    expect(!ring.call.take(), || "the guest is called".to_owned())?;
    bench.settle()?;
    passed()
}

/// A ring with slow requests in flight. Not applicable if they are done at once.
fn loaded(stage: &mut Stage<'_>) -> Result<(Bench, Ring, Jobs), Miss> {
    let (bench, mut ring, jobs) = set_up(stage, 0)?;
    bench.serve(&mut ring, &jobs, 0..1)?;
    stage.subject.slow(SLOW);
    bench.offer(&mut ring, &jobs, 1..=HELD);
    ring.kick.signal();
    std::thread::sleep(SLOW / 4);
    let done = ring.used_idx().wrapping_sub(1);
    if done >= HELD {
        return lacks("no request is held back by a slow image");
    }
    Ok((bench, ring, jobs))
}

/// Requires of a ring that was just stopped that its base is `used.idx`, and that nothing is written any more.
fn holds(ring: &Ring, jobs: &Jobs, base: u16) -> Result<(), Miss> {
    let used = ring.used_idx();
    let (written, completed) = (jobs.contents(), ring.used_ring());
    std::thread::sleep(SLOW * 3);
    let late_ring = ring.used_ring() != completed;
    let late_data = jobs.contents() != written;
    expect(base == used && !late_ring && !late_data, || {
        let mut why = format!("the base is {base}, used.idx was {used} then and is {} later", ring.used_idx());
        if late_data {
            why.push_str("; guest memory was written after the answer");
        }
        why
    })
}

/// Starts the ring again at `base` and requires that everything that was offered and not completed is done.
fn goes_on(bench: &Bench, ring: &Ring, jobs: &Jobs, base: u16) -> Result<(), Miss> {
    let left: Vec<u16> = (base..ring.avail_idx()).collect();
    bench.start(ring, base)?;
    ring.kick.signal();
    bench.served(ring, jobs, base, &left)
}

fn stop_drains(stage: &mut Stage<'_>) -> Checked {
    let (bench, ring, jobs) = loaded(stage)?;
    let base = bench.stop(&ring)?;
    holds(&ring, &jobs, base)?;
    stage.subject.slow(Duration::ZERO);
    goes_on(&bench, &ring, &jobs, base)?;
    Ok(format!("{} of {HELD} were completed before", base.wrapping_sub(1)))
}

/// Some wait for a few seconds and then claim what is not so.
fn stop_stalled(stage: &mut Stage<'_>) -> Checked {
    const STUCK: Duration = Duration::from_secs(10);
    let (bench, mut ring, jobs) = set_up(stage, 0)?;
    bench.serve(&mut ring, &jobs, 0..1)?;
    stage.subject.slow(STUCK);
    bench.offer(&mut ring, &jobs, 1..2);
    ring.kick.signal();
    std::thread::sleep(SLOW);
    stage.subject.slow(Duration::ZERO);
    if ring.used_idx() != 1 {
        return lacks("no request is held back by a slow image");
    }
    let request = Request::GetVringBase(VringState { index: ring.index, value: 0 });
    bench.link.send(&request, &[], false)?;
    let began = Instant::now();
    match bench.link.hear_within(STUCK * 2)? {
        Heard::Message { payload, .. } => {
            let (after, used) = (began.elapsed().as_secs_f64(), ring.used_idx());
            let base = payload.get(4..6).map_or(0, |it| u16::from_ne_bytes([it[0], it[1]]));
            let done = used == 2;
            // What is not completed by then must never be: whoever serves the ring next does it.
            let late = !done && ring.reaches(2, STUCK);
            expect(base == used && !late, || {
                let end = if done || late { "it is completed later" } else { "it is never completed" };
                format!("after {after:.1} s the base is {base}, used.idx {used} with a request in flight; {end}")
            })?;
            let how = if done { "" } else { ", and the request given back" };
            Ok(format!("it is answered after {after:.1} s{how}"))
        }
        Heard::Closed => Err(Miss::Closed("instead of an answer to GET_VRING_BASE".to_owned())),
        Heard::Silence => Err(Miss::Timeout("GET_VRING_BASE is not answered when the request is done".to_owned())),
    }
}

/// Lets a ring that gets no new work come to rest, stops it and starts it again.
fn drains(
    stage: &mut Stage<'_>,
    bench: &Bench,
    mut ring: Ring,
    jobs: &Jobs,
    guest: &EventFd,
    otherwise: fn(String) -> Checked,
) -> Checked {
    bench.offer(&mut ring, jobs, HELD + 1..=HELD + LATER);
    guest.signal();
    if !ring.rests(REST, REST_MAX) {
        return failed(format!("it does not come to rest within {REST_MAX:?} ({})", ring.words()));
    }
    let done = ring.used_idx().wrapping_sub(1);
    if done > HELD {
        return otherwise(format!("new work is not kept away: {} later requests were served", done - HELD));
    }
    let base = bench.stop(&ring)?;
    holds(&ring, jobs, base)?;
    stage.subject.slow(Duration::ZERO);
    bench.enable(&ring, true)?;
    goes_on(bench, &ring, jobs, base)?;
    Ok(format!("{done} of {HELD} were completed before"))
}

fn private_kick_drains(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = loaded(stage)?;
    let guest = std::mem::replace(&mut ring.kick, EventFd::new()?);
    bench.set_kick(&ring)?;
    bench.settle()?;
    // Whoever polls need not listen to kicks at all. This is one way of three.
    drains(stage, &bench, ring, &jobs, &guest, lacks)
}

fn disable_drains(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = loaded(stage)?;
    bench.enable(&ring, false)?;
    bench.settle()?;
    let guest = std::mem::replace(&mut ring.kick, EventFd::new()?);
    drains(stage, &bench, ring, &jobs, &guest, failed)
}

fn answers_loaded(stage: &mut Stage<'_>) -> Checked {
    let (bench, ring, _) = loaded(stage)?;
    let began = Instant::now();
    bench.settle()?;
    let took = began.elapsed();
    let left = HELD - ring.used_idx().wrapping_sub(1).min(HELD);
    expect(took < Duration::from_secs(1), || format!("it answers after {} ms", took.as_millis()))?;
    Ok(format!("after {:.1} ms, {left} in flight", took.as_secs_f64() * 1e3))
}

fn restart(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, 0)?;
    for _ in 0..3 {
        bench.serve(&mut ring, &jobs, 0..5)?;
        let base = bench.stop(&ring)?;
        expect(base == ring.used_idx(), || format!("the base is {base} ({})", ring.words()))?;
        bench.start(&ring, base)?;
    }
    bench.serve(&mut ring, &jobs, 0..5)?;
    passed()
}

fn restart_new(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, 0)?;
    bench.serve(&mut ring, &jobs, 0..5)?;
    bench.stop(&ring)?;
    ring.reset(0);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 5..9)?;
    passed()
}

fn wrap(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, 65533)?;
    bench.serve(&mut ring, &jobs, 0..8)?;
    let base = bench.stop(&ring)?;
    expect(base == 5, || format!("8 requests after 65533 the base is {base}"))?;
    bench.start(&ring, base)?;
    bench.serve(&mut ring, &jobs, 8..10)?;
    passed()
}
