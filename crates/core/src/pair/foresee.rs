//! A failure of the primary is predicted: what is asked before it is acted upon, and what is said if it is not.
//!
//! The shadow is the control group. It has the same storage and another process: what makes it slow as well lies below both, and a swap would
//! only show the guest the same fault once more.

use warmswap_predict::{Alarm, Law};

use super::{Pair, Step};
use crate::canary::CanaryState;
use crate::event::Action;
use crate::failover::{Kind, Outcome, Report};
use crate::foresight::{Foresight, Withheld, can_drain};
use crate::journal::Entry;
use crate::observer::Observer;
use crate::policy::OnPrediction;
use crate::time::Nanos;

impl Pair {
    /// An alarm of the failure model.
    pub(crate) fn failure_predicted(&mut self, foresight: Foresight, step: &mut Step<'_>) {
        self.counters.alarms += 1;
        // One of a backend that has gone, or is just being replaced, concerns nobody any more.
        if self.failover.is_some() || self.primary != Some(foresight.backend) || self.policy.considered.is_some() {
            return;
        }
        // One that was never given a ring has nothing that could be saved.
        if !self.link(foresight.backend).is_some_and(|link| link.touched) {
            return;
        }
        let limits = self.config.limits;
        if self.config.on_prediction == OnPrediction::Act
            && let Some(why) = self.nudge(foresight.alarm, step)
        {
            return self.withhold(&foresight, &why, step);
        }
        match self.policy.at_first(&foresight, self.config.on_prediction, &limits, step.now) {
            Some(why) => self.withhold(&foresight, &why, step),
            None => self.policy.consider(foresight, step.now),
        }
    }

    /// Goes on with an alarm that is being looked into.
    pub(crate) fn poll_foresight(&mut self, step: &mut Step<'_>) {
        let Some(considered) = &self.policy.considered else { return };
        if self.failover.is_some() || self.primary != Some(considered.foresight.backend) {
            self.policy.considered = None;
            return;
        }
        let limits = self.config.limits;
        let late = step.now >= considered.began + limits.consider_max;
        let wants_read = considered.wants_read() && self.shadow_can_read();
        let kills = self.state_is_at_stake().filter(|_| !can_drain(considered.foresight.alarm));
        let hinders = self.refusal().or(kills).or_else(|| self.hindrance());
        let waiting = self.canary_waiting(step.now);
        let slow = waiting.is_some_and(|waiting| self.policy.is_slow(waiting));
        if !late && !slow && (wants_read || hinders.is_some()) {
            return;
        }
        let foresight = considered.foresight.clone();
        // What the shadow does says more than that it is busy with it.
        let swaps = |report: &&Report| {
            report.outcome == Outcome::Settled && matches!(report.kind, Kind::Planned | Kind::Predicted)
        };
        let swap = self.last_report.as_ref().filter(swaps).map(|report| report.blackout);
        let against = self.policy.against(waiting, swap, &limits).or_else(|| hinders.map(Withheld::Refused));
        if let Some(why) = against {
            self.policy.found_common(&why, waiting, step.now);
            return self.withhold(&foresight, &why, step);
        }
        self.act_on_prediction(step);
    }

    /// What was lost between driver and device is given once more: an interrupt or a kick too many is nothing to either. None: that is not
    /// what the alarm is about, or it does not help.
    fn nudge(&mut self, alarm: Alarm, step: &mut Step<'_>) -> Option<Withheld> {
        let (why, interrupts) = match alarm {
            Alarm::Law(Law::InterruptIsTaken) => {
                let rings = self.rings.iter().filter_map(|ring| ring.observer.as_ref());
                let submitted = rings.map(Observer::submissions).sum();
                (self.policy.interrupt_lost(submitted, &self.config.limits, step.now), true)
            }
            Alarm::Law(Law::KickIsSeen) => {
                // What was submitted without a kick to a ring that is watched by its kick may not have been seen yet.
                self.look_at_served(step);
                (self.policy.kick_lost(self.waiting_since(), step.now), false)
            }
            _ => return None,
        };
        for index in self.served_rings() {
            let ring = self.session.ring(index);
            let fd = ring.and_then(|ring| if interrupts { ring.call } else { ring.kick });
            fd.into_iter().for_each(|fd| step.out.push(Action::Signal(fd)));
        }
        why
    }

    /// A minute long after kicks were lost again and again, a ring that stands still is given one without waiting for an alarm: half as long
    /// again each time, for a backend that is only slow hears it as well.
    pub(crate) fn give_kicks(&mut self, step: &mut Step<'_>) {
        if !self.policy.gives_kicks(step.now) || self.failover.is_some() {
            return;
        }
        for (index, ring) in (0_u32..).zip(&mut self.rings) {
            let owes = ring.observer.as_ref().is_some_and(|it| it.outstanding() > 0);
            let due = ring.progressed_at.max(ring.kick_given_at);
            let pause = self.config.limits.standstill().max(Nanos(step.now.since(ring.progressed_at).0 / 2));
            if !ring.served || !owes || step.now < due + pause {
                continue;
            }
            ring.kick_given_at = step.now;
            let kick = self.session.ring(index).and_then(|ring| ring.kick);
            kick.into_iter().for_each(|fd| step.out.push(Action::Signal(fd)));
        }
    }

    fn act_on_prediction(&mut self, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let Some(foresight) = self.policy.act(&limits, step.now) else { return };
        let cause =
            format!("predicted ({}): {}; causes: {}", foresight.alarm.name(), foresight.alarm, foresight.causes);
        let drain = can_drain(foresight.alarm);
        self.begin_failover(Kind::Predicted, cause, foresight.backend, None, drain, step);
    }

    fn withhold(&mut self, foresight: &Foresight, why: &Withheld, step: &mut Step<'_>) {
        self.counters.withheld += 1;
        if !self.policy.withhold(why, step.now) {
            return;
        }
        step.out.journal(
            Entry::warning("FailoverWithheld")
                .with("backend", foresight.backend.0)
                .with("alarm", foresight.alarm.name())
                .with("why", why.name())
                .with("reason", why.to_string())
                .with("next", why.next()),
        );
    }

    /// Whether the shadow can be asked to read. A device without a harmless read has the weaker proof that its shadow answers.
    fn shadow_can_read(&self) -> bool {
        let shadow = self.shadow.and_then(|id| self.link(id));
        shadow.is_some_and(|link| link.private_memory.is_some() && link.canary.possible)
    }

    /// For how long a read of the shadow has been under way.
    fn canary_waiting(&self, now: Nanos) -> Option<Nanos> {
        let link = self.shadow.and_then(|id| self.link(id))?;
        (link.canary.state == CanaryState::Reading).then(|| now.since(link.canary.began))
    }

    /// Whether a read of the shadow is wanted at once.
    pub(crate) fn wants_read_now(&self) -> bool {
        self.policy.considered.as_ref().is_some_and(crate::foresight::Considered::wants_read)
    }

    pub(crate) fn next_foresight(&self) -> Option<Nanos> {
        Some(self.policy.considered.as_ref()?.began + self.config.limits.consider_max)
    }
}
