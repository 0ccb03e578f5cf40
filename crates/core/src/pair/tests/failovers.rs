//! Planned failovers, crashes, hangs, and everything that can go wrong on the way.

use expect_test::expect;
use warmswap_wire::DeviceType;

use super::harness::{Harness, config};
use super::{check, check_with};
use crate::drain::DrainMethod;
use crate::event::FenceLevel;
use crate::policy::{Limits, PairConfig, Survivors};
use crate::time::Nanos;

#[test]
fn a_planned_failover_diverts_drains_verifies_and_hands_over() {
    check(
        "~ready 1\n~submit 0 1 2\n~complete 0 2 1\nfailover\nup 3\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=2, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
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
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=3
            > status
                protected Idle; primary #2 active, shadow #3 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_drain_by_disabling_waits_until_what_was_taken_is_completed() {
    let config = PairConfig { drain: DrainMethod::Disable, ..config() };
    check_with(
        config,
        "~ready 1\n~submit 0 1 2\nfailover\nwait 200us\ncomplete 0 1 2\nwait 1ms\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_ENABLE! 0=0
            > wait 200us
            > complete 0 1 2
            > wait 1ms
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=2, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
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
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_drain_by_stopping_asks_every_ring_at_once() {
    let config = PairConfig { drain: DrainMethod::Stop, ..config() };
    check_with(
        config,
        "~ready 2\nfailover\nwait 1ms\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- GET_VRING_BASE 0, GET_VRING_BASE 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE 0=1, SET_VRING_BASE 1=0, SET_VRING_ADDR 1, SET_VRING_KICK kick1, SET_VRING_ENABLE! 1=1
                signal kick0
                signal call0
                signal kick1
                signal call1
                signal kick0
                signal kick1
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
                answer: settled drained
                start #3
                #3 is shadow
            > wait 1ms
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0; ring 1 served exact inflight 0
        "#]],
    );
}

#[test]
fn requests_that_arrive_while_the_primary_is_diverted_go_to_the_shadow() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\nfailover\ncomplete 0 1\nsubmit 0 3\ncomplete 0 2\nwait 30ms\nring 0\ncomplete 0 3\nwait 1ms",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
            > complete 0 1
            > submit 0 3
            > complete 0 2
            > wait 30ms
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=2, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 3 used 2 owed [3] flags 0 avail_event 0
            > complete 0 3
            > wait 1ms
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped" survivors=1
                answer: settled drained
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_stop_that_is_not_verified_is_a_crash() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~claims 1 2\nfailover\nwait 30ms\nfenced 1\ncomplete 0 1 2\nwait 1ms",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
            > wait 30ms
                #1 <- GET_VRING_BASE 0
                * DrainUnverified base=2 next="the primary is fenced and treated as crashed"
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
            > complete 0 1 2
            > wait 1ms
                retire #1
                * FailoverSettled kind="planned" cause="operator: test" recovery="exact" fence="reaped" survivors=2 message="not drained: it answered the stop of ring 0 with base 2 while used.idx is 0"
                answer: settled exact not drained: it answered the stop of ring 0 with base 2 while used.idx is 0
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_drain_that_takes_too_long_is_a_crash() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~mute 1\nfailover\nwait 1100ms\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
            > wait 1100ms
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > status
                failing-over Fencing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_failover_without_drain_fences_at_once() {
    check(
        "~ready 1\nfailover now\nfenced 1\nstatus",
        &expect![[r#"
            > failover now
                * FailoverStarted kind="planned" cause="operator: test" backend=1
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
                retire #1
                * FailoverSettled kind="planned" cause="operator: test" recovery="exact" fence="reaped"
                answer: settled exact
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_drained_primary_is_killed_as_well_where_the_fence_demands_it() {
    let config = PairConfig { fence: FenceLevel::Reaped, ..config() };
    check_with(
        config,
        "~ready 1\nfailover\nfenced 1\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
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
                retire #1
                * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="reaped"
                answer: settled drained
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_fence_below_the_configured_level_halts() {
    let config = PairConfig { fence: FenceLevel::Target, ..config() };
    check_with(
        config,
        "~ready 1\nexit 1\nfenced 1 reaped\nstatus",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1 reaped
                retire #1
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="proved reaped, configured is target"
                #2 is primary
                start #3
                #3 is shadow
            > status
                halted Halted; primary #2 ready, shadow #3 starting; recovery exact; ring 0 waiting exact inflight 0; halted: proved reaped, configured is target
        "#]],
    );
}

#[test]
fn failovers_are_refused_with_a_reason_where_they_cannot_be_made() {
    check(
        "~start\nfailover\n~up 1\n~up 2\n~boot 1\n~exit 2\nfailover\n~wait 1ms\nfailover",
        &expect![[r#"
        > failover
            * FailoverRefused cause="operator: test" reason="the primary is starting"
            answer: refused refused the primary is starting
        > failover
            * FailoverRefused cause="operator: test" reason="the shadow is starting, not ready"
            answer: refused refused the shadow is starting, not ready
        > failover
            * FailoverRefused cause="operator: test" reason="the shadow is starting, not ready"
            answer: refused refused the shadow is starting, not ready
    "#]],
    );
}

#[test]
fn a_crash_hands_the_survivors_over_in_the_order_of_their_submission() {
    check(
        "
        ~ready 1
        ~submit 0 0 1 2 3 4 5
        ~wait 1ms
        ~complete 0 4 1 0
        ~wait 1ms
        exit 1
        ring 0
        fenced 1
        ring 0
        complete 0 2
        wait 1ms
        status
        ",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > ring 0
                avail 6 used 3 owed [3 4 5] flags 0 avail_event 0
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=3, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 6 used 3 owed [2 3 5] flags 0 avail_event 0
            > complete 0 2
            > wait 1ms
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=3
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 2
        "#]],
    );
}

#[test]
fn survivors_are_placed_across_the_wrap_of_the_indices() {
    check(
        "
        ~at 0 65533
        ~ready 1
        ~submit 0 0 1 2 3 4
        ~wait 1ms
        ~complete 0 3 1
        ~wait 1ms
        exit 1
        fenced 1
        ring 0
        ",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=65535, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 2 used 65535 owed [0 2 4] flags 0 avail_event 65533
        "#]],
    );
}

#[test]
fn nothing_is_written_where_the_slots_hold_the_survivors_already() {
    let config = PairConfig { survivors: Survivors::Refuse, ..config() };
    check_with(
        config,
        "~ready 1\n~submit 0 0 1 2\n~wait 1ms\n~complete 0 0\nexit 1\nfenced 1\nring 0",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 3 used 1 owed [1 2] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn survivors_that_would_have_to_be_written_halt_where_that_is_switched_off() {
    let config = PairConfig { survivors: Survivors::Refuse, ..config() };
    check_with(
        config,
        "~ready 1\n~submit 0 0 1 2\n~wait 1ms\n~complete 0 2\nexit 1\nfenced 1\nring 0",
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
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: survivors would have to be written to the available ring, which is switched off"
                #2 is primary
                start #3
                #3 is shadow
            > ring 0
                avail 3 used 1 owed [1 2] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn every_ring_is_kicked_and_called_and_kicked_again_once_it_is_known_to_be_enabled() {
    check(
        "~ready 2\n~submit 0 1\n~submit 1 2\n~wait 1ms\n~exit 1\nfenced 1",
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
        "#]],
    );
}

#[test]
fn flags_the_dead_backend_left_behind_are_cleared() {
    check(
        "~ready 1\n~flags 0 1\n~exit 1\n~fenced 1\nring 0",
        &expect![[r#"
        > ring 0
            avail 0 used 0 owed [] flags 0 avail_event 0
    "#]],
    );
}

#[test]
fn a_position_the_dead_backend_left_behind_is_moved_to_what_is_submitted_next() {
    // EVENT_IDX among them.
    let features = "features=160002200";
    let mut harness = Harness::new(config());
    for line in ["start", &format!("up 1 {features}"), &format!("up 2 {features}"), "vmm connect"] {
        harness.line(line);
    }
    for line in ["SET_FEATURES 160002200", "SET_MEM_TABLE 0", "SET_VRING_NUM 0 8", "SET_VRING_ADDR 0"] {
        harness.line(&format!("vmm !{line}"));
    }
    for line in ["SET_VRING_CALL 0", "SET_VRING_KICK 0", "SET_VRING_ENABLE 0 1"] {
        harness.line(&format!("vmm !{line}"));
    }
    harness.line("submit 0 3 5");
    // The driver would not kick for the next 32,767 requests.
    harness.memory.ring(0).avail_event = 2 + 0x7fff;
    harness.line("exit 1");
    harness.line("fenced 1");
    let ring = harness.memory.ring(0);
    assert_eq!((ring.avail_idx, ring.avail_event), (2, 2), "{}", harness.shown());
    harness.finish();
}

#[test]
fn a_base_that_is_the_used_index_by_chance_is_not_believed_while_something_older_is_owed() {
    let mut harness = Harness::new(PairConfig { drain: DrainMethod::Stop, ..config() });
    for line in ["ready 1", "submit 0 1 2 3", "complete 0 2", "claims 1 1", "failover"] {
        harness.line(line);
    }
    assert!(harness.journal.contains(&"DrainUnverified"), "{}", harness.shown());
    // Whoever takes over finds the two that are owed: the harness checks that.
    harness.line("fenced 1");
    harness.line("complete 0 1");
    harness.line("wait 1ms");
    assert!(harness.journal.contains(&"FailoverSettled"), "{}", harness.shown());
    harness.finish();
}

#[test]
fn a_crash_while_the_ring_is_not_known_exactly_halts_until_the_vmm_resets_it() {
    check(
        "
        ~ready 1
        ~submit 0 1 2
        ~wait 1ms
        jump 90ms
        failover
        exit 1
        fenced 1
        status
        vmm GET_VRING_BASE 0
        status
        ",
        &expect![[r#"
            > jump 90ms
                * ObserverInexact reason="the ring was not observed for so long that its indices may have wrapped" next="resynchronising"
            > failover
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
                * FailoverRefused cause="operator: test" reason="failover 1 is in phase Fencing already"
                answer: refused refused failover 1 is in phase Fencing already
            > fenced 1
                retire #1
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped"
                #2 is primary
                start #3
                #3 is shadow
            > status
                halted Halted; primary #2 ready, shadow #3 starting; recovery refused; ring 0 waiting inexact inflight 2; halted: ring 0: what is in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped
            > vmm GET_VRING_BASE 0
                * RingStopped
                vmm <- GET_VRING_BASE 0=0
            > status
                unprotected Idle; primary #2 ready, shadow #3 starting; recovery exact
        "#]],
    );
}

#[test]
fn knowledge_comes_back_when_everything_open_at_the_gap_is_completed() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~jump 90ms\ncomplete 0 2 1\nwait 3ms\nstatus",
        &expect![[r#"
        > complete 0 2 1
        > wait 3ms
            * ObserverExact
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
    "#]],
    );
}

#[test]
fn a_hung_primary_is_found_by_its_silent_control_channel() {
    check(
        "~ready 1\n~wait 20ms\n~mute 1\n~submit 0 1\nwait 1100ms\nstatus",
        &expect![[r#"
            > wait 1100ms
                #1 <- GET_FEATURES
                * FailoverStarted kind="hang" cause="nothing was completed for 500ms and its control channel is silent" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
                #2 <- GET_FEATURES
            > status
                failing-over Fencing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn an_idle_primary_that_stops_answering_is_failed_over_as_well() {
    check(
        "~ready 1\n~mute 1\nwait 2000ms",
        &expect![[r#"
            > wait 2000ms
                watch kick0
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                * FailoverStarted kind="hang" cause="its control channel has been silent for 500ms" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
                #2 <- GET_FEATURES
        "#]],
    );
}

#[test]
fn a_primary_that_completes_but_does_not_answer_is_alive_until_it_completes_nothing() {
    let busy = "~submit 0 1\n~wait 100ms\n~complete 0 1\n~wait 100ms\n".repeat(20);
    check(
        &format!("~ready 1\n~mute 1\n{busy}status\nwait 1200ms"),
        &expect![[r#"
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        > wait 1200ms
            * FailoverStarted kind="hang" cause="its control channel has been silent for 3.4s" backend=1
            fence #1
            close #1.kick
            close #1.call
            close #1.probe
            #2 <- GET_FEATURES
    "#]],
    );
}

#[test]
fn a_primary_that_completes_but_never_answers_is_failed_over_in_the_end() {
    let busy = "~submit 0 1\n~wait 100ms\n~complete 0 1\n~wait 100ms\n".repeat(160);
    check(
        &format!("~ready 1\n~mute 1\n{busy}status"),
        &expect![[r#"
        > status
            failing-over Fencing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
    "#]],
    );
}

#[test]
fn a_primary_that_answers_but_completes_nothing_is_failed_over_once() {
    check(
        "~ready 1\n~wait 20ms\n~submit 0 1\n~wait 29000ms\nwait 1500ms\n~fenced 1\n~wait 2ms\nup 3\n~wait 29000ms\nwait 3000ms\nstatus",
        &expect![[r#"
            > wait 1500ms
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                * FailoverStarted kind="hang" cause="it answers, but has completed nothing for 30s while requests wait" backend=1
                fence #1
                close #1.kick
                close #1.call
                close #1.probe
            > up 3
                close #3.channel
                close #3.kick
                close #3.call
                close #3.probe
            > wait 3000ms
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                retire #5
                * ShadowLost backend=5 reason="it was not ready within 10s" next="another one is started in 40ms"
                start #6
                #6 is shadow
                #2 <- GET_FEATURES
            > status
                unprotected Idle; primary #2 active, shadow #6 starting; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_dead_shadow_is_replaced_at_once() {
    check(
        "~ready 1\nexit 2\nup 3\nstatus",
        &expect![[r#"
            > exit 2
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="killed by signal 9" next="another one is started in 0ns"
                start #3
                #3 is shadow
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=3
            > status
                protected Idle; primary #1 active, shadow #3 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn with_both_dead_a_cold_backend_is_started_and_the_guest_waits() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\nexit 2\nexit 1\nfenced 1\nup 3\ncomplete 0 1 2\nwait 1ms\nstatus",
        &expect![[r#"
            > exit 2
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="killed by signal 9" next="another one is started in 0ns"
                start #3
                #3 is shadow
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=3
                #3 is primary
                #3 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > complete 0 1 2
            > wait 1ms
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=2
                start #4
                #4 is shadow
            > status
                unprotected Idle; primary #3 active, shadow #4 starting; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_pair_without_a_shadow_starts_a_cold_backend() {
    let config = PairConfig { shadow: false, ..config() };
    check_with(
        config,
        "start\nup 1\n~boot 1\n~submit 0 1\nexit 1\nfenced 1\nup 2\ncomplete 0 1\nwait 1ms\nstatus",
        &expect![[r#"
            > start
                start #1
                #1 is primary
            > up 1
                #1 <- GET_FEATURES
                #1 <- GET_PROTOCOL_FEATURES
                #1 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #1.channel
                close #1.channel
                #1 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #1 <- GET_FEATURES
                * PrimaryReady backend=1
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                start #2
                #2 is shadow
            > up 2
                #2 <- GET_FEATURES
                #2 <- GET_PROTOCOL_FEATURES
                #2 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #2.channel
                close #2.channel
                #2 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #2 <- GET_FEATURES
                #2 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=2
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > complete 0 1
            > wait 1ms
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1
            > status
                unprotected Idle; primary #2 active, shadow none; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_shadow_that_dies_while_the_primary_is_fenced_does_not_make_anybody_spin() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\nexit 1\nexit 2\nwait 5000ms\nfenced 1",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > exit 2
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="killed by signal 9" next="another one is started in 0ns"
            > wait 5000ms
            > fenced 1
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn a_fence_without_proof_waits_and_nothing_is_handed_over() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\nexit 1\nwait 9000ms\nstatus",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > wait 9000ms
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
                #2 <- GET_FEATURES
            > status
                failing-over Fencing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_target_that_dies_before_it_acknowledged_is_fenced_like_a_primary() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~exit 1\n~mute 2\nfenced 1\nstatus\nexit 2\nfenced 2\nup 3\nring 0",
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
            > status
                failing-over Resuming; primary #1 ended, shadow #2 active; recovery exact; ring 0 served exact inflight 2
            > exit 2
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowFailed backend=2 reason="killed by signal 9" next="it is fenced and another one takes over"
                retire #1
                fence #2
            > fenced 2
                start #3
                #3 is shadow
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=3
                #3 is primary
                #3 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 2 used 0 owed [1 2] flags 0 avail_event 0
        "#]],
    );
}

#[test]
fn a_target_that_dies_while_it_is_confirmed_is_fenced_like_a_primary() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~exit 1\n~fenced 1\nstatus\nexit 2\nfenced 2\nup 3\nstatus",
        &expect![[r#"
            > status
                failing-over Confirming; primary #1 ended, shadow #2 active; recovery exact; ring 0 served exact inflight 2
            > exit 2
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowFailed backend=2 reason="killed by signal 9" next="it is fenced and another one takes over"
                retire #1
                fence #2
            > fenced 2
                start #3
                #3 is shadow
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=3
                #3 is primary
                #3 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > status
                failing-over Confirming; primary #2 ended, shadow #3 active; recovery exact; ring 0 served exact inflight 2
        "#]],
    );
}

#[test]
fn a_target_that_refuses_the_rings_is_fenced_like_a_primary() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\n~refuses 2\nfenced 1",
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowFailed backend=2 reason="it refused the rings" next="it is fenced and another one takes over"
                retire #1
                fence #2
        "#]],
    );
}

#[test]
fn a_target_that_falls_silent_is_fenced_like_a_primary() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\n~mute 2\nfenced 1\nwait 2500ms",
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
            > wait 2500ms
                #2 <- GET_FEATURES
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowFailed backend=2 reason="its control channel has been silent for 500ms" next="it is fenced and another one takes over"
                retire #1
                fence #2
        "#]],
    );
}

#[test]
fn a_target_that_refuses_a_change_of_the_vmm_is_fenced_before_anybody_else_is_given_its_rings() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\n~fenced 1\n~refuses 2\nvmm ADD_MEM_REG 1\nstatus\nfenced 2\nup 3\nstatus",
        &expect![[r#"
            > vmm ADD_MEM_REG 1
                #2 <- ADD_MEM_REG! mem1
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowFailed backend=2 reason="it refused a change that the VMM made" next="it is fenced and another one takes over"
                retire #1
                fence #2
                vmm <- ADD_MEM_REG ok
            > status
                failing-over Fencing; primary #2 ended, shadow none; recovery exact; ring 0 served exact inflight 1
            > fenced 2
                start #3
                #3 is shadow
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, ADD_MEM_REG mem1, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                * ShadowReady backend=3
                #3 is primary
                #3 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > status
                failing-over Confirming; primary #2 ended, shadow #3 active; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_target_on_a_slow_disk_is_accepted_once_it_answers() {
    check(
        "~ready 1\n~submit 0 1\n~wait 1ms\n~exit 1\nfenced 1\nwait 1500ms\nstatus",
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > wait 1500ms
                #2 <- GET_FEATURES
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped" survivors=1 message="the new primary answers, but has not completed anything yet"
                start #3
                #3 is shadow
                #2 <- GET_FEATURES
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_drained_primary_that_falls_silent_afterwards_does_not_make_anybody_spin() {
    check(
        "~ready 1\n~submit 0 1\n~complete 0 1\n~mute 2\nfailover\n~mute 1\nsubmit 0 2\nwait 3000ms\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
            > submit 0 2
            > wait 3000ms
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowFailed backend=2 reason="its control channel has been silent for 500ms" next="it is fenced and another one takes over"
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                fence #2
            > status
                failing-over Fencing; primary #2 ended, shadow none; recovery exact; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_device_whose_requests_must_not_run_twice_is_handed_over_only_after_a_drain() {
    let device = PairConfig { device: DeviceType::Scsi, ..config() };
    let script = "~start\n~up 1 no-config features=140000000\n~up 2 no-config features=140000000\n~vmm connect\n~vmm SET_FEATURES 140000000\n~vmm SET_MEM_TABLE 0\n~vmm SET_VRING_NUM 0 8\n~vmm SET_VRING_ADDR 0\n~vmm SET_VRING_CALL 0\n~vmm SET_VRING_KICK 0\n";
    check_with(
        device.clone(),
        &format!("{script}status\nfailover\nstatus"),
        &expect![[r#"
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 0
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
                answer: settled drained
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 active, shadow #3 starting; recovery drained; ring 0 served exact inflight 0
        "#]],
    );
    check_with(
        device,
        &format!("{script}~submit 0 1\n~wait 1ms\nexit 1\nfenced 1\nstatus"),
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
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" survivors=1 message="the scsi device owed 1 requests, and its requests must not be executed twice"
                #2 is primary
                start #3
                #3 is shadow
            > status
                halted Halted; primary #2 ready, shadow #3 starting; recovery drained; ring 0 waiting exact inflight 1; halted: the scsi device owed 1 requests, and its requests must not be executed twice
        "#]],
    );
}

#[test]
fn a_primary_that_dies_before_it_was_given_a_ring_needs_no_fence() {
    check(
        "~start\n~up 1\n~up 2\nexit 1\nstatus\n~up 3\n~boot 1\nstatus",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                retire #1
                #2 is primary
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="stopped"
                start #3
                #3 is shadow
            > status
                unprotected Idle; primary #2 ready, shadow #3 starting; recovery exact
            > status
                protected Idle; primary #2 active, shadow #3 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
    check(
        "~start\n~up 1\n~up 2\n~exit 2\nexit 1\nwait 50ms\nup 3\nstatus",
        &expect![[r#"
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                retire #1
            > wait 50ms
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                * ShadowReady backend=3
                #3 is primary
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="stopped"
                start #4
                #4 is shadow
            > status
                unprotected Idle; primary #3 ready, shadow #4 starting; recovery exact
        "#]],
    );
}

#[test]
fn a_hang_while_it_is_not_known_what_is_owed_is_left_alone_for_a_while() {
    check(
        "~ready 1\n~submit 0 1 2\n~wait 1ms\n~jump 70ms\nmute 1\nwait 2000ms\nstatus",
        &expect![[r#"
        > mute 1
        > wait 2000ms
            #1 <- GET_FEATURES
            * FailoverPutOff backend=1 cause="nothing was completed for 500ms and its control channel is silent" reason="what ring 0 has in flight is not known exactly: the ring was not observed for so long that its indices may have wrapped" next="the primary is left alone for a while: it may come back"
            #2 <- GET_FEATURES
            #1 <- GET_FEATURES
            #2 <- GET_FEATURES
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery refused; ring 0 served inexact inflight 2
    "#]],
    );
}

#[test]
fn buffers_that_wait_to_be_filled_are_no_requests_that_wait() {
    let config = PairConfig { device: DeviceType::Net, ..config() };
    check_with(
        config,
        "~ready 2 no-config\n~submit 0 1 2\n~wait 32000ms\nstatus\nexit 1\nfenced 1\nwait 1ms",
        &expect![[r#"
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 2; ring 1 served exact inflight 0
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE 0=1, SET_VRING_BASE 1=0, SET_VRING_ADDR 1, SET_VRING_KICK kick1, SET_VRING_ENABLE! 1=1
                signal kick0
                signal call0
                signal kick1
                signal call1
                signal kick0
                signal kick1
                retire #1
                * FailoverSettled kind="crash" cause="killed by signal 9" recovery="exact" fence="reaped"
                start #3
                #3 is shadow
            > wait 1ms
        "#]],
    );
}

#[test]
fn a_kick_that_the_vmm_changes_during_a_drain_does_not_start_the_ring_again() {
    for drain in [DrainMethod::PrivateKick, DrainMethod::Disable] {
        let script = "
            ~ready 2
            ~submit 0 1
            ~wait 1ms
            failover
            vmm SET_VRING_KICK 0
            vmm SET_VRING_KICK 1
            vmm SET_VRING_ENABLE 1 1
            ~complete 0 1
            wait 1ms
            ";
        let expected = match drain {
            DrainMethod::PrivateKick => expect![[r#"
                > failover
                    * FailoverStarted kind="planned" cause="operator: test" backend=1
                    #1 <- SET_VRING_KICK #1.kick, SET_VRING_KICK! #1.kick
                    #1 <- GET_VRING_BASE 1
                > vmm SET_VRING_KICK 0
                    close kick0
                    vmm <- SET_VRING_KICK ok
                > vmm SET_VRING_KICK 1
                    close kick1
                    vmm <- SET_VRING_KICK ok
                > vmm SET_VRING_ENABLE 1 1
                    vmm <- SET_VRING_ENABLE ok
                > wait 1ms
                    #1 <- GET_VRING_BASE 0
                    #2 is primary
                    #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE 0=1, SET_VRING_BASE 1=0, SET_VRING_ADDR 1, SET_VRING_KICK kick1, SET_VRING_ENABLE! 1=1
                    signal kick0
                    signal call0
                    signal kick1
                    signal call1
                    signal kick0
                    signal kick1
                    retire #1
                    close #1.kick
                    close #1.call
                    close #1.probe
                    * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
                    answer: settled drained
                    start #3
                    #3 is shadow
            "#]],
            _ => expect![[r#"
                > failover
                    * FailoverStarted kind="planned" cause="operator: test" backend=1
                    #1 <- SET_VRING_ENABLE 0=0, SET_VRING_ENABLE! 1=0
                    #1 <- GET_VRING_BASE 1
                > vmm SET_VRING_KICK 0
                    close kick0
                    vmm <- SET_VRING_KICK ok
                > vmm SET_VRING_KICK 1
                    close kick1
                    vmm <- SET_VRING_KICK ok
                > vmm SET_VRING_ENABLE 1 1
                    vmm <- SET_VRING_ENABLE ok
                > wait 1ms
                    #1 <- GET_VRING_BASE 0
                    #2 is primary
                    #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE 0=1, SET_VRING_BASE 1=0, SET_VRING_ADDR 1, SET_VRING_KICK kick1, SET_VRING_ENABLE! 1=1
                    signal kick0
                    signal call0
                    signal kick1
                    signal call1
                    signal kick0
                    signal kick1
                    retire #1
                    close #1.kick
                    close #1.call
                    close #1.probe
                    * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
                    answer: settled drained
                    start #3
                    #3 is shadow
            "#]],
        };
        check_with(PairConfig { drain, ..config() }, script, &expected);
    }
}

#[test]
fn a_primary_that_does_not_come_to_rest_is_followed_while_it_is_drained() {
    let busy =
        "~submit 0 4\n~wait 50us\n~complete 0 3\n~wait 50us\n~submit 0 3\n~wait 50us\n~complete 0 4\n~wait 50us\n";
    let limits = Limits { drain_max: Nanos::from_millis(20), ..Limits::default() };
    check_with(
        PairConfig { limits, ..config() },
        &format!("~ready 1\n~submit 0 3\n~wait 1ms\n~failover\n{}fenced 1\nring 0", busy.repeat(110)),
        &expect![[r#"
            > fenced 1
                #2 is primary
                #2 <- SET_VRING_BASE 0=220, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > ring 0
                avail 221 used 220 owed [3] flags 0 avail_event 0
        "#]],
    );
}

/// That nothing moved between two looks is no rest.
#[test]
fn a_primary_that_pauses_and_goes_on_taking_new_work_is_followed_while_it_is_drained() {
    let busy =
        "~submit 0 4\n~wait 50us\n~complete 0 3\n~wait 50us\n~submit 0 3\n~wait 50us\n~complete 0 4\n~wait 50us\n";
    let (long, short) = (busy.repeat(50), busy.repeat(6));
    check(
        &format!("~ready 1\n~submit 0 3\n~wait 1ms\n~failover\n{long}~wait 200us\n{short}status"),
        &expect![[r#"
            > status
                failing-over Draining; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 2
        "#]],
    );
}
