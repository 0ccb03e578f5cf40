//! One device in the control thread: turns what happens on its descriptors into events of the core, and carries out the core's
//! actions in their order.

mod keep;
mod take_over;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::SystemTime;

use crossbeam_channel::Sender;
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use warmswap_core::{
    Action, Actions, BackendId, CommandId, Entry, Event, FenceLevel, Foresight, Nanos, Pair, PairState, PrivateEvents,
    Report, StateDirection, Status, Value,
};
use warmswap_wire::{BackendRequest, FdSlot, Request, RequestCode};

use super::backends::{self, Backend};
use super::fence::{Fence, Progress};
use super::inspector::{Inspector, Look, Search};
use super::keeping::{Channel, Keeping};
use super::maps::{self, Maps};
use super::offload::{Move, Offload};
use super::poller::{Interest, Poller, Source as PollSource, Token};
use super::profile::Reporter;
use super::spawner::{Spawner, Start, Wanted};
use super::state::{Moved, StateMover};
use crate::config::{DeviceConfig, Source};
use crate::fds::FdTable;
use crate::journal::JournalSender;
use crate::process::{self, Process, RunDir, has_ended, open_pidfd};
use crate::profile::sampler::Teller;
use crate::profile::snapshots::Negotiated;
use crate::shm::{MemoryAccess, SharedMemory};
use crate::storage::{FenceBasis, Storage};
use warmswap_socket::{Connection, ConnectionError, Message};

/// Backends are looked at for what they have open this often; and this soon after one was given rings, ever more rarely then.
const INSPECT_EVERY: Nanos = Nanos::from_millis(5_000);
const INSPECT_SOON: Nanos = Nanos::from_millis(20);

/// How the core begins to say that a backend took too long.
const NOT_READY: &str = "it was not ready within";

/// Processes that were ended are looked at this often until they are gone.
const RETIRE_EVERY: Nanos = Nanos::from_millis(3);

/// A connection that could not be taken, because the system has no descriptor left, is tried again after this long.
const ACCEPT_AGAIN: Nanos = Nanos::from_millis(500);

/// Messages of one peer that are taken before the others are looked at again.
const MESSAGES_PER_WAKE: usize = 32;

pub(crate) use take_over::{Around, Kept};

/// One device.
pub(crate) struct Device {
    pub(crate) config: DeviceConfig,
    number: u16,
    pair: Pair,
    actions: Actions,
    events: VecDeque<Event>,
    fds: FdTable,
    memory: SharedMemory,
    listener: Option<OwnedFd>,
    /// Device and inode of the socket that the VMM connects to, once it is made.
    pub(crate) listening_at: Option<(u64, u64)>,
    /// When the listener, which could not take a connection, is watched again.
    accept_at: Option<Nanos>,
    vmm: Option<Connection>,
    /// The process that connected, where it can be told.
    vmm_process: Option<OwnedFd>,
    backends: Vec<Backend>,
    fences: Vec<Fence>,
    retired: Vec<Process>,
    watched: HashMap<u32, OwnedFd>,
    answers: HashMap<u64, Sender<Report>>,
    commands: u64,
    run_dir: RunDir,
    journal: JournalSender,
    spawner: Spawner,
    /// Starts that have not come back from the spawner yet.
    starting: usize,
    inspect_at: Nanos,
    inspect_after: Nanos,
    /// When the processes that were ended are looked at again.
    retire_at: Nanos,
    /// The VMM's socket may have something to read.
    vmm_readable: bool,
    unprovable: Option<String>,
    unprovable_noted: Option<BackendId>,
    inspector: Inspector,
    maps: Maps,
    states: StateMover,
    /// State of the device on its way from one backend to the next.
    state: Vec<u8>,
    offload: Offload,
    /// Process of the VMM, if the system says which.
    vmm_pid: Option<u32>,
    /// The VMM maps guest memory so that nobody else sees what the guest writes.
    private_memory: Option<String>,
    /// What was last refused of a ring, until one starts.
    refused_ring: Option<String>,
    last_failover_at: Option<SystemTime>,
    /// Why the last backend that was given up could never be connected to.
    unconnected: Option<String>,
    /// Journal entries of this step, handed over at its end.
    entries: Vec<Entry>,
    /// Tells the sampler, where there is one.
    reporter: Option<Reporter>,
    /// Keeps the device for the next broker, where there is a store.
    keeper: Option<keep::Keeper>,
    /// It began as one that is kept: its connections are only looked at, and watched accordingly.
    looks: bool,
    #[cfg(feature = "lab")]
    failpoint: Option<super::failpoint::Failpoint>,
}

/// The threads that work for devices.
pub(crate) struct Threads {
    pub(crate) spawner: Spawner,
    pub(crate) inspector: Inspector,
    pub(crate) maps: Maps,
    /// Carries device state.
    pub(crate) states: StateMover,
    /// Moves backends to where their role belongs.
    pub(crate) offload: Offload,
    /// Measures devices, where that is wanted.
    pub(crate) sampler: Option<Teller>,
    /// Keeps devices for the next broker, where there is a store.
    pub(crate) keeping: Option<Rc<RefCell<Keeping>>>,
}

/// Messages to one backend that leave together. Descriptors belong to the message that starts with the bytes they travel with, so
/// one with descriptors begins a batch.
#[derive(Debug, Default)]
struct Batch {
    backend: Option<BackendId>,
    bytes: Vec<u8>,
    fds: Vec<FdSlot>,
}

impl Batch {
    fn takes(&self, backend: BackendId, fds: &[FdSlot]) -> bool {
        self.backend == Some(backend) && fds.is_empty()
    }
}

impl Device {
    pub(crate) fn new(
        number: u16,
        config: DeviceConfig,
        journal: JournalSender,
        threads: Threads,
        now: Nanos,
    ) -> std::io::Result<Self> {
        let run_dir = RunDir::create(&config.run_dir, &config.name)?;
        let pair = Pair::new(config.pair.clone());
        let keeper = threads.keeping.as_ref().map(|keeping| keep::Keeper::open(keeping, &config.name)).transpose()?;
        let mut device = Device::around(number, config, journal, threads, (pair, run_dir, keeper), now);
        device.pair.start(now, &mut device.actions);
        Ok(device)
    }

    /// A device around a pair.
    fn around(
        number: u16,
        config: DeviceConfig,
        journal: JournalSender,
        threads: Threads,
        (pair, run_dir, keeper): (Pair, RunDir, Option<keep::Keeper>),
        now: Nanos,
    ) -> Self {
        let Threads { spawner, inspector, maps, states, offload, sampler, keeping: _ } = threads;
        let reporter = sampler.map(|teller| Reporter::new(number, &config, teller));
        Device {
            number,
            pair,
            actions: Actions::default(),
            events: VecDeque::new(),
            fds: FdTable::default(),
            memory: SharedMemory::default(),
            listener: None,
            listening_at: None,
            accept_at: None,
            vmm: None,
            vmm_process: None,
            backends: Vec::new(),
            fences: Vec::new(),
            retired: Vec::new(),
            watched: HashMap::new(),
            answers: HashMap::new(),
            commands: 0,
            run_dir,
            journal,
            spawner,
            starting: 0,
            inspect_at: now + INSPECT_EVERY,
            inspect_after: INSPECT_EVERY,
            retire_at: now,
            vmm_readable: false,
            unprovable: None,
            unprovable_noted: None,
            inspector,
            offload,
            maps,
            states,
            state: Vec::new(),
            vmm_pid: None,
            private_memory: None,
            refused_ring: None,
            last_failover_at: None,
            unconnected: None,
            entries: Vec::new(),
            reporter,
            looks: keeper.is_some(),
            keeper,
            #[cfg(feature = "lab")]
            failpoint: None,
            config,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// Writes to the journal, at the end of the step: waking the journal's thread is not free, and a failover does not wait for it.
    pub(crate) fn note(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Hands over the entries of this step.
    pub(crate) fn flush_journal(&mut self) {
        for entry in self.entries.drain(..) {
            self.journal.entry(&self.config.name, entry);
        }
    }

    /// Why the device could not start, if so.
    pub(crate) fn failed(&self) -> Option<String> {
        let reason = self.unprovable.as_deref().or(self.pair.failed())?;
        let unconnected = self.unconnected.as_ref().filter(|_| reason.starts_with(NOT_READY));
        Some(unconnected.map_or_else(|| reason.to_owned(), |why| format!("{reason}: {why}")))
    }

    /// Whether the VMM may connect and does not yet have a socket to connect to.
    pub(crate) fn wants_listener(&self) -> bool {
        self.listener.is_none() && self.pair.is_open()
    }

    /// Whether the VMM cannot connect to it yet.
    pub(crate) fn is_starting(&self) -> bool {
        self.listener.is_none()
    }

    pub(crate) fn listen(&mut self, listener: OwnedFd, poller: &Poller) -> std::io::Result<()> {
        poller.add(listener.as_fd(), self.token(PollSource::Listener), Interest::Read)?;
        self.listener = Some(listener);
        Ok(())
    }

    fn token(&self, source: PollSource) -> Token {
        Token { device: self.number, source }
    }

    /// Whether no backend process of ours is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.starting == 0 && self.backends.is_empty() && self.fences.is_empty() && self.retired.is_empty()
    }

    // --- time --------------------------------------------------------------------------------------------------------------

    pub(crate) fn next_timeout(&self) -> Option<Nanos> {
        let connects = self.backends.iter().filter_map(|backend| backend.connect_at);
        let fences = self.fences.iter().map(|fence| fence.check_at);
        let retired = (!self.retired.is_empty()).then_some(self.retire_at);
        connects
            .chain(fences)
            .chain(retired)
            .chain(self.accept_at)
            .chain(self.pair.next_timeout())
            .chain([self.inspect_at])
            .min()
    }

    /// Everything that depends on time alone.
    pub(crate) fn tick(&mut self, now: Nanos, poller: &Poller) {
        if now >= self.inspect_at {
            self.inspect(now);
        }
        if now >= self.retire_at {
            self.retire_at = now + RETIRE_EVERY;
            self.retired.retain_mut(|process| process.is_gone().is_err());
        }
        self.accept_again(now, poller);
        self.connect_backends(now, poller);
        self.look_at_fences(now, poller);
        self.events.push_back(Event::Tick);
        self.run(now, poller);
    }

    fn inspect(&mut self, now: Nanos) {
        self.inspect_after = Nanos(self.inspect_after.0.saturating_mul(8)).min(INSPECT_EVERY);
        self.inspect_at = now + self.inspect_after;
        for index in 0..self.backends.len() {
            if self.backends[index].link.is_some() {
                self.look_at(index);
            }
        }
    }

    /// Has the inspector look at a backend.
    fn look_at(&mut self, index: usize) {
        let backend = &mut self.backends[index];
        let Some(process) = &backend.process else { return };
        let (subject, process) = (process.subject(), process.shared_pidfd());
        let Some(storage) = backend.storage.take() else { return };
        let look = Look { device: self.number, backend: backend.id, subject, process, storage };
        if let Err(look) = self.inspector.look(look) {
            // It is busy; what is known stays, and the next round comes.
            backend.storage = Some(look.storage);
        }
    }

    /// The inspector has looked.
    pub(crate) fn inspected(&mut self, id: BackendId, storage: Storage, now: Nanos, poller: &Poller) {
        if self.keeper.is_some() {
            self.note_storage(id, storage.record());
        }
        if let Some(fence) = self.fences.iter_mut().find(|fence| fence.backend == id) {
            fence.storage = Some(storage);
            self.look_at_fences(now, poller);
        } else if let Some(index) = self.backends.iter().position(|backend| backend.id == id) {
            let (basis, rival) = (storage.basis(), storage.rival().map(str::to_owned));
            self.backends[index].storage = Some(storage);
            match self.backends[index].pending.take() {
                Some(connection) => {
                    if let Err(reason) = self.link_up(index, connection, &basis, rival, poller) {
                        self.events.push_back(Event::Exited { backend: id, reason });
                    }
                }
                None => self.note_basis(id, basis),
            }
        }
        self.run(now, poller);
    }

    /// Says so, once for each backend, when it becomes known that its death could not be proved.
    fn note_basis(&mut self, id: BackendId, basis: FenceBasis) {
        if let FenceBasis::Unprovable(reason) = basis
            && self.config.fence_command.is_none()
            && self.unprovable_noted != Some(id)
        {
            self.unprovable_noted = Some(id);
            let entry = Entry::error("FenceUnprovable").with("backend", id.0).with("reason", reason);
            let next = "use local storage, an engine whose I/O ends with the process (aio=threads, aio=native), or give \
                        --fence-command; a crash would wait for an operator";
            self.note(entry.with("next", next));
        }
    }

    // --- running the core --------------------------------------------------------------------------------------------------

    /// Feeds the core what happened and carries out what it wants, until both are done.
    pub(crate) fn run(&mut self, now: Nanos, poller: &Poller) {
        // What was looked at is taken away with the step that it leads to, not before.
        let taken = self.keeper.as_mut().map(keep::Keeper::take_taken).unwrap_or_default();
        self.act(now, poller);
        self.keeper.iter_mut().for_each(|keeper| keeper.give_back(&taken));
        while let Some(event) = self.events.pop_front() {
            // What an action took belongs to the phase it was made in.
            let now = super::now();
            let waiting = self.keeper.as_mut().map(keep::Keeper::stores);
            let mut memory = MemoryAccess { memory: &mut self.memory, fds: &mut self.fds, waiting };
            self.pair.handle(now, event, &mut memory, &mut self.actions);
            self.act(now, poller);
            if let Some(keeper) = &mut self.keeper {
                keeper.note(&mut self.pair);
            }
        }
        if self.keeper.as_ref().is_some_and(keep::Keeper::has_taken) {
            // It meant nothing to anybody.
            self.act(now, poller);
        }
        if let Some(reporter) = &mut self.reporter {
            reporter.report(&self.pair, &self.memory, &self.backends);
        }
    }

    pub(crate) fn act(&mut self, now: Nanos, poller: &Poller) {
        if self.keeper.is_some() {
            return self.act_kept(now, poller);
        }
        let mut actions = std::mem::take(&mut self.actions);
        let mut batch = Batch::default();
        for action in actions.drain() {
            #[cfg(feature = "lab")]
            self.strike_before(&action, &mut batch, poller);
            match action {
                Action::SendLink { backend, bytes, fds } => {
                    if !batch.takes(backend, &fds) {
                        self.send_link(&mut batch, poller);
                        batch.backend = Some(backend);
                        batch.fds = fds;
                    }
                    batch.bytes.extend_from_slice(&bytes);
                }
                other => {
                    self.send_link(&mut batch, poller);
                    self.carry_out(other, now, poller);
                }
            }
        }
        self.send_link(&mut batch, poller);
        self.actions = actions;
    }

    /// Kills backends before the action of the next failover that has this number.
    #[cfg(feature = "lab")]
    pub(crate) fn set_failpoint(&mut self, step: u32, whom: super::failpoint::Whom) {
        use super::failpoint::{Failpoint, Whom};
        if whom == Whom::Broker {
            self.failpoint = Some(Failpoint::of_broker(step));
            return;
        }
        let meant = |backend: &&Backend| match whom {
            Whom::Primary => backend.primary,
            Whom::Shadow => !backend.primary,
            Whom::Both => true,
            Whom::Broker => false,
        };
        let processes = self.backends.iter().filter(meant).filter_map(|backend| backend.process.as_ref());
        let victims = processes.map(Process::shared_pidfd).collect();
        self.failpoint = Some(Failpoint::new(step, victims));
    }

    /// Kills where a failpoint is reached. What was to be sent before is sent.
    #[cfg(feature = "lab")]
    fn strike_before(&mut self, action: &Action, batch: &mut Batch, poller: &Poller) {
        let failing_over = self.pair.is_failing_over();
        let Some(mut point) = self.failpoint.take_if(|point| !point.is_of_broker()) else { return };
        if point.reaches(failing_over) {
            self.send_link(batch, poller);
            let entry = point.strike(self.pair.status(super::now()).phase, action);
            self.entries.push(entry);
        } else if !point.is_passed(failing_over) {
            self.failpoint = Some(point);
        }
    }

    fn carry_out(&mut self, action: Action, now: Nanos, poller: &Poller) {
        match action {
            Action::SendVmm { bytes, fds } => self.send_vmm(&bytes, &fds, poller),
            Action::SendVmmBackend { channel, bytes } => self.send_vmm_backend(channel, &bytes),
            Action::DropVmm => self.vmm_gone("it sent what cannot be answered", poller),
            Action::SendLink { .. } => unreachable!("messages to backends are sent in batches"),
            Action::SendLinkBackend { backend, bytes } => self.answer_backend(backend, &bytes, poller),
            Action::Close(slot) => self.fds.close(slot),
            Action::Signal(slot) => self.fds.signal(slot),
            Action::Start { backend } => self.start_backend(backend, now),
            Action::Fence { backend } => self.fence(backend, now, poller),
            Action::Retire { backend } => self.retire(backend, poller),
            Action::OpenState { backend, direction } => self.open_state(backend, direction),
            Action::WatchKick { ring, kick } => self.watch_kick(ring, kick, poller),
            Action::UnwatchKick { ring } => self.unwatch_kick(ring, poller),
            Action::Assign { backend, primary } => {
                self.backend(backend).into_iter().for_each(|backend| backend.assign(primary));
                self.put_in_place(backend);
            }
            Action::Journal(entry) => {
                self.learn(&entry);
                self.entries.push(entry);
            }
            Action::Answer { command, report } => {
                if let Some(answer) = self.answers.remove(&command.0) {
                    // The asker may have gone away.
                    let _gone = answer.try_send(*report);
                }
            }
        }
    }

    /// Makes a channel for a backend's state. What was received last goes into the next one, once.
    fn open_state(&mut self, backend: BackendId, direction: StateDirection) {
        let state = std::mem::take(&mut self.state);
        let channel = self.states.open(self.number, backend, direction, state);
        let channel = channel.map(|fd| self.fds.insert(fd)).map_err(|error| error.to_string());
        self.events.push_back(Event::StateOpened { backend, channel });
    }

    /// A backend's state has left it, or got into it, or has not.
    pub(crate) fn state_moved(
        &mut self,
        backend: BackendId,
        moved: Result<Moved, String>,
        now: Nanos,
        poller: &Poller,
    ) {
        let size = moved.map(|moved| match moved {
            Moved::Received(state) => {
                self.state = state;
                self.state.len() as u64
            }
            Moved::Sent(size) => size,
        });
        self.events.push_back(Event::StateMoved { backend, size });
        self.run(now, poller);
    }

    /// Has a backend moved to where its role belongs.
    fn put_in_place(&self, id: BackendId) {
        let Some(backend) = self.backends.iter().find(|backend| backend.id == id) else { return };
        let Some(process) = backend.process.as_ref().filter(|process| process.is_ours()) else { return };
        let subject = process.subject();
        self.offload.put(Move { pid: subject.pid, group: subject.group, primary: backend.primary });
    }

    /// What `status` shows of what the journal says.
    fn learn(&mut self, entry: &Entry) {
        let text = |name: &str| {
            entry.properties.iter().find_map(|(known, value)| match value {
                Value::Text(text) if *known == name => Some(text.as_str()),
                _ => None,
            })
        };
        match entry.event {
            "FailoverSettled" | "FailoverHalted" => {
                self.last_failover_at = Some(SystemTime::now());
                if let Some(reporter) = &mut self.reporter {
                    reporter.freeze(entry.event);
                }
            }
            "RingStarted" => self.refused_ring = None,
            "MessageRefused" if text("peer") == Some("vmm") => {
                if let (Some(request), Some(reason)) = (text("request"), text("reason"))
                    && request.starts_with("SET_VRING")
                {
                    self.refused_ring = Some(format!("{request} was refused: {reason}"));
                }
            }
            _ => {}
        }
    }

    // --- the VMM -----------------------------------------------------------------------------------------------------------

    pub(crate) fn accept(&mut self, now: Nanos, poller: &Poller) {
        let Some(listener) = &self.listener else { return };
        let socket = match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            // Who was waiting has gone.
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(error) => {
                // Who waits goes on waiting, and is looked at again when there may be descriptors.
                poller.remove(listener.as_fd());
                self.accept_at = Some(now + ACCEPT_AGAIN);
                let entry = Entry::error("VmmRefused").with("reason", format!("it cannot be accepted: {error}"));
                return self.entries.push(entry.with("next", "tried again every half second"));
            }
        };
        let kept = self.keep_at_once(socket.as_fd());
        if !self.welcome(socket, kept, now, poller) {
            self.let_go(kept);
        }
    }

    /// Takes a VMM's connection, which is `kept` under that name; false if it is not wanted.
    fn welcome(&mut self, socket: OwnedFd, kept: Option<u32>, now: Nanos, poller: &Poller) -> bool {
        // A VMM that reconnects at once is seen before the end of its last connection. And one that has died may have left its end
        // of the connection in hands that keep it open: ours, or a backend's.
        if self.vmm.as_ref().is_some_and(Connection::is_hung_up) {
            self.lose_vmm("it connected again", now, poller);
        } else if self.vmm_process.as_ref().is_some_and(|process| has_ended(process.as_fd())) {
            self.lose_vmm("its process has ended, and another one connects", now, poller);
        }
        if self.vmm.is_some() {
            let entry = Entry::warning("VmmRefused").with("reason", "another VMM is connected to this device already");
            self.entries.push(entry);
            return false;
        }
        let Ok(mut connection) = Connection::new(socket) else { return false };
        self.keep_connection(&mut connection);
        if poller.add(connection.as_fd(), self.token(PollSource::Vmm), Interest::Edge).is_err() {
            return false;
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.vmm = kept;
        }
        // A VMM that is gone already, or lives in another process namespace, is served without knowing its process.
        let peer = process::peer(connection.as_fd()).ok().filter(|(pid, _)| *pid != 0);
        self.vmm_pid = peer.as_ref().map(|(pid, _)| *pid);
        self.vmm_process = peer.and_then(|(pid, process)| process.or_else(|| open_pidfd(pid).ok()));
        self.vmm = Some(connection);
        self.private_memory = None;
        self.vmm_readable = true;
        self.events.push_back(Event::VmmConnected);
        self.run(now, poller);
        true
    }

    /// Watches the listener again after a connection could not be taken.
    fn accept_again(&mut self, now: Nanos, poller: &Poller) {
        if self.accept_at.is_none_or(|at| at > now) {
            return;
        }
        let watched = self.listener.as_ref().is_none_or(|listener| {
            poller.add(listener.as_fd(), self.token(PollSource::Listener), Interest::Read).is_ok()
        });
        self.accept_at = (!watched).then_some(now + ACCEPT_AGAIN);
    }

    /// The VMM has sent something, or has read what it was sent.
    pub(crate) fn vmm_is_ready(&mut self, now: Nanos, poller: &Poller) {
        self.vmm_readable = true;
        let token = self.token(PollSource::Vmm);
        let Some(vmm) = &mut self.vmm else { return };
        if let Err(error) = vmm.flush().and_then(|()| watch_room(vmm, token, Interest::Edge, poller)) {
            self.lose_vmm(&error.to_string(), now, poller);
        }
    }

    /// Whether there may be requests that could be read at once.
    pub(crate) fn has_more(&self) -> bool {
        self.keeper.as_ref().is_some_and(keep::Keeper::has_more) || self.has_vmm_more()
    }

    fn has_vmm_more(&self) -> bool {
        self.vmm_readable && self.vmm.is_some() && self.pair.wants_request()
    }

    /// Reads requests, one at a time, while there are any and the core wants them. Many are read in several steps: the event queue
    /// tells only once that they came, [`Device::has_more`] as long as they are there.
    pub(crate) fn read_vmm(&mut self, now: Nanos, poller: &Poller) {
        self.read_more(now, poller);
        for _ in 0..MESSAGES_PER_WAKE {
            if !self.has_vmm_more() {
                return;
            }
            let Some(vmm) = &mut self.vmm else { return };
            match vmm.receive() {
                Ok(Some(mut message)) => {
                    self.note_taken(Channel::Vmm, &mut message);
                    self.vmm_message(message);
                }
                Ok(None) => {
                    self.vmm_readable = false;
                    return;
                }
                Err(error) => return self.lose_vmm(&error.to_string(), now, poller),
            }
            self.run(now, poller);
        }
    }

    fn lose_vmm(&mut self, reason: &str, now: Nanos, poller: &Poller) {
        self.vmm_gone(reason, poller);
        self.run(now, poller);
    }

    fn vmm_message(&mut self, message: Message) {
        let Message { header, payload, fds } = message;
        let slots: Vec<FdSlot> = fds.into_iter().map(|fd| self.fds.insert(fd)).collect();
        let need_reply = header.needs_reply();
        let refuse = |request, reason| Event::VmmRefused { request, reason, need_reply };
        let checked = |request: &Request| self.vmm.as_ref().map_or(Ok(()), |vmm| self.fds.check(request, vmm.as_fd()));
        match Request::decode(&header, &payload, &slots).map(|request| checked(&request).map(|()| request)) {
            Ok(Ok(request)) => {
                match request {
                    Request::RemMemReg(_) => slots.into_iter().for_each(|slot| self.fds.close(slot)),
                    Request::SetMemTable(_) | Request::AddMemReg { .. } => self.look_at_memory(&slots),
                    _ => {}
                }
                self.events.push_back(Event::VmmRequest { request, need_reply });
            }
            Ok(Err(reason)) => {
                slots.into_iter().for_each(|slot| self.fds.close(slot));
                self.events.push_back(refuse(header.request, reason));
            }
            Err(error) => {
                slots.into_iter().for_each(|slot| self.fds.close(slot));
                self.events.push_back(refuse(header.request, error.to_string()));
            }
        }
    }

    /// Has the VMM's own mappings of what it gives as memory looked at.
    fn look_at_memory(&mut self, slots: &[FdSlot]) {
        let Some(vmm) = self.vmm_pid else { return };
        let stats = slots.iter().filter_map(|slot| rustix::fs::fstat(self.fds.get(*slot)?).ok());
        let files = stats.map(|stat| maps::File { device: stat.st_dev, inode: stat.st_ino }).collect();
        self.maps.look(maps::Look { device: self.number, vmm, files });
    }

    /// The VMM's mappings have been looked at.
    pub(crate) fn memory_looked(&mut self, vmm: u32, private: bool) {
        if !private || self.vmm_pid != Some(vmm) || self.vmm.is_none() || self.private_memory.is_some() {
            return;
        }
        let reason = "the VMM maps the guest's RAM privately, so what the guest writes reaches no backend";
        let next =
            "start the VMM with shared memory (QEMU: memory-backend-memfd,share=on; libvirt: <access mode='shared'/>)";
        self.private_memory = Some(format!("{reason}: {next}"));
        let entry = Entry::error("GuestMemoryPrivate").with("vmm_pid", vmm).with("reason", reason).with("next", next);
        self.entries.push(entry);
    }

    fn vmm_gone(&mut self, reason: &str, poller: &Poller) {
        self.vmm_process = None;
        if let Some(vmm) = self.vmm.take() {
            poller.remove(vmm.as_fd());
            hang_up(&vmm);
            self.events.push_back(Event::VmmGone { reason: reason.to_owned() });
        }
    }

    /// Brings the rings to rest as if the VMM had disconnected.
    pub(crate) fn shut_down(&mut self, now: Nanos, poller: &Poller) {
        self.listener = None;
        self.pair.end();
        self.vmm_gone("warmswap is ending", poller);
        self.run(now, poller);
    }

    /// Whether the rings of the last session are still being brought to rest.
    pub(crate) fn is_closing(&self) -> bool {
        self.pair.is_closing()
    }

    /// Rings that are served, or should be.
    pub(crate) fn rings(&self) -> usize {
        self.pair.status(super::now()).rings.len()
    }

    /// Says how the program's end went for this device.
    pub(crate) fn note_end(&mut self, rings: usize, took: Nanos) {
        let entry = if self.is_closing() {
            let reason =
                "not every ring came to rest in time: the next broker may repeat requests, or miss that some are done";
            Entry::error("Ended").with("at_rest", false).with("reason", reason)
        } else {
            Entry::info("Ended").with("at_rest", true)
        };
        let rings = rings as u64;
        self.note(entry.with("rings", rings).with("took_us", Value::Micros(took.as_micros())));
    }

    /// Kills everything that is left.
    pub(crate) fn kill_all(&mut self, poller: &Poller) {
        let ids: Vec<BackendId> = self.backends.iter().map(|backend| backend.id).collect();
        ids.into_iter().for_each(|id| self.retire(id, poller));
        self.retired.extend(self.fences.drain(..).map(|fence| fence.process));
        self.retired.retain_mut(|process| {
            process.kill();
            process.is_gone().is_err()
        });
    }

    fn send_vmm(&mut self, bytes: &[u8], fds: &[FdSlot], poller: &Poller) {
        let token = self.token(PollSource::Vmm);
        let Some(vmm) = &mut self.vmm else { return };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().filter_map(|slot| self.fds.get(*slot)).collect();
        if let Err(error) = vmm.send(bytes, &fds).and_then(|()| watch_room(vmm, token, Interest::Edge, poller)) {
            self.vmm_gone(&error.to_string(), poller);
        }
    }

    fn send_vmm_backend(&mut self, channel: FdSlot, bytes: &[u8]) {
        if let Some(channel) = self.fds.get(channel) {
            let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
            // A VMM that does not read its own channel misses a notification; its main channel tells if it is gone.
            let _unread = rustix::net::send(channel, bytes, flags);
        }
    }

    // --- backends ----------------------------------------------------------------------------------------------------------

    fn backend(&mut self, id: BackendId) -> Option<&mut Backend> {
        self.backends.iter_mut().find(|backend| backend.id == id)
    }

    fn start_backend(&mut self, id: BackendId, now: Nanos) {
        if let Err(reason) = self.try_start(id, now) {
            self.events.push_back(Event::Exited { backend: id, reason });
        }
    }

    /// A primary, and whoever is to take over in a failover, is started whatever it takes.
    fn admission(&self, id: BackendId) -> Wanted {
        let primary = self.pair.primary();
        if primary == Some(id) || self.pair.is_failing_over() {
            return Wanted::AtAnyCost;
        }
        let primary = self.backends.iter().find(|backend| Some(backend.id) == primary);
        Wanted::WhereThereIsRoom { primary: primary.and_then(|backend| Some(backend.process.as_ref()?.pid)) }
    }

    fn try_start(&mut self, id: BackendId, now: Nanos) -> Result<(), String> {
        match &self.config.source {
            Source::Command(command) => {
                let path = self.run_dir.socket(id.0);
                let start = Start {
                    device: self.number,
                    backend: id,
                    command: command.clone(),
                    path: path.clone(),
                    group: crate::cgroup::name(&self.config.name, id.0),
                    admission: self.admission(id),
                };
                if !self.spawner.spawn(start) {
                    return Err("too many processes wait to be started".to_owned());
                }
                self.starting += 1;
                self.backends.push(Backend::new(id, path, None));
            }
            Source::External { primary, shadow } => {
                let taken: Vec<PathBuf> = self.backends.iter().map(|backend| backend.path.clone()).collect();
                let path = backends::external_path(primary, shadow.as_deref(), &taken)?;
                self.backends.push(Backend::new(id, path, Some(now)));
            }
        }
        Ok(())
    }

    /// A process that was asked for is there, or is not.
    pub(crate) fn spawned(&mut self, id: BackendId, process: Result<Process, String>, now: Nanos, poller: &Poller) {
        self.starting -= 1;
        let at = self.backends.iter().position(|backend| backend.id == id);
        match (process, at) {
            (Ok(process), Some(at)) => {
                let entry = Entry::info("BackendStarted").with("backend", id.0).with("pid", process.pid);
                self.entries.push(entry);
                self.backends[at].process = Some(process);
                self.backends[at].connect_at = Some(now);
                self.watch_process(&self.backends[at], poller);
                self.put_in_place(id);
                self.note_change();
            }
            // Given up in the meantime.
            (Ok(process), None) => {
                process.kill();
                self.retired.push(process);
            }
            (Err(reason), _) => self.events.push_back(Event::Exited { backend: id, reason }),
        }
        self.run(now, poller);
    }

    fn watch_process(&self, backend: &Backend, poller: &Poller) {
        let Some(process) = &backend.process else { return };
        let id = backend.id.0;
        // If it cannot be watched its link still tells of its end.
        let _unwatched = poller.add(process.pidfd(), self.token(PollSource::Process(id)), Interest::Read);
        if let Some(stderr) = process.stderr() {
            let _unwatched = poller.add(stderr, self.token(PollSource::Output(id)), Interest::Read);
        }
    }

    fn connect_backends(&mut self, now: Nanos, poller: &Poller) {
        for index in 0..self.backends.len() {
            if self.backends[index].connect_at.is_none_or(|at| at > now) {
                continue;
            }
            let external = self.backends[index].process.is_none();
            let id = self.backends[index].id;
            let others = self.backends.iter().filter(|other| other.id != id);
            let others: Vec<u32> = others.filter_map(|other| Some(other.process.as_ref()?.pid)).collect();
            match self.backends[index].connect(now, &others) {
                Ok(None) => {}
                Ok(Some(connection)) => {
                    if external {
                        self.watch_process(&self.backends[index], poller);
                    }
                    self.backends[index].pending = Some(connection);
                    self.look_at(index);
                }
                Err(reason) => self.events.push_back(Event::Exited { backend: id, reason }),
            }
        }
    }

    fn link_up(
        &mut self,
        index: usize,
        connection: Connection,
        basis: &FenceBasis,
        rival: Option<String>,
        poller: &Poller,
    ) -> Result<(), String> {
        let id = self.backends[index].id;
        if let Some(rival) = rival {
            let reason =
                format!("{rival}: two guards on one image would be two virtual machines that overwrite each other");
            if !self.pair.is_open() {
                self.unprovable = Some(reason.clone());
            }
            self.release_foreign(index, poller);
            return Err(reason);
        }
        if let FenceBasis::Unprovable(reason) = basis
            && self.config.fence_command.is_none()
        {
            let reason = format!(
                "its death could not be proved harmless: {reason}. Use local storage, an engine whose I/O ends with the process \
                 (aio=threads, aio=native), or give --fence-command"
            );
            if !self.pair.is_open() {
                self.unprovable = Some(reason.clone());
            }
            self.release_foreign(index, poller);
            return Err(reason);
        }
        let fail = |error: Errno| error.to_string();
        let mut connection = connection;
        self.keep_connection(&mut connection);
        poller
            .add(connection.as_fd(), self.token(PollSource::Link(id.0)), self.interest())
            .map_err(|e| e.to_string())?;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail)?;
        let mut requests = Connection::new(ours).map_err(|error| error.to_string())?;
        self.keep_connection(&mut requests);
        poller
            .add(requests.as_fd(), self.token(PollSource::Requests(id.0)), self.interest())
            .map_err(|e| e.to_string())?;
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(fail);
        let [kick, call, probe] = [event()?, event()?, event()?].map(|fd| self.fds.insert(fd));
        let private = PrivateEvents { kick, call, probe };
        let backend_req = Some(self.fds.insert(theirs));
        self.backends[index].link = Some(connection);
        self.backends[index].requests = Some(requests);
        self.events.push_back(Event::LinkUp { backend: id, backend_req, private });
        Ok(())
    }

    /// A process of somebody else's that is not taken as a backend is not killed either.
    fn release_foreign(&mut self, index: usize, poller: &Poller) {
        if let Some(process) = self.backends[index].process.take_if(|process| !process.is_ours()) {
            poller.remove(process.pidfd());
        }
    }

    pub(crate) fn read_link(&mut self, id: u64, now: Nanos, poller: &Poller) {
        let token = self.token(PollSource::Link(id));
        let interest = self.interest();
        let id = BackendId(id);
        let Some(link) = self.backend(id).and_then(|backend| backend.link.as_mut()) else { return };
        if let Err(error) = link.flush().and_then(|()| watch_room(link, token, interest, poller)) {
            return self.lose_link(id, &error, now, poller);
        }
        for _ in 0..MESSAGES_PER_WAKE {
            let Some(link) = self.backend(id).and_then(|backend| backend.link.as_mut()) else { return };
            match link.receive() {
                Ok(Some(mut message)) => {
                    self.note_taken(Channel::Link(id.0), &mut message);
                    let Message { header, payload, fds } = message;
                    let fds = fds.into_iter().map(|fd| self.fds.insert(fd)).collect();
                    self.events.push_back(Event::LinkMessage { backend: id, header, payload, fds });
                    self.run(now, poller);
                }
                Ok(None) => return,
                Err(error) => return self.lose_link(id, &error, now, poller),
            }
        }
        self.note_more(PollSource::Link(id.0));
    }

    fn lose_link(&mut self, id: BackendId, error: &ConnectionError, now: Nanos, poller: &Poller) {
        self.drop_link(id, poller);
        let reason = format!("its link ended: {error}");
        self.events.push_back(Event::LinkDown { backend: id, reason });
        self.run(now, poller);
    }

    fn drop_link(&mut self, id: BackendId, poller: &Poller) {
        let Some(backend) = self.backends.iter_mut().find(|backend| backend.id == id) else { return };
        backend.kept = (None, None);
        for connection in [backend.link.take(), backend.requests.take()].into_iter().flatten() {
            poller.remove(connection.as_fd());
            hang_up(&connection);
        }
    }

    fn send_link(&mut self, batch: &mut Batch, poller: &Poller) {
        let Batch { backend: Some(id), bytes, fds: slots } = std::mem::take(batch) else { return };
        let token = self.token(PollSource::Link(id.0));
        let interest = self.interest();
        let Some(backend) = self.backends.iter_mut().find(|backend| backend.id == id) else { return };
        let Some(link) = &mut backend.link else { return };
        // A ring begins with its kick; a message with a descriptor stands at the beginning.
        if backend.given_at.is_none() && bytes.starts_with(&(RequestCode::SetVringKick as u32).to_ne_bytes()) {
            let now = super::now();
            backend.given_at = Some(now);
            self.inspect_after = INSPECT_SOON;
            self.inspect_at = now + INSPECT_SOON;
        }
        let fds: Vec<BorrowedFd<'_>> = slots.iter().filter_map(|slot| self.fds.get(*slot)).collect();
        assert_eq!(fds.len(), slots.len(), "a message names a descriptor that is closed");
        if let Err(error) = link.send(&bytes, &fds).and_then(|()| watch_room(link, token, interest, poller)) {
            self.drop_link(id, poller);
            self.events.push_back(Event::LinkDown { backend: id, reason: format!("its link ended: {error}") });
        }
    }

    pub(crate) fn read_requests(&mut self, id: u64, now: Nanos, poller: &Poller) {
        let token = self.token(PollSource::Requests(id));
        let interest = self.interest();
        let id = BackendId(id);
        if let Some(requests) = self.backend(id).and_then(|backend| backend.requests.as_mut()) {
            // A channel that has failed is found when it is read.
            let _failed = requests.flush().and_then(|()| watch_room(requests, token, interest, poller));
        }
        for _ in 0..MESSAGES_PER_WAKE {
            let Some(requests) = self.backend(id).and_then(|backend| backend.requests.as_mut()) else { return };
            match requests.receive() {
                Ok(Some(mut message)) => {
                    self.note_taken(Channel::Requests(id.0), &mut message);
                    let Message { header, payload, fds } = message;
                    let slots: Vec<FdSlot> = fds.into_iter().map(|fd| self.fds.insert(fd)).collect();
                    match BackendRequest::decode(&header, &payload, &slots) {
                        Ok(request) => {
                            let need_reply = header.needs_reply();
                            self.events.push_back(Event::BackendRequest { backend: id, request, need_reply });
                        }
                        Err(error) => {
                            slots.into_iter().for_each(|slot| self.fds.close(slot));
                            let entry = Entry::warning("MessageRefused").with("peer", "backend").with("backend", id.0);
                            self.entries.push(entry.with("reason", error.to_string()));
                        }
                    }
                    self.run(now, poller);
                }
                Ok(None) => return,
                Err(_) => return self.drop_requests(id, poller),
            }
        }
        self.note_more(PollSource::Requests(id.0));
    }

    fn drop_requests(&mut self, id: BackendId, poller: &Poller) {
        if let Some(backend) = self.backend(id)
            && let Some(requests) = backend.requests.take()
        {
            backend.kept.1 = None;
            poller.remove(requests.as_fd());
            hang_up(&requests);
        }
    }

    fn answer_backend(&mut self, id: BackendId, bytes: &[u8], poller: &Poller) {
        let token = self.token(PollSource::Requests(id.0));
        let interest = self.interest();
        let Some(requests) = self.backend(id).and_then(|backend| backend.requests.as_mut()) else { return };
        if requests.send(bytes, &[]).and_then(|()| watch_room(requests, token, interest, poller)).is_err() {
            // One that does not read its answers loses the channel; whether it is well its link tells.
            self.drop_requests(id, poller);
        }
    }

    /// A process ended.
    pub(crate) fn process_ended(&mut self, id: u64, now: Nanos, poller: &Poller) {
        let id = BackendId(id);
        if let Some(fence) = self.fences.iter_mut().find(|fence| fence.backend == id) {
            // It stays readable, also while a tracer keeps the exit from being collected. The fence looks again by itself.
            poller.remove(fence.process.pidfd());
            self.look_at_fences(now, poller);
            return self.run(now, poller);
        }
        let Some(process) = self.backend(id).and_then(|backend| backend.process.as_mut()) else { return };
        poller.remove(process.pidfd());
        let pid = process.pid;
        let how = process.reap().unwrap_or("ended, and its exit is held back: is it being traced?");
        let reason = format!("process {pid}: {how}");
        self.events.push_back(Event::Exited { backend: id, reason });
        self.run(now, poller);
    }

    pub(crate) fn read_output(&mut self, id: u64) {
        let name = self.config.name.clone();
        let journal = self.journal.clone();
        if let Some(process) = self.backend(BackendId(id)).and_then(|backend| backend.process.as_mut()) {
            process.read_stderr(&mut |line| journal.output(&name, id, line));
        }
    }

    fn fence(&mut self, id: BackendId, now: Nanos, poller: &Poller) {
        // A process that is dying anyway is not asked how it is.
        let alive = self.backend(id).is_some_and(|backend| backend.link.is_some());
        self.drop_link(id, poller);
        let Some(at) = self.backends.iter().position(|backend| backend.id == id) else {
            // It never came to life.
            let evidence = "the process was never started".to_owned();
            self.events.push_back(Event::Fenced { backend: id, level: FenceLevel::Reaped, evidence });
            return;
        };
        let mut backend = self.backends.remove(at);
        let Some(process) = backend.process.take() else {
            let evidence = "it was never connected to".to_owned();
            self.events.push_back(Event::Fenced { backend: id, level: FenceLevel::Reaped, evidence });
            return;
        };
        if let Some(stderr) = process.stderr() {
            poller.remove(stderr);
        }
        let entry = Entry::info("Fencing").with("backend", id.0).with("pid", process.pid);
        let state = if alive { process.state_hint() } else { String::new() };
        let state = state.trim_matches([' ', '(', ')']).trim_start_matches("it is ");
        self.entries.push(if state.is_empty() { entry } else { entry.with("state", state) });
        self.fences.push(Fence::raise(
            id,
            process,
            backend.storage,
            backend.recorded,
            backend.given_at,
            self.config.fence_command.clone(),
            now,
        ));
        self.look_at_fences(now, poller);
    }

    /// Whether a process may have been started on this thread: by a fence, for the operator's command.
    pub(crate) fn may_run_command(&self) -> bool {
        self.config.fence_command.is_some() && !self.fences.is_empty()
    }

    fn look_at_fences(&mut self, now: Nanos, poller: &Poller) {
        if self.fences.is_empty() {
            return;
        }
        let name = self.config.name.clone();
        let mut at = 0;
        while at < self.fences.len() {
            let fence = &mut self.fences[at];
            let backend = fence.backend;
            match fence.look(&name, now) {
                Progress::Proved { level, evidence } => {
                    // Others have copies of its descriptor, and it stays readable as long as one is open.
                    poller.remove(self.fences.remove(at).process.pidfd());
                    self.events.push_back(Event::Fenced { backend, level, evidence });
                    continue;
                }
                Progress::Overdue(reason) => self.events.push_back(Event::FenceWaiting { backend, reason }),
                Progress::Waiting => {}
            }
            if let Some(mark) = self.fences[at].unexplained(now) {
                self.inspector.search(Search { device: self.number, backend, mark });
            }
            at += 1;
        }
    }

    /// Who holds what a dead backend had open: said in the next report.
    pub(crate) fn holder_found(&mut self, id: BackendId, holder: String) {
        if let Some(fence) = self.fences.iter_mut().find(|fence| fence.backend == id) {
            fence.holder = Some(holder);
        }
    }

    /// Ends a backend that serves nothing.
    fn retire(&mut self, id: BackendId, poller: &Poller) {
        self.drop_link(id, poller);
        let Some(at) = self.backends.iter().position(|backend| backend.id == id) else { return };
        let mut backend = self.backends.remove(at);
        if backend.connect_at.is_some() && !backend.connect_error.is_empty() {
            let who = match (&backend.process, &self.config.source) {
                (Some(process), Source::Command(command)) => format!("{}, process {},", command[0], process.pid),
                _ => "the backend".to_owned(),
            };
            self.unconnected = Some(format!("{who} did not listen where it should ({})", backend.connect_error));
        }
        if let Some(mut process) = backend.process.take() {
            poller.remove(process.pidfd());
            if let Some(stderr) = process.stderr() {
                poller.remove(stderr);
            }
            // Somebody else's process that was not looked at yet is no backend of ours: it may be that of another guard.
            if !process.is_ours() && backend.pending.is_some() {
                return;
            }
            process.kill();
            if process.is_gone().is_err() {
                self.retired.push(process);
            }
        }
        // Where a backend listened is free again.
        let _gone = std::fs::remove_file(self.run_dir.socket(id.0));
    }

    // --- rings -------------------------------------------------------------------------------------------------------------

    fn watch_kick(&mut self, ring: u32, kick: FdSlot, poller: &Poller) {
        self.unwatch_kick(ring, poller);
        let Some(Ok(copy)) = self.fds.get(kick).map(|fd| fd.try_clone_to_owned()) else { return };
        if poller.watch_once(copy.as_fd(), self.token(PollSource::Kick(ring))).is_ok() {
            self.watched.insert(ring, copy);
        }
    }

    fn unwatch_kick(&mut self, ring: u32, poller: &Poller) {
        if let Some(kick) = self.watched.remove(&ring) {
            poller.unwatch(kick.as_fd(), self.token(PollSource::Kick(ring)));
        }
    }

    pub(crate) fn kicked(&mut self, ring: u32, now: Nanos, poller: &Poller) {
        self.unwatch_kick(ring, poller);
        self.events.push_back(Event::Kicked { ring });
        self.run(now, poller);
    }

    // --- commands ----------------------------------------------------------------------------------------------------------

    pub(crate) fn request_failover(
        &mut self,
        at_once: bool,
        reason: String,
        answer: Sender<Report>,
        now: Nanos,
        poller: &Poller,
    ) {
        self.commands += 1;
        let command = CommandId(self.commands);
        self.answers.insert(command.0, answer);
        self.events.push_back(Event::FailoverRequested { command, now: at_once, reason });
        self.run(now, poller);
    }

    /// What was negotiated, and where rings stand, but not during a failover.
    pub(crate) fn negotiated(&self) -> Option<Negotiated> {
        let rings = || self.pair.status(super::now()).rings;
        let quiet = !self.pair.is_failing_over();
        quiet.then(|| Negotiated { session: self.pair.session().encode(), rings: rings() })
    }

    /// The failure model has an alarm.
    pub(crate) fn failure_predicted(&mut self, foresight: Foresight, now: Nanos, poller: &Poller) {
        self.events.push_back(Event::FailurePredicted(foresight));
        self.run(now, poller);
    }

    /// Replaces the shadow by a newly started one, as if its process had ended. Answers with the generation of the one that goes.
    pub(crate) fn refresh(&mut self, now: Nanos, poller: &Poller) -> Result<u64, String> {
        let status = self.pair.status(super::now());
        if !matches!(status.state, PairState::Protected | PairState::Unprotected) {
            return Err(format!("the device is {}: its shadow cannot be replaced now", status.state.name()));
        }
        // Where there is none a new one is being waited for already.
        let Some(shadow) = status.shadow else { return Ok(0) };
        let reason = "the operator wants a newly started one".to_owned();
        self.events.push_back(Event::Exited { backend: shadow.id, reason });
        self.run(now, poller);
        Ok(shadow.id.0)
    }

    pub(crate) fn status(&self) -> DeviceStatus {
        let process = |id: Option<BackendId>| {
            let backend = self.backends.iter().find(|backend| Some(backend.id) == id)?;
            Some(backend.process.as_ref()?.pid)
        };
        let status = self.pair.status(super::now());
        let primary = status.primary.as_ref().map(|backend| backend.id);
        let provable = self.backends.iter().find(|backend| Some(backend.id) == primary);
        // Before it has been looked at nothing is known; afterwards it is with the inspector now and then.
        let basis = provable.filter(|backend| backend.link.is_some()).map(|backend| backend.storage.as_ref());
        let fence = match (&self.config.fence_command, basis.map(|storage| storage.map(Storage::basis))) {
            (Some(_), _) => Some("target"),
            (None, None) => None,
            (None, Some(Some(FenceBasis::Unprovable(_)))) => Some("unprovable"),
            (None, Some(_)) => Some("reaped"),
        };
        DeviceStatus {
            primary_pid: process(primary),
            shadow_pid: process(status.shadow.as_ref().map(|backend| backend.id)),
            fence,
            descriptors: self.fds.len(),
            misconfigured: self.private_memory.clone().or_else(|| self.refused_ring.clone()),
            last_failover_at: self.last_failover_at,
            late: 0,
            late_worst: Nanos(0),
            configuration: None,
            pair: status,
        }
    }
}

/// Ends a connection for its peer, too, where a copy of it lies in the descriptor store.
fn hang_up(connection: &Connection) {
    if connection.looks_only() {
        // It may have ended already.
        let _ended = rustix::net::shutdown(connection.as_fd(), rustix::net::Shutdown::Both);
    }
}

/// Has the event queue tell when a peer reads again, while there is something unsent and no longer.
fn watch_room(
    connection: &mut Connection,
    token: Token,
    interest: Interest,
    poller: &Poller,
) -> Result<(), ConnectionError> {
    let Some(room) = connection.room_wanted() else { return Ok(()) };
    poller
        .watch_room(connection.as_fd(), token, interest, room)
        .map_err(|error| ConnectionError::Socket(Errno::from_io_error(&error).unwrap_or(Errno::IO)))
}

/// A device at one moment.
#[derive(Clone, Debug)]
pub(crate) struct DeviceStatus {
    /// What the core says.
    pub(crate) pair: Status,
    /// Process of the primary.
    pub(crate) primary_pid: Option<u32>,
    /// Process of the shadow.
    pub(crate) shadow_pid: Option<u32>,
    /// What the primary's death would prove; none while it is not known yet.
    pub(crate) fence: Option<&'static str>,
    /// What is wrong with what the VMM was told.
    pub(crate) misconfigured: Option<String>,
    /// When the last failover ended.
    pub(crate) last_failover_at: Option<SystemTime>,
    /// How often the control thread was late, and the worst of it.
    pub(crate) late: u64,
    /// See `late`.
    pub(crate) late_worst: Nanos,
    /// Number of the configuration that the process goes by, where that can be changed, and whether it has undone a newer one.
    pub(crate) configuration: Option<(u64, bool)>,
    /// Descriptors in the device's table.
    pub(crate) descriptors: usize,
}
