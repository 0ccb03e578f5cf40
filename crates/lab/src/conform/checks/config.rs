//! Configuration space, status, resets.

use warmswap_wire::{ConfigSpace, ProtocolFeatures, Reply, Request, VirtioFeatures};

use super::{Check, For};
use crate::conform::job::Jobs;
use crate::conform::outcome::{Checked, Miss, expect, failed, lacks, passed};
use crate::conform::raw;
use crate::conform::ring::Ring;
use crate::conform::stage::{Bench, Choice, QUIET, Stage};

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "config-size",
        name: "GET_CONFIG is answered with as many bytes as were asked for",
        clause: "GET_CONFIG: the back-end's payload size MUST match the front-end's request",
        devices: For::Any,
        run: size,
    },
    Check {
        id: "config-part",
        name: "a part of the configuration space is that part of the whole",
        clause: "Virtio device config space: offset: a 32-bit offset of virtio device's configuration space",
        devices: For::Blk,
        run: part,
    },
    Check {
        id: "config-beyond",
        name: "GET_CONFIG beyond the end is an error without a payload, or has the size that was asked for",
        clause: "GET_CONFIG: back-end uses zero length of payload to indicate an error",
        devices: For::Any,
        run: beyond,
    },
    Check {
        id: "config-write",
        name: "SET_CONFIG switches the write cache",
        clause: "SET_CONFIG: submitted when the guest changes the virtio device configuration space",
        devices: For::Blk,
        run: write,
    },
    Check {
        id: "config-read-only",
        name: "SET_CONFIG does not change what the guest may only read",
        clause: "SET_CONFIG: back-ends MUST NOT accept SET_CONFIG for read-only fields unless the live migration bit is set",
        devices: For::Blk,
        run: read_only,
    },
    Check {
        id: "status",
        name: "the status that was set is read",
        clause: "SET_STATUS, GET_STATUS: device status as defined in the Virtio specification",
        devices: For::Any,
        run: status,
    },
    Check {
        id: "reset-device",
        name: "RESET_DEVICE stops all rings, and the device can be set up anew",
        clause: "RESET_DEVICE: disable all rings and reset all internal device state to the initial state, ready to be reinitialized",
        devices: For::Requests,
        run: reset_device,
    },
    Check {
        id: "reset-owner",
        name: "RESET_OWNER is ignored, or disables the rings",
        clause: "RESET_OWNER: it is recommended that back-ends either ignore this message, or use it to disable all rings",
        devices: For::Requests,
        run: reset_owner,
    },
];

/// VIRTIO_BLK_F_CONFIG_WCE and where it is switched.
const F_CONFIG_WCE: u64 = 1 << 11;
const WRITEBACK: u32 = 32;
/// Bytes up to the end of what every revision has.
const CONFIG_BYTES: usize = 60;
/// VIRTIO_BLK_F_FLUSH.
const F_FLUSH: u64 = 1 << 9;

fn set_up(stage: &mut Stage<'_>) -> Result<Bench, Miss> {
    let bench = stage
        .ready_with(Choice::and(VirtioFeatures::from_bits_retain(F_CONFIG_WCE | F_FLUSH), ProtocolFeatures::empty()))?;
    bench.needs(ProtocolFeatures::CONFIG)?;
    Ok(bench)
}

/// Bytes of the configuration space; none where the back-end says that it cannot.
fn get(bench: &Bench, offset: u32, size: usize) -> Result<Option<Vec<u8>>, Miss> {
    let wanted = ConfigSpace { offset, flags: 0, bytes: vec![0; size] };
    match bench.ask(&Request::GetConfig(wanted))?.0 {
        Reply::Config(Some(config)) => {
            expect(config.bytes.len() == size, || format!("{size} bytes were asked for, {} came", config.bytes.len()))?;
            Ok(Some(config.bytes))
        }
        Reply::Config(None) => Ok(None),
        other => failed(format!("GET_CONFIG is answered with {other:?}")),
    }
}

fn get_some(bench: &Bench, offset: u32, size: usize) -> Result<Vec<u8>, Miss> {
    get(bench, offset, size)?.ok_or_else(|| Miss::Fail(format!("GET_CONFIG of {size} bytes at {offset} is refused")))
}

fn size(stage: &mut Stage<'_>) -> Checked {
    let bench = set_up(stage)?;
    let bytes = get_some(&bench, 0, 8)?;
    if bench.known && bench.kind == super::Kind::Blk {
        let sectors = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let expected = crate::conform::IMAGE_BYTES / 512;
        expect(sectors == expected, || format!("it has {sectors} sectors, the image {expected}"))?;
    }
    passed()
}

fn part(stage: &mut Stage<'_>) -> Checked {
    let bench = set_up(stage)?;
    let whole = get_some(&bench, 0, CONFIG_BYTES)?;
    for (offset, size) in [(0, 8), (20, 4), (32, 1), (34, 2), (36, 24)] {
        let bytes = get_some(&bench, offset as u32, size)?;
        expect(bytes == whole[offset..offset + size], || {
            format!("{size} bytes at {offset} are {bytes:?}, in the whole {:?}", &whole[offset..offset + size])
        })?;
    }
    passed()
}

fn beyond(stage: &mut Stage<'_>) -> Checked {
    let bench = set_up(stage)?;
    let bytes = get(&bench, 200, 56)?;
    bench.settle()?;
    Ok(if bytes.is_some() { "it has the size that was asked for" } else { "it is refused" }.to_owned())
}

fn set(bench: &Bench, offset: u32, bytes: &[u8]) -> Result<Option<u64>, Miss> {
    let request = Request::SetConfig(ConfigSpace { offset, flags: 0, bytes: bytes.to_vec() });
    if bench.protocol.contains(ProtocolFeatures::REPLY_ACK) {
        return bench.acknowledged(&request, &[]).map(Some);
    }
    bench.link.send(&request, &[], false)?;
    bench.settle()?;
    Ok(None)
}

fn write(stage: &mut Stage<'_>) -> Checked {
    let bench = set_up(stage)?;
    if bench.features & F_CONFIG_WCE == 0 {
        return lacks("the write cache cannot be switched");
    }
    for value in [0, 1, 0] {
        let answer = set(&bench, WRITEBACK, &[value])?;
        expect(answer.is_none_or(|it| it == 0), || format!("SET_CONFIG of {value} is refused with {answer:?}"))?;
        // As a part of the whole: some have no other part than the first.
        let found = get_some(&bench, 0, CONFIG_BYTES)?[WRITEBACK as usize];
        expect(found == value, || format!("{value} was written, {found} is read"))?;
    }
    passed()
}

fn read_only(stage: &mut Stage<'_>) -> Checked {
    let bench = set_up(stage)?;
    let before = get_some(&bench, 0, 8)?;
    let changed = set(&bench, 0, &1_u64.to_le_bytes()).and_then(|answer| Ok((answer, get_some(&bench, 0, 8)?)));
    let (answer, after) = match changed {
        Err(Miss::Closed(_)) => return Ok("it closes the connection".to_owned()),
        changed => changed?,
    };
    expect(before == after, || format!("the capacity was {before:?} and is {after:?}"))?;
    expect(answer != Some(0), || "nothing has changed, but it is acknowledged as a success".to_owned())?;
    passed()
}

fn status(stage: &mut Stage<'_>) -> Checked {
    let bench = stage.ready_with(Choice::and(VirtioFeatures::empty(), ProtocolFeatures::STATUS))?;
    bench.needs(ProtocolFeatures::STATUS)?;
    for status in [1, 3, 11, 15] {
        bench.tell(&Request::SetStatus(status), &[])?;
        let found = bench.number(&Request::GetStatus)?;
        expect(found == status, || format!("{status} was set, {found} is read"))?;
    }
    passed()
}

/// A ring that has served.
fn served(stage: &mut Stage<'_>, protocol: ProtocolFeatures) -> Result<(Bench, Ring, Jobs), Miss> {
    let mut bench = stage.ready_with(Choice::and(VirtioFeatures::empty(), protocol))?;
    bench.needs(protocol)?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    Ok((bench, ring, jobs))
}

fn reset_device(stage: &mut Stage<'_>) -> Checked {
    let (mut bench, mut ring, jobs) = served(stage, ProtocolFeatures::RESET_DEVICE)?;
    bench.tell(&Request::ResetDevice, &[])?;
    bench.settle()?;
    bench.offer(&mut ring, &jobs, 4..6);
    ring.kick.signal();
    expect(!ring.moves(QUIET) && !jobs.is_touched(4), || "a ring is served after the reset".to_owned())?;
    // As a driver begins again; the connection has its owner.
    bench.tell(&Request::SetFeatures(bench.features), &[])?;
    bench.share_memory()?;
    ring.reset(0);
    ring.kick.take();
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    passed()
}

fn reset_owner(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = served(stage, ProtocolFeatures::empty())?;
    bench.link.send_raw(&raw::message(4, raw::PLAIN, &[]), &[], "RESET_OWNER")?;
    bench.settle()?;
    bench.enable(&ring, true)?;
    bench.serve(&mut ring, &jobs, 4..6)?;
    passed()
}
