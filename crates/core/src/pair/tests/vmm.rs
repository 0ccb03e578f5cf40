//! Requests of the VMM: what is answered from the record, what is mirrored, what is refused.

use expect_test::expect;

use super::check;

#[test]
fn a_ring_is_started_from_used_idx_whatever_base_the_vmm_names() {
    check(
        "
        ~start
        ~up 1
        ~up 2
        ~at 0 5
        ~vmm connect
        vmm SET_FEATURES
        vmm SET_MEM_TABLE 0
        vmm SET_VRING_NUM 0 8
        vmm SET_VRING_BASE 0 7
        vmm SET_VRING_ADDR 0
        vmm SET_VRING_CALL 0
        vmm SET_VRING_ERR 0
        vmm SET_VRING_KICK 0
        vmm SET_VRING_ENABLE 0 1
        status
        ",
        &expect![[r#"
            > vmm SET_FEATURES
                vmm <- SET_FEATURES ok
            > vmm SET_MEM_TABLE 0
                vmm <- SET_MEM_TABLE ok
                #1 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                #2 <- SET_FEATURES 0x140002200, ADD_MEM_REG mem0, GET_FEATURES
                * PrimaryReady backend=1
                * ShadowReady backend=2
            > vmm SET_VRING_NUM 0 8
                #1 <- SET_VRING_NUM! 0=8
                #2 <- SET_VRING_NUM! 0=8
                vmm <- SET_VRING_NUM ok
            > vmm SET_VRING_BASE 0 7
                vmm <- SET_VRING_BASE ok
            > vmm SET_VRING_ADDR 0
                vmm <- SET_VRING_ADDR ok
            > vmm SET_VRING_CALL 0
                #1 <- SET_VRING_CALL call0
                #2 <- SET_VRING_CALL call0
                vmm <- SET_VRING_CALL ok
            > vmm SET_VRING_ERR 0
                #1 <- SET_VRING_ERR err0
                #2 <- SET_VRING_ERR err0
                vmm <- SET_VRING_ERR ok
            > vmm SET_VRING_KICK 0
                * RingStarted size=8 base=5 base_asked=7 goes_on=false
                #1 <- SET_VRING_BASE 0=5, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=0
                signal kick0
                signal call0
                vmm <- SET_VRING_KICK ok
            > vmm SET_VRING_ENABLE 0 1
                #1 <- SET_VRING_ENABLE! 0=1
                vmm <- SET_VRING_ENABLE ok
                signal kick0
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn set_owner_is_answered_here_however_often_it_comes() {
    check(
        "~ready 1\nvmm SET_OWNER\nvmm SET_OWNER\nvmm RESET_OWNER",
        &expect![[r#"
        > vmm SET_OWNER
            vmm <- SET_OWNER ok
        > vmm SET_OWNER
            vmm <- SET_OWNER ok
        > vmm RESET_OWNER
            vmm <- RESET_OWNER ok
    "#]],
    );
}

#[test]
fn the_memory_table_is_mirrored_to_both_and_acknowledged_when_both_have_it() {
    check(
        "~ready 1\n~mute 2\nvmm SET_MEM_TABLE 0 1\nunmute 2",
        &expect![[r#"
        > vmm SET_MEM_TABLE 0 1
            close mem0
            #1 <- SET_MEM_TABLE! mem0 mem1
            #2 <- SET_MEM_TABLE! mem0 mem1
        > unmute 2
            vmm <- SET_MEM_TABLE ok
    "#]],
    );
}

#[test]
fn memory_is_plugged_and_unplugged_on_both() {
    check(
        "~ready 1\nvmm ADD_MEM_REG 3\nvmm REM_MEM_REG 3\nvmm REM_MEM_REG 3",
        &expect![[r#"
        > vmm ADD_MEM_REG 3
            #1 <- ADD_MEM_REG! mem3
            #2 <- ADD_MEM_REG! mem3
            vmm <- ADD_MEM_REG ok
        > vmm REM_MEM_REG 3
            close mem3
            #1 <- REM_MEM_REG!
            #2 <- REM_MEM_REG!
            vmm <- REM_MEM_REG ok
        > vmm REM_MEM_REG 3
            * MessageRefused peer="vmm" request="REM_MEM_REG" reason="there is no memory region at 0xc0000000"
            vmm <- REM_MEM_REG refused
    "#]],
    );
}

#[test]
fn a_silent_backend_cannot_hold_up_the_vmm_beyond_the_bound() {
    check(
        "~ready 1\n~mute 1\nvmm SET_MEM_TABLE 0\nwait 4ms\nwait 2ms\nunmute 1",
        &expect![[r#"
            > vmm SET_MEM_TABLE 0
                close mem0
                #1 <- SET_MEM_TABLE! mem0
                #2 <- SET_MEM_TABLE! mem0
            > wait 4ms
                * AnsweredFromRecord request="SET_MEM_TABLE" silent=1
                vmm <- SET_MEM_TABLE ok
            > wait 2ms
            > unmute 1
        "#]],
    );
}

#[test]
fn other_memory_at_the_same_place_waits_for_whoever_may_still_have_the_old_one() {
    check(
        "
        ~ready 1
        ~vmm ADD_MEM_REG 1
        ~submit 0 3
        ~mute 1
        vmm REM_MEM_REG 1
        wait 4ms
        vmm ADD_MEM_REG 1
        wait 4ms
        vmm GET_FEATURES
        unmute 1
        vmm REM_MEM_REG 1
        vmm ADD_MEM_REG 1
        ",
        &expect![[r#"
            > vmm REM_MEM_REG 1
                close mem1
                #1 <- REM_MEM_REG!
                #2 <- REM_MEM_REG!
            > wait 4ms
                * AnsweredFromRecord request="REM_MEM_REG" silent=1
                vmm <- REM_MEM_REG ok
            > vmm ADD_MEM_REG 1
                #1 <- ADD_MEM_REG! mem1
                #2 <- ADD_MEM_REG! mem1
            > wait 4ms
                #1 <- GET_FEATURES
            > vmm GET_FEATURES
                (the VMM waits)
            > unmute 1
                vmm <- ADD_MEM_REG ok
                vmm <- GET_FEATURES 0x140002200
            > vmm REM_MEM_REG 1
                close mem1
                #1 <- REM_MEM_REG!
                #2 <- REM_MEM_REG!
                vmm <- REM_MEM_REG ok
            > vmm ADD_MEM_REG 1
                #1 <- ADD_MEM_REG! mem1
                #2 <- ADD_MEM_REG! mem1
                vmm <- ADD_MEM_REG ok
        "#]],
    );
}

#[test]
fn memory_is_not_given_while_a_primary_that_is_being_fenced_may_still_serve() {
    check(
        "~ready 1\n~submit 0 3\n~down 1\nvmm ADD_MEM_REG 1\nfenced 1\nvmm REM_MEM_REG 1",
        &expect![[r#"
            > vmm ADD_MEM_REG 1
                #2 <- ADD_MEM_REG! mem1
            > fenced 1
                vmm <- ADD_MEM_REG ok
                #2 is primary
                #2 <- SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > vmm REM_MEM_REG 1
                close mem1
                #2 <- REM_MEM_REG!
                vmm <- REM_MEM_REG ok
        "#]],
    );
}

#[test]
fn the_next_request_waits_until_the_last_is_answered() {
    check(
        "~ready 1\n~mute 1\nvmm ADD_MEM_REG 1\nvmm GET_FEATURES\nwait 6ms",
        &expect![[r#"
        > vmm ADD_MEM_REG 1
            #1 <- ADD_MEM_REG! mem1
            #2 <- ADD_MEM_REG! mem1
        > vmm GET_FEATURES
            (the VMM waits)
        > wait 6ms
            * AnsweredFromRecord request="ADD_MEM_REG" silent=1
            vmm <- ADD_MEM_REG ok
            vmm <- GET_FEATURES 0x140002200
    "#]],
    );
}

#[test]
fn a_refusal_by_the_primary_reaches_the_vmm_and_one_by_the_shadow_costs_the_shadow() {
    check(
        "~ready 1\n~refuses 1\nvmm ADD_MEM_REG 1",
        &expect![[r#"
        > vmm ADD_MEM_REG 1
            #1 <- ADD_MEM_REG! mem1
            #2 <- ADD_MEM_REG! mem1
            vmm <- ADD_MEM_REG refused
    "#]],
    );
    check(
        "~ready 1\n~refuses 2\nvmm ADD_MEM_REG 1",
        &expect![[r#"
            > vmm ADD_MEM_REG 1
                #1 <- ADD_MEM_REG! mem1
                #2 <- ADD_MEM_REG! mem1
                vmm <- ADD_MEM_REG ok
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowLost backend=2 reason="it refused a change that the VMM made" next="another one is started in 10ms"
        "#]],
    );
}

#[test]
fn memory_that_cannot_be_mapped_is_refused_and_leaves_the_old_table_in_force() {
    check(
        "~ready 1\nvmm SET_MEM_TABLE 0 2 2\nvmm SET_MEM_TABLE 0 2\nstatus",
        &expect![[r#"
            > vmm SET_MEM_TABLE 0 2 2
                close mem0
                close mem2
                close mem2
                * MessageRefused peer="vmm" request="SET_MEM_TABLE" reason="guest memory of 1073741824 bytes at 0x80000000 cannot be mapped: it overlaps another region"
                vmm <- SET_MEM_TABLE refused
            > vmm SET_MEM_TABLE 0 2
                close mem0
                #1 <- SET_MEM_TABLE! mem0 mem2
                #2 <- SET_MEM_TABLE! mem0 mem2
                vmm <- SET_MEM_TABLE ok
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn unknown_and_masked_messages_are_refused_with_a_reason() {
    check(
        "
        ~ready 1
        vmm unknown
        vmm !unknown
        vmm GET_INFLIGHT_FD
        vmm SET_INFLIGHT_FD
        vmm RESET_DEVICE
        vmm GET_STATUS
        vmm !SET_STATUS
        vmm VRING_KICK 0
        vmm POSTCOPY_ADVISE
        ",
        &expect![[r#"
            > vmm unknown
                * MessageRefused peer="vmm" request=77 reason="unknown request 77 on the front-end channel"
                vmm <- 77 refused
            > vmm !unknown
                * MessageRefused peer="vmm" request=77 reason="unknown request 77 on the front-end channel"
            > vmm GET_INFLIGHT_FD
                * MessageRefused peer="vmm" request="GET_INFLIGHT_FD" reason="GET_INFLIGHT_FD belongs to a feature that is masked"
                vmm <- GET_INFLIGHT_FD 0 bytes, descriptor None
            > vmm SET_INFLIGHT_FD
                close inflight
                * MessageRefused peer="vmm" request="SET_INFLIGHT_FD" reason="SET_INFLIGHT_FD belongs to a feature that is masked"
                vmm <- SET_INFLIGHT_FD refused
            > vmm RESET_DEVICE
                * MessageRefused peer="vmm" request="RESET_DEVICE" reason="RESET_DEVICE belongs to a feature that is masked"
                vmm <- RESET_DEVICE refused
            > vmm GET_STATUS
                * MessageRefused peer="vmm" request="GET_STATUS" reason="GET_STATUS belongs to a feature that is masked"
                vmm <- GET_STATUS 0x1
            > vmm !SET_STATUS
                * MessageRefused peer="vmm" request="SET_STATUS" reason="SET_STATUS belongs to a feature that is masked"
            > vmm VRING_KICK 0
                * MessageRefused peer="vmm" request="VRING_KICK" reason="VRING_KICK belongs to a feature that is masked"
                vmm <- VRING_KICK refused
            > vmm POSTCOPY_ADVISE
                * MessageRefused peer="vmm" request="POSTCOPY_ADVISE" reason="POSTCOPY_ADVISE belongs to a feature that is masked"
                drop the VMM
        "#]],
    );
}

#[test]
fn a_ring_the_backends_do_not_have_is_refused_with_a_hint() {
    check(
        "~ready 1\nvmm SET_VRING_CALL 2\nvmm SET_VRING_NUM 200 8\nvmm GET_VRING_BASE 200",
        &expect![[r#"
            > vmm SET_VRING_CALL 2
                close call2
                * MessageRefused peer="vmm" request="SET_VRING_CALL" reason="the VMM uses ring 2, the backends serve 2: give the backend more queues (num-queues=) or the VMM fewer"
                vmm <- SET_VRING_CALL refused
            > vmm SET_VRING_NUM 200 8
                * MessageRefused peer="vmm" request="SET_VRING_NUM" reason="the VMM uses ring 200, the backends serve 2"
                vmm <- SET_VRING_NUM refused
            > vmm GET_VRING_BASE 200
                vmm <- GET_VRING_BASE 200=0
        "#]],
    );
}

#[test]
fn a_ring_outside_guest_memory_or_without_a_size_is_refused() {
    check(
        "~start\n~up 1\n~up 2\n~vmm connect\n~vmm SET_FEATURES\n~vmm SET_MEM_TABLE 0\nvmm SET_VRING_KICK 0\n~vmm SET_VRING_NUM 0 8\nvmm SET_VRING_KICK 0\n~vmm SET_VRING_ADDR 0 wild\nvmm SET_VRING_KICK 0",
        &expect![[r#"
            > vmm SET_VRING_KICK 0
                * MessageRefused peer="vmm" request="SET_VRING_KICK" reason="ring 0 is started without a size"
                vmm <- SET_VRING_KICK refused
            > vmm SET_VRING_KICK 0
                close kick0
                * MessageRefused peer="vmm" request="SET_VRING_KICK" reason="ring 0 is started without addresses"
                vmm <- SET_VRING_KICK refused
            > vmm SET_VRING_KICK 0
                close kick0
                * MessageRefused peer="vmm" request="SET_VRING_KICK" reason="ring 0: its available ring at 0x4000000001000 does not lie in the memory table, or is misaligned; is the guest's RAM shared (QEMU: memory-backend-memfd,share=on)?"
                vmm <- SET_VRING_KICK refused
        "#]],
    );
}

#[test]
fn the_size_of_a_running_ring_cannot_be_changed() {
    check(
        "~ready 1\nvmm SET_VRING_NUM 0 4\nvmm SET_VRING_NUM 1 4",
        &expect![[r#"
            > vmm SET_VRING_NUM 0 4
                * MessageRefused peer="vmm" request="SET_VRING_NUM" reason="ring 0 is running"
                vmm <- SET_VRING_NUM refused
            > vmm SET_VRING_NUM 1 4
                #1 <- SET_VRING_NUM! 1=4
                #2 <- SET_VRING_NUM! 1=4
                vmm <- SET_VRING_NUM ok
        "#]],
    );
}

#[test]
fn a_new_call_descriptor_replaces_the_old_one_everywhere() {
    check(
        "~ready 1\nvmm SET_VRING_CALL 0",
        &expect![[r#"
        > vmm SET_VRING_CALL 0
            close call0
            #1 <- SET_VRING_CALL call0
            #2 <- SET_VRING_CALL call0
            vmm <- SET_VRING_CALL ok
    "#]],
    );
}

#[test]
fn the_dirty_log_reaches_both_and_is_answered_with_its_description() {
    check(
        "~ready 1 log\n~vmm SET_PROTOCOL_FEATURES 2\nvmm !SET_LOG_BASE\nvmm SET_LOG_FD\nvmm SET_FEATURES 144002200",
        &expect![[r#"
            > vmm !SET_LOG_BASE
                #1 <- SET_LOG_BASE log
                #2 <- SET_LOG_BASE log
                vmm <- SET_LOG_BASE Log(LogRegion { size: 4096, offset: 0 })
            > vmm SET_LOG_FD
                #1 <- SET_LOG_FD! log-notify
                #2 <- SET_LOG_FD! log-notify
                vmm <- SET_LOG_FD ok
            > vmm SET_FEATURES 144002200
                * MessageRefused peer="vmm" request="SET_FEATURES" reason="features 0x4000000 were not offered (offered: 0x140002200)"
                vmm <- SET_FEATURES refused
        "#]],
    );
}

#[test]
fn writes_to_the_configuration_space_reach_both_and_are_read_back() {
    check(
        "~ready 1\nvmm SET_CONFIG 0 1\nvmm GET_CONFIG\nstatus",
        &expect![[r#"
        > vmm SET_CONFIG 0 1
            #1 <- SET_CONFIG! 0=[1]
            #2 <- SET_CONFIG! 0=[1]
            vmm <- SET_CONFIG ok
        > vmm GET_CONFIG
            vmm <- GET_CONFIG [1, 7, 7, 7]
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 0
    "#]],
    );
}

#[test]
fn writes_to_the_configuration_space_are_bounded() {
    let writes: String = (0..256).map(|at| format!("~vmm SET_CONFIG {at} {}\n", at % 7)).collect();
    check(
        &format!("~ready 1\n{writes}vmm SET_CONFIG 3 1\nvmm SET_CONFIG 256 1"),
        &expect![[r#"
            > vmm SET_CONFIG 3 1
                #1 <- SET_CONFIG! 3=[1]
                #2 <- SET_CONFIG! 3=[1]
                vmm <- SET_CONFIG ok
            > vmm SET_CONFIG 256 1
                * MessageRefused peer="vmm" request="SET_CONFIG" reason="too many different writes to the configuration space"
                vmm <- SET_CONFIG refused
        "#]],
    );
}

#[test]
fn a_resize_seen_by_the_primary_is_told_to_the_vmm_and_followed_by_the_shadow() {
    check(
        "~ready 1\n~vmm SET_BACKEND_REQ_FD\nconfig 1 9\nvmm GET_CONFIG\nstatus\n~wait 20ms\nup 3 config=9\nstatus",
        &expect![[r#"
            > config 1 9
                #1 <- GET_CONFIG 256
                * ConfigChanged backend=1
                vmm-channel <- BACKEND_CONFIG_CHANGE_MSG
                #2 <- GET_CONFIG 256
                retire #2
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowLost backend=2 reason="its configuration space differs from the device's at byte 0 (capacity)" next="another one is started in 10ms"
            > vmm GET_CONFIG
                vmm <- GET_CONFIG [9, 7, 7, 7]
            > status
                unprotected Idle; primary #1 active, shadow none; recovery exact; ring 0 served exact inflight 0
            > up 3 config=9
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
fn other_requests_of_a_backend_are_refused_and_their_descriptors_closed() {
    check(
        "~ready 1\nnotifier 2",
        &expect![[r#"
        > notifier 2
            * MessageRefused peer="backend" backend=2 request="BACKEND_VRING_HOST_NOTIFIER_MSG" reason="it belongs to a feature that is masked"
            close notifier
            #2.channel <- ack 1
    "#]],
    );
}

#[test]
fn an_idle_ring_is_watched_by_its_kick_and_looked_at_again_when_it_fires() {
    check(
        "~ready 1\nwait 60ms\nsubmit 0 1\nstatus\n~wait 1ms\nstatus\ncomplete 0 1\nwait 100ms",
        &expect![[r#"
        > wait 60ms
            watch kick0
        > submit 0 1
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 1
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery exact; ring 0 served exact inflight 1
        > complete 0 1
        > wait 100ms
            watch kick0
    "#]],
    );
}

#[test]
fn a_ring_whose_indices_cannot_be_is_reported_and_never_guessed_at() {
    check(
        "~ready 1\n~break 0 900\nwait 5ms\nstatus\nfailover",
        &expect![[r#"
            > wait 5ms
                * RingViolated reason="avail.idx 900 is further ahead of used.idx 0 than the ring is long" next="a crash of its backend would halt the device until the VMM resets the ring"
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery refused; ring 0 served violated inflight 0
            > failover
                * FailoverRefused cause="operator: test" reason="ring 0: avail.idx 900 is further ahead of used.idx 0 than the ring is long"
                answer: refused refused ring 0: avail.idx 900 is further ahead of used.idx 0 than the ring is long
        "#]],
    );
}

#[test]
fn writes_to_the_configuration_space_end_with_the_session() {
    check(
        "
        ~ready 1
        ~vmm SET_CONFIG 32 1
        ~vmm SET_CONFIG 0 1
        vmm GET_CONFIG
        ~config 1 7
        ~exit 2
        ~up 3
        status
        ~vmm gone
        ~up 4
        ~up 5
        ~vmm connect
        vmm GET_CONFIG
        status
        ",
        &expect![[r#"
            > vmm GET_CONFIG
                vmm <- GET_CONFIG [1, 7, 7, 7]
            > status
                protected Idle; primary #1 active, shadow #3 ready; recovery exact; ring 0 served exact inflight 0
            > vmm GET_CONFIG
                vmm <- GET_CONFIG [7, 7, 7, 7]
            > status
                protected Idle; primary #4 ready, shadow #5 ready; recovery exact
        "#]],
    );
}

#[test]
fn a_dirty_log_is_not_acknowledged_before_the_primary_marks_its_writes() {
    check(
        "~ready 1 log\nmute 1\nvmm SET_LOG_BASE\nwait 20ms\nunmute 1",
        &expect![[r#"
        > mute 1
        > vmm SET_LOG_BASE
            #1 <- SET_LOG_BASE log
            #2 <- SET_LOG_BASE log
        > wait 20ms
            #1 <- GET_FEATURES
            watch kick0
        > unmute 1
            vmm <- SET_LOG_BASE 0x0
    "#]],
    );
}

#[test]
fn a_question_that_cannot_be_read_and_must_be_answered_ends_the_connection() {
    check(
        "~ready 1\nvmm unknown\nvmm garbled",
        &expect![[r#"
        > vmm unknown
            * MessageRefused peer="vmm" request=77 reason="unknown request 77 on the front-end channel"
            vmm <- 77 refused
        > vmm garbled
            * MessageRefused peer="vmm" request=24 reason="GET_CONFIG: 3 bytes, expected 12"
            drop the VMM
    "#]],
    );
}

#[test]
fn a_change_of_memory_without_acknowledgement_holds_back_the_next_request_until_both_have_it() {
    check(
        "
        ~ready 1
        ~mute 1
        ~mute 2
        vmm !SET_MEM_TABLE 0 1
        vmm GET_FEATURES
        unmute 2
        unmute 1
        vmm GET_FEATURES
        ",
        &expect![[r#"
            > vmm !SET_MEM_TABLE 0 1
                close mem0
                #1 <- SET_MEM_TABLE! mem0 mem1
                #2 <- SET_MEM_TABLE! mem0 mem1
            > vmm GET_FEATURES
                (the VMM waits)
            > unmute 2
            > unmute 1
                vmm <- GET_FEATURES 0x140002200
            > vmm GET_FEATURES
                vmm <- GET_FEATURES 0x140002200
        "#]],
    );
}

#[test]
fn a_silent_backend_holds_back_the_next_request_no_longer_than_the_bound() {
    check(
        "~ready 1\n~mute 1\nvmm !ADD_MEM_REG 1\nvmm !REM_MEM_REG 1\nvmm GET_FEATURES\nwait 4ms\nwait 4ms\nunmute 1",
        &expect![[r#"
            > vmm !ADD_MEM_REG 1
                #1 <- ADD_MEM_REG! mem1
                #2 <- ADD_MEM_REG! mem1
            > vmm !REM_MEM_REG 1
                (the VMM waits)
            > vmm GET_FEATURES
                (the VMM waits)
            > wait 4ms
                * AnsweredFromRecord request="ADD_MEM_REG" silent=1
                close mem1
                #1 <- REM_MEM_REG!
                #2 <- REM_MEM_REG!
            > wait 4ms
                * AnsweredFromRecord request="REM_MEM_REG" silent=1
                vmm <- GET_FEATURES 0x140002200
            > unmute 1
        "#]],
    );
}

#[test]
fn a_backend_that_dies_holds_back_nothing() {
    check(
        "~ready 1\n~mute 2\nvmm !ADD_MEM_REG 1\nvmm GET_FEATURES\nexit 2",
        &expect![[r#"
        > vmm !ADD_MEM_REG 1
            #1 <- ADD_MEM_REG! mem1
            #2 <- ADD_MEM_REG! mem1
        > vmm GET_FEATURES
            (the VMM waits)
        > exit 2
            close #2.kick
            close #2.call
            close #2.probe
            retire #2
            * ShadowLost backend=2 reason="killed by signal 9" next="another one is started in 0ns"
            start #3
            #3 is shadow
            vmm <- GET_FEATURES 0x140002200
    "#]],
    );
}

#[test]
fn a_refusal_of_a_change_without_acknowledgement_is_not_told() {
    check(
        "~ready 1\n~refuses 1\nvmm !ADD_MEM_REG 1\nvmm GET_FEATURES",
        &expect![[r#"
        > vmm !ADD_MEM_REG 1
            #1 <- ADD_MEM_REG! mem1
            #2 <- ADD_MEM_REG! mem1
        > vmm GET_FEATURES
            vmm <- GET_FEATURES 0x140002200
    "#]],
    );
}

#[test]
fn a_backend_without_acknowledgements_is_waited_for_as_well() {
    check(
        "~ready 1 no-ack\n~mute 1\nvmm !SET_MEM_TABLE 0 1\nvmm GET_FEATURES\nunmute 1",
        &expect![[r#"
        > vmm !SET_MEM_TABLE 0 1
            close mem0
            #1 <- SET_MEM_TABLE mem0 mem1, GET_FEATURES
            #2 <- SET_MEM_TABLE mem0 mem1, GET_FEATURES
        > vmm GET_FEATURES
            (the VMM waits)
        > unmute 1
            vmm <- GET_FEATURES 0x140002200
    "#]],
    );
}

#[test]
fn other_changes_without_acknowledgement_hold_back_nothing() {
    check(
        "~ready 1\n~mute 1\nvmm !SET_VRING_NUM 1 4\nvmm !SET_CONFIG 32 1\nvmm GET_FEATURES",
        &expect![[r#"
        > vmm !SET_VRING_NUM 1 4
            #1 <- SET_VRING_NUM 1=4
            #2 <- SET_VRING_NUM 1=4
        > vmm !SET_CONFIG 32 1
            #1 <- SET_CONFIG 32=[1]
            #2 <- SET_CONFIG 32=[1]
        > vmm GET_FEATURES
            vmm <- GET_FEATURES 0x140002200
    "#]],
    );
}

#[test]
fn a_vmm_that_leaves_during_a_change_without_acknowledgement_is_not_waited_for() {
    check(
        "~ready 1\n~mute 2\nvmm !ADD_MEM_REG 1\nvmm gone\nvmm connect\nwait 4ms",
        &expect![[r#"
        > vmm !ADD_MEM_REG 1
            #1 <- ADD_MEM_REG! mem1
            #2 <- ADD_MEM_REG! mem1
        > vmm gone
            * VmmGone reason="the connection was closed"
            #1 <- SET_VRING_KICK! #1.kick
            #1 <- GET_VRING_BASE 0
            close mem0
            close mem1
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
        > vmm connect
            * VmmConnected
        > wait 4ms
    "#]],
    );
}
