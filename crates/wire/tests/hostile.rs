//! Random bytes, lengths and numbers of descriptors: a clear error or a value, never a panic. The same functions run under the
//! fuzzer (`fuzz/`).

#[path = "../../../fuzz/src/codec.rs"]
mod codec;
#[path = "../../../fuzz/src/inflight.rs"]
mod inflight;

use proptest::prelude::*;

/// A message that is nearly right: a known id, the version, a length that fits or nearly fits.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let size = prop_oneof![Just(0_usize), Just(8), Just(16), Just(20), Just(24), Just(32), Just(40), 0..400_usize];
    (0..40_u8, 0..48_u32, 0..16_u32, size, any::<[u8; 400]>(), -1..=1_i64).prop_map(
        |(fds, id, flags, size, payload, off)| {
            let claimed = u32::try_from((i64::try_from(size).expect("small") + off).max(0)).expect("small");
            let mut bytes = vec![fds];
            for word in [id, flags, claimed] {
                bytes.extend_from_slice(&word.to_ne_bytes());
            }
            bytes.extend_from_slice(&payload[..size]);
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic_the_codec(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        codec::run(&bytes);
    }

    #[test]
    fn messages_that_are_nearly_right_never_panic_the_codec(bytes in nearly_right()) {
        codec::run(&bytes);
    }

    #[test]
    fn random_in_flight_regions_never_panic_the_reader(
        size in 0..6_u8, used in any::<u16>(), mut region in proptest::collection::vec(any::<u8>(), 0..640), right in any::<bool>()
    ) {
        if right && region.len() >= 16 {
            region[8..10].copy_from_slice(&1_u16.to_ne_bytes());
            region[10..12].copy_from_slice(&(1_u16 << size).to_ne_bytes());
        }
        let [low, high] = used.to_le_bytes();
        inflight::run(&[&[size, low, high], region.as_slice()].concat());
    }
}
