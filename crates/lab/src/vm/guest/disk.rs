//! The disk as the guest sees it: opened without the page cache, and read whole at the end.

use std::os::fd::OwnedFd;

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags};

use super::port::Port;
use crate::vm::layout::{BLOCK, DISK_BYTES, MIB};
use crate::vm::orders::Line;
use crate::vm::rng::digest;

/// The whole disk.
pub(crate) const DEVICE: &str = "/dev/vda";
/// The partition of the file system.
pub(crate) const PARTITION: &str = "/dev/vda1";

/// Opens the disk for direct I/O.
pub(crate) fn open() -> anyhow::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(DEVICE, flags, Mode::empty()).context("opening the disk")
}

/// What is read at once at the end, aligned as direct I/O wants it.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

const CHUNK_BYTES: usize = 256 << 10;
const _: () = assert!(MIB.is_multiple_of(CHUNK_BYTES as u64));

/// Reads the whole disk past the cache and tells the host a digest of each mebibyte.
pub(crate) fn report_digests(port: &Port) -> anyhow::Result<()> {
    let disk = open()?;
    let mut chunk = Box::new(Chunk([0; CHUNK_BYTES]));
    for index in 0..DISK_BYTES / MIB {
        let mut sums = Vec::new();
        for part in 0..MIB / CHUNK_BYTES as u64 {
            let read = rustix::io::pread(&disk, &mut chunk.0, index * MIB + part * CHUNK_BYTES as u64)?;
            anyhow::ensure!(read == CHUNK_BYTES, "short read at the end");
            for block in chunk.0.chunks(usize::try_from(BLOCK)?) {
                sums.extend_from_slice(&digest(block).to_le_bytes());
            }
        }
        port.say(&Line::new("digest").with("mib", index).with("sum", format!("{:016x}", digest(&sums))));
    }
    Ok(())
}
