//! Stream sockets that carry vhost-user messages and descriptors, without blocking.
//!
//! A [`Connection`] assembles whole messages with their descriptors, and keeps what its peer has not read yet, up to a bound. It is
//! the same for the broker, which waits for many, and for a backend, which waits for one.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use warmswap_wire::{FDS_MAX, HEADER_SIZE, Header};
use warmswap_zoo::{Animal, loose};

/// Most bytes that may wait for a peer that does not read.
const UNSENT_MAX: usize = 1 << 20;
/// Most descriptors that may wait with them: a whole session has 509 regions and three for each of its rings.
const UNSENT_FDS_MAX: usize = 2048;

/// A message as it came: header, payload, descriptors.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its payload, of the length that the header says.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer has closed it.
    #[error("the connection was closed")]
    Closed,
    /// What came has no header that can be followed.
    #[error("{0}")]
    Protocol(#[from] warmswap_wire::Error),
    /// The system refused.
    #[error("the socket failed: {0}")]
    Socket(#[from] Errno),
    /// More descriptors than any message has.
    #[error("more than {FDS_MAX} descriptors came with one message")]
    TooManyFds,
    /// More waits for the peer than is kept.
    #[error("it does not read what it is sent")]
    Unread,
}

/// One connection: assembles incoming messages, keeps what the peer has not read yet.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    head: [u8; HEADER_SIZE],
    head_len: usize,
    header: Option<Header>,
    payload: Vec<u8>,
    payload_len: usize,
    fds: Vec<OwnedFd>,
    unsent: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    unsent_bytes: usize,
    unsent_fds: usize,
    /// The event queue tells when there is room to write.
    room_watched: bool,
    /// What is received stays where it is.
    looking: bool,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    /// Takes a connected stream socket.
    pub fn new(socket: OwnedFd) -> Result<Self, ConnectionError> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Connection {
            socket,
            head: [0; HEADER_SIZE],
            head_len: 0,
            header: None,
            payload: Vec::new(),
            payload_len: 0,
            fds: Vec::new(),
            unsent: VecDeque::new(),
            unsent_bytes: 0,
            unsent_fds: 0,
            room_watched: false,
            looking: false,
        })
    }

    /// From now on what is received is only looked at, and stays in the socket until somebody takes it away. The socket has to go on
    /// behind its last look by itself (`SO_PEEK_OFF`); the caller sees to that.
    pub fn look_only(&mut self) {
        self.looking = true;
    }

    /// From now on what is received is taken. A message that was looked at in part is received from its beginning.
    pub fn take_from_now_on(&mut self) {
        self.looking = false;
        (self.head_len, self.header, self.payload_len) = (0, None, 0);
        self.payload.clear();
        self.fds.clear();
    }

    /// Whether what is received is only looked at.
    #[must_use]
    pub fn looks_only(&self) -> bool {
        self.looking
    }

    /// Keeps what is left of a message of which the caller has sent so many bytes itself.
    ///
    /// # Errors
    /// As for [`Connection::send`].
    pub fn sent(&mut self, count: usize, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
        if count == bytes.len() {
            return Ok(());
        }
        self.keep(&bytes[count..], if count == 0 { fds } else { &[] })
    }

    /// The next whole message, or none if it has not arrived yet.
    pub fn receive(&mut self) -> Result<Option<Message>, ConnectionError> {
        if self.header.is_none() {
            while self.head_len < HEADER_SIZE {
                let from = self.head_len;
                let mut head = self.head;
                let Some(count) = self.read(&mut head[from..])? else { return Ok(None) };
                self.head = head;
                self.head_len += count;
                if loose(Animal::PartialHeader) {
                    break;
                }
            }
            let header = Header::decode(&self.head)?;
            self.payload = vec![0; header.size as usize];
            self.payload_len = 0;
            self.header = Some(header);
        }
        while self.payload_len < self.payload.len() {
            let mut payload = std::mem::take(&mut self.payload);
            let result = self.read(&mut payload[self.payload_len..]);
            self.payload = payload;
            match result? {
                Some(count) => self.payload_len += count,
                None => return Ok(None),
            }
        }
        self.head_len = 0;
        let header = self.header.take().expect("decoded above");
        Ok(Some(Message { header, payload: std::mem::take(&mut self.payload), fds: std::mem::take(&mut self.fds) }))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<usize>, ConnectionError> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let look = if self.looking { RecvFlags::PEEK } else { RecvFlags::empty() };
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | look;
        let received = loop {
            match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(into)], &mut ancillary, flags) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Err(error) => return Err(error.into()),
            }
        };
        // Every look at a part of what was sent with descriptors shows them again.
        let seen = self.looking && !self.fds.is_empty();
        for message in ancillary.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(fds) if !seen => self.fds.extend(fds),
                _ => {}
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > FDS_MAX {
            return Err(ConnectionError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(ConnectionError::Closed);
        }
        Ok(Some(received.bytes))
    }

    /// Sends one message, or keeps it until the peer reads.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
        self.flush()?;
        if self.unsent.is_empty() {
            let sent = self.transmit(bytes, fds)?;
            if sent == bytes.len() {
                return Ok(());
            }
            let rest = if sent == 0 { fds } else { &[] };
            return self.keep(&bytes[sent..], rest);
        }
        self.keep(bytes, fds)
    }

    fn keep(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
        self.unsent_bytes += bytes.len();
        self.unsent_fds += fds.len();
        if self.unsent_bytes > UNSENT_MAX || self.unsent_fds > UNSENT_FDS_MAX {
            return Err(ConnectionError::Unread);
        }
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>();
        let fds = fds.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?;
        self.unsent.push_back((bytes.to_vec(), fds));
        Ok(())
    }

    /// Whether the peer has closed its end.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&none)), Ok(count) if count > 0)
    }

    /// Whether the event queue must now begin (true) or cease (false) to tell when there is room to write; none if it does what it
    /// should. The caller sees to it.
    pub fn room_wanted(&mut self) -> Option<bool> {
        let wanted = !self.unsent.is_empty();
        (std::mem::replace(&mut self.room_watched, wanted) != wanted).then_some(wanted)
    }

    /// Whether something waits for the peer to read.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what was kept.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        while let Some((bytes, fds)) = self.unsent.pop_front() {
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let sent = self.transmit(&bytes, &borrowed)?;
            self.unsent_bytes -= sent;
            if sent > 0 {
                self.unsent_fds -= fds.len();
            }
            if sent < bytes.len() {
                let rest = if sent == 0 { fds } else { Vec::new() };
                self.unsent.push_front((bytes[sent..].to_vec(), rest));
                break;
            }
        }
        Ok(())
    }

    fn transmit(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, ConnectionError> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ConnectionError::TooManyFds);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(sent) => return Ok(sent),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Listens at a path, without blocking, for `backlog` connections at a time. A socket that nobody serves any more is replaced; one that is
/// served is somebody else's, and so is what is no socket.
///
/// # Errors
/// What lies there is somebody else's, or what the system says; with the path.
pub fn listen(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    let named = |error: Errno| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let refuse = |kind, text| Err(io::Error::new(kind, format!("{}: {text}", path.display())));
    let address = SocketAddrUnix::new(path).map_err(named)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return refuse(io::ErrorKind::AlreadyExists, "this exists and is not a socket: it is left alone");
        }
        // As many wait for its owner already as may.
        if matches!(rustix::net::connect(socket()?, &address), Ok(()) | Err(Errno::AGAIN)) {
            return refuse(io::ErrorKind::AddrInUse, "another process listens there");
        }
        std::fs::remove_file(path)?;
    }
    let listener = socket()?;
    rustix::net::bind(&listener, &address).map_err(named)?;
    rustix::net::listen(&listener, backlog).map_err(named)?;
    Ok(listener)
}

#[cfg(test)]
mod tests;
