//! The link to one backend: what it offers, what it has been told, what it still has to answer.
//!
//! ```text
//! Starting ─LinkUp─▶ Negotiating ─all answers─▶ Offered ─session known─▶ Warming ─ack─▶ Ready ─rings handed─▶ Active
//!     any state ─LinkDown, Exited, failover─▶ Ended
//! ```
//! Replies come in the order of the requests, so what is unanswered is a queue. Acknowledgements belong to one link: where the
//! backend lacks REPLY_ACK, a GET_FEATURES behind the message serves as one.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};
use warmswap_wire::{
    ConfigSpace, DeviceType, Error, FdSlot, Header, HeaderFlags, InflightDescription, ProtocolFeatures, Reply,
    ReplyKind, Request, RequestCode, VirtioFeatures, VringFd, VringState,
};
use warmswap_zoo::{Animal, loose};

use crate::canary::Canary;
use crate::event::{Action, Actions, BackendId, PrivateEvents};
use crate::time::Nanos;

/// Most replies one backend may owe.
const PENDING_MAX: usize = 4096;

/// Sizes of the configuration space to ask for, largest first: backends refuse what is longer than their own structure.
const CONFIG_SIZES: [u16; 9] = [256, 128, 96, 72, 60, 36, 24, 12, 8];

/// Where a backend stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkState {
    /// The process is being started or connected to.
    Starting,
    /// Features and limits are being asked for.
    Negotiating,
    /// Everything is known of it; it knows nothing of the session yet.
    Offered,
    /// The session is being replayed to it.
    Warming,
    /// It mirrors the session and could take over at once.
    Ready,
    /// It serves rings.
    Active,
    /// Its link or process is gone, or it is being fenced.
    Ended,
}

impl LinkState {
    /// The word used in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            LinkState::Starting => "starting",
            LinkState::Negotiating => "negotiating",
            LinkState::Offered => "offered",
            LinkState::Warming => "warming",
            LinkState::Ready => "ready",
            LinkState::Active => "active",
            LinkState::Ended => "ended",
        }
    }
}

/// What a backend can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Virtio features.
    pub features: u64,
    /// Protocol features, as it offers them.
    pub protocol: u64,
    /// Most rings.
    pub queues: u64,
    /// Most memory regions.
    pub mem_slots: u64,
    /// Configuration space.
    pub config: Vec<u8>,
}

/// What a reply is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    Features,
    Protocol,
    Queues,
    MemSlots,
    Config,
    ConfigAgain,
    Offered,
    Warm,
    /// A change mirrored for the VMM's request of that number.
    Mirror(u64),
    Divert,
    Stop {
        ring: u32,
    },
    Handed,
    /// Rings were given, or enabled, outside a failover.
    Enabled,
    /// A ring that was served with a call of the broker's own has the guest's.
    Called {
        ring: u32,
    },
    Isolated,
    Canary,
    Ping,
    Inflight,
    /// As `Inflight`, for the canary.
    CanaryRegion,
    /// It was given the channel for its state.
    State,
    /// It was asked whether its state went over whole.
    StateCheck,
    /// An answer nobody waits for.
    Nobody,
}

#[derive(Debug, Serialize, Deserialize)]
struct Pending {
    code: RequestCode,
    kind: ReplyKind,
    purpose: Purpose,
}

/// The link to one backend.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Link {
    pub(crate) id: BackendId,
    pub(crate) state: LinkState,
    pub(crate) offer: Offer,
    /// Protocol features in force on this link.
    pub(crate) protocol: ProtocolFeatures,
    pub(crate) private: Option<PrivateEvents>,
    pub(crate) started_at: Nanos,
    pub(crate) warming_at: Nanos,
    pub(crate) heard_at: Nanos,
    pub(crate) pinged_at: Option<Nanos>,
    /// When the first sign of life was asked for that has not come.
    asked_at: Option<Nanos>,
    /// How long it took to give the last one that came.
    pub(crate) round_trip: Option<Nanos>,
    /// It has been given a ring once: it may have touched guest memory.
    pub(crate) touched: bool,
    /// The in-flight region it keeps, where it keeps one.
    pub(crate) region: Region,
    /// Rings have been given to it with that region.
    pub(crate) region_used: bool,
    /// Entries of a ring it was asked to have room for, and rings.
    region_size: u16,
    region_queues: u16,
    /// One of its own for the canary, where the backend needs one.
    pub(crate) canary_region: Region,
    /// Memory of the broker's own that the backend has, or is about to have, as one more region.
    pub(crate) private_memory: Option<FdSlot>,
    /// It has been told of a session.
    pub(crate) warmed: bool,
    pub(crate) canary: Canary,
    /// Rings it has a call descriptor for.
    pub(crate) calls: BTreeSet<u32>,
    may_have_region: bool,
    backend_req: Option<FdSlot>,
    pending: VecDeque<Pending>,
    config_size: usize,
}

/// A backend's in-flight region, in its own layout. It is a witness when the backend dies, and is never given to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Region {
    None,
    Asked,
    Set { description: InflightDescription, fd: FdSlot },
}

/// A region for as many rings, of as many entries, as it was asked for, where its maker does not say it again (yc-libvhost-server). QEMU
/// goes by its own numbers as well.
pub(crate) fn named(made: InflightDescription, num_queues: u16, queue_size: u16) -> InflightDescription {
    let or = |said: u16, asked: u16| if said == 0 { asked } else { said };
    InflightDescription {
        num_queues: or(made.num_queues, num_queues),
        queue_size: or(made.queue_size, queue_size),
        ..made
    }
}

/// What a message from a backend meant.
#[derive(Debug, PartialEq)]
pub(crate) enum Answered {
    /// Negotiation goes on.
    Nothing,
    /// Negotiation is complete.
    Offered,
    /// The reply to a message sent for this purpose.
    For(Purpose, Reply),
}

impl Link {
    pub(crate) fn new(id: BackendId, may_have_region: bool, now: Nanos) -> Self {
        Link {
            id,
            state: LinkState::Starting,
            offer: Offer::default(),
            protocol: ProtocolFeatures::empty(),
            private: None,
            started_at: now,
            warming_at: now,
            heard_at: now,
            pinged_at: None,
            asked_at: None,
            round_trip: None,
            touched: false,
            region: Region::None,
            region_used: false,
            region_size: 0,
            region_queues: 0,
            canary_region: Region::None,
            private_memory: None,
            warmed: false,
            canary: Canary::new(now),
            calls: BTreeSet::new(),
            may_have_region,
            backend_req: None,
            pending: VecDeque::new(),
            config_size: 0,
        }
    }

    /// Whether it is connected and not given up.
    pub(crate) fn is_alive(&self) -> bool {
        !matches!(self.state, LinkState::Starting | LinkState::Ended)
    }

    /// Whether it has been told of the session and must hear of every change.
    pub(crate) fn mirrors(&self) -> bool {
        let warming = self.state == LinkState::Warming && !loose(Animal::WarmingMissesChanges);
        warming || matches!(self.state, LinkState::Ready | LinkState::Active)
    }

    pub(crate) fn connected(
        &mut self,
        backend_req: Option<FdSlot>,
        private: PrivateEvents,
        now: Nanos,
        out: &mut Actions,
    ) {
        self.state = LinkState::Negotiating;
        self.backend_req = backend_req;
        self.private = Some(private);
        self.heard_at = now;
        self.ask(&Request::GetFeatures, Purpose::Features, out);
    }

    /// Closes the descriptors that belong to the link.
    pub(crate) fn end(&mut self, out: &mut Actions) {
        self.state = LinkState::Ended;
        self.pending.clear();
        let private = self.private.take().into_iter().flat_map(|events| [events.kick, events.call, events.probe]);
        for fd in self.backend_req.take().into_iter().chain(private) {
            out.push(Action::Close(fd));
        }
    }

    /// Closes what was kept of it beyond its end: regions are read after the death of the backend.
    pub(crate) fn forget(&mut self, out: &mut Actions) {
        self.end(out);
        for region in [&mut self.region, &mut self.canary_region] {
            if let Region::Set { fd, .. } = std::mem::replace(region, Region::None) {
                out.push(Action::Close(fd));
            }
        }
        if let Some(fd) = self.private_memory.take() {
            out.push(Action::Close(fd));
        }
    }

    /// Every descriptor that belongs to the link.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = FdSlot> + '_ {
        let private = self.private.into_iter().flat_map(|events| [events.kick, events.call, events.probe]);
        let regions = [self.region, self.canary_region].into_iter().filter_map(|region| match region {
            Region::Set { fd, .. } => Some(fd),
            _ => None,
        });
        private.chain(regions).chain(self.backend_req).chain(self.private_memory)
    }

    pub(crate) fn tracks_in_flight(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Whether rings may be given to it: a backend with in-flight tracking must have its region first. Asks for one if need be.
    pub(crate) fn region_is_set(&mut self, queues: u16, queue_size: u16, out: &mut Actions) -> bool {
        if !self.tracks_in_flight() {
            return true;
        }
        if self.region == Region::None {
            self.region = Region::Asked;
            (self.region_size, self.region_queues) = (queue_size, queues);
            let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: queues, queue_size };
            self.ask(&Request::GetInflightFd(wanted), Purpose::Inflight, out);
        }
        matches!(self.region, Region::Set { .. })
    }

    /// Gives up a region that does not fit rings which are about to be given to a backend that serves none: the driver has set them up
    /// anew, with indices of which the region knows nothing, or of another size.
    pub(crate) fn renew_region(&mut self, queue_size: u16, out: &mut Actions) {
        let Region::Set { fd, .. } = self.region else { return };
        // What was asked for counts, not what the backend calls it: nobody is asked for the same twice.
        let fits = loose(Animal::RegionNotRenewed) || (!self.region_used && self.region_size >= queue_size);
        if !fits {
            self.region = Region::None;
            self.region_used = false;
            out.push(Action::Close(fd));
        }
    }

    /// The backend has made a region: it gets it back, fresh, unless a canary reads with its own. Then it gets it behind that.
    pub(crate) fn region_made(&mut self, made: InflightDescription, fd: FdSlot, out: &mut Actions) {
        let description = named(made, self.region_queues, self.region_size);
        self.region = Region::Set { description, fd };
        if self.is_free() || loose(Animal::RegionSwappedInCanary) {
            self.tell(&Request::SetInflightFd { region: description, fd }, out);
        }
    }

    /// Sends a message that nobody waits for.
    pub(crate) fn tell(&mut self, request: &Request, out: &mut Actions) {
        let kind = self.unasked_reply(request.code());
        self.transmit(request, HeaderFlags::empty(), out);
        if let Some(kind) = kind {
            self.expect(request.code(), kind, Purpose::Nobody);
        }
    }

    /// Sends a message whose reply, or acknowledgement, is waited for.
    pub(crate) fn ask(&mut self, request: &Request, purpose: Purpose, out: &mut Actions) {
        let code = request.code();
        if let Some(kind) = self.unasked_reply(code) {
            self.transmit(request, HeaderFlags::empty(), out);
            self.expect(code, kind, purpose);
        } else if self.protocol.contains(ProtocolFeatures::REPLY_ACK) {
            self.transmit(request, HeaderFlags::NEED_REPLY, out);
            self.expect(code, ReplyKind::Ack, purpose);
        } else {
            self.transmit(request, HeaderFlags::empty(), out);
            self.transmit(&Request::GetFeatures, HeaderFlags::empty(), out);
            self.expect(RequestCode::GetFeatures, ReplyKind::Ack, purpose);
        }
    }

    /// The reply a message has on this link without being asked for one.
    fn unasked_reply(&self, code: RequestCode) -> Option<ReplyKind> {
        let log = code == RequestCode::SetLogBase && self.protocol.contains(ProtocolFeatures::LOG_SHMFD);
        (code.always_replies() || log).then(|| code.reply_kind())
    }

    fn transmit(&mut self, request: &Request, flags: HeaderFlags, out: &mut Actions) {
        match request {
            Request::SetVringCall(call) if call.fd.is_some() => _ = self.calls.insert(call.index),
            Request::GetVringBase(_) if loose(Animal::CallForgotten) => {}
            Request::SetVringCall(VringFd { index, .. }) | Request::GetVringBase(VringState { index, .. }) => {
                self.calls.remove(index);
            }
            _ => {}
        }
        let (mut bytes, mut fds) = (Vec::with_capacity(64), Vec::new());
        request.encode(flags, &mut bytes, &mut fds);
        out.push(Action::SendLink { backend: self.id, bytes, fds });
    }

    fn expect(&mut self, code: RequestCode, kind: ReplyKind, purpose: Purpose) {
        self.pending.push_back(Pending { code, kind, purpose });
    }

    /// Whether it owes so many answers that it must be taken for silent.
    pub(crate) fn is_overrun(&self) -> bool {
        self.pending.len() > PENDING_MAX
    }

    /// Handles a message from the backend.
    pub(crate) fn message(
        &mut self,
        device: DeviceType,
        header: &Header,
        payload: &[u8],
        fds: &[FdSlot],
        now: Nanos,
        out: &mut Actions,
    ) -> Result<Answered, Error> {
        let name = RequestCode::from_id(header.request).map_or("an unknown message", RequestCode::name);
        let oldest = if loose(Animal::ReplyMismatched) { self.pending.pop_back() } else { self.pending.pop_front() };
        let Some(pending) = oldest else {
            return Err(Error::Direction { request: name, expected: false, found: header.is_reply() });
        };
        let code = pending.code;
        let reply = Reply::decode(code as u32, code.name(), pending.kind, header, payload, fds)?;
        self.heard_at = now;
        // An acknowledgement that is really the answer to a GET_FEATURES barrier carries features, not success.
        let barrier = code == RequestCode::GetFeatures && pending.kind == ReplyKind::Ack;
        let reply = if barrier { Reply::U64(0) } else { reply };
        match pending.purpose {
            Purpose::Ping => {
                self.pinged_at = None;
                self.round_trip = self.asked_at.take().map(|at| now.since(at)).or(self.round_trip);
                Ok(Answered::Nothing)
            }
            Purpose::Nobody => Ok(Answered::Nothing),
            Purpose::Features
            | Purpose::Protocol
            | Purpose::Queues
            | Purpose::MemSlots
            | Purpose::Config
            | Purpose::Offered => self.negotiate(device, pending.purpose, reply, out),
            purpose => Ok(Answered::For(purpose, reply)),
        }
    }

    fn negotiate(
        &mut self,
        device: DeviceType,
        purpose: Purpose,
        reply: Reply,
        out: &mut Actions,
    ) -> Result<Answered, Error> {
        match (purpose, reply) {
            (Purpose::Features, Reply::U64(features)) => {
                self.offer.features = features;
                self.offer.queues = 1;
                self.offer.mem_slots = warmswap_wire::REGIONS_MAX as u64;
                if features & VirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                    self.ask(&Request::SetOwner, Purpose::Offered, out);
                } else {
                    self.ask(&Request::GetProtocolFeatures, Purpose::Protocol, out);
                }
            }
            (Purpose::Protocol, Reply::U64(bits)) => self.settle_protocol(device, bits, out),
            (Purpose::Queues, Reply::U64(queues)) => self.offer.queues = queues,
            // One is kept for memory of the broker's own.
            (Purpose::MemSlots, Reply::U64(slots)) => self.offer.mem_slots = slots.saturating_sub(1).max(1),
            (Purpose::Config, Reply::Config(None)) => {
                self.config_size += 1;
                self.ask_config(out);
            }
            (Purpose::Config, Reply::Config(Some(config))) => {
                self.offer.config = config.bytes;
                self.ask(&Request::GetFeatures, Purpose::Offered, out);
            }
            (Purpose::Offered, _) => {
                self.state = LinkState::Offered;
                return Ok(Answered::Offered);
            }
            _ => {}
        }
        Ok(Answered::Nothing)
    }

    fn settle_protocol(&mut self, device: DeviceType, bits: u64, out: &mut Actions) {
        self.offer.protocol = bits;
        self.protocol = ProtocolFeatures::from_bits_truncate(bits) & device.link_features(self.may_have_region);
        if self.backend_req.is_none() {
            self.protocol.remove(ProtocolFeatures::BACKEND_REQ);
        }
        self.tell(&Request::SetProtocolFeatures(self.protocol.bits()), out);
        self.tell(&Request::SetOwner, out);
        if self.protocol.contains(ProtocolFeatures::BACKEND_REQ)
            && let Some(channel) = self.backend_req.take()
        {
            self.tell(&Request::SetBackendReqFd(channel), out);
            out.push(Action::Close(channel));
        }
        if self.protocol.contains(ProtocolFeatures::MQ) {
            self.ask(&Request::GetQueueNum, Purpose::Queues, out);
        }
        if self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            self.ask(&Request::GetMaxMemSlots, Purpose::MemSlots, out);
        }
        self.ask_config(out);
    }

    fn ask_config(&mut self, out: &mut Actions) {
        match CONFIG_SIZES.get(self.config_size) {
            Some(size) if self.protocol.contains(ProtocolFeatures::CONFIG) => {
                let config = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; usize::from(*size)] };
                self.ask(&Request::GetConfig(config), Purpose::Config, out);
            }
            _ => self.ask(&Request::GetFeatures, Purpose::Offered, out),
        }
    }

    /// Reads the whole configuration space once more, after a change.
    pub(crate) fn read_config_again(&mut self, out: &mut Actions) {
        let bytes = vec![0; self.offer.config.len()];
        if !bytes.is_empty() {
            self.ask(&Request::GetConfig(ConfigSpace { offset: 0, flags: 0, bytes }), Purpose::ConfigAgain, out);
        }
    }

    /// It is left alone for now, and asked for a sign of life later.
    pub(crate) fn ask_again(&mut self, now: Nanos) {
        self.pinged_at = None;
        self.heard_at = now;
    }

    /// Nobody has listened for a while: what it says counts from now on.
    pub(crate) fn restart_clocks(&mut self, now: Nanos) {
        self.heard_at = now;
        self.warming_at = now;
        self.started_at = now;
        self.pinged_at = self.pinged_at.map(|_| now);
        self.asked_at = self.asked_at.map(|_| now);
    }

    /// Asks for a sign of life, unless one is owed already.
    pub(crate) fn ping(&mut self, now: Nanos, out: &mut Actions) {
        if self.pinged_at.is_none() {
            self.pinged_at = Some(now);
            self.asked_at.get_or_insert(now);
            self.ask(&Request::GetFeatures, Purpose::Ping, out);
        }
    }
}
