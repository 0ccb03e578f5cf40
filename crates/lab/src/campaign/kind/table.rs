//! The one table of kinds.

use warmswap_predict::Feature::{self, *};

use super::Backend::{self, Blk, BlkDirect, Qsd, QsdUring};
use super::{Harmless, Hook, Kind, Means, Outside, StoreFault};
use crate::campaign::form::Form::{self, OnOff, Periodic, Ramp, Step, Sudden};

const ALL: &[Backend] = &[Blk, Qsd, BlkDirect, QsdUring];
const CACHED: &[Backend] = &[Blk, Qsd, QsdUring];
const OURS: &[Backend] = &[Blk, BlkDirect];
const GRADUAL: &[Form] = &[Ramp, Step, OnOff, Periodic];
const AT_ONCE: &[Form] = &[Sudden];
const LEAKS: &[Form] = &[Step, Ramp, Periodic];
const READING: &[&str] = &["read-qd1", "mixed-qd8", "read-qd32", "sequential", "open-loop"];
const WRITING: &[&str] = &["mixed-qd8", "open-loop", "flush-heavy", "bursts"];
const LATE: &[Feature] = &[
    LatencyMean,
    LatencyP50,
    LatencyP90,
    LatencyP99,
    LatencyP999,
    LatencyMax,
    ReadP50,
    ReadP99,
    WriteP50,
    WriteP99,
    OldestAge,
    Gap,
];
const STARVED: &[Feature] = &[
    Throttled,
    RunDelay,
    GroupCpuPressure,
    SwitchesInvoluntary,
    Cpu,
    CpuPerRequest,
    Pickup,
    KickOverdue,
    BusiestThread,
];
const STOPPED: &[Feature] =
    &[Gap, OldestAge, Pickup, KickOverdue, LatencyMax, LatencyP999, LatencyP99, RunDelay, Backlog];
const MEMORY: &[Feature] = &[MemoryShare, Rss, RssAnon, Pss, MinorFaults, MajorFaults, GroupMemoryPressure, Referenced];

const fn kind(name: &'static str, means: Means) -> Kind {
    Kind { name, means, precursor: true, forms: GRADUAL, backends: ALL, workloads: &[], exhausts: None, causes: LATE }
}

const fn harmless(name: &'static str, what: Harmless) -> Kind {
    Kind { precursor: false, forms: AT_ONCE, causes: &[], ..kind(name, Means::Harmless(what)) }
}

const fn sham(name: &'static str, what: Outside, backends: &'static [Backend]) -> Kind {
    Kind { precursor: false, forms: AT_ONCE, backends, causes: &[], ..kind(name, Means::Sham(what)) }
}

/// Every kind.
pub(in crate::campaign) const KINDS: &[Kind] = &[
    Kind { causes: STARVED, ..kind("cpu-quota", Means::Outside(Outside::Quota)) },
    Kind { causes: STARVED, ..kind("cpu-hogs", Means::Outside(Outside::Hogs)) },
    Kind { causes: STOPPED, ..kind("pauses", Means::Outside(Outside::Pause)) },
    Kind { causes: STOPPED, ..kind("abort", Means::Outside(Outside::Abort)) },
    Kind { precursor: false, forms: AT_ONCE, causes: &[], ..kind("kill", Means::Outside(Outside::Kill)) },
    Kind {
        backends: CACHED,
        workloads: READING,
        // No exhausts: what can be given back is given back, and its share says nothing of the time that is left.
        causes: &[
            MemoryShare,
            MajorFaults,
            MinorFaults,
            GroupMemoryPressure,
            GroupIoPressure,
            ReadBytes,
            LatencyMean,
            LatencyP99,
            ReadP99,
        ],
        ..kind("memory-squeeze", Means::Outside(Outside::Squeeze))
    },
    Kind { backends: &[Qsd, QsdUring], ..kind("throttle-group", Means::Outside(Outside::Throttle)) },
    Kind {
        backends: &[Qsd, QsdUring],
        forms: LEAKS,
        exhausts: Some(DescriptorShare),
        causes: &[Descriptors, DescriptorShare],
        ..kind("descriptors", Means::Outside(Outside::Descriptors))
    },
    Kind {
        backends: &[BlkDirect],
        causes: &[
            LatencyMean,
            LatencyP50,
            LatencyP90,
            LatencyP99,
            ReadP50,
            ReadP99,
            WriteP50,
            WriteP99,
            OldestAge,
            Gap,
            GroupIoPressure,
            DiskWait,
        ],
        ..kind("disk-throttle", Means::Outside(Outside::Disk))
    },
    Kind {
        backends: &[Blk, Qsd],
        forms: &[Ramp, Step],
        workloads: WRITING,
        exhausts: Some(StoreShare),
        causes: &[StoreShare, StoreFree],
        ..kind("store-full", Means::Outside(Outside::Fill))
    },
    Kind { backends: CACHED, ..kind("store-slow", Means::Outside(Outside::Store(StoreFault::Slow))) },
    Kind {
        backends: CACHED,
        workloads: &["flush-heavy"],
        causes: &[FlushP50, FlushP99, LatencyMean, LatencyP90, LatencyP99, LatencyP999, LatencyMax, OldestAge, Gap],
        ..kind("flush-slow", Means::Outside(Outside::Store(StoreFault::SlowFlush)))
    },
    Kind {
        backends: &[Blk],
        workloads: READING,
        causes: &[Retries, LatencyP99, LatencyP90, ReadP99, LatencyMean, CpuPerRequest, Errors, ErrorShare],
        ..kind("store-short", Means::Outside(Outside::Store(StoreFault::Short)))
    },
    Kind { backends: OURS, ..kind("latency", Means::Hook(Hook::Latency)) },
    Kind { backends: OURS, ..kind("region", Means::Hook(Hook::Region)) },
    Kind { backends: OURS, forms: &[Ramp, Periodic], causes: STOPPED, ..kind("stall", Means::Hook(Hook::Stall)) },
    Kind {
        backends: OURS,
        causes: &[
            Gap,
            OldestAge,
            Pickup,
            KickOverdue,
            LatencyMean,
            LatencyP50,
            LatencyP90,
            LatencyP99,
            SwitchesVoluntary,
            CpuPerRequest,
        ],
        ..kind("convoy", Means::Hook(Hook::Convoy))
    },
    Kind {
        backends: OURS,
        forms: LEAKS,
        exhausts: Some(MemoryShare),
        causes: MEMORY,
        ..kind("leak", Means::Hook(Hook::Leak))
    },
    Kind {
        backends: OURS,
        forms: LEAKS,
        exhausts: Some(DescriptorShare),
        causes: &[Descriptors, DescriptorShare],
        ..kind("descriptor-leak", Means::Hook(Hook::Descriptors))
    },
    Kind {
        backends: OURS,
        forms: LEAKS,
        exhausts: Some(ThreadShare),
        causes: &[Threads, ThreadShare],
        ..kind("thread-leak", Means::Hook(Hook::Threads))
    },
    Kind {
        backends: OURS,
        forms: AT_ONCE,
        causes: &[OldestAge, Depth, Gap, LatencyMean],
        ..kind("lost-completion", Means::Hook(Hook::LoseCompletion))
    },
    Kind {
        backends: OURS,
        forms: &[Sudden, Ramp],
        causes: &[CallOverdue, Reaction, ReactionMax, Calls, CallShare],
        ..kind("lost-interrupt", Means::Hook(Hook::LoseCall))
    },
    Kind {
        forms: &[Sudden, Ramp],
        causes: &[KickOverdue, Pickup, OldestAge, Gap],
        ..kind("lost-kick", Means::LostKicks)
    },
    Kind {
        backends: &[Qsd, QsdUring],
        forms: &[Sudden, Ramp],
        causes: &[CallOverdue, Reaction, ReactionMax, Calls, CallShare],
        ..kind("stray-interrupt", Means::LostCalls)
    },
    Kind {
        backends: OURS,
        forms: AT_ONCE,
        causes: &[Gap, OldestAge, KickOverdue, Pickup, Cpu, BusiestThread, CpuPerRequest],
        ..kind("spin", Means::Hook(Hook::Spin))
    },
    Kind {
        backends: OURS,
        precursor: false,
        forms: AT_ONCE,
        causes: &[Errors, ErrorShare],
        ..kind("errors", Means::Hook(Hook::Errors))
    },
    Kind { backends: OURS, forms: &[Ramp], ..kind("poison", Means::Hook(Hook::Poison)) },
    sham("sham-quota", Outside::Quota, ALL),
    sham("sham-memory", Outside::Squeeze, CACHED),
    sham("sham-store", Outside::Store(StoreFault::Slow), CACHED),
    sham("sham-throttle", Outside::Throttle, &[Qsd, QsdUring]),
    harmless("steady", Harmless::Steady),
    harmless("load-steps", Harmless::LoadSteps),
    harmless("mix-changes", Harmless::MixChanges),
    harmless("demand-bursts", Harmless::Bursts),
    harmless("neighbour", Harmless::Neighbour),
    harmless("backup", Harmless::Backup),
    harmless("reboot", Harmless::Reboot),
    harmless("drop-cache", Harmless::DropCache),
    Kind { backends: OURS, ..harmless("resize", Harmless::Resize) },
    harmless("stopped-sampler", Harmless::StoppedSampler),
    harmless("configuration", Harmless::Configuration),
];
