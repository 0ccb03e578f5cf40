//! Processes this instrument starts: each is ended by its id and reaped on every way out, an interrupt and a panic too.

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// How long a process asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

static INTERRUPT: AtomicI32 = AtomicI32::new(0);
static SENDER: AtomicI32 = AtomicI32::new(0);
static LIVE: Mutex<Vec<Pid>> = Mutex::new(Vec::new());
static WORKSPACE: OnceLock<PathBuf> = OnceLock::new();

/// Makes interrupts a flag and panics clean: afterwards every way out of this program ends what it started.
pub(crate) fn guard_exits(workspace: &Path) {
    let _ = WORKSPACE.set(workspace.to_owned());
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let note: extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void) = note_interrupt;
        // SAFETY: all-zero is a valid `sigaction`; the handler has the signature SA_SIGINFO asks for and only stores to
        // atomics, which is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        end_everything();
    }));
}

extern "C" fn note_interrupt(signal: libc::c_int, info: *const libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure to a handler installed with SA_SIGINFO.
    let sender = unsafe { (*info).si_pid() };
    SENDER.store(sender, Ordering::Relaxed);
    INTERRUPT.store(signal, Ordering::Relaxed);
}

/// Who asked this program to end, if somebody did.
pub(crate) fn interrupted() -> Option<String> {
    match INTERRUPT.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(format!("interrupted by signal {signal} from process {}", SENDER.load(Ordering::Relaxed))),
    }
}

/// The way out of a panic (which aborts, so no destructor runs): ends processes, removes files.
fn end_everything() {
    let Ok(live) = LIVE.try_lock().map(|live| live.clone()) else { return };
    for signal in [Signal::TERM, Signal::KILL] {
        for pid in &live {
            let _ = kill_process(*pid, signal);
        }
        let deadline = Instant::now() + GRACE;
        let gone = |pid: &Pid| !matches!(waitpid(Some(*pid), WaitOptions::NOHANG), Ok(None));
        while Instant::now() < deadline && !live.iter().all(gone) {
            thread::sleep(POLL);
        }
    }
    if let Some(workspace) = WORKSPACE.get() {
        end_strays(workspace);
        let _ = std::fs::remove_dir_all(workspace);
    }
}

/// A process this program started.
#[derive(Debug)]
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts a process in a group of its own (an interrupt from the terminal is ours to hand on, in our order). Must be
    /// called from the main thread: the process is sent SIGTERM should the thread that started it disappear.
    pub(crate) fn start(name: &'static str, command: &mut Command) -> anyhow::Result<Self> {
        command.process_group(0);
        // SAFETY: the closure makes one system call and allocates nothing, as is required between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let process = Self { name, child, status: None };
        live().push(process.pid());
        Ok(process)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its standard streams and the rest of the standard library's handle.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            let pid = self.pid();
            live().retain(|known| *known != pid);
            self.status = Some(status);
        }
        self.status
    }

    /// Waits for the end, at most `patience`.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(POLL);
        }
    }

    /// Sends it a signal, unless it is gone.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let _ = kill_process(self.pid(), signal);
        }
    }

    /// Asks it to end, then makes it end; returns once it is reaped. False if it had to be killed.
    pub(crate) fn end(&mut self) -> bool {
        self.signal(Signal::TERM);
        if self.wait(GRACE).is_some() {
            return true;
        }
        self.kill();
        false
    }

    /// Kills it and reaps it.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
        if self.wait(GRACE).is_none() {
            eprintln!("lab vm: {} (process {:?}) does not die", self.name, self.pid());
        }
    }

    /// One sentence on an unexpected end.
    pub(crate) fn obituary(&mut self) -> String {
        match self.ended() {
            None => format!("{} is running", self.name),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("{} ended with code {code}", self.name),
                (_, signal) => format!("{} was ended by signal {}", self.name, signal.unwrap_or(0)),
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.end();
        }
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<Pid>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills every process whose command line names `workspace` (it is ours then, or a child of ours) and says which.
pub(crate) fn end_strays(workspace: &Path) -> Vec<String> {
    let own = rustix::process::getpid();
    let mut strays = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        if pid != own && command_line(pid).contains(&*workspace.to_string_lossy()) {
            strays.push(format!("{} {}", pid.as_raw_nonzero(), command_line(pid)));
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    strays
}

/// The command line of a process; empty if there is no such process or it is a zombie.
pub(crate) fn command_line(pid: Pid) -> String {
    let bytes = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_owned()
}
