//! Bytes to and from vhost-user messages, features, the memory table, the in-flight region and split-ring layout.
//!
//! This crate knows the vhost-user protocol (QEMU `docs/interop/vhost-user.rst`) and the split virtqueue layout (virtio 1.3
//! §2.7). It knows no socket, no clock, no file descriptor: a descriptor is a [`FdSlot`], a number in the caller's table.
//! Everything it is given is hostile until decoded; nothing here panics on input.
//!
//! Calling order for a stream: read [`HEADER_SIZE`] bytes, [`Header::decode`], read [`Header::size`] more bytes, then
//! [`Request::decode`], [`Reply::decode`] or [`BackendRequest::decode`].

#![forbid(unsafe_code)]

mod backend;
mod bytes;
mod error;
mod features;
mod header;
pub mod inflight;
mod memory;
mod payload;
mod reply;
mod request;
pub mod ring;

pub use backend::BackendRequest;
pub use error::{Channel, Error};
pub use features::{DeviceType, ProtocolFeatures, VirtioFeatures};
pub use header::{HEADER_SIZE, Header, HeaderFlags, PAYLOAD_SIZE_MAX};
pub use memory::{MemoryRegion, MemoryTable, REGIONS_MAX};
pub use payload::{
    ConfigSpace, DeviceStateTransfer, FdSlot, HostNotifierArea, InflightDescription, IotlbMessage, LogRegion,
    RINGS_MAX, SharedObjectId, VringAddr, VringFd, VringState,
};
pub use reply::{Reply, ReplyKind};
pub use request::{Request, RequestCode};

/// Most descriptors accepted with one message. The specification needs at most eight (SET_MEM_TABLE without
/// CONFIGURE_MEM_SLOTS); rust-vmm's `vhost` takes 32.
pub const FDS_MAX: usize = 32;
