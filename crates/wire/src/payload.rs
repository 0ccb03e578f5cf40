//! The structures that payloads are made of.

use crate::bytes::{Put, Reader};
use crate::{Error, PAYLOAD_SIZE_MAX};
use serde::{Deserialize, Serialize};

/// A descriptor by its number in the caller's table. The codec never sees a real one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FdSlot(pub u32);

/// Most rings of one device: KICK, CALL and ERR have eight bits for the index.
pub const RINGS_MAX: u32 = 256;

pub(crate) fn ring_index(request: &'static str, index: u32) -> Result<u32, Error> {
    if index < RINGS_MAX {
        Ok(index)
    } else {
        Err(Error::Value { request, field: "ring index", found: u64::from(index), expected: "less than 256" })
    }
}

/// A ring and one number: its size, base, enable flag or endianness ("vring state description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringState {
    /// Ring index.
    pub index: u32,
    /// The number.
    pub value: u32,
}

impl VringState {
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::exactly(request, payload, 8)?;
        Ok(VringState { index: ring_index(request, reader.u32()?)?, value: reader.u32()? })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u32(self.index);
        out.put_u32(self.value);
    }
}

/// Where a ring lies, in the front-end's own (user) address space ("vring address description").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringAddr {
    /// Ring index.
    pub index: u32,
    /// Bit 0: log writes to the used ring (`VHOST_VRING_F_LOG`).
    pub flags: u32,
    /// Descriptor table.
    pub descriptor: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Guest-physical address of the used ring, for the dirty log.
    pub log: u64,
}

impl VringAddr {
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::exactly(request, payload, 40)?;
        Ok(VringAddr {
            index: ring_index(request, reader.u32()?)?,
            flags: reader.u32()?,
            descriptor: reader.u64()?,
            used: reader.u64()?,
            available: reader.u64()?,
            log: reader.u64()?,
        })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u32(self.index);
        out.put_u32(self.flags);
        out.put_u64(self.descriptor);
        out.put_u64(self.used);
        out.put_u64(self.available);
        out.put_u64(self.log);
    }
}

/// A ring and its kick, call or error descriptor; none means "poll" (bit 8 of the payload).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringFd {
    /// Ring index.
    pub index: u32,
    /// The eventfd.
    pub fd: Option<FdSlot>,
}

impl VringFd {
    const NO_FD: u64 = 1 << 8;

    pub(crate) fn decode(request: &'static str, payload: &[u8], fds: &[FdSlot]) -> Result<Self, Error> {
        let value = Reader::exactly(request, payload, 8)?.u64()?;
        let index = (value & 0xff) as u32;
        if value & Self::NO_FD != 0 {
            no_fds(request, fds)?;
            return Ok(VringFd { index, fd: None });
        }
        Ok(VringFd { index, fd: Some(one_fd(request, fds)?) })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u64(u64::from(self.index & 0xff) | if self.fd.is_none() { Self::NO_FD } else { 0 });
    }
}

/// Offset and size of the dirty log in the descriptor that comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRegion {
    /// Size in bytes.
    pub size: u64,
    /// Offset into the descriptor.
    pub offset: u64,
}

impl LogRegion {
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::exactly(request, payload, 16)?;
        Ok(LogRegion { size: reader.u64()?, offset: reader.u64()? })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u64(self.size);
        out.put_u64(self.offset);
    }
}

/// A part of the virtio device's configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpace {
    /// First byte.
    pub offset: u32,
    /// Of SET_CONFIG: 0 = a write of the guest, 1 = a migration (specification, QEMU); rust-vmm's `vhost` says 1 and 2.
    pub flags: u32,
    /// The bytes. In a request for reading they only carry the length.
    pub bytes: Vec<u8>,
}

impl ConfigSpace {
    /// Largest part one message may carry (`VHOST_USER_MAX_CONFIG_SIZE`).
    pub const SIZE_MAX: usize = 256;

    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(request, payload);
        let (offset, size, flags) = (reader.u32()?, reader.u32()?, reader.u32()?);
        if size as usize > Self::SIZE_MAX || offset as usize > Self::SIZE_MAX {
            return Err(Error::Value {
                request,
                field: "offset or size",
                found: u64::from(size.max(offset)),
                expected: "at most 256",
            });
        }
        let bytes = reader.take(size as usize)?.to_vec();
        reader.end()?;
        Ok(ConfigSpace { offset, flags, bytes })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.offset);
        out.put_u32(u32::try_from(self.bytes.len()).expect("bounded by SIZE_MAX"));
        out.put_u32(self.flags);
        out.extend_from_slice(&self.bytes);
    }
}

/// The in-flight region as GET/SET_INFLIGHT_FD describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightDescription {
    /// Size of the mapping in bytes.
    pub mmap_size: u64,
    /// Offset of the mapping in the descriptor.
    pub mmap_offset: u64,
    /// Number of rings it covers.
    pub num_queues: u16,
    /// Ring size.
    pub queue_size: u16,
}

impl InflightDescription {
    /// The structure is 20 bytes of fields, which peers send padded to 24 (`sizeof` in C): QEMU, DPDK and rust-vmm's `vhost` take no
    /// other length.
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        if payload.len() != 20 && payload.len() != 24 {
            return Err(Error::Length { request, expected: 20, found: payload.len() });
        }
        let mut reader = Reader::new(request, payload);
        Ok(InflightDescription {
            mmap_size: reader.u64()?,
            mmap_offset: reader.u64()?,
            num_queues: reader.u16()?,
            queue_size: reader.u16()?,
        })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u64(self.mmap_size);
        out.put_u64(self.mmap_offset);
        out.put_u16(self.num_queues);
        out.put_u16(self.queue_size);
        out.put_u32(0);
    }
}

/// An IOTLB message (`struct vhost_iotlb_msg`, 32 bytes with padding).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbMessage {
    /// I/O virtual address.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
    /// Front-end virtual address.
    pub user_addr: u64,
    /// Access permission: 0 none, 1 read, 2 write, 3 both.
    pub perm: u8,
    /// 1 miss, 2 update, 3 invalidate, 4 access fail.
    pub kind: u8,
}

impl IotlbMessage {
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        if payload.len() != 26 && payload.len() != 32 {
            return Err(Error::Length { request, expected: 32, found: payload.len() });
        }
        let mut reader = Reader::new(request, payload);
        Ok(IotlbMessage {
            iova: reader.u64()?,
            size: reader.u64()?,
            user_addr: reader.u64()?,
            perm: reader.u8()?,
            kind: reader.u8()?,
        })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u64(self.iova);
        out.put_u64(self.size);
        out.put_u64(self.user_addr);
        out.put_u8(self.perm);
        out.put_u8(self.kind);
        out.extend_from_slice(&[0; 6]);
    }
}

/// A part of a descriptor the VMM shall map as a ring's doorbell ("vring area description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostNotifierArea {
    /// Ring index; bit 8 set means there is no area any more.
    pub ring: u64,
    /// Size in bytes.
    pub size: u64,
    /// Offset into the descriptor.
    pub offset: u64,
}

impl HostNotifierArea {
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::exactly(request, payload, 24)?;
        Ok(HostNotifierArea { ring: reader.u64()?, size: reader.u64()?, offset: reader.u64()? })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u64(self.ring);
        out.put_u64(self.size);
        out.put_u64(self.offset);
    }
}

/// The UUID of a shared object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedObjectId(pub [u8; 16]);

impl SharedObjectId {
    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut id = [0; 16];
        id.copy_from_slice(Reader::exactly(request, payload, 16)?.take(16)?);
        Ok(SharedObjectId(id))
    }
}

/// Direction and phase of a device state transfer (SET_DEVICE_STATE_FD).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStateTransfer {
    /// 0 save, 1 load.
    pub direction: u32,
    /// 0 stopped: the only phase there is.
    pub phase: u32,
}

impl DeviceStateTransfer {
    /// Out of a back-end whose rings are stopped.
    pub const SAVE: Self = DeviceStateTransfer { direction: 0, phase: 0 };
    /// Into one whose rings are stopped.
    pub const LOAD: Self = DeviceStateTransfer { direction: 1, phase: 0 };

    pub(crate) fn decode(request: &'static str, payload: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::exactly(request, payload, 8)?;
        Ok(DeviceStateTransfer { direction: reader.u32()?, phase: reader.u32()? })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.put_u32(self.direction);
        out.put_u32(self.phase);
    }
}

pub(crate) fn no_fds(request: &'static str, fds: &[FdSlot]) -> Result<(), Error> {
    if fds.is_empty() { Ok(()) } else { Err(Error::Descriptors { request, expected: 0, found: fds.len() }) }
}

pub(crate) fn one_fd(request: &'static str, fds: &[FdSlot]) -> Result<FdSlot, Error> {
    match fds {
        [fd] => Ok(*fd),
        _ => Err(Error::Descriptors { request, expected: 1, found: fds.len() }),
    }
}

pub(crate) fn at_most_one_fd(request: &'static str, fds: &[FdSlot]) -> Result<Option<FdSlot>, Error> {
    match fds {
        [] => Ok(None),
        _ => one_fd(request, fds).map(Some),
    }
}

const _: () = assert!(ConfigSpace::SIZE_MAX + 12 <= PAYLOAD_SIZE_MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_and_size_of_a_part_of_the_configuration_space_are_bounded_each() {
        for (offset, size, fits) in [
            (0_u32, 256_u32, true),
            (256, 0, true),
            (256, 256, true),
            (257, 0, false),
            (0, 257, false),
            (257, 257, false),
        ] {
            let words = [offset, size, 0].map(u32::to_ne_bytes).concat();
            let payload = [words, vec![0; size as usize]].concat();
            assert_eq!(ConfigSpace::decode("GET_CONFIG", &payload).is_ok(), fits, "{size} bytes at {offset}");
        }
    }
}
