//! A pair that goes on in another broker: the last one has ended, by itself, by a signal or for its next version.
//!
//! A pair is a value, and so is what it waits for. Everything that has an effect outside of it was written down before it was done (the
//! caller sees to that), so a pair that is read again stands where it stood. What has gone by meanwhile is time: nobody looked at the
//! rings, nobody heard what backends said. Knowledge of a ring that was busy is lost by the observer's own rules and comes back by them; a
//! clock that ran against a backend is set anew, for it is not known whether the backend was silent, or nobody listened.

use std::collections::BTreeSet;

use warmswap_wire::FdSlot;

use super::{Pair, Step};
use crate::canary::CanaryState;
use crate::event::{Action, Actions, BackendId};
use crate::failover::{Phase, TransferStep};
use crate::journal::Entry;
use crate::link::{Link, LinkState};
use crate::memory::GuestMemory;
#[cfg(doc)]
use crate::observer::Observer;
use crate::pair::rings::BURST_RATE;
use crate::policy::PairConfig;
use crate::time::Nanos;

impl Pair {
    /// Goes on with a pair that was read: what a broker that has ended wrote down last. `config` is what it is to do from now on.
    /// `quiet_since` says that whoever served the rings had been killed by then, so that nothing was missed after that.
    ///
    /// Backends that are not there any more are told of by [`crate::Event::LinkDown`] or [`crate::Event::Exited`] afterwards, and the fences
    /// that were being raised are raised again by the caller.
    ///
    /// # Errors
    /// Guest memory, or a ring in it, cannot be reached any more: nothing can be followed, and the caller lets go of the device.
    pub fn take_over(
        mut self,
        config: PairConfig,
        quiet_since: Option<Nanos>,
        now: Nanos,
        memory: &mut dyn GuestMemory,
        out: &mut Actions,
    ) -> Result<Self, String> {
        self.config = config;
        let mut step = Step { now, memory, out };
        self.reach_memory(&mut step)?;
        self.restart_clocks(now);
        for ring in &mut self.rings {
            let Some(observer) = &mut ring.observer else { continue };
            if quiet_since.is_some_and(|at| observer.was_looked_at_near(at)) {
                observer.forgive_silence(now);
            }
        }
        // Who asked for it has lost its connection.
        self.asked = None;
        self.counters.take_overs += 1;
        let phase = self.failover.as_mut().map_or(Phase::Idle, |failover| {
            failover.command = None;
            failover.phase
        });
        let entry = Entry::info("TakenOver").with("take_over", self.counters.take_overs).with("phase", phase.name());
        step.out.journal(entry.with("rings", self.session.started().count() as u64));
        self.renew_drain(&mut step);
        self.renew_transfer(&mut step);
        self.interrupt_once(&mut step);
        Ok(self)
    }

    /// Notes down what looking at its rings has told since it was noted last, in memory that outlives the broker: `write` is given ring, size
    /// of the ring, place of a word (below [`Observer::notes_len`] of that size) and its value, and must keep their order.
    pub fn note_rings(&mut self, write: &mut dyn FnMut(u32, u16, usize, u64)) {
        for (index, ring) in (0_u32..).zip(&mut self.rings) {
            if let Some(observer) = &mut ring.observer {
                let size = observer.layout().size();
                observer.note(&mut |at, word| write(index, size, at, word));
            }
        }
    }

    /// Goes on from such notes where they are later than what was written down of the whole, before it is taken over. `read` gives the word
    /// of a ring, of that size, at a place; zero where there is none.
    pub fn recall_rings(&mut self, read: &dyn Fn(u32, u16, usize) -> u64) {
        for (index, ring) in (0_u32..).zip(&mut self.rings) {
            if let Some(observer) = &mut ring.observer {
                let size = observer.layout().size();
                observer.recall(&|at| read(index, size, at));
            }
        }
    }

    /// A call descriptor that the VMM replaced meanwhile reached no backend, and what was completed then has interrupted nobody. One
    /// interrupt too many harms nobody.
    fn interrupt_once(&self, step: &mut Step<'_>) {
        let calls = self.session.rings.iter().filter(|ring| ring.started).filter_map(|ring| ring.call);
        calls.for_each(|call| step.out.push(Action::Signal(call)));
    }

    /// Whether it waits to hear that this backend is connected. One that was is not known to it as such, if the broker ended before.
    #[must_use]
    pub fn awaits_link(&self, backend: BackendId) -> bool {
        self.link(backend).is_some_and(|link| link.state == LinkState::Starting)
    }

    /// Every descriptor that it knows of, and will close.
    #[must_use]
    pub fn descriptors(&self) -> BTreeSet<FdSlot> {
        let session = self.session.fds().into_iter().map(|(fd, _)| fd);
        session.chain(self.links.iter().flat_map(Link::descriptors)).collect()
    }

    fn reach_memory(&mut self, step: &mut Step<'_>) -> Result<(), String> {
        for (region, fd) in &self.session.memory {
            step.memory.map(region, *fd).map_err(|error| error.to_string())?;
        }
        if self.session.log.is_some() {
            step.memory.set_log(self.session.log).map_err(|error| error.to_string())?;
        }
        for index in (0_u32..).take(self.rings.len()) {
            if self.rings[index as usize].observer.is_some() {
                self.attach_ring(index, step)?;
            }
        }
        Ok(())
    }

    /// Nobody is blamed for the time in which nobody listened.
    fn restart_clocks(&mut self, now: Nanos) {
        for link in &mut self.links {
            link.restart_clocks(now);
            if link.canary.state != CanaryState::Resting {
                (link.canary.began, link.canary.waited, link.canary.poll_at) = (now, Nanos(0), now);
            }
        }
        for ring in &mut self.rings {
            ring.watched = false;
            ring.woken_at = None;
            ring.idle_since = None;
            (ring.observe_at, ring.observed_at, ring.progressed_at) = (now, now, now);
            (ring.rate, ring.counted, ring.counting_since) = (BURST_RATE, 0, now);
            ring.meter.start(now);
            ring.drain.iter_mut().for_each(|drain| drain.look_again(now));
        }
        if let Some(failover) = &mut self.failover {
            failover.poll_at = now;
        }
    }

    /// A drain under which the primary has run away from whoever followed it is undone: a stop that it does not answer as it should would
    /// end in a fence, and nobody would know what it owed.
    fn renew_drain(&mut self, step: &mut Step<'_>) {
        if self.failover.as_ref().is_none_or(|failover| failover.phase != Phase::Draining) {
            return;
        }
        self.look_at_served(step);
        let Some(why) = self.exactness_refusal().filter(|_| !self.closing) else { return };
        let failover = self.failover.as_mut().expect("just seen");
        failover.undone.get_or_insert_with(|| format!("the broker ended meanwhile, and {why}"));
        self.poll_undone(step);
    }

    /// State of the device that was under way between two backends has ended with the broker that carried it.
    fn renew_transfer(&mut self, step: &mut Step<'_>) {
        let carried =
            |step: TransferStep| matches!(step, TransferStep::Saving | TransferStep::Saved | TransferStep::Loading);
        let under_way = self.failover.as_ref().and_then(|it| it.transfer).is_some_and(|it| carried(it.step));
        if under_way {
            self.undo_transfer("the broker that carried the state has ended", step);
        }
    }
}
