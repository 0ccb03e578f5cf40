//! Device state on its way from the old primary to the shadow: pipes, each emptied or filled by a thread that ends with it.
//!
//! A backend that hangs in the middle keeps its thread until [`PATIENCE`] is over, and nobody else waits for it: the core gives up
//! earlier and tells the primary to go on.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pipe::PipeFlags;
use warmswap_core::{BackendId, StateDirection};

use super::{Command, Commander};

/// A state that is larger is refused: what is open in a file system takes some hundred bytes a file.
pub(crate) const STATE_MAX: u64 = 256 << 20;
/// Longest wait for a backend that neither reads nor writes. More than the core's own bound.
const PATIENCE: Duration = Duration::from_secs(10);
/// Read or written at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// A state that was received, or how much was sent.
#[derive(Debug)]
pub(crate) enum Moved {
    Received(Vec<u8>),
    Sent(u64),
}

/// Makes channels for the state of backends.
#[derive(Clone, Debug)]
pub(crate) struct StateMover {
    commander: Commander,
}

impl StateMover {
    pub(crate) fn new(commander: Commander) -> Self {
        StateMover { commander }
    }

    /// A channel for the state of a backend, as the end that the backend is given. Into a backend goes `state`. What came of it comes
    /// back as a command.
    pub(crate) fn open(
        &self,
        device: u16,
        backend: BackendId,
        direction: StateDirection,
        state: Vec<u8>,
    ) -> std::io::Result<OwnedFd> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (theirs, ours) = match direction {
            StateDirection::Save => (writer, reader),
            StateDirection::Load => (reader, writer),
        };
        // Of our end alone: each end of a pipe is a description of its own.
        rustix::fs::fcntl_setfl(&ours, rustix::fs::fcntl_getfl(&ours)? | rustix::fs::OFlags::NONBLOCK)?;
        let commander = self.commander.clone();
        std::thread::Builder::new().name("state".to_owned()).spawn(move || {
            let moved = match direction {
                StateDirection::Save => receive(ours).map(Moved::Received),
                StateDirection::Load => send(ours, &state).map(Moved::Sent),
            };
            commander.send(Command::StateMoved { device, backend, moved });
        })?;
        Ok(theirs)
    }
}

/// Reads until the backend closes its end.
fn receive(pipe: OwnedFd) -> Result<Vec<u8>, String> {
    let mut pipe = std::fs::File::from(pipe);
    let (mut state, mut chunk) = (Vec::new(), vec![0; CHUNK]);
    loop {
        wait(&pipe, PollFlags::IN)?;
        match pipe.read(&mut chunk) {
            Ok(0) => return Ok(state),
            Ok(read) if state.len() as u64 + read as u64 > STATE_MAX => {
                return Err(format!("it has more than {STATE_MAX} bytes"));
            }
            Ok(read) => state.extend_from_slice(&chunk[..read]),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Writes everything and closes the pipe, which is its end.
fn send(pipe: OwnedFd, mut state: &[u8]) -> Result<u64, String> {
    let size = state.len() as u64;
    let mut pipe = std::fs::File::from(pipe);
    while !state.is_empty() {
        wait(&pipe, PollFlags::OUT)?;
        match pipe.write(&state[..state.len().min(CHUNK)]) {
            Ok(written) => state = &state[written..],
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(size)
}

fn is_passing(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted)
}

/// Waits until the backend has done something.
fn wait(pipe: &impl AsFd, what: PollFlags) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(pipe, what)], Some(&left)) {
            Ok(0) => return Err(format!("the backend did nothing for {} s", PATIENCE.as_secs())),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received_whole() {
        let state: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe");
        let sent = state.clone();
        let sender = std::thread::spawn(move || send(writer, &sent));
        assert_eq!(receive(reader).expect("it is whole"), state);
        assert_eq!(sender.join().expect("it ends"), Ok(state.len() as u64));
    }

    #[test]
    fn a_reader_that_goes_away_is_an_error() {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe");
        drop(reader);
        let error = send(writer, b"state").expect_err("nobody reads it");
        assert!(error.contains("Broken pipe"), "{error}");
    }
}
