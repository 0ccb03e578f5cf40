//! What the model brings along: the default that is fitted to fault campaigns, as a file.
//!
//! Little-endian: `wsMd`, format (u16), schema of the records (u16), then everything of [`Trained`] in the order of its declaration, then a
//! CRC-32 of all that. A file of another format or for other records is refused.

use core::fmt;

use crate::hazard::{BINS, HORIZON_COUNT, Hazard};
use crate::inputs::{INPUT_COUNT, INPUTS, Input};
use crate::outcomes::{CONTEXT_COUNT, DEPTH, Kind, MISSES, OUTCOME_COUNT, OUTCOMES};
use crate::record::SCHEMA_VERSION;
use crate::regress::WEIGHT_MAX;
use crate::schema::Unit;

/// First bytes of the file.
const MAGIC: [u8; 4] = *b"wsMd";
/// Version of what follows.
const FORMAT: u16 = 1;
const HEADER: usize = 8;
const PRIORS: usize = OUTCOME_COUNT * (1 + CONTEXT_COUNT);
const TABLES: usize = INPUT_COUNT * (4 * (BINS - 1) + 2 * HORIZON_COUNT * BINS) + 4 * HORIZON_COUNT;
/// Bytes of the file.
pub const TRAINED_BYTES: usize = HEADER + 4 * PRIORS + TABLES + 4 * 2 + 4;

/// What is known before a component was ever seen. Shared by all models, never written.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Least deviation of each outcome: what it varies by in health anyway.
    pub floors: [f32; OUTCOME_COUNT],
    /// Weights of the context that regressions begin with.
    pub weights: [[f32; CONTEXT_COUNT]; OUTCOME_COUNT],
    /// The hazard.
    pub hazard: Hazard,
    /// Harm, and probability of a failure within a minute of windows, that are borne with.
    pub tolerances: [f32; 2],
}

/// Why bytes are no trained model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainedError {
    /// There are more or fewer.
    Length {
        /// Bytes there.
        found: usize,
    },
    /// They do not begin as one does.
    Magic,
    /// It has another format.
    Format {
        /// The format found.
        found: u16,
    },
    /// It is for other records.
    Schema {
        /// The schema found.
        found: u16,
    },
    /// The checksum is of other bytes.
    Checksum,
    /// It was written by nothing that keeps the rules: a table falls, or a number is none.
    Values,
}

impl fmt::Display for TrainedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrainedError::Length { found } => write!(f, "trained model: {found} bytes, expected {TRAINED_BYTES}"),
            TrainedError::Magic => f.write_str("trained model: it does not begin as one"),
            TrainedError::Format { found } => write!(f, "trained model: format {found}, expected {FORMAT}"),
            TrainedError::Schema { found } => {
                write!(f, "trained model: for records of schema {found}, expected {SCHEMA_VERSION}")
            }
            TrainedError::Checksum => f.write_str("trained model: it is damaged: the checksum is of other bytes"),
            TrainedError::Values => f.write_str("trained model: a table falls, or a number is none"),
        }
    }
}

impl core::error::Error for TrainedError {}

/// The default: fitted to fault campaigns on real backends, see `lab train`.
static DEFAULT: &[u8; TRAINED_BYTES] = include_bytes!("../trained/default.wsm");

/// The model that is shipped.
///
/// # Panics
/// Never: a test decodes it.
#[must_use]
pub fn load_trained_model() -> Trained {
    Trained::decode(DEFAULT).expect("the default is a trained model of this format")
}

impl Trained {
    /// What is known without any campaign: how outcomes vary, that depth costs time, and that more of any sign is worse.
    #[must_use]
    pub fn prior() -> Self {
        let floors = core::array::from_fn(|at| match OUTCOMES[at].0.spec().unit {
            Unit::Micros | Unit::Cores => 0.15,
            Unit::PerSecond | Unit::BytesPerSecond => 0.3,
            Unit::Bytes | Unit::Count => 0.02,
            Unit::Share => 0.05,
        });
        let mut weights = [[0.0; CONTEXT_COUNT]; OUTCOME_COUNT];
        for (weights, (_, kind)) in weights.iter_mut().zip(OUTCOMES) {
            if matches!(kind, Kind::Latency | Kind::Tail) {
                (weights[DEPTH], weights[MISSES]) = (0.7, 1.0);
            }
        }
        Trained { floors, weights, hazard: Self::prior_hazard(), tolerances: [0.1, 0.05] }
    }

    fn prior_hazard() -> Hazard {
        let mut hazard = Hazard {
            edges: [[0.0; BINS - 1]; INPUT_COUNT],
            tables: [[[0; BINS]; HORIZON_COUNT]; INPUT_COUNT],
            bias: [-9.0, -8.0, -7.0, -6.5],
        };
        for (input, (edges, tables)) in hazard.edges.iter_mut().zip(&mut hazard.tables).enumerate() {
            let whole = match INPUTS[input] {
                Input::Score(_) | Input::Joint => 10.0,
                Input::Sum(_) | Input::Burst(_) => 40.0,
                _ => 1.0,
            };
            *edges = core::array::from_fn(|at| whole * (at + 1) as f32 / BINS as f32);
            // At its largest an input alone makes a failure within a minute as likely as not in ten minutes of windows.
            tables
                .iter_mut()
                .for_each(|table| *table = core::array::from_fn(|bin| 60 * i16::try_from(bin).unwrap_or(0)));
        }
        hazard
    }

    /// As a file.
    #[must_use]
    pub fn encode(&self) -> [u8; TRAINED_BYTES] {
        let mut bytes = [0; TRAINED_BYTES];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&MAGIC);
        put(&FORMAT.to_le_bytes());
        put(&SCHEMA_VERSION.to_le_bytes());
        let Hazard { edges, tables, bias } = &self.hazard;
        let before = self.floors.iter().chain(self.weights.iter().flatten()).chain(edges.iter().flatten());
        before.for_each(|value| put(&value.to_le_bytes()));
        tables.iter().flatten().flatten().for_each(|value| put(&value.to_le_bytes()));
        bias.iter().chain(&self.tolerances).for_each(|value| put(&value.to_le_bytes()));
        let sum = crc32fast::hash(&bytes[..TRAINED_BYTES - 4]);
        bytes[TRAINED_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Of a file.
    ///
    /// # Errors
    /// It is none, or one of another format, or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, TrainedError> {
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes.len() < HEADER {
            return Err(TrainedError::Length { found: bytes.len() });
        }
        if bytes[..4] != MAGIC {
            return Err(TrainedError::Magic);
        }
        match (number(4), number(6)) {
            (FORMAT, SCHEMA_VERSION) => {}
            (FORMAT, found) => return Err(TrainedError::Schema { found }),
            (found, _) => return Err(TrainedError::Format { found }),
        }
        if bytes.len() != TRAINED_BYTES {
            return Err(TrainedError::Length { found: bytes.len() });
        }
        let (body, sum) = bytes.split_at(TRAINED_BYTES - 4);
        if crc32fast::hash(body).to_le_bytes() != *sum {
            return Err(TrainedError::Checksum);
        }
        Self::read(&body[HEADER..]).ok_or(TrainedError::Values)
    }

    fn read(mut body: &[u8]) -> Option<Self> {
        fn take<'a, const N: usize>(body: &mut &'a [u8]) -> Option<&'a [u8; N]> {
            let (part, rest) = body.split_first_chunk()?;
            *body = rest;
            Some(part)
        }
        let mut trained = Trained::prior();
        let Hazard { edges, tables, bias } = &mut trained.hazard;
        let before =
            trained.floors.iter_mut().chain(trained.weights.iter_mut().flatten()).chain(edges.iter_mut().flatten());
        for value in before {
            *value = f32::from_le_bytes(*take(&mut body)?);
        }
        for value in tables.iter_mut().flatten().flatten() {
            *value = i16::from_le_bytes(*take(&mut body)?);
        }
        for value in bias.iter_mut().chain(&mut trained.tolerances) {
            *value = f32::from_le_bytes(*take(&mut body)?);
        }
        trained.is_valid().then_some(trained)
    }

    fn is_valid(&self) -> bool {
        self.hazard.is_monotone()
            && self.floors.iter().all(|floor| floor.is_finite() && *floor > 0.0)
            && self.weights.iter().flatten().all(|weight| weight.abs() <= WEIGHT_MAX)
            && self.tolerances.iter().all(|borne| (0.0..1.0).contains(borne))
    }

    /// A number that tells one model from another: the checksum of its file.
    #[must_use]
    pub fn digest(&self) -> u32 {
        let bytes = self.encode();
        u32::from_le_bytes([
            bytes[TRAINED_BYTES - 4],
            bytes[TRAINED_BYTES - 3],
            bytes[TRAINED_BYTES - 2],
            bytes[TRAINED_BYTES - 1],
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_back_as_it_was_and_anything_else_is_refused_by_name() {
        let trained = Trained::prior();
        let bytes = trained.encode();
        assert_eq!(Trained::decode(&bytes), Ok(trained.clone()));
        assert!(bytes.len() < 16 * 1024);
        let changed = |at: usize| {
            let mut bytes = bytes;
            bytes[at] ^= 0x40;
            Trained::decode(&bytes)
        };
        assert_eq!(changed(0), Err(TrainedError::Magic));
        assert!(matches!(changed(4), Err(TrainedError::Format { .. })));
        assert!(matches!(changed(6), Err(TrainedError::Schema { .. })));
        for at in (8..TRAINED_BYTES).step_by(97) {
            assert_eq!(changed(at), Err(TrainedError::Checksum), "{at}");
        }
        assert!(matches!(Trained::decode(&bytes[..100]), Err(TrainedError::Length { found: 100 })));
        assert!(matches!(Trained::decode(&[]), Err(TrainedError::Length { found: 0 })));
        let mut falling = trained;
        falling.hazard.tables[0][0][3] = -7;
        assert_eq!(Trained::decode(&falling.encode()), Err(TrainedError::Values));
    }

    #[test]
    fn the_default_can_be_read_and_is_fitted_to_something() {
        let trained = load_trained_model();
        assert_ne!(trained.hazard, Trained::prior().hazard);
        assert!(trained.hazard.tables.iter().flatten().flatten().any(|logit| *logit > 500), "some sign counts");
    }

    #[test]
    fn risk_grows_with_every_input_and_with_the_horizon() {
        let hazard = Trained::prior().hazard;
        let mut inputs = [0.0; INPUT_COUNT];
        let mut last = hazard.risk(&inputs, 0.0);
        for at in 0..INPUT_COUNT {
            inputs[at] = 100.0;
            let risk = hazard.risk(&inputs, 0.0);
            assert!(risk.is_sorted() && risk.iter().zip(&last).all(|(now, before)| now >= before), "{at}");
            last = risk;
        }
        assert!(last[3] > 0.9, "{last:?}");
    }
}
