//! The session: what the VMM has negotiated, as a value.
//!
//! It records the last effective value of every message, so it can be applied to any backend at any time, encoded, and
//! rebuilt by another process from its bytes and a table of named descriptors ([`Session::encode`], [`Session::decode`]).

mod codec;

pub use codec::{NamedFd, SessionError};

use serde::{Deserialize, Serialize};
use warmswap_wire::{
    ConfigSpace, FdSlot, LogRegion, MemoryRegion, MemoryTable, Request, VirtioFeatures, VringAddr, VringState,
};
use warmswap_wire::{RINGS_MAX, VringFd};
use warmswap_zoo::{Animal, loose};

use crate::event::{Action, Actions};

/// Most writes to the configuration space that are kept; at each place only the last one counts.
const CONFIG_WRITES_MAX: usize = codec::CONFIG_WRITES_MAX as usize;

/// One ring as the VMM described it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ring {
    /// Number of entries.
    pub size: Option<u32>,
    /// Where its parts lie.
    pub addr: Option<VringAddr>,
    /// The base the VMM asked for.
    pub base: Option<u32>,
    /// Kick descriptor.
    pub kick: Option<FdSlot>,
    /// Call descriptor.
    pub call: Option<FdSlot>,
    /// Error descriptor.
    pub err: Option<FdSlot>,
    /// The last SET_VRING_ENABLE, if there was one.
    pub enabled: Option<bool>,
    /// The VMM wants the ring served: it sent a kick descriptor and no stop since.
    pub started: bool,
}

/// What the VMM has negotiated and described.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Session {
    /// Virtio features the VMM accepted.
    pub features: Option<u64>,
    /// Protocol features the VMM accepted.
    pub protocol_features: Option<u64>,
    /// Regions of guest memory and their descriptors, in the order in which they came.
    pub memory: Vec<(MemoryRegion, FdSlot)>,
    /// The memory table has been set at least once.
    pub memory_set: bool,
    /// Dirty log.
    pub log: Option<(LogRegion, FdSlot)>,
    /// Descriptor that tells when the log is to be read.
    pub log_fd: Option<FdSlot>,
    /// The VMM's end of the back-end request channel.
    pub backend_req: Option<FdSlot>,
    /// Writes to the configuration space, in order; a later one replaces an earlier one at the same place.
    pub config_writes: Vec<ConfigSpace>,
    /// Maximum transmission unit (net).
    pub mtu: Option<u64>,
    /// The rings that were ever named, by index.
    pub rings: Vec<Ring>,
}

impl Session {
    /// The ring of that index, made where it was not known yet.
    pub fn ring_mut(&mut self, index: u32) -> &mut Ring {
        assert!(index < RINGS_MAX, "the codec admits no ring index beyond RINGS_MAX");
        let at = index as usize;
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, Ring::default);
        }
        &mut self.rings[at]
    }

    /// The ring of that index.
    #[must_use]
    pub fn ring(&self, index: u32) -> Option<&Ring> {
        self.rings.get(index as usize)
    }

    /// Indices of the rings the VMM wants served.
    pub fn started(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.rings).filter(|(_, ring)| ring.started).map(|(index, _)| index)
    }

    /// Whether enough is known to warm a backend.
    #[must_use]
    pub fn can_warm(&self) -> bool {
        self.features.is_some() && self.memory_set
    }

    /// Whether writes to guest memory must be logged.
    #[must_use]
    pub fn logs(&self) -> bool {
        self.features.is_some_and(|features| features & VirtioFeatures::LOG_ALL.bits() != 0)
    }

    /// Whether rings are to be enabled one by one. By the specification a ring starts out enabled unless protocol features were
    /// negotiated.
    #[must_use]
    pub fn ring_enabled(&self, index: u32) -> bool {
        let default = self.features.is_some_and(|bits| bits & VirtioFeatures::PROTOCOL_FEATURES.bits() == 0);
        self.ring(index).and_then(|ring| ring.enabled).unwrap_or(default)
    }

    /// Whether EVENT_IDX was negotiated.
    #[must_use]
    pub fn has_event_idx(&self) -> bool {
        self.features.is_some_and(|features| features & VirtioFeatures::EVENT_IDX.bits() != 0)
    }

    /// The memory table without its descriptors.
    #[must_use]
    pub fn memory_table(&self) -> MemoryTable {
        MemoryTable { regions: self.memory.iter().map(|(region, _)| *region).collect() }
    }

    /// A configuration space as the guest sees it: what the device presents, and over it what the guest has written.
    #[must_use]
    pub fn written_over(&self, config: &[u8]) -> Vec<u8> {
        let mut seen = config.to_vec();
        for write in &self.config_writes {
            let at = write.offset as usize;
            if let Some(bytes) = seen.get_mut(at..at + write.bytes.len()) {
                bytes.copy_from_slice(&write.bytes);
            }
        }
        seen
    }

    /// Takes the guest's writes out of a configuration space that a backend presents: they end with the session, and are no
    /// difference between two backends. In their place stands what the device presented at first.
    pub fn take_out_writes(&self, config: &mut [u8], device: &[u8]) {
        for write in &self.config_writes {
            let range = write.offset as usize..write.offset as usize + write.bytes.len();
            if let (Some(bytes), Some(first)) = (config.get_mut(range.clone()), device.get(range)) {
                bytes.copy_from_slice(first);
            }
        }
    }

    /// Whether a write to the configuration space can still be recorded: it replaces one at the same place, or there is room.
    #[must_use]
    pub fn has_room_for(&self, config: &ConfigSpace) -> bool {
        let same = |old: &ConfigSpace| old.offset == config.offset && old.bytes.len() == config.bytes.len();
        self.config_writes.len() < CONFIG_WRITES_MAX || self.config_writes.iter().any(same)
    }

    /// Records a request that only changes the record. Descriptors that it replaces are closed.
    ///
    /// Requests that ask, start, stop or end something are not recorded here; the pair handles them.
    pub fn record(&mut self, request: &Request, out: &mut Actions) {
        match request {
            Request::SetFeatures(features) => self.features = Some(*features),
            Request::SetProtocolFeatures(features) => self.protocol_features = Some(*features),
            Request::SetMemTable(regions) => {
                let old = std::mem::replace(&mut self.memory, regions.clone());
                old.into_iter().for_each(|(_, fd)| out.push(Action::Close(fd)));
                self.memory_set = true;
            }
            Request::AddMemReg { region, fd: Some(fd) } => {
                self.memory.push((*region, *fd));
                self.memory_set = true;
            }
            Request::RemMemReg(region) => self.remove_region(region, out),
            Request::SetLogBase { region, fd } => {
                let new = fd.map(|fd| (*region, fd));
                replace(&mut self.log, new, |(_, fd)| out.push(Action::Close(fd)));
            }
            Request::SetLogFd(fd) => replace(&mut self.log_fd, Some(*fd), |fd| out.push(Action::Close(fd))),
            Request::SetBackendReqFd(fd) => {
                replace(&mut self.backend_req, Some(*fd), |fd| out.push(Action::Close(fd)));
            }
            Request::SetVringNum(VringState { index, value }) => self.ring_mut(*index).size = Some(*value),
            Request::SetVringAddr(addr) => self.ring_mut(addr.index).addr = Some(*addr),
            Request::SetVringBase(VringState { index, value }) => self.ring_mut(*index).base = Some(*value),
            Request::SetVringKick(VringFd { index, fd }) => {
                replace(&mut self.ring_mut(*index).kick, *fd, |fd| out.push(Action::Close(fd)));
            }
            Request::SetVringCall(VringFd { index, fd }) => {
                replace(&mut self.ring_mut(*index).call, *fd, |fd| out.push(Action::Close(fd)));
            }
            Request::SetVringErr(VringFd { index, fd }) => {
                replace(&mut self.ring_mut(*index).err, *fd, |fd| out.push(Action::Close(fd)));
            }
            Request::SetVringEnable(VringState { index, value }) => {
                self.ring_mut(*index).enabled = Some(*value != 0);
            }
            Request::SetConfig(config) => {
                self.config_writes.retain(|old| old.offset != config.offset || old.bytes.len() != config.bytes.len());
                if self.config_writes.len() == CONFIG_WRITES_MAX {
                    self.config_writes.remove(0);
                }
                self.config_writes.push(config.clone());
            }
            Request::NetSetMtu(mtu) => self.mtu = Some(*mtu),
            _ => {}
        }
    }

    /// The region REM_MEM_REG means: rust-vmm and QEMU name it by all its addresses, some leave the offset out.
    #[must_use]
    pub fn find_region(&self, region: &MemoryRegion) -> Option<usize> {
        self.memory.iter().position(|(known, _)| {
            known.guest_addr == region.guest_addr && known.size == region.size && known.user_addr == region.user_addr
        })
    }

    fn remove_region(&mut self, region: &MemoryRegion, out: &mut Actions) {
        if let Some(at) = self.find_region(region) {
            let (_, fd) = self.memory.remove(at);
            let times = if loose(Animal::DoubleClose) { 2 } else { usize::from(!loose(Animal::DescriptorLeak)) };
            (0..times).for_each(|_| out.push(Action::Close(fd)));
        }
    }

    /// Forgets everything and closes every descriptor: the VMM is gone.
    pub fn clear(&mut self, out: &mut Actions) {
        self.fds().into_iter().for_each(|(fd, _)| out.push(Action::Close(fd)));
        *self = Session::default();
    }
}

fn replace<T>(place: &mut Option<T>, new: Option<T>, close: impl FnOnce(T)) {
    if let Some(old) = std::mem::replace(place, new) {
        close(old);
    }
}

#[cfg(test)]
mod tests;
