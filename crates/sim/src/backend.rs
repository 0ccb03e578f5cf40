//! A backend process: its control path. Real messages are decoded with `wire`; what differs between classes is named here.

use std::collections::VecDeque;

use warmswap_core::{Nanos, PRIVATE_ADDR};
use warmswap_wire::inflight::ring_bytes;
use warmswap_wire::ring::{FLAGS, IDX, Layout, USED_F_NO_NOTIFY};
use warmswap_wire::{
    ConfigSpace, FdSlot, InflightDescription, MemoryRegion, ProtocolFeatures, Reply, Request, VirtioFeatures,
    VringAddr, VringFd, VringState,
};

use crate::keeper::Keeper;
use crate::memory::{Effect, Obj};
use crate::options::{Class, Keeping, Sabotage};
use crate::stream::{Message, Stream};
use crate::world::{Event, World};

/// Rings a backend serves at most.
pub(crate) const RINGS: usize = 3;
/// Regions of memory a backend takes.
const SLOTS: u64 = 8;
/// virtio-blk: flush.
const BLK_FLUSH: u64 = 1 << 9;
const BLK_MQ: u64 = 1 << 12;
/// Bytes of the configuration space.
const CONFIG: usize = 60;
/// Where in it stands whether the device caches writes (virtio 1.2, 5.2.4).
pub(crate) const WRITEBACK: usize = 32;

/// What a message is answered with.
enum Answer {
    Reply(Reply),
    /// An acknowledgement, if one was asked for.
    Acknowledged,
    Later,
}

/// A request a backend has carried out.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub(crate) head: u16,
    pub(crate) status: (Obj, u64),
    pub(crate) value: u8,
    pub(crate) len: u32,
}

/// One ring of a backend.
#[derive(Debug, Default)]
pub(crate) struct BackendRing {
    pub(crate) size: Option<u16>,
    pub(crate) addr: Option<VringAddr>,
    pub(crate) available: (Obj, u64),
    pub(crate) used_ring: (Obj, u64),
    pub(crate) descriptors: (Obj, u64),
    /// The next index of the available ring to take.
    pub(crate) next: u16,
    /// The next index of the used ring.
    pub(crate) used: u16,
    /// Where the ring stood when it was started.
    started_at: u16,
    pub(crate) kick: Option<Obj>,
    pub(crate) call: Option<Obj>,
    err: Option<Obj>,
    pub(crate) started: bool,
    pub(crate) enabled: bool,
    /// There may be something to take.
    pub(crate) look: bool,
    pub(crate) keeper: Option<Keeper>,
    /// To be taken again.
    pub(crate) again: VecDeque<u16>,
    pub(crate) taken: Vec<u16>,
    pub(crate) done: VecDeque<Done>,
    /// What `used.idx` was when the driver was last interrupted; none at first.
    pub(crate) signalled: Option<u16>,
    /// Counts starts: what was begun before belongs to nobody.
    pub(crate) epoch: u32,
    /// It is to be stopped as soon as nothing is taken, and since when.
    stopping: Option<(u32, Nanos)>,
}

impl BackendRing {
    pub(crate) fn layout(&self) -> Layout {
        self.size.and_then(Layout::new).expect("a ring is started with a size")
    }

    /// It serves the guest, or has something of the guest's that is not over.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_the_guests() && (self.started || !self.done.is_empty() || !self.taken.is_empty())
    }

    /// It touches the guest's memory.
    pub(crate) fn is_the_guests(&self) -> bool {
        self.addr.is_some_and(|addr| addr.descriptor < PRIVATE_ADDR)
    }
}

/// What a write to the configuration space says of the cache.
pub(crate) fn written_writeback(write: &ConfigSpace) -> Option<u8> {
    let at = WRITEBACK.checked_sub(write.offset as usize)?;
    write.bytes.get(at).copied()
}

/// A backend process.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) id: u64,
    pub(crate) class: Class,
    keeping: Keeping,
    /// The process is there.
    pub(crate) alive: bool,
    /// Connected to.
    pub(crate) connected: bool,
    /// The broker has given it up, or it was never started.
    pub(crate) retired: bool,
    /// The data thread, by its number.
    pub(crate) thread: usize,
    pub(crate) hung: bool,
    pub(crate) stalled: bool,
    pub(crate) muted: bool,
    pub(crate) slow_until: Nanos,
    pub(crate) from_broker: Stream,
    pub(crate) to_broker: Stream,
    features: u64,
    pub(crate) protocol: ProtocolFeatures,
    pub(crate) table: Vec<(MemoryRegion, Obj)>,
    pub(crate) rings: Vec<BackendRing>,
    region: Option<(InflightDescription, Obj)>,
    /// An event for its worker, for its control path, is under way.
    pub(crate) work_due: bool,
    /// The control path is about to change something: the worker takes nothing up.
    pub(crate) worker_waits: bool,
    control_at: Nanos,
    pub(crate) dies_in_messages: Option<u32>,
    /// Requests at the disk.
    pub(crate) at_disk: u32,
    /// It is proved that it writes no more.
    pub(crate) fenced: bool,
    /// The broker waits for that proof; its process is reaped.
    pub(crate) fencing: bool,
    pub(crate) reaped: bool,
    pub(crate) exit_told: bool,
    /// What the guest has written to the configuration space, as far as it has read of it; and the last the broker has sent.
    writeback: u8,
    pub(crate) told_writeback: Option<u8>,
}

impl Backend {
    pub(crate) fn new(id: u64, class: Class, keeping: Keeping, thread: usize) -> Self {
        let keeping = if class.may_keep_region() { keeping } else { Keeping::Absent };
        Backend {
            id,
            class,
            keeping,
            alive: false,
            connected: false,
            retired: false,
            thread,
            hung: false,
            stalled: false,
            muted: false,
            slow_until: Nanos(0),
            from_broker: Stream::default(),
            to_broker: Stream::default(),
            features: 0,
            protocol: ProtocolFeatures::empty(),
            table: Vec::new(),
            rings: (0..RINGS).map(|_| BackendRing::default()).collect(),
            region: None,
            work_due: false,
            worker_waits: false,
            control_at: Nanos(u64::MAX),
            dies_in_messages: None,
            at_disk: 0,
            fenced: false,
            fencing: false,
            reaped: false,
            exit_told: false,
            writeback: 0,
            told_writeback: None,
        }
    }

    /// Whether its threads make steps.
    pub(crate) fn works(&self) -> bool {
        self.alive && !self.hung && !self.stalled
    }

    fn offers(&self) -> u64 {
        let common = VirtioFeatures::PROTOCOL_FEATURES | VirtioFeatures::VERSION_1 | VirtioFeatures::INDIRECT_DESC;
        let event = if self.class == Class::Spdk { VirtioFeatures::empty() } else { VirtioFeatures::EVENT_IDX };
        (common | event).bits() | BLK_FLUSH | BLK_MQ
    }

    fn offers_protocol(&self) -> ProtocolFeatures {
        use ProtocolFeatures as P;
        let common = P::MQ | P::CONFIG | P::CONFIGURE_MEM_SLOTS;
        let own = match self.class {
            Class::LibvhostUser | Class::Draining => P::REPLY_ACK | P::BACKEND_REQ | P::LOG_SHMFD,
            Class::RustVmm => P::REPLY_ACK | P::BACKEND_REQ,
            Class::Spdk => P::REPLY_ACK,
        };
        let region = if self.keeping == Keeping::Absent { P::empty() } else { P::INFLIGHT_SHMFD };
        common | own | region
    }

    pub(crate) fn has_event_idx(&self) -> bool {
        self.features & VirtioFeatures::EVENT_IDX.bits() != 0
    }

    pub(crate) fn find_user(&self, addr: u64, length: u64) -> Option<(Obj, u64)> {
        let place = |(region, obj): &(MemoryRegion, Obj)| {
            Some((*obj, region.mmap_offset + region.offset_of_user(addr, length)?))
        };
        self.table.iter().find_map(place)
    }

    pub(crate) fn find_guest(&self, addr: u64, length: u64) -> Option<(Obj, u64)> {
        let place = |(region, obj): &(MemoryRegion, Obj)| {
            Some((*obj, region.mmap_offset + region.offset_of_guest(addr, length)?))
        };
        self.table.iter().find_map(place)
    }

    /// Whether it may still write to what is the guest's, as far as anybody can know without a proof.
    pub(crate) fn may_write(&self) -> bool {
        !self.fenced && self.connected && self.rings.iter().any(BackendRing::is_busy)
    }
}

impl World<'_> {
    pub(crate) fn backend(&mut self, id: u64) -> &mut Backend {
        &mut self.backends[id as usize - 1]
    }

    /// Wakes the control path of a backend at `at`.
    pub(crate) fn wake_control(&mut self, id: u64, at: Nanos) {
        let at = at.max(self.now);
        let backend = self.backend(id);
        if at < backend.control_at {
            backend.control_at = at;
            self.at(at, Event::Control(id));
        }
    }

    pub(crate) fn control(&mut self, id: u64) {
        let now = self.now;
        let backend = self.backend(id);
        if backend.control_at != now {
            return;
        }
        backend.control_at = Nanos(u64::MAX);
        if !backend.alive || backend.hung || backend.muted {
            return;
        }
        if self.finish_stops(id) {
            return;
        }
        let busy = !self.mem.threads.borrow()[self.backends[id as usize - 1].thread].queue.is_empty();
        let backend = self.backend(id);
        backend.worker_waits = false;
        if busy && !backend.stalled && backend.from_broker.has_arrived(now) {
            // What its worker is about to store comes first, and nothing after it.
            backend.worker_waits = true;
            return self.wake_control(id, Nanos(now.0 + 500));
        }
        match backend.from_broker.receive(now) {
            Ok(Some(message)) => {
                let dies = match &mut backend.dies_in_messages {
                    Some(0) => true,
                    Some(left) => {
                        *left -= 1;
                        false
                    }
                    None => false,
                };
                if dies {
                    return self.kill(id, "at a message");
                }
                self.heard(id, message);
                self.wake_worker(id);
                let slow = self.backend(id).slow_until > now;
                let takes = if slow {
                    Nanos::from_micros(self.random.between(200, 4_000))
                } else {
                    Nanos(self.random.between(300, 4_000))
                };
                self.wake_control(id, now + takes);
            }
            Ok(None) => {
                if let Some(at) = backend.from_broker.next_arrival() {
                    self.wake_control(id, at);
                }
            }
            Err(error) => self.fail("messages", format!("#{id} cannot follow the broker: {error}")),
        }
    }

    /// One message of the broker.
    fn heard(&mut self, id: u64, message: Message) {
        let Message { header, payload, fds } = message;
        let slots: Vec<FdSlot> = fds.iter().map(|obj| FdSlot(*obj)).collect();
        let request = match Request::decode(&header, &payload, &slots) {
            Ok(request) => request,
            Err(error) => return self.fail("messages", format!("#{id} cannot decode what the broker says: {error}")),
        };
        self.note(|| format!("#{id} reads {}", request.code().name()));
        match self.obey(id, &request, header.request) {
            Ok(Answer::Reply(reply)) => self.reply(id, header.request, &reply),
            Ok(Answer::Acknowledged) if header.needs_reply() => self.reply(id, header.request, &Reply::U64(0)),
            Ok(Answer::Acknowledged | Answer::Later) => {}
            // As libvhost-user does: it panics.
            Err(reason) => self.kill(id, &reason),
        }
    }

    fn reply(&mut self, id: u64, request: u32, reply: &Reply) {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        reply.encode(request, &mut bytes, &mut fds);
        let at = self.latency();
        self.backend(id).to_broker.send(&bytes, fds.iter().map(|fd| fd.0).collect(), at);
        self.wake_broker(at);
    }

    fn obey(&mut self, id: u64, request: &Request, code: u32) -> Result<Answer, String> {
        let backend = self.backend(id);
        let reply = match request {
            Request::GetFeatures => Reply::U64(backend.offers()),
            Request::GetProtocolFeatures => Reply::U64(backend.offers_protocol().bits()),
            Request::GetQueueNum => Reply::U64(RINGS as u64),
            Request::GetMaxMemSlots => Reply::U64(SLOTS),
            Request::GetConfig(wanted) => {
                let config = self.config_space(id);
                let fits = wanted.bytes.len() <= CONFIG && wanted.offset == 0;
                let bytes = config.get(..wanted.bytes.len()).map(<[u8]>::to_vec).unwrap_or_default();
                Reply::Config(fits.then_some(ConfigSpace { offset: 0, flags: 0, bytes }))
            }
            Request::GetInflightFd(wanted) => {
                let mmap_size = ring_bytes(wanted.queue_size) * u64::from(wanted.num_queues);
                let obj = self.mem.make_bytes(mmap_size, false);
                Reply::Inflight {
                    region: InflightDescription { mmap_size, mmap_offset: 0, ..*wanted },
                    fd: Some(FdSlot(obj)),
                }
            }
            Request::GetVringBase(state) => return self.stop(id, state.index, code),
            _ => {
                self.apply(id, request)?;
                return Ok(Answer::Acknowledged);
            }
        };
        Ok(Answer::Reply(reply))
    }

    fn config_space(&self, id: u64) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        config[..8].copy_from_slice(&self.options.blocks.to_le_bytes());
        config[20..24].copy_from_slice(&512_u32.to_le_bytes());
        config[WRITEBACK] = self.backends[id as usize - 1].writeback;
        config[34..36].copy_from_slice(&self.options.rings.to_le_bytes());
        config
    }

    fn apply(&mut self, id: u64, request: &Request) -> Result<(), String> {
        let backend = &mut self.backends[id as usize - 1];
        let ring = |index: u32| {
            if (index as usize) < RINGS { Ok(index as usize) } else { Err(format!("there is no ring {index}")) }
        };
        match request {
            Request::SetFeatures(features) => backend.features = *features,
            Request::SetProtocolFeatures(bits) => backend.protocol = ProtocolFeatures::from_bits_retain(*bits),
            Request::SetMemTable(regions) => {
                backend.table = regions.iter().map(|(region, fd)| (*region, fd.0)).collect();
            }
            Request::AddMemReg { region, fd: Some(fd) } => backend.table.push((*region, fd.0)),
            Request::RemMemReg(region) => backend.table.retain(|(known, _)| known.guest_addr != region.guest_addr),
            Request::SetVringNum(VringState { index, value }) => {
                let size = u16::try_from(*value).map_err(|_| format!("size {value}"))?;
                backend.rings[ring(*index)?].size = Some(size);
            }
            Request::SetVringBase(VringState { index, value }) => {
                let ring = &mut backend.rings[ring(*index)?];
                ring.next = *value as u16;
                ring.used = *value as u16;
            }
            Request::SetVringAddr(addr) => self.place_ring(id, addr)?,
            Request::SetVringCall(VringFd { index, fd }) => {
                backend.rings[ring(*index)?].call = fd.map(|fd| fd.0);
            }
            Request::SetVringErr(VringFd { index, fd }) => backend.rings[ring(*index)?].err = fd.map(|fd| fd.0),
            Request::SetVringKick(VringFd { index, fd }) => {
                backend.rings[ring(*index)?].kick = fd.map(|fd| fd.0);
                if backend.rings[*index as usize].started {
                    self.look_if_kicked(id, *index as usize);
                } else {
                    self.start_ring(id, *index as usize)?;
                }
            }
            Request::SetVringEnable(VringState { index, value }) => {
                let at = ring(*index)?;
                backend.rings[at].enabled = *value != 0;
                if *value != 0 {
                    // vhost-user-backend runs its handler on enable since 0.24.
                    backend.rings[at].look |= backend.class == Class::RustVmm;
                    self.look_if_kicked(id, at);
                }
            }
            Request::SetInflightFd { region, fd } => backend.region = Some((*region, fd.0)),
            Request::SetConfig(write) => backend.writeback = written_writeback(write).unwrap_or(backend.writeback),
            _ => {}
        }
        Ok(())
    }

    fn place_ring(&mut self, id: u64, addr: &VringAddr) -> Result<(), String> {
        let backend = &mut self.backends[id as usize - 1];
        let at = addr.index as usize;
        let size = backend.rings.get(at).and_then(|ring| ring.size);
        let layout = size.and_then(Layout::new).ok_or("addresses of a ring without a size")?;
        let find = |addr, length| backend.find_user(addr, length).ok_or("a ring lies in no region");
        let descriptors = find(addr.descriptor, layout.descriptor_bytes())?;
        let available = find(addr.available, layout.available_bytes())?;
        let used_ring = find(addr.used, layout.used_bytes())?;
        let used = self.mem.read_u16(used_ring.0, used_ring.1 + IDX);
        let ring = &mut backend.rings[at];
        (ring.descriptors, ring.available, ring.used_ring) = (descriptors, available, used_ring);
        ring.addr = Some(*addr);
        // libvhost-user and rust-vmm's daemons cache it here.
        ring.used = used;
        Ok(())
    }

    fn start_ring(&mut self, id: u64, at: usize) -> Result<(), String> {
        let backend = &mut self.backends[id as usize - 1];
        let ring = &mut backend.rings[at];
        let size = ring.size.ok_or("a ring is started without a size")?;
        if ring.addr.is_none() {
            return Err("a ring is started without addresses".to_owned());
        }
        let used = self.mem.read_u16(ring.used_ring.0, ring.used_ring.1 + IDX);
        if backend.class == Class::Spdk && ring.next != used {
            // DPDK: "some packets maybe resent for Tx and dropped for Rx".
            ring.next = used;
        }
        if backend.class == Class::Spdk {
            ring.used = used;
        }
        ring.started = true;
        ring.started_at = ring.next;
        ring.signalled = None;
        ring.epoch += 1;
        ring.taken.clear();
        ring.done.clear();
        ring.again.clear();
        ring.keeper = None;
        let mut effects = VecDeque::new();
        if backend.protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            let (region, obj) = backend.region.ok_or("a ring is started without an in-flight region")?;
            let stride = region.mmap_size / u64::from(region.num_queues.max(1));
            let place = (obj, region.mmap_offset + stride * at as u64);
            let (keeper, start, stores) = Keeper::start(backend.keeping, place, size, used, ring.next, &self.mem)?;
            ring.keeper = Some(keeper);
            ring.next = start.next_available;
            ring.again = start.resubmit.into();
            effects = stores;
        }
        let polls = backend.class == Class::Spdk;
        // Whoever recovers kicks itself; whoever polls looks anyway.
        ring.look = polls || ring.keeper.is_some();
        if polls {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&USED_F_NO_NOTIFY.to_le_bytes());
            effects.push_back(Effect::Store { obj: ring.used_ring.0, at: ring.used_ring.1 + FLAGS, len: 2, bytes });
        }
        let thread = backend.thread;
        self.mem.threads.borrow_mut()[thread].queue.extend(effects);
        self.look_if_kicked(id, at);
        self.wake_worker(id);
        Ok(())
    }

    /// An eventfd that was written before it was listened on tells at once.
    fn look_if_kicked(&mut self, id: u64, at: usize) {
        let ring = &self.backends[id as usize - 1].rings[at];
        if ring.started && ring.kick.is_some_and(|kick| self.mem.event(kick).is_some_and(std::cell::Cell::get)) {
            self.wake_worker(id);
        }
        if self.backends[id as usize - 1].rings[at].look {
            self.wake_worker(id);
        }
    }

    /// GET_VRING_BASE.
    fn stop(&mut self, id: u64, index: u32, code: u32) -> Result<Answer, String> {
        let now = self.now;
        let lies = self.options.sabotage == Sabotage::LiesAboutBase;
        let backend = self.backend(id);
        let class = backend.class;
        let ring = backend.rings.get_mut(index as usize).ok_or("there is no such ring")?;
        let drains = matches!(class, Class::Draining | Class::Spdk) && !lies;
        if drains && ring.started && !(ring.taken.is_empty() && ring.done.is_empty() && ring.again.is_empty()) {
            ring.stopping = Some((code, now));
            return Ok(Answer::Later);
        }
        Ok(Answer::Reply(self.stopped(id, index)))
    }

    /// Ends stops that were waited for. True: the control path waits.
    fn finish_stops(&mut self, id: u64) -> bool {
        let (now, drain_max) = (self.now, self.options.limits.drain_max);
        for index in 0..RINGS {
            let backend = self.backend(id);
            let class = backend.class;
            let thread = backend.thread;
            let ring = &backend.rings[index];
            let Some((code, since)) = ring.stopping else { continue };
            let idle = ring.taken.is_empty() && ring.done.is_empty() && ring.again.is_empty();
            let stored = self.mem.threads.borrow()[thread].queue.is_empty();
            // SPDK gives up after three seconds and answers all the same: three times what a drain may take by default.
            let bored = class == Class::Spdk && now.since(since).0 > 3 * drain_max.0;
            if !(bored || idle && stored) {
                self.wake_control(id, now + Nanos::from_micros(5));
                return true;
            }
            self.backend(id).rings[index].stopping = None;
            let base = self.backend(id).rings[index].started_at;
            let mut reply = self.stopped(id, index as u32);
            if !idle {
                // What DPDK recorded at the start.
                reply = Reply::VringState(VringState { index: index as u32, value: u32::from(base) });
            }
            self.reply(id, code, &reply);
        }
        false
    }

    fn stopped(&mut self, id: u64, index: u32) -> Reply {
        let lies = self.options.sabotage == Sabotage::LiesAboutBase;
        let backend = self.backend(id);
        let ring = &mut backend.rings[index as usize];
        let value = u32::from(if lies { ring.used } else { ring.next });
        ring.started = false;
        ring.look = false;
        (ring.kick, ring.call) = (None, None);
        Reply::VringState(VringState { index, value })
    }
}
