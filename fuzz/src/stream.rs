//! Any bytes as a recorded stream: every byte behind the header is a record's or named as damage, and whole frames are found whatever lies
//! between them.
//!
//! Bytes are read as they are, and once more as pieces between whole frames of our own.

use std::io::Read;

use warmswap_predict::{Feature, Grain, RECORD_BYTES, Record};

use super::allocation;
use super::stream::{Item, StreamReader, write_header, write_record};

const FRAME: u64 = 8 + RECORD_BYTES as u64;
/// The reader's buffer, twice while it grows, and what the harness keeps.
const BYTES_MAX: usize = 1 << 20;

pub(crate) fn run(data: &[u8]) {
    allocation::within(BYTES_MAX + 8 * data.len(), "a stream", || {
        as_it_is(data);
        between_frames(data);
    });
}

fn as_it_is(data: &[u8]) {
    match StreamReader::open(data) {
        Ok(reader) => drop(accounts(reader, data.len())),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Our own header, then by turns a piece of the data and a frame.
fn between_frames(data: &[u8]) {
    let Some((pieces, rest)) = data.split_first() else { return };
    let pieces = usize::from(pieces % 4) + 1;
    let mut bytes = Vec::new();
    write_header(&mut bytes, "disk").expect("memory has room");
    let written: Vec<Record> = (0..pieces as u64)
        .map(|number| {
            let mut record = Record::new(Grain::Tick, number, 1, number * 100_000_000, 100_000);
            record.set(Feature::Arrivals, Some(number as f32));
            record
        })
        .collect();
    for (at, record) in written.iter().enumerate() {
        let piece = rest.len() * at / pieces..rest.len() * (at + 1) / pieces;
        bytes.extend_from_slice(&rest[piece]);
        write_record(&mut bytes, record).expect("memory has room");
    }
    // Read in steps that do not fit its own.
    let length = bytes.len();
    let reader = StreamReader::open(Slowly(&bytes, pieces * 97)).expect("our own header");
    assert_eq!(reader.device(), "disk");
    let found = accounts(reader, length);
    // What was written is found in its order, and nothing else unless the data hold whole frames themselves.
    let mut expected = written.iter().peekable();
    for record in &found {
        expected.next_if(|next| *next == record);
    }
    assert!(expected.peek().is_none(), "a whole frame was passed over: {:?}", expected.next());
}

/// Reads to the end: records and damage follow each other without a gap up to the last byte.
fn accounts<R: Read>(mut reader: StreamReader<R>, length: usize) -> Vec<Record> {
    let (mut records, mut at) = (Vec::new(), None);
    while let Some(item) = reader.next().expect("bytes can be read") {
        match item {
            Item::Record(record) => {
                assert!(record.values().all(|(_, value)| value.is_finite()));
                records.push(*record);
                at = at.map(|at| at + FRAME);
            }
            Item::Damage(damage) => {
                assert!(damage.bytes > 0 && !damage.what.is_empty(), "{damage}");
                let behind = damage.offset + damage.bytes;
                assert!(behind <= length as u64, "{damage}");
                if let Some(at) = at {
                    assert_eq!(damage.offset, at, "a gap before {damage}");
                }
                at = Some(behind);
            }
        }
    }
    if let Some(at) = at {
        assert_eq!(at, length as u64, "bytes at the end are not accounted for");
    }
    records
}

/// Gives no more than so many bytes at once.
struct Slowly<'a>(&'a [u8], usize);

impl Read for Slowly<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = into.len().min(self.1);
        self.0.read(&mut into[..most])
    }
}
