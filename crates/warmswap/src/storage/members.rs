//! Which processes a backend consists of.
//!
//! A wrapper (`sh -c`, a sandbox, `sudo`) serves nothing itself: what has the image open is its child. So a backend is every process
//! of its control group; where there is none, every descendant of its first process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most processes of one backend.
pub(crate) const MEMBERS_MAX: usize = 128;

/// A backend as the system knows it.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// Its first process.
    pub(crate) pid: u32,
    /// Directory of its control group, where it has one of its own.
    pub(crate) group: Option<PathBuf>,
}

impl Subject {
    /// Its processes at this moment, the first of them first.
    pub(super) fn members(&self) -> io::Result<Vec<u32>> {
        let mut members = vec![self.pid];
        if let Some(group) = &self.group {
            // Every descendant is in it. Walking the threads of a process as well leaves entries of `/proc` behind that slow down its end.
            add_group(group, &mut members)?;
            return Ok(members);
        }
        let mut parents = 0;
        while let Some(parent) = members.get(parents).copied() {
            for child in children(parent)? {
                add(child, &mut members)?;
            }
            parents += 1;
        }
        Ok(members)
    }
}

fn add(pid: u32, members: &mut Vec<u32>) -> io::Result<()> {
    if pid == 0 {
        return Err(io::Error::other("a process of its control group lies outside our process namespace"));
    }
    if !members.contains(&pid) {
        if members.len() == MEMBERS_MAX {
            return Err(io::Error::other(format!("it has more than {MEMBERS_MAX} processes")));
        }
        members.push(pid);
    }
    Ok(())
}

fn add_group(group: &Path, members: &mut Vec<u32>) -> io::Result<()> {
    for pid in numbers(&fs::read_to_string(group.join("cgroup.procs"))?) {
        add(pid, members)?;
    }
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match add_group(&entry.path(), members) {
                // Removed in the meantime.
                Err(error) if is_gone(&error) => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// What every thread of a process has started. Nothing if it is gone.
fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Ok(found) };
    for thread in threads.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(text) => found.extend(numbers(&text)),
            // A thread that is gone, or a kernel without this file: then every process says who its parent is.
            Err(error) if is_gone(&error) && thread.path().join("stat").exists() => return by_parent(pid),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn by_parent(parent: u32) -> io::Result<Vec<u32>> {
    let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.filter(|pid| self::parent(*pid) == Some(parent)).collect())
}

fn numbers(text: &str) -> impl Iterator<Item = u32> + '_ {
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok())
}

pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODEV))
}

/// A field of `/proc/PID/stat`, counted from 1 as in proc(5), from the third on.
fn stat_field(pid: u32, number: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(number - 3).map(str::to_owned)
}

/// The process that started another one, or has adopted it.
pub(crate) fn parent(pid: u32) -> Option<u32> {
    stat_field(pid, 4)?.parse().ok()
}

/// Whether a process is on its way out, or gone: it shows nothing of what it has open any more.
pub(super) fn is_dying(pid: u32) -> bool {
    const PF_EXITING: u64 = 0x4;
    let flags = stat_field(pid, 9).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_none_or(|flags| flags & PF_EXITING != 0)
}

/// The name of a process, for people.
pub(crate) fn name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {pid} ({})", name.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_wrapper_has_started_belongs_to_the_backend() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "(sleep 60; true); true"]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut shell = shell.spawn().expect("a shell");
        let subject = Subject { pid: shell.id(), group: None };
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let members = loop {
            let members = subject.members().expect("our own children");
            if members.len() >= 3 || std::time::Instant::now() > until {
                break members;
            }
        };
        assert!(members.len() >= 3, "the shell, its child and its grandchild: {members:?}");
        assert_eq!(parent(shell.id()), Some(std::process::id()));
        assert_eq!(by_parent(shell.id()).expect("asked"), children(shell.id()).expect("asked"));
        for pid in members.iter().rev().filter_map(|pid| rustix::process::Pid::from_raw(i32::try_from(*pid).ok()?)) {
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        shell.wait().expect("our own child");
    }
}
