//! What the device is: features, and the configuration space (virtio 1.3 §5.2.3, §5.2.4).
//!
//! By default both say what qemu-storage-daemon says of the same image, so that either can stand in for the other.
//!
//! `VIRTIO_F_ACCESS_PLATFORM` is not offered: behind an IOMMU every address would have to be translated by the front-end, through a
//! cache that belongs to one back-end alone. Whoever takes over would begin with an empty one, in the middle of requests whose
//! translations may be gone.

use warmswap_wire::{ProtocolFeatures, VirtioFeatures};

use crate::image::SECTOR;
use crate::request::{ID_BYTES, RANGE_SECTORS_MAX};

/// Most data segments of one request.
const SEGMENTS_MAX: u32 = 126;

// VIRTIO_BLK_F_*.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub(crate) const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub(crate) const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Length of the configuration space: the whole structure, with zeroes where it belongs to features that are not offered.
pub(crate) const CONFIG_BYTES: usize = 96;
/// Where `writeback` lies in it: the one field that a driver may write.
pub(crate) const WRITEBACK_AT: usize = 32;

/// Protocol features.
pub(crate) const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) sectors: u64,
    pub(crate) block_size: u32,
    pub(crate) queues: u16,
    pub(crate) read_only: bool,
}

impl Shape {
    /// Virtio features that are offered.
    pub(crate) fn features(&self) -> u64 {
        let transport = VirtioFeatures::VERSION_1
            | VirtioFeatures::EVENT_IDX
            | VirtioFeatures::INDIRECT_DESC
            | VirtioFeatures::LOG_ALL
            | VirtioFeatures::PROTOCOL_FEATURES;
        let device = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES;
        transport.bits() | device | if self.read_only { F_RO } else { 0 }
    }

    /// The configuration space.
    pub(crate) fn config(&self, write_cache: bool) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        // Topology: blocks of their own size, aligned at the start; least and best size of I/O in blocks.
        put(26, &1_u16.to_le_bytes());
        put(28, &1_u32.to_le_bytes());
        put(WRITEBACK_AT, &[u8::from(write_cache)]);
        put(34, &self.queues.to_le_bytes());
        for at in [36, 48] {
            // Discard and write zeroes: most sectors, most segments.
            put(at, &RANGE_SECTORS_MAX.to_le_bytes());
            put(at + 4, &1_u32.to_le_bytes());
        }
        put(44, &(self.block_size / SECTOR as u32).to_le_bytes());
        config
    }
}

/// The name of a device as GET_ID tells it: cut, or filled with zeroes.
pub(crate) fn id(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let len = serial.len().min(ID_BYTES);
    id[..len].copy_from_slice(&serial.as_bytes()[..len]);
    id
}
