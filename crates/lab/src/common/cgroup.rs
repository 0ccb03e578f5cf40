//! Control groups of version 1, one controller each: what an instrument does to a process from outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

/// Removing a group is tried this often: processes that have just ended stay in it for a moment.
const REMOVE_TRIES: u32 = 200;

/// A group. Removed on drop; what is in it still goes to the group above.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
}

impl Group {
    /// Makes a group of that controller, named after `prefix`, this process and `name`. Groups of that prefix whose process is gone are
    /// removed.
    pub(crate) fn new(controller: &str, prefix: &str, name: &str) -> anyhow::Result<Self> {
        let parent = hierarchy(controller)?;
        remove_abandoned(&parent, prefix);
        let path = parent.join(format!("{prefix}{}.{name}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Group { path })
    }

    /// Puts a process with all its threads into it.
    pub(crate) fn add(&self, pid: u32) -> anyhow::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Writes one of its files.
    pub(crate) fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path.join(file);
        fs::write(&path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
    }

    /// Reads one of its files.
    pub(crate) fn read(&self, file: &str) -> anyhow::Result<String> {
        let path = self.path.join(file);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// Reads a number.
    pub(crate) fn number(&self, file: &str) -> anyhow::Result<u64> {
        let text = self.read(file)?;
        text.trim().parse().with_context(|| format!("{file} of {}: {text:?}, expected a number", self.path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let above = self.path.parent().map(|parent| parent.join("cgroup.procs"));
        for _ in 0..REMOVE_TRIES {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            let left = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
            for pid in left.lines() {
                // One that has ended meanwhile has left the group as well.
                let _ = above.as_ref().map(|above| fs::write(above, pid));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        eprintln!("control group {} is left over", self.path.display());
    }
}

/// Where a version 1 controller is mounted.
pub(crate) fn hierarchy(controller: &str) -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let has_it = system.starts_with("cgroup ") && system.split([' ', ',']).any(|option| option == controller);
        has_it.then(|| mount.split(' ').nth(4)).flatten()
    });
    mount.map(PathBuf::from).with_context(|| format!("this needs the version 1 controller {controller}"))
}

fn remove_abandoned(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whatever cannot be removed is in nobody's way.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_in_its_group_until_the_group_goes() {
        let Ok(group) = Group::new("cpu", "lab-test-", "one") else {
            eprintln!("not tested: this system lets us make no control groups of version 1");
            return;
        };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("everybody has one");
        group.add(child.id()).expect("it lives");
        let membership = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it lives");
        assert!(membership(child.id()).contains("lab-test-"));
        group.write("cpu.shares", "2").expect("a file of that controller");
        assert_eq!(group.number("cpu.shares").expect("a number"), 2);
        group.write("cpu.sharks", "2").expect_err("there is no such file");
        let path = group.path.clone();
        drop(group);
        assert!(!path.exists() && !membership(child.id()).contains("lab-test-"));
        child.kill().and_then(|()| child.wait()).expect("our own child");
    }
}
