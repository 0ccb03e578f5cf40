//! The VMM stops rings, disconnects, comes back.

use expect_test::expect;

use super::harness::config;
use super::{check, check_with};
use crate::drain::DrainMethod;
use crate::policy::{Limits, PairConfig};
use crate::time::Nanos;

#[test]
fn a_stop_is_answered_when_the_ring_is_proved_quiet() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\nvmm GET_VRING_BASE 0\ncomplete 0 1\nwait 25ms\nstatus",
        &expect![[r#"
        > vmm GET_VRING_BASE 0
            #1 <- SET_VRING_KICK! #1.kick
        > complete 0 1
        > wait 25ms
            #1 <- GET_VRING_BASE 0
            * RingStopped base=1
            vmm <- GET_VRING_BASE 0=1
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact
    "#]],
    );
}

#[test]
fn a_ring_that_never_started_is_answered_from_the_record() {
    check(
        "~ready 1\n~vmm SET_VRING_BASE 1 77\nvmm GET_VRING_BASE 1",
        &expect![[r#"
        > vmm GET_VRING_BASE 1
            vmm <- GET_VRING_BASE 1=77
    "#]],
    );
}

#[test]
fn a_ring_can_be_stopped_and_started_while_another_runs_on() {
    check(
        "~ready 2\n~submit 1 5\nvmm GET_VRING_BASE 0\nvmm SET_VRING_KICK 0\nstatus",
        &expect![[r#"
            > vmm GET_VRING_BASE 0
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > vmm SET_VRING_KICK 0
                close kick0
                * RingStarted size=8 goes_on=false
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                vmm <- SET_VRING_KICK ok
                signal kick0
                signal kick1
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0; ring 1 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_silent_primary_is_fenced_so_that_the_stop_can_be_answered() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~complete 0 2\n~mute 1\nvmm GET_VRING_BASE 0\nwait 6ms\nfenced 1\nring 0\nstatus",
        &expect![[r#"
            > vmm GET_VRING_BASE 0
                #1 <- SET_VRING_KICK! #1.kick
            > wait 6ms
                * FailoverStarted kind="crash" cause="its control channel is silent while the VMM stops a ring" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > fenced 1
                * RingStopped base=1
                vmm <- GET_VRING_BASE 0=1
                #2 is primary
                retire #1
                * FailoverSettled kind="crash" cause="its control channel is silent while the VMM stops a ring" recovery="exact" fence="reaped" survivors=1
                start #3
                #3 is shadow
            > ring 0
                avail 2 used 1 owed [1] flags 0 avail_event 0
            > status
                unprotected Idle; primary #2 ready, shadow #3 starting; recovery exact
        "#]],
    );
}

#[test]
fn a_primary_that_does_not_complete_is_fenced_when_the_patience_is_over() {
    let config = PairConfig { drain: DrainMethod::Stop, ..config() };
    check_with(
        config,
        "~ready 1\n~submit 0 1\n~wait 1ms\n~mute 1\nvmm GET_VRING_BASE 0\nwait 1100ms\nfenced 1",
        &expect![[r#"
            > vmm GET_VRING_BASE 0
                #1 <- GET_VRING_BASE 0
            > wait 1100ms
                #1 <- GET_FEATURES
                * FailoverStarted kind="hang" cause="nothing was completed for 500ms and its control channel is silent" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
                #2 <- GET_FEATURES
                * AnsweredFromRecord request="GET_VRING_BASE" reason="the backend that had the ring is not proved quiet yet; the ring is abandoned"
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > fenced 1
                #2 is primary
                retire #1
                * FailoverSettled kind="hang" cause="nothing was completed for 500ms and its control channel is silent" recovery="exact" fence="reaped"
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_stop_during_a_failover_waits_for_the_proof() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~complete 0 2\n~exit 1\nvmm GET_VRING_BASE 0\nfenced 1\nring 0",
        &expect![[r#"
        > vmm GET_VRING_BASE 0
        > fenced 1
            * RingStopped base=1
            vmm <- GET_VRING_BASE 0=1
            #2 is primary
            retire #1
            * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1
            start #3
            #3 is shadow
        > ring 0
            avail 2 used 1 owed [1] flags 0 avail_event 0
    "#]],
    );
}

#[test]
fn a_stop_that_the_proof_keeps_waiting_is_answered_and_the_ring_is_abandoned() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\nvmm GET_VRING_BASE 0\nwait 6ms\nfenced 1\nstatus",
        &expect![[r#"
            > vmm GET_VRING_BASE 0
            > wait 6ms
                * AnsweredFromRecord request="GET_VRING_BASE" reason="the backend that had the ring is not proved quiet yet; the ring is abandoned"
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > fenced 1
                #2 is primary
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped"
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 ready, shadow #3 starting; recovery exact
        "#]],
    );
}

#[test]
fn a_stop_while_the_target_is_confirmed_is_carried_out_by_the_new_primary() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\n~fenced 1\nvmm GET_VRING_BASE 0\ncomplete 0 1\nwait 30ms\nstatus",
        &expect![[r#"
        > vmm GET_VRING_BASE 0
        > complete 0 1
        > wait 30ms
            retire #1
            * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1
            #2 <- SET_VRING_KICK! #2.kick
            start #3
            #3 is shadow
            #2 <- GET_VRING_BASE 0
            * RingStopped base=1
            vmm <- GET_VRING_BASE 0=1
        > status
            unprotected Idle; primary #2 active, shadow #3 starting; recovery exact
    "#]],
    );
}

#[test]
fn a_vmm_that_leaves_has_its_rings_brought_to_rest_and_both_backends_replaced() {
    check(
        "~ready 1\nvmm gone\nstatus",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                close mem0
                close kick0
                close call0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                start #3
                #3 is primary
                start #4
                #4 is shadow
            > status
                unprotected Idle; primary #3 starting, shadow #4 starting; recovery exact
        "#]],
    );
}

#[test]
fn a_vmm_that_leaves_requests_behind_finds_them_in_the_ring_when_it_comes_back() {
    check(
        "
        ~ready 1
        ~submit 0 0 1 2
        ~wait 1ms
        ~complete 0 1
        ~wait 1ms
        ~mute 1
        vmm gone
        wait 1600ms
        fenced 1
        ring 0
        ~up 3
        ~up 4
        boot 1
        complete 0 0 2
        ~wait 1ms
        status
        ",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
                #1 <- SET_VRING_KICK! #1.kick
            > wait 1600ms
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                * FailoverStarted kind="hang" cause="its control channel has been silent for 500ms" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > fenced 1
                retire #1
                * FailoverRefused kind="hang" cause="its control channel has been silent for 500ms" recovery="exact" fence="reaped" survivors=2 message="not handed over: the VMM disconnected"
                close mem0
                close kick0
                close call0
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                start #3
                #3 is primary
                start #4
                #4 is shadow
            > ring 0
                avail 3 used 1 owed [0 2] flags 0 avail_event 0
            > boot 1
                * VmmConnected
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                #4 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                * PrimaryReady backend=3
                * ShadowReady backend=4
                #3 <- SET_VRING_NUM 0=8
                #4 <- SET_VRING_NUM 0=8
                #3 <- SET_VRING_CALL call0
                #4 <- SET_VRING_CALL call0
                * RingStarted size=8 base=1 pending=2 goes_on=false
                #3 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                #3 <- SET_VRING_ENABLE! 0=1
                signal kick0
            > complete 0 0 2
            > status
                protected Idle; primary #3 active, shadow #4 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_vmm_that_comes_back_while_its_rings_still_rest_has_to_wait() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~mute 1\n~vmm gone\nvmm connect\nvmm GET_FEATURES\nwait 1600ms\nfenced 1",
        &expect![[r#"
            > vmm connect
                * VmmConnected
            > vmm GET_FEATURES
                (the VMM waits)
            > wait 1600ms
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                * FailoverStarted kind="hang" cause="its control channel has been silent for 500ms" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > fenced 1
                retire #1
                * FailoverRefused kind="hang" cause="its control channel has been silent for 500ms" recovery="exact" fence="reaped" survivors=1 message="not handed over: the VMM disconnected"
                close mem0
                close kick0
                close call0
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                start #3
                #3 is primary
                start #4
                #4 is shadow
                vmm <- GET_FEATURES 0x140002200
        "#]],
    );
}

#[test]
fn a_vmm_that_leaves_during_a_failover_is_not_handed_over() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\nvmm gone\nfenced 1\nstatus",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
            > fenced 1
                retire #1
                * FailoverRefused kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1 message="not handed over: the VMM disconnected"
                close mem0
                close kick0
                close call0
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                start #3
                #3 is primary
                start #4
                #4 is shadow
            > status
                unprotected Idle; primary #3 starting, shadow #4 starting; recovery exact
        "#]],
    );
}

#[test]
fn a_vmm_that_leaves_while_no_backend_can_be_had_is_let_go() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\n~exit 2\n~fenced 1\nvmm gone\nvmm connect\nvmm GET_FEATURES\nstatus",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
                retire #1
                * FailoverRefused kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1 message="not handed over: the VMM disconnected"
                close mem0
                close kick0
                close call0
                #3 is primary
                start #4
                #4 is shadow
            > vmm connect
                * VmmConnected
            > vmm GET_FEATURES
                vmm <- GET_FEATURES 0x140002200
            > status
                unprotected Idle; primary #3 starting, shadow #4 starting; recovery exact
        "#]],
    );
}

#[test]
fn a_vmm_that_leaves_a_halted_device_frees_it() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~jump 90ms\n~exit 1\n~fenced 1\nstatus\nvmm gone\nstatus\n~up 3\n~boot 1\nstatus",
        &expect![[r#"
            > status
                halted Halted; primary #2 ready, shadow #3 starting; recovery refused; ring 0 waiting inexact inflight 1; halted: ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped
            > vmm gone
                * VmmGone reason="the connection was closed"
                close mem0
                close kick0
                close call0
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                #3 is primary
                start #4
                #4 is shadow
            > status
                unprotected Idle; primary #3 starting, shadow #4 starting; recovery exact
            > status
                unprotected Idle; primary #3 active, shadow #4 starting; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_vmm_that_leaves_before_it_started_a_ring_leaves_nothing() {
    check(
        "~start\n~up 1\n~up 2\n~vmm connect\n~vmm SET_FEATURES\n~vmm SET_MEM_TABLE 0 1\n~vmm SET_VRING_CALL 0\nvmm gone",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
                close mem0
                close mem1
                close call0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                start #3
                #3 is primary
                start #4
                #4 is shadow
        "#]],
    );
}

#[test]
fn a_stop_is_never_answered_while_a_living_backend_may_still_serve_the_ring() {
    // While the target is confirmed.
    check(
        "~ready 2\n~submit 0 1\n~wait 1ms\n~exit 1\n~fenced 1\nstatus\nvmm GET_VRING_BASE 1\nwait 30ms\nstatus",
        &expect![[r#"
            > status
                failing-over Confirming; primary #1 ended, shadow #2 active; recovery exact; ring 0 served exact inflight 1; ring 1 served exact inflight 0
            > vmm GET_VRING_BASE 1
            > wait 30ms
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1 message="the new primary answers, but has not completed anything yet"
                #2 <- SET_VRING_KICK! #2.kick
                start #3
                #3 is shadow
                #2 <- GET_VRING_BASE 1
                * RingStopped ring=1
                vmm <- GET_VRING_BASE 1=0
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
    // While the target has not acknowledged its rings.
    check(
        "~ready 2\n~submit 0 1\n~wait 1ms\n~exit 1\n~mute 2\n~fenced 1\nstatus\nvmm GET_VRING_BASE 1\nwait 30ms\nunmute 2\nwait 30ms",
        &expect![[r#"
            > status
                failing-over Resuming; primary #1 ended, shadow #2 active; recovery exact; ring 0 served exact inflight 1; ring 1 served exact inflight 0
            > vmm GET_VRING_BASE 1
            > wait 30ms
                watch kick1
            > unmute 2
                signal kick0
                signal kick1
            > wait 30ms
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1 message="the new primary answers, but has not completed anything yet"
                #2 <- SET_VRING_KICK! #2.kick
                start #3
                #3 is shadow
                #2 <- GET_VRING_BASE 1
                * RingStopped ring=1
                unwatch kick1
                vmm <- GET_VRING_BASE 1=0
        "#]],
    );
    // While the primary is drained.
    check(
        "~ready 2\n~submit 0 1\n~wait 1ms\n~mute 1\n~failover\nstatus\nvmm GET_VRING_BASE 1\nwait 30ms\nunmute 1\ncomplete 0 1\nwait 30ms",
        &expect![[r#"
            > status
                failing-over Draining; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 1; ring 1 served exact inflight 0
            > vmm GET_VRING_BASE 1
            > wait 30ms
                watch kick1
            > unmute 1
                #1 <- GET_VRING_BASE 1
            > complete 0 1
            > wait 30ms
                #1 <- GET_VRING_BASE 0
                * RingStopped ring=1
                unwatch kick1
                vmm <- GET_VRING_BASE 1=0
                #2 is primary
                #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
                answer: settled drained
                start #3
                #3 is shadow
                watch kick0
        "#]],
    );
}

#[test]
fn a_stop_that_is_answered_too_late_proves_nothing() {
    let limits = Limits { drain_max: Nanos::from_millis(100), ..Limits::default() };
    check_with(
        PairConfig { drain: DrainMethod::Stop, limits, ..config() },
        "
        ~start
        ~up 1 inflight
        ~up 2 inflight
        ~boot 1
        ~submit 0 3
        ~wait 1ms
        ~mute 1
        vmm gone
        wait 150ms
        unmute 1
        ",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
                #1 <- GET_VRING_BASE 0
            > wait 150ms
            > unmute 1
                * DrainUnverified next="the primary is fenced and treated as crashed"
                * FailoverStarted kind="crash" cause="it answered the stop of ring 0 only after 150ms" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
        "#]],
    );
}

#[test]
fn a_primary_that_was_drained_holds_up_no_change_it_has_not_acknowledged() {
    check_with(
        PairConfig { drain: DrainMethod::Stop, ..config() },
        "
        ~ready 1
        ~mute 1
        failover
        vmm SET_MEM_TABLE 0
        unmute 1
        ",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- GET_VRING_BASE 0
            > vmm SET_MEM_TABLE 0
                close mem0
                #1 <- SET_MEM_TABLE! mem0
                #2 <- SET_MEM_TABLE! mem0
            > unmute 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                vmm <- SET_MEM_TABLE ok
                signal kick0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
                answer: settled drained
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_ring_whose_index_stands_at_zero_after_a_full_turn_goes_on() {
    check(
        "
        ~at 0 65535
        ~ready 1
        ~submit 0 3 4 5
        ~wait 1ms
        ~complete 0 4
        ~wait 1ms
        ~exit 1
        ~vmm GET_VRING_BASE 0
        wait 6ms
        ~fenced 1
        vmm SET_VRING_KICK 0
        ring 0
        ",
        &expect![[r#"
            > wait 6ms
                * AnsweredFromRecord request="GET_VRING_BASE" reason="the backend that had the ring is not proved quiet yet; the ring is abandoned"
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > vmm SET_VRING_KICK 0
                close kick0
                * RingStarted size=8 pending=2 goes_on=true
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                vmm <- SET_VRING_KICK ok
                signal kick0
            > ring 0
                avail 2 used 0 owed [3 5] flags 0 avail_event 65535
        "#]],
    );
}

#[test]
fn a_ring_that_is_set_up_anew_begins_at_zero_whatever_was_in_flight_before() {
    check(
        "
        ~at 0 65535
        ~ready 1
        ~submit 0 3 4 5
        ~wait 1ms
        ~complete 0 4
        ~wait 1ms
        ~exit 1
        ~vmm GET_VRING_BASE 0
        ~wait 6ms
        ~fenced 1
        ~at 0 0
        ~submit 0 7 6
        vmm SET_VRING_KICK 0
        ring 0
        ",
        &expect![[r#"
            > vmm SET_VRING_KICK 0
                close kick0
                * RingStarted size=8 pending=2 goes_on=false
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                vmm <- SET_VRING_KICK ok
                signal kick0
            > ring 0
                avail 2 used 0 owed [7 6] flags 0 avail_event 0
        "#]],
    );
}

/// What was owed there when it was abandoned is out of order, and says nothing of the primary that is drained meanwhile.
#[test]
fn an_abandoned_ring_that_is_started_again_during_a_drain_is_handed_over_with_what_it_owes() {
    check(
        "
        ~ready 2
        ~submit 1 3 4 5
        ~wait 1ms
        ~complete 1 4
        ~wait 1ms
        ~exit 1
        ~vmm GET_VRING_BASE 1
        ~wait 6ms
        ~fenced 1
        ~up 3
        ~wait 1ms
        ~submit 0 1
        ~wait 1ms
        failover
        vmm SET_VRING_KICK 1
        complete 0 1
        wait 1ms
        ring 1
        status
        ",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=2
                #2 <- SET_VRING_KICK! #2.kick
            > vmm SET_VRING_KICK 1
                close kick1
                * RingStarted ring=1 size=8 base=1 pending=2 goes_on=true
                vmm <- SET_VRING_KICK ok
            > complete 0 1
            > wait 1ms
                #2 <- GET_VRING_BASE 0
                #3 is primary
                #3 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE 0=1, SET_VRING_BASE 1=1, SET_VRING_ADDR 1, SET_VRING_KICK kick1, SET_VRING_ENABLE! 1=1
                signal kick0
                signal call0
                signal kick1
                signal call1
                signal kick0
                signal kick1
            > ring 1
                avail 3 used 1 owed [3 5] flags 0 avail_event 0
            > status
                failing-over Confirming; primary #2 active, shadow #3 active; recovery exact; ring 0 served exact inflight 0; ring 1 served exact inflight 2
        "#]],
    );
}
