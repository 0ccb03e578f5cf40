//! Rings: what is known of each, starting them, giving them to backends.

use serde::{Deserialize, Serialize};
use warmswap_wire::ring::{Layout, UsedElem};
use warmswap_wire::{Request, VringFd, VringState};
use warmswap_zoo::{Animal, loose};

use super::{Pair, Step};
use crate::drain::Drain;
use crate::event::{Action, BackendId};
use crate::failover::Phase;
use crate::journal::Entry;
use crate::link::{Link, LinkState, Purpose};
use crate::memory::RingPlace;
use crate::meter::RingMeter;
use crate::observer::{Knowledge, Observer};
use crate::time::Nanos;

/// A ring is looked at as if requests could come at this rate, per second, from one look to the next.
pub(super) const BURST_RATE: f64 = 100_000.0;

/// What the broker knows of a ring beyond what the VMM said.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RingState {
    /// Follows the ring from its start to its stop by the VMM, across failovers.
    pub(crate) observer: Option<Observer>,
    /// A backend serves it now.
    pub(crate) served: bool,
    /// It is being stopped.
    pub(crate) drain: Option<Drain>,
    /// Where the backend that was stopped said it stands, if it is to go on there itself: what it holds is not handed over.
    pub(super) goes_on_at: Option<u16>,
    /// What it owed could not be told; only the VMM can start it again.
    pub(crate) halted: bool,
    /// What was known of it when the VMM's stop had to be answered before its backend was proved quiet, or after it was halted. A
    /// ring that is started again goes on from this, or not at all.
    pub(super) abandoned: Option<Observer>,
    pub(super) observe_at: Nanos,
    /// Last completion, or the moment it became busy.
    pub(crate) progressed_at: Nanos,
    /// When it was last given a kick because it stood still.
    pub(super) kick_given_at: Nanos,
    /// When a look last found something completed, since the ring was given to the backend that serves it.
    pub(super) completed_at: Option<Nanos>,
    pub(super) idle_since: Option<Nanos>,
    pub(super) watched: bool,
    /// Entries per second, a decaying peak.
    #[serde(skip)]
    pub(super) rate: f64,
    /// Entries since then.
    pub(super) counted: u64,
    pub(super) counting_since: Nanos,
    pub(super) observed_at: Nanos,
    /// A kick has woken it, and it has not come to rest since.
    pub(super) woken_at: Option<Nanos>,
    /// Outlives stops and starts.
    #[serde(skip)]
    pub(crate) meter: RingMeter,
}

impl RingState {
    pub(super) fn size(&self) -> Option<Layout> {
        self.observer.as_ref().map(Observer::layout)
    }
}

impl Pair {
    /// Requests about one ring.
    pub(crate) fn ring_request(&mut self, request: &Request, need_reply: bool, step: &mut Step<'_>) {
        let code = request.code();
        let index = match request {
            Request::SetVringKick(VringFd { index, .. })
            | Request::SetVringCall(VringFd { index, .. })
            | Request::SetVringErr(VringFd { index, .. })
            | Request::SetVringBase(VringState { index, .. })
            | Request::SetVringEnable(VringState { index, .. }) => *index,
            Request::SetVringAddr(addr) => addr.index,
            _ => return,
        };
        let queues = self.offer.as_ref().map_or(0, |offer| offer.queues);
        if u64::from(index) >= queues {
            self.close_request_fds(request, step);
            let reason = format!(
                "the VMM uses ring {index}, the backends serve {queues}: give the backend more queues (num-queues=) or the VMM fewer"
            );
            self.refuse_request(code, &reason, need_reply, step);
            return;
        }
        let was_started = self.session.ring(index).is_some_and(|ring| ring.started);
        let had_call = self.session.ring(index).is_some_and(|ring| ring.call.is_some());
        self.session.record(request, step.out);
        if let (true, Request::SetVringAddr(_)) = (loose(Animal::AddressEarly), request) {
            let shadows = self.links.iter_mut().filter(|link| link.mirrors() && !link.touched);
            shadows.for_each(|link| link.tell(request, step.out));
        }
        let result = match request {
            Request::SetVringKick(_) if !was_started => self.start_ring(index, step),
            Request::SetVringKick(_) => {
                self.unwatch(index, step);
                self.forward_ring_request(index, request, step);
                Ok(())
            }
            Request::SetVringAddr(_) if was_started => {
                let result = self.attach_ring(index, step);
                self.forward_ring_request(index, request, step);
                result
            }
            Request::SetVringBase(_) | Request::SetVringAddr(_) => Ok(()),
            // Call and error descriptors start nothing: every backend has them, so that a failover need not send them.
            Request::SetVringCall(_) if !had_call && !loose(Animal::FirstCallLost) => {
                self.give_first_call(index, request, step);
                Ok(())
            }
            Request::SetVringCall(_) | Request::SetVringErr(_) => {
                let hears = |link: &Link| link.state == LinkState::Active || !loose(Animal::CallStale);
                let links = self.links.iter_mut().filter(|link| link.mirrors() && hears(link));
                links.for_each(|link| link.tell(request, step.out));
                Ok(())
            }
            _ => {
                self.forward_ring_request(index, request, step);
                Ok(())
            }
        };
        match result {
            Ok(()) => self.acknowledge(code, need_reply, 0, step),
            Err(reason) => self.refuse_request(code, &reason, need_reply, step),
        }
    }

    /// The first call of a ring. There are VMMs that start a ring before they give it one (QEMU): until then it is served with one of the
    /// broker's own, and what was completed meanwhile has interrupted nobody.
    fn give_first_call(&mut self, index: u32, request: &Request, step: &mut Step<'_>) {
        let served = self.rings.get(index as usize).is_some_and(|ring| ring.served);
        let serving = self.serving().filter(|_| served);
        for link in self.links.iter_mut().filter(|link| link.mirrors()) {
            if serving == Some(link.id) {
                link.ask(request, Purpose::Called { ring: index }, step.out);
            } else {
                link.tell(request, step.out);
            }
        }
    }

    /// From here on completions interrupt the guest; for those before it is interrupted now. One interrupt too many harms nobody.
    pub(crate) fn ring_called(&mut self, backend: BackendId, index: u32, step: &mut Step<'_>) {
        let served = self.rings.get(index as usize).is_some_and(|ring| ring.served);
        if served && self.serving() == Some(backend) {
            let call = self.session.ring(index).and_then(|ring| ring.call);
            call.into_iter().for_each(|fd| step.out.push(Action::Signal(fd)));
        }
    }

    /// What the VMM says of a ring that is served reaches the backend that serves it. One that is being stopped must not be started
    /// again by that: a kick, or that the ring is enabled, is told to whoever gets the ring next.
    fn forward_ring_request(&mut self, index: u32, request: &Request, step: &mut Step<'_>) {
        let starts = matches!(request, Request::SetVringKick(_) | Request::SetVringEnable(_));
        let starts = starts && !loose(Animal::RestartedWhileDrained);
        let takes = |ring: &RingState| ring.served && !(starts && ring.drain.is_some());
        if !self.rings.get(index as usize).is_some_and(takes) {
            return;
        }
        match request {
            Request::SetVringEnable(VringState { value, .. }) if *value != 0 => {
                if let Some(link) = self.serving().and_then(|id| self.link_mut(id)) {
                    link.ask(request, Purpose::Enabled, step.out);
                }
            }
            _ => self.tell_serving(request, step),
        }
    }

    /// A backend has seen that its rings are enabled. What the driver has kicked until then may be lost: there are backends that take a
    /// kick away and, as the ring is not enabled yet, do nothing (`vhost-user-backend`). One kick too many harms nobody.
    pub(crate) fn rings_enabled(&mut self, backend: BackendId, value: u64, step: &mut Step<'_>) {
        if self.serving() != Some(backend) {
            return;
        }
        if value != 0 {
            let entry = Entry::warning("RingRefused").with("backend", backend.0);
            step.out.journal(entry.with("next", "what its rings do decides"));
        }
        if loose(Animal::KickBeforeEnableLost) || loose(Animal::KickLost) {
            return;
        }
        for index in self.served_rings().into_iter().filter(|index| self.session.ring_enabled(*index)) {
            if let Some(kick) = self.session.ring(index).and_then(|ring| ring.kick) {
                step.out.push(Action::Signal(kick));
            }
        }
    }

    pub(super) fn ring_state(&mut self, index: u32) -> &mut RingState {
        let at = index as usize;
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, RingState::default);
        }
        &mut self.rings[at]
    }

    pub(super) fn attach_ring(&mut self, index: u32, step: &mut Step<'_>) -> Result<(), String> {
        let ring = self.session.ring(index).ok_or("the ring was never described")?;
        let size = ring.size.ok_or_else(|| format!("ring {index} is started without a size"))?;
        let addr = ring.addr.ok_or_else(|| format!("ring {index} is started without addresses"))?;
        let layout = u16::try_from(size)
            .ok()
            .and_then(Layout::new)
            .ok_or_else(|| format!("ring {index}: size {size} is no power of two"))?;
        let place = RingPlace { layout, descriptor: addr.descriptor, available: addr.available, used: addr.used };
        step.memory
            .attach(index, &place)
            .map_err(|error| format!("{error}; is the guest's RAM shared (QEMU: memory-backend-memfd,share=on)?"))
    }

    /// The VMM gave a kick descriptor: from here on the ring is to be served.
    fn start_ring(&mut self, index: u32, step: &mut Step<'_>) -> Result<(), String> {
        self.attach_ring(index, step)?;
        let ring = self.session.ring_mut(index).clone();
        let layout = Layout::new(ring.size.unwrap_or(0) as u16).expect("attach_ring has checked the size");
        // Whatever base the VMM names, only what lies between used.idx and avail.idx is owed: bases taken from avail.idx lose
        // it. When the VMM's last session ended, the slots from used.idx on were made to hold exactly that.
        let start = step.memory.used_idx(index);
        let asked = ring.base.unwrap_or(0) as u16;
        let avail = step.memory.avail_idx(index);
        let pending = avail.wrapping_sub(start);
        let now = step.now;
        // A driver that sets its ring up anew begins at zero; one that goes on may stand there as well.
        let used_before = || used_slots_hold_something(index, layout, step) && !loose(Animal::FullTurnForgotten);
        let goes_on = |it: &Observer| pending > 0 && (start != 0 || it.has_wrapped_to_zero(avail) && used_before());
        let abandoned = self.ring_state(index).abandoned.take().filter(goes_on);
        let abandoned = abandoned.filter(|_| !loose(Animal::AbandonedForgotten));
        let goes_on = abandoned.is_some();
        let observer = match abandoned {
            Some(observer) => self.resume_observer(index, observer, layout, step)?,
            None => Observer::new(layout, start, now),
        };
        let entry = Entry::info("RingStarted").with("ring", index).with("size", layout.size()).with("base", start);
        step.out.journal(entry.with("base_asked", asked).with("pending", pending).with("goes_on", goes_on));
        self.session.ring_mut(index).started = true;
        let mut meter = std::mem::take(&mut self.ring_state(index).meter);
        meter.start(now);
        *self.ring_state(index) = RingState {
            meter,
            observer: Some(observer),
            observe_at: now,
            observed_at: now,
            counting_since: now,
            progressed_at: now,
            // Until something is known of it, a ring is taken to be busy.
            rate: BURST_RATE,
            ..RingState::default()
        };
        let proved = self.failover.as_ref().is_none_or(|failover| failover.phase > Phase::Fencing);
        if goes_on && proved {
            // Its old backend is gone by now: the slots are made to say what is owed before anybody reads them.
            if let Err(reason) = self.collect_ring(index, false, step) {
                self.release_ring(index, true, step);
                return Err(format!("ring {index}: {reason}; reset the guest"));
            }
        }
        if self.rings.iter().all(|ring| !ring.halted) {
            self.halted = None;
        }
        self.serve_waiting_rings(step);
        if let Some(shadow) = self.shadow.filter(|id| self.link(*id).is_some_and(|link| link.mirrors())) {
            // The shadow's region is made now, not when every microsecond counts.
            self.has_region(shadow, step);
        }
        Ok(())
    }

    /// A ring that was stopped without proof goes on with what is known of it; without such knowledge it must not.
    fn resume_observer(
        &mut self,
        index: u32,
        mut observer: Observer,
        layout: Layout,
        step: &mut Step<'_>,
    ) -> Result<Observer, String> {
        if observer.layout() == layout && observer.knowledge() == Knowledge::Exact {
            // No driver submits to a stopped ring, so its indices cannot have gone round.
            observer.forgive_silence(step.now);
            return Ok(observer);
        }
        // Kept for the next try.
        self.ring_state(index).abandoned = Some(observer);
        Err(format!("what ring {index} owes is not known since its backend was lost; reset the guest"))
    }

    /// Gives the serving backend every ring that is to be served and is not.
    pub(crate) fn serve_waiting_rings(&mut self, step: &mut Step<'_>) {
        let Some(serving) = self.serving() else { return };
        if matches!(&self.failover, Some(failover) if failover.phase == Phase::Draining) {
            return;
        }
        let waiting = self.waiting_rings();
        if !waiting.is_empty() && self.has_region(serving, step) {
            self.hand_rings(serving, &waiting, Purpose::Enabled, step);
        }
    }

    /// Whether a backend has the in-flight region it needs before it is given rings; asks for one otherwise.
    pub(crate) fn has_region(&mut self, backend: BackendId, step: &mut Step<'_>) -> bool {
        let queues = self.offer.as_ref().map_or(1, |offer| offer.queues);
        let sizes = self.session.rings.iter().filter_map(|ring| ring.size);
        let size = u16::try_from(sizes.max().unwrap_or(0)).unwrap_or(0);
        let queues = u16::try_from(queues).unwrap_or(u16::MAX);
        let serves = self.serving() == Some(backend) && !self.served_rings().is_empty();
        let Some(link) = self.link_mut(backend) else { return true };
        if !serves {
            link.renew_region(size, step.out);
        }
        link.region_is_set(queues, size, step.out)
    }

    /// A region that rings waited for is there.
    pub(crate) fn rings_may_be_given(&mut self, step: &mut Step<'_>) {
        match &self.failover {
            Some(failover) if failover.phase == Phase::Handing => self.hand_over(step),
            Some(_) => {}
            None => self.serve_waiting_rings(step),
        }
    }

    /// Rings the VMM wants served that no backend serves.
    pub(crate) fn waiting_rings(&self) -> Vec<u32> {
        let state = |index: &u32| self.rings.get(*index as usize);
        self.session
            .started()
            .filter(|index| state(index).is_some_and(|ring| !ring.served && !ring.halted && ring.observer.is_some()))
            .collect()
    }

    /// Rings a backend serves.
    pub(crate) fn served_rings(&self) -> Vec<u32> {
        (0_u32..).zip(&self.rings).filter(|(_, ring)| ring.served).map(|(index, _)| index).collect()
    }

    /// Gives rings to a backend: clears what the last one left behind, describes them, starts them, and writes every kick and
    /// every call once, because nobody knows which of them the last backend has swallowed.
    pub(crate) fn hand_rings(&mut self, target: BackendId, rings: &[u32], purpose: Purpose, step: &mut Step<'_>) {
        let mut signals = Vec::new();
        // Whoever begins to serve hears of every change before it hears of its rings.
        if self.served_rings().is_empty() {
            self.leaving.clear();
        }
        for (at, index) in rings.iter().enumerate() {
            let last = at + 1 == rings.len();
            self.hand_ring(target, *index, if last { purpose } else { Purpose::Nobody }, step);
            let ring = self.session.ring_mut(*index);
            signals.extend(ring.kick.filter(|_| !loose(Animal::KickLost)));
            signals.extend(ring.call.filter(|_| !loose(Animal::CallLost)));
            let now = step.now;
            let state = self.ring_state(*index);
            state.served = true;
            state.drain = None;
            state.observe_at = now;
            state.progressed_at = now;
            state.completed_at = None;
        }
        if let Some(link) = self.link_mut(target) {
            link.state = LinkState::Active;
            link.touched = true;
            link.region_used = true;
        }
        signals.into_iter().for_each(|fd| step.out.push(Action::Signal(fd)));
    }

    fn hand_ring(&mut self, target: BackendId, index: u32, purpose: Purpose, step: &mut Step<'_>) {
        let own = self.ring_state(index).goes_on_at.take();
        let base = own.unwrap_or_else(|| step.memory.used_idx(index));
        let base = if loose(Animal::ReplayFromAvail) { step.memory.avail_idx(index) } else { base };
        // A polling backend leaves NO_NOTIFY behind, any backend a position that may suppress kicks for thousands of requests.
        if !loose(Animal::NoNotifyLeft) {
            step.memory.set_used_flags(index, 0);
        }
        if self.session.has_event_idx() && !loose(Animal::EventIdxLeft) {
            let avail = step.memory.avail_idx(index);
            step.memory.set_avail_event(index, avail);
        }
        let takes_over = self.failover.is_some();
        let enabled = u32::from(self.session.ring_enabled(index) && !loose(Animal::EnableForgotten));
        let mut ring = self.session.ring_mut(index).clone();
        if loose(Animal::KicksSwapped) {
            let neighbour = self.session.ring(index ^ 1).cloned().unwrap_or_default();
            (ring.kick, ring.call) = (neighbour.kick.or(ring.kick), neighbour.call.or(ring.call));
        }
        let Some(link) = self.link_mut(target) else { return };
        let fd = |fd| VringFd { index, fd };
        if !link.calls.contains(&index) {
            // A stop closes it. A completion without any makes some backends panic, so until the VMM gives one ours will do.
            let call = ring.call.or(link.private.map(|events| events.call));
            link.tell(&Request::SetVringCall(fd(call)), step.out);
        }
        link.tell(&Request::SetVringBase(VringState { index, value: u32::from(base) }), step.out);
        let told = loose(Animal::AddressEarly) && takes_over;
        if let Some(addr) = ring.addr.filter(|_| !told) {
            link.tell(&Request::SetVringAddr(addr), step.out);
        }
        link.tell(&Request::SetVringKick(fd(ring.kick)), step.out);
        let enable = Request::SetVringEnable(VringState { index, value: enabled });
        if purpose == Purpose::Nobody {
            link.tell(&enable, step.out);
        } else {
            link.ask(&enable, purpose, step.out);
        }
    }

    /// Memory changed: rings may lie elsewhere now.
    pub(crate) fn reattach_rings(&mut self, step: &mut Step<'_>) {
        let started: Vec<u32> = self.session.started().collect();
        for index in started {
            if let Err(reason) = self.attach_ring(index, step) {
                step.memory.detach(index);
                if let Some(observer) = self.ring_state(index).observer.as_mut() {
                    observer.memory_gone();
                }
                step.out.journal(Entry::error("RingUnreachable").with("ring", index).with("reason", reason));
            }
        }
    }

    /// Forgets a ring: the VMM has stopped it.
    ///
    /// `unproved`: its backend may still complete something; what is known of the ring is kept, as it is for a halted one.
    pub(crate) fn release_ring(&mut self, index: u32, unproved: bool, step: &mut Step<'_>) {
        if unproved {
            // What is in flight from here on can only be completed.
            self.observe(index, step);
        }
        self.unwatch(index, step);
        self.abandon_trials(index);
        step.memory.detach(index);
        let old = std::mem::take(self.ring_state(index));
        let state = self.ring_state(index);
        state.abandoned = if unproved || old.halted { old.observer } else { old.abandoned };
        state.meter = old.meter;
        state.meter.stop();
        self.session.ring_mut(index).started = false;
    }
}

/// Whether anything was ever completed in a ring: a driver that sets it up anew begins with zeroes.
fn used_slots_hold_something(index: u32, layout: Layout, step: &Step<'_>) -> bool {
    (0..layout.size()).any(|slot| step.memory.used_slot(index, slot) != UsedElem { id: 0, len: 0 })
}
