//! When a shadow is asked to read, and what follows from its answer.
//!
//! The canary uses the guest's first ring of a backend that serves none of the guest's rings, and gives it back stopped. While it is
//! under way the backend takes no other ring: a completion would go to wherever its ring lies at that moment.

use warmswap_wire::{DeviceType, ProtocolFeatures, REGIONS_MAX, Request, VringFd, VringState};

use super::{Pair, Step};
use crate::canary::{self, Canary, CanaryState};
use crate::event::{Action, BackendId, earliest};
use crate::failover::Phase;
use crate::journal::Entry;
use crate::link::{Link, LinkState, Purpose, Region};
use crate::memory::private_region;
use crate::time::Nanos;

/// The ring the canary borrows.
const RING: u32 = 0;

impl Pair {
    /// Gives a link memory of the broker's own, if it has room for one more region than the guest has.
    pub(crate) fn give_private_memory(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let guest = self.session.memory.len();
        if self.config.device != DeviceType::Blk || !self.config.canary {
            return;
        }
        let Some(link) = self.link_mut(backend) else { return };
        if link.private_memory.is_none() && link.has_room_for_private(guest) {
            link.private_memory = step.memory.make_private().ok();
        }
    }

    /// Begins a canary, if this backend can be asked for one, or as soon as it has what it needs for one.
    pub(crate) fn begin_canary(&mut self, backend: BackendId, step: &mut Step<'_>) -> bool {
        if self.link(backend).is_none_or(|link| link.private_memory.is_none() || !link.canary.possible) {
            return false;
        }
        if !self.canary_has_region(backend, step) {
            return self.link(backend).is_some_and(|link| link.canary_region == Region::Asked);
        }
        let config = self.offer.as_ref().map_or(&[][..], |offer| &offer.config);
        let Some(link) = self.links.iter_mut().find(|link| link.id == backend) else { return false };
        let (Some(private), Some(events), true) = (link.private_memory, link.private, link.canary.possible) else {
            return false;
        };
        if !canary::write_ring(step.memory, private, link.canary.number, config) {
            return false;
        }
        let poll_at = step.now + self.config.limits.canary_poll;
        link.canary = Canary { state: CanaryState::Reading, began: step.now, waited: Nanos(0), poll_at, ..link.canary };
        let state = |value| VringState { index: RING, value };
        let fd = |fd| VringFd { index: RING, fd: Some(fd) };
        link.lend_region(step.out);
        link.tell(&Request::SetVringNum(state(u32::from(canary::RING_SIZE))), step.out);
        link.tell(&Request::SetVringBase(state(0)), step.out);
        link.tell(&Request::SetVringAddr(canary::ring_addr(RING)), step.out);
        link.tell(&Request::SetVringCall(fd(events.call)), step.out);
        link.tell(&Request::SetVringKick(fd(events.probe)), step.out);
        link.tell(&Request::SetVringEnable(state(1)), step.out);
        step.out.push(Action::Signal(events.probe));
        true
    }

    /// Looks after canaries: what is due is begun, what is under way is looked at.
    pub(crate) fn poll_canaries(&mut self, step: &mut Step<'_>) {
        for at in 0..self.links.len() {
            let Some(link) = self.links.get(at) else { return };
            let (id, canary) = (link.id, link.canary);
            match canary.state {
                CanaryState::Reading if step.now >= canary.poll_at => self.look_at_canary(id, step),
                CanaryState::Resting if self.canary_due(link).is_some_and(|due| due <= step.now) => {
                    let began = self.begin_canary(id, step);
                    if let Some(link) = self.link_mut(id).filter(|_| !began) {
                        // The device has nothing to read.
                        link.canary.possible = false;
                    }
                }
                _ => {}
            }
        }
    }

    /// When the next canary of a link is due, if one is.
    fn canary_due(&self, link: &Link) -> Option<Nanos> {
        let free = self.shadow == Some(link.id) && self.failover.is_none() && link.private_memory.is_some();
        let free = free && link.canary.possible && !self.closing && link.canary_region != Region::Asked;
        let every = if self.wants_read_now() { Nanos(0) } else { self.config.limits.canary_every };
        (free && link.state == LinkState::Ready).then(|| link.canary.began + every)
    }

    fn look_at_canary(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let waiting = self.failover.is_some();
        let hurried = waiting || self.asked.is_some() || self.wants_read_now();
        let Some(link) = self.link_mut(backend) else { return };
        let Some(private) = link.private_memory else { return };
        let waited = step.now.since(link.canary.began);
        match canary::status(step.memory, private, link.canary.number) {
            Some(0) => {
                link.canary.state = CanaryState::Stopping;
                link.canary.took = Some(waited);
                let (first, began) = (link.canary.number == 0, link.canary.began);
                link.warming_at = step.now;
                let request = Request::GetVringBase(VringState { index: RING, value: 0 });
                link.ask(&request, Purpose::Canary, step.out);
                // As good a sign of life as any.
                link.pinged_at = Some(step.now);
                // The first pays for what is put off until then.
                if !first && self.shadow == Some(backend) {
                    self.policy.read(began, waited, step.now);
                }
            }
            Some(status) => {
                self.canary_failed(backend, &format!("its canary read ended with status {status}"), step);
            }
            None if waited >= limits.stall || (waiting && waited >= limits.hang) => {
                self.canary_failed(backend, &format!("its canary read was not completed for {waited}"), step);
            }
            // Half as long again each time: a slow store must not cost a processor, a failover waits for this.
            None => {
                link.canary.waited = waited;
                let poll = if hurried { limits.poll } else { limits.canary_poll };
                link.canary.poll_at = step.now + poll.max(Nanos(waited.0 / 2)).min(Nanos(limits.hang.0 / 8));
            }
        }
    }

    fn canary_failed(&mut self, backend: BackendId, reason: &str, step: &mut Step<'_>) {
        step.out.journal(Entry::warning("CanaryFailed").with("backend", backend.0).with("reason", reason));
        self.counters.canaries_failed += 1;
        self.lose_shadow(backend, reason, step);
    }

    /// The canary's ring is stopped: it is the guest's again.
    pub(crate) fn canary_stopped(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let ring = self.session.ring(RING).cloned().unwrap_or_default();
        let Some(link) = self.link_mut(backend).filter(|link| link.canary.state == CanaryState::Stopping) else {
            return;
        };
        link.canary.state = CanaryState::Resting;
        link.canary.number += 1;
        link.pinged_at = None;
        let fd = |fd| VringFd { index: RING, fd: Some(fd) };
        let state = |value| VringState { index: RING, value };
        link.tell(&Request::SetVringEnable(state(0)), step.out);
        let others = (0_u32..).zip(&self.session.rings).skip(1);
        let sizes: Vec<Request> = others
            .filter_map(|(index, ring)| Some(Request::SetVringNum(VringState { index, value: ring.size? })))
            .collect();
        let Some(link) = self.links.iter_mut().find(|link| link.id == backend) else { return };
        link.restore_region(step.out);
        // What the VMM said of other rings meanwhile.
        sizes.iter().for_each(|request| link.tell(request, step.out));
        let restored = [
            ring.size.map(|size| Request::SetVringNum(state(size))),
            ring.call.map(|call| Request::SetVringCall(fd(call))),
            ring.err.map(|err| Request::SetVringErr(fd(err))),
        ];
        restored.iter().flatten().for_each(|request| link.tell(request, step.out));
        let was = link.state;
        match was {
            LinkState::Warming => self.ready(backend, step),
            LinkState::Ready if self.primary == Some(backend) => self.serve_waiting_rings(step),
            LinkState::Ready => self.shadow_became_ready(step),
            _ => {}
        }
    }

    /// The shadow, if rings can be given to it at this moment.
    pub(crate) fn ready_shadow(&self) -> Option<BackendId> {
        self.shadow.filter(|id| self.link(*id).is_some_and(|it| it.state == LinkState::Ready && it.is_free()))
    }

    /// Why the shadow cannot be relied upon although it is ready: it has not brought its canary home in time.
    pub(crate) fn canary_overdue(&self) -> Option<String> {
        let waited = self.shadow.and_then(|id| self.link(id)).filter(|link| !link.is_free())?.canary.waited;
        (waited >= self.config.limits.hang).then(|| format!("the shadow's canary read has been waiting for {waited}"))
    }

    /// A backend's memory table is about to be replaced: a read under way would end in memory that is gone.
    pub(crate) fn give_up_canaries(&mut self, step: &mut Step<'_>) {
        let busy: Vec<BackendId> = self.links.iter().filter(|link| !link.is_free()).map(|link| link.id).collect();
        busy.into_iter().for_each(|id| self.lose_shadow(id, "the VMM replaced its memory during a canary read", step));
    }

    pub(crate) fn next_canary(&self) -> Option<Nanos> {
        self.links.iter().fold(None, |next, link| match link.canary.state {
            CanaryState::Reading => earliest(next, Some(link.canary.poll_at)),
            CanaryState::Resting => earliest(next, self.canary_due(link)),
            CanaryState::Stopping => next,
        })
    }

    /// Whether a new shadow is asked for a canary before it counts as ready: not when the guest is waiting for it.
    pub(crate) fn wants_first_canary(&self, backend: BackendId) -> bool {
        let waited_for = self.failover.as_ref().is_some_and(|failover| failover.phase >= Phase::Fencing);
        self.shadow == Some(backend) && !waited_for
    }
}

impl Link {
    /// Whether nothing of the broker's own is under way on it.
    pub(crate) fn is_free(&self) -> bool {
        self.canary.state == CanaryState::Resting
    }

    /// Whether one more region than the guest has can be given to it.
    fn has_room_for_private(&self, guest_regions: usize) -> bool {
        // Of memory slots one is kept for this: see `Link::negotiate`.
        self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) || guest_regions < REGIONS_MAX
    }

    /// A new memory table as this link must hear it, and what it must hear then, so that it keeps memory of the broker's own.
    pub(crate) fn adapted(&mut self, request: &Request) -> (Option<Request>, Option<Request>) {
        let (Request::SetMemTable(regions), Some(private)) = (request, self.private_memory) else {
            return (None, None);
        };
        let region = private_region();
        if self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            (None, Some(Request::AddMemReg { region, fd: Some(private) }))
        } else if regions.len() < REGIONS_MAX {
            let all = regions.iter().copied().chain([(region, private)]);
            (Some(Request::SetMemTable(all.collect())), None)
        } else {
            // It has to do without. The descriptor stays with the link until that ends.
            self.canary.possible = false;
            (None, None)
        }
    }
}
