//! Known bugs, set loose, and the random histories that must notice them.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};

use warmswap_zoo::{Animal, release};

use super::random::{nonsense_history, orderly_history};

/// Histories until one fails.
const HISTORIES_MAX: u64 = 100;

/// What random histories are to notice. The others are the simulator's, or those of tests of their own.
const NOTICED: &[Animal] = &[
    Animal::StopTakenForDrain,
    Animal::StopAnsweredWhileServed,
    Animal::FenceSkipped,
    Animal::FenceByTimeout,
    Animal::ReplayFromUsed,
    Animal::SurvivorsByHead,
    Animal::EarlyKick,
    Animal::DoubleClose,
    Animal::DescriptorLeak,
    Animal::ResubmittedByHead,
    Animal::RegionSwappedInCanary,
    Animal::RegionNotRenewed,
];

fn is_noticed(history: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(history)).is_err()
}

#[test]
fn random_histories_notice_known_bugs() {
    // Hundreds of failures that are wanted would hide one that is not.
    set_hook(Box::new(|_| {}));
    let at_large: Vec<&str> = NOTICED.iter().copied().filter(|animal| !is_caught(*animal)).map(Animal::id).collect();
    let _default = std::panic::take_hook();
    assert!(at_large.is_empty(), "not noticed within {HISTORIES_MAX} histories: {at_large:?}");
}

fn is_caught(animal: Animal) -> bool {
    let _loose = release(animal);
    (1..=HISTORIES_MAX)
        .any(|seed| is_noticed(|| orderly_history(seed).finish()) || is_noticed(|| nonsense_history(seed).finish()))
}
