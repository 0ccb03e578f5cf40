//! What a device's profile leaves behind: in memory the last minutes tick by tick, on disk its windows.
//!
//! ```text
//! ticks ───▶ FlightRecorder ──freeze──▶ Recording ──┐
//! windows ──────────────────────────────────────────┴──▶ History (one file) ──▶ Reader
//!    └── and what the device is ──▶ Snapshot ──▶ Snapshots (a file each)
//! ```
//! All are bounded, and recorder and history leave out what is [idle](idle_like): a component that rests costs next to nothing. Times are
//! arguments.

#![forbid(unsafe_code)]

mod codec;
mod error;
mod flight;
mod guarded;
mod history;
mod idle;
mod overlay;
mod reader;
mod recording;
pub mod snapshot;

pub use codec::{Broken, rounded};
pub use error::StoreError;
pub use flight::{FLIGHT_BYTES_MAX, FLIGHT_KEEP_NS, FlightRecorder};
pub use history::{History, Retention};
pub use idle::idle_like;
pub use reader::{Reader, Windows};
pub use recording::{Recording, RecordingError, Ticks};
pub use snapshot::{
    Listed, Newest, Refusal, RingPosition, SNAPSHOT_BYTES_MAX, SNAPSHOT_WINDOWS_MAX, Snapshot, SnapshotError,
    SnapshotRetention, SnapshotVerdict, Snapshots,
};
