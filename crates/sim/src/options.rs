//! What is switched on in a run: drawn from the seed, printed in full, and open to whoever wants a run with something else.

use std::fmt;

use warmswap_core::{DrainMethod, FenceLevel, Limits, Nanos, OnPrediction, PairConfig, RegionUse, Survivors};
use warmswap_wire::DeviceType;

use crate::random::Random;

/// How a VMM behaves, above all when it connects again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmRule {
    /// Connects again; describes ring by ring; names `used.idx` as base; asks for few acknowledgements.
    Qemu,
    /// Connects again; describes by message; names `avail.idx` as base; asks for an acknowledgement of everything.
    CloudHypervisor,
    /// Never connects again: its guest is started anew. All messages of crosvm's front-end.
    Crosvm,
    /// Never connects again. Knows no protocol feature but CONFIG.
    Firecracker,
}

impl VmmRule {
    /// All of them.
    pub const ALL: [VmmRule; 4] = [VmmRule::Qemu, VmmRule::CloudHypervisor, VmmRule::Crosvm, VmmRule::Firecracker];

    /// Whether it connects again with the same guest.
    #[must_use]
    pub fn reconnects(self) -> bool {
        matches!(self, VmmRule::Qemu | VmmRule::CloudHypervisor)
    }
}

/// A kind of backend, as known in public.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Drains when a ring is stopped, keeps an in-flight region where it may: our own, yc-libvhost-server.
    Draining,
    /// qemu-storage-daemon: answers a stop at once, completes or loses later what it had taken, and dies of a completion without a
    /// call descriptor. Caches `used.idx` when it is told addresses. Starts when kicked.
    LibvhostUser,
    /// A daemon on rust-vmm's `vhost-user-backend`: a disabled ring takes no kicks; a stop is answered at once.
    RustVmm,
    /// SPDK: polls, leaves NO_NOTIFY behind, has no EVENT_IDX, drains for a bounded time and then answers all the same.
    Spdk,
}

impl Class {
    /// All of them.
    pub const ALL: [Class; 4] = [Class::Draining, Class::LibvhostUser, Class::RustVmm, Class::Spdk];

    /// How new work is kept from it.
    #[must_use]
    pub fn drain(self) -> DrainMethod {
        match self {
            Class::Draining | Class::Spdk => DrainMethod::Stop,
            Class::LibvhostUser => DrainMethod::PrivateKick,
            Class::RustVmm => DrainMethod::Disable,
        }
    }

    /// Whether there are backends of this class that keep an in-flight region.
    #[must_use]
    pub fn may_keep_region(self) -> bool {
        matches!(self, Class::Draining | Class::Spdk)
    }
}

/// How a backend keeps its in-flight region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// It has none.
    Absent,
    /// As the specification has it: `warmswap_wire::inflight::Tracker`.
    Correct,
    /// `used_idx` starts at zero instead of the live index (SPDK issue 3766).
    StartsAtZero,
    /// Marks are never cleared.
    NeverCleared,
    /// Marks are cleared before the completion is published.
    ClearedEarly,
    /// The counter stands still: the order of submission is lost.
    NoOrder,
}

/// Something a backend, a fence or a disk does on purpose that warmswap cannot survive, one excepted: shows that the checks notice. Never
/// drawn from a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing.
    None,
    /// A request is completed twice now and then.
    CompletesTwice,
    /// A write is acknowledged and not made now and then.
    LosesWrite,
    /// A flush is acknowledged and not made.
    LosesFlush,
    /// A request is taken and never completed. Another backend carries it out.
    LosesRequest,
    /// A completion's interrupt is left out now and then.
    LosesCall,
    /// What is read is wrong now and then.
    ReadsWrong,
    /// The proof of a death comes while its writes are still under way.
    FencesEarly,
    /// A killed backend's threads go on for a while after the proof.
    LivesOn,
    /// A backend stops without finishing what it has and says that it has.
    LiesAboutBase,
    /// A request is answered with an error.
    FailsRequest,
}

impl Sabotage {
    /// All that break something.
    pub const ALL: [Sabotage; 10] = [
        Sabotage::CompletesTwice,
        Sabotage::LosesWrite,
        Sabotage::LosesFlush,
        Sabotage::LosesRequest,
        Sabotage::LosesCall,
        Sabotage::ReadsWrong,
        Sabotage::FencesEarly,
        Sabotage::LivesOn,
        Sabotage::LiesAboutBase,
        Sabotage::FailsRequest,
    ];
}

/// Kinds of fault that may occur in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The serving backend is killed at some instant.
    pub kill: bool,
    /// A backend is killed after a number of its own stores into shared memory: between any two of them.
    pub kill_at_store: bool,
    /// A backend is killed after a number of messages it has read: a shadow in each phase.
    pub kill_at_message: bool,
    /// The shadow is killed.
    pub kill_shadow: bool,
    /// Both are killed at about the same time.
    pub kill_both: bool,
    /// The link of a backend ends while its data path lives on.
    pub drop_link: bool,
    /// All threads of a backend stop for good.
    pub hang: bool,
    /// The data path of a backend stops; its control path answers.
    pub stall: bool,
    /// The control path of a backend stops; its data path goes on.
    pub mute: bool,
    /// A backend is slow to answer for a while.
    pub slow: bool,
    /// A backend cannot be started.
    pub start_fails: bool,
    /// The last message of a dying backend, or of a VMM that disconnects, is cut at some byte.
    pub cut: bool,
    /// The operator asks for failovers.
    pub planned: bool,
    /// The failure model has alarms.
    pub predicted: bool,
    /// The broker's control thread is kept from its processor for a while.
    pub late: bool,
    /// A request kills every backend that takes it.
    pub poison: bool,
    /// The broker dies in some step, and another one goes on.
    pub broker_dies: bool,
}

/// Everything about a run except the seed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rings of the device.
    pub rings: u16,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Where both indices stand at first.
    pub start_index: u16,
    /// The guest wants EVENT_IDX.
    pub event_idx: bool,
    /// The guest uses indirect descriptors.
    pub indirect: bool,
    /// Requests in flight on each ring, at most.
    pub depth: u16,
    /// Requests submitted at once, at most.
    pub burst: u16,
    /// Mean time between bursts.
    pub pause: Nanos,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Blocks of a request, at most.
    pub request_blocks: u16,
    /// Reads and flushes in a hundred requests; the others write.
    pub reads: u8,
    /// See `reads`.
    pub flushes: u8,
    /// How the VMM behaves.
    pub vmm: VmmRule,
    /// The VMM stops rings and starts them again.
    pub stops: bool,
    /// The VMM adds memory and takes it away again.
    pub hotplug: bool,
    /// The VMM disconnects.
    pub disconnects: bool,
    /// The guest is reset.
    pub resets: bool,
    /// The VMM replaces call descriptors.
    pub call_swaps: bool,
    /// The guest writes to the configuration space: whether the device caches what it writes.
    pub cache_modes: bool,
    /// The VMM sends messages that nobody can follow: with a missing descriptor, of an unknown kind.
    pub bad_messages: bool,
    /// Class of every second backend, beginning with the first.
    pub primary: Class,
    /// Class of the others.
    pub shadow: Class,
    /// How those that may keep an in-flight region keep it.
    pub keeping: Keeping,
    /// Mean time of a request at the disk.
    pub service: Nanos,
    /// I/O of a killed process goes on for a while.
    pub late_writes: bool,
    /// Threads of the guest and of backends are kept from their processor now and then, between any two stores.
    pub preempted: bool,
    /// Others go on between two loads of the broker.
    pub torn_looks: bool,
    /// Messages arrive in pieces.
    pub pieces: bool,
    /// Time from a start to a connection, and from a kill to its proof.
    pub start_takes: Nanos,
    /// See `start_takes`.
    pub fence_takes: Nanos,
    /// The broker's configuration.
    pub drain: DrainMethod,
    /// See `drain`.
    pub region: RegionUse,
    /// See `drain`.
    pub fence: FenceLevel,
    /// See `drain`.
    pub canary: bool,
    /// See `drain`.
    pub survivors: Survivors,
    /// See `drain`.
    pub on_prediction: OnPrediction,
    /// See `drain`.
    pub limits: Limits,
    /// What goes wrong.
    pub faults: Faults,
    /// Mean time between two faults.
    pub fault_every: Nanos,
    /// For so long faults occur.
    pub safety: Nanos,
    /// Afterwards everything must come to an end within this.
    pub liveness: Nanos,
    /// What is done on purpose.
    pub sabotage: Sabotage,
}

impl Options {
    /// The options of a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Options {
        let random = &mut Random::new(seed ^ 0x006f_7074_696f_6e73);
        let ring_size = 2_u16 << random.below(8);
        let vmm = random.pick(&[
            VmmRule::Qemu,
            VmmRule::Qemu,
            VmmRule::CloudHypervisor,
            VmmRule::CloudHypervisor,
            VmmRule::Crosvm,
            VmmRule::Firecracker,
        ]);
        let primary = random.pick(&Class::ALL);
        // Mostly a pair is two of a kind: the drain that is configured suits both.
        let shadow = if random.percent(70) { primary } else { random.pick(&Class::ALL) };
        let keeping = random.pick(&[
            Keeping::Correct,
            Keeping::Correct,
            Keeping::Correct,
            Keeping::Absent,
            Keeping::StartsAtZero,
            Keeping::NeverCleared,
            Keeping::ClearedEarly,
            Keeping::NoOrder,
        ]);
        let start_index = match random.below(3) {
            0 => 0,
            1 => 65_535 - random.below(u64::from(ring_size) * 4 + 40) as u16,
            _ => random.below(65_536) as u16,
        };
        let trusted = keeping == Keeping::Correct && primary.may_keep_region() && shadow.may_keep_region();
        let depth = random.between(1, u64::from(ring_size).min(32)) as u16;
        let service = random.span(Nanos::from_micros(3), Nanos::from_micros(400));
        let pause = random.span(Nanos::from_micros(12), Nanos::from_micros(1_500));
        Options {
            rings: random.between(1, 3) as u16,
            ring_size,
            start_index,
            event_idx: random.percent(60),
            indirect: ring_size < 4 || random.percent(40),
            depth,
            burst: random.between(1, u64::from(depth).min(8)) as u16,
            pause,
            blocks: random.between(16, 128),
            request_blocks: random.between(1, 4) as u16,
            reads: random.between(10, 60) as u8,
            flushes: random.between(0, 10) as u8,
            vmm,
            stops: random.percent(40),
            hotplug: random.percent(40),
            disconnects: random.percent(30),
            resets: random.percent(20),
            call_swaps: random.percent(30),
            // Drawn by itself: the seeds without it live as they did before there was any.
            cache_modes: Random::new(seed ^ 0x0077_7269_7465_6273).percent(25),
            bad_messages: random.percent(20),
            primary,
            shadow,
            keeping,
            service,
            late_writes: random.percent(60),
            preempted: random.percent(50),
            torn_looks: random.percent(50),
            pieces: random.percent(30),
            start_takes: random.span(Nanos::from_micros(100), Nanos::from_millis(4)),
            fence_takes: random.span(Nanos::from_micros(30), Nanos::from_millis(3)),
            drain: primary.drain(),
            region: if trusted && random.percent(50) { RegionUse::Trust } else { RegionUse::Witness },
            fence: random.pick(&[FenceLevel::Stopped, FenceLevel::Stopped, FenceLevel::Reaped]),
            canary: random.percent(60),
            survivors: if random.percent(95) { Survivors::Place } else { Survivors::Refuse },
            on_prediction: if random.percent(90) { OnPrediction::Act } else { OnPrediction::Observe },
            limits: limits(random),
            // Drawn by itself: the seeds that were there before it go on as they did.
            faults: Faults { broker_dies: Random::new(seed ^ 0x6272_6f6b_6572).percent(30), ..faults(random) },
            fault_every: random.span(Nanos::from_micros(400), Nanos::from_millis(4)),
            safety: Nanos::from_millis(random.between(10, 60)),
            liveness: Nanos::from_millis(4_000),
            sabotage: Sabotage::None,
        }
    }

    /// What the broker is told.
    #[must_use]
    pub fn config(&self) -> PairConfig {
        PairConfig {
            device: DeviceType::Blk,
            drain: self.drain,
            survivors: self.survivors,
            region: self.region,
            fence: self.fence,
            shadow: true,
            canary: self.canary,
            on_prediction: self.on_prediction,
            limits: self.limits,
        }
    }

    /// The class of a backend.
    #[must_use]
    pub fn class_of(&self, generation: u64) -> Class {
        if generation % 2 == 1 { self.primary } else { self.shadow }
    }
}

/// Bounds that make seconds of milliseconds, in the proportions of the defaults.
fn limits(random: &mut Random) -> Limits {
    let hang = Nanos::from_millis(random.between(5, 30));
    Limits {
        drain_max: Nanos::from_millis(random.between(2, 30)),
        hang,
        stall: Nanos(hang.0 * random.between(3, 10)),
        confirm_max: Nanos(hang.0 * 2),
        start_max: Nanos::from_millis(random.between(30, 200)),
        ping_every: Nanos(hang.0 * random.between(1, 3)),
        ask_max: Nanos::from_millis(random.between(1, 30)),
        canary_every: Nanos::from_millis(random.between(2, 50)),
        idle_after: Nanos::from_millis(random.between(1, 20)),
        restart_min: Nanos::from_micros(random.between(200, 5_000)),
        restart_max: Nanos::from_millis(100),
        predicted_per_hour: random.between(1, 6) as u32,
        cool_down_min: Nanos::from_millis(random.between(1, 20)),
        cool_down_max: Nanos::from_millis(1_000),
        consider_max: Nanos::from_millis(random.between(2, 30)),
        ..Limits::default()
    }
}

fn faults(random: &mut Random) -> Faults {
    let mut some = |percent| random.percent(percent);
    Faults {
        kill: some(60),
        kill_at_store: some(60),
        kill_at_message: some(40),
        kill_shadow: some(40),
        kill_both: some(25),
        drop_link: some(30),
        hang: some(20),
        stall: some(15),
        mute: some(15),
        slow: some(30),
        start_fails: some(20),
        cut: some(40),
        planned: some(60),
        predicted: some(50),
        late: some(15),
        poison: some(8),
        broker_dies: false,
    }
}

impl fmt::Display for Options {
    /// All of them, one in a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        macro_rules! lines {
            ($($field:ident)*) => {{
                // A field that is added has to be printed.
                let Options { $($field),* } = self;
                $(writeln!(f, "{:<15} {:?}", stringify!($field), $field)?;)*
            }};
        }
        lines!(rings ring_size start_index event_idx indirect depth burst pause blocks request_blocks reads flushes
            vmm stops hotplug disconnects resets call_swaps cache_modes bad_messages primary shadow keeping service late_writes
            preempted torn_looks pieces start_takes fence_takes drain region fence canary survivors on_prediction
            limits faults fault_every safety liveness sabotage);
        Ok(())
    }
}
