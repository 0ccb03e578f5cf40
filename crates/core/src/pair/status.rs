//! What is shown of a pair to people and programs.

use super::Pair;
use crate::event::BackendId;
use crate::failover::{Phase, Report};
use crate::foresight::PolicyStatus;
use crate::link::LinkState;
use crate::observer::Observer;
use crate::time::Nanos;
use serde::{Deserialize, Serialize};

/// Counters since the pair was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Failovers that settled.
    pub settled: u64,
    /// Of these, asked for by the operator.
    pub planned: u64,
    /// Of these, because a failure was predicted.
    pub predicted: u64,
    /// Of these, after a death.
    pub crash: u64,
    /// Of these, after a hang.
    pub hang: u64,
    /// Windows with an alarm of the failure model.
    pub alarms: u64,
    /// Of these, not acted upon.
    pub withheld: u64,
    /// Failovers that were refused.
    pub refused: u64,
    /// Failovers that were halted.
    pub halted: u64,
    /// Shadows that were lost.
    pub shadows_lost: u64,
    /// Requests answered with an I/O error because they killed every backend.
    pub isolated: u64,
    /// Canary reads that ended with an error or not at all.
    pub canaries_failed: u64,
    /// Drains whose claim did not match the ring.
    pub drains_unverified: u64,
    /// Drains that did not end in time.
    pub drains_overdue: u64,
    /// Requests of the VMM that were answered without the backends.
    pub answered_from_record: u64,
    /// Messages that were refused.
    pub refused_messages: u64,
    /// Backends that broke the protocol.
    pub protocol_errors: u64,
    /// Requests of the VMM.
    pub vmm_requests: u64,
    /// Connections of the VMM.
    pub vmm_connections: u64,
    /// Brokers that have gone on with it after another one had ended.
    pub take_overs: u64,
    /// Looks at rings.
    pub observations: u64,
    /// Looks that came too late.
    pub observer_gaps: u64,
}

/// Overall state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairState {
    /// It is not known yet what can be offered to the VMM.
    Starting,
    /// A primary serves and a shadow is ready.
    Protected,
    /// A primary serves, or will, and no shadow is ready.
    Unprotected,
    /// A failover is running.
    FailingOver,
    /// A failover was halted.
    Halted,
}

impl PairState {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            PairState::Starting => "starting",
            PairState::Protected => "protected",
            PairState::Unprotected => "unprotected",
            PairState::FailingOver => "failing-over",
            PairState::Halted => "halted",
        }
    }
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendStatus {
    /// Its generation.
    pub id: BackendId,
    /// Where it stands.
    pub state: LinkState,
    /// How long the last read of its canary took, if it has had one.
    pub canary: Option<Nanos>,
}

/// One ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingStatus {
    /// Index.
    pub index: u32,
    /// Number of entries.
    pub size: u16,
    /// A backend serves it.
    pub served: bool,
    /// `avail.idx` at the last observation.
    pub avail_idx: u16,
    /// `used.idx` at the last observation.
    pub used_idx: u16,
    /// Requests in flight at the last observation.
    pub inflight: u16,
    /// `exact`, `inexact` or `violated`.
    pub observer: &'static str,
    /// Requests seen since its start.
    pub requests: u64,
}

/// A pair at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Overall state.
    pub state: PairState,
    /// Phase of the running failover.
    pub phase: Phase,
    /// The VMM is connected.
    pub vmm_connected: bool,
    /// The primary.
    pub primary: Option<BackendStatus>,
    /// The shadow.
    pub shadow: Option<BackendStatus>,
    /// Why there is no shadow, or how it is.
    pub shadow_note: String,
    /// Why a planned failover would be refused now.
    pub refusal: Option<String>,
    /// Why the device is halted.
    pub halted: Option<String>,
    /// Recovery level: `exact`, `drained` or `refused`.
    pub recovery: &'static str,
    /// Rings the VMM wants served.
    pub rings: Vec<RingStatus>,
    /// What is done about predictions.
    pub policy: PolicyStatus,
    /// Counters.
    pub counters: Counters,
    /// The last failover.
    pub last: Option<Report>,
}

impl Pair {
    /// How long the primary took to give its last sign of life that was asked for.
    #[must_use]
    pub fn round_trip(&self) -> Option<Nanos> {
        self.link(self.primary?)?.round_trip
    }

    /// How long the shadow's last canary took.
    #[must_use]
    pub fn canary(&self) -> Option<Nanos> {
        self.link(self.shadow?)?.canary.took
    }

    /// Whether a failover is running.
    #[must_use]
    pub fn is_failing_over(&self) -> bool {
        self.failover.is_some()
    }

    /// The primary.
    #[must_use]
    pub fn primary(&self) -> Option<BackendId> {
        self.primary
    }

    /// Whether driver and device tell each other by event indices when they want to be notified.
    #[must_use]
    pub fn has_event_idx(&self) -> bool {
        self.session.has_event_idx()
    }

    /// The pair as it is now.
    #[must_use]
    pub fn status(&self, now: Nanos) -> Status {
        let backend = |id: Option<BackendId>| {
            let link = self.link(id?)?;
            Some(BackendStatus { id: link.id, state: link.state, canary: link.canary.took })
        };
        Status {
            state: self.state(),
            phase: self
                .failover
                .as_ref()
                .map_or(if self.halted.is_some() { Phase::Halted } else { Phase::Idle }, |failover| failover.phase),
            vmm_connected: self.vmm_connected,
            primary: backend(self.primary),
            shadow: backend(self.shadow),
            shadow_note: self.shadow_differs().unwrap_or_else(|| self.shadow_note.clone()),
            refusal: self.refusal().or_else(|| self.hindrance()),
            halted: self.halted.clone(),
            recovery: self.recovery_level(),
            rings: self.ring_status(),
            policy: self.policy.status(self.config.on_prediction, &self.config.limits, now),
            counters: self.counters,
            last: self.last_report.clone(),
        }
    }

    fn state(&self) -> PairState {
        let ready = self.shadow.and_then(|id| self.link(id)).is_some_and(|link| link.state == LinkState::Ready);
        if self.offer.is_none() {
            PairState::Starting
        } else if self.halted.is_some() {
            PairState::Halted
        } else if self.failover.is_some() {
            PairState::FailingOver
        } else if ready && self.shadow_differs().is_none() {
            PairState::Protected
        } else {
            PairState::Unprotected
        }
    }

    /// What a crash right now could promise.
    fn recovery_level(&self) -> &'static str {
        let exact = self.exactness_refusal().is_none();
        match (exact, self.config.device.may_replay()) {
            (true, true) => "exact",
            (_, false) => "drained",
            (false, true) => "refused",
        }
    }

    fn ring_status(&self) -> Vec<RingStatus> {
        let observed =
            (0_u32..).zip(&self.rings).filter_map(|(index, ring)| Some((index, ring, ring.observer.as_ref()?)));
        observed
            .map(|(index, ring, observer): (u32, _, &Observer)| RingStatus {
                index,
                size: observer.layout().size(),
                served: ring.served,
                avail_idx: observer.avail_idx(),
                used_idx: observer.used_idx(),
                inflight: observer.outstanding(),
                observer: observer.knowledge().name(),
                requests: observer.submissions(),
            })
            .collect()
    }
}
