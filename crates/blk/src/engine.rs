//! How blocks are read and written: the seam at which other kinds of storage come in.
//!
//! An [`Engine`] belongs to one worker thread and does what its queues ask for: on a raw local image by io_uring ([`uring`]) or by
//! plain calls ([`sync`]). An image format, or a store behind a network, would be one more of them: it gets offsets and pieces of guest
//! memory, and answers by tag. It is also what the worker sleeps in, because both its completions and the driver's kicks end the sleep.

pub(crate) mod sync;
pub(crate) mod uring;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::memory::Piece;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Into the pieces.
    Read,
    /// From the pieces.
    Write {
        /// It is done only when it is on stable storage.
        durable: bool,
    },
    /// What was written before is on stable storage when this is done.
    Flush,
    /// The range may be forgotten.
    Discard,
    /// The range reads as zeroes.
    Zeroes {
        /// Its space may be given back.
        unmap: bool,
    },
}

/// One thing asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Io<'a> {
    /// Comes back with the answer.
    pub(crate) tag: Tag,
    pub(crate) op: Op,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Guest memory. It stays where it is until the answer came; so does the slice itself.
    pub(crate) pieces: &'a [Piece],
}

/// A request: its queue and its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) queue: u16,
    pub(crate) head: u16,
}

/// What a descriptor is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    /// Kicks of that queue.
    Kick(u16),
    /// Commands of the control thread.
    Commands,
}

/// What an engine has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A request was done: bytes, or a negative error number.
    Done(Tag, i64),
    /// A descriptor is readable. It is not watched any more.
    Ready(Watch),
}

/// See the module.
pub(crate) trait Engine {
    /// Starts one. `Some`: it is done already, with bytes or a negative error number; there is no answer to come.
    fn start(&mut self, io: &Io<'_>) -> Option<i64>;

    /// Makes sure that everything started is under way.
    fn submit(&mut self) -> io::Result<()>;

    /// Takes the next answer that is there. Does not wait.
    fn answer(&mut self) -> Option<Answer>;

    /// Whether an answer is there, as cheaply as possible.
    fn has_answer(&mut self) -> bool;

    /// Tells once when `fd` is readable. Its descriptor stays open until then or until [`Engine::unwatch`].
    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()>;

    /// Ends a watch; an answer of it that is on its way still comes.
    fn unwatch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()>;

    /// Submits, and sleeps until there is an answer, at most that long.
    fn sleep(&mut self, at_most: Option<Duration>) -> io::Result<()>;
}

/// What the system said to a call: bytes, or a negative error number.
pub(crate) fn result_of(result: isize) -> i64 {
    if result < 0 { -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)) } else { result as i64 }
}
