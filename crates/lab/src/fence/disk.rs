//! The disk of a round: anonymous memory behind a loop device. The backends see a block device; the oracle sees the memory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;

use super::loop_device::LoopDevice;
use super::stamp::{Generation, Stamp};
use crate::guest::{BLOCK, Mapping, Window};

/// Bytes of one request.
pub(super) const EXTENT: usize = 64 << 10;
/// Blocks of one request.
pub(super) const EXTENT_BLOCKS: u32 = (EXTENT / BLOCK) as u32;
/// Extents of a disk.
pub(super) const EXTENTS: u16 = 64;

/// The disk. Nothing of it is left when it and its users are gone.
#[derive(Debug)]
pub(super) struct Disk {
    device: LoopDevice,
    memory: Arc<Mapping>,
    /// The loop driver has its own reference; this one is for the mapping's name in `/proc`.
    _image: OwnedFd,
}

impl Disk {
    /// A disk with every extent at [`Generation::Original`].
    pub(super) fn new() -> anyhow::Result<Self> {
        let bytes = EXTENT * usize::from(EXTENTS);
        let image = rustix::fs::memfd_create("lab-fence", rustix::fs::MemfdFlags::CLOEXEC).context("memfd_create")?;
        rustix::fs::ftruncate(&image, bytes as u64)?;
        let memory = Arc::new(Mapping::new(&image, 0, bytes).context("mapping the image")?);
        let disk = Disk { device: LoopDevice::over(image.as_fd())?, memory, _image: image };
        for extent in 0..EXTENTS {
            Stamp { generation: Generation::Original, extent }.fill(&disk.extent(extent));
        }
        Ok(disk)
    }

    /// What lies at an extent, whoever wrote it.
    pub(super) fn extent(&self, extent: u16) -> Window {
        Window {
            mapping: Arc::clone(&self.memory),
            start: usize::from(extent) * EXTENT,
            length: EXTENT,
            guest: u64::from(extent) * EXTENT as u64,
        }
    }

    /// The block device.
    pub(super) fn path(&self) -> &PathBuf {
        self.device.path()
    }

    /// `major:minor` of it.
    pub(super) fn number(&self) -> anyhow::Result<String> {
        self.device.number()
    }
}
