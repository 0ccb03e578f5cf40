//! Predicted failures: what is asked before one is acted upon, and what comes of it.

use expect_test::{Expect, expect};

use super::check_with;
use super::harness::config;
use crate::policy::{OnPrediction, PairConfig};

fn check(script: &str, expected: &Expect) {
    check_with(PairConfig { canary: true, ..config() }, script, expected);
}

#[test]
fn an_alarm_has_the_shadow_read_and_is_acted_upon_if_it_is_well() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~submit 0 3
            alarm 1 harm
            wait 2ms
            complete 0 3
            wait 2ms
            status
            ",
        &expect![[r#"
            > alarm 1 harm
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
            > wait 2ms
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * FailoverStarted kind="predicted" cause="predicted (harm): requests take longer than they should at this load, for too long to be chance; causes: none" backend=1
                #1 <- SET_VRING_KICK! #1.kick
            > complete 0 3
            > wait 2ms
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                close private-ring
                * FailoverSettled kind="predicted" cause="predicted (harm): requests take longer than they should at this load, for too long to be chance; causes: none" recovery="drained" fence="stopped"
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_shadow_that_is_slow_as_well_is_a_common_cause() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~canary 2 off
            alarm 1 harm
            wait 280ms
            canary 2 0
            wait 50ms
            status
            ",
        &expect![[r#"
            > alarm 1 harm
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
            > wait 280ms
                * FailoverWithheld backend=1 alarm="harm" why="common-cause" reason="the shadow's reads are not completed either, usually they take 149.999µs" next="look at the storage: the fault lies below both backends"
            > canary 2 0
            > wait 50ms
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_lost_completion_is_not_drained() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~submit 0 3
            ~wait 1ms
            alarm 1 law
            wait 2ms
            fenced 1
            wait 1ms
            ",
        &expect![[r#"
            > alarm 1 law
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
            > wait 2ms
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * FailoverStarted kind="predicted" cause="predicted (law): a completion was lost: a request is not answered while younger ones are; causes: none" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > wait 1ms
        "#]],
    );
}

#[test]
fn a_drain_that_takes_too_long_before_a_predicted_failure_ends_in_a_fence() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~submit 0 3
            ~wait 1ms
            ~alarm 1 harm
            ~wait 2ms
            wait 249ms
            ",
        &expect![[r#"
            > wait 249ms
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
        "#]],
    );
}

#[test]
fn without_a_shadow_it_is_waited_for_and_then_withheld() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~exit 2
            alarm 1 harm
            wait 999ms
            wait 2ms
            up 3
            wait 1ms
            alarm 1 harm
            wait 5ms
            ",
        &expect![[r#"
            > alarm 1 harm
            > wait 999ms
            > wait 2ms
                #1 <- GET_FEATURES
                * FailoverWithheld backend=1 alarm="harm" why="refused" reason="the shadow is starting, not ready" next="it is tried again at the next alarm"
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, ADD_MEM_REG private-ring, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
            > wait 1ms
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * ShadowReady backend=3
            > alarm 1 harm
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
            > wait 5ms
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * FailoverStarted kind="predicted" cause="predicted (harm): requests take longer than they should at this load, for too long to be chance; causes: none" backend=1
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                #3 is primary
                #3 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                close private-ring
                * FailoverSettled kind="predicted" cause="predicted (harm): requests take longer than they should at this load, for too long to be chance; causes: none" recovery="drained" fence="stopped"
                start #4
                #4 is shadow
        "#]],
    );
}

#[test]
fn an_alarm_of_a_backend_that_has_gone_concerns_nobody() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            alarm 2 harm
            alarm 1 store
            alarm 1 store
            exit 1
            alarm 1 harm
            ",
        &expect![[r#"
            > alarm 2 harm
            > alarm 1 store
                * FailoverWithheld backend=1 alarm="exhaustion" why="shared-resource" reason="store_used_share is shared by primary and shadow: a swap cannot help" next="make room: primary and shadow use it up together"
            > alarm 1 store
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > alarm 1 harm
        "#]],
    );
}

#[test]
fn the_next_one_has_to_wait() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~alarm 1 full
            ~wait 10ms
            ~up 3
            ~wait 1000ms
            status
            alarm 2 harm
            wait 10000ms
            ~alarm 2 harm
            ~wait 10ms
            status
            ",
        &expect![[r#"
            > status
                protected Idle; primary #2 active, shadow #3 ready; recovery exact; ring 0 served exact inflight 0
            > alarm 2 harm
                * FailoverWithheld backend=2 alarm="harm" why="cooling" reason="the last predicted failover is too recent: not before 8.99045s have passed" next="look at the device: one that alarms again after a swap has its fault elsewhere"
            > wait 10000ms
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #2 <- GET_FEATURES
            > status
                unprotected Idle; primary #3 active, shadow #4 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_lost_interrupt_is_given_again_and_only_a_guest_that_goes_on_has_its_backend_looked_into() {
    check(
        "
            ~ready 1
            ~submit 0 3
            ~complete 0 3
            ~wait 11000ms
            alarm 1 interrupt
            alarm 1 interrupt
            ~submit 0 4
            ~complete 0 4
            ~wait 1ms
            alarm 1 interrupt
            ",
        &expect![[r#"
            > alarm 1 interrupt
                signal call0
                * FailoverWithheld backend=1 alarm="law" why="given-again" reason="an interrupt seems to be lost: the guest is given it once more" next="nothing: if the next one is lost as well the shadow takes over"
            > alarm 1 interrupt
                signal call0
                * FailoverWithheld backend=1 alarm="law" why="guest-absent" reason="the guest takes no interrupts, given again or not" next="look at the guest: it has stopped, or hangs"
            > alarm 1 interrupt
                signal call0
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
        "#]],
    );
}

#[test]
fn a_lost_kick_is_given_again_and_a_backend_that_does_not_hear_that_is_looked_into() {
    check(
        "~ready 1\n~wait 11000ms\n~submit 0 3\n~wait 60ms\nalarm 1 kick\n~wait 160ms\nalarm 1 kick",
        &expect![[r#"
            > alarm 1 kick
                signal kick0
                * FailoverWithheld backend=1 alarm="law" why="kicked-again" reason="a kick seems to be lost: the backend is given it once more" next="nothing, if it was one; look at the guest and its VMM if it goes on: the shadow takes over only from a backend that is deaf"
            > alarm 1 kick
                signal kick0
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
        "#]],
    );
}

#[test]
fn a_deaf_backend_is_told_at_the_second_alarm_where_nobody_saw_the_submission_before_the_first() {
    // Idle, the ring is watched by its kick, which does not come.
    check(
        "~ready 1\n~wait 11000ms\n~submit 0 3\nalarm 1 kick\n~wait 160ms\nalarm 1 kick",
        &expect![[r#"
        > alarm 1 kick
            signal kick0
            * FailoverWithheld backend=1 alarm="law" why="kicked-again" reason="a kick seems to be lost: the backend is given it once more" next="nothing, if it was one; look at the guest and its VMM if it goes on: the shadow takes over only from a backend that is deaf"
        > alarm 1 kick
            signal kick0
            #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
            signal #2.probe
    "#]],
    );
}

#[test]
fn kicks_that_are_lost_again_and_again_are_given_to_a_ring_that_stands_still_and_to_no_other() {
    check(
        "
            ~ready 1
            ~wait 11000ms
            ~submit 0 3
            ~wait 60ms
            alarm 1 kick
            ~complete 0 3
            ~wait 400ms
            ~submit 0 4
            ~wait 60ms
            alarm 1 kick
            ~complete 0 4
            wait 100ms
            submit 0 5
            wait 30ms
            ~complete 0 5
            ~wait 61000ms
            submit 0 6
            wait 30ms
            ",
        &expect![[r#"
            > alarm 1 kick
                signal kick0
                * FailoverWithheld backend=1 alarm="law" why="kicked-again" reason="a kick seems to be lost: the backend is given it once more" next="nothing, if it was one; look at the guest and its VMM if it goes on: the shadow takes over only from a backend that is deaf"
            > alarm 1 kick
                signal kick0
                signal kick0
            > wait 100ms
            > submit 0 5
            > wait 30ms
                signal kick0
                signal kick0
                signal kick0
                signal kick0
            > submit 0 6
            > wait 30ms
        "#]],
    );
}

#[test]
fn whoever_only_wants_to_be_told_is_told() {
    check_with(
        PairConfig { on_prediction: OnPrediction::Observe, ..config() },
        "
            ~ready 1
            alarm 1 harm
            alarm 1 harm
            alarm 1 interrupt
            ",
        &expect![[r#"
            > alarm 1 harm
                * FailoverWithheld backend=1 alarm="harm" why="observe-only" reason="predictions are only reported here (--observe)" next="start without --observe to have it acted upon, or make the failover yourself"
            > alarm 1 harm
            > alarm 1 interrupt
        "#]],
    );
}
