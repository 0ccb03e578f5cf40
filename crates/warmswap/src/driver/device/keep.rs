//! Keeping a device for the next broker: what a step wants is written down before it is done. See [`super::super::keeping`].

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use rustix::io::Errno;
use warmswap_core::{Action, BackendId, Entry, Event, FenceLevel, Nanos, Pair};
use warmswap_socket::{Connection, ConnectionError, Message as Received};
use warmswap_wire::{FdSlot, HEADER_SIZE, RequestCode};

use super::super::backends::Backend;
use super::super::keeping::{
    self, BackendRecord, Channel, ConnectionRecord, Deed, FORMAT, FenceRecord, Keeping, Ledger, Message, Outbox,
    ProcessRecord, Record, Shell, StorageRecord, VmmRecord,
};
use super::super::poller::{Interest, Poller, Source as PollSource};
use super::{Device, INSPECT_SOON, watch_room};
use crate::shm::{MemoryAccess, Waiting};

/// What keeps one device.
pub(super) struct Keeper {
    pub(super) keeping: Rc<RefCell<Keeping>>,
    pub(super) ledger: Ledger,
    /// Messages that were looked at in this step.
    taken: Vec<(Channel, usize)>,
    /// Stores of this step.
    pub(super) stores: Waiting,
    /// Something else has changed that the next broker has to know.
    changed: bool,
    /// Connections with more messages than were looked at.
    more: Vec<PollSource>,
    /// Names of the listener, the VMM's connection and its process in the descriptor store.
    pub(super) listener: Option<u32>,
    pub(super) vmm: Option<u32>,
    pub(super) vmm_process: Option<u32>,
}

impl Keeper {
    /// A ledger for a new device.
    pub(super) fn open(keeping: &Rc<RefCell<Keeping>>, device: &str) -> io::Result<Self> {
        let ledger = keeping.borrow_mut().open(device)?;
        Ok(Keeper::new(Rc::clone(keeping), ledger))
    }

    pub(super) fn new(keeping: Rc<RefCell<Keeping>>, ledger: Ledger) -> Self {
        Keeper {
            keeping,
            ledger,
            taken: Vec::new(),
            stores: Waiting::default(),
            changed: false,
            more: Vec::new(),
            listener: None,
            vmm: None,
            vmm_process: None,
        }
    }

    /// Notes down what looks at the rings have told.
    pub(super) fn note(&mut self, pair: &mut Pair) {
        let notes = &mut self.ledger.notes;
        pair.note_rings(&mut |ring, size, at, word| notes.write(ring, size, at, word));
    }

    pub(super) fn stores(&mut self) -> &mut Waiting {
        &mut self.stores
    }

    /// Messages that were looked at, out of the way for now.
    pub(super) fn take_taken(&mut self) -> Vec<(Channel, usize)> {
        std::mem::take(&mut self.taken)
    }

    pub(super) fn give_back(&mut self, taken: &[(Channel, usize)]) {
        self.taken.extend_from_slice(taken);
    }

    pub(super) fn has_taken(&self) -> bool {
        !self.taken.is_empty()
    }

    pub(super) fn has_more(&self) -> bool {
        !self.more.is_empty()
    }
}

/// What a step wants, sorted by when it is done.
#[derive(Default)]
struct Wanted {
    outbox: Outbox,
    rest: Vec<Action>,
    /// The next broker has to know of it.
    tells: bool,
}

impl Device {
    /// Whether another broker could go on with it.
    pub(crate) fn is_kept(&self) -> bool {
        self.keeper.is_some()
    }

    /// Whether a VMM has connected.
    pub(crate) fn has_vmm(&self) -> bool {
        self.vmm.is_some()
    }

    /// The next broker goes on with it: what this one has made stays.
    pub(crate) fn leave(&mut self) {
        self.flush_journal();
        self.run_dir.leave();
    }

    /// Keeps a connection that has just come, before anything is written down about it: the next broker finds it by where it leads. One
    /// that cannot be kept is tried again with the record.
    pub(super) fn keep_at_once(&self, socket: BorrowedFd<'_>) -> Option<u32> {
        self.keeper.as_ref().and_then(|keeper| keeper.keeping.borrow_mut().put(socket).ok())
    }

    pub(super) fn let_go(&self, name: Option<u32>) {
        if let (Some(keeper), Some(name)) = (&self.keeper, name) {
            keeper.keeping.borrow_mut().let_go(name);
        }
    }

    /// No broker is to go on with it.
    pub(crate) fn forget(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            keeper.keeping.borrow_mut().forget(&self.config.name);
        }
    }

    /// How connections to backends are watched. What is only looked at stays readable.
    pub(super) fn interest(&self) -> Interest {
        if self.looks { Interest::Edge } else { Interest::Read }
    }

    /// From now on messages are looked at where they lie.
    pub(super) fn keep_connection(&self, connection: &mut Connection) {
        // A socket that cannot is read as always: a message that is lost with the broker is one of a socket that is none of ours.
        if self.keeper.is_some() && keeping::look_without_taking(connection.as_fd()).is_ok() {
            connection.look_only();
        }
    }

    /// A message was looked at, and is to be taken with what comes of it.
    pub(super) fn note_taken(&mut self, from: Channel, message: &mut Received) {
        if let Some(keeper) = &mut self.keeper {
            keeper.taken.push((from, message.payload.len()));
            // A look at a message without descriptors shows those of the next one that has some.
            if !may_carry_descriptors(from, message) {
                message.fds.clear();
            }
        }
    }

    pub(super) fn note_change(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.changed = true;
        }
    }

    pub(super) fn note_more(&mut self, source: PollSource) {
        if let Some(keeper) = self.keeper.as_mut().filter(|keeper| !keeper.more.contains(&source)) {
            keeper.more.push(source);
        }
    }

    /// Goes on with connections that had more messages than were looked at.
    pub(super) fn read_more(&mut self, now: Nanos, poller: &Poller) {
        let Some(keeper) = &mut self.keeper else { return };
        for source in std::mem::take(&mut keeper.more) {
            match source {
                PollSource::Link(id) => self.read_link(id, now, poller),
                PollSource::Requests(id) => self.read_requests(id, now, poller),
                _ => {}
            }
        }
    }

    pub(super) fn note_storage(&mut self, id: BackendId, storage: StorageRecord) {
        let backend = self.backends.iter_mut().find(|it| it.id == id).map(|it| &mut it.recorded);
        let fence = self.fences.iter_mut().find(|it| it.backend == id).map(|it| &mut it.recorded);
        let Some(known) = backend.or(fence) else { return };
        // When it was looked at changes each time, and matters as soon as it is given rings.
        let same = known.began.is_some() && *known == StorageRecord { began: known.began, ..storage.clone() };
        *known = storage;
        if !same {
            self.note_change();
        }
    }

    /// Writes down what is wanted, then does it.
    pub(super) fn act_kept(&mut self, now: Nanos, poller: &Poller) {
        let Some(mut keeper) = self.keeper.take() else { return };
        let mut wanted = self.sort_actions(now, poller);
        wanted.outbox.taken = std::mem::take(&mut keeper.taken);
        wanted.outbox.stores = keeper.stores.take();
        let nothing = wanted.outbox.taken.is_empty() && wanted.outbox.stores.is_empty();
        let tells = wanted.tells || !nothing || std::mem::take(&mut keeper.changed);
        let Wanted { outbox, rest, .. } = wanted;
        let written = if tells { self.commit(&mut keeper, &outbox, poller) } else { Ok(()) };
        if let Err(error) = &written {
            self.do_without(&keeper, &outbox, error, poller);
        }
        self.keeper = written.is_ok().then_some(keeper);
        for action in rest {
            self.strike_between("an action");
            self.carry_out(action, now, poller);
        }
    }

    /// What is said to others goes into the outbox, what nobody else sees is done at once, and the rest comes afterwards.
    fn sort_actions(&mut self, now: Nanos, poller: &Poller) -> Wanted {
        let mut wanted = Wanted::default();
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain() {
            let messages = &mut wanted.outbox.messages;
            match action {
                Action::SendLink { backend, bytes, fds } => self.queue_for_link(backend, bytes, &fds, messages),
                Action::SendVmm { bytes, fds } if self.vmm.is_some() => {
                    messages.push(Message { to: Channel::Vmm, bytes, fds: fds.iter().map(|slot| slot.0).collect() });
                }
                Action::SendVmm { .. } => {}
                Action::SendVmmBackend { channel, bytes } => {
                    messages.push(Message { to: Channel::VmmBackend(channel.0), bytes, fds: Vec::new() });
                }
                Action::SendLinkBackend { backend, bytes } => {
                    messages.push(Message { to: Channel::Requests(backend.0), bytes, fds: Vec::new() });
                }
                // A primary that lives on while its fence is only written down could not be followed meanwhile, and nobody would know what
                // it owed. One that is killed and of which that is not written down has died, for the next broker, and is fenced as such.
                Action::Assign { .. } | Action::Fence { .. } => {
                    wanted.tells = true;
                    self.carry_out(action, now, poller);
                }
                Action::Journal(_) => self.carry_out(action, now, poller),
                Action::WatchKick { .. } | Action::UnwatchKick { .. } | Action::Answer { .. } => {
                    wanted.rest.push(action);
                }
                other => {
                    wanted.tells = true;
                    let outbox = &mut wanted.outbox;
                    match &other {
                        Action::Signal(slot) => outbox.signals.push(slot.0),
                        Action::Retire { backend } => outbox.retires.push(backend.0),
                        Action::Close(slot) => outbox.closes.push(slot.0),
                        Action::DropVmm => outbox.drop_vmm = true,
                        // A start leaves a backend without a process in the record; a channel for state dies with the broker.
                        _ => {}
                    }
                    wanted.rest.push(other);
                }
            }
        }
        self.actions = actions;
        wanted.tells |= !wanted.outbox.messages.is_empty();
        wanted
    }

    fn queue_for_link(&mut self, id: BackendId, bytes: Vec<u8>, slots: &[FdSlot], messages: &mut Vec<Message>) {
        let Some(backend) = self.backends.iter_mut().find(|backend| backend.id == id) else { return };
        if backend.link.is_none() {
            return;
        }
        // A ring begins with its kick.
        if backend.given_at.is_none() && bytes.starts_with(&(RequestCode::SetVringKick as u32).to_ne_bytes()) {
            let now = super::super::now();
            backend.given_at = Some(now);
            self.inspect_after = INSPECT_SOON;
            self.inspect_at = now + INSPECT_SOON;
        }
        let to = Channel::Link(id.0);
        match messages.last_mut() {
            // Descriptors belong to the message that starts with the bytes they travel with.
            Some(last) if last.to == to && slots.is_empty() => last.bytes.extend_from_slice(&bytes),
            _ => messages.push(Message { to, bytes, fds: slots.iter().map(|slot| slot.0).collect() }),
        }
    }

    /// Writes the record, then makes the stores, takes and sends.
    fn commit(&mut self, keeper: &mut Keeper, outbox: &Outbox, poller: &Poller) -> io::Result<()> {
        self.strike_between("a record");
        let keeping = Rc::clone(&keeper.keeping);
        let mut keeping = keeping.borrow_mut();
        let (shell, names) = self.shell(keeper, &mut keeping)?;
        let record = Record {
            format: FORMAT,
            number: keeper.ledger.next(),
            at: super::super::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pair: &self.pair,
            shell,
            outbox,
        };
        keeper.ledger.write(&record)?;
        self.strike_between("the stores");
        self.make_stores(outbox);
        self.strike_between("the messages");
        self.perform(keeper, &mut keeping, outbox, poller);
        keeper.ledger.let_go(&mut keeping, names)
    }

    fn make_stores(&mut self, outbox: &Outbox) {
        let mut memory = MemoryAccess { memory: &mut self.memory, fds: &mut self.fds, waiting: None };
        memory.make_all(&outbox.stores).expect("what this broker has mapped need not be mapped again");
    }

    /// Takes what was looked at, sends and counts, in one system call.
    pub(super) fn perform(&mut self, keeper: &Keeper, keeping: &mut Keeping, outbox: &Outbox, poller: &Poller) {
        let slow: Vec<Channel> = outbox
            .messages
            .iter()
            .filter(|message| self.is_slow(message.to, &outbox.messages))
            .map(|message| message.to)
            .collect();
        let mut deeds = Vec::with_capacity(2 * outbox.taken.len() + outbox.messages.len() + 1);
        for (from, payload) in &outbox.taken {
            let Some(socket) = self.socket(*from) else { continue };
            // Header and payload may lie in two pieces.
            deeds.push(Deed::Take { socket, bytes: HEADER_SIZE });
            if *payload > 0 {
                deeds.push(Deed::Take { socket, bytes: *payload });
            }
        }
        let first = deeds.len();
        let mut sent = Vec::with_capacity(outbox.messages.len());
        for (at, message) in outbox.messages.iter().enumerate() {
            if slow.contains(&message.to) {
                continue;
            }
            let Some(socket) = self.socket(message.to) else { continue };
            deeds.push(Deed::Send { socket, bytes: &message.bytes, fds: self.descriptors(&message.fds) });
            sent.push(at);
        }
        deeds.push(Deed::Count { counter: keeper.ledger.counter() });
        let results = keeping.perform(&deeds);
        drop(deeds);
        for (at, result) in sent.into_iter().zip(&results[first..]) {
            self.book_sent(&outbox.messages[at], *result, poller);
        }
        for message in outbox.messages.iter().filter(|message| slow.contains(&message.to)) {
            // It waits behind what waits already, or is sent if there is room now.
            self.book_sent(message, -Errno::AGAIN.raw_os_error(), poller);
        }
    }

    fn descriptors(&self, slots: &[u32]) -> Vec<BorrowedFd<'_>> {
        let fds: Vec<_> = slots.iter().filter_map(|slot| self.fds.get(FdSlot(*slot))).collect();
        assert_eq!(fds.len(), slots.len(), "a message names a descriptor that is closed");
        fds
    }

    fn connection(&mut self, channel: Channel) -> Option<&mut Connection> {
        match channel {
            Channel::Vmm => self.vmm.as_mut(),
            Channel::VmmBackend(_) => None,
            Channel::Link(id) => self.backend(BackendId(id))?.link.as_mut(),
            Channel::Requests(id) => self.backend(BackendId(id))?.requests.as_mut(),
        }
    }

    fn peer(&self, id: u64) -> Option<&Backend> {
        self.backends.iter().find(|backend| backend.id.0 == id)
    }

    fn socket(&self, channel: Channel) -> Option<BorrowedFd<'_>> {
        match channel {
            Channel::Vmm => self.vmm.as_ref().map(AsFd::as_fd),
            Channel::VmmBackend(slot) => self.fds.get(FdSlot(slot)),
            Channel::Link(id) => self.peer(id)?.link.as_ref().map(AsFd::as_fd),
            Channel::Requests(id) => self.peer(id)?.requests.as_ref().map(AsFd::as_fd),
        }
    }

    /// Whether a peer has so much to read that what is sent to it may have to wait: messages must not overtake each other.
    fn is_slow(&mut self, channel: Channel, messages: &[Message]) -> bool {
        let Some(connection) = self.connection(channel) else { return false };
        let sizes = messages.iter().filter(|message| message.to == channel).map(|message| message.bytes.len());
        connection.has_unsent() || !keeping::has_room_for(connection.as_fd(), sizes)
    }

    /// A message was sent, in part, or not at all.
    fn book_sent(&mut self, message: &Message, result: i32, poller: &Poller) {
        let interest = if message.to == Channel::Vmm { Interest::Edge } else { self.interest() };
        let (token, backend) = match message.to {
            Channel::Vmm => (self.token(PollSource::Vmm), None),
            // A VMM that does not read its own channel misses a notification; its main channel tells if it is gone.
            Channel::VmmBackend(_) => return,
            Channel::Link(id) => (self.token(PollSource::Link(id)), Some(BackendId(id))),
            Channel::Requests(id) => (self.token(PollSource::Requests(id)), Some(BackendId(id))),
        };
        let fds: Vec<_> = if result <= 0 { message.fds.clone() } else { Vec::new() };
        let fds: Vec<_> =
            fds.iter().filter_map(|slot| self.fds.get(FdSlot(*slot))?.try_clone_to_owned().ok()).collect();
        let Some(connection) = self.connection(message.to) else { return };
        let again = -Errno::AGAIN.raw_os_error();
        let kept = match usize::try_from(result) {
            Ok(count) => connection.sent(count, &message.bytes, &[]),
            Err(_) if result == again => {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                connection.sent(0, &message.bytes, &fds)
            }
            Err(_) => Err(ConnectionError::Socket(Errno::from_raw_os_error(-result))),
        };
        let kept = kept.and_then(|()| watch_room(connection, token, interest, poller));
        let Err(error) = kept else { return };
        match (message.to, backend) {
            (Channel::Vmm, _) => self.vmm_gone(&error.to_string(), poller),
            (Channel::Link(_), Some(id)) => {
                self.drop_link(id, poller);
                self.events.push_back(Event::LinkDown { backend: id, reason: format!("its link ended: {error}") });
            }
            // One that does not read its answers loses the channel; whether it is well its link tells.
            (_, Some(id)) => self.drop_requests(id, poller),
            _ => {}
        }
    }

    /// What cannot be written down is done all the same: the guest comes first. The device is not kept any more.
    fn do_without(&mut self, keeper: &Keeper, outbox: &Outbox, error: &io::Error, poller: &Poller) {
        let entry = Entry::error("NotKept").with("reason", error.to_string());
        let next =
            "a broker that ends now ends the device for its guest; restart the guest's device at a convenient time";
        self.entries.push(entry.with("next", next));
        self.make_stores(outbox);
        let keeping = Rc::clone(&keeper.keeping);
        keeping.borrow_mut().forget(self.config.name.as_str());
        self.perform(keeper, &mut keeping.borrow_mut(), outbox, poller);
        let links = self.backends.iter_mut().flat_map(|it| [it.link.as_mut(), it.requests.as_mut()]);
        let looking = links.chain([self.vmm.as_mut()]).flatten().filter(|it| it.looks_only());
        looking.for_each(Connection::take_from_now_on);
    }

    /// Everything that the next broker has to know beyond the pair, and the names of all its descriptors.
    fn shell(&mut self, keeper: &mut Keeper, keeping: &mut Keeping) -> io::Result<(Shell, Vec<u32>)> {
        let mut put = |fd: BorrowedFd<'_>| keeping.put(fd);
        let slots = self.fds.keep(&mut put)?;
        let mut named = |kept: &mut Option<u32>, fd: Option<BorrowedFd<'_>>| -> io::Result<Option<u32>> {
            match (fd, *kept) {
                (Some(fd), None) => *kept = Some(put(fd)?),
                (None, _) => *kept = None,
                _ => {}
            }
            Ok(*kept)
        };
        let mut connection =
            |kept: &mut Option<u32>, it: Option<&Connection>| -> io::Result<Option<ConnectionRecord>> {
                let socket = named(kept, it.map(AsFd::as_fd))?;
                Ok(socket.map(|socket| ConnectionRecord { socket, unsent: it.is_some_and(Connection::has_unsent) }))
            };
        let vmm = connection(&mut keeper.vmm, self.vmm.as_ref())?;
        let mut links = Vec::with_capacity(self.backends.len());
        for backend in &mut self.backends {
            let (link, requests) = &mut backend.kept;
            links.push((connection(link, backend.link.as_ref())?, connection(requests, backend.requests.as_ref())?));
        }
        let listener = named(&mut keeper.listener, self.listener.as_ref().map(AsFd::as_fd))?;
        let process = named(&mut keeper.vmm_process, self.vmm_process.as_ref().map(AsFd::as_fd))?;
        let mut backends = Vec::with_capacity(self.backends.len());
        for (backend, (link, requests)) in self.backends.iter_mut().zip(links) {
            backends.push(BackendRecord {
                id: backend.id.0,
                path: backend.path.clone(),
                process: backend.process.as_mut().map(|process| process.record(&mut put)).transpose()?,
                link,
                requests,
                primary: backend.primary,
                given_at: backend.given_at,
                storage: backend.recorded.clone(),
            });
        }
        let mut fences = Vec::with_capacity(self.fences.len());
        for fence in &mut self.fences {
            fences.push(FenceRecord {
                backend: fence.backend.0,
                process: fence.process.record(&mut put)?,
                given_at: fence.given_at,
                killed_at: fence.began,
                storage: fence.recorded.clone(),
            });
        }
        let retired = self.retired.iter_mut().map(|process| process.record(&mut put));
        let shell = Shell {
            next_slot: self.fds.next_slot(),
            slots,
            listener,
            listening_at: self.listening_at,
            vmm: vmm.map(|connection| VmmRecord { connection, process, pid: self.vmm_pid }),
            backends,
            fences,
            proved: self.events.iter().filter_map(proved).collect(),
            retired: retired.collect::<io::Result<Vec<_>>>()?,
            run_dir: self.run_dir.path().to_path_buf(),
            commands: self.commands,
            private_memory: self.private_memory.clone(),
            refused_ring: self.refused_ring.clone(),
        };
        let names = names_of(&shell);
        Ok((shell, names))
    }

    /// A broker that is told to die between two steps dies here.
    #[cfg(feature = "lab")]
    fn strike_between(&mut self, before: &str) {
        let failing_over = self.pair.is_failing_over();
        if let Some(point) = self.failpoint.as_mut().filter(|point| point.is_of_broker())
            && point.reaches(failing_over)
        {
            point.strike_broker(before);
        }
    }

    #[cfg(not(feature = "lab"))]
    fn strike_between(&mut self, _before: &str) {}
}

/// A proof that is on its way to the pair.
fn proved(event: &Event) -> Option<(u64, FenceLevel, String)> {
    match event {
        Event::Fenced { backend, level, evidence } => Some((backend.0, *level, evidence.clone())),
        _ => None,
    }
}

/// Whether descriptors that were seen with a message can be its own.
fn may_carry_descriptors(from: Channel, message: &Received) -> bool {
    // `VHOST_USER_VRING_NOFD_MASK`: the sender says that there is none.
    let none = message.payload.get(1).is_some_and(|byte| byte & 1 != 0);
    match (from, RequestCode::from_id(message.header.request)) {
        (Channel::Vmm, Some(RequestCode::SetVringKick | RequestCode::SetVringCall | RequestCode::SetVringErr)) => !none,
        (Channel::Vmm, Some(code)) => matches!(
            code,
            RequestCode::SetMemTable
                | RequestCode::AddMemReg
                | RequestCode::RemMemReg
                | RequestCode::SetLogBase
                | RequestCode::SetLogFd
                | RequestCode::SetBackendReqFd
                | RequestCode::SetInflightFd
                | RequestCode::SetDeviceStateFd
        ),
        (Channel::Link(_), Some(code)) => matches!(code, RequestCode::GetInflightFd | RequestCode::SetDeviceStateFd),
        // Nothing that a backend asks for by itself, and nothing unknown, is followed with its descriptors.
        _ => false,
    }
}

/// Every name a record mentions, as often as it does.
pub(super) fn names_of(shell: &Shell) -> Vec<u32> {
    let of_process = |process: &ProcessRecord| [Some(process.pidfd), process.stderr];
    let of_connection = |connection: Option<ConnectionRecord>| connection.map(|it| it.socket);
    let mut names: Vec<u32> = shell.slots.iter().map(|(_, name)| *name).collect();
    names.extend(shell.listener);
    names.extend(shell.vmm.iter().flat_map(|vmm| [Some(vmm.connection.socket), vmm.process]).flatten());
    for backend in &shell.backends {
        names.extend(of_connection(backend.link).into_iter().chain(of_connection(backend.requests)));
        names.extend(backend.process.iter().flat_map(of_process).flatten());
    }
    names.extend(shell.fences.iter().flat_map(|fence| of_process(&fence.process)).flatten());
    names.extend(shell.retired.iter().flat_map(of_process).flatten());
    names.sort_unstable();
    names
}
