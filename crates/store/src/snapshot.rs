//! Health snapshots: what a device is, and how it has been behaving, at one moment, in one file.
//!
//! ```text
//! Snapshot ──encode──▶ bytes ──Snapshots::write──▶ DIR/NAME.snapshots/00000001767225600000000000.wss
//!    ▲                   │
//!    └──────decode───────┘◀─────read, newest_valid──── the newest that is whole, and why newer ones are not
//! ```
//! Configuration and negotiated state alone say how to begin again; with the recent profile, what the model learnt and its verdict they also
//! say what to expect. A file is put in its place whole or not at all, and one that is refused says why and costs nothing but itself: the one
//! before it is read instead.

use std::path::PathBuf;

use warmswap_predict::Record;

use crate::codec::Broken;
use crate::recording::{Recording, RecordingError};

mod directory;
mod format;

pub use directory::{Listed, Newest, SnapshotRetention, Snapshots, list, newest_that, newest_valid, read};
pub use format::{decode, encode};

/// Most bytes of a snapshot.
pub const SNAPSHOT_BYTES_MAX: usize = 1 << 20;
/// Most windows of a snapshot: ten minutes.
pub const SNAPSHOT_WINDOWS_MAX: usize = 600;

/// What a device is, and how it has been behaving, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// When, in nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Of which device.
    pub device: String,
    /// Why it was taken.
    pub reason: String,
    /// Name and version of the program that wrote it.
    pub software: String,
    /// What the device was configured with: names and values.
    pub configuration: Vec<(String, String)>,
    /// The command line that guards the device.
    pub arguments: Vec<String>,
    /// What was negotiated, as the session encodes itself.
    pub session: Vec<u8>,
    /// Where each ring stood.
    pub rings: Vec<RingPosition>,
    /// The recent profile, the oldest window first, at most [`SNAPSHOT_WINDOWS_MAX`]. They are kept [rounded](crate::rounded).
    pub windows: Vec<Record>,
    /// The last minutes tick by tick, where something happened.
    pub recording: Option<Recording>,
    /// What the model learnt, as it encodes itself.
    pub model: Vec<u8>,
    /// The trained model it learnt with.
    pub trained_digest: u32,
    /// The last verdict, if there was one.
    pub verdict: Option<SnapshotVerdict>,
    /// Of a snapshot that was read: what in it is of another version of the profile and was left out, and why. Not written.
    pub passed_over: Vec<Refusal>,
}

/// Where a ring stood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingPosition {
    /// Number of the ring.
    pub index: u32,
    /// Its entries.
    pub size: u16,
    /// What the driver had made available.
    pub avail_idx: u16,
    /// What the device had used.
    pub used_idx: u16,
    /// Requests between the two.
    pub in_flight: u16,
    /// Whether every one of them is known, or only how many there are.
    pub exact: bool,
}

/// What the model said last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SnapshotVerdict {
    /// Probability of a failure within each horizon.
    pub risk: [f32; 4],
    /// What the guest suffers, 0 to 1.
    pub harm: f32,
    /// Evidence against health as a part of what an alarm takes, 0 to 1.
    pub evidence: f32,
    /// The kind of alarm, if there is one.
    pub alarm: Option<String>,
    /// The alarm as a sentence.
    pub reason: Option<String>,
    /// What speaks most for a failure, the most first, and its part of that.
    pub causes: Vec<(String, f32)>,
    /// Windows the model has learnt from.
    pub learnt: u64,
}

/// Why bytes are no snapshot, or a snapshot cannot be bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// They end too early.
    #[error("health snapshot: it ends within its header or a section")]
    Short,
    /// They do not begin as one does.
    #[error("health snapshot: it does not begin as one")]
    Magic,
    /// It was written in another format.
    #[error("health snapshot: format {found}, expected {expected}: use the program that wrote it")]
    Format {
        /// The format found.
        found: u16,
        /// What is read.
        expected: u16,
    },
    /// There are more or fewer bytes than it says.
    #[error("health snapshot: {found} bytes, expected {expected}: it was cut off or added to")]
    Length {
        /// Bytes there.
        found: u64,
        /// What it says.
        expected: u64,
    },
    /// It is larger than any.
    #[error("health snapshot: {bytes} bytes, at most {SNAPSHOT_BYTES_MAX}")]
    Large {
        /// Its bytes.
        bytes: u64,
    },
    /// It has more windows than any.
    #[error("health snapshot: more than {SNAPSHOT_WINDOWS_MAX} windows")]
    Windows,
    /// The checksum is of other bytes.
    #[error("health snapshot: it is damaged: the checksum is of other bytes")]
    Checksum,
    /// It lacks what every one has.
    #[error("health snapshot: its {0} is missing")]
    Missing(&'static str),
    /// It has something twice.
    #[error("health snapshot: it has its {0} twice")]
    Twice(&'static str),
    /// A part of it cannot be read.
    #[error("health snapshot: its {0} cannot be read")]
    Section(&'static str),
    /// Its windows have another table of features.
    #[error("health snapshot: its windows are of schema {found} with {features} features, which is not this program's")]
    Schema {
        /// The schema found.
        found: u16,
        /// Features of it.
        features: u16,
    },
    /// A window is none.
    #[error("health snapshot: its windows: {0}")]
    Window(#[from] Broken),
    /// Its recording is none.
    #[error("health snapshot: its recording: {0}")]
    Recording(#[from] RecordingError),
}

/// Why snapshots cannot be written or read. Every one names the file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// What is in the file, or is to be, is no snapshot.
    #[error("{path}: {source}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Refusal,
    },
    /// It can be read, and will not do for who asks.
    #[error("{path}: {why}")]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// It is of another device.
    #[error("{path} is a health snapshot of device {found}, not of {expected}: move it away")]
    Device {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose was expected.
        expected: String,
    },
    /// A directory cannot have the name of such a device.
    #[error(
        "{path} cannot have snapshots of a device named {device:?}: it is to be a file name that does not begin with a dot"
    )]
    Name {
        /// Where its directory was to be.
        path: PathBuf,
        /// The device.
        device: String,
    },
    /// What is beyond the retention cannot be taken away.
    #[error("{path} is too old or too much and cannot be taken away: {source}; the new snapshot is on the disk")]
    Kept {
        /// The file that stays.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
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
