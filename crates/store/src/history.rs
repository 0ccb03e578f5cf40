//! The history of one device: a file.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use redb::{Builder, Database, Durability, ReadableTable, ReadableTableMetadata, Table, TableDefinition};
use warmswap_predict::{RECORD_BYTES, Record, SCHEMA_VERSION};

use crate::error::StoreError;
use crate::guarded::{Changed, Guarded};
use crate::idle::idle_like;
use crate::reader::Reader;
use crate::recording::Recording;

/// Encoded windows by their end.
pub(crate) const WINDOWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("windows");
/// Encoded recordings by their time.
pub(crate) const RECORDINGS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("recordings");
/// What the file is.
pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
pub(crate) const FORMAT_KEY: &str = "format";
pub(crate) const SCHEMA_KEY: &str = "schema";
pub(crate) const DEVICE_KEY: &str = "device";
/// Version of the tables.
pub(crate) const FORMAT: u16 = 1;

/// What every such file begins with.
pub(crate) const MAGIC: [u8; 9] = [b'r', b'e', b'd', b'b', 0x1a, 0x0a, 0xa9, 0x0d, 0x0a];
/// Memory for pages of the file. Little is ever read twice.
const CACHE: usize = 512 * 1024;
/// What a window takes of the file: pages that are filled in order are split when they are full, and stay half empty.
const WINDOW_BYTES: u64 = (RECORD_BYTES as u64 + 8) * 2;
/// What is beside a recording in its page, at most.
const RECORDING_BESIDE: u64 = 64;
/// Of idle windows one is stored in this time.
const IDLE_EVERY_NS: u64 = 60_000_000_000;

/// What is kept. What is too old is taken away by [`History::prune`], what is too much at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Age of windows, in nanoseconds.
    pub windows_ns: u64,
    /// Recordings.
    pub recordings: u64,
    /// Bytes of all of them in the file, which takes a little more: what is replaced is freed later.
    pub bytes: u64,
}

impl Retention {
    /// How many windows there is room for beside so many bytes of recordings.
    fn room(&self, recorded: u64) -> u64 {
        self.bytes.saturating_sub(recorded) / WINDOW_BYTES
    }
}

impl Default for Retention {
    /// A day of windows, 32 recordings, 80 MiB.
    fn default() -> Self {
        Retention { windows_ns: 24 * 3_600 * 1_000_000_000, recordings: 32, bytes: 80 << 20 }
    }
}

/// The history of one device: a file that one process has open. After a kill at any moment it opens again, with what was appended until
/// the last [`sync`](History::sync), [`prune`](History::prune) or [`record`](History::record), or more.
///
/// What is changed or cut off in the file by others while it is open is an error when it is met, and so is everything from then on: nothing
/// of it is taken for a history.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    database: Arc<Database>,
    /// The open file, whatever is at its path.
    place: (u64, u64),
    /// How the file was changed by others, once that was found.
    changed: Arc<OnceLock<Changed>>,
    retention: Retention,
    /// What the recordings take of the file.
    recorded: u64,
    /// The last window that was stored.
    stored: Option<Record>,
    /// Something was appended that is not on the disk yet.
    unsynced: bool,
}

impl History {
    /// Opens the history of `device` at `path`, or begins it. All of the file is checked first: it takes a moment.
    ///
    /// # Errors
    /// The file is something else, damaged, of another format or device, in use, or cannot be read and written.
    pub fn open(path: &Path, device: &str, retention: Retention) -> Result<Self, StoreError> {
        if is_begun(path)? {
            // What is refused is left as it is.
            let reader = Reader::open(path)?;
            if reader.device() != device {
                let (found, expected) = (reader.device().to_owned(), device.to_owned());
                return Err(StoreError::Device { path: path.to_owned(), found, expected });
            }
        } else {
            begin(path, device)?;
        }
        let mut options = OpenOptions::new();
        let Opened { database, place, changed } = open_guarded(path, options.read(true).write(true))?;
        let database = Arc::new(database);
        let reader = Reader::new(path, &database)?;
        // One that cannot be read is no reason to refuse the others.
        let stored = reader.last_window().unwrap_or(None);
        let path = path.to_owned();
        Ok(History { path, database, place, changed, retention, recorded: 0, stored, unsynced: false })
    }

    /// Reads of the same file, from any thread, while it is written.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn reader(&self) -> Result<Reader, StoreError> {
        Reader::new(&self.path, &self.database)
    }

    /// Appends windows in one step, and says how many were stored: of [idle](idle_like) ones one a minute. They are on the disk after the
    /// next [`sync`](History::sync), [`prune`](History::prune) or [`record`](History::record).
    ///
    /// # Errors
    /// The file cannot be written, or another one is in its place: none of them is stored.
    pub fn append(&mut self, windows: &[Record]) -> Result<usize, StoreError> {
        // Of a device at rest nothing may be written for long.
        self.check_place()?;
        let mut last = self.stored;
        let mut news = Vec::new();
        for window in windows {
            let idle = last.is_some_and(|last| {
                let since = window.end_unix_ns.checked_sub(last.end_unix_ns);
                since.is_some_and(|since| since < IDLE_EVERY_NS) && idle_like(&last, window)
            });
            if !idle {
                last = Some(*window);
                news.push(window);
            }
        }
        if news.is_empty() {
            return Ok(0);
        }
        let room = self.retention.room(self.recorded);
        self.write(Durability::None, |transaction, path| {
            let mut table = transaction.open_table(WINDOWS).map_err(|error| StoreError::of(path, error))?;
            for window in &news {
                let inserted = table.insert(window.end_unix_ns, window.encode().as_slice());
                inserted.map_err(|error| StoreError::of(path, error))?;
            }
            keep_last(&mut table, room).map_err(|error| StoreError::of(path, error))
        })?;
        self.stored = last;
        self.unsynced = true;
        Ok(news.len())
    }

    /// Keeps a recording, and takes away what is too much with it, the oldest first. It, and everything before it, is on the disk when this
    /// returns.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn record(&mut self, recording: &Recording) -> Result<(), StoreError> {
        self.write_bounded(Some(recording), 0)?;
        Ok(())
    }

    /// Takes away what is beyond the retention: windows that ended too long before `now_unix_ns`, then the oldest until the rest is within
    /// its bounds. What was appended is on the disk when this returns. How many windows and recordings were taken away.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn prune(&mut self, now_unix_ns: u64) -> Result<(u64, u64), StoreError> {
        self.write_bounded(None, now_unix_ns.saturating_sub(self.retention.windows_ns))
    }

    /// Adds a recording, if there is one, and takes away windows that ended before `since`, then what is too much. How many windows and
    /// recordings were taken away.
    fn write_bounded(&mut self, recording: Option<&Recording>, since: u64) -> Result<(u64, u64), StoreError> {
        let (retention, mut recorded) = (self.retention, 0);
        let mut gone = (0, 0);
        self.write(Durability::Immediate, |transaction, path| {
            let fail = |error: redb::StorageError| StoreError::of(path, error);
            let mut recordings = transaction.open_table(RECORDINGS).map_err(|error| StoreError::of(path, error))?;
            if let Some(recording) = recording {
                recordings.insert(recording.unix_ns, recording.encode().as_slice()).map_err(fail)?;
            }
            for entry in recordings.iter().map_err(fail)? {
                recorded += recording_bytes(entry.map_err(fail)?.1.value().len());
            }
            while recordings.len().map_err(fail)? > retention.recordings
                || (recorded > retention.bytes / 2 && recordings.len().map_err(fail)? > 1)
            {
                let Some((_, value)) = recordings.pop_first().map_err(fail)? else { break };
                recorded = recorded.saturating_sub(recording_bytes(value.value().len()));
                gone.1 += 1;
            }
            let mut windows = transaction.open_table(WINDOWS).map_err(|error| StoreError::of(path, error))?;
            let had = windows.len().map_err(fail)?;
            windows.retain_in(..since, |_, _| false).map_err(fail)?;
            keep_last(&mut windows, retention.room(recorded)).map_err(fail)?;
            gone.0 = had - windows.len().map_err(fail)?;
            Ok(())
        })?;
        (self.recorded, self.unsynced) = (recorded, false);
        Ok(gone)
    }

    /// Everything that was appended is on the disk when this returns.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn sync(&mut self) -> Result<(), StoreError> {
        self.check_place()?;
        if self.unsynced {
            self.write(Durability::Immediate, |_, _| Ok(()))?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Nothing was found to be changed by others.
    fn check_changed(&self) -> Result<(), StoreError> {
        self.changed
            .get()
            .map_or(Ok(()), |changed| Err(StoreError::Damaged { path: self.path.clone(), what: changed.to_string() }))
    }

    /// The file is still the one at its path, and nothing was found to be wrong with it.
    fn check_place(&self) -> Result<(), StoreError> {
        self.check_changed()?;
        match std::fs::metadata(&self.path) {
            Ok(found) if place(&found) == self.place => Ok(()),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StoreError::io(&self.path, error)),
            _ => Err(StoreError::Replaced { path: self.path.clone() }),
        }
    }

    fn write(
        &self,
        durability: Durability,
        change: impl FnOnce(&redb::WriteTransaction, &Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.check_place()?;
        let fail = |error: redb::Error| StoreError::of(&self.path, error);
        let written = || {
            let mut transaction = self.database.begin_write().map_err(|error| fail(error.into()))?;
            transaction.set_durability(durability).map_err(|error| fail(error.into()))?;
            change(&transaction, &self.path)?;
            transaction.commit().map_err(|error| fail(error.into()))
        };
        // Where one who reads has met it first, redb does not say what it was.
        written().map_err(|error| self.check_changed().err().unwrap_or(error))
    }
}

/// A file that is open, and what it is.
struct Opened {
    database: Database,
    place: (u64, u64),
    changed: Arc<OnceLock<Changed>>,
}

fn place(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// Opens a file to be written: what others change of it from then on is an error.
fn open_guarded(path: &Path, options: &OpenOptions) -> Result<Opened, StoreError> {
    let fail = |error| StoreError::io(path, error);
    let file = options.open(path).map_err(fail)?;
    // Before anything is read: what is found is what counts.
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => return Err(fail(error)),
    }
    let (place, changed) = (place(&file.metadata().map_err(fail)?), Arc::new(OnceLock::new()));
    let guarded = Guarded::new(file, Arc::clone(&changed)).map_err(|error| StoreError::of(path, error))?;
    let database = builder().create_with_backend(guarded).map_err(|error| StoreError::opening(path, error))?;
    Ok(Opened { database, place, changed })
}

/// Takes away the oldest windows until there is room for the others.
fn keep_last(windows: &mut Table<'_, u64, &'static [u8]>, room: u64) -> Result<(), redb::StorageError> {
    while windows.len()? > room {
        windows.pop_first()?;
    }
    Ok(())
}

impl Drop for History {
    fn drop(&mut self) {
        // Who wants to know of a failure calls it before.
        let _unsynced = self.sync();
    }
}

pub(crate) fn builder() -> Builder {
    let mut builder = Builder::new();
    // A damaged file is then an error here, and none later.
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    builder
}

/// Something is there.
fn is_begun(path: &Path) -> Result<bool, StoreError> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            Err(StoreError::Foreign { path: path.to_owned(), found: "it is no file".to_owned() })
        }
        Ok(found) => Ok(found.len() > 0),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io(path, error)),
    }
}

/// What a recording takes of the file: a large value has pages of its own, whose number is a power of two.
fn recording_bytes(len: usize) -> u64 {
    (len as u64 + RECORDING_BESIDE).next_power_of_two()
}

/// It begins as every such file does.
pub(crate) fn check_magic(path: &Path) -> Result<(), StoreError> {
    let mut found = Vec::new();
    let file = File::open(path).map_err(|error| StoreError::io(path, error))?;
    file.take(MAGIC.len() as u64).read_to_end(&mut found).map_err(|error| StoreError::io(path, error))?;
    if found != MAGIC {
        let found = "it does not begin as one".to_owned();
        return Err(StoreError::Foreign { path: path.to_owned(), found });
    }
    Ok(())
}

/// Makes an empty history beside its place and puts it there whole: a kill leaves no half of one.
fn begin(path: &Path, device: &str) -> Result<(), StoreError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(StoreError::io(&new, error)),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let Opened { database, .. } = open_guarded(&new, options.read(true).write(true).create_new(true))?;
    let fail = |error: redb::Error| StoreError::of(&new, error);
    let transaction = database.begin_write().map_err(|error| fail(error.into()))?;
    {
        let mut meta = transaction.open_table(META).map_err(|error| fail(error.into()))?;
        let (format, schema) = (FORMAT.to_le_bytes(), SCHEMA_VERSION.to_le_bytes());
        for (key, value) in [(FORMAT_KEY, &format[..]), (SCHEMA_KEY, &schema), (DEVICE_KEY, device.as_bytes())] {
            meta.insert(key, value).map_err(|error| fail(error.into()))?;
        }
        transaction.open_table(WINDOWS).map_err(|error| fail(error.into()))?;
        transaction.open_table(RECORDINGS).map_err(|error| fail(error.into()))?;
    }
    transaction.commit().map_err(|error| fail(error.into()))?;
    database.close().map_err(|error| fail(error.into()))?;
    std::fs::rename(&new, path).map_err(|error| StoreError::io(path, error))
}
