//! Devices that are more than their rings.

use expect_test::expect;
use warmswap_wire::DeviceType;

use super::check_with;
use super::harness::config;
use crate::drain::DrainMethod;
use crate::event::FenceLevel;
use crate::policy::PairConfig;

/// A file system whose backends are drained by disabling their rings.
fn fs() -> PairConfig {
    PairConfig { device: DeviceType::Fs, drain: DrainMethod::Disable, ..config() }
}

/// Two backends that can move their state, and a guest.
const READY: &str = "~ready 1 state\n";

fn check(script: &str, expected: &expect_test::Expect) {
    check_with(fs(), &format!("{READY}{script}"), expected);
}

#[test]
fn the_shadow_gets_the_state_before_the_rings() {
    check(
        "~submit 0 1 2\n~complete 0 1 2\nfailover\nsubmit 0 3\nmoved 1 4096\nmoved 2 4096\ncomplete 0 3\nwait 10ms\nstatus",
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_ENABLE! 0=0
                #1 <- GET_VRING_BASE 0
                open a channel for the state of #1: Save
                #1 <- SET_DEVICE_STATE_FD save #1.state
                close #1.state
            > submit 0 3
            > moved 1 4096
                #1 <- CHECK_DEVICE_STATE
                open a channel for the state of #2: Load
                #2 <- SET_DEVICE_STATE_FD load #2.state
                close #2.state
            > moved 2 4096
                #2 <- CHECK_DEVICE_STATE
                * StateTransferred backend=1 to=2 bytes=4096
                #2 is primary
                #2 <- SET_VRING_BASE 0=2, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > complete 0 3
            > wait 10ms
                retire #1
                close #1.channel
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
}

#[test]
fn a_primary_that_is_to_be_fenced_is_fenced_when_its_state_is_saved() {
    check_with(
        PairConfig { fence: FenceLevel::Reaped, ..fs() },
        &format!("{READY}failover\nmoved 1 4096\nmoved 2 4096\nfenced 1\nstatus"),
        &expect![[r#"
            > failover
                * FailoverStarted kind="planned" cause="operator: test" backend=1
                #1 <- SET_VRING_ENABLE! 0=0
                #1 <- GET_VRING_BASE 0
                open a channel for the state of #1: Save
                #1 <- SET_DEVICE_STATE_FD save #1.state
                close #1.state
            > moved 1 4096
                #1 <- CHECK_DEVICE_STATE
                open a channel for the state of #2: Load
                #2 <- SET_DEVICE_STATE_FD load #2.state
                close #2.state
            > moved 2 4096
                #2 <- CHECK_DEVICE_STATE
                * StateTransferred backend=1 to=2 bytes=4096
                fence #1
                close #1.channel
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
                unprotected Idle; primary #2 active, shadow #3 starting; recovery drained; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_primary_whose_state_cannot_be_had_goes_on() {
    for (script, expected) in [
        (
            "~failover\n~moved 1 fails\nstatus\nsubmit 0 1",
            expect![[r#"
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 0
            > submit 0 1
        "#]],
        ),
        (
            "~failover\n~unwhole 1\nmoved 1 10\nstatus",
            expect![[r#"
            > moved 1 10
                #1 <- CHECK_DEVICE_STATE
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="stopped" message="backend #1 says that its state is not whole; the primary goes on"
                answer: refused refused backend #1 says that its state is not whole; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
        (
            "~refuses 1\n~failover\nstatus",
            expect![[r#"
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
        (
            "~failover\nwait 6000ms\nstatus",
            expect![[r#"
            > wait 6000ms
                watch kick0
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="stopped" message="the state of the device was not transferred within 5s; the primary goes on"
                answer: refused refused the state of the device was not transferred within 5s; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                #2 <- GET_FEATURES
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
    ] {
        check(script, &expected);
    }
}

#[test]
fn a_shadow_that_cannot_take_the_state_is_replaced_and_the_primary_goes_on() {
    for (script, expected) in [
        (
            "~failover\n~moved 1 10\nmoved 2 fails\nstatus",
            expect![[r#"
            > moved 2 fails
                retire #2
                close #2.channel
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowLost backend=2 reason="the state of backend #2 did not go over: the channel broke" next="another one is started in 10ms"
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="stopped" message="the state of backend #2 did not go over: the channel broke; the primary goes on"
                answer: refused refused the state of backend #2 did not go over: the channel broke; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > status
                unprotected Idle; primary #1 active, shadow none; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
        (
            "~failover\n~moved 1 10\n~unwhole 2\nmoved 2 10\nstatus",
            expect![[r#"
            > moved 2 10
                #2 <- CHECK_DEVICE_STATE
                retire #2
                close #2.channel
                close #2.kick
                close #2.call
                close #2.probe
                * ShadowLost backend=2 reason="backend #2 says that its state is not whole" next="another one is started in 10ms"
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="stopped" message="backend #2 says that its state is not whole; the primary goes on"
                answer: refused refused backend #2 says that its state is not whole; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
            > status
                unprotected Idle; primary #1 active, shadow none; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
        (
            "~failover\nexit 2\nstatus",
            expect![[r#"
            > exit 2
                close #2.channel
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="killed by signal 9" next="another one is started in 0ns"
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="stopped" message="the shadow was lost; the primary goes on"
                answer: refused refused the shadow was lost; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                start #3
                #3 is shadow
                signal kick0
            > status
                unprotected Idle; primary #1 active, shadow #3 starting; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
        (
            "~failover\n~moved 1 10\nexit 2\nstatus",
            expect![[r#"
            > exit 2
                close #2.channel
                close #2.kick
                close #2.call
                close #2.probe
                retire #2
                * ShadowLost backend=2 reason="killed by signal 9" next="another one is started in 0ns"
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="stopped" message="the shadow was lost; the primary goes on"
                answer: refused refused the shadow was lost; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=0, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                start #3
                #3 is shadow
                signal kick0
            > status
                unprotected Idle; primary #1 active, shadow #3 starting; recovery drained; ring 0 served exact inflight 0
        "#]],
        ),
    ] {
        check(script, &expected);
    }
}

#[test]
fn a_primary_that_dies_before_its_state_is_saved_takes_it_along() {
    check(
        "~submit 0 1\n~complete 0 1\n~failover\nexit 1\nfenced 1\nstatus",
        &expect![[r#"
        > exit 1
            close #1.channel
            close #1.kick
            close #1.call
            close #1.probe
            fence #1
        > fenced 1
            retire #1
            * FailoverHalted kind="planned" cause="operator: test" recovery="refused" fence="reaped" message="what the guest had open on the fs device lay in the process that is gone; reset the device in the guest (mount it again)"
            answer: halted refused what the guest had open on the fs device lay in the process that is gone; reset the device in the guest (mount it again)
            #2 is primary
            start #3
            #3 is shadow
        > status
            halted Halted; primary #2 ready, shadow #3 starting; recovery drained; ring 0 waiting exact inflight 0; halted: what the guest had open on the fs device lay in the process that is gone; reset the device in the guest (mount it again)
    "#]],
    );
}

#[test]
fn a_primary_that_dies_after_its_state_is_saved_has_done_its_part() {
    check(
        "~submit 0 1\n~complete 0 1\n~failover\n~moved 1 10\nexit 1\nmoved 2 10\nfenced 1\nstatus",
        &expect![[r#"
        > exit 1
            close #1.channel
            close #1.kick
            close #1.call
            close #1.probe
        > moved 2 10
            #2 <- CHECK_DEVICE_STATE
            * StateTransferred backend=1 to=2 bytes=10
            fence #1
        > fenced 1
            #2 is primary
            #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
            signal kick0
            signal call0
            signal kick0
            retire #1
            * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="reaped"
            answer: settled drained
            start #3
            #3 is shadow
        > status
            unprotected Idle; primary #2 active, shadow #3 starting; recovery drained; ring 0 served exact inflight 0
    "#]],
    );
}

#[test]
fn a_crash_cannot_be_recovered_from_without_the_state() {
    check(
        "exit 1\nfenced 1\nstatus",
        &expect![[r#"
        > exit 1
            close #1.channel
            close #1.kick
            close #1.call
            close #1.probe
            * PrimaryLost backend=1 reason="killed by signal 9" next="failing over"
            * FailoverStarted kind="crash" cause="killed by signal 9" backend=1
            fence #1
        > fenced 1
            retire #1
            * FailoverHalted kind="crash" cause="killed by signal 9" recovery="refused" fence="reaped" message="what the guest had open on the fs device lay in the process that is gone; reset the device in the guest (mount it again)"
            #2 is primary
            start #3
            #3 is shadow
        > status
            halted Halted; primary #2 ready, shadow #3 starting; recovery drained; ring 0 waiting exact inflight 0; halted: what the guest had open on the fs device lay in the process that is gone; reset the device in the guest (mount it again)
    "#]],
    );
}

#[test]
fn a_primary_that_hangs_is_left_alone() {
    check(
        "~mute 1\n~submit 0 1\nwait 3000ms\nfailover now\nstatus\nunmute 1\ncomplete 0 1\nwait 10ms\nstatus",
        &expect![[r#"
            > wait 3000ms
                #1 <- GET_FEATURES
                * FailoverPutOff backend=1 cause="nothing was completed for 500ms and its control channel is silent" reason="what the guest has open lies in the primary and would be lost with it" next="the primary is left alone for a while: it may come back"
                #2 <- GET_FEATURES
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
            > failover now
                * FailoverRefused cause="operator: test" reason="what the guest has open lies in the primary and would be lost with it: ask for it without --now"
                answer: refused refused what the guest has open lies in the primary and would be lost with it: ask for it without --now
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
            > unmute 1
            > complete 0 1
            > wait 10ms
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 0
        "#]],
    );
}

#[test]
fn a_drain_that_takes_too_long_is_undone() {
    check(
        "~submit 0 1\n~take 0 1\n~failover\nwait 1100ms\nstatus\ncomplete 0 1\nstatus",
        &expect![[r#"
        > wait 1100ms
            #1 <- GET_VRING_BASE 0
            * DrainUnverified base=1 next="the primary gets its rings back"
            * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="reaped" message="it answered the stop of ring 0 with base 1 while used.idx is 0; the primary goes on"
            answer: refused refused it answered the stop of ring 0 with base 1 while used.idx is 0; the primary goes on
            #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
            signal kick0
            signal call0
            signal kick0
            #1 <- GET_FEATURES
            #2 <- GET_FEATURES
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
        > complete 0 1
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
    "#]],
    );
    check_with(
        PairConfig { drain: DrainMethod::PrivateKick, ..fs() },
        &format!("{READY}~submit 0 1\n~take 0 1\n~failover\nwait 1100ms\nstatus"),
        &expect![[r#"
            > wait 1100ms
                #1 <- GET_VRING_BASE 0
                * DrainUnverified base=1 next="the primary gets its rings back"
                * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="reaped" message="it answered the stop of ring 0 with base 1 while used.idx is 0; the primary goes on"
                answer: refused refused it answered the stop of ring 0 with base 1 while used.idx is 0; the primary goes on
                #1 <- SET_VRING_CALL call0, SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
                signal kick0
                signal call0
                signal kick0
                #1 <- GET_FEATURES
                #2 <- GET_FEATURES
            > status
                protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
        "#]],
    );
}

#[test]
fn a_drain_that_hangs_is_undone_when_the_primary_answers() {
    check(
        "~mute 1\n~submit 0 1\n~failover\nwait 1500ms\nstatus\nunmute 1\nstatus",
        &expect![[r#"
        > wait 1500ms
            #1 <- GET_FEATURES
            #2 <- GET_FEATURES
            #1 <- SET_VRING_ENABLE! 0=1
            signal kick0
            * FailoverRefused kind="planned" cause="operator: test" recovery="refused" fence="reaped" message="the primary did not come to rest within 1s; the primary goes on"
            answer: refused refused the primary did not come to rest within 1s; the primary goes on
            * FailoverPutOff backend=1 cause="nothing was completed for 1.25s and its control channel is silent" reason="what the guest has open lies in the primary and would be lost with it" next="the primary is left alone for a while: it may come back"
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
        > unmute 1
            signal kick0
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
    "#]],
    );
    check(
        "~submit 0 1\n~complete 0 1\n~failover\nmoved 1 1\nstatus",
        &expect![[r#"
        > moved 1 1
            #1 <- CHECK_DEVICE_STATE
            open a channel for the state of #2: Load
            #2 <- SET_DEVICE_STATE_FD load #2.state
            close #2.state
        > status
            failing-over Transferring; primary #1 active, shadow #2 ready; recovery drained; ring 0 waiting exact inflight 0
    "#]],
    );
}

#[test]
fn a_shadow_without_state_transfer_is_refused() {
    check_with(
        fs(),
        "~start\n~up 1 state\nup 2\nstatus",
        &expect![[r#"
        > up 2
            #2 <- GET_FEATURES
            #2 <- GET_PROTOCOL_FEATURES
            #2 <- SET_PROTOCOL_FEATURES 0x8009, SET_OWNER, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_FEATURES
            * PrimaryReady backend=1
            * ShadowRefused backend=2 reason="what the guest has open lies in the process of a fs device, and it cannot hand it over (protocol feature DEVICE_STATE)" next="the device runs unprotected; another start is tried with back-off"
            retire #2
            close #2.channel
            close #2.kick
            close #2.call
            close #2.probe
            * ShadowLost backend=2 reason="refused: what the guest has open lies in the process of a fs device, and it cannot hand it over (protocol feature DEVICE_STATE)" next="another one is started in 10ms"
        > status
            unprotected Idle; primary #1 ready, shadow none; recovery drained
    "#]],
    );
    check_with(
        fs(),
        "~start\n~up 1\nup 2 state\nstatus",
        &expect![[r#"
        > up 2 state
            #2 <- GET_FEATURES
            #2 <- GET_PROTOCOL_FEATURES
            #2 <- SET_PROTOCOL_FEATURES 0x88009, SET_OWNER, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_FEATURES
            * PrimaryReady backend=1
            * ShadowRefused backend=2 reason="what the guest has open lies in the process of a fs device, and the primary cannot hand it over (protocol feature DEVICE_STATE)" next="the device runs unprotected; another start is tried with back-off"
            retire #2
            close #2.channel
            close #2.kick
            close #2.call
            close #2.probe
            * ShadowLost backend=2 reason="refused: what the guest has open lies in the process of a fs device, and the primary cannot hand it over (protocol feature DEVICE_STATE)" next="another one is started in 10ms"
        > status
            unprotected Idle; primary #1 ready, shadow none; recovery drained
    "#]],
    );
}

#[test]
fn a_vmm_that_goes_or_stops_a_ring_while_the_state_is_under_way_is_served() {
    check(
        "~failover\nvmm gone\nstatus",
        &expect![[r#"
        > vmm gone
            * VmmGone reason="the connection was closed"
            retire #1
            close #1.channel
            close #1.kick
            close #1.call
            close #1.probe
            * FailoverRefused kind="planned" cause="operator: test" recovery="drained" fence="stopped" message="not handed over: the VMM disconnected"
            answer: refused drained not handed over: the VMM disconnected
            close mem0
            close kick0
            close call0
            #2 is primary
            start #3
            #3 is shadow
        > status
            unprotected Idle; primary #2 ready, shadow #3 starting; recovery drained
    "#]],
    );
    check(
        "~failover\nvmm GET_VRING_BASE 0\nmoved 1 10\nmoved 2 10\nstatus",
        &expect![[r#"
        > vmm GET_VRING_BASE 0
            * RingStopped
            vmm <- GET_VRING_BASE 0=0
        > moved 1 10
            #1 <- CHECK_DEVICE_STATE
            open a channel for the state of #2: Load
            #2 <- SET_DEVICE_STATE_FD load #2.state
            close #2.state
        > moved 2 10
            #2 <- CHECK_DEVICE_STATE
            * StateTransferred backend=1 to=2 bytes=10
            #2 is primary
            retire #1
            close #1.channel
            close #1.kick
            close #1.call
            close #1.probe
            * FailoverSettled kind="planned" cause="operator: test" recovery="drained" fence="stopped"
            answer: settled drained
            start #3
            #3 is shadow
        > status
            unprotected Idle; primary #2 ready, shadow #3 starting; recovery drained
    "#]],
    );
}

#[test]
fn a_prediction_is_acted_upon_where_the_state_can_be_moved() {
    check(
        "~submit 0 1\n~complete 0 1\nalarm 1 harm\nwait 1100ms\nmoved 1 10\nmoved 2 10\nstatus",
        &expect![[r#"
        > alarm 1 harm
            * FailoverStarted kind="predicted" cause="predicted (harm): requests take longer than they should at this load, for too long to be chance; causes: none" backend=1
            #1 <- SET_VRING_ENABLE! 0=0
            #1 <- GET_VRING_BASE 0
            open a channel for the state of #1: Save
            #1 <- SET_DEVICE_STATE_FD save #1.state
            close #1.state
        > wait 1100ms
            watch kick0
            #1 <- GET_FEATURES
            #2 <- GET_FEATURES
        > moved 1 10
            #1 <- CHECK_DEVICE_STATE
            open a channel for the state of #2: Load
            #2 <- SET_DEVICE_STATE_FD load #2.state
            close #2.state
        > moved 2 10
            #2 <- CHECK_DEVICE_STATE
            * StateTransferred backend=1 to=2 bytes=10
            #2 is primary
            #2 <- SET_VRING_BASE 0=1, SET_VRING_ADDR 0, SET_VRING_KICK kick0, SET_VRING_ENABLE! 0=1
            signal kick0
            signal call0
            signal kick0
            retire #1
            close #1.channel
            close #1.kick
            close #1.call
            close #1.probe
            * FailoverSettled kind="predicted" cause="predicted (harm): requests take longer than they should at this load, for too long to be chance; causes: none" recovery="drained" fence="stopped"
            start #3
            #3 is shadow
        > status
            unprotected Idle; primary #2 active, shadow #3 starting; recovery drained; ring 0 served exact inflight 0
    "#]],
    );
    // A backend that has lost a request does not come to rest: it would have to be killed.
    check(
        "~submit 0 1\nalarm 1 law\nwait 1100ms\nstatus",
        &expect![[r#"
        > alarm 1 law
        > wait 1100ms
            #1 <- GET_FEATURES
            #2 <- GET_FEATURES
            * FailoverWithheld backend=1 alarm="law" why="refused" reason="what the guest has open lies in the primary and would be lost with it" next="it is tried again at the next alarm"
        > status
            protected Idle; primary #1 active, shadow #2 ready; recovery drained; ring 0 served exact inflight 1
    "#]],
    );
}

#[test]
fn nothing_is_done_about_a_primary_that_serves_nothing() {
    check_with(
        config(),
        "~start\n~up 1\n~up 2\nalarm 1 harm\nwait 1100ms",
        &expect![[r#"
        > alarm 1 harm
        > wait 1100ms
            #1 <- GET_FEATURES
            #2 <- GET_FEATURES
    "#]],
    );
}
