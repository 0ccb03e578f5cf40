//! A pair: one device, its session with the VMM, its primary and its shadow.
//!
//! One struct owns everything. Each event is applied, then [`Pair::settle_step`] leaves the state clean: roles filled, rings
//! served, deadlines kept. Multi-step procedures (drain, failover, VMM stop) are state machines, never waits.
//!
//! - `vmm`: requests of the VMM, and when they are answered
//! - `links`: backends coming, negotiating, warming, going
//! - `rings`: starting rings and giving them to backends
//! - `observe`: looking at rings
//! - `stop`: stopping rings
//! - `failover`: the phases
//! - `foresee`: a failure that is predicted
//! - `canary`: reads of the broker's own on the shadow
//! - `take_over`: going on in another broker
//! - `transfer`: what a device is beyond its rings
//! - `isolate`: a request that kills every backend
//! - `status`: what is shown to people and programs

mod canary;
mod failover;
mod foresee;
mod isolate;
mod links;
mod observe;
mod region;
mod rings;
mod status;
mod stop;
mod take_over;
#[cfg(any(test, feature = "fuzzing"))]
mod tests;
mod transfer;
mod vmm;

#[cfg(any(test, feature = "fuzzing"))]
pub use tests::run;

pub use status::{BackendStatus, Counters, PairState, RingStatus, Status};

use serde::{Deserialize, Serialize};
use warmswap_wire::MemoryRegion;

use crate::drain::DrainMethod;
use crate::event::{Action, Actions, BackendId, CommandId, Event, earliest};
use crate::failover::{Failover, Kind, Phase, Report};
use crate::foresight::Policy;
use crate::journal::Entry;
use crate::link::{Link, LinkState, Offer};
use crate::memory::GuestMemory;
use crate::policy::PairConfig;
use crate::session::Session;
use crate::time::Nanos;

use isolate::Suspects;
use rings::RingState;
use vmm::Ticket;

/// One step's surroundings: time, guest memory, and where actions go.
pub(crate) struct Step<'a> {
    pub(crate) now: Nanos,
    pub(crate) memory: &'a mut dyn GuestMemory,
    pub(crate) out: &'a mut Actions,
}

/// A failover the operator has asked for.
#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    command: CommandId,
    at_once: bool,
    cause: String,
    deadline: Nanos,
}

/// A device with its primary and its shadow.
#[derive(Serialize, Deserialize)]
pub struct Pair {
    /// What it is told to do is told anew by whoever takes it over.
    #[serde(skip, default = "PairConfig::unknown")]
    config: PairConfig,
    session: Session,
    /// What is offered to the VMM: fixed once both backends, or the only one that started, are known.
    offer: Option<Offer>,
    links: Vec<Link>,
    primary: Option<BackendId>,
    shadow: Option<BackendId>,
    rings: Vec<RingState>,
    failover: Option<Failover>,
    /// A failover the operator wants, until it begins or is refused.
    asked: Option<Asked>,
    vmm_connected: bool,
    /// The VMM is gone and its rings are being brought to rest.
    closing: bool,
    /// Nothing is started any more.
    ending: bool,
    ticket: Option<Ticket>,
    tickets: u64,
    /// Regions that were taken away, by the number of the ticket that tells the backends: until the serving one has heard it, it may
    /// take what lies at the same place for the old one.
    leaving: Vec<(u64, MemoryRegion)>,
    halted: Option<String>,
    failed: Option<String>,
    backends: u64,
    failovers: u64,
    restart_at: Option<Nanos>,
    restart_wait: Nanos,
    stall_max: Nanos,
    /// Since when a hang has been left alone because it is not known what is owed.
    put_off_since: Option<Nanos>,
    shadow_note: String,
    suspects: Suspects,
    policy: Policy,
    counters: Counters,
    last_report: Option<Report>,
}

impl Pair {
    /// A pair that has no backend yet.
    #[must_use]
    pub fn new(config: PairConfig) -> Self {
        Pair {
            restart_wait: config.limits.restart_min,
            stall_max: config.limits.stall,
            config,
            session: Session::default(),
            offer: None,
            links: Vec::new(),
            primary: None,
            shadow: None,
            rings: Vec::new(),
            failover: None,
            asked: None,
            vmm_connected: false,
            closing: false,
            ending: false,
            ticket: None,
            tickets: 0,
            leaving: Vec::new(),
            halted: None,
            failed: None,
            backends: 0,
            failovers: 0,
            restart_at: None,
            shadow_note: "not started yet".to_owned(),
            put_off_since: None,
            suspects: Suspects::default(),
            policy: Policy::default(),
            counters: Counters::default(),
            last_report: None,
        }
    }

    /// Starts both backends.
    pub fn start(&mut self, now: Nanos, out: &mut Actions) {
        assert!(self.links.is_empty(), "a pair is started once");
        self.primary = Some(self.start_backend(now, true, out));
        if self.config.shadow {
            self.shadow = Some(self.start_backend(now, false, out));
        }
    }

    /// Whether the VMM may connect: it is known what can be offered to it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.offer.is_some()
    }

    /// Why the pair could not start at all, if so.
    #[must_use]
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Whether the next request of the VMM may be delivered.
    #[must_use]
    pub fn wants_request(&self) -> bool {
        self.ticket.is_none() && !self.closing && self.offer.is_some()
    }

    /// Nothing new is started from here on: the program is ending.
    pub fn end(&mut self) {
        self.ending = true;
    }

    /// Whether the rings of a VMM that has gone are still being brought to rest.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// The session, to be encoded.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Handles one event.
    pub fn handle(&mut self, now: Nanos, event: Event, memory: &mut dyn GuestMemory, out: &mut Actions) {
        let mut step = Step { now, memory, out };
        match event {
            Event::VmmConnected => self.vmm_arrived(&mut step),
            Event::VmmRequest { request, need_reply } => self.vmm_request(request, need_reply, &mut step),
            Event::VmmRefused { request, reason, need_reply } => {
                self.refuse_message(request, &reason, need_reply, &mut step);
            }
            Event::VmmGone { reason } => self.vmm_gone(&reason, &mut step),
            Event::LinkUp { backend, backend_req, private } => {
                self.link_up(backend, backend_req, private, &mut step);
            }
            Event::LinkMessage { backend, header, payload, fds } => {
                self.link_message(backend, &header, &payload, &fds, &mut step);
            }
            Event::BackendRequest { backend, request, need_reply } => {
                self.backend_request(backend, &request, need_reply, &mut step);
            }
            Event::LinkDown { backend, reason } | Event::Exited { backend, reason } => {
                self.backend_lost(backend, &reason, &mut step);
            }
            Event::Fenced { backend, level, evidence } => self.fenced(backend, level, &evidence, &mut step),
            Event::FenceWaiting { backend, reason } => {
                step.out.journal(
                    Entry::warning("FenceWaiting")
                        .with("backend", backend.0)
                        .with("reason", reason)
                        .with("next", "the guest's requests stay pending until the proof is there"),
                );
            }
            Event::StateOpened { backend, channel } => self.state_opened(backend, channel, &mut step),
            Event::StateMoved { backend, size } => self.state_moved(backend, size, &mut step),
            Event::Kicked { ring } => self.ring_kicked(ring, &mut step),
            Event::FailoverRequested { command, now: at_once, reason } => {
                self.failover_requested(command, at_once, &reason, &mut step);
            }
            Event::FailurePredicted(foresight) => self.failure_predicted(foresight, &mut step),
            Event::Tick => {}
        }
        self.settle_step(&mut step);
    }

    /// Everything that depends on state and time alone; cheap, and run after every event.
    fn settle_step(&mut self, step: &mut Step<'_>) {
        self.observe_due(step);
        self.poll_drains(step);
        self.poll_failover(step);
        self.poll_canaries(step);
        self.poll_links(step);
        self.begin_asked(step);
        self.poll_foresight(step);
        self.poll_ticket(step);
        self.fill_roles(step);
    }

    /// When the next [`Event::Tick`] is due.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Nanos> {
        let mut next = self.restart_at.filter(|_| self.may_restart());
        next = earliest(next, self.next_observation());
        next = earliest(next, self.next_failover_poll());
        next = earliest(next, self.next_link_check());
        next = earliest(next, self.next_canary());
        next = earliest(next, self.next_foresight());
        next = earliest(next, self.asked.as_ref().map(|asked| asked.deadline));
        earliest(next, self.ticket.as_ref().map(Ticket::deadline))
    }

    /// Whether a shadow would be started now if it were time. While nobody may start one its time must not wake anybody.
    fn may_restart(&self) -> bool {
        let target_wanted = |phase| matches!(phase, Phase::Handing | Phase::Isolating);
        self.shadow.is_none()
            && match &self.failover {
                Some(failover) => target_wanted(failover.phase),
                None => self.config.shadow && self.offer.is_some() && self.failed.is_none() && !self.closing,
            }
    }

    /// Every backend the pair knows of, by its generation.
    pub fn backends(&self) -> impl Iterator<Item = BackendId> + '_ {
        self.links.iter().map(|link| link.id)
    }

    pub(crate) fn link(&self, id: BackendId) -> Option<&Link> {
        self.links.iter().find(|link| link.id == id)
    }

    pub(crate) fn link_mut(&mut self, id: BackendId) -> Option<&mut Link> {
        self.links.iter_mut().find(|link| link.id == id)
    }

    /// The backend that serves rings now: the primary, or after Handing the target of a running failover.
    pub(crate) fn serving(&self) -> Option<BackendId> {
        let id = match &self.failover {
            Some(failover) if failover.handed => failover.target,
            Some(failover) if failover.phase == Phase::Draining => Some(failover.victim),
            Some(_) => None,
            None => self.primary,
        };
        let serves = |link: &Link| matches!(link.state, LinkState::Ready | LinkState::Active) && link.is_free();
        id.filter(|id| self.link(*id).is_some_and(serves))
    }

    fn start_backend(&mut self, now: Nanos, primary: bool, out: &mut Actions) -> BackendId {
        self.backends += 1;
        let id = BackendId(self.backends);
        // A private kick would make a libvhost-user backend with a region submit everything in flight again.
        let may_have_region = self.config.drain != DrainMethod::PrivateKick;
        self.links.push(Link::new(id, may_have_region, now));
        out.push(Action::Start { backend: id });
        out.push(Action::Assign { backend: id, primary });
        id
    }

    fn forget_backend(&mut self, id: BackendId, out: &mut Actions) {
        if let Some(at) = self.links.iter().position(|link| link.id == id) {
            self.links.remove(at).forget(out);
        }
    }

    fn failover_requested(&mut self, command: CommandId, at_once: bool, reason: &str, step: &mut Step<'_>) {
        let cause = format!("operator: {reason}");
        let kills = self.state_is_at_stake().filter(|_| at_once);
        let kills = kills.map(|why| format!("{why}: ask for it without --now"));
        let refusal = self
            .refusal()
            .or(kills)
            .or_else(|| self.asked.as_ref().map(|_| "another one is about to begin".to_owned()));
        if let Some(why) = refusal {
            return self.refuse_failover(command, cause, why, step);
        }
        let deadline = step.now + self.config.limits.ask_max;
        self.asked = Some(Asked { command, at_once, cause, deadline });
        self.begin_asked(step);
    }

    /// Begins what the operator asked for as soon as nothing hinders it, or refuses it when that takes too long.
    fn begin_asked(&mut self, step: &mut Step<'_>) {
        let Some(late) = self.asked.as_ref().map(|asked| step.now >= asked.deadline) else { return };
        // Knowledge of a while ago is none: a primary that is killed now is not followed any further.
        self.look_at_served(step);
        let why = self.refusal().or_else(|| self.hindrance().filter(|_| late));
        if why.is_none() && self.hindrance().is_some() {
            return;
        }
        let Asked { command, at_once, cause, .. } = self.asked.take().expect("just seen");
        match why {
            Some(why) => self.refuse_failover(command, cause, why, step),
            None => {
                let victim = self.primary.expect("refusal() has seen a primary");
                self.begin_failover(Kind::Planned, cause, victim, Some(command), !at_once, step);
            }
        }
    }

    /// What will pass by itself, mostly within microseconds, and keeps a failover that nobody needs from being made until then.
    fn hindrance(&self) -> Option<String> {
        let busy = self.shadow.and_then(|id| self.link(id)).is_some_and(|link| !link.is_free());
        let busy = busy.then(|| "the shadow is in the middle of its canary read".to_owned());
        busy.or_else(|| self.exactness_refusal())
    }

    /// Why a failover that nobody needs would not be made now, as a sentence for an operator.
    fn refusal(&self) -> Option<String> {
        if let Some(failover) = &self.failover {
            return Some(format!("failover {} is in phase {} already", failover.report.id, failover.phase.name()));
        }
        if let Some(halted) = &self.halted {
            return Some(format!("the device is halted: {halted}"));
        }
        if self.closing {
            return Some("the VMM has just disconnected and its rings are being brought to rest".to_owned());
        }
        if matches!(self.ticket, Some(Ticket::Stop { .. })) {
            return Some("the VMM is stopping a ring; try again when it has been answered".to_owned());
        }
        let Some(primary) = self.primary.and_then(|id| self.link(id)) else {
            return Some("there is no primary".to_owned());
        };
        if !matches!(primary.state, LinkState::Ready | LinkState::Active) {
            return Some(format!("the primary is {}", primary.state.name()));
        }
        match self.shadow.and_then(|id| self.link(id)) {
            None => Some(format!("there is no shadow: {}", self.shadow_note)),
            Some(shadow) if shadow.state != LinkState::Ready => {
                Some(format!("the shadow is {}, not ready", shadow.state.name()))
            }
            Some(_) => self.canary_overdue().or_else(|| self.violation()),
        }
    }

    /// A planned failover may have to fall back to fencing, so it needs exact knowledge, too.
    pub(super) fn exactness_refusal(&self) -> Option<String> {
        self.rings.iter().enumerate().find_map(|(index, ring)| {
            let knowledge = ring.observer.as_ref()?.knowledge();
            match knowledge {
                crate::observer::Knowledge::Exact => None,
                crate::observer::Knowledge::Inexact(_) if self.region_is_trusted() => None,
                crate::observer::Knowledge::Inexact(gap) => {
                    Some(format!("what ring {index} has in flight is not known exactly: {gap}"))
                }
                crate::observer::Knowledge::Violated(violation) => Some(format!("ring {index}: {violation}")),
            }
        })
    }

    /// What a ring holds that cannot be.
    fn violation(&self) -> Option<String> {
        self.rings.iter().enumerate().find_map(|(index, ring)| match ring.observer.as_ref()?.knowledge() {
            crate::observer::Knowledge::Violated(violation) => Some(format!("ring {index}: {violation}")),
            _ => None,
        })
    }
}
