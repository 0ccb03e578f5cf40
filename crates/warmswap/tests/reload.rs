//! A daemon's configuration is changed under its guests: all of it, or nothing of it.

mod support;

use std::process::{Child, Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use support::{Disk, Scratch, Vmm, kill, wait_for, warmswap};

/// `warmswap daemon` under a keeper.
struct Daemon {
    scratch: Scratch,
    keeper: Child,
}

impl Daemon {
    fn start(name: &str, devices: &[String]) -> Self {
        let scratch = Scratch::new(name);
        let program = env!("CARGO_BIN_EXE_warmswap");
        let (control, config) = (scratch.path(""), scratch.path("warmswap.toml"));
        configure(&scratch, devices);
        let mut keeper = Command::new(program);
        keeper.args(["keeper", "--run-dir"]).arg(&control).args(["--", program, "daemon", "--config"]).arg(&config);
        let keeper = keeper.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts");
        Daemon { scratch, keeper }
    }

    fn run(&self, words: &[&str]) -> Output {
        let control = self.scratch.0.to_str().expect("plain text");
        warmswap(&[words, &["--control", control]].concat())
    }

    fn status(&self, device: &str) -> Value {
        let output = self.run(&["status", device, "--json"]);
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()["devices"][0].clone()
    }

    fn pid(&self, device: &str) -> u64 {
        self.status(device)["broker"]["pid"].as_u64().unwrap_or(0)
    }

    fn wait_until_protected(&self, device: &str) {
        wait_for("a protected device", || self.status(device)["state"] == "protected");
    }

    fn backends(&self, device: &str) -> [Option<u64>; 2] {
        let status = self.status(device);
        ["primary", "shadow"].map(|role| status[role]["pid"].as_u64())
    }

    fn journal(&self) -> String {
        std::fs::read_to_string(self.scratch.path("journal")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        kill(u64::from(self.keeper.id()), Signal::TERM);
        let _ended = self.keeper.wait();
    }
}

/// A device on the built-in back-end, with an image of its own.
fn device(scratch: &Scratch, name: &str) -> String {
    let image = scratch.path(&format!("{name}.raw"));
    if !image.exists() {
        std::fs::File::create(&image).and_then(|file| file.set_len(4 << 20)).expect("an image");
    }
    format!("[device.{name}]\nsocket = {:?}\ndisk = {image:?}\n", scratch.path(&format!("{name}.sock")))
}

fn configure(scratch: &Scratch, devices: &[String]) {
    let (control, journal) = (scratch.path(""), scratch.path("journal"));
    let devices: String =
        devices.iter().map(|it| if it.contains('[') { it.clone() } else { device(scratch, it) }).collect();
    let text = format!("control = {control:?}\njournal = {journal:?}\nquiet = true\n{devices}");
    std::fs::write(scratch.path("warmswap.toml"), text).expect("a file");
}

fn one() -> Vec<String> {
    vec!["one".to_owned()]
}

fn guest(daemon: &Daemon, name: &str) -> (Vmm, Disk) {
    let mut vmm = Vmm::connect(&daemon.scratch.path(&format!("{name}.sock")));
    let disk = vmm.boot();
    daemon.wait_until_protected(name);
    (vmm, disk)
}

#[test]
fn devices_come_and_go_and_a_guest_does_not_notice() {
    let daemon = Daemon::start("reload", &one());
    daemon.wait_until_protected("one");
    let (mut vmm, mut disk) = guest(&daemon, "one");
    disk.write(&mut vmm, 3, 0x33);
    let before = daemon.backends("one");
    let mut two = device(&daemon.scratch, "one");
    two.push_str("hang-ms = 700\n");
    configure(&daemon.scratch, &[two, "two".to_owned()]);
    let output = daemon.run(&["reload", "one", "--json"]);
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert_eq!(
        (said["configuration"].as_u64(), said["devices"].as_array().map(Vec::len)),
        (Some(2), Some(2)),
        "{output:?}"
    );
    daemon.wait_until_protected("two");
    assert_eq!(daemon.backends("one"), before);
    assert_eq!(disk.read(&mut vmm, 3), vec![0x33; 512]);
    // It is killed, and the next process goes by what is in force.
    let old = daemon.pid("one");
    kill(old, Signal::KILL);
    wait_for("the next process", || ![0, old].contains(&daemon.pid("one")));
    daemon.wait_until_protected("two");
    let [primary, shadow] = daemon.backends("two");
    configure(&daemon.scratch, &one());
    let old = daemon.pid("one");
    kill(old, Signal::HUP);
    wait_for("the end of a device that was taken out", || {
        [primary, shadow].iter().flatten().all(|pid| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists())
    });
    wait_for("the third configuration", || daemon.status("one")["broker"]["configuration"] == 3);
    assert_eq!(daemon.backends("one"), before);
    assert_eq!(disk.read(&mut vmm, 3), vec![0x33; 512]);
}

#[test]
fn what_is_wrong_is_refused_and_changes_nothing_even_if_the_process_dies() {
    let daemon = Daemon::start("reload-wrong", &one());
    daemon.wait_until_protected("one");
    let (mut vmm, mut disk) = guest(&daemon, "one");
    disk.write(&mut vmm, 3, 0x33);
    let (before, old) = (daemon.backends("one"), daemon.pid("one"));
    let refused = |text: &str| {
        let output = daemon.run(&["reload", "one"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(3) && said.contains(text), "{output:?}");
        assert_eq!(daemon.pid("one"), old);
    };
    configure(&daemon.scratch, &[device(&daemon.scratch, "one") + "hang-s = 7\n"]);
    refused("warmswap.toml:7:1: device one: unexpected argument '--hang-s'");
    let _image = device(&daemon.scratch, "other");
    let other = device(&daemon.scratch, "one").replace("one.raw", "other.raw");
    configure(&daemon.scratch, &[other]);
    refused("warmswap.toml:6:1: device one is in use: its disk cannot be changed");
    configure(&daemon.scratch, &["two".to_owned()]);
    refused("device one is not in it, and a VMM is connected to one");
    kill(old, Signal::KILL);
    wait_for("the next process", || ![0, old].contains(&daemon.pid("one")));
    daemon.wait_until_protected("one");
    assert_eq!(daemon.backends("one"), before);
    assert_eq!(disk.read(&mut vmm, 3), vec![0x33; 512]);
    assert_eq!(daemon.status("one")["broker"]["configuration"], 1);
}

#[test]
fn what_turns_out_not_to_work_is_undone() {
    let daemon = Daemon::start("reload-undone", &one());
    daemon.wait_until_protected("one");
    let (mut vmm, mut disk) = guest(&daemon, "one");
    disk.write(&mut vmm, 3, 0x33);
    let before = daemon.backends("one");
    // Nothing is wrong with it as far as words go; but somebody listens there.
    let taken = std::os::unix::net::UnixListener::bind(daemon.scratch.path("two.sock")).expect("a socket");
    configure(&daemon.scratch, &["one".to_owned(), "two".to_owned()]);
    let output = daemon.run(&["reload", "one"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("did not get in force"), "{output:?}");
    daemon.wait_until_protected("one");
    assert!(daemon.journal().contains("ReloadUndone"), "{}", daemon.journal());
    assert_eq!(daemon.backends("one"), before);
    assert_eq!(disk.read(&mut vmm, 3), vec![0x33; 512]);
    drop(taken);
    std::fs::remove_file(daemon.scratch.path("two.sock")).expect("ours");
    let output = daemon.run(&["reload", "one"]);
    assert!(output.status.success(), "{output:?}");
    daemon.wait_until_protected("two");
    assert_eq!(disk.read(&mut vmm, 3), vec![0x33; 512]);
}
