//! What can be wrong with a peer's bytes.

use std::fmt;

/// Which of the two sockets of a vhost-user connection a message travelled on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Front-end requests and their replies.
    Front,
    /// Back-end requests (SET_BACKEND_REQ_FD) and their replies.
    Back,
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Channel::Front => "front-end channel",
            Channel::Back => "back-end channel",
        })
    }
}

/// A message that breaks the protocol. The text names the message, what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The version bits of the header are not 1.
    #[error("message {request}: protocol version {found}, expected 1")]
    Version {
        /// Request id of the header.
        request: u32,
        /// Version bits found.
        found: u32,
    },
    /// The payload is larger than any message may be.
    #[error("message {request}: payload of {found} bytes, at most {max} are accepted")]
    TooLarge {
        /// Request id of the header.
        request: u32,
        /// Size found.
        found: u32,
        /// Largest accepted size.
        max: u32,
    },
    /// A request id this codec does not know, or that has moved between revisions of the specification.
    #[error("unknown request {request} on the {channel}")]
    UnknownRequest {
        /// Request id of the header.
        request: u32,
        /// Where it came from.
        channel: Channel,
    },
    /// A reply where a request was due, or the other way round.
    #[error("{request}: reply flag is {found}, expected {expected}")]
    Direction {
        /// Message name.
        request: &'static str,
        /// Flag expected.
        expected: bool,
        /// Flag found.
        found: bool,
    },
    /// A reply to another request than the oldest unanswered one.
    #[error("reply to request {found}, expected a reply to {expected}")]
    Mismatch {
        /// Name of the oldest unanswered request.
        expected: &'static str,
        /// Request id of the reply.
        found: u32,
    },
    /// Payload length differs from what the message needs.
    #[error("{request}: payload of {found} bytes, expected {expected}")]
    Length {
        /// Message name.
        request: &'static str,
        /// Length needed.
        expected: usize,
        /// Length found.
        found: usize,
    },
    /// A field holds a value the specification does not admit.
    #[error("{request}: {field} is {found:#x}, expected {expected}")]
    Value {
        /// Message name.
        request: &'static str,
        /// Field name.
        field: &'static str,
        /// Value found.
        found: u64,
        /// What is admitted, in words.
        expected: &'static str,
    },
    /// The wrong number of descriptors came along.
    #[error("{request}: {found} descriptors, expected {expected}")]
    Descriptors {
        /// Message name.
        request: &'static str,
        /// Number needed.
        expected: usize,
        /// Number found.
        found: usize,
    },
}
