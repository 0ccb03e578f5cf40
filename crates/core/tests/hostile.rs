//! Random bytes as sessions, random words as guest memory. The same functions run under the fuzzer (`fuzz/`).

#[path = "../../../fuzz/src/observer.rs"]
mod observer;
#[path = "../../../fuzz/src/session.rs"]
mod session;

use proptest::prelude::*;

/// Bytes that start like a session, for random ones never would.
fn nearly_a_session() -> impl Strategy<Value = Vec<u8>> {
    let small = proptest::collection::vec(prop_oneof![4 => Just(0_u8), 4 => Just(1), 1 => any::<u8>()], 0..200);
    small.prop_map(|rest| [b"WSSN\x01\x00".as_slice(), &rest].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic_the_session(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        session::run(&bytes);
    }

    #[test]
    fn bytes_that_start_like_a_session_never_panic_it(bytes in nearly_a_session()) {
        session::run(&bytes);
    }

    #[test]
    fn random_guest_memory_never_panics_the_observer(bytes in proptest::collection::vec(0..20_u8, 0..2_000)) {
        observer::run(&bytes);
    }

    #[test]
    fn wild_guest_memory_never_panics_the_observer(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        observer::run(&bytes);
    }
}
