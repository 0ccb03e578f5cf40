//! Reading a history.

use std::fs::{File, TryLockError};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata};
use warmswap_predict::{Record, SCHEMA_VERSION};

use crate::error::StoreError;
use crate::history::{DEVICE_KEY, FORMAT, FORMAT_KEY, META, RECORDINGS, SCHEMA_KEY, WINDOWS, builder, check_magic};
use crate::overlay::Overlay;
use crate::recording::Recording;

/// Reads a history, from any thread, while it is written or after.
#[derive(Clone, Debug)]
pub struct Reader {
    path: PathBuf,
    database: Arc<Database>,
    device: String,
}

/// Windows of a history, the oldest first.
pub struct Windows {
    path: PathBuf,
    range: redb::Range<'static, u64, &'static [u8]>,
    /// Closed, it could not be read on.
    _database: Arc<Database>,
}

impl std::fmt::Debug for Windows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Windows").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Iterator for Windows {
    type Item = Result<Record, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.range.next()?;
        Some(entry.map_err(|error| StoreError::of(&self.path, error)).and_then(|(end, value)| {
            let (path, end_unix_ns) = (&self.path, end.value());
            Record::decode(value.value()).map_err(|source| StoreError::Window {
                path: path.clone(),
                end_unix_ns,
                source,
            })
        }))
    }
}

impl Reader {
    pub(crate) fn new(path: &Path, database: &Arc<Database>) -> Result<Self, StoreError> {
        let mut reader = Reader { path: path.to_owned(), database: Arc::clone(database), device: String::new() };
        reader.device = reader.check()?;
        Ok(reader)
    }

    /// Opens the history that a process has left. All of the file is checked first. It is not written to: what is to be repaired after a
    /// kill is repaired in memory. While it is read nobody can write to it.
    ///
    /// # Errors
    /// As [`History::open`](crate::History::open).
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(path, error);
        let file = File::open(path).map_err(fail)?;
        match file.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(fail(error)),
        }
        let found = file.metadata().map_err(fail)?;
        if !found.is_file() {
            return Err(StoreError::Foreign { path: path.to_owned(), found: "it is no file".to_owned() });
        }
        check_magic(path)?;
        let overlay = Overlay::new(file).map_err(fail)?;
        let database = builder().create_with_backend(overlay).map_err(|error| StoreError::opening(path, error))?;
        Reader::new(path, &Arc::new(database))
    }

    /// What the file is; the device's name.
    fn check(&self) -> Result<String, StoreError> {
        let transaction = self.transaction()?;
        let meta = transaction.open_table(META).map_err(|error| StoreError::of(&self.path, error))?;
        let get = |key: &str| -> Result<Vec<u8>, StoreError> {
            let value = meta.get(key).map_err(|error| StoreError::of(&self.path, error))?;
            let value = value.map(|value| value.value().to_owned());
            value.ok_or_else(|| StoreError::Foreign { path: self.path.clone(), found: format!("it says no {key}") })
        };
        let [format, schema] =
            [get(FORMAT_KEY)?, get(SCHEMA_KEY)?].map(|bytes| bytes.try_into().map_or(0, u16::from_le_bytes));
        if (format, schema) != (FORMAT, SCHEMA_VERSION) {
            let name = |format, schema| format!("{format} with schema {schema}");
            let (found, expected) = (name(format, schema), name(FORMAT, SCHEMA_VERSION));
            return Err(StoreError::Format { path: self.path.clone(), found, expected });
        }
        Ok(String::from_utf8_lossy(&get(DEVICE_KEY)?).into_owned())
    }

    fn transaction(&self) -> Result<ReadTransaction, StoreError> {
        self.database.begin_read().map_err(|error| StoreError::of(&self.path, error))
    }

    /// The device whose history it is.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Windows that ended from `from_unix_ns` to `to_unix_ns`, the oldest first. Of idle windows one a minute is stored: a gap is idleness,
    /// or a program that did not run. What is appended later is not among them.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn range(&self, from_unix_ns: u64, to_unix_ns: u64) -> Result<Windows, StoreError> {
        let table = self.transaction()?.open_table(WINDOWS).map_err(|error| StoreError::of(&self.path, error))?;
        // One that ends before it begins is empty.
        let bounds = (Bound::Included(from_unix_ns), Bound::Included(to_unix_ns));
        let empty = (Bound::Included(0), Bound::Excluded(0));
        let range = table.range::<u64>(if from_unix_ns > to_unix_ns { empty } else { bounds });
        let range = range.map_err(|error| StoreError::of(&self.path, error))?;
        Ok(Windows { path: self.path.clone(), range, _database: Arc::clone(&self.database) })
    }

    /// The last window that is stored, unless it is damaged.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn last_window(&self) -> Result<Option<Record>, StoreError> {
        let table = self.transaction()?.open_table(WINDOWS).map_err(|error| StoreError::of(&self.path, error))?;
        let last = table.last().map_err(|error| StoreError::of(&self.path, error))?;
        Ok(last.and_then(|(_, value)| Record::decode(value.value()).ok()))
    }

    /// How many windows are stored.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn windows(&self) -> Result<u64, StoreError> {
        let table = self.transaction()?.open_table(WINDOWS).map_err(|error| StoreError::of(&self.path, error))?;
        table.len().map_err(|error| StoreError::of(&self.path, error))
    }

    /// Times of the recordings, the oldest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn recordings(&self) -> Result<Vec<u64>, StoreError> {
        let table = self.transaction()?.open_table(RECORDINGS).map_err(|error| StoreError::of(&self.path, error))?;
        let entries = table.iter().map_err(|error| StoreError::of(&self.path, error))?;
        entries.map(|entry| Ok(entry.map_err(|error| StoreError::of(&self.path, error))?.0.value())).collect()
    }

    /// The recording of that time, if there is one.
    ///
    /// # Errors
    /// The file cannot be read, or the recording is damaged.
    pub fn recording(&self, unix_ns: u64) -> Result<Option<Recording>, StoreError> {
        let table = self.transaction()?.open_table(RECORDINGS).map_err(|error| StoreError::of(&self.path, error))?;
        let value = table.get(unix_ns).map_err(|error| StoreError::of(&self.path, error))?;
        let recording = value.map(|value| Recording::decode(value.value())).transpose();
        recording.map_err(|source| StoreError::Recording { path: self.path.clone(), unix_ns, source })
    }
}
