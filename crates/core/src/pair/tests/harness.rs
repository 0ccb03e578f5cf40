//! The world around a pair: a VMM, a driver, backends that answer, and the invariants that hold whatever they do.
//!
//! ```text
//! start                           the pair starts
//! up 1 queues=1 config=9          backend 1 connects (also features=, slots=, no-ack, no-slots, no-config, inflight, no-region,
//!                                 odd-region, empty, state, no-channel)
//! down 1 · exit 1 · fenced 1      its link ends · its process ends · it is proved harmless (fenced 1 stopped: at that level)
//! mute 1 · unmute 1               it reads but does not answer · it answers all it owes
//! claims 1 7                      it answers the next stop with this base instead of used.idx
//! refuses 1                       it acknowledges everything with an error from now on
//! garbage 1                       it sends something nobody asked for
//! config 1 9                      its configuration space changes, and it says so
//! vmm NAME args                   the VMM sends a request (`!` in front of the name: it wants no acknowledgement)
//! boot 2                          the VMM connects, negotiates and starts that many rings of eight entries
//! ready 2                         all of that: both backends are up and the VMM has booted
//! at 0 65533                      the ring's indices stand there before the VMM starts it
//! break 0 900                     the driver stores that into avail.idx
//! trial                           the request that is being tried alone is completed
//! submit 0 3 4 · complete 0 4     the driver submits, the device completes these heads (and has read the ring up to them)
//! take 0 3                        the backend takes the ring's requests up to this head
//! publish 0 3 4                   as `complete`, and its backend gets no further than that: it does not clear the marks in its region
//! spoil 1 0 version 7             what its region says of ring 0 is damaged (also size, used, marks HEAD COUNTER, gone)
//! failover · failover now         the operator asks for one
//! alarm 1 harm                    the failure model has an alarm of backend 1 (also law, interrupt, kick, full, store)
//! moved 1 4096 · moved 1 fails    that backend's state was received, or sent, whole, or was not
//! unwhole 1                       it says of the next check of its state that it is not whole
//! wait 25ms                       time passes, ticks come when they are due
//! another 20ms                    the broker has died, and so much later another one goes on
//! jump 90ms                       time passes unnoticed: the control thread was not given the processor
//! ring 0 · status                 shows a ring · shows the pair
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write;

use warmswap_wire::inflight::ring_bytes;
use warmswap_wire::{
    BackendRequest, ConfigSpace, DeviceStateTransfer, DeviceType, FdSlot, HEADER_SIZE, Header, HeaderFlags,
    InflightDescription, LogRegion, MemoryRegion, ProtocolFeatures, Reply, ReplyKind, Request, RequestCode,
    VirtioFeatures, VringAddr, VringFd, VringState,
};

use warmswap_predict::{Alarm, Feature, Law};

use super::keeper::Keepers;
use crate::canary;
use crate::drain::DrainMethod;
use crate::event::{Action, Actions, BackendId, CommandId, Event, FenceLevel, PrivateEvents};
use crate::foresight::Foresight;
use crate::journal::{Entry, Value};
use crate::memory::GuestMemory;
use crate::memory::PRIVATE_ADDR;
use crate::pair::Pair;
use crate::pair::isolate::{TRIAL_AVAILABLE, TRIAL_USED};
use crate::policy::{Limits, PairConfig, Survivors};
use crate::testing::{PRIVATE_SLOTS, PlainMemory, PlainRing};
use crate::time::Nanos;

/// Where the guest's memory starts in the VMM's address space.
const USER: u64 = 0x1000_0000;
/// virtio-blk features of a backend: flush, discard.
const FEATURES: u64 = VirtioFeatures::PROTOCOL_FEATURES.bits() | VirtioFeatures::VERSION_1.bits() | 1 << 9 | 1 << 13;
const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// A block device with the default bounds.
pub(super) fn config() -> PairConfig {
    PairConfig {
        device: DeviceType::Blk,
        drain: DrainMethod::PrivateKick,
        survivors: Survivors::Place,
        region: crate::policy::RegionUse::Witness,
        fence: FenceLevel::Stopped,
        shadow: true,
        canary: false,
        on_prediction: crate::policy::OnPrediction::Act,
        limits: Limits::default(),
    }
}

/// A backend that answers at once, unless it is muted.
pub(super) struct Backend {
    pub(super) features: u64,
    pub(super) protocol: ProtocolFeatures,
    pub(super) queues: u64,
    pub(super) slots: u64,
    pub(super) config: Vec<u8>,
    pub(super) muted: bool,
    pub(super) refuses: bool,
    pub(super) claims: Option<u32>,
    pub(super) acked: u64,
    owes: VecDeque<(Header, Vec<u8>)>,
    private_kick: FdSlot,
    probe_kick: FdSlot,
    /// Memory of the broker's own that it was given.
    private: Option<FdSlot>,
    /// It completes canary reads.
    pub(super) canary: bool,
    /// A canary read is under way.
    pub(super) reading: bool,
    /// It offers in-flight tracking and cannot make a region.
    no_region: bool,
    /// It says that its region is for rings of no entries.
    odd_region: bool,
    /// It says of the next check of its state that it is not whole.
    unwhole: bool,
    /// No channel can be made for its state.
    no_channel: bool,
}

/// A driver's view of one ring: what it has submitted and not seen completed, in order.
#[derive(Default)]
pub(super) struct Driver {
    pub(super) inflight: Vec<u16>,
    /// The ring was made to break the rules; nothing can be said about what is owed.
    pub(super) broken: bool,
    /// Where in the available ring each of them stands for the backend that holds it.
    pub(super) positions: BTreeMap<u16, u16>,
    /// How far that backend must have read, for it has completed what stood before.
    pub(super) popped: u16,
}

pub(super) struct Harness {
    pub(super) pair: Pair,
    config: PairConfig,
    pub(super) memory: PlainMemory,
    pub(super) now: Nanos,
    pub(super) backends: BTreeMap<u64, Backend>,
    pub(super) drivers: BTreeMap<u32, Driver>,
    /// Requests the VMM has sent and the pair does not want yet.
    pub(super) requests: VecDeque<(Request, bool)>,
    pub(super) watched: BTreeSet<u32>,
    /// Backends that are being fenced.
    pub(super) fencing: BTreeSet<u64>,
    /// Backends that were asked for and have not come up.
    pub(super) starting: BTreeSet<u64>,
    pub(super) answered: usize,
    pub(super) replies: usize,
    /// Backends that were given one request alone, on a ring of the broker's.
    trials: BTreeSet<u64>,
    pub(super) kept: Keepers,
    /// Rings each backend was given and has not been proved to have let go.
    holds: BTreeMap<u64, BTreeSet<u32>>,
    /// Rings each backend was asked to stop: it takes nothing more of them.
    stopping: BTreeSet<(u64, u32)>,
    open: BTreeMap<u32, String>,
    slots: u32,
    /// Backends whose state a channel is asked for.
    opening: Vec<u64>,
    /// Backends whose state is under way.
    pub(super) moving: BTreeSet<u64>,
    /// Messages of backends under way.
    inbox: VecDeque<(u64, Header, Vec<u8>)>,
    out: String,
    shows: bool,
    pub(super) journal: Vec<&'static str>,
    pub(super) handed: u64,
    /// Nobody keeps the rules, so nothing can be said about what a ring owes.
    pub(super) anything_goes: bool,
}

impl Harness {
    pub(super) fn new(config: PairConfig) -> Self {
        Harness {
            config: config.clone(),
            pair: Pair::new(config),
            memory: PlainMemory::default(),
            now: Nanos::from_millis(1_000),
            backends: BTreeMap::new(),
            drivers: BTreeMap::new(),
            requests: VecDeque::new(),
            watched: BTreeSet::new(),
            fencing: BTreeSet::new(),
            starting: BTreeSet::new(),
            answered: 0,
            replies: 0,
            trials: BTreeSet::new(),
            kept: Keepers::default(),
            holds: BTreeMap::new(),
            stopping: BTreeSet::new(),
            open: BTreeMap::new(),
            slots: 0,
            opening: Vec::new(),
            moving: BTreeSet::new(),
            inbox: VecDeque::new(),
            out: String::new(),
            shows: true,
            journal: Vec::new(),
            handed: 0,
            anything_goes: false,
        }
    }

    pub(super) fn shown(&self) -> String {
        self.out.clone()
    }

    /// Carries out one line of a script.
    pub(super) fn line(&mut self, line: &str) {
        let (line, shows) = line.strip_prefix('~').map_or((line, true), |line| (line.trim(), false));
        self.shows = shows;
        self.show(&format!("> {line}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        self.command(words[0], &words[1..]);
        self.shows = true;
    }

    /// Carries out a line of a random history: only the line itself is kept, or everything with `WARMSWAP_TEST_SEED` set.
    pub(super) fn quietly(&mut self, line: &str) {
        if self.out.len() > 1 << 15 {
            self.out.drain(..1 << 14);
        }
        _ = writeln!(self.out, "> {line}");
        self.shows = std::env::var_os("WARMSWAP_TEST_SEED").is_some();
        let words: Vec<&str> = line.split_whitespace().collect();
        self.command(words[0], &words[1..]);
    }

    fn command(&mut self, verb: &str, args: &[&str]) {
        let id = || args[0].parse::<u64>().expect("a backend's number");
        match verb {
            "start" => {
                let mut out = Actions::default();
                self.pair.start(self.now, &mut out);
                self.act(out);
            }
            "up" => self.up(id(), &args[1..]),
            "down" => self.lose(id(), false),
            "exit" => self.lose(id(), true),
            "fenced" => {
                let level = match args.get(1) {
                    Some(&"stopped") => FenceLevel::Stopped,
                    Some(&"target") => FenceLevel::Target,
                    _ => FenceLevel::Reaped,
                };
                self.fenced(id(), level);
            }
            "mute" => self.backend(id()).muted = true,
            "unmute" => self.unmute(id()),
            "claims" => self.backend(id()).claims = Some(args[1].parse().expect("a base")),
            "refuses" => self.backend(id()).refuses = true,
            "canary" => match args[1] {
                "off" => self.backend(id()).canary = false,
                result => {
                    let private = self.backend(id()).private.expect("it has memory for a canary read");
                    canary::complete(&mut self.memory, private, number(result) as u8);
                }
            },
            "unwhole" => self.backend(id()).unwhole = true,
            "moved" => {
                let size = args[1].parse().map_err(|_| "the channel broke".to_owned());
                self.moving.remove(&id());
                self.event(Event::StateMoved { backend: BackendId(id()), size });
            }
            "garbage" => {
                let header = Header { request: 4711, flags: HeaderFlags::REPLY, size: 3 };
                self.inbox.push_back((id(), header, vec![1, 2, 3]));
                self.pump();
            }
            "config" => {
                self.backend(id()).config[0] = args[1].parse().expect("a number");
                let request = BackendRequest::ConfigChange;
                self.event(Event::BackendRequest { backend: BackendId(id()), request, need_reply: false });
            }
            "notifier" => {
                let fd = Some(self.slot("notifier".to_owned()));
                let area = warmswap_wire::HostNotifierArea { ring: 0, size: 4096, offset: 0 };
                let request = BackendRequest::VringHostNotifier { area, fd };
                self.event(Event::BackendRequest { backend: BackendId(id()), request, need_reply: true });
            }
            "vmm" => self.vmm(args),
            "boot" => self.boot(args[0].parse().expect("a number of rings")),
            "ready" => {
                self.command("start", &[]);
                self.up(1, &args[1..]);
                self.up(2, &args[1..]);
                self.boot(number(args[0]));
            }
            "at" => {
                let [ring, start] = [0, 1].map(|at| args[at].parse::<u32>().expect("a number"));
                self.memory.rings.insert(ring, PlainRing::new(8, start as u16));
            }
            "submit" => self.submit(number(args[0]), &args[1..].iter().map(|it| number(it) as u16).collect::<Vec<_>>()),
            "complete" => {
                self.complete(number(args[0]), &args[1..].iter().map(|it| number(it) as u16).collect::<Vec<_>>());
            }
            "take" => self.take(number(args[0]), &args[1..].iter().map(|it| number(it) as u16).collect::<Vec<_>>()),
            "publish" => {
                let heads: Vec<u16> = args[1..].iter().map(|it| number(it) as u16).collect();
                self.complete_batch(number(args[0]), &heads, true);
                self.forget_completed(number(args[0]), &heads);
            }
            "spoil" => {
                let values: Vec<u32> = args[3..].iter().map(|it| number(it)).collect();
                self.spoil(id(), number(args[1]), args[2], &values);
            }
            "break" => {
                let ring = number(args[0]);
                self.drivers.entry(ring).or_default().broken = true;
                self.memory.ring(ring).avail_idx = number(args[1]) as u16;
            }
            "flags" => self.memory.ring(number(args[0])).used_flags = number(args[1]) as u16,
            "trial" => {
                // The backend completes the request it was given alone.
                let tried = self.trials.iter().find_map(|id| self.backends.get(id)?.private);
                let private = tried.expect("a trial is running");
                let head = self.memory.read_region(private, TRIAL_AVAILABLE + 4, 2).expect("it is there");
                let used = [0, 0, 1, 0, head[0], head[1], 0, 0, 0, 2, 0, 0];
                self.memory.write_private(private, TRIAL_USED, &used);
            }
            "failover" => {
                let now = args.first() == Some(&"now");
                self.event(Event::FailoverRequested { command: CommandId(1), now, reason: "test".to_owned() });
            }
            "alarm" => {
                let alarm = match args[1] {
                    "law" => Alarm::Law(Law::RequestIsCompleted),
                    "interrupt" => Alarm::Law(Law::InterruptIsTaken),
                    "kick" => Alarm::Law(Law::KickIsSeen),
                    "full" => Alarm::Exhaustion(Feature::DescriptorShare),
                    "store" => Alarm::Exhaustion(Feature::StoreShare),
                    _ => Alarm::Harm,
                };
                let (backend, causes) = (BackendId(id()), "none".to_owned());
                let foresight = Foresight { backend, alarm, risk: 0.5, harm: 0.5, cause: None, causes, others: 0 };
                self.event(Event::FailurePredicted(foresight));
            }
            "wait" => self.wait(nanos(args[0])),
            "jump" => {
                self.now = self.now + nanos(args[0]);
                self.event(Event::Tick);
            }
            "another" => self.take_over(nanos(args[0])),
            "ring" => self.show_ring(number(args[0])),
            "status" => self.show_status(),
            other => panic!("unknown line: {other}"),
        }
    }

    // --- the VMM -----------------------------------------------------------------------------------------------------------

    fn vmm(&mut self, args: &[&str]) {
        let (name, need_reply) = args[0].strip_prefix('!').map_or((args[0], true), |name| (name, false));
        let state = || VringState { index: number(args[1]), value: args.get(2).map_or(0, |value| number(value)) };
        let code = RequestCode::ALL.iter().find(|code| code.name() == name);
        let event = |harness: &mut Self, kind: &str| {
            let index = number(args[1]);
            let fd = (args.get(2) != Some(&"none")).then(|| harness.slot(format!("{kind}{index}")));
            VringFd { index, fd }
        };
        use RequestCode as C;
        let request = match code {
            None if name == "connect" => return self.event(Event::VmmConnected),
            None if name == "gone" => return self.vmm_gone(),
            None if name == "garbled" => {
                let reason = "GET_CONFIG: 3 bytes, expected 12".to_owned();
                let request = RequestCode::GetConfig as u32;
                return self.event(Event::VmmRefused { request, reason, need_reply: false });
            }
            None if name == "unknown" => {
                let reason = "unknown request 77 on the front-end channel".to_owned();
                return self.event(Event::VmmRefused { request: 77, reason, need_reply });
            }
            None => panic!("unknown request {name}"),
            Some(code) => match code {
                C::GetFeatures => Request::GetFeatures,
                C::SetFeatures => Request::SetFeatures(args.get(1).map_or(FEATURES, |bits| hex(bits))),
                C::SetOwner => Request::SetOwner,
                C::ResetOwner => Request::ResetOwner,
                C::SetMemTable => {
                    let regions = args[1..].iter().map(|at| (region(number(at)), self.slot(format!("mem{at}"))));
                    Request::SetMemTable(regions.collect())
                }
                C::AddMemReg => {
                    let fd = Some(self.slot(format!("mem{}", args[1])));
                    Request::AddMemReg { region: region(number(args[1])), fd }
                }
                C::RemMemReg => Request::RemMemReg(region(number(args[1]))),
                C::SetLogBase => {
                    let region = LogRegion { size: 4096, offset: 0 };
                    Request::SetLogBase { region, fd: Some(self.slot("log".to_owned())) }
                }
                C::SetLogFd => Request::SetLogFd(self.slot("log-notify".to_owned())),
                C::SetVringNum => Request::SetVringNum(state()),
                C::SetVringAddr => Request::SetVringAddr(addr(number(args[1]), args.get(2) == Some(&"wild"))),
                C::SetVringBase => Request::SetVringBase(state()),
                C::GetVringBase => Request::GetVringBase(state()),
                C::SetVringKick => Request::SetVringKick(event(self, "kick")),
                C::SetVringCall => Request::SetVringCall(event(self, "call")),
                C::SetVringErr => Request::SetVringErr(event(self, "err")),
                C::SetVringEnable => Request::SetVringEnable(state()),
                C::GetProtocolFeatures => Request::GetProtocolFeatures,
                C::SetProtocolFeatures => Request::SetProtocolFeatures(hex(args[1])),
                C::GetQueueNum => Request::GetQueueNum,
                C::SetBackendReqFd => Request::SetBackendReqFd(self.slot("vmm-channel".to_owned())),
                C::GetConfig => Request::GetConfig(ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 4] }),
                C::SetConfig => {
                    let bytes = vec![number(args[2]) as u8];
                    Request::SetConfig(ConfigSpace { offset: number(args[1]), flags: 1, bytes })
                }
                C::GetInflightFd | C::SetInflightFd => {
                    let region = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: 8 };
                    if *code == C::GetInflightFd {
                        Request::GetInflightFd(region)
                    } else {
                        Request::SetInflightFd { region, fd: self.slot("inflight".to_owned()) }
                    }
                }
                C::ResetDevice => Request::ResetDevice,
                C::GetMaxMemSlots => Request::GetMaxMemSlots,
                C::PostcopyAdvise => Request::PostcopyAdvise,
                C::GetStatus => Request::GetStatus,
                C::SetStatus => Request::SetStatus(7),
                C::VringKick => Request::VringKick(state()),
                C::SendRarp => Request::SendRarp(1),
                C::NetSetMtu => Request::NetSetMtu(1500),
                other => panic!("{} has no form in scripts yet", other.name()),
            },
        };
        self.request(request, need_reply);
    }

    pub(super) fn request(&mut self, request: Request, need_reply: bool) {
        self.requests.push_back((request, need_reply));
        self.deliver();
        if !self.requests.is_empty() {
            self.show("    (the VMM waits)");
        }
    }

    fn deliver(&mut self) {
        while self.pair.wants_request() {
            let Some((request, need_reply)) = self.requests.pop_front() else { return };
            self.event_once(Event::VmmRequest { request, need_reply });
            self.pump_backends();
        }
    }

    fn vmm_gone(&mut self) {
        // What it had sent and nobody has read is lost with its socket.
        let mut fds = Vec::new();
        for (request, _) in self.requests.drain(..) {
            request.encode(HeaderFlags::empty(), &mut Vec::new(), &mut fds);
        }
        fds.into_iter().for_each(|fd| self.close(fd));
        self.event(Event::VmmGone { reason: "the connection was closed".to_owned() });
    }

    fn boot(&mut self, rings: u32) {
        self.event(Event::VmmConnected);
        let mut script = vec!["!SET_FEATURES".to_owned(), "!SET_MEM_TABLE 0".to_owned()];
        for ring in 0..rings {
            let steps = ["!SET_VRING_NUM # 8", "!SET_VRING_ADDR #", "!SET_VRING_CALL #", "!SET_VRING_KICK #"];
            script.extend(steps.iter().map(|step| step.replace('#', &ring.to_string())));
            script.push(format!("!SET_VRING_ENABLE {ring} 1"));
        }
        for line in script {
            self.vmm(&line.split(' ').collect::<Vec<_>>());
        }
    }

    // --- driver and device -------------------------------------------------------------------------------------------------

    pub(super) fn submit(&mut self, ring: u32, heads: &[u16]) {
        for head in heads {
            let driver = self.drivers.entry(ring).or_default();
            driver.positions.insert(*head, self.memory.ring(ring).avail_idx);
            driver.inflight.push(*head);
            self.memory.ring(ring).submit(*head);
        }
        if self.watched.remove(&ring) {
            self.event(Event::Kicked { ring });
        }
    }

    pub(super) fn complete(&mut self, ring: u32, heads: &[u16]) {
        self.complete_batch(ring, heads, false);
        self.forget_completed(ring, heads);
    }

    /// The driver has seen these completed.
    fn forget_completed(&mut self, ring: u32, heads: &[u16]) {
        for head in heads {
            let driver = self.drivers.entry(ring).or_default();
            driver.inflight.retain(|known| known != head);
            if let Some(at) = driver.positions.remove(head) {
                driver.popped = later(driver.popped, at.wrapping_add(1));
            }
        }
    }

    /// Whether a request runs alone and is not completed yet.
    pub(super) fn tries(&self) -> bool {
        let running = |id: &u64| {
            let private = self.backends.get(id).and_then(|backend| backend.private);
            private.is_some_and(|fd| self.memory.read_region(fd, TRIAL_USED, 4).is_some_and(|used| used[2] == 0))
        };
        self.trials.iter().any(running)
    }

    /// Whether the holder of a ring may complete this head: once it has answered the stop of the ring, it takes nothing more.
    pub(super) fn may_complete(&self, ring: u32, head: u16) -> bool {
        let Some(holder) = self.holder(ring) else { return false };
        let taken = |driver: &Driver| {
            let at = driver.positions.get(&head).copied();
            at.is_some_and(|at| later(at.wrapping_add(1), driver.popped) == driver.popped)
        };
        !self.stopping.contains(&(holder, ring)) || self.drivers.get(&ring).is_some_and(taken)
    }

    /// The backend that holds a ring of the guest's, if any does.
    pub(super) fn holder(&self, ring: u32) -> Option<u64> {
        let holds = |(id, rings): &(&u64, &BTreeSet<u32>)| rings.contains(&ring) && !self.trials.contains(*id);
        self.holds.iter().find(holds).map(|(id, _)| *id)
    }

    // --- backends ----------------------------------------------------------------------------------------------------------

    fn backend(&mut self, id: u64) -> &mut Backend {
        self.backends.get_mut(&id).expect("the script has connected this backend")
    }

    pub(super) fn up(&mut self, id: u64, options: &[&str]) {
        let [kick, call, probe] = ["kick", "call", "probe"].map(|name| self.slot(format!("#{id}.{name}")));
        let private = PrivateEvents { kick, call, probe };
        let mut backend = Backend {
            features: FEATURES,
            protocol: PROTOCOL,
            queues: 2,
            slots: 8,
            config: vec![7; 256],
            muted: false,
            refuses: false,
            claims: None,
            acked: 0,
            owes: VecDeque::new(),
            private_kick: private.kick,
            probe_kick: private.probe,
            private: None,
            canary: true,
            reading: false,
            no_region: false,
            odd_region: false,
            unwhole: false,
            no_channel: false,
        };
        for option in options {
            match option.split_once('=') {
                Some(("features", bits)) => backend.features = hex(bits),
                Some(("queues", value)) => backend.queues = value.parse().expect("a number"),
                Some(("slots", value)) => backend.slots = value.parse().expect("a number"),
                Some(("config", value)) => backend.config[0] = value.parse().expect("a number"),
                _ if *option == "no-canary" => backend.canary = false,
                _ if *option == "no-ack" => backend.protocol.remove(ProtocolFeatures::REPLY_ACK),
                _ if *option == "no-slots" => backend.protocol.remove(ProtocolFeatures::CONFIGURE_MEM_SLOTS),
                _ if *option == "no-config" => backend.protocol.remove(ProtocolFeatures::CONFIG),
                _ if *option == "inflight" => backend.protocol.insert(ProtocolFeatures::INFLIGHT_SHMFD),
                _ if *option == "empty" => backend.config = vec![0; 256],
                _ if *option == "odd-region" => backend.odd_region = true,
                _ if *option == "no-region" => backend.no_region = true,
                _ if *option == "state" => backend.protocol.insert(ProtocolFeatures::DEVICE_STATE),
                _ if *option == "no-channel" => backend.no_channel = true,
                _ if *option == "log" => backend.protocol.insert(ProtocolFeatures::LOG_SHMFD),
                _ if *option == "everything" => backend.protocol = ProtocolFeatures::all(),
                _ => panic!("unknown option {option}"),
            }
        }
        self.backends.insert(id, backend);
        self.starting.remove(&id);
        let backend_req = Some(self.slot(format!("#{id}.channel")));
        self.event(Event::LinkUp { backend: BackendId(id), backend_req, private });
    }

    pub(super) fn lose(&mut self, id: u64, exited: bool) {
        self.backends.remove(&id);
        self.starting.remove(&id);
        self.inbox.retain(|(from, _, _)| *from != id);
        let backend = BackendId(id);
        self.event(if exited {
            Event::Exited { backend, reason: "killed by signal 9".to_owned() }
        } else {
            Event::LinkDown { backend, reason: "its link ended".to_owned() }
        });
    }

    pub(super) fn fenced(&mut self, id: u64, level: FenceLevel) {
        assert!(self.fencing.remove(&id), "#{id} is not being fenced");
        self.backends.remove(&id);
        self.inbox.retain(|(from, _, _)| *from != id);
        self.holds.remove(&id);
        self.keeper_ended(id);
        self.event(Event::Fenced { backend: BackendId(id), level, evidence: "reaped".to_owned() });
    }

    pub(super) fn unmute(&mut self, id: u64) {
        let backend = self.backend(id);
        backend.muted = false;
        let owed: Vec<_> = backend.owes.drain(..).collect();
        for (header, payload) in owed {
            self.inbox.push_back((id, header, payload));
        }
        self.pump();
    }

    /// How far a backend has read a ring. One that has completed everything it has read stands at `used.idx`.
    fn truthful_base(&self, ring: u32) -> u32 {
        let used = self.memory.used_idx(ring);
        u32::from(self.drivers.get(&ring).map_or(used, |driver| later(used, driver.popped)))
    }

    /// What a backend answers to a message.
    fn hears(&mut self, id: u64, bytes: &[u8], fds: &[FdSlot]) {
        let (head, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("a header");
        let header = Header::decode(head).expect("ours");
        let request = Request::decode(&header, payload, fds).expect("ours");
        self.note_rings(id, &request);
        self.note_private(id, &request);
        self.note_regions(id, &request);
        let base = if let Request::GetVringBase(state) = request {
            self.stopping.insert((id, state.index));
            self.truthful_base(state.index)
        } else {
            0
        };
        let Some(backend) = self.backends.get_mut(&id) else { return };
        let ack = u64::from(backend.refuses);
        let reply = match &request {
            Request::GetFeatures => Some(Reply::U64(backend.features)),
            Request::GetProtocolFeatures => Some(Reply::U64(backend.protocol.bits())),
            Request::GetQueueNum => Some(Reply::U64(backend.queues)),
            Request::GetMaxMemSlots => Some(Reply::U64(backend.slots)),
            Request::SetProtocolFeatures(bits) => {
                backend.acked = *bits;
                None
            }
            Request::GetConfig(wanted) => {
                let fits = wanted.bytes.len() == backend.config.len();
                let bytes = backend.config.clone();
                Some(Reply::Config(fits.then_some(ConfigSpace { offset: 0, flags: 0, bytes })))
            }
            Request::GetVringBase(state) => {
                let value = backend.claims.take().unwrap_or(base);
                Some(Reply::VringState(VringState { index: state.index, value }))
            }
            Request::GetInflightFd(_) if backend.no_region => {
                let region = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 0, queue_size: 0 };
                Some(Reply::Inflight { region, fd: None })
            }
            Request::GetInflightFd(wanted) => {
                let mmap_size = ring_bytes(wanted.queue_size) * u64::from(wanted.num_queues);
                // Some do not say for what it is.
                let said = if backend.odd_region { (0, 0) } else { (wanted.num_queues, wanted.queue_size) };
                let region = InflightDescription { mmap_size, mmap_offset: 0, num_queues: said.0, queue_size: said.1 };
                Some(Reply::Inflight { region, fd: None })
            }
            // Bit 8: no descriptor of its own.
            Request::SetDeviceStateFd { .. } => Some(Reply::Fd { value: 0x100 | ack, fd: None }),
            Request::CheckDeviceState => Some(Reply::U64(u64::from(std::mem::take(&mut backend.unwhole)))),
            Request::SetLogBase { region, .. } if backend.acked & ProtocolFeatures::LOG_SHMFD.bits() != 0 => {
                Some(Reply::Log(*region))
            }
            _ => header.needs_reply().then_some(Reply::U64(ack)),
        };
        let Some(reply) = reply else { return };
        let mut bytes = Vec::new();
        reply.encode(header.request, &mut bytes, &mut Vec::new());
        let (head, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("a header");
        let answer = (Header::decode(head).expect("ours"), payload.to_vec());
        if backend.muted {
            backend.owes.push_back(answer);
        } else {
            self.inbox.push_back((id, answer.0, answer.1));
        }
    }

    // --- invariants --------------------------------------------------------------------------------------------------------

    /// At most one backend holds rings, and a ring is handed over with exactly what is owed, in the order of its submission.
    fn note_rings(&mut self, id: u64, request: &Request) {
        let Request::SetVringKick(VringFd { index, fd }) = request else { return };
        let private = self.backends.get(&id).map(|backend| backend.private_kick);
        let trial = fd.is_some() && *fd == self.backends.get(&id).map(|backend| backend.probe_kick);
        if self.backends.get(&id).is_some_and(|backend| backend.reading) {
            assert!(trial, "#{id} is given ring {index} during a canary read\n{}", self.out);
            return;
        }
        let holds = self.holds.entry(id).or_default();
        if fd.is_some() && *fd == private && holds.contains(index) {
            return;
        }
        let fresh = holds.insert(*index);
        self.stopping.remove(&(id, *index));
        if trial {
            self.trials.insert(id);
        }
        let others: Vec<u64> =
            self.holds.iter().filter(|(other, rings)| **other != id && !rings.is_empty()).map(|it| *it.0).collect();
        assert!(others.is_empty(), "#{id} is given ring {index} while {others:?} may still serve\n{}", self.out);
        if fresh && !trial {
            self.handed += 1;
            let index = *index;
            self.check_handed(index);
            let used = self.memory.used_idx(index);
            let driver = self.drivers.entry(index).or_default();
            driver.popped = used;
            driver.positions =
                driver.inflight.iter().zip(0..).map(|(head, at)| (*head, used.wrapping_add(at))).collect();
        }
    }

    /// What it has of the broker's own, and the canary read it is given there: it completes it at once, or never.
    fn note_private(&mut self, id: u64, request: &Request) {
        let Some(backend) = self.backends.get_mut(&id) else { return };
        let given = |fd: &FdSlot| fd.0 > PRIVATE_SLOTS;
        match request {
            Request::AddMemReg { fd: Some(fd), .. } if given(fd) => backend.private = Some(*fd),
            Request::SetMemTable(regions) => backend.private = regions.iter().map(|it| it.1).find(given),
            Request::SetVringAddr(addr) => backend.reading = addr.descriptor >= PRIVATE_ADDR,
            Request::SetVringEnable(VringState { value: 1, .. }) if backend.reading => {
                let private = backend.private.expect("a canary read needs memory");
                if backend.canary && !backend.muted {
                    canary::complete(&mut self.memory, private, 0);
                }
            }
            Request::GetVringBase(_) if backend.reading => {
                let private = backend.private.expect("a canary read needs memory");
                assert!(canary::is_complete(&self.memory, private), "a ring is stopped in the middle of a canary read");
                backend.reading = false;
            }
            _ => {}
        }
    }

    fn check_handed(&self, index: u32) {
        let Some(driver) = self.drivers.get(&index).filter(|it| !it.broken && !self.anything_goes) else { return };
        let ring = &self.memory.rings[&index];
        let owed = ring.avail_idx.wrapping_sub(ring.used_idx);
        let held: Vec<u16> =
            (0..owed).map(|at| ring.avail[usize::from(ring.layout.slot(ring.used_idx.wrapping_add(at)))]).collect();
        assert_eq!(held, driver.inflight, "ring {index} is handed over with the wrong requests\n{}", self.out);
    }

    /// Where the pair says that it does not know, or that it gave up on a ring, nothing is owed until the driver sets it up again.
    fn note_entry(&mut self, entry: &Entry) {
        self.journal.push(entry.event);
        let stop = ("request", Value::Text("GET_VRING_BASE".to_owned()));
        let given_up = entry.event == "AnsweredFromRecord" && entry.properties.contains(&stop);
        if given_up || entry.event == "FailoverHalted" {
            self.drivers.values_mut().for_each(|driver| driver.broken = true);
        }
    }

    fn slot(&mut self, name: String) -> FdSlot {
        self.slots += 1;
        self.open.insert(self.slots, name);
        FdSlot(self.slots)
    }

    pub(super) fn fresh_slot(&mut self, name: &str) -> FdSlot {
        self.slot(name.to_owned())
    }

    fn name(&self, fd: FdSlot) -> String {
        if fd.0 > PRIVATE_SLOTS {
            assert!(
                self.memory.private.contains_key(&fd),
                "memory of the broker's own is used after its end\n{}",
                self.out
            );
            return "private-ring".to_owned();
        }
        let name = self.open.get(&fd.0);
        name.unwrap_or_else(|| panic!("slot {} is used although it is closed\n{}", fd.0, self.out)).clone()
    }

    fn close(&mut self, fd: FdSlot) {
        self.memory.in_flight.remove(&fd);
        let open = self.open.remove(&fd.0).is_some() || self.memory.private.remove(&fd).is_some();
        assert!(open, "slot {} is closed twice\n{}", fd.0, self.out);
    }

    /// Everybody leaves; nothing may be left open.
    pub(super) fn finish(mut self) {
        self.shows = false;
        self.vmm_gone();
        for _ in 0..40 {
            for id in self.fencing.clone() {
                self.fenced(id, FenceLevel::Target);
            }
            for id in self.backends.keys().copied().collect::<Vec<_>>() {
                self.lose(id, true);
            }
            self.wait(Nanos::from_millis(200));
        }
        assert!(self.open.is_empty(), "descriptors leak: {:?}\n{}", self.open, self.out);
        assert!(self.memory.private.is_empty(), "memory of the broker's own leaks\n{}", self.out);
        assert!(self.watched.is_empty(), "a kick is watched for nobody: {:?}", self.watched);
    }

    // --- time and events ---------------------------------------------------------------------------------------------------

    pub(super) fn wait(&mut self, span: Nanos) {
        let until = self.now + span;
        let mut ticks = 0_u64;
        while let Some(next) = self.pair.next_timeout() {
            if next > until {
                break;
            }
            // Time always passes between two ticks.
            self.now = next.max(self.now + Nanos(1_000));
            self.event(Event::Tick);
            ticks += 1;
            let allowed = 2_000 + span.0 / 5_000;
            assert!(ticks < allowed, "{ticks} ticks in {span}: it spins, next {next}, now {}\n{}", self.now, self.out);
        }
        self.now = self.now.max(until);
    }

    pub(super) fn event(&mut self, event: Event) {
        self.event_once(event);
        self.pump();
    }

    fn pump(&mut self) {
        self.pump_backends();
        self.deliver();
    }

    /// Channels come as they do from the shell: at once, as an event.
    fn open_channels(&mut self) {
        for id in std::mem::take(&mut self.opening) {
            let fails = self.backends.get(&id).is_none_or(|backend| backend.no_channel);
            let channel = if fails { Err("no descriptors".to_owned()) } else { Ok(self.slot(format!("#{id}.state"))) };
            self.moving.extend((!fails).then_some(id));
            self.event_once(Event::StateOpened { backend: BackendId(id), channel });
        }
    }

    fn pump_backends(&mut self) {
        let mut answers = 0;
        self.open_channels();
        while let Some((id, header, payload)) = self.inbox.pop_front() {
            answers += 1;
            assert!(answers < 1_000, "messages go to and fro without end\n{}", self.out);
            self.note_stop(id, &header, &payload);
            let fds = self.carried(id, &header, &payload);
            self.event_once(Event::LinkMessage { backend: BackendId(id), header, payload, fds });
            self.open_channels();
        }
    }

    /// Descriptors that come with a message: they come into being when it is read.
    fn carried(&mut self, id: u64, header: &Header, payload: &[u8]) -> Vec<FdSlot> {
        let kind = ReplyKind::Inflight;
        match Reply::decode(RequestCode::GetInflightFd as u32, "", kind, header, payload, &[]) {
            Ok(Reply::Inflight { region, .. }) if region.mmap_size > 0 => vec![self.make_region(id, &region)],
            _ => Vec::new(),
        }
    }

    /// A stop that is answered with used.idx lets the ring go.
    fn note_stop(&mut self, id: u64, header: &Header, payload: &[u8]) {
        if header.request == RequestCode::GetVringBase as u32
            && let Ok(Reply::VringState(VringState { index, value })) =
                Reply::decode(header.request, "", ReplyKind::VringState, header, payload, &[])
            && value == u32::from(self.memory.used_idx(index))
            && let Some(rings) = self.holds.get_mut(&id)
        {
            rings.remove(&index);
            self.keeper_stopped(id, index);
        }
    }

    /// The broker has died, and after a while another one goes on with what it had written down, in a process that has nothing mapped.
    fn take_over(&mut self, after: Nanos) {
        self.now = self.now + after;
        let record = serde_json::to_string(&self.pair).expect("a pair can be written down");
        let pair: Pair = serde_json::from_str(&record).expect("and read");
        assert!(serde_json::to_string(&pair).expect("again") == record, "what is read is what was written");
        let known: BTreeSet<u32> = pair.descriptors().iter().map(|slot| slot.0).collect();
        let open: BTreeSet<u32> = self.open.keys().copied().collect();
        // Those of requests that wait are not its yet.
        let all = known == open || (!self.requests.is_empty() && known.is_subset(&open));
        assert!(all, "who goes on knows of every descriptor: {known:?} of {open:?}");
        let config = self.config.clone();
        self.memory.regions.clear();
        self.memory.detached.extend(self.memory.rings.keys());
        self.watched.clear();
        let mut out = Actions::default();
        self.pair = pair.take_over(config, None, self.now, &mut self.memory, &mut out).expect("guest memory is there");
        self.act(out);
        self.event(Event::Tick);
    }

    pub(super) fn event_once(&mut self, event: Event) {
        let mut out = Actions::default();
        let before: Vec<(u32, u16)> = self.memory.rings.iter().map(|(index, ring)| (*index, ring.used_idx)).collect();
        self.pair.handle(self.now, event, &mut self.memory, &mut out);
        for (index, used) in before {
            self.note_completions(index, used);
        }
        self.act(out);
    }

    /// What the broker itself has completed must have been in flight, and not while a backend holds the ring.
    fn note_completions(&mut self, index: u32, from: u16) {
        let ring = self.memory.rings[&index].clone();
        for at in 0..ring.used_idx.wrapping_sub(from) {
            assert_eq!(
                self.holder(index),
                None,
                "the broker writes ring {index} while a backend holds it\n{}",
                self.out
            );
            let head = ring.used[usize::from(ring.layout.slot(from.wrapping_add(at)))];
            let driver = self.drivers.entry(index).or_default();
            let known = driver.inflight.iter().position(|known| u32::from(*known) == head);
            assert!(
                known.is_some() || driver.broken || self.anything_goes,
                "head {head} is completed without being in flight\n{}",
                self.out
            );
            known.map(|at| driver.inflight.remove(at));
        }
    }

    fn act(&mut self, mut out: Actions) {
        let actions: Vec<Action> = out.drain().collect();
        let mut told: Option<(u64, String)> = None;
        for action in actions {
            if let Action::SendLink { backend, bytes, fds } = &action {
                let text = self.message_text(bytes, fds);
                match &mut told {
                    Some((id, line)) if *id == backend.0 => line.push_str(&format!(", {text}")),
                    _ => {
                        self.show_told(told.take());
                        told = Some((backend.0, text));
                    }
                }
                self.hears(backend.0, bytes, fds);
                continue;
            }
            self.show_told(told.take());
            self.carry_out(action);
        }
        self.show_told(told);
    }

    fn show_told(&mut self, told: Option<(u64, String)>) {
        if let Some((id, line)) = told {
            self.show(&format!("    #{id} <- {line}"));
        }
    }

    fn carry_out(&mut self, action: Action) {
        let text = match action {
            Action::SendVmm { bytes, fds } => {
                fds.iter().for_each(|fd| drop(self.name(*fd)));
                self.replies += 1;
                reply_text(&bytes)
            }
            Action::SendVmmBackend { channel, bytes } => {
                let header = Header::decode(bytes.first_chunk().expect("a header")).expect("ours");
                let name = BackendRequest::name_of(header.request).expect("a request");
                format!("{} <- {name}", self.name(channel))
            }
            Action::DropVmm => "drop the VMM".to_owned(),
            Action::SendLinkBackend { backend, bytes } => {
                let value = bytes[HEADER_SIZE];
                format!("{backend}.channel <- ack {value}")
            }
            Action::Close(fd) => {
                let name = self.name(fd);
                self.close(fd);
                format!("close {name}")
            }
            Action::Signal(fd) => format!("signal {}", self.name(fd)),
            Action::Start { backend } => {
                self.starting.insert(backend.0);
                format!("start {backend}")
            }
            Action::Fence { backend } => {
                self.fencing.insert(backend.0);
                self.starting.remove(&backend.0);
                format!("fence {backend}")
            }
            Action::Retire { backend } => {
                self.backends.remove(&backend.0);
                self.starting.remove(&backend.0);
                self.inbox.retain(|(id, _, _)| *id != backend.0);
                self.keeper_ended(backend.0);
                format!("retire {backend}")
            }
            Action::OpenState { backend, direction } => {
                self.opening.push(backend.0);
                format!("open a channel for the state of {backend}: {direction:?}")
            }
            Action::WatchKick { ring, kick } => {
                self.watched.insert(ring);
                format!("watch {}", self.name(kick))
            }
            Action::UnwatchKick { ring } => {
                self.watched.remove(&ring);
                format!("unwatch kick{ring}")
            }
            Action::Assign { backend, primary } => {
                format!("{backend} is {}", if primary { "primary" } else { "shadow" })
            }
            Action::Journal(entry) => {
                self.note_entry(&entry);
                journal_text(&entry)
            }
            Action::Answer { report, .. } => {
                self.answered += 1;
                format!("answer: {} {} {}", report.outcome.name(), report.recovery.name(), report.message)
            }
            Action::SendLink { .. } => unreachable!("handled by the caller"),
        };
        self.show(&format!("    {}", text.trim_end()));
    }

    // --- text --------------------------------------------------------------------------------------------------------------

    fn show(&mut self, line: &str) {
        if self.shows {
            self.out.push_str(line);
            self.out.push('\n');
        }
    }

    fn message_text(&self, bytes: &[u8], fds: &[FdSlot]) -> String {
        let (head, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("a header");
        let header = Header::decode(head).expect("ours");
        let request = Request::decode(&header, payload, fds).expect("ours");
        let mut text = request.code().name().to_owned();
        if header.needs_reply() {
            text.push('!');
        }
        let state = |it: &VringState| format!(" {}={}", it.index, it.value);
        match &request {
            Request::SetVringNum(it) | Request::SetVringBase(it) | Request::SetVringEnable(it) => text += &state(it),
            Request::GetVringBase(it) => _ = write!(text, " {}", it.index),
            Request::SetVringAddr(it) => _ = write!(text, " {}", it.index),
            Request::GetConfig(it) => _ = write!(text, " {}", it.bytes.len()),
            Request::GetInflightFd(it) => _ = write!(text, " {}x{}", it.num_queues, it.queue_size),
            Request::SetConfig(it) => _ = write!(text, " {}={:?}", it.offset, it.bytes),
            Request::SetDeviceStateFd { transfer, .. } => {
                text.push_str(if *transfer == DeviceStateTransfer::SAVE { " save" } else { " load" });
            }
            Request::SetFeatures(bits) | Request::SetProtocolFeatures(bits) => _ = write!(text, " {bits:#x}"),
            _ => {}
        }
        fds.iter().for_each(|fd| _ = write!(text, " {}", self.name(*fd)));
        text
    }

    fn show_ring(&mut self, index: u32) {
        let ring = self.memory.ring(index).clone();
        let owed = ring.avail_idx.wrapping_sub(ring.used_idx);
        let slots: Vec<String> = (0..owed.min(ring.layout.size()))
            .map(|at| ring.avail[usize::from(ring.layout.slot(ring.used_idx.wrapping_add(at)))].to_string())
            .collect();
        let line = format!(
            "    avail {} used {} owed [{}] flags {} avail_event {}",
            ring.avail_idx,
            ring.used_idx,
            slots.join(" "),
            ring.used_flags,
            ring.avail_event
        );
        self.show(&line);
    }

    fn show_status(&mut self) {
        let status = self.pair.status(self.now);
        let backend = |it: &Option<crate::pair::BackendStatus>| {
            it.as_ref().map_or("none".to_owned(), |it| format!("{} {}", it.id, it.state.name()))
        };
        let mut line = format!(
            "    {} {}; primary {}, shadow {}; recovery {}",
            status.state.name(),
            status.phase.name(),
            backend(&status.primary),
            backend(&status.shadow),
            status.recovery
        );
        for ring in &status.rings {
            let served = if ring.served { "served" } else { "waiting" };
            _ = write!(line, "; ring {} {served} {} inflight {}", ring.index, ring.observer, ring.inflight);
        }
        if let Some(halted) = &status.halted {
            _ = write!(line, "; halted: {halted}");
        }
        self.show(&line);
    }
}

/// The index that is further on, where both are less than half a turn apart.
pub(super) fn later(left: u16, right: u16) -> u16 {
    if right.wrapping_sub(left) < 1 << 15 { right } else { left }
}

fn number(text: &str) -> u32 {
    text.parse().unwrap_or_else(|_| panic!("{text} is no number"))
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{text} is no bit mask"))
}

fn nanos(text: &str) -> Nanos {
    if let Some(millis) = text.strip_suffix("ms") {
        return Nanos::from_millis(u64::from(number(millis)));
    }
    Nanos::from_micros(u64::from(number(text.strip_suffix("us").expect("a time in ms or us"))))
}

/// Regions of 1 GiB; the rings lie in the first.
pub(super) fn region(number: u32) -> MemoryRegion {
    let at = u64::from(number) << 30;
    MemoryRegion { guest_addr: at, size: 1 << 30, user_addr: USER + at, mmap_offset: 0 }
}

pub(super) fn addr(index: u32, wild: bool) -> VringAddr {
    let at = if wild { 1 << 50 } else { USER + (u64::from(index) << 16) };
    VringAddr { index, flags: 0, descriptor: at, available: at + 0x1000, used: at + 0x2000, log: 0 }
}

fn reply_text(bytes: &[u8]) -> String {
    let (head, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("a header");
    let header = Header::decode(head).expect("ours");
    let Some(code) = RequestCode::from_id(header.request) else { return format!("vmm <- {} refused", header.request) };
    let kinds = [code.reply_kind(), ReplyKind::Ack];
    let reply = kinds.iter().find_map(|kind| {
        let fds: &[FdSlot] = &[];
        Reply::decode(header.request, code.name(), *kind, &header, payload, fds).ok()
    });
    let text = match reply.expect("our own reply") {
        Reply::U64(value) if code.reply_kind() == ReplyKind::Ack => {
            if value == 0 {
                "ok".to_owned()
            } else {
                "refused".to_owned()
            }
        }
        Reply::U64(value) => format!("{value:#x}"),
        Reply::VringState(state) => format!("{}={}", state.index, state.value),
        Reply::Config(Some(config)) => format!("{:?}", config.bytes),
        Reply::Config(None) => "none".to_owned(),
        Reply::Inflight { region, fd } => format!("{} bytes, descriptor {fd:?}", region.mmap_size),
        other => format!("{other:?}"),
    };
    format!("vmm <- {} {text}", code.name())
}

fn journal_text(entry: &Entry) -> String {
    // What only repeats what the script says, or measures time.
    let silent = ["took_us", "blackout_us", "evidence", "id", "phase", "inflight"];
    let shown = entry.properties.iter().filter(|(name, value)| {
        !silent.contains(name) && !matches!(value, Value::Micros(_)) && *value != Value::Number(0)
    });
    let mut text = format!("* {}", entry.event);
    for (name, value) in shown {
        let value = match value {
            Value::Number(value) => value.to_string(),
            Value::Text(value) => format!("\"{value}\""),
            Value::Flag(value) => value.to_string(),
            Value::Micros(_) => continue,
        };
        _ = write!(text, " {name}={value}");
    }
    text
}
