//! Monotonic time as a value. The core never reads a clock; the caller says what time it is.

use serde::{Deserialize, Serialize};

use std::fmt;
use std::ops::Add;
use std::time::Duration;

/// Nanoseconds: an instant since an arbitrary start, or a span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Nanos(pub u64);

impl Nanos {
    /// A span of microseconds.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Nanos(micros * 1_000)
    }

    /// A span of milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Nanos(millis * 1_000_000)
    }

    /// The same without what is less than a millisecond, for people.
    #[must_use]
    pub const fn to_the_millisecond(self) -> Self {
        Nanos(self.0 / 1_000_000 * 1_000_000)
    }

    /// Span since an earlier instant; zero if that lies in the future.
    #[must_use]
    pub fn since(self, earlier: Nanos) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0))
    }

    /// Microseconds with a fraction.
    #[must_use]
    pub fn as_micros(self) -> f64 {
        self.0 as f64 / 1e3
    }

    /// As the standard library's span.
    #[must_use]
    pub fn as_duration(self) -> Duration {
        Duration::from_nanos(self.0)
    }
}

impl Add for Nanos {
    type Output = Nanos;
    fn add(self, span: Nanos) -> Nanos {
        Nanos(self.0.saturating_add(span.0))
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_duration())
    }
}
