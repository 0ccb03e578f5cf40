//! What a profile record is to the failure model: outcomes and the context that explains a part of them, both on scales on which differences
//! mean the same everywhere.
//!
//! Latencies, rates, bytes and counts are taken as logarithms: a slowdown to twice is one step at a microsecond and at a second. Shares
//! are taken as they are.

use crate::record::Record;
use crate::schema::{Feature, Unit};

/// What an outcome tells of: outcomes of one kind speak with one voice, so that ten ways to see a slow disk do not outvote one leak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// How long requests take in the middle.
    Latency,
    /// How long the longest take.
    Tail,
    /// Requests that fail or are tried again.
    Error,
    /// Processor time.
    Cpu,
    /// Waiting for a processor.
    Starved,
    /// Memory and faults.
    Memory,
    /// Descriptors and threads.
    Handles,
    /// Kicks and interrupts.
    Signals,
    /// What lies below: device, pressure.
    Below,
    /// The control connection and the canary.
    Control,
}

impl Kind {
    /// Number of kinds.
    pub const COUNT: usize = 10;
    /// Every kind, in the order of their declaration.
    pub const ALL: [Kind; Kind::COUNT] = [
        Kind::Latency,
        Kind::Tail,
        Kind::Error,
        Kind::Cpu,
        Kind::Starved,
        Kind::Memory,
        Kind::Handles,
        Kind::Signals,
        Kind::Below,
        Kind::Control,
    ];

    /// The word used in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Latency => "latency",
            Kind::Tail => "tail",
            Kind::Error => "error",
            Kind::Cpu => "cpu",
            Kind::Starved => "starved",
            Kind::Memory => "memory",
            Kind::Handles => "handles",
            Kind::Signals => "signals",
            Kind::Below => "below",
            Kind::Control => "control",
        }
    }
}

/// The outcomes. More is worse of every one of them.
pub const OUTCOMES: [(Feature, Kind); OUTCOME_COUNT] = [
    (Feature::LatencyMean, Kind::Latency),
    (Feature::LatencyP50, Kind::Latency),
    (Feature::LatencyP90, Kind::Latency),
    (Feature::ReadP50, Kind::Latency),
    (Feature::WriteP50, Kind::Latency),
    (Feature::FlushP50, Kind::Latency),
    (Feature::LatencyP99, Kind::Tail),
    (Feature::LatencyP999, Kind::Tail),
    (Feature::LatencyMax, Kind::Tail),
    (Feature::ReadP99, Kind::Tail),
    (Feature::WriteP99, Kind::Tail),
    (Feature::FlushP99, Kind::Tail),
    (Feature::OldestAge, Kind::Tail),
    (Feature::Gap, Kind::Tail),
    (Feature::ErrorShare, Kind::Error),
    (Feature::Errors, Kind::Error),
    (Feature::Retries, Kind::Error),
    (Feature::Malformed, Kind::Error),
    (Feature::CpuPerRequest, Kind::Cpu),
    (Feature::RunDelay, Kind::Starved),
    (Feature::SwitchesInvoluntary, Kind::Starved),
    (Feature::Throttled, Kind::Starved),
    (Feature::GroupCpuPressure, Kind::Starved),
    (Feature::MinorFaults, Kind::Memory),
    (Feature::MajorFaults, Kind::Memory),
    (Feature::RssAnon, Kind::Memory),
    (Feature::GroupMemoryPressure, Kind::Memory),
    (Feature::Descriptors, Kind::Handles),
    (Feature::Threads, Kind::Handles),
    (Feature::Pickup, Kind::Signals),
    (Feature::KickOverdue, Kind::Signals),
    (Feature::CallOverdue, Kind::Signals),
    (Feature::Reaction, Kind::Signals),
    (Feature::DiskWait, Kind::Below),
    (Feature::GroupIoPressure, Kind::Below),
    (Feature::ControlRoundTrip, Kind::Control),
    (Feature::Canary, Kind::Control),
];

/// Number of outcomes.
pub const OUTCOME_COUNT: usize = 37;

/// Number of terms of context, the constant 1 among them.
pub const CONTEXT_COUNT: usize = 9;
/// Place of the depth among them.
pub(crate) const DEPTH: usize = 1;
/// Place of the share that the page cache did not have.
pub(crate) const MISSES: usize = 8;

/// An outcome on its scale, if it is not missing.
#[must_use]
pub fn outcome(record: &Record, at: usize) -> Option<f32> {
    let feature = OUTCOMES[at].0;
    record.get(feature).map(|value| scaled(feature, value))
}

/// A value on the scale of its unit.
fn scaled(feature: Feature, value: f32) -> f32 {
    let least = match feature.spec().unit {
        // Where a slowdown begins to matter to anybody; what is shorter is also measured less well.
        Unit::Micros => 50.0,
        Unit::PerSecond | Unit::Count => 1.0,
        Unit::Bytes | Unit::BytesPerSecond => 65_536.0,
        Unit::Cores => 0.01,
        Unit::Share => return value,
    };
    libm::logf(1.0 + (value / least).max(0.0))
}

/// The terms that outcomes are regressed on, each about as large as 1: what the guest asks for, how much of it the page cache did not have, and
/// the host's pressure.
///
/// Not the rate of requests: where the guest waits for answers it falls because the backend is slow, and would explain that away. The
/// depth is the guest's choice there; where requests come by the clock it grows with latency, which is why its weight is bounded.
#[must_use]
pub fn context(record: &Record) -> [f32; CONTEXT_COUNT] {
    let value = |feature| record.get(feature).unwrap_or(0.0);
    [
        1.0,
        libm::logf(value(Feature::Depth).max(1.0)),
        value(Feature::WriteShare),
        value(Feature::FlushShare),
        value(Feature::DiscardShare),
        libm::logf(value(Feature::Size).max(4096.0) / 4096.0) / 3.0,
        value(Feature::SequentialShare),
        value(Feature::HostCpuPressure),
        (value(Feature::ReadBytes) / value(Feature::Bytes).max(1.0)).min(1.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Grain;

    #[test]
    fn every_outcome_is_there_once_and_has_a_scale_on_which_more_is_more() {
        for (at, (feature, _)) in OUTCOMES.into_iter().enumerate() {
            assert!(OUTCOMES[..at].iter().all(|(other, _)| *other != feature), "{}", feature.name());
            assert!(scaled(feature, 0.5) > scaled(feature, 0.1), "{}", feature.name());
            assert_eq!(scaled(feature, 0.0), 0.0);
        }
        for kind in Kind::ALL {
            assert!(OUTCOMES.iter().any(|(_, other)| *other == kind), "{}", kind.name());
        }
    }

    #[test]
    fn what_is_missing_is_no_outcome_and_no_context() {
        let record = Record::new(Grain::Window, 0, 1, 0, 1);
        assert!((0..OUTCOME_COUNT).all(|at| outcome(&record, at).is_none()));
        assert_eq!(context(&record), [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
