//! Journal entries: what happened to a device, in public vocabulary.

/// A value of a property.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A count, an index, an amount.
    Number(u64),
    /// Microseconds with a fraction.
    Micros(f64),
    /// Words.
    Text(String),
    /// Yes or no.
    Flag(bool),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Value::Number(value)
    }
}
impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Value::Number(u64::from(value))
    }
}
impl From<u16> for Value {
    fn from(value: u16) -> Self {
        Value::Number(u64::from(value))
    }
}
impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Flag(value)
    }
}
impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::Text(value.to_owned())
    }
}
impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::Text(value)
    }
}

/// How much an entry matters, by what its reader should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Rare changes of state.
    Info,
    /// Abnormal, nothing lost.
    Warning,
    /// What was asked for did not happen: act.
    Error,
}

/// One entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Name of the event, in public vocabulary.
    pub event: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What there is to know, in order.
    pub properties: Vec<(&'static str, Value)>,
}

impl Entry {
    /// An entry that reports a change of state.
    #[must_use]
    pub fn info(event: &'static str) -> Self {
        Entry { event, severity: Severity::Info, properties: Vec::new() }
    }

    /// An entry that reports something abnormal.
    #[must_use]
    pub fn warning(event: &'static str) -> Self {
        Entry { event, severity: Severity::Warning, properties: Vec::new() }
    }

    /// An entry that asks for an operator.
    #[must_use]
    pub fn error(event: &'static str) -> Self {
        Entry { event, severity: Severity::Error, properties: Vec::new() }
    }

    /// Adds a property.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.properties.push((name, value.into()));
        self
    }
}
