//! What a device of each type owes its guest at a failover.

use crate::vm::device::Device;
use crate::vm::plan::{Kind, Plan, Step};

/// What is asked of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Demand {
    /// Requests that may be lost at a failover, because the device's nature allows it: what a network card had taken up and not yet
    /// passed on dies with it, as on a wire.
    pub(super) lost_per_failover: u64,
    /// What a death must lead to.
    pub(super) death: Death,
    /// The longest time the guest may wait, in microseconds.
    pub(super) longest_us: u64,
}

/// How a failover after a death ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    /// The other one takes over.
    Settles,
    /// What the device is lies in the process that is dead: it stands still, and says why. The run ends there. One that hangs is left
    /// alone, so there is nothing to be seen.
    Halts,
    /// The other one takes over if nothing was owed: requests must not be executed twice. Else it halts, and the run ends there.
    HaltsIfOwed,
}

/// Twice the window of datagrams: a packet of the stream as well for each.
const PACKETS_IN_FLIGHT: u64 = 64;

impl Demand {
    pub(super) fn of(device: Device) -> Self {
        // The emulated processors share those of the host with two backends, and maybe with others: a wait says little here.
        let demand = Self { lost_per_failover: 0, death: Death::Settles, longest_us: 10_000_000 };
        match device {
            Device::Blk | Device::Rng => demand,
            Device::Net => Self { lost_per_failover: PACKETS_IN_FLIGHT, ..demand },
            Device::Scsi => Self { death: Death::HaltsIfOwed, ..demand },
            Device::Fs => Self { death: Death::Halts, ..demand },
        }
    }

    /// The plan, so that what ends a run comes last.
    pub(super) fn plan(&self, mut plan: Plan) -> Plan {
        let ends = |kind: Kind| match self.death {
            Death::Settles => false,
            Death::Halts => kind == Kind::Crash,
            Death::HaltsIfOwed => kind != Kind::Planned,
        };
        if self.death != Death::Settles {
            let planned = plan.steps.iter().filter(|step| step.kind == Kind::Planned).copied();
            let last = plan.steps.iter().find(|step| ends(step.kind)).copied();
            plan.steps = planned.chain(last).collect::<Vec<Step>>();
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_ends_a_run_comes_last_and_once() {
        let kinds = [Kind::Crash, Kind::Planned, Kind::Crash, Kind::Planned];
        let plan = Plan::steady(&kinds, Duration::from_secs(1), Duration::from_secs(1));
        let kinds_of = |plan: &Plan| plan.steps.iter().map(|step| step.kind).collect::<Vec<_>>();
        let halting = Demand::of(Device::Fs).plan(plan.clone());
        assert_eq!(kinds_of(&halting), [Kind::Planned, Kind::Planned, Kind::Crash]);
        assert_eq!(Demand::of(Device::Net).plan(plan.clone()), plan);
        let hangs = Plan::steady(&[Kind::Planned, Kind::Hang], Duration::from_secs(1), Duration::from_secs(1));
        assert_eq!(kinds_of(&Demand::of(Device::Fs).plan(hangs.clone())), [Kind::Planned]);
        assert_eq!(Demand::of(Device::Scsi).plan(hangs.clone()), hangs);
    }
}
