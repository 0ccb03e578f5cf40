//! What happens to a pair, and what the pair wants done about it.
//!
//! The caller turns the outside world into [`Event`]s, hands each to [`crate::Pair::handle`] and carries out the [`Action`]s
//! in their order. Nothing here does I/O.

use serde::{Deserialize, Serialize};
use warmswap_wire::{BackendRequest, FdSlot, Header, Request};

use crate::failover::Report;
use crate::foresight::Foresight;
use crate::journal::Entry;
use crate::time::Nanos;

/// A backend process, by its generation: every process a pair ever had has a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackendId(pub u64);

impl std::fmt::Display for BackendId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Which way a device's state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDirection {
    /// Out of a backend.
    Save,
    /// Into one.
    Load,
}

/// A command waiting for its answer, by the caller's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandId(pub u64);

/// Eventfds of the broker's own, for one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateEvents {
    /// Given to the backend as kick where the guest's kicks must not reach it.
    pub kick: FdSlot,
    /// Given to the backend as call where its calls must not reach the guest.
    pub call: FdSlot,
    /// Given to the backend as kick of a ring of the broker's own.
    pub probe: FdSlot,
}

/// What has been proved about a backend that must no longer touch anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FenceLevel {
    /// F0: its stop was acknowledged and every ring's `used.idx` equals the returned base.
    Stopped,
    /// F1: process gone, its cgroup empty, its storage descriptions closed.
    Reaped,
    /// F2: the storage target refuses the old writer.
    Target,
}

impl FenceLevel {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FenceLevel::Stopped => "stopped",
            FenceLevel::Reaped => "reaped",
            FenceLevel::Target => "target",
        }
    }
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// The VMM connected.
    VmmConnected,
    /// A request of the VMM. Only delivered while [`crate::Pair::wants_request`].
    VmmRequest {
        /// The decoded request.
        request: Request,
        /// The VMM wants an acknowledgement.
        need_reply: bool,
    },
    /// The VMM sent something that is not a request this broker knows; `need_reply` as in its header.
    VmmRefused {
        /// Request id.
        request: u32,
        /// Why it was refused.
        reason: String,
        /// The VMM wants an acknowledgement.
        need_reply: bool,
    },
    /// The VMM's connection ended, or broke the protocol beyond repair.
    VmmGone {
        /// In words.
        reason: String,
    },
    /// A backend accepted the link.
    LinkUp {
        /// Which.
        backend: BackendId,
        /// Our end's counterpart of its back-end request channel, to be sent to it.
        backend_req: Option<FdSlot>,
        /// Eventfds of the broker's own: a kick nobody writes, for diverting new work, a call nobody reads, and the kick of the broker's
        /// own ring.
        private: PrivateEvents,
    },
    /// A message from a backend on its link, not yet decoded: only the core knows what was asked.
    LinkMessage {
        /// Which.
        backend: BackendId,
        /// Its header.
        header: Header,
        /// Its payload.
        payload: Vec<u8>,
        /// Its descriptors.
        fds: Vec<FdSlot>,
    },
    /// A request of a backend on its own channel.
    BackendRequest {
        /// Which.
        backend: BackendId,
        /// The decoded request.
        request: BackendRequest,
        /// It wants an acknowledgement.
        need_reply: bool,
    },
    /// A backend's link ended or broke the protocol.
    LinkDown {
        /// Which.
        backend: BackendId,
        /// In words.
        reason: String,
    },
    /// A backend's process ended by itself, or could not be started at all.
    Exited {
        /// Which.
        backend: BackendId,
        /// How, in words: exit status, last lines it printed.
        reason: String,
    },
    /// A backend asked for with [`Action::Fence`] is proved harmless.
    Fenced {
        /// Which.
        backend: BackendId,
        /// What was proved.
        level: FenceLevel,
        /// The evidence, in words.
        evidence: String,
    },
    /// Proof is still missing after some time; it is still being waited for.
    FenceWaiting {
        /// Which.
        backend: BackendId,
        /// What is missing.
        reason: String,
    },
    /// The channel asked for with [`Action::OpenState`] is there: the end that belongs to the backend.
    StateOpened {
        /// Which.
        backend: BackendId,
        /// The end, or why there is none.
        channel: Result<FdSlot, String>,
    },
    /// A backend's state was received whole, or sent whole, as was asked for with [`Action::OpenState`].
    StateMoved {
        /// Which.
        backend: BackendId,
        /// Bytes, or why it was not.
        size: Result<u64, String>,
    },
    /// The kick descriptor of a ring that was asked for with [`Action::WatchKick`] fired.
    Kicked {
        /// Ring index.
        ring: u32,
    },
    /// The operator wants a failover.
    FailoverRequested {
        /// Whom to answer.
        command: CommandId,
        /// No drain: fence at once.
        now: bool,
        /// The operator's reason.
        reason: String,
    },
    /// The failure model takes a failure of the primary for imminent.
    FailurePredicted(Foresight),
    /// Time has passed.
    Tick,
}

/// Something to be done.
#[derive(Debug)]
pub enum Action {
    /// Send to the VMM (a reply).
    SendVmm {
        /// Bytes of one message.
        bytes: Vec<u8>,
        /// Descriptors that travel with it.
        fds: Vec<FdSlot>,
    },
    /// Send to the VMM on the back-end request channel.
    SendVmmBackend {
        /// The channel.
        channel: FdSlot,
        /// Bytes of one message.
        bytes: Vec<u8>,
    },
    /// Drop the VMM's connection: it broke the protocol.
    DropVmm,
    /// Send to a backend on its link.
    SendLink {
        /// Which.
        backend: BackendId,
        /// Bytes of one message.
        bytes: Vec<u8>,
        /// Descriptors that travel with it.
        fds: Vec<FdSlot>,
    },
    /// Answer a backend on its own channel.
    SendLinkBackend {
        /// Which.
        backend: BackendId,
        /// Bytes of one message.
        bytes: Vec<u8>,
    },
    /// Close a descriptor of the table.
    Close(FdSlot),
    /// Write an eventfd once.
    Signal(FdSlot),
    /// Start a backend process and connect to it; [`Event::LinkUp`] or [`Event::Exited`] follows.
    Start {
        /// Its generation.
        backend: BackendId,
    },
    /// Kill a backend and prove it harmless; [`Event::Fenced`] follows, however long it takes.
    Fence {
        /// Which.
        backend: BackendId,
    },
    /// End a backend that serves nothing. No proof is waited for, nothing follows.
    Retire {
        /// Which.
        backend: BackendId,
    },
    /// Make a channel for a backend's state: [`Event::StateOpened`] follows. What the backend writes is read to its end and kept, or
    /// what was kept last is written to it, and the channel closed; [`Event::StateMoved`] follows that.
    OpenState {
        /// Which.
        backend: BackendId,
        /// Out of it, or into it.
        direction: StateDirection,
    },
    /// Tell with [`Event::Kicked`], once, when this ring is kicked, without taking the kick away.
    WatchKick {
        /// Ring index.
        ring: u32,
        /// Its kick descriptor.
        kick: FdSlot,
    },
    /// Stop watching.
    UnwatchKick {
        /// Ring index.
        ring: u32,
    },
    /// A backend has been given the primary's or the shadow's role.
    Assign {
        /// Which.
        backend: BackendId,
        /// Serves the guest from now on.
        primary: bool,
    },
    /// Write to the journal.
    Journal(Entry),
    /// Answer a command.
    Answer {
        /// Which.
        command: CommandId,
        /// How the failover ended.
        report: Box<Report>,
    },
}

/// The actions of one step, in order.
#[derive(Debug, Default)]
pub struct Actions {
    list: Vec<Action>,
}

impl Actions {
    /// Adds one.
    pub fn push(&mut self, action: Action) {
        self.list.push(action);
    }

    /// Takes them all, oldest first, keeping the room for the next step.
    pub fn drain(&mut self) -> std::vec::Drain<'_, Action> {
        self.list.drain(..)
    }

    /// Adds a journal entry.
    pub fn journal(&mut self, entry: Entry) {
        self.push(Action::Journal(entry));
    }
}

/// When something has to happen at the latest.
#[must_use]
pub(crate) fn earliest(left: Option<Nanos>, right: Option<Nanos>) -> Option<Nanos> {
    match (left, right) {
        (Some(left), Some(right)) => Some(left.min(right)),
        (one, None) | (None, one) => one,
    }
}
