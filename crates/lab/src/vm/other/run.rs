//! One run: a machine whose device is taken away again and again.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Signal, kill_process};

use super::Settings;
use super::account::Account;
use super::backend::{self, Program};
use super::demand::{Death, Demand};
use super::image;
use crate::vm::broker::{Broker, Failover, Status};
use crate::vm::cache::Kernel;
use crate::vm::campaign::describe;
use crate::vm::device::Device;
use crate::vm::kernel_log::KernelLog;
use crate::vm::machine::{CONSOLE, Machine};
use crate::vm::orders::{Load, Orders};
use crate::vm::plan::{Kind, Plan, Step};
use crate::vm::process;
use crate::vm::watch::Watch;
use crate::vm::workspace::Workspace;

/// From the machine's start to the first answers of the device.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// From an injection to its end in the status.
const FAILOVER_MAX: Duration = Duration::from_secs(30);
/// From the end of a failover to a new shadow.
const REPROTECT_MAX: Duration = Duration::from_secs(60);
/// From the word to stop to the guest's last word.
const FINISH_MAX: Duration = Duration::from_secs(60);
/// How often the broker is asked for its status while something is awaited: each question is a process.
const ASK: Duration = Duration::from_millis(100);

/// Everything a run has found.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The failovers, in order.
    pub(super) injected: Vec<(Kind, Failover)>,
    /// What the guest said.
    pub(super) account: Account,
    /// What its kernel said.
    pub(super) kernel_log: KernelLog,
    /// Why the run could not go on, if so.
    pub(super) trouble: Option<String>,
    /// Processes that outlived their owner.
    pub(super) leaks: Vec<String>,
    /// Time of the whole run.
    pub(super) took: Duration,
    /// The guest's kernel.
    pub(super) kernel: String,
}

/// A run in progress.
#[derive(Debug)]
struct Run<'a> {
    settings: &'a Settings,
    demand: &'a Demand,
    workspace: &'a Workspace,
    machine: Machine,
    watch: Watch<Account>,
    broker: Broker,
    injected: Vec<(Kind, Failover)>,
    /// The device stands still, as it must.
    halted: bool,
    began: Instant,
}

/// Makes a run from start to verdict. An error means that it could not be made.
pub(super) fn run(settings: &Settings, program: &Program, demand: &Demand, plan: &Plan) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let kernel = Kernel::find()?;
    let workspace = Workspace::make()?;
    process::guard_exits(workspace.root());
    match settings.device {
        Device::Fs => std::fs::create_dir(backend::share(&workspace))?,
        Device::Scsi => image::make(&workspace.image(), settings.seed)?,
        _ => {}
    }
    let socket = workspace.path("device.sock");
    let broker = Broker::start(&program.guarded(&workspace), &workspace, &socket)?;
    let orders = Orders { seed: settings.seed, device: settings.device, load: Load::Rounds };
    let (machine, port) = Machine::start(&settings.qemu, &kernel, orders, &socket, &workspace)?;
    let watch = Watch::new(port, Account::new())?;
    let injected = Vec::new();
    let mut run =
        Run { settings, demand, workspace: &workspace, machine, watch, broker, injected, halted: false, began };
    let trouble = run.play(plan).err().map(|why| format!("{why:#}"));
    if let Some(why) = process::interrupted() {
        anyhow::bail!(why);
    }
    let outcome = run.conclude(trouble, kernel.release);
    if let Some(target) = &settings.logs {
        workspace.save_logs(target)?;
    }
    Ok(outcome)
}

impl Run<'_> {
    /// The run itself; an error says why it ended before its time.
    fn play(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_MAX;
        while !self.watch.account.under_way() {
            anyhow::ensure!(Instant::now() < deadline, "the guest gets no answer: {}", self.console_tail());
            self.listen_for(ASK)?;
        }
        self.say(&format!(
            "the device is under load ({} ms after the kernel began)",
            self.watch.account.boot_ms.unwrap_or(0)
        ));
        let deadline = Instant::now() + self.settings.cap;
        for (number, step) in (1..).zip(&plan.steps) {
            if Instant::now() > deadline {
                self.say(&format!("time is up after {} failovers", number - 1));
                break;
            }
            self.inject(number, plan.steps.len(), *step)?;
            if self.halted {
                return Ok(());
            }
        }
        self.listen_for(plan.tail)?;
        self.finish()
    }

    /// Listens to the guest; an error says why there is no point in going on.
    fn listen_for(&mut self, span: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + span;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.watch.listen(left.min(Duration::from_millis(200))) && self.settings.live {
                self.say(&self.watch.account.second());
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
        if let Some(why) = self.broker.gone() {
            anyhow::bail!("{why}");
        }
        if let Some(line) = self.kernel_log().trouble.first() {
            anyhow::bail!("the guest's kernel complains: {line}");
        }
        match self.watch.account.standstill() {
            Some(why) => anyhow::bail!("{why}"),
            None => Ok(()),
        }
    }

    /// One failover: wait until it is possible, wait the step's gap, take the primary away, wait for the end.
    fn inject(&mut self, number: usize, of: usize, step: Step) -> anyhow::Result<()> {
        let status = self.await_status("a new shadow", REPROTECT_MAX, |status| status.ready)?;
        let before = status.last.map(|last| last.id);
        self.listen_for(step.gap)?;
        let failover = match step.kind {
            Kind::Planned => self.broker.fail_over()?,
            Kind::Crash => self.take_away(&before, Signal::KILL)?,
            Kind::Hang => self.take_away(&before, Signal::STOP)?,
        };
        self.say(&format!("{number}/{of} {}: {}", step.kind.word(), describe(&failover)));
        let may_halt = step.kind != Kind::Planned && self.demand.death != Death::Settles;
        self.halted = failover.result == "halted" && may_halt;
        let unexpected = failover.result == "halted" && !may_halt;
        self.injected.push((step.kind, failover));
        anyhow::ensure!(!unexpected, "the failover halted: only an operator can go on");
        Ok(())
    }

    /// Sends the primary a signal and waits for the failover that follows.
    fn take_away(&mut self, before: &Option<String>, signal: Signal) -> anyhow::Result<Failover> {
        let status = self.broker.status()?;
        kill_process(self.broker.primary_of(&status)?, signal).context("sending the primary a signal")?;
        let is_new =
            |status: &Status| status.last.is_some() && status.last.as_ref().map(|last| &last.id) != before.as_ref();
        let status = self.await_status("the end of the failover", FAILOVER_MAX, is_new)?;
        status.last.context("it was waited for")
    }

    /// Asks for the status until it is as wanted.
    fn await_status(
        &mut self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&Status) -> bool,
    ) -> anyhow::Result<Status> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.broker.status()?;
            if wanted(&status) {
                return Ok(status);
            }
            anyhow::ensure!(Instant::now() < deadline, "{what} did not come within {patience:?}: {}", status.state);
            self.listen_for(ASK)?;
        }
    }

    /// Lets the guest end its loads and switch itself off.
    fn finish(&mut self) -> anyhow::Result<()> {
        self.say("the guest ends its loads");
        self.watch.say_stop()?;
        let deadline = Instant::now() + FINISH_MAX;
        while !self.watch.account.ended {
            anyhow::ensure!(Instant::now() < deadline, "the guest did not finish within {FINISH_MAX:?}");
            self.listen_for(Duration::from_millis(20))?;
        }
        anyhow::ensure!(self.machine.wait(Duration::from_secs(20)).is_some(), "the guest does not switch itself off");
        Ok(())
    }

    /// Ends everything.
    fn conclude(mut self, trouble: Option<String>, kernel: String) -> Outcome {
        if let Some(why) = &trouble {
            self.say(&format!("given up: {why}"));
        }
        self.machine.end();
        let mut leaks = Vec::new();
        if !self.broker.end() {
            leaks.push("the broker itself, which had to be killed".to_owned());
        }
        leaks.extend(process::end_strays(self.workspace.root()));
        let kernel_log = self.kernel_log();
        Outcome {
            injected: self.injected,
            account: self.watch.account,
            kernel_log,
            trouble,
            leaks,
            took: self.began.elapsed(),
            kernel,
        }
    }

    fn kernel_log(&self) -> KernelLog {
        let console = std::fs::read(self.workspace.path(CONSOLE)).unwrap_or_default();
        KernelLog::read(&String::from_utf8_lossy(&console))
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
