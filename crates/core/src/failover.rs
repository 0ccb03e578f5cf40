//! The failover: its phases, what it has proved so far, and the report it leaves.
//!
//! ```text
//! Idle → [Draining] → Fencing → Collecting → [Isolating | Transferring] → Handing → Resuming → Confirming → Settled
//!             └── deadline ──┘       └── sources disagree → Halted
//! ```
//! A failed Handing, Resuming or Confirming goes back to Fencing, with the failed shadow as the victim.

use std::collections::VecDeque;

use crate::event::{BackendId, CommandId, FenceLevel};
use crate::time::Nanos;
use serde::{Deserialize, Serialize};

/// Phase of a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// No failover is running.
    Idle,
    /// New work is kept from the primary and what it holds completes.
    Draining,
    /// The primary is being killed and proved harmless.
    Fencing,
    /// What it owed is being counted.
    Collecting,
    /// A request that kills every backend is being found.
    Isolating,
    /// What the device is beyond its rings is being carried from the old primary to the shadow.
    Transferring,
    /// The shadow is being given the rings.
    Handing,
    /// Kicks and calls have been written, acknowledgements are waited for.
    Resuming,
    /// The first completion on every ring that owed work is waited for.
    Confirming,
    /// The shadow is the primary.
    Settled,
    /// The sources disagree; an operator decides.
    Halted,
}

impl Phase {
    /// The phases a failover spends time in, in their order.
    pub const TIMED: [Phase; 8] = [
        Phase::Draining,
        Phase::Fencing,
        Phase::Collecting,
        Phase::Isolating,
        Phase::Transferring,
        Phase::Handing,
        Phase::Resuming,
        Phase::Confirming,
    ];

    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "Idle",
            Phase::Draining => "Draining",
            Phase::Fencing => "Fencing",
            Phase::Collecting => "Collecting",
            Phase::Isolating => "Isolating",
            Phase::Transferring => "Transferring",
            Phase::Handing => "Handing",
            Phase::Resuming => "Resuming",
            Phase::Confirming => "Confirming",
            Phase::Settled => "Settled",
            Phase::Halted => "Halted",
        }
    }

    fn timed_index(self) -> Option<usize> {
        Self::TIMED.iter().position(|phase| *phase == self)
    }
}

/// Why a failover is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// The operator asked.
    Planned,
    /// The primary works, but its failure is thought to be imminent.
    Predicted,
    /// The primary died.
    Crash,
    /// The primary lives but does nothing.
    Hang,
}

impl Kind {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Planned => "planned",
            Kind::Predicted => "predicted",
            Kind::Crash => "crash",
            Kind::Hang => "hang",
        }
    }
}

/// How sure it is that exactly what was owed was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recovery {
    /// An unbroken chain of observations, or a region and rings that agree.
    Exact,
    /// The primary completed everything it had taken; only a planned failover can have this.
    Drained,
    /// Not possible; the report says why.
    Refused,
}

impl Recovery {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Recovery::Exact => "exact",
            Recovery::Drained => "drained",
            Recovery::Refused => "refused",
        }
    }
}

/// How a failover ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The shadow serves the guest.
    Settled,
    /// It was not begun; the report says why.
    Refused,
    /// It was stopped; an operator decides.
    Halted,
}

impl Outcome {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Settled => "settled",
            Outcome::Refused => "refused",
            Outcome::Halted => "halted",
        }
    }
}

/// What a failover did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its number.
    pub id: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was made.
    pub kind: Kind,
    /// The reason in words: the operator's, or what was seen of the primary.
    pub cause: String,
    /// How it ended, in words.
    pub message: String,
    /// Requests that were outstanding when it began.
    pub inflight: u32,
    /// Requests the old primary still owed when it was fenced or drained.
    pub survivors: u32,
    /// How sure the handover was.
    pub recovery: Recovery,
    /// What was proved about the old primary.
    pub fence: FenceLevel,
    /// The evidence for it.
    pub evidence: String,
    /// Time spent in each of [`Phase::TIMED`].
    pub phases: [Nanos; Phase::TIMED.len()],
    /// From freeze or detected death to the first completion by the new primary; to the last kick where nothing was owed.
    pub blackout: Nanos,
    /// Backends that failed on the way.
    pub attempts: u32,
    /// Requests answered with an I/O error because they killed every backend.
    pub isolated: u32,
}

/// A failover under way.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failover {
    pub(crate) report: Report,
    pub(crate) phase: Phase,
    pub(crate) began: Nanos,
    pub(crate) entered: Nanos,
    pub(crate) command: Option<CommandId>,
    /// The backend to be drained or fenced.
    pub(crate) victim: BackendId,
    /// The backend that takes over, once chosen.
    pub(crate) target: Option<BackendId>,
    /// Rings that owed work when they were handed, with their `used.idx`.
    pub(crate) owing: Vec<(u32, u16)>,
    pub(crate) first_completion: Option<Nanos>,
    pub(crate) handed: bool,
    pub(crate) poll_at: Nanos,
    pub(crate) isolation: Option<Isolation>,
    /// The transfer of the device's state, where it has one.
    pub(crate) transfer: Option<Transfer>,
    /// Why the primary gets its rings back as soon as none of them is just being stopped.
    pub(crate) undone: Option<String>,
}

/// A transfer of a device's state.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) step: TransferStep,
    /// The shadow that is to have it.
    pub(crate) to: BackendId,
    pub(crate) began: Nanos,
    /// Bytes of it.
    pub(crate) size: u64,
}

/// Where a transfer stands, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum TransferStep {
    /// The old primary gets somewhere to write it to, and writes it.
    Saving,
    /// It is asked whether that was all.
    Saved,
    /// The shadow gets somewhere to read it from, and reads it.
    Loading,
    /// It is asked whether it can go on with that.
    Loaded,
    /// It can.
    Done,
}

/// The search for a request that kills every backend: each is run alone, on a ring of its own.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Isolation {
    /// Rings and heads still to be tried, in the order of their submission.
    pub(crate) queue: VecDeque<(u32, u16)>,
    /// The one being tried, and on which backend.
    pub(crate) trial: Option<Trial>,
}

/// One request on trial.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Trial {
    pub(crate) ring: u32,
    pub(crate) head: u16,
    pub(crate) backend: BackendId,
    pub(crate) began: Nanos,
    /// The backend is being fenced; the verdict follows.
    pub(crate) over: bool,
    /// The VMM has stopped the ring: the verdict concerns nobody any more.
    pub(crate) abandoned: bool,
}

impl Failover {
    pub(crate) fn new(
        id: u64,
        kind: Kind,
        cause: String,
        victim: BackendId,
        command: Option<CommandId>,
        now: Nanos,
    ) -> Self {
        Failover {
            report: Report {
                id,
                outcome: Outcome::Settled,
                kind,
                cause,
                message: String::new(),
                inflight: 0,
                survivors: 0,
                recovery: Recovery::Exact,
                fence: FenceLevel::Reaped,
                evidence: String::new(),
                phases: [Nanos(0); Phase::TIMED.len()],
                blackout: Nanos(0),
                attempts: 0,
                isolated: 0,
            },
            phase: Phase::Idle,
            began: now,
            entered: now,
            command,
            victim,
            target: None,
            owing: Vec::new(),
            first_completion: None,
            handed: false,
            poll_at: now,
            isolation: None,
            transfer: None,
            undone: None,
        }
    }

    /// Enters a phase and books the time of the one before.
    pub(crate) fn enter(&mut self, phase: Phase, now: Nanos) {
        if let Some(at) = self.phase.timed_index() {
            self.report.phases[at] = self.report.phases[at] + now.since(self.entered);
        }
        self.phase = phase;
        self.entered = now;
        self.poll_at = now;
    }

    pub(crate) fn spent(&self, now: Nanos) -> Nanos {
        now.since(self.entered)
    }
}
