//! One front-end: what it has said, and what it is answered.
//!
//! Requests are answered in their order. Everything that concerns a running ring goes through its worker, whose reply is waited for:
//! when a request is acknowledged, it holds. Only the stop of a ring can take time, for it is answered when the last request that was
//! taken from the ring is completed; then `used.idx` equals the base.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::PollFlags;
use warmswap_socket::{Connection, Message};
use warmswap_wire::inflight::ring_bytes;
use warmswap_wire::{
    BackendRequest, ConfigSpace, FdSlot, HeaderFlags, InflightDescription, ProtocolFeatures, RINGS_MAX, Reply, Request,
    VirtioFeatures, VringAddr, VringFd, VringState,
};

use crate::device::{CONFIG_BYTES, F_CONFIG_WCE, F_FLUSH, PROTOCOL, Shape, WRITEBACK_AT};
use crate::log::DirtyLog;
use crate::memory::{Mapping, MemoryMap, REGIONS_MAX};
use crate::pool::{Patience, Pool, Waited};
use crate::queue::{Region, Start};
use crate::request::Limits;
use crate::ring::Place;
use crate::worker::{Command, Reply as WorkerReply};

/// Flags of a SET_CONFIG that is a wish of the driver. The specification and QEMU say 1 for a migration; rust-vmm's `vhost` says 1 for the
/// driver and 2 for a migration, so anything else may be one.
const CONFIG_OF_DRIVER: u32 = 0;

/// A ring as the front-end described it.
#[derive(Debug, Default)]
struct RingSetup {
    size: u16,
    addr: Option<VringAddr>,
    base: u16,
    kick: Option<OwnedFd>,
    /// The front-end has said which kick descriptor there is, or that there is none.
    kick_known: bool,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    started: bool,
    /// Its worker was asked for the stop; the answer has not come.
    stopping: bool,
}

/// Why a session ends.
#[derive(Debug)]
pub(crate) enum End {
    /// The front-end is gone, or said what cannot be followed.
    Lost(String),
    /// The process was asked to end.
    Asked,
}

/// What of the device its sessions share.
#[derive(Debug)]
pub(crate) struct Shared<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) shape: Shape,
    /// A session begins with a write cache.
    pub(crate) write_cache: bool,
    /// Readable when the process is asked to end.
    pub(crate) end: BorrowedFd<'a>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    shared: &'a Shared<'a>,
    shape: Shape,
    connection: Connection,
    features: u64,
    protocol: ProtocolFeatures,
    memory: Arc<MemoryMap>,
    rings: Vec<RingSetup>,
    inflight: Option<(InflightDescription, Arc<Mapping>)>,
    log: Option<Arc<DirtyLog>>,
    backend_channel: Option<Connection>,
    write_cache: bool,
}

/// What a request is answered with.
enum Outcome {
    /// An acknowledgement, if one is wanted.
    Done,
    Reply(Reply, Option<OwnedFd>),
}

impl<'a> Session<'a> {
    /// A session with a front-end that has just connected.
    pub(crate) fn new(connection: Connection, shared: &'a Shared<'a>) -> Self {
        let rings = std::iter::repeat_with(RingSetup::default).take(usize::from(shared.shape.queues)).collect();
        Session {
            shared,
            shape: shared.shape,
            connection,
            features: 0,
            protocol: ProtocolFeatures::empty(),
            memory: Arc::default(),
            rings,
            inflight: None,
            log: None,
            backend_channel: None,
            write_cache: shared.write_cache,
        }
    }

    /// Its socket.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// What its socket is waited for: messages, and room for what was not read yet.
    pub(crate) fn wants(&self) -> PollFlags {
        if self.connection.has_unsent() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    /// The size that the front-end was told of.
    pub(crate) fn sectors(&self) -> u64 {
        self.shape.sectors
    }

    /// The back-end's own channel, where the front-end has opened one.
    pub(crate) fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.backend_channel.as_ref().map(AsFd::as_fd)
    }

    /// Serves what has come.
    pub(crate) fn serve(&mut self) -> Result<(), End> {
        self.connection.flush().map_err(|error| End::Lost(error.to_string()))?;
        loop {
            match self.connection.receive() {
                Ok(Some(message)) => self.serve_message(message)?,
                Ok(None) => return Ok(()),
                Err(error) => return Err(End::Lost(error.to_string())),
            }
        }
    }

    /// Takes what the front-end says on the back-end's channel: acknowledgements, of which nothing depends.
    pub(crate) fn serve_channel(&mut self) {
        let lost = |channel: &mut Connection| loop {
            match channel.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        };
        if self.backend_channel.as_mut().is_some_and(lost) {
            self.backend_channel = None;
        }
    }

    fn serve_message(&mut self, message: Message) -> Result<(), End> {
        let Message { header, payload, fds } = message;
        let slots: Vec<FdSlot> = (0..fds.len() as u32).map(FdSlot).collect();
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        // Who asks for an acknowledgement has negotiated it, perhaps with this very message.
        let wants_ack = header.flags.contains(HeaderFlags::NEED_REPLY);
        let request = match Request::decode(&header, &payload, &slots) {
            Ok(request) => request,
            Err(error) if wants_ack => {
                crate::tell(&format!("a request was refused: {error}"));
                return self.send(header.request, &Reply::U64(1), &[]);
            }
            Err(error) => return Err(End::Lost(error.to_string())),
        };
        let (name, has_reply) = (request.code().name(), request.code().always_replies());
        match self.carry_out(request, &mut fds) {
            Ok(Outcome::Done) if wants_ack => self.send(header.request, &Reply::U64(0), &[]),
            Ok(Outcome::Done) => Ok(()),
            Ok(Outcome::Reply(reply, fd)) => {
                let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
                self.send(header.request, &reply, &fds)
            }
            Err(Refused::Asked) => Err(End::Asked),
            Err(Refused::Because(reason)) if wants_ack && !has_reply => {
                crate::tell(&format!("{name} was refused: {reason}"));
                self.send(header.request, &Reply::U64(1), &[])
            }
            // There is no other way to say that it was not done.
            Err(Refused::Because(reason)) => Err(End::Lost(format!("{name}: {reason}"))),
        }
    }

    fn send(&mut self, request: u32, reply: &Reply, fds: &[BorrowedFd<'_>]) -> Result<(), End> {
        let (mut bytes, mut slots) = (Vec::with_capacity(64), Vec::new());
        reply.encode(request, &mut bytes, &mut slots);
        self.connection.send(&bytes, fds).map_err(|error| End::Lost(error.to_string()))
    }

    fn carry_out(&mut self, request: Request, fds: &mut [Option<OwnedFd>]) -> Result<Outcome, Refused> {
        let mut fd = |slot: FdSlot| fds[slot.0 as usize].take().expect("each descriptor belongs to one field");
        let number = |value| Ok(Outcome::Reply(Reply::U64(value), None));
        match request {
            Request::GetFeatures => return number(self.shape.features()),
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::GetProtocolFeatures => return number(PROTOCOL.bits()),
            Request::SetProtocolFeatures(bits) => {
                self.protocol = ProtocolFeatures::from_bits_retain(bits);
                if !PROTOCOL.contains(self.protocol) {
                    return Err(format!("features {:#x} were not offered", bits & !PROTOCOL.bits()).into());
                }
            }
            Request::GetQueueNum => return number(u64::from(self.shape.queues)),
            Request::GetMaxMemSlots => return number(REGIONS_MAX as u64),
            // There is one owner: who is connected.
            Request::SetOwner | Request::ResetOwner => {}
            Request::SetBackendReqFd(slot) => {
                let channel = Connection::new(fd(slot)).map_err(|error| error.to_string())?;
                self.backend_channel = Some(channel);
            }
            Request::GetConfig(config) => return Ok(Outcome::Reply(Reply::Config(self.config(&config)), None)),
            Request::SetConfig(config) => self.set_config(&config)?,
            Request::SetMemTable(table) => {
                let mut memory = MemoryMap::default();
                for (region, slot) in table {
                    memory = memory.with(region, fd(slot).as_fd())?;
                }
                self.set_memory(memory)?;
            }
            Request::AddMemReg { region, fd: Some(slot) } => {
                let memory = self.memory.with(region, fd(slot).as_fd())?;
                self.set_memory(memory)?;
            }
            Request::AddMemReg { fd: None, .. } => return Err("it came without a descriptor".to_owned().into()),
            Request::RemMemReg(region) => {
                let memory = self.memory.without(&region).ok_or_else(|| "there is no such region".to_owned())?;
                self.set_memory(memory)?;
            }
            Request::SetLogBase { region, fd: Some(slot) } => {
                self.log = Some(Arc::new(DirtyLog::new(region, fd(slot).as_fd())?));
                self.tell_log()?;
                return number(0);
            }
            Request::SetLogBase { fd: None, .. } => return Err("it came without a descriptor".to_owned().into()),
            // What would be written there is said through the log itself.
            Request::SetLogFd(_) => {}
            Request::GetInflightFd(wanted) => return make_region(wanted).map_err(Refused::Because),
            Request::SetInflightFd { region, fd: slot } => self.set_region(region, fd(slot).as_fd())?,
            Request::ResetDevice => self.reset(Patience::Besides(self.shared.end))?,
            Request::GetVringBase(VringState { index, .. }) => return self.stop(index),
            Request::SetVringNum(VringState { index, value }) => {
                let size = u16::try_from(value).ok().filter(|size| size.is_power_of_two());
                let size = size.ok_or_else(|| format!("ring {index}: {value} is no power of two"))?;
                let ring = self.ring(index)?;
                if ring.started {
                    return Err(format!("ring {index} is running").into());
                }
                ring.size = size;
            }
            Request::SetVringBase(VringState { index, value }) => self.ring(index)?.base = value as u16,
            Request::SetVringAddr(addr) => self.set_addr(addr)?,
            Request::SetVringKick(VringFd { index, fd: slot }) => self.set_kick(index, slot.map(fd))?,
            Request::SetVringCall(VringFd { index, fd: slot }) => self.set_call(index, slot.map(fd))?,
            Request::SetVringErr(VringFd { index, fd: slot }) => self.set_err(index, slot.map(fd))?,
            Request::SetVringEnable(VringState { index, value }) => self.enable(index, value == 1)?,
            other => return Err(format!("{} is not supported", other.code().name()).into()),
        }
        Ok(Outcome::Done)
    }

    fn ring(&mut self, index: u32) -> Result<&mut RingSetup, String> {
        let count = self.rings.len();
        self.rings.get_mut(index as usize).ok_or_else(|| format!("ring {index}: the device has {count}"))
    }

    fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    fn set_features(&mut self, features: u64) -> Result<(), String> {
        let surplus = features & !self.shape.features();
        if surplus != 0 {
            return Err(format!("features {surplus:#x} were not offered"));
        }
        self.features = features;
        if !self.has(VirtioFeatures::PROTOCOL_FEATURES.bits()) {
            // Without the feature there is no message to enable them.
            for index in 0..self.rings.len() as u32 {
                self.enable(index, true)?;
            }
        }
        self.tell_log()?;
        self.tell_limits()
    }

    /// The log is in force while LOG_ALL is.
    fn tell_log(&self) -> Result<(), String> {
        let log = self.log.clone().filter(|_| self.has(VirtioFeatures::LOG_ALL.bits()));
        self.shared.pool.ask_all(|| Command::Log(log.clone()))
    }

    fn limits(&self) -> Limits {
        // A driver that can do neither does not know that there is a cache: it must not lose anything by it (virtio 1.3 §5.2.6.2).
        let cached = if self.has(F_CONFIG_WCE) { self.write_cache } else { self.has(F_FLUSH) && self.write_cache };
        Limits {
            sectors: self.shape.sectors,
            read_only: self.shape.read_only,
            write_through: !cached,
            block_sectors: u64::from(self.shape.block_size) / crate::image::SECTOR,
        }
    }

    fn tell_limits(&self) -> Result<(), String> {
        let limits = self.limits();
        self.shared.pool.ask_all(|| Command::Limits(limits))
    }

    /// Part of the configuration space; none if it does not lie inside.
    fn config(&self, wanted: &ConfigSpace) -> Option<ConfigSpace> {
        let whole = self.shape.config(self.write_cache);
        let bytes = whole.get(wanted.offset as usize..)?.get(..wanted.bytes.len())?.to_vec();
        Some(ConfigSpace { bytes, ..*wanted })
    }

    fn set_config(&mut self, config: &ConfigSpace) -> Result<(), String> {
        let at = config.offset as usize;
        if at + config.bytes.len() > CONFIG_BYTES {
            return Err(format!("{} bytes at {at} lie beyond the {CONFIG_BYTES} there are", config.bytes.len()));
        }
        // Everything else is read-only to a driver: "back-ends MUST NOT accept SET_CONFIG for read-only configuration space fields unless
        // the live migration bit is set" (SET_CONFIG). What is there already may be written by anybody.
        let whole = self.shape.config(self.write_cache);
        let differs = |(index, byte): (usize, &u8)| at + index != WRITEBACK_AT && whole[at + index] != *byte;
        if config.flags == CONFIG_OF_DRIVER && config.bytes.iter().enumerate().any(differs) {
            return Err(format!("{} bytes at {at} would change what a driver may only read", config.bytes.len()));
        }
        if let Some(byte) = WRITEBACK_AT.checked_sub(at).and_then(|at| config.bytes.get(at)) {
            self.write_cache = *byte != 0;
            self.tell_limits()?;
        }
        Ok(())
    }

    fn set_memory(&mut self, memory: MemoryMap) -> Result<(), String> {
        let memory = Arc::new(memory);
        let mut moves = Vec::new();
        for (index, ring) in self.rings.iter().enumerate().filter(|(_, ring)| ring.started) {
            let addr = ring.addr.as_ref().expect("a started ring has addresses");
            let place =
                Place::find(&memory, ring.size, addr).map_err(|why| format!("ring {index} is running, and {why}"))?;
            moves.push((index as u16, place));
        }
        self.memory = Arc::clone(&memory);
        for (index, place) in moves {
            self.shared.pool.ask(index, Command::Move(index, Arc::clone(&memory), place))?;
        }
        Ok(())
    }

    fn set_addr(&mut self, addr: VringAddr) -> Result<(), String> {
        let (memory, pool) = (Arc::clone(&self.memory), self.shared.pool);
        let index = addr.index;
        let ring = self.ring(index)?;
        if ring.started {
            // QEMU sends it again to a running ring when it begins or ends to log writes.
            let place = Place::find(&memory, ring.size, &addr).map_err(|why| format!("ring {index}: {why}"))?;
            ring.addr = Some(addr);
            return pool.ask(index as u16, Command::Move(index as u16, memory, place)).map(drop);
        }
        ring.addr = Some(addr);
        self.start_if_complete(index)
    }

    fn set_kick(&mut self, index: u32, kick: Option<OwnedFd>) -> Result<(), String> {
        kick.iter().for_each(dont_block);
        let pool = self.shared.pool;
        let ring = self.ring(index)?;
        ring.kick_known = true;
        if ring.started {
            return pool.ask(index as u16, Command::Kick(index as u16, kick)).map(drop);
        }
        ring.kick = kick;
        self.start_if_complete(index)
    }

    fn set_call(&mut self, index: u32, call: Option<OwnedFd>) -> Result<(), String> {
        call.iter().for_each(dont_block);
        let pool = self.shared.pool;
        let ring = self.ring(index)?;
        if ring.started {
            return pool.ask(index as u16, Command::Call(index as u16, call)).map(drop);
        }
        ring.call = call;
        Ok(())
    }

    fn set_err(&mut self, index: u32, err: Option<OwnedFd>) -> Result<(), String> {
        err.iter().for_each(dont_block);
        let pool = self.shared.pool;
        let ring = self.ring(index)?;
        if ring.started {
            return pool.ask(index as u16, Command::Err(index as u16, err)).map(drop);
        }
        ring.err = err;
        Ok(())
    }

    fn enable(&mut self, index: u32, enabled: bool) -> Result<(), String> {
        let pool = self.shared.pool;
        let ring = self.ring(index)?;
        ring.enabled = enabled;
        if ring.started {
            return pool.ask(index as u16, Command::Enable(index as u16, enabled)).map(drop);
        }
        Ok(())
    }

    /// A ring starts when its kick descriptor comes, or its absence is said, and everything else is known.
    fn start_if_complete(&mut self, index: u32) -> Result<(), String> {
        let (event_idx, indirect) =
            (self.has(VirtioFeatures::EVENT_IDX.bits()), self.has(VirtioFeatures::INDIRECT_DESC.bits()));
        let log = self.log.clone().filter(|_| self.has(VirtioFeatures::LOG_ALL.bits()));
        let memory = Arc::clone(&self.memory);
        let ring = self.ring(index)?;
        let Some(addr) = ring.addr.filter(|_| ring.kick_known && ring.size > 0) else { return Ok(()) };
        let place = Place::find(&memory, ring.size, &addr).map_err(|why| format!("ring {index}: {why}"))?;
        let size = ring.size;
        let region = self.region_of(index, size)?;
        let ring = self.ring(index)?;
        let start = Start {
            index: index as u16,
            place,
            memory,
            base: ring.base,
            region,
            event_idx,
            indirect,
            enabled: ring.enabled,
            kick: ring.kick.take(),
            call: ring.call.take(),
            err: ring.err.take(),
            log,
        };
        ring.started = true;
        let asked = self.shared.pool.ask(index as u16, Command::Start(Box::new(start)));
        match asked {
            Ok(WorkerReply::Started(recovered)) => {
                if recovered > 0 {
                    crate::tell(&format!(
                        "ring {index}: {recovered} requests of the last back-end are submitted again"
                    ));
                }
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(reason) => {
                self.ring(index)?.started = false;
                Err(reason)
            }
        }
    }

    fn region_of(&self, index: u32, size: u16) -> Result<Option<Region>, String> {
        let Some((region, mapping)) = &self.inflight else { return Ok(None) };
        if index >= u32::from(region.num_queues) {
            return Err(format!("ring {index}: the in-flight region is for {} rings", region.num_queues));
        }
        let stride = region.mmap_size / u64::from(region.num_queues);
        let bytes = ring_bytes(size);
        if bytes > stride {
            return Err(format!("ring {index}: {bytes} bytes of in-flight region are needed, it has {stride}"));
        }
        let window = mapping.window(region.mmap_offset + stride * u64::from(index), bytes);
        let window = window.filter(|it| it.is_aligned(8)).ok_or("the in-flight region is not aligned to 8 bytes")?;
        Ok(Some(Region(window)))
    }

    fn set_region(&mut self, region: InflightDescription, fd: BorrowedFd<'_>) -> Result<(), String> {
        if region.num_queues == 0 {
            return Err("an in-flight region for no ring".to_owned());
        }
        let end = region.mmap_offset.checked_add(region.mmap_size).ok_or("its size and offset wrap around")?;
        let mapping = Mapping::new(fd, end).map_err(|error| format!("the in-flight region: {error}"))?;
        self.inflight = Some((region, Arc::new(mapping)));
        Ok(())
    }

    /// GET_VRING_BASE: answered when everything that was taken from the ring is completed.
    fn stop(&mut self, index: u32) -> Result<Outcome, Refused> {
        let base = self.stop_ring(index, Patience::Besides(self.shared.end))?;
        let state = VringState { index, value: u32::from(base) };
        Ok(Outcome::Reply(Reply::VringState(state), None))
    }

    fn stop_ring(&mut self, index: u32, patience: Patience<'_>) -> Result<u16, Refused> {
        let pool = self.shared.pool;
        let ring = self.ring(index)?;
        if !ring.started {
            return Ok(ring.base);
        }
        if !std::mem::replace(&mut ring.stopping, true) {
            pool.stop(index as u16);
        }
        let base = match pool.wait(index as u16, patience)? {
            Waited::Reply(WorkerReply::Stopped(base)) => base,
            Waited::Reply(other) => return Err(format!("the worker answered a stop with {other:?}").into()),
            Waited::Interrupted => return Err(Refused::Asked),
        };
        *ring = RingSetup { size: ring.size, addr: ring.addr, base, enabled: ring.enabled, ..RingSetup::default() };
        Ok(base)
    }

    /// Stops every ring, and forgets what was said of it.
    fn reset(&mut self, patience: Patience<'_>) -> Result<(), Refused> {
        for index in 0..self.rings.len() as u32 {
            self.stop_ring(index, patience)?;
            *self.ring(index)? = RingSetup::default();
        }
        Ok(())
    }

    /// The front-end is gone: brings every ring to rest, however long that takes. True if the process was asked to end before.
    pub(crate) fn end(mut self) -> bool {
        match self.reset(Patience::Besides(self.shared.end)) {
            Ok(()) => false,
            Err(Refused::Asked) => true,
            Err(Refused::Because(reason)) => {
                crate::tell(&format!("a ring could not be stopped: {reason}"));
                false
            }
        }
    }

    /// The process ends: brings to rest what comes to rest until then. What does not is for whoever serves the rings next.
    pub(crate) fn end_until(mut self, until: u64) {
        match self.reset(Patience::Until(until)) {
            Ok(()) => {}
            Err(Refused::Asked) => {
                crate::tell("requests are still in flight: they are left to whoever serves the rings next");
            }
            Err(Refused::Because(reason)) => crate::tell(&format!("a ring could not be stopped: {reason}")),
        }
    }

    /// The image has another size.
    pub(crate) fn resize(&mut self, sectors: u64) -> Result<(), String> {
        self.shape.sectors = sectors;
        self.tell_limits()?;
        let Some(channel) = &mut self.backend_channel else { return Ok(()) };
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        BackendRequest::ConfigChange.encode(HeaderFlags::empty(), &mut bytes, &mut slots);
        channel.send(&bytes, &[]).map_err(|error| format!("the front-end could not be told of it: {error}"))
    }
}

/// Why a request is not carried out.
#[derive(Debug)]
enum Refused {
    Because(String),
    /// The process was asked to end, or its patience ended, while something was waited for.
    Asked,
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Refused::Because(reason)
    }
}

/// GET_INFLIGHT_FD: memory for every ring that is asked for, all zero.
fn make_region(wanted: InflightDescription) -> Result<Outcome, String> {
    let InflightDescription { num_queues, queue_size, .. } = wanted;
    if num_queues == 0 || u32::from(num_queues) > RINGS_MAX || queue_size == 0 {
        return Err(format!("an in-flight region for {num_queues} rings of {queue_size} entries"));
    }
    let mmap_size = ring_bytes(queue_size) * u64::from(num_queues);
    let make = || -> rustix::io::Result<OwnedFd> {
        let fd = rustix::fs::memfd_create("warmswap-inflight", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, mmap_size)?;
        Ok(fd)
    };
    let fd = make().map_err(|error| format!("the in-flight region: {error}"))?;
    let region = InflightDescription { mmap_size, mmap_offset: 0, num_queues, queue_size };
    Ok(Outcome::Reply(Reply::Inflight { region, fd: Some(FdSlot(0)) }, Some(fd)))
}

/// Eventfds are shared with others, who may take what they hold: a read must not wait for more.
fn dont_block(fd: &OwnedFd) {
    // One that cannot be changed is used as it is.
    let _kept = rustix::io::ioctl_fionbio(fd, true);
}

const _: () = assert!(CONFIG_BYTES <= ConfigSpace::SIZE_MAX);
