//! Backends coming, negotiating, being refused, warming.

use expect_test::expect;

use super::check;

#[test]
fn both_backends_are_started_and_the_vmm_may_connect_once_both_are_known() {
    check(
        "start\nup 1\nup 2\nstatus",
        &expect![[r#"
        > start
            start #1
            #1 is primary
            start #2
            #2 is shadow
        > up 1
            #1 <- GET_FEATURES
            #1 <- GET_PROTOCOL_FEATURES
            #1 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #1.channel
            close #1.channel
            #1 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #1 <- GET_FEATURES
        > up 2
            #2 <- GET_FEATURES
            #2 <- GET_PROTOCOL_FEATURES
            #2 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #2.channel
            close #2.channel
            #2 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #2 <- GET_FEATURES
            * PrimaryReady backend=1
            * ShadowReady backend=2
        > status
            protected Idle; primary #1 ready, shadow #2 ready; recovery exact
    "#]],
    );
}

#[test]
fn a_backend_without_acknowledgements_is_asked_behind_a_barrier() {
    check(
        "start\n~up 2\nup 1 no-ack\n~boot 1\nvmm SET_MEM_TABLE 0 1",
        &expect![[r#"
        > start
            start #1
            #1 is primary
            start #2
            #2 is shadow
        > up 1 no-ack
            #1 <- GET_FEATURES
            #1 <- GET_PROTOCOL_FEATURES
            #1 <- SET_PROTOCOL_FEATURES 0x8221, SET_OWNER, SET_BACKEND_REQ_FD #1.channel
            close #1.channel
            #1 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #1 <- GET_FEATURES
            * PrimaryReady backend=1
            * ShadowReady backend=2
        > vmm SET_MEM_TABLE 0 1
            close mem0
            #1 <- SET_MEM_TABLE mem0 mem1, GET_FEATURES
            #2 <- SET_MEM_TABLE! mem0 mem1
            vmm <- SET_MEM_TABLE ok
    "#]],
    );
}

#[test]
fn one_backend_that_dies_at_once_leaves_the_other_alone() {
    check(
        "start\nexit 2\nup 1\nstatus\nwait 15ms",
        &expect![[r#"
        > start
            start #1
            #1 is primary
            start #2
            #2 is shadow
        > exit 2
            retire #2
            * BackendFailed backend=2 reason="killed by signal 9"
        > up 1
            #1 <- GET_FEATURES
            #1 <- GET_PROTOCOL_FEATURES
            #1 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #1.channel
            close #1.channel
            #1 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #1 <- GET_FEATURES
            * PrimaryReady backend=1
        > status
            unprotected Idle; primary #1 ready, shadow none; recovery exact
        > wait 15ms
            start #3
            #3 is shadow
    "#]],
    );
}

#[test]
fn a_primary_that_dies_at_once_leaves_its_role_to_the_shadow() {
    check(
        "start\nup 2\nexit 1\nstatus",
        &expect![[r#"
        > start
            start #1
            #1 is primary
            start #2
            #2 is shadow
        > up 2
            #2 <- GET_FEATURES
            #2 <- GET_PROTOCOL_FEATURES
            #2 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #2.channel
            close #2.channel
            #2 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #2 <- GET_FEATURES
        > exit 1
            retire #1
            * BackendFailed backend=1 reason="killed by signal 9"
            #2 is primary
            * PrimaryReady backend=2
            start #3
            #3 is shadow
        > status
            unprotected Idle; primary #2 ready, shadow #3 starting; recovery exact
    "#]],
    );
}

#[test]
fn a_pair_without_any_backend_has_failed_and_says_why() {
    check(
        "start\nexit 1\nexit 2\nstatus",
        &expect![[r#"
        > start
            start #1
            #1 is primary
            start #2
            #2 is shadow
        > exit 1
            retire #1
            * BackendFailed backend=1 reason="killed by signal 9"
            #2 is primary
        > exit 2
            retire #2
            * BackendFailed backend=2 reason="killed by signal 9"
        > status
            starting Idle; primary none, shadow none; recovery exact
    "#]],
    );
}

#[test]
fn a_backend_that_never_comes_up_is_given_up() {
    check(
        "start\nup 1\nwait 9000ms\nstatus\nwait 2000ms\nstatus",
        &expect![[r#"
        > start
            start #1
            #1 is primary
            start #2
            #2 is shadow
        > up 1
            #1 <- GET_FEATURES
            #1 <- GET_PROTOCOL_FEATURES
            #1 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #1.channel
            close #1.channel
            #1 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
            #1 <- GET_FEATURES
        > wait 9000ms
        > status
            starting Idle; primary #1 offered, shadow #2 starting; recovery exact
        > wait 2000ms
            retire #2
            * BackendFailed backend=2 reason="it was not ready within 10s"
            * PrimaryReady backend=1
            #1 <- GET_FEATURES
            start #3
            #3 is shadow
        > status
            unprotected Idle; primary #1 ready, shadow #3 starting; recovery exact
    "#]],
    );
}

#[test]
fn the_vmm_is_offered_what_both_have_and_nothing_that_is_masked() {
    check(
        "
        ~start
        ~up 1 everything features=ffffffffffffffff
        ~up 2 everything features=0000000140002200
        ~vmm connect
        vmm GET_FEATURES
        vmm GET_PROTOCOL_FEATURES
        vmm GET_QUEUE_NUM
        vmm GET_MAX_MEM_SLOTS
        vmm GET_CONFIG
        ",
        &expect![[r#"
            > vmm GET_FEATURES
                vmm <- GET_FEATURES 0x140002200
            > vmm GET_PROTOCOL_FEATURES
                vmm <- GET_PROTOCOL_FEATURES 0x822b
            > vmm GET_QUEUE_NUM
                vmm <- GET_QUEUE_NUM 0x2
            > vmm GET_MAX_MEM_SLOTS
                vmm <- GET_MAX_MEM_SLOTS 0x7
            > vmm GET_CONFIG
                vmm <- GET_CONFIG [7, 7, 7, 7]
        "#]],
    );
}

#[test]
fn features_that_were_not_offered_cannot_be_accepted() {
    check(
        "~start\n~up 1\n~up 2\n~vmm connect\nvmm SET_FEATURES 400002200",
        &expect![[r#"
        > vmm SET_FEATURES 400002200
            * MessageRefused peer="vmm" request="SET_FEATURES" reason="features 0x400000000 were not offered (offered: 0x140002200)"
            vmm <- SET_FEATURES refused
    "#]],
    );
}

#[test]
fn the_offer_is_the_least_of_queues_and_memory_slots() {
    check(
        "~start\n~up 1 queues=4 slots=32\n~up 2 queues=2 slots=8\n~vmm connect\nvmm GET_QUEUE_NUM\nvmm GET_MAX_MEM_SLOTS\nstatus",
        &expect![[r#"
            > vmm GET_QUEUE_NUM
                vmm <- GET_QUEUE_NUM 0x2
            > vmm GET_MAX_MEM_SLOTS
                vmm <- GET_MAX_MEM_SLOTS 0x7
            > status
                protected Idle; primary #1 ready, shadow #2 ready; recovery exact
        "#]],
    );
}

#[test]
fn a_late_shadow_with_fewer_features_is_refused_with_the_difference() {
    check(
        "~start\n~exit 2\n~up 1\n~wait 15ms\nup 3 features=140000200",
        &expect![[r#"
            > up 3 features=140000200
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                * ShadowRefused backend=3 reason="features 0x2000 were offered to the VMM and it lacks them" next="the device runs unprotected; another start is tried with back-off"
                retire #3
                close #3.kick
                close #3.call
                close #3.probe
                * ShadowLost backend=3 reason="refused: features 0x2000 were offered to the VMM and it lacks them" next="another one is started in 10ms"
        "#]],
    );
}

#[test]
fn a_shadow_of_another_capacity_is_refused_with_the_difference() {
    check(
        "~start\n~up 1\nup 2 config=9",
        &expect![[r#"
            > up 2 config=9
                #2 <- GET_FEATURES
                #2 <- GET_PROTOCOL_FEATURES
                #2 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #2.channel
                close #2.channel
                #2 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #2 <- GET_FEATURES
                * PrimaryReady backend=1
                * ShadowRefused backend=2 reason="its configuration space differs from the device's at byte 0 (capacity)" next="the device runs unprotected; another start is tried with back-off"
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowLost backend=2 reason="refused: its configuration space differs from the device's at byte 0 (capacity)" next="another one is started in 10ms"
        "#]],
    );
}

#[test]
fn a_late_shadow_with_fewer_queues_or_slots_is_refused_with_the_difference() {
    check(
        "~start\n~exit 2\n~up 1\n~wait 15ms\nup 3 queues=1\n~wait 25ms\nup 4 slots=2",
        &expect![[r#"
            > up 3 queues=1
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                * ShadowRefused backend=3 reason="it serves 1 rings, 2 were offered to the VMM" next="the device runs unprotected; another start is tried with back-off"
                retire #3
                close #3.kick
                close #3.call
                close #3.probe
                * ShadowLost backend=3 reason="refused: it serves 1 rings, 2 were offered to the VMM" next="another one is started in 10ms"
            > up 4 slots=2
                #4 <- GET_FEATURES
                #4 <- GET_PROTOCOL_FEATURES
                #4 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #4.channel
                close #4.channel
                #4 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #4 <- GET_FEATURES
                * ShadowRefused backend=4 reason="it takes 1 memory regions, 7 were offered" next="the device runs unprotected; another start is tried with back-off"
                retire #4
                close #4.kick
                close #4.call
                close #4.probe
                * ShadowLost backend=4 reason="refused: it takes 1 memory regions, 7 were offered" next="another one is started in 20ms"
        "#]],
    );
}

#[test]
fn a_late_shadow_without_protocol_features_that_were_offered_is_refused() {
    check(
        "~start\n~exit 2\n~up 1\n~wait 15ms\nup 3 no-slots\n~wait 25ms\nup 4 no-config",
        &expect![[r#"
            > up 3 no-slots
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_CONFIG 256
                #3 <- GET_FEATURES
                * ShadowRefused backend=3 reason="protocol features ProtocolFeatures(CONFIGURE_MEM_SLOTS) were offered to the VMM and it lacks them" next="the device runs unprotected; another start is tried with back-off"
                retire #3
                close #3.kick
                close #3.call
                close #3.probe
                * ShadowLost backend=3 reason="refused: protocol features ProtocolFeatures(CONFIGURE_MEM_SLOTS) were offered to the VMM and it lacks them" next="another one is started in 10ms"
            > up 4 no-config
                #4 <- GET_FEATURES
                #4 <- GET_PROTOCOL_FEATURES
                #4 <- SET_PROTOCOL_FEATURES 0x8029, SET_OWNER, SET_BACKEND_REQ_FD #4.channel
                close #4.channel
                #4 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_FEATURES
                * ShadowRefused backend=4 reason="its configuration space has 0 bytes, the device's 256" next="the device runs unprotected; another start is tried with back-off"
                retire #4
                close #4.kick
                close #4.call
                close #4.probe
                * ShadowLost backend=4 reason="refused: its configuration space has 0 bytes, the device's 256" next="another one is started in 20ms"
        "#]],
    );
}

#[test]
fn a_refused_shadow_is_tried_again_ever_more_rarely() {
    check(
        "~start\n~up 1\n~up 2 config=9\nwait 9ms\nwait 2ms\nup 3 config=9\nwait 19ms\nwait 2ms",
        &expect![[r#"
            > wait 9ms
            > wait 2ms
                start #3
                #3 is shadow
            > up 3 config=9
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                * ShadowRefused backend=3 reason="its configuration space differs from the device's at byte 0 (capacity)" next="the device runs unprotected; another start is tried with back-off"
                retire #3
                close #3.kick
                close #3.call
                close #3.probe
                * ShadowLost backend=3 reason="refused: its configuration space differs from the device's at byte 0 (capacity)" next="another one is started in 20ms"
            > wait 19ms
            > wait 2ms
                start #4
                #4 is shadow
        "#]],
    );
}

#[test]
fn a_late_shadow_is_warmed_from_the_record_without_being_given_a_ring() {
    check(
        "~start\n~exit 2\n~up 1\n~boot 2\n~vmm SET_CONFIG 32 1\n~submit 0 1 2\n~wait 15ms\nup 3\nstatus",
        &expect![[r#"
            > up 3
                #3 <- GET_FEATURES
                #3 <- GET_PROTOCOL_FEATURES
                #3 <- SET_PROTOCOL_FEATURES 0x8229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
                close #3.channel
                #3 <- GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_CONFIG 256
                #3 <- GET_FEATURES
                #3 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, SET_CONFIG 32=[1], SET_VRING_NUM 0=8, SET_VRING_CALL call0, SET_VRING_NUM 1=8, SET_VRING_CALL call1, GET_FEATURES
                * ShadowReady backend=3
            > status
                protected Idle; primary #1 active, shadow #3 ready; recovery exact; ring 0 served exact inflight 2; ring 1 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_shadow_without_memory_slots_is_warmed_with_the_whole_table() {
    check(
        "~start\n~up 1 no-slots\n~exit 2\n~boot 1\n~wait 15ms\nup 3 no-slots",
        &expect![[r#"
        > up 3 no-slots
            #3 <- GET_FEATURES
            #3 <- GET_PROTOCOL_FEATURES
            #3 <- SET_PROTOCOL_FEATURES 0x229, SET_OWNER, SET_BACKEND_REQ_FD #3.channel
            close #3.channel
            #3 <- GET_QUEUE_NUM, GET_CONFIG 256
            #3 <- GET_FEATURES
            #3 <- SET_FEATURES 0x140002200, SET_MEM_TABLE mem0, SET_VRING_NUM 0=8, SET_VRING_CALL call0, GET_FEATURES
            * ShadowReady backend=3
    "#]],
    );
}

#[test]
fn a_ready_shadow_takes_the_place_of_a_primary_that_has_not_served_yet() {
    check(
        "~start\n~up 1\n~up 2\n~mute 1\nboot 1\nstatus",
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
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                #2 <- SET_VRING_ENABLE! 0=1
                signal kick0
            > status
                unprotected Idle; primary #2 active, shadow #1 warming; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_call_that_comes_after_the_kick_is_written_once_the_backend_has_it() {
    check(
        "
        ~start
        ~up 1
        ~up 2
        ~vmm connect
        ~vmm !SET_FEATURES
        ~vmm !SET_MEM_TABLE 0
        ~vmm !SET_VRING_NUM 0 8
        ~vmm !SET_VRING_ADDR 0
        ~at 0 0
        ~submit 0 3
        vmm !SET_VRING_KICK 0
        complete 0 3
        vmm !SET_VRING_CALL 0
        vmm !SET_VRING_CALL 0
        ",
        &expect![[r#"
            > vmm !SET_VRING_KICK 0
                * RingStarted size=8 pending=1 goes_on=false
                #1 <- SET_VRING_CALL #1.call, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
            > complete 0 3
            > vmm !SET_VRING_CALL 0
                #1 <- SET_VRING_CALL! call0
                #2 <- SET_VRING_CALL call0
                signal call0
            > vmm !SET_VRING_CALL 0
                close call0
                #1 <- SET_VRING_CALL call0
                #2 <- SET_VRING_CALL call0
        "#]],
    );
}

#[test]
fn a_backend_that_does_not_answer_while_it_is_warmed_is_replaced() {
    check(
        "~start\n~up 1\n~up 2\n~mute 2\n~boot 1\nwait 1200ms",
        &expect![[r#"
            > wait 1200ms
                watch kick0
                #1 <- GET_FEATURES
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="it does not answer while the session is replayed to it" next="another one is started in 10ms"
                start #3
                #3 is shadow
        "#]],
    );
}

#[test]
fn what_comes_unasked_from_a_backend_ends_its_link() {
    check(
        "~ready 1\ngarbage 2\n~wait 5ms\ngarbage 9",
        &expect![[r#"
            > garbage 2
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="it broke the protocol: an unknown message: reply flag is true, expected false" next="another one is started in 0ns"
                start #3
                #3 is shadow
            > garbage 9
        "#]],
    );
}

#[test]
fn a_backend_that_comes_up_after_it_was_given_up_gets_its_descriptors_closed() {
    check(
        "~start\n~up 1\n~wait 11000ms\nup 2",
        &expect![[r#"
            > up 2
                close #2.channel
                close #2.kick
                close #2.call
                close #2.probe
        "#]],
    );
}
