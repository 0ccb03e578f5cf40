//! The process behind a socket.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `SO_PEERPIDFD` of `asm-generic/socket.h` (Linux 6.5): not in the libc crate.
const SO_PEERPIDFD: libc::c_int = 77;

/// Who made the other end of a socket, or listens there: its process id, and a descriptor of it where the kernel gives one. Without the
/// descriptor the id may have gone to somebody else in the meantime. The id is 0 if it lies outside our process namespace.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> io::Result<(u32, Option<OwnedFd>)> {
    let pid = credentials(socket)?;
    Ok((pid, pidfd(socket)?.filter(|pidfd| is_of(pidfd, pid))))
}

/// `SO_PEERCRED` without a type that a process id of 0 does not fit in, as rustix' has it.
fn credentials(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("twelve bytes");
    // SAFETY: the kernel writes at most `size` bytes into `peer`, which is that long and of plain integers.
    let result = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut peer).cast(), &raw mut size)
    };
    if result == 0 { Ok(u32::try_from(peer.pid).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// A kernel that does not know the question is no failure; a process that has ended is.
fn pidfd(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut pidfd: RawFd = -1;
    let mut size = libc::socklen_t::try_from(size_of::<RawFd>()).expect("four bytes");
    // SAFETY: the socket is open, and value and size are of the kind this option fills in.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut pidfd).cast(), &raw mut size)
    };
    if result == 0 && pidfd >= 0 {
        // SAFETY: the kernel has just made this descriptor for us.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(pidfd) }));
    }
    match io::Error::last_os_error() {
        error if result < 0 && matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => Err(error),
        _ => Ok(None),
    }
}

fn is_of(pidfd: &OwnedFd, pid: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap_or_default();
    info.lines().filter_map(|line| line.strip_prefix("Pid:")).any(|it| it.trim().parse() == Ok(pid))
}

/// Why a process must not be taken for a backend, which may be killed: it is more than that.
pub(crate) fn refusal(pid: u32) -> Option<String> {
    let what = "a backend is killed when it is fenced, so it must listen itself";
    match pid {
        0 => return Some(format!("it lies outside our process namespace; {what} and be seen from here")),
        1 => return Some(format!("process 1 listens there (socket activation?); {what}")),
        _ => {}
    }
    let mut ancestor = Some(std::process::id());
    while let Some(known) = ancestor.filter(|known| *known > 1) {
        if known == pid {
            let who = if pid == std::process::id() { "warmswap itself" } else { "which warmswap descends from" };
            return Some(format!("{} listens there, {who}; {what}", crate::storage::process_name(pid)));
        }
        ancestor = crate::storage::parent(known);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn init_ourselves_and_our_ancestors_are_no_backends() {
        let parent = rustix::process::getppid().expect("a test has a parent").as_raw_nonzero().get();
        for pid in [0, 1, std::process::id(), u32::try_from(parent).expect("positive")] {
            assert!(refusal(pid).is_some(), "{pid}");
        }
        let mut other = std::process::Command::new("sleep").arg("60").spawn().expect("it starts");
        assert_eq!(refusal(other.id()), None);
        other.kill().expect("our own child");
        other.wait().expect("our own child");
    }

    #[test]
    fn the_listener_behind_a_socket_is_found() {
        let path = std::env::temp_dir().join(format!("warmswap-peer-{}", std::process::id()));
        let _stale = fs::remove_file(&path);
        let _listener = UnixListener::bind(&path).expect("a socket");
        let client = UnixStream::connect(&path).expect("it listens");
        let (pid, pidfd) = peer(client.as_fd()).expect("asked");
        assert_eq!(pid, std::process::id());
        assert!(pidfd.is_none_or(|pidfd| is_of(&pidfd, pid)));
        fs::remove_file(path).expect("it is there");
    }
}
