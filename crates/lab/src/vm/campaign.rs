//! One run: a machine under load, its disk taken away again and again, everything checked at the end.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Signal, kill_process};

use super::backend::{self, Backends, Bare, Limits};
use super::broker::{Broker, Failover, Status};
use super::cache::{Kernel, Qemu};
use super::checks::{self, Findings};
use super::kernel_log::KernelLog;
use super::machine::{CONSOLE, Machine};
use super::orders::Orders;
use super::plan::{BrokerKill, Kind, Plan, Step};
use super::process;
use super::rng::Rng;
use super::sabotage::{Damage, Sabotage};
use super::succession::Succession;
use super::watch::{Account, Patience, Watch};
use super::workspace::Workspace;

/// From the machine's start to the guest's first word.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// From an injection to its end in the status.
const FAILOVER_MAX: Duration = Duration::from_secs(30);
/// From the end of a failover to a new shadow.
const REPROTECT_MAX: Duration = Duration::from_secs(30);
/// From the word to stop to the guest's last word: the longest round of fio and the final reading.
const FINISH_MAX: Duration = Duration::from_secs(300);
/// How often the guest is looked after.
const POLL: Duration = Duration::from_millis(20);
/// How often the broker is asked for its status while something is awaited: each question is a process.
const ASK: Duration = Duration::from_millis(40);

/// What to run.
#[derive(Debug)]
pub(crate) struct Settings {
    /// What serves the disk.
    pub(crate) backends: Backends,
    /// With a broker, or the backend alone.
    pub(crate) guard: bool,
    /// A keeper starts the broker, which is killed as the plan says.
    pub(crate) kills_broker: bool,
    /// The programs.
    pub(crate) qemu: Qemu,
    /// What the backend puts before the image.
    pub(crate) limits: Limits,
    /// The failovers.
    pub(crate) plan: Plan,
    /// What the guest does.
    pub(crate) orders: Orders,
    /// The longest time for injecting.
    pub(crate) cap: Duration,
    /// When the guest counts as lost.
    pub(crate) patience: Patience,
    /// Print a line for each second of the guest.
    pub(crate) live: bool,
    /// Damage the image behind everybody's back: the checks must then find it.
    pub(crate) sabotage: Option<Sabotage>,
    /// Where to keep the logs.
    pub(crate) logs: Option<std::path::PathBuf>,
}

/// One injected failover and what came of it.
#[derive(Debug)]
pub(crate) struct Injected {
    /// What was done.
    pub(crate) kind: Kind,
    /// The broker's account; none without a broker.
    pub(crate) failover: Option<Failover>,
    at: Instant,
    /// The slowest probe of the guest in the seconds before it: what is normal under this load.
    pub(crate) guest_before_us: u64,
    /// The slowest probe of the guest in the seconds that followed.
    pub(crate) guest_worst_us: u64,
}

/// Everything a run has found.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The failovers, in order.
    pub(crate) injected: Vec<Injected>,
    /// What the guest said.
    pub(crate) account: Account,
    /// What its kernel said.
    pub(crate) kernel_log: KernelLog,
    /// What the image showed.
    pub(crate) findings: Findings,
    /// Why the run could not go on, if so.
    pub(crate) trouble: Option<String>,
    /// Processes that outlived their owner.
    pub(crate) leaks: Vec<String>,
    /// The most memory the broker was seen to use.
    pub(crate) broker_rss_bytes_max: u64,
    /// Brokers that were killed.
    pub(crate) broker_kills: u64,
    /// Of these, between a failover's beginning and its end.
    pub(crate) broker_kills_in_failover: u64,
    /// From the kill of each until the next one answered.
    pub(crate) readopted_us: Vec<u64>,
    /// Requests that unguarded backends have submitted again for dead ones.
    pub(crate) resubmitted: u64,
    /// Time of the whole run.
    pub(crate) took: Duration,
    /// The guest's kernel.
    pub(crate) kernel: String,
}

/// Who serves the disk.
#[derive(Debug)]
enum Disk {
    Guarded(Broker),
    Bare(Bare),
}

/// A run in progress.
#[derive(Debug)]
struct Campaign<'a> {
    settings: &'a Settings,
    workspace: &'a Workspace,
    machine: Machine,
    watch: Watch<Account>,
    disk: Disk,
    injected: Vec<Injected>,
    broker_rss_bytes_max: u64,
    broker_kills_in_failover: u64,
    began: Instant,
}

/// Runs one campaign from start to verdict. An error means that the run could not be made; what the run found is in the
/// outcome.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let kernel = Kernel::find()?;
    let workspace = Workspace::make()?;
    process::guard_exits(workspace.root());
    workspace.make_image()?;
    let outcome = run_in(settings, &workspace, &kernel, began);
    if let Some(target) = &settings.logs {
        workspace.save_logs(target)?;
    }
    outcome
}

fn run_in(settings: &Settings, workspace: &Workspace, kernel: &Kernel, began: Instant) -> anyhow::Result<Outcome> {
    let socket = workspace.path("disk.sock");
    let disk = if settings.guard {
        let mut guarded = backend::guarded(settings.backends, &settings.qemu, settings.limits, &workspace.image());
        guarded.kept = settings.kills_broker;
        Disk::Guarded(Broker::start(&guarded, workspace, &socket)?)
    } else {
        Disk::Bare(Bare::start(settings.backends, &settings.qemu, settings.limits, workspace, socket.clone())?)
    };
    let (machine, port) = Machine::start(&settings.qemu, kernel, settings.orders, &socket, workspace)?;
    let watch = Watch::new(port, Account::new())?;
    let mut campaign = Campaign {
        settings,
        workspace,
        machine,
        watch,
        disk,
        injected: Vec::new(),
        broker_rss_bytes_max: 0,
        broker_kills_in_failover: 0,
        began,
    };
    let trouble = campaign.play().err().map(|why| format!("{why:#}"));
    if let Some(why) = process::interrupted() {
        anyhow::bail!(why);
    }
    campaign.conclude(trouble, kernel)
}

impl Campaign<'_> {
    /// The run itself; an error says why it ended before its time.
    fn play(&mut self) -> anyhow::Result<()> {
        self.await_boot()?;
        self.await_load()?;
        let deadline = Instant::now() + self.settings.cap;
        for (number, step) in (1..).zip(&self.settings.plan.steps) {
            if Instant::now() > deadline {
                self.say(&format!("time is up after {} failovers", number - 1));
                break;
            }
            self.inject(number, *step)?;
        }
        if let Some(kind) = self.settings.sabotage {
            self.damage_image(kind)?;
        }
        self.listen_for(self.settings.plan.tail)?;
        self.finish()
    }

    fn await_boot(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_MAX;
        while self.watch.account.ticks.is_empty() {
            anyhow::ensure!(Instant::now() < deadline, "the guest does not start: {}", self.console_tail());
            self.listen_for(POLL)?;
        }
        let boot_ms = self.watch.account.boot_ms.unwrap_or(0);
        self.say(&format!("the guest is up ({boot_ms} ms after its kernel began)"));
        Ok(())
    }

    /// Waits until fio has written its part once and is in its first round: what is tested here is a disk under mixed
    /// load, not the boot of a kernel.
    fn await_load(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_MAX;
        while self.watch.account.fio.rounds == 0 {
            anyhow::ensure!(Instant::now() < deadline, "fio does not get through its first round");
            self.listen_for(POLL)?;
        }
        self.say("the disk is under load");
        self.listen_for(Duration::from_secs(1))
    }

    /// Listens to the guest; an error says why there is no point in going on.
    fn listen_for(&mut self, span: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + span;
        loop {
            if self.watch.listen(deadline.saturating_duration_since(Instant::now()).min(POLL * 10)) {
                self.show_tick();
                self.assert_kernel_content()?;
            }
            self.assert_alive()?;
            if Instant::now() >= deadline {
                return Ok(());
            }
        }
    }

    fn assert_alive(&mut self) -> anyhow::Result<()> {
        if let Some(why) = process::interrupted() {
            anyhow::bail!(why);
        }
        if self.machine.ended().is_some() && !self.watch.account.ended {
            anyhow::bail!("{}: {}", self.machine.obituary(), self.console_tail());
        }
        if let Disk::Guarded(broker) = &mut self.disk
            && let Some(why) = broker.gone()
        {
            anyhow::bail!("{why}");
        }
        match self.watch.account.standstill(&self.settings.patience) {
            Some(why) => anyhow::bail!("{why}"),
            None => Ok(()),
        }
    }

    /// Once the guest's kernel has complained, nothing that follows could make the run good.
    fn assert_kernel_content(&self) -> anyhow::Result<()> {
        let log = self.kernel_log();
        match log.trouble.first() {
            Some(line) => anyhow::bail!("the guest's kernel complains: {line}"),
            None => Ok(()),
        }
    }

    fn kernel_log(&self) -> KernelLog {
        let console = std::fs::read(self.workspace.path(CONSOLE)).unwrap_or_default();
        KernelLog::read(&String::from_utf8_lossy(&console))
    }

    /// One failover: wait until it is possible, wait the step's gap, take the primary away, wait for the end.
    fn inject(&mut self, number: usize, step: Step) -> anyhow::Result<()> {
        self.await_status("a new shadow", REPROTECT_MAX, |status| status.ready)?;
        self.listen_for(step.gap)?;
        if number == 1 {
            self.show_picture()?;
        }
        if step.broker_kill == Some(BrokerKill::UnderLoad) {
            self.kill_broker()?;
        }
        let deaths = self.deaths();
        let at = Instant::now();
        let failover = match &mut self.disk {
            Disk::Bare(bare) => {
                bare.replace(bare_signal(step.kind))?;
                None
            }
            Disk::Guarded(_) => {
                let status = self.status_before_a_blow()?;
                let before = status.last.as_ref().map(|last| last.id.clone());
                if let Some(BrokerKill::Before(thing)) = step.broker_kill {
                    self.ask(|broker| broker.die_before(thing))?;
                }
                match step.kind {
                    Kind::Planned => Some(self.ask_for_failover(&before)?),
                    Kind::Crash => self.take_away(&status, &before, Signal::KILL)?,
                    Kind::Hang => self.take_away(&status, &before, Signal::STOP)?,
                }
            }
        };
        self.broker_kills_in_failover += self.deaths() - deaths;
        let line = match &failover {
            Some(failover) => describe(failover),
            None => "backend replaced".to_owned(),
        };
        self.say(&format!("{number}/{} {}: {line}", self.settings.plan.steps.len(), step.kind.word()));
        let halted = failover.as_ref().is_some_and(|failover| failover.result == "halted");
        self.injected.push(Injected { kind: step.kind, failover, at, guest_before_us: 0, guest_worst_us: 0 });
        anyhow::ensure!(!halted, "the failover halted: only an operator can go on");
        Ok(())
    }

    /// Brokers that have died so far.
    fn deaths(&mut self) -> u64 {
        let Disk::Guarded(broker) = &mut self.disk else { return 0 };
        broker.succession().map_or(0, |succession| succession.deaths())
    }

    /// Kills the broker under load, and waits until the next one could make a failover.
    fn kill_broker(&mut self) -> anyhow::Result<()> {
        let Disk::Guarded(broker) = &mut self.disk else { return Ok(()) };
        broker.succession().context("no keeper would start the next one")?.kill();
        let deadline = Instant::now() + REPROTECT_MAX;
        while let Disk::Guarded(broker) = &mut self.disk
            && !broker.succession().is_some_and(|succession| succession.is_answered())
        {
            anyhow::ensure!(Instant::now() < deadline, "no broker has followed the one that was killed");
            self.listen_for(Duration::from_millis(1))?;
        }
        self.await_status("a broker that follows the rings", REPROTECT_MAX, |status| status.ready && status.follows)?;
        Ok(())
    }

    /// What the broker says of itself.
    fn status(&mut self) -> anyhow::Result<Status> {
        self.ask(Broker::status)
    }

    /// Asks the broker something. Where it is killed, the next one is asked.
    fn ask<T>(&mut self, question: impl Fn(&Broker) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let deadline = Instant::now() + REPROTECT_MAX;
        loop {
            let Disk::Guarded(broker) = &self.disk else { anyhow::bail!("nobody guards the disk") };
            match question(broker) {
                Err(_) if self.settings.kills_broker && Instant::now() < deadline => self.listen_for(POLL)?,
                answer => return answer,
            }
        }
    }

    /// The status just before a blow. A broker that has followed another one is given the time to follow the rings again, which it needs
    /// whenever the host has kept the processor from it as well.
    fn status_before_a_blow(&mut self) -> anyhow::Result<Status> {
        if !self.settings.kills_broker {
            return self.status();
        }
        let status =
            self.await_status("a broker that follows the rings", REPROTECT_MAX, |it| it.ready && it.follows)?;
        status.context("nobody guards the disk")
    }

    /// Asks for a planned failover. Where its answer died with a broker, the next one is asked what came of it.
    fn ask_for_failover(&mut self, before: &Option<String>) -> anyhow::Result<Failover> {
        let Disk::Guarded(broker) = &self.disk else { anyhow::bail!("nobody guards the disk") };
        match broker.fail_over() {
            Err(_) if self.settings.kills_broker => {}
            failover => return failover,
        }
        let status = self.await_status("a broker at rest", FAILOVER_MAX, |status| status.ready && status.follows)?;
        let last = status.and_then(|status| status.last).filter(|last| Some(&last.id) != before.as_ref());
        Ok(last.unwrap_or_else(Failover::never_begun))
    }

    /// Sends the primary a signal and waits for the failover that follows.
    fn take_away(
        &mut self,
        status: &Status,
        before: &Option<String>,
        signal: Signal,
    ) -> anyhow::Result<Option<Failover>> {
        let Disk::Guarded(broker) = &self.disk else { anyhow::bail!("nobody guards the disk") };
        kill_process(broker.primary_of(status)?, signal).context("sending the primary a signal")?;
        let is_new =
            |status: &Status| status.last.is_some() && status.last.as_ref().map(|last| &last.id) != before.as_ref();
        let status = self.await_status("the end of the failover", FAILOVER_MAX, is_new)?;
        Ok(status.and_then(|status| status.last))
    }

    /// Asks for the status until it is as wanted; none without a broker.
    fn await_status(
        &mut self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&Status) -> bool,
    ) -> anyhow::Result<Option<Status>> {
        let deadline = Instant::now() + patience;
        loop {
            if matches!(self.disk, Disk::Bare(_)) {
                return Ok(None);
            }
            let status = self.status()?;
            self.broker_rss_bytes_max = self.broker_rss_bytes_max.max(status.broker_rss_bytes);
            if wanted(&status) {
                return Ok(Some(status));
            }
            anyhow::ensure!(Instant::now() < deadline, "{what} did not come within {patience:?}: {}", status.state);
            self.listen_for(ASK)?;
        }
    }

    /// Damages the image a few times under load.
    fn damage_image(&mut self, kind: Sabotage) -> anyhow::Result<()> {
        let mut rng = Rng::new(self.settings.orders.seed, 200);
        for _ in 0..5 {
            let damage = Damage::prepare(kind, &self.workspace.image(), &mut rng)?;
            self.listen_for(Duration::from_millis(1500))?;
            damage.strike()?;
            self.say("image damaged");
        }
        Ok(())
    }

    /// Lets the guest end its loads and switch itself off.
    fn finish(&mut self) -> anyhow::Result<()> {
        self.say("the guest ends its loads and checks");
        self.watch.say_stop()?;
        let deadline = Instant::now() + FINISH_MAX;
        while !self.watch.account.ended {
            anyhow::ensure!(Instant::now() < deadline, "the guest did not finish within {FINISH_MAX:?}");
            self.listen_for(POLL)?;
        }
        anyhow::ensure!(self.machine.wait(Duration::from_secs(20)).is_some(), "the guest does not switch itself off");
        Ok(())
    }

    /// Ends everything and looks at what is left.
    fn conclude(mut self, trouble: Option<String>, kernel: &Kernel) -> anyhow::Result<Outcome> {
        if let Some(why) = &trouble {
            self.say(&format!("given up: {why}"));
        }
        self.machine.end();
        let (mut leaks, mut resubmitted, mut succession) = (Vec::new(), 0, (0, Vec::new()));
        match &mut self.disk {
            Disk::Bare(bare) => {
                bare.end();
                resubmitted = bare.resubmitted();
            }
            Disk::Guarded(broker) => {
                succession = broker.succession().map(Succession::end).unwrap_or_default();
                if !broker.end() {
                    leaks.push("the broker itself, which had to be killed".to_owned());
                }
            }
        }
        leaks.extend(process::end_strays(self.workspace.root()));
        let kernel_log = self.kernel_log();
        let seed = self.settings.orders.seed;
        let findings = checks::check(&self.workspace.image(), seed, &self.watch.account)?;
        self.attribute_waits();
        Ok(Outcome {
            injected: self.injected,
            account: self.watch.account,
            kernel_log,
            findings,
            trouble,
            leaks,
            resubmitted,
            broker_rss_bytes_max: self.broker_rss_bytes_max,
            broker_kills: succession.0,
            broker_kills_in_failover: self.broker_kills_in_failover,
            readopted_us: succession.1,
            took: self.began.elapsed(),
            kernel: kernel.release.clone(),
        })
    }

    /// Gives each failover the slowest probe of the ticks around it, up to its neighbours.
    fn attribute_waits(&mut self) {
        const REACH: Duration = Duration::from_secs(3);
        let starts: Vec<Instant> = self.injected.iter().map(|injected| injected.at).collect();
        for (index, injected) in self.injected.iter_mut().enumerate() {
            let next = starts.get(index + 1).copied();
            let until = match next {
                // Nothing followed: what is still waiting at the end belongs to the last one.
                None => Instant::now(),
                Some(next) => next.min(injected.at + REACH),
            };
            injected.guest_worst_us = self.watch.account.worst_us_between(injected.at, until);
            let since = injected.at.checked_sub(REACH).unwrap_or(injected.at);
            injected.guest_before_us = self.watch.account.worst_us_between(since, injected.at);
        }
    }

    fn show_tick(&self) {
        let Some(tick) = self.watch.account.ticks.last().filter(|_| self.settings.live) else { return };
        let bar = "#".repeat(usize::try_from(tick.iops / 200).unwrap_or(0).min(40));
        self.say(&format!("{:>6} IOPS  worst {:>9.1} ms  {bar}", tick.iops, to_ms(tick.worst_us)));
    }

    /// What the broker makes of the same seconds, from outside, beside what the guest has just counted.
    fn show_picture(&self) -> anyhow::Result<()> {
        let (Disk::Guarded(broker), Some(tick)) = (&self.disk, self.watch.account.ticks.last()) else { return Ok(()) };
        if self.settings.live {
            self.say(&format!("the guest counts {} requests per second; this is `warmswap top`:", tick.iops));
            eprintln!("\n{}", broker.picture()?);
        }
        Ok(())
    }

    fn say(&self, what: &str) {
        eprintln!("[{:6.1} s] {what}", self.began.elapsed().as_secs_f64());
    }

    fn console_tail(&self) -> String {
        let text = std::fs::read(self.workspace.path(CONSOLE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines[lines.len().saturating_sub(3)..].join(" | ")
    }
}

/// What happens to a backend nobody guards: a planned restart asks it to end, anything else kills it.
fn bare_signal(kind: Kind) -> Signal {
    match kind {
        Kind::Planned => Signal::TERM,
        Kind::Crash | Kind::Hang => Signal::KILL,
    }
}

/// One line on a failover.
pub(crate) fn describe(failover: &Failover) -> String {
    let blackout = failover.blackout_us.map_or_else(String::new, |us| format!(" after {:.2} ms", to_ms(us)));
    let Failover { result, recovery, fence, inflight, survivors, message, .. } = failover;
    let why = if message.is_empty() || result == "settled" { String::new() } else { format!(": {message}") };
    format!("{result}{blackout}, {inflight} in flight, {survivors} survivors ({recovery}, {fence}){why}")
}

/// Microseconds as milliseconds.
#[expect(clippy::cast_precision_loss, reason = "a time for people to read")]
pub(crate) fn to_ms(us: u64) -> f64 {
    us as f64 / 1000.0
}
