//! What a process holds, and what one leaves behind.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, WaitOptions};

use crate::common::process::{children_of, stat};

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

impl Holdings {
    /// Adds what its keeper holds for it, and counts its children, which are the keeper's where brokers have died.
    pub(crate) fn and_keeper(&mut self, keeper: &Holdings) {
        for (kind, count) in &keeper.fd_kinds {
            *self.fd_kinds.entry(format!("keeper's {kind}")).or_default() += count;
        }
        // One of them is the broker.
        self.children += keeper.children.saturating_sub(1);
        self.zombies += keeper.zombies;
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

fn is_zombie(pid: u32) -> bool {
    stat(pid).is_none_or(|(state, _)| state == 'Z')
}

/// Has orphans of our descendants become our children, so that a broker that leaves processes behind is found out.
pub(crate) fn adopt_orphans() -> anyhow::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("PR_SET_CHILD_SUBREAPER")
}

/// How long processes may take to end after their broker has.
const ORPHANS_MAX: Duration = Duration::from_secs(1);

/// Reaps what became our child when its parent ended, and waits for what has `directory` in its command line: where systemd is the keeper,
/// orphans are its children. What does not end by itself is killed; returns the command lines of these. We have no other children then.
pub(crate) fn reap_orphans(directory: &Path) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + ORPHANS_MAX;
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        let mut orphans = named_after(directory)?;
        orphans.extend(children_of(std::process::id())?);
        if orphans.is_empty() {
            return Ok(Vec::new());
        }
        if Instant::now() > deadline {
            return orphans.into_iter().map(kill_orphan).collect();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Processes with `directory` in their command line.
fn named_after(directory: &Path) -> anyhow::Result<BTreeSet<u32>> {
    let directory = directory.to_string_lossy();
    let numbers = std::fs::read_dir("/proc")?.flatten().filter_map(|it| it.file_name().to_str()?.parse::<u32>().ok());
    Ok(numbers.filter(|pid| *pid != std::process::id() && command_line(*pid).contains(&*directory)).collect())
}

/// Empty for a zombie, and for what is gone.
fn command_line(pid: u32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}

fn kill_orphan(orphan: u32) -> anyhow::Result<String> {
    let command = command_line(orphan);
    let pid = Pid::from_raw(orphan.cast_signed()).context("pid zero")?;
    // It may end by itself meanwhile; what counts is that it was there.
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    // One that is no child of ours is reaped by whose it is.
    let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_behind_is_found_by_its_directory_and_ended() {
        let directory = std::env::temp_dir().join(format!("left-behind-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let mut child =
            std::process::Command::new("tail").arg("-f").arg("/dev/null").arg(directory.join("none")).spawn();
        let child = child.as_mut().expect("tail");
        let found = std::iter::repeat_with(|| named_after(&directory).expect("proc")).find(|found| !found.is_empty());
        assert_eq!(found, Some(BTreeSet::from([child.id()])));
        assert!(kill_orphan(child.id()).expect("it is there").contains("left-behind"));
        assert_eq!(named_after(&directory).expect("proc"), BTreeSet::new());
        std::fs::remove_dir_all(&directory).expect("it is empty");
    }

    #[test]
    fn our_own_holdings_are_seen() {
        let before = Holdings::of(std::process::id()).expect("proc");
        let file = std::fs::File::open("/proc/self/status").expect("open");
        assert!(Holdings::of(std::process::id()).expect("proc").fds > 3);
        drop(file);
        assert!(before.rss_bytes > 100_000);
    }
}
