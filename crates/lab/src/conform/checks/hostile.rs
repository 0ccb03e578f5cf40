//! Messages that no front-end should send: whatever is done with them, the back-end neither crashes nor hangs.
//!
//! It may refuse them, ignore them, close the connection (and take another one), or end in order.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use warmswap_wire::{Request, RequestCode};

use super::{Check, For};
use crate::conform::link::{Heard, Link};
use crate::conform::outcome::{Checked, Miss, failed};
use crate::conform::raw;
use crate::conform::stage::{Bench, QUIET, Stage};
use crate::guest::GuestMemory;

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "hostile-version",
        name: "a header of another version",
        clause: HEADER,
        devices: For::Any,
        run: version,
    },
    Check { id: "hostile-size", name: "a header that announces 4 GiB", clause: HEADER, devices: For::Any, run: size },
    Check {
        id: "hostile-short",
        name: "messages with too little payload",
        clause: PAYLOAD,
        devices: For::Any,
        run: short,
    },
    Check {
        id: "hostile-truncated",
        name: "a connection that ends within a header, and within a payload",
        clause: CLOSE,
        devices: For::Any,
        run: truncated,
    },
    Check { id: "hostile-reply", name: "a reply that nobody asked for", clause: HEADER, devices: For::Any, run: reply },
    Check {
        id: "hostile-fds",
        name: "more descriptors than a message has",
        clause: CLOSE,
        devices: For::Any,
        run: surplus_fds,
    },
    Check {
        id: "hostile-no-fd",
        name: "messages without the descriptors they need",
        clause: CLOSE,
        devices: For::Any,
        run: no_fd,
    },
    Check {
        id: "hostile-ring-size",
        name: "rings of 0, 3, 65536 and 2^31 entries",
        clause: RING,
        devices: For::Any,
        run: ring_size,
    },
    Check {
        id: "hostile-ring-index",
        name: "messages for rings that do not exist",
        clause: RING,
        devices: For::Any,
        run: ring_index,
    },
    Check {
        id: "hostile-ring-addr",
        name: "a ring outside guest memory, started and kicked",
        clause: RING,
        devices: For::Any,
        run: ring_addr,
    },
    Check {
        id: "hostile-regions",
        name: "a memory table of 2^31 regions, and regions that wrap around",
        clause: PAYLOAD,
        devices: For::Any,
        run: regions,
    },
    Check {
        id: "hostile-config",
        name: "GET_CONFIG and SET_CONFIG of 4 GiB",
        clause: PAYLOAD,
        devices: For::Any,
        run: config,
    },
    Check {
        id: "hostile-start",
        name: "a ring that is started before anything is known of it",
        clause: RING,
        devices: For::Any,
        run: start,
    },
];

const ENDS: &str = "the process ends";
const HEADER: &str = "Header; Communication: if the back-end detects some error, it may also close the connection";
const PAYLOAD: &str = "Payload; Communication: if the back-end detects some error, it may also close the connection";
const RING: &str =
    "Virtio 1.3 §2.7: queue size is a power of 2, at most 32768; Communication: it may also close the connection";
const CLOSE: &str = "Communication: if the back-end detects some error, it may also close the connection";

/// Whether the back-end is still there, and in which way. `since` is what was done.
fn survives(stage: &Stage<'_>, bench: &Bench, since: &str) -> Result<&'static str, Miss> {
    match answers(&bench.link) {
        Ok(words) => return Ok(words),
        Err(Miss::Closed(_)) => {}
        Err(Miss::Timeout(_)) => return Err(Miss::Timeout(format!("after {since} it does not answer any more"))),
        Err(other) => return Err(other),
    }
    bench.hang_up()?;
    if bench.process.borrow_mut().ends_within(QUIET)?.is_some() {
        // How is told by the process itself.
        return Ok(ENDS);
    }
    let link = Link::connect(&bench.socket, Duration::from_secs(1), stage.subject.patience);
    match link.and_then(|link| answers(&link)) {
        Ok(_) => Ok("the connection is closed"),
        Err(_) if bench.process.borrow_mut().ends_within(QUIET)?.is_some() => Ok(ENDS),
        Err(Miss::Timeout(_) | Miss::Closed(_)) => {
            Err(Miss::Timeout(format!("after {since} it has closed the connection, and serves no other")))
        }
        Err(other) => Err(other),
    }
}

/// Whether GET_FEATURES is answered; other answers may come before.
fn answers(link: &Link) -> Result<&'static str, Miss> {
    let mut words = "it is ignored";
    link.send(&Request::GetFeatures, &[], false)?;
    loop {
        match link.hear()? {
            Heard::Message { header, .. } if header.request == RequestCode::GetFeatures as u32 => return Ok(words),
            Heard::Message { .. } => words = "it is refused",
            Heard::Closed => return Err(Miss::Closed("then".to_owned())),
            Heard::Silence => return Err(Miss::Timeout("then".to_owned())),
        }
    }
}

/// Plays one hostile deed on a back-end of its own.
type Deed<'a> = &'a dyn Fn(&Bench) -> Result<(), Miss>;

/// Each of the deeds on a back-end of its own, which has negotiated and knows the memory.
fn each(stage: &mut Stage<'_>, deeds: &[(&str, Deed<'_>)]) -> Checked {
    let mut found = Vec::new();
    for (what, deed) in deeds {
        let bench = stage.ready()?;
        match deed(&bench) {
            Ok(()) | Err(Miss::Closed(_)) => {}
            Err(other) => return Err(other),
        }
        let how = survives(stage, &bench, what)?;
        // How it died is said by who judges.
        if bench.process.borrow_mut().died(how == ENDS)?.is_some() {
            return failed(*what);
        }
        bench.process.borrow_mut().kill()?;
        found.push((*what, how));
    }
    let first = found[0].1;
    if found.iter().all(|(_, how)| *how == first) {
        return Ok(first.to_owned());
    }
    Ok(found.iter().map(|(what, how)| format!("{what}: {how}")).collect::<Vec<_>>().join("; "))
}

fn send(bench: &Bench, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Miss> {
    bench.link.send_raw(bytes, fds, "what is hostile")
}

fn message(code: RequestCode, payload: &[u8]) -> Vec<u8> {
    raw::message(code as u32, raw::NEED_REPLY, payload)
}

fn version(stage: &mut Stage<'_>) -> Checked {
    each(stage, &[("version 2", &|bench| send(bench, &raw::message(RequestCode::GetFeatures as u32, 2, &[]), &[]))])
}

fn size(stage: &mut Stage<'_>) -> Checked {
    let huge = raw::header(RequestCode::SetVringNum as u32, raw::PLAIN, 0xffff_fff0);
    each(stage, &[("4 GiB", &|bench| send(bench, &huge, &[]))])
}

fn short(stage: &mut Stage<'_>) -> Checked {
    let cut = |code, bytes: usize| message(code, &vec![0; bytes]);
    each(
        stage,
        &[
            ("SET_VRING_NUM of 4 bytes", &|bench| send(bench, &cut(RequestCode::SetVringNum, 4), &[])),
            ("SET_VRING_ADDR of 8 bytes", &|bench| send(bench, &cut(RequestCode::SetVringAddr, 8), &[])),
            ("SET_FEATURES of nothing", &|bench| send(bench, &cut(RequestCode::SetFeatures, 0), &[])),
            ("GET_CONFIG of 4 bytes", &|bench| send(bench, &cut(RequestCode::GetConfig, 4), &[])),
            ("SET_MEM_TABLE of 4 bytes", &|bench| send(bench, &cut(RequestCode::SetMemTable, 4), &[])),
        ],
    )
}

fn truncated(stage: &mut Stage<'_>) -> Checked {
    let whole = message(RequestCode::SetVringNum, &raw::words(&[0, 64]));
    let part = |length: usize| {
        let part = whole[..length].to_vec();
        move |bench: &Bench| {
            send(bench, &part, &[])?;
            bench.hang_up()
        }
    };
    each(stage, &[("within a header", &part(5)), ("within a payload", &part(16))])
}

fn reply(stage: &mut Stage<'_>) -> Checked {
    let reply = raw::message(RequestCode::GetFeatures as u32, raw::PLAIN | 1 << 2, &[0; 8]);
    each(stage, &[("a reply", &|bench| send(bench, &reply, &[]))])
}

fn surplus_fds(stage: &mut Stage<'_>) -> Checked {
    let kick = raw::message(RequestCode::SetVringKick as u32, raw::NEED_REPLY, &0_u64.to_ne_bytes());
    let file = std::fs::File::open("/dev/null")?;
    let many = |count: usize| vec![file.as_fd(); count];
    each(
        stage,
        &[
            ("SET_VRING_KICK with 2", &|bench| send(bench, &kick, &many(2))),
            ("SET_VRING_KICK with 32", &|bench| send(bench, &kick, &many(32))),
            ("GET_FEATURES with 8", &|bench| send(bench, &message(RequestCode::GetFeatures, &[]), &many(8))),
        ],
    )
}

fn no_fd(stage: &mut Stage<'_>) -> Checked {
    let zero = 0_u64.to_ne_bytes();
    let region = region(0x1000, 0x1000);
    let table = [raw::words(&[1, 0]), region.clone()].concat();
    let slot = [vec![0; 8], region].concat();
    each(
        stage,
        &[
            ("SET_VRING_KICK", &|bench| send(bench, &message(RequestCode::SetVringKick, &zero), &[])),
            ("SET_VRING_CALL", &|bench| send(bench, &message(RequestCode::SetVringCall, &zero), &[])),
            ("SET_VRING_ERR", &|bench| send(bench, &message(RequestCode::SetVringErr, &zero), &[])),
            ("SET_MEM_TABLE", &|bench| send(bench, &message(RequestCode::SetMemTable, &table), &[])),
            ("ADD_MEM_REG", &|bench| send(bench, &message(RequestCode::AddMemReg, &slot), &[])),
            ("SET_LOG_BASE", &|bench| send(bench, &message(RequestCode::SetLogBase, &[0; 16]), &[])),
            ("SET_INFLIGHT_FD", &|bench| send(bench, &message(RequestCode::SetInflightFd, &[0; 24]), &[])),
            ("SET_BACKEND_REQ_FD", &|bench| send(bench, &message(RequestCode::SetBackendReqFd, &[]), &[])),
        ],
    )
}

/// A region's fields: guest address, size, user address, offset.
fn region(guest: u64, size: u64) -> Vec<u8> {
    [guest, size, guest, 0].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn ring_size(stage: &mut Stage<'_>) -> Checked {
    let sized = |size: u32| {
        move |bench: &Bench| {
            send(bench, &message(RequestCode::SetVringNum, &raw::words(&[0, size])), &[])?;
            start_at_zero(bench)
        }
    };
    each(stage, &[("0", &sized(0)), ("3", &sized(3)), ("65536", &sized(65536)), ("2^31", &sized(1 << 31))])
}

/// Addresses at the start of guest memory, a kick that waits, enabled.
fn start_at_zero(bench: &Bench) -> Result<(), Miss> {
    let (region, _) = bench.memory.table().next().expect("guest memory has a region");
    start_at(bench, region.user_addr)
}

fn start_at(bench: &Bench, user: u64) -> Result<(), Miss> {
    let addresses: Vec<u8> =
        [user, user + 0x2000, user + 0x1000, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    send(bench, &message(RequestCode::SetVringAddr, &[raw::words(&[0, 0]), addresses].concat()), &[])?;
    kick_and_enable(bench)
}

fn kick_and_enable(bench: &Bench) -> Result<(), Miss> {
    let (kick, call) = (crate::guest::EventFd::new()?, crate::guest::EventFd::new()?);
    kick.signal();
    send(bench, &message(RequestCode::SetVringCall, &0_u64.to_ne_bytes()), &[call.as_fd()])?;
    send(bench, &message(RequestCode::SetVringKick, &0_u64.to_ne_bytes()), &[kick.as_fd()])?;
    send(bench, &message(RequestCode::SetVringEnable, &raw::words(&[0, 1])), &[])?;
    std::thread::sleep(Duration::from_millis(50));
    Ok(())
}

fn ring_index(stage: &mut Stage<'_>) -> Checked {
    let state =
        |code: RequestCode, index: u32| move |bench: &Bench| send(bench, &message(code, &raw::words(&[index, 1])), &[]);
    let kick = |index: u64| {
        move |bench: &Bench| {
            let kick = crate::guest::EventFd::new()?;
            send(bench, &message(RequestCode::SetVringKick, &index.to_ne_bytes()), &[kick.as_fd()])
        }
    };
    each(
        stage,
        &[
            ("SET_VRING_NUM 255", &state(RequestCode::SetVringNum, 255)),
            ("SET_VRING_BASE 65536", &state(RequestCode::SetVringBase, 65536)),
            ("SET_VRING_ENABLE 2^32-1", &state(RequestCode::SetVringEnable, u32::MAX)),
            ("GET_VRING_BASE 255", &state(RequestCode::GetVringBase, 255)),
            ("SET_VRING_KICK 255", &kick(255)),
        ],
    )
}

fn ring_addr(stage: &mut Stage<'_>) -> Checked {
    let at = |user: u64| {
        move |bench: &Bench| {
            send(bench, &message(RequestCode::SetVringNum, &raw::words(&[0, 64])), &[])?;
            start_at(bench, user)
        }
    };
    let end = |bench: &Bench| {
        let (region, _) = bench.memory.table().next().expect("guest memory has a region");
        send(bench, &message(RequestCode::SetVringNum, &raw::words(&[0, 32768])), &[])?;
        start_at(bench, region.user_addr + region.size - 0x3000)
    };
    each(
        stage,
        &[
            ("nowhere", &at(0x10_0000)),
            ("at the end of the address space", &at(u64::MAX - 0x2fff)),
            ("across the end of a region", &end),
        ],
    )
}

fn regions(stage: &mut Stage<'_>) -> Checked {
    let memory = GuestMemory::new(1 << 20)?;
    let fd = memory.table().next().expect("guest memory has a region").1;
    let table = |count: u32, region: &[u8]| {
        message(RequestCode::SetMemTable, &[raw::words(&[count, 0]), region.to_vec()].concat())
    };
    each(
        stage,
        &[
            ("2^31 regions", &|bench| send(bench, &table(1 << 31, &region(0, 1 << 20)), &[fd])),
            ("9 regions", &|bench| send(bench, &table(9, &region(0, 1 << 20).repeat(9)), &[fd; 9])),
            ("a region of nothing", &|bench| send(bench, &table(1, &region(0, 0)), &[fd])),
            ("a region that wraps around", &|bench| send(bench, &table(1, &region(u64::MAX - 0xfff, 1 << 20)), &[fd])),
            ("regions that overlap", &|bench| send(bench, &table(2, &region(0, 1 << 20).repeat(2)), &[fd; 2])),
        ],
    )
}

fn config(stage: &mut Stage<'_>) -> Checked {
    let asks = |code: RequestCode, offset: u32, size: u32| {
        move |bench: &Bench| send(bench, &message(code, &[raw::words(&[offset, size, 0]), vec![0; 16]].concat()), &[])
    };
    each(
        stage,
        &[
            ("GET_CONFIG of 4 GiB", &asks(RequestCode::GetConfig, 0, u32::MAX)),
            ("GET_CONFIG at 4 GiB", &asks(RequestCode::GetConfig, u32::MAX, 16)),
            ("SET_CONFIG of 4 GiB", &asks(RequestCode::SetConfig, 0, u32::MAX)),
            ("SET_CONFIG at 4 GiB", &asks(RequestCode::SetConfig, u32::MAX - 7, 16)),
        ],
    )
}

fn start(stage: &mut Stage<'_>) -> Checked {
    each(stage, &[("a start without anything", &kick_and_enable), ("a start without a size", &start_at_zero)])
}
