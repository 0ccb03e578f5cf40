//! The record of one device: everything the next broker has to know of it.
//!
//! It is JSON, so that a broker of another version reads what it knows: fields that were added say `default`, fields it does not know are
//! passed over. A change that an older broker would misread is a new [`FORMAT`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use warmswap_core::{FenceLevel, Nanos};

use crate::shm::Batch;

/// Version of the record.
pub(crate) const FORMAT: u32 = 2;

/// A device at one moment. `P` is the pair and `O` the outbox, or references to them where the record is only written.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record<P, O = Outbox> {
    pub(crate) format: u32,
    /// Number of the record: so many times something was to be done.
    pub(crate) number: u64,
    /// When it was written.
    pub(crate) at: Nanos,
    /// Program that wrote it.
    pub(crate) version: String,
    pub(crate) pair: P,
    pub(crate) shell: Shell,
    pub(crate) outbox: O,
}

/// What the driver knows beyond the pair. Descriptors go by their names in the store.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Shell {
    /// The descriptor table: slot and name.
    pub(crate) slots: Vec<(u32, u32)>,
    pub(crate) next_slot: u32,
    pub(crate) listener: Option<u32>,
    pub(crate) listening_at: Option<(u64, u64)>,
    pub(crate) vmm: Option<VmmRecord>,
    pub(crate) backends: Vec<BackendRecord>,
    pub(crate) fences: Vec<FenceRecord>,
    /// Backends that were proved harmless, of which the pair has not been told yet: which, how far, and how that is known.
    pub(crate) proved: Vec<(u64, FenceLevel, String)>,
    /// Backends that serve nothing and have been killed.
    pub(crate) retired: Vec<ProcessRecord>,
    pub(crate) run_dir: PathBuf,
    pub(crate) commands: u64,
    pub(crate) private_memory: Option<String>,
    pub(crate) refused_ring: Option<String>,
}

/// The VMM's connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VmmRecord {
    pub(crate) connection: ConnectionRecord,
    pub(crate) process: Option<u32>,
    pub(crate) pid: Option<u32>,
}

/// One connection.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct ConnectionRecord {
    pub(crate) socket: u32,
    /// Something waited for the peer to read. It dies with the broker, and so the connection is no good any more.
    pub(crate) unsent: bool,
}

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    pub(crate) pid: u32,
    pub(crate) pidfd: u32,
    pub(crate) stderr: Option<u32>,
    pub(crate) group: Option<PathBuf>,
    /// A broker has started it.
    pub(crate) ours: bool,
}

/// One backend.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BackendRecord {
    pub(crate) id: u64,
    pub(crate) path: PathBuf,
    pub(crate) process: Option<ProcessRecord>,
    pub(crate) link: Option<ConnectionRecord>,
    pub(crate) requests: Option<ConnectionRecord>,
    pub(crate) primary: bool,
    pub(crate) given_at: Option<Nanos>,
    /// What it had open when that was last looked at.
    pub(crate) storage: StorageRecord,
}

/// A fence that was being raised.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FenceRecord {
    pub(crate) backend: u64,
    pub(crate) process: ProcessRecord,
    pub(crate) given_at: Option<Nanos>,
    /// When it was killed.
    pub(crate) killed_at: Nanos,
    pub(crate) storage: StorageRecord,
}

/// What a backend had open.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StorageRecord {
    pub(crate) marks: Vec<MarkRecord>,
    pub(crate) unmarked: Option<String>,
    pub(crate) foreign: Option<String>,
    pub(crate) hidden: Option<String>,
    pub(crate) ring: bool,
    pub(crate) others: Vec<MemberRecord>,
    pub(crate) began: Option<Nanos>,
}

/// A mark on an open file description: the byte of it that is locked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MarkRecord {
    pub(crate) path: String,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) byte: i64,
    pub(crate) claimed: bool,
}

/// A process that a backend has started. Its start tells it from another one of that number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MemberRecord {
    pub(crate) pid: u32,
    pub(crate) started: u64,
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Channel {
    /// The VMM.
    Vmm,
    /// The VMM, on its back-end request channel, which is this slot.
    VmmBackend(u32),
    /// A backend, on its link.
    Link(u64),
    /// A backend, on its own channel.
    Requests(u64),
}

/// A message that is to be sent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) to: Channel,
    pub(crate) bytes: Vec<u8>,
    /// Slots.
    pub(crate) fds: Vec<u32>,
}

/// What is to be done because of the step that led to the record.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Outbox {
    /// Messages that have been looked at, to be taken away: from whom, and the length of the payload.
    pub(crate) taken: Vec<(Channel, usize)>,
    /// Stores into guest memory. They come before the messages: done if those are.
    pub(crate) stores: Vec<Batch>,
    pub(crate) messages: Vec<Message>,
    /// What follows, in this order, can be done twice: slots to be written once, backends to be ended, slots to be closed.
    pub(crate) signals: Vec<u32>,
    pub(crate) retires: Vec<u64>,
    pub(crate) closes: Vec<u32>,
    /// The VMM's connection is to be dropped.
    pub(crate) drop_vmm: bool,
}
