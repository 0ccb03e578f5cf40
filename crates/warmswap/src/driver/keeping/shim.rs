use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
#[derive(Debug, Default)]
pub(crate) struct Store { next: u32 }
impl Store {
    pub(crate) fn from_env() -> io::Result<Option<Self>> { Ok(None) }
    pub(crate) fn take_inherited(&mut self) -> Vec<(String, OwnedFd)> { Vec::new() }
    pub(crate) fn adopt(&mut self, _number: u32, _fd: BorrowedFd<'_>) -> io::Result<()> { Ok(()) }
    pub(crate) fn claim(&mut self, _number: u32) -> io::Result<()> { Ok(()) }
    pub(crate) fn put(&mut self, _fd: BorrowedFd<'_>) -> io::Result<u32> { self.next += 1; Ok(self.next - 1) }
    pub(crate) fn let_go(&mut self, _number: u32) {}
    pub(crate) fn forget_unclaimed(&mut self) -> io::Result<()> { Ok(()) }
    pub(crate) fn ready(&mut self) {}
}
