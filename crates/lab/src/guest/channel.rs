//! One vhost-user connection: messages out, replies in, with a bound on every wait.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use warmswap_wire::{BackendRequest, FdSlot, HEADER_SIZE, Header, HeaderFlags, Reply, Request};

/// Most descriptors of one message (SET_MEM_TABLE).
const MESSAGE_FDS_MAX: usize = 8;

/// For which messages an acknowledgement is asked, where REPLY_ACK was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acks {
    /// For those QEMU 10 asks for: memory table, memory regions, ring enable.
    Qemu,
    /// For every message that may be acknowledged.
    All,
    /// For none.
    None,
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    message: Vec<u8>,
}

impl Channel {
    /// Connects to `path`. Every later wait is bounded by `timeout`: the front-end of a VMM has no such bound, so
    /// reaching it is a failure of the other side.
    pub(crate) fn connect(path: &Path, timeout: Duration) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Channel { stream, message: Vec::with_capacity(512) })
    }

    /// Sends `request`, whose descriptor slots are indices into `fds`, and reads the reply if there will be one.
    pub(crate) fn call(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        acknowledge: bool,
    ) -> anyhow::Result<Option<(Reply, Vec<OwnedFd>)>> {
        let code = request.code();
        self.send(request, fds, acknowledge && !code.always_replies())
            .with_context(|| format!("sending {}", code.name()))?;
        if !acknowledge && !code.always_replies() {
            return Ok(None);
        }
        let (reply, fds) =
            self.receive(request).with_context(|| format!("waiting for the reply to {}", code.name()))?;
        if !code.always_replies() && reply != Reply::U64(0) {
            bail!("{} was refused: {reply:?}", code.name());
        }
        Ok(Some((reply, fds)))
    }

    fn send(&mut self, request: &Request, fds: &[BorrowedFd<'_>], need_reply: bool) -> anyhow::Result<()> {
        let mut slots = Vec::new();
        self.message.clear();
        let flags = if need_reply { HeaderFlags::NEED_REPLY } else { HeaderFlags::empty() };
        request.encode(flags, &mut self.message, &mut slots);
        let chosen: Vec<BorrowedFd<'_>> = slots.iter().map(|FdSlot(index)| fds[*index as usize]).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !chosen.is_empty() {
            ensure!(control.push(SendAncillaryMessage::ScmRights(&chosen)), "too many descriptors");
        }
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.stream, &[IoSlice::new(&self.message)], &mut control, SendFlags::NOSIGNAL)
        })?;
        ensure!(sent == self.message.len(), "only {sent} of {} bytes were taken", self.message.len());
        Ok(())
    }

    fn receive(&mut self, request: &Request) -> anyhow::Result<(Reply, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_SIZE];
        self.read_exact(&mut header, &mut fds)?;
        let header = Header::decode(&header)?;
        let mut payload = vec![0; header.size as usize];
        self.read_exact(&mut payload, &mut fds)?;
        let slots: Vec<FdSlot> = (0..fds.len() as u32).map(FdSlot).collect();
        let code = request.code();
        let reply = Reply::decode(code as u32, code.name(), code.reply_kind(), &header, &payload, &slots)
            .or_else(|error| acknowledged(request, &header, &payload).ok_or(error))?;
        Ok((reply, fds))
    }

    fn read_exact(&mut self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> anyhow::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer[filled..])];
            let received = match rustix::net::recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => bail!("no answer in time"),
                Err(error) => return Err(error.into()),
            };
            ensure!(received > 0, "the other side hung up");
            filled += received;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
        }
        Ok(())
    }
}

/// Our end of the back-end's own channel (SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub(crate) struct BackendChannel {
    stream: UnixStream,
    received: Vec<u8>,
}

impl BackendChannel {
    /// A channel, and the end that goes to the back-end.
    pub(crate) fn pair() -> std::io::Result<(Self, UnixStream)> {
        let (stream, theirs) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        Ok((BackendChannel { stream, received: Vec::new() }, theirs))
    }

    /// Reads what is there and acknowledges what asks for it. Descriptors that come along are dropped by the kernel, for
    /// no space is offered for them.
    pub(crate) fn serve(&mut self) -> anyhow::Result<usize> {
        let mut part = [0; 512];
        loop {
            match self.stream.read(&mut part) {
                Ok(0) => break,
                Ok(count) => self.received.extend_from_slice(&part[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("reading the back-end's channel"),
            }
        }
        let mut served = 0;
        while let Some(header) = self.received.first_chunk::<HEADER_SIZE>() {
            let header = Header::decode(header)?;
            let end = HEADER_SIZE + header.size as usize;
            let Some(payload) = self.received.get(HEADER_SIZE..end) else { break };
            BackendRequest::decode(&header, payload, &[])?;
            if header.needs_reply() {
                let mut reply = Vec::new();
                Reply::U64(0).encode(header.request, &mut reply, &mut Vec::new());
                self.stream.write_all(&reply).context("answering the back-end")?;
            }
            self.received.drain(..end);
            served += 1;
        }
        Ok(served)
    }
}

/// A message with a reply of its own may be acknowledged with a plain number where it failed.
fn acknowledged(request: &Request, header: &Header, payload: &[u8]) -> Option<Reply> {
    let value = u64::from_ne_bytes(payload.try_into().ok()?);
    (header.is_reply() && header.request == request.code() as u32).then_some(Reply::U64(value))
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_end_is_answered_once_its_message_is_whole() {
        let (mut channel, mut theirs) = BackendChannel::pair().expect("pair");
        let mut message = Vec::new();
        BackendRequest::ConfigChange.encode(HeaderFlags::NEED_REPLY, &mut message, &mut Vec::new());
        theirs.write_all(&message[..5]).expect("write");
        assert_eq!(channel.serve().expect("serve"), 0);
        theirs.write_all(&message[5..]).expect("write");
        assert_eq!(channel.serve().expect("serve"), 1);
        let mut reply = [0; HEADER_SIZE + 8];
        theirs.read_exact(&mut reply).expect("an answer");
        assert!(Header::decode(reply.first_chunk().expect("header")).expect("header").is_reply());
    }
}
