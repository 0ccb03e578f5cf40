//! Any bytes as a recorded stream. The same function runs under the fuzzer (`fuzz/`).

#[path = "../../../../fuzz/src/allocation.rs"]
mod allocation;
#[path = "../../../../fuzz/src/seeds.rs"]
mod seeds;
#[path = "../../../../fuzz/src/stream.rs"]
mod streams;

use proptest::prelude::*;
use warmswap_predict::{Feature, Grain, Record};

use super::stream;
use stream::{write_header, write_record};

/// Two records of a device.
fn whole() -> Vec<u8> {
    let mut bytes = Vec::new();
    write_header(&mut bytes, "disk").expect("memory has room");
    for number in 0..2 {
        let mut record = Record::new(Grain::Tick, number, 1, number * 100_000_000, 100_000);
        record.set(Feature::Arrivals, Some(7.0));
        write_record(&mut bytes, &record).expect("memory has room");
    }
    bytes
}

#[test]
fn the_seeds_of_stream_are_those_of_our_writer() {
    let mut cut = whole();
    cut.drain(60..90);
    let header = whole()[..26].to_vec();
    seeds::check("stream", &[("whole", whole()), ("cut", cut), ("header", header)], streams::run);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn in_a_changed_stream_every_byte_is_accounted_for(
        at in any::<usize>(), out in 0..700_usize, into in proptest::collection::vec(any::<u8>(), 0..700)
    ) {
        let mut bytes = whole();
        let at = at % bytes.len();
        let end = (at + out).min(bytes.len());
        bytes.splice(at..end, into);
        streams::run(&bytes);
    }
}
