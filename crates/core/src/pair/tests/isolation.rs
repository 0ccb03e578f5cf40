//! A request that kills every backend.

use expect_test::expect;

use super::harness::config;
use super::{check, check_with};
use crate::drain::DrainMethod;
use crate::policy::PairConfig;

/// Two requests are in flight while three backends die in a row.
const THREE_DEATHS: &str = "
    ~ready 1
    ~submit 0 3 5
    ~wait 1ms
    ~exit 1
    ~fenced 1
    ~exit 2
    ~fenced 2
    ~up 3
    ~exit 3
";

#[test]
fn after_three_deaths_each_suspect_runs_alone_and_the_guilty_one_is_answered_with_an_error() {
    check(
        &format!(
            "{THREE_DEATHS}
            fenced 3
            up 4
            exit 4
            fenced 4
            ring 0
            up 5
            status
            complete 0 5
            wait 1ms
            status
            "
        ),
        &expect![[r#"
            > fenced 3
                * IsolationStarted suspects=2 next="each is run alone on a fresh backend"
                start #4
                #4 is shadow
            > up 4
                #4 <- GET_FEATURES
                #4 <- GET_PROTOCOL_FEATURES
                #4 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #4.channel
                close #4.channel
                #4 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #4 <- GET_FEATURES
                #4 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=4
                #4 <- ADD_MEM_REG private-ring, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #4.call, SET_VRING_KICK #4.probe, SET_VRING_ENABLE! 0=1
                signal #4.probe
                #4 <- GET_FEATURES
            > exit 4
                close #4.kick
                close #4.call
                close #4.probe
                fence #4
                start #5
                #5 is shadow
            > fenced 4
                close private-ring
                * RequestIsolated head=3 status_written=true reason="every backend that ran it died; it was answered with an I/O error"
                signal call0
            > ring 0
                avail 2 used 1 owed [5] flags 0 avail_event 0
            > up 5
                #5 <- GET_FEATURES
                #5 <- GET_PROTOCOL_FEATURES
                #5 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #5.channel
                close #5.channel
                #5 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #5 <- GET_FEATURES
                #5 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=5
                #5 is primary
                #5 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > status
                failing-over Confirming; primary #3 ended, shadow #5 active; recovery exact; ring 0 served exact inflight 1
            > complete 0 5
            > wait 1ms
                retire #3
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=6 attempts=2 isolated=1
                start #6
                #6 is shadow
            > status
                unprotected Idle; primary #5 active, shadow #6 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn an_innocent_request_is_completed_by_its_trial() {
    check(
        &format!(
            "{THREE_DEATHS}\n~fenced 3\n~up 4\ntrial\nwait 1ms\nfenced 4\nring 0\nup 5\nexit 5\nfenced 5\nup 6\nring 0\nstatus"
        ),
        &expect![[r#"
            > trial
            > wait 1ms
                close #4.kick
                close #4.call
                close #4.probe
                fence #4
                start #5
                #5 is shadow
            > fenced 4
                close private-ring
                signal call0
            > ring 0
                avail 2 used 1 owed [5] flags 0 avail_event 0
            > up 5
                #5 <- GET_FEATURES
                #5 <- GET_PROTOCOL_FEATURES
                #5 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #5.channel
                close #5.channel
                #5 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #5 <- GET_FEATURES
                #5 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=5
                #5 <- ADD_MEM_REG private-ring, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #5.call, SET_VRING_KICK #5.probe, SET_VRING_ENABLE! 0=1
                signal #5.probe
                #5 <- GET_FEATURES
            > exit 5
                close #5.kick
                close #5.call
                close #5.probe
                fence #5
                start #6
                #6 is shadow
            > fenced 5
                close private-ring
                * RequestIsolated head=5 status_written=true reason="every backend that ran it died; it was answered with an I/O error"
                signal call0
            > up 6
                #6 <- GET_FEATURES
                #6 <- GET_PROTOCOL_FEATURES
                #6 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #6.channel
                close #6.channel
                #6 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #6 <- GET_FEATURES
                #6 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=6
                #6 is primary
                #6 <- SET_VRING_BASE 0=2, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #3
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=6 attempts=2 isolated=1
                start #7
                #7 is shadow
            > ring 0
                avail 2 used 2 owed [] flags 0 avail_event 0
            > status
                unprotected Idle; primary #6 active, shadow #7 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_trial_that_takes_its_time_is_asked_for_a_sign_of_life_now_and_then() {
    check(
        &format!("{THREE_DEATHS}\n~fenced 3\n~up 4\nwait 600ms\ntrial\nwait 3ms"),
        &expect![[r#"
            > wait 600ms
                #4 <- GET_FEATURES
                #4 <- GET_FEATURES
                #4 <- GET_FEATURES
                #4 <- GET_FEATURES
            > trial
            > wait 3ms
                close #4.kick
                close #4.call
                close #4.probe
                fence #4
                start #5
                #5 is shadow
        "#]],
    );
}

#[test]
fn a_trial_that_hangs_is_decided_by_its_silence() {
    check(
        &format!("{THREE_DEATHS}\n~fenced 3\n~up 4\n~mute 4\nwait 3000ms"),
        &expect![[r#"
            > wait 3000ms
                #4 <- GET_FEATURES
                close #4.kick
                close #4.call
                close #4.probe
                fence #4
                start #5
                #5 is shadow
        "#]],
    );
}

#[test]
fn a_backend_that_takes_no_further_region_cannot_try_a_request_and_the_device_halts() {
    check(
        "~ready 1 no-slots\n~submit 0 3\n~wait 1ms\n~exit 1\n~fenced 1\n~exit 2\n~fenced 2\n~up 3 no-slots\n~exit 3\n~fenced 3\nup 4 no-slots\nstatus",
        &expect![[r#"
            > up 4 no-slots
                #4 <- GET_FEATURES
                #4 <- GET_PROTOCOL_FEATURES
                #4 <- SET_PROTOCOL_FEATURES 0x229, SET_OWNER, SET_BACKEND_REQ_FD #4.channel
                close #4.channel
                #4 <- GET_QUEUE_NUM, GET_CONFIG 256
                #4 <- GET_FEATURES
                #4 <- SET_FEATURES 0x140002200, SET_MEM_TABLE mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=4
                retire #3
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" survivors=3 attempts=2 message="a request kills every backend and cannot be isolated: the backend takes no further memory region"
                #4 is primary
                start #5
                #5 is shadow
            > status
                halted Halted; primary #4 ready, shadow #5 starting; recovery exact; ring 0 waiting exact inflight 1; halted: a request kills every backend and cannot be isolated: the backend takes no further memory region
        "#]],
    );
}

#[test]
fn a_ring_the_vmm_resets_during_the_trial_is_not_touched_afterwards() {
    check(
        &format!(
            "{THREE_DEATHS}
            ~fenced 3
            ~up 4
            vmm GET_VRING_BASE 0
            wait 6ms
            vmm SET_VRING_KICK 0
            exit 4
            fenced 4
            ring 0
            up 5
            ring 0
            "
        ),
        &expect![[r#"
            > vmm GET_VRING_BASE 0
                close #4.kick
                close #4.call
                close #4.probe
                fence #4
                start #5
                #5 is shadow
            > wait 6ms
                * AnsweredFromRecord request="GET_VRING_BASE" reason="the backend that had the ring is not proved quiet yet; the ring is abandoned"
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > vmm SET_VRING_KICK 0
                close kick0
                * RingStarted size=8 pending=2 goes_on=false
                vmm <- SET_VRING_KICK ok
            > exit 4
            > fenced 4
                close private-ring
            > ring 0
                avail 2 used 0 owed [3 5] flags 0 avail_event 0
            > up 5
                #5 <- GET_FEATURES
                #5 <- GET_PROTOCOL_FEATURES
                #5 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #5.channel
                close #5.channel
                #5 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #5 <- GET_FEATURES
                #5 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=5
                #5 is primary
                #5 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 2 used 0 owed [3 5] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn whoever_dies_after_the_one_an_operator_had_killed_speaks_against_what_was_in_flight() {
    check(
        "
        ~ready 1
        ~submit 0 3
        ~wait 1ms
        ~failover now
        ~fenced 1
        ~exit 2
        ~fenced 2
        ~up 3
        ~exit 3
        ~fenced 3
        ~up 4
        ~exit 4
        fenced 4
        ",
        &expect![[r#"
            > fenced 4
                * IsolationStarted suspects=1 next="each is run alone on a fresh backend"
                start #5
                #5 is shadow
        "#]],
    );
}

#[test]
fn a_ring_the_vmm_resets_before_anything_is_tried_is_handed_over() {
    check(
        &format!(
            "{THREE_DEATHS}
            ~fenced 3
            vmm GET_VRING_BASE 0
            ~vmm !SET_VRING_CALL 0
            vmm !SET_VRING_KICK 0
            ~wait 1ms
            ~up 4
            ~wait 1ms
            status
            "
        ),
        &expect![[r#"
            > vmm GET_VRING_BASE 0
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > vmm !SET_VRING_KICK 0
                close kick0
                * RingStarted size=8 pending=2 goes_on=false
            > status
                failing-over Confirming; primary #3 ended, shadow #4 active; recovery exact; ring 0 served exact inflight 2
        "#]],
    );
}

#[test]
fn deaths_without_anything_in_flight_accuse_nobody() {
    check(
        "~ready 1\n~exit 1\n~fenced 1\n~up 3\n~exit 2\n~fenced 2\n~up 4\n~exit 3\nfenced 3\nstatus",
        &expect![[r#"
            > fenced 3
                #4 is primary
                #4 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #3
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped"
                start #5
                #5 is shadow
            > status
                unprotected Idle; primary #4 active, shadow #5 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_backend_that_dies_while_a_trial_ends_is_started_again() {
    check(
        &format!("{THREE_DEATHS}\n~fenced 3\n~up 4\n~exit 4\nup 5\nexit 5\nwait 1ms\nstatus"),
        &expect![[r#"
        > up 5
            #5 <- GET_FEATURES
            #5 <- GET_PROTOCOL_FEATURES
            #5 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #5.channel
            close #5.channel
            #5 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #5 <- GET_FEATURES
            #5 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
            * ShadowReady backend=5
        > exit 5
            close #5.kick
            close #5.call
            close #5.probe
            retire #5
            * ShadowLost backend=5 reason="killed by signal 9" next="another one is started in 0ns"
            start #6
            #6 is shadow
        > wait 1ms
        > status
            failing-over Isolating; primary #3 ended, shadow #6 starting; recovery exact; ring 0 waiting exact inflight 2
    "#]],
    );
}

#[test]
fn a_backend_that_tracks_what_is_in_flight_is_given_no_trial() {
    check_with(
        PairConfig { drain: DrainMethod::Stop, ..config() },
        &format!(
            "{}\n~fenced 3\nup 4 inflight\nstatus",
            THREE_DEATHS.replace("up 3", "up 3 inflight").replace("ready 1", "ready 1 inflight")
        ),
        &expect![[r#"
            > up 4 inflight
                #4 <- GET_FEATURES
                #4 <- GET_PROTOCOL_FEATURES
                #4 <- SET_PROTOCOL_FEATURES 0x9229, SET_OWNER, SET_BACKEND_REQ_FD #4.channel
                close #4.channel
                #4 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #4 <- GET_FEATURES
                #4 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=4
                #4 <- GET_INFLIGHT_FD 2x8
                retire #3
                close #3.region
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" survivors=6 attempts=2 message="a request kills every backend and cannot be isolated: the backend tracks what is in flight, and would find the trial among it"
                #4 is primary
                start #5
                #5 is shadow
                #4 <- SET_INFLIGHT_FD #4.region
            > status
                halted Halted; primary #4 ready, shadow #5 starting; recovery exact; ring 0 waiting exact inflight 2; halted: a request kills every backend and cannot be isolated: the backend tracks what is in flight, and would find the trial among it
        "#]],
    );
}
