//! A real broker process with its backends, and the three lines to it: commands, status, events.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::json;

use super::control::{Answer, DeviceStatus, StatusAnswer};
use super::halt::{Halted, Halts};
use crate::common::broker::{BrokerProcess, Launch};
use crate::common::lines::Lines;
use crate::common::process::Target;
use crate::common::systemd;
use crate::guest::now_ns;

/// Name of the guarded device.
const NAME: &str = "rig";
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
    /// A keeper starts it, and again when it dies.
    pub(crate) kept: bool,
    /// What the keeper executes, if not this program.
    pub(crate) program: Option<PathBuf>,
}

/// The connections to it.
#[derive(Debug)]
struct Control {
    commands: Lines,
    status: Lines,
    events: Lines,
}

impl Control {
    fn connect(process: &BrokerProcess) -> anyhow::Result<Self> {
        let mut events = process.connect()?;
        events.send(&json!({"verb": "events", "follow": true}))?;
        Ok(Control { commands: process.connect()?, status: process.connect()?, events })
    }
}

/// A broker that runs. Ended on drop.
#[derive(Debug)]
pub(crate) struct Broker {
    process: BrokerProcess,
    target: Target,
    /// None while the broker is dead.
    lines: Option<Control>,
    kept: bool,
    /// When it was killed, until its successor answers.
    killed_ns: Option<u64>,
    /// How long it took until it did, of those that were not taken yet.
    readopted_ns: Vec<u64>,
    /// An answer died with a broker.
    answer_lost: bool,
    latest: Option<(u64, DeviceStatus)>,
    asked_ns: u64,
    waiting: bool,
    event_came: bool,
    halts: Halts,
    /// Failovers asked for whose answers have not come.
    unanswered: u64,
    answer: Option<Answer>,
    /// Failpoints that were reached and not taken yet.
    points: Vec<String>,
}

impl Broker {
    /// Starts a broker and waits until it listens.
    pub(crate) fn start(setup: &Setup) -> anyhow::Result<Self> {
        let mut options = vec!["--hang-ms".to_owned(), setup.hang_ms.to_string()];
        options.extend_from_slice(&setup.extra);
        let process = BrokerProcess::start(&Launch {
            name: NAME,
            directory: &setup.directory,
            options: &options,
            backend: &setup.backend,
            environment: None,
            kept: setup.kept,
            program: setup.program.as_deref(),
        })?;
        Ok(Broker {
            target: Target::open(process.pid())?,
            lines: Some(Control::connect(&process)?),
            kept: setup.kept,
            killed_ns: None,
            readopted_ns: Vec::new(),
            answer_lost: false,
            process,
            latest: None,
            asked_ns: 0,
            waiting: false,
            event_came: false,
            halts: Halts::default(),
            unanswered: 0,
            answer: None,
            points: Vec::new(),
        })
    }

    /// Where the VMM connects.
    pub(crate) fn socket(&self) -> PathBuf {
        self.process.socket()
    }

    /// Asks for a failover; the answer comes with [`Broker::take_answer`].
    pub(crate) fn ask_failover(&mut self, now: bool) -> anyhow::Result<()> {
        self.answer = None;
        self.unanswered += 1;
        self.ask(&json!({"verb": "failover", "device": NAME, "now": now, "reason": "lab rig"}))
    }

    /// Has it believe that a failure of the primary is imminent.
    pub(crate) fn alarm(&mut self, alarm: &str) -> anyhow::Result<()> {
        self.answer = None;
        self.unanswered += 1;
        self.ask(&json!({"verb": "alarm", "device": NAME, "alarm": alarm}))
    }

    /// Has it kill backends, by their roles now, before a step of the next failover.
    pub(crate) fn set_failpoint(&mut self, step: u64, whom: &str) -> anyhow::Result<()> {
        self.answer = None;
        self.unanswered += 1;
        self.ask(&json!({"verb": "failpoint", "device": NAME, "step": step, "whom": whom}))
    }

    /// Sends a command. One that cannot be sent, because the broker has died, has no answer.
    fn ask(&mut self, command: &serde_json::Value) -> anyhow::Result<()> {
        self.answer_lost = false;
        match self.lines.as_mut().map(|lines| lines.commands.send(command)) {
            Some(Err(error)) if !self.kept => Err(error),
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => {
                self.disconnected();
                self.answer_lost = true;
                Ok(())
            }
        }
    }

    /// Whether the answer to the last command died with a broker.
    pub(crate) fn has_lost_answer(&self) -> bool {
        self.answer_lost
    }

    /// Has it replaced by the program that lies there now. An answer comes only if it is not.
    pub(crate) fn upgrade(&mut self) -> anyhow::Result<()> {
        self.answer = None;
        self.ask(&json!({"verb": "upgrade"}))
    }

    /// Kills the broker, not its keeper.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.killed_ns.get_or_insert_with(now_ns);
        // One that has just died by itself is as dead.
        if let Ok(broker) = self.broker_pid().and_then(Target::open) {
            let _ended = broker.signal(rustix::process::Signal::KILL);
        }
        Ok(())
    }

    /// The process that guards: the child of the keeper, where there is one.
    pub(crate) fn broker_pid(&self) -> anyhow::Result<u32> {
        if !self.kept {
            return Ok(self.target.pid());
        }
        let latest = self.latest.as_ref().map(|(_, status)| status.broker.pid);
        latest.context("the broker has died, and the next one has not answered yet")
    }

    /// The process that holds its descriptors and has its orphans for children.
    pub(crate) fn keeper_pid(&self) -> u32 {
        if systemd::is_inside() { systemd::PID } else { self.target.pid() }
    }

    /// Whether the successor of one that died answers.
    pub(crate) fn is_connected(&self) -> bool {
        self.lines.is_some() && self.killed_ns.is_none()
    }

    /// Whether a successor has answered that was not taken yet.
    pub(crate) fn has_readopted(&self) -> bool {
        !self.readopted_ns.is_empty()
    }

    /// Takes how long successors took to answer.
    pub(crate) fn take_readopted(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.readopted_ns)
    }

    fn disconnected(&mut self) {
        self.lines = None;
        self.waiting = false;
        self.latest = None;
        self.answer_lost |= std::mem::take(&mut self.unanswered) > 0;
        self.killed_ns.get_or_insert_with(now_ns);
    }

    /// Takes the failpoints that were reached: in which phase, and before what.
    pub(crate) fn take_points(&mut self) -> Vec<String> {
        std::mem::take(&mut self.points)
    }

    /// The answer to the last command, once. Those of earlier ones, which nobody waited for, are dropped.
    pub(crate) fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take()
    }

    /// Reads what came, and asks for the status if `watch` wants to know it. Never blocks. Where a keeper starts a dead broker again, it is
    /// connected to again.
    pub(crate) fn tick(&mut self, watch: bool) -> anyhow::Result<()> {
        if self.lines.is_none() {
            self.lines = Control::connect(&self.process).ok();
        }
        match self.read(watch || self.killed_ns.is_some()) {
            Err(_) if self.kept => {
                self.disconnected();
                Ok(())
            }
            result => result,
        }
    }

    fn read(&mut self, watch: bool) -> anyhow::Result<()> {
        let Some(lines) = &mut self.lines else { return Ok(()) };
        while let Some(line) = lines.events.next()? {
            self.event_came = true;
            self.halts.event(&line);
            self.points.extend(point_of(&line));
        }
        while let Some(line) = lines.commands.next()? {
            self.unanswered = self.unanswered.saturating_sub(1);
            let answer = Answer::parse(&line)?;
            self.answer = (self.unanswered == 0).then_some(answer);
        }
        if let Some(line) = lines.status.next()? {
            let answer: StatusAnswer = serde_json::from_str(&line).with_context(|| format!("status: {line}"))?;
            let device = answer.devices.into_iter().next().context("the broker has no device")?;
            self.halts.status(device.failovers.halted, device.halt_message());
            self.latest = Some((self.asked_ns, device));
            self.waiting = false;
            if let Some(killed) = self.killed_ns.take() {
                self.readopted_ns.push(now_ns() - killed);
            }
        }
        let now = now_ns();
        if watch && !self.waiting && (self.event_came || now >= self.asked_ns + ASK_EVERY_NS) {
            lines.status.send(&json!({"verb": "status"}))?;
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
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let lines = self.lines.iter().flat_map(|it| [it.commands.as_fd(), it.status.as_fd(), it.events.as_fd()]);
        lines.chain([self.target.as_fd()]).collect()
    }

    /// Fails if the broker has ended.
    pub(crate) fn must_live(&mut self) -> anyhow::Result<()> {
        match self.process.ended()? {
            None => Ok(()),
            Some(status) => bail!("the broker ended: {status}"),
        }
    }

    /// Ends it as an operator does and waits until it is gone.
    pub(crate) fn end(self) -> anyhow::Result<()> {
        self.process.end()
    }

    /// The last few events.
    pub(crate) fn last_events(&self) -> String {
        self.process.log_tail(LOG_LINES / 3)
    }

    /// Its last status and the last events, as its log has them, for the report of a failure.
    pub(crate) fn last_words(&self) -> String {
        let status = self.latest.as_ref().map(|(_, status)| format!("{status:?}")).unwrap_or_default();
        format!("last status: {status}\n{}", self.process.log_tail(LOG_LINES))
    }
}

/// The failpoint that an event tells of, if it does.
fn point_of(line: &str) -> Option<String> {
    // Looked for first: events come by the thousand.
    let event: serde_json::Value =
        line.contains("FailpointReached").then(|| serde_json::from_str(line).ok()).flatten()?;
    let property = |name: &str| event["properties"][name].as_str();
    Some(format!("{} before {}", property("phase")?, property("before")?))
}
