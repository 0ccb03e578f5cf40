//! Going on with a device that a broker before this one has kept.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use warmswap_core::{BackendId, Entry, Event, Nanos, Pair, Value};
use warmswap_socket::Connection;
use warmswap_wire::FdSlot;

use super::super::backends::Backend;
use super::super::fence::Fence;
use super::super::keeping::{
    BackendRecord, ConnectionRecord, FORMAT, FenceRecord, Keeping, Outbox, ProcessRecord, Record, Shell, Taken,
    VmmRecord,
};
use super::super::poller::{Interest, Poller, Source as PollSource};
use super::keep::{Keeper, names_of};
use super::{Device, Threads};
use crate::cgroup::Janitor;
use crate::config::DeviceConfig;
use crate::fds::FdTable;
use crate::journal::JournalSender;
use crate::process::{Process, RunDir};
use crate::shm::{MemoryAccess, SharedMemory};
use crate::storage::Storage;

/// What was kept of a device, read and found to be whole.
pub(crate) struct Kept {
    record: Record<Pair>,
    taken: Taken,
}

impl Kept {
    /// Reads what was kept of a device.
    ///
    /// # Errors
    /// It was written by a broker whose records this one does not understand.
    pub(crate) fn read(taken: Taken) -> Result<Self, String> {
        let record: Record<Pair> = serde_json::from_slice(&taken.record)
            .map_err(|error| format!("its record cannot be read ({error}); {WITH_THE_OTHER}"))?;
        if record.format != FORMAT {
            let found = record.format;
            return Err(format!("its record has format {found}, expected {FORMAT}; {WITH_THE_OTHER}"));
        }
        Ok(Kept { record, taken })
    }

    /// Control groups of the backends that live on.
    pub(crate) fn groups(&self) -> Vec<std::path::PathBuf> {
        let shell = &self.record.shell;
        let of_backends = shell.backends.iter().filter_map(|backend| backend.process.as_ref());
        let processes = of_backends.chain(shell.fences.iter().map(|fence| &fence.process)).chain(&shell.retired);
        processes.filter_map(|process| process.group.clone()).collect()
    }
}

/// What to do about a record that is not understood.
const WITH_THE_OTHER: &str = "start the version that wrote it, which goes on with the device";

/// What a device that is gone on with finds around it.
#[derive(Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) janitor: &'a Janitor,
    pub(crate) poller: &'a Poller,
    pub(crate) now: Nanos,
}

/// Whether a descriptor is a connection that came in at this path.
fn leads_to(fd: BorrowedFd<'_>, path: &Path) -> bool {
    let here =
        rustix::net::getsockname(fd).ok().and_then(|address| rustix::net::SocketAddrUnix::try_from(address).ok());
    let here = here.is_some_and(|address| address.path_bytes() == Some(path.as_os_str().as_bytes()));
    here && rustix::net::getpeername(fd).is_ok()
}

/// Descriptors that were kept, by name.
struct Inherited<'a> {
    keeping: &'a Rc<RefCell<Keeping>>,
    missing: Vec<u32>,
}

impl Inherited<'_> {
    fn take(&mut self, name: u32) -> Option<OwnedFd> {
        let fd = self.keeping.borrow_mut().inherited(name);
        if fd.is_none() {
            self.missing.push(name);
        }
        fd
    }

    fn process(&mut self, record: &ProcessRecord, janitor: &Janitor) -> Option<Process> {
        let pidfd = self.take(record.pidfd)?;
        let stderr = record.stderr.and_then(|name| self.take(name));
        Some(Process::inherit(record, pidfd, stderr, janitor))
    }
}

impl Device {
    /// Goes on with a device: everything that is left of it is watched again, and what the last broker had written down and not done is
    /// done.
    ///
    /// # Errors
    /// A descriptor is missing, or guest memory is gone: the device cannot be gone on with.
    pub(crate) fn take_over(
        number: u16,
        config: DeviceConfig,
        journal: JournalSender,
        threads: Threads,
        kept: Kept,
        around: Around<'_>,
    ) -> Result<Self, String> {
        let Around { poller, now, .. } = around;
        let Kept { record, taken: Taken { mut ledger, done, .. } } = kept;
        let Record { at, pair, shell, outbox, version, .. } = record;
        let keeping = threads.keeping.clone().ok_or("there is no descriptor store")?;
        let names = names_of(&shell);
        ledger.claim(&mut keeping.borrow_mut(), names).map_err(|error| error.to_string())?;
        let mut inherited = Inherited { keeping: &keeping, missing: Vec::new() };
        let mut slots = Vec::with_capacity(shell.slots.len());
        for (slot, name) in &shell.slots {
            slots.extend(inherited.take(*name).map(|fd| (*slot, *name, fd)));
        }
        let mut fds = FdTable::resume(shell.next_slot, slots);
        if !inherited.missing.is_empty() {
            return Err(format!("{} of its descriptors are not in the store", inherited.missing.len()));
        }
        let mut memory = SharedMemory::default();
        let quiet_since = shell.fences.iter().map(|fence| fence.killed_at).max();
        let mut actions = warmswap_core::Actions::default();
        let mut access = MemoryAccess { memory: &mut memory, fds: &mut fds, waiting: None };
        let mut pair = pair;
        let notes = RefCell::new(&mut ledger.notes);
        pair.recall_rings(&|ring, size, at| notes.borrow_mut().read(ring, size, at));
        let pair = pair.take_over(config.pair.clone(), quiet_since, now, &mut access, &mut actions)?;
        if !done {
            // Nobody serves the rings that they are for before the messages are sent.
            access.make_all(&outbox.stores)?;
        }
        let run_dir = RunDir::inherit(shell.run_dir.clone());
        let keeper = Keeper::new(Rc::clone(&keeping), ledger);
        let mut device = Device::around(number, config, journal, threads, (pair, run_dir, Some(keeper)), now);
        (device.fds, device.memory, device.actions) = (fds, memory, actions);
        device.commands = shell.commands;
        let entry = Entry::info("DeviceKept")
            .with("version", version)
            .with("written_us_ago", Value::Micros(now.since(at).as_micros()));
        device.note(entry.with("outbox_done", done).with("descriptors", device.fds.len() as u64));
        device.resume_shell(shell, &mut inherited, around);
        device.redo(&outbox, done, poller);
        device.run(now, poller);
        device.find_stray(now, poller);
        Ok(device)
    }

    fn resume_shell(&mut self, shell: Shell, inherited: &mut Inherited<'_>, around: Around<'_>) {
        let Around { janitor, poller, .. } = around;
        self.private_memory = shell.private_memory;
        self.refused_ring = shell.refused_ring;
        self.listening_at = shell.listening_at;
        if let Some(name) = shell.listener
            && let Some(listener) = inherited.take(name)
        {
            // A listener that cannot be watched is made anew when the VMM is gone.
            let _unwatched = self.listen(listener, poller);
            self.keeper.iter_mut().for_each(|keeper| keeper.listener = Some(name));
        }
        if let Some(vmm) = shell.vmm {
            self.resume_vmm(&vmm, inherited, poller);
        }
        for backend in shell.backends {
            self.resume_backend(backend, inherited, around);
        }
        for fence in shell.fences {
            self.resume_fence(fence, inherited, around);
        }
        for (backend, level, evidence) in shell.proved {
            self.events.push_back(Event::Fenced { backend: BackendId(backend), level, evidence });
        }
        for record in shell.retired {
            self.retired.extend(inherited.process(&record, janitor).inspect(Process::kill));
        }
        self.end_strangers();
    }

    /// A VMM that the last broker had let in and written nothing about. One that connects again has done so because its last connection
    /// has ended.
    fn find_stray(&mut self, now: Nanos, poller: &Poller) {
        let Some(keeping) = self.keeper.as_ref().map(|keeper| Rc::clone(&keeper.keeping)) else { return };
        let listens_at = self.config.socket.clone();
        let stray = keeping.borrow_mut().stray(|fd| leads_to(fd, &listens_at));
        if let Some((name, socket)) = stray
            && !self.welcome(socket, Some(name), now, poller)
        {
            self.let_go(Some(name));
        }
    }

    fn resume_connection(
        &mut self,
        record: ConnectionRecord,
        inherited: &mut Inherited<'_>,
    ) -> Result<Connection, String> {
        if record.unsent {
            return Err("something still waited to be sent when the broker ended".to_owned());
        }
        let socket = inherited.take(record.socket).ok_or("its socket is not in the store")?;
        let mut connection = Connection::new(socket).map_err(|error| error.to_string())?;
        self.keep_connection(&mut connection);
        Ok(connection)
    }

    fn resume_vmm(&mut self, record: &VmmRecord, inherited: &mut Inherited<'_>, poller: &Poller) {
        let connection = self.resume_connection(record.connection, inherited).and_then(|connection| {
            let watched = poller.add(connection.as_fd(), self.token(PollSource::Vmm), Interest::Edge);
            watched.map(|()| connection).map_err(|error| error.to_string())
        });
        match connection {
            Ok(connection) => {
                self.vmm = Some(connection);
                self.vmm_readable = true;
                self.vmm_pid = record.pid;
                self.vmm_process = record.process.and_then(|name| inherited.take(name));
                if let Some(keeper) = &mut self.keeper {
                    keeper.vmm = Some(record.connection.socket);
                    keeper.vmm_process = record.process.filter(|_| self.vmm_process.is_some());
                }
            }
            Err(reason) => self.events.push_back(Event::VmmGone { reason }),
        }
    }

    fn resume_backend(&mut self, record: BackendRecord, inherited: &mut Inherited<'_>, around: Around<'_>) {
        let Around { janitor, poller, now } = around;
        let id = BackendId(record.id);
        let mut backend = Backend::new(id, record.path, None);
        (backend.primary, backend.given_at) = (record.primary, record.given_at);
        backend.storage = Some(Storage::recall(&record.storage));
        backend.recorded = record.storage;
        backend.process = record.process.as_ref().and_then(|process| inherited.process(process, janitor));
        let link = match record.link {
            Some(link) if !self.pair.awaits_link(id) => self.resume_connection(link, inherited),
            _ => Err("it was being started when the broker ended".to_owned()),
        };
        let watched = link.and_then(|link| {
            let token = self.token(PollSource::Link(id.0));
            poller.add(link.as_fd(), token, self.interest()).map(|()| link).map_err(|error| error.to_string())
        });
        match watched {
            Ok(link) => {
                backend.link = Some(link);
                backend.kept.0 = record.link.map(|link| link.socket);
            }
            Err(reason) => self.events.push_back(Event::LinkDown { backend: id, reason }),
        }
        if backend.link.is_some()
            && let Some(Ok(requests)) = record.requests.map(|requests| self.resume_connection(requests, inherited))
            && poller.add(requests.as_fd(), self.token(PollSource::Requests(id.0)), self.interest()).is_ok()
        {
            backend.requests = Some(requests);
            backend.kept.1 = record.requests.map(|requests| requests.socket);
        }
        self.watch_process(&backend, poller);
        self.backends.push(backend);
        // What it has opened since.
        self.inspect_at = now;
    }

    fn resume_fence(&mut self, record: FenceRecord, inherited: &mut Inherited<'_>, around: Around<'_>) {
        let Around { janitor, poller, now } = around;
        let id = BackendId(record.backend);
        let Some(process) = inherited.process(&record.process, janitor) else { return };
        // If it cannot be watched it is looked at all the same.
        let _unwatched = poller.add(process.pidfd(), self.token(PollSource::Process(id.0)), Interest::Read);
        let storage = Some(Storage::recall(&record.storage));
        let command = self.config.fence_command.clone();
        self.fences.push(Fence::raise(id, process, storage, record.storage, record.given_at, command, now));
    }

    /// Links that have nothing behind them: their backends were being started.
    fn end_strangers(&mut self) {
        let known = |id: &BackendId| self.backends.iter().any(|backend| backend.id == *id);
        let fenced = |id: &BackendId| self.fences.iter().any(|fence| fence.backend == *id);
        let strangers = self.pair.backends().filter(|id| !known(id) && !fenced(id));
        let reason = "it was being started when the broker ended";
        let events: Vec<Event> =
            strangers.map(|backend| Event::Exited { backend, reason: reason.to_owned() }).collect();
        self.events.extend(events);
    }

    /// Does what was written down and not done, and what is harmless if it is done twice.
    fn redo(&mut self, outbox: &Outbox, done: bool, poller: &Poller) {
        if !done && let Some(keeper) = self.keeper.take() {
            let keeping = Rc::clone(&keeper.keeping);
            self.perform(&keeper, &mut keeping.borrow_mut(), outbox, poller);
            self.keeper = Some(keeper);
        }
        outbox.signals.iter().for_each(|slot| self.fds.signal(FdSlot(*slot)));
        outbox.retires.iter().for_each(|id| self.retire(BackendId(*id), poller));
        outbox.closes.iter().for_each(|slot| self.fds.close(FdSlot(*slot)));
        // What came with something that the pair was not told of any more.
        let known = self.pair.descriptors();
        self.fds.retain(|slot| known.contains(&slot));
        if outbox.drop_vmm {
            self.vmm_gone("it sent what cannot be answered", poller);
        }
        self.note_change();
    }
}
