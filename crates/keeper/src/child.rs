//! The command: prepared once, started any number of times without allocating.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::Pid;

use crate::line::Line;
use crate::table::Table;

/// What the child is told by its keeper alone: whatever the keeper itself was told under these names is not meant for it.
const OURS: [&str; 7] =
    ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE", "WATCHDOG_PID", "WATCHDOG_USEC"];
/// Places at the end of the environment that are filled for each child: process, number of descriptors, names.
const PER_CHILD: usize = 3;
/// Status of a child whose program could not be executed.
const NOT_EXECUTED: i32 = 127;

/// A command with its environment, as execve(2) takes it.
pub(crate) struct Command {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// Shared with the child: why the program could not be executed, as an error number.
    failure: &'static AtomicI32,
}

impl Command {
    /// A program, its arguments (its name is the first), and what holds for every child: where the keeper listens and how many
    /// descriptors it holds at most. The rest of the environment is that of this process.
    ///
    /// # Errors
    /// There is no such program in `PATH`; something of it has a byte of value zero; there is no memory.
    pub(crate) fn new(command: &[OsString], socket: &Path, descriptors_max: usize) -> io::Result<Self> {
        let nothing = || io::Error::new(io::ErrorKind::InvalidInput, "no command to start");
        let program = find(command.first().ok_or_else(nothing)?)?;
        let kept = std::env::vars_os().filter(|(name, _)| OURS.iter().all(|ours| name != ours));
        let kept = kept.map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
        let told = [
            [b"NOTIFY_SOCKET=", socket.as_os_str().as_bytes()].concat(),
            format!("FDSTORE={descriptors_max}").into_bytes(),
        ];
        let environment = kept.chain(told).map(CString::new).collect::<Result<Vec<_>, _>>()?;
        let arguments = command.iter().map(|argument| CString::new(argument.as_bytes()));
        let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
        let mut argv: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
        argv.push(ptr::null());
        let mut envp: Vec<_> = environment.iter().map(|variable| variable.as_ptr()).collect();
        envp.resize(envp.len() + PER_CHILD + 1, ptr::null());
        let program = CString::new(program.into_os_string().into_vec())?;
        Ok(Command { program, arguments, environment, argv, envp, failure: shared()? })
    }

    /// The program, as it is executed.
    #[must_use]
    pub(crate) fn program(&self) -> &[u8] {
        self.program.as_bytes()
    }

    /// Starts a child that has every descriptor of the table, from number 3 on, and no other but the three ordinary ones.
    ///
    /// # Errors
    /// There can be no further process. Whether its program could be executed is known when it has ended.
    pub(crate) fn start(&mut self, table: &mut Table) -> io::Result<Pid> {
        debug_assert_eq!(self.argv.len(), self.arguments.len() + 1, "pointers and what they point at live together");
        let mut count_variable = Line::<32>::new();
        count_variable.add(format_args!("LISTEN_FDS={}\0", table.len()));
        let told = if table.is_empty() {
            // Zero descriptors are said by saying nothing.
            [ptr::null(), ptr::null()]
        } else {
            [count_variable.bytes(), table.variable()].map(|variable| variable.as_ptr().cast())
        };
        let from = self.environment.len();
        self.envp[from + 1..].copy_from_slice(&[told[0], told[1], ptr::null()]);
        self.failure.store(0, Ordering::Relaxed);
        // SAFETY: fork(2) in a process of one thread. The child touches only what was prepared here, allocates nothing, and either
        // becomes another program or ends at once.
        let pid = unsafe { libc::fork() };
        match pid {
            0 => {
                let mut pid_variable = Line::<32>::new();
                pid_variable.add(format_args!("LISTEN_PID={}\0", std::process::id()));
                self.envp[from] = pid_variable.bytes().as_ptr().cast();
                self.execute()
            }
            -1 => Err(io::Error::last_os_error()),
            pid => Ok(Pid::from_raw(pid).expect("fork gives a process' number")),
        }
    }

    /// In the child: becomes the program, with nothing of the keeper's signals.
    fn execute(&self) -> ! {
        reset_signals();
        // SAFETY: program, arguments and environment are strings that end with a zero, behind lists that end with a null pointer;
        // they live in this value and in the frame of `start`. `failure` is memory that parent and child share.
        unsafe {
            libc::execve(self.program.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr());
            self.failure.store(*libc::__errno_location(), Ordering::Relaxed);
            libc::_exit(NOT_EXECUTED)
        }
    }

    /// Why the program of the child that has ended could not be executed, as an error number; none if it was.
    #[must_use]
    pub(crate) fn failure(&self) -> Option<i32> {
        Some(self.failure.load(Ordering::Relaxed)).filter(|error| *error != 0)
    }
}

/// What is blocked or ignored stays so when a program is executed: it gets what a program expects.
fn reset_signals() {
    // As the kernel has it: default action, no flags, nothing blocked. The C library lets nobody at two of the signals.
    const SIGNALS_MAX: libc::c_int = 64;
    let default = [0_u64; 4];
    for signal in 1..=SIGNALS_MAX {
        // SAFETY: the kernel reads its own structure of 32 bytes, and there is no function of ours in it. Signals that have no
        // other action are refused, and that is well.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), ptr::null_mut::<u64>(), size_of::<u64>());
        }
    }
    let none = 0_u64;
    // SAFETY: the kernel reads a set of 64 signals.
    unsafe {
        let old = ptr::null_mut::<u64>();
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, old, size_of::<u64>());
    }
}

/// A number in memory that a forked child shares with its parent, for as long as this process lives.
fn shared() -> io::Result<&'static AtomicI32> {
    use rustix::mm::{MapFlags, ProtFlags};
    let (size, access) = (size_of::<AtomicI32>(), ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: a new mapping where the kernel likes, which is never taken away. A page is aligned for any type, and all zeros are a
    // valid number.
    unsafe { Ok(&*rustix::mm::mmap_anonymous(ptr::null_mut(), size, access, MapFlags::SHARED)?.cast::<AtomicI32>()) }
}

/// The path of a program: as it is given if it names a place, else where `PATH` has it first.
fn find(program: &OsStr) -> io::Result<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Ok(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let executable = |path: &PathBuf| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(executable).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("there is no program {} in PATH", program.display()))
    })
}
