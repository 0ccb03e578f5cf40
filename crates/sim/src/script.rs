//! What a VMM does, step by step, in the order of each implementation.

use std::collections::VecDeque;

use warmswap_core::Nanos;
use warmswap_wire::{ConfigSpace, Request, VringAddr, VringState};

use crate::options::VmmRule;

/// Something the VMM does next.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Connects.
    Connect,
    /// Sends a request; waits for its answer where it has one.
    Say(Request),
    /// As `Say`, and asks for an acknowledgement where that is possible.
    Insist(Request),
    /// Accepts what was offered.
    Features,
    /// See `Features`.
    Protocol,
    /// Describes all of the guest's memory.
    Memory,
    /// Names where a ring begins, by its rule.
    Base(u16),
    /// Gives a ring its kick descriptor: a new one.
    Kick(u16),
    /// Gives a ring a call descriptor: a new one.
    Call(u16),
    /// Lets the guest's processors run, or stops them.
    Run,
    /// See `Run`.
    Pause,
    /// Does nothing for a while.
    Wait(Nanos),
    /// Sets all rings up as a driver does after a reset.
    Reset,
    /// Another guest, with memory of its own.
    NewGuest,
    /// Gives the guest memory, or takes it away again.
    Plug,
    /// The guest uses it.
    Plugged,
    /// See `Plug`.
    Unplug,
    /// Waits until no request lies in it.
    Unused,
    /// A message without the descriptor it needs.
    Bare(Request),
    /// A message nobody knows.
    Unknown,
}

/// Asks for the configuration space.
pub(crate) fn get_config() -> Request {
    Request::GetConfig(ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 60] })
}

/// Connects, negotiates, describes everything and starts all rings.
pub(crate) fn boot(rule: VmmRule, rings: u16) -> VecDeque<Step> {
    let mut steps = vec![Step::Connect, Step::Say(Request::GetFeatures)];
    if rule != VmmRule::Qemu {
        steps.push(Step::Say(Request::SetOwner));
    }
    steps.extend([Step::Say(Request::GetProtocolFeatures), Step::Protocol]);
    if rule != VmmRule::Firecracker {
        steps.push(Step::Say(Request::GetQueueNum));
    }
    if rule == VmmRule::Qemu {
        steps.extend([Step::Say(Request::GetMaxMemSlots), Step::Say(Request::SetOwner)]);
    }
    steps.extend([Step::Say(get_config()), Step::Features, Step::Memory]);
    steps.extend(start_rings(rule, rings));
    steps.push(Step::Run);
    steps.into()
}

/// Describes and starts all rings.
pub(crate) fn start_rings(rule: VmmRule, rings: u16) -> Vec<Step> {
    // Sizes and addresses are filled in when they are sent.
    let num = |ring| Step::Say(Request::SetVringNum(VringState { index: u32::from(ring), value: 0 }));
    let addr = |ring| {
        let index = u32::from(ring);
        Step::Say(Request::SetVringAddr(VringAddr { index, flags: 0, descriptor: 0, used: 0, available: 0, log: 0 }))
    };
    let enable = |ring| Step::Say(Request::SetVringEnable(VringState { index: u32::from(ring), value: 1 }));
    let mut steps = Vec::new();
    if rule == VmmRule::Qemu {
        for ring in 0..rings {
            steps.extend([num(ring), Step::Base(ring), addr(ring), Step::Kick(ring), Step::Call(ring)]);
        }
    } else {
        steps.extend((0..rings).map(num));
        for ring in 0..rings {
            steps.extend([addr(ring), Step::Base(ring), Step::Call(ring), Step::Kick(ring)]);
        }
    }
    steps.extend((0..rings).map(enable));
    steps
}
