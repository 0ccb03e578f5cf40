//! Process groups that can be killed and counted as a whole: version 2 control groups, which need no controller for it.
//!
//! Making, killing and removing a group waits for locks that other users of control groups may hold for tens of milliseconds, so
//! none of it is done by the control thread.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crossbeam_channel::{Receiver, Sender};

/// Kills and removes groups on a thread of its own.
#[derive(Clone, Debug)]
pub(crate) struct Janitor {
    chores: Sender<Chore>,
}

#[derive(Debug)]
enum Chore {
    /// Kill what is left in a group whose first process is gone.
    Kill(PathBuf),
    Remove(PathBuf),
}

impl Janitor {
    /// Starts the thread. It ends when the last janitor and the last group are gone; wait for it then.
    pub(crate) fn start() -> io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (sender, chores): (_, Receiver<Chore>) = crossbeam_channel::unbounded();
        let thread = std::thread::Builder::new().name("janitor".to_owned()).spawn(move || {
            sweep();
            for chore in chores {
                match chore {
                    // Kernels before 5.14 lack cgroup.kill: then it is the operator who must end them.
                    Chore::Kill(path) => drop(fs::write(path.join("cgroup.kill"), "1")),
                    Chore::Remove(path) => remove(&path),
                }
            }
        })?;
        Ok((Janitor { chores: sender }, thread))
    }
}

/// A group for one backend and everything it starts.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: fs::File,
    events: fs::File,
    janitor: Janitor,
}

impl Cgroup {
    /// Makes a group beside our own, where the system allows it.
    pub(crate) fn create(name: &str, janitor: &Janitor) -> io::Result<Self> {
        let path = own_path()?.join(format!("warmswap.{name}"));
        fs::create_dir(&path).or_else(|error| {
            // Left behind by a broker of that process id that was killed: usable if empty.
            if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
        })?;
        match (fs::File::open(&path), fs::File::open(path.join("cgroup.events"))) {
            (Ok(directory), Ok(events)) => Ok(Cgroup { path, directory, events, janitor: janitor.clone() }),
            (Err(error), _) | (_, Err(error)) => {
                remove(&path);
                Err(error)
            }
        }
    }

    /// The group's directory, to start a process in it.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Has every process in the group killed, soon.
    pub(crate) fn kill(&self) {
        // Without a janitor the program is ending, and what is left dies with its parent.
        let _janitor_gone = self.janitor.chores.send(Chore::Kill(self.path.clone()));
    }

    /// Whether no living process is left in the group.
    pub(crate) fn is_empty(&mut self) -> io::Result<bool> {
        let mut text = String::with_capacity(64);
        self.events.seek(SeekFrom::Start(0))?;
        self.events.read_to_string(&mut text)?;
        Ok(text.lines().any(|line| line == "populated 0"))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Without a janitor the directory stays, empty, and is found by its name.
        let _janitor_gone = self.janitor.chores.send(Chore::Remove(std::mem::take(&mut self.path)));
    }
}

fn remove(path: &Path) {
    // A group with a process that has not quite gone is busy for a moment; one that stays is found by its name.
    for _ in 0..50 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            _ => return,
        }
    }
}

/// Removes what brokers that were killed have left behind: empty groups whose broker is gone. Occupied ones refuse.
fn sweep() {
    let Ok(entries) = own_path().and_then(fs::read_dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let broker = name.strip_prefix("warmswap.").and_then(|rest| rest.rsplit('.').nth(1)?.parse::<u32>().ok());
        if broker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // A group that is not empty belongs to somebody.
            let _occupied = fs::remove_dir(entry.path());
        }
    }
}

/// Where our own group lies in the version 2 hierarchy.
fn own_path() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup2 "))
        .find_map(|line| line.split(' ').nth(4))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no version 2 control group hierarchy"))?;
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    Ok(Path::new(mount).join(own.trim_start_matches('/')))
}
