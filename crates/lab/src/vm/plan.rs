//! What is done to the disk, and when: made from the seed before the run, so that a run can be repeated.

use std::time::Duration;

use super::rng::Rng;

/// The ways a primary is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Asked for: the primary is drained, then swapped.
    Planned,
    /// SIGKILL.
    Crash,
    /// SIGSTOP.
    Hang,
}

impl Kind {
    /// The word used everywhere.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Crash => "crash",
            Self::Hang => "hang",
        }
    }
}

/// When the broker is killed as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BrokerKill {
    /// At some instant under load; the next one makes the failover.
    UnderLoad,
    /// Before so many things that it does, counted from just before the failover: in the middle of it more often than not.
    Before(u64),
}

/// One failover to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    /// How long after the device is ready for it.
    pub(crate) gap: Duration,
    /// Which one.
    pub(crate) kind: Kind,
    /// Whether the broker dies as well.
    pub(crate) broker_kill: Option<BrokerKill>,
}

/// A whole run's failovers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// In order.
    pub(crate) steps: Vec<Step>,
    /// Load after the last one.
    pub(crate) tail: Duration,
}

impl Plan {
    /// `count` failovers, each kind in turn, at random distances.
    pub(crate) fn in_turn(seed: u64, count: u32, kinds: &[Kind]) -> Self {
        let mut plan = Self::random(seed, count, kinds);
        plan.steps.iter_mut().zip(kinds.iter().cycle()).for_each(|(step, kind)| step.kind = *kind);
        plan
    }

    /// `count` failovers of random kinds at random distances.
    pub(crate) fn random(seed: u64, count: u32, kinds: &[Kind]) -> Self {
        const GAP_MS: (u64, u64) = (150, 1500);
        let mut rng = Rng::new(seed, 100);
        let step = |_| Step {
            gap: Duration::from_millis(rng.range(GAP_MS.0, GAP_MS.1)),
            kind: *rng.pick(kinds),
            broker_kill: None,
        };
        Self { steps: (0..count).map(step).collect(), tail: Duration::from_secs(2) }
    }

    /// The broker is killed once for each failover: of three times twice under load, and once in the middle of it.
    pub(crate) fn with_broker_kills(mut self, seed: u64) -> Self {
        /// More than a failover of two queues takes.
        const STEPS: (u64, u64) = (1, 60);
        let mut rng = Rng::new(seed, 101);
        for step in &mut self.steps {
            let in_failover = rng.range(0, 3) == 0;
            step.broker_kill = Some(match in_failover {
                true => BrokerKill::Before(rng.range(STEPS.0, STEPS.1)),
                false => BrokerKill::UnderLoad,
            });
        }
        self
    }

    /// The given kinds, one every `gap`.
    pub(crate) fn steady(kinds: &[Kind], gap: Duration, tail: Duration) -> Self {
        Self { steps: kinds.iter().map(|&kind| Step { gap, kind, broker_kill: None }).collect(), tail }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_repeats_and_keeps_to_the_kinds() {
        let kinds = [Kind::Planned, Kind::Hang];
        let plan = Plan::random(5, 50, &kinds);
        assert_eq!(plan, Plan::random(5, 50, &kinds));
        assert_ne!(plan, Plan::random(6, 50, &kinds));
        assert!(plan.steps.iter().all(|step| kinds.contains(&step.kind)));
        let kills = Plan::random(5, 300, &kinds).with_broker_kills(5);
        assert_eq!(kills, Plan::random(5, 300, &kinds).with_broker_kills(5));
        let under_load = kills.steps.iter().filter(|step| step.broker_kill == Some(BrokerKill::UnderLoad)).count();
        assert!((150..250).contains(&under_load), "{under_load} of 300");
        let in_turn: Vec<Kind> = Plan::in_turn(5, 3, &kinds).steps.iter().map(|step| step.kind).collect();
        assert_eq!(in_turn, [Kind::Planned, Kind::Hang, Kind::Planned]);
    }
}
