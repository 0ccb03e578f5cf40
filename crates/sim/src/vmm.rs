//! The VMM: real messages, and the rules by which VMMs connect again.
//!
//! Checked here: every request is answered, in the form it must have, within a bound.

use std::collections::VecDeque;

use warmswap_core::Nanos;
use warmswap_wire::{
    FdSlot, HeaderFlags, ProtocolFeatures, Reply, ReplyKind, Request, RequestCode, VirtioFeatures, VringAddr, VringFd,
    VringState,
};

use crate::backend::written_writeback;
use crate::guest::{HOT_SIZE, hot_region};
use crate::memory::Object;
use crate::options::{Options, VmmRule};
use crate::script::{Step, boot, start_rings};
use crate::stream::Stream;
use crate::world::{Event, World};

#[derive(Clone, Copy, Debug)]
struct Waiting {
    code: u32,
    kind: ReplyKind,
    since: Nanos,
    /// The answer says that a change of memory was made.
    memory: bool,
}

/// The VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    rule: VmmRule,
    pub(crate) to_broker: Stream,
    pub(crate) from_broker: Stream,
    /// It has connected, and nobody has accepted that yet.
    pub(crate) connecting: bool,
    connected: bool,
    pub(crate) script: VecDeque<Step>,
    waiting: Option<Waiting>,
    wakes_at: Nanos,
    offered: u64,
    accepted: u64,
    offered_protocol: u64,
    protocol: ProtocolFeatures,
    /// It has described all there is: a question that comes later says whether a change was made.
    is_whole: bool,
    /// The broker could not answer until then, for a reason that is no fault of its.
    pub(crate) excused_until: Nanos,
    /// It begins nothing any more.
    pub(crate) finishes: bool,
    /// What it has written to the configuration space since it connected.
    writeback: Option<u8>,
}

impl Vmm {
    pub(crate) fn new(options: &Options) -> Self {
        let rule = options.vmm;
        Vmm {
            rule,
            to_broker: Stream::default(),
            from_broker: Stream::default(),
            connecting: false,
            connected: false,
            script: boot(rule, options.rings),
            waiting: None,
            wakes_at: Nanos(u64::MAX),
            offered: 0,
            accepted: 0,
            offered_protocol: 0,
            protocol: ProtocolFeatures::empty(),
            is_whole: false,
            excused_until: Nanos(0),
            finishes: false,
            writeback: None,
        }
    }

    pub(crate) fn has_event_idx(&self) -> bool {
        self.accepted & VirtioFeatures::EVENT_IDX.bits() != 0
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.connected && self.script.is_empty() && self.waiting.is_none()
    }

    pub(crate) fn what_it_does(&self) -> String {
        match (self.waiting, self.script.front()) {
            (Some(waiting), _) => {
                let name = RequestCode::from_id(waiting.code).map_or("?", RequestCode::name);
                format!("waits for the answer to {name} since {}", waiting.since)
            }
            (None, Some(step)) => format!("is about to {step:?}"),
            (None, None) => "is not connected".to_owned(),
        }
    }

    fn slots(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn wants_protocol(&self) -> ProtocolFeatures {
        use ProtocolFeatures as P;
        match self.rule {
            // QEMU acknowledges everything it knows.
            VmmRule::Qemu => P::from_bits_truncate((1 << 20) - 1),
            VmmRule::CloudHypervisor => {
                P::CONFIG
                    | P::MQ
                    | P::CONFIGURE_MEM_SLOTS
                    | P::REPLY_ACK
                    | P::INFLIGHT_SHMFD
                    | P::LOG_SHMFD
                    | P::BACKEND_REQ
            }
            VmmRule::Crosvm => P::CONFIG | P::MQ | P::BACKEND_REQ | P::REPLY_ACK,
            VmmRule::Firecracker => P::CONFIG,
        }
    }
}

impl World<'_> {
    pub(crate) fn wake_vmm(&mut self, at: Nanos) {
        let at = at.max(self.now + Nanos(1));
        if at < self.vmm.wakes_at {
            self.vmm.wakes_at = at;
            self.at(at, Event::Vmm);
        }
    }

    pub(crate) fn vmm_goes_on(&mut self) {
        if self.vmm.wakes_at != self.now {
            return;
        }
        self.vmm.wakes_at = Nanos(u64::MAX);
        if let Some(waiting) = self.vmm.waiting {
            match self.vmm.from_broker.receive(self.now) {
                Ok(Some(message)) => self.vmm_hears(waiting, &message),
                Ok(None) => {
                    if let Some(at) = self.vmm.from_broker.next_arrival() {
                        self.wake_vmm(at);
                    }
                    return;
                }
                Err(error) => return self.fail("messages", format!("the VMM cannot follow the broker: {error}")),
            }
        } else if self.vmm.connected
            && let Ok(Some(message)) = self.vmm.from_broker.receive(self.now)
        {
            let detail = format!("the VMM is told {} although it asked for nothing", message.header.request);
            return self.fail("messages", detail);
        }
        if let Some(step) = self.vmm.script.pop_front() {
            self.vmm_does(step);
        }
        if self.vmm.waiting.is_none() && !self.vmm.script.is_empty() {
            let takes = Nanos(self.random.between(300, 6_000));
            self.wake_vmm(self.now + takes);
        }
    }

    fn vmm_hears(&mut self, waiting: Waiting, message: &crate::stream::Message) {
        self.vmm.waiting = None;
        let waited = self.now.since(waiting.since.max(self.vmm.excused_until));
        self.stats.answer_max = self.stats.answer_max.max(waited);
        let name = RequestCode::from_id(waiting.code).map_or("an unknown request", RequestCode::name);
        let bound = self.answer_bound(waiting);
        if waited > bound {
            return self.fail("answer in time", format!("{name} was answered after {waited}, the bound is {bound}"));
        }
        let slots: Vec<FdSlot> = message.fds.iter().map(|obj| FdSlot(*obj)).collect();
        let reply = Reply::decode(waiting.code, name, waiting.kind, &message.header, &message.payload, &slots);
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return self.fail("messages", format!("the answer to {name} cannot be decoded: {error}")),
        };
        self.note(|| format!("VMM: {name} is answered after {waited}: {reply:?}"));
        match (RequestCode::from_id(waiting.code), reply) {
            (Some(RequestCode::GetFeatures), Reply::U64(bits)) => self.vmm.offered = bits,
            (Some(RequestCode::GetProtocolFeatures), Reply::U64(bits)) => self.vmm.offered_protocol = bits,
            (Some(RequestCode::AddMemReg | RequestCode::SetMemTable), Reply::U64(value)) if value != 0 => {
                self.fail("memory refused", format!("{name} was refused"));
            }
            (Some(RequestCode::SetConfig), Reply::U64(value)) if value != 0 => {
                self.fail("configuration refused", format!("{name} was refused"));
            }
            (Some(RequestCode::GetConfig), Reply::Config(space)) => {
                let (read, wrote) = (space.as_ref().and_then(written_writeback), self.vmm.writeback);
                if wrote.is_some() && read != wrote {
                    self.fail("configuration read", format!("the guest wrote {wrote:?} and reads {read:?}"));
                }
            }
            _ => {}
        }
    }

    /// Within this the VMM must have its answer.
    fn answer_bound(&self, waiting: Waiting) -> Nanos {
        let limits = &self.options.limits;
        let some = Nanos(limits.answer_max.0 * 4 + 2_000_000);
        // One that is silent and still completes something is borne with for ten hangs; one of which it is not known what it owes for eight.
        let silent = Nanos(limits.hang.0 * 11).min(limits.stall).max(limits.hang) + limits.hang;
        let put_off = Nanos(limits.hang.0 * 8).min(limits.stall);
        if waiting.code == RequestCode::GetVringBase as u32 {
            some + limits.drain_max + limits.hang + limits.ping_every
        } else if waiting.memory && self.options.hotplug {
            // Memory at a place where other memory was: see `Pair::must_be_applied`.
            some + silent + put_off
        } else {
            some
        }
    }

    pub(crate) fn vmm_does(&mut self, step: Step) {
        let event = |world: &mut Self, index: u16| VringFd {
            index: u32::from(index),
            fd: Some(FdSlot(world.mem.make_event())),
        };
        self.note(|| format!("VMM: {step:?}"));
        match step {
            // Whoever listens sees the end of the last connection first.
            Step::Connect if self.broker.has_vmm => self.vmm.script.push_front(Step::Connect),
            Step::Connect => {
                (self.vmm.connecting, self.vmm.connected) = (true, true);
                self.vmm.from_broker = Stream::default();
                self.vmm.to_broker = Stream::default();
                self.vmm.waiting = None;
                self.vmm.is_whole = false;
                self.vmm.writeback = None;
                self.note(|| "VMM: connects".to_owned());
                self.wake_broker(self.now);
            }
            Step::Say(request) => {
                let insists = match self.vmm.rule {
                    VmmRule::Qemu => matches!(request, Request::SetVringEnable(_)) && self.random.one_in(2),
                    _ => true,
                };
                self.say(request, insists, false);
            }
            Step::Insist(request) => self.say(request, true, false),
            Step::Bare(request) => self.say(request, true, true),
            Step::Features => {
                let wants_event = if self.options.event_idx { VirtioFeatures::EVENT_IDX.bits() } else { 0 };
                let wants_indirect = if self.options.indirect { VirtioFeatures::INDIRECT_DESC.bits() } else { 0 };
                let common = VirtioFeatures::VERSION_1 | VirtioFeatures::PROTOCOL_FEATURES;
                let wanted = common.bits() | wants_event | wants_indirect | 1 << 9 | 1 << 12;
                self.vmm.accepted = self.vmm.offered & wanted;
                self.say(Request::SetFeatures(self.vmm.accepted), self.vmm.rule != VmmRule::Qemu, false);
            }
            Step::Protocol => {
                self.vmm.protocol =
                    ProtocolFeatures::from_bits_truncate(self.vmm.offered_protocol) & self.vmm.wants_protocol();
                self.say(Request::SetProtocolFeatures(self.vmm.protocol.bits()), false, false);
            }
            Step::Memory => {
                let regions = self.guest.regions();
                if self.vmm.slots() {
                    for (region, obj) in regions.into_iter().rev() {
                        self.vmm.script.push_front(Step::Insist(Request::AddMemReg { region, fd: Some(FdSlot(obj)) }));
                    }
                } else {
                    let regions = regions.into_iter().map(|(region, obj)| (region, FdSlot(obj))).collect();
                    self.say(Request::SetMemTable(regions), true, false);
                }
            }
            Step::Base(ring) => {
                let value = match self.vmm.rule {
                    VmmRule::CloudHypervisor => self.guest.avail_idx(ring, &self.mem),
                    _ => self.guest.used_idx(ring, &self.mem),
                };
                let state = VringState { index: u32::from(ring), value: u32::from(value) };
                self.say(Request::SetVringBase(state), self.vmm.rule != VmmRule::Qemu, false);
            }
            Step::Kick(ring) => {
                let kick = event(self, ring);
                self.guest.rings[usize::from(ring)].kick = kick.fd.expect("just made").0;
                self.say(Request::SetVringKick(kick), self.vmm.rule != VmmRule::Qemu, false);
            }
            Step::Call(ring) => {
                let call = event(self, ring);
                // What still comes on the one before counts, and on older ones while somebody may not have heard of it.
                let all_heard = !self.vmm.to_broker.has_some()
                    && self.broker.events.is_empty()
                    && self.backends.iter().all(|it| !it.alive || !(it.muted || it.from_broker.has_some()));
                let calls = &mut self.guest.rings[usize::from(ring)].calls;
                if all_heard {
                    calls.drain(..calls.len().saturating_sub(1));
                }
                calls.push(call.fd.expect("just made").0);
                self.say(Request::SetVringCall(call), self.vmm.rule != VmmRule::Qemu, false);
            }
            Step::Run => {
                self.vmm.is_whole = true;
                self.run_guest();
            }
            Step::Pause => self.guest.runs = false,
            Step::Wait(span) => self.wake_vmm(self.now + span),
            Step::Reset if self.broker.fences > 0 => self.vmm.script.push_front(Step::Reset),
            Step::Reset => self.reset_guest(),
            // Another process is started when the last one is gone.
            Step::NewGuest if self.broker.is_busy_with_the_last() => self.vmm.script.push_front(Step::NewGuest),
            Step::NewGuest => self.new_guest(),
            Step::Plug => {
                let obj = self.mem.make_bytes(HOT_SIZE, true);
                self.guest.hot = Some(obj);
                self.stats.memory_changes += 1;
                if self.vmm.slots() {
                    self.say(Request::AddMemReg { region: hot_region(), fd: Some(FdSlot(obj)) }, true, false);
                } else {
                    self.vmm.script.push_front(Step::Memory);
                }
            }
            Step::Plugged => self.guest.uses_hot = true,
            Step::Unused => {
                self.guest.uses_hot = false;
                if self.broker.needs_reset {
                    // It will not be unused before that; the memory stays.
                    self.vmm.script.clear();
                } else if self.guest.hot_in_use() {
                    self.vmm.script.push_front(Step::Unused);
                    self.wake_vmm(self.now + Nanos::from_micros(50));
                }
            }
            Step::Unplug => {
                self.guest.hot = None;
                self.stats.memory_changes += 1;
                if self.vmm.slots() {
                    self.say(Request::RemMemReg(hot_region()), true, false);
                } else {
                    self.vmm.script.push_front(Step::Memory);
                }
            }
            Step::Unknown => {
                let (mut bytes, flags) = (Vec::new(), HeaderFlags::NEED_REPLY);
                warmswap_wire::Header { request: 77, flags, size: 0 }.encode(&mut bytes);
                self.send_vmm_bytes(&bytes, Vec::new());
                self.vmm.waiting = Some(Waiting { code: 77, kind: ReplyKind::Ack, since: self.now, memory: false });
            }
        }
    }

    /// Sends a request of the VMM. `bare`: without its descriptor.
    fn say(&mut self, request: Request, insists: bool, bare: bool) {
        let request = match request {
            Request::SetVringNum(state) => {
                Request::SetVringNum(VringState { value: u32::from(self.options.ring_size), ..state })
            }
            Request::SetVringAddr(addr) => {
                let [descriptor, available, used] = self.guest.ring_addr(addr.index as u16);
                Request::SetVringAddr(VringAddr { descriptor, available, used, ..addr })
            }
            other => other,
        };
        if let Request::SetConfig(write) = &request {
            self.vmm.writeback = written_writeback(write).or(self.vmm.writeback);
        }
        let code = request.code();
        let acknowledged = insists && self.vmm.protocol.contains(ProtocolFeatures::REPLY_ACK) && !code.always_replies();
        let flags = if acknowledged { HeaderFlags::NEED_REPLY } else { HeaderFlags::empty() };
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        request.encode(flags, &mut bytes, &mut fds);
        if bare {
            fds.clear();
        }
        self.send_vmm_bytes(&bytes, fds.iter().map(|fd| fd.0).collect());
        let memory = matches!(code, RequestCode::SetMemTable | RequestCode::AddMemReg | RequestCode::RemMemReg);
        if memory && !acknowledged {
            // The answer to this says that it was done.
            self.vmm.script.push_front(Step::Say(Request::GetFeatures));
        }
        if acknowledged || code.always_replies() {
            let kind = if code.always_replies() { code.reply_kind() } else { ReplyKind::Ack };
            let memory = memory || (code == RequestCode::GetFeatures && self.vmm.is_whole);
            self.vmm.waiting = Some(Waiting { code: code as u32, kind, since: self.now, memory });
        }
    }

    fn send_vmm_bytes(&mut self, bytes: &[u8], fds: Vec<u32>) {
        let at = self.latency();
        if self.options.pieces && bytes.len() > 1 {
            let cut = self.random.between(1, bytes.len() as u64 - 1) as usize;
            self.vmm.to_broker.send(&bytes[..cut], fds, at);
            let later = Nanos(self.random.between(1_000, 100_000));
            self.vmm.to_broker.send(&bytes[cut..], Vec::new(), at + later);
        } else {
            self.vmm.to_broker.send(bytes, fds, at);
        }
        self.wake_broker(at);
    }

    /// The connection ends; of what is under way the last bytes are lost.
    pub(crate) fn vmm_disconnects(&mut self, lost: usize) {
        self.note(|| "VMM: disconnects".to_owned());
        self.vmm.connected = false;
        self.vmm.waiting = None;
        self.vmm.script.clear();
        self.vmm.to_broker.close(lost);
        self.wake_broker(self.now + Nanos(2_000));
    }

    /// The broker has ended the connection, or has seen its end.
    pub(crate) fn vmm_dropped(&mut self) {
        if !self.vmm.connected {
            return;
        }
        // It was the broker: the VMM notices, and does what its rule says.
        self.vmm.connected = false;
        self.vmm.waiting = None;
        self.vmm.script.clear();
        self.vmm_comes_again();
    }

    /// After a disconnect: the same guest connects again, or another one is started.
    pub(crate) fn vmm_comes_again(&mut self) {
        let pause = Nanos(self.random.between(20_000, 3_000_000));
        self.vmm.script.push_back(Step::Wait(pause));
        if !self.options.vmm.reconnects() {
            self.vmm.script.push_back(Step::NewGuest);
        }
        let steps = boot(self.options.vmm, self.options.rings);
        self.vmm.script.extend(steps);
        self.wake_vmm(self.now + Nanos(1_000));
    }

    /// The VMM stops all rings.
    pub(crate) fn stop_rings(&self) -> Vec<Step> {
        let stop = |ring| Step::Say(Request::GetVringBase(VringState { index: u32::from(ring), value: 0 }));
        (0..self.options.rings).map(stop).collect()
    }

    pub(crate) fn start_rings(&self) -> Vec<Step> {
        start_rings(self.options.vmm, self.options.rings)
    }

    /// The driver sets its rings up anew; what was in flight it gives up.
    fn reset_guest(&mut self) {
        self.stats.resets += 1;
        self.broker.needs_reset = false;
        for ring in 0..self.options.rings {
            self.mem.threads.borrow_mut()[usize::from(ring)].queue.clear();
            let given_up = self.guest.set_up(ring, 0, &self.mem);
            self.stats.abandoned += given_up;
        }
        self.note(|| "the guest is reset".to_owned());
    }

    /// Another guest with memory of its own.
    fn new_guest(&mut self) {
        self.guest.runs = false;
        self.guest.memory = self.mem.make_bytes(self.guest.size, true);
        (self.guest.hot, self.guest.uses_hot) = (None, false);
        self.reset_guest();
    }

    /// An eventfd or a socket, for a message that needs one.
    pub(crate) fn some_descriptor(&mut self) -> FdSlot {
        FdSlot(self.mem.make(Object::Channel))
    }
}
