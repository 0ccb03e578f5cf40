//! What the pair is told to do and how long it may take: every bound in one place.

use warmswap_wire::DeviceType;

use crate::drain::DrainMethod;
use crate::event::FenceLevel;
use crate::failover::Kind;
use crate::time::Nanos;

/// What may be done with the requests a dead backend still owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// Write their heads over the consumed slots of the available ring.
    Place,
    /// Never write guest memory: halt unless the slots already hold them.
    Refuse,
}

/// What is made of the in-flight region that a backend keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionUse {
    /// It is a second witness: it must not contradict the ring, and proves nothing by itself.
    Witness,
    /// Where the ring could not be followed it is believed: its keeper is known to do it right.
    Trust,
}

/// What is done when a failure is predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPrediction {
    /// A failover is made, if everything that has to speak for it does.
    Act,
    /// It is reported.
    Observe,
}

impl OnPrediction {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            OnPrediction::Act => "act",
            OnPrediction::Observe => "observe",
        }
    }
}

/// The configuration of a pair.
#[derive(Clone, Debug)]
pub struct PairConfig {
    /// Type of the device.
    pub device: DeviceType,
    /// How the backend is drained.
    pub drain: DrainMethod,
    /// What may be done with survivors.
    pub survivors: Survivors,
    /// What is made of a backend's in-flight region.
    pub region: RegionUse,
    /// Least proof before another backend may write.
    pub fence: FenceLevel,
    /// A shadow is kept.
    pub shadow: bool,
    /// The shadow is asked to read from the device now and then.
    pub canary: bool,
    /// What is done when a failure is predicted.
    pub on_prediction: OnPrediction,
    /// The bounds.
    pub limits: Limits,
}

impl PairConfig {
    /// What stands in a pair that is being read, until it is told what it is to do.
    pub(crate) fn unknown() -> Self {
        PairConfig {
            device: DeviceType::Blk,
            drain: DrainMethod::Stop,
            survivors: Survivors::Refuse,
            region: RegionUse::Witness,
            fence: FenceLevel::Target,
            shadow: false,
            canary: false,
            on_prediction: OnPrediction::Observe,
            limits: Limits::default(),
        }
    }
}

/// Bounds. Reaching one is an event in the journal.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Within this the VMM gets its answer, whatever a backend does.
    pub answer_max: Nanos,
    /// A planned failover, or a stop by the VMM, may wait this long for the primary to complete what it holds.
    pub drain_max: Nanos,
    /// A primary that is silent this long while it is asked, or while requests wait, is taken for hung.
    pub hang: Nanos,
    /// A primary that answers but completes nothing for this long, while requests wait, is failed over once.
    pub stall: Nanos,
    /// A new primary has this long to show its first completion before it must answer a ping.
    pub confirm_max: Nanos,
    /// A backend has this long from start to offer.
    pub start_max: Nanos,
    /// Signs of life are asked for this often.
    pub ping_every: Nanos,
    /// Shortest and longest time between two observations of a busy ring.
    pub observe_min: Nanos,
    /// See `observe_min`.
    pub observe_max: Nanos,
    /// Longest time between two observations of a ring that is watched by its kick.
    pub observe_idle: Nanos,
    /// A ring that was idle this long is watched by its kick instead.
    pub idle_after: Nanos,
    /// Time between two looks at a ring while a failover waits for it.
    pub poll: Nanos,
    /// What the operator asked for may wait this long for something that passes by itself.
    pub ask_max: Nanos,
    /// Time between two reads by the shadow.
    pub canary_every: Nanos,
    /// Time to the first look at whether such a read is done.
    pub canary_poll: Nanos,
    /// First and longest wait before a shadow that failed to start is started again.
    pub restart_min: Nanos,
    /// See `restart_min`.
    pub restart_max: Nanos,
    /// The device's state has this long to get from the old primary to the shadow while the guest waits.
    pub transfer_max: Nanos,
    /// Deaths a request must have been in flight at before it is isolated.
    pub isolate_after: u32,
    /// Predicted failovers within an hour, at most.
    pub predicted_per_hour: u32,
    /// After a predicted failover the next one is not made for this long; twice as long each time one did not help, up to the second.
    pub cool_down_min: Nanos,
    /// See `cool_down_min`.
    pub cool_down_max: Nanos,
    /// A prediction is looked into for this long: a shadow that is on its way, and reads of the shadow, are waited for.
    pub consider_max: Nanos,
}

impl Limits {
    /// How long a primary may take to complete what it holds. One that is about to fail gets less: the guest waits.
    #[must_use]
    pub(crate) fn drain_of(&self, kind: Kind) -> Nanos {
        if kind == Kind::Predicted { self.drain_max.min(Nanos(self.hang.0 / 2)) } else { self.drain_max }
    }

    /// A ring whose kicks get lost is looked at this often, and given one if nothing was completed meanwhile.
    #[must_use]
    pub(crate) fn standstill(&self) -> Nanos {
        Nanos(self.observe_max.0 / 4)
    }

    /// Time to the next look at something that has been waited for since `waited`: often at first, then less, so that a slow disk
    /// does not cost a processor.
    #[must_use]
    pub fn poll_interval(&self, waited: Nanos) -> Nanos {
        Nanos(waited.0 / 8).clamp(self.poll, self.observe_max)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            answer_max: Nanos::from_millis(3),
            drain_max: Nanos::from_millis(1_000),
            hang: Nanos::from_millis(500),
            stall: Nanos::from_millis(30_000),
            confirm_max: Nanos::from_millis(1_000),
            start_max: Nanos::from_millis(10_000),
            ping_every: Nanos::from_millis(1_000),
            observe_min: Nanos::from_micros(100),
            observe_max: Nanos::from_micros(10_000),
            observe_idle: Nanos::from_millis(1_000),
            idle_after: Nanos::from_millis(20),
            poll: Nanos::from_micros(50),
            ask_max: Nanos::from_millis(100),
            canary_every: Nanos::from_millis(900),
            canary_poll: Nanos::from_micros(150),
            restart_min: Nanos::from_millis(10),
            restart_max: Nanos::from_millis(5_000),
            transfer_max: Nanos::from_millis(5_000),
            isolate_after: 3,
            predicted_per_hour: 6,
            cool_down_min: Nanos::from_millis(10_000),
            cool_down_max: Nanos::from_millis(3_600_000),
            consider_max: Nanos::from_millis(1_000),
        }
    }
}
