//! A part of the seeds, in the test profile; `lab sim` runs many more.

use warmswap_core::Nanos;
use warmswap_sim::{Class, Faults, Keeping, Options, Outcome, Stats, VmmRule, replay, run};

/// Runs a seed that must not fail; says how to see what it does.
fn clean(seed: u64, options: &Options) -> Outcome {
    let outcome = run(seed, options);
    if let Some(failure) = &outcome.failure {
        panic!("seed {seed}: {} after {}: {}\n{options}", failure.check, failure.at, failure.detail);
    }
    outcome
}

#[test]
fn nothing_is_lost_in_a_thousand_lives() {
    let mut all = Stats::default();
    for seed in 0..1_000 {
        all.add(&clean(seed, &Options::from_seed(seed)).stats);
    }
    assert_eq!(all.completed + all.abandoned, all.requests, "a request has no end");
    assert!(all.failovers_inflight > 1_000, "{} failovers with requests in flight: not much was tried", all.failovers);
    for kind in ["crash", "hang", "planned", "predicted"] {
        assert!(all.kinds.get(kind).is_some_and(|count| *count > 3), "hardly any {kind} failover: {:?}", all.kinds);
    }
    for fault in [
        "kill at a store",
        "kill at a message",
        "kill both",
        "drop the link",
        "stall",
        "mute",
        "late broker",
        "cache mode",
    ] {
        assert!(all.faults.get(fault).is_some_and(|count| *count > 10), "hardly any {fault}: {:?}", all.faults);
    }
    assert!(all.connections > 1_100 && all.stops > 500 && all.memory_changes > 100 && all.resets > 100, "{all:?}");
    assert!(all.survivors > 5_000, "{} survivors", all.survivors);
}

#[test]
fn the_same_seed_is_the_same_life() {
    for seed in 0..60 {
        let options = Options::from_seed(seed);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let one = replay(seed, &options, &mut |at, text| first.push(format!("{at} {text}")));
        let two = replay(seed, &options, &mut |at, text| second.push(format!("{at} {text}")));
        assert_eq!(first, second, "seed {seed}");
        assert_eq!(one, two, "seed {seed}");
        assert_eq!(one, run(seed, &options), "seed {seed}: watching changes it");
        assert_ne!(one.stats.trace_hash, run(seed + 1, &options).stats.trace_hash, "seed {seed}: it does not matter");
    }
}

#[test]
fn options_are_printed_in_full() {
    let text = Options::from_seed(3).to_string();
    for name in ["ring_size", "vmm", "keeping", "limits", "kill_at_store", "sabotage"] {
        assert!(text.contains(name), "{name} is missing:\n{text}");
    }
}

#[test]
fn every_vmm_with_every_pair_of_backends() {
    let mut seed = 10_000;
    for vmm in VmmRule::ALL {
        for primary in Class::ALL {
            for shadow in Class::ALL {
                let mut failovers = 0;
                for _ in 0..4 {
                    seed += 1;
                    let drain = primary.drain();
                    let options =
                        Options { vmm, primary, shadow, drain, disconnects: true, ..Options::from_seed(seed) };
                    failovers += clean(seed, &options).stats.failovers;
                }
                assert!(failovers > 0, "{vmm:?} with {primary:?} and {shadow:?}: no failover was made");
            }
        }
    }
}

#[test]
fn every_way_to_keep_a_region() {
    use Keeping as K;
    let mut seed = 20_000;
    for keeping in [K::Absent, K::Correct, K::StartsAtZero, K::NeverCleared, K::ClearedEarly, K::NoOrder] {
        for class in [Class::Draining, Class::Spdk] {
            for _ in 0..12 {
                seed += 1;
                let region = warmswap_core::RegionUse::Witness;
                let drain = class.drain();
                let options =
                    Options { keeping, primary: class, shadow: class, drain, region, ..Options::from_seed(seed) };
                clean(seed, &options);
            }
        }
    }
}

#[test]
fn indices_go_all_the_way_round() {
    for seed in 30_000..30_100 {
        let options = Options { start_index: 65_535 - (seed % 300) as u16, ..Options::from_seed(seed) };
        clean(seed, &options);
    }
}

/// Where the ring can be followed and nothing lies, every failover is exact, and none halts.
#[test]
fn nothing_halts_where_everything_can_be_known() {
    let mut all = Stats::default();
    for seed in 40_000..40_200 {
        let drawn = Options::from_seed(seed);
        let options = Options {
            ring_size: 256,
            depth: drawn.depth.min(16),
            keeping: Keeping::Correct,
            survivors: warmswap_core::Survivors::Place,
            service: Nanos::from_micros(100).max(drawn.service),
            faults: Faults { late: false, poison: false, broker_dies: false, ..drawn.faults },
            limits: warmswap_core::Limits { isolate_after: 1_000, ..drawn.limits },
            ..drawn
        };
        all.add(&clean(seed, &options).stats);
    }
    assert_eq!(all.halts, Default::default());
    assert!(all.failovers_inflight > 200, "{} failovers", all.failovers_inflight);
}

/// Seeds that once failed, far from the ranges above. What each found has a script of its own in `core`; this is the life it was found in.
#[test]
fn what_failed_once_fails_no_more() {
    for seed in [48_339, 443_529, 937_170, 945_913, 967_199, 2_137_903, 2_143_731] {
        // They were found before the simulation knew of these.
        clean(seed, &Options { cache_modes: false, ..Options::from_seed(seed) });
    }
}
