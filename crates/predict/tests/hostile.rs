//! Any bytes as what this crate reads: trained models, what a model learnt, records. The same function runs under the fuzzer (`fuzz/`).

#[path = "../../../fuzz/src/allocation.rs"]
mod allocation;
#[path = "../../../fuzz/src/model.rs"]
mod model;
#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;

use proptest::prelude::*;
use warmswap_predict::{Feature, Grain, Record, load_trained_model};

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

#[test]
fn the_seeds_of_model_are_those_of_our_encoders() {
    let mut record = Record::new(Grain::Window, 3, 1, 5_000_000_000, 1_000_000);
    record.set(Feature::Arrivals, Some(1_000.0));
    // What to lay bytes over, where, and the bytes.
    let laid = |what: u8, at: u16, bytes: &[u8]| [&[what][..], &at.to_le_bytes(), bytes].concat();
    let made = [
        ("trained", laid(0, 0, &load_trained_model().encode())),
        ("trained-part", laid(1, 40, &0.25_f32.to_le_bytes())),
        ("state-part", laid(3, 0, &2.0_f32.to_le_bytes())),
        ("record", laid(4, 0, &record.encode())),
        ("record-part", laid(5, 60, &[0xff; 8])),
    ];
    seeds::check("model", &made, model::run);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_laid_over_models_and_records_are_read_back_or_refused_by_name(
        what in 0..6_u8, at in any::<u16>(), bytes in proptest::collection::vec(any::<u8>(), 0..24)
    ) {
        let [low, high] = at.to_le_bytes();
        model::run(&[&[what, low, high], bytes.as_slice()].concat());
    }

    #[test]
    fn numbers_laid_over_models_and_records_are_read_back_or_refused_by_name(
        what in 0..6_u8, at in any::<u16>(), number in any::<f32>(), times in 1..6_usize
    ) {
        let [low, high] = (at / 4 * 4).to_le_bytes();
        model::run(&[&[what, low, high], number.to_le_bytes().repeat(times).as_slice()].concat());
    }
}
