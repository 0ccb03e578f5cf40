//! Random histories. In the first kind the VMM and the driver keep the rules and everything else goes wrong; in the second nobody
//! keeps any rule. The harness checks its invariants after every step; a failure names its seed and the last lines.

use warmswap_wire::{
    BackendRequest, ConfigSpace, DeviceType, FdSlot, Header, HeaderFlags, HostNotifierArea, InflightDescription,
    IotlbMessage, LogRegion, MemoryRegion, Request, SharedObjectId, VringFd, VringState,
};

use super::harness::{Driver, Harness, addr, config, region};
use crate::drain::DrainMethod;
use crate::event::{BackendId, CommandId, Event, FenceLevel, PrivateEvents};
use crate::policy::{PairConfig, RegionUse, Survivors};
use crate::testing::{PlainRing, Random};
use crate::time::Nanos;

const RINGS: u32 = 2;
/// Most steps of a history that a fuzzer writes.
const STEPS_MAX: usize = 400;

/// Whoever decides what happens next.
trait Draw {
    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64;
}

impl Draw for Random {
    fn below(&mut self, bound: u64) -> u64 {
        Random::below(self, bound)
    }
}

/// Decisions as bytes, as few as each needs. At the end everything is zero.
struct Script<'a>(&'a [u8]);

impl Draw for Script<'_> {
    fn below(&mut self, bound: u64) -> u64 {
        let mut number = 0;
        let mut range = bound - 1;
        while range > 0 {
            let Some((byte, rest)) = self.0.split_first() else { break };
            self.0 = rest;
            number = number << 8 | u64::from(*byte);
            range >>= 8;
        }
        number % bound
    }
}

/// Plays the history that these bytes are, in which nobody keeps any rule.
///
/// # Panics
/// If the pair breaks one of the invariants that the harness checks.
pub fn run(data: &[u8]) {
    let mut script = Script(data);
    let config = random_config(&mut script);
    let survivors = [Survivors::Place, Survivors::Refuse][script.below(2) as usize];
    let mut harness = Harness::new(PairConfig { survivors, ..config });
    harness.anything_goes = true;
    let mut vmm = false;
    harness.quietly("start");
    for _ in 0..STEPS_MAX {
        if script.0.is_empty() {
            break;
        }
        nonsense_step(&mut harness, &mut vmm, &mut script);
    }
    harness.wait(Nanos::from_millis(50));
    harness.finish();
}

/// Seeds `1..count`, or up to `WARMSWAP_TEST_SEEDS`; or the one that is asked for with `WARMSWAP_TEST_SEED`, whose history is then shown
/// whole when it fails.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|seed| seed.parse().ok());
    number("WARMSWAP_TEST_SEED").map_or(1..number("WARMSWAP_TEST_SEEDS").unwrap_or(count), |seed| seed..seed + 1)
}

fn random(seed: u64) -> Random {
    Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
}

fn random_config(random: &mut dyn Draw) -> PairConfig {
    PairConfig {
        drain: DrainMethod::ALL[random.below(3) as usize],
        shadow: random.below(5) > 0,
        canary: random.below(2) == 0,
        region: [RegionUse::Witness, RegionUse::Trust][random.below(2) as usize],
        fence: [FenceLevel::Stopped, FenceLevel::Reaped][random.below(2) as usize],
        device: if random.below(5) == 0 { DeviceType::Fs } else { DeviceType::Blk },
        ..config()
    }
}

/// One of a set, if it has any.
fn pick<T: Copy>(from: impl Iterator<Item = T>, random: &mut dyn Draw) -> Option<T> {
    let all: Vec<T> = from.collect();
    (!all.is_empty()).then(|| all[random.below(all.len() as u64) as usize])
}

/// A VMM that keeps the rules.
struct Vmm {
    connected: bool,
    /// Rings it has started and not stopped.
    running: [bool; RINGS as usize],
    /// Rings it is stopping, and how many replies it had before.
    stopping: Option<(u32, usize)>,
}

impl Vmm {
    fn step(&mut self, harness: &mut Harness, random: &mut dyn Draw) {
        if !harness.pair.is_open() {
            return;
        }
        if !self.connected {
            harness.quietly("boot 2");
            *self = Vmm { connected: true, running: [true; 2], stopping: None };
            return;
        }
        if let Some((ring, replies)) = self.stopping {
            if harness.replies > replies && harness.requests.is_empty() {
                self.stopping = None;
                self.running[ring as usize] = false;
            }
            return;
        }
        let ring = random.below(u64::from(RINGS)) as u32;
        match random.below(13) {
            0 if random.below(3) == 0 => {
                harness.quietly("vmm gone");
                *self = Vmm { connected: false, running: [false; 2], stopping: None };
            }
            1 | 2 if self.running[ring as usize] && harness.requests.is_empty() => {
                self.stopping = Some((ring, harness.replies));
                harness.quietly(&format!("vmm GET_VRING_BASE {ring}"));
            }
            3 | 4 if !self.running[ring as usize] && harness.requests.is_empty() && self.may_start(ring, harness) => {
                self.set_up_again(ring, harness, random);
                harness.quietly(&format!("vmm !SET_VRING_KICK {ring}"));
                self.running[ring as usize] = true;
            }
            5 => harness.quietly("vmm ADD_MEM_REG 3"),
            6 => harness.quietly("vmm !REM_MEM_REG 3"),
            7 => harness.quietly(&format!("vmm SET_VRING_CALL {ring}")),
            8 => harness.quietly("vmm SET_MEM_TABLE 0"),
            10 => harness.quietly("vmm !SET_MEM_TABLE 0"),
            9 => harness.quietly(&format!("vmm SET_CONFIG 32 {}", random.below(2))),
            _ => harness.quietly("vmm !GET_FEATURES"),
        }
    }

    /// A driver that sets up one ring anew does so with all of them: a region that another ring is kept in cannot be made afresh.
    fn may_start(&self, ring: u32, harness: &Harness) -> bool {
        let anew = harness.drivers.get(&ring).is_some_and(|driver| driver.broken);
        !anew || self.running == [false; 2] || harness.pair.config.drain == DrainMethod::PrivateKick
    }

    /// A ring about which the broker said that it knows nothing is set up afresh by the driver, as after a reset; and now and then all
    /// of them are.
    fn set_up_again(&self, ring: u32, harness: &mut Harness, random: &mut dyn Draw) {
        let reset = self.running == [false; 2] && random.below(2) == 0;
        let Some(driver) = harness.drivers.get_mut(&ring).filter(|driver| driver.broken || reset) else { return };
        *driver = Driver::default();
        harness.memory.rings.insert(ring, PlainRing::new(8, random.below(65_536) as u16));
    }
}

fn world_step(harness: &mut Harness, random: &mut dyn Draw) {
    // What has been asked for comes, mostly. Where rings are drained by stopping them, backends track what is in flight.
    if random.below(6) == 0
        && let Some(id) = pick(harness.starting.iter().copied(), random)
    {
        let tracks = ["", " inflight", " inflight", " inflight no-canary"][random.below(4) as usize];
        let moves = ["", " state no-channel", " state", " state", " state", " state"][random.below(6) as usize];
        return harness.quietly(&format!("up {id}{tracks}{moves}"));
    }
    if random.below(12) == 0
        && let Some(id) = pick(harness.fencing.iter().copied(), random)
    {
        return harness.quietly(&format!("fenced {id}"));
    }
    if random.below(4) == 0
        && let Some(id) = pick(harness.moving.iter().copied(), random)
    {
        if random.below(6) == 0 && harness.backends.contains_key(&id) {
            harness.quietly(&format!("unwhole {id}"));
        }
        let size = if random.below(6) == 0 { "fails" } else { "4096" };
        return harness.quietly(&format!("moved {id} {size}"));
    }
    if harness.tries() && random.below(8) == 0 {
        return harness.quietly("trial");
    }
    let ring = random.below(u64::from(RINGS)) as u32;
    match random.below(20) {
        0..=4 => {
            let Some(known) = harness.memory.rings.get(&ring) else { return };
            let owed = known.avail_idx.wrapping_sub(known.used_idx);
            let inflight = harness.drivers.get(&ring).map_or(Vec::new(), |driver| driver.inflight.clone());
            let free = pick((0..8).filter(|head| !inflight.contains(head)), random);
            if let Some(head) = free.filter(|_| owed < 8) {
                harness.quietly(&format!("submit {ring} {head}"));
            }
        }
        5..=9 => {
            // The holder completes something, also while it is being fenced.
            if harness.holder(ring).is_some()
                && let Some(driver) = harness.drivers.get(&ring).filter(|driver| !driver.broken)
                && let Some(head) = pick(driver.inflight.iter().copied(), random)
                && harness.may_complete(ring, head)
            {
                let verb = ["take", "complete", "complete"][random.below(3) as usize];
                harness.quietly(&format!("{verb} {ring} {head}"));
            }
        }
        10 | 11 => harness.quietly(&format!("wait {}us", 1 + random.below(3_000))),
        12 => harness.quietly(&format!("wait {}ms", 1 + random.below(700))),
        13 if random.below(8) == 0 => harness.quietly("jump 70ms"),
        14 if random.below(2) == 0 => {
            if let Some(id) = pick(harness.backends.keys().copied(), random) {
                let end = ["exit", "down", "mute", "unmute", "unmute", "config"][random.below(6) as usize];
                let value = if end == "config" { " 8" } else { "" };
                harness.quietly(&format!("{end} {id}{value}"));
            }
        }
        15 if random.below(3) == 0 => {
            if let Some(id) = pick(harness.starting.iter().copied(), random) {
                let options = ["", "", "", " no-ack", " no-slots", " queues=1"][random.below(6) as usize];
                harness.quietly(&if random.below(9) == 0 { format!("exit {id}") } else { format!("up {id}{options}") });
            }
        }
        17 => {
            if let Some(id) = pick(harness.fencing.iter().copied(), random) {
                harness.quietly(&format!("fenced {id}"));
            }
        }
        18 => harness.quietly(if random.below(3) == 0 { "failover now" } else { "failover" }),
        16 => {
            if let Some(id) = pick(harness.backends.keys().copied(), random) {
                harness.quietly(&format!("alarm {id} {}", ["harm", "law", "full"][random.below(3) as usize]));
            }
        }
        19 if random.below(20) == 0 => {
            if let Some(id) = pick(harness.backends.keys().copied(), random) {
                harness.quietly(&format!("claims {id} {}", random.below(65_536)));
            }
        }
        _ => {}
    }
}

/// A history in which the VMM and the driver keep the rules.
pub(super) fn orderly_history(seed: u64) -> Harness {
    let mut random = random(seed);
    let mut harness = Harness::new(random_config(&mut random));
    let mut vmm = Vmm { connected: false, running: [false; 2], stopping: None };
    harness.quietly("start");
    for _ in 0..300 {
        if random.below(6) == 0 {
            vmm.step(&mut harness, &mut random);
        } else {
            world_step(&mut harness, &mut random);
        }
    }
    harness
}

#[test]
fn nothing_is_lost_or_repeated_in_random_histories_of_a_vmm_that_keeps_the_rules() {
    let (mut handed, mut settled, mut believed, mut moved) = (0, 0, 0, 0);
    for seed in seeds(200) {
        println!("seed {seed}");
        let harness = orderly_history(seed);
        handed += harness.handed;
        settled += harness.journal.iter().filter(|event| **event == "FailoverSettled").count();
        believed += harness.journal.iter().filter(|event| **event == "RegionBelieved").count();
        moved += harness.journal.iter().filter(|event| **event == "StateTransferred").count();
        harness.finish();
    }
    let whole = seeds(2) == (1..2);
    assert!(
        !whole || (handed > 500 && settled > 150 && believed > 5 && moved > 5),
        "the histories are lively: {handed} rings handed, {settled} settled, {believed} regions believed, {moved} states moved"
    );
}

/// Any request that the codec would let through.
fn random_request(harness: &mut Harness, random: &mut dyn Draw) -> Request {
    let index = [0, 0, 0, 1, 1, 2, 255][random.below(7) as usize];
    let value = [0, 1, 2, 3, 8, 16, 7, 32_768, 65_535, 70_000][random.below(10) as usize];
    let state = VringState { index, value };
    let fd = |harness: &mut Harness| harness.fresh_slot("fd");
    let some_region = |random: &mut dyn Draw| match random.below(4) {
        0 => MemoryRegion { guest_addr: random.below(1 << 40), size: 1, user_addr: 0, mmap_offset: 0 },
        _ => region(random.below(4) as u32),
    };
    let ring_fd = |harness: &mut Harness, random: &mut dyn Draw| VringFd {
        index,
        fd: (random.below(5) > 0).then(|| fd(harness)),
    };
    let config = ConfigSpace { offset: random.below(257) as u32, flags: 0, bytes: vec![1; random.below(40) as usize] };
    match random.below(34) {
        0 => Request::SetFeatures([0, 0x1_4000_2200, 0x1_0000_2200, u64::MAX][random.below(4) as usize]),
        1 => Request::SetMemTable((0..random.below(4)).map(|_| (some_region(random), fd(harness))).collect()),
        2 => Request::AddMemReg { region: some_region(random), fd: (random.below(4) > 0).then(|| fd(harness)) },
        3 => Request::RemMemReg(some_region(random)),
        4 | 5 => Request::SetVringNum(VringState { index, value: value.clamp(1, 32_768) }),
        6 | 7 => Request::SetVringAddr(addr(index, random.below(4) == 0)),
        8 => Request::SetVringBase(state),
        9..=11 => Request::GetVringBase(state),
        12..=15 => Request::SetVringKick(ring_fd(harness, random)),
        16 => Request::SetVringCall(ring_fd(harness, random)),
        17 => Request::SetVringErr(ring_fd(harness, random)),
        18 => Request::SetVringEnable(VringState { index, value: value & 1 }),
        19 => Request::SetConfig(config),
        20 => Request::GetConfig(config),
        21 => Request::SetLogBase {
            region: LogRegion { size: 4096, offset: 0 },
            fd: (random.below(3) > 0).then(|| fd(harness)),
        },
        22 => Request::SetLogFd(fd(harness)),
        23 => Request::SetBackendReqFd(fd(harness)),
        24 => Request::SetProtocolFeatures(random.below(1 << 24)),
        25 => {
            Request::GetInflightFd(InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: 8 })
        }
        26 => Request::ResetDevice,
        27 => Request::IotlbMsg(IotlbMessage { iova: 0, size: 1, user_addr: 0, perm: 3, kind: 1 }),
        28 => Request::CreateCryptoSession(vec![1; 9]),
        29 => Request::GpuSetSocket(fd(harness)),
        30 => Request::NetSetMtu(9),
        31 => Request::SendRarp(9),
        32 => Request::GetSharedObject(SharedObjectId([3; 16])),
        _ => Request::GetFeatures,
    }
}

fn random_message(random: &mut dyn Draw) -> (Header, Vec<u8>) {
    let flags = if random.below(4) > 0 { HeaderFlags::REPLY } else { HeaderFlags::empty() };
    let payload = vec![random.below(256) as u8; [0, 8, 8, 8, 12, 16, 24, 268][random.below(8) as usize]];
    let request = [1, 1, 5, 8, 11, 11, 15, 17, 18, 24, 36, 37, 99][random.below(13) as usize];
    (Header { request, flags, size: payload.len() as u32 }, payload)
}

fn nonsense_step(harness: &mut Harness, vmm: &mut bool, random: &mut dyn Draw) {
    let any = BackendId(random.below(9));
    match random.below(24) {
        0 if harness.pair.is_open() && !*vmm => {
            *vmm = true;
            harness.quietly("boot 2");
        }
        1 if *vmm && random.below(3) == 0 => {
            *vmm = false;
            harness.quietly("vmm gone");
        }
        2..=9 if *vmm => {
            let request = random_request(harness, random);
            harness.request(request, random.below(2) == 0);
        }
        10 => {
            let (header, payload) = random_message(random);
            let fds: Vec<FdSlot> = (0..random.below(3)).map(|_| harness.fresh_slot("surplus")).collect();
            harness.event(Event::LinkMessage { backend: any, header, payload, fds });
        }
        11 => {
            let fd = (random.below(2) == 0).then(|| harness.fresh_slot("notifier"));
            let area = HostNotifierArea { ring: 0, size: 1, offset: 0 };
            let request = [
                BackendRequest::ConfigChange,
                BackendRequest::VringCall(VringState { index: 0, value: 0 }),
                BackendRequest::SharedObjectLookup(SharedObjectId([1; 16])),
            ];
            let request = match fd {
                Some(_) => BackendRequest::VringHostNotifier { area, fd },
                None => request[random.below(3) as usize].clone(),
            };
            harness.event(Event::BackendRequest { backend: any, request, need_reply: random.below(2) == 0 });
        }
        12 if random.below(4) == 0 => harness.lose(any.0, random.below(2) == 0),
        13 => {
            let [kick, call, probe] = ["kick", "call", "probe"].map(|name| harness.fresh_slot(name));
            let private = PrivateEvents { kick, call, probe };
            let backend = BackendId(1_000 + random.below(9));
            harness.event(Event::LinkUp { backend, backend_req: None, private });
        }
        14 => {
            let level = FenceLevel::Reaped;
            harness.event(Event::Fenced { backend: BackendId(1_000), level, evidence: "nothing".to_owned() });
            harness.event(Event::FenceWaiting { backend: any, reason: "nothing".to_owned() });
        }
        15 => {
            let ring = random.below(300) as u32 / 60;
            harness.watched.remove(&ring);
            harness.event(Event::Kicked { ring });
        }
        16 => {
            // The guest writes whatever it likes.
            let ring = random.below(u64::from(RINGS)) as u32;
            if let Some(plain) = harness.memory.rings.get_mut(&ring) {
                let word = random.below(65_536) as u16;
                match random.below(5) {
                    0 => plain.avail_idx = word,
                    1 => plain.used_idx = word,
                    2 => plain.avail.fill(word),
                    3 => plain.used.fill(u32::from(word) << random.below(16)),
                    _ => plain.avail_idx = plain.avail_idx.wrapping_add(1),
                }
            }
            harness.memory.faulted = random.below(50) == 0;
        }
        17 => {
            let now = random.below(2) == 0;
            harness.event(Event::FailoverRequested { command: CommandId(7), now, reason: String::new() });
        }
        18 if *vmm => {
            let request = random.below(90) as u32;
            let (reason, need_reply) = ("unknown".to_owned(), random.below(2) == 0);
            if harness.pair.wants_request() {
                harness.event(Event::VmmRefused { request, reason, need_reply });
            }
        }
        _ => world_step(harness, random),
    }
}

/// A history in which nobody keeps any rule.
pub(super) fn nonsense_history(seed: u64) -> Harness {
    let mut random = random(seed);
    let config = random_config(&mut random);
    let survivors = [Survivors::Place, Survivors::Refuse][random.below(2) as usize];
    let mut harness = Harness::new(PairConfig { survivors, ..config });
    harness.anything_goes = true;
    let mut vmm = false;
    harness.quietly("start");
    for _ in 0..200 {
        nonsense_step(&mut harness, &mut vmm, &mut random);
    }
    harness.wait(Nanos::from_millis(50));
    harness
}

#[test]
fn nonsense_that_a_fuzzer_writes_never_breaks_an_invariant() {
    for seed in seeds(60) {
        println!("seed {seed}");
        let mut random = random(seed);
        let history: Vec<u8> = (0..1_500).map(|_| random.below(256) as u8).collect();
        run(&history);
    }
}

#[test]
fn nonsense_from_everybody_never_breaks_an_invariant() {
    for seed in seeds(250) {
        println!("seed {seed}");
        nonsense_history(seed).finish();
    }
}
