//! A vhost-user front-end that says what QEMU 10 says, in QEMU's order (`hw/virtio/vhost-user.c`, `vhost.c`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use warmswap_wire::{
    ConfigSpace, FdSlot, InflightDescription, MemoryRegion, ProtocolFeatures, Reply, Request, VirtioFeatures,
    VringAddr, VringFd, VringState,
};

use super::blk::BlkQueue;
use super::channel::{Acks, BackendChannel, Channel};
use super::memory::GuestMemory;
use super::notify::EventFd;

/// Length of the part of virtio-blk's configuration space that is read (virtio 1.3 §5.2.4, up to write zeroes).
const CONFIG_BYTES: usize = 60;
/// VIRTIO_BLK_F_FLUSH.
pub(crate) const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_MQ.
pub(crate) const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub(crate) const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub(crate) const F_WRITE_ZEROES: u64 = 1 << 14;

/// What the device says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlkConfig {
    /// Capacity in sectors of 512 bytes.
    pub(crate) sectors: u64,
    /// Most segments of a request.
    pub(crate) segments_max: u32,
    /// Queues the device has.
    pub(crate) queues: u16,
    /// Most sectors of one discard.
    pub(crate) discard_sectors_max: u32,
    /// Most sectors of one write-zeroes.
    pub(crate) zeroes_sectors_max: u32,
    /// The bytes.
    pub(crate) raw: Vec<u8>,
}

impl BlkConfig {
    fn parse(raw: Vec<u8>) -> anyhow::Result<Self> {
        ensure!(raw.len() >= CONFIG_BYTES, "the configuration space has only {} bytes", raw.len());
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        Ok(BlkConfig {
            sectors: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            segments_max: u32_at(12),
            queues: u16_at(34),
            discard_sectors_max: u32_at(36),
            zeroes_sectors_max: u32_at(48),
            raw,
        })
    }
}

/// What the front-end wants of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Ask for EVENT_IDX.
    pub(crate) event_idx: bool,
    /// Ask for INDIRECT_DESC.
    pub(crate) indirect: bool,
    /// Ask for CONFIGURE_MEM_SLOTS: regions one by one instead of the table.
    pub(crate) memory_slots: bool,
    /// Ask for BACKEND_REQ and open the back-end's channel.
    pub(crate) backend_channel: bool,
    /// Ask for INFLIGHT_SHMFD.
    pub(crate) inflight: bool,
    /// Messages to have acknowledged.
    pub(crate) acks: Acks,
}

/// An in-flight region: made by a back-end, kept by the front-end, handed to the next back-end.
#[derive(Debug)]
pub(crate) struct InflightRegion {
    description: InflightDescription,
    fd: OwnedFd,
}

/// One connection, from GET_FEATURES to the last GET_VRING_BASE.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    channel: Channel,
    /// Our end of the back-end's channel.
    backend_channel: Option<BackendChannel>,
    wanted: Wanted,
    features: u64,
    protocol: ProtocolFeatures,
    queues_max: u64,
    memory_slots_max: u64,
    /// Regions the device knows, where they are given one by one.
    shared: Vec<MemoryRegion>,
}

impl FrontEnd {
    /// Connects and negotiates, up to SET_OWNER. Nothing is shared with the device yet.
    pub(crate) fn connect(path: &Path, wanted: Wanted, timeout: Duration) -> anyhow::Result<Self> {
        let channel = Channel::connect(path, timeout)?;
        let mut front = FrontEnd {
            channel,
            backend_channel: None,
            wanted,
            features: 0,
            protocol: ProtocolFeatures::empty(),
            queues_max: 1,
            memory_slots_max: 8,
            shared: Vec::new(),
        };
        front.negotiate()?;
        Ok(front)
    }

    fn negotiate(&mut self) -> anyhow::Result<()> {
        let offered = self.number(&Request::GetFeatures)?;
        ensure!(offered & VirtioFeatures::PROTOCOL_FEATURES.bits() != 0, "the device has no protocol features");
        let protocol = self.number(&Request::GetProtocolFeatures)?;
        self.protocol = self.choose_protocol(protocol);
        self.tell(&Request::SetProtocolFeatures(self.protocol.bits()), &[])?;
        if self.protocol.contains(ProtocolFeatures::MQ) {
            self.queues_max = self.number(&Request::GetQueueNum)?;
        }
        if self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            self.memory_slots_max = self.number(&Request::GetMaxMemSlots)?;
        }
        if self.protocol.contains(ProtocolFeatures::BACKEND_REQ) {
            self.open_backend_channel()?;
        }
        self.tell(&Request::SetOwner, &[])?;
        // QEMU asks twice: once for the connection, once for the device.
        let offered = self.number(&Request::GetFeatures)?;
        self.features = self.choose_features(offered);
        Ok(())
    }

    fn choose_protocol(&self, offered: u64) -> ProtocolFeatures {
        let mut known = ProtocolFeatures::MQ
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::LOG_SHMFD;
        known.set(ProtocolFeatures::CONFIGURE_MEM_SLOTS, self.wanted.memory_slots);
        known.set(ProtocolFeatures::BACKEND_REQ, self.wanted.backend_channel);
        known.set(ProtocolFeatures::INFLIGHT_SHMFD, self.wanted.inflight);
        ProtocolFeatures::from_bits_truncate(offered) & known
    }

    fn choose_features(&self, offered: u64) -> u64 {
        let mut known = VirtioFeatures::VERSION_1 | VirtioFeatures::PROTOCOL_FEATURES;
        known.set(VirtioFeatures::EVENT_IDX, self.wanted.event_idx);
        known.set(VirtioFeatures::INDIRECT_DESC, self.wanted.indirect);
        // size_max, seg_max, blk_size, topology and config_wce describe; the rest decides which requests exist.
        let block = 1 << 1 | 1 << 2 | 1 << 6 | F_FLUSH | 1 << 10 | 1 << 11 | F_MQ | F_DISCARD | F_WRITE_ZEROES;
        offered & (known.bits() | block)
    }

    fn open_backend_channel(&mut self) -> anyhow::Result<()> {
        let (channel, theirs) = BackendChannel::pair()?;
        self.tell(&Request::SetBackendReqFd(FdSlot(0)), &[theirs.as_fd()])?;
        self.backend_channel = Some(channel);
        Ok(())
    }

    /// Whether all of `features` are in use.
    pub(crate) fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Most queues the device takes.
    pub(crate) fn queues_max(&self) -> u64 {
        self.queues_max
    }

    /// Reads the configuration space.
    pub(crate) fn config(&mut self) -> anyhow::Result<BlkConfig> {
        let wanted = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; CONFIG_BYTES] };
        match self.call(&Request::GetConfig(wanted), &[], false)? {
            Some(Reply::Config(Some(config))) => BlkConfig::parse(config.bytes),
            other => bail!("GET_CONFIG: {other:?}"),
        }
    }

    /// SET_FEATURES.
    pub(crate) fn set_features(&mut self) -> anyhow::Result<()> {
        self.tell(&Request::SetFeatures(self.features), &[])
    }

    /// Whether the device keeps an in-flight region, and was asked for it.
    pub(crate) fn has_inflight(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// GET_INFLIGHT_FD: a new region for `num_queues` rings of `queue_size` entries.
    pub(crate) fn get_inflight(&mut self, num_queues: u16, queue_size: u16) -> anyhow::Result<InflightRegion> {
        let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues, queue_size };
        match self.channel.call(&Request::GetInflightFd(wanted), &[], false)? {
            Some((Reply::Inflight { region: description, fd: Some(FdSlot(at)) }, fds)) => {
                let fd = fds.into_iter().nth(at as usize).context("the region has no descriptor")?;
                Ok(InflightRegion { description, fd })
            }
            other => bail!("GET_INFLIGHT_FD: {other:?}"),
        }
    }

    /// SET_INFLIGHT_FD: before the rings are started.
    pub(crate) fn set_inflight(&mut self, region: &InflightRegion) -> anyhow::Result<()> {
        let request = Request::SetInflightFd { region: region.description, fd: FdSlot(0) };
        self.tell(&request, &[region.fd.as_fd()])
    }

    /// Shares the guest's memory: region by region as far as the device does not know it yet, or as a whole table.
    pub(crate) fn share_memory(&mut self, memory: &GuestMemory) -> anyhow::Result<()> {
        if !self.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let fds: Vec<BorrowedFd<'_>> = memory.table().map(|(_, fd)| fd).collect();
            let table = memory.table().enumerate().map(|(index, (region, _))| (region, FdSlot(index as u32))).collect();
            self.acknowledged(&Request::SetMemTable(table), &fds)?;
            return self.settle_memory();
        }
        let wanted: Vec<MemoryRegion> = memory.table().map(|(region, _)| region).collect();
        let (slots, regions) = (self.memory_slots_max, wanted.len() as u64);
        ensure!(regions <= slots, "the device has {slots} memory slots, {regions} are wanted");
        for region in self.shared.iter().filter(|region| !wanted.contains(region)).copied().collect::<Vec<_>>() {
            self.acknowledged(&Request::RemMemReg(region), &[])?;
        }
        for (region, fd) in memory.table().filter(|(region, _)| !self.shared.contains(region)).collect::<Vec<_>>() {
            self.acknowledged(&Request::AddMemReg { region, fd: Some(FdSlot(0)) }, &[fd])?;
        }
        self.shared = wanted;
        self.settle_memory()
    }

    /// Without acknowledgements a request into new memory could reach the device before the memory does.
    fn settle_memory(&mut self) -> anyhow::Result<()> {
        if self.wanted.acks == Acks::None { self.synchronise() } else { Ok(()) }
    }

    /// Sets up one ring and starts it: CALL, which QEMU gives when it connects, then NUM, BASE, ADDR, KICK. A backend that is kicked
    /// before it has a call descriptor may break on its first completion.
    pub(crate) fn start_ring(&mut self, queue: &BlkQueue, base: u16) -> anyhow::Result<()> {
        let index = u32::from(queue.index());
        let (descriptor, available, used) = queue.vring().user_addresses();
        self.set_call(queue.index(), queue.call_fd())?;
        self.tell(&Request::SetVringNum(VringState { index, value: queue.vring().size().into() }), &[])?;
        self.tell(&Request::SetVringBase(VringState { index, value: base.into() }), &[])?;
        let log = queue.vring().used_guest();
        self.tell(&Request::SetVringAddr(VringAddr { index, flags: 0, descriptor, used, available, log }), &[])?;
        let fd = Some(FdSlot(0));
        self.tell(&Request::SetVringKick(VringFd { index, fd }), &[queue.kick_fd().as_fd()])
    }

    /// SET_VRING_CALL, at any time.
    pub(crate) fn set_call(&mut self, queue: u16, call: &EventFd) -> anyhow::Result<()> {
        let ring = VringFd { index: queue.into(), fd: Some(FdSlot(0)) };
        self.tell(&Request::SetVringCall(ring), &[call.as_fd()])
    }

    /// SET_VRING_ENABLE.
    pub(crate) fn enable_ring(&mut self, queue: u16, enable: bool) -> anyhow::Result<()> {
        let request = Request::SetVringEnable(VringState { index: queue.into(), value: enable.into() });
        if enable { self.acknowledged(&request, &[]) } else { self.tell(&request, &[]) }
    }

    /// GET_VRING_BASE: stops the ring.
    pub(crate) fn stop_ring(&mut self, queue: u16) -> anyhow::Result<u16> {
        let index = u32::from(queue);
        match self.call(&Request::GetVringBase(VringState { index, value: 0 }), &[], false)? {
            Some(Reply::VringState(state)) if state.index == index => Ok(state.value as u16),
            other => bail!("GET_VRING_BASE: {other:?}"),
        }
    }

    /// Waits until the other side has taken every message sent so far: GET_FEATURES has an answer.
    pub(crate) fn synchronise(&mut self) -> anyhow::Result<()> {
        self.number(&Request::GetFeatures).map(drop)
    }

    /// Takes what the back-end sent on its own channel and acknowledges it, as QEMU does. Returns how many messages there
    /// were.
    pub(crate) fn serve_backend(&mut self) -> anyhow::Result<usize> {
        match &mut self.backend_channel {
            Some(channel) => channel.serve(),
            None => Ok(0),
        }
    }

    fn tell(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        self.call(request, fds, self.wanted.acks == Acks::All).map(drop)
    }

    fn acknowledged(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        self.call(request, fds, self.wanted.acks != Acks::None).map(drop)
    }

    fn call(&mut self, request: &Request, fds: &[BorrowedFd<'_>], acknowledge: bool) -> anyhow::Result<Option<Reply>> {
        let acknowledge = acknowledge && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        Ok(self.channel.call(request, fds, acknowledge)?.map(|(reply, _)| reply))
    }

    fn number(&mut self, request: &Request) -> anyhow::Result<u64> {
        match self.call(request, &[], false)?.with_context(|| format!("{} needs a reply", request.code().name()))? {
            Reply::U64(value) => Ok(value),
            other => bail!("{}: {other:?}", request.code().name()),
        }
    }
}

impl AsFd for FrontEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
