//! What a model learnt of its component, as bytes: so that it outlives the process that learnt it.
//!
//! Little-endian: `wsMs`, format (u16), schema of the records (u16), digest of the [`Trained`] it was learnt with (u32), then what is accepted,
//! what waits, the candidate and the anchor, each as covariance, weights and the three numbers of every scale (f32), then the greatest harm,
//! risk and errors in health, the longest latency (f32), the windows learnt from, those until what waits is accepted, those for which nothing
//! is learnt (u64), then a CRC-32 of all that. What belongs to one backend process is left out: a model that is read begins with it anew.
//!
//! A state of another format, for other records or of another [`Trained`] is refused, and so is a number that no model comes to.

use core::fmt;

use crate::knowledge::Knowledge;
use crate::model::{Learnt, Model};
use crate::outcomes::{CONTEXT_COUNT, OUTCOME_COUNT};
use crate::record::SCHEMA_VERSION;
use crate::regress::Regression;
use crate::scale::Scale;
use crate::trained::Trained;

/// First bytes of a state.
const MAGIC: [u8; 4] = *b"wsMs";
/// Version of what follows.
const FORMAT: u16 = 1;
const HEADER: usize = 4 + 2 + 2 + 4;
const KNOWLEDGE: usize = 4 * (CONTEXT_COUNT * CONTEXT_COUNT + OUTCOME_COUNT * (CONTEXT_COUNT + 3));
/// Bytes of a model's state.
pub const MODEL_STATE_BYTES: usize = HEADER + 4 * KNOWLEDGE + 4 * (3 + 1) + 8 * 3 + 4;

/// Why bytes are no state of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateError {
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
    /// It was learnt with another trained model: what it knows is relative to that.
    Trained {
        /// The digest found.
        found: u32,
        /// That of the model it was to be read for.
        expected: u32,
    },
    /// It was written by nothing that keeps the rules: a number is none, or one that no model comes to.
    Values {
        /// What it is a number of.
        of: &'static str,
    },
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateError::Length { found } => write!(f, "model state: {found} bytes, expected {MODEL_STATE_BYTES}"),
            StateError::Magic => f.write_str("model state: it does not begin as one"),
            StateError::Format { found } => write!(f, "model state: format {found}, expected {FORMAT}"),
            StateError::Schema { found } => {
                write!(f, "model state: for records of schema {found}, expected {SCHEMA_VERSION}")
            }
            StateError::Checksum => f.write_str("model state: it is damaged: the checksum is of other bytes"),
            StateError::Trained { found, expected } => {
                write!(f, "model state: learnt with the trained model {found:08x}, expected {expected:08x}")
            }
            StateError::Values { of } => write!(f, "model state: a {of} is one that no model comes to"),
        }
    }
}

impl core::error::Error for StateError {}

impl Model {
    /// What it learnt of the component, as bytes. `trained` is the one it learnt with.
    #[must_use]
    pub fn encode(&self, trained: &Trained) -> [u8; MODEL_STATE_BYTES] {
        let mut bytes = [0; MODEL_STATE_BYTES];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&MAGIC);
        put(&FORMAT.to_le_bytes());
        put(&SCHEMA_VERSION.to_le_bytes());
        put(&trained.digest().to_le_bytes());
        let learnt = self.learnt();
        for (regression, scales) in learnt.knowledge.iter().map(Knowledge::parts) {
            let (covariance, weights) = regression.parts();
            let scales = scales.iter().flat_map(Scale::parts);
            let values = covariance.iter().flatten().chain(weights.iter().flatten()).copied().chain(scales);
            values.for_each(|value| put(&value.to_le_bytes()));
        }
        learnt.own.iter().chain([&learnt.longest_us]).for_each(|value| put(&value.to_le_bytes()));
        [learnt.windows, learnt.commit_in, learnt.held].iter().for_each(|count| put(&count.to_le_bytes()));
        let sum = crc32fast::hash(&bytes[..MODEL_STATE_BYTES - 4]);
        bytes[MODEL_STATE_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads what [`Model::encode`] wrote. The model has seen nothing of any backend yet.
    ///
    /// # Errors
    /// The bytes are no state, or one of another format or another trained model, or damaged, or have a number that cannot be.
    pub fn decode(trained: &Trained, bytes: &[u8]) -> Result<Self, StateError> {
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes.len() < HEADER {
            return Err(StateError::Length { found: bytes.len() });
        }
        if bytes[..4] != MAGIC {
            return Err(StateError::Magic);
        }
        match (number(4), number(6)) {
            (FORMAT, SCHEMA_VERSION) => {}
            (FORMAT, found) => return Err(StateError::Schema { found }),
            (found, _) => return Err(StateError::Format { found }),
        }
        if bytes.len() != MODEL_STATE_BYTES {
            return Err(StateError::Length { found: bytes.len() });
        }
        let (body, sum) = bytes.split_at(MODEL_STATE_BYTES - 4);
        if crc32fast::hash(body).to_le_bytes() != *sum {
            return Err(StateError::Checksum);
        }
        let mut rest = &body[8..];
        let (found, expected) = (u32::from_le_bytes(take(&mut rest)), trained.digest());
        if found != expected {
            return Err(StateError::Trained { found, expected });
        }
        let learnt = take_learnt(rest)?;
        learnt.check().map_err(|of| StateError::Values { of })?;
        Ok(Model::of_learnt(trained, learnt))
    }
}

fn take_learnt(mut rest: &[u8]) -> Result<Learnt, StateError> {
    let rest = &mut rest;
    let knowledge = [take_knowledge(rest)?, take_knowledge(rest)?, take_knowledge(rest)?, take_knowledge(rest)?];
    Ok(Learnt {
        knowledge,
        own: take_values(rest),
        longest_us: f32::from_le_bytes(take(rest)),
        windows: u64::from_le_bytes(take(rest)),
        commit_in: u64::from_le_bytes(take(rest)),
        held: u64::from_le_bytes(take(rest)),
    })
}

fn take_knowledge(rest: &mut &[u8]) -> Result<Knowledge, StateError> {
    let covariance: [[f32; CONTEXT_COUNT]; CONTEXT_COUNT] = core::array::from_fn(|_| take_values(rest));
    let weights: [[f32; CONTEXT_COUNT]; OUTCOME_COUNT] = core::array::from_fn(|_| take_values(rest));
    let regression =
        Regression::from_parts(covariance, weights).ok_or(StateError::Values { of: "covariance or weight" })?;
    let parts: [[f32; 3]; OUTCOME_COUNT] = core::array::from_fn(|_| take_values(rest));
    let scales = parts.map(Scale::from_parts);
    // What cannot be was taken for nothing learnt.
    if scales.iter().zip(&parts).any(|(scale, parts)| scale.parts() != *parts) {
        return Err(StateError::Values { of: "mean, variance or count" });
    }
    Ok(Knowledge::from_parts(regression, scales))
}

fn take_values<const N: usize>(rest: &mut &[u8]) -> [f32; N] {
    core::array::from_fn(|_| f32::from_le_bytes(take(rest)))
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (now, later) = rest.split_first_chunk().expect("the length was checked");
    *rest = later;
    *now
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::COMMIT_EVERY;
    use crate::record::{Grain, Record};
    use crate::schema::Feature;
    use proptest::prelude::*;

    /// Windows of one component whose load comes and goes.
    fn window(number: u64, backend: u64, slower: f32) -> Record {
        let mut record = Record::new(Grain::Window, number, backend, number * 1_000_000_000, 1_000_000);
        let about = |salt: u64| {
            let mixed = (number * 8 + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            0.9 + 0.2 * ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 24) as f32
        };
        let load = 1.0 + (number / 20 % 5) as f32;
        let latency = 100.0 * libm::sqrtf(load) * slower * about(0);
        for (feature, value) in [
            (Feature::Arrivals, 5_000.0 * load),
            (Feature::Completions, 5_000.0 * load),
            (Feature::Depth, load),
            (Feature::Size, 4_096.0),
            (Feature::WriteShare, 0.3),
            (Feature::LatencyMean, latency),
            (Feature::LatencyP50, latency * about(1)),
            (Feature::LatencyP99, latency * 3.0 * about(2)),
            (Feature::LatencyMax, latency * 5.0 * about(3)),
            (Feature::Cpu, 0.2 * load * about(4)),
            (Feature::MemoryShare, 0.4),
        ] {
            record.set(feature, Some(value));
        }
        record
    }

    fn see(model: &mut Model, trained: &Trained, record: &Record) -> String {
        let verdict = model.predict(trained, record);
        model.train(trained);
        // Missing residuals are no numbers, which are not even equal to themselves.
        format!("{verdict:?} {:?} {}", model.inputs(), model.windows())
    }

    fn learnt(windows: u64) -> (Trained, Model) {
        let trained = Trained::prior();
        let mut model = Model::new(&trained);
        (0..windows).for_each(|number| drop(see(&mut model, &trained, &window(number, 1, 1.0))));
        (trained, model)
    }

    #[test]
    fn a_model_that_is_read_judges_as_the_one_that_was_written_does_after_a_failover() {
        // Before it is warm, before and after something was accepted, and while nothing is learnt after an alarm.
        for (windows, slower) in [(0, 1.0), (20, 1.0), (300, 1.0), (1_500, 1.0), (900, 4.0)] {
            let (trained, mut model) = learnt(windows);
            (windows..windows + 30).for_each(|number| drop(see(&mut model, &trained, &window(number, 1, slower))));
            let bytes = model.encode(&trained);
            let mut read = Model::decode(&trained, &bytes).expect("it was just written");
            assert_eq!((read.learnt(), read.encode(&trained)), (model.learnt(), bytes));
            assert_eq!(slower > 1.0, model.learnt().held > 0, "an alarm, or none");
            model.reset_volatile();
            for number in 0..1_400 {
                let record = window(5_000 + number, 1, if number > 1_300 { 2.5 } else { 1.0 });
                let (one, other) = (see(&mut read, &trained, &record), see(&mut model, &trained, &record));
                assert_eq!(one, other, "{windows} windows before, {number} after");
            }
        }
    }

    #[test]
    fn any_flipped_bit_and_any_other_length_is_refused() {
        let (trained, model) = learnt(300);
        let bytes = model.encode(&trained);
        println!("{} bytes", bytes.len());
        for at in 0..bytes.len() {
            let mut flipped = bytes;
            flipped[at] ^= 1 << (at % 8);
            let error = Model::decode(&trained, &flipped).expect_err("it is damaged");
            let expected = match at {
                0..4 => matches!(error, StateError::Magic),
                4..6 => matches!(error, StateError::Format { .. }),
                6..8 => matches!(error, StateError::Schema { .. }),
                _ => error == StateError::Checksum,
            };
            assert!(expected, "byte {at}: {error}");
            assert!(Model::decode(&trained, &bytes[..at]).is_err(), "{at} bytes");
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        let found = longer.len();
        assert_eq!(Model::decode(&trained, &longer).err(), Some(StateError::Length { found }));
        assert_eq!(Model::decode(&trained, &[]).err(), Some(StateError::Length { found: 0 }));
        assert_eq!(Model::decode(&trained, &trained.encode()).err(), Some(StateError::Magic));
    }

    #[test]
    fn the_state_of_another_trained_model_is_refused_by_name() {
        let (trained, model) = learnt(60);
        let mut other = trained.clone();
        other.floors[0] *= 2.0;
        let (found, expected) = (trained.digest(), other.digest());
        let error = Model::decode(&other, &model.encode(&trained)).expect_err("it is of another");
        assert_eq!(error, StateError::Trained { found, expected });
        assert_eq!(
            error.to_string(),
            format!("model state: learnt with the trained model {found:08x}, expected {expected:08x}")
        );
    }

    /// A state with other bytes somewhere, and the checksum to it.
    fn with(bytes: &[u8; MODEL_STATE_BYTES], at: usize, part: &[u8]) -> [u8; MODEL_STATE_BYTES] {
        let mut bytes = *bytes;
        bytes[at..at + part.len()].copy_from_slice(part);
        let sum = crc32fast::hash(&bytes[..MODEL_STATE_BYTES - 4]);
        bytes[MODEL_STATE_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn numbers_that_no_model_comes_to_are_refused_whatever_the_checksum_says() {
        let (trained, model) = learnt(300);
        let bytes = model.encode(&trained);
        let said = |at: usize, part: &[u8]| match Model::decode(&trained, &with(&bytes, at, part)) {
            Err(StateError::Values { of }) => of,
            other => panic!("{:?} at byte {at}", other.map(drop)),
        };
        let (nan, less) = (f32::NAN.to_le_bytes(), (-1.0_f32).to_le_bytes());
        let scales = HEADER + 4 * CONTEXT_COUNT * (CONTEXT_COUNT + OUTCOME_COUNT);
        for part in [nan, less, [0; 4]] {
            assert_eq!(said(HEADER, &part), "covariance or weight");
            assert_eq!(said(HEADER + 3 * KNOWLEDGE, &part), "covariance or weight");
        }
        assert_eq!(said(scales - 4, &nan), "covariance or weight");
        assert_eq!(said(scales, &nan), "mean, variance or count");
        assert_eq!(said(scales + 4, &less), "mean, variance or count");
        assert_eq!(said(scales + 8, &less), "mean, variance or count");
        let own = HEADER + 4 * KNOWLEDGE;
        for part in [nan, less, 1.5_f32.to_le_bytes()] {
            assert_eq!(said(own + 8, &part), "harm in health");
        }
        assert_eq!(said(own + 12, &f32::INFINITY.to_le_bytes()), "longest latency");
        assert_eq!(said(own + 16, &u64::MAX.to_le_bytes()), "number of windows");
        for count in [0, COMMIT_EVERY + 1] {
            assert_eq!(said(own + 24, &count.to_le_bytes()), "number of windows");
        }
        assert_eq!(said(own + 32, &(COMMIT_EVERY + 1).to_le_bytes()), "number of windows");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_model_that_judges_or_say_why(
            part in proptest::collection::vec(any::<u8>(), 0..64), at in HEADER..MODEL_STATE_BYTES - 70, whole in any::<bool>(),
        ) {
            let (trained, model) = learnt(50);
            let bytes = with(&model.encode(&trained), at, &part);
            let read = Model::decode(&trained, if whole { &bytes } else { &part });
            if let Ok(mut model) = read {
                for number in 0..5 {
                    let verdict = model.predict(&trained, &window(number, 1, 1.0));
                    model.train(&trained);
                    prop_assert!(verdict.risk.iter().all(|risk| risk.is_finite()), "{verdict:?}");
                }
            }
        }
    }
}
