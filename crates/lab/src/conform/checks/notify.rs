//! Kicks that are wanted and calls that are made, also after a device that was here before.

use std::time::Duration;

use warmswap_wire::ring::USED_F_NO_NOTIFY;
use warmswap_wire::{ProtocolFeatures, VirtioFeatures};

use super::{Check, For, TAKEOVER};
use crate::conform::job::Jobs;
use crate::conform::outcome::{Checked, Miss, expect, passed};
use crate::conform::ring::Ring;
use crate::conform::stage::{Bench, Choice, QUIET, SERVED, Stage};

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "call",
        name: "every completion calls a driver that wants it",
        clause: "Virtio 1.3 §2.7.7.2, without EVENT_IDX: if flags is 0, the device MUST send a notification",
        devices: For::Requests,
        run: call,
    },
    Check {
        id: "call-suppressed",
        name: "a driver that does not want calls gets none",
        clause: "Virtio 1.3 §2.7.7.2, without EVENT_IDX: if flags is 1, the device SHOULD NOT send a notification",
        devices: For::Requests,
        run: call_suppressed,
    },
    Check {
        id: "event-call",
        name: "with EVENT_IDX the completion that is asked for calls, also across the wrap",
        clause: "Virtio 1.3 §2.7.7.2: if idx was equal to used_event, the device MUST send a notification",
        devices: For::Requests,
        run: event_call,
    },
    Check {
        id: "event-suppressed",
        name: "with EVENT_IDX other completions do not call",
        clause: "Virtio 1.3 §2.7.7.2: otherwise the device SHOULD NOT send a notification",
        devices: For::Requests,
        run: event_suppressed,
    },
    Check {
        id: "kick-wanted",
        name: "a driver that kicks only when it is asked to is served",
        clause: "Virtio 1.3 §2.7.10.2: the device MUST NOT rely on notifications being suppressed, and asks for those it needs",
        devices: For::Requests,
        run: |stage| kick_wanted(stage, VirtioFeatures::empty(), |_| {}),
    },
    Check {
        id: "event-kick-wanted",
        name: "the same with EVENT_IDX",
        clause: "Virtio 1.3 §2.7.10.2: avail_event says when the device needs a notification",
        devices: For::Requests,
        run: |stage| kick_wanted(stage, VirtioFeatures::EVENT_IDX, |_| {}),
    },
    Check {
        id: "stale-flag",
        name: "NO_NOTIFY that a predecessor left in used.flags is cleared",
        clause: TAKEOVER,
        devices: For::Requests,
        run: |stage| kick_wanted(stage, VirtioFeatures::empty(), |ring| ring.set_used_flags(USED_F_NO_NOTIFY)),
    },
    Check {
        id: "stale-event",
        name: "an avail_event that a predecessor left is written anew",
        clause: TAKEOVER,
        devices: For::Requests,
        run: |stage| {
            kick_wanted(stage, VirtioFeatures::EVENT_IDX, |ring| ring.set_avail_event(ring.avail_idx() + 0x7fff))
        },
    },
    Check {
        id: "event-call-takeover",
        name: "with EVENT_IDX the first completion after a start in the middle calls",
        clause: TAKEOVER,
        devices: For::Requests,
        run: event_call_takeover,
    },
];

/// A ring that runs, with these features besides the usual ones.
fn set_up(stage: &mut Stage<'_>, features: VirtioFeatures, start: u16) -> Result<(Bench, Ring, Jobs), Miss> {
    let mut bench = stage.ready_with(Choice::and(features, ProtocolFeatures::empty()))?;
    bench.needs_virtio(features)?;
    let (ring, jobs) = (bench.ring(start)?, bench.jobs()?);
    bench.start(&ring, start)?;
    // Some call once when they start.
    std::thread::sleep(Duration::from_millis(20));
    ring.call.take();
    Ok((bench, ring, jobs))
}

fn call(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, VirtioFeatures::empty(), 0)?;
    for round in 0..20 {
        bench.serve(&mut ring, &jobs, 0..1)?;
        expect(ring.is_called(SERVED)?, || format!("completion {round} is not called"))?;
    }
    passed()
}

fn call_suppressed(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, VirtioFeatures::empty(), 0)?;
    ring.want_calls(false);
    for _ in 0..20 {
        bench.serve(&mut ring, &jobs, 0..1)?;
    }
    expect(!ring.is_called(QUIET)?, || "it is called all the same".to_owned())?;
    ring.want_calls(true);
    bench.serve(&mut ring, &jobs, 0..1)?;
    expect(ring.is_called(SERVED)?, || "it is not called when it wants it again".to_owned())?;
    passed()
}

fn event_call(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, VirtioFeatures::EVENT_IDX, 65530)?;
    for _ in 0..6 {
        // In the middle of the batch, of which the third crosses the wrap.
        ring.set_used_event(ring.used_idx().wrapping_add(2));
        bench.serve(&mut ring, &jobs, 0..4)?;
        expect(ring.is_called(SERVED)?, || format!("it is not called when used_event is passed ({})", ring.words()))?;
    }
    passed()
}

fn event_suppressed(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, VirtioFeatures::EVENT_IDX, 0)?;
    bench.serve(&mut ring, &jobs, 0..1)?;
    ring.is_called(SERVED)?;
    ring.set_used_event(ring.used_idx().wrapping_sub(0x8000));
    for _ in 0..20 {
        bench.serve(&mut ring, &jobs, 0..1)?;
    }
    expect(!ring.is_called(QUIET)?, || "it is called all the same".to_owned())?;
    passed()
}

/// A driver that kicks as Linux' does, one request at a time, on a ring as a predecessor has left it. Whoever starts a ring kicks it
/// once.
fn kick_wanted(stage: &mut Stage<'_>, features: VirtioFeatures, leave: fn(&Ring)) -> Checked {
    const START: u16 = 5;
    let mut bench = stage.ready_with(Choice::and(features, ProtocolFeatures::empty()))?;
    bench.needs_virtio(features)?;
    let (mut ring, jobs) = (bench.ring(START)?, bench.jobs()?);
    leave(&ring);
    bench.start(&ring, START)?;
    ring.kick.signal();
    std::thread::sleep(Duration::from_millis(50));
    let event_idx = features.contains(VirtioFeatures::EVENT_IDX);
    let mut kicks = 0;
    for round in 0..50 {
        let (old, from) = (ring.avail_idx(), ring.used_idx());
        bench.offer(&mut ring, &jobs, 0..1);
        if ring.wants_kick(event_idx, old) {
            ring.kick.signal();
            kicks += 1;
        }
        bench.served(&ring, &jobs, from, &[0]).map_err(|miss| match miss {
            Miss::Fail(why) => Miss::Fail(format!("request {round}, after {kicks} kicks: {why}")),
            other => other,
        })?;
    }
    Ok(format!("{kicks} kicks for 50 requests"))
}

fn event_call_takeover(stage: &mut Stage<'_>) -> Checked {
    for start in [105, 40_000] {
        let mut bench = stage.ready_with(Choice::and(VirtioFeatures::EVENT_IDX, ProtocolFeatures::empty()))?;
        bench.needs_virtio(VirtioFeatures::EVENT_IDX)?;
        let (mut ring, jobs) = (bench.ring(start)?, bench.jobs()?);
        bench.start(&ring, start)?;
        std::thread::sleep(Duration::from_millis(20));
        ring.call.take();
        ring.set_used_event(start);
        bench.serve(&mut ring, &jobs, 0..1)?;
        expect(ring.is_called(SERVED)?, || format!("started at {start}, its first completion is not called"))?;
        // Some let nobody else have their image.
        bench.process.borrow_mut().kill()?;
    }
    passed()
}
