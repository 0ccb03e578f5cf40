//! In-flight regions: when they are made, that they are fresh, what is made of them when their keeper has died.

use expect_test::{Expect, expect};

use super::check_with;
use super::harness::{Harness, config};
use crate::drain::DrainMethod;
use crate::policy::{PairConfig, RegionUse, Survivors};

/// A region belongs to backends that are drained by stopping their rings.
fn tracked() -> PairConfig {
    PairConfig { drain: DrainMethod::Stop, ..config() }
}

fn check(script: &str, expected: &Expect) {
    check_with(tracked(), script, expected);
}

fn check_canary(script: &str, expected: &Expect) {
    check_with(PairConfig { canary: true, ..tracked() }, script, expected);
}

fn check_trusted(script: &str, expected: &Expect) {
    check_with(PairConfig { region: RegionUse::Trust, ..tracked() }, script, expected);
}

#[test]
fn both_backends_have_their_regions_when_the_first_ring_starts() {
    check(
        "
        ~start
        ~up 1 inflight
        ~up 2 inflight
        ~vmm connect
        ~vmm !SET_FEATURES
        ~vmm !SET_MEM_TABLE 0
        ~vmm !SET_VRING_NUM 0 8
        ~vmm !SET_VRING_ADDR 0
        ~vmm !SET_VRING_CALL 0
        vmm !SET_VRING_KICK 0
        ",
        &expect![[r#"
            > vmm !SET_VRING_KICK 0
                * RingStarted size=8 goes_on=false
                #1 <- GET_INFLIGHT_FD 2x8
                #2 <- GET_INFLIGHT_FD 2x8
                #1 <- SET_INFLIGHT_FD #1.region, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                #2 <- SET_INFLIGHT_FD #2.region
        "#]],
    );
}

#[test]
fn a_later_shadow_has_its_region_as_soon_as_it_is_ready() {
    check(
        "~ready 1 inflight\n~exit 2\nup 3 inflight",
        &expect![[r#"
        > up 3 inflight
            #3 <- GET_FEATURES
            #3 <- GET_PROTOCOL_FEATURES
            #3 <- SET_PROTOCOL_FEATURES 0x9229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
            close #3.channel
            #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #3 <- GET_FEATURES
            #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
            * ShadowReady backend=3
            #3 <- GET_INFLIGHT_FD 2x8
            #3 <- SET_INFLIGHT_FD #3.region
    "#]],
    );
}

#[test]
fn a_failover_finds_the_region_in_place() {
    check(
        "~ready 2 inflight\n~submit 0 1 2\n~take 0 2\n~wait 1ms\n~exit 1\nfenced 1\ncomplete 0 1 2\nwait 1ms\nstatus",
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE 0=1, SET_VRING_BASE 1=0, SET_VRING_ADDR 1, SET_VRING_KICK kick1, SET_VRING_ENABLE! 1=1
                signal kick0
                signal call0
                signal kick1
                signal call1
                signal kick0
                signal kick1
            > complete 0 1 2
            > wait 1ms
                retire #1
                close #1.region
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=2
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0; ring 1 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_ring_waits_for_the_region_of_its_backend() {
    check(
        "
        ~start
        ~up 1 inflight
        ~up 2 inflight
        ~mute 1
        boot 1
        unmute 1
        ",
        &expect![[r#"
            > boot 1
                * VmmConnected
                #1 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                #2 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                * ShadowReady backend=2
                #2 is primary
                #1 is shadow
                * PrimaryReady backend=2
                #1 <- SET_VRING_NUM 0=8
                #2 <- SET_VRING_NUM 0=8
                #1 <- SET_VRING_CALL call0
                #2 <- SET_VRING_CALL call0
                * RingStarted size=8 goes_on=false
                #2 <- GET_INFLIGHT_FD 2x8
                #1 <- GET_INFLIGHT_FD 2x8
                #2 <- SET_INFLIGHT_FD #2.region, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                #2 <- SET_VRING_ENABLE! 0=1
                signal kick0
            > unmute 1
                * ShadowReady backend=1
                #1 <- SET_INFLIGHT_FD #1.region
        "#]],
    );
}

#[test]
fn a_backend_that_offers_tracking_and_makes_no_region_is_lost() {
    check(
        "~start\n~up 1 inflight no-region\n~up 2 inflight\nboot 1\nstatus",
        &expect![[r#"
            > boot 1
                * VmmConnected
                #1 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                #2 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                * PrimaryReady backend=1
                * ShadowReady backend=2
                #1 <- SET_VRING_NUM 0=8
                #2 <- SET_VRING_NUM 0=8
                #1 <- SET_VRING_CALL call0
                #2 <- SET_VRING_CALL call0
                * RingStarted size=8 goes_on=false
                #1 <- GET_INFLIGHT_FD 2x8
                #2 <- GET_INFLIGHT_FD 2x8
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="it offers in-flight tracking and makes no region" next="failing over"
                * FailoverStarted kind="crash" cause="it offers in-flight tracking and makes no region" backend=1
                retire #1
                #2 <- SET_INFLIGHT_FD #2.region
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                retire #1
                * FailoverSettled kind="crash" cause="it offers in-flight tracking and makes no region" recovery="exact" fence="stopped"
                start #3
                #3 is shadow
                #2 <- SET_VRING_ENABLE! 0=1
                signal kick0
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn no_region_is_asked_for_where_rings_are_drained_by_a_private_kick() {
    check_with(
        config(),
        "~start\nup 1 inflight\n~up 2 inflight\n~boot 1\nstatus",
        &expect![[r#"
        > up 1 inflight
            #1 <- GET_FEATURES
            #1 <- GET_PROTOCOL_FEATURES
            #1 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #1.channel
            close #1.channel
            #1 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #1 <- GET_FEATURES
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
    "#]],
    );
}

#[test]
fn a_canary_has_a_region_of_its_own_and_the_guests_is_in_force_again_behind_it() {
    check_canary(
        "~ready 1 inflight\n~wait 1ms\n~exit 2\n~wait 11ms\nup 3 inflight\nwait 1ms\nwait 2300ms\nexit 1\nfenced 1",
        &expect![[r#"
            > up 3 inflight
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x9229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, ADD_MEM_REG private-ring, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                #3 <- GET_INFLIGHT_FD 1x64
                #3 <- SET_INFLIGHT_FD #3.canary-region, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
            > wait 1ms
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * ShadowReady backend=3
                #3 <- GET_INFLIGHT_FD 2x8
                #3 <- SET_INFLIGHT_FD #3.region
            > wait 2300ms
                watch kick0
                #3 <- SET_INFLIGHT_FD #3.canary-region, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_INFLIGHT_FD #3.region, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #1 <- GET_FEATURES
                #3 <- SET_INFLIGHT_FD #3.canary-region, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_INFLIGHT_FD #3.region, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #1 <- GET_FEATURES
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                #3 is primary
                #3 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #1
                close #1.region
                close private-ring
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped"
                start #4
                #4 is shadow
        "#]],
    );
}

#[test]
fn a_ring_that_starts_during_a_canary_read_does_not_take_its_region_away() {
    check_canary(
        "
        ~start
        ~up 1 inflight
        ~up 2 inflight no-canary
        ~boot 1
        wait 1ms
        canary 2 0
        wait 1ms
        status
        ",
        &expect![[r#"
            > wait 1ms
            > canary 2 0
            > wait 1ms
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_INFLIGHT_FD #2.region, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * ShadowReady backend=2
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_device_with_nothing_to_read_leaves_no_canarys_region_in_force() {
    check_canary(
        "
        start
        ~up 1 inflight empty
        ~up 2 inflight empty
        boot 1
        wait 1100ms
        ~exit 1
        fenced 1
        ",
        &expect![[r#"
            > start
                start #1
                #1 is primary
                start #2
                #2 is shadow
            > boot 1
                * VmmConnected
                #1 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, ADD_MEM_REG private-ring, GET_FEATURES
                #2 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, ADD_MEM_REG private-ring, GET_FEATURES
                * PrimaryReady backend=1
                #2 <- GET_INFLIGHT_FD 1x64
                * ShadowReady backend=2
                #1 <- SET_VRING_NUM 0=8
                #2 <- SET_VRING_NUM 0=8
                #1 <- SET_VRING_CALL call0
                #2 <- SET_VRING_CALL call0
                * RingStarted size=8 goes_on=false
                #1 <- GET_INFLIGHT_FD 2x8
                #2 <- GET_INFLIGHT_FD 2x8
                #1 <- SET_INFLIGHT_FD #1.region, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                #2 <- SET_INFLIGHT_FD #2.region
                #1 <- SET_VRING_ENABLE! 0=1
                signal kick0
            > wait 1100ms
                watch kick0
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #1
                close #1.region
                close private-ring
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped"
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_backend_that_makes_no_region_for_its_canary_is_replaced() {
    check_canary(
        "~ready 1 inflight\n~exit 2\n~wait 11ms\nup 3 inflight no-region\nstatus",
        &expect![[r#"
        > up 3 inflight no-region
            #3 <- GET_FEATURES
            #3 <- GET_PROTOCOL_FEATURES
            #3 <- SET_PROTOCOL_FEATURES 0x9229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
            close #3.channel
            #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #3 <- GET_FEATURES
            #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, ADD_MEM_REG private-ring, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
            #3 <- GET_INFLIGHT_FD 1x64
            close #3.kick
            close #3.call
            close #3.probe
            retire #3
            close private-ring
            * ShadowLost backend=3 reason="it offers in-flight tracking and makes no region" next="another one is started in 20ms"
        > status
            unprotected Idle; primary #1 active, shadow none; recovery exact; ring 0 served exact inflight 0
    "#]],
    );
}

#[test]
fn a_ring_of_another_driver_has_a_fresh_region() {
    check(
        "
        ~ready 1 inflight
        ~submit 0 1 2
        ~complete 0 2 1
        ~wait 1ms
        vmm GET_VRING_BASE 0
        ~at 0 0
        ~vmm !SET_VRING_ADDR 0
        vmm !SET_VRING_KICK 0
        submit 0 1
        ~complete 0 1
        ",
        &expect![[r#"
            > vmm GET_VRING_BASE 0
                #1 <- GET_VRING_BASE 0
                * RingStopped base=2
                vmm <- GET_VRING_BASE 0=2
            > vmm !SET_VRING_KICK 0
                close kick0
                * RingStarted size=8 goes_on=false
                close #1.region
                #1 <- GET_INFLIGHT_FD 2x8
                #1 <- SET_INFLIGHT_FD #1.region, SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > submit 0 1
        "#]],
    );
}

#[test]
fn a_larger_ring_has_a_larger_region_at_both_backends() {
    check(
        "
        ~ready 1 inflight
        ~vmm GET_VRING_BASE 0
        ~vmm !SET_VRING_NUM 0 16
        ~vmm !SET_VRING_ADDR 0
        vmm !SET_VRING_KICK 0
        ",
        &expect![[r#"
            > vmm !SET_VRING_KICK 0
                close kick0
                * RingStarted size=16 goes_on=false
                close #1.region
                #1 <- GET_INFLIGHT_FD 2x16
                close #2.region
                #2 <- GET_INFLIGHT_FD 2x16
                #1 <- SET_INFLIGHT_FD #1.region, SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                #2 <- SET_INFLIGHT_FD #2.region
                signal kick0
        "#]],
    );
}

#[test]
fn a_backend_is_not_asked_twice_for_a_region_that_it_describes_as_it_likes() {
    check(
        "~start\n~up 1 inflight odd-region\n~up 2 inflight odd-region\nboot 1\nstatus",
        &expect![[r#"
            > boot 1
                * VmmConnected
                #1 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                #2 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                * PrimaryReady backend=1
                * ShadowReady backend=2
                #1 <- SET_VRING_NUM 0=8
                #2 <- SET_VRING_NUM 0=8
                #1 <- SET_VRING_CALL call0
                #2 <- SET_VRING_CALL call0
                * RingStarted size=8 goes_on=false
                #1 <- GET_INFLIGHT_FD 2x8
                #2 <- GET_INFLIGHT_FD 2x8
                #1 <- SET_INFLIGHT_FD #1.region, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                #2 <- SET_INFLIGHT_FD #2.region
                #1 <- SET_VRING_ENABLE! 0=1
                signal kick0
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

/// Ring 0 could not be followed: 2 and 4 are completed, 1, 3 and 5 were taken, 6 was not.
const LOST: &str = "
    ~ready 1 inflight
    ~submit 0 1 2 3 4 5
    ~take 0 2
    ~wait 1ms
    ~jump 90ms
    ~complete 0 2
    ~submit 0 6
    ~take 0 5
    ~complete 0 4
    ";

#[test]
fn a_ring_that_could_not_be_followed_is_taken_from_a_trusted_region() {
    check_trusted(
        &format!("{LOST}\nstatus\nexit 1\nfenced 1\nring 0\n~complete 0 1\nwait 1ms\nstatus"),
        &expect![[r#"
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served inexact inflight 5
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                * RegionBelieved taken=3 owed=4
                #2 is primary
                #2 <- SET_VRING_BASE 0=2, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 6 used 2 owed [1 3 5 6] flags 0 avail_event 0
            > wait 1ms
                retire #1
                close #1.region
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=4
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 3
        "#]],
    );
}

#[test]
fn a_ring_that_could_not_be_followed_halts_where_the_region_is_only_a_witness() {
    check(
        &format!("{LOST}\nexit 1\nfenced 1\nstatus"),
        &expect![[r#"
        > exit 1
            close #1.kick
            close #1.call
            close #1.probe
            * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
            * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
            fence #1
        > fenced 1
            retire #1
            close #1.region
            * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped"
            #2 is primary
            start #3
            #3 is shadow
        > status
            halted Halted; primary #2 ready, shadow #3 starting; recovery refused; ring 0 waiting inexact inflight 4; halted: ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped
    "#]],
    );
}

#[test]
fn a_batch_whose_marks_were_not_cleared_is_not_owed() {
    check_trusted(
        &format!("{LOST}\n~publish 0 1 5\nexit 1\nfenced 1\nring 0"),
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                * RegionBelieved taken=1 owed=2
                #2 is primary
                #2 <- SET_VRING_BASE 0=4, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 6 used 4 owed [3 6] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn a_trusted_region_across_the_wrap_of_the_indices() {
    check_trusted(
        &format!("~at 0 65534\n{LOST}\n~exit 1\nfenced 1\nring 0"),
        &expect![[r#"
            > fenced 1
                * RegionBelieved taken=3 owed=4
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 4 used 0 owed [1 3 5 6] flags 0 avail_event 65534
        "#]],
    );
}

#[test]
fn a_region_that_was_never_used_says_that_nothing_was_taken() {
    check_trusted(
        "~ready 1 inflight\n~submit 0 1 2\n~wait 1ms\n~jump 90ms\n~submit 0 3\n~spoil 1 0 version 0\n~exit 1\nfenced 1\nring 0",
        &expect![[r#"
            > fenced 1
                * RegionBelieved owed=3
                * WitnessSilent reason="in-flight region version 0, expected 1" next="the ring alone is believed"
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 3 used 0 owed [1 2 3] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn a_planned_failover_is_not_refused_for_a_ring_that_a_trusted_region_knows() {
    check_trusted(
        "~ready 1 inflight\n~submit 0 1 2\n~take 0 1\n~wait 1ms\njump 90ms\nfailover now\nfenced 1\nring 0",
        &expect![[r#"
            > jump 90ms
                * ObserverInexact reason="the ring was not observed for so long that its indices may have wrapped" next="resynchronising"
            > failover now
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > fenced 1
                * RegionBelieved taken=1 owed=2
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 2 used 0 owed [1 2] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn a_planned_failover_is_refused_for_it_where_the_region_is_only_a_witness() {
    check(
        "~ready 1 inflight\n~submit 0 1 2\n~take 0 1\n~wait 1ms\njump 90ms\nfailover now\nwait 200ms",
        &expect![[r#"
            > jump 90ms
                * ObserverInexact reason="the ring was not observed for so long that its indices may have wrapped" next="resynchronising"
            > failover now
            > wait 200ms
                * FailoverRefused cause="operator: test" reason="what ring 0 has in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped"
                answer: refused refused what ring 0 has in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped
                #1 <- GET_FEATURES
        "#]],
    );
}

#[test]
fn a_hang_is_not_put_off_where_a_trusted_region_knows_what_is_owed() {
    let script = "~ready 1 inflight\n~submit 0 1 2\n~take 0 1\n~wait 1ms\n~mute 1\njump 90ms\nwait 600ms";
    check_trusted(
        script,
        &expect![[r#"
        > jump 90ms
            * ObserverInexact reason="the ring was not observed for so long that its indices may have wrapped" next="resynchronising"
        > wait 600ms
            #1 <- GET_FEATURES
            * FailoverStarted kind="hang" cause="nothing was completed for 500ms and its control channel is silent" backend=1
            fence #1
            close #1.kick
            close #1.call
            close #1.probe
    "#]],
    );
    check(
        script,
        &expect![[r#"
        > jump 90ms
            * ObserverInexact reason="the ring was not observed for so long that its indices may have wrapped" next="resynchronising"
        > wait 600ms
            #1 <- GET_FEATURES
            * FailoverPutOff backend=1 cause="nothing was completed for 500ms and its control channel is silent" reason="what ring 0 has in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped" next="the primary is left alone for a while: it may come back"
    "#]],
    );
}

#[test]
fn a_backend_that_keeps_no_region_is_not_trusted() {
    check_trusted(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\njump 90ms\n~exit 1\nfenced 1",
        &expect![[r#"
        > jump 90ms
            * ObserverInexact reason="the ring was not observed for so long that its indices may have wrapped" next="resynchronising"
        > fenced 1
            retire #1
            * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped; the backend kept no in-flight region"
            #2 is primary
            start #3
            #3 is shadow
    "#]],
    );
}

#[test]
fn a_trusted_region_that_is_broken_halts_with_the_reason() {
    for (damage, reason) in [
        ("version 7", "in-flight region version 7, expected 1"),
        ("size 16", "in-flight region for 16 descriptors, expected 8"),
        ("used 30", "in-flight region: the last batch's list is broken at entry 0"),
        ("gone", "the in-flight region cannot be read"),
    ] {
        assert_eq!(halted(&format!("{LOST}\n~spoil 1 0 {damage}")), reason);
    }
    // 1, 3 and 5 were taken and 6 was not. Two more heads that nobody has submitted are too many.
    assert_eq!(
        halted(&format!("{LOST}\n~spoil 1 0 marks 0 90\n~spoil 1 0 marks 7 91")),
        "the in-flight region marks 5 requests, avail.idx - used.idx is 4"
    );
    // Taken, it says, and standing where what was not taken stands.
    assert_eq!(
        halted("~ready 1 inflight\n~submit 0 1 2 3\n~take 0 1\n~wait 1ms\n~jump 90ms\n~spoil 1 0 marks 3 90"),
        "head 3 was submitted and is in flight by the in-flight region"
    );
}

/// Why a crash halts, behind what is said of the observer.
fn halted(script: &str) -> String {
    let mut harness = Harness::new(PairConfig { region: RegionUse::Trust, ..tracked() });
    let script = format!("{script}\n~exit 1\n~fenced 1");
    script.lines().map(str::trim).filter(|line| !line.is_empty()).for_each(|line| harness.line(line));
    let reason = harness.pair.status(harness.now).halted.expect("it is halted");
    harness.finish();
    let unknown = "ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped; ";
    reason.strip_prefix(unknown).unwrap_or_else(|| panic!("it halts for another reason: {reason}")).to_owned()
}

#[test]
fn survivors_of_a_trusted_region_are_not_written_where_that_is_switched_off() {
    check_with(
        PairConfig { region: RegionUse::Trust, survivors: Survivors::Refuse, ..tracked() },
        &format!("{LOST}\n~exit 1\nfenced 1\nring 0"),
        &expect![[r#"
            > fenced 1
                retire #1
                close #1.region
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped; survivors would have to be written to the available ring, which is switched off"
                #2 is primary
                start #3
                #3 is shadow
            > ring 0
                avail 6 used 2 owed [3 4 5 6] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn a_region_that_marks_what_the_ring_shows_as_completed_halts() {
    check(
        "~ready 1 inflight\n~submit 0 1 2\n~complete 0 1\n~wait 1ms\n~spoil 1 0 marks 1 90\n~exit 1\nfenced 1",
        &expect![[r#"
            > fenced 1
                retire #1
                close #1.region
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: the in-flight region marks head 1, which the rings show as completed"
                #2 is primary
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_witness_that_cannot_be_read_is_silent() {
    check(
        "~ready 1 inflight\n~submit 0 1 2\n~take 0 1\n~wait 1ms\n~spoil 1 0 version 7\n~exit 1\nfenced 1\nring 0",
        &expect![[r#"
            > fenced 1
                * WitnessSilent reason="in-flight region version 7, expected 1" next="the ring alone is believed"
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 2 used 0 owed [1 2] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn a_region_that_knows_less_than_the_ring_is_no_contradiction() {
    check(
        "~ready 1 inflight\n~submit 0 1 2 3\n~complete 0 2\n~submit 0 4\n~wait 1ms\n~exit 1\nfenced 1\nring 0",
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 4 used 1 owed [1 3 4] flags 0 avail_event 0
        "#]],
    );
}
