//! A broker that dies, or is replaced, costs its guest nothing where something keeps what it has.

mod support;

use std::time::Duration;

use rustix::process::Signal;
use support::{Broker, Disk, Scratch, Vmm, kill, storage_daemon, wait_for, warmswap};
use warmswap_wire::{FdSlot, Reply, Request, VringFd};

fn pids(broker: &Broker) -> [u64; 2] {
    let status = broker.status();
    ["primary", "shadow"].map(|role| status[role]["pid"].as_u64().expect("it is there"))
}

fn is_alive(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

#[test]
fn the_next_broker_goes_on_with_the_same_backends_and_the_same_connection() {
    let scratch = Scratch::new("kept");
    let mut broker = Broker::start_kept(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 3, 0x5a);
    broker.wait_for_state("protected");
    let before = pids(&broker);
    for round in 0..3_u8 {
        let old = broker.pid();
        kill(old, Signal::KILL);
        // Nobody is needed for this.
        disk.write(&mut vmm, 5, round);
        broker.wait_for_another(old);
        assert_eq!(disk.read(&mut vmm, 5), vec![round; 512]);
        assert!(matches!(vmm.ask(&Request::GetFeatures, &[]), Ok(Reply::U64(_))), "{}", broker.noted());
        broker.wait_for_state("protected");
        assert_eq!(pids(&broker), before, "{}", broker.noted());
    }
    let output = broker.ask(&["failover", "disk", "--reason", "test"]);
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), broker.noted());
    assert_eq!(disk.read(&mut vmm, 3), vec![0x5a; 512]);
    assert!(!broker.noted().contains("ShadowLost"), "{}", broker.noted());
}

#[test]
fn a_request_of_the_vmm_is_answered_by_the_next_broker() {
    let scratch = Scratch::new("kept-request");
    let mut broker = Broker::start_kept(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 1, 1);
    broker.wait_for_state("protected");
    let old = broker.pid();
    kill(old, Signal::STOP);
    let call = Request::SetVringCall(VringFd { index: 0, fd: Some(FdSlot(0)) });
    let other = Disk::new();
    assert!(vmm.tell(&call, &[std::os::fd::AsFd::as_fd(&other.call)], true));
    // It lies there, and nobody reads it.
    std::thread::sleep(Duration::from_millis(20));
    kill(old, Signal::KILL);
    let mut answer = [0; 20];
    std::io::Read::read_exact(&mut vmm.stream, &mut answer).expect("an answer");
    assert_eq!(answer[12..], [0; 8], "it is done");
    let count = || {
        let mut count = [0; 8];
        rustix::io::read(&other.call, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    disk.write(&mut vmm, 1, 2);
    wait_for("an interrupt by the new descriptor", || count() > 0);
}

#[test]
fn a_primary_that_dies_while_there_is_no_broker_is_failed_over_by_the_next_one() {
    let scratch = Scratch::new("kept-both");
    let mut broker = Broker::start_kept(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 7, 0x77);
    broker.wait_for_state("protected");
    let (old, [primary, _]) = (broker.pid(), pids(&broker));
    // The keeper starts nobody for now.
    broker.signal(Signal::STOP);
    kill(old, Signal::KILL);
    kill(primary, Signal::KILL);
    wait_for("the end of the primary", || !is_alive(primary));
    broker.signal(Signal::CONT);
    broker.wait_for_another(old);
    assert_eq!(disk.read(&mut vmm, 7), vec![0x77; 512]);
    wait_for("the failover", || broker.noted().contains("FailoverSettled"));
}

#[test]
fn an_upgrade_replaces_the_process_and_stops_nothing_and_the_end_leaves_nothing() {
    let scratch = Scratch::new("kept-upgrade");
    let mut broker = Broker::start_kept(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    broker.wait_for_state("protected");
    let before = pids(&broker);
    for round in 0..4_u8 {
        let old = broker.pid();
        let output = broker.ask(&["upgrade", "disk", "--json"]);
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        assert_eq!(said["before"]["pid"].as_u64(), Some(old), "{output:?}");
        assert_eq!(said["after"]["pid"].as_u64(), Some(broker.pid()));
        disk.write(&mut vmm, 2, round);
        assert_eq!(disk.read(&mut vmm, 2), vec![round; 512]);
    }
    assert_eq!(pids(&broker), before);
    let last = broker.pid();
    broker.signal(Signal::TERM);
    assert!(broker.wait().success(), "{}", broker.noted());
    for pid in before.into_iter().chain([last]) {
        wait_for("the end of every process", || !is_alive(pid));
    }
    assert!(!broker.socket.exists());
}

#[test]
fn without_its_keeper_a_broker_goes_on_and_says_what_is_lost() {
    let scratch = Scratch::new("kept-no-keeper");
    let mut broker = Broker::start_kept(&scratch, &[], &storage_daemon(&scratch.image()));
    broker.wait_for_state("protected");
    let mut vmm = Vmm::connect(&broker.socket);
    let mut disk = vmm.boot();
    disk.write(&mut vmm, 3, 0x5a);
    broker.wait_for_state("protected");
    let (old, before) = (broker.pid(), pids(&broker));
    broker.signal(Signal::KILL);
    disk.write(&mut vmm, 4, 0x66);
    let output = broker.ask(&["failover", "disk", "--reason", "test"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((disk.read(&mut vmm, 3), disk.read(&mut vmm, 4)), (vec![0x5a; 512], vec![0x66; 512]));
    wait_for("another shadow", || broker.status()["state"] == "protected");
    assert!((broker.pid(), pids(&broker)[0]) == (old, before[1]), "{}", broker.noted());
    assert!(broker.noted().contains("NotKept"), "{}", broker.noted());
    let output = broker.ask(&["upgrade", "disk"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not kept"), "{output:?}");
    let last = pids(&broker);
    kill(old, Signal::TERM);
    for pid in last.into_iter().chain([old]) {
        wait_for("the end of every process", || !is_alive(pid));
    }
}

#[test]
fn without_a_store_there_is_no_upgrade() {
    let scratch = Scratch::new("unkept");
    let broker = Broker::start(&scratch, &[], &storage_daemon(&scratch.image()));
    let output = broker.ask(&["upgrade", "disk"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("descriptor store"), "{said}");
}

#[test]
fn a_daemon_guards_what_its_configuration_says_and_is_replaced_as_a_whole() {
    let scratch = Scratch::new("daemon");
    let image = scratch.image();
    let device = |name: &str| {
        let words: Vec<String> = storage_daemon(&image).iter().map(|word| format!("{word:?}")).collect();
        let socket = scratch.path(&format!("{name}.sock"));
        format!("[device.{name}]\nsocket = {socket:?}\nno-shadow = true\ncommand = [{}]\n", words.join(", "))
    };
    let config = scratch.path("warmswap.toml");
    let control = scratch.0.to_str().expect("plain text");
    // One image with two guards is refused, so there is one device.
    std::fs::write(&config, format!("control = {control:?}\nquiet = true\n{}", device("one"))).expect("a file");
    let file = config.to_str().expect("plain text");
    let checked = warmswap(&["check-config", "--config", file]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let program = env!("CARGO_BIN_EXE_warmswap");
    let mut keeper = std::process::Command::new(program);
    keeper.args(["keeper", "--run-dir", control, "--", program, "daemon", "--config", file]);
    let mut keeper = keeper.stdout(std::process::Stdio::null()).spawn().expect("the program starts");
    let status = || {
        let output = warmswap(&["status", "one", "--json", "--control", control]);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_default()["devices"][0].clone()
    };
    wait_for("the device", || status()["primary"]["state"] == "ready");
    let (pid, primary) = (status()["broker"]["pid"].as_u64(), status()["primary"]["pid"].as_u64());
    kill(pid.expect("a broker"), Signal::KILL);
    wait_for("the next broker", || status()["broker"]["pid"].as_u64().is_some_and(|now| Some(now) != pid));
    assert_eq!(status()["primary"]["pid"].as_u64(), primary);
    kill(u64::from(keeper.id()), Signal::TERM);
    assert!(keeper.wait().expect("our own child").success());
}
