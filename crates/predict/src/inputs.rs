//! What the hazard is a function of: dimensionless signs, more of each is worse.

use crate::outcomes::Kind;

/// An input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Slowdown of requests at equal load: the mean of what latencies are longer than expected, as a logarithm, 1 at four times.
    Slowdown,
    /// Greatest score of the outcomes of a kind, in deviations.
    Score(Kind),
    /// Its sum over time, beyond what is usual: a change that lasts (slow).
    Sum(Kind),
    /// The same over a short time: a change that is great.
    Burst(Kind),
    /// All outcomes together.
    Joint,
    /// Slope of the slowdown: what it is of late above what it was before.
    Trend,
    /// How far the accepted latencies have moved from where they were at the beginning, as a logarithm.
    Drift,
    /// Greatest share of a bound that is used.
    Share,
    /// Probability that a bound is reached within ten windows.
    Full10,
    /// The same within sixty.
    Full60,
    /// Age of the oldest request against what is usual for the longest, as a logarithm.
    Oldest,
    /// Time without a completion while requests waited, against 50 ms, as a logarithm.
    Stall,
    /// Share of requests that fail.
    Errors,
    /// Time in which a quota was used up, as a share.
    Throttled,
    /// Time for which a due kick or interrupt had no effect, against 50 ms, as a logarithm.
    Unanswered,
}

/// Number of inputs.
pub const INPUT_COUNT: usize = 3 * Kind::COUNT + OTHERS.len();

/// Those that are not of a kind of outcome.
const OTHERS: [Input; 12] = [
    Input::Slowdown,
    Input::Joint,
    Input::Trend,
    Input::Drift,
    Input::Share,
    Input::Full10,
    Input::Full60,
    Input::Oldest,
    Input::Stall,
    Input::Errors,
    Input::Throttled,
    Input::Unanswered,
];

/// The inputs in their order: scores, sums and bursts of each kind, then the others.
pub const INPUTS: [Input; INPUT_COUNT] = {
    let mut inputs = [Input::Joint; INPUT_COUNT];
    let mut at = 0;
    while at < Kind::COUNT {
        inputs[at] = Input::Score(Kind::ALL[at]);
        inputs[Kind::COUNT + at] = Input::Sum(Kind::ALL[at]);
        inputs[2 * Kind::COUNT + at] = Input::Burst(Kind::ALL[at]);
        at += 1;
    }
    let mut other = 0;
    while other < OTHERS.len() {
        inputs[3 * Kind::COUNT + other] = OTHERS[other];
        other += 1;
    }
    inputs
};

impl Input {
    /// The kind of outcome that it is a sign of, if it is of one.
    #[must_use]
    pub fn kind(self) -> Option<Kind> {
        match self {
            Input::Score(kind) | Input::Sum(kind) | Input::Burst(kind) => Some(kind),
            Input::Slowdown | Input::Trend | Input::Drift => Some(Kind::Latency),
            Input::Oldest | Input::Stall => Some(Kind::Tail),
            Input::Errors => Some(Kind::Error),
            Input::Throttled => Some(Kind::Starved),
            Input::Unanswered => Some(Kind::Signals),
            Input::Joint | Input::Share | Input::Full10 | Input::Full60 => None,
        }
    }

    /// The word used in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Input::Slowdown => "slowdown",
            Input::Score(kind) => kind.name(),
            Input::Sum(_) => "lasting change",
            Input::Burst(_) => "sudden change",
            Input::Joint => "all together",
            Input::Trend => "trend",
            Input::Drift => "drift",
            Input::Share => "share of a bound",
            Input::Full10 | Input::Full60 => "exhaustion",
            Input::Oldest => "oldest request",
            Input::Stall => "stall",
            Input::Errors => "errors",
            Input::Throttled => "throttled",
            Input::Unanswered => "signals without effect",
        }
    }
}
