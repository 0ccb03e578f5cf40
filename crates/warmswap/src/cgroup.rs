//! Process groups that can be killed and counted as a whole: version 2 control groups, which need no controller for it.
//!
//! Making, killing and removing a group waits for locks that other users of control groups may hold for tens of milliseconds, so
//! none of it is done by the control thread.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

/// What is left of a backend is cleared away so much later.
const CLEAR_AFTER: Duration = Duration::from_millis(100);
/// What dead brokers have left running may take this long to end before nothing is started.
const LEFTOVERS_MAX: Duration = Duration::from_secs(10);

/// Kills and removes groups, and collects children that have ended, on a thread of its own.
#[derive(Clone, Debug)]
pub(crate) struct Janitor {
    chores: Sender<Chore>,
}

#[derive(Debug)]
enum Chore {
    /// Kill what is left in a group whose first process is gone.
    Kill(PathBuf),
    Remove(PathBuf),
    /// Collect a child that has ended.
    Reap(OwnedFd),
}

/// What is left of a backend.
#[derive(Debug)]
enum Rest {
    Group(PathBuf),
    Process(OwnedFd),
}

impl Rest {
    fn clear(&self) {
        match self {
            Rest::Group(path) => remove(path),
            Rest::Process(process) => {
                let id = rustix::process::WaitId::PidFd(process.as_fd());
                // It has ended, so this does not wait. It makes the kernel forget the process' entries in `/proc`, and spin while anybody
                // is still at them.
                let _collected = rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED);
            }
        }
    }
}

impl Janitor {
    /// Starts the thread. It ends when the last janitor and the last group are gone; wait for it then.
    pub(crate) fn start() -> io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (sender, chores): (_, Receiver<Chore>) = crossbeam_channel::unbounded();
        let thread = std::thread::Builder::new().name("janitor".to_owned()).spawn(move || {
            sweep();
            let mut old: VecDeque<(Instant, Rest)> = VecDeque::new();
            loop {
                let due = old.front().map(|(at, _)| *at);
                let chore = match due {
                    Some(at) => match chores.recv_deadline(at) {
                        Ok(chore) => chore,
                        Err(RecvTimeoutError::Timeout) => {
                            old.pop_front().iter().for_each(|(_, rest)| rest.clear());
                            continue;
                        }
                        Err(RecvTimeoutError::Disconnected) => break,
                    },
                    None => match chores.recv() {
                        Ok(chore) => chore,
                        Err(_) => break,
                    },
                };
                match chore {
                    // Kernels before 5.14 lack cgroup.kill: then it is the operator who must end them.
                    Chore::Kill(path) => drop(fs::write(path.join("cgroup.kill"), "1")),
                    // A new primary has better use for the processor just now.
                    Chore::Remove(path) => old.push_back((Instant::now() + CLEAR_AFTER, Rest::Group(path))),
                    Chore::Reap(process) => old.push_back((Instant::now() + CLEAR_AFTER, Rest::Process(process))),
                }
            }
            old.iter().for_each(|(_, rest)| rest.clear());
        })?;
        Ok((Janitor { chores: sender }, thread))
    }

    /// Has a child collected that has ended.
    pub(crate) fn reap(&self, process: OwnedFd) {
        // Without a janitor the program is ending.
        let _janitor_gone = self.chores.send(Chore::Reap(process));
    }
}

/// A group for one backend and everything it starts.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Open until a process was started in it.
    directory: Option<fs::File>,
    events: fs::File,
    janitor: Janitor,
}

impl Cgroup {
    /// Makes a group beside our own, where the system allows it. One of that name which is occupied is somebody else's: `ResourceBusy`.
    pub(crate) fn create(name: &str, janitor: &Janitor) -> io::Result<Self> {
        let path = own_path()?.join(name);
        fs::create_dir(&path).or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists if !is_occupied(&path)? => Ok(()),
            io::ErrorKind::AlreadyExists => {
                let text = format!("the control group {} exists and has processes in it", path.display());
                Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
            }
            _ => Err(error),
        })?;
        match (fs::File::open(&path), fs::File::open(path.join("cgroup.events"))) {
            (Ok(directory), Ok(events)) => {
                Ok(Cgroup { path, directory: Some(directory), events, janitor: janitor.clone() })
            }
            (Err(error), _) | (_, Err(error)) => {
                remove(&path);
                Err(error)
            }
        }
    }

    /// Goes on with a group that a broker before this one has made.
    pub(crate) fn inherit(path: &Path, janitor: &Janitor) -> io::Result<Self> {
        let events = fs::File::open(path.join("cgroup.events"))?;
        Ok(Cgroup { path: path.to_path_buf(), directory: None, events, janitor: janitor.clone() })
    }

    /// The group's directory, to start a process in it.
    pub(crate) fn directory(&self) -> Option<BorrowedFd<'_>> {
        self.directory.as_ref().map(AsFd::as_fd)
    }

    /// A process was started in it; no other will be.
    pub(crate) fn started(&mut self) {
        self.directory = None;
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Has every process in the group killed, soon.
    pub(crate) fn kill(&self) {
        // Without a janitor the program is ending, and what is left dies with its parent.
        let _janitor_gone = self.janitor.chores.send(Chore::Kill(self.path.clone()));
    }

    /// Whether no living process is left in the group.
    pub(crate) fn is_empty(&mut self) -> io::Result<bool> {
        let mut text = String::with_capacity(64);
        let sought = self.events.seek(SeekFrom::Start(0));
        match sought.and_then(|_| self.events.read_to_string(&mut text)) {
            // The group has been removed, which only an empty one can be: by the janitor of a broker that was killed, for one. There are
            // kernels that say so to the one call, and kernels that say so to the other.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(true),
            read => read?,
        };
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
                std::thread::sleep(Duration::from_micros(200));
            }
            _ => return,
        }
    }
}

/// Removes what brokers that were killed have left behind: empty groups whose broker is gone. Occupied ones refuse, and wait for the
/// next broker of their device.
fn sweep() {
    for (path, _) in abandoned() {
        let _occupied = fs::remove_dir(path);
    }
}

/// Kills what backends of dead brokers of this device have left running, and waits for its end: another backend is about to write
/// what they write. Returns the groups that had processes in them.
pub(crate) fn end_leftovers(device: &str, but: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    let mut ended = Vec::new();
    let left = abandoned().into_iter().filter(|(path, name)| name.device == device && !but.contains(path));
    for (path, _) in left {
        let until = Instant::now() + LEFTOVERS_MAX;
        let mut killed = false;
        // A group that cannot be read any more has been removed.
        while is_occupied(&path).unwrap_or(false) {
            // Kernels before 5.14 lack cgroup.kill, and what sleeps in the kernel does not end: it is waited for, then an operator is.
            let result = fs::write(path.join("cgroup.kill"), "1");
            if Instant::now() > until {
                let why = result.err().map(|error| format!(" ({error})")).unwrap_or_default();
                let text = format!(
                    "{}: processes that a broker of this device left behind cannot be ended{why}; end them and start again",
                    path.display()
                );
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            killed = true;
            std::thread::sleep(Duration::from_millis(1));
        }
        remove(&path);
        if killed {
            ended.push(path);
        }
    }
    Ok(ended)
}

/// Brokers of one keeper come and go, and their backends stay: the groups are the keeper's, and nobody else's to end while it lives.
static KEPT: AtomicBool = AtomicBool::new(false);

/// What is started from now on lives on with the process that has started this one. Called before anything is.
pub(crate) fn belong_to_keeper() {
    KEPT.store(true, Ordering::Relaxed);
}

/// The process whose life tells whether a group of ours is somebody's.
fn owner() -> u32 {
    let parent = rustix::process::getppid().and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok());
    parent.filter(|_| KEPT.load(Ordering::Relaxed)).unwrap_or_else(std::process::id)
}

/// Groups whose broker is gone; those of a keeper's own earlier brokers among them.
fn abandoned() -> Vec<(PathBuf, Name)> {
    let (Ok(entries), Some(me)) = (own_path().and_then(fs::read_dir), Broker::find(std::process::id())) else {
        return Vec::new();
    };
    let named = entries.flatten().filter_map(|entry| Some((entry.path(), Name::parse(entry.file_name().to_str()?)?)));
    let ours = Broker::find(owner()).filter(|_| KEPT.load(Ordering::Relaxed));
    named.filter(|(_, name)| name.broker.is_gone(me) || Some(name.broker) == ours).collect()
}

fn is_occupied(group: &Path) -> io::Result<bool> {
    Ok(!fs::read_to_string(group.join("cgroup.events"))?.lines().any(|line| line == "populated 0"))
}

/// A broker's process. Start time and namespace tell it from another one that has its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Broker {
    pid: u32,
    /// In ticks since the system was started.
    started: u64,
    /// Inode of its namespace of processes.
    namespace: u64,
}

impl Broker {
    /// The living process of this number.
    fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may hold anything; the state follows it.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let dead = matches!(fields.next()?, "Z" | "X");
        let started = fields.nth(18)?.parse().ok()?;
        let namespace = fs::metadata("/proc/self/ns/pid").ok()?.ino();
        (!dead).then_some(Broker { pid, started, namespace })
    }

    /// Whether it has ended. Of other namespaces nothing is known.
    fn is_gone(self, me: Broker) -> bool {
        self.namespace == me.namespace && Broker::find(self.pid) != Some(self)
    }
}

/// When a living process was started, in ticks since the system was.
pub(crate) fn start_of(pid: u32) -> Option<u64> {
    Some(Broker::find(pid)?.started)
}

/// Name of a group: `warmswap.DEVICE.PID-STARTED-NAMESPACE.GENERATION`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    device: String,
    broker: Broker,
    generation: u64,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Name { device, broker: Broker { pid, started, namespace }, generation } = self;
        write!(f, "warmswap.{device}.{pid}-{started}-{namespace}.{generation}")
    }
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("warmswap.")?.rsplitn(3, '.');
        let generation = parts.next()?.parse().ok()?;
        let numbers = parts.next()?.split('-').map(|number| number.parse::<u64>().ok()).collect::<Option<Vec<_>>>()?;
        let &[pid, started, namespace] = numbers.as_slice() else { return None };
        let broker = Broker { pid: u32::try_from(pid).ok()?, started, namespace };
        Some(Name { device: parts.next()?.to_owned(), broker, generation })
    }
}

/// Name of the group of one backend of this process.
pub(crate) fn name(device: &str, generation: u64) -> String {
    let pid = owner();
    // Without /proc there are no groups either.
    let broker = Broker::find(pid).unwrap_or(Broker { pid, started: 0, namespace: 0 });
    Name { device: device.to_owned(), broker, generation }.to_string()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A group of a broker that may be dead, with a process in it; none where the system lets nobody make groups.
    fn occupied(name: &str) -> Option<(PathBuf, std::process::Child)> {
        let path = own_path().ok()?.join(name);
        fs::create_dir(&path).ok()?;
        let child = Command::new("/bin/sleep").arg("60").spawn().expect("everybody has one");
        // As long as it is empty any broker that starts meanwhile may remove it.
        while fs::write(path.join("cgroup.procs"), child.id().to_string()).is_err() {
            let _there = fs::create_dir(&path);
        }
        Some((path, child))
    }

    fn dead_broker() -> Broker {
        // Our own number, but another process.
        Broker { started: 1, ..Broker::find(std::process::id()).expect("it runs this") }
    }

    #[test]
    fn a_group_that_somebody_has_removed_is_empty() {
        let (janitor, thread) = Janitor::start().expect("a thread");
        // Nobody else sweeps a group with another name.
        let Ok(made) = Cgroup::create(&format!("removed-{}", std::process::id()), &janitor) else { return };
        let mut group = Cgroup::inherit(made.path(), &janitor).expect("it is there");
        assert!(group.is_empty().expect("it can be read"));
        fs::remove_dir(group.path()).expect("it is empty");
        assert!(group.is_empty().expect("it is known to be gone"));
        drop((made, group, janitor));
        thread.join().expect("it ends with the last who knows it");
    }

    #[test]
    fn names_of_groups_tell_their_device_and_their_broker() {
        let me = Broker::find(std::process::id()).expect("it runs this");
        let name = name("disk.0-a", 7);
        assert_eq!(Name::parse(&name), Some(Name { device: "disk.0-a".to_owned(), broker: me, generation: 7 }));
        assert!(!me.is_gone(me));
        assert!(dead_broker().is_gone(me));
        assert!(!Broker { namespace: 1, ..dead_broker() }.is_gone(me), "nothing is known of another namespace");
        for foreign in ["warmswap.disk.1.2", "warmswap.disk", "disk.1-2-3.4", "warmswap.disk.1-2-3.x"] {
            assert_eq!(Name::parse(foreign), None);
        }
    }

    #[test]
    fn what_a_dead_broker_of_the_device_left_running_is_ended() {
        let group = |device: &str, broker| Name { device: device.to_owned(), broker, generation: 1 }.to_string();
        let me = Broker::find(std::process::id()).expect("it runs this");
        let Some((left, mut child)) = occupied(&group("test-left", dead_broker())) else {
            eprintln!("not tested: this system lets us make no control groups");
            return;
        };
        let (other, mut of_other) = occupied(&group("test-other", dead_broker())).expect("as above");
        let (living, mut of_living) = occupied(&group("test-left", me)).expect("as above");
        assert_eq!(end_leftovers("test-left", &[]).expect("it ends"), std::slice::from_ref(&left));
        assert!(!left.exists());
        assert!(!child.wait().expect("our own child").success());
        for (path, child) in [(other, &mut of_other), (living, &mut of_living)] {
            assert!(matches!(child.try_wait(), Ok(None)), "{} is not the device's, or not abandoned", path.display());
            child.kill().and_then(|()| child.wait()).expect("our own child");
            remove(&path);
        }
    }

    #[test]
    fn an_occupied_group_is_not_taken() {
        let name = name("test-occupied", 1);
        let Some((path, mut child)) = occupied(&name) else {
            eprintln!("not tested: this system lets us make no control groups");
            return;
        };
        let (janitor, thread) = Janitor::start().expect("a thread");
        let refused = Cgroup::create(&name, &janitor).map(drop).expect_err("somebody is in it");
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        child.kill().and_then(|()| child.wait()).expect("our own child");
        while is_occupied(&path).expect("it is there") {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(Cgroup::create(&name, &janitor).expect("an empty one is usable"));
        drop(janitor);
        thread.join().expect("it ends");
        assert!(!path.exists());
    }
}
