//! What can be done to a backend, or to its surroundings.

mod table;

use warmswap_predict::Feature;

use super::form::Form;
pub(super) use table::KINDS;

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
            Backend::Blk => "blk",
            Backend::BlkDirect => "blk-direct",
            Backend::Qsd => "qsd",
            Backend::QsdUring => "qsd-uring",
        }
    }
}

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
