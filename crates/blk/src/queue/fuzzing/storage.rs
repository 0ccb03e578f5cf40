//! The storage: an engine that believes nothing.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{BYTES, MAPS, QUEUE, SECTORS};
use crate::chain::PIECES_MAX;
use crate::engine::sync::perform;
use crate::engine::{Answer, Engine, Io, Op, Tag, Watch};
use crate::image::{Image, SECTOR};
use crate::memory::{MemoryMap, Piece};
use crate::request::{Limits, RANGE_SECTORS_MAX};

/// How the storage answers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Manner {
    /// Later, when it is asked to.
    Later,
    /// At once, and as it is.
    Truly,
    /// At once, not everything, or with an error.
    Badly(u8),
}

impl Manner {
    pub(super) fn of(byte: u8) -> Self {
        match byte % 4 {
            0 | 1 => Manner::Later,
            2 => Manner::Truly,
            _ => Manner::Badly(byte / 4),
        }
    }
}

/// What was started and is not answered.
pub(super) struct Pending {
    pub(super) tag: Tag,
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) pieces: Vec<Piece>,
    /// The map that its pieces lie in.
    pub(super) memory: Weak<MemoryMap>,
}

impl Pending {
    pub(super) fn io(&self) -> Io<'_> {
        Io { tag: self.tag, op: self.op, offset: self.offset, len: self.len, pieces: &self.pieces }
    }
}

/// An engine that believes nothing.
pub(super) struct Recorder {
    pub(super) image: Arc<Image>,
    pub(super) limits: Limits,
    pub(super) manner: Manner,
    pub(super) pending: Vec<Pending>,
    pub(super) memory: Weak<MemoryMap>,
    /// Addresses of the memory that the queue may use now.
    pub(super) inside: Vec<(usize, usize)>,
    /// Sectors that something was allowed to change, a bit for each.
    pub(super) touched: u64,
}

impl Recorder {
    pub(super) fn examine(&mut self, io: &Io<'_>) {
        let Io { tag, op, offset, len, pieces } = *io;
        assert_eq!(tag.queue, QUEUE);
        assert!(self.pending.iter().all(|it| it.tag.head != tag.head), "head {} is started twice", tag.head);
        let end = offset.checked_add(len).expect("no offset wraps around");
        // Not the limits that the queue has: those of the file count.
        assert!(end <= SECTORS * SECTOR && end <= self.limits.sectors * SECTOR, "{op:?} of {len} bytes at {offset}");
        if op == Op::Flush {
            assert_eq!((offset, len), (0, 0));
            return;
        }
        assert!(len > 0 && len.is_multiple_of(SECTOR) && offset.is_multiple_of(SECTOR), "{len} bytes at {offset}");
        if op != Op::Read {
            assert!(!self.limits.read_only, "{op:?} on what is read-only");
            let sectors = len / SECTOR;
            self.touched |= (u64::MAX >> (64 - sectors)) << (offset / SECTOR);
        }
        match op {
            Op::Read | Op::Write { .. } => {
                assert!(pieces.len() <= PIECES_MAX);
                assert_eq!(pieces.iter().map(|it| it.len as u64).sum::<u64>(), len);
                for piece in pieces {
                    let start = piece.as_ptr().addr();
                    let end = start + piece.len;
                    let lies = self.inside.iter().any(|(from, to)| *from <= start && end <= *to);
                    assert!(lies && piece.len > 0, "{piece:?} lies in no memory of the guest's");
                }
            }
            Op::Discard | Op::Zeroes { .. } => {
                let block = self.limits.block_sectors * SECTOR;
                assert!(len <= u64::from(RANGE_SECTORS_MAX) * SECTOR);
                assert!(len.is_multiple_of(block) && offset.is_multiple_of(block));
            }
            Op::Flush => unreachable!("it was looked at"),
        }
        if let Op::Write { durable } = op {
            assert_eq!(durable, self.limits.write_through);
        }
    }

    /// What the storage says to it.
    pub(super) fn result(&self, io: &Io<'_>, manner: Manner) -> i64 {
        let Manner::Badly(how) = manner else {
            let result = perform(&self.image, io);
            assert_ne!(result, -i64::from(libc::EFAULT), "the kernel finds no memory at {:?}", io.pieces);
            return result;
        };
        let errors = [libc::EIO, libc::EINTR, libc::EAGAIN, libc::EOPNOTSUPP, libc::ENOSPC];
        let moves = matches!(io.op, Op::Read | Op::Write { .. });
        match usize::from(how) % (errors.len() + 3) {
            at if at < errors.len() => -i64::from(errors[at]),
            _ if !moves => 0,
            5 => 0,
            6 => io.len.cast_signed() / 2 + 1,
            _ => io.len.cast_signed() - 1,
        }
    }

    /// Answers one, as the script will have it.
    pub(super) fn answer_one(&mut self, at: usize, manner: Manner) -> (u16, i64) {
        let pending = self.pending.remove(at);
        assert!(pending.memory.strong_count() > 0, "the memory of head {} was given up before", pending.tag.head);
        (pending.tag.head, self.result(&pending.io(), manner))
    }
}

impl Engine for Recorder {
    fn start(&mut self, io: &Io<'_>) -> Option<i64> {
        self.examine(io);
        if !matches!(self.manner, Manner::Later) {
            return Some(self.result(io, self.manner));
        }
        let Io { tag, op, offset, len, pieces } = *io;
        let pieces = if op == Op::Flush { Vec::new() } else { pieces.to_vec() };
        self.pending.push(Pending { tag, op, offset, len, pieces, memory: Weak::clone(&self.memory) });
        None
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn answer(&mut self) -> Option<Answer> {
        None
    }

    fn has_answer(&mut self) -> bool {
        false
    }

    fn watch(&mut self, _fd: BorrowedFd<'_>, _watch: Watch) -> io::Result<()> {
        Ok(())
    }

    fn unwatch(&mut self, _fd: BorrowedFd<'_>, _watch: Watch) -> io::Result<()> {
        Ok(())
    }

    fn sleep(&mut self, _at_most: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// The engine learns which memory may be used from now on: that of the map with that number.
pub(super) fn learn(engine: &mut Recorder, memory: &Arc<MemoryMap>, number: usize) {
    engine.memory = Arc::downgrade(memory);
    engine.inside.clear();
    for (region, guest_addr) in MAPS[number] {
        let (piece, _) = memory.piece(*guest_addr, BYTES[*region]).expect("it is a region");
        let start = piece.as_ptr().addr();
        engine.inside.push((start, start + piece.len));
    }
}
