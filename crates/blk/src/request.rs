//! virtio-blk requests (virtio 1.3 §5.2.6): what a chain of buffers asks for.

use warmswap_telemetry::Kind;

use crate::chain::{Chain, Malformed, copy_from, total};
use crate::engine::Op;
use crate::image::SECTOR;
use crate::memory::Piece;

/// Most sectors of one discard or write-zeroes request, and segments: one, as qemu-storage-daemon has it.
pub(crate) const RANGE_SECTORS_MAX: u32 = 32_768;
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
    if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > limits.sectors) {
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
