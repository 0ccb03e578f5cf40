//! Processes seen from outside: /proc, pidfds, children.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

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

/// What a process holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Open descriptors.
    pub(crate) fds: usize,
    /// What they are, without their numbers, with their counts.
    pub(crate) fd_kinds: BTreeMap<String, usize>,
    /// Mappings.
    pub(crate) mappings: usize,
    /// Resident private memory in bytes.
    pub(crate) anonymous_bytes: u64,
    /// Resident memory in bytes.
    pub(crate) rss_bytes: u64,
    /// Children that run.
    pub(crate) children: usize,
    /// Children that ended and were not reaped.
    pub(crate) zombies: usize,
}

impl Holdings {
    /// Looks at `pid`.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let read = |file: &str| {
            std::fs::read_to_string(format!("/proc/{pid}/{file}")).with_context(|| format!("/proc/{pid}/{file}"))
        };
        let status = read("status")?;
        let (mut children, mut zombies) = (0, 0);
        for child in children_of(pid)? {
            if is_zombie(child) { zombies += 1 } else { children += 1 }
        }
        let fd_kinds = fd_kinds(pid)?;
        Ok(Holdings {
            fds: fd_kinds.values().sum(),
            fd_kinds,
            mappings: read("maps")?.lines().count(),
            anonymous_bytes: kilobytes(&status, "RssAnon:")?,
            rss_bytes: kilobytes(&status, "VmRSS:")?,
            children,
            zombies,
        })
    }
}

/// Descriptors by what they are: `socket:[]`, `anon_inode:[eventfd]`, a file's path.
fn fd_kinds(pid: u32) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // It may be closed meanwhile.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let kind: String = target.to_string_lossy().chars().filter(|letter| !letter.is_ascii_digit()).collect();
        *kinds.entry(kind).or_default() += 1;
    }
    Ok(kinds)
}

fn kilobytes(status: &str, field: &str) -> anyhow::Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
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

fn is_zombie(pid: u32) -> bool {
    stat(pid).is_none_or(|(state, _)| state == 'Z')
}

/// State and parent.
fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Has orphans of our descendants become our children, so that a broker that leaves processes behind is found out.
pub(crate) fn adopt_orphans() -> anyhow::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("PR_SET_CHILD_SUBREAPER")
}

/// How long processes may take to end after their broker has.
const ORPHANS_MAX: Duration = Duration::from_secs(1);

/// Reaps what became our child when its parent ended. What does not end by itself is killed; returns the command lines of
/// these. We have no other children then.
pub(crate) fn reap_orphans() -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + ORPHANS_MAX;
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        let orphans = children_of(std::process::id())?;
        if orphans.is_empty() {
            return Ok(Vec::new());
        }
        if Instant::now() > deadline {
            return orphans.into_iter().map(kill_orphan).collect();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill_orphan(orphan: u32) -> anyhow::Result<String> {
    let command = std::fs::read_to_string(format!("/proc/{orphan}/cmdline")).unwrap_or_default().replace('\0', " ");
    let pid = Pid::from_raw(orphan.cast_signed()).context("pid zero")?;
    // It may end by itself meanwhile; what counts is that it was there.
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    rustix::process::waitpid(Some(pid), WaitOptions::empty()).context("reaping a process the broker left behind")?;
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_holdings_are_seen() {
        let before = Holdings::of(std::process::id()).expect("proc");
        let file = std::fs::File::open("/proc/self/status").expect("open");
        assert!(Holdings::of(std::process::id()).expect("proc").fds > 3);
        drop(file);
        assert!(before.rss_bytes > 100_000);
    }

    #[test]
    fn a_child_is_found_and_its_end_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let target = Target::open(child.id()).expect("pidfd");
        assert!(children_of(std::process::id()).expect("proc").contains(&child.id()));
        target.signal(Signal::KILL).expect("kill");
        child.wait().expect("wait");
        target.signal(Signal::KILL).expect_err("it is gone");
    }
}
