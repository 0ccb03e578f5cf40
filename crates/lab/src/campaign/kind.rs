//! What can be done to a backend, or to its surroundings: the one table of kinds.

use warmswap_predict::Feature::{self, *};

use super::form::Form::{self, OnOff, Periodic, Ramp, Step, Sudden};

/// What is done from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outside {
    /// A quota of processor time.
    Quota,
    /// One processor, and rivals on it.
    Hogs,
    /// SIGSTOP and SIGCONT.
    Pause,
    /// The same by chance, and SIGABRT.
    Abort,
    /// SIGKILL.
    Kill,
    /// A memory limit that comes down.
    Squeeze,
    /// A throttle group of qemu-storage-daemon.
    Throttle,
    /// Files that qemu-storage-daemon opens and never closes.
    Descriptors,
    /// A limit of the block device's requests.
    Disk,
    /// A file system that fills up.
    Fill,
    /// A store in user space.
    Store(StoreFault),
}

/// What is wrong with a store in user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreFault {
    /// Reads and writes take longer.
    Slow,
    /// Flushes take longer.
    SlowFlush,
    /// Reads come back short, in the end with errors.
    Short,
}

/// What is done inside our own backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// Requests take longer.
    Latency,
    /// Those to a part of the disk do.
    Region,
    /// Nothing completes for a while, again and again.
    Stall,
    /// The worker queues for a lock.
    Convoy,
    /// Memory is lost with every request.
    Leak,
    /// Descriptors are.
    Descriptors,
    /// Threads are.
    Threads,
    /// A completion is never published.
    LoseCompletion,
    /// Calls are not sent.
    LoseCall,
    /// The worker computes for ever.
    Spin,
    /// Requests end with an error.
    Errors,
    /// Requests take a little longer with every window, to four times as long.
    Poison,
}

/// What harms nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Harmless {
    /// Nothing at all.
    Steady,
    /// The guest asks for more, and for less.
    LoadSteps,
    /// It writes instead of reading.
    MixChanges,
    /// It rests, and asks for much at once.
    Bursts,
    /// Somebody else computes, with the least weight there is.
    Neighbour,
    /// Somebody else reads the whole image.
    Backup,
    /// The guest boots again.
    Reboot,
    /// The page cache forgets the image.
    DropCache,
    /// The image grows.
    Resize,
    /// The broker stands still for a moment.
    StoppedSampler,
    /// Interrupts are masked and set up anew, memory comes and goes.
    Configuration,
}

/// How it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Means {
    /// From outside.
    Outside(Outside),
    /// From outside, with no effect.
    Sham(Outside),
    /// Inside our own backend.
    Hook(Hook),
    /// Kicks are lost on their way.
    LostKicks,
    /// Interrupts are.
    LostCalls,
    /// Nothing bad.
    Harmless(Harmless),
}

/// A kind of run.
#[derive(Debug)]
pub(super) struct Kind {
    /// Its name in plans and labels.
    pub(super) name: &'static str,
    /// What is done.
    pub(super) means: Means,
    /// Anything of it can be known before the guest sees it.
    pub(super) precursor: bool,
    /// Ways it may come.
    pub(super) forms: &'static [Form],
    /// Backends it can be done to.
    pub(super) backends: &'static [Backend],
    /// Workloads it shows under; none: all.
    pub(super) workloads: &'static [&'static str],
    /// The resource that runs out.
    pub(super) exhausts: Option<Feature>,
    /// Features that name the cause.
    pub(super) causes: &'static [Feature],
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    /// Our own, through the page cache.
    Blk,
    /// Our own, past it.
    BlkDirect,
    /// qemu-storage-daemon with a thread pool.
    Qsd,
    /// qemu-storage-daemon with io_uring.
    QsdUring,
}

impl Backend {
    /// The word in plans and labels.
    pub(super) fn name(self) -> &'static str {
        match self {
            Blk => "blk",
            BlkDirect => "blk-direct",
            Qsd => "qsd",
            QsdUring => "qsd-uring",
        }
    }
}

use Backend::{Blk, BlkDirect, Qsd, QsdUring};

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
pub(super) const KINDS: &[Kind] = &[
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

impl Kind {
    /// The kind of that name.
    pub(super) fn from_name(name: &str) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.name == name)
    }

    /// Whether it is meant to harm.
    pub(super) fn is_fault(&self) -> bool {
        !matches!(self.means, Means::Sham(_) | Means::Harmless(_))
    }

    /// What is done from outside, if anything is.
    pub(super) fn outside(&self) -> Option<Outside> {
        match self.means {
            Means::Outside(outside) | Means::Sham(outside) => Some(outside),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::workload::WORKLOADS;

    #[test]
    fn the_table_is_sound() {
        for (at, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[..at].iter().all(|other| other.name != kind.name), "{} is there twice", kind.name);
            assert!(!kind.forms.is_empty() && !kind.backends.is_empty(), "{}", kind.name);
            assert!(kind.workloads.iter().all(|it| WORKLOADS.contains(it)), "{}", kind.name);
            assert_eq!(
                kind.is_fault() && kind.precursor,
                !kind.causes.is_empty() && kind.name != "errors",
                "{}",
                kind.name
            );
            assert!(kind.precursor || kind.exhausts.is_none(), "{}", kind.name);
        }
    }
}
