//! Random bytes as sessions, random words as guest memory. The same functions run under the fuzzer (`fuzz/`).

#[path = "../../../fuzz/src/observer.rs"]
mod observer;
#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;
#[path = "../../../fuzz/src/session.rs"]
mod session;

use proptest::prelude::*;
use warmswap_core::{Ring, Session};
use warmswap_wire::{ConfigSpace, FdSlot, LogRegion, MemoryRegion, VringAddr};

#[test]
fn the_seeds_of_session_are_those_of_our_encoder() {
    let fd = Some(FdSlot(1));
    let region = MemoryRegion { guest_addr: 4096, size: 8192, user_addr: 1 << 40, mmap_offset: 0 };
    let addr = VringAddr { index: 0, flags: 0, descriptor: 4096, used: 8192, available: 6144, log: 0 };
    let ring = Ring {
        size: Some(8),
        addr: Some(addr),
        base: Some(7),
        kick: fd,
        call: fd,
        err: None,
        enabled: Some(true),
        started: true,
    };
    let whole = Session {
        features: Some(1 << 30),
        protocol_features: Some(3),
        memory: vec![(region, FdSlot(2))],
        memory_set: true,
        log: Some((LogRegion { size: 4096, offset: 0 }, FdSlot(3))),
        log_fd: fd,
        backend_req: fd,
        config_writes: vec![ConfigSpace { offset: 32, flags: 0, bytes: vec![1] }],
        mtu: Some(1500),
        rings: vec![ring, Ring::default()],
    };
    let made = [("whole", whole.encode()), ("empty", Session::default().encode())];
    seeds::check("session", &made, session::run);
}

#[test]
fn the_seeds_of_observer_are_rings_that_move() {
    // Size and start; then by looks: time, used.idx, avail.idx, slots, and both indices again.
    let words =
        |words: &[u16]| [&[2, 0, 0][..], &words.iter().flat_map(|it| it.to_le_bytes()).collect::<Vec<_>>()].concat();
    let one = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1];
    seeds::check("observer", &[("one", words(&one)), ("many", words(&one.repeat(4)))], observer::run);
}

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
