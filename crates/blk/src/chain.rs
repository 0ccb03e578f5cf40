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
    /// Guest addresses and lengths of the latter, for a dirty log.
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
            self.add(memory, &descriptor)?;
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
    fn add(&mut self, memory: &MemoryMap, descriptor: &Descriptor) -> Result<(), Malformed> {
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
        // Always: logging may begin while the request is in flight.
        if write {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{END, FREE, Guest, REGION, TABLE, indirect, readable, writable};

    const SIZE: u16 = 8;

    /// Follows what the ring's table says from its first descriptor on.
    fn follow(guest: &Guest, size: u16, with_indirect: bool) -> Result<Chain, Malformed> {
        let mut chain = Chain::default();
        let place = guest.place(size);
        chain.follow(&place.descriptors, size, &guest.memory, 0, with_indirect).map(|()| chain)
    }

    fn malformed(descriptors: &[Descriptor]) -> Malformed {
        let guest = Guest::new();
        guest.table(TABLE, descriptors);
        follow(&guest, SIZE, true).expect_err("it is malformed")
    }

    fn linked(descriptor: Descriptor, next: u16) -> Descriptor {
        Descriptor { flags: descriptor.flags | DESC_F_NEXT, next, ..descriptor }
    }

    fn lengths(pieces: &[Piece]) -> Vec<usize> {
        pieces.iter().map(|it| it.len).collect()
    }

    #[test]
    fn buffers_come_in_their_order_and_are_cut_where_regions_meet() {
        let guest = Guest::new();
        let across = writable(REGION - 8, 24);
        guest.chain(TABLE, &[readable(FREE, 16), readable(FREE, 0), readable(FREE + 64, 3), across, writable(FREE, 1)]);
        let chain = follow(&guest, SIZE, false).expect("it is in order");
        assert_eq!((lengths(&chain.readable), lengths(&chain.writable)), (vec![16, 3], vec![8, 16, 1]));
        assert_eq!((total(&chain.readable), total(&chain.writable)), (19, 25));
        assert_eq!(chain.logged, [(REGION - 8, 24), (FREE, 1)]);
        assert_eq!(chain.missing, None);
    }

    #[test]
    fn a_chain_is_followed_by_its_links_and_not_by_their_numbers() {
        let guest = Guest::new();
        let nowhere = readable(END, 1);
        guest.table(TABLE, &[linked(readable(FREE, 1), 7), nowhere, writable(FREE, 4)]);
        guest.table(TABLE + 16 * 7, &[linked(readable(FREE, 2), 2)]);
        let chain = follow(&guest, SIZE, false).expect("it is in order");
        assert_eq!((lengths(&chain.readable), lengths(&chain.writable)), (vec![1, 2], vec![4]));
    }

    #[test]
    fn a_chain_that_runs_in_a_circle_or_out_of_its_table_is_malformed() {
        let long = Malformed::Long(PIECES_MAX);
        assert_eq!(malformed(&[linked(readable(FREE, 1), 0)]), long);
        assert_eq!(malformed(&[linked(readable(FREE, 0), 1), linked(readable(FREE, 0), 0)]), long, "without a byte");
        assert_eq!(malformed(&[linked(readable(FREE, 1), 8)]), Malformed::Next { next: 8, count: 8 });
        assert_eq!(malformed(&[linked(readable(FREE, 1), 65_535)]), Malformed::Next { next: 65_535, count: 8 });
        let order = [linked(readable(FREE, 1), 1), linked(writable(FREE, 1), 2), readable(FREE, 1)];
        assert_eq!(malformed(&order), Malformed::Order);
    }

    #[test]
    fn a_chain_has_as_many_buffers_as_the_kernel_takes_and_no_more() {
        let guest = Guest::new();
        guest.chain(TABLE, &vec![readable(FREE, 2); PIECES_MAX]);
        let chain = follow(&guest, 1024, false).expect("it is as long as it may be");
        assert_eq!(chain.readable.len(), PIECES_MAX);
        // One buffer fewer, and one that lies in two regions.
        let mut descriptors = vec![readable(FREE, 2); PIECES_MAX];
        descriptors[7] = readable(REGION - 1, 2);
        guest.chain(TABLE, &descriptors);
        assert_eq!(follow(&guest, 1024, false).expect_err("one piece too many"), Malformed::Long(PIECES_MAX));
        let outside = FREE;
        guest.chain(outside, &vec![readable(0, 1); PIECES_MAX + 1]);
        guest.chain(TABLE, &[indirect(outside, 16 * (PIECES_MAX as u32 + 1))]);
        assert_eq!(follow(&guest, SIZE, true).expect_err("one too many"), Malformed::Long(PIECES_MAX));
    }

    #[test]
    fn an_indirect_table_may_lie_anywhere_in_memory_and_across_regions() {
        for table in [FREE, FREE + 1, FREE + 8, REGION - 16, REGION - 17, REGION - 24, END - 48] {
            let guest = Guest::new();
            guest.chain(table, &[readable(0, 16), writable(FREE, 512), writable(FREE, 1)]);
            guest.chain(TABLE, &[readable(0, 5), indirect(table, 48)]);
            let chain = follow(&guest, SIZE, true).expect("it is in order");
            let found = (lengths(&chain.readable), lengths(&chain.writable));
            assert_eq!(found, (vec![5, 16], vec![512, 1]), "a table at {table:#x}");
        }
    }

    #[test]
    fn an_indirect_table_of_a_wrong_kind_is_malformed() {
        let guest = Guest::new();
        guest.chain(FREE, &[readable(0, 16), writable(FREE, 1)]);
        guest.chain(TABLE, &[indirect(FREE, 32)]);
        assert_eq!(follow(&guest, SIZE, false).expect_err("not negotiated"), Malformed::Indirect);
        for bytes in [0, 1, 15, 17, u32::MAX] {
            assert_eq!(malformed(&[indirect(FREE, bytes)]), Malformed::TableSize { bytes });
        }
        assert_eq!(malformed(&[linked(indirect(FREE, 32), 1)]), Malformed::Nested, "with something behind it");
        guest.chain(FREE, &[readable(0, 16), indirect(FREE, 32)]);
        assert_eq!(follow(&guest, SIZE, true).expect_err("in itself"), Malformed::Nested);
        guest.table(FREE, &[linked(readable(0, 16), 2)]);
        assert_eq!(follow(&guest, SIZE, true).expect_err("beyond"), Malformed::Next { next: 2, count: 2 });
        for (addr, first) in [(END, END), (END - 8, END - 8), (u64::MAX - 7, u64::MAX - 7)] {
            assert_eq!(malformed(&[indirect(addr, 32)]), Malformed::Memory { addr: first, bytes: 16 });
        }
        // It begins in memory and goes on where there is none.
        guest.table(END - 16, &[linked(readable(0, 16), 1)]);
        guest.chain(TABLE, &[indirect(END - 16, 32)]);
        assert_eq!(follow(&guest, SIZE, true).expect_err("no memory"), Malformed::Memory { addr: END, bytes: 16 });
    }

    #[test]
    fn a_buffer_that_is_no_memory_is_noted_unless_it_is_the_last() {
        let missing = Malformed::Memory { addr: END - 1, bytes: 2 };
        let guest = Guest::new();
        guest.chain(TABLE, &[readable(FREE, 16), writable(END - 1, 2), writable(FREE, 1)]);
        let chain = follow(&guest, SIZE, false).expect("it can be answered");
        assert_eq!((chain.missing, lengths(&chain.writable)), (Some(missing), vec![1]));
        assert_eq!(malformed(&[linked(readable(FREE, 16), 1), writable(END - 1, 2)]), missing);
        assert_eq!(malformed(&[readable(u64::MAX, 2)]), Malformed::Memory { addr: u64::MAX, bytes: 2 });
    }

    #[test]
    fn a_chain_that_is_used_again_has_nothing_of_the_last() {
        let guest = Guest::new();
        let (mut chain, place) = (Chain::default(), guest.place(SIZE));
        let follow = |chain: &mut Chain| {
            chain.follow(&place.descriptors, SIZE, &guest.memory, 0, false).expect("it can be answered");
        };
        guest.chain(TABLE, &[readable(FREE, 16), writable(END, 2), writable(FREE, 1)]);
        follow(&mut chain);
        guest.chain(TABLE, &[writable(FREE, 3)]);
        follow(&mut chain);
        assert_eq!((lengths(&chain.readable), lengths(&chain.writable)), (vec![], vec![3]));
        assert_eq!((chain.missing, &chain.logged[..]), (None, &[(FREE, 3)][..]));
    }

    #[test]
    fn the_header_is_taken_off_however_it_is_cut() {
        let guest = Guest::new();
        let header: Vec<u8> = (1..=20).collect();
        guest.put(FREE, &header);
        for cuts in [vec![16], vec![20], vec![1, 15], vec![4, 4, 4, 4], vec![5, 7, 8], vec![0, 16, 0], vec![15, 5]] {
            let mut at = FREE;
            let mut descriptors = Vec::new();
            for bytes in &cuts {
                descriptors.push(readable(at, *bytes));
                at += u64::from(*bytes);
            }
            guest.chain(TABLE, &descriptors);
            let mut chain = follow(&guest, SIZE, false).expect("it is in order");
            assert_eq!(chain.take_header::<16>().expect("it is there")[..], header[..16], "{cuts:?}");
            assert_eq!(total(&chain.readable), u64::from(cuts.iter().sum::<u32>()) - 16, "{cuts:?}");
            let left = chain.readable.clone();
            let mut bytes = vec![0; total(&left) as usize];
            copy_out(&left, &mut bytes);
            assert_eq!(bytes, header[16..16 + bytes.len()], "{cuts:?}");
        }
        guest.chain(TABLE, &[readable(FREE, 15)]);
        let mut chain = follow(&guest, SIZE, false).expect("it is in order");
        assert_eq!(chain.take_header::<16>(), Err(Malformed::Header(15)));
        assert_eq!(total(&chain.readable), 15, "nothing was taken");
    }

    #[test]
    fn the_status_is_the_last_byte_that_can_be_written() {
        let guest = Guest::new();
        for (descriptors, left) in [
            (vec![writable(FREE + 9, 1)], vec![]),
            (vec![writable(FREE, 10)], vec![9]),
            (vec![writable(FREE, 512), writable(FREE + 9, 1)], vec![512]),
            (vec![writable(FREE, 512), writable(FREE + 9, 1), writable(FREE, 0)], vec![512]),
        ] {
            guest.chain(TABLE, &descriptors);
            let mut chain = follow(&guest, SIZE, false).expect("it is in order");
            let status = chain.take_status().expect("there is one");
            let (expected, _) = guest.memory.piece(FREE + 9, 1).expect("it is memory");
            assert_eq!((status, lengths(&chain.writable)), (expected, left));
        }
        guest.chain(TABLE, &[readable(FREE, 16), writable(FREE, 0)]);
        assert_eq!(follow(&guest, SIZE, false).expect("it is in order").take_status(), None);
    }
}
