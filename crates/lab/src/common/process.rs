//! Processes: children that die with us, and any process by a name that stays its own.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, Signal};

/// Has the kernel kill the child when the thread that started it ends: no exit path of the rig leaves a process behind.
pub(crate) fn die_with_parent(command: &mut Command) -> &mut Command {
    signal_with_parent(command, Signal::KILL)
}

/// Has the kernel send `signal` to the child when the thread that started it ends.
pub(crate) fn signal_with_parent(command: &mut Command, signal: Signal) -> &mut Command {
    // SAFETY: between fork and exec the closure makes one system call and touches no memory but its own.
    unsafe { command.pre_exec(move || Ok(rustix::process::set_parent_process_death_signal(Some(signal))?)) }
}

/// Has the child inherit a descriptor under the number it has here.
pub(crate) fn inherit<'a>(command: &'a mut Command, fd: BorrowedFd<'_>) -> &'a mut Command {
    let number = fd.as_raw_fd();
    let keep = move || {
        // SAFETY: the call takes numbers alone, and fails on one that is not open.
        if unsafe { libc::fcntl(number, libc::F_SETFD, 0) } < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes one system call and touches no memory but its own.
    unsafe { command.pre_exec(keep) }
}

/// A process that cannot be mistaken for another, whatever happens to its number.
#[derive(Debug)]
pub(crate) struct Target {
    pid: u32,
    pidfd: OwnedFd,
}

impl Target {
    /// Opens the process.
    pub(crate) fn open(pid: u32) -> anyhow::Result<Self> {
        let number = Pid::from_raw(pid.cast_signed()).context("a backend without a process")?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())
            .with_context(|| format!("process {pid} is gone already"))?;
        Ok(Target { pid, pidfd })
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
    }

    /// Whether SIGSTOP has taken effect.
    pub(crate) fn is_stopped(&self) -> bool {
        stat(self.pid).is_some_and(|(state, _)| state == 'T')
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal)
            .with_context(|| format!("signalling process {}", self.pid))
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Children of a process, zombies included.
pub(crate) fn children_of(pid: u32) -> anyhow::Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(child) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        if stat(child).is_some_and(|(_, parent)| parent == pid) {
            children.push(child);
        }
    }
    Ok(children)
}

/// State and parent.
pub(crate) fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_found_and_its_end_is_seen() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let target = Target::open(child.id()).expect("pidfd");
        assert!(children_of(std::process::id()).expect("proc").contains(&child.id()));
        target.signal(Signal::KILL).expect("kill");
        child.wait().expect("wait");
        target.signal(Signal::KILL).expect_err("it is gone");
    }
}
