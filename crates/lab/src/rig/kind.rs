//! The ways in which a backend ends.

use std::fmt;

use clap::ValueEnum;
use serde::{Serialize, Serializer};

/// What is done to the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(crate) enum Kind {
    /// A failover is asked for through the control socket.
    Planned,
    /// As planned, without a drain.
    Now,
    /// The failure model has an alarm.
    Predicted,
    /// SIGKILL of the primary.
    Crash,
    /// SIGSTOP of the primary: a hang.
    Stop,
    /// The primary's main thread is made to spin.
    Spin,
    /// SIGKILL of the shadow; then, in half of the cases, of the primary at once.
    Shadow,
    /// Both killed: a cold start while the guest waits.
    Both,
    /// A request that kills every backend it is given to.
    Poison,
    /// A failover, planned or after SIGKILL of the primary, in the course of which the broker kills backends before a certain step that it
    /// takes.
    Point,
}

impl Kind {
    /// The name on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Planned => "planned",
            Kind::Now => "now",
            Kind::Predicted => "predicted",
            Kind::Crash => "crash",
            Kind::Stop => "stop",
            Kind::Spin => "spin",
            Kind::Shadow => "shadow",
            Kind::Both => "both",
            Kind::Poison => "poison",
            Kind::Point => "point",
        }
    }

    /// How often the kind is drawn, relative to the others. What takes the broker a time-out is rarer.
    pub(crate) fn weight(self) -> u64 {
        match self {
            Kind::Planned | Kind::Crash | Kind::Point => 30,
            Kind::Now | Kind::Predicted => 15,
            Kind::Shadow => 6,
            Kind::Stop | Kind::Spin | Kind::Both => 5,
            Kind::Poison => 2,
        }
    }

    /// What the broker calls it in its report, where only one name is right.
    pub(crate) fn reported_as(self) -> Option<&'static str> {
        match self {
            Kind::Planned | Kind::Now => Some("planned"),
            Kind::Predicted => Some("predicted"),
            Kind::Crash => Some("crash"),
            Kind::Stop | Kind::Spin => Some("hang"),
            Kind::Shadow | Kind::Both | Kind::Poison | Kind::Point => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
