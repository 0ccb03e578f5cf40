//! The control thread: one loop around the kernel's event queue that drives every device.

mod backends;
mod device;
#[cfg(feature = "lab")]
pub(crate) mod failpoint;
mod fence;
mod inspector;
mod keeping;
mod kicks;
mod maps;
mod offload;
mod poller;
mod profile;
mod spawner;
mod state;
mod system;

pub(crate) use device::DeviceStatus;
pub(crate) use keeping::{Keeping, MarkRecord, MemberRecord, ProcessRecord, StorageRecord};
pub(crate) use system::take_signals;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use warmswap_core::{BackendId, Entry, Foresight, Nanos, Report, Value};

use self::device::{Around, Device, Kept, Threads};
use self::inspector::Inspector;
use self::maps::Maps;
use self::offload::Offload;
use self::poller::{Interest, Poller, Source, Token};
use self::spawner::Spawner;
use self::state::{Moved, StateMover};
use crate::cgroup::Janitor;
use crate::config::DeviceConfig;
use crate::journal::JournalSender;
use crate::process::Process;
use crate::profile::sampler::Teller;
use crate::profile::snapshots::Negotiated;
use crate::storage::Storage;

/// Commands that may wait for the control thread.
const COMMANDS_MAX: usize = 64;
/// How long the rings of the last session may take to come to rest when the program ends.
const SHUTDOWN_MAX: Nanos = Nanos::from_millis(3_000);

/// Devices whose backends are started at the same time.
const STARTING_MAX: usize = 8;

/// Being later than this is counted.
const LATE_MAX: Nanos = Nanos::from_millis(10);
/// Lateness is an event this often at most.
const LATE_NOTED_EVERY: Nanos = Nanos::from_millis(60_000);

/// How long somebody who asked for another process is waited for until it is told.
const SAID_MAX: std::time::Duration = std::time::Duration::from_millis(100);

/// A command for the control thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// Report every device.
    Status {
        /// Where to.
        answer: Sender<Vec<(String, DeviceStatus)>>,
    },
    /// A process that was asked for is there, or is not.
    Spawned {
        /// Number of its device.
        device: u16,
        /// Its generation.
        backend: BackendId,
        /// The process, or why there is none.
        process: Result<Process, String>,
    },
    /// A backend has been looked at.
    Inspected {
        /// Number of its device.
        device: u16,
        /// Its generation.
        backend: BackendId,
        /// What it has open.
        storage: Storage,
    },
    /// The VMM's own mappings of guest memory have been looked at.
    MemoryLooked {
        /// Number of its device.
        device: u16,
        /// Process of the VMM.
        vmm: u32,
        /// Something that was given as memory is mapped by it, and only privately.
        private: bool,
    },
    /// A backend's state has left it, or got into it, or has not.
    StateMoved {
        /// Number of its device.
        device: u16,
        /// Its generation.
        backend: BackendId,
        /// What came of it.
        moved: Result<Moved, String>,
    },
    /// Replace the shadow by a newly started one.
    Refresh {
        /// Of which device.
        device: String,
        /// The generation of the shadow that goes, or why none does; dropped if there is no such device.
        answer: Sender<Result<u64, String>>,
    },
    /// It was found out who holds what a dead backend had open.
    HolderFound {
        /// Number of its device.
        device: u16,
        /// Its generation.
        backend: BackendId,
        /// In words.
        holder: String,
    },
    /// Say what a device has negotiated; dropped while a failover runs.
    Negotiated {
        /// Which device.
        device: Arc<str>,
        /// Where to.
        answer: Sender<Negotiated>,
    },
    /// The failure model of a device has an alarm.
    Predicted {
        /// Which device.
        device: Arc<str>,
        /// What it says.
        foresight: Foresight,
    },
    /// End now and leave everything to the next process of the same program.
    Upgrade {
        /// Told that it does, or why not.
        answer: Sender<Result<(), String>>,
        /// Disconnected when whoever asked has been told.
        said: Receiver<()>,
    },
    /// Go by another configuration from the next process on.
    Reload {
        /// What it is, or what is wrong with it.
        proposal: Result<Proposal, String>,
        /// Told that it is going to be tried, or why not.
        answer: Sender<Result<(), String>>,
        /// Disconnected when whoever asked has been told.
        said: Option<Receiver<()>>,
    },
    /// Kill backends at a step of the next failover.
    #[cfg(feature = "lab")]
    Failpoint {
        /// Of which device.
        device: String,
        /// Before which of its actions, from 1.
        step: u32,
        /// Which backends.
        whom: failpoint::Whom,
        /// Told when it is set; dropped if there is no such device.
        answer: Sender<()>,
    },
    /// Make a failover.
    Failover {
        /// Of which device.
        device: String,
        /// Without a drain.
        now: bool,
        /// The operator's reason.
        reason: String,
        /// Where the outcome goes; dropped if there is no such device.
        answer: Sender<Report>,
    },
}

/// A configuration that could be used, as far as can be seen from outside.
#[derive(Clone, Debug)]
pub(crate) struct Proposal {
    /// As the next process reads it.
    pub(crate) text: String,
    /// Names of its devices.
    pub(crate) devices: Vec<String>,
}

/// Reads the configuration again, and says what is wrong with it, line by line.
pub(crate) type Reread = dyn Fn() -> Result<Proposal, String> + Send + Sync;

/// Sends commands to the control thread.
#[derive(Clone)]
pub(crate) struct Commander {
    commands: Sender<Command>,
    waker: Arc<OwnedFd>,
    /// Where the devices come from a configuration.
    reread: Option<Arc<Reread>>,
}

impl std::fmt::Debug for Commander {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Commander").finish_non_exhaustive()
    }
}

impl Commander {
    /// Reads the configuration again and has the next process go by it: the names of its devices.
    ///
    /// # Errors
    /// What is wrong with it, or why this process cannot be followed by another one; nothing has changed then. `said` is disconnected when
    /// whoever asked has been told.
    pub(crate) fn reload(&self, said: Option<Receiver<()>>) -> Result<Vec<String>, String> {
        let reread = self.reread.clone().ok_or("the device was not configured with a file: see `warmswap daemon`")?;
        // Those who ask have small stacks.
        let thread = std::thread::Builder::new().name("reload".to_owned()).spawn(move || reread());
        let read = thread.map_err(|error| error.to_string())?.join();
        let proposal = read.map_err(|_| "reading it has failed".to_owned())?;
        let devices = proposal.as_ref().map(|proposal| proposal.devices.clone()).unwrap_or_default();
        let (answer, may) = crossbeam_channel::bounded(1);
        self.send(Command::Reload { proposal, answer, said });
        may.recv().map_err(|_| "the broker is ending".to_owned())?.map(|()| devices)
    }

    /// Hands a command over if there is room for it; never waits.
    pub(crate) fn try_send(&self, command: Command) -> bool {
        let sent = self.commands.try_send(command).is_ok();
        let _full = rustix::io::write(&*self.waker, &1_u64.to_ne_bytes());
        sent
    }

    /// Hands a command over, waiting for room if the control thread is behind.
    pub(crate) fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        // The counter is full only if it is signalled already.
        let _full = rustix::io::write(&*self.waker, &1_u64.to_ne_bytes());
        sent
    }
}

#[cfg(test)]
impl Commander {
    /// For a control socket without a control thread: whatever is asked of it has no answer.
    pub(crate) fn to_nobody() -> Self {
        Commander {
            commands: crossbeam_channel::bounded(1).0,
            waker: Arc::new(poller::waker().expect("an event counter")),
            reread: None,
        }
    }
}

/// Why the control thread ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// A signal asked for it.
    Asked {
        /// Every ring of the last session was brought to rest.
        at_rest: bool,
    },
    /// Everything is left to the next process: no ring was stopped, no backend ended.
    Left,
    /// A device could not be started; the reason in words.
    Failed(String),
}

/// The control thread's state.
pub(crate) struct Driver {
    poller: Poller,
    devices: Vec<Device>,
    /// What each wants next, and whether it has to be gone through in this step: of many devices few have something to do.
    agenda: Vec<Agenda>,
    /// Devices that are not begun with yet.
    waiting: VecDeque<(DeviceConfig, JournalSender)>,
    commands: Receiver<Command>,
    waker: Arc<OwnedFd>,
    signals: OwnedFd,
    tokens: Vec<Token>,
    spawner: Spawner,
    inspector: Inspector,
    maps: Maps,
    states: StateMover,
    offload: Offload,
    sampler: Option<Teller>,
    janitor: Janitor,
    /// Keeps devices for the next broker, where there is a store.
    keeping: Option<Rc<RefCell<Keeping>>>,
    /// Reads the configuration again on a signal.
    reloader: Commander,
    /// Devices that were gone on with and not been said to be ready yet.
    resumed: Vec<usize>,
    /// It ends, and leaves everything to the next process.
    leaving: bool,
    /// Disconnected when those who asked for that have been told.
    said: Vec<Receiver<()>>,
    /// What nobody has asked for is gone from the store.
    settled: bool,
    /// Adopted orphans may have ended.
    orphans: bool,
    /// When the last wait ended.
    woken: Nanos,
    lateness: Lateness,
}

/// What is known of a device without asking it.
#[derive(Clone, Copy, Debug)]
struct Agenda {
    due: Option<Nanos>,
    /// It has more to do at once.
    more: bool,
    /// Something happened to it.
    touched: bool,
}

impl Agenda {
    /// To be gone through.
    const TOUCHED: Agenda = Agenda { due: None, more: true, touched: true };

    fn of(device: &Device) -> Self {
        Agenda { due: device.next_timeout(), more: device.has_more(), touched: false }
    }
}

/// How often the control thread was late, and by how much.
#[derive(Clone, Copy, Debug, Default)]
struct Lateness {
    count: u64,
    worst: Nanos,
    /// When it was noted last, and what has come since.
    noted_at: Option<Nanos>,
    unnoted: u64,
    unnoted_worst: Nanos,
}

impl Lateness {
    /// Counts one. If it is time to say so: how many there were since the last time, and the worst of them.
    fn add(&mut self, late: Nanos, now: Nanos) -> Option<(u64, Nanos)> {
        self.count += 1;
        self.worst = self.worst.max(late);
        self.unnoted += 1;
        self.unnoted_worst = self.unnoted_worst.max(late);
        if self.noted_at.is_some_and(|at| now.since(at) < LATE_NOTED_EVERY) {
            return None;
        }
        self.noted_at = Some(now);
        Some((std::mem::take(&mut self.unnoted), std::mem::take(&mut self.unnoted_worst)))
    }
}

impl Driver {
    /// Makes the control thread's state. `signals` is what [`take_signals`] returned.
    ///
    /// # Errors
    /// The system refuses an event queue or a descriptor.
    pub(crate) fn new(
        signals: OwnedFd,
        janitor: Janitor,
        sampler: Option<Teller>,
        offload_cpus: Vec<usize>,
        keeping: Option<Rc<RefCell<Keeping>>>,
        reread: Option<Arc<Reread>>,
    ) -> std::io::Result<(Self, Commander)> {
        let poller = Poller::new()?;
        let (sender, commands) = crossbeam_channel::bounded(COMMANDS_MAX);
        let waker = Arc::new(poller::waker()?);
        poller.add(waker.as_fd(), Token { device: 0, source: Source::Commands }, Interest::Read)?;
        poller.add(signals.as_fd(), Token { device: 0, source: Source::Signals }, Interest::Read)?;
        let commander = Commander { commands: sender, waker: Arc::clone(&waker), reread };
        let offload = Offload::start(offload_cpus)?;
        let spawner = Spawner::start(commander.clone(), janitor.clone(), offload.cpus().to_vec(), keeping.is_some())?;
        let inspector = Inspector::start(commander.clone())?;
        let maps = Maps::start(commander.clone())?;
        let tokens = Vec::with_capacity(64);
        let driver = Driver {
            poller,
            devices: Vec::new(),
            agenda: Vec::new(),
            waiting: VecDeque::new(),
            commands,
            waker,
            signals,
            tokens,
            spawner,
            inspector,
            maps,
            states: StateMover::new(commander.clone()),
            offload,
            sampler,
            janitor,
            keeping,
            reloader: commander.clone(),
            resumed: Vec::new(),
            leaving: false,
            said: Vec::new(),
            settled: false,
            orphans: false,
            woken: Nanos(0),
            lateness: Lateness::default(),
        };
        Ok((driver, commander))
    }

    /// Adds devices and starts their backends, a few at a time.
    pub(crate) fn add(&mut self, configs: Vec<DeviceConfig>, journal: &JournalSender) -> std::io::Result<()> {
        self.waiting.extend(configs.into_iter().map(|config| (config, journal.clone())));
        self.add_waiting()
    }

    /// Adds devices that wait, as long as few have begun and cannot be connected to yet: the backends of all of them at once would
    /// keep each other from the processors until they were late.
    fn add_waiting(&mut self) -> std::io::Result<()> {
        while !self.waiting.is_empty() && self.devices.iter().filter(|it| it.is_starting()).count() < STARTING_MAX {
            let Some((config, journal)) = self.waiting.pop_front() else { break };
            self.add_one(config, journal)?;
        }
        Ok(())
    }

    fn add_one(&mut self, config: DeviceConfig, journal: JournalSender) -> std::io::Result<()> {
        let number = u16::try_from(self.devices.len()).map_err(|_| std::io::ErrorKind::QuotaExceeded)?;
        let kept = self.kept(&config)?;
        let groups = kept.as_ref().map(Kept::groups).unwrap_or_default();
        // Before anything is started: what is left of a broker that was killed may still write.
        let leftovers = crate::cgroup::end_leftovers(&config.name, &groups)?;
        let threads = || Threads {
            spawner: self.spawner.clone(),
            inspector: self.inspector.clone(),
            maps: self.maps.clone(),
            states: self.states.clone(),
            offload: self.offload.clone(),
            sampler: self.sampler.clone(),
            keeping: self.keeping.clone(),
        };
        let mut device = match kept {
            Some(kept) => self.take_over_or_begin(number, config, journal, &threads, kept)?,
            None => Device::new(number, config, journal, threads(), now())?,
        };
        for group in leftovers {
            let entry = Entry::warning("LeftoversKilled").with("group", group.display().to_string());
            device.note(entry.with("reason", "a broker of this device was killed, and its backends lived on"));
        }
        if device.is_starting() {
            device.run(now(), &self.poller);
        } else {
            self.resumed.push(self.devices.len());
        }
        self.devices.push(device);
        self.agenda.push(Agenda::TOUCHED);
        Ok(())
    }

    /// What a broker before this one has kept of a device.
    ///
    /// # Errors
    /// This version does not understand it: it is left to one that does.
    fn kept(&self, config: &DeviceConfig) -> std::io::Result<Option<Kept>> {
        let taken = self.keeping.as_ref().and_then(|keeping| keeping.borrow_mut().take(&config.name));
        let read = taken.map(Kept::read).transpose();
        read.map_err(|why| std::io::Error::other(format!("{}: {why}", config.name)))
    }

    /// Goes on with a device, or, where that cannot be, begins it anew: its VMM has to connect again.
    fn take_over_or_begin(
        &self,
        number: u16,
        config: DeviceConfig,
        journal: JournalSender,
        threads: &dyn Fn() -> Threads,
        kept: Kept,
    ) -> std::io::Result<Device> {
        let around = Around { janitor: &self.janitor, poller: &self.poller, now: now() };
        let (again, log) = (config.clone(), journal.clone());
        let taken = Device::take_over(number, config, journal, threads(), kept, around);
        taken.or_else(|why| {
            let entry = Entry::error("NotTakenOver").with("reason", why);
            log.entry(
                &again.name,
                entry.with("next", "the device begins anew: its VMM has to connect again, or to be restarted"),
            );
            if let Some(keeping) = &self.keeping {
                keeping.borrow_mut().forget(&again.name);
            }
            crate::cgroup::end_leftovers(&again.name, &[])?;
            // What listened there was the last broker's.
            let _gone = std::fs::remove_file(&again.socket);
            Device::new(number, again, log, threads(), now())
        })
    }

    /// Runs until a signal or a device that cannot start. `ready` is told of each device the VMM can connect to.
    ///
    /// # Errors
    /// The event queue fails, or a socket cannot be made.
    pub(crate) fn run(&mut self, ready: &mut dyn FnMut(&DeviceConfig)) -> std::io::Result<Ended> {
        system::be_prompt();
        let ended = loop {
            if let Some(ended) = self.step(ready)? {
                break ended;
            }
        };
        if ended == Ended::Left {
            self.devices.iter_mut().for_each(Device::leave);
            // They are told within microseconds, or do not listen.
            self.said.iter().for_each(|said| _ = said.recv_timeout(SAID_MAX));
            return Ok(ended);
        }
        if let Ended::Failed(reason) = &ended
            && let Some(keeping) = &self.keeping
            && keeping.borrow_mut().is_trial()
        {
            let next = "the configuration before it is used again";
            self.note_of_all(&Entry::error("ReloadUndone").with("reason", reason.as_str()).with("next", next));
            self.devices.iter_mut().for_each(Device::leave);
            return Ok(Ended::Left);
        }
        // One that could not start says why, and has nothing to bring to rest.
        let started = !matches!(ended, Ended::Failed(_));
        let at_rest = self.shut_down(started)?;
        Ok(if started { Ended::Asked { at_rest } } else { ended })
    }

    fn step(&mut self, ready: &mut dyn FnMut(&DeviceConfig)) -> std::io::Result<Option<Ended>> {
        let due = self.agenda.iter().filter_map(|it| it.due).min();
        let started = now();
        let timeout = match self.agenda.iter().any(|it| it.more) {
            true => Some(Nanos(0)),
            false => due.map(|due| due.since(started)),
        };
        let mut tokens = std::mem::take(&mut self.tokens);
        self.poller.wait(timeout, &mut tokens)?;
        let woken = now();
        for token in &tokens {
            if self.dispatch(*token) {
                return Ok(Some(Ended::Asked { at_rest: false }));
            }
        }
        self.tokens = tokens;
        self.reap_orphans();
        if let Some(due) = due {
            self.note_lateness("the processor was not given in time", woken.since(due.max(started)));
        }
        self.note_lateness("a step took long", started.since(self.woken));
        self.woken = woken;
        let now = now();
        for (device, agenda) in self.devices.iter_mut().zip(&mut self.agenda) {
            let is_due = agenda.due.is_some_and(|due| due <= now);
            if !(agenda.touched || agenda.more || is_due) {
                continue;
            }
            if device.next_timeout().is_some_and(|due| due <= now) {
                device.tick(now, &self.poller);
            }
            device.read_vmm(now, &self.poller);
            device.flush_journal();
            if let Some(reason) = device.failed() {
                return Ok(Some(Ended::Failed(format!("{}: {reason}", device.name()))));
            }
            if device.wants_listener() {
                let listener = listen(&device.config.socket)?;
                device.listening_at = identity(&device.config.socket);
                admit(&device.config)?;
                device.listen(listener, &self.poller)?;
                ready(&device.config);
            }
            *agenda = Agenda::of(device);
        }
        for at in std::mem::take(&mut self.resumed) {
            ready(&self.devices[at].config);
        }
        if !self.waiting.is_empty() {
            self.add_waiting()?;
        }
        self.settle_store()?;
        Ok(self.leaving.then_some(Ended::Left))
    }

    /// Every device has begun: what nobody has asked for is let go of, once, and the program says that it works.
    fn settle_store(&mut self) -> std::io::Result<()> {
        let begun = !self.settled && self.waiting.is_empty() && !self.devices.iter().any(Device::is_starting);
        if begun && let Some(keeping) = &self.keeping {
            self.settled = true;
            let mut keeping = keeping.borrow_mut();
            keeping.settle()?;
            keeping.ready();
        }
        Ok(())
    }

    /// Collects orphans, but not while a fence command runs: it is the only process that this thread starts itself.
    fn reap_orphans(&mut self) {
        if self.orphans && !self.devices.iter().any(Device::may_run_command) {
            self.orphans = system::reap_orphans();
        }
    }

    /// A control thread that is late may lose sight of the rings: said, with the reason, so that somebody can help.
    fn note_lateness(&mut self, reason: &str, late: Nanos) {
        if late <= LATE_MAX || self.woken == Nanos(0) {
            return;
        }
        let Some((count, worst)) = self.lateness.add(late, self.woken) else { return };
        self.agenda.iter_mut().for_each(|it| it.touched = true);
        for device in &mut self.devices {
            device.note(
                Entry::warning("ControlThreadLate")
                    .with("reason", reason)
                    .with("count", count)
                    .with("worst_us", Value::Micros(worst.as_micros())),
            );
        }
    }

    /// Handles one source; true if the program is to end.
    fn dispatch(&mut self, token: Token) -> bool {
        let now = now();
        match token.source {
            Source::Commands => {
                self.obey(now);
                // They may be for any of them, and are few.
                self.agenda.iter_mut().for_each(|it| it.touched = true);
            }
            Source::Signals => {
                let said = system::take_said(&self.signals);
                self.orphans |= said.child;
                return said.end || (said.hangup && !self.hangup());
            }
            source => {
                let poller = &self.poller;
                let at = usize::from(token.device);
                let (Some(device), Some(agenda)) = (self.devices.get_mut(at), self.agenda.get_mut(at)) else {
                    return false;
                };
                agenda.touched = true;
                match source {
                    Source::Listener => device.accept(now, poller),
                    Source::Vmm => device.vmm_is_ready(now, poller),
                    Source::Link(id) => device.read_link(id, now, poller),
                    Source::Requests(id) => device.read_requests(id, now, poller),
                    Source::Process(id) => device.process_ended(id, now, poller),
                    Source::Output(id) => device.read_output(id),
                    Source::Kick(ring) => device.kicked(ring, now, poller),
                    Source::Commands | Source::Signals | Source::Kicks => {}
                }
            }
        }
        false
    }

    fn obey(&mut self, now: Nanos) {
        let mut count = [0; 8];
        // Empty means another pass has taken the commands already.
        let _empty = rustix::io::read(&*self.waker, &mut count);
        // Askers that ask without end get their turn in the next step.
        for count in 0.. {
            if count == COMMANDS_MAX {
                let _full = rustix::io::write(&*self.waker, &1_u64.to_ne_bytes());
                break;
            }
            let Ok(command) = self.commands.try_recv() else { break };
            match command {
                Command::Status { answer } => {
                    let (late, late_worst) = (self.lateness.count, self.lateness.worst);
                    let configuration = self.keeping.as_ref().map(|it| it.borrow_mut().configuration_state());
                    let with_lateness = |status| DeviceStatus { late, late_worst, configuration, ..status };
                    let status = self.devices.iter().map(|it| (it.name().to_owned(), with_lateness(it.status())));
                    let _gone = answer.try_send(status.collect());
                }
                Command::Spawned { device, backend, process } => {
                    if let Some(device) = self.devices.get_mut(usize::from(device)) {
                        device.spawned(backend, process, now, &self.poller);
                    }
                }
                Command::Inspected { device, backend, storage } => {
                    if let Some(device) = self.devices.get_mut(usize::from(device)) {
                        device.inspected(backend, storage, now, &self.poller);
                    }
                }
                Command::MemoryLooked { device, vmm, private } => {
                    if let Some(device) = self.devices.get_mut(usize::from(device)) {
                        device.memory_looked(vmm, private);
                    }
                }
                Command::StateMoved { device, backend, moved } => {
                    if let Some(device) = self.devices.get_mut(usize::from(device)) {
                        device.state_moved(backend, moved, now, &self.poller);
                    }
                }
                Command::Refresh { device, answer } => {
                    if let Some(device) = self.devices.iter_mut().find(|known| known.name() == device) {
                        let _gone = answer.try_send(device.refresh(now, &self.poller));
                    }
                }
                Command::HolderFound { device, backend, holder } => {
                    if let Some(device) = self.devices.get_mut(usize::from(device)) {
                        device.holder_found(backend, holder);
                    }
                }
                Command::Negotiated { device, answer } => {
                    let negotiated = self.devices.iter().find(|known| known.name() == &*device);
                    if let Some(negotiated) = negotiated.and_then(Device::negotiated) {
                        let _gone = answer.try_send(negotiated);
                    }
                }
                Command::Predicted { device, foresight } => {
                    if let Some(device) = self.devices.iter_mut().find(|known| known.name() == &*device) {
                        device.failure_predicted(foresight, now, &self.poller);
                    }
                }
                Command::Reload { proposal, answer, said } => {
                    self.said.extend(said);
                    let _gone = answer.try_send(self.propose(proposal));
                }
                Command::Upgrade { answer, said } => {
                    self.said.push(said);
                    let may = self.may_leave();
                    self.leaving |= may.is_ok();
                    let _gone = answer.try_send(may);
                }
                #[cfg(feature = "lab")]
                Command::Failpoint { device, step, whom, answer } => {
                    if let Some(device) = self.devices.iter_mut().find(|known| known.name() == device) {
                        device.set_failpoint(step, whom);
                        let _gone = answer.try_send(());
                    }
                }
                Command::Failover { device, now: at_once, reason, answer } => {
                    if let Some(device) = self.devices.iter_mut().find(|known| known.name() == device) {
                        device.request_failover(at_once, reason, answer, now, &self.poller);
                    }
                }
            }
        }
    }

    /// A terminal is gone, or somebody wants the configuration to be read again; false if there is none.
    fn hangup(&self) -> bool {
        let reloader = self.reloader.clone();
        // Reading files may take as long as it likes. What comes of it is in the journal.
        let read = move || drop(reloader.reload(None));
        self.reloader.reread.is_some() && std::thread::Builder::new().name("reload".to_owned()).spawn(read).is_ok()
    }

    /// Another configuration is to be tried by the next process, if that is sure to find everything that this one has.
    fn propose(&mut self, proposal: Result<Proposal, String>) -> Result<(), String> {
        let accepted = proposal.and_then(|proposal| self.try_next(&proposal));
        match &accepted {
            Ok(()) => self.leaving = true,
            Err(why) => {
                let entry = Entry::warning("ReloadRefused").with("reason", why.as_str());
                self.note_of_all(&entry.with("next", "everything goes on as it was"));
            }
        }
        accepted
    }

    fn try_next(&mut self, proposal: &Proposal) -> Result<(), String> {
        self.may_leave()?;
        if !self.settled || !self.waiting.is_empty() {
            return Err("devices are still being started: ask again when they have begun".to_owned());
        }
        let removed = |device: &&Device| !proposal.devices.iter().any(|name| name == device.name());
        if let Some(busy) = self.devices.iter().filter(removed).find(|device| device.has_vmm()) {
            let name = busy.name();
            return Err(format!("device {name} is not in it, and a VMM is connected to {name}: detach it there first"));
        }
        let keeping = self.keeping.as_ref().expect("may_leave() has seen it");
        keeping.borrow_mut().try_configuration(&proposal.text).map_err(|error| error.to_string())
    }

    /// Says something that concerns the process, in the journal of its first device.
    fn note_of_all(&mut self, entry: &Entry) {
        if let Some(device) = self.devices.first_mut() {
            device.note(entry.clone());
            device.flush_journal();
        }
    }

    /// Whether another process would go on with everything.
    fn may_leave(&self) -> Result<(), String> {
        if self.keeping.is_none() {
            let why = "there is no descriptor store: the program was started neither by `warmswap keeper` nor by systemd with \
                       FileDescriptorStoreMax=";
            return Err(why.to_owned());
        }
        let unkept = self.devices.iter().find(|device| !device.is_kept());
        unkept.map_or(Ok(()), |device| Err(format!("{} is not kept: see its journal (NotKept)", device.name())))
    }

    /// Brings every ring to rest, so that whoever serves the guest next finds exactly what is owed, then ends every backend. Says
    /// whether all came to rest in time.
    fn shut_down(&mut self, started: bool) -> std::io::Result<bool> {
        let began = now();
        let until = began + SHUTDOWN_MAX;
        let rings: Vec<usize> = self.devices.iter().map(Device::rings).collect();
        for device in &mut self.devices {
            // The path is free for the next broker at once. What is not the socket made here is somebody else's.
            if device.listening_at.is_some() && device.listening_at == identity(&device.config.socket) {
                let _gone = std::fs::remove_file(&device.config.socket);
            }
            device.shut_down(now(), &self.poller);
        }
        while now() < until && self.devices.iter().any(Device::is_closing) {
            self.last_steps()?;
        }
        let took = now().since(began);
        for (device, rings) in self.devices.iter_mut().zip(rings).filter(|_| started) {
            device.note_end(rings, took);
        }
        let at_rest = !self.devices.iter().any(Device::is_closing);
        let until = now() + SHUTDOWN_MAX;
        while now() < until && !self.devices.iter().all(Device::is_empty) {
            self.devices.iter_mut().for_each(|device| device.kill_all(&self.poller));
            self.last_steps()?;
        }
        self.devices.iter_mut().for_each(Device::flush_journal);
        // Whoever comes next begins anew, also where the store stays.
        self.devices.iter_mut().for_each(Device::forget);
        self.keeping.iter().for_each(|keeping| keeping.borrow_mut().forget_configuration());
        Ok(at_rest)
    }

    fn last_steps(&mut self) -> std::io::Result<()> {
        let mut tokens = std::mem::take(&mut self.tokens);
        self.poller.wait(Some(Nanos::from_micros(200)), &mut tokens)?;
        for token in &tokens {
            // It is ending already.
            let _asked_again = self.dispatch(*token);
        }
        self.tokens = tokens;
        self.reap_orphans();
        for device in &mut self.devices {
            device.tick(now(), &self.poller);
            device.flush_journal();
        }
        Ok(())
    }
}

/// Monotonic time.
pub(crate) fn now() -> Nanos {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Nanos(u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Gives the VMM's socket the mode and group that were asked for.
fn admit(config: &DeviceConfig) -> std::io::Result<()> {
    let fail = |option: &str, error: std::io::Error| {
        std::io::Error::new(error.kind(), format!("{option} for {}: {error}", config.socket.display()))
    };
    if let Some(group) = config.socket_group {
        std::os::unix::fs::chown(&config.socket, None, Some(group)).map_err(|error| fail("--socket-group", error))?;
    }
    if let Some(mode) = config.socket_mode {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&config.socket, mode).map_err(|error| fail("--socket-mode", error))?;
    }
    Ok(())
}

/// What is at a path: its device and inode.
fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).ok().map(|it| (it.dev(), it.ino()))
}

/// Listens at a path, for as many as may come at once.
pub(crate) fn listen(path: &Path) -> std::io::Result<OwnedFd> {
    warmswap_socket::listen(path, 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_is_counted_and_said_once_a_minute_with_count_and_worst() {
        let (mut lateness, ms) = (Lateness::default(), Nanos::from_millis);
        assert_eq!(lateness.add(ms(12), ms(1)), Some((1, ms(12))));
        assert_eq!(lateness.add(ms(40), ms(20)), None);
        assert_eq!(lateness.add(ms(11), ms(59_000)), None);
        assert_eq!(lateness.add(ms(15), ms(60_001)), Some((3, ms(40))));
        assert_eq!(lateness.add(ms(15), ms(60_002)), None);
        assert_eq!((lateness.count, lateness.worst), (5, ms(40)));
    }
}
