//! Stopping one ring without losing what the backend holds.
//!
//! ```text
//! Diverting ─ack─▶ Settling ─quiet─▶ Asked ─reply─▶ Stopped { base }
//! ```
//! A reply to GET_VRING_BASE is a claim. Several backends answer at once and complete, or lose, requests later. So new work is
//! first kept from the backend, then its `used.idx` is watched until it rests, then it is asked, and the claim is accepted only if
//! `used.idx` equals the base.

use serde::{Deserialize, Serialize};
use warmswap_wire::ring::Layout;

use crate::memory::GuestMemory;
use crate::time::Nanos;

/// How new work is kept from a running backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainMethod {
    /// Its kick descriptor is replaced by one that never fires (qemu-storage-daemon and other users of libvhost-user without
    /// in-flight region).
    PrivateKick,
    /// The ring is disabled (rust-vmm's daemons then unregister the kick).
    Disable,
    /// GET_VRING_BASE itself drains (SPDK, DPDK, crosvm, yc-libvhost-server).
    Stop,
}

impl DrainMethod {
    /// All of them.
    pub const ALL: &[DrainMethod] = &[DrainMethod::PrivateKick, DrainMethod::Disable, DrainMethod::Stop];

    /// The word used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DrainMethod::PrivateKick => "private-kick",
            DrainMethod::Disable => "disable",
            DrainMethod::Stop => "stop",
        }
    }
}

/// Where the stop of one ring stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DrainState {
    Diverting,
    Settling,
    Asked,
    Stopped { base: u16 },
}

/// The stop of one ring.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Drain {
    pub(crate) state: DrainState,
    pub(crate) began: Nanos,
    used_idx: u16,
    rested_since: Nanos,
    event_seen: Option<u16>,
}

impl Drain {
    pub(crate) fn new(now: Nanos) -> Self {
        Drain { state: DrainState::Diverting, began: now, used_idx: 0, rested_since: now, event_seen: None }
    }

    /// The backend has acknowledged that it gets no new work.
    pub(crate) fn diverted(&mut self, now: Nanos) {
        if self.state == DrainState::Diverting {
            self.state = DrainState::Settling;
            self.rested_since = now;
        }
    }

    /// Nobody has looked for a while: rest counts from now on.
    pub(crate) fn look_again(&mut self, now: Nanos) {
        self.rested_since = now;
        self.event_seen = None;
    }

    /// Whether the ring has come to rest, so that the backend may be asked to stop. Only a hint: the proof is made afterwards.
    ///
    /// At rest means: everything submitted is completed; or, with EVENT_IDX, everything the backend says it has popped is (both
    /// libvhost-user and virtio-queue publish their position as `avail_event`); or nothing has moved for `window`.
    pub(crate) fn at_rest(
        &mut self,
        now: Nanos,
        ring: u32,
        layout: Layout,
        event_idx: bool,
        window: Nanos,
        memory: &dyn GuestMemory,
    ) -> bool {
        let used = memory.used_idx(ring);
        let outstanding = memory.avail_idx(ring).wrapping_sub(used);
        if outstanding == 0 {
            return true;
        }
        if used != self.used_idx {
            self.used_idx = used;
            self.rested_since = now;
        }
        // A position within what is outstanding is believable; a stale one is not.
        let popped = memory.avail_event(ring).wrapping_sub(used);
        if event_idx && popped == 0 && outstanding <= layout.size() {
            // Seen twice: between popping and publishing there is an instant in which the position lags.
            if self.event_seen == Some(used) {
                return true;
            }
            self.event_seen = Some(used);
            return false;
        }
        self.event_seen = None;
        now.since(self.rested_since) >= window
    }
}
