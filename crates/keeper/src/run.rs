//! The keeper's loop: what the command sends is held, what has ended is reaped, the command is started again.
//!
//! ```text
//!              start                 ended by a signal, or with a status that is not 0
//!   Waiting ───────────▶ Running ────────────────────────────────────────────────────▶ Waiting
//!   (at once, or until                 status 75 (RESTART): Waiting, and never delayed
//!    the delay is over)                status 0, or SIGTERM or SIGINT came before: the keeper ends
//! ```
//!
//! The command alone may send: not its children, which run as the same user and may be exactly what the command protects itself
//! against. What it sent before it died is read before it is reaped, when its number can be nobody else's, and before the next one
//! is started.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, Resource, Rlimit, Signal};

use crate::child::Command;
use crate::datagram::{Datagram, MESSAGE_FDS_MAX};
use crate::line::{Line, say};
use crate::protocol::{self, Refusal, Request};
use crate::table::{DESCRIPTORS_MAX, FIRST, Numbers, Table};

/// Status with which the command asks to be started again at once: the live upgrade (EX_TEMPFAIL of sysexits.h).
pub const RESTART: u8 = 75;
/// How many descriptors are held at most, unless it is said.
pub const DESCRIPTORS_DEFAULT: usize = 32_000;

/// Numbers of descriptors that are not those of the table: three ordinary ones, those of the keeper, those of one message.
const NUMBERS_SPARE: usize = 3 + 8 + MESSAGE_FDS_MAX;
/// Datagrams that are read before signals are looked at again.
const BATCH_MAX: usize = 64;
/// Datagrams that are read when the command has died: more than any queue holds, so that a stranger who goes on sending stops nothing.
const DRAIN_MAX: usize = 65_536;
/// A command that lived no longer than this has died early.
const EARLY: Duration = Duration::from_secs(1);
/// How often it may do so in a row before it is started with a delay.
const EARLY_FREE: u32 = 3;
/// The first delay; every further one is twice as long.
const DELAY_FIRST: Duration = Duration::from_millis(100);
/// The longest.
const DELAY_MAX: Duration = Duration::from_secs(5);
/// `si_code` of a signal that the kernel sent: one typed at a terminal has reached the command already.
const SI_KERNEL: i32 = 0x80;

/// What a keeper is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many descriptors are held at most; by default [`DESCRIPTORS_DEFAULT`], or as many as the limit of descriptors allows.
    pub descriptors_max: Option<usize>,
    /// Where the socket is made that the command sends to.
    pub run_dir: PathBuf,
    /// The command with its arguments.
    pub command: Vec<OsString>,
}

/// The command, as far as the keeper knows.
#[derive(Clone, Copy, Debug)]
enum Main {
    Waiting {
        until: Instant,
    },
    /// `worked`: it has said that it is ready.
    Running {
        pid: Pid,
        since: Instant,
        worked: bool,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Status(i32),
    Signal(i32),
}

/// A keeper that has everything it will ever need.
pub struct Keeper {
    command: Command,
    table: Table,
    socket: OwnedFd,
    signals: OwnedFd,
    path: PathBuf,
    main: Main,
    /// The program could be executed before.
    has_run: bool,
    /// Told to end.
    stopping: bool,
    early_deaths: u32,
    refused: u64,
    /// Why the command is started again; empty for the first time.
    reason: Line<160>,
}

impl Keeper {
    /// Prepares everything; nothing is allocated after that. The process must have one thread, and the keeper takes it over as a
    /// whole: signals, limits, every descriptor above the three ordinary ones, children.
    ///
    /// # Errors
    /// What cannot be had, in words.
    pub fn prepare(options: &Options) -> io::Result<Self> {
        let capacity = raise_limit(options.descriptors_max)?;
        let [socket, signals] =
            [FIRST, FIRST + 1].map(|place| place + RawFd::try_from(capacity).expect("below the limit"));
        // Whatever was inherited would stand where the first stored descriptor belongs.
        // SAFETY: nothing in this process has a descriptor above 2 yet: it has just begun, and the caller gives it over.
        if unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let signals = above(&watch_signals()?, signals)?;
        let (bound, path) = listen(&options.run_dir)?;
        let socket = above(&bound, socket)?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let command = Command::new(&options.command, &path, capacity)?;
        Ok(Keeper {
            command,
            table: Table::new(capacity),
            socket,
            signals,
            path,
            main: Main::Waiting { until: Instant::now() },
            has_run: false,
            stopping: false,
            early_deaths: 0,
            refused: 0,
            reason: Line::new(),
        })
    }

    /// Where the command sends to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Starts the command, and again whenever it has died, until it ends with status 0 or this process is told to end: the status to
    /// end with. Everything that is held is let go of then.
    #[must_use]
    pub fn run(mut self) -> u8 {
        let status = loop {
            if let Main::Waiting { until } = self.main
                && (self.stopping || until <= Instant::now())
                && let Some(status) = self.start()
            {
                break status;
            }
            self.wait();
            if let Some(status) = self.take_signals() {
                break status;
            }
            self.receive(BATCH_MAX);
        };
        // It may be somebody else's by now, or gone.
        let _gone = rustix::fs::unlink(&self.path);
        status
    }

    /// Waits for a datagram, a signal or the end of the delay.
    fn wait(&self) {
        let left = match self.main {
            Main::Waiting { until } => Some(until.saturating_duration_since(Instant::now())),
            Main::Running { .. } => None,
        };
        let left =
            left.map(|left| Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() });
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        match rustix::event::poll(&mut fds, left.as_ref()) {
            // Looking in vain is harmless.
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("poll of two open descriptors fails with error {}", error.raw_os_error()),
        }
    }

    /// Starts the command; the status to end with if that makes no sense.
    fn start(&mut self) -> Option<u8> {
        if self.stopping {
            return Some(0);
        }
        let since = Instant::now();
        match self.command.start(&mut self.table) {
            Ok(pid) => {
                self.main = Main::Running { pid, since, worked: false };
                if !self.reason.bytes().is_empty() {
                    let (reason, held) = (text(self.reason.bytes()), self.table.len());
                    say(format_args!("{reason}; started again as {} with {held} descriptors", pid.as_raw_nonzero()));
                }
                None
            }
            Err(error) => {
                let error = Error(error.raw_os_error().unwrap_or(0));
                say(format_args!("no process can be started ({error}); {} descriptors are held", self.table.len()));
                self.early_deaths = self.early_deaths.max(EARLY_FREE) + 1;
                self.main = Main::Waiting { until: since + delay(self.early_deaths) };
                (!self.has_run).then_some(1)
            }
        }
    }

    /// Takes what signals have come; the status to end with if the command has ended for good.
    fn take_signals(&mut self) -> Option<u8> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        while let Ok(count) = rustix::io::read(&self.signals, &mut info)
            && count == info.len()
        {
            let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
            let (signal, code) = (word(0), word(8));
            match Signal::from_named_raw(signal) {
                Some(Signal::CHILD) | None => {}
                Some(signal) => self.forward(signal, code),
            }
        }
        // Signals of one kind melt into one: what has ended is counted, not they.
        self.reap()
    }

    fn forward(&mut self, signal: Signal, code: i32) {
        self.stopping |= signal == Signal::TERM || signal == Signal::INT;
        if let Main::Running { pid, .. } = self.main
            && code != SI_KERNEL
        {
            // It has ended and is not reaped yet.
            let _ended = rustix::process::kill_process(pid, signal);
        }
    }

    /// Reaps whatever has ended: the command, and everybody whose parent has gone. Whoever looks after a process that has died
    /// must be able to see that it is gone.
    fn reap(&mut self) -> Option<u8> {
        let mut outcome = None;
        while let Some((pid, end)) = ended() {
            if matches!(self.main, Main::Running { pid: main, .. } if main == pid) {
                self.receive(DRAIN_MAX);
            }
            // Seen just now, and nobody else waits.
            let _reaped = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
            // What it said last was read just now.
            if let Main::Running { pid: main, since, worked } = self.main
                && main == pid
            {
                outcome = self.ended(pid, since.elapsed(), worked, end);
            }
        }
        outcome
    }

    /// What follows from the end of the command.
    fn ended(&mut self, pid: Pid, lived: Duration, worked: bool, end: End) -> Option<u8> {
        let failure = self.command.failure();
        self.has_run |= failure.is_none();
        self.reason = Line::new();
        if let Some(error) = failure.map(Error) {
            let program = text(self.command.program());
            say(format_args!("cannot execute {program} ({error}); {} descriptors are held", self.table.len()));
            if !self.has_run {
                return Some(1);
            }
            self.reason.add(format_args!("{program} could not be executed"));
        } else {
            self.reason.add(format_args!("{} {end} after {} ms", pid.as_raw_nonzero(), lived.as_millis()));
        }
        match end {
            End::Status(0) => return Some(0),
            End::Status(status) if self.stopping => return Some(u8::try_from(status).unwrap_or(1)),
            End::Signal(signal) if self.stopping => return Some(u8::try_from(128 + signal).unwrap_or(1)),
            End::Status(status) if status == i32::from(RESTART) => {}
            _ if failure.is_some() => self.early_deaths = self.early_deaths.max(EARLY_FREE).saturating_add(1),
            // One that had begun its work was whole, however soon somebody killed it.
            End::Signal(libc::SIGKILL) if worked => self.early_deaths = 0,
            _ if lived < EARLY => self.early_deaths = self.early_deaths.saturating_add(1),
            _ => self.early_deaths = 0,
        }
        let restart = end == End::Status(RESTART.into());
        let delay = if restart { Duration::ZERO } else { delay(self.early_deaths) };
        self.main = Main::Waiting { until: Instant::now() + delay };
        None
    }

    /// Takes in up to `count` datagrams.
    fn receive(&mut self, count: usize) {
        for _ in 0..count {
            match Datagram::receive(&self.socket) {
                Ok(datagram) => self.take_in(datagram),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Something with this datagram alone; the socket is our own.
                Err(error) => return self.refuse(format_args!("{}", Error(error.raw_os_error().unwrap_or(0)))),
            }
        }
    }

    fn take_in(&mut self, mut datagram: Datagram) {
        let main = match self.main {
            Main::Running { pid, .. } => pid.as_raw_nonzero().get(),
            Main::Waiting { .. } => -1,
        };
        if datagram.sender != main {
            return self.refuse(format_args!("it is from process {}, not from the command", datagram.sender));
        }
        if datagram.cut {
            return self.refuse(format_args!("{}", Refusal::TooLong.text()));
        }
        if datagram.fds_cut {
            return self.refuse(format_args!("not every descriptor could be received"));
        }
        let (bytes, fds) = datagram.parts();
        let notice = protocol::parse(bytes);
        if let (Ok(notice), Main::Running { worked, .. }) = (&notice, &mut self.main) {
            *worked |= notice.ready;
        }
        match notice.map(|notice| notice.store) {
            Err(refusal) => self.refuse(format_args!("{}", refusal.text())),
            Ok(Some(Request::Put { name, .. })) => {
                for fd in fds {
                    if let Err(full) = self.table.put(name, fd.into_raw_fd(), &mut System) {
                        self.refuse(format_args!("{}", full.text()));
                    }
                }
            }
            Ok(Some(Request::Remove { name })) => {
                let _count = self.table.remove(name, &mut System);
            }
            // Its descriptor is closed with it: that is the answer.
            Ok(Some(Request::Barrier) | None) => {}
        }
    }

    /// Something that was sent is not taken. Whoever sends on and on is mentioned ever more seldom.
    fn refuse(&mut self, why: fmt::Arguments<'_>) {
        self.refused += 1;
        if self.refused.is_power_of_two() {
            say(format_args!("refused (number {}): {why}", self.refused));
        }
    }
}

/// How long a command that has died early so many times in a row is not started.
fn delay(early_deaths: u32) -> Duration {
    match early_deaths.checked_sub(EARLY_FREE + 1) {
        None => Duration::ZERO,
        Some(doublings) => (DELAY_FIRST * (1 << doublings.min(10))).min(DELAY_MAX),
    }
}

/// A child that has ended and is not reaped yet, with its end.
fn ended() -> Option<(Pid, End)> {
    // SAFETY: an all-zero siginfo is valid memory for waitid(2) to fill. Number and status are read only after it said that a
    // child has ended: then these are the members that count.
    let (pid, code, status) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        if libc::waitid(libc::P_ALL, 0, &raw mut info, options) != 0 {
            return None;
        }
        (info.si_pid(), info.si_code, info.si_status())
    };
    let end = if code == libc::CLD_EXITED { End::Status(status) } else { End::Signal(status) };
    Pid::from_raw(pid).map(|pid| (pid, end))
}

/// The real descriptors of this process.
struct System;

impl Numbers for System {
    fn rename(&mut self, from: RawFd, to: RawFd) -> bool {
        // SAFETY: the table owns both numbers: nobody else in this process has either.
        unsafe { libc::dup2(from, to) == to && libc::close(from) == 0 }
    }

    fn close(&mut self, fd: RawFd) {
        // SAFETY: the table owns it and forgets it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

/// Raises the limit of descriptors as far as it goes; how many can be held.
fn raise_limit(wanted: Option<usize>) -> io::Result<usize> {
    let capacity = wanted.unwrap_or(DESCRIPTORS_DEFAULT);
    if capacity == 0 || capacity > DESCRIPTORS_MAX {
        let text = format!("{capacity} descriptors cannot be held: 1 to {DESCRIPTORS_MAX} can");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let needed = (capacity + NUMBERS_SPARE) as u64;
    let mut hard = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let set = |limit: u64| {
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) })
    };
    // Only the privileged may, up to what the system allows.
    if hard < needed && set(needed).is_ok() {
        hard = needed;
    }
    set(hard)?;
    let possible = usize::try_from(hard).unwrap_or(usize::MAX).saturating_sub(NUMBERS_SPARE);
    match wanted {
        _ if possible >= capacity => Ok(capacity),
        None if possible > 0 => {
            say(format_args!("the limit of descriptors is {hard}: {possible} can be held instead of {capacity}"));
            Ok(possible)
        }
        _ => {
            let text =
                format!("{capacity} descriptors cannot be held: the limit is {hard} (ulimit -Hn), needed {needed}");
            Err(io::Error::other(text))
        }
    }
}

/// The socket that the command sends to, and its path.
fn listen(run_dir: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(run_dir)?;
    let run_dir = run_dir.canonicalize()?;
    let path = run_dir.join(format!("keeper-{}.notify", std::process::id()));
    let named = |error: Errno| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    // Of a keeper that was killed and had this number before us.
    let _stale = rustix::fs::unlink(&path);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::sockopt::set_socket_passcred(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).map_err(named)?).map_err(named)?;
    rustix::fs::chmod(&path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).map_err(named)?;
    Ok((socket, path))
}

/// Blocks the signals that the keeper waits for, and makes them a descriptor.
fn watch_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero set is valid memory for sigemptyset(3) to fill, and outlives every call that reads it; the new
    // descriptor is owned by nobody else.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut signals, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &raw const signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Moves a descriptor of the keeper's own out of the way of those that it holds.
fn above(fd: &OwnedFd, place: RawFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, place)?)
}

/// What is text of bytes: as far as it is.
fn text(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
    }
}

/// An error number in words. The system's own words would be allocated.
struct Error(i32);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self.0 {
            libc::ENOENT => "it does not exist",
            libc::EACCES => "it may not be executed",
            libc::ENOEXEC => "it is no program",
            libc::ETXTBSY => "it is being written",
            libc::E2BIG => "arguments and environment are too long",
            libc::EAGAIN => "no more processes are allowed",
            libc::ENOMEM => "there is no memory",
            _ => "see errno(3)",
        };
        write!(f, "error {}: {words}", self.0)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Status(status) if *status == i32::from(RESTART) => write!(f, "asked to be started again"),
            End::Status(status) => write!(f, "ended with status {status}"),
            End::Signal(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

#[cfg(test)]
mod tests;
