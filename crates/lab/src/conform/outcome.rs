//! What a check comes to.

use std::io::ErrorKind;

/// The result of a check, as it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be.
    Pass,
    /// Something else was seen than was expected.
    Fail,
    /// The back-end does not offer what the check is about.
    NotApplicable,
    /// The back-end died of it.
    Crash,
    /// An answer did not come.
    Timeout,
}

impl Verdict {
    /// All of them.
    pub(super) const ALL: [Verdict; 5] =
        [Verdict::Pass, Verdict::Fail, Verdict::NotApplicable, Verdict::Crash, Verdict::Timeout];

    /// The word for it, in tables and in JSON.
    pub(super) fn word(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail => "fail",
            Verdict::NotApplicable => "not-applicable",
            Verdict::Crash => "crash",
            Verdict::Timeout => "timeout",
        }
    }

    /// Whether nothing is wrong with the back-end.
    pub(super) fn is_good(self) -> bool {
        matches!(self, Verdict::Pass | Verdict::NotApplicable)
    }
}

/// Why a check did not pass.
#[derive(Debug)]
pub(super) enum Miss {
    /// What was expected and what was seen.
    Fail(String),
    /// What the back-end does not offer.
    NotApplicable(String),
    /// The back-end closed the connection; what was being done then.
    Closed(String),
    /// What was waited for in vain.
    Timeout(String),
    /// The suite itself could not go on. Says nothing about the back-end.
    Broken(anyhow::Error),
}

/// What a check returns: what is worth saying of a pass, or why it is none.
pub(super) type Checked = Result<String, Miss>;

impl From<anyhow::Error> for Miss {
    fn from(error: anyhow::Error) -> Self {
        Miss::Broken(error)
    }
}

impl From<std::io::Error> for Miss {
    fn from(error: std::io::Error) -> Self {
        Miss::Broken(error.into())
    }
}

/// Whether a socket fails that way because the other side is gone.
pub(super) fn is_gone(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected)
}

/// A pass with nothing to say.
pub(super) fn passed() -> Checked {
    Ok(String::new())
}

/// A fail, in a shape that fits everywhere.
pub(super) fn failed<T>(why: impl Into<String>) -> Result<T, Miss> {
    Err(Miss::Fail(why.into()))
}

/// The back-end lacks what the check is about.
pub(super) fn lacks<T>(what: impl Into<String>) -> Result<T, Miss> {
    Err(Miss::NotApplicable(what.into()))
}

/// A fail unless `good`.
pub(super) fn expect(good: bool, why: impl FnOnce() -> String) -> Result<(), Miss> {
    if good { Ok(()) } else { Err(Miss::Fail(why())) }
}
