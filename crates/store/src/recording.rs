//! What a flight recorder remembered when something happened.

use std::fmt;

use warmswap_predict::{FEATURE_COUNT, Record, SCHEMA_VERSION};

use crate::codec::{Broken, Decoder, State};

/// First bytes of an encoded recording.
const MAGIC: [u8; 4] = *b"wsFr";
/// Version of what follows.
const FORMAT: u16 = 1;
/// Most bytes of a reason.
const REASON_MAX: usize = 1_024;
const HEADER: usize = 4 + 2 + 2 + 2 + 2 + 8 + 4;

/// What a flight recorder remembered when something happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    /// Why it was kept.
    pub reason: String,
    /// When, in nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    count: u32,
    before: State,
    bytes: Vec<u8>,
}

/// Why bytes are no recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordingError {
    /// They are too few.
    Short,
    /// They do not begin as a recording does.
    Magic,
    /// It was written in another format.
    Format(u16),
    /// Its table of features is not this one.
    Schema(u16),
    /// Its reason is no text.
    Reason,
    /// What its first tick is related to cannot be read.
    State,
}

impl fmt::Display for RecordingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordingError::Short => f.write_str("recording: it ends within its header"),
            RecordingError::Magic => f.write_str("recording: it does not begin as one"),
            RecordingError::Format(found) => write!(f, "recording: format {found}, expected {FORMAT}"),
            RecordingError::Schema(found) => write!(f, "recording: schema version {found}, expected {SCHEMA_VERSION}"),
            RecordingError::Reason => f.write_str("recording: its reason is no text"),
            RecordingError::State => f.write_str("recording: what its first tick is related to cannot be read"),
        }
    }
}

impl std::error::Error for RecordingError {}

/// Its ticks, the oldest first. Ends behind the first that is broken.
#[derive(Clone, Debug)]
pub struct Ticks<'a>(Decoder<std::iter::Copied<std::slice::Iter<'a, u8>>>);

impl Iterator for Ticks<'_> {
    type Item = Result<Record, Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

impl Recording {
    /// Of ticks that are encoded from `before` on.
    pub(crate) fn new(reason: &str, unix_ns: u64, count: u32, before: State, bytes: Vec<u8>) -> Self {
        let end = (0..=reason.len().min(REASON_MAX)).rev().find(|end| reason.is_char_boundary(*end)).unwrap_or(0);
        Recording { reason: reason[..end].to_owned(), unix_ns, count, before, bytes }
    }

    /// How many ticks it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// It holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Its ticks, the oldest first.
    #[must_use]
    pub fn ticks(&self) -> Ticks<'_> {
        Ticks(Decoder::new(self.before.clone(), self.bytes.iter().copied()))
    }

    /// The same as bytes, little-endian: magic `wsFr`, format (u16), schema version (u16), number of features (u16), bytes of the reason
    /// (u16), time in nanoseconds since the Unix epoch (u64), number of ticks (u32), the reason in UTF-8, what the first tick is
    /// related to, the ticks.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.reason.len() + self.bytes.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&SCHEMA_VERSION.to_le_bytes());
        out.extend_from_slice(&(FEATURE_COUNT as u16).to_le_bytes());
        out.extend_from_slice(&(self.reason.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.unix_ns.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(self.reason.as_bytes());
        self.before.encode(&mut out);
        out.extend_from_slice(&self.bytes);
        out
    }

    /// Reads what [`Recording::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are no recording, or one of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordingError> {
        let mut rest = bytes;
        if take(&mut rest)? != MAGIC {
            return Err(RecordingError::Magic);
        }
        let format = u16::from_le_bytes(take(&mut rest)?);
        if format != FORMAT {
            return Err(RecordingError::Format(format));
        }
        let schema = u16::from_le_bytes(take(&mut rest)?);
        let features = u16::from_le_bytes(take(&mut rest)?);
        if schema != SCHEMA_VERSION || usize::from(features) != FEATURE_COUNT {
            return Err(RecordingError::Schema(schema));
        }
        let reason = usize::from(u16::from_le_bytes(take(&mut rest)?));
        let unix_ns = u64::from_le_bytes(take(&mut rest)?);
        let count = u32::from_le_bytes(take(&mut rest)?);
        let (reason, ticks) = rest.split_at_checked(reason).ok_or(RecordingError::Short)?;
        let reason = str::from_utf8(reason).map_err(|_| RecordingError::Reason)?;
        let mut ticks = ticks.iter().copied();
        let before = State::decode(&mut ticks).map_err(|_| RecordingError::State)?;
        Ok(Recording { reason: reason.to_owned(), unix_ns, count, before, bytes: ticks.collect() })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], RecordingError> {
    let (now, later) = rest.split_first_chunk().ok_or(RecordingError::Short)?;
    *rest = later;
    Ok(*now)
}
