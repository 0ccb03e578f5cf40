//! The layers that hold for the whole process.

use super::{Layer, SandboxError, Seccomp, State, Switch};
use landlock::{ABI, Access, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::SeccompAction;

/// The newest Landlock whose restrictions have been tried with this program. What a newer one adds is not asked for.
const KNOWN: ABI = ABI::V10;

/// More capabilities than this a kernel cannot have: they are counted in 64 bits.
const CAPABILITIES_MAX: u32 = 64;

fn refused(what: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Refused { what, source }
}

/// No privileges, and no way to gain any.
pub(super) fn privileges(wanted: Switch) -> Result<Layer, SandboxError> {
    const NAME: &str = "privileges";
    if wanted == Switch::Off {
        return Ok(Layer::new(NAME, State::Off));
    }
    rustix::thread::set_no_new_privs(true).map_err(refused("set no_new_privs"))?;
    // Before the others: to drop from this set is a privilege itself.
    let bounded = drop_bounding_set()?;
    rustix::thread::clear_ambient_capability_set().map_err(refused("clear the ambient capabilities"))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(refused("drop its capabilities"))?;
    let layer = Layer::new(NAME, State::InForce);
    Ok(match bounded {
        true => layer,
        false => layer.because("the bounding set stays: to drop it needs CAP_SETPCAP, and no_new_privs makes it void"),
    })
}

/// Whether nothing is left in it.
fn drop_bounding_set() -> Result<bool, SandboxError> {
    for number in 0..CAPABILITIES_MAX {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            // The first number that the kernel has no capability for.
            Err(Errno::INVAL) => break,
            Err(source) => return Err(refused("read its bounding set")(source)),
            Ok(false) => continue,
            Ok(true) => {}
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::PERM) => return Ok(false),
            Err(source) => return Err(refused("drop its bounding set")(source)),
        }
    }
    Ok(true)
}

/// No core dump, to wherever the system sends them.
pub(super) fn core_files(wanted: Switch) -> Result<Layer, SandboxError> {
    const NAME: &str = "core files";
    if wanted == Switch::Off {
        return Ok(Layer::new(NAME, State::Off));
    }
    // Not 0: a limit of 0 holds for files only, and a core that is piped to a program (systemd-coredump, apport) is
    // piped as a whole. A limit of one byte suppresses both: it is less than a core file needs, and for pipes it is the
    // kernel's mark that there shall be none.
    let one_byte = Rlimit { current: Some(1), maximum: Some(1) };
    match rustix::process::setrlimit(Resource::Core, one_byte) {
        Ok(()) => {}
        // It was at 0 already, for good.
        Err(Errno::PERM) => {
            let detail = "the limit was 0 before and cannot become 1: a core piped to a program is not suppressed";
            return Ok(Layer::new(NAME, State::Partial).because(detail));
        }
        Err(source) => return Err(refused("limit its core files")(source)),
    }
    Ok(Layer::new(NAME, State::InForce).because("suppressed"))
}

/// Nothing that has a name, by its name: no rule allows anything.
pub(super) fn landlock(wanted: Switch) -> Result<Layer, SandboxError> {
    const NAME: &str = "Landlock";
    if wanted == Switch::Off {
        return Ok(Layer::new(NAME, State::Off));
    }
    let enforce = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?
            .restrict_self()
    };
    let status = enforce().map_err(|source| SandboxError::Landlock { source: Box::new(source) })?;
    let state = match status.ruleset {
        RulesetStatus::FullyEnforced => State::InForce,
        RulesetStatus::PartiallyEnforced => State::Partial,
        RulesetStatus::NotEnforced => State::NotAvailable,
    };
    Ok(Layer::new(NAME, state).because(match status.landlock {
        LandlockStatus::NotImplemented => "the kernel has no Landlock".to_owned(),
        LandlockStatus::NotEnabled => "the kernel's Landlock is switched off, see its parameter lsm=".to_owned(),
        LandlockStatus::Available { effective_abi, .. } => version(effective_abi),
    }))
}

/// What is in force with this version, in words.
fn version(abi: ABI) -> String {
    let missing = uncovered(abi);
    match missing.is_empty() {
        true => format!("version {abi}"),
        false => format!("version {abi}, which does not cover {}", missing.join(", ")),
    }
}

/// What a version of Landlock cannot deny that [`KNOWN`] can. That files can be moved between directories (2) is not
/// among it: the first version denies that always.
pub(super) fn uncovered(abi: ABI) -> Vec<&'static str> {
    let since = [
        (ABI::V3, "truncating files"),
        (ABI::V4, "TCP"),
        (ABI::V5, "ioctls of devices"),
        (ABI::V6, "abstract sockets and signals"),
        (ABI::V9, "named sockets"),
        (ABI::V10, "UDP"),
    ];
    since.into_iter().filter(|&(first, _)| abi < first).map(|(_, what)| what).collect()
}

/// What the threads' filters will be. They are not put in force here.
pub(super) fn seccomp(wanted: Seccomp) -> (Layer, Option<SeccompAction>) {
    const NAME: &str = "system calls";
    let (action, detail) = match wanted {
        Seccomp::Off => return (Layer::new(NAME, State::Off), None),
        Seccomp::On => (SeccompAction::KillProcess, "any other call kills the process by SIGSYS"),
        Seccomp::Log => (SeccompAction::Log, "any other call is logged and executed"),
    };
    // The kernel answers with an error if it was built without.
    match rustix::thread::secure_computing_mode() {
        Ok(_) => (Layer::new(NAME, State::PerThread).because(detail), Some(action)),
        Err(error) => {
            (Layer::new(NAME, State::NotAvailable).because(format!("the kernel has no seccomp: {error}")), None)
        }
    }
}
