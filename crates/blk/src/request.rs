//! virtio-blk requests (virtio 1.3 §5.2.6): what a chain of buffers asks for.

use warmswap_telemetry::Kind;

use crate::chain::{Chain, Malformed, copy_from, total};
use crate::engine::Op;
use crate::image::SECTOR;
use crate::memory::Piece;

/// Most sectors of one discard or write-zeroes request, and segments: one, as qemu-storage-daemon has it.
pub(crate) const RANGE_SECTORS_MAX: u32 = 32_768;
/// Most bytes of one read or write: what the kernel does in one call (`MAX_RW_COUNT`).
const BYTES_MAX: u64 = 0x7fff_f000;
/// Length of the device's name in GET_ID.
pub(crate) const ID_BYTES: usize = 20;

/// `VIRTIO_BLK_T_*`.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_S_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What may be asked of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Its size.
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
    /// Writes are done when they are on stable storage, without being flushed.
    pub(crate) write_through: bool,
    /// Sectors of a block.
    pub(crate) block_sectors: u64,
}

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// I/O on the image.
    Io { op: Op, offset: u64, len: u64 },
    /// The device's name.
    Id,
    /// Nothing that is done: why, as the driver is told.
    No(Status),
}

/// A request, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) kind: Kind,
    pub(crate) wish: Wish,
    /// Where the status goes.
    pub(crate) status: Piece,
}

/// Understands a chain: takes header and status off it, and leaves the data.
///
/// # Errors
/// Without a place for a status nothing can be answered. Everything else that is wrong has an answer. (A chain that ends nowhere is
/// not understood at all: the last byte that can be written need not be the driver's status.)
#[inline]
pub(crate) fn parse(chain: &mut Chain, limits: &Limits) -> Result<Parsed, Malformed> {
    let status = chain.take_status().ok_or(Malformed::NothingWritable)?;
    let (kind, wish) = match chain.take_header::<16>() {
        Ok(header) if chain.missing.is_none() => understand(chain, &header, limits),
        _ => (Kind::Other, Wish::No(Status::IoError)),
    };
    Ok(Parsed { kind, wish, status })
}

#[inline]
fn understand(chain: &Chain, header: &[u8; 16], limits: &Limits) -> (Kind, Wish) {
    let code = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(header[8..].try_into().expect("eight of sixteen bytes"));
    match code {
        T_IN => (Kind::Read, data(Op::Read, sector, &chain.writable, limits)),
        T_OUT if limits.read_only => (Kind::Write, Wish::No(Status::IoError)),
        T_OUT => {
            let op = Op::Write { durable: limits.write_through };
            (Kind::Write, data(op, sector, &chain.readable, limits))
        }
        T_FLUSH => (Kind::Flush, Wish::Io { op: Op::Flush, offset: 0, len: 0 }),
        T_GET_ID => (Kind::GetId, Wish::Id),
        T_DISCARD => (Kind::Discard, range(chain, limits, |flags| (flags == 0).then_some(Op::Discard))),
        T_WRITE_ZEROES => {
            let op = |flags| (flags <= 1).then_some(Op::Zeroes { unmap: flags == 1 });
            (Kind::WriteZeroes, range(chain, limits, op))
        }
        _ => (Kind::Other, Wish::No(Status::Unsupported)),
    }
}

#[inline]
fn data(op: Op, sector: u64, pieces: &[Piece], limits: &Limits) -> Wish {
    let len = total(pieces);
    let end = sector.checked_add(len / SECTOR);
    if len > BYTES_MAX || !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > limits.sectors) {
        return Wish::No(Status::IoError);
    }
    Wish::Io { op, offset: sector * SECTOR, len }
}

/// The one segment of a discard or write-zeroes request: sector, number of sectors, flags.
fn range(chain: &Chain, limits: &Limits, op: impl Fn(u32) -> Option<Op>) -> Wish {
    if limits.read_only {
        return Wish::No(Status::IoError);
    }
    let Some(segment) = copy_from::<16>(&chain.readable) else { return Wish::No(Status::Unsupported) };
    let u32_at = |at: usize| u32::from_le_bytes(segment[at..at + 4].try_into().expect("four bytes"));
    let sector = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
    let (count, flags) = (u32_at(8), u32_at(12));
    let Some(op) = op(flags) else { return Wish::No(Status::Unsupported) };
    let end = sector.checked_add(u64::from(count));
    let whole = sector.is_multiple_of(limits.block_sectors) && u64::from(count).is_multiple_of(limits.block_sectors);
    if count > RANGE_SECTORS_MAX || !whole || end.is_none_or(|end| end > limits.sectors) {
        return Wish::No(Status::IoError);
    }
    Wish::Io { op, offset: sector * SECTOR, len: u64::from(count) * SECTOR }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{END, FREE, Guest, REGION, TABLE, readable, writable};
    use warmswap_wire::ring::Descriptor;

    const HEADER: u64 = FREE;
    const STATUS: u64 = FREE + 0x100;
    const DATA: u64 = FREE + 0x200;
    const SEGMENT: u64 = FREE + 0x180;
    const SECTORS: u64 = 100_000;
    const NO: Wish = Wish::No(Status::IoError);
    const UNSUPPORTED: Wish = Wish::No(Status::Unsupported);

    fn limits() -> Limits {
        Limits { sectors: SECTORS, read_only: false, write_through: false, block_sectors: 1 }
    }

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0xee; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    /// Understands the chain that is made of these descriptors.
    fn parse_chain(guest: &Guest, descriptors: &[Descriptor], limits: &Limits) -> Result<Parsed, Malformed> {
        guest.chain(TABLE, descriptors);
        let mut chain = Chain::default();
        chain.follow(&guest.place(8).descriptors, 8, &guest.memory, 0, true)?;
        parse(&mut chain, limits)
    }

    /// A request as most drivers make it: header, one buffer of data, status.
    fn ask(kind: u32, sector: u64, data: Option<Descriptor>, limits: &Limits) -> (Kind, Wish) {
        let guest = Guest::new();
        guest.put(HEADER, &header(kind, sector));
        let descriptors = [Some(readable(HEADER, 16)), data, Some(writable(STATUS, 1))].into_iter().flatten();
        let parsed = parse_chain(&guest, &descriptors.collect::<Vec<_>>(), limits).expect("there is a status");
        let (status, _) = guest.memory.piece(STATUS, 1).expect("it is memory");
        assert_eq!(parsed.status, status);
        (parsed.kind, parsed.wish)
    }

    /// One with so many segments, the first of which is this.
    fn ask_range(kind: u32, segment: (u64, u32, u32), segments: u32, limits: &Limits) -> Wish {
        let guest = Guest::new();
        guest.put(HEADER, &header(kind, 0));
        let (sector, count, flags) = segment;
        guest.put(SEGMENT, &[sector.to_le_bytes().as_slice(), &count.to_le_bytes(), &flags.to_le_bytes()].concat());
        let descriptors = [readable(HEADER, 16), readable(SEGMENT, 16 * segments), writable(STATUS, 1)];
        parse_chain(&guest, &descriptors, limits).expect("there is a status").wish
    }

    #[test]
    fn every_kind_of_request_is_understood() {
        let io = |op, sector: u64, len| Wish::Io { op, offset: sector * SECTOR, len };
        let write = Op::Write { durable: false };
        let (into, from) = (Some(writable(DATA, 1024)), Some(readable(DATA, 1024)));
        for (kind, sector, data, expected) in [
            (0, 7, into, (Kind::Read, io(Op::Read, 7, 1024))),
            (1, 7, from, (Kind::Write, io(write, 7, 1024))),
            (4, 7, None, (Kind::Flush, io(Op::Flush, 0, 0))),
            (8, 0, Some(writable(DATA, 20)), (Kind::GetId, Wish::Id)),
            (0, 0, None, (Kind::Read, io(Op::Read, 0, 0))),
            (2, 0, None, (Kind::Other, UNSUPPORTED)),
            // Secure erase is not offered.
            (14, 0, from, (Kind::Other, UNSUPPORTED)),
            (u32::MAX, 0, None, (Kind::Other, UNSUPPORTED)),
            (1 << 31, 0, into, (Kind::Other, UNSUPPORTED)),
        ] {
            assert_eq!(ask(kind, sector, data, &limits()), expected, "type {kind}");
        }
        let durable = Limits { write_through: true, ..limits() };
        assert_eq!(ask(1, 7, from, &durable).1, io(Op::Write { durable: true }, 7, 1024));
    }

    #[test]
    fn data_in_the_wrong_direction_is_no_data() {
        // A read with nothing to read into but the status, a write of nothing.
        let nothing = |op| Wish::Io { op, offset: SECTOR, len: 0 };
        assert_eq!(ask(0, 1, Some(readable(DATA, 512)), &limits()).1, nothing(Op::Read));
        assert_eq!(ask(1, 1, Some(writable(DATA, 512)), &limits()).1, nothing(Op::Write { durable: false }));
    }

    #[test]
    fn nothing_beyond_the_device_and_no_part_of_a_sector_is_touched() {
        for (kind, data) in [(0, writable as fn(u64, u32) -> Descriptor), (1, readable)] {
            let wish = |sector, bytes| ask(kind, sector, Some(data(DATA, bytes)), &limits()).1;
            let is_no = |sector, bytes| assert_eq!(wish(sector, bytes), NO, "{bytes} bytes at sector {sector}");
            assert!(matches!(wish(SECTORS - 1, 512), Wish::Io { .. }), "the last sector");
            assert!(matches!(wish(SECTORS - 2, 1024), Wish::Io { .. }), "the last two");
            is_no(SECTORS - 1, 1024);
            is_no(SECTORS, 512);
            is_no(u64::MAX, 512);
            is_no(u64::MAX - 1, 512);
            is_no(u64::MAX / SECTOR, 512);
            is_no(u64::MAX / SECTOR + 1, 512);
            is_no(1 << 63, 512);
            is_no(0, 511);
            is_no(0, 513);
            is_no(0, 1);
        }
    }

    #[test]
    fn a_device_that_is_read_only_is_read_and_flushed_alone() {
        let limits = Limits { read_only: true, ..limits() };
        assert_eq!(ask(1, 0, Some(readable(DATA, 512)), &limits), (Kind::Write, NO));
        assert_eq!(ask_range(T_DISCARD, (0, 1, 0), 1, &limits), NO);
        assert_eq!(ask_range(T_WRITE_ZEROES, (0, 1, 0), 1, &limits), NO);
        assert!(matches!(ask(0, 0, Some(writable(DATA, 512)), &limits).1, Wish::Io { op: Op::Read, .. }));
        assert!(matches!(ask(4, 0, None, &limits).1, Wish::Io { op: Op::Flush, .. }));
        assert_eq!(ask(8, 0, Some(writable(DATA, 20)), &limits).1, Wish::Id);
    }

    #[test]
    fn a_range_is_one_segment_inside_of_the_device() {
        let coarse = Limits { block_sectors: 8, ..limits() };
        let huge = Limits { sectors: u64::MAX, ..limits() };
        let max = RANGE_SECTORS_MAX;
        let io = |op, sector: u64, count: u32| Wish::Io { op, offset: sector * SECTOR, len: u64::from(count) * SECTOR };
        for (kind, op) in [(T_DISCARD, Op::Discard), (T_WRITE_ZEROES, Op::Zeroes { unmap: false })] {
            for (segment, segments, limits, expected) in [
                ((0, 1, 0), 1, limits(), io(op, 0, 1)),
                ((5, max, 0), 1, limits(), io(op, 5, max)),
                ((5, max + 1, 0), 1, limits(), NO),
                ((0, u32::MAX, 0), 1, huge, NO),
                ((SECTORS - 3, 3, 0), 1, limits(), io(op, SECTORS - 3, 3)),
                ((SECTORS - 3, 4, 0), 1, limits(), NO),
                ((SECTORS, 0, 0), 1, limits(), io(op, SECTORS, 0)),
                ((SECTORS + 1, 0, 0), 1, limits(), NO),
                ((u64::MAX, 1, 0), 1, limits(), NO),
                ((u64::MAX, 1, 0), 1, huge, NO),
                ((1 << 40, 1, 0), 1, limits(), NO),
                ((16, 8, 0), 1, coarse, io(op, 16, 8)),
                ((15, 8, 0), 1, coarse, NO),
                ((16, 7, 0), 1, coarse, NO),
                ((0, 1, 0), 0, limits(), UNSUPPORTED),
                ((0, 1, 0), 2, limits(), UNSUPPORTED),
                ((0, 1, 2), 1, limits(), UNSUPPORTED),
                ((0, 1, 3), 1, limits(), UNSUPPORTED),
                ((0, 1, 1 << 31), 1, limits(), UNSUPPORTED),
            ] {
                assert_eq!(ask_range(kind, segment, segments, &limits), expected, "type {kind}, {segment:?}");
            }
        }
        // The flag that only one of them has.
        assert_eq!(ask_range(T_DISCARD, (0, 1, 1), 1, &limits()), UNSUPPORTED);
        assert_eq!(ask_range(T_WRITE_ZEROES, (0, 1, 1), 1, &limits()), io(Op::Zeroes { unmap: true }, 0, 1));
    }

    #[test]
    fn how_a_request_is_cut_into_buffers_says_nothing() {
        let guest = Guest::new();
        // The status behind the data, the data behind the header, in the same buffers and in others, across regions.
        let at = REGION - 16 - 100;
        guest.put(at, &header(1, 3));
        let status = writable(STATUS, 1);
        let expected = Wish::Io { op: Op::Write { durable: false }, offset: 3 * SECTOR, len: 1024 };
        for cuts in [vec![16 + 1024], vec![16, 1024], vec![10, 6, 1, 1023], vec![16 + 1000, 24], vec![1, 1039]] {
            let mut from = at;
            let mut descriptors = Vec::new();
            for bytes in &cuts {
                descriptors.push(readable(from, *bytes));
                from += u64::from(*bytes);
            }
            descriptors.push(status);
            let parsed = parse_chain(&guest, &descriptors, &limits()).expect("there is a status");
            assert_eq!(parsed.wish, expected, "{cuts:?}");
        }
        guest.put(HEADER, &header(0, 3));
        let expected = Wish::Io { op: Op::Read, offset: 3 * SECTOR, len: 1024 };
        for cuts in [vec![1025], vec![1024, 1], vec![1, 1024], vec![500, 525]] {
            let mut into = at;
            let mut descriptors = vec![readable(HEADER, 16)];
            for bytes in &cuts {
                descriptors.push(writable(into, *bytes));
                into += u64::from(*bytes);
            }
            let parsed = parse_chain(&guest, &descriptors, &limits()).expect("there is a status");
            let (status, _) = guest.memory.piece(at + 1024, 1).expect("it is memory");
            assert_eq!((parsed.wish, parsed.status), (expected, status), "{cuts:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_request_is_answered_while_there_is_a_place_for_it() {
        let guest = Guest::new();
        guest.put(HEADER, &header(0, 0));
        let (good, status) = (readable(HEADER, 16), writable(STATUS, 1));
        let wish = |descriptors: &[Descriptor]| {
            let parsed = parse_chain(&guest, descriptors, &limits()).expect("there is a status");
            (parsed.kind, parsed.wish)
        };
        // A header that is short, is not there, or is no memory; data that is no memory.
        for descriptors in [
            vec![readable(HEADER, 15), status],
            vec![status],
            vec![readable(END, 16), status],
            vec![readable(END - 8, 16), good, status],
            vec![good, writable(END, 512), status],
            vec![good, writable(END - 511, 512), status],
            vec![good, writable(u64::MAX, 512), status],
            vec![good, writable(DATA, 512), writable(DATA, u32::MAX), status],
        ] {
            assert_eq!(wish(&descriptors), (Kind::Other, NO), "{descriptors:?}");
        }
        let refused = |descriptors: &[Descriptor]| {
            parse_chain(&guest, descriptors, &limits()).expect_err("there is no place for a status")
        };
        assert_eq!(refused(&[good]), Malformed::NothingWritable);
        assert_eq!(refused(&[good, readable(DATA, 512)]), Malformed::NothingWritable);
        assert_eq!(refused(&[good, writable(STATUS, 0)]), Malformed::NothingWritable);
        assert_eq!(refused(&[good, writable(END, 1)]), Malformed::Memory { addr: END, bytes: 1 });
        assert_eq!(refused(&[good, status, readable(DATA, 1)]), Malformed::Order);
    }
}
