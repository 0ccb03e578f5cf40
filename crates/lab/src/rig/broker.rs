//! A real broker process with its backends, and the three lines to it: commands, status, events.

use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::control::{Answer, DeviceStatus, Lines, StatusAnswer};
use super::halt::{Halted, Halts};
use super::process::Target;
use super::sys::die_with_parent;
use crate::guest::now_ns;

/// Name of the guarded device.
const NAME: &str = "rig";
/// How long a broker may take to start its backends and listen.
const READY_MAX: Duration = Duration::from_secs(20);
/// How long it may take to end.
const END_MAX: Duration = Duration::from_secs(10);
/// While the rig waits for a state, it asks this often, and at once when an event came.
const ASK_EVERY_NS: u64 = 2_000_000;
/// Lines of the broker's log in the report of a failure.
const LOG_LINES: usize = 60;

/// How a broker is started.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Directory for sockets, log and journal.
    pub(crate) directory: PathBuf,
    /// Time without progress that counts as a hang.
    pub(crate) hang_ms: u64,
    /// The backend's command line with `{socket}` in it.
    pub(crate) backend: Vec<String>,
    /// More options for `guard`, as given to the rig.
    pub(crate) extra: Vec<String>,
}

/// A broker that runs. Ended on drop.
#[derive(Debug)]
pub(crate) struct Broker {
    child: Child,
    target: Target,
    directory: PathBuf,
    commands: Lines,
    status: Lines,
    events: Lines,
    latest: Option<(u64, DeviceStatus)>,
    asked_ns: u64,
    waiting: bool,
    event_came: bool,
    halts: Halts,
    /// Failovers asked for whose answers have not come.
    unanswered: u64,
    answer: Option<Answer>,
}

impl Broker {
    /// Starts a broker and waits until it listens.
    pub(crate) fn start(setup: &Setup) -> anyhow::Result<Self> {
        let directory = setup.directory.clone();
        let control = directory.join("control");
        std::fs::create_dir_all(&control)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["warmswap", "guard", "--name", NAME, "--type", "blk"]);
        command.arg("--socket").arg(directory.join("vmm.sock"));
        command.arg("--control").arg(&control);
        command.arg("--run-dir").arg(directory.join("run"));
        command.arg("--hang-ms").arg(setup.hang_ms.to_string());
        command.args(&setup.extra).arg("--").args(&setup.backend);
        let log = std::fs::File::create(directory.join("broker.log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // An interrupt from the terminal is for the rig, which ends the broker in its turn.
        command.process_group(0);
        let mut child = die_with_parent(&mut command).spawn().context("starting the broker")?;
        let ready = wait_until_ready(&mut child).with_context(|| log_tail(&directory, LOG_LINES));
        if let Err(error) = ready {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        let socket = control.join(format!("{NAME}.sock"));
        let mut events = Lines::connect(&socket)?;
        events.send(&json!({"verb": "events", "follow": true}))?;
        Ok(Broker {
            target: Target::open(child.id())?,
            child,
            commands: Lines::connect(&socket)?,
            status: Lines::connect(&socket)?,
            events,
            directory,
            latest: None,
            asked_ns: 0,
            waiting: false,
            event_came: false,
            halts: Halts::default(),
            unanswered: 0,
            answer: None,
        })
    }

    /// Where the VMM connects.
    pub(crate) fn socket(directory: &Path) -> PathBuf {
        directory.join("vmm.sock")
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.target.pid()
    }

    /// Asks for a failover; the answer comes with [`Broker::take_answer`].
    pub(crate) fn ask_failover(&mut self, now: bool) -> anyhow::Result<()> {
        self.answer = None;
        self.unanswered += 1;
        self.commands.send(&json!({"verb": "failover", "device": NAME, "now": now, "reason": "lab rig"}))
    }

    /// The answer to the last command, once. Those of earlier ones, which nobody waited for, are dropped.
    pub(crate) fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take()
    }

    /// Reads what came, and asks for the status if `watch` wants to know it. Never blocks.
    pub(crate) fn tick(&mut self, watch: bool) -> anyhow::Result<()> {
        while let Some(line) = self.events.next()? {
            self.event_came = true;
            self.halts.event(&line);
        }
        while let Some(line) = self.commands.next()? {
            self.unanswered = self.unanswered.saturating_sub(1);
            let answer = Answer::parse(&line)?;
            self.answer = (self.unanswered == 0).then_some(answer);
        }
        if let Some(line) = self.status.next()? {
            let answer: StatusAnswer = serde_json::from_str(&line).with_context(|| format!("status: {line}"))?;
            let device = answer.devices.into_iter().next().context("the broker has no device")?;
            self.halts.status(device.failovers.halted, device.halt_message());
            self.latest = Some((self.asked_ns, device));
            self.waiting = false;
        }
        let now = now_ns();
        if watch && !self.waiting && (self.event_came || now >= self.asked_ns + ASK_EVERY_NS) {
            self.status.send(&json!({"verb": "status"}))?;
            (self.asked_ns, self.waiting, self.event_came) = (now, true, false);
        }
        Ok(())
    }

    /// Takes a halt of the device that was not taken before.
    pub(crate) fn take_halt(&mut self) -> Option<Halted> {
        self.halts.take()
    }

    /// The status, if one was asked for after `since_ns`.
    pub(crate) fn status_since(&self, since_ns: u64) -> Option<&DeviceStatus> {
        self.latest.as_ref().filter(|(asked, _)| *asked > since_ns).map(|(_, status)| status)
    }

    /// Descriptors that become readable when something came.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 4] {
        [self.commands.as_fd(), self.status.as_fd(), self.events.as_fd(), self.target.as_fd()]
    }

    /// Fails if the broker has ended.
    pub(crate) fn must_live(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the broker ended: {status}"),
        }
    }

    /// Ends it as an operator does and waits until it is gone.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.terminate().with_context(|| log_tail(&self.directory, LOG_LINES))
    }

    fn terminate(&mut self) -> anyhow::Result<()> {
        self.target.signal(Signal::TERM)?;
        let deadline = Instant::now() + END_MAX;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "the broker did not end on SIGTERM within {END_MAX:?}");
            std::thread::sleep(Duration::from_millis(1));
        };
        ensure!(status.success(), "on SIGTERM the broker ended with {status}");
        let left = [Broker::socket(&self.directory), self.directory.join("control").join(format!("{NAME}.sock"))];
        for socket in left {
            ensure!(!socket.exists(), "the broker left {} behind", socket.display());
        }
        Ok(())
    }

    /// The last few events.
    pub(crate) fn last_events(&self) -> String {
        log_tail(&self.directory, LOG_LINES / 3)
    }

    /// Its last status and the last events, as its log has them, for the report of a failure.
    pub(crate) fn last_words(&self) -> String {
        let status = self.latest.as_ref().map(|(_, status)| format!("{status:?}")).unwrap_or_default();
        format!("last status: {status}\n{}", log_tail(&self.directory, LOG_LINES))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_until_ready(child: &mut Child) -> anyhow::Result<()> {
    let stdout = child.stdout.take().context("the broker's output")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines();
        let first = lines.next();
        // The receiver may have given up; the pipe is drained all the same, so that the broker never blocks on it.
        let _ = sender.send(first);
        lines.for_each(drop);
    });
    match receiver.recv_timeout(READY_MAX) {
        Ok(Some(Ok(line))) if line.starts_with("ready:") => Ok(()),
        Ok(Some(Ok(line))) => bail!("the broker said {line:?} instead of that it is ready"),
        Ok(_) => bail!("the broker ended before it was ready"),
        Err(_) => bail!("the broker was not ready within {READY_MAX:?}"),
    }
}

fn log_tail(directory: &Path, count: usize) -> String {
    let log = std::fs::read_to_string(directory.join("broker.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    format!("end of the broker's log:\n{}", lines[lines.len().saturating_sub(count)..].join("\n"))
}
