//! Reads of the broker's own on the shadow.

use expect_test::{Expect, expect};

use super::check_with;
use super::harness::config;
use crate::policy::PairConfig;

fn check(script: &str, expected: &Expect) {
    check_with(PairConfig { canary: true, ..config() }, script, expected);
}

#[test]
fn a_new_shadow_reads_from_the_device_before_it_counts_as_ready() {
    check(
        "
            ~ready 1
            ~exit 2
            up 3
            wait 1ms
            status
            ",
        &expect![[r#"
            > up 3
                close #3.channel
                close #3.kick
                close #3.call
                close #3.probe
            > wait 1ms
            > status
                unprotected Idle; primary #1 active, shadow none; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn the_read_is_repeated_while_the_shadow_stands_by() {
    check(
        "
            ~ready 1
            ~wait 1ms
            wait 2000ms
            ",
        &expect![[r#"
            > wait 2000ms
                watch kick0
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #1 <- GET_FEATURES
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #1 <- GET_FEATURES
        "#]],
    );
}

#[test]
fn a_failover_waits_for_a_read_under_way_and_no_ring_is_given_before() {
    check(
        "
            ~ready 1
            ~wait 1ms
            ~canary 2 off
            ~submit 0 3
            ~wait 2000ms
            exit 1
            fenced 1
            wait 1ms
            status
            canary 2 0
            wait 1ms
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
            > wait 1ms
            > status
                failing-over Handing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 waiting exact inflight 1
            > canary 2 0
            > wait 1ms
        "#]],
    );
}

#[test]
fn a_shadow_that_does_not_bring_its_read_home_is_replaced_by_a_cold_start_when_it_is_needed() {
    check(
        "
            ~ready 1
            ~wait 1ms
            ~canary 2 off
            ~wait 2000ms
            ~wait 600ms
            failover
            status
            exit 1
            status
            up 3 no-canary
            status
            ",
        &expect![[r#"
            > failover
                * FailoverRefused cause="operator: test" reason="the shadow's canary read has been waiting for 1.693868128s"
                answer: refused refused the shadow's canary read has been waiting for 1.693868128s
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
            > exit 1
                close #1.kick
                close #1.call
                close #1.probe
                * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
                * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
                fence #1
            > status
                failing-over Fencing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
            > up 3 no-canary
                close #3.channel
                close #3.kick
                close #3.call
                close #3.probe
            > status
                failing-over Fencing; primary #1 ended, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_shadow_whose_read_fails_is_replaced_with_the_reason() {
    check(
        "
            ~ready 1
            ~wait 1ms
            ~canary 2 off
            ~wait 2000ms
            canary 2 1
            wait 1ms
            status
            ",
        &expect![[r#"
            > canary 2 1
            > wait 1ms
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_new_memory_table_keeps_the_memory_of_the_broker() {
    check(
        "
            ~ready 1
            ~wait 1ms
            vmm SET_MEM_TABLE 0 1
            wait 2000ms
            ",
        &expect![[r#"
            > vmm SET_MEM_TABLE 0 1
                close mem0
                #1 <- SET_MEM_TABLE! mem0 mem1, ADD_MEM_REG private-ring
                #2 <- SET_MEM_TABLE! mem0 mem1, ADD_MEM_REG private-ring
                vmm <- SET_MEM_TABLE ok
            > wait 2000ms
                watch kick0
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #1 <- GET_FEATURES
                #2 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #2.call, SET_VRING_KICK #2.probe, SET_VRING_ENABLE 0=1
                signal #2.probe
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                #1 <- GET_FEATURES
        "#]],
    );
}

#[test]
fn a_new_memory_table_in_the_middle_of_a_read_costs_the_shadow() {
    check(
        "
            ~ready 1
            ~wait 1ms
            ~canary 2 off
            ~wait 2000ms
            vmm SET_MEM_TABLE 0 1
            ",
        &expect![[r#"
            > vmm SET_MEM_TABLE 0 1
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                close private-ring
                * ShadowLost backend=2 reason="the VMM replaced its memory during a canary read" next="another one is started in 10ms"
                close mem0
                #1 <- SET_MEM_TABLE! mem0 mem1, ADD_MEM_REG private-ring
                vmm <- SET_MEM_TABLE ok
        "#]],
    );
}

#[test]
fn a_shadow_without_memory_slots_gets_the_memory_with_the_table() {
    check(
        "
            ~ready 1 no-slots
            ~wait 1ms
            ~exit 2
            up 3 no-slots
            wait 1ms
            vmm SET_MEM_TABLE 0 1
            ",
        &expect![[r#"
            > up 3 no-slots
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, SET_MEM_TABLE mem0 private-ring, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
                #3 <- SET_VRING_NUM 0=64, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_CALL #3.call, SET_VRING_KICK #3.probe, SET_VRING_ENABLE 0=1
                signal #3.probe
            > wait 1ms
                #3 <- GET_VRING_BASE 0
                #3 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 0=8, SET_VRING_CALL call0
                * ShadowReady backend=3
            > vmm SET_MEM_TABLE 0 1
                close mem0
                #1 <- SET_MEM_TABLE! mem0 mem1 private-ring
                #3 <- SET_MEM_TABLE! mem0 mem1 private-ring
                vmm <- SET_MEM_TABLE ok
        "#]],
    );
}

#[test]
fn a_read_under_way_does_not_keep_a_vmm_from_leaving() {
    check(
        "
            ~ready 1
            ~wait 1ms
            ~canary 2 off
            ~wait 2000ms
            vmm gone
            ",
        &expect![[r#"
            > vmm gone
                * VmmGone reason="the connection was closed"
                #1 <- SET_VRING_KICK! #1.kick
                #1 <- GET_VRING_BASE 0
                unwatch kick0
                close mem0
                close kick0
                close call0
                retire #1
                close #1.kick
                close #1.call
                close #1.probe
                close private-ring
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                close private-ring
                start #3
                #3 is primary
                start #4
                #4 is shadow
        "#]],
    );
}

#[test]
fn the_size_of_a_ring_is_not_changed_in_the_middle_of_a_read() {
    check(
        "
            ~start
            ~up 1
            ~up 2 no-canary
            ~vmm connect
            ~vmm !SET_FEATURES
            ~vmm !SET_MEM_TABLE 0
            vmm SET_VRING_NUM 0 8
            vmm SET_VRING_NUM 1 4
            canary 2 0
            wait 1ms
            ",
        &expect![[r#"
            > vmm SET_VRING_NUM 0 8
                #1 <- SET_VRING_NUM! 0=8
                vmm <- SET_VRING_NUM ok
            > vmm SET_VRING_NUM 1 4
                #1 <- SET_VRING_NUM! 1=4
                vmm <- SET_VRING_NUM ok
            > canary 2 0
            > wait 1ms
                #2 <- GET_VRING_BASE 0
                #2 <- SET_VRING_ENABLE 0=0, SET_VRING_NUM 1=4, SET_VRING_NUM 0=8
                * ShadowReady backend=2
        "#]],
    );
}

#[test]
fn one_that_became_primary_during_its_read_and_is_lost_leaves_the_role_to_another() {
    check(
        "
            ~ready 1
            ~wait 1ms
            ~exit 2
            ~up 3 no-canary
            ~break 0 900
            ~wait 1ms
            ~exit 1
            fenced 1
            vmm SET_MEM_TABLE 0
            status
            ",
        &expect![[r#"
            > fenced 1
                retire #1
                close private-ring
                * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="ring 0: avail.idx 900 is further ahead of used.idx 0 than the ring is long"
                #3 is primary
                start #4
                #4 is shadow
            > vmm SET_MEM_TABLE 0
                retire #3
                close #3.kick
                close #3.call
                close #3.probe
                close private-ring
                * PrimaryLost backend=3 reason="the VMM replaced its memory during a canary read" next="another one takes its place"
                close mem0
                vmm <- SET_MEM_TABLE ok
                #4 is primary
                start #5
                #5 is shadow
            > status
                halted Halted; primary #4 starting, shadow #5 starting; recovery refused; ring 0 waiting violated inflight 0; halted: ring 0: avail.idx 900 is further ahead of used.idx 0 than the ring is long
        "#]],
    );
}
