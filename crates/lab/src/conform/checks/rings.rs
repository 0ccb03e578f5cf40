//! When a ring is served, and when it is not.

use std::os::fd::AsFd as _;
use std::time::Duration;

use warmswap_wire::{FdSlot, ProtocolFeatures, Request, VringFd};

use super::{Check, For, TAKEOVER};
use crate::conform::job::Jobs;
use crate::conform::outcome::{Checked, Miss, expect, failed, lacks, passed};
use crate::conform::ring::Ring;
use crate::conform::stage::{Bench, Choice, QUIET, SIZE, Stage};
use crate::guest::EventFd;

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "serves",
        name: "a ring that is started and enabled is served, each request once",
        clause: "Ring states: started and enabled: the back-end must process the ring normally",
        devices: For::Requests,
        run: serves,
    },
    Check {
        id: "no-kick",
        name: "a ring is not served before SET_VRING_KICK",
        clause: "Ring states: while a ring is stopped, the back-end must not process the ring at all",
        devices: For::Requests,
        run: no_kick,
    },
    Check {
        id: "disabled",
        name: "a ring that was never enabled does nothing",
        clause: "Ring states: started and disabled: the back-end must process the ring without causing any side effects",
        devices: For::Requests,
        run: disabled,
    },
    Check {
        id: "kick-before-enable",
        name: "a kick that came before the ring was enabled is not lost",
        clause: TAKEOVER,
        devices: For::Requests,
        run: kick_before_enable,
    },
    Check {
        id: "kick-waiting",
        name: "a kick that waits in the descriptor when it is passed is not lost",
        clause: "Ring states: a ring is started upon detecting that the file descriptor is readable",
        devices: For::Requests,
        run: kick_waiting,
    },
    Check {
        id: "enable-by-features",
        name: "without PROTOCOL_FEATURES in SET_FEATURES rings are enabled",
        clause: "Ring states: upon SET_FEATURES without F_PROTOCOL_FEATURES the back-end must enable all rings immediately",
        devices: For::Requests,
        run: enable_by_features,
    },
    Check {
        id: "disable-running",
        name: "a ring that is disabled takes nothing new, and goes on when it is enabled",
        clause: "Ring states: started and disabled: without causing any side effects",
        devices: For::Requests,
        run: disable_running,
    },
    Check {
        id: "kick-polled",
        name: "a ring without a kick descriptor is polled",
        clause: "SET_VRING_KICK: the invalid FD flag signals that polling should be used instead of waiting for the kick",
        devices: For::Requests,
        run: kick_polled,
    },
    Check {
        id: "call-none",
        name: "a ring without a call descriptor is served",
        clause: "SET_VRING_CALL: the invalid FD flag signals that polling will be used instead of waiting for the call",
        devices: For::Requests,
        run: call_none,
    },
    Check {
        id: "call-late",
        name: "a ring is started without a call descriptor, and one that comes later is used",
        clause: "Ring states: the back-end must start a ring upon receiving a kick",
        devices: For::Requests,
        run: call_late,
    },
    Check {
        id: "call-replaced",
        name: "a call descriptor is replaced on a running ring",
        clause: "Ring states: while processing the rings the back-end must support changing some configuration aspects on the fly",
        devices: For::Requests,
        run: call_replaced,
    },
    Check {
        id: "kick-replaced",
        name: "a kick descriptor is replaced on a running ring",
        clause: "Ring states: while processing the rings the back-end must support changing some configuration aspects on the fly",
        devices: For::Requests,
        run: kick_replaced,
    },
    Check {
        id: "sparse-rings",
        name: "the second ring alone is served",
        clause: "Multiple queue support: the front-end uses a unique index for each queue",
        devices: For::Blk,
        run: sparse_rings,
    },
];

fn set_up(stage: &mut Stage<'_>) -> Result<(Bench, Ring, Jobs), Miss> {
    let mut bench = stage.ready()?;
    let (ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    Ok((bench, ring, jobs))
}

/// Requires that nothing is done with the requests in these slots for a while, and that the control channel answers.
fn idle(bench: &Bench, ring: &Ring, jobs: &Jobs, slots: &[u16], state: &str) -> Result<(), Miss> {
    let moved = ring.moves(QUIET);
    let touched = slots.iter().any(|slot| jobs.is_touched(*slot));
    bench.settle()?;
    expect(!touched, || format!("a request of a ring that is {state} was executed: its buffer is written"))?;
    expect(!moved, || format!("used.idx of a ring that is {state} has moved ({})", ring.words()))
}

fn serves(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.start(&ring, 0)?;
    for _ in 0..8 {
        bench.serve(&mut ring, &jobs, 0..12)?;
    }
    passed()
}

fn no_kick(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.offer(&mut ring, &jobs, 0..2);
    ring.kick.signal();
    bench.describe(&ring, 0)?;
    bench.enable(&ring, true)?;
    idle(&bench, &ring, &jobs, &[0, 1], "stopped")?;
    bench.set_kick(&ring)?;
    bench.served(&ring, &jobs, 0, &[0, 1])?;
    passed()
}

fn disabled(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.describe(&ring, 0)?;
    bench.set_kick(&ring)?;
    bench.settle()?;
    bench.offer(&mut ring, &jobs, 0..2);
    ring.kick.signal();
    idle(&bench, &ring, &jobs, &[0, 1], "disabled")?;
    passed()
}

fn kick_before_enable(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.describe(&ring, 0)?;
    bench.set_kick(&ring)?;
    bench.settle()?;
    bench.offer(&mut ring, &jobs, 0..2);
    ring.kick.signal();
    // Time enough to take the kick away.
    std::thread::sleep(Duration::from_millis(50));
    bench.enable(&ring, true)?;
    bench.served(&ring, &jobs, 0, &[0, 1])?;
    passed()
}

fn kick_waiting(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.offer(&mut ring, &jobs, 0..2);
    ring.kick.signal();
    bench.start(&ring, 0)?;
    bench.served(&ring, &jobs, 0, &[0, 1])?;
    passed()
}

fn enable_by_features(stage: &mut Stage<'_>) -> Checked {
    let usual = Choice::default();
    let features = usual.features & !warmswap_wire::VirtioFeatures::PROTOCOL_FEATURES.bits();
    let mut bench = stage.ready_with(Choice { features, ..usual })?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    // There is no SET_VRING_ENABLE among these.
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..2)?;
    passed()
}

fn disable_running(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..2)?;
    bench.enable(&ring, false)?;
    bench.settle()?;
    let from = ring.used_idx();
    bench.offer(&mut ring, &jobs, 2..4);
    ring.kick.signal();
    idle(&bench, &ring, &jobs, &[2, 3], "disabled")?;
    bench.enable(&ring, true)?;
    bench.served(&ring, &jobs, from, &[2, 3])?;
    passed()
}

fn kick_polled(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.describe(&ring, 0)?;
    let request = Request::SetVringKick(VringFd { index: ring.index, fd: None });
    match bench.tell(&request, &[]) {
        Err(Miss::Fail(why)) => return failed(why),
        Err(Miss::Closed(_)) => return failed("the connection is closed"),
        other => other?,
    }
    bench.enable(&ring, true)?;
    bench.settle()?;
    bench.offer(&mut ring, &jobs, 0..2);
    bench.served(&ring, &jobs, 0, &[0, 1])?;
    passed()
}

fn call_none(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.tell(&Request::SetVringCall(VringFd { index: ring.index, fd: None }), &[])?;
    bench.describe_without_call(&ring, 0)?;
    bench.set_kick(&ring)?;
    bench.enable(&ring, true)?;
    bench.serve(&mut ring, &jobs, 0..2)?;
    bench.settle()?;
    passed()
}

fn call_late(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.describe_without_call(&ring, 0)?;
    bench.set_kick(&ring)?;
    bench.enable(&ring, true)?;
    bench.serve(&mut ring, &jobs, 0..1)?;
    bench.set_call(&ring)?;
    bench.settle()?;
    ring.call.take();
    bench.serve(&mut ring, &jobs, 1..2)?;
    expect(ring.is_called(QUIET)?, || "it is never written".to_owned())?;
    passed()
}

fn call_replaced(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..1)?;
    expect(ring.is_called(QUIET)?, || "the first completion is not called".to_owned())?;
    let old = std::mem::replace(&mut ring.call, EventFd::new()?);
    bench.set_call(&ring)?;
    bench.settle()?;
    old.take();
    bench.serve(&mut ring, &jobs, 1..2)?;
    expect(ring.is_called(QUIET)?, || "the new descriptor is not written".to_owned())?;
    expect(!old.take(), || "the old descriptor is still written".to_owned())?;
    passed()
}

fn kick_replaced(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage)?;
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..1)?;
    // The old one stays open, and is never written again.
    let _old = std::mem::replace(&mut ring.kick, EventFd::new()?);
    bench.set_kick(&ring)?;
    bench.settle()?;
    bench.serve(&mut ring, &jobs, 1..2)?;
    passed()
}

fn sparse_rings(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    bench.needs(ProtocolFeatures::MQ)?;
    let rings = bench.number(&Request::GetQueueNum)?;
    if rings < 2 {
        return lacks(format!("it has {rings} ring"));
    }
    let jobs = bench.jobs()?;
    let mut ring = Ring::new(&mut bench.memory, 1, SIZE, 0)?;
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    let request = Request::SetVringErr(VringFd { index: 1, fd: Some(FdSlot(0)) });
    bench.tell(&request, &[ring.err.as_fd()])?;
    expect(bench.stop(&ring)? == 4, || "its base is not 4".to_owned())?;
    passed()
}
