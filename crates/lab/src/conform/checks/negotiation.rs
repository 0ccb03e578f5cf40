//! Features, ownership, acknowledgements.

use std::os::fd::AsFd as _;

use warmswap_wire::{FdSlot, ProtocolFeatures, Request, VirtioFeatures, VringFd, VringState};

use super::{Check, For, TAKEOVER};
use crate::conform::link::Heard;
use crate::conform::outcome::{Checked, Miss, expect, failed, lacks, passed};
use crate::conform::raw;
use crate::conform::stage::{Bench, Choice, QUIET, Stage, number_in};

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "features",
        name: "GET_FEATURES is answered, and offers protocol features and virtio 1",
        clause: "Message types, GET_FEATURES: reply payload u64; needed for takeover: VHOST_USER_F_PROTOCOL_FEATURES",
        devices: For::Any,
        run: features,
    },
    Check {
        id: "protocol-first",
        name: "protocol features are negotiated before SET_FEATURES",
        clause: "GET/SET_PROTOCOL_FEATURES: back-ends that report the feature must support this message even before SET_FEATURES was called",
        devices: For::Any,
        run: protocol_first,
    },
    Check {
        id: "protocol-subset",
        name: "a front-end that takes no protocol feature is served",
        clause: "Communication: any protocol extensions are gated by protocol feature bits",
        devices: For::Requests,
        run: protocol_subset,
    },
    Check {
        id: "protocol-unoffered",
        name: "a protocol feature that was not offered does no harm",
        clause: TAKEOVER,
        devices: For::Any,
        run: protocol_unoffered,
    },
    Check {
        id: "features-unoffered",
        name: "a virtio feature that was not offered does no harm",
        clause: TAKEOVER,
        devices: For::Any,
        run: features_unoffered,
    },
    Check {
        id: "queue-num",
        name: "GET_QUEUE_NUM says at least one ring",
        clause: "Multiple queue support: the max number of queues can be queried with GET_QUEUE_NUM",
        devices: For::Any,
        run: queue_num,
    },
    Check {
        id: "reply-ack",
        name: "every message that asks for it is acknowledged once, with zero",
        clause: "REPLY_ACK: the back-end MUST respond with a payload indicating success or failure",
        devices: For::Any,
        run: reply_ack,
    },
    Check {
        id: "reply-ack-own",
        name: "a message with a reply of its own is not acknowledged besides",
        clause: "REPLY_ACK: for the message types that already solicit a reply the need_reply bit brings no behavioural change",
        devices: For::Any,
        run: reply_ack_own,
    },
    Check {
        id: "reply-ack-failure",
        name: "what cannot be done is acknowledged with a failure",
        clause: "REPLY_ACK: zero on success or non-zero on failure",
        devices: For::Any,
        run: reply_ack_failure,
    },
    Check {
        id: "reply-ack-unknown",
        name: "an unknown message that asks for it is acknowledged with a failure",
        clause: "REPLY_ACK: the need_reply flag can be set to any command; the back-end MUST respond",
        devices: For::Any,
        run: reply_ack_unknown,
    },
];

fn features(stage: &mut Stage<'_>) -> Checked {
    let bench = stage.open()?;
    let offered = bench.number(&Request::GetFeatures)?;
    for (bit, name) in
        [(VirtioFeatures::PROTOCOL_FEATURES, "PROTOCOL_FEATURES"), (VirtioFeatures::VERSION_1, "VERSION_1")]
    {
        expect(offered & bit.bits() != 0, || format!("{name} is not among the features {offered:#x}"))?;
    }
    Ok(format!("{offered:#x}"))
}

fn protocol_first(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.open()?;
    bench.offered = bench.number(&Request::GetFeatures)?;
    let offered = bench.number(&Request::GetProtocolFeatures)?;
    bench.tell(&Request::SetProtocolFeatures(offered & ProtocolFeatures::REPLY_ACK.bits()), &[])?;
    bench.settle()?;
    let names: Vec<&str> = ProtocolFeatures::from_bits_truncate(offered).iter_names().map(|(name, _)| name).collect();
    Ok(names.join(" "))
}

fn protocol_subset(stage: &mut Stage<'_>) -> Checked {
    let choice = Choice { protocol: ProtocolFeatures::empty(), ..Choice::default() };
    let mut bench = stage.ready_with(choice)?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    passed()
}

/// What a back-end does with a message that it should not get, and whether it lives on.
fn unoffered(bench: &Bench, request: &Request) -> Checked {
    let answer = bench.acknowledged(request, &[]);
    match answer.and_then(|answer| bench.settle().map(|()| answer)) {
        Ok(0) => Ok("it is ignored".to_owned()),
        Ok(_) => Ok("it is refused".to_owned()),
        Err(Miss::Closed(_)) => Ok("it closes the connection".to_owned()),
        Err(other) => Err(other),
    }
}

fn protocol_unoffered(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    bench.needs(ProtocolFeatures::REPLY_ACK)?;
    let offered = bench.number(&Request::GetProtocolFeatures)?;
    bench.offered = bench.number(&Request::GetFeatures)?;
    unoffered(&bench, &Request::SetProtocolFeatures(bench.protocol.bits() | (1 << 62) & !offered))
}

fn features_unoffered(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.open()?;
    bench.negotiate(Choice::default())?;
    bench.needs(ProtocolFeatures::REPLY_ACK)?;
    let Some(bit) = (0..64).rev().map(|bit| 1_u64 << bit).find(|bit| bench.offered & bit == 0) else {
        return lacks("every feature is offered");
    };
    unoffered(&bench, &Request::SetFeatures(bench.features | bit))
}

fn queue_num(stage: &mut Stage<'_>) -> Checked {
    let bench = stage.ready()?;
    bench.needs(ProtocolFeatures::MQ)?;
    let rings = bench.number(&Request::GetQueueNum)?;
    expect((1..=0xffff).contains(&rings), || format!("it has {rings} rings"))?;
    Ok(format!("{rings}"))
}

fn reply_ack(stage: &mut Stage<'_>) -> Checked {
    // `tell` requires an acknowledgement of zero for each of them, `settle` that there is no further one.
    let mut bench = stage.ready()?;
    bench.needs(ProtocolFeatures::REPLY_ACK)?;
    let ring = bench.ring(0)?;
    bench.describe(&ring, 0)?;
    bench.settle()?;
    let index = ring.index;
    bench.tell(&Request::SetVringErr(VringFd { index, fd: Some(FdSlot(0)) }), &[ring.err.as_fd()])?;
    bench.set_kick(&ring)?;
    bench.settle()?;
    bench.enable(&ring, true)?;
    bench.enable(&ring, false)?;
    bench.settle()?;
    passed()
}

fn reply_ack_own(stage: &mut Stage<'_>) -> Checked {
    let bench = stage.ready()?;
    bench.needs(ProtocolFeatures::REPLY_ACK)?;
    for request in [Request::GetFeatures, Request::GetProtocolFeatures] {
        bench.link.send(&request, &[], true)?;
        bench.answer(&request)?;
    }
    match bench.link.hear_within(QUIET)? {
        Heard::Silence => passed(),
        other => failed(format!("after the replies came {other:?}")),
    }
}

fn reply_ack_failure(stage: &mut Stage<'_>) -> Checked {
    let bench = stage.ready()?;
    bench.needs(ProtocolFeatures::REPLY_ACK)?;
    let request = Request::SetVringNum(VringState { index: 250, value: 64 });
    let answer = match bench.acknowledged(&request, &[]) {
        Err(Miss::Closed(_)) => return failed("SET_VRING_NUM for ring 250 is not answered, the connection is closed"),
        answer => answer?,
    };
    expect(answer != 0, || "SET_VRING_NUM for ring 250 is acknowledged as a success".to_owned())?;
    match bench.settle() {
        Err(Miss::Closed(_)) => Ok("and then the connection is closed".to_owned()),
        settled => settled.and_then(|()| passed()),
    }
}

fn reply_ack_unknown(stage: &mut Stage<'_>) -> Checked {
    const UNKNOWN: u32 = 1000;
    let bench = stage.ready()?;
    bench.needs(ProtocolFeatures::REPLY_ACK)?;
    bench.link.send_raw(&raw::message(UNKNOWN, raw::NEED_REPLY, &[]), &[], "message 1000")?;
    match bench.link.hear()? {
        Heard::Message { header, payload, .. } => {
            expect(header.is_reply() && header.request == UNKNOWN, || format!("it is answered with {header:?}"))?;
            expect(number_in(&payload).is_some_and(|it| it != 0), || format!("it is answered with {payload:?}"))?;
        }
        Heard::Closed => return failed("it is not answered, the connection is closed"),
        Heard::Silence => return Err(Miss::Timeout("it is not answered".to_owned())),
    }
    bench.settle()?;
    passed()
}
