//! What rust-vmm's `vhost` makes of messages to a back-end: a handler of theirs that notes what it is told as our own requests.

use std::fs::File;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{Backend, GpuBackend, VhostUserBackendReqHandlerMut};
use warmswap_wire::{
    ConfigSpace, DeviceStateTransfer, FdSlot, HEADER_SIZE, Header, HeaderFlags, InflightDescription, LogRegion,
    MemoryRegion, Request, SharedObjectId, VringAddr, VringFd, VringState,
};

use super::{FEATURES, file};

type Result<T> = vhost::vhost_user::Result<T>;

/// What their back-end was told, as our own requests; descriptors are numbered in the order in which they came.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) requests: Vec<Request>,
    pub(crate) files: Vec<File>,
    pub(crate) backend: Option<Backend>,
    pub(crate) config_fails: bool,
}

impl Told {
    fn keep(&mut self, file: File) -> FdSlot {
        self.files.push(file);
        FdSlot(u32::try_from(self.files.len() - 1).expect("few"))
    }

    fn ring(&mut self, index: u8, file: Option<File>) -> VringFd {
        VringFd { index: u32::from(index), fd: file.map(|file| self.keep(file)) }
    }

    fn note(&mut self, request: Request) -> Result<()> {
        self.requests.push(request);
        Ok(())
    }
}

fn ours(region: &VhostUserMemoryRegion) -> MemoryRegion {
    MemoryRegion {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        user_addr: region.user_addr,
        mmap_offset: region.mmap_offset,
    }
}

fn description(inflight: &VhostUserInflight) -> InflightDescription {
    InflightDescription {
        mmap_size: inflight.mmap_size,
        mmap_offset: inflight.mmap_offset,
        num_queues: inflight.num_queues,
        queue_size: inflight.queue_size,
    }
}

impl VhostUserBackendReqHandlerMut for Told {
    fn set_owner(&mut self) -> Result<()> {
        self.note(Request::SetOwner)
    }
    fn reset_owner(&mut self) -> Result<()> {
        self.note(Request::ResetOwner)
    }
    fn reset_device(&mut self) -> Result<()> {
        self.note(Request::ResetDevice)
    }
    fn get_features(&mut self) -> Result<u64> {
        self.note(Request::GetFeatures)?;
        Ok(FEATURES)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.note(Request::SetFeatures(features))
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let table = regions.iter().zip(files).map(|(region, file)| (ours(region), self.keep(file))).collect();
        self.note(Request::SetMemTable(table)).map(|()| None)
    }
    fn set_vring_num(&mut self, index: u32, value: u32) -> Result<()> {
        self.note(Request::SetVringNum(VringState { index, value }))
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        self.note(Request::SetVringAddr(VringAddr { index, flags: flags.bits(), descriptor, used, available, log }))
    }
    fn set_vring_base(&mut self, index: u32, value: u32) -> Result<()> {
        self.note(Request::SetVringBase(VringState { index, value }))
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.note(Request::GetVringBase(VringState { index, value: 0 }))?;
        Ok(VhostUserVringState::new(index, 4711))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self.ring(index, fd);
        self.note(Request::SetVringKick(ring))
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self.ring(index, fd);
        self.note(Request::SetVringCall(ring))
    }
    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self.ring(index, fd);
        self.note(Request::SetVringErr(ring))
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        self.note(Request::GetProtocolFeatures)?;
        Ok(VhostUserProtocolFeatures::all())
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.note(Request::SetProtocolFeatures(features))
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        self.note(Request::GetQueueNum)?;
        Ok(16)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.note(Request::SetVringEnable(VringState { index, value: u32::from(enable) }))
    }
    fn get_config(&mut self, offset: u32, size: u32, flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.note(Request::GetConfig(ConfigSpace { offset, flags: flags.bits(), bytes: vec![0; size as usize] }))?;
        if self.config_fails { Err(vhost::vhost_user::Error::InvalidParam) } else { Ok(vec![5; size as usize]) }
    }
    fn set_config(&mut self, offset: u32, bytes: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        self.note(Request::SetConfig(ConfigSpace { offset, flags: flags.bits(), bytes: bytes.to_vec() }))
    }
    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.backend = Some(backend);
    }
    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        self.note(Request::GpuSetSocket(FdSlot(0)))
    }
    fn get_shared_object(&mut self, object: VhostUserSharedMsg) -> Result<File> {
        self.note(Request::GetSharedObject(SharedObjectId(*object.uuid.as_bytes())))?;
        Ok(file())
    }
    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.note(Request::GetInflightFd(description(inflight)))?;
        Ok((VhostUserInflight::new(4096, 64, inflight.num_queues, inflight.queue_size), file()))
    }
    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let fd = self.keep(file);
        self.note(Request::SetInflightFd { region: description(inflight), fd })
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        self.note(Request::GetMaxMemSlots)?;
        Ok(509)
    }
    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let fd = Some(self.keep(file));
        self.note(Request::AddMemReg { region: ours(region), fd }).map(|()| None)
    }
    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.note(Request::RemMemReg(ours(region)))
    }
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        let fd = self.keep(file);
        let transfer = DeviceStateTransfer { direction: direction.into(), phase: phase.into() };
        self.note(Request::SetDeviceStateFd { transfer, fd }).map(|()| None)
    }
    fn check_device_state(&mut self) -> Result<()> {
        self.note(Request::CheckDeviceState)
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(vhost::vhost_user::Error::InvalidParam)
    }
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let fd = Some(self.keep(file));
        self.note(Request::SetLogBase { region: LogRegion { size: log.mmap_size, offset: log.mmap_offset }, fd })
    }
}

/// The request with its slots made equal.
pub(crate) fn normal(request: &Request) -> Request {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    request.encode(HeaderFlags::empty(), &mut bytes, &mut fds);
    let (header, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("a header");
    let slots: Vec<FdSlot> = (0..fds.len() as u32).map(FdSlot).collect();
    Request::decode(&Header::decode(header).expect("ours"), payload, &slots).expect("ours")
}
