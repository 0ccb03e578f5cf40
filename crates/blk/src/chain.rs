//! Descriptor chains: what a request is made of (virtio 1.3 §2.7.5).

use warmswap_wire::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Descriptor};

use crate::memory::{MemoryMap, Piece, Window, copy_out};

/// Most descriptors of a request, and most pieces of memory that one is cut into: what the kernel takes at once (`UIO_MAXIOV`).
pub(crate) const PIECES_MAX: usize = 1024;

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("it goes on at descriptor {next} of {count}")]
    Next { next: u16, count: u32 },
    #[error("it has more than {0} descriptors, or runs in a circle")]
    Long(usize),
    #[error("{bytes} bytes at guest address {addr:#x} are no memory")]
    Memory { addr: u64, bytes: u32 },
    #[error("a buffer to read lies behind one to write")]
    Order,
    #[error("an indirect table of {bytes} bytes")]
    TableSize { bytes: u32 },
    #[error("an indirect table inside of another, or with a descriptor behind it")]
    Nested,
    #[error("indirect descriptors were not negotiated")]
    Indirect,
    #[error("there is nothing to write to")]
    NothingWritable,
    #[error("its header has only {0} bytes")]
    Header(usize),
}

/// The buffers of one request, in their order. Kept and used again, so that nothing is allocated for a request.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// What the driver has written.
    pub(crate) readable: Vec<Piece>,
    /// What the device shall write.
    pub(crate) writable: Vec<Piece>,
    /// Guest addresses and lengths of the latter, where they are wanted for a dirty log.
    pub(crate) logged: Vec<(u64, u32)>,
    /// A buffer that is no memory. The rest is followed all the same: a request whose status can be written has an answer.
    pub(crate) missing: Option<Malformed>,
}

/// Where descriptors are read from.
enum Table<'a> {
    Ring(&'a Window),
    Guest { memory: &'a MemoryMap, addr: u64 },
}

impl Table<'_> {
    #[inline]
    fn read(&self, index: u16) -> Result<Descriptor, Malformed> {
        use std::sync::atomic::Ordering::Relaxed;
        let at = DESC_SIZE * u64::from(index);
        let mut bytes = [0; DESC_SIZE as usize];
        match self {
            Table::Ring(window) => {
                bytes[..8].copy_from_slice(&window.load_u64(at, Relaxed).to_ne_bytes());
                bytes[8..].copy_from_slice(&window.load_u64(at + 8, Relaxed).to_ne_bytes());
            }
            Table::Guest { memory, addr } => {
                let addr = addr.wrapping_add(at);
                if !read_guest(memory, addr, &mut bytes) {
                    return Err(Malformed::Memory { addr, bytes: DESC_SIZE as u32 });
                }
            }
        }
        Ok(Descriptor::from_le_bytes(bytes))
    }
}

/// Copies out of guest memory; the usual case, all in one region, allocates nothing.
#[inline]
fn read_guest(memory: &MemoryMap, addr: u64, into: &mut [u8; DESC_SIZE as usize]) -> bool {
    match memory.piece(addr, DESC_SIZE) {
        Some((piece, DESC_SIZE)) => copy_out(&[piece], into) == into.len(),
        Some(_) => {
            let mut pieces = Vec::new();
            memory.pieces(addr, DESC_SIZE as u32, &mut pieces) && copy_out(&pieces, into) == into.len()
        }
        None => false,
    }
}

impl Chain {
    /// Follows the chain at `head`, whose number was checked.
    #[inline]
    pub(crate) fn follow(
        &mut self,
        descriptors: &Window,
        size: u16,
        memory: &MemoryMap,
        head: u16,
        indirect: bool,
        log: bool,
    ) -> Result<(), Malformed> {
        self.readable.clear();
        self.writable.clear();
        self.logged.clear();
        self.missing = None;
        let (mut table, mut count, mut at) = (Table::Ring(descriptors), u32::from(size), head);
        let mut inside = false;
        for _ in 0..PIECES_MAX {
            let descriptor = table.read(at)?;
            if descriptor.flags & DESC_F_INDIRECT != 0 {
                if !indirect {
                    return Err(Malformed::Indirect);
                }
                if inside || descriptor.flags & DESC_F_NEXT != 0 {
                    return Err(Malformed::Nested);
                }
                let bytes = descriptor.len;
                if bytes == 0 || u64::from(bytes) % DESC_SIZE != 0 {
                    return Err(Malformed::TableSize { bytes });
                }
                (table, count, at) = (Table::Guest { memory, addr: descriptor.addr }, bytes / DESC_SIZE as u32, 0);
                inside = true;
                continue;
            }
            self.add(memory, &descriptor, log)?;
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            at = descriptor.next;
            if u32::from(at) >= count {
                return Err(Malformed::Next { next: at, count });
            }
        }
        Err(Malformed::Long(PIECES_MAX))
    }

    #[inline]
    fn add(&mut self, memory: &MemoryMap, descriptor: &Descriptor, log: bool) -> Result<(), Malformed> {
        let write = descriptor.flags & DESC_F_WRITE != 0;
        if !write && !self.writable.is_empty() {
            return Err(Malformed::Order);
        }
        let pieces = if write { &mut self.writable } else { &mut self.readable };
        if !memory.pieces(descriptor.addr, descriptor.len, pieces) {
            let missing = Malformed::Memory { addr: descriptor.addr, bytes: descriptor.len };
            self.missing = Some(missing);
            // It may be the place of the status.
            return if descriptor.flags & DESC_F_NEXT == 0 { Err(missing) } else { Ok(()) };
        }
        if pieces.len() > PIECES_MAX {
            return Err(Malformed::Long(PIECES_MAX));
        }
        if write && log {
            self.logged.push((descriptor.addr, descriptor.len));
        }
        Ok(())
    }

    /// Takes the header off the front.
    #[inline]
    pub(crate) fn take_header<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut header = [0; N];
        let found = copy_out(&self.readable, &mut header);
        if found < N {
            return Err(Malformed::Header(found));
        }
        let mut left = N;
        let whole = self.readable.iter().take_while(|piece| {
            let goes = piece.len <= left;
            if goes {
                left -= piece.len;
            }
            goes
        });
        let whole = whole.count();
        self.readable.drain(..whole);
        if left > 0 {
            self.readable[0] = self.readable[0].skip(left);
        }
        Ok(header)
    }

    /// Takes the last byte off the end: where the status goes.
    #[inline]
    pub(crate) fn take_status(&mut self) -> Option<Piece> {
        let last = self.writable.last_mut()?;
        let before = last.len - 1;
        let status = last.skip(before);
        if before == 0 {
            self.writable.pop();
        } else {
            *last = last.first(before);
        }
        Some(status)
    }
}

/// Bytes in all.
#[inline]
pub(crate) fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.len as u64).sum()
}

/// All bytes, if there are exactly so many.
pub(crate) fn copy_from<const N: usize>(pieces: &[Piece]) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (total(pieces) == N as u64 && copy_out(pieces, &mut bytes) == N).then_some(bytes)
}
