//! The bug zoo: known-bad variants of our own code, to show that what checks it would notice.
//!
//! Each animal is one bug: one this project had, one that others of its kind have, or one that is easily written. Where it lives there
//! is a line such as `if loose(Animal::FenceSkipped) || …`. Without the feature `zoo`, and nothing that is shipped has it, [`loose`] is
//! the constant `false` and the line is what it was before. With it an animal is loose in a thread that has [`release`]d it, or in
//! every thread of a process that was started with its name in `WARMSWAP_ZOO`.

#![cfg_attr(not(feature = "zoo"), no_std)]
#![forbid(unsafe_code)]

macro_rules! animals {
    ($($name:ident = $id:literal, $home:literal, $source:literal, $what:literal;)*) => {
        /// A known bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(not(feature = "zoo"), allow(missing_docs, reason = "each is described where it can be set loose"))]
        pub enum Animal { $(#[cfg_attr(feature = "zoo", doc = $what)] $name),* }

        #[cfg(feature = "zoo")]
        impl Animal {
            /// All of them.
            pub const ALL: &[Animal] = &[$(Animal::$name),*];

            /// The name used on the command line and in every report.
            #[must_use]
            pub fn id(self) -> &'static str {
                match self { $(Animal::$name => $id),* }
            }

            /// What it does wrong, as a sentence.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self { $(Animal::$name => $what),* }
            }

            /// The file it lives in.
            #[must_use]
            pub fn home(self) -> &'static str {
                match self { $(Animal::$name => $home),* }
            }

            /// Where it was met: a project's issue, a measurement, or the commit that mended it here.
            #[must_use]
            pub fn source(self) -> &'static str {
                match self { $(Animal::$name => $source),* }
            }
        }
    };
}

animals! {
    // Stopping.
    StopTakenForDrain = "stop-taken-for-drain", "core/pair/stop.rs",
        "qemu-storage-daemon 10.0.2 answers at once and completes later",
        "the answer to a stop is taken for a drain, whatever base it names";
    ClaimByIndexAlone = "claim-by-index-alone", "core/pair/stop.rs",
        "SPDK answers late, with an index of the past",
        "a stop is believed if its base equals used.idx, though something older is owed";
    StopAnsweredWhileServed = "stop-answered-while-served", "core/pair/stop.rs", "mended in 99dc84b",
        "the VMM's stop is answered from the record while a new primary serves the ring";
    RestartedWhileDrained = "restarted-while-drained", "core/pair/rings.rs", "mended in 8cfbeaa",
        "a kick descriptor of the VMM reaches a backend that is being drained, and starts its ring again";
    AbandonedForgotten = "abandoned-ring-forgotten", "core/pair/rings.rs", "mended in 3795d91",
        "a ring that was stopped without proof is started again at used.idx as if it owed nothing out of order";
    // Fencing.
    FenceSkipped = "fence-skipped", "core/pair/failover.rs", "cloud-hypervisor issue 8613: hang-up precedes death",
        "a backend whose connection has ended is taken for dead";
    FenceByTimeout = "fence-by-timeout", "core/pair/failover.rs", "cloud-hypervisor issue 8613",
        "a backend that was killed is taken for dead after a while";
    OneOfGroupKilled = "one-of-group-killed", "warmswap/process.rs", "own measurement: a child goes on writing",
        "of a backend's processes only the first is killed and waited for";
    ExitTakenForQuiet = "exit-taken-for-quiet", "warmswap/driver/fence.rs",
        "own measurement: io_uring writes 15 s after the process is gone",
        "the end of a process is taken for the end of its I/O";
    // What is owed.
    ReplayFromAvail = "replay-from-avail-idx", "core/pair/rings.rs", "cloud-hypervisor's rule without a region",
        "the next backend starts at avail.idx: everything in flight is lost";
    ReplayFromUsed = "replay-from-used-idx", "core/pair/failover.rs", "QEMU's rule without a region",
        "the next backend starts at used.idx, and what the slots from there on hold is not put right";
    SurvivorsByHead = "survivors-in-head-order", "core/observer.rs", "ecosystem of regions: order by counter",
        "what is owed is replayed in the order of heads, not of submission";
    PlacedWithoutWrap = "placed-without-wrap", "core/pair/failover.rs", "written for the zoo",
        "survivors beyond index 65535 are all written to one slot";
    OverrunIgnored = "overrun-ignored", "core/observer.rs", "written for the zoo",
        "slots that may have been overwritten since the last look are believed";
    SilenceIgnored = "silence-ignored", "core/observer.rs", "written for the zoo",
        "indices that may have gone all the way round are believed";
    InexactBelieved = "inexact-taken-for-exact", "core/observer.rs", "the rule `count agrees` proves nothing",
        "what is in flight after a gap is taken for known";
    // Handing over.
    KickLost = "kick-lost", "core/pair/rings.rs", "rust-vmm/vhost issue 375",
        "kicks that the old backend has taken away are not given to the new one";
    KickBeforeEnableLost = "kick-before-enable-lost", "core/pair/rings.rs", "rust-vmm/vhost issue 247; mended in 634c3ff",
        "a ring is kicked before its backend knows that it is enabled, and not again";
    CallLost = "call-lost", "core/pair/rings.rs", "cloud-hypervisor issue 7851",
        "a completion whose interrupt the old backend still owed is never told to the driver";
    CallStale = "call-on-stale-descriptor", "core/pair/rings.rs", "QEMU masks interrupts by other descriptors",
        "a call descriptor that the VMM replaces is told to the primary alone";
    CallForgotten = "call-forgotten-after-stop", "core/link.rs", "mended in ff1d808",
        "a backend that closed its call descriptor with a stop is not given it again";
    EnableForgotten = "enable-forgotten", "core/pair/rings.rs", "rust-vmm/vhost issue 227",
        "rings are handed over and not enabled";
    NoNotifyLeft = "no-notify-left-behind", "core/pair/rings.rs", "SPDK polls and leaves used.flags = NO_NOTIFY",
        "used.flags of a polling backend are left to one that waits for kicks";
    EventIdxLeft = "avail-event-left-behind", "core/pair/rings.rs", "written for the zoo",
        "the position up to which the old backend wanted no kick is left to the new one";
    AddressEarly = "ring-address-early", "core/pair/links.rs", "libvhost-user keeps used.idx as of SET_VRING_ADDR",
        "a warm shadow is told the addresses of rings, and not again when it takes over";
    EarlyKick = "started-by-early-kick", "core/pair/links.rs", "libvhost-user and SPDK start at SET_VRING_KICK",
        "a warm shadow is given the guest's kick descriptors, and starts to serve";
    KicksSwapped = "descriptors-swapped", "core/pair/rings.rs", "cloud-hypervisor issue 8626",
        "a ring gets the descriptors of its neighbour";
    ReplyMismatched = "reply-mismatched", "core/link.rs", "rust-vmm/vhost issue 290",
        "a reply is taken for that to the last request, not the first";
    // The session.
    MemoryStale = "memory-table-stale", "core/pair/vmm.rs", "SPDK issue 3150",
        "a change of guest memory is told to the primary alone";
    WarmingMissesChanges = "warming-misses-changes", "core/link.rs", "SPDK issue 3150",
        "what the VMM changes while a shadow is being warmed never reaches it";
    MemoryAckedEarly = "memory-acknowledged-early", "core/pair/vmm.rs", "mended in 9c36038",
        "a change of memory without acknowledgement is called done before the backends have it";
    FeaturesDiffer = "features-differ", "core/pair/links.rs", "written for the zoo",
        "a shadow that lacks features of the guest's is taken";
    CapacityDiffers = "capacity-differs", "core/pair/links.rs", "written for the zoo",
        "a shadow with another configuration space, the capacity in it, is taken";
    WriteCacheForgotten = "write-cache-forgotten", "core/pair/links.rs", "written for the zoo",
        "what the guest has written to the configuration space, the write-cache mode, is not told to a shadow";
    ConfigChangeSwallowed = "config-change-swallowed", "core/pair/links.rs", "written for the zoo",
        "the VMM is not told that the configuration space has changed";
    LogOnOneLeg = "log-on-one-leg", "core/pair/vmm.rs", "cloud-hypervisor issue 8918",
        "that writes are to be logged is told to the primary alone";
    LogAckedEarly = "log-acknowledged-early", "core/pair/vmm.rs", "mended in ff1d808",
        "a change to the dirty log is called done before the serving backend has made it";
    DoubleClose = "double-close", "core/session.rs", "written for the zoo",
        "the descriptor of a region that is removed is closed twice";
    DescriptorLeak = "descriptor-leak", "core/session.rs", "SPDK issue 2852",
        "the descriptor of a region that is removed is never closed";
    // Hangs, suspects, foresight.
    HangKilledBlind = "hang-killed-blind", "core/pair/observe.rs", "mended in ff1d808",
        "a hanging primary is killed although it is not known what it owes";
    BusyTakenForHung = "busy-taken-for-hung", "core/pair/links.rs", "mended in 18ae9da",
        "a primary that completes requests is killed because its control channel is silent";
    TrialOutlivesStop = "trial-outlives-stop", "core/pair/isolate.rs", "mended in ff1d808",
        "a request on trial runs on in a ring that the VMM was told is stopped";
    PingPong = "ping-pong", "core/foresight.rs", "written for the zoo",
        "neither rest nor budget limits predicted failovers";
    CommonCauseIgnored = "common-cause-ignored", "core/foresight.rs", "mended in 829494d",
        "a failover is made although the shadow is as slow";
    NanInModel = "nan-in-model", "predict/regress.rs", "written for the zoo",
        "a value that is no number is learnt";
    // In-flight regions.
    MarksNeverCleared = "marks-never-cleared", "wire/inflight/track.rs", "written for the zoo",
        "marks of completed requests stay";
    ClearedBeforePublished = "cleared-before-published", "wire/inflight/track.rs", "written for the zoo",
        "marks are cleared before used.idx says that the requests are completed";
    RegionAtZero = "region-starts-at-zero", "wire/inflight/track.rs", "SPDK issue 3766",
        "a fresh region says that nothing was ever completed";
    BatchHalfRepaired = "batch-repaired-by-half", "wire/inflight.rs", "SPDK issue 3766",
        "of the last batch only its first request is taken for completed";
    ResubmittedByHead = "resubmitted-in-head-order", "wire/inflight.rs", "written for the zoo",
        "a region's requests are submitted again in the order of heads, not of counters";
    ResubmittedTwice = "resubmitted-twice", "wire/inflight/track.rs", "written for the zoo",
        "what was submitted again is taken from the ring once more";
    BaseOverRegion = "base-believed-over-region", "wire/inflight/track.rs", "mended in d4b3643",
        "the base that a front-end names is believed where a region knows better";
    MarkedBeforeCounted = "marked-before-counted", "wire/inflight/track.rs", "written for the zoo",
        "a request is marked before its counter says when it came";
    RegionSwappedInCanary = "region-swapped-in-canary", "core/link.rs", "mended in 8cfbeaa",
        "a backend is given the guest's region in the middle of a canary read";
    RegionNotRenewed = "region-not-renewed", "core/link.rs", "mended in 8cfbeaa",
        "a region that knows other rings is kept for rings that were set up anew";
    // The built-in backend.
    StopUndrained = "stop-undrained", "blk/queue.rs", "vhost-user-backend 0.24: stop_vring() does nothing",
        "the built-in backend answers a stop at once and drops what it holds";
    OwedCallForgotten = "owed-call-forgotten", "blk/queue.rs", "mended in d4b3643",
        "the built-in backend does not repeat the call that the last one may have owed";
    PublishedBeforeWritten = "published-before-written", "blk/queue.rs", "written for the zoo",
        "the built-in backend stores used.idx before the entries it speaks of";
    // The protocol.
    PackedOffered = "packed-rings-offered", "wire/features.rs", "QEMU knows no index of a packed ring after a crash",
        "packed rings are offered, which cannot be observed";
    EventWithoutWrap = "event-without-wrap", "wire/ring.rs", "written for the zoo",
        "whether a notification is due is reckoned without the wrap of indices";
    PartialHeader = "partial-header-accepted", "socket/lib.rs", "written for the zoo",
        "a header is decoded before all of it has come";
    LengthUnchecked = "length-unchecked", "wire/bytes.rs", "written for the zoo",
        "a payload may be longer than its message";
}

/// Whether an animal is loose: never, without the feature `zoo`.
#[cfg(not(feature = "zoo"))]
#[inline(always)]
#[must_use]
pub const fn loose(_: Animal) -> bool {
    false
}

#[cfg(feature = "zoo")]
mod cages;
#[cfg(feature = "zoo")]
pub use cages::{Loose, VARIABLE, loose, release};
