//! The load of a SCSI disk that is only read: every block has the content that the host gave it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags};

use super::Load;
use crate::vm::layout::BLOCK;
use crate::vm::other::image;
use crate::vm::rng::{Rng, digest};

const DEVICE: &str = "/dev/sda";
/// Disks are looked for after the driver was loaded.
const FOUND_MAX: Duration = Duration::from_secs(20);

/// A block, aligned as direct I/O wants it.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK as usize]);

/// Reads blocks until told to stop.
pub(super) fn run(load: &Load) -> anyhow::Result<()> {
    let disk = open()?;
    let mut rng = Rng::new(load.seed, digest(load.tally.name().as_bytes()));
    let mut block = Box::new(Block([0; BLOCK as usize]));
    while !load.stopping() {
        let index = rng.range(0, image::BLOCKS);
        match load.tally.timed(|| rustix::io::pread(&disk, &mut block.0, index * BLOCK)) {
            Ok(_) if block.0[..] == image::block(load.seed, index)[..] => {}
            Ok(length) => {
                load.tally.mistake();
                load.complain(&format!("block {index} has other content ({length} bytes)"));
            }
            Err(error) => load.complain(&format!("block {index}: {error}")),
        }
    }
    Ok(())
}

/// Waits for the disk and opens it past the page cache.
fn open() -> anyhow::Result<OwnedFd> {
    let deadline = Instant::now() + FOUND_MAX;
    while !Path::new(DEVICE).exists() || File::open(DEVICE).is_err() {
        anyhow::ensure!(Instant::now() < deadline, "{DEVICE} was not found");
        std::thread::sleep(Duration::from_millis(50));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(DEVICE, flags, Mode::empty()).context("opening the disk")
}
