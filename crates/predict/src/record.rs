//! A profile record: what is known of a component for one tick or window.

use core::fmt;

use crate::schema::{FEATURE_COUNT, Feature};

/// Version of the table of features. A record of another one is refused.
pub const SCHEMA_VERSION: u16 = 1;
/// First bytes of an encoded record.
const MAGIC: [u8; 4] = *b"wsPr";
/// Words of the mask.
const MASK_WORDS: usize = FEATURE_COUNT.div_ceil(64);
const HEADER_BYTES: usize = 4 + 2 + 1 + 1 + 8 + 8 + 8 + 4 + 4;
/// Bytes of an encoded record.
pub const RECORD_BYTES: usize = HEADER_BYTES + MASK_WORDS * 8 + FEATURE_COUNT * 4;

/// How much time a record covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// One tick.
    Tick,
    /// A window of several.
    Window,
}

impl Grain {
    /// The word used in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Grain::Tick => "tick",
            Grain::Window => "window",
        }
    }
}

/// What is known of a component for one tick or window.
#[derive(Clone, Copy, PartialEq)]
pub struct Record {
    /// Tick or window.
    pub grain: Grain,
    /// Number within its grain since the component was first measured.
    pub number: u64,
    /// The generation of the backend that served. A record never covers two.
    pub backend: u64,
    /// End of the time it covers, in nanoseconds since the Unix epoch.
    pub end_unix_ns: u64,
    /// The time it covers, in microseconds.
    pub span_us: u32,
    present: [u64; MASK_WORDS],
    values: [f32; FEATURE_COUNT],
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Record");
        shown.field("grain", &self.grain).field("number", &self.number).field("backend", &self.backend);
        for (feature, value) in self.values() {
            shown.field(feature.name(), &value);
        }
        shown.finish_non_exhaustive()
    }
}

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// There are fewer bytes than a record has.
    Short {
        /// Bytes there.
        found: usize,
    },
    /// They do not begin as a record does.
    Magic,
    /// Its table of features is not this one.
    Version {
        /// Version found.
        found: u16,
    },
    /// Its grain is neither tick nor window.
    Grain {
        /// What it is.
        found: u8,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Short { found } => write!(f, "profile record: {found} bytes, expected {RECORD_BYTES}"),
            DecodeError::Magic => f.write_str("profile record: it does not begin as one"),
            DecodeError::Version { found } => {
                write!(f, "profile record: schema version {found}, expected {SCHEMA_VERSION}")
            }
            DecodeError::Grain { found } => write!(f, "profile record: grain {found}, expected 0 or 1"),
        }
    }
}

impl core::error::Error for DecodeError {}

impl Record {
    /// A record in which everything is missing.
    #[must_use]
    pub fn new(grain: Grain, number: u64, backend: u64, end_unix_ns: u64, span_us: u32) -> Self {
        Record { grain, number, backend, end_unix_ns, span_us, present: [0; MASK_WORDS], values: [0.0; FEATURE_COUNT] }
    }

    /// A value, unless it is missing.
    #[must_use]
    pub fn get(&self, feature: Feature) -> Option<f32> {
        let at = feature as usize;
        (self.present[at / 64] >> (at % 64) & 1 == 1).then(|| self.values[at])
    }

    /// Sets a value, or marks it missing. What is no number is missing.
    pub fn set(&mut self, feature: Feature, value: Option<f32>) {
        let (at, value) = (feature as usize, value.filter(|value| value.is_finite()));
        let bit = 1 << (at % 64);
        match value {
            Some(_) => self.present[at / 64] |= bit,
            None => self.present[at / 64] &= !bit,
        }
        self.values[at] = value.unwrap_or(0.0);
    }

    /// Every value that is not missing, in the order of the table.
    pub fn values(&self) -> impl Iterator<Item = (Feature, f32)> + '_ {
        Feature::ALL.into_iter().filter_map(|feature| Some((feature, self.get(feature)?)))
    }

    /// The same as bytes, little-endian: magic `wsPr`, version (u16), grain (u8: 0 tick, 1 window), 0 (u8), number (u64), backend (u64),
    /// end in nanoseconds since the Unix epoch (u64), span in microseconds (u32), number of features (u32), one bit per feature that is
    /// present in u64 words from the lowest bit on, one f32 per feature.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let mut rest = &mut bytes[..];
        put(&mut rest, &MAGIC);
        put(&mut rest, &SCHEMA_VERSION.to_le_bytes());
        put(
            &mut rest,
            &[match self.grain {
                Grain::Tick => 0,
                Grain::Window => 1,
            }],
        );
        put(&mut rest, &[0]);
        put(&mut rest, &self.number.to_le_bytes());
        put(&mut rest, &self.backend.to_le_bytes());
        put(&mut rest, &self.end_unix_ns.to_le_bytes());
        put(&mut rest, &self.span_us.to_le_bytes());
        put(&mut rest, &(FEATURE_COUNT as u32).to_le_bytes());
        self.present.iter().for_each(|word| put(&mut rest, &word.to_le_bytes()));
        self.values.iter().for_each(|value| put(&mut rest, &value.to_le_bytes()));
        bytes
    }

    /// Reads what [`Record::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are no record of this version. Values that are no numbers are taken as missing.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Some(mut rest) = bytes.get(..RECORD_BYTES) else {
            return Err(DecodeError::Short { found: bytes.len() });
        };
        if take(&mut rest) != MAGIC {
            return Err(DecodeError::Magic);
        }
        let version = u16::from_le_bytes(take(&mut rest));
        if version != SCHEMA_VERSION {
            return Err(DecodeError::Version { found: version });
        }
        let [grain, _] = take(&mut rest);
        let grain = match grain {
            0 => Grain::Tick,
            1 => Grain::Window,
            found => return Err(DecodeError::Grain { found }),
        };
        let number = u64::from_le_bytes(take(&mut rest));
        let backend = u64::from_le_bytes(take(&mut rest));
        let end_unix_ns = u64::from_le_bytes(take(&mut rest));
        let span_us = u32::from_le_bytes(take(&mut rest));
        if u32::from_le_bytes(take(&mut rest)) != FEATURE_COUNT as u32 {
            return Err(DecodeError::Version { found: version });
        }
        let mut record = Record::new(grain, number, backend, end_unix_ns, span_us);
        let present: [u64; MASK_WORDS] = core::array::from_fn(|_| u64::from_le_bytes(take(&mut rest)));
        for feature in Feature::ALL {
            let (at, value) = (feature as usize, f32::from_le_bytes(take(&mut rest)));
            record.set(feature, (present[at / 64] >> (at % 64) & 1 == 1).then_some(value));
        }
        Ok(record)
    }
}

fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    let (now, later) = core::mem::take(rest).split_at_mut(bytes.len());
    now.copy_from_slice(bytes);
    *rest = later;
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (now, later) = rest.split_first_chunk().expect("the length was checked");
    *rest = later;
    *now
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(values: &[Option<f32>]) -> Record {
        let mut record = Record::new(Grain::Window, 7, 3, 1_234_567, 1_000_000);
        for (feature, value) in Feature::ALL.into_iter().zip(values) {
            record.set(feature, *value);
        }
        record
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(values in proptest::collection::vec(any::<Option<f32>>(), FEATURE_COUNT)) {
            let record = record(&values);
            let decoded = Record::decode(&record.encode());
            prop_assert_eq!(decoded, Ok(record));
            for (feature, value) in Feature::ALL.into_iter().zip(values) {
                prop_assert_eq!(record.get(feature), value.filter(|value| value.is_finite()));
            }
        }

        #[test]
        fn any_bytes_give_a_record_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..2 * RECORD_BYTES), proper in any::<bool>(),
        ) {
            if proper && bytes.len() >= 8 {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..8].copy_from_slice(&[1, 0, 0, 0]);
            }
            if let Ok(record) = Record::decode(&bytes) {
                prop_assert!(record.values().all(|(_, value)| value.is_finite()));
            }
        }
    }

    #[test]
    fn what_is_no_record_says_why() {
        let good = record(&[]).encode();
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            Record::decode(&bytes).expect_err("it is broken").to_string()
        };
        assert_eq!(Record::decode(&good[1..]), Err(DecodeError::Short { found: RECORD_BYTES - 1 }));
        assert_eq!(with(0, b'x'), "profile record: it does not begin as one");
        assert_eq!(with(4, 9), "profile record: schema version 9, expected 1");
        assert_eq!(with(6, 2), "profile record: grain 2, expected 0 or 1");
    }
}
