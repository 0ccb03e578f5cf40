//! A file that is read and never written to.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

use crate::guarded::{BLOCK, Sums, blocks};

#[derive(Debug)]
struct Written {
    len: u64,
    /// Bytes of the file that count. What was cut off by a shorter length does not come back.
    file_len: u64,
    /// Blocks that are not as they are in the file, by their number.
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
}

/// A file, and in memory what is written over it: a database that is to be repaired after a kill is so without being touched. What is
/// changed of the file after it was opened is an error.
#[derive(Debug)]
pub(crate) struct Overlay {
    file: File,
    sums: Sums,
    written: Mutex<Written>,
}

impl Overlay {
    pub(crate) fn new(file: File) -> Result<Self> {
        let sums = Sums::of(&file)?;
        let len = sums.len();
        let written = Mutex::new(Written { len, file_len: len, blocks: BTreeMap::new() });
        Ok(Overlay { file, sums, written })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block as it is in the file, with zeroes behind its end.
    fn original(&self, block: u64, file_len: u64) -> Result<Box<[u8; BLOCK]>> {
        let there = usize::try_from(file_len.saturating_sub(block * BLOCK as u64)).unwrap_or(BLOCK).min(BLOCK);
        if there == 0 {
            return Ok(Box::new([0; BLOCK]));
        }
        let mut bytes = Box::new(self.sums.block(&self.file, block)?);
        bytes[there..].fill(0);
        Ok(bytes)
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> Result<u64> {
        Ok(self.written().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let written = self.written();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.len) {
            return Err(Error::new(ErrorKind::UnexpectedEof, "it ends before what is to be read"));
        }
        for (block, within, range) in blocks(offset, out.len()) {
            let (part, len) = (&mut out[range.clone()], range.len());
            match written.blocks.get(&block) {
                Some(bytes) => part.copy_from_slice(&bytes[within..within + len]),
                None => part.copy_from_slice(&self.original(block, written.file_len)?[within..within + len]),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut written = self.written();
        if len < written.len {
            written.file_len = written.file_len.min(len);
            let (last, within) = (len / BLOCK as u64, (len % BLOCK as u64) as usize);
            written.blocks.split_off(&(last + 1));
            if let Some(block) = written.blocks.get_mut(&last) {
                block[within..].fill(0);
            }
        }
        written.len = len;
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        // A process that is being started has the file open for a moment, and would keep it locked.
        self.file.unlock()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut written = self.written();
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > written.len) {
            return Err(Error::new(ErrorKind::InvalidInput, "it ends before what is to be written"));
        }
        for (block, within, range) in blocks(offset, data.len()) {
            if !written.blocks.contains_key(&block) {
                let original = self.original(block, written.file_len)?;
                written.blocks.insert(block, original);
            }
            if let Some(bytes) = written.blocks.get_mut(&block) {
                bytes[within..within + range.len()].copy_from_slice(&data[range]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_the_file_stays_what_it_is() {
        let path = std::env::temp_dir().join(format!("ws-overlay-{}", std::process::id()));
        let content: Vec<u8> = (0..10_000_u32).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &content).expect("it can be written");
        let overlay = Overlay::new(File::open(&path).expect("it is there")).expect("it has a length");
        let mut expected = content.clone();
        let check = |expected: &[u8]| {
            let mut back = vec![0; expected.len()];
            overlay.read(0, &mut back).expect("it is there");
            assert!(back == expected && overlay.len().expect("it has one") == expected.len() as u64);
        };
        check(&expected);
        overlay.write(4_000, &[7; 5_000]).expect("it has room");
        expected[4_000..9_000].fill(7);
        check(&expected);
        // What is cut off does not come back.
        for (len, fill) in [(8_500, None), (9_500, None), (3_000, None), (20_000, Some(19_990))] {
            overlay.set_len(len).expect("it can have any");
            expected.resize(len as usize, 0);
            if let Some(at) = fill {
                overlay.write(at, &[9; 10]).expect("it has room");
                expected[at as usize..at as usize + 10].fill(9);
            }
            check(&expected);
        }
        assert!(overlay.read(19_999, &mut [0; 2]).is_err() && overlay.write(u64::MAX, &[0; 2]).is_err());
        assert!(std::fs::read(&path).expect("it is there") == content);
        std::fs::remove_file(&path).expect("it is there");
    }
}
