//! Requests of the VMM.
//!
//! The broker answers from its own record wherever it can, so that a backend that hangs cannot hang the VMM. A change that must
//! reach the backends is mirrored to all of them and acknowledged when they have acknowledged it, or after
//! [`crate::Limits::answer_max`]; a stop is answered when the ring is proved quiet.

use serde::{Deserialize, Serialize};
use warmswap_wire::{
    ConfigSpace, InflightDescription, MemoryRegion, ProtocolFeatures, Reply, Request, RequestCode, VirtioFeatures,
    VringState,
};
use warmswap_zoo::{Animal, loose};

use super::{Pair, Step};
use crate::event::{Action, BackendId};
use crate::failover::{Kind, Phase};
use crate::journal::Entry;
use crate::link::Purpose;
use crate::time::Nanos;

/// The VMM's request that is waiting for its answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ticket {
    /// A change that backends must acknowledge.
    Mirror {
        number: u64,
        code: RequestCode,
        waiting: Vec<BackendId>,
        result: u64,
        deadline: Nanos,
        strict: bool,
        /// The VMM waits for an acknowledgement. If not, its next request waits: the answer to that says that this was done.
        answered: bool,
    },
    /// A ring that is being stopped.
    Stop { ring: u32, deadline: Nanos },
}

impl Ticket {
    pub(crate) fn deadline(&self) -> Nanos {
        match self {
            Ticket::Mirror { deadline, .. } | Ticket::Stop { deadline, .. } => *deadline,
        }
    }
}

impl Pair {
    pub(crate) fn vmm_arrived(&mut self, step: &mut Step<'_>) {
        self.vmm_connected = true;
        self.counters.vmm_connections += 1;
        step.out.journal(Entry::info("VmmConnected"));
    }

    pub(crate) fn vmm_request(&mut self, request: Request, need_reply: bool, step: &mut Step<'_>) {
        assert!(self.wants_request(), "requests are delivered one at a time");
        self.counters.vmm_requests += 1;
        let code = request.code();
        if let Some(feature) =
            feature_of(code).filter(|it| self.offer.as_ref().is_some_and(|offer| offer.protocol & it.bits() == 0))
        {
            let reason = format!("{} belongs to {feature:?}, which was not offered", code.name());
            self.close_request_fds(&request, step);
            return self.refuse_request(code, &reason, need_reply, step);
        }
        match request {
            Request::GetFeatures
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::GetMaxMemSlots
            | Request::GetConfig(_) => self.answer_from_record(&request, step),
            Request::GetVringBase(state) => self.vmm_stops_ring(state.index, step),
            Request::SetOwner | Request::ResetOwner => self.acknowledge(code, need_reply, 0, step),
            Request::SetFeatures(features) => self.set_features(features, need_reply, step),
            Request::SetProtocolFeatures(features) => {
                let offered =
                    self.offer.as_ref().map_or(0, |offer| offer.protocol) | ProtocolFeatures::REPLY_ACK.bits();
                if features & !offered != 0 {
                    let reason = format!("protocol features {:#x} were not offered", features & !offered);
                    return self.refuse_request(code, &reason, need_reply, step);
                }
                self.session.record(&request, step.out);
                self.acknowledge(code, need_reply, 0, step);
            }
            Request::SetMemTable(_) | Request::AddMemReg { .. } | Request::RemMemReg(_) => {
                self.change_memory(&request, need_reply, step);
            }
            Request::SetLogBase { region, fd } => self.set_log(&Request::SetLogBase { region, fd }, need_reply, step),
            Request::SetVringNum(state) => self.set_ring_size(state, need_reply, step),
            Request::SetLogFd(_) | Request::NetSetMtu(_) => {
                self.session.record(&request, step.out);
                self.mirror(&request, need_reply, step);
            }
            Request::SetConfig(config) => self.set_config(config, need_reply, step),
            Request::SendRarp(_) => {
                self.tell_serving(&request, step);
                self.acknowledge(code, need_reply, 0, step);
            }
            Request::SetBackendReqFd(_) => {
                self.session.record(&request, step.out);
                self.acknowledge(code, need_reply, 0, step);
            }
            Request::SetVringKick(_)
            | Request::SetVringCall(_)
            | Request::SetVringErr(_)
            | Request::SetVringAddr(_)
            | Request::SetVringBase(_)
            | Request::SetVringEnable(_) => self.ring_request(&request, need_reply, step),
            _ => {
                let reason = format!("{} belongs to a feature that is masked", code.name());
                self.close_request_fds(&request, step);
                self.refuse_request(code, &reason, need_reply, step);
            }
        }
    }

    fn answer_from_record(&mut self, request: &Request, step: &mut Step<'_>) {
        let Some(offer) = &self.offer else { return };
        let reply = match request {
            Request::GetFeatures => Reply::U64(offer.features),
            // REPLY_ACK ends here, so it can be offered whatever the backends do.
            Request::GetProtocolFeatures => Reply::U64(offer.protocol | ProtocolFeatures::REPLY_ACK.bits()),
            Request::GetQueueNum => Reply::U64(offer.queues),
            Request::GetMaxMemSlots => Reply::U64(offer.mem_slots),
            Request::GetConfig(wanted) => {
                Reply::Config(config_slice(&self.session.written_over(&offer.config), wanted))
            }
            _ => return,
        };
        self.reply(request.code(), &reply, step);
    }

    fn set_features(&mut self, features: u64, need_reply: bool, step: &mut Step<'_>) {
        let offered = self.offer.as_ref().map_or(0, |offer| offer.features);
        let surplus = features & !offered;
        if surplus != 0 {
            let reason = format!("features {surplus:#x} were not offered (offered: {offered:#x})");
            self.refuse_request(RequestCode::SetFeatures, &reason, need_reply, step);
            return;
        }
        let could_warm = self.session.can_warm();
        self.session.record(&Request::SetFeatures(features), step.out);
        if could_warm {
            // The protocol features belong to the links, whatever the VMM does with its own.
            let request = Request::SetFeatures(self.link_features());
            self.mirror(&request, need_reply, step);
        } else {
            self.acknowledge(RequestCode::SetFeatures, need_reply, 0, step);
            self.warm_all(step);
        }
    }

    /// The features a link is told: what the VMM accepted, and the bit that makes protocol features and per-ring enabling work.
    pub(crate) fn link_features(&self) -> u64 {
        let bit = VirtioFeatures::PROTOCOL_FEATURES.bits();
        self.session.features.unwrap_or(0) | self.offer.as_ref().map_or(0, |offer| offer.features & bit)
    }

    fn change_memory(&mut self, request: &Request, need_reply: bool, step: &mut Step<'_>) {
        let code = request.code();
        if let Err(error) = self.map_change(request, step) {
            self.close_request_fds(request, step);
            self.refuse_request(code, &error, need_reply, step);
            return;
        }
        if let Request::SetMemTable(_) = request {
            self.give_up_canaries(step);
        }
        let could_warm = self.session.can_warm();
        if could_warm {
            self.note_leaving(request);
        }
        self.session.record(request, step.out);
        self.reattach_rings(step);
        if could_warm {
            self.mirror(request, need_reply, step);
        } else {
            self.acknowledge(code, need_reply, 0, step);
            self.warm_all(step);
        }
    }

    /// Notes which regions a change takes away, before it is recorded.
    fn note_leaving(&mut self, request: &Request) {
        let number = self.tickets + 1;
        let known = self.session.memory.iter().map(|(region, _)| *region);
        match request {
            Request::RemMemReg(region) => {
                self.leaving.extend(known.filter(|it| it.guest_addr == region.guest_addr).map(|it| (number, it)));
            }
            Request::SetMemTable(regions) => {
                let stays = |it: &MemoryRegion| regions.iter().any(|(region, _)| region == it);
                self.leaving.extend(known.filter(|it| !stays(it)).map(|it| (number, it)));
            }
            _ => {}
        }
    }

    /// Whether a change puts memory where the serving backend may still have other memory.
    fn replaces_what_is_leaving(&self, request: &Request) -> bool {
        let overlaps = |new: &MemoryRegion| {
            let ends_before = |one: &MemoryRegion, other: &MemoryRegion| one.guest_addr + one.size <= other.guest_addr;
            self.leaving.iter().any(|(_, old)| !ends_before(old, new) && !ends_before(new, old))
        };
        match request {
            Request::AddMemReg { region, .. } => overlaps(region),
            Request::SetMemTable(regions) => regions.iter().any(|(region, _)| overlaps(region)),
            _ => false,
        }
    }

    /// Maps the recorded table again, after another one was refused.
    fn restore_memory(&mut self, step: &mut Step<'_>) {
        for (region, fd) in &self.session.memory {
            if let Err(error) = step.memory.map(region, *fd) {
                step.out.journal(Entry::error("MemoryLost").with("reason", error.to_string()));
            }
        }
        self.reattach_rings(step);
    }

    fn map_change(&mut self, request: &Request, step: &mut Step<'_>) -> Result<(), String> {
        match request {
            Request::SetMemTable(regions) => {
                for (old, _) in &self.session.memory {
                    step.memory.unmap(old.guest_addr);
                }
                for (at, (region, fd)) in regions.iter().enumerate() {
                    if let Err(error) = step.memory.map(region, *fd) {
                        regions[..at].iter().for_each(|(mapped, _)| step.memory.unmap(mapped.guest_addr));
                        self.restore_memory(step);
                        return Err(error.to_string());
                    }
                }
            }
            Request::AddMemReg { region, fd } => {
                let fd = fd.ok_or("ADD_MEM_REG came without a descriptor: guest memory is not shared")?;
                if self.session.memory.len() as u64 >= self.offer.as_ref().map_or(0, |offer| offer.mem_slots) {
                    return Err(format!("more than {} memory regions", self.session.memory.len()));
                }
                step.memory.map(region, fd).map_err(|error| error.to_string())?;
            }
            Request::RemMemReg(region) => {
                if self.session.find_region(region).is_none() {
                    return Err(format!("there is no memory region at {:#x}", region.guest_addr));
                }
                step.memory.unmap(region.guest_addr);
            }
            _ => {}
        }
        Ok(())
    }

    fn set_log(&mut self, request: &Request, need_reply: bool, step: &mut Step<'_>) {
        let Request::SetLogBase { region, fd: Some(fd) } = request else {
            return self.refuse_request(RequestCode::SetLogBase, "it came without a descriptor", true, step);
        };
        if let Err(error) = step.memory.set_log(Some((*region, *fd))) {
            // Writes go on being marked where they were.
            let _before = step.memory.set_log(self.session.log);
            self.close_request_fds(request, step);
            return self.refuse_request(RequestCode::SetLogBase, &error.to_string(), true, step);
        }
        self.session.record(request, step.out);
        // With LOG_SHMFD the message has a reply of its own.
        self.mirror(request, need_reply || self.logs_by_descriptor(), step);
    }

    /// The parts of a running ring lie where its size says: it cannot change under the observer and the backend.
    fn set_ring_size(&mut self, state: VringState, need_reply: bool, step: &mut Step<'_>) {
        let queues = self.offer.as_ref().map_or(0, |offer| offer.queues);
        let started = self.session.ring(state.index).is_some_and(|ring| ring.started);
        let reason = if u64::from(state.index) >= queues {
            format!("the VMM uses ring {}, the backends serve {queues}", state.index)
        } else if started {
            format!("ring {} is running", state.index)
        } else {
            let request = Request::SetVringNum(state);
            self.session.record(&request, step.out);
            return self.mirror(&request, need_reply, step);
        };
        self.refuse_request(RequestCode::SetVringNum, &reason, need_reply, step);
    }

    fn set_config(&mut self, config: ConfigSpace, need_reply: bool, step: &mut Step<'_>) {
        if !self.session.has_room_for(&config) {
            let reason = "too many different writes to the configuration space";
            return self.refuse_request(RequestCode::SetConfig, reason, need_reply, step);
        }
        let request = Request::SetConfig(config);
        self.session.record(&request, step.out);
        self.mirror(&request, need_reply, step);
    }

    /// Tells every backend that mirrors the session, and answers the VMM when they have it.
    fn mirror(&mut self, request: &Request, need_reply: bool, step: &mut Step<'_>) {
        let code = request.code();
        self.tickets += 1;
        let number = self.tickets;
        // A VMM without acknowledgements takes the answer to its next question for one, and lets the guest use the memory.
        let waits =
            need_reply || matches!(code, RequestCode::SetMemTable | RequestCode::AddMemReg | RequestCode::RemMemReg);
        let waits = if loose(Animal::MemoryAckedEarly) { need_reply } else { waits };
        let primary_only = is_told_the_primary_alone(request);
        let mut waiting = Vec::new();
        // The size of a ring that a canary has borrowed is told when the canary gives it back.
        let borrowed = |link: &crate::link::Link| matches!(request, Request::SetVringNum(_)) && !link.is_free();
        let primary = self.primary;
        let hears = |link: &crate::link::Link| !primary_only || Some(link.id) == primary;
        for link in self.links.iter_mut().filter(|link| link.mirrors() && !borrowed(link) && hears(link)) {
            let (adapted, then) = link.adapted(request);
            let request = adapted.as_ref().unwrap_or(request);
            if waits {
                link.ask(request, Purpose::Mirror(number), step.out);
                waiting.push(link.id);
            } else {
                link.tell(request, step.out);
            }
            then.iter().for_each(|request| link.tell(request, step.out));
        }
        if waits && let Some(dying) = self.dying() {
            waiting.push(dying);
        }
        let strict = self.must_be_applied(request);
        if !waiting.is_empty() {
            let deadline = step.now + self.config.limits.answer_max;
            let answered = need_reply;
            self.ticket = Some(Ticket::Mirror { number, code, waiting, result: 0, deadline, strict, answered });
        } else if need_reply {
            self.answer_ack(code, 0, step);
        }
    }

    /// The backend that is being fenced and may still serve.
    fn dying(&self) -> Option<BackendId> {
        let failover = self.failover.as_ref().filter(|failover| failover.phase == Phase::Fencing)?;
        Some(failover.victim)
    }

    /// Whether a change must not be called done before the serving backend has made it: what it writes before it marks its writes in the
    /// dirty log would be missing at the destination of a migration, and what it does in memory that is gone, where the guest has other
    /// memory now, is lost. It is bounded all the same: a backend that stays silent is fenced.
    fn must_be_applied(&self, request: &Request) -> bool {
        match request {
            _ if loose(Animal::LogAckedEarly) => false,
            Request::SetLogBase { .. } => true,
            Request::SetFeatures(_) => self.session.log.is_some(),
            _ => self.replaces_what_is_leaving(request) && !loose(Animal::OldMemoryUsed),
        }
    }

    /// Puts off the answer to a change the serving backend has not made yet, and asks it for a sign of life.
    fn insist(&mut self, step: &mut Step<'_>) -> bool {
        let serving = self.serving();
        let Some(Ticket::Mirror { waiting, deadline, strict: true, .. }) = &mut self.ticket else { return false };
        let Some(serving) = serving.filter(|id| waiting.contains(id)) else { return false };
        *deadline = step.now + self.config.limits.hang;
        let now = step.now;
        if let Some(link) = self.link_mut(serving) {
            link.ping(now, step.out);
        }
        true
    }

    /// A backend has acknowledged a mirrored change. Only the primary's refusal is the VMM's business.
    pub(crate) fn mirrored(&mut self, backend: BackendId, number: u64, value: u64, step: &mut Step<'_>) {
        // Roles may change below.
        let primary = self.primary == Some(backend);
        if value != 0 && self.failover.as_ref().is_some_and(|failover| failover.target == Some(backend)) {
            // It has been given rings: it is fenced before anybody else is.
            self.backend_lost(backend, "it refused a change that the VMM made", step);
        } else if value != 0 && self.primary != Some(backend) {
            self.lose_shadow(backend, "it refused a change that the VMM made", step);
        }
        if self.serving() == Some(backend) {
            self.leaving.retain(|(told, _)| *told > number);
        }
        let Some(Ticket::Mirror { number: current, waiting, result, .. }) = &mut self.ticket else { return };
        if *current != number {
            return;
        }
        waiting.retain(|id| *id != backend);
        if primary {
            *result = value;
        }
        self.finish_mirror(step);
    }

    /// A backend that is gone acknowledges nothing.
    pub(crate) fn stop_waiting_for(&mut self, backend: BackendId, step: &mut Step<'_>) {
        if let Some(Ticket::Mirror { waiting, .. }) = &mut self.ticket {
            waiting.retain(|id| *id != backend);
            self.finish_mirror(step);
        }
    }

    fn finish_mirror(&mut self, step: &mut Step<'_>) {
        if let Some(Ticket::Mirror { code, waiting, result, answered, .. }) = &self.ticket
            && waiting.is_empty()
        {
            let (code, result, answered) = (*code, *result, *answered);
            self.ticket = None;
            self.acknowledge(code, answered, result, step);
        }
    }

    pub(crate) fn poll_ticket(&mut self, step: &mut Step<'_>) {
        match &self.ticket {
            Some(ticket) if ticket.deadline() <= step.now => {}
            _ => return,
        }
        if self.insist(step) {
            return;
        }
        match self.ticket.take() {
            Some(Ticket::Mirror { code, waiting, answered, .. }) => {
                self.counters.answered_from_record += 1;
                step.out.journal(
                    Entry::warning("AnsweredFromRecord")
                        .with("request", code.name())
                        .with("silent", waiting.first().map_or(0, |id| id.0)),
                );
                self.acknowledge(code, answered, 0, step);
            }
            Some(Ticket::Stop { ring, deadline }) => {
                self.ticket = Some(Ticket::Stop { ring, deadline });
                self.stop_overdue(ring, step);
            }
            None => {}
        }
    }

    /// Refuses what could not even be decoded.
    pub(crate) fn refuse_message(&mut self, request: u32, reason: &str, need_reply: bool, step: &mut Step<'_>) {
        self.counters.refused_messages += 1;
        step.out.journal(
            Entry::warning("MessageRefused").with("peer", "vmm").with("request", request).with("reason", reason),
        );
        if RequestCode::from_id(request).is_some_and(RequestCode::always_replies) {
            // It waits for an answer of a form that a refusal does not have.
            step.out.push(Action::DropVmm);
        } else if need_reply {
            let (mut bytes, mut fds) = (Vec::new(), Vec::new());
            Reply::U64(1).encode(request, &mut bytes, &mut fds);
            step.out.push(Action::SendVmm { bytes, fds });
        }
    }

    pub(crate) fn refuse_request(&mut self, code: RequestCode, reason: &str, need_reply: bool, step: &mut Step<'_>) {
        self.counters.refused_messages += 1;
        step.out.journal(
            Entry::warning("MessageRefused").with("peer", "vmm").with("request", code.name()).with("reason", reason),
        );
        match code {
            RequestCode::GetInflightFd => {
                let region = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 0, queue_size: 0 };
                self.reply(code, &Reply::Inflight { region, fd: None }, step);
            }
            // Replies that must carry a descriptor cannot be refused in the protocol: the connection is.
            RequestCode::PostcopyAdvise | RequestCode::GetSharedObject | RequestCode::CreateCryptoSession => {
                step.out.push(Action::DropVmm);
            }
            _ if code.always_replies() || need_reply => self.reply(code, &Reply::U64(1), step),
            _ => {}
        }
    }

    pub(crate) fn close_request_fds(&mut self, request: &Request, step: &mut Step<'_>) {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        request.encode(warmswap_wire::HeaderFlags::empty(), &mut bytes, &mut fds);
        fds.into_iter().for_each(|fd| step.out.push(Action::Close(fd)));
    }

    pub(crate) fn acknowledge(&mut self, code: RequestCode, need_reply: bool, value: u64, step: &mut Step<'_>) {
        if need_reply {
            self.answer_ack(code, value, step);
        }
    }

    fn answer_ack(&mut self, code: RequestCode, value: u64, step: &mut Step<'_>) {
        // With LOG_SHMFD a front-end waits for as many bytes as it sent (rust-vmm's `vhost`) or takes any number (QEMU).
        let reply = match self.session.log {
            Some((region, _)) if code == RequestCode::SetLogBase && self.logs_by_descriptor() => Reply::Log(region),
            _ => Reply::U64(value),
        };
        self.reply(code, &reply, step);
    }

    fn logs_by_descriptor(&self) -> bool {
        let shmfd = ProtocolFeatures::LOG_SHMFD.bits();
        self.session.protocol_features.is_some_and(|bits| bits & shmfd != 0)
    }

    pub(crate) fn reply_base(&mut self, ring: u32, base: u16, step: &mut Step<'_>) {
        let state = VringState { index: ring, value: u32::from(base) };
        self.reply(RequestCode::GetVringBase, &Reply::VringState(state), step);
    }

    fn reply(&mut self, code: RequestCode, reply: &Reply, step: &mut Step<'_>) {
        if !self.vmm_connected {
            return;
        }
        let (mut bytes, mut fds) = (Vec::with_capacity(32), Vec::new());
        reply.encode(code as u32, &mut bytes, &mut fds);
        step.out.push(Action::SendVmm { bytes, fds });
    }

    pub(crate) fn tell_serving(&mut self, request: &Request, step: &mut Step<'_>) {
        if let Some(link) = self.serving().and_then(|id| self.link_mut(id)) {
            link.tell(request, step.out);
        }
    }

    /// The VMM's connection ended: its rings are brought to rest, so that whoever comes next finds in memory exactly what is owed.
    pub(crate) fn vmm_gone(&mut self, reason: &str, step: &mut Step<'_>) {
        if !self.vmm_connected {
            return;
        }
        self.vmm_connected = false;
        self.ticket = None;
        if self.closing {
            // Another one came and went while the rings of the last one are brought to rest.
            return;
        }
        self.closing = true;
        step.out.journal(Entry::info("VmmGone").with("reason", reason));
        if self.failover.is_none() {
            self.drain_for_close(step);
        }
    }

    fn drain_for_close(&mut self, step: &mut Step<'_>) {
        let rings: Vec<u32> = self.served_rings();
        match self.serving() {
            Some(serving) if !rings.is_empty() => self.divert(serving, &rings, step),
            _ if rings.is_empty() => self.finish_close(step),
            _ => {
                let victim = self.primary.expect("served rings have a server");
                self.begin_failover(Kind::Crash, "the VMM disconnected".to_owned(), victim, None, false, step);
            }
        }
    }

    /// Nothing serves the old session any more: forget it and start fresh backends, which hold none of its memory.
    pub(crate) fn finish_close(&mut self, step: &mut Step<'_>) {
        self.closing = false;
        self.halted = None;
        self.suspects.clear();
        for index in 0..self.rings.len() {
            let index = u32::try_from(index).expect("bounded by RINGS_MAX");
            self.release_ring(index, false, step);
        }
        for (region, _) in &self.session.memory {
            step.memory.unmap(region.guest_addr);
        }
        self.leaving.clear();
        // Clearing a log never fails.
        let _cleared = step.memory.set_log(None);
        self.session.clear(step.out);
        self.recycle_backends(step);
    }
}

/// Whether a change reaches the primary alone: never, but for the zoo.
fn is_told_the_primary_alone(request: &Request) -> bool {
    match request {
        Request::SetMemTable(_) | Request::AddMemReg { .. } | Request::RemMemReg(_) => loose(Animal::MemoryStale),
        Request::SetFeatures(_) | Request::SetLogBase { .. } => loose(Animal::LogOnOneLeg),
        _ => false,
    }
}

/// The protocol feature a message belongs to, where a backend without it would not know the message.
fn feature_of(code: RequestCode) -> Option<ProtocolFeatures> {
    match code {
        RequestCode::GetMaxMemSlots | RequestCode::AddMemReg | RequestCode::RemMemReg => {
            Some(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
        }
        RequestCode::GetConfig | RequestCode::SetConfig => Some(ProtocolFeatures::CONFIG),
        RequestCode::NetSetMtu => Some(ProtocolFeatures::MTU),
        RequestCode::SendRarp => Some(ProtocolFeatures::RARP),
        RequestCode::SetBackendReqFd => Some(ProtocolFeatures::BACKEND_REQ),
        RequestCode::SetLogBase | RequestCode::SetLogFd => Some(ProtocolFeatures::LOG_SHMFD),
        _ => None,
    }
}

/// The asked-for part of the configuration space; none if it is not all there.
fn config_slice(config: &[u8], wanted: &ConfigSpace) -> Option<ConfigSpace> {
    let at = wanted.offset as usize;
    let bytes = config.get(at..at.checked_add(wanted.bytes.len())?)?;
    Some(ConfigSpace { offset: wanted.offset, flags: wanted.flags, bytes: bytes.to_vec() })
}
