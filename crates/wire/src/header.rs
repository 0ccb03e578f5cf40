//! The twelve bytes before every payload.

use crate::Error;
use crate::bytes::{Put, Reader};

/// Length of the header in bytes: request, flags, payload size.
pub const HEADER_SIZE: usize = 12;

/// Largest payload accepted, in bytes. The largest message of the specification is a crypto session (about 1.1 KiB);
/// rust-vmm's `vhost` has the same bound.
pub const PAYLOAD_SIZE_MAX: u32 = 4096;

const VERSION: u32 = 1;

bitflags::bitflags! {
    /// Flag bits of the header, without the version in bits 0 and 1.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HeaderFlags: u32 {
        /// The message is a reply.
        const REPLY = 1 << 2;
        /// The sender wants an acknowledgement (REPLY_ACK).
        const NEED_REPLY = 1 << 3;
    }
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request id, not yet known to be one of the specification's.
    pub request: u32,
    /// Flags; bits the specification does not name are dropped.
    pub flags: HeaderFlags,
    /// Payload length in bytes, at most [`PAYLOAD_SIZE_MAX`].
    pub size: u32,
}

impl Header {
    /// Decodes and checks version and size.
    ///
    /// # Errors
    /// [`Error::Version`] and [`Error::TooLarge`]: the stream cannot be followed any further.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, Error> {
        let mut reader = Reader::new("header", bytes);
        let (request, flags, size) = (reader.u32()?, reader.u32()?, reader.u32()?);
        if flags & 3 != VERSION {
            return Err(Error::Version { request, found: flags & 3 });
        }
        if size > PAYLOAD_SIZE_MAX {
            return Err(Error::TooLarge { request, found: size, max: PAYLOAD_SIZE_MAX });
        }
        Ok(Header { request, flags: HeaderFlags::from_bits_truncate(flags), size })
    }

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.request);
        out.put_u32(self.flags.bits() | VERSION);
        out.put_u32(self.size);
    }

    /// Whether the message is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags.contains(HeaderFlags::REPLY)
    }

    /// Whether the sender waits for an acknowledgement.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags.contains(HeaderFlags::NEED_REPLY)
    }
}

/// Appends header and payload, fixing the size once the payload is known.
pub(crate) fn frame(out: &mut Vec<u8>, request: u32, flags: HeaderFlags, payload: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    Header { request, flags, size: 0 }.encode(out);
    payload(out);
    let size = u32::try_from(out.len() - start - HEADER_SIZE).expect("payloads are bounded by PAYLOAD_SIZE_MAX");
    out[start + 8..start + HEADER_SIZE].copy_from_slice(&size.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_may_be_as_long_as_the_bound_and_no_longer() {
        for (size, fits) in [(0, true), (PAYLOAD_SIZE_MAX, true), (PAYLOAD_SIZE_MAX + 1, false), (u32::MAX, false)] {
            let mut bytes = Vec::new();
            let header = Header { request: 1, flags: HeaderFlags::empty(), size };
            header.encode(&mut bytes);
            let bytes: [u8; HEADER_SIZE] = bytes.try_into().expect("a header's length");
            assert_eq!(Header::decode(&bytes).is_ok_and(|decoded| decoded == header), fits, "{size}");
        }
    }
}
