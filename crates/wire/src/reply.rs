//! Replies of the back-end to front-end requests, and of either side to a wish for acknowledgement.

use crate::bytes::{Put, Reader};
use crate::header::frame;
use crate::payload::{ConfigSpace, FdSlot, InflightDescription, LogRegion, VringState, at_most_one_fd, no_fds};
use crate::{Error, Header, HeaderFlags};
use serde::{Deserialize, Serialize};

/// The shape of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplyKind {
    /// REPLY_ACK: zero is success.
    Ack,
    /// One number.
    U64,
    /// SET_LOG_BASE: nothing, one number (libvhost-user) or the log's description (rust-vmm's `vhost`); implementations differ.
    Log,
    /// Ring and base.
    VringState,
    /// Part of the configuration space; empty on failure.
    Config,
    /// In-flight region and its descriptor.
    Inflight,
    /// A crypto session, opaque.
    Crypto,
    /// A descriptor, with or without a number.
    Fd,
    /// A number, and a descriptor unless bit 8 of the number says otherwise.
    U64Fd,
}

/// A decoded reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number: an acknowledgement, features, a count.
    U64(u64),
    /// Nothing.
    Empty,
    /// The dirty log as it was described in the request.
    Log(LogRegion),
    /// Ring and base.
    VringState(VringState),
    /// Part of the configuration space. `None`: the back-end could not serve the request.
    Config(Option<ConfigSpace>),
    /// In-flight region. `fd` is absent where the back-end could not make one.
    Inflight {
        /// Where in the descriptor the region lies.
        region: InflightDescription,
        /// The memory.
        fd: Option<FdSlot>,
    },
    /// A crypto session, opaque.
    Crypto(Vec<u8>),
    /// A number and possibly a descriptor.
    Fd {
        /// The number, zero where there was none.
        value: u64,
        /// The descriptor.
        fd: Option<FdSlot>,
    },
}

/// A part of the configuration space without what follows it: yc-libvhost-server answers with as many bytes as were asked for, and says in
/// `size` how many of them it has.
fn without_padding(payload: &[u8]) -> &[u8] {
    const HEAD: usize = 12;
    let size = payload.get(4..8).map(|size| u32::from_ne_bytes(size.try_into().expect("four bytes")) as usize);
    size.and_then(|size| payload.get(..HEAD.saturating_add(size))).unwrap_or(payload)
}

impl Reply {
    /// Decodes the reply to the request called `name`, whose id is `request`.
    ///
    /// # Errors
    /// A reply to another request, wrong lengths and wrong numbers of descriptors.
    pub fn decode(
        request: u32,
        name: &'static str,
        kind: ReplyKind,
        header: &Header,
        payload: &[u8],
        fds: &[FdSlot],
    ) -> Result<Self, Error> {
        if !header.is_reply() {
            return Err(Error::Direction { request: name, expected: true, found: false });
        }
        if header.request != request {
            return Err(Error::Mismatch { expected: name, found: header.request });
        }
        if !matches!(kind, ReplyKind::Inflight | ReplyKind::Fd | ReplyKind::U64Fd) {
            no_fds(name, fds)?;
        }
        let number = || Reader::exactly(name, payload, 8)?.u64();
        match kind {
            ReplyKind::Ack | ReplyKind::U64 => number().map(Reply::U64),
            ReplyKind::Log if payload.is_empty() => Ok(Reply::Empty),
            ReplyKind::Log if payload.len() == 16 => LogRegion::decode(name, payload).map(Reply::Log),
            ReplyKind::Log => number().map(Reply::U64),
            ReplyKind::VringState => VringState::decode(name, payload).map(Reply::VringState),
            ReplyKind::Config if payload.is_empty() => Ok(Reply::Config(None)),
            // rust-vmm's `vhost` says that it failed with a description of no bytes.
            ReplyKind::Config => {
                let config = ConfigSpace::decode(name, without_padding(payload))?;
                Ok(Reply::Config(Some(config).filter(|config| !config.bytes.is_empty())))
            }
            ReplyKind::Inflight => Ok(Reply::Inflight {
                region: InflightDescription::decode(name, payload)?,
                fd: at_most_one_fd(name, fds)?,
            }),
            ReplyKind::Crypto => Ok(Reply::Crypto(payload.to_vec())),
            ReplyKind::Fd | ReplyKind::U64Fd => {
                let value = if payload.is_empty() { 0 } else { number()? };
                Ok(Reply::Fd { value, fd: at_most_one_fd(name, fds)? })
            }
        }
    }

    /// Appends the reply to request `request`, and its descriptors.
    pub fn encode(&self, request: u32, out: &mut Vec<u8>, fds: &mut Vec<FdSlot>) {
        frame(out, request, HeaderFlags::REPLY, |out| match self {
            Reply::U64(value) => out.put_u64(*value),
            Reply::Empty | Reply::Config(None) => {}
            Reply::Log(region) => region.encode(out),
            Reply::VringState(state) => state.encode(out),
            Reply::Config(Some(config)) => config.encode(out),
            Reply::Inflight { region, .. } => region.encode(out),
            Reply::Crypto(bytes) => out.extend_from_slice(bytes),
            Reply::Fd { value, .. } => out.put_u64(*value),
        });
        match self {
            Reply::Inflight { fd, .. } | Reply::Fd { fd, .. } => fds.extend(fd),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(size: u32, payload: usize) -> Result<Reply, Error> {
        let header = Header { request: 24, flags: HeaderFlags::REPLY, size: 12 + payload as u32 };
        let mut bytes = Vec::new();
        [0, size, 0].iter().for_each(|word: &u32| bytes.put_u32(*word));
        bytes.resize(12 + payload, 7);
        Reply::decode(24, "GET_CONFIG", ReplyKind::Config, &header, &bytes, &[])
    }

    #[test]
    fn configuration_that_is_padded_to_what_was_asked_for_is_what_its_size_says() {
        let part = ConfigSpace { offset: 0, flags: 0, bytes: vec![7; 60] };
        assert_eq!(config(60, 256), Ok(Reply::Config(Some(part))));
        assert_eq!(config(0, 56), Ok(Reply::Config(None)));
        config(60, 59).expect_err("a byte is missing");
        config(u32::MAX, 256).expect_err("it does not say how many there are");
    }
}
