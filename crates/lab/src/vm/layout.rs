//! The guest's disk: which part belongs to which load. Host and guest agree because both are this program.
//!
//! ```text
//! 0        1 MiB          17 MiB                81 MiB               145 MiB
//! | MBR    | stamp blocks | fio, crc32c headers | ext4 (partition 1) |
//! ```

/// One mebibyte.
pub(crate) const MIB: u64 = 1 << 20;
/// The block of the stamp load, and the spacing of fio's verify headers.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes of the whole disk.
pub(crate) const DISK_BYTES: u64 = 145 * MIB;

/// A stretch of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// First byte.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) bytes: u64,
}

/// Blocks stamped and checked one at a time.
pub(crate) const STAMP: Region = Region { offset: MIB, bytes: 16 * MIB };
/// The part fio writes and verifies.
pub(crate) const FIO: Region = Region { offset: 17 * MIB, bytes: 64 * MIB };
/// The part that holds the file system, also partition 1.
pub(crate) const EXT4: Region = Region { offset: 81 * MIB, bytes: 64 * MIB };

const _: () = assert!(STAMP.offset + STAMP.bytes == FIO.offset);
const _: () = assert!(FIO.offset + FIO.bytes == EXT4.offset);
const _: () = assert!(EXT4.offset + EXT4.bytes == DISK_BYTES);

/// The partition table in the first sector: one Linux partition over [`EXT4`].
pub(crate) fn master_boot_record() -> [u8; 512] {
    const SECTOR: u64 = 512;
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).expect("the disk is far below 2 TiB");
    let mut sector = [0_u8; 512];
    let entry = &mut sector[446..462];
    entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[4] = 0x83;
    entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[8..12].copy_from_slice(&sectors(EXT4.offset).to_le_bytes());
    entry[12..16].copy_from_slice(&sectors(EXT4.bytes).to_le_bytes());
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}
