//! What the backend gives up once it needs it no longer.
//!
//! ```text
//!  image opened and locked, socket bound           the rings made, or the connections awaited
//!            |                                                      |
//!  one free thread --- restrict_process --> a restricted process --- restrict_thread --> a filtered thread
//! ```
//!
//! [`restrict_process`] is called once, by the main thread, before there is any other: privileges, Landlock and the
//! limit on core files are inherited by the threads that are made afterwards. [`restrict_thread`] is called by each
//! thread, the main one included, when its set-up is done. From then on it may use what its [`Profile`] names (see
//! [`rules`]) and nothing else. Nothing of this can be undone.
//!
//! What is open stays open: no layer looks at what is read and written through a descriptor. What came with a message
//! of the front-end is such a descriptor.
//!
//! **What the filter does not see.** An io_uring is not asked for its requests: what a ring may do, its own
//! restrictions must say. Path arguments cannot be read by a filter: a `statx` with `AT_EMPTY_PATH` and a path all the
//! same is not told apart, and Landlock does not restrict looking at metadata. Landlock lets a process open again, by
//! `/proc/self/fd`, what lies on no file system (its memfds and pipes); the filter does not.
//!
//! **What a filtered thread must not do:** start a thread or a process, remove its socket's path, look into `/proc`,
//! print a backtrace, ask for the local time. Two of these would happen behind one's back, and [`restrict_process`]
//! sees to it that they do not: backtraces are switched off, and glibc's allocator keeps to one arena, since one of
//! several reads a file when it shrinks.
//!
//! The process stays *dumpable*: the broker's fence must be able to look into it.

mod filter;
mod layers;
mod runtime;
mod table;
#[cfg(test)]
mod tests;

use seccompiler::SeccompAction;
use std::fmt::{self, Display, Formatter};

pub use table::{Call, Must, Profile, Rule, Test, Value, rules};

/// Whether a layer is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// As far as the kernel has it.
    #[default]
    On,
    /// Left as it is found.
    Off,
}

/// What a system call that a thread's profile does not name leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// The process is killed, by SIGSYS. The kernel's log, or that of auditd, tells the number of the call.
    #[default]
    On,
    /// No filter.
    Off,
    /// The call is executed, and named in the kernel's log or that of auditd: to find out what a profile lacks.
    Log,
}

/// Which layers are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// `no_new_privs`, and no capability in any set. If it is off, Landlock and the filters set `no_new_privs` all the
    /// same.
    pub privileges: Switch,
    /// No core file: guest memory would be in it.
    pub core_files: Switch,
    /// Nothing can be opened, made, executed or connected to by its name.
    pub landlock: Switch,
    /// The threads' filters.
    pub seccomp: Seccomp,
    /// A layer that is wanted and not available is an error. One that is partially in force is not: a later kernel
    /// always knows more.
    pub require: bool,
}

/// How far a layer is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not wanted.
    Off,
    /// As it was wanted.
    InForce,
    /// The kernel knows only part of it.
    Partial,
    /// In force for each thread from its [`restrict_thread`] on.
    PerThread,
    /// The kernel does not have it.
    NotAvailable,
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Off => "off",
            State::InForce => "in force",
            State::Partial => "partially in force",
            State::PerThread => "in force for each thread that has been set up",
            State::NotAvailable => "not available",
        })
    }
}

/// One layer and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its name in the log.
    pub name: &'static str,
    /// How far it is in force.
    pub state: State,
    /// What an operator should know of it, if anything.
    pub detail: Option<String>,
}

impl Layer {
    fn new(name: &'static str, state: State) -> Layer {
        Layer { name, state, detail: None }
    }

    fn because(self, detail: impl Into<String>) -> Layer {
        Layer { detail: Some(detail.into()), ..self }
    }
}

impl Display for Layer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.state)?;
        match &self.detail {
            Some(detail) => write!(f, " ({detail})"),
            None => Ok(()),
        }
    }
}

/// What became of a [`Policy`]. It is shown as one line for the log. To have one means that the process is restricted,
/// so [`restrict_thread`] asks for it.
#[derive(Clone, Debug)]
pub struct Report {
    layers: [Layer; 4],
    violation: Option<SeccompAction>,
}

impl Report {
    /// Privileges, core files, Landlock, system calls.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = &self.layers;
        write!(f, "{first}")?;
        rest.iter().try_for_each(|layer| write!(f, "; {layer}"))
    }
}

/// Why the process or a thread could not be restricted as it was wanted. It may be restricted in part and must not go
/// on.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// There is more than one thread.
    #[error(
        "the sandbox found {found} threads, expected to be entered by the only one: the others would stay free; \
         the backend does not start"
    )]
    NotAlone {
        /// How many there are.
        found: usize,
    },
    /// It is not known how many threads there are.
    #[error(
        "the sandbox cannot count the threads of its process: {source}, expected /proc to be mounted; \
         the backend does not start"
    )]
    Uncounted {
        /// Why not.
        source: std::io::Error,
    },
    /// The kernel has refused what it allows everybody.
    #[error("the sandbox cannot {what}: {source}; the backend does not start half restricted")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: rustix::io::Errno,
    },
    /// Landlock is there and has failed.
    #[error("Landlock cannot be put in force: {source}; the backend does not start half restricted")]
    Landlock {
        /// Where, and why.
        source: Box<landlock::RulesetError>,
    },
    /// The policy demands a layer that the kernel does not have.
    #[error(
        "the sandbox is required, but its layer \"{layer}\" is not available: {detail}; the backend does not start. \
         It needs a kernel that has the layer, or not to be required"
    )]
    NotAvailable {
        /// Its name.
        layer: &'static str,
        /// Why.
        detail: String,
    },
    /// A filter could not be built or installed.
    #[error(
        "the system-call filter of a {profile} thread cannot be put in force: {source}; \
         the backend must not serve without it"
    )]
    Filter {
        /// Whose.
        profile: Profile,
        /// Why.
        source: seccompiler::Error,
    },
}

/// Restricts the process. The main thread calls it once, when the image is open and locked and the socket is bound, and
/// before it makes a thread or an io_uring (which has threads of its own). A thread that has ended counts too: glibc
/// settles its number of arenas when the first one allocates.
///
/// Without capabilities `RLIMIT_MEMLOCK` counts: what is to be locked or registered beyond it must be before, or the
/// limit raised.
pub fn restrict_process(policy: &Policy) -> Result<Report, SandboxError> {
    runtime::alone()?;
    if policy.seccomp != Seccomp::Off {
        runtime::keep_away_from_files();
    }
    let wanted = |layer: Layer| match layer.state {
        State::NotAvailable if policy.require => {
            Err(SandboxError::NotAvailable { layer: layer.name, detail: layer.detail.unwrap_or_default() })
        }
        _ => Ok(layer),
    };
    // Landlock comes last: until then a layer may still look at the system.
    let core_files = wanted(layers::core_files(policy.core_files)?)?;
    let privileges = wanted(layers::privileges(policy.privileges)?)?;
    let (seccomp, violation) = layers::seccomp(policy.seccomp);
    let seccomp = wanted(seccomp)?;
    let landlock = wanted(layers::landlock(policy.landlock)?)?;
    Ok(Report { layers: [privileges, core_files, landlock, seccomp], violation })
}

/// Confines the calling thread to its profile. It is the last step of the thread's set-up. Without effect if the report
/// says that the filters are off or not available.
pub fn restrict_thread(profile: Profile, report: &Report) -> Result<(), SandboxError> {
    let Some(violation) = &report.violation else { return Ok(()) };
    let install = || filter::install(filter::chains(profile)?, violation.clone());
    install().map_err(|source| SandboxError::Filter { profile, source })
}
