//! Backend processes: starting them, finding those somebody else started, killing them.

mod launch;
mod peer;

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;

use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitIdOptions};
use warmswap_zoo::{Animal, loose};

pub(crate) use self::peer::{peer, refusal};
use crate::cgroup::{Cgroup, Janitor};
use crate::driver::ProcessRecord;
use crate::storage::Subject;

/// Lines of a backend's output that are kept to explain its end.
const TAIL_LINES: usize = 12;

/// Bytes of output that are read at a time.
const OUTPUT_PER_LOOK: usize = 4096;
/// So many of them are a full pipe.
const OUTPUT_LOOKS_MAX: usize = 16;

/// After so many looks at a group without its first process the rest of it is killed.
const OCCUPIED_LOOKS: u32 = 4;

/// A backend process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pidfd: Arc<OwnedFd>,
    /// Ours to reap, on the janitor's thread; others are only watched.
    child: Option<Janitor>,
    /// A broker has started it: this one, or one before it, whose children are somebody else's to reap now.
    ours: bool,
    /// Names of `pidfd` and `stderr` in the descriptor store.
    kept: Option<(u32, Option<u32>)>,
    cgroup: Option<Cgroup>,
    stderr: Option<fs::File>,
    tail: Tail,
    exited: Option<String>,
    /// Looks at which the group was occupied although the process was gone.
    looks_occupied: u32,
}

/// What a command line's placeholders stand for.
#[derive(Debug)]
pub(crate) enum Endpoint<'a> {
    /// `{socket}`: the path at which the backend shall listen.
    Path(&'a Path),
    /// `{fd}`: a listening socket it inherits.
    Listener(BorrowedFd<'a>),
}

impl Process {
    /// Starts a backend, in a control group of its own where the system has them.
    pub(crate) fn spawn(
        command: &[String],
        endpoint: &Endpoint<'_>,
        group: &str,
        janitor: &Janitor,
        survives: bool,
    ) -> io::Result<Self> {
        let inherited = match endpoint {
            Endpoint::Path(_) => None,
            Endpoint::Listener(fd) => Some(*fd),
        };
        let fill = |argument: &String| match endpoint {
            Endpoint::Path(path) => argument.replace("{socket}", &path.display().to_string()),
            Endpoint::Listener(fd) => argument.replace("{fd}", &fd.as_raw_fd().to_string()),
        };
        let arguments: Vec<String> = command.iter().map(fill).collect();
        // Without control groups descendants cannot be counted; the process itself still can.
        let mut cgroup = match Cgroup::create(group, janitor) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(error),
            group => group.ok(),
        };
        let (stderr, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&stderr, true)?;
        let child = launch::Child {
            arguments: &arguments,
            stderr: theirs.as_fd(),
            inherited,
            cgroup: cgroup.as_ref().and_then(Cgroup::directory),
            survives,
        };
        let (pid, pidfd) = child.launch()?;
        cgroup.as_mut().into_iter().for_each(Cgroup::started);
        let stderr = Some(fs::File::from(stderr));
        Ok(Process {
            pid,
            pidfd: Arc::new(pidfd),
            child: Some(janitor.clone()),
            ours: true,
            kept: None,
            cgroup,
            stderr,
            tail: Tail::default(),
            exited: None,
            looks_occupied: 0,
        })
    }

    /// Watches a process somebody else started.
    pub(crate) fn adopt(pid: u32, pidfd: Option<OwnedFd>) -> io::Result<Self> {
        let pidfd = pidfd.map_or_else(|| open_pidfd(pid), Ok)?;
        Ok(Process {
            pid,
            pidfd: Arc::new(pidfd),
            child: None,
            ours: false,
            kept: None,
            cgroup: None,
            stderr: None,
            tail: Tail::default(),
            exited: None,
            looks_occupied: 0,
        })
    }

    /// Goes on with a process that a broker before this one has started, or has been told of.
    pub(crate) fn inherit(record: &ProcessRecord, pidfd: OwnedFd, stderr: Option<OwnedFd>, janitor: &Janitor) -> Self {
        let cgroup = record.group.as_ref().and_then(|path| Cgroup::inherit(path, janitor).ok());
        Process {
            pid: record.pid,
            pidfd: Arc::new(pidfd),
            child: None,
            ours: record.ours,
            kept: Some((record.pidfd, record.stderr)),
            cgroup,
            stderr: stderr.map(fs::File::from),
            tail: Tail::default(),
            exited: None,
            looks_occupied: 0,
        }
    }

    /// The process as the next broker has to know it. Its descriptors are given names by `put`, if they have none yet.
    pub(crate) fn record(
        &mut self,
        put: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<u32>,
    ) -> io::Result<ProcessRecord> {
        let (pidfd, stderr) = match self.kept {
            Some(kept) => kept,
            None => (put(self.pidfd.as_fd())?, self.stderr.as_ref().map(|it| put(it.as_fd())).transpose()?),
        };
        let stderr = stderr.filter(|_| self.stderr.is_some());
        self.kept = Some((pidfd, stderr));
        let group = self.cgroup.as_ref().map(|group| group.path().to_path_buf());
        Ok(ProcessRecord { pid: self.pid, pidfd, stderr, group, ours: self.ours })
    }

    /// Whether we have started it, and what it has started is ours to kill as well.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }

    /// What is looked at: the process, its group, and what it has started.
    pub(crate) fn subject(&self) -> Subject {
        Subject { pid: self.pid, group: self.cgroup.as_ref().map(|group| group.path().to_path_buf()) }
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The same for somebody who may need it longer.
    pub(crate) fn shared_pidfd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.pidfd)
    }

    pub(crate) fn stderr(&self) -> Option<BorrowedFd<'_>> {
        self.stderr.as_ref().map(AsFd::as_fd)
    }

    /// Kills the process; its group follows when it is looked at. Doing it twice is harmless.
    pub(crate) fn kill(&self) {
        if self.exited.is_none() {
            // It may be gone already; the pidfd makes sure nobody else is hit.
            let _gone = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    /// Collects the exit of the process itself, if it has ended. Says how it ended.
    pub(crate) fn reap(&mut self) -> Option<&str> {
        if self.exited.is_none() {
            self.exited = if self.child.is_some() { self.reap_child() } else { self.foreign_exit() };
        }
        self.exited.as_deref()
    }

    fn reap_child(&mut self) -> Option<String> {
        let status = rustix::process::waitid(
            rustix::process::WaitId::PidFd(self.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT,
        );
        let status = match status {
            Ok(None) => return None,
            Ok(Some(status)) => status,
            Err(error) => return Some(format!("its exit cannot be collected: {error}")),
        };
        let how = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("{}", exit_status(code)),
            (_, Some(signal)) => format!("killed by signal {signal}"),
            _ => "ended".to_owned(),
        };
        // Its threads, memory and descriptors are gone. Taking the last of it away makes the kernel spin while anybody else is at
        // the process' entries in /proc; in a real-time thread that can last until the kernel takes the processor away.
        if let (Some(janitor), Ok(process)) = (&self.child, self.pidfd.try_clone()) {
            janitor.reap(process);
        }
        // What it said last, as far as a pipe holds it; its descendants may go on for ever.
        let _rest = (0..OUTPUT_LOOKS_MAX).all(|_| self.read_stderr(&mut |_| {}));
        Some(self.tail.explain(how))
    }

    fn foreign_exit(&self) -> Option<String> {
        has_ended(self.pidfd()).then(|| "ended".to_owned())
    }

    /// Whether the process and everything in its group is gone, and how that is known. Reaps first.
    pub(crate) fn is_gone(&mut self) -> Result<String, String> {
        if self.reap().is_none() {
            return Err(format!("process {} has not ended{}", self.pid, self.state_hint()));
        }
        let group = self.cgroup.as_mut().filter(|_| !loose(Animal::OneOfGroupKilled));
        match group.map(Cgroup::is_empty) {
            Some(Ok(false)) => {
                // The count of a group lags a little behind the exit of its last process; what is still there then is killed.
                if self.looks_occupied == OCCUPIED_LOOKS {
                    self.cgroup.iter().for_each(Cgroup::kill);
                }
                self.looks_occupied = self.looks_occupied.saturating_add(1);
                Err(format!("processes that {} started are still alive", self.pid))
            }
            Some(Err(error)) => Err(format!("its control group cannot be read: {error}")),
            Some(Ok(true)) => Ok(format!("process {} reaped, its control group empty", self.pid)),
            None if self.child.is_some() => Ok(format!("process {} reaped", self.pid)),
            None => Ok(format!("process {} ended", self.pid)),
        }
    }

    /// The kernel's one-letter state, for people.
    pub(crate) fn state_hint(&self) -> String {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let letter = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        match letter {
            Some('T' | 't') => " (it is stopped)".to_owned(),
            Some('D') => " (it is in uninterruptible sleep)".to_owned(),
            Some('R') => " (it is running)".to_owned(),
            _ => String::new(),
        }
    }

    /// Reads some of what the process printed; each line goes to `line` and to the tail. False if there was nothing.
    pub(crate) fn read_stderr(&mut self, line: &mut dyn FnMut(&str)) -> bool {
        let Some(stderr) = &mut self.stderr else { return false };
        let mut buffer = [0; OUTPUT_PER_LOOK];
        match stderr.read(&mut buffer) {
            Ok(0) => {
                self.stderr = None;
                false
            }
            Ok(count) => {
                self.tail.push(&buffer[..count], line);
                true
            }
            Err(error) => error.kind() == io::ErrorKind::Interrupted,
        }
    }
}

/// The last lines a process printed.
#[derive(Debug, Default)]
struct Tail {
    partial: Vec<u8>,
    lines: std::collections::VecDeque<String>,
}

impl Tail {
    fn push(&mut self, bytes: &[u8], line: &mut dyn FnMut(&str)) {
        for byte in bytes {
            if *byte != b'\n' {
                if self.partial.len() < 1024 {
                    self.partial.push(*byte);
                }
                continue;
            }
            let text = String::from_utf8_lossy(&self.partial).into_owned();
            self.partial.clear();
            line(&text);
            if self.lines.len() == TAIL_LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(text);
        }
    }

    fn explain(&self, how: String) -> String {
        if self.lines.is_empty() {
            return how;
        }
        let said: Vec<&str> = self.lines.iter().map(String::as_str).collect();
        let said = said.join(" / ");
        let hint = if said.contains("Failed to get") && said.contains("lock") {
            " (the image is locked by another process: primary and shadow must be able to open it together, \
             for qemu-storage-daemon raw images with locking=on and writable=on exports)"
        } else {
            ""
        };
        format!("{how}; it said: {said}{hint}")
    }
}

fn exit_status(code: i32) -> ExitStatus {
    std::os::unix::process::ExitStatusExt::from_raw(code << 8)
}

/// Whether a process has ended, collected or not.
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(pidfd, rustix::event::PollFlags::IN)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&none)), Ok(1))
}

pub(crate) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// A private directory for one device's sockets, gone with the value. Whoever could enter it could take a backend's place.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    stays: bool,
}

impl RunDir {
    pub(crate) fn create(base: &Path, name: &str) -> io::Result<Self> {
        let path = base.join(format!("{name}.{}", std::process::id()));
        let own = rustix::process::geteuid().as_raw();
        fs::create_dir_all(base)?;
        // Left behind by a broker of that process id: ours, and nobody else's to prepare.
        if fs::symlink_metadata(&path).is_ok_and(|it| it.is_dir() && it.uid() == own && it.mode() & 0o077 == 0) {
            fs::remove_dir_all(&path)?;
        }
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    "this exists and was not made by a broker of this user; remove it".to_owned()
                }
                _ => error.to_string(),
            };
            io::Error::new(error.kind(), format!("{}: {why}", path.display()))
        })?;
        Ok(RunDir { path, stays: false })
    }

    /// Goes on with a directory that a broker before this one has made.
    pub(crate) fn inherit(path: PathBuf) -> Self {
        RunDir { path, stays: false }
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// It outlives this value: the next broker goes on with it.
    pub(crate) fn leave(&mut self) {
        self.stays = true;
    }

    pub(crate) fn socket(&self, generation: u64) -> PathBuf {
        self.path.join(format!("backend-{generation}.sock"))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.stays {
            // Only sockets of backends that are gone are in it.
            let _leftover = fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn the_directory_of_the_sockets_is_private_and_one_of_somebody_else_is_refused() {
        let base = std::env::temp_dir().join(format!("ws-run-dir-{}", std::process::id()));
        fs::create_dir(&base).expect("a temporary directory");
        let place = base.join(format!("disk.{}", std::process::id()));
        let refused = || {
            let error = RunDir::create(&base, "disk").expect_err("it exists");
            assert!(error.to_string().contains("was not made by a broker"), "{error}");
        };
        let elsewhere = base.join("elsewhere");
        fs::create_dir(&elsewhere).expect("a directory");
        symlink(&elsewhere, &place).expect("a link");
        refused();
        fs::remove_file(&place).expect("it is a link");
        // Open to others, who may have put something into it.
        fs::create_dir(&place).expect("a directory");
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).expect("ours");
        refused();
        // What this user's broker left behind is replaced.
        fs::set_permissions(&place, fs::Permissions::from_mode(0o700)).expect("ours");
        fs::write(place.join("backend-1.sock"), "stale").expect("a file");
        let made = RunDir::create(&base, "disk").expect("it is made");
        assert_eq!(fs::metadata(&place).expect("it is there").mode() & 0o777, 0o700);
        assert!(!made.socket(1).exists());
        drop(made);
        assert!(!place.exists());
        fs::remove_dir_all(&base).expect("ours");
    }

    #[test]
    fn a_backend_inherits_nothing_but_what_it_needs() {
        let (janitor, thread) = Janitor::start().expect("a thread");
        let path = std::env::temp_dir().join(format!("ws-inherit-{}.sock", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        fs::remove_file(&path).expect("it is there");
        let (inherited, _writer) = rustix::pipe::pipe().expect("a pipe that is not closed by exec");
        let script = "for fd in /proc/$$/fd/*; do readlink $fd >&2; done; # {fd}";
        let command = ["/bin/sh", "-c", script].map(str::to_owned);
        let group = crate::cgroup::name("test-inherit", 1);
        let mut process = Process::spawn(&command, &Endpoint::Listener(listener.as_fd()), &group, &janitor, false)
            .expect("it starts");
        while process.reap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let (pipe, socket) = (rustix::fs::fstat(&inherited), rustix::fs::fstat(&listener));
        let [pipe, socket] = [pipe, socket].map(|stat| stat.expect("open").st_ino);
        let said = process.reap().expect("just seen").to_owned();
        assert!(said.contains(&format!("socket:[{socket}]")), "{said}");
        assert!(!said.contains(&format!("pipe:[{pipe}]")), "{said}");
        drop((process, janitor));
        thread.join().expect("it ends");
    }
}
