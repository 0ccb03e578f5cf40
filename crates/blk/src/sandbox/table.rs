//! What a thread may ask of the kernel, and why: one table, which the filter is made from and the documents can be.
//!
//! Every call that is missing here has been thought about or was never met: no `socket`, `connect`, `bind`, `open…`,
//! `unlink…`, `clone…`, `exec…`, `kill`, `ptrace`, `io_uring_setup`, `io_uring_register`, `seccomp`, `setsockopt`,
//! `prlimit64`. `rseq` and `set_robust_list` are called once by each new thread before it runs anything of ours.

use libc::{
    AT_EMPTY_PATH, F_ADD_SEALS, F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFD, F_GETFL, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW,
    F_SETFD, F_SETFL, FIONBIO, PR_SET_NAME, PROT_EXEC, SO_DOMAIN, SO_ERROR, SO_PEERCRED, SO_TYPE, SOL_SOCKET,
};
use std::fmt::{self, Display, Formatter};

/// `_IO(0x12, 119)` of `linux/fs.h`.
const BLKDISCARD: u32 = 0x1277;
/// `_IO(0x12, 127)` of `linux/fs.h`.
const BLKZEROOUT: u32 = 0x127f;
/// `_IOR(0x12, 114, size_t)` of `linux/fs.h`.
const BLKGETSIZE64: u32 = 0x8008_1272;
/// Of `linux/prctl.h`. Its only function gives a name to memory.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// It executes requests on the image.
    Worker,
    /// It speaks with the front-end, and waits for what happens.
    Control,
}

impl Display for Profile {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Profile::Worker => "worker",
            Profile::Control => "control",
        })
    }
}

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub(super) name: &'static str,
    /// Its number here.
    pub number: libc::c_long,
}

impl Call {
    /// Its name in the manual.
    pub fn name(&self) -> &'static str {
        self.name.trim_start_matches("SYS_")
    }
}

/// A value of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// Its name in the headers.
    pub name: &'static str,
    /// Its lower half; no upper half is used.
    pub bits: u32,
}

/// What an argument must be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Must {
    /// Equal to one of these.
    BeOneOf(&'static [Value]),
    /// All these bits are set.
    Have(Value),
    /// None of these bits is set.
    Lack(Value),
    /// The id of the process itself.
    BeThisProcess,
}

/// A condition on one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Which one, counted from 0.
    pub arg: u8,
    /// What it must be like.
    pub must: Must,
}

impl Display for Test {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "argument {} ", self.arg)?;
        match self.must {
            Must::BeOneOf([one]) => f.write_str(one.name),
            Must::BeOneOf(values) => {
                let names: Vec<_> = values.iter().map(|value| value.name).collect();
                write!(f, "one of {}", names.join(", "))
            }
            Must::Have(value) => write!(f, "with {}", value.name),
            Must::Lack(value) => write!(f, "without {}", value.name),
            Must::BeThisProcess => f.write_str("its own process"),
        }
    }
}

/// System calls that are allowed for one reason. Shown as one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which.
    pub calls: &'static [Call],
    /// The conditions, all of which must hold; always if there is none.
    pub only: &'static [Test],
    /// What needs them.
    pub why: &'static str,
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.calls.iter().map(Call::name).collect();
        f.write_str(&names.join(", "))?;
        if !self.only.is_empty() {
            let tests: Vec<_> = self.only.iter().map(Test::to_string).collect();
            write!(f, " ({})", tests.join("; "))?;
        }
        write!(f, ": {}", self.why)
    }
}

/// What a profile allows. What it does not name, it does not allow.
pub fn rules(profile: Profile) -> impl Iterator<Item = &'static Rule> {
    let own = match profile {
        Profile::Worker => WORKER,
        Profile::Control => CONTROL,
    };
    COMMON.iter().chain(own)
}

macro_rules! calls {
    ($($(#[$attribute:meta])* $name:ident),+ $(,)?) => {
        &[$($(#[$attribute])* Call { name: stringify!($name), number: libc::$name }),+]
    };
}

macro_rules! value {
    ($name:ident) => {
        Value { name: stringify!($name), bits: $name as u32 }
    };
}

macro_rules! one_of {
    ($arg:literal: $($name:ident),+ $(,)?) => {
        Test { arg: $arg, must: Must::BeOneOf(&[$(value!($name)),+]) }
    };
}

const fn always(calls: &'static [Call], why: &'static str) -> Rule {
    Rule { calls, only: &[], why }
}

const fn only(calls: &'static [Call], only: &'static [Test], why: &'static str) -> Rule {
    Rule { calls, only, why }
}

/// What every thread needs, mostly because std and glibc do.
const COMMON: &[Rule] = &[
    always(calls![SYS_futex], "locks, channels, parking, joining a thread"),
    only(
        calls![SYS_mmap, SYS_mprotect],
        &[Test { arg: 2, must: Must::Lack(value!(PROT_EXEC)) }],
        "the allocator and guest memory; nothing becomes code",
    ),
    always(
        calls![SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk],
        "the allocator; a large vector grows by mremap; a stack is given back when its thread ends",
    ),
    always(
        calls![SYS_read, SYS_write, SYS_writev],
        "eventfds, signalfds, timers, lines on standard error; glibc's last words on a damaged heap come by writev",
    ),
    always(
        calls![
            #[cfg(target_arch = "x86_64")]
            SYS_poll,
            SYS_ppoll,
            #[cfg(target_arch = "x86_64")]
            SYS_epoll_wait,
            SYS_epoll_pwait,
            SYS_epoll_pwait2,
            SYS_epoll_ctl,
        ],
        "waiting for descriptors, which come and go with the rings",
    ),
    always(calls![SYS_close], "descriptors that came with a message or were made here"),
    only(
        calls![SYS_fcntl],
        &[one_of!(1: F_GETFD)],
        "std, in a build with assertions: whether the descriptor is open that it is to close",
    ),
    always(calls![SYS_clock_gettime], "the time, on machines whose clock cannot be read without a call"),
    always(calls![SYS_nanosleep, SYS_clock_nanosleep, SYS_sched_yield], "patience, and waiting for a lock"),
    always(
        calls![SYS_restart_syscall],
        "the kernel's own: it goes on with a wait that a stop of the process interrupted",
    ),
    always(calls![SYS_getrandom], "the seeds of hash maps"),
    only(
        calls![SYS_prctl],
        &[one_of!(0: PR_SET_NAME, PR_SET_VMA)],
        "the name of a thread; names that glibc gives to its memory if it is told to",
    ),
    always(
        calls![SYS_rt_sigprocmask, SYS_rt_sigaction, SYS_rt_sigreturn, SYS_sigaltstack],
        "abort, a thread's end, the handlers for SIGBUS and for a stack that overflows",
    ),
    only(calls![SYS_tgkill], &[Test { arg: 0, must: Must::BeThisProcess }], "abort"),
    always(calls![SYS_getpid, SYS_gettid], "abort, and the line that a panic prints"),
    always(calls![SYS_exit, SYS_exit_group], "the end"),
];

const WORKER: &[Rule] = &[
    always(
        calls![SYS_io_uring_enter],
        "requests to the image; what else a ring could do is up to the ring's restrictions",
    ),
    always(
        calls![SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev, SYS_preadv2, SYS_pwritev2],
        "requests to the image, without a ring",
    ),
    always(calls![SYS_epoll_ctl], "kicks to wait for, without a ring"),
    always(calls![SYS_fsync, SYS_fdatasync], "flushes"),
    always(calls![SYS_fallocate], "discards and zeroes in a file"),
    only(calls![SYS_ioctl], &[one_of!(1: BLKDISCARD, BLKZEROOUT)], "discards and zeroes on a block device"),
];

const CONTROL: &[Rule] = &[
    always(calls![SYS_recvmsg, SYS_sendmsg], "messages of the front-end, and the descriptors that come with them"),
    always(
        calls![SYS_recvfrom, SYS_sendto],
        "the same without descriptors, as std's sockets do it; they can do nothing that the others cannot",
    ),
    always(calls![SYS_accept4, SYS_shutdown], "connections to the socket that was bound before"),
    only(
        calls![SYS_getsockopt],
        &[one_of!(1: SOL_SOCKET), one_of!(2: SO_PEERCRED, SO_ERROR, SO_TYPE, SO_DOMAIN)],
        "who a peer is, and what came as a descriptor",
    ),
    always(calls![SYS_epoll_create1], "what to wait with"),
    always(calls![SYS_eventfd2, SYS_timerfd_settime], "waking a thread, and patience"),
    only(
        calls![SYS_fcntl],
        &[one_of!(1:
            F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW, F_GETFL, F_SETFL, F_SETFD, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS,
        )],
        "the image's lock, flags of descriptors, copies of them, the seals of memory that is shared",
    ),
    always(calls![SYS_fstat], "what a descriptor is, and how large"),
    only(
        calls![SYS_newfstatat],
        &[Test { arg: 3, must: Must::Have(value!(AT_EMPTY_PATH)) }],
        "the same, as some versions of glibc do it",
    ),
    only(calls![SYS_statx], &[Test { arg: 2, must: Must::Have(value!(AT_EMPTY_PATH)) }], "the same, as std does it"),
    only(
        calls![SYS_ioctl],
        &[one_of!(1: BLKGETSIZE64, FIONBIO)],
        "the size of a block device; sockets that do not block",
    ),
    always(calls![SYS_memfd_create, SYS_ftruncate], "memory that is shared with the front-end or the broker"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: Profile) -> Vec<&'static str> {
        rules(profile).flat_map(|rule| rule.calls).map(Call::name).collect()
    }

    #[test]
    fn no_profile_names_a_call_that_opens_starts_or_reaches_something() {
        let never = [
            "socket",
            "socketpair",
            "connect",
            "bind",
            "listen",
            "open",
            "openat",
            "openat2",
            "open_by_handle_at",
            "creat",
            "unlink",
            "unlinkat",
            "rename",
            "renameat2",
            "link",
            "linkat",
            "symlinkat",
            "mkdirat",
            "mknodat",
            "truncate",
            "clone",
            "clone3",
            "fork",
            "vfork",
            "execve",
            "execveat",
            "kill",
            "tkill",
            "pidfd_open",
            "pidfd_getfd",
            "pidfd_send_signal",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "io_uring_setup",
            "io_uring_register",
            "seccomp",
            "bpf",
            "setsockopt",
            "prlimit64",
            "setrlimit",
            "mount",
            "umount2",
            "setns",
            "unshare",
            "personality",
            "userfaultfd",
            "perf_event_open",
            "pkey_mprotect",
            "shmat",
            "remap_file_pages",
            "dup2",
            "dup3",
        ];
        for profile in [Profile::Worker, Profile::Control] {
            let allowed = names(profile);
            assert!(allowed.contains(&"futex"), "the check sees what is allowed");
            let found: Vec<_> = never.iter().filter(|name| allowed.contains(name)).collect();
            assert!(found.is_empty(), "{profile}: {found:?}");
        }
    }

    #[test]
    fn the_profiles_have_no_way_of_the_other() {
        let (worker, control) = (names(Profile::Worker), names(Profile::Control));
        for name in ["io_uring_enter", "pwrite64", "fallocate"] {
            assert!(worker.contains(&name) && !control.contains(&name), "{name}");
        }
        for name in ["recvmsg", "sendmsg", "accept4", "memfd_create"] {
            assert!(control.contains(&name) && !worker.contains(&name), "{name}");
        }
    }

    #[test]
    fn a_rule_is_shown_as_a_line_of_a_document() {
        let line = |profile, name| {
            rules(profile).filter(|rule| rule.calls[0].name() == name).map(Rule::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            line(Profile::Worker, "ioctl"),
            ["ioctl (argument 1 one of BLKDISCARD, BLKZEROOUT): discards and zeroes on a block device"]
        );
        assert_eq!(line(Profile::Worker, "tgkill"), ["tgkill (argument 0 its own process): abort"]);
        assert_eq!(line(Profile::Control, "fsync"), [""; 0]);
    }
}
