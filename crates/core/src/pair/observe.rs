//! When rings are looked at, and what follows from what is seen.

use warmswap_wire::ring::{Layout, USED_F_NO_NOTIFY};
use warmswap_zoo::{Animal, loose};

use super::{Pair, Step};
use crate::drain::DrainState;
use crate::event::{Action, BackendId, earliest};
use crate::failover::{Kind, Phase};
use crate::journal::Entry;
use crate::meter::RingMeter;
use crate::observer::{Knowledge, Observation, Observer};
use crate::time::Nanos;

use super::rings::{BURST_RATE, RingState};

/// A peak of the rate is remembered for this long, in seconds, before it counts half.
const RATE_MEMORY_S: f64 = 0.5;
/// Least time over which a rate is reckoned.
const RATE_WINDOW: Nanos = Nanos::from_micros(500);
/// Part of the ring that may pass between two looks at the rate that is reckoned with.
const RING_PART: f64 = 2.0;
/// Shortest time between two looks while knowledge is on its way back.
const RESYNC_MIN: Nanos = Nanos::from_micros(20);
/// The first look after a kick comes after this part of the shortest time between two.
const WOKEN_PART: u64 = 4;
/// A hang is left alone for so many times the time it was found in, while it is not known what is owed.
const PUT_OFF: u64 = 8;

impl Pair {
    pub(crate) fn observe_due(&mut self, step: &mut Step<'_>) {
        let any_due = self.rings.iter().any(|ring| ring.observer.is_some() && ring.observe_at <= step.now);
        for index in 0..self.rings.len() {
            let ring = &self.rings[index];
            // A wake-up costs more than a look: one that is due soon is made with the others.
            let waited = step.now.since(ring.observed_at);
            let soon = any_due && ring.observe_at.since(step.now) <= waited && !ring.watched;
            if ring.observer.is_some() && (ring.observe_at <= step.now || soon) {
                self.observe(u32::try_from(index).expect("bounded by RINGS_MAX"), step);
            }
        }
        self.give_kicks(step);
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
        state.meter.look(observer, &seen, state.progressed_at, now);
        self.counters.observations += 1;
        if seen.completed > 0 || (seen.submitted > 0 && (seen.outstanding == seen.submitted || was_idle)) {
            state.progressed_at = now;
        }
        if seen.completed > 0 {
            state.completed_at = Some(now);
            self.stall_max = self.config.limits.stall;
            self.put_off_since = None;
        }
        self.note_knowledge(index, before, after, &seen, step);
        self.schedule(index, &seen, step);
    }

    /// Looks at every ring that a backend serves: before it is decided whether that backend may be killed.
    pub(super) fn look_at_served(&mut self, step: &mut Step<'_>) {
        self.served_rings().into_iter().for_each(|index| self.observe(index, step));
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
        let event_idx = self.session.has_event_idx();
        let gives_kicks = self.policy.gives_kicks(now);
        let kick = self.session.ring(index).and_then(|ring| ring.kick);
        let ring = &mut self.rings[index as usize];
        ring.observed_at = now;
        let moved = seen.submitted.max(seen.completed);
        ring.counted += u64::from(moved);
        let elapsed = now.since(ring.counting_since);
        if elapsed >= RATE_WINDOW {
            // Over less time a single batch of completions would pass for a rate.
            let elapsed = elapsed.0 as f64 / 1e9;
            ring.rate = (ring.counted as f64 / elapsed).max(ring.rate * (-elapsed / RATE_MEMORY_S).exp2());
            ring.counted = 0;
            ring.counting_since = now;
        }
        let size = f64::from(ring.size().map_or(1, Layout::size));
        let period = Nanos((size / RING_PART / ring.rate.max(BURST_RATE) * 1e9) as u64);
        let mut period = period.clamp(limits.observe_min, limits.observe_max);
        if matches!(ring.observer.as_ref().map(Observer::knowledge), Some(Knowledge::Inexact(_))) {
            // Counting off what was open at the cut goes wrong, harmlessly, for heads that come round twice between two looks.
            let mean = f64::from(seen.outstanding) / ring.rate.max(1.0);
            period = period.min(Nanos((mean / 4.0 * 1e9) as u64).max(RESYNC_MIN));
        }
        if gives_kicks {
            period = period.min(limits.standstill());
        }
        if let Some(drain) = ring.drain.filter(|drain| drain.state == DrainState::Settling) {
            // Looking often takes time from the backend that is waited for, where the two share a processor. Only rest has to be looked for;
            // everything else a failover waits for makes itself heard. But never more rarely than a ring at work: that nothing moved between
            // two looks is no rest, some backends go on taking new work, and one that does not come to rest has to be fenced.
            let rest = limits.poll_interval(now.since(drain.began));
            ring.observe_at = now + rest.min(period);
            return;
        }
        let quiet = moved == 0 && seen.outstanding == 0;
        if !quiet {
            ring.idle_since = None;
            if let (Some(woken), true) = (ring.woken_at, seen.outstanding > 0) {
                // How long what woke it takes is told within a factor of two.
                period = period.min(now.since(woken).max(Nanos(limits.observe_min.0 / WOKEN_PART)));
            } else {
                ring.woken_at = None;
            }
            ring.observe_at = now + unevenly(period, now);
            return;
        }
        ring.woken_at = None;
        let idle_since = *ring.idle_since.get_or_insert(now);
        let rested = now.since(idle_since) >= limits.idle_after;
        match kick {
            // A backend may read a kick before it is seen here, so how long nothing is looked at grows with the rest.
            Some(_) if ring.watched => ring.observe_at = now + now.since(idle_since).min(limits.observe_idle),
            Some(kick) if rested && !gives_kicks && will_kick(index, event_idx, step) => {
                ring.watched = true;
                if let Some(observer) = &mut ring.observer {
                    observer.remember(index, step.memory);
                }
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
            ring.woken_at = Some(step.now);
            ring.meter.woken(step.now);
            if let Some(observer) = &mut ring.observer {
                observer.woken(step.now);
            }
        }
    }

    /// What following each ring told of its load since the pair was made.
    pub fn meters(&self) -> impl Iterator<Item = (u32, &RingMeter)> {
        (0_u32..).zip(self.rings.iter().map(|ring| &ring.meter))
    }

    pub(crate) fn unwatch(&mut self, index: u32, step: &mut Step<'_>) {
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
            let cause =
                format!("nothing was completed for {} and its control channel is silent", waited.to_the_millisecond());
            self.hang_found(primary, cause, step);
        } else if waited >= self.stall_max {
            // Once: if the next primary stalls as well, the fault lies below both.
            self.stall_max = Nanos(self.stall_max.0.saturating_mul(8));
            let cause = format!(
                "it answers, but has completed nothing for {} while requests wait",
                waited.to_the_millisecond()
            );
            self.hang_found(primary, cause, step);
        }
    }

    /// Whether a backend that lives and has not been heard of may be waited for, since it was first to be. Looks at its rings.
    pub(super) fn is_patient(&mut self, step: &mut Step<'_>) -> bool {
        let since = *self.put_off_since.get_or_insert(step.now);
        let patience = Nanos(self.config.limits.hang.0.saturating_mul(PUT_OFF)).min(self.config.limits.stall);
        self.look_at_served(step);
        step.now.since(since) < patience
    }

    /// A living primary is fenced only where it is known what it owes: killing it would turn a hang, which may pass, into a halt.
    pub(crate) fn hang_found(&mut self, primary: BackendId, cause: String, step: &mut Step<'_>) {
        let since = *self.put_off_since.get_or_insert(step.now);
        let patient = self.is_patient(step);
        // One that was never given a ring owes nothing.
        let patient = patient && self.link(primary).is_some_and(|link| link.touched) && !loose(Animal::HangKilledBlind);
        let reason = self.exactness_refusal().filter(|_| patient);
        let Some(reason) = self.state_is_at_stake().or(reason) else {
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
        self.link_mut(primary).into_iter().for_each(|link| link.ask_again(now));
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

/// A period, somewhat shorter or longer: looks as regular as a load that comes by the clock would see it at the same point of its way every
/// time, and take that for the whole.
fn unevenly(period: Nanos, now: Nanos) -> Nanos {
    // The upper bits of a product with an odd constant (Knuth, TAOCP 3, 6.4: multiplicative hashing) are as good as random.
    let part = now.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    Nanos(period.0 / 4 * 3 + (u128::from(period.0) * u128::from(part) / (256 * 3)) as u64)
}
