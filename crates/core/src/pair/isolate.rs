//! A request that kills every backend.
//!
//! A request that was in flight when several backends in a row died is suspect. Suspects are run one by one, in the order of their
//! submission, each on a fresh backend and on a ring of the broker's own: guest memory and descriptor table are the guest's, only
//! the two index rings are not. One that completes is completed in the guest's ring; the first that takes its backend with it is
//! answered with an I/O error, and the device lives on.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use warmswap_wire::ring::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, Layout, SIZE_MAX, UsedElem,
};
use warmswap_wire::{DeviceType, FdSlot, ProtocolFeatures, Request, VringAddr, VringFd, VringState};
use warmswap_zoo::{Animal, loose};

use super::vmm::Ticket;
use super::{Pair, Step};
use crate::event::{Action, BackendId};
use crate::failover::{Isolation, Kind, Phase, Recovery, Report, Trial};
use crate::journal::Entry;
use crate::link::{LinkState, Purpose};
use crate::memory::{GuestMemory, PRIVATE_ADDR, private_region};
use crate::time::Nanos;

/// Where the two index rings of a trial lie in memory of the broker's own; the lower part belongs to the canary.
pub(super) const TRIAL_AVAILABLE: u64 = 1 << 18;
/// See `TRIAL_AVAILABLE`.
pub(super) const TRIAL_USED: u64 = 1 << 19;

/// `VIRTIO_BLK_S_IOERR`.
const BLK_STATUS_IO_ERROR: u8 = 1;

/// Requests that were in flight when backends died.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Suspects {
    list: Vec<Suspect>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Suspect {
    ring: u32,
    head: u16,
    submission: u64,
    deaths: u32,
}

impl Suspects {
    pub(crate) fn clear(&mut self) {
        self.list.clear();
    }

    fn deaths_of(&self, ring: u32, head: u16, submission: u64) -> u32 {
        let same = |it: &&Suspect| it.ring == ring && it.head == head && it.submission == submission;
        self.list.iter().find(same).map_or(0, |it| it.deaths)
    }
}

impl Pair {
    /// Books one more death against everything that was in flight; what was not is acquitted.
    pub(crate) fn suspect(&mut self, rings: &[u32]) {
        // A backend that was drained, or killed because an operator asked, did not die of anything it was doing. That is the first one of a
        // failover: whoever was to take over after it has died by itself.
        let first = |report: &Report| report.attempts == 0 || loose(Animal::NobodySuspected);
        let asked = |report: &Report| report.kind == Kind::Planned && first(report);
        let innocent = |report: &Report| report.recovery == Recovery::Drained || asked(report);
        if self.failover.as_ref().is_some_and(|it| innocent(&it.report)) {
            return;
        }
        let mut list = Vec::new();
        for index in rings {
            let Some(observer) = self.rings[*index as usize].observer.as_ref() else { continue };
            for head in observer.survivors().unwrap_or_default() {
                let submission = observer.submission_of(head);
                let deaths = self.suspects.deaths_of(*index, head, submission) + 1;
                list.push(Suspect { ring: *index, head, submission, deaths });
            }
        }
        self.suspects.list = list;
    }

    /// Enters Isolating where a request has been in flight at too many deaths.
    pub(crate) fn begin_isolation(&mut self, step: &mut Step<'_>) -> bool {
        let limit = self.config.limits.isolate_after;
        let waiting = self.waiting_rings();
        let guilty = |it: &&Suspect| it.deaths >= limit && waiting.contains(&it.ring);
        let queue: VecDeque<(u32, u16)> =
            self.suspects.list.iter().filter(guilty).map(|it| (it.ring, it.head)).collect();
        if queue.is_empty() {
            return false;
        }
        step.out.journal(
            Entry::warning("IsolationStarted")
                .with("suspects", queue.len() as u64)
                .with("next", "each is run alone on a fresh backend"),
        );
        let failover = self.failover.as_mut().expect("only a failover isolates");
        failover.enter(Phase::Isolating, step.now);
        failover.isolation = Some(Isolation { queue, trial: None });
        self.next_trial(step);
        true
    }

    fn next_trial(&mut self, step: &mut Step<'_>) {
        let failover = self.failover.as_mut().expect("only a failover isolates");
        let isolation = failover.isolation.as_mut().expect("the phase has begun");
        if isolation.queue.is_empty() || self.closing {
            failover.isolation = None;
            self.suspects.clear();
            self.hand_over(step);
            return;
        }
        if let Some(backend) = self.ready_shadow() {
            self.begin_trial(backend, step);
        }
    }

    pub(crate) fn isolation_target_ready(&mut self, step: &mut Step<'_>) {
        let idle = self.failover.as_ref().and_then(|it| it.isolation.as_ref()).is_some_and(|it| it.trial.is_none());
        if idle {
            self.next_trial(step);
        }
    }

    fn begin_trial(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let failover = self.failover.as_mut().expect("only a failover isolates");
        let isolation = failover.isolation.as_mut().expect("the phase has begun");
        let Some((ring, head)) = isolation.queue.pop_front() else { return };
        isolation.trial = Some(Trial { ring, head, backend, began: step.now, over: false, abandoned: false });
        failover.target = Some(backend);
        if let Err(reason) = self.send_trial(backend, ring, head, step) {
            self.halt(&format!("a request kills every backend and cannot be isolated: {reason}"), step);
        }
    }

    fn send_trial(&mut self, backend: BackendId, ring: u32, head: u16, step: &mut Step<'_>) -> Result<(), String> {
        let described = self.session.ring(ring).cloned().ok_or("the ring is gone")?;
        let addr = described.addr.ok_or("the ring has no addresses")?;
        let layout = self.rings[ring as usize].observer.as_ref().map(crate::observer::Observer::layout);
        let layout = layout.ok_or("the ring is not observed")?;
        let link = self.links.iter_mut().find(|link| link.id == backend).ok_or("the backend is gone")?;
        let events = link.private.ok_or("the link has no eventfds")?;
        if link.tracks_in_flight() {
            return Err("the backend tracks what is in flight, and would find the trial among it".to_owned());
        }
        let known = link.private_memory.is_some();
        if !known && !link.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return Err("the backend takes no further memory region".to_owned());
        }
        let private = match link.private_memory {
            Some(private) => private,
            None => step.memory.make_private().map_err(|error| error.to_string())?,
        };
        link.private_memory = Some(private);
        write_trial(step.memory, private, layout, head);
        let fd = |fd| VringFd { index: ring, fd: Some(fd) };
        link.state = LinkState::Active;
        link.touched = true;
        if !known {
            link.tell(&Request::AddMemReg { region: private_region(), fd: Some(private) }, step.out);
        }
        link.tell(&Request::SetVringBase(VringState { index: ring, value: 0 }), step.out);
        let place = VringAddr {
            flags: 0,
            used: PRIVATE_ADDR + TRIAL_USED,
            available: PRIVATE_ADDR + TRIAL_AVAILABLE,
            log: 0,
            ..addr
        };
        link.tell(&Request::SetVringAddr(place), step.out);
        link.tell(&Request::SetVringCall(fd(events.call)), step.out);
        link.tell(&Request::SetVringKick(fd(events.probe)), step.out);
        link.ask(&Request::SetVringEnable(VringState { index: ring, value: 1 }), Purpose::Isolated, step.out);
        step.out.push(Action::Signal(events.probe));
        Ok(())
    }

    pub(crate) fn isolation_acknowledged(&mut self, backend: BackendId, step: &mut Step<'_>) {
        // A backend that broke on the request notices the end of its connection with the next message.
        let now = step.now;
        if let Some(link) = self.link_mut(backend) {
            link.ping(now, step.out);
        }
    }

    pub(crate) fn poll_isolation(&mut self, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let Some(isolation) = self.failover.as_ref().and_then(|it| it.isolation.as_ref()) else { return };
        let Some(trial) = isolation.trial else {
            // The VMM may have stopped the rings whose requests were suspected, while no backend was there to try them.
            let over = isolation.queue.is_empty() || self.closing;
            return if over { self.next_trial(step) } else { self.ensure_trial_backend(step) };
        };
        if trial.over {
            // The one that was started meanwhile may have died as well.
            return self.ensure_target(step);
        }
        let waited = step.now.since(trial.began);
        if self.trial_result(trial.backend, step.memory).is_some() || waited >= limits.stall {
            self.end_trial(step);
        } else if let Some(link) = self.link_mut(trial.backend)
            && step.now.since(link.heard_at) >= Nanos(limits.hang.0 / 4)
        {
            link.ping(step.now, step.out);
        }
    }

    /// What a trial's backend has completed, once it has.
    fn trial_result(&self, backend: BackendId, memory: &dyn GuestMemory) -> Option<UsedElem> {
        let private = self.link(backend)?.private_memory?;
        let used = memory.read_region(private, TRIAL_USED, 12)?;
        let field = |at: usize| u32::from_le_bytes(used[at..at + 4].try_into().expect("four bytes"));
        (used[2..4] != [0, 0]).then(|| UsedElem { id: field(4), len: field(8) })
    }

    fn ensure_trial_backend(&mut self, step: &mut Step<'_>) {
        match self.ready_shadow() {
            Some(backend) => self.begin_trial(backend, step),
            None => self.ensure_target(step),
        }
    }

    /// The trial is decided: its backend has completed the request, or died of it. Either way it has touched guest memory, and
    /// the verdict is read when it is proved gone.
    pub(crate) fn end_trial(&mut self, step: &mut Step<'_>) {
        let failover = self.failover.as_mut().expect("only a failover isolates");
        let Some(trial) = failover.isolation.as_mut().and_then(|it| it.trial.as_mut()) else { return };
        if trial.over {
            return;
        }
        trial.over = true;
        let backend = trial.backend;
        failover.target = None;
        if self.shadow == Some(backend) {
            self.shadow = None;
        }
        if let Some(link) = self.link_mut(backend) {
            link.end(step.out);
        }
        step.out.push(Action::Fence { backend });
        self.ensure_target(step);
    }

    /// The trial's backend is gone for good.
    pub(crate) fn trial_fenced(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let used = self.trial_result(backend, step.memory);
        let failover = self.failover.as_mut().expect("only a failover isolates");
        let Some(isolation) = failover.isolation.as_mut() else { return };
        let Some(trial) = isolation.trial.filter(|trial| trial.backend == backend) else { return };
        isolation.trial = None;
        if used.is_none() && !trial.abandoned {
            failover.report.isolated += 1;
            // The others were only in its company.
            isolation.queue.clear();
        }
        self.forget_backend(backend, step.out);
        if !trial.abandoned {
            self.complete_for_guest(trial, used, step);
        }
        if let Some(Ticket::Stop { ring, .. }) = self.ticket
            && ring == trial.ring
        {
            self.finish_vmm_stop(ring, step);
        }
        self.next_trial(step);
    }

    /// Whether a request of this ring is on trial, and its backend not proved gone.
    pub(crate) fn is_tried(&self, ring: u32) -> bool {
        let trial = self.failover.as_ref().and_then(|it| it.isolation.as_ref()?.trial);
        trial.is_some_and(|trial| trial.ring == ring)
    }

    /// The VMM stops a ring: a request of it on trial is given up, so that its buffers are left alone.
    pub(crate) fn end_trial_on(&mut self, ring: u32, step: &mut Step<'_>) {
        if self.is_tried(ring) && !loose(Animal::TrialOutlivesStop) {
            self.end_trial(step);
        }
    }

    /// The VMM has stopped a ring: what was in it is its own again.
    pub(crate) fn abandon_trials(&mut self, ring: u32) {
        self.suspects.list.retain(|suspect| suspect.ring != ring);
        let Some(isolation) = self.failover.as_mut().and_then(|it| it.isolation.as_mut()) else { return };
        isolation.queue.retain(|(suspected, _)| *suspected != ring);
        if let Some(trial) = isolation.trial.as_mut().filter(|trial| trial.ring == ring) {
            trial.abandoned = true;
        }
    }

    /// Completes a tried request in the guest's ring, with the backend's result or with an error.
    fn complete_for_guest(&mut self, trial: Trial, result: Option<UsedElem>, step: &mut Step<'_>) {
        let Trial { ring, head, .. } = trial;
        let entry = result.unwrap_or_else(|| {
            self.counters.isolated += 1;
            let answered = self.config.device == DeviceType::Blk && fail_blk_request(ring, head, step.memory);
            step.out.journal(
                Entry::error("RequestIsolated")
                    .with("ring", ring)
                    .with("head", head)
                    .with("status_written", answered)
                    .with("reason", "every backend that ran it died; it was answered with an I/O error"),
            );
            UsedElem { id: u32::from(head), len: u32::from(answered) }
        });
        let Some(observer) = self.rings[ring as usize].observer.as_mut() else { return };
        let used = observer.used_idx();
        step.memory.push_used(ring, used, UsedElem { id: u32::from(head), len: entry.len });
        observer.completed_by_broker(head, used.wrapping_add(1));
        let layout = observer.layout();
        // One slot less is owed: the others move behind the new used.idx.
        let heads = observer.survivors().unwrap_or_default();
        let mut at = used.wrapping_add(1);
        for head in heads {
            step.memory.set_avail_slot(ring, layout.slot(at), head);
            at = at.wrapping_add(1);
        }
        if let Some(call) = self.session.ring(ring).and_then(|it| it.call) {
            step.out.push(Action::Signal(call));
        }
    }
}

/// Puts `head` into memory of the broker's own as the only request of a fresh ring. The descriptor table stays the guest's.
fn write_trial(memory: &mut dyn GuestMemory, private: FdSlot, layout: Layout, head: u16) {
    let slot = layout.available_slot(0);
    memory.write_private(private, TRIAL_AVAILABLE + slot, &head.to_le_bytes());
    memory.write_private(private, TRIAL_AVAILABLE, &AVAIL_F_NO_INTERRUPT.to_le_bytes());
    memory.write_private(private, TRIAL_AVAILABLE + 2, &1_u16.to_le_bytes());
}

/// Writes the error status where a block request keeps it: the last byte of its last writable buffer.
fn fail_blk_request(ring: u32, head: u16, memory: &mut dyn GuestMemory) -> bool {
    let Some(last) = last_writable(ring, head, memory) else { return false };
    let Some(at) = last.addr.checked_add(u64::from(last.len) - 1) else { return false };
    memory.write_guest(at, &[BLK_STATUS_IO_ERROR])
}

/// The last writable descriptor of a chain. The chain is hostile: loops and wild indices end the walk.
fn last_writable(ring: u32, head: u16, memory: &dyn GuestMemory) -> Option<Descriptor> {
    let first = memory.descriptor(ring, head);
    let mut last = None;
    let mut note = |descriptor: Descriptor| {
        if descriptor.flags & DESC_F_WRITE != 0 && descriptor.len > 0 {
            last = Some(descriptor);
        }
    };
    if first.flags & DESC_F_INDIRECT != 0 {
        let mut index = 0;
        for _ in 0..(first.len / 16).min(u32::from(SIZE_MAX)) {
            let mut bytes = [0; 16];
            let at = first.addr.checked_add(16 * u64::from(index))?;
            if u32::from(index) >= first.len / 16 || !memory.read_guest(at, &mut bytes) {
                break;
            }
            let descriptor = Descriptor::from_le_bytes(bytes);
            note(descriptor);
            if descriptor.flags & DESC_F_NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
    } else {
        let mut descriptor = first;
        for _ in 0..SIZE_MAX {
            note(descriptor);
            if descriptor.flags & DESC_F_NEXT == 0 {
                break;
            }
            descriptor = memory.descriptor(ring, descriptor.next);
        }
    }
    last
}
