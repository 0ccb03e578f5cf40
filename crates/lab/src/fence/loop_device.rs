//! A loop block device that the kernel removes by itself when nobody has it open any more, however its users ended.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use anyhow::Context;

/// Numbers of the loop driver's requests (`linux/loop.h`).
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
/// Cleared at the last close.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Another program may take the free device first, so often.
const TRIES: u32 = 20;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// An open loop device.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    /// Keeps it from being cleared.
    device: File,
}

impl LoopDevice {
    /// Makes a device of `image`.
    pub(super) fn over(image: BorrowedFd<'_>) -> anyhow::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control").context("/dev/loop-control")?;
        for _ in 0..TRIES {
            let path = PathBuf::from(format!("/dev/loop{}", free_number(&control).context("a free loop device")?));
            let device = File::options().read(true).write(true).open(&path);
            let device = device.with_context(|| path.display().to_string())?;
            match configure(&device, image) {
                Ok(()) => return Ok(LoopDevice { path, device }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error).with_context(|| format!("configuring {}", path.display())),
            }
        }
        anyhow::bail!("no loop device stayed free")
    }

    /// Its path.
    pub(super) fn path(&self) -> &PathBuf {
        &self.path
    }

    /// `major:minor`, as control groups name it.
    pub(super) fn number(&self) -> anyhow::Result<String> {
        let number = rustix::fs::fstat(self.device.as_fd())?.st_rdev;
        Ok(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number)))
    }
}

fn free_number(control: &File) -> io::Result<libc::c_int> {
    // SAFETY: the request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    if number < 0 { Err(io::Error::last_os_error()) } else { Ok(number) }
}

fn configure(device: &File, image: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = image.as_raw_fd().cast_unsigned();
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    // SAFETY: the structure has the layout the request reads and outlives the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
