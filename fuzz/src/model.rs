//! Any bytes as a trained model, as what a model learnt, and as a profile record: what is read is encoded to the same bytes, and what judges
//! afterwards comes to numbers.
//!
//! Each is also tried with the checksum, the schema and the digest that it ought to have.

use std::cell::RefCell;

use warmswap_predict::{
    Feature, Grain, MODEL_STATE_BYTES, Model, RECORD_BYTES, Record, TRAINED_BYTES, Trained, load_trained_model,
};

use super::allocation;

/// Nothing here allocates beyond what the harness itself does.
const BYTES_MAX: usize = 256 * 1024;

/// The first byte says what the rest is laid over: a trained model, a model's state, a record; and where.
pub(crate) fn run(data: &[u8]) {
    thread_local! {
        static KNOWN: RefCell<Known> = RefCell::new(Known::new());
    }
    KNOWN.with_borrow_mut(|known| known.run(data));
}

/// What bytes are laid over: so that a few of them are enough to come behind the checks.
struct Known {
    prior: Trained,
    trained: [u8; TRAINED_BYTES],
    learnt: Model,
    state: [u8; MODEL_STATE_BYTES],
    record: [u8; RECORD_BYTES],
}

/// A window of a component with some load.
fn window(number: u64, load: f32) -> Record {
    let mut record = Record::new(Grain::Window, number, 1, number * 1_000_000_000, 1_000_000);
    for feature in Feature::ALL {
        record.set(feature, Some(load * (1.0 + (number % 7) as f32)));
    }
    record
}

impl Known {
    fn new() -> Self {
        let prior = Trained::prior();
        let mut model = Model::new(&prior);
        for number in 0..300 {
            model.predict(&prior, &window(number, 100.0));
            model.train(&prior);
        }
        let state = model.encode(&prior);
        Known { trained: load_trained_model().encode(), learnt: model, state, record: window(3, 7.0).encode(), prior }
    }

    fn run(&mut self, data: &[u8]) {
        let Some(([what, low, high], rest)) = data.split_first_chunk::<3>() else { return };
        let at = usize::from(u16::from_le_bytes([*low, *high]));
        match what % 6 {
            0 => trained(rest),
            1 => trained(&laid(&self.trained, 8, at, rest)),
            2 => self.state(rest),
            3 => self.state(&laid(&self.state, 12, at, rest)),
            4 => self.record(rest),
            _ => {
                let mut bytes = self.record;
                lay(&mut bytes[8..], at, rest);
                self.record(&bytes);
            }
        }
    }

    fn state(&self, bytes: &[u8]) {
        let read = allocation::within(BYTES_MAX, "a model's state", || Model::decode(&self.prior, bytes));
        let mut model = match read {
            Ok(model) => model,
            Err(error) => return says(&error.to_string(), "model state: "),
        };
        assert_eq!(model.encode(&self.prior).as_slice(), bytes);
        judges(&mut model, &self.prior, 4);
        // What it has become can be read again.
        let later = model.encode(&self.prior);
        let again = Model::decode(&self.prior, &later).unwrap_or_else(|error| panic!("what it learnt since: {error}"));
        assert_eq!(again.encode(&self.prior), later);
    }

    fn record(&self, bytes: &[u8]) {
        let record = match Record::decode(bytes) {
            Ok(record) => record,
            Err(error) => return says(&error.to_string(), "profile record: "),
        };
        assert!(record.values().all(|(_, value)| value.is_finite()), "{record:?}");
        assert_eq!(Record::decode(&record.encode()), Ok(record));
        let mut model = self.learnt.clone();
        let verdict = model.predict(&self.prior, &record);
        model.train(&self.prior);
        finite(&verdict.risk, &[verdict.harm, verdict.evidence]);
        judges(&mut model, &self.prior, 2);
    }
}

fn trained(bytes: &[u8]) {
    let trained = match allocation::within(BYTES_MAX, "a trained model", || Trained::decode(bytes)) {
        Ok(trained) => trained,
        Err(error) => return says(&error.to_string(), "trained model: "),
    };
    assert_eq!(trained.encode().as_slice(), bytes);
    let mut model = Model::new(&trained);
    judges(&mut model, &trained, 3);
    let state = model.encode(&trained);
    let again = Model::decode(&trained, &state).unwrap_or_else(|error| panic!("what was learnt with it: {error}"));
    assert_eq!(again.encode(&trained), state);
}

/// `over` with these bytes at some place behind its header, and the checksum to it.
fn laid(over: &[u8], header: usize, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut whole = over.to_vec();
    let end = whole.len() - 4;
    lay(&mut whole[header..end], at, bytes);
    let sum = crc32fast::hash(&whole[..end]);
    whole[end..].copy_from_slice(&sum.to_le_bytes());
    whole
}

fn lay(over: &mut [u8], at: usize, bytes: &[u8]) {
    let at = at % over.len();
    let fits = bytes.len().min(over.len() - at);
    over[at..at + fits].copy_from_slice(&bytes[..fits]);
}

fn says(said: &str, begins: &str) {
    assert!(said.starts_with(begins) && said.len() < 200, "{said}");
}

/// Some windows of ordinary load.
fn judges(model: &mut Model, trained: &Trained, windows: u64) {
    for number in 0..windows {
        let verdict = model.predict(trained, &window(1_000 + number, 100.0));
        model.train(trained);
        finite(&verdict.risk, &[verdict.harm, verdict.evidence]);
    }
}

fn finite(risk: &[f32], others: &[f32]) {
    assert!(risk.iter().all(|risk| (0.0..=1.0).contains(risk)), "risks {risk:?}");
    assert!(risk.is_sorted(), "a failure soon is a failure later as well: {risk:?}");
    assert!(others.iter().all(|value| value.is_finite()), "harm and evidence {others:?}");
}
