//! What a backend does its I/O on, and whether its storage descriptions are closed.
//!
//! A reaped process is not quiet: I/O that it had submitted through io_uring goes on after its exit, into guest memory and onto
//! the disk, and neither its control group nor the device's counters show it. What does show it is the open file description the
//! I/O was submitted on: requests in flight hold it. Each is given a [`Mark`] while the backend lives, and the backend is harmless
//! when every mark is gone. This needs nothing from the backend, whatever its engine and whether or not it locks its image.
//!
//! A backend is all of its processes ([`Subject`]). What is done through other things than files and block devices may go on where
//! nobody here sees it; then nothing that can be observed proves its end.

mod kind;
mod mark;
mod members;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use warmswap_core::Nanos;
use warmswap_zoo::{Animal, loose};

use self::kind::Kind;
pub(crate) use self::mark::Mark;
pub(crate) use self::members::{Subject, name as process_name, parent};
use crate::driver::{MemberRecord, StorageRecord};

/// Most descriptions of one backend that are marked.
const MARKS_MAX: usize = 256;

/// What a backend does its I/O on, and how.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    marks: Vec<Mark>,
    /// A description that could not be marked, and why.
    unmarked: Option<String>,
    /// What it does I/O through besides, where its end cannot be seen.
    foreign: Option<String>,
    /// A process of it that the last look could not look into, and why.
    hidden: Option<String>,
    /// Another broker guards what it writes.
    rival: Option<String>,
    /// It has, or may make, an io_uring.
    ring: bool,
    /// Its processes besides the first, as far as they were seen.
    others: Vec<Member>,
    /// When the last complete look began.
    began: Option<Nanos>,
}

/// A process that a backend has started.
#[derive(Debug)]
struct Member {
    pid: u32,
    process: OwnedFd,
}

/// What makes a dead backend's I/O provably over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FenceBasis {
    /// The marks on its storage descriptions go.
    Marks,
    /// The exit of the process waits for its I/O.
    Exit,
    /// Nothing that can be observed; the reason in words.
    Unprovable(String),
}

impl Storage {
    /// Looks at a living backend and marks what it has opened since the last look. What was marked once is never forgotten: a
    /// process that is dying has no descriptors any more, its I/O may.
    pub(crate) fn inspect(&mut self, subject: &Subject, first: BorrowedFd<'_>, now: Nanos) {
        let hidden = self.look(subject, first).err();
        // One that is dying shows nothing; what is known of it stays.
        if members::is_dying(subject.pid) || has_ended(first) {
            return;
        }
        self.hidden = hidden.map(|error| format!("it cannot be looked into: {error}"));
        self.began = Some(now);
    }

    fn look(&mut self, subject: &Subject, first: BorrowedFd<'_>) -> io::Result<()> {
        let members = subject.members()?;
        self.others.retain(|member| !has_ended(member.process.as_fd()));
        for pid in &members {
            if *pid == subject.pid {
                self.look_at(*pid, first, &members)?;
                continue;
            }
            let known = self.others.iter().position(|member| member.pid == *pid);
            let process = match known {
                Some(at) => self.others.swap_remove(at).process,
                None => match open(*pid) {
                    Ok(process) => process,
                    Err(error) if members::is_gone(&error) => continue,
                    Err(error) => return Err(error),
                },
            };
            let looked = self.look_at(*pid, process.as_fd(), &members);
            self.others.push(Member { pid: *pid, process });
            looked?;
        }
        Ok(())
    }

    fn look_at(&mut self, pid: u32, process: BorrowedFd<'_>, members: &[u32]) -> io::Result<()> {
        self.look_into(pid, process, members).or_else(|error| {
            // Of a process on its way out nothing can be seen, with various errors.
            if members::is_gone(&error) || members::is_dying(pid) || has_ended(process) {
                return Ok(());
            }
            Err(io::Error::new(error.kind(), format!("{}: {error}", members::name(pid))))
        })
    }

    fn look_into(&mut self, pid: u32, process: BorrowedFd<'_>, members: &[u32]) -> io::Result<()> {
        // A ring may be made with the first request, long after the start.
        self.ring |= fs::read(format!("/proc/{pid}/cmdline"))?.windows(8).any(|word| word == b"io_uring");
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let Ok(fd) = entry.file_name().to_string_lossy().parse::<RawFd>() else { continue };
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy().into_owned();
            let socket = target.starts_with("socket:[");
            if target == "anon_inode:[io_uring]" {
                self.ring = true;
            }
            if !socket && (!target.starts_with('/') || target.starts_with("/memfd:")) {
                continue;
            }
            let copy = match rustix::process::pidfd_getfd(process, fd, PidfdGetfdFlags::empty()) {
                Ok(copy) => copy,
                // Closed in the meantime.
                Err(rustix::io::Errno::BADF) => continue,
                Err(error) => return Err(error.into()),
            };
            let kind = if socket { kind::of_socket(&copy, members) } else { kind::of_file(&copy, fd, &target) };
            match kind {
                Kind::Harmless => {}
                Kind::Storage => self.mark(&copy, &target),
                Kind::Foreign(reason) => self.foreign = Some(reason),
            }
        }
        Ok(())
    }

    fn mark(&mut self, copy: &OwnedFd, path: &str) {
        if self.marks.iter().any(|mark| mark.path == path && mark.is_on(copy.as_fd())) {
            return;
        }
        self.marks.retain(|mark| mark.is_held().unwrap_or(true));
        if self.marks.len() >= MARKS_MAX {
            self.unmarked = Some(format!("it has more than {MARKS_MAX} files open"));
            return;
        }
        match Mark::set(copy.as_fd(), path) {
            Ok(mark) if mark.is_shared_with_us(copy.as_fd()) => mark.lift(copy.as_fd()),
            Ok(mark) => {
                if kind::is_writable(copy) {
                    match mark.claim() {
                        Ok(None) => {}
                        Ok(Some(rival)) => self.rival = Some(format!("{path} is guarded by {rival}")),
                        Err(error) => self.unmarked = Some(format!("{path} cannot be claimed: {error}")),
                    }
                }
                self.marks.push(mark);
            }
            Err(error) => self.unmarked = Some(format!("{path} cannot be marked: {error}")),
        }
    }

    /// What the next broker has to know.
    pub(crate) fn record(&self) -> StorageRecord {
        let member = |member: &Member| {
            let started = crate::cgroup::start_of(member.pid)?;
            Some(MemberRecord { pid: member.pid, started })
        };
        StorageRecord {
            marks: self.marks.iter().filter_map(Mark::record).collect(),
            unmarked: self.unmarked.clone(),
            foreign: self.foreign.clone(),
            hidden: self.hidden.clone(),
            ring: self.ring,
            others: self.others.iter().filter_map(member).collect(),
            began: self.began,
        }
    }

    /// What a broker before this one has found out. A mark that cannot be asked for any more proves nothing: it is not believed to be gone.
    pub(crate) fn recall(record: &StorageRecord) -> Self {
        let mut storage = Storage {
            unmarked: record.unmarked.clone(),
            foreign: record.foreign.clone(),
            hidden: record.hidden.clone(),
            ring: record.ring,
            began: record.began,
            ..Storage::default()
        };
        for mark in &record.marks {
            match Mark::recall(mark) {
                Ok(mark) => storage.marks.push(mark),
                Err(error) => {
                    let why = format!(
                        "{} was open when the broker was replaced, and cannot be asked for: {error}",
                        mark.path
                    );
                    storage.hidden.get_or_insert(why);
                }
            }
        }
        for member in &record.others {
            if crate::cgroup::start_of(member.pid) == Some(member.started)
                && let Ok(process) = open(member.pid)
            {
                storage.others.push(Member { pid: member.pid, process });
            }
        }
        storage
    }

    /// Who else guards what it writes, in words, if somebody does.
    pub(crate) fn rival(&self) -> Option<&str> {
        self.rival.as_deref()
    }

    /// When the last complete look began.
    pub(crate) fn last_look(&self) -> Option<Nanos> {
        self.began
    }

    /// What it does its I/O on.
    pub(crate) fn files(&self) -> impl Iterator<Item = OwnedFd> + '_ {
        self.marks.iter().filter_map(Mark::file)
    }

    /// What its death would prove.
    pub(crate) fn basis(&self) -> FenceBasis {
        if let Some(reason) = self.foreign.as_ref().or(self.hidden.as_ref()) {
            return FenceBasis::Unprovable(reason.clone());
        }
        if self.began.is_none() {
            return FenceBasis::Unprovable("it has not been looked into".to_owned());
        }
        match &self.unmarked {
            None if !self.marks.is_empty() => FenceBasis::Marks,
            None if self.ring => FenceBasis::Unprovable(
                "it does I/O through io_uring, which outlives the process, and has nothing open on which its end could be seen"
                    .to_owned(),
            ),
            Some(reason) if self.ring => FenceBasis::Unprovable(format!(
                "it does I/O through io_uring, which outlives the process, and its end could not be seen: {reason}"
            )),
            _ => FenceBasis::Exit,
        }
    }

    /// Whether every process that it was seen to have started has ended. With a control group the group says more.
    ///
    /// # Errors
    /// Who is left, in words. They are killed if `kill` says so.
    pub(crate) fn has_no_process(&self, kill: bool) -> Result<(), String> {
        if loose(Animal::OneOfGroupKilled) {
            return Ok(());
        }
        let Some(left) = self.others.iter().find(|member| !has_ended(member.process.as_fd())) else { return Ok(()) };
        if kill {
            for member in &self.others {
                // It may be gone; the descriptor makes sure nobody else is hit.
                let _gone = rustix::process::pidfd_send_signal(&member.process, Signal::KILL);
            }
        }
        Err(format!("{}, which the backend has started, is still alive", members::name(left.pid)))
    }

    /// Whether every marked description is closed.
    ///
    /// # Errors
    /// What is still open, in words.
    pub(crate) fn is_closed(&self) -> Result<(), String> {
        for mark in &self.marks {
            match mark.is_held() {
                Ok(false) => {}
                Ok(true) => {
                    return Err(format!("I/O on {} may still be in flight: its description is open", mark.path));
                }
                Err(error) => return Err(format!("the mark on {} cannot be asked for: {error}", mark.path)),
            }
        }
        Ok(())
    }

    /// Number of descriptions that are marked.
    pub(crate) fn marked(&self) -> usize {
        self.marks.len()
    }

    /// A mark that is still there.
    pub(crate) fn held(&self) -> Option<Mark> {
        self.marks.iter().find(|mark| mark.is_held().unwrap_or(true))?.try_clone().ok()
    }
}

/// Which living process has the marked description open. None: what holds it is I/O in flight, or a mapping.
pub(crate) fn holder(mark: &Mark) -> Option<u32> {
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id()).find(|pid| holds(*pid, mark))
}

fn holds(pid: u32, mark: &Mark) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let same_path = entries
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy() == mark.path.as_str()));
    let mut fds = same_path.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok()).peekable();
    if fds.peek().is_none() {
        return false;
    }
    let Ok(process) = open(pid) else { return false };
    fds.any(|fd| {
        rustix::process::pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).is_ok_and(|copy| mark.is_on(copy.as_fd()))
    })
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

fn has_ended(process: BorrowedFd<'_>) -> bool {
    let mut fds = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&none)), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    const SEEN: Option<Nanos> = Some(Nanos(1));

    fn with(change: impl FnOnce(&mut Storage)) -> FenceBasis {
        let mut storage = Storage { began: SEEN, ..Storage::default() };
        change(&mut storage);
        storage.basis()
    }

    fn mark() -> Mark {
        let thread = std::thread::current().id();
        let path = std::env::temp_dir().join(format!("warmswap-basis-{}-{thread:?}", std::process::id()));
        let file = fs::File::create(&path).expect("a temporary file");
        fs::remove_file(path).expect("just made");
        Mark::set(file.as_fd(), "test").expect("an ordinary file takes a mark")
    }

    #[test]
    fn what_a_death_proves_follows_from_marks_and_engine() {
        let reason = || Some("a file".to_owned());
        assert_eq!(with(|it| it.marks.push(mark())), FenceBasis::Marks);
        assert_eq!(
            with(|it| {
                it.marks.push(mark());
                it.ring = true;
            }),
            FenceBasis::Marks
        );
        assert_eq!(with(|_| ()), FenceBasis::Exit, "no storage and no ring");
        assert_eq!(with(|it| it.unmarked = reason()), FenceBasis::Exit);
        let unprovable = [
            with(|it| it.ring = true),
            with(|it| {
                it.unmarked = reason();
                it.ring = true;
            }),
            with(|it| it.foreign = reason()),
            with(|it| it.hidden = reason()),
            with(|it| it.began = None),
        ];
        for basis in unprovable {
            assert!(matches!(basis, FenceBasis::Unprovable(_)), "{basis:?}");
        }
    }

    /// A process with a file of ours at its standard input, through a shell that waits for it.
    fn wrapped(file: fs::File) -> (Child, OwnedFd, Subject) {
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 3<&0 </dev/null; (exec <&3 3<&-; sleep 60; true) & exec 3<&-; wait"]);
        let shell = shell.stdin(file).stdout(Stdio::null()).spawn().expect("a shell");
        let process = open(shell.id()).expect("our own child");
        let subject = Subject { pid: shell.id(), group: None };
        (shell, process, subject)
    }

    #[test]
    fn what_a_child_of_the_backend_has_open_is_marked_once_and_its_mark_goes_with_it() {
        let path = std::env::temp_dir().join(format!("warmswap-storage-{}", std::process::id()));
        let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let (mut shell, process, subject) = wrapped(file.expect("a temporary file"));
        let mut storage = Storage::default();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::time::Instant::now() < until
            && (subject.members().expect("our own").len() < 3
                || fs::read_link(format!("/proc/{}/fd/0", subject.pid)).is_ok_and(|it| it == path))
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        storage.inspect(&subject, process.as_fd(), Nanos(1));
        storage.inspect(&subject, process.as_fd(), Nanos(2));
        // A program that is starting has other files open for a moment.
        let ours = storage.marks.iter().filter(|mark| mark.path == path.display().to_string()).count();
        assert_eq!((ours, storage.last_look()), (1, Some(Nanos(2))), "{storage:?}");
        assert!(storage.is_closed().is_err() && storage.others.len() >= 2);
        shell.kill().expect("our own child");
        shell.wait().expect("our own child");
        // Without a control group its children live on, and are found by what was seen of them.
        let mark = storage.held().expect("it is open");
        assert!(storage.others.iter().any(|member| Some(member.pid) == holder(&mark)), "its child has it open");
        assert!(storage.has_no_process(true).is_err());
        while std::time::Instant::now() < until
            && (storage.has_no_process(true).is_err() || storage.is_closed().is_err())
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!((storage.has_no_process(false), storage.is_closed()), (Ok(()), Ok(())));
        storage.inspect(&subject, process.as_fd(), Nanos(3));
        assert_eq!(storage.last_look(), Some(Nanos(2)), "one that is gone cannot be looked at");
        fs::remove_file(path).expect("the file is there");
    }
}
