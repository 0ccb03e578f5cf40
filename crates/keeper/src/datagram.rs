//! One datagram as it comes: bytes, sender, descriptors; into memory that is there already.
//!
//! The sender may be 0: a process that is in no process namespace of ours. It is one that no type for processes can hold, so the
//! message is taken apart here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::protocol::DATAGRAM_MAX;

/// Most descriptors that one message carries (SCM_MAX_FD of the kernel).
pub(crate) const MESSAGE_FDS_MAX: usize = 253;
/// Room for sender and descriptors.
// SAFETY: CMSG_SPACE(3) is arithmetic.
const CONTROL_MAX: usize = unsafe {
    libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) + libc::CMSG_SPACE((MESSAGE_FDS_MAX * size_of::<RawFd>()) as u32)
} as usize;

/// Control messages begin where a header may stand.
#[repr(C, align(8))]
struct Control([u8; CONTROL_MAX]);

/// A datagram.
pub(crate) struct Datagram {
    bytes: [u8; DATAGRAM_MAX],
    length: usize,
    /// Its sender, as the kernel says; 0 if it is not of our process namespace.
    pub(crate) sender: libc::pid_t,
    /// It was longer than there is room for.
    pub(crate) cut: bool,
    /// Not everything that came with it could be received.
    pub(crate) fds_cut: bool,
    fds: Fds,
}

/// Descriptors that came with one datagram. Those that nobody has taken are closed.
pub(crate) struct Fds {
    numbers: [RawFd; MESSAGE_FDS_MAX],
    taken: usize,
    count: usize,
}

impl Datagram {
    /// Receives the next one, without waiting. Its descriptors stay open when a program is executed.
    pub(crate) fn receive(socket: impl AsFd) -> io::Result<Self> {
        let mut datagram = Datagram {
            bytes: [0; DATAGRAM_MAX],
            length: 0,
            sender: 0,
            cut: false,
            fds_cut: false,
            fds: Fds { numbers: [-1; MESSAGE_FDS_MAX], taken: 0, count: 0 },
        };
        let mut control = Control([0; CONTROL_MAX]);
        let mut place = libc::iovec { iov_base: datagram.bytes.as_mut_ptr().cast(), iov_len: DATAGRAM_MAX };
        // SAFETY: all zeros are a valid header: no name, no places.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut place;
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = CONTROL_MAX;
        // SAFETY: the header describes `bytes` and `control`, which outlive the call.
        let count = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
        datagram.length = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        datagram.cut = header.msg_flags & libc::MSG_TRUNC != 0;
        datagram.fds_cut = header.msg_flags & libc::MSG_CTRUNC != 0;
        // SAFETY: the kernel has filled `control` and said in the header how far; the macros go from message to message within
        // that. Their data is read as bytes that need no alignment.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(&raw const header);
            while let Some(found) = message.as_ref() {
                let data = libc::CMSG_DATA(message);
                let length = found.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                match (found.cmsg_level, found.cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                        datagram.sender = data.cast::<libc::ucred>().read_unaligned().pid;
                    }
                    (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                        let fds = &mut datagram.fds;
                        let count = (length / size_of::<RawFd>()).min(MESSAGE_FDS_MAX - fds.count);
                        let place = fds.numbers[fds.count..].as_mut_ptr().cast::<u8>();
                        data.copy_to_nonoverlapping(place, count * size_of::<RawFd>());
                        fds.count += count;
                    }
                    _ => {}
                }
                message = libc::CMSG_NXTHDR(&raw const header, message);
            }
        }
        Ok(datagram)
    }

    /// What it says, and what came with it.
    pub(crate) fn parts(&mut self) -> (&[u8], &mut Fds) {
        (&self.bytes[..self.length], &mut self.fds)
    }
}

impl Iterator for Fds {
    type Item = OwnedFd;

    fn next(&mut self) -> Option<OwnedFd> {
        let fd = *self.numbers[..self.count].get(self.taken)?;
        self.taken += 1;
        // SAFETY: the kernel made it for us with this message, and it is given out once.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Drop for Fds {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
