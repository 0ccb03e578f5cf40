//! Taking, sending and counting in one system call.
//!
//! A process that is killed leaves the kernel only at the end of a system call or where it would have to wait. `io_uring_enter` carries out
//! what it is given one after the other before it returns, and none of what is given to it here waits: so either all of it is done, or
//! nothing. Where io_uring is forbidden the calls are made one by one, and a broker that is killed between two of them leaves a link or a
//! VMM with a message too many.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};

/// Deeds that fit at once. More are done in several calls.
const DEEDS_MAX: u32 = 256;
/// Most descriptors of one message.
const FDS_MAX: usize = warmswap_wire::FDS_MAX;
/// Room for their control message.
const CONTROL: usize = 16 + (FDS_MAX * 4).next_multiple_of(8);

/// One thing to be done.
#[derive(Debug)]
pub(crate) enum Deed<'a> {
    /// Take so many bytes away that lie on a socket. Descriptors that came with them are closed: they have been looked at already.
    Take { socket: BorrowedFd<'a>, bytes: usize },
    /// Send a message.
    Send { socket: BorrowedFd<'a>, bytes: &'a [u8], fds: Vec<BorrowedFd<'a>> },
    /// Count one more.
    Count { counter: BorrowedFd<'a> },
}

/// Room for a control message, aligned as one must be.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// What the kernel reads while a deed is done.
struct Prepared {
    header: libc::msghdr,
    part: libc::iovec,
    control: Control,
}

/// Does deeds.
pub(crate) struct Doing {
    ring: Option<IoUring>,
    trash: Vec<u8>,
}

impl std::fmt::Debug for Doing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doing").field("at_once", &self.ring.is_some()).finish_non_exhaustive()
    }
}

impl Doing {
    /// Sees what the system allows.
    pub(crate) fn new() -> Self {
        let ring = IoUring::builder().setup_submit_all().build(DEEDS_MAX).ok();
        Doing { ring, trash: vec![0; warmswap_wire::PAYLOAD_SIZE_MAX as usize + warmswap_wire::HEADER_SIZE] }
    }

    /// Does them in their order. For each: bytes, or the error number, negative.
    pub(crate) fn all(&mut self, deeds: &[Deed<'_>]) -> Vec<i32> {
        let mut results = Vec::with_capacity(deeds.len());
        for deeds in deeds.chunks(DEEDS_MAX as usize) {
            match self.at_once(deeds) {
                Ok(done) => results.extend(done),
                Err(_) => results.extend(deeds.iter().map(|deed| one(deed, &mut self.trash))),
            }
        }
        results
    }

    fn at_once(&mut self, deeds: &[Deed<'_>]) -> io::Result<Vec<i32>> {
        let Some(ring) = &mut self.ring else { return Err(io::ErrorKind::Unsupported.into()) };
        let one = 1_u64.to_ne_bytes();
        let mut prepared: Vec<Box<Prepared>> = deeds.iter().filter_map(Prepared::new).collect();
        let mut headers = prepared.iter_mut();
        for (deed, number) in deeds.iter().zip(0..) {
            let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u32;
            let entry = match deed {
                Deed::Take { socket, bytes } => {
                    let trash = &mut self.trash[..*bytes];
                    let to = types::Fd(socket.as_raw_fd());
                    opcode::Recv::new(to, trash.as_mut_ptr(), *bytes as u32).flags(libc::MSG_DONTWAIT).build()
                }
                Deed::Send { socket, .. } => {
                    let prepared = headers.next().expect("one for each message");
                    opcode::SendMsg::new(types::Fd(socket.as_raw_fd()), &raw const prepared.header).flags(flags).build()
                }
                Deed::Count { counter } => opcode::Write::new(types::Fd(counter.as_raw_fd()), one.as_ptr(), 8).build(),
            };
            // SAFETY: everything the entries point to, `trash`, `one`, `prepared` and the deeds' own bytes, lives until the call below has
            // returned, which it does when all of them are completed.
            unsafe { ring.submission().push(&entry.user_data(number)) }.map_err(io::Error::other)?;
        }
        loop {
            match ring.submit_and_wait(deeds.len()) {
                Ok(_) => break,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // What was handed over may be under way: nothing that it points to may be given back.
                Err(error) => panic!("io_uring does not do what it was given: {error}"),
            }
        }
        let mut results = vec![-libc::EIO; deeds.len()];
        for completion in ring.completion() {
            results[completion.user_data() as usize] = completion.result();
        }
        Ok(results)
    }
}

impl Prepared {
    fn new(deed: &Deed<'_>) -> Option<Box<Self>> {
        let Deed::Send { bytes, fds, .. } = deed else { return None };
        // SAFETY: zero is valid for every field of these plain structures.
        let mut prepared: Box<Prepared> = Box::new(unsafe { std::mem::zeroed() });
        prepared.part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        prepared.header.msg_iov = &raw mut prepared.part;
        prepared.header.msg_iovlen = 1;
        let fds = &fds[..fds.len().min(FDS_MAX)];
        if !fds.is_empty() {
            let len = (fds.len() * 4) as u32;
            prepared.header.msg_control = (&raw mut prepared.control).cast();
            // SAFETY: a calculation; then the control message lies in `control`, which has room for FDS_MAX descriptors and is aligned.
            unsafe {
                prepared.header.msg_controllen = libc::CMSG_SPACE(len) as usize;
                let control = libc::CMSG_FIRSTHDR(&raw const prepared.header);
                (*control).cmsg_level = libc::SOL_SOCKET;
                (*control).cmsg_type = libc::SCM_RIGHTS;
                (*control).cmsg_len = libc::CMSG_LEN(len) as usize;
                for (at, fd) in fds.iter().enumerate() {
                    let number = fd.as_raw_fd().to_ne_bytes();
                    std::ptr::copy_nonoverlapping(number.as_ptr(), libc::CMSG_DATA(control).add(4 * at), number.len());
                }
            }
        }
        Some(prepared)
    }
}

/// Does one deed by itself.
fn one(deed: &Deed<'_>, trash: &mut [u8]) -> i32 {
    let done = |result: rustix::io::Result<usize>| match result {
        Ok(count) => i32::try_from(count).unwrap_or(i32::MAX),
        Err(error) => -error.raw_os_error(),
    };
    match deed {
        Deed::Take { socket, bytes } => {
            let flags = rustix::net::RecvFlags::DONTWAIT;
            done(rustix::net::recv(socket, &mut trash[..*bytes], flags).map(|(count, _)| count))
        }
        Deed::Send { socket, bytes, fds } => {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(fds)) {
                return -libc::EMSGSIZE;
            }
            let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
            done(rustix::net::sendmsg(socket, &[io::IoSlice::new(bytes)], &mut ancillary, flags))
        }
        Deed::Count { counter } => done(rustix::io::write(counter, &1_u64.to_ne_bytes())),
    }
}

/// Makes what is looked at on a socket stay there: from now on a look goes on behind the last one, and what is taken shortens the way.
pub(crate) fn look_without_taking(socket: BorrowedFd<'_>) -> io::Result<()> {
    let start: libc::c_int = 0;
    // SAFETY: a plain call; the option is one number, which outlives it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const start).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether messages of these sizes certainly find room on a socket, whether or not its peer reads.
pub(crate) fn has_room_for(socket: BorrowedFd<'_>, sizes: impl Iterator<Item = usize>) -> bool {
    // What the kernel reckons for one message beyond its bytes, generously.
    const BEYOND: usize = 2048;
    let mut waiting: libc::c_int = 0;
    // SAFETY: a plain call; the number it writes outlives it.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
    let room = rustix::net::sockopt::socket_send_buffer_size(socket).unwrap_or(0);
    let wanted: usize = sizes.map(|size| size + BEYOND).sum();
    asked == 0 && usize::try_from(waiting).is_ok_and(|waiting| waiting + wanted <= room)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn counter() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK).expect("a counter")
    }

    fn count(counter: &OwnedFd) -> u64 {
        let mut value = [0; 8];
        rustix::io::read(counter, &mut value).map_or(0, |_| u64::from_ne_bytes(value))
    }

    #[test]
    fn what_is_given_is_done_in_order_with_descriptors_whether_at_once_or_one_by_one() {
        for ring in [true, false] {
            let mut doing = Doing::new();
            if !ring {
                doing.ring = None;
            }
            let (ours, theirs) = UnixStream::pair().expect("a pair");
            let (counter, passed) = (counter(), counter());
            rustix::io::write(&passed, &7_u64.to_ne_bytes()).expect("room");
            (&theirs).write_all(b"0123456789").expect("room");
            let message = |number: u32| [number, 1, 0].map(u32::to_ne_bytes).concat();
            let (with, without) = (message(1), message(2));
            let deeds = [
                Deed::Take { socket: ours.as_fd(), bytes: 4 },
                Deed::Send { socket: ours.as_fd(), bytes: &with, fds: vec![passed.as_fd()] },
                Deed::Send { socket: ours.as_fd(), bytes: &without, fds: Vec::new() },
                Deed::Count { counter: counter.as_fd() },
            ];
            assert_eq!(doing.all(&deeds), [4, 12, 12, 8]);
            assert_eq!(count(&counter), 1);
            let mut rest = [0; 6];
            (&ours).read_exact(&mut rest).expect("it is there");
            assert_eq!(&rest, b"456789");
            let mut theirs = warmswap_socket::Connection::new(theirs.into()).expect("a stream");
            let first = theirs.receive().expect("it lives").expect("it is there");
            assert_eq!((first.header.request, first.fds.len(), count(&first.fds[0])), (1, 1, 7));
            let second = theirs.receive().expect("it lives").expect("it is there");
            assert_eq!((second.header.request, second.fds.len()), (2, 0));
        }
    }

    #[test]
    fn descriptors_are_shown_once_for_their_message_and_for_those_before_it() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (mut ours, mut theirs) =
            [ours, theirs].map(|end| warmswap_socket::Connection::new(end.into()).expect("a stream")).into();
        look_without_taking(ours.as_fd()).expect("a socket of this kind can");
        ours.look_only();
        let message = |number: u32, payload: &[u8]| {
            [[number, 1, payload.len() as u32].map(u32::to_ne_bytes).concat(), payload.to_vec()].concat()
        };
        let event = counter();
        theirs.send(&message(1, b""), &[]).expect("room");
        theirs.send(&message(2, b"12345678"), &[event.as_fd()]).expect("room");
        let mut shown = || ours.receive().expect("it lives").map(|message| (message.header.request, message.fds.len()));
        // The first is the kernel's doing: who reads has to know which messages have descriptors.
        assert_eq!([shown(), shown(), shown()], [Some((1, 1)), Some((2, 1)), None]);
    }

    #[test]
    fn a_look_goes_on_behind_the_last_one_over_pieces_with_descriptors_and_taking_moves_it_back() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        look_without_taking(ours.as_fd()).expect("a socket of this kind can");
        let event = counter();
        let mut doing = Doing::new();
        let pieces = [
            Deed::Send { socket: theirs.as_fd(), bytes: b"head", fds: vec![event.as_fd()] },
            Deed::Send { socket: theirs.as_fd(), bytes: b"payload", fds: Vec::new() },
        ];
        assert_eq!(doing.all(&pieces), [4, 7]);
        let look = |length: usize| {
            let mut bytes = vec![0; length];
            let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
            let count = rustix::net::recv(&ours, &mut bytes[..], flags).map_or(0, |(count, _)| count);
            bytes.truncate(count);
            bytes
        };
        assert_eq!((look(4), look(3), look(9)), (b"head".to_vec(), b"pay".to_vec(), b"load".to_vec()));
        assert_eq!(look(1), b"");
        let take = [Deed::Take { socket: ours.as_fd(), bytes: 4 }, Deed::Take { socket: ours.as_fd(), bytes: 7 }];
        assert_eq!(doing.all(&take), [4, 7]);
        (&theirs).write_all(b"next").expect("room");
        assert_eq!(look(9), b"next");
    }
}
