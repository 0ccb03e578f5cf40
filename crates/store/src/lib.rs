//! What a device's profile leaves behind: in memory the last minutes tick by tick, on disk its windows.
//!
//! ```text
//! ticks ───▶ FlightRecorder ──freeze──▶ Recording ──┐
//! windows ──────────────────────────────────────────┴──▶ History (one file) ──▶ Reader
//! ```
//! Both are bounded, and both leave out what is [idle](idle_like): a component that rests costs next to nothing. Times are arguments.

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

pub use codec::{Broken, rounded};
pub use error::StoreError;
pub use flight::{FLIGHT_BYTES_MAX, FLIGHT_KEEP_NS, FlightRecorder};
pub use history::{History, Retention};
pub use idle::idle_like;
pub use reader::{Reader, Windows};
pub use recording::{Recording, RecordingError, Ticks};
