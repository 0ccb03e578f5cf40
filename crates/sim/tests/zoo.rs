//! Known bugs, set loose in the simulator one after the other: those that it catches soon are caught again, and the seeds that catch them
//! are clean while everybody is in his cage.

#![cfg(feature = "zoo")]

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

use warmswap_sim::{Options, run};
use warmswap_zoo::{Animal, release};

/// The first seed.
const FROM: u64 = 77_000_001;
/// Seeds until one fails, at most: many times the median of each (`docs/zoo.md`).
const SEEDS_MAX: u64 = 1_000;

const CAUGHT_SOON: &[Animal] = &[
    Animal::StopTakenForDrain,
    Animal::AbandonedForgotten,
    Animal::FenceSkipped,
    Animal::FenceByTimeout,
    Animal::ReplayFromAvail,
    Animal::ReplayFromUsed,
    Animal::SurvivorsByHead,
    Animal::PlacedWithoutWrap,
    Animal::OverrunIgnored,
    Animal::InexactBelieved,
    Animal::KickLost,
    Animal::CallLost,
    Animal::CallStale,
    Animal::EnableForgotten,
    Animal::NoNotifyLeft,
    Animal::AddressEarly,
    Animal::EarlyKick,
    Animal::KicksSwapped,
    Animal::WriteCacheForgotten,
    Animal::ReplyMismatched,
    Animal::MemoryStale,
    Animal::DoubleClose,
    Animal::DescriptorLeak,
    Animal::MarksNeverCleared,
    Animal::EventWithoutWrap,
];

/// Whether a seed fails: a check of the simulation, or an assertion.
fn fails(seed: u64) -> bool {
    let outcome = catch_unwind(AssertUnwindSafe(|| run(seed, &Options::from_seed(seed))));
    outcome.is_err() || outcome.is_ok_and(|outcome| outcome.failure.is_some())
}

/// Seeds until one fails with an animal loose.
fn seeds_to_catch(animal: Animal) -> Option<u64> {
    let _loose = release(animal);
    (1..=SEEDS_MAX).find(|count| fails(FROM + count - 1))
}

#[test]
fn bugs_that_were_caught_soon_are_caught_again_and_the_same_seeds_are_clean_without_them() {
    // Failures that are wanted would hide one that is not.
    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let caught: Vec<(Animal, Option<u64>)> =
        CAUGHT_SOON.iter().map(|animal| (*animal, seeds_to_catch(*animal))).collect();
    set_hook(hook);
    let at_large: Vec<&str> = caught.iter().filter(|it| it.1.is_none()).map(|it| it.0.id()).collect();
    assert!(at_large.is_empty(), "not caught within {SEEDS_MAX} seeds: {at_large:?}");
    let most = caught.iter().filter_map(|it| it.1).max().unwrap_or(0);
    let unclean: Vec<u64> = (FROM..FROM + most).filter(|seed| fails(*seed)).collect();
    assert!(unclean.is_empty(), "seeds fail with nothing loose: {unclean:?}");
}
