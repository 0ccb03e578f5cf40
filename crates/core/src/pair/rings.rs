//! Rings: starting, observing and stopping them.

use warmswap_wire::ring::{Layout, USED_F_NO_NOTIFY};
use warmswap_wire::{Request, VringFd, VringState};

use super::failover::slots_hold;
use super::vmm::Ticket;
use super::{Pair, Step};
use crate::drain::{Drain, DrainMethod, DrainState};
use crate::event::{Action, BackendId, earliest};
use crate::failover::{Kind, Phase};
use crate::journal::Entry;
use crate::link::{LinkState, Purpose};
use crate::memory::RingPlace;
use crate::observer::{Knowledge, Observation, Observer};
use crate::time::Nanos;

/// A ring is looked at as if requests could come at this rate, per second, from one look to the next.
const BURST_RATE: f64 = 100_000.0;
/// A peak of the rate is remembered for this long, in seconds, before it counts half.
const RATE_MEMORY_S: f64 = 0.5;
/// Part of the ring that may pass between two looks at the rate that is reckoned with.
const RING_PART: f64 = 2.0;

/// A hang is left alone for so many times the time it was found in, while it is not known what is owed.
const PUT_OFF: u64 = 8;

/// What the broker knows of a ring beyond what the VMM said.
#[derive(Debug, Default)]
pub(crate) struct RingState {
    /// Follows the ring from its start to its stop by the VMM, across failovers.
    pub(crate) observer: Option<Observer>,
    /// A backend serves it now.
    pub(crate) served: bool,
    /// It is being stopped.
    pub(crate) drain: Option<Drain>,
    /// What it owed could not be told; only the VMM can start it again.
    pub(crate) halted: bool,
    /// What was known of it when the VMM's stop had to be answered before its backend was proved quiet, or after it was halted. A
    /// ring that is started again goes on from this, or not at all.
    abandoned: Option<Observer>,
    observe_at: Nanos,
    /// Last completion, or the moment it became busy.
    pub(crate) progressed_at: Nanos,
    idle_since: Option<Nanos>,
    watched: bool,
    /// Entries per second, a decaying peak.
    rate: f64,
    observed_at: Nanos,
}

impl RingState {
    fn size(&self) -> Option<Layout> {
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
            let mut fds = Vec::new();
            request.encode(warmswap_wire::HeaderFlags::empty(), &mut Vec::new(), &mut fds);
            fds.into_iter().for_each(|fd| step.out.push(Action::Close(fd)));
            let reason = format!(
                "the VMM uses ring {index}, the backends serve {queues}: give the backend more queues (num-queues=) or the VMM fewer"
            );
            self.refuse_request(code, &reason, need_reply, step);
            return;
        }
        let was_started = self.session.ring(index).is_some_and(|ring| ring.started);
        self.session.record(request, step.out);
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
            Request::SetVringCall(_) | Request::SetVringErr(_) => {
                self.links.iter_mut().filter(|link| link.mirrors()).for_each(|link| link.tell(request, step.out));
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

    fn forward_ring_request(&mut self, index: u32, request: &Request, step: &mut Step<'_>) {
        if self.rings.get(index as usize).is_some_and(|ring| ring.served) {
            self.tell_serving(request, step);
        }
    }

    fn ring_state(&mut self, index: u32) -> &mut RingState {
        let at = index as usize;
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, RingState::default);
        }
        &mut self.rings[at]
    }

    fn attach_ring(&mut self, index: u32, step: &mut Step<'_>) -> Result<(), String> {
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
        let pending = step.memory.avail_idx(index).wrapping_sub(start);
        let now = step.now;
        let abandoned = self.ring_state(index).abandoned.take().filter(|_| pending > 0 && start != 0);
        let goes_on = abandoned.is_some();
        let observer = match abandoned {
            Some(observer) => self.resume_observer(index, observer, layout, step)?,
            None => Observer::new(layout, start, now),
        };
        let entry = Entry::info("RingStarted").with("ring", index).with("size", layout.size()).with("base", start);
        step.out.journal(entry.with("base_asked", asked).with("pending", pending).with("goes_on", goes_on));
        self.session.ring_mut(index).started = true;
        *self.ring_state(index) = RingState {
            observer: Some(observer),
            observe_at: now,
            observed_at: now,
            progressed_at: now,
            // Until something is known of it, a ring is taken to be busy.
            rate: BURST_RATE,
            ..RingState::default()
        };
        let proved = self.failover.as_ref().is_none_or(|failover| failover.phase > Phase::Fencing);
        if goes_on && proved {
            // Its old backend is gone by now: the slots are made to say what is owed before anybody reads them.
            if let Err(reason) = self.collect_ring(index, step) {
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
            self.hand_rings(serving, &waiting, Purpose::Nobody, step);
        }
    }

    /// Whether a backend has the in-flight region it needs before it is given rings; asks for one otherwise.
    pub(crate) fn has_region(&mut self, backend: BackendId, step: &mut Step<'_>) -> bool {
        let queues = self.offer.as_ref().map_or(1, |offer| offer.queues);
        let sizes = self.session.rings.iter().filter_map(|ring| ring.size);
        let size = u16::try_from(sizes.max().unwrap_or(0)).unwrap_or(0);
        let queues = u16::try_from(queues).unwrap_or(u16::MAX);
        self.link_mut(backend).is_none_or(|link| link.region_is_set(queues, size, step.out))
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
        for (at, index) in rings.iter().enumerate() {
            let last = at + 1 == rings.len();
            self.hand_ring(target, *index, if last { purpose } else { Purpose::Nobody }, step);
            let ring = self.session.ring_mut(*index);
            signals.extend(ring.kick);
            signals.extend(ring.call);
            let now = step.now;
            let state = self.ring_state(*index);
            state.served = true;
            state.drain = None;
            state.observe_at = now;
            state.progressed_at = now;
        }
        if let Some(link) = self.link_mut(target) {
            link.state = LinkState::Active;
            link.touched = true;
        }
        signals.into_iter().for_each(|fd| step.out.push(Action::Signal(fd)));
    }

    fn hand_ring(&mut self, target: BackendId, index: u32, purpose: Purpose, step: &mut Step<'_>) {
        let base = step.memory.used_idx(index);
        // A polling backend leaves NO_NOTIFY behind, any backend a position that may suppress kicks for thousands of requests.
        step.memory.set_used_flags(index, 0);
        if self.session.has_event_idx() {
            let avail = step.memory.avail_idx(index);
            step.memory.set_avail_event(index, avail);
        }
        let enabled = u32::from(self.session.ring_enabled(index));
        let ring = self.session.ring_mut(index).clone();
        let Some(link) = self.link_mut(target) else { return };
        let fd = |fd| VringFd { index, fd };
        if !link.calls.contains(&index) {
            // A stop closes it. A completion without any makes some backends panic, so until the VMM gives one ours will do.
            let call = ring.call.or(link.private.map(|events| events.call));
            link.tell(&Request::SetVringCall(fd(call)), step.out);
        }
        link.tell(&Request::SetVringBase(VringState { index, value: u32::from(base) }), step.out);
        if let Some(addr) = ring.addr {
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
        self.unwatch(index, step);
        self.abandon_trials(index);
        step.memory.detach(index);
        let old = std::mem::take(self.ring_state(index));
        self.ring_state(index).abandoned = if unproved || old.halted { old.observer } else { old.abandoned };
        self.session.ring_mut(index).started = false;
    }

    // --- observing ---------------------------------------------------------------------------------------------------------

    pub(crate) fn observe_due(&mut self, step: &mut Step<'_>) {
        for index in 0..self.rings.len() {
            let ring = &self.rings[index];
            if ring.observer.is_some() && ring.observe_at <= step.now {
                self.observe(u32::try_from(index).expect("bounded by RINGS_MAX"), step);
            }
        }
        self.check_progress(step);
    }

    /// Looks at a ring now and decides when to look again.
    pub(crate) fn observe(&mut self, index: u32, step: &mut Step<'_>) {
        let now = step.now;
        // Completions come from a backend that serves the ring and lives: one that is being killed makes no 65 536 of them.
        let killed = self.failover.as_ref().is_some_and(|failover| failover.phase == Phase::Fencing);
        let state = &mut self.rings[index as usize];
        let moves = state.served && !killed;
        let Some(observer) = &mut state.observer else { return };
        if !moves {
            observer.forgive_silence(now);
        }
        let before = observer.knowledge();
        let seen = observer.observe(now, index, step.memory);
        let after = observer.knowledge();
        let was_idle = observer.submissions() == u64::from(seen.submitted);
        self.counters.observations += 1;
        if seen.completed > 0 || (seen.submitted > 0 && (seen.outstanding == seen.submitted || was_idle)) {
            state.progressed_at = now;
        }
        if seen.completed > 0 {
            self.stall_max = self.config.limits.stall;
            self.put_off_since = None;
        }
        self.note_knowledge(index, before, after, &seen, step);
        self.schedule(index, &seen, step);
    }

    fn note_knowledge(
        &mut self,
        index: u32,
        before: Knowledge,
        after: Knowledge,
        seen: &Observation,
        step: &mut Step<'_>,
    ) {
        if seen.lost.is_some() {
            self.counters.observer_gaps += 1;
        }
        match (before, after) {
            (_, Knowledge::Violated(violation)) if before != after => {
                step.out.journal(
                    Entry::error("RingViolated")
                        .with("ring", index)
                        .with("reason", violation.to_string())
                        .with("next", "a crash of its backend would halt the device until the VMM resets the ring"),
                );
            }
            (Knowledge::Exact, Knowledge::Inexact(gap)) => {
                let entry = Entry::warning("ObserverInexact").with("ring", index).with("reason", gap.to_string());
                step.out.journal(entry.with("next", "resynchronising"));
            }
            (Knowledge::Inexact(_), Knowledge::Exact) => {
                step.out.journal(Entry::info("ObserverExact").with("ring", index));
            }
            _ => {}
        }
    }

    /// The next look comes before half of the ring can have passed, however busy it is; an idle ring is watched by its
    /// kick, and looked at rarely.
    fn schedule(&mut self, index: u32, seen: &Observation, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let now = step.now;
        let failover_began = self.failover.as_ref().map(|failover| failover.entered);
        let event_idx = self.session.has_event_idx();
        let kick = self.session.ring(index).and_then(|ring| ring.kick);
        let ring = &mut self.rings[index as usize];
        let elapsed = now.since(ring.observed_at).0.max(1) as f64 / 1e9;
        ring.observed_at = now;
        let moved = f64::from(seen.submitted.max(seen.completed));
        ring.rate = (moved / elapsed).max(ring.rate * (-elapsed / RATE_MEMORY_S).exp2());
        let waited = failover_began.or(ring.drain.map(|drain| drain.began));
        if let Some(began) = waited {
            ring.observe_at = now + limits.poll_interval(now.since(began));
            return;
        }
        let size = f64::from(ring.size().map_or(1, Layout::size));
        let period = Nanos((size / RING_PART / ring.rate.max(BURST_RATE) * 1e9) as u64);
        let period = period.clamp(limits.observe_min, limits.observe_max);
        let quiet = moved == 0.0 && seen.outstanding == 0;
        if !quiet {
            ring.idle_since = None;
            ring.observe_at = now + period;
            return;
        }
        let idle_since = *ring.idle_since.get_or_insert(now);
        let rested = now.since(idle_since) >= limits.idle_after;
        match kick {
            // A backend may read a kick before it is seen here, so how long nothing is looked at grows with the rest.
            Some(_) if ring.watched => ring.observe_at = now + now.since(idle_since).min(limits.observe_idle),
            Some(kick) if rested && will_kick(index, event_idx, step) => {
                ring.watched = true;
                // Looked at once more very soon: a kick may have been swallowed before the watch was in place.
                ring.observe_at = now + limits.observe_min;
                step.out.push(Action::WatchKick { ring: index, kick });
            }
            _ => {
                ring.observe_at = now + period;
            }
        }
    }

    pub(crate) fn ring_kicked(&mut self, index: u32, step: &mut Step<'_>) {
        if let Some(ring) = self.rings.get_mut(index as usize).filter(|ring| ring.watched) {
            ring.watched = false;
            ring.idle_since = None;
            ring.observe_at = step.now;
        }
    }

    fn unwatch(&mut self, index: u32, step: &mut Step<'_>) {
        if let Some(ring) = self.rings.get_mut(index as usize).filter(|ring| ring.watched) {
            ring.watched = false;
            step.out.push(Action::UnwatchKick { ring: index });
        }
    }

    pub(crate) fn next_observation(&self) -> Option<Nanos> {
        let observed = self.rings.iter().filter(|ring| ring.observer.is_some());
        observed.fold(None, |next, ring| earliest(next, Some(ring.observe_at)))
    }

    /// Since when requests have been waiting without any completion, on the ring that waits longest.
    pub(crate) fn waiting_since(&self) -> Option<Nanos> {
        let waits = |(index, ring): &(u32, &RingState)| {
            // One that is not followed any more shows no progress either.
            let followed = |it: &&Observer| !matches!(it.knowledge(), Knowledge::Violated(_));
            let owes = ring.observer.as_ref().filter(followed).is_some_and(|it| it.outstanding() > 0);
            ring.served && owes && self.config.device.carries_requests(*index)
        };
        (0_u32..).zip(&self.rings).filter(waits).map(|(_, ring)| ring.progressed_at).min()
    }

    /// A primary that completes nothing while requests wait is asked for a sign of life; one that gives it may still be stuck.
    fn check_progress(&mut self, step: &mut Step<'_>) {
        if self.failover.is_some() || self.closing {
            return;
        }
        let (Some(since), Some(primary)) = (self.waiting_since(), self.primary) else { return };
        let limits = self.config.limits;
        let waited = step.now.since(since);
        let half = Nanos(limits.hang.0 / 2);
        let Some(link) = self.link_mut(primary) else { return };
        if waited >= half && link.heard_at < since + half && link.is_alive() {
            link.ping(step.now, step.out);
        }
        let silent = link.pinged_at.is_some_and(|at| step.now.since(at) >= half);
        if waited >= limits.hang && silent {
            let cause = format!("nothing was completed for {waited} and its control channel is silent");
            self.hang_found(primary, cause, step);
        } else if waited >= self.stall_max {
            // Once: if the next primary stalls as well, the fault lies below both.
            self.stall_max = Nanos(self.stall_max.0.saturating_mul(8));
            let cause = format!("it answers, but has completed nothing for {waited} while requests wait");
            self.hang_found(primary, cause, step);
        }
    }

    /// A living primary is fenced only where it is known what it owes: killing it would turn a hang, which may pass, into a halt.
    pub(crate) fn hang_found(&mut self, primary: BackendId, cause: String, step: &mut Step<'_>) {
        let since = *self.put_off_since.get_or_insert(step.now);
        let patience = Nanos(self.config.limits.hang.0.saturating_mul(PUT_OFF)).min(self.config.limits.stall);
        let patient = step.now.since(since) < patience;
        // One that was never given a ring owes nothing.
        let patient = patient && self.link(primary).is_some_and(|link| link.touched);
        let Some(reason) = self.exactness_refusal().filter(|_| patient) else {
            self.put_off_since = None;
            return self.begin_failover(Kind::Hang, cause, primary, None, false, step);
        };
        if since == step.now {
            step.out.journal(
                Entry::warning("FailoverPutOff")
                    .with("backend", primary.0)
                    .with("cause", cause)
                    .with("reason", reason)
                    .with("next", "the primary is left alone for a while: it may come back"),
            );
        }
        let now = step.now;
        if let Some(link) = self.link_mut(primary) {
            // It is asked again.
            link.pinged_at = None;
            link.heard_at = now;
        }
    }

    // --- stopping ----------------------------------------------------------------------------------------------------------

    /// Keeps new work from the backend on these rings, then waits for what it holds.
    pub(crate) fn divert(&mut self, backend: BackendId, rings: &[u32], step: &mut Step<'_>) {
        let (method, now) = (self.config.drain, step.now);
        for index in rings {
            let state = self.ring_state(*index);
            state.drain = Some(Drain::new(now));
            state.observe_at = now;
        }
        let Some(link) = self.link_mut(backend) else { return };
        for (at, index) in rings.iter().enumerate() {
            let index = *index;
            let request = match method {
                DrainMethod::PrivateKick => {
                    Request::SetVringKick(VringFd { index, fd: link.private.map(|it| it.kick) })
                }
                DrainMethod::Disable => Request::SetVringEnable(VringState { index, value: 0 }),
                DrainMethod::Stop => continue,
            };
            if at + 1 == rings.len() {
                link.ask(&request, Purpose::Divert, step.out);
            } else {
                link.tell(&request, step.out);
            }
        }
        if method == DrainMethod::Stop {
            rings.iter().for_each(|index| self.ask_base(backend, *index, step));
        }
    }

    pub(crate) fn diverted(&mut self, backend: BackendId, step: &mut Step<'_>) {
        if self.serving() != Some(backend) {
            return;
        }
        let now = step.now;
        self.rings.iter_mut().filter_map(|ring| ring.drain.as_mut()).for_each(|drain| drain.diverted(now));
        self.poll_drains(step);
    }

    fn ask_base(&mut self, backend: BackendId, index: u32, step: &mut Step<'_>) {
        if let Some(drain) = &mut self.ring_state(index).drain {
            drain.state = DrainState::Asked;
        }
        let Some(link) = self.link_mut(backend) else { return };
        let request = Request::GetVringBase(VringState { index, value: 0 });
        link.ask(&request, Purpose::Stop { ring: index }, step.out);
    }

    pub(crate) fn poll_drains(&mut self, step: &mut Step<'_>) {
        let Some(serving) = self.serving() else { return };
        let event_idx = self.session.has_event_idx();
        for index in 0..self.rings.len() {
            let ring = &mut self.rings[index];
            let (Some(layout), Some(drain)) = (ring.size(), ring.drain.as_mut()) else { continue };
            if drain.state != DrainState::Settling {
                continue;
            }
            let at = u32::try_from(index).expect("bounded by RINGS_MAX");
            // Four times the mean time a request takes (Little's law), within reason.
            let outstanding = f64::from(ring.observer.as_ref().map_or(0, Observer::outstanding));
            let mean = if ring.rate > 0.0 { outstanding / ring.rate } else { 1e-3 };
            let window = Nanos((4e9 * mean) as u64).clamp(Nanos::from_micros(300), Nanos::from_millis(20));
            if drain.at_rest(step.now, at, layout, event_idx, window, step.memory) {
                self.ask_base(serving, at, step);
            }
        }
    }

    /// The backend claims to have stopped a ring.
    pub(crate) fn stop_answered(&mut self, backend: BackendId, ring: u32, named: u32, base: u32, step: &mut Step<'_>) {
        if self.serving() != Some(backend) {
            return;
        }
        let used = step.memory.used_idx(ring);
        let asked = self.ring_state(ring).drain.is_some_and(|drain| drain.state == DrainState::Asked);
        let believable = named == ring && base == u32::from(used) && !self.owes_out_of_order(ring, step);
        let Some(drain) = self.ring_state(ring).drain.as_mut() else { return };
        if asked && believable {
            drain.state = DrainState::Stopped { base: used };
            self.ring_stopped(step);
            return;
        }
        self.counters.drains_unverified += 1;
        step.out.journal(
            Entry::warning("DrainUnverified")
                .with("ring", ring)
                .with("base", base)
                .with("used_idx", used)
                .with("next", "the primary is fenced and treated as crashed"),
        );
        let cause = format!("it answered the stop of ring {ring} with base {base} while used.idx is {used}");
        self.drain_failed(&cause, step);
    }

    /// Whether something older than what the slots from `used.idx` on hold is still owed: whoever took requests out of the ring in
    /// order and stands at `used.idx` cannot owe it.
    fn owes_out_of_order(&mut self, index: u32, step: &mut Step<'_>) -> bool {
        if self.rings.get(index as usize).is_none_or(|ring| ring.observer.is_none()) {
            return false;
        }
        self.observe(index, step);
        let observer = self.rings[index as usize].observer.as_ref();
        observer.is_some_and(|it| {
            it.survivors().is_ok_and(|heads| !slots_hold(index, it.layout(), it.used_idx(), &heads, step))
        })
    }

    /// A drain did not come out: fence the backend instead.
    fn drain_failed(&mut self, cause: &str, step: &mut Step<'_>) {
        if self.failover.is_some() {
            self.enter_fencing(cause, step);
        } else if let Some(victim) = self.primary {
            self.begin_failover(Kind::Crash, cause.to_owned(), victim, None, false, step);
        }
    }

    fn ring_stopped(&mut self, step: &mut Step<'_>) {
        let stopped = |ring: &RingState| {
            !ring.served || ring.drain.is_some_and(|drain| matches!(drain.state, DrainState::Stopped { .. }))
        };
        let all = self.rings.iter().all(stopped);
        if self.failover.is_some() {
            if all {
                self.drained(step);
            }
        } else if self.closing {
            if all {
                self.finish_close(step);
            }
        } else if let Some(Ticket::Stop { ring, .. }) = self.ticket {
            self.finish_vmm_stop(ring, step);
        }
    }

    /// GET_VRING_BASE from the VMM.
    pub(crate) fn vmm_stops_ring(&mut self, index: u32, step: &mut Step<'_>) {
        let started = self.session.ring(index).is_some_and(|ring| ring.started);
        let served = self.rings.get(index as usize).is_some_and(|ring| ring.served);
        let deadline = step.now + self.config.limits.answer_max;
        if !started {
            let base = self.session.ring(index).and_then(|ring| ring.base).unwrap_or(0) as u16;
            self.reply_base(index, base, step);
        } else if !served && self.is_quiet(index) {
            // Nobody serves it: it is as quiet as it can be.
            self.finish_vmm_stop(index, step);
        } else {
            self.ticket = Some(Ticket::Stop { ring: index, deadline });
            self.end_trial_on(index, step);
            self.resume_vmm_stop(step);
        }
    }

    /// Whether every backend that was given a ring which nobody serves now is proved harmless.
    fn is_quiet(&self, index: u32) -> bool {
        match self.failover.as_ref().map(|failover| failover.phase) {
            None | Some(Phase::Handing) => true,
            Some(Phase::Isolating) => !self.is_tried(index),
            Some(_) => false,
        }
    }

    /// Goes on with a stop the VMM waits for, where no failover is in its way.
    pub(crate) fn resume_vmm_stop(&mut self, step: &mut Step<'_>) {
        let Some(Ticket::Stop { ring, .. }) = self.ticket else { return };
        if self.failover.is_some() {
            return;
        }
        match self.serving() {
            Some(serving) if self.ring_state(ring).served => self.divert(serving, &[ring], step),
            _ => self.finish_vmm_stop(ring, step),
        }
    }

    /// Answers the VMM's stop: nothing serves the ring, and its slots from `used.idx` on hold what is owed.
    pub(crate) fn finish_vmm_stop(&mut self, index: u32, step: &mut Step<'_>) {
        let base = step.memory.used_idx(index);
        step.out.journal(Entry::info("RingStopped").with("ring", index).with("base", base));
        self.ticket = None;
        let fencing = self.failover.as_ref().is_some_and(|failover| failover.phase <= Phase::Fencing);
        let unproved = fencing || self.is_tried(index);
        self.release_ring(index, unproved, step);
        self.reply_base(index, base, step);
        if self.rings.iter().all(|ring| !ring.halted) {
            self.halted = None;
        }
    }

    /// A stop has missed its bound.
    pub(crate) fn stop_overdue(&mut self, index: u32, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let served = self.ring_state(index).served;
        match self.failover.as_ref().map(|failover| failover.phase) {
            // A living backend serves the ring and must be stopped: the new primary at once, an old one that is being drained, or a
            // new one that has not acknowledged its rings yet, when that is decided. Both are bounded.
            Some(Phase::Confirming) if served => {
                self.extend_stop(step.now + limits.answer_max);
                return self.settle(false, step);
            }
            Some(Phase::Draining | Phase::Resuming) if served => {
                return self.extend_stop(step.now + limits.answer_max);
            }
            _ => {}
        }
        if self.failover.is_some() {
            // The proof is not there. The VMM is answered, and nothing is ever written to that ring again.
            self.counters.answered_from_record += 1;
            step.out.journal(
                Entry::error("AnsweredFromRecord")
                    .with("request", "GET_VRING_BASE")
                    .with("ring", index)
                    .with("reason", "the backend that had the ring is not proved quiet yet; the ring is abandoned"),
            );
            self.finish_vmm_stop(index, step);
            return;
        }
        let Some(drain) = self.ring_state(index).drain else { return self.finish_vmm_stop(index, step) };
        let patience = drain.began + limits.drain_max;
        if drain.state == DrainState::Diverting {
            // Killing it and proving it gone takes a few milliseconds more.
            self.extend_stop(step.now + limits.answer_max + limits.answer_max);
            self.drain_failed("its control channel is silent while the VMM stops a ring", step);
        } else if step.now < patience {
            self.extend_stop(patience);
        } else {
            self.extend_stop(step.now + limits.answer_max);
            self.drain_failed("it did not complete what it holds while the VMM stops a ring", step);
        }
    }

    fn extend_stop(&mut self, until: Nanos) {
        if let Some(Ticket::Stop { deadline, .. }) = &mut self.ticket {
            *deadline = until;
        }
    }
}

/// Whether the driver will kick for its next request.
fn will_kick(index: u32, event_idx: bool, step: &Step<'_>) -> bool {
    if event_idx {
        step.memory.avail_event(index) == step.memory.avail_idx(index)
    } else {
        step.memory.used_flags(index) & USED_F_NO_NOTIFY == 0
    }
}
