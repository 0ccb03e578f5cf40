//! Finding the page of another process among its descriptors.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// What the link of a descriptor of a page reads as: the name, as the kernel shows a memfd.
const LINK: &[u8] = b"/memfd:warmswap-telemetry (deleted)";

/// Most descriptors of a process that are looked at.
pub const FDS_MAX: usize = 65_536;

/// Opens the telemetry page of process `pid` for reading: the one with the lowest descriptor, or `None` if there is
/// none.
///
/// Anybody can give a memfd this name: whether it is a page is for [`Reader::open`](crate::Reader::open) to say. That
/// it is the page of the process one means, and not of a later one with the same number, is for the caller to make
/// sure, who holds a pidfd and sees after this call that the process has not ended. The caller needs the right to trace
/// the process.
///
/// # Errors
/// There is no such process, or no right to look into it.
pub fn find_in_process(pid: u32) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Everything else goes through this descriptor, which stays with the process if its number is given to another one.
    let directory = rustix::fs::open(format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    for entry in Dir::read_from(&directory)?.take(FDS_MAX) {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes().first().is_some_and(u8::is_ascii_digit)
            && is_page(&directory, name)?
            && let Some(page) = open(&directory, name)?
        {
            return Ok(Some(page));
        }
    }
    Ok(None)
}

/// The link of a descriptor names a page. One that was closed meanwhile does not.
fn is_page(directory: impl AsFd, name: impl rustix::path::Arg) -> io::Result<bool> {
    match rustix::fs::readlinkat(directory, name, Vec::new()) {
        Ok(link) => Ok(link.to_bytes() == LINK),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Opens what a descriptor refers to. The process may put something else in its place at any time, and opening that, a
/// pipe or a device, could wait or do things. So it is first taken hold of without being opened, then looked at, then
/// opened.
fn open(directory: &OwnedFd, name: &CStr) -> io::Result<Option<OwnedFd>> {
    let held = match rustix::fs::openat(directory, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        held => held?,
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&held)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let own = format!("/proc/self/fd/{}", held.as_raw_fd());
    if !is_page(CWD, own.as_str())? {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(Some(rustix::fs::open(own, flags, Mode::empty())?))
}
