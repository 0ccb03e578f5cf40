//! Guest memory that comes and goes, and the log of what was written to it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use warmswap_wire::{FdSlot, LogRegion, MemoryRegion, ProtocolFeatures, Request, VirtioFeatures};

use super::{Check, For};
use crate::conform::job::Jobs;
use crate::conform::outcome::{Checked, Miss, expect, passed};
use crate::conform::ring::Ring;
use crate::conform::stage::{Bench, Choice, Stage};
use crate::guest::Mapping;

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "mem-table-running",
        name: "SET_MEM_TABLE on a running ring: it is served on, also in the new region",
        clause: "Ring states: while processing the rings the back-end must support changing some configuration aspects on the fly",
        devices: For::Requests,
        run: table_running,
    },
    Check {
        id: "mem-slots",
        name: "regions are added one by one, and used",
        clause: "ADD_MEM_REG: a region of guest memory which the back-end device must map in",
        devices: For::Requests,
        run: slots,
    },
    Check {
        id: "mem-remove",
        name: "a region that is removed is unmapped",
        clause: "REM_MEM_REG: a region of guest memory which the back-end device must unmap",
        devices: For::Requests,
        run: remove,
    },
    Check {
        id: "mem-remove-fd",
        name: "a descriptor that comes with REM_MEM_REG is closed",
        clause: "REM_MEM_REG: if a file descriptor is passed, the back-end MUST close it without using it otherwise",
        devices: For::Any,
        run: remove_fd,
    },
    Check {
        id: "log-dirty",
        name: "with LOG_ALL the pages of buffers and of the used ring are marked",
        clause: "Migration: all the modifications to memory pointed by vring descriptors should be marked; to the used vring if VHOST_VRING_F_LOG",
        devices: For::Requests,
        run: log_dirty,
    },
    Check {
        id: "log-toggle",
        name: "LOG_ALL comes and goes on a running ring, which is served on",
        clause: "Migration: to start/stop logging the front-end may send SET_FEATURES with VHOST_F_LOG_ALL and SET_VRING_ADDR",
        devices: For::Requests,
        run: log_toggle,
    },
];

/// Name of the memory of a plugged region in `/proc`.
const PLUGGED: &str = "memfd:guest-dimm";
const PLUGGED_BYTES: u64 = 4 << 20;

fn set_up(stage: &mut Stage<'_>, protocol: ProtocolFeatures) -> Result<(Bench, Ring, Jobs), Miss> {
    let mut bench = stage.ready_with(Choice::and(VirtioFeatures::empty(), protocol))?;
    bench.needs(protocol)?;
    let (ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    Ok((bench, ring, jobs))
}

/// Slots in memory that is plugged in.
fn plug(bench: &mut Bench) -> Result<Jobs, Miss> {
    let region = bench.memory.plug(PLUGGED_BYTES)?;
    Jobs::new(&mut bench.memory, region, bench.kind, 8, bench.known)
}

/// The region that was plugged last.
fn last(bench: &Bench) -> Result<(MemoryRegion, OwnedFd), Miss> {
    let (region, fd) = bench.memory.table().last().expect("guest memory has a region");
    Ok((region, fd.try_clone_to_owned()?))
}

fn add_last(bench: &Bench) -> Result<MemoryRegion, Miss> {
    let (region, fd) = last(bench)?;
    bench.tell(&Request::AddMemReg { region, fd: Some(FdSlot(0)) }, &[fd.as_fd()])?;
    bench.settle()?;
    Ok(region)
}

fn table_running(stage: &mut Stage<'_>) -> Checked {
    let (mut bench, mut ring, jobs) = set_up(stage, ProtocolFeatures::empty())?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    let far = plug(&mut bench)?;
    bench.share_memory()?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    bench.serve(&mut ring, &far, 4..8)?;
    bench.memory.unplug();
    bench.share_memory()?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    passed()
}

/// A ring whose memory was given region by region.
fn set_up_slots(stage: &mut Stage<'_>) -> Result<(Bench, Ring, Jobs), Miss> {
    let mut bench = stage.open()?;
    bench.negotiate(Choice::and(VirtioFeatures::empty(), ProtocolFeatures::CONFIGURE_MEM_SLOTS))?;
    bench.needs(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
    let slots = bench.number(&Request::GetMaxMemSlots)?;
    expect(slots >= 2, || format!("it has {slots} memory slots"))?;
    add_last(&bench)?;
    let (ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    Ok((bench, ring, jobs))
}

fn slots(stage: &mut Stage<'_>) -> Checked {
    let (mut bench, mut ring, jobs) = set_up_slots(stage)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    let far = plug(&mut bench)?;
    add_last(&bench)?;
    bench.serve(&mut ring, &far, 4..8)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    Ok(format!("{} slots", bench.number(&Request::GetMaxMemSlots)?))
}

fn remove(stage: &mut Stage<'_>) -> Checked {
    let (mut bench, mut ring, jobs) = set_up_slots(stage)?;
    let far = plug(&mut bench)?;
    let region = add_last(&bench)?;
    bench.serve(&mut ring, &far, 4..8)?;
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", bench.process.borrow().pid()));
    expect(maps()?.contains(PLUGGED), || "it was never mapped".to_owned())?;
    bench.tell(&Request::RemMemReg(region), &[])?;
    bench.settle()?;
    expect(!maps()?.contains(PLUGGED), || "it is still mapped".to_owned())?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    passed()
}

fn remove_fd(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.open()?;
    bench.negotiate(Choice::and(VirtioFeatures::empty(), ProtocolFeatures::CONFIGURE_MEM_SLOTS))?;
    bench.needs(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
    add_last(&bench)?;
    bench.memory.plug(PLUGGED_BYTES)?;
    let region = add_last(&bench)?;
    let (_, fd) = last(&bench)?;
    bench.link.send_raw(&remove_message(&region), &[fd.as_fd()], "REM_MEM_REG with a descriptor")?;
    match bench.settle() {
        Err(Miss::Closed(_)) => return Ok("it closes the connection".to_owned()),
        other => other?,
    }
    let pid = bench.process.borrow().pid();
    let mut kept = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = std::fs::read_link(entry?.path()).unwrap_or_default();
        kept += u32::from(path.to_string_lossy().contains(PLUGGED));
    }
    expect(kept == 0, || format!("{kept} descriptors of the region are still open"))?;
    passed()
}

/// The codec attaches none.
fn remove_message(region: &MemoryRegion) -> Vec<u8> {
    let mut bytes = Vec::new();
    let flags = warmswap_wire::HeaderFlags::empty();
    Request::RemMemReg(*region).encode(flags, &mut bytes, &mut Vec::new());
    bytes
}

/// The dirty log: a bit for each page.
struct Log(Mapping);

impl Log {
    const BYTES: u64 = 4096;

    /// Makes one and tells the back-end. It has an answer of its own, of whatever form.
    fn begin(bench: &Bench) -> Result<Self, Miss> {
        bench.needs(ProtocolFeatures::LOG_SHMFD)?;
        expect(bench.offered & VirtioFeatures::LOG_ALL.bits() != 0, || {
            "LOG_SHMFD is offered, VHOST_F_LOG_ALL is not".to_owned()
        })?;
        let fd =
            rustix::fs::memfd_create("conform-log", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        rustix::fs::ftruncate(&fd, Self::BYTES).map_err(std::io::Error::from)?;
        let mapping = Mapping::new(&fd, 0, Self::BYTES as usize)?;
        let request = Request::SetLogBase { region: LogRegion { size: Self::BYTES, offset: 0 }, fd: Some(FdSlot(0)) };
        bench.link.send(&request, &[fd.as_fd()], false)?;
        bench.answer(&request)?;
        Ok(Log(mapping))
    }

    /// Whether the page of that guest-physical address is marked. Takes the mark away.
    fn takes(&self, guest: u64) -> bool {
        let page = (guest / 4096) as usize;
        let bit = 1 << (page % 8);
        self.0.u8(page / 8).fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }
}

/// Switches the log on or off, as QEMU does.
fn log_all(bench: &Bench, ring: &Ring, on: bool) -> Result<(), Miss> {
    let features = bench.features | if on { VirtioFeatures::LOG_ALL.bits() } else { 0 };
    bench.tell(&Request::SetFeatures(features), &[])?;
    bench.tell(&Request::SetVringAddr(ring.addresses(on)), &[])?;
    bench.settle()
}

/// Requires marks for a request in that slot that was just served.
fn marked(log: &Log, bench: &Bench, ring: &Ring, jobs: &Jobs, slot: u16) -> Result<(), Miss> {
    let mut places = vec![(ring.used_guest(), "used ring")];
    if bench.kind.is_answered() {
        places.push((jobs.data_guest(slot), "buffer"));
    }
    for (guest, name) in places {
        expect(log.takes(guest), || format!("the page of the {name} at {guest:#x} is not marked"))?;
    }
    Ok(())
}

fn log_dirty(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, ProtocolFeatures::LOG_SHMFD)?;
    let log = Log::begin(&bench)?;
    log_all(&bench, &ring, true)?;
    for slot in 0..4 {
        bench.serve(&mut ring, &jobs, [slot])?;
        marked(&log, &bench, &ring, &jobs, slot)?;
    }
    passed()
}

fn log_toggle(stage: &mut Stage<'_>) -> Checked {
    let (bench, mut ring, jobs) = set_up(stage, ProtocolFeatures::LOG_SHMFD)?;
    let log = Log::begin(&bench)?;
    for on in [true, false, true, false] {
        log_all(&bench, &ring, on)?;
        // What was done before the change may have been marked until then.
        log.takes(ring.used_guest());
        log.takes(jobs.data_guest(0));
        bench.serve(&mut ring, &jobs, 0..1)?;
        // A mark too many does no harm.
        if on {
            marked(&log, &bench, &ring, &jobs, 0)?;
        }
    }
    passed()
}
