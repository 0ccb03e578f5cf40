//! Stopping rings: for a failover, for the VMM that asks, for the VMM that has gone.

use warmswap_wire::{Request, VringFd, VringState};
use warmswap_zoo::{Animal, loose};

use super::failover::slots_hold;
use super::rings::RingState;
use super::vmm::Ticket;
use super::{Pair, Step};
use crate::drain::{Drain, DrainMethod, DrainState};
use crate::event::BackendId;
use crate::failover::{Kind, Phase};
use crate::journal::Entry;
use crate::link::Purpose;
use crate::observer::Observer;
use crate::time::Nanos;

impl Pair {
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
        let soon = now + self.config.limits.poll;
        for ring in &mut self.rings {
            if let Some(drain) = &mut ring.drain {
                drain.diverted(now);
                ring.observe_at = soon;
            }
        }
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
        let drain = self.ring_state(ring).drain;
        // There are backends that give up waiting for what they hold, and name where they began (SPDK): that may be `used.idx` by chance.
        let took = drain.map_or(Nanos(0), |drain| step.now.since(drain.began));
        let late = took > self.config.limits.drain_max && !loose(Animal::LateStopBelieved);
        let outstanding = drain.is_some_and(|drain| drain.state == DrainState::Asked);
        let asked = outstanding && !late;
        let believable = named == ring && base == u32::from(used) && !self.owes_out_of_order(ring, step);
        let believable = believable || loose(Animal::StopTakenForDrain);
        let Some(drain) = self.ring_state(ring).drain.as_mut() else { return };
        if asked && believable {
            drain.state = DrainState::Stopped { base: used };
            self.ring_stopped(step);
            return;
        }
        self.counters.drains_unverified += 1;
        let cause = if late {
            format!("it answered the stop of ring {ring} only after {}", took.to_the_millisecond())
        } else {
            format!("it answered the stop of ring {ring} with base {base} while used.idx is {used}")
        };
        let undo = outstanding && named == ring && self.failover.is_some() && self.must_live().is_some();
        let next =
            if undo { "the primary gets its rings back" } else { "the primary is fenced and treated as crashed" };
        let entry = Entry::warning("DrainUnverified").with("ring", ring).with("base", base);
        step.out.journal(entry.with("used_idx", used).with("next", next));
        if undo {
            self.undo_stop(ring, base, &cause, step);
        } else {
            self.drain_failed(&cause, step);
        }
    }

    /// Whether something older than what the slots from `used.idx` on hold is still owed: whoever took requests out of the ring in
    /// order and stands at `used.idx` cannot owe it.
    fn owes_out_of_order(&mut self, index: u32, step: &mut Step<'_>) -> bool {
        let unknown = self.rings.get(index as usize).is_none_or(|ring| ring.observer.is_none());
        if unknown || loose(Animal::ClaimByIndexAlone) {
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
            if !self.poll_undone(step) && all {
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
            None | Some(Phase::Transferring | Phase::Handing) => true,
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
            Some(Phase::Confirming) if served && !loose(Animal::StopAnsweredWhileServed) => {
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
