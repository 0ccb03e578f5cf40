//! One connection to the back-end under test: any bytes out, whatever comes back in, with a bound on every wait.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use warmswap_wire::{FDS_MAX, FdSlot, HEADER_SIZE, Header, HeaderFlags, Request};

use super::outcome::{Miss, is_gone};

/// Between two tries to connect to a socket that nobody listens on yet.
const AGAIN: Duration = Duration::from_millis(5);

/// What came back.
#[derive(Debug)]
pub(super) enum Heard {
    /// A message.
    Message {
        /// Its header.
        header: Header,
        /// Its payload.
        payload: Vec<u8>,
        /// Its descriptors.
        fds: Vec<OwnedFd>,
    },
    /// The other side has closed the connection.
    Closed,
    /// Nothing, for as long as was waited.
    Silence,
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    /// What a message must have been answered within.
    patience: Duration,
}

impl Link {
    /// Connects to `path`, or that with a 0 behind it; tries until somebody listens there, or `within` has passed.
    pub(super) fn connect(path: &Path, within: Duration, patience: Duration) -> Result<Self, Miss> {
        let deadline = Instant::now() + within;
        loop {
            // Some serve several sockets, and number them.
            let numbered = PathBuf::from(format!("{}0", path.display()));
            match UnixStream::connect(if numbered.exists() { &numbered } else { path }) {
                Ok(stream) => {
                    stream.set_write_timeout(Some(patience))?;
                    return Ok(Link { stream, patience });
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(Miss::Timeout(format!("nobody accepts a connection within {within:?}: {error}")));
                }
                Err(_) => std::thread::sleep(AGAIN),
            }
        }
    }

    /// Closes it in both directions.
    pub(super) fn hang_up(&self) -> Result<(), Miss> {
        match self.stream.shutdown(std::net::Shutdown::Both) {
            Err(error) if !is_gone(error.kind()) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Sends a request, whose descriptor slots are indices into `fds`.
    pub(super) fn send(&self, request: &Request, fds: &[BorrowedFd<'_>], need_reply: bool) -> Result<(), Miss> {
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        let flags = if need_reply { HeaderFlags::NEED_REPLY } else { HeaderFlags::empty() };
        request.encode(flags, &mut bytes, &mut slots);
        let chosen: Vec<BorrowedFd<'_>> = slots.iter().map(|FdSlot(index)| fds[*index as usize]).collect();
        self.send_raw(&bytes, &chosen, request.code().name())
    }

    /// Sends bytes that need not be a message, with descriptors. `what` names them.
    pub(super) fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], what: &str) -> Result<(), Miss> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Miss::Broken(anyhow::anyhow!("{what}: {} descriptors do not fit", fds.len())));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let parts = [IoSlice::new(&bytes[sent..])];
            match rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    sent += count;
                    control.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Miss::Timeout(format!("{what} is not taken"))),
                Err(error) if is_gone(error.kind()) => return Err(Miss::Closed(format!("while {what} was sent"))),
                Err(error) => return Err(Miss::Broken(anyhow::Error::from(error).context(format!("sending {what}")))),
            }
        }
        Ok(())
    }

    /// Waits for the next message, at most as long as a message may take to be answered.
    pub(super) fn hear(&self) -> Result<Heard, Miss> {
        self.hear_within(self.patience)
    }

    /// Waits for the next message, at most `within`.
    pub(super) fn hear_within(&self, within: Duration) -> Result<Heard, Miss> {
        let deadline = Instant::now() + within;
        let mut fds = Vec::new();
        let mut head = [0; HEADER_SIZE];
        if let Some(end) = self.fill(&mut head, &mut fds, deadline)? {
            return Ok(end);
        }
        let header =
            Header::decode(&head).map_err(|error| Miss::Fail(format!("what it sent is no message: {error}")))?;
        let mut payload = vec![0; header.size as usize];
        match self.fill(&mut payload, &mut fds, deadline)? {
            None => Ok(Heard::Message { header, payload, fds }),
            Some(_) => Err(Miss::Fail(format!("it sent a header of {} bytes of payload, and not these", header.size))),
        }
    }

    /// Fills `buffer`. Some: it ended before the first byte.
    fn fill(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>, deadline: Instant) -> Result<Option<Heard>, Miss> {
        let mut filled = 0;
        while filled < buffer.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Some(Heard::Silence));
            }
            self.stream.set_read_timeout(Some(left)).context("a time limit for the connection")?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer[filled..])];
            match rustix::net::recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes == 0 => return Ok(Some(Heard::Closed)),
                Ok(received) => filled += received.bytes,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Some(Heard::Silence)),
                Err(error) if is_gone(error.kind()) => return Ok(Some(Heard::Closed)),
                Err(error) => return Err(Miss::Broken(error.into())),
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
        }
        Ok(None)
    }
}
