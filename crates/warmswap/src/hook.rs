//! The operator's hook: a command that is run when something happens that somebody may want to act on.
//!
//! A thread of its own runs one after the other; what comes while too many wait is counted and said to the next one. Nothing here can delay a
//! failover.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError};

/// Calls that wait.
const QUEUE_MAX: usize = 64;
/// A call that takes longer is killed.
const CALL_MAX: Duration = Duration::from_secs(10);
/// What waits at the end of the program has so long.
const END_MAX: Duration = Duration::from_secs(2);
/// How often it is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Events that are told.
const TOLD: [&str; 15] = [
    "PrimaryLost",
    "ShadowReady",
    "ShadowLost",
    "ShadowRefused",
    "CanaryFailed",
    "FailurePredicted",
    "FailoverWithheld",
    "FailoverStarted",
    "FailoverSettled",
    "FailoverRefused",
    "FailoverHalted",
    "FenceWaiting",
    "FenceUnprovable",
    "RequestIsolated",
    "Ended",
];

/// A call.
#[derive(Debug)]
struct Call {
    device: String,
    event: &'static str,
    /// The entry of the journal as JSON.
    line: String,
    /// Calls that were left out before this one.
    left_out: u64,
}

/// The journal's end of the hook.
#[derive(Debug)]
pub(crate) struct Hook {
    queue: Sender<Call>,
    left_out: u64,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Hook {
    /// Starts the thread that runs `command`.
    pub(crate) fn start(command: String) -> std::io::Result<Self> {
        let (queue, calls) = crossbeam_channel::bounded(QUEUE_MAX);
        let thread = std::thread::Builder::new().name("hook".to_owned()).spawn(move || run(&command, &calls))?;
        Ok(Hook { queue, left_out: 0, thread: Some(thread) })
    }

    /// Tells of an event, if it is one of those that are told. Never waits.
    pub(crate) fn tell(&mut self, device: &str, event: &'static str, line: impl FnOnce() -> String) {
        if !TOLD.contains(&event) {
            return;
        }
        let call = Call { device: device.to_owned(), event, line: line(), left_out: self.left_out };
        match self.queue.try_send(call) {
            Ok(()) => self.left_out = 0,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.left_out += 1,
        }
    }
}

impl Drop for Hook {
    /// What waits is still told, for a moment.
    fn drop(&mut self) {
        self.queue = crossbeam_channel::bounded(0).0;
        let until = Instant::now() + END_MAX;
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

fn run(command: &str, calls: &Receiver<Call>) {
    for call in calls {
        if let Err(error) = carry_out(command, &call) {
            let _unread = writeln!(std::io::stderr(), "warmswap: --hook for {}: {error}", call.event);
        }
    }
}

fn carry_out(command: &str, call: &Call) -> std::io::Result<()> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .env("WARMSWAP_DEVICE", &call.device)
        .env("WARMSWAP_EVENT", call.event)
        .env("WARMSWAP_LEFT_OUT", call.left_out.to_string())
        .stdin(entry(&call.line)?)
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()?;
    wait(&mut child)
}

/// A file in memory with a line: whoever does not read it holds nobody up.
fn entry(line: &str) -> std::io::Result<Stdio> {
    let mut file = File::from(rustix::fs::memfd_create("entry", rustix::fs::MemfdFlags::CLOEXEC)?);
    writeln!(file, "{line}")?;
    file.rewind()?;
    Ok(Stdio::from(file))
}

fn wait(child: &mut Child) -> std::io::Result<()> {
    let until = Instant::now() + CALL_MAX;
    while Instant::now() < until {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(std::io::Error::other(format!("it ended with {status}"))),
            None => std::thread::sleep(LOOK_EVERY),
        }
    }
    // With all that it has started.
    let group = rustix::process::Pid::from_raw(child.id().cast_signed());
    let _gone = group.map(|group| rustix::process::kill_process_group(group, rustix::process::Signal::KILL));
    child.wait()?;
    Err(std::io::Error::other(format!("it was killed after {} s", CALL_MAX.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_with_their_entry_and_others_are_not() {
        let path = std::env::temp_dir().join(format!("warmswap-hook-{}", std::process::id()));
        let command = format!("echo \"$WARMSWAP_DEVICE $WARMSWAP_EVENT $(cat)\" >> {}", path.display());
        let mut hook = Hook::start(command).expect("a thread");
        hook.tell("disk", "FailoverSettled", || r#"{"event":"FailoverSettled"}"#.to_owned());
        hook.tell("disk", "BackendOutput", || unreachable!("nobody is told of it"));
        hook.tell("disk", "Ended", || "{}".to_owned());
        drop(hook);
        let told = std::fs::read_to_string(&path).expect("it was written");
        std::fs::remove_file(&path).expect("it is there");
        assert_eq!(told, "disk FailoverSettled {\"event\":\"FailoverSettled\"}\ndisk Ended {}\n");
    }

    #[test]
    fn a_command_that_fails_is_an_error_and_ends_nothing() {
        let call = Call { device: "disk".into(), event: "Ended", line: String::new(), left_out: 0 };
        assert!(carry_out("exit 3", &call).expect_err("it fails").to_string().contains("3"));
        assert!(carry_out("true", &call).is_ok(), "it need not read");
    }
}
