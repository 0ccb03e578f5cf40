//! Plain calls, one after the other, on the worker's own thread. For images in memory, where a call is all there is to wait for, and
//! for systems without io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use super::{Answer, Engine, Io, Op, Watch, result_of};
use crate::image::Image;
use crate::memory::Piece;

/// Descriptors that are told of at a time.
const EVENTS_MAX: usize = 32;

/// See the module.
#[derive(Debug)]
pub(crate) struct Sync {
    image: Arc<Image>,
    epoll: OwnedFd,
    answers: VecDeque<Answer>,
}

impl Sync {
    /// An engine on that image.
    pub(crate) fn new(image: Arc<Image>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Sync { image, epoll, answers: VecDeque::with_capacity(EVENTS_MAX) })
    }

    fn wait(&mut self, at_most: Option<Duration>) -> io::Result<()> {
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; EVENTS_MAX];
        let timeout = at_most.map(|it| it.try_into().expect("a few milliseconds"));
        let count = match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        self.answers.extend(events[..count].iter().map(|event| Answer::Ready(watch_of(event.data.u64()))));
        Ok(())
    }
}

const COMMANDS: u64 = u64::MAX;

fn number_of(watch: Watch) -> u64 {
    match watch {
        Watch::Kick(queue) => u64::from(queue),
        Watch::Commands => COMMANDS,
    }
}

fn watch_of(number: u64) -> Watch {
    u16::try_from(number).map_or(Watch::Commands, Watch::Kick)
}

impl Engine for Sync {
    #[inline]
    fn start(&mut self, io: &Io<'_>) -> Option<i64> {
        Some(perform(&self.image, io))
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    fn has_answer(&mut self) -> bool {
        !self.answers.is_empty()
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        match epoll::modify(&self.epoll, fd, EventData::new_u64(number_of(watch)), flags) {
            Err(Errno::NOENT) => Ok(epoll::add(&self.epoll, fd, EventData::new_u64(number_of(watch)), flags)?),
            result => Ok(result?),
        }
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>, _watch: Watch) -> io::Result<()> {
        match epoll::delete(&self.epoll, fd) {
            Err(Errno::NOENT) => Ok(()),
            result => Ok(result?),
        }
    }

    fn sleep(&mut self, at_most: Option<Duration>) -> io::Result<()> {
        if self.answers.is_empty() { self.wait(at_most) } else { Ok(()) }
    }
}

/// Does one thing by plain calls, whole or up to an error. What had been done before an error does not count.
pub(crate) fn perform(image: &Image, io: &Io<'_>) -> i64 {
    match io.op {
        Op::Read | Op::Write { .. } => transfer(image, io),
        Op::Flush => match rustix::fs::fdatasync(image.file(0)) {
            Ok(()) => 0,
            Err(error) => -i64::from(error.raw_os_error()),
        },
        Op::Discard => fallocate(image, io, Image::DISCARD_MODE),
        Op::Zeroes { unmap } => fallocate(image, io, image.zeroes_mode(unmap)),
    }
}

fn fallocate(image: &Image, io: &Io<'_>, mode: rustix::fs::FallocateFlags) -> i64 {
    match rustix::fs::fallocate(image.file(0), mode, io.offset, io.len) {
        Ok(()) => 0,
        Err(error) => -i64::from(error.raw_os_error()),
    }
}

#[inline]
fn transfer(image: &Image, io: &Io<'_>) -> i64 {
    let file = image.file(image.file_for(io.offset, io.pieces)).as_raw_fd();
    let result = match (io.op, io.pieces) {
        // SAFETY: the piece lies in a mapping that lives as long as the request; the kernel checks the address besides.
        (Op::Read, [piece]) => unsafe {
            libc::pread64(file, piece.as_ptr().cast(), piece.len, io.offset.cast_signed())
        },
        // SAFETY: as above.
        (Op::Write { durable: false }, [piece]) => unsafe {
            libc::pwrite64(file, piece.as_ptr().cast(), piece.len, io.offset.cast_signed())
        },
        (op, pieces) => {
            let flags = if op == (Op::Write { durable: true }) { libc::RWF_DSYNC } else { 0 };
            vectored(file, op, pieces, io.offset, flags)
        }
    };
    result_of(result)
}

fn vectored(file: i32, op: Op, pieces: &[Piece], offset: u64, flags: libc::c_int) -> isize {
    let count = libc::c_int::try_from(pieces.len()).expect("bounded by PIECES_MAX");
    let vector = pieces.as_ptr().cast::<libc::iovec>();
    // SAFETY: pieces have the layout of iovecs; their memory lives as long as the request.
    unsafe {
        match op {
            Op::Read => libc::preadv64v2(file, vector, count, offset.cast_signed(), flags),
            _ => libc::pwritev64v2(file, vector, count, offset.cast_signed(), flags),
        }
    }
}
