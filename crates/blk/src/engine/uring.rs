//! io_uring: many requests at once, handed to the kernel and taken back in batches.
//!
//! One ring for each worker, used by that thread alone, with completions worked off only when it asks for them (`DEFER_TASKRUN`), so
//! that no request interrupts another. The ring can be used for nothing but what is needed here: everything else is forbidden to it before
//! it is enabled.
//!
//! Nothing is registered. The kernel gives a registered file back long after its process is gone, 30 to 75 ms were seen, and whoever has to
//! prove that the process does no I/O any more waits as long. Registered guest memory would be pinned as a whole, which a shadow
//! beside every device cannot afford. Neither made a difference to a disk (fio, 4 KiB reads at depth 32: 82,000 per second with and without).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::{Answer, Engine, Io, Op, Tag, Watch};
use crate::image::Image;

/// Entries of the submission queue; more requests are submitted in several turns.
const ENTRIES: u32 = 512;
/// Entries that the kernel is told of at once. The block layer holds back what comes in one call until the call ends: a disk that could
/// begin with the first request waits for the last. On a virtio disk, 32 at a time against 8 cost 15 to 25 % of the 4 KiB reads per second;
/// fewer than 8 brought nothing, and cost processor time.
const SUBMITTED_AT_ONCE: usize = 8;
/// Completions that may wait: more than these wait in the kernel.
const COMPLETIONS: u32 = 4096;

// What an entry is for, in the upper half of its user data.
const KIND_IO: u64 = 0;
const KIND_KICK: u64 = 1;
const KIND_COMMANDS: u64 = 2;
const KIND_NOBODY: u64 = 3;

/// See the module.
pub(crate) struct Uring {
    image: Arc<Image>,
    ring: IoUring,
    answers: VecDeque<Answer>,
    /// Entries that the kernel has not been told of.
    unsubmitted: usize,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("unsubmitted", &self.unsubmitted).finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring for the calling thread.
    ///
    /// # Errors
    /// The system forbids io_uring, or its version lacks what is needed.
    pub(crate) fn new(image: Arc<Image>) -> io::Result<Self> {
        let ring = build()?;
        let codes = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::PollRemove::CODE,
        ];
        let mut restrictions: Vec<Restriction> = codes.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_allowed(squeue::Flags::empty().bits()));
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        Ok(Uring { image, ring, answers: VecDeque::with_capacity(COMPLETIONS as usize), unsubmitted: 0 })
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what an entry points to (pieces, and the slice of them) stays where it is until its answer has come, as
            // `Engine::start` has it.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.unsubmitted += 1;
                if self.unsubmitted >= SUBMITTED_AT_ONCE {
                    // That it fails is seen at the next call.
                    let _later = self.submit();
                }
                return;
            }
            // A full queue is emptied by telling the kernel of it; it takes all or says why not.
            self.submit().expect("the kernel takes entries that it has room for");
        }
    }

    fn entry(&self, io: &Io<'_>) -> squeue::Entry {
        let file = |number: usize| Fd(self.image.file(number).as_raw_fd());
        let user_data = KIND_IO << 32 | u64::from(io.tag.queue) << 16 | u64::from(io.tag.head);
        let entry = match io.op {
            Op::Read | Op::Write { .. } => self.transfer(io, file(self.image.file_for(io.offset, io.pieces))),
            Op::Flush => opcode::Fsync::new(file(0)).flags(FsyncFlags::DATASYNC).build(),
            Op::Discard | Op::Zeroes { .. } => {
                let mode = match io.op {
                    Op::Zeroes { unmap } => self.image.zeroes_mode(unmap),
                    _ => Image::DISCARD_MODE,
                };
                opcode::Fallocate::new(file(0), io.len)
                    .offset(io.offset)
                    .mode(i32::try_from(mode.bits()).expect("a few low bits"))
                    .build()
            }
        };
        entry.user_data(user_data)
    }

    fn transfer(&self, io: &Io<'_>, file: Fd) -> squeue::Entry {
        let flags = if io.op == (Op::Write { durable: true }) { libc::RWF_DSYNC } else { 0 };
        if let [piece] = io.pieces {
            let len = u32::try_from(piece.len).unwrap_or(LEN_MAX).min(LEN_MAX);
            return match io.op {
                Op::Read => opcode::Read::new(file, piece.as_ptr(), len).offset(io.offset).build(),
                _ => opcode::Write::new(file, piece.as_ptr(), len).offset(io.offset).rw_flags(flags).build(),
            };
        }
        let vector = io.pieces.as_ptr().cast::<libc::iovec>();
        let count = u32::try_from(io.pieces.len()).expect("bounded by PIECES_MAX");
        match io.op {
            Op::Read => opcode::Readv::new(file, vector, count).offset(io.offset).build(),
            _ => opcode::Writev::new(file, vector, count).offset(io.offset).rw_flags(flags).build(),
        }
    }

    fn take_completions(&mut self) {
        let answers = &mut self.answers;
        self.ring.completion().for_each(|entry| {
            let (data, result) = (entry.user_data(), entry.result());
            let low = data as u32;
            match data >> 32 {
                KIND_IO => {
                    let tag = Tag { queue: (low >> 16) as u16, head: low as u16 };
                    answers.push_back(Answer::Done(tag, i64::from(result)));
                }
                KIND_KICK if result != -libc::ECANCELED => answers.push_back(Answer::Ready(Watch::Kick(low as u16))),
                KIND_COMMANDS if result != -libc::ECANCELED => answers.push_back(Answer::Ready(Watch::Commands)),
                _ => {}
            }
        });
    }

    fn enter(&mut self, want: usize, at_most: Option<Duration>) -> io::Result<()> {
        let result = match at_most {
            None => self.ring.submitter().submit_and_wait(want),
            Some(at_most) => {
                let timeout = Timespec::from(at_most);
                self.ring.submitter().submit_with_args(want, &SubmitArgs::new().timespec(&timeout))
            }
        };
        match result {
            Ok(taken) => {
                self.unsubmitted -= taken.min(self.unsubmitted);
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                // A signal, the end of the time, or completions that are to be taken first: the caller looks again.
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => {
                    self.unsubmitted = self.ring.submission().len();
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }
}

/// What one read or write takes at most (`MAX_RW_COUNT`).
const LEN_MAX: u32 = 0x7fff_f000;

fn watch_data(watch: Watch) -> u64 {
    match watch {
        Watch::Kick(queue) => KIND_KICK << 32 | u64::from(queue),
        Watch::Commands => KIND_COMMANDS << 32,
    }
}

/// The best ring that the kernel makes: disabled until its restrictions are set. Kernels before 6.1 have no `DEFER_TASKRUN`.
fn build() -> io::Result<IoUring> {
    let best = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_clamp()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_r_disabled()
        .dontfork()
        .build(ENTRIES);
    match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(COMPLETIONS).setup_clamp().setup_r_disabled().dontfork().build(ENTRIES)
        }
        result => result,
    }
}

impl Engine for Uring {
    #[inline]
    fn start(&mut self, io: &Io<'_>) -> Option<i64> {
        let entry = self.entry(io);
        self.push(&entry);
        None
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.unsubmitted > 0 { self.enter(0, None) } else { Ok(()) }
    }

    fn answer(&mut self) -> Option<Answer> {
        if self.answers.is_empty() {
            self.take_completions();
        }
        self.answers.pop_front()
    }

    fn has_answer(&mut self) -> bool {
        if self.answers.is_empty() && self.ring.submission().taskrun() {
            // Something is done, and only waits for us to look after it. That it fails is seen at the next call.
            let _later = self.enter(0, None);
        }
        !self.answers.is_empty() || !self.ring.completion().is_empty()
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        let poll = opcode::PollAdd::new(Fd(fd.as_raw_fd()), u32::from(libc::POLLIN.cast_unsigned())).build();
        self.push(&poll.user_data(watch_data(watch)));
        Ok(())
    }

    fn unwatch(&mut self, _fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        self.push(&opcode::PollRemove::new(watch_data(watch)).build().user_data(KIND_NOBODY << 32));
        self.submit()
    }

    fn sleep(&mut self, at_most: Option<Duration>) -> io::Result<()> {
        if self.answers.is_empty() { self.enter(1, at_most) } else { self.submit() }
    }
}
