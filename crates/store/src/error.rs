//! Why a history cannot be used.

use std::path::{Path, PathBuf};

use redb::{DatabaseError, StorageError};
use warmswap_predict::DecodeError;

use crate::guarded::Changed;
use crate::recording::RecordingError;

/// Why a history cannot be used. Every one names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is no history.
    #[error("{path} is no profile history: {found}; it is left alone: give another path, or move it away")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// A newer program wrote it.
    #[error(
        "{path} holds a profile history of format {found}, this program reads {expected}: use the program that wrote it, or move the file away"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format and schema.
        found: String,
        /// What is read.
        expected: String,
    },
    /// It is of another device.
    #[error(
        "{path} holds the profile history of device {found}, not of {expected}: give another path, or move it away"
    )]
    Device {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose was expected.
        expected: String,
    },
    /// A process has it open.
    #[error("{path} is in use by another process: ask that one (without --store), or wait until it has ended")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is damaged.
    #[error("{path} is damaged: {what}; move it away, and a new one is begun")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// Another file is in its place.
    #[error("{path} was replaced or taken away while it was open; what is there now is left alone")]
    Replaced {
        /// Where it was.
        path: PathBuf,
    },
    /// A window in it is none.
    #[error("{path}: the window that ended at {end_unix_ns} ns is damaged: {source}")]
    Window {
        /// The file.
        path: PathBuf,
        /// Its key.
        end_unix_ns: u64,
        /// How.
        source: DecodeError,
    },
    /// A recording in it is none.
    #[error("{path}: the recording of {unix_ns} ns is damaged: {source}")]
    Recording {
        /// The file.
        path: PathBuf,
        /// Its key.
        unix_ns: u64,
        /// How.
        source: RecordingError,
    },
    /// The system says no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
}

impl StoreError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        StoreError::Io { path: path.to_owned(), source }
    }

    /// What redb said of the file at `path`.
    pub(crate) fn of(path: &Path, error: impl Into<redb::Error>) -> Self {
        let path = path.to_owned();
        match error.into() {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => StoreError::InUse { path },
            redb::Error::Io(source) if Changed::of(&source).is_some() => {
                StoreError::Damaged { path, what: source.to_string() }
            }
            redb::Error::Io(source) if source.kind() == std::io::ErrorKind::InvalidData => {
                StoreError::Foreign { path, found: source.to_string() }
            }
            redb::Error::Io(source) => StoreError::Io { path, source },
            redb::Error::UpgradeRequired(found) => {
                StoreError::Format { path, found: format!("redb {found}"), expected: "redb 3".to_owned() }
            }
            redb::Error::PreviousIo => {
                StoreError::Io { path, source: std::io::Error::other("an earlier read or write of it failed") }
            }
            error @ (redb::Error::TableDoesNotExist(_) | redb::Error::TableTypeMismatch { .. }) => {
                StoreError::Foreign { path, found: error.to_string() }
            }
            error => StoreError::Damaged { path, what: error.to_string() },
        }
    }

    /// The same of an opening, where the file's length or beginning may be wrong.
    pub(crate) fn opening(path: &Path, error: DatabaseError) -> Self {
        match error {
            DatabaseError::Storage(StorageError::Corrupted(what)) => {
                StoreError::Damaged { path: path.to_owned(), what }
            }
            error => StoreError::of(path, error),
        }
    }
}
