//! A file of which only what belongs there is ever read: what was found in it when it was opened, or was written since.
//!
//! redb checks a file when it opens it, and trusts it from then on: it panics over a page that was damaged later, and a process that guards
//! a disk would end for it. Here such a page is an error, before redb sees any of it.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

pub(crate) const BLOCK: usize = 4_096;
/// Bytes that are read at a time when all of a file is.
const READ_AT_ONCE: usize = 64 * BLOCK;

/// How a file is not what it was left as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Changed {
    #[error("what is in it at byte {0} is not what was there, and this program did not change it")]
    Content(u64),
    #[error("it has {found} bytes and had {expected}, and this program did not change that")]
    Length { found: u64, expected: u64 },
}

impl Changed {
    /// What an error says of this, if it does.
    pub(crate) fn of(error: &Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

impl From<Changed> for Error {
    fn from(changed: Changed) -> Self {
        Error::new(ErrorKind::InvalidData, changed)
    }
}

/// The blocks of some bytes: the number of each, where in it they begin, and which of the bytes lie there.
pub(crate) fn blocks(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % BLOCK as u64) as usize;
        let part = (len - done).min(BLOCK - within);
        let range = done..done + part;
        done += part;
        (part > 0).then_some((at / BLOCK as u64, within, range))
    })
}

/// What a file is known to hold: its length, and a checksum of each of its blocks. The last one counts as if zeroes followed.
#[derive(Debug)]
pub(crate) struct Sums {
    len: u64,
    sums: Vec<u32>,
}

impl Sums {
    /// Of all that is in a file.
    pub(crate) fn of(file: &File) -> Result<Self> {
        let len = file.metadata()?.len();
        let (mut bytes, mut sums, mut at) = (vec![0; READ_AT_ONCE], Vec::new(), 0);
        while at < len {
            let part = usize::try_from(len - at).unwrap_or(READ_AT_ONCE).min(READ_AT_ONCE);
            file.read_exact_at(&mut bytes[..part], at)?;
            let whole = part.next_multiple_of(BLOCK);
            bytes[part..whole].fill(0);
            sums.extend(bytes[..whole].chunks_exact(BLOCK).map(crc32fast::hash));
            at += part as u64;
        }
        Ok(Sums { len, sums })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The file is as long as it was.
    fn check_len(&self, file: &File) -> Result<()> {
        let (found, expected) = (file.metadata()?.len(), self.len);
        if found == expected { Ok(()) } else { Err(Changed::Length { found, expected }.into()) }
    }

    /// Bytes are those of a block.
    fn check(&self, block: u64, bytes: &[u8]) -> Result<()> {
        let expected = usize::try_from(block).ok().and_then(|block| self.sums.get(block));
        if expected == Some(&crc32fast::hash(bytes)) {
            return Ok(());
        }
        Err(Changed::Content(block.saturating_mul(BLOCK as u64)).into())
    }

    fn read_exact(&self, file: &File, out: &mut [u8], at: u64) -> Result<()> {
        match file.read_exact_at(out, at) {
            // What was there before has been cut off.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                self.check_len(file)?;
                Err(Changed::Content(at).into())
            }
            other => other,
        }
    }

    /// A block, with zeroes behind the end.
    pub(crate) fn block(&self, file: &File, block: u64) -> Result<[u8; BLOCK]> {
        let (mut bytes, start) = ([0; BLOCK], block.saturating_mul(BLOCK as u64));
        let there = usize::try_from(self.len.saturating_sub(start)).unwrap_or(BLOCK).min(BLOCK);
        self.read_exact(file, &mut bytes[..there], start)?;
        self.check(block, &bytes)?;
        Ok(bytes)
    }

    fn set(&mut self, block: u64, sum: u32) {
        if let Some(known) = usize::try_from(block).ok().and_then(|block| self.sums.get_mut(block)) {
            *known = sum;
        }
    }

    /// Those bytes are within it.
    fn check_range(&self, offset: u64, len: usize) -> Result<()> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(Error::new(ErrorKind::UnexpectedEof, "it ends before what is to be read or written"));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct State {
    sums: Sums,
    /// Something was written since the last time that all was made sure to be on the disk.
    begun: bool,
}

/// A file that is read and written, and changed by nobody else.
#[derive(Debug)]
pub(crate) struct Guarded {
    file: File,
    /// The same file, as redb locks it.
    locks: FileBackend,
    state: RwLock<State>,
    changed: Arc<OnceLock<Changed>>,
}

impl Guarded {
    /// What is in the file now counts as what belongs there: it is to be locked before. What is wrong with it later is said by the error
    /// that finds it, and by `changed` from then on.
    pub(crate) fn new(file: File, changed: Arc<OnceLock<Changed>>) -> std::result::Result<Self, redb::Error> {
        let locks = FileBackend::new(file.try_clone()?)?;
        let sums = Sums::of(&file)?;
        Ok(Guarded { file, locks, state: RwLock::new(State { sums, begun: false }), changed })
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first change that is found is remembered: redb says of everything after it only that something was before.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if let Some(changed) = result.as_ref().err().and_then(Changed::of) {
            self.changed.get_or_init(|| changed);
        }
        result
    }

    fn read_checked(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        // Held meanwhile: nothing is written between reading and comparing.
        let State { sums, .. } = &*self.state();
        sums.check_range(offset, out.len())?;
        if offset.is_multiple_of(BLOCK as u64) && out.len().is_multiple_of(BLOCK) {
            sums.read_exact(&self.file, out, offset)?;
            let first = offset / BLOCK as u64;
            return (first..).zip(out.chunks_exact(BLOCK)).try_for_each(|(block, bytes)| sums.check(block, bytes));
        }
        for (block, within, range) in blocks(offset, out.len()) {
            let bytes = sums.block(&self.file, block)?;
            let len = range.len();
            out[range].copy_from_slice(&bytes[within..within + len]);
        }
        Ok(())
    }

    fn write_checked(&self, offset: u64, data: &[u8]) -> Result<()> {
        let State { sums, begun } = &mut *self.state_mut();
        sums.check_range(offset, data.len())?;
        sums.check_len(&self.file)?;
        if !*begun {
            // A history that was copied over this one begins otherwise, and is left as it is.
            sums.block(&self.file, 0)?;
            *begun = true;
        }
        let mut news = Vec::with_capacity(data.len() / BLOCK + 2);
        for (block, within, range) in blocks(offset, data.len()) {
            let sum = if range.len() == BLOCK {
                crc32fast::hash(&data[range])
            } else {
                // The rest of it stays, and is what it is to be.
                let mut bytes = sums.block(&self.file, block)?;
                bytes[within..within + range.len()].copy_from_slice(&data[range]);
                crc32fast::hash(&bytes)
            };
            news.push((block, sum));
        }
        self.file.write_all_at(data, offset)?;
        news.into_iter().for_each(|(block, sum)| sums.set(block, sum));
        Ok(())
    }

    fn set_len_checked(&self, len: u64) -> Result<()> {
        let State { sums, .. } = &mut *self.state_mut();
        sums.check_len(&self.file)?;
        let (last, within) = (len / BLOCK as u64, (len % BLOCK as u64) as usize);
        // What is left of a block that is cut.
        let cut = if len < sums.len && within > 0 {
            let mut bytes = sums.block(&self.file, last)?;
            bytes[within..].fill(0);
            Some(crc32fast::hash(&bytes))
        } else {
            None
        };
        self.file.set_len(len)?;
        sums.len = len;
        let count = usize::try_from(len.div_ceil(BLOCK as u64)).map_err(Error::other)?;
        sums.sums.resize(count, crc32fast::hash(&[0; BLOCK]));
        if let Some(sum) = cut {
            sums.set(last, sum);
        }
        Ok(())
    }
}

impl StorageBackend for Guarded {
    fn len(&self) -> Result<u64> {
        let state = self.state();
        self.noted(state.sums.check_len(&self.file).map(|()| state.sums.len))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.noted(self.read_checked(offset, out))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.noted(self.set_len_checked(len))
    }

    fn sync_data(&self) -> Result<()> {
        {
            let mut state = self.state_mut();
            state.begun = false;
            self.noted(state.sums.check_len(&self.file))?;
        }
        // Who reads does not wait for the disk.
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.noted(self.write_checked(offset, data))
    }

    fn close(&self) -> Result<()> {
        let closed = self.locks.close();
        // A process that is being started has the file open for a moment, and would keep it locked.
        self.file.unlock().and(closed)
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.locks.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.locks.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.locks.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.locks.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.locks.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.locks.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_others_change_is_an_error_that_says_where() {
        let path = std::env::temp_dir().join(format!("ws-guarded-{}", std::process::id()));
        std::fs::write(&path, [5; 10_000]).expect("it can be written");
        let other = File::options().read(true).write(true).open(&path).expect("it is there");
        let changed = Arc::new(OnceLock::new());
        let guarded = || Guarded::new(other.try_clone().expect("it is open"), Arc::clone(&changed)).expect("a file");
        let this = guarded();
        let mut expected = vec![5; 10_000];
        for (len, at) in [(10_000, 4_000), (20_000, 19_000), (9_000, 8_500), (12_288, 8_192), (12_300, 0)] {
            this.set_len(len).expect("it can have any");
            expected.resize(len as usize, 0);
            this.write(at as u64, &[7; 300]).expect("it has room");
            expected[at..at + 300].fill(7);
            let mut back = vec![0; expected.len()];
            this.read(0, &mut back).expect("it is there");
            assert!(back == expected && this.len().expect("it has one") == len);
            this.read(4_096, &mut back[..4_096]).expect("it is there");
            assert!(back[..4_096] == expected[4_096..8_192]);
        }
        assert!(this.read(12_299, &mut [0; 2]).is_err() && this.write(u64::MAX, &[0; 2]).is_err());
        assert_eq!(changed.get(), None, "asking too much is no change");
        let said = |result: Result<()>| result.expect_err("it was changed");
        other.write_all_at(&[1], 5_000).expect("it can be written");
        let error = said(this.read(4_500, &mut [0; 10]));
        assert_eq!((error.kind(), Changed::of(&error)), (ErrorKind::InvalidData, Some(Changed::Content(4_096))));
        assert_eq!(Changed::of(&said(this.write(4_500, &[0; 10]))), Some(Changed::Content(4_096)));
        this.read(0, &mut [0; 4_096]).expect("nothing was changed there");
        this.write(4_096, &[3; 4_096]).expect("nothing of it stays");
        this.read(4_500, &mut [0; 10]).expect("it is what was written");
        this.sync_data().expect("it can be written");
        other.write_all_at(&[1], 5).expect("it can be written");
        assert_eq!(Changed::of(&said(this.write(4_096, &[3; 4_096]))), Some(Changed::Content(0)));
        for len in [50_000, 12_300 - 20] {
            let this = guarded();
            other.set_len(len).expect("it can have any");
            let ways = [this.len().map(drop), this.set_len(9), this.sync_data(), this.write(0, &[0; 4_096])];
            assert!(ways.into_iter().all(|way| matches!(Changed::of(&said(way)), Some(Changed::Length { .. }))));
        }
        assert_eq!(changed.get(), Some(&Changed::Content(4_096)), "the first one is kept");
        std::fs::remove_file(&path).expect("it is there");
    }
}
