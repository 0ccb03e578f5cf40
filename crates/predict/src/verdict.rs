//! What the model says of a window.

use core::fmt;

use crate::exhaust::Forecast;
use crate::hazard::{HORIZON_COUNT, HORIZONS};
use crate::schema::Feature;

/// What the model says of a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Probability of a failure within each of the [`HORIZONS`].
    pub risk: [f32; HORIZON_COUNT],
    /// What the guest suffers, 0 to 1, held for a while: requests four times as slow as they should be at this load, nothing completed at all, or
    /// every request failing are 1.
    pub harm: f32,
    /// Evidence against health as a part of what an alarm takes: logarithms, 0 to 1.
    pub evidence: f32,
    /// Why a failure is thought to be imminent, if it is.
    pub alarm: Option<Alarm>,
    /// What speaks most for a failure, the most first; none as long as hardly anything does.
    pub causes: [Option<Cause>; 3],
    /// The resource that will be used up first, and when.
    pub exhaustion: Option<(Feature, Forecast)>,
    /// Whether enough was seen of the component to judge more than what needs no knowledge of it.
    pub is_warm: bool,
}

/// Why a failure is thought to be imminent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alarm {
    /// A law that holds in every healthy component is broken: what was done by a kick or for a request never shows, while others go on.
    Law(Law),
    /// A resource will have been used up soon.
    Exhaustion(Feature),
    /// Harm beyond the tolerance, for so long that health is not believable any more.
    Harm,
    /// Requests fail or have to be tried again, for so long that it is no chance.
    Errors,
    /// Requests take longer at the same load than when the component was new, and that came so slowly that every step of it was usual.
    Drift,
    /// Signs that preceded failures before, for so long that health is not believable any more.
    Risk,
}

/// A law that needs no learning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Law {
    /// A kick is followed by a look at the ring.
    KickIsSeen,
    /// A request is completed while younger ones are.
    RequestIsCompleted,
    /// Something is completed while requests wait.
    AnythingIsCompleted,
    /// An interrupt is followed by a look at the completions.
    InterruptIsTaken,
}

/// A cause.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cause {
    /// The measured feature.
    pub feature: Feature,
    /// How far it is from what was expected, in deviations; of a share, the share.
    pub residual: f32,
    /// Its part of what speaks for a failure, 0 to 1.
    pub share: f32,
}

impl Alarm {
    /// The word used in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Alarm::Law(_) => "law",
            Alarm::Exhaustion(_) => "exhaustion",
            Alarm::Harm => "harm",
            Alarm::Errors => "errors",
            Alarm::Drift => "drift",
            Alarm::Risk => "risk",
        }
    }
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Alarm::Law(Law::KickIsSeen) => f.write_str("a kick was lost: the backend has not looked at the ring since"),
            Alarm::Law(Law::RequestIsCompleted) => {
                f.write_str("a completion was lost: a request is not answered while younger ones are")
            }
            Alarm::Law(Law::AnythingIsCompleted) => f.write_str(
                "nothing has been completed for a whole window though requests wait and a processor was there",
            ),
            Alarm::Law(Law::InterruptIsTaken) => {
                f.write_str("an interrupt was lost: the guest has not looked at completions since")
            }
            Alarm::Exhaustion(feature) => write!(f, "{} will reach its bound soon", feature.name()),
            Alarm::Harm => f.write_str("requests take longer than they should at this load, for too long to be chance"),
            Alarm::Errors => f.write_str("requests fail or have to be tried again, again and again"),
            Alarm::Drift => f.write_str("requests have become slower at the same load, little by little"),
            Alarm::Risk => f.write_str("it behaves as backends did before they failed, for too long to be chance"),
        }
    }
}

impl Verdict {
    /// The shortest horizon within which a failure is more likely than not, in windows.
    #[must_use]
    pub fn lead_windows(&self) -> Option<u32> {
        let exhausted = self.exhaustion.map(|(_, forecast)| forecast.windows).filter(|windows| windows.is_finite());
        let likely = HORIZONS.into_iter().zip(self.risk).find(|(_, risk)| *risk > 0.5).map(|(windows, _)| windows);
        match (exhausted, likely) {
            (Some(exhausted), Some(likely)) => Some((exhausted as u32).min(likely)),
            (Some(exhausted), None) => Some(exhausted as u32),
            (None, likely) => likely,
        }
    }
}
