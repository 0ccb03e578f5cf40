//! The phases of a failover.

use warmswap_wire::ring::Layout;
use warmswap_zoo::{Animal, loose};

use super::rings::RingState;
use super::vmm::Ticket;
use super::{Pair, Step};
use crate::event::{Action, BackendId, CommandId, FenceLevel};
use crate::failover::{Failover, Kind, Outcome, Phase, Recovery, Report};
use crate::journal::{Entry, Value};
use crate::link::{LinkState, Purpose};
use crate::observer::{Knowledge, Observer};
use crate::policy::{RegionUse, Survivors};
use crate::time::Nanos;

impl Pair {
    pub(crate) fn refuse_failover(&mut self, command: CommandId, cause: String, why: String, step: &mut Step<'_>) {
        self.counters.refused += 1;
        step.out.journal(Entry::warning("FailoverRefused").with("cause", cause.as_str()).with("reason", why.as_str()));
        let victim = self.primary.unwrap_or(BackendId(0));
        let mut report = Failover::new(0, Kind::Planned, cause, victim, None, step.now).report;
        report.outcome = Outcome::Refused;
        report.recovery = Recovery::Refused;
        report.message = why;
        step.out.push(Action::Answer { command, report: Box::new(report) });
    }

    /// Begins a failover away from `victim`.
    pub(crate) fn begin_failover(
        &mut self,
        kind: Kind,
        cause: String,
        victim: BackendId,
        command: Option<CommandId>,
        drain: bool,
        step: &mut Step<'_>,
    ) {
        assert!(self.failover.is_none(), "one failover at a time");
        self.failovers += 1;
        let mut failover = Failover::new(self.failovers, kind, cause, victim, command, step.now);
        failover.report.inflight =
            self.rings.iter().filter_map(|ring| ring.observer.as_ref()).map(|it| u32::from(it.outstanding())).sum();
        step.out.journal(
            Entry::info("FailoverStarted")
                .with("id", failover.report.id)
                .with("kind", kind.name())
                .with("cause", failover.report.cause.as_str())
                .with("backend", victim.0),
        );
        self.failover = Some(failover);
        if drain && self.link(victim).is_some_and(|link| matches!(link.state, LinkState::Ready | LinkState::Active)) {
            self.enter(Phase::Draining, step);
            let rings = self.served_rings();
            if rings.is_empty() {
                self.drained(step);
            } else {
                self.divert(victim, &rings, step);
            }
        } else {
            self.enter_fencing("", step);
        }
    }

    pub(super) fn enter(&mut self, phase: Phase, step: &Step<'_>) {
        let failover = self.failover.as_mut().expect("phases belong to a failover");
        failover.enter(phase, step.now);
    }

    /// Every ring of the primary is stopped and quiet.
    pub(crate) fn drained(&mut self, step: &mut Step<'_>) {
        let level = self.config.fence;
        let failover = self.failover.as_mut().expect("only a failover drains");
        failover.report.recovery = Recovery::Drained;
        failover.report.fence = FenceLevel::Stopped;
        failover.report.evidence = "stop acknowledged and used.idx == base on every ring".to_owned();
        // A device that is more than its rings is fenced when the shadow has the rest.
        if level > FenceLevel::Stopped && !self.wants_transfer() {
            self.enter_fencing("", step);
        } else {
            self.collect(step);
        }
    }

    /// Kills the victim and waits for the proof that it is harmless.
    pub(crate) fn enter_fencing(&mut self, note: &str, step: &mut Step<'_>) {
        let failover = self.failover.as_mut().expect("only a failover fences");
        let victim = failover.victim;
        if !note.is_empty() {
            failover.report.message = format!("not drained: {note}");
            failover.report.recovery = Recovery::Exact;
        }
        failover.report.fence = FenceLevel::Reaped;
        failover.enter(Phase::Fencing, step.now);
        let harmless = self.link(victim).is_some_and(|link| !link.touched) || loose(Animal::FenceSkipped);
        step.out.push(if harmless { Action::Retire { backend: victim } } else { Action::Fence { backend: victim } });
        if let Some(link) = self.link_mut(victim) {
            link.end(step.out);
        }
        // One that is dying may still serve: what the VMM changes is not called done before that is over, or for as long as it waits at most.
        if harmless {
            self.stop_waiting_for(victim, step);
        }
        self.rings.iter_mut().for_each(|ring| ring.drain = None);
        if harmless {
            let failover = self.failover.as_mut().expect("just seen");
            failover.report.fence = FenceLevel::Stopped;
            failover.report.evidence = "it was never given a ring".to_owned();
            self.collect(step);
        }
    }

    /// The victim's link or process ended while the failover was still talking to it.
    pub(crate) fn victim_lost(&mut self, step: &mut Step<'_>) {
        if self.failover.as_ref().is_some_and(|failover| failover.phase == Phase::Draining) {
            self.enter_fencing("the primary died while it was drained", step);
        }
    }

    pub(crate) fn fenced(&mut self, backend: BackendId, level: FenceLevel, evidence: &str, step: &mut Step<'_>) {
        self.stop_waiting_for(backend, step);
        let Some(failover) = &mut self.failover else { return };
        if failover.phase == Phase::Isolating {
            return self.trial_fenced(backend, step);
        }
        if failover.victim != backend || failover.phase != Phase::Fencing {
            return;
        }
        failover.report.fence = level;
        failover.report.evidence = evidence.to_owned();
        if level < self.config.fence {
            let reason = format!("proved {}, configured is {}", level.name(), self.config.fence.name());
            self.halt(&reason, step);
        } else {
            self.collect(step);
        }
    }

    /// Counts what the victim owed, and makes the rings say so.
    fn collect(&mut self, step: &mut Step<'_>) {
        self.enter(Phase::Collecting, step);
        let recovery = self.failover.as_ref().map(|failover| failover.report.recovery);
        // What the VMM has started since the drain began was never the old primary's, and nobody has drained it.
        let drained = |ring: &mut RingState| std::mem::take(&mut ring.served) && recovery == Some(Recovery::Drained);
        let drained: Vec<bool> = self.rings.iter_mut().map(drained).collect();
        let mut survivors = 0;
        let rings = self.waiting_rings();
        for index in &rings {
            match self.collect_ring(*index, drained[*index as usize], step) {
                // Buffers that wait to be filled owe nothing.
                Ok(count) if self.config.device.carries_requests(*index) => survivors += u32::from(count),
                Ok(_) => {}
                Err(reason) => return self.halt(&format!("ring {index}: {reason}"), step),
            }
        }
        let failover = self.failover.as_mut().expect("only a failover collects");
        failover.report.survivors += survivors;
        let drained = failover.report.recovery == Recovery::Drained;
        if !drained && !self.closing && self.wants_transfer() {
            let reason = format!(
                "what the guest had open on the {} device lay in the process that is gone; reset the device in the guest (mount it again)",
                self.config.device.name()
            );
            return self.halt(&reason, step);
        }
        if !drained && survivors > 0 && !self.config.device.may_replay() {
            let reason = format!(
                "the {} device owed {survivors} requests, and its requests must not be executed twice",
                self.config.device.name()
            );
            return self.halt(&reason, step);
        }
        self.collected(&rings, step);
    }

    /// The last look at a ring nobody serves, and its survivors placed from `used.idx` on. Returns their number.
    ///
    /// `drained`: whoever served it last has completed everything it had taken, as was proved.
    pub(crate) fn collect_ring(&mut self, index: u32, drained: bool, step: &mut Step<'_>) -> Result<u16, String> {
        self.observe(index, step);
        let ring = &mut self.rings[index as usize];
        let observer = ring.observer.as_mut().expect("waiting rings are observed");
        if drained && matches!(observer.knowledge(), Knowledge::Inexact(_)) {
            // A drained ring needs no history: what it owes is what nobody has taken yet.
            *observer = Observer::new(observer.layout(), step.memory.used_idx(index), step.now);
            observer.observe(step.now, index, step.memory);
        }
        if let (Knowledge::Inexact(gap), RegionUse::Trust) = (observer.knowledge(), self.config.region) {
            self.learn_from_region(index, step)
                .map_err(|why| format!("what is in flight is not known exactly: {gap}; {why}"))?;
        }
        let observer = self.rings[index as usize].observer.as_mut().expect("waiting rings are observed");
        let heads = observer.survivors().map_err(|knowledge| match knowledge {
            Knowledge::Inexact(gap) => format!("what is in flight is not known exactly: {gap}"),
            Knowledge::Violated(violation) => violation.to_string(),
            Knowledge::Exact => unreachable!("survivors() answers where knowledge is exact"),
        })?;
        let (used, avail) = (observer.used_idx(), observer.avail_idx());
        let owed = avail.wrapping_sub(used);
        if heads.len() != usize::from(owed) {
            return Err(format!("{} requests were followed, avail.idx - used.idx is {owed}", heads.len()));
        }
        if step.memory.used_idx(index) != used {
            return Err("used.idx moved although nothing serves the ring".to_owned());
        }
        self.ask_region(index, used, &heads, step)?;
        let observer = self.rings[index as usize].observer.as_ref().expect("waiting rings are observed");
        let layout = observer.layout();
        if drained && !slots_hold(index, layout, used, &heads, step) {
            return Err(
                "the drained primary left completions out of order, which a drained ring cannot have".to_owned()
            );
        }
        if !slots_hold(index, layout, used, &heads, step) && !loose(Animal::ReplayFromUsed) {
            if self.config.survivors == Survivors::Refuse {
                return Err(
                    "survivors would have to be written to the available ring, which is switched off".to_owned()
                );
            }
            place(index, layout, used, &heads, step);
        }
        Ok(owed)
    }

    /// Everything owed is known and lies in the rings.
    fn collected(&mut self, rings: &[u32], step: &mut Step<'_>) {
        if self.closing {
            self.abandon_failover("the VMM disconnected", step);
            self.finish_close(step);
            return;
        }
        if let Some(Ticket::Stop { ring, .. }) = self.ticket {
            self.finish_vmm_stop(ring, step);
        }
        self.suspect(rings);
        if self.begin_isolation(step) {
            return;
        }
        self.hand_over(step);
    }

    /// Hands all waiting rings to the shadow, as soon as there is one that is ready.
    pub(crate) fn hand_over(&mut self, step: &mut Step<'_>) {
        if self.closing {
            // Nobody wants the rings any more, and what is owed lies in them: no backend is waited for.
            self.abandon_failover("the VMM disconnected", step);
            return self.finish_close(step);
        }
        if let Some(failover) = self.failover.as_ref().filter(|failover| failover.phase != Phase::Handing) {
            // What kept a shadow from being started while nobody waited for it, room for one above all, is no reason now.
            if failover.report.attempts == 0 {
                (self.restart_at, self.restart_wait) = (None, self.config.limits.restart_min);
            }
            self.enter(Phase::Handing, step);
        }
        let wants_transfer = self.wants_transfer();
        let Some(target) = self.ready_shadow() else {
            return if wants_transfer {
                self.undo_transfer("the shadow was lost", step);
            } else {
                self.ensure_target(step);
            };
        };
        if wants_transfer {
            return self.begin_transfer(target, step);
        }
        if !self.waiting_rings().is_empty() && !self.has_region(target, step) {
            return;
        }
        let rings = self.waiting_rings();
        let owing = rings.iter().filter(|index| self.config.device.carries_requests(**index));
        let owing = owing.map(|index| (*index, step.memory.used_idx(*index)));
        let owing: Vec<(u32, u16)> = owing.filter(|(index, used)| step.memory.avail_idx(*index) != *used).collect();
        let failover = self.failover.as_mut().expect("only a failover hands over");
        failover.target = Some(target);
        failover.handed = true;
        failover.owing = owing;
        step.out.push(Action::Assign { backend: target, primary: true });
        if rings.is_empty() {
            if let Some(link) = self.link_mut(target) {
                link.state = LinkState::Ready;
            }
            self.enter(Phase::Confirming, step);
        } else {
            self.hand_rings(target, &rings, Purpose::Handed, step);
            self.enter(Phase::Resuming, step);
        }
    }

    /// No shadow is ready: a cold one is started unless one is on its way. The guest's requests wait in the rings.
    pub(crate) fn ensure_target(&mut self, step: &mut Step<'_>) {
        let due = self.restart_at.is_none_or(|at| at <= step.now);
        if self.shadow.is_none() && due {
            self.restart_at = None;
            self.shadow_note = "starting".to_owned();
            self.shadow = Some(self.start_backend(step.now, false, step.out));
        }
    }

    pub(crate) fn shadow_became_ready(&mut self, step: &mut Step<'_>) {
        let Some(failover) = &self.failover else { return };
        if failover.phase == Phase::Handing && failover.target.is_none() {
            self.hand_over(step);
        } else if failover.phase == Phase::Isolating {
            self.isolation_target_ready(step);
        }
    }

    /// The target has acknowledged the rings.
    pub(crate) fn handed(&mut self, backend: BackendId, value: u64, step: &mut Step<'_>) {
        let Some(failover) = &self.failover else { return };
        if failover.target != Some(backend) || failover.phase != Phase::Resuming {
            return;
        }
        if value == 0 {
            self.rings_enabled(backend, value, step);
            self.enter(Phase::Confirming, step);
        } else {
            self.backend_lost(backend, "it refused the rings", step);
        }
    }

    /// The backend that was to take over is gone. It may have served the rings: it is fenced like a primary.
    pub(crate) fn target_lost(&mut self, reason: &str, step: &mut Step<'_>) {
        let failover = self.failover.as_mut().expect("targets belong to a failover");
        if failover.phase == Phase::Isolating {
            return self.end_trial(step);
        }
        let target = failover.target.take().expect("the caller has seen the target");
        let old = std::mem::replace(&mut failover.victim, target);
        failover.handed = false;
        // What it had of the device is lost with it.
        failover.transfer = None;
        failover.report.attempts += 1;
        failover.report.recovery = Recovery::Exact;
        step.out.journal(
            Entry::warning("ShadowFailed")
                .with("backend", target.0)
                .with("reason", reason)
                .with("next", "it is fenced and another one takes over"),
        );
        if self.primary == Some(old) {
            step.out.push(Action::Retire { backend: old });
            self.forget_backend(old, step.out);
            self.primary = Some(target);
        }
        if self.shadow == Some(target) {
            self.shadow = None;
        }
        self.enter_fencing("", step);
    }

    pub(crate) fn poll_failover(&mut self, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let Some(failover) = &mut self.failover else { return };
        failover.poll_at = step.now + limits.poll_interval(failover.spent(step.now));
        match failover.phase {
            Phase::Draining if failover.spent(step.now) > limits.drain_of(failover.report.kind) => {
                let most = limits.drain_of(failover.report.kind);
                let note = format!("the primary did not come to rest within {most}");
                self.drain_overdue(&note, step);
            }
            Phase::Transferring => self.poll_transfer(step),
            Phase::Fencing if loose(Animal::FenceByTimeout) && failover.spent(step.now) > limits.answer_max => {
                self.collect(step);
            }
            Phase::Handing if failover.target.is_none() => self.hand_over(step),
            Phase::Isolating => self.poll_isolation(step),
            Phase::Confirming => self.confirm(step),
            _ => {}
        }
    }

    /// Why a primary that lives, and is being drained, must not be killed: what it holds would be lost with it, or nobody would know what
    /// it owed.
    pub(super) fn must_live(&self) -> Option<String> {
        let blind = || self.exactness_refusal().filter(|_| !self.closing && !loose(Animal::HangKilledBlind));
        self.state_is_at_stake().or_else(blind)
    }

    /// A primary that does not come to rest is killed, unless what it holds would be lost with it.
    fn drain_overdue(&mut self, note: &str, step: &mut Step<'_>) {
        if self.must_live().is_none() {
            self.counters.drains_overdue += 1;
            return self.enter_fencing(note, step);
        }
        let failover = self.failover.as_mut().expect("only a failover drains");
        if failover.undone.is_none() {
            failover.undone = Some(note.to_owned());
            self.counters.drains_overdue += 1;
        }
        self.poll_undone(step);
    }

    /// Watches the new primary complete something on every ring that owed work.
    fn confirm(&mut self, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let failover = self.failover.as_mut().expect("the caller has seen it");
        let before = failover.owing.len();
        failover.owing.retain(|(index, used)| step.memory.used_idx(*index) == *used);
        if failover.owing.len() < before && failover.first_completion.is_none() {
            failover.first_completion = Some(step.now);
        }
        if failover.phase != Phase::Confirming {
            return;
        }
        if failover.owing.is_empty() {
            self.settle(true, step);
            return;
        }
        // A slow disk may take its time; a backend that does not answer has failed.
        let asked = failover.entered + limits.confirm_max.min(Nanos(limits.hang.0 / 2));
        let target = failover.target;
        if step.now < asked {
            return;
        }
        let Some(link) = target.and_then(|id| self.link_mut(id)) else { return };
        if link.heard_at >= asked {
            self.settle(false, step);
        } else {
            link.ping(step.now, step.out);
        }
    }

    pub(super) fn settle(&mut self, confirmed: bool, step: &mut Step<'_>) {
        let mut failover = self.failover.take().expect("only a failover settles");
        failover.enter(Phase::Settled, step.now);
        let target = failover.target.expect("a settled failover has a target");
        let ended = failover.first_completion.unwrap_or(step.now);
        failover.report.blackout = ended.since(failover.began);
        if !confirmed {
            failover.report.message = "the new primary answers, but has not completed anything yet".to_owned();
        }
        self.retire_victim(failover.victim, step);
        self.primary = Some(target);
        self.shadow = None;
        self.restart_at = None;
        self.shadow_note = "starting".to_owned();
        match failover.report.kind {
            Kind::Planned => self.counters.planned += 1,
            Kind::Predicted => self.counters.predicted += 1,
            Kind::Crash => self.counters.crash += 1,
            Kind::Hang => self.counters.hang += 1,
        }
        self.counters.settled += 1;
        self.finish_report(failover, step);
        if self.closing {
            self.close_after_failover(step);
        } else {
            self.resume_vmm_stop(step);
        }
    }

    /// The victim has been stopped or fenced: nothing more comes from it.
    fn retire_victim(&mut self, victim: BackendId, step: &mut Step<'_>) {
        step.out.push(Action::Retire { backend: victim });
        self.forget_backend(victim, step.out);
        self.stop_waiting_for(victim, step);
    }

    fn close_after_failover(&mut self, step: &mut Step<'_>) {
        let rings = self.served_rings();
        match self.serving() {
            Some(serving) if !rings.is_empty() => self.divert(serving, &rings, step),
            _ => self.finish_close(step),
        }
    }

    /// The sources disagree, or knowledge is missing. Nothing is guessed: the rings stay unserved until the VMM resets them.
    pub(crate) fn halt(&mut self, reason: &str, step: &mut Step<'_>) {
        let mut failover = self.failover.take().expect("only a failover halts");
        failover.enter(Phase::Halted, step.now);
        failover.report.outcome = Outcome::Halted;
        failover.report.recovery = Recovery::Refused;
        failover.report.message = reason.to_owned();
        self.counters.halted += 1;
        self.rings.iter_mut().for_each(|ring| ring.served = false);
        for index in self.waiting_rings() {
            self.rings[index as usize].halted = true;
        }
        self.halted = Some(reason.to_owned());
        self.retire_victim(failover.victim, step);
        if self.primary == Some(failover.victim) {
            self.primary = None;
        }
        self.finish_report(failover, step);
        if let Some(Ticket::Stop { ring, .. }) = self.ticket {
            self.finish_vmm_stop(ring, step);
        }
        if self.closing {
            self.finish_close(step);
        }
    }

    /// Ends a failover whose rings nobody wants any more.
    fn abandon_failover(&mut self, why: &str, step: &mut Step<'_>) {
        let mut failover = self.failover.take().expect("only a failover is abandoned");
        failover.enter(Phase::Settled, step.now);
        failover.report.outcome = Outcome::Refused;
        failover.report.message = format!("not handed over: {why}");
        self.retire_victim(failover.victim, step);
        if self.primary == Some(failover.victim) {
            self.primary = None;
        }
        self.finish_report(failover, step);
    }

    pub(super) fn finish_report(&mut self, failover: Failover, step: &mut Step<'_>) {
        let Failover { report, command, .. } = failover;
        step.out.journal(journal_entry(&report));
        if let Some(command) = command {
            step.out.push(Action::Answer { command, report: Box::new(report.clone()) });
        }
        self.last_report = Some(report);
    }

    pub(crate) fn next_failover_poll(&self) -> Option<Nanos> {
        let failover = self.failover.as_ref()?;
        match failover.phase {
            Phase::Draining => {
                let deadline = failover.entered + self.config.limits.drain_of(failover.report.kind) + Nanos(1);
                Some(deadline.max(failover.poll_at))
            }
            Phase::Transferring => Some(self.transfer_deadline(failover)),
            Phase::Confirming | Phase::Isolating => Some(failover.poll_at),
            Phase::Handing => self.restart_at,
            _ => None,
        }
    }
}

fn journal_entry(report: &Report) -> Entry {
    let (event, entry): (_, fn(&'static str) -> Entry) = match report.outcome {
        Outcome::Settled => ("FailoverSettled", Entry::info),
        Outcome::Refused => ("FailoverRefused", Entry::warning),
        Outcome::Halted => ("FailoverHalted", Entry::error),
    };
    let mut entry = entry(event)
        .with("id", report.id)
        .with("kind", report.kind.name())
        .with("cause", report.cause.as_str())
        .with("recovery", report.recovery.name())
        .with("fence", report.fence.name())
        .with("evidence", report.evidence.as_str())
        .with("inflight", report.inflight)
        .with("survivors", report.survivors)
        .with("attempts", report.attempts)
        .with("isolated", report.isolated)
        .with("blackout_us", Value::Micros(report.blackout.as_micros()));
    for (phase, spent) in Phase::TIMED.iter().zip(report.phases) {
        entry = entry.with(phase.name(), Value::Micros(spent.as_micros()));
    }
    if report.message.is_empty() { entry } else { entry.with("message", report.message.as_str()) }
}

/// Whether the available slots from `used` on hold these heads already.
pub(super) fn slots_hold(index: u32, layout: Layout, used: u16, heads: &[u16], step: &Step<'_>) -> bool {
    let mut at = used;
    heads.iter().all(|head| {
        let held = step.memory.avail_slot(index, layout.slot(at));
        at = at.wrapping_add(1);
        held == *head
    })
}

/// Writes the heads, in the order of their submission, over the consumed slots. The driver never reads them back and writes only
/// from `avail.idx` on.
pub(super) fn place(index: u32, layout: Layout, used: u16, heads: &[u16], step: &mut Step<'_>) {
    let mut at = used;
    for head in heads {
        step.memory.set_avail_slot(index, layout.slot(at), *head);
        at = if loose(Animal::PlacedWithoutWrap) { at.saturating_add(1) } else { at.wrapping_add(1) };
    }
}
