//! Starting a process directly in its control group.
//!
//! Moving a process into a group after its start waits for a grace period of the kernel (15 ms and more) and holds a lock that every
//! other user of control groups waits for; `clone3` with `CLONE_INTO_CGROUP` does neither, and the child cannot run a single
//! instruction outside the group.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// `CLONE_INTO_CGROUP` of `linux/sched.h`: beyond the type that the libc crate gives it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What a child is given.
pub(super) struct Child<'a> {
    pub(super) arguments: &'a [String],
    pub(super) stderr: BorrowedFd<'a>,
    /// A descriptor that keeps its number.
    pub(super) inherited: Option<BorrowedFd<'a>>,
    pub(super) cgroup: Option<BorrowedFd<'a>>,
    /// It lives on when the broker is gone, for the next one.
    pub(super) survives: bool,
}

/// Everything the child needs, made before it exists: it may not allocate.
struct Prepared {
    argv: Vec<*const libc::c_char>,
    null: RawFd,
    stderr: RawFd,
    inherited: Option<RawFd>,
    /// With whom it dies, if it does.
    parent: Option<libc::pid_t>,
}

impl Child<'_> {
    /// Starts it. Returns its process id and a descriptor of it.
    pub(super) fn launch(&self) -> io::Result<(u32, OwnedFd)> {
        let program = find(&self.arguments[0])?;
        let words = std::iter::once(program.as_os_str().as_bytes())
            .chain(self.arguments[1..].iter().map(|argument| argument.as_bytes()))
            .map(CString::new)
            .collect::<Result<Vec<_>, _>>()?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        let mut argv: Vec<*const libc::c_char> = words.iter().map(|word| word.as_ptr()).collect();
        argv.push(std::ptr::null());
        let prepared = Prepared {
            argv,
            null: null.as_raw_fd(),
            stderr: self.stderr.as_raw_fd(),
            inherited: self.inherited.map(|fd| fd.as_raw_fd()),
            parent: (!self.survives).then(|| libc::pid_t::try_from(std::process::id()).unwrap_or(0)),
        };
        // exec reports its failure through this pipe, which closes on success.
        let (report, failure) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (pid, pidfd) = clone_into(self.cgroup, &prepared, failure.as_raw_fd())?;
        drop(failure);
        let mut code = [0; 4];
        match rustix::io::read(&report, &mut code) {
            Ok(4) => {
                let error = io::Error::from_raw_os_error(i32::from_ne_bytes(code));
                let options = rustix::process::WaitIdOptions::EXITED;
                let id = rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd));
                // It has ended by itself; this only collects it.
                let _collected = rustix::process::waitid(id, options);
                Err(error)
            }
            _ => Ok((pid, pidfd)),
        }
    }
}

/// Finds a program as a shell would.
fn find(program: &str) -> io::Result<PathBuf> {
    if program.contains('/') {
        return Ok(PathBuf::from(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsStr::new("/usr/bin:/bin").to_owned());
    let executable = |path: &Path| {
        std::fs::metadata(path)
            .is_ok_and(|it| it.is_file() && std::os::unix::fs::PermissionsExt::mode(&it.permissions()) & 0o111 != 0)
    };
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| executable(path))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no such program"))
}

fn clone_into(cgroup: Option<BorrowedFd<'_>>, prepared: &Prepared, failure: RawFd) -> io::Result<(u32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    // SAFETY: zero is valid for every field of this plain structure.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: a plain fork with arguments that live on this stack. The child gets a copy of this thread alone and calls nothing but
    // async-signal-safe functions on memory prepared before, until it execs or ends.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        become_backend(prepared, failure);
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Runs in the child: marks everything beyond the first three descriptors to be closed by exec. What the broker was started with, a
/// lock or a log, is no business of a backend's: held there, it would look like storage that the backend keeps open.
fn close_the_rest() -> bool {
    // SAFETY: a plain call without pointers.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    // SAFETY: the thread's own errno.
    let refused = unsafe { *libc::__errno_location() };
    // Kernels before 5.11, and filters older than that, do not know it: then the broker's own are closed, as they always are.
    closed == 0 || matches!(refused, libc::ENOSYS | libc::EINVAL | libc::EPERM)
}

/// Runs in the child.
fn become_backend(prepared: &Prepared, failure: RawFd) -> ! {
    // SAFETY: async-signal-safe calls on memory and descriptors that were prepared before the fork.
    unsafe {
        // A backend must not inherit the broker's blocked signals or its priority.
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let normal = libc::sched_param { sched_priority: 0 };
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const normal);
        libc::setpgid(0, 0);
        let orphaned = prepared.parent.is_some_and(|parent| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::getppid() != parent
        });
        let ready = !orphaned
            && libc::dup2(prepared.null, 0) >= 0
            && libc::dup2(prepared.null, 1) >= 0
            && libc::dup2(prepared.stderr, 2) >= 0
            && close_the_rest()
            && prepared.inherited.is_none_or(|fd| libc::fcntl(fd, libc::F_SETFD, 0) >= 0);
        if ready {
            libc::execv(prepared.argv[0], prepared.argv.as_ptr());
        }
        let code = (*libc::__errno_location()).to_ne_bytes();
        libc::write(failure, code.as_ptr().cast(), code.len());
        libc::_exit(127)
    }
}
