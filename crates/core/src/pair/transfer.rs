//! What a device is beyond its rings: carried from the old primary to the shadow while the rings of both are stopped.
//!
//! ```text
//! Saving ─received whole─▶ Saved ─yes─▶ Loading ─sent whole─▶ Loaded ─yes─▶ Done
//!    └───────────────────────┴─── no, or too late ─┴───────────────┴─▶ the primary gets its rings back
//! ```
//! vhost-user, "Migrating back-end state": a back-end whose rings are all stopped writes its state into a channel and closes it, another
//! one reads it until its end; CHECK_DEVICE_STATE says whether that was all. The old primary keeps what it has, so that until the shadow
//! has said yes everything can be undone. After that it must not serve the device any more.

use warmswap_wire::{DeviceStateTransfer, FdSlot, ProtocolFeatures, Reply, Request, VringFd, VringState};

use super::{Pair, Step};
use crate::drain::{DrainMethod, DrainState};
use crate::event::{Action, BackendId, FenceLevel, StateDirection};
use crate::failover::{Failover, Outcome, Phase, Recovery, Transfer, TransferStep};
use crate::journal::{Entry, Value};
use crate::link::{Link, LinkState, Purpose};
use crate::time::Nanos;

/// Bit 8 of the reply to SET_DEVICE_STATE_FD: no descriptor comes with it, so the one that was sent is used.
const NO_DESCRIPTOR: u64 = 1 << 8;
/// Bits 0 to 7 of it: zero is success.
const ERROR: u64 = 0xff;

impl Pair {
    /// Why a backend cannot be the shadow of a device that is more than its rings.
    pub(super) fn state_refusal(&self, backend: BackendId) -> Option<String> {
        if !self.config.device.carries_state() || self.primary == Some(backend) {
            return None;
        }
        let lacks = |id: BackendId| self.link(id).is_some_and(|link| !link.can_move_state());
        let whose = if lacks(backend) {
            "it"
        } else if self.primary.is_some_and(lacks) {
            "the primary"
        } else {
            return None;
        };
        Some(format!(
            "what the guest has open lies in the process of a {} device, and {whose} cannot hand it over (protocol feature DEVICE_STATE)",
            self.config.device.name()
        ))
    }

    /// Why a primary of this device is never killed to make room for the shadow.
    pub(super) fn state_is_at_stake(&self) -> Option<String> {
        let at_stake = self.config.device.carries_state()
            && self.primary.and_then(|id| self.link(id)).is_some_and(|link| link.touched);
        at_stake.then(|| "what the guest has open lies in the primary and would be lost with it".to_owned())
    }

    /// Whether the state of the device has to get from the victim to this shadow before that can be given rings.
    pub(super) fn wants_transfer(&self) -> bool {
        let Some(failover) = &self.failover else { return false };
        let done = failover.transfer.is_some_and(|transfer| transfer.step == TransferStep::Done);
        let touched = self.link(failover.victim).is_some_and(|link| link.touched);
        self.config.device.carries_state() && touched && !done
    }

    pub(super) fn begin_transfer(&mut self, to: BackendId, step: &mut Step<'_>) {
        self.enter(Phase::Transferring, step);
        let failover = self.failover.as_mut().expect("only a failover transfers");
        failover.transfer = Some(Transfer { step: TransferStep::Saving, to, began: step.now, size: 0 });
        let backend = failover.victim;
        step.out.push(Action::OpenState { backend, direction: StateDirection::Save });
    }

    /// The transfer under way and the backend that it concerns at this step.
    fn transferring(&mut self, backend: BackendId) -> Option<&mut Transfer> {
        let failover = self.failover.as_mut().filter(|failover| failover.phase == Phase::Transferring)?;
        let victim = failover.victim;
        let transfer = failover.transfer.as_mut()?;
        let whose = if transfer.step <= TransferStep::Saved { victim } else { transfer.to };
        (whose == backend).then_some(transfer)
    }

    pub(crate) fn state_opened(&mut self, backend: BackendId, channel: Result<FdSlot, String>, step: &mut Step<'_>) {
        let at = self.transferring(backend).map(|transfer| transfer.step);
        match (channel, at) {
            (Ok(fd), Some(at)) => {
                let saves = at == TransferStep::Saving;
                let transfer = if saves { DeviceStateTransfer::SAVE } else { DeviceStateTransfer::LOAD };
                if let Some(link) = self.link_mut(backend) {
                    link.ask(&Request::SetDeviceStateFd { transfer, fd }, Purpose::State, step.out);
                }
                // The backend has its own by now; as long as this one is open the channel has no end.
                step.out.push(Action::Close(fd));
            }
            (Ok(fd), None) => step.out.push(Action::Close(fd)),
            (Err(reason), Some(_)) => self.undo_transfer(&format!("no channel for its state: {reason}"), step),
            (Err(_), None) => {}
        }
    }

    pub(super) fn state_channel_taken(&mut self, backend: BackendId, reply: &Reply, step: &mut Step<'_>) {
        let Reply::Fd { value, fd } = reply else { return };
        step.out_close(*fd);
        if self.transferring(backend).is_none() {
            return;
        }
        if value & ERROR != 0 {
            self.undo_transfer(&format!("backend {backend} refuses the transfer of its state ({value:#x})"), step);
        } else if fd.is_some() && value & NO_DESCRIPTOR == 0 {
            self.undo_transfer(
                &format!("backend {backend} wants its state to go another way, which is not built"),
                step,
            );
        }
    }

    pub(crate) fn state_moved(&mut self, backend: BackendId, size: Result<u64, String>, step: &mut Step<'_>) {
        let Some(transfer) = self.transferring(backend) else { return };
        let next = match transfer.step {
            TransferStep::Saving => TransferStep::Saved,
            TransferStep::Loading => TransferStep::Loaded,
            _ => return,
        };
        match size {
            Ok(size) => {
                transfer.size = size;
                transfer.step = next;
                if let Some(link) = self.link_mut(backend) {
                    link.ask(&Request::CheckDeviceState, Purpose::StateCheck, step.out);
                }
            }
            Err(reason) => {
                self.undo_transfer(&format!("the state of backend {backend} did not go over: {reason}"), step);
            }
        }
    }

    pub(super) fn state_checked(&mut self, backend: BackendId, value: u64, step: &mut Step<'_>) {
        let Some(transfer) = self.transferring(backend) else { return };
        let to = transfer.to;
        match transfer.step {
            _ if value != 0 => self.undo_transfer(&format!("backend {backend} says that its state is not whole"), step),
            TransferStep::Saved => {
                transfer.step = TransferStep::Loading;
                step.out.push(Action::OpenState { backend: to, direction: StateDirection::Load });
            }
            TransferStep::Loaded => {
                transfer.step = TransferStep::Done;
                self.transferred(step);
            }
            _ => {}
        }
    }

    /// The shadow has everything. From here on the old primary must not serve the device.
    fn transferred(&mut self, step: &mut Step<'_>) {
        let level = self.config.fence;
        let failover = self.failover.as_ref().expect("only a failover transfers");
        let (victim, transfer) = (failover.victim, failover.transfer.expect("it is done"));
        let took = step.now.since(transfer.began);
        let entry = Entry::info("StateTransferred").with("backend", victim.0).with("to", transfer.to.0);
        let entry = entry.with("bytes", transfer.size);
        step.out.journal(entry.with("took_us", Value::Micros(took.as_micros())));
        if level > FenceLevel::Stopped || !self.link(victim).is_some_and(Link::is_alive) {
            self.enter_fencing("", step);
        } else {
            self.hand_over(step);
        }
    }

    /// Looks after a transfer: whether those it concerns are there, and in time.
    pub(super) fn poll_transfer(&mut self, step: &mut Step<'_>) {
        if self.closing {
            return self.hand_over(step);
        }
        let failover = self.failover.as_ref().expect("the caller has seen it");
        let (victim, spent) = (failover.victim, failover.spent(step.now));
        let Some(transfer) = failover.transfer else { return };
        let saved = transfer.step > TransferStep::Saved;
        let lives = |id: BackendId| self.link(id).is_some_and(|link| link.is_alive());
        if !saved && !lives(victim) {
            self.enter_fencing("the primary died before its state was saved", step);
        } else if !self.link(transfer.to).is_some_and(|link| link.state == LinkState::Ready) {
            self.undo_transfer("the shadow was lost", step);
        } else if spent > self.config.limits.transfer_max {
            let most = self.config.limits.transfer_max;
            self.undo_transfer(&format!("the state of the device was not transferred within {most}"), step);
        }
    }

    /// The primary has kept what it has: it gets its rings back. A shadow that has read a part of the state is of no use any more.
    pub(super) fn undo_transfer(&mut self, why: &str, step: &mut Step<'_>) {
        let failover = self.failover.as_ref().expect("only a failover transfers");
        let victim = failover.victim;
        let spoilt = failover.transfer.filter(|transfer| transfer.step > TransferStep::Saved).map(|it| it.to);
        if let Some(to) = spoilt.filter(|to| self.shadow == Some(*to)) {
            self.lose_shadow(to, why, step);
        }
        if self.link(victim).is_some_and(Link::is_alive) {
            self.resume_primary(why, step);
        } else {
            self.enter_fencing(&format!("{why}, and the primary has died"), step);
        }
    }

    /// A ring was stopped in the middle of its work: the backend goes on with it where it says that it stands.
    pub(super) fn undo_stop(&mut self, ring: u32, base: u32, why: &str, step: &mut Step<'_>) {
        let used = step.memory.used_idx(ring);
        let state = self.ring_state(ring);
        // Rings have 16-bit indices; the upper half is for packed rings, which are masked.
        state.goes_on_at = Some(base as u16);
        if let Some(drain) = &mut state.drain {
            drain.state = DrainState::Stopped { base: used };
        }
        if let Some(failover) = &mut self.failover {
            failover.undone.get_or_insert_with(|| why.to_owned());
        }
        self.poll_undone(step);
    }

    /// Undoes a drain that is not to go on, once no answer is outstanding. Whether there is one.
    pub(super) fn poll_undone(&mut self, step: &mut Step<'_>) -> bool {
        let Some(why) = self.failover.as_ref().and_then(|failover| failover.undone.clone()) else { return false };
        if !self.is_being_stopped() {
            self.undo_drain(&why, step);
        }
        true
    }

    /// Whether the answer to the stop of a ring is outstanding.
    pub(super) fn is_being_stopped(&self) -> bool {
        self.rings.iter().filter_map(|ring| ring.drain).any(|drain| drain.state == DrainState::Asked)
    }

    /// Gives the primary back what a drain has taken from it. No ring is just being stopped.
    pub(super) fn undo_drain(&mut self, why: &str, step: &mut Step<'_>) {
        let victim = self.failover.as_ref().expect("only a failover drains").victim;
        let method = self.config.drain;
        for index in self.served_rings() {
            let state = self.ring_state(index);
            let stopped = matches!(state.drain.take().map(|drain| drain.state), Some(DrainState::Stopped { .. }));
            if stopped {
                state.served = false;
                continue;
            }
            let (kick, enabled) =
                (self.session.ring(index).and_then(|ring| ring.kick), self.session.ring_enabled(index));
            let Some(link) = self.link_mut(victim) else { continue };
            match method {
                DrainMethod::PrivateKick => link.tell(&Request::SetVringKick(VringFd { index, fd: kick }), step.out),
                DrainMethod::Disable => {
                    let value = u32::from(enabled);
                    link.ask(&Request::SetVringEnable(VringState { index, value }), Purpose::Enabled, step.out);
                }
                DrainMethod::Stop => {}
            }
            kick.into_iter().for_each(|kick| step.out.push(Action::Signal(kick)));
        }
        self.resume_primary(why, step);
    }

    /// Ends a failover with its victim as the primary it was.
    fn resume_primary(&mut self, why: &str, step: &mut Step<'_>) {
        let mut failover: Failover = self.failover.take().expect("the caller has seen it");
        failover.enter(Phase::Settled, step.now);
        failover.report.outcome = Outcome::Refused;
        failover.report.recovery = Recovery::Refused;
        failover.report.blackout = step.now.since(failover.began);
        failover.report.message = format!("{why}; the primary goes on");
        self.counters.refused += 1;
        self.finish_report(failover, step);
        self.serve_waiting_rings(step);
        self.resume_vmm_stop(step);
    }

    /// When a transfer must be over.
    pub(super) fn transfer_deadline(&self, failover: &Failover) -> Nanos {
        failover.entered + self.config.limits.transfer_max + Nanos(1)
    }
}

impl Step<'_> {
    fn out_close(&mut self, fd: Option<FdSlot>) {
        fd.into_iter().for_each(|fd| self.out.push(Action::Close(fd)));
    }
}

impl Link {
    /// Whether its state can be taken out of it, and put into it.
    fn can_move_state(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::DEVICE_STATE)
    }
}
