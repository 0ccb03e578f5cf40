//! Streams of bytes with descriptors, one for each direction of a connection.

use std::collections::VecDeque;

use warmswap_core::Nanos;
use warmswap_wire::{HEADER_SIZE, Header};

use crate::memory::Obj;

/// A message that has arrived whole.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<Obj>,
}

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    bytes: VecDeque<u8>,
    /// Descriptors, and how many bytes lie before the message they came with.
    fds: VecDeque<(usize, Vec<Obj>)>,
    /// So many bytes may be read before that instant.
    arrivals: VecDeque<(Nanos, usize)>,
    arrived: usize,
    /// The other side has closed it.
    pub(crate) closed: bool,
}

impl Stream {
    /// Sends a message that arrives at `at`.
    pub(crate) fn send(&mut self, bytes: &[u8], fds: Vec<Obj>, at: Nanos) {
        if !fds.is_empty() {
            self.fds.push_back((self.bytes.len(), fds));
        }
        self.bytes.extend(bytes);
        let at = self.arrivals.back().map_or(at, |(last, _)| at.max(*last));
        self.arrivals.push_back((at, bytes.len()));
    }

    /// The other side closes it; of what is still under way the last bytes are lost.
    pub(crate) fn close(&mut self, lost: usize) {
        self.closed = true;
        let kept = self.bytes.len().saturating_sub(lost);
        self.bytes.truncate(kept);
        self.fds.retain(|(at, _)| *at < kept);
    }

    /// The next message, if it has arrived whole by `now`. An error: the stream cannot be followed.
    pub(crate) fn receive(&mut self, now: Nanos) -> Result<Option<Message>, String> {
        while self.arrivals.front().is_some_and(|(at, _)| *at <= now) {
            self.arrived += self.arrivals.pop_front().map_or(0, |it| it.1);
        }
        let there = if self.closed { self.bytes.len() } else { self.arrived.min(self.bytes.len()) };
        if there < HEADER_SIZE {
            return Ok(None);
        }
        let mut head = [0; HEADER_SIZE];
        self.bytes.iter().zip(&mut head).for_each(|(byte, place)| *place = *byte);
        let header = Header::decode(&head).map_err(|error| error.to_string())?;
        let length = HEADER_SIZE + header.size as usize;
        if there < length {
            return Ok(None);
        }
        let payload = self.bytes.drain(..length).skip(HEADER_SIZE).collect();
        self.arrived = self.arrived.saturating_sub(length);
        let mut fds = Vec::new();
        while self.fds.front().is_some_and(|(at, _)| *at < length) {
            fds.extend(self.fds.pop_front().map(|it| it.1).unwrap_or_default());
        }
        self.fds.iter_mut().for_each(|(at, _)| *at -= length);
        Ok(Some(Message { header, payload, fds }))
    }

    /// Whether nothing more will come: what is left is no whole message.
    pub(crate) fn is_over(&self, now: Nanos) -> bool {
        self.closed && self.arrivals.front().is_none_or(|(at, _)| *at <= now || self.bytes.is_empty())
    }

    /// Whether something was sent that nobody has read.
    pub(crate) fn has_some(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Whether some of it has arrived.
    pub(crate) fn has_arrived(&self, now: Nanos) -> bool {
        self.arrived > 0 || self.arrivals.front().is_some_and(|(at, _)| *at <= now)
    }

    /// When the next bytes arrive.
    pub(crate) fn next_arrival(&self) -> Option<Nanos> {
        self.arrivals.front().map(|(at, _)| *at)
    }
}
