//! The control thread: one loop around the kernel's event queue that drives every device.

mod backends;
mod device;
mod fence;
mod inspector;
mod kicks;
mod poller;
mod spawner;
mod system;

pub(crate) use device::DeviceStatus;
pub(crate) use system::take_signals;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use warmswap_core::{BackendId, Entry, Nanos, Report, Value};

use self::device::Device;
use self::inspector::Inspector;
use self::poller::{Interest, Poller, Source, Token};
use self::spawner::Spawner;
use crate::cgroup::Janitor;
use crate::config::DeviceConfig;
use crate::journal::JournalSender;
use crate::process::Process;
use crate::storage::Storage;

/// Commands that may wait for the control thread.
const COMMANDS_MAX: usize = 64;
/// How long the rings of the last session may take to come to rest when the program ends.
const SHUTDOWN_MAX: Nanos = Nanos::from_millis(3_000);

/// Being later than this is an event.
const LATE_MAX: Nanos = Nanos::from_millis(10);

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

/// Sends commands to the control thread.
#[derive(Clone, Debug)]
pub(crate) struct Commander {
    commands: Sender<Command>,
    waker: Arc<OwnedFd>,
}

impl Commander {
    /// Hands a command over, waiting for room if the control thread is behind.
    pub(crate) fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        // The counter is full only if it is signalled already.
        let _full = rustix::io::write(&*self.waker, &1_u64.to_ne_bytes());
        sent
    }
}

/// Why the control thread ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// A signal asked for it.
    Asked,
    /// A device could not be started; the reason in words.
    Failed(String),
}

/// The control thread's state.
pub(crate) struct Driver {
    poller: Poller,
    devices: Vec<Device>,
    commands: Receiver<Command>,
    waker: Arc<OwnedFd>,
    signals: OwnedFd,
    tokens: Vec<Token>,
    spawner: Spawner,
    inspector: Inspector,
    /// When the last wait ended.
    woken: Nanos,
}

impl Driver {
    /// Makes the control thread's state. `signals` is what [`take_signals`] returned.
    ///
    /// # Errors
    /// The system refuses an event queue or a descriptor.
    pub(crate) fn new(signals: OwnedFd, janitor: Janitor) -> std::io::Result<(Self, Commander)> {
        let poller = Poller::new()?;
        let (sender, commands) = crossbeam_channel::bounded(COMMANDS_MAX);
        let waker = Arc::new(poller::waker()?);
        poller.add(waker.as_fd(), Token { device: 0, source: Source::Commands }, Interest::Read)?;
        poller.add(signals.as_fd(), Token { device: 0, source: Source::Signals }, Interest::Read)?;
        let commander = Commander { commands: sender, waker: Arc::clone(&waker) };
        let spawner = Spawner::start(commander.clone(), janitor)?;
        let inspector = Inspector::start(commander.clone())?;
        let tokens = Vec::with_capacity(64);
        let driver = Driver {
            poller,
            devices: Vec::new(),
            commands,
            waker,
            signals,
            tokens,
            spawner,
            inspector,
            woken: Nanos(0),
        };
        Ok((driver, commander))
    }

    /// Adds a device and starts its backends.
    pub(crate) fn add(&mut self, config: DeviceConfig, journal: JournalSender) -> std::io::Result<()> {
        let number = u16::try_from(self.devices.len()).map_err(|_| std::io::ErrorKind::QuotaExceeded)?;
        let mut device = Device::new(number, config, journal, self.spawner.clone(), self.inspector.clone(), now())?;
        device.run(now(), &self.poller);
        self.devices.push(device);
        Ok(())
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
        self.shut_down()?;
        Ok(ended)
    }

    fn step(&mut self, ready: &mut dyn FnMut(&DeviceConfig)) -> std::io::Result<Option<Ended>> {
        let due = self.devices.iter().filter_map(Device::next_timeout).min();
        let started = now();
        let timeout = due.map(|due| due.since(started));
        let mut tokens = std::mem::take(&mut self.tokens);
        self.poller.wait(timeout, &mut tokens)?;
        let woken = now();
        for token in &tokens {
            if self.dispatch(*token) {
                return Ok(Some(Ended::Asked));
            }
        }
        self.tokens = tokens;
        if let Some(due) = due {
            self.note_lateness("the processor was not given in time", woken.since(due.max(started)));
        }
        self.note_lateness("a step took long", started.since(self.woken));
        self.woken = woken;
        let now = now();
        for device in &mut self.devices {
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
                device.listen(listener, &self.poller)?;
                ready(&device.config);
            }
        }
        Ok(None)
    }

    /// A control thread that is late may lose sight of the rings: said, with the reason, so that somebody can help.
    fn note_lateness(&mut self, reason: &str, late: Nanos) {
        if late > LATE_MAX && self.woken > Nanos(0) {
            for device in &mut self.devices {
                device.note(
                    Entry::warning("ControlThreadLate")
                        .with("reason", reason)
                        .with("late_us", Value::Micros(late.as_micros())),
                );
            }
        }
    }

    /// Handles one source; true if the program is to end.
    fn dispatch(&mut self, token: Token) -> bool {
        let now = now();
        match token.source {
            Source::Commands => self.obey(now),
            Source::Signals => return system::signal_waits(&self.signals),
            source => {
                let poller = &self.poller;
                let Some(device) = self.devices.get_mut(usize::from(token.device)) else { return false };
                match source {
                    Source::Listener => device.accept(now, poller),
                    Source::Vmm => device.vmm_is_readable(),
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
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Status { answer } => {
                    let status = self.devices.iter().map(|device| (device.name().to_owned(), device.status()));
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
                Command::Failover { device, now: at_once, reason, answer } => {
                    if let Some(device) = self.devices.iter_mut().find(|known| known.name() == device) {
                        device.request_failover(at_once, reason, answer, now, &self.poller);
                    }
                }
            }
        }
    }

    /// Brings every ring to rest, so that whoever serves the guest next finds exactly what is owed, then ends every backend.
    fn shut_down(&mut self) -> std::io::Result<()> {
        let until = now() + SHUTDOWN_MAX;
        for device in &mut self.devices {
            // The path is free for the next broker at once.
            let _gone = std::fs::remove_file(&device.config.socket);
            device.shut_down(now(), &self.poller);
        }
        while now() < until && self.devices.iter().any(Device::is_closing) {
            self.last_steps()?;
        }
        let until = now() + SHUTDOWN_MAX;
        while now() < until && !self.devices.iter().all(Device::is_empty) {
            self.devices.iter_mut().for_each(|device| device.kill_all(&self.poller));
            self.last_steps()?;
        }
        Ok(())
    }

    fn last_steps(&mut self) -> std::io::Result<()> {
        let mut tokens = std::mem::take(&mut self.tokens);
        self.poller.wait(Some(Nanos::from_micros(200)), &mut tokens)?;
        for token in &tokens {
            if token.source != Source::Signals {
                self.dispatch(*token);
            }
        }
        self.tokens = tokens;
        for device in &mut self.devices {
            device.tick(now(), &self.poller);
            device.flush_journal();
        }
        Ok(())
    }
}

/// Monotonic time.
fn now() -> Nanos {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Nanos(u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Listens at a path. A socket that nobody serves any more is replaced; one that is served is somebody else's.
pub(crate) fn listen(path: &Path) -> std::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
    };
    if std::fs::symlink_metadata(path).is_ok() {
        if rustix::net::connect(socket()?, &address).is_ok() {
            let text = format!("{}: another process listens there", path.display());
            return Err(std::io::Error::new(std::io::ErrorKind::AddrInUse, text));
        }
        if std::os::unix::fs::FileTypeExt::is_socket(&std::fs::symlink_metadata(path)?.file_type()) {
            std::fs::remove_file(path)?;
        }
    }
    let listener = socket()?;
    rustix::net::bind(&listener, &address)
        .map_err(|error| std::io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    rustix::net::listen(&listener, 16)?;
    Ok(listener)
}
