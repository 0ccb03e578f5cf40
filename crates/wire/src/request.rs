//! Requests of the front-end.
//!
//! Ids and payloads: `docs/interop/vhost-user.rst`, "Front-end message types".

use crate::bytes::{Put, Reader};
use crate::header::frame;
use crate::memory::{MemoryRegion, REGIONS_MAX};
use crate::payload::{
    ConfigSpace, DeviceStateTransfer, FdSlot, InflightDescription, IotlbMessage, LogRegion, SharedObjectId, VringAddr,
    VringFd, VringState, at_most_one_fd, no_fds, one_fd, ring_index,
};
use crate::reply::ReplyKind;
use crate::{Channel, Error, Header, HeaderFlags};
use serde::{Deserialize, Serialize};

macro_rules! request_codes {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $text:literal;)*) => {
        /// Ids of front-end requests. Ids above 43 moved between revisions of the specification and are not known here.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[repr(u32)]
        #[allow(missing_docs, reason = "the names are the specification's")]
        pub enum RequestCode { $($(#[$doc])* $name = $id),* }

        impl RequestCode {
            /// All of them, in the order of their ids.
            pub const ALL: &[RequestCode] = &[$(RequestCode::$name),*];

            /// The request with this id.
            #[must_use]
            pub fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(RequestCode::$name),)* _ => None }
            }

            /// The specification's name, without its prefix.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(RequestCode::$name => $text),* }
            }
        }
    };
}

request_codes! {
    GetFeatures = 1, "GET_FEATURES";
    SetFeatures = 2, "SET_FEATURES";
    SetOwner = 3, "SET_OWNER";
    ResetOwner = 4, "RESET_OWNER";
    SetMemTable = 5, "SET_MEM_TABLE";
    SetLogBase = 6, "SET_LOG_BASE";
    SetLogFd = 7, "SET_LOG_FD";
    SetVringNum = 8, "SET_VRING_NUM";
    SetVringAddr = 9, "SET_VRING_ADDR";
    SetVringBase = 10, "SET_VRING_BASE";
    GetVringBase = 11, "GET_VRING_BASE";
    SetVringKick = 12, "SET_VRING_KICK";
    SetVringCall = 13, "SET_VRING_CALL";
    SetVringErr = 14, "SET_VRING_ERR";
    GetProtocolFeatures = 15, "GET_PROTOCOL_FEATURES";
    SetProtocolFeatures = 16, "SET_PROTOCOL_FEATURES";
    GetQueueNum = 17, "GET_QUEUE_NUM";
    SetVringEnable = 18, "SET_VRING_ENABLE";
    SendRarp = 19, "SEND_RARP";
    NetSetMtu = 20, "NET_SET_MTU";
    SetBackendReqFd = 21, "SET_BACKEND_REQ_FD";
    IotlbMsg = 22, "IOTLB_MSG";
    SetVringEndian = 23, "SET_VRING_ENDIAN";
    GetConfig = 24, "GET_CONFIG";
    SetConfig = 25, "SET_CONFIG";
    CreateCryptoSession = 26, "CREATE_CRYPTO_SESSION";
    CloseCryptoSession = 27, "CLOSE_CRYPTO_SESSION";
    PostcopyAdvise = 28, "POSTCOPY_ADVISE";
    PostcopyListen = 29, "POSTCOPY_LISTEN";
    PostcopyEnd = 30, "POSTCOPY_END";
    GetInflightFd = 31, "GET_INFLIGHT_FD";
    SetInflightFd = 32, "SET_INFLIGHT_FD";
    GpuSetSocket = 33, "GPU_SET_SOCKET";
    ResetDevice = 34, "RESET_DEVICE";
    VringKick = 35, "VRING_KICK";
    GetMaxMemSlots = 36, "GET_MAX_MEM_SLOTS";
    AddMemReg = 37, "ADD_MEM_REG";
    RemMemReg = 38, "REM_MEM_REG";
    SetStatus = 39, "SET_STATUS";
    GetStatus = 40, "GET_STATUS";
    GetSharedObject = 41, "GET_SHARED_OBJECT";
    SetDeviceStateFd = 42, "SET_DEVICE_STATE_FD";
    CheckDeviceState = 43, "CHECK_DEVICE_STATE";
}

impl RequestCode {
    /// What the back-end answers without being asked for an acknowledgement. SET_LOG_BASE answers only where LOG_SHMFD was
    /// negotiated, SET_MEM_TABLE in postcopy with the table: both are the caller's to know.
    #[must_use]
    pub fn reply_kind(self) -> ReplyKind {
        use RequestCode as C;
        match self {
            C::GetFeatures
            | C::GetProtocolFeatures
            | C::GetQueueNum
            | C::GetMaxMemSlots
            | C::GetStatus
            | C::CheckDeviceState
            | C::PostcopyEnd => ReplyKind::U64,
            C::SetLogBase => ReplyKind::Log,
            C::GetVringBase => ReplyKind::VringState,
            C::GetConfig => ReplyKind::Config,
            C::GetInflightFd => ReplyKind::Inflight,
            C::CreateCryptoSession => ReplyKind::Crypto,
            C::PostcopyAdvise | C::GetSharedObject => ReplyKind::Fd,
            C::SetDeviceStateFd => ReplyKind::U64Fd,
            _ => ReplyKind::Ack,
        }
    }

    /// Whether the request is answered even when no acknowledgement was asked for.
    #[must_use]
    pub fn always_replies(self) -> bool {
        !matches!(self.reply_kind(), ReplyKind::Ack | ReplyKind::Log)
    }
}

/// A front-end request with its payload and descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the specification's messages, one to one")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(MemoryRegion, FdSlot)>),
    SetLogBase {
        region: LogRegion,
        fd: Option<FdSlot>,
    },
    SetLogFd(FdSlot),
    SetVringNum(VringState),
    SetVringAddr(VringAddr),
    SetVringBase(VringState),
    GetVringBase(VringState),
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(VringState),
    SendRarp(u64),
    NetSetMtu(u64),
    SetBackendReqFd(FdSlot),
    IotlbMsg(IotlbMessage),
    SetVringEndian(VringState),
    GetConfig(ConfigSpace),
    SetConfig(ConfigSpace),
    /// The session's parameters, opaque: their layout belongs to the device type, and the feature is masked.
    CreateCryptoSession(Vec<u8>),
    CloseCryptoSession(u64),
    PostcopyAdvise,
    PostcopyListen,
    PostcopyEnd,
    GetInflightFd(InflightDescription),
    SetInflightFd {
        region: InflightDescription,
        fd: FdSlot,
    },
    GpuSetSocket(FdSlot),
    ResetDevice,
    VringKick(VringState),
    GetMaxMemSlots,
    AddMemReg {
        region: MemoryRegion,
        fd: Option<FdSlot>,
    },
    RemMemReg(MemoryRegion),
    SetStatus(u64),
    GetStatus,
    GetSharedObject(SharedObjectId),
    SetDeviceStateFd {
        transfer: DeviceStateTransfer,
        fd: FdSlot,
    },
    CheckDeviceState,
}

impl Request {
    /// The request's id.
    #[must_use]
    pub fn code(&self) -> RequestCode {
        use RequestCode as C;
        match self {
            Request::GetFeatures => C::GetFeatures,
            Request::SetFeatures(_) => C::SetFeatures,
            Request::SetOwner => C::SetOwner,
            Request::ResetOwner => C::ResetOwner,
            Request::SetMemTable(_) => C::SetMemTable,
            Request::SetLogBase { .. } => C::SetLogBase,
            Request::SetLogFd(_) => C::SetLogFd,
            Request::SetVringNum(_) => C::SetVringNum,
            Request::SetVringAddr(_) => C::SetVringAddr,
            Request::SetVringBase(_) => C::SetVringBase,
            Request::GetVringBase(_) => C::GetVringBase,
            Request::SetVringKick(_) => C::SetVringKick,
            Request::SetVringCall(_) => C::SetVringCall,
            Request::SetVringErr(_) => C::SetVringErr,
            Request::GetProtocolFeatures => C::GetProtocolFeatures,
            Request::SetProtocolFeatures(_) => C::SetProtocolFeatures,
            Request::GetQueueNum => C::GetQueueNum,
            Request::SetVringEnable(_) => C::SetVringEnable,
            Request::SendRarp(_) => C::SendRarp,
            Request::NetSetMtu(_) => C::NetSetMtu,
            Request::SetBackendReqFd(_) => C::SetBackendReqFd,
            Request::IotlbMsg(_) => C::IotlbMsg,
            Request::SetVringEndian(_) => C::SetVringEndian,
            Request::GetConfig(_) => C::GetConfig,
            Request::SetConfig(_) => C::SetConfig,
            Request::CreateCryptoSession(_) => C::CreateCryptoSession,
            Request::CloseCryptoSession(_) => C::CloseCryptoSession,
            Request::PostcopyAdvise => C::PostcopyAdvise,
            Request::PostcopyListen => C::PostcopyListen,
            Request::PostcopyEnd => C::PostcopyEnd,
            Request::GetInflightFd(_) => C::GetInflightFd,
            Request::SetInflightFd { .. } => C::SetInflightFd,
            Request::GpuSetSocket(_) => C::GpuSetSocket,
            Request::ResetDevice => C::ResetDevice,
            Request::VringKick(_) => C::VringKick,
            Request::GetMaxMemSlots => C::GetMaxMemSlots,
            Request::AddMemReg { .. } => C::AddMemReg,
            Request::RemMemReg(_) => C::RemMemReg,
            Request::SetStatus(_) => C::SetStatus,
            Request::GetStatus => C::GetStatus,
            Request::GetSharedObject(_) => C::GetSharedObject,
            Request::SetDeviceStateFd { .. } => C::SetDeviceStateFd,
            Request::CheckDeviceState => C::CheckDeviceState,
        }
    }

    /// Decodes a request.
    ///
    /// # Errors
    /// Unknown ids, wrong lengths, values out of range and wrong numbers of descriptors. Descriptors that a known front-end is
    /// seen to attach without need (REM_MEM_REG) are accepted and left to the caller to close.
    pub fn decode(header: &Header, payload: &[u8], fds: &[FdSlot]) -> Result<Self, Error> {
        use RequestCode as C;
        let code = RequestCode::from_id(header.request)
            .ok_or(Error::UnknownRequest { request: header.request, channel: Channel::Front })?;
        let name = code.name();
        if header.is_reply() {
            return Err(Error::Direction { request: name, expected: false, found: true });
        }
        if !takes_fds(code) {
            no_fds(name, fds)?;
        }
        let empty = |request: Request| Reader::exactly(name, payload, 0).map(|_| request);
        let u64_value = || Reader::exactly(name, payload, 8)?.u64();
        let state = || VringState::decode(name, payload);
        match code {
            C::GetFeatures => empty(Request::GetFeatures),
            C::SetFeatures => u64_value().map(Request::SetFeatures),
            C::SetOwner => empty(Request::SetOwner),
            C::ResetOwner => empty(Request::ResetOwner),
            C::SetMemTable => memory_table(name, payload, fds),
            C::SetLogBase => {
                Ok(Request::SetLogBase { region: LogRegion::decode(name, payload)?, fd: at_most_one_fd(name, fds)? })
            }
            C::SetLogFd => one_fd(name, fds).map(Request::SetLogFd),
            C::SetVringNum => ring_size(name, state()?).map(Request::SetVringNum),
            C::SetVringAddr => VringAddr::decode(name, payload).map(Request::SetVringAddr),
            C::SetVringBase => state().map(Request::SetVringBase),
            C::GetVringBase => state().map(Request::GetVringBase),
            C::SetVringKick => VringFd::decode(name, payload, fds).map(Request::SetVringKick),
            C::SetVringCall => VringFd::decode(name, payload, fds).map(Request::SetVringCall),
            C::SetVringErr => VringFd::decode(name, payload, fds).map(Request::SetVringErr),
            C::GetProtocolFeatures => empty(Request::GetProtocolFeatures),
            C::SetProtocolFeatures => u64_value().map(Request::SetProtocolFeatures),
            C::GetQueueNum => empty(Request::GetQueueNum),
            C::SetVringEnable => boolean(name, state()?).map(Request::SetVringEnable),
            C::SendRarp => u64_value().map(Request::SendRarp),
            C::NetSetMtu => u64_value().map(Request::NetSetMtu),
            C::SetBackendReqFd => one_fd(name, fds).map(Request::SetBackendReqFd),
            C::IotlbMsg => IotlbMessage::decode(name, payload).map(Request::IotlbMsg),
            C::SetVringEndian => boolean(name, state()?).map(Request::SetVringEndian),
            C::GetConfig => ConfigSpace::decode(name, payload).map(Request::GetConfig),
            C::SetConfig => ConfigSpace::decode(name, payload).map(Request::SetConfig),
            C::CreateCryptoSession => Ok(Request::CreateCryptoSession(payload.to_vec())),
            C::CloseCryptoSession => u64_value().map(Request::CloseCryptoSession),
            C::PostcopyAdvise => empty(Request::PostcopyAdvise),
            C::PostcopyListen => empty(Request::PostcopyListen),
            C::PostcopyEnd => empty(Request::PostcopyEnd),
            C::GetInflightFd => InflightDescription::decode(name, payload).map(Request::GetInflightFd),
            C::SetInflightFd => Ok(Request::SetInflightFd {
                region: InflightDescription::decode(name, payload)?,
                fd: one_fd(name, fds)?,
            }),
            C::GpuSetSocket => one_fd(name, fds).map(Request::GpuSetSocket),
            C::ResetDevice => empty(Request::ResetDevice),
            C::VringKick => state().map(Request::VringKick),
            C::GetMaxMemSlots => empty(Request::GetMaxMemSlots),
            C::AddMemReg => {
                let region = single_region(name, payload)?.check(name)?;
                Ok(Request::AddMemReg { region, fd: at_most_one_fd(name, fds)? })
            }
            C::RemMemReg => {
                at_most_one_fd(name, fds)?;
                single_region(name, payload).map(Request::RemMemReg)
            }
            C::SetStatus => u64_value().map(Request::SetStatus),
            C::GetStatus => empty(Request::GetStatus),
            C::GetSharedObject => SharedObjectId::decode(name, payload).map(Request::GetSharedObject),
            C::SetDeviceStateFd => Ok(Request::SetDeviceStateFd {
                transfer: DeviceStateTransfer::decode(name, payload)?,
                fd: one_fd(name, fds)?,
            }),
            C::CheckDeviceState => empty(Request::CheckDeviceState),
        }
    }

    /// Appends the message to `out` and its descriptors to `fds`. They must leave in one `sendmsg`.
    pub fn encode(&self, flags: HeaderFlags, out: &mut Vec<u8>, fds: &mut Vec<FdSlot>) {
        frame(out, self.code() as u32, flags, |out| self.encode_payload(out));
        self.push_fds(fds);
    }

    fn encode_payload(&self, out: &mut Vec<u8>) {
        match self {
            Request::SetFeatures(value)
            | Request::SetProtocolFeatures(value)
            | Request::SendRarp(value)
            | Request::NetSetMtu(value)
            | Request::CloseCryptoSession(value)
            | Request::SetStatus(value) => out.put_u64(*value),
            Request::SetMemTable(regions) => {
                out.put_u32(u32::try_from(regions.len()).expect("bounded by REGIONS_MAX"));
                out.put_u32(0);
                regions.iter().for_each(|(region, _)| region.encode(out));
            }
            Request::SetLogBase { region, .. } => region.encode(out),
            Request::SetVringNum(state)
            | Request::SetVringBase(state)
            | Request::GetVringBase(state)
            | Request::SetVringEnable(state)
            | Request::SetVringEndian(state)
            | Request::VringKick(state) => state.encode(out),
            Request::SetVringAddr(addr) => addr.encode(out),
            Request::SetVringKick(fd) | Request::SetVringCall(fd) | Request::SetVringErr(fd) => fd.encode(out),
            Request::IotlbMsg(message) => message.encode(out),
            Request::GetConfig(config) | Request::SetConfig(config) => config.encode(out),
            Request::CreateCryptoSession(bytes) => out.extend_from_slice(bytes),
            Request::GetInflightFd(region) | Request::SetInflightFd { region, .. } => region.encode(out),
            Request::AddMemReg { region, .. } | Request::RemMemReg(region) => {
                out.put_u64(0);
                region.encode(out);
            }
            Request::GetSharedObject(id) => out.extend_from_slice(&id.0),
            Request::SetDeviceStateFd { transfer, .. } => transfer.encode(out),
            Request::GetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::SetLogFd(_)
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::SetBackendReqFd(_)
            | Request::PostcopyAdvise
            | Request::PostcopyListen
            | Request::PostcopyEnd
            | Request::GpuSetSocket(_)
            | Request::ResetDevice
            | Request::GetMaxMemSlots
            | Request::GetStatus
            | Request::CheckDeviceState => {}
        }
    }

    fn push_fds(&self, fds: &mut Vec<FdSlot>) {
        match self {
            Request::SetMemTable(regions) => fds.extend(regions.iter().map(|(_, fd)| *fd)),
            Request::SetLogBase { fd, .. } | Request::AddMemReg { fd, .. } => fds.extend(fd),
            Request::SetVringKick(ring) | Request::SetVringCall(ring) | Request::SetVringErr(ring) => {
                fds.extend(ring.fd);
            }
            Request::SetLogFd(fd)
            | Request::SetBackendReqFd(fd)
            | Request::SetInflightFd { fd, .. }
            | Request::GpuSetSocket(fd)
            | Request::SetDeviceStateFd { fd, .. } => fds.push(*fd),
            _ => {}
        }
    }
}

/// Requests that carry descriptors, or to which front-ends attach one without need.
fn takes_fds(code: RequestCode) -> bool {
    use RequestCode as C;
    matches!(
        code,
        C::SetMemTable
            | C::SetLogBase
            | C::SetLogFd
            | C::SetVringKick
            | C::SetVringCall
            | C::SetVringErr
            | C::SetBackendReqFd
            | C::SetInflightFd
            | C::GpuSetSocket
            | C::AddMemReg
            | C::RemMemReg
            | C::SetDeviceStateFd
    )
}

fn memory_table(name: &'static str, payload: &[u8], fds: &[FdSlot]) -> Result<Request, Error> {
    let mut reader = Reader::new(name, payload);
    let count = reader.u32()? as usize;
    reader.u32()?;
    if count > REGIONS_MAX {
        return Err(Error::Value {
            request: name,
            field: "number of regions",
            found: count as u64,
            expected: "at most 8",
        });
    }
    if fds.len() != count {
        return Err(Error::Descriptors { request: name, expected: count, found: fds.len() });
    }
    let mut regions = Vec::with_capacity(count);
    for fd in fds {
        regions.push((MemoryRegion::decode_fields(&mut reader)?.check(name)?, *fd));
    }
    reader.end()?;
    Ok(Request::SetMemTable(regions))
}

fn single_region(name: &'static str, payload: &[u8]) -> Result<MemoryRegion, Error> {
    let mut reader = Reader::exactly(name, payload, 40)?;
    reader.u64()?;
    MemoryRegion::decode_fields(&mut reader)
}

/// Virtio 1.3 §2.7: the size of a split ring is a power of two of at most 32768.
fn ring_size(name: &'static str, state: VringState) -> Result<VringState, Error> {
    ring_index(name, state.index)?;
    if state.value == 0 || state.value > 32768 {
        return Err(Error::Value {
            request: name,
            field: "ring size",
            found: u64::from(state.value),
            expected: "1 to 32768",
        });
    }
    Ok(state)
}

fn boolean(name: &'static str, state: VringState) -> Result<VringState, Error> {
    if state.value > 1 {
        return Err(Error::Value { request: name, field: "flag", found: u64::from(state.value), expected: "0 or 1" });
    }
    Ok(state)
}
