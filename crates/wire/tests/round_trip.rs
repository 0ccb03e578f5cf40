//! Decoding what was encoded gives back the value, for every message and every descriptor that travels with it.

use proptest::collection::vec;
use proptest::prelude::*;
use warmswap_wire::{
    BackendRequest, ConfigSpace, DeviceStateTransfer, FdSlot, HEADER_SIZE, Header, HeaderFlags, HostNotifierArea,
    InflightDescription, IotlbMessage, LogRegion, MemoryRegion, Reply, Request, RequestCode, SharedObjectId, VringAddr,
    VringFd, VringState,
};

fn fd() -> impl Strategy<Value = FdSlot> {
    any::<u32>().prop_map(FdSlot)
}

fn ring() -> impl Strategy<Value = u32> {
    0..256_u32
}

fn state(value: impl Strategy<Value = u32>) -> impl Strategy<Value = VringState> {
    (ring(), value).prop_map(|(index, value)| VringState { index, value })
}

fn ring_fd() -> impl Strategy<Value = VringFd> {
    (ring(), proptest::option::of(fd())).prop_map(|(index, fd)| VringFd { index, fd })
}

fn region() -> impl Strategy<Value = MemoryRegion> {
    (0..1_u64 << 62, 1..1_u64 << 62, 0..1_u64 << 62, 0..1_u64 << 62).prop_map(
        |(guest_addr, size, user_addr, mmap_offset)| MemoryRegion { guest_addr, size, user_addr, mmap_offset },
    )
}

fn config() -> impl Strategy<Value = ConfigSpace> {
    (0..=256_u32, 0..3_u32, vec(any::<u8>(), 1..=256)).prop_map(|(offset, flags, bytes)| ConfigSpace {
        offset,
        flags,
        bytes,
    })
}

fn inflight() -> impl Strategy<Value = InflightDescription> {
    (any::<u64>(), any::<u64>(), any::<u16>(), any::<u16>()).prop_map(
        |(mmap_size, mmap_offset, num_queues, queue_size)| InflightDescription {
            mmap_size,
            mmap_offset,
            num_queues,
            queue_size,
        },
    )
}

fn iotlb() -> impl Strategy<Value = IotlbMessage> {
    (any::<u64>(), any::<u64>(), any::<u64>(), any::<u8>(), any::<u8>())
        .prop_map(|(iova, size, user_addr, perm, kind)| IotlbMessage { iova, size, user_addr, perm, kind })
}

fn addr() -> impl Strategy<Value = VringAddr> {
    (ring(), any::<u32>(), any::<[u64; 4]>()).prop_map(|(index, flags, [descriptor, used, available, log])| VringAddr {
        index,
        flags,
        descriptor,
        used,
        available,
        log,
    })
}

fn object() -> impl Strategy<Value = SharedObjectId> {
    any::<[u8; 16]>().prop_map(SharedObjectId)
}

/// Every request with values of every kind; the match makes sure that none is forgotten.
fn request_of(code: RequestCode) -> BoxedStrategy<Request> {
    use RequestCode as C;
    let number = any::<u64>();
    match code {
        C::GetFeatures => Just(Request::GetFeatures).boxed(),
        C::SetFeatures => number.prop_map(Request::SetFeatures).boxed(),
        C::SetOwner => Just(Request::SetOwner).boxed(),
        C::ResetOwner => Just(Request::ResetOwner).boxed(),
        C::SetMemTable => vec((region(), fd()), 0..=8).prop_map(Request::SetMemTable).boxed(),
        C::SetLogBase => (any::<[u64; 2]>(), proptest::option::of(fd()))
            .prop_map(|([size, offset], fd)| Request::SetLogBase { region: LogRegion { size, offset }, fd })
            .boxed(),
        C::SetLogFd => fd().prop_map(Request::SetLogFd).boxed(),
        C::SetVringNum => state(1..=32768_u32).prop_map(Request::SetVringNum).boxed(),
        C::SetVringAddr => addr().prop_map(Request::SetVringAddr).boxed(),
        C::SetVringBase => state(any::<u32>()).prop_map(Request::SetVringBase).boxed(),
        C::GetVringBase => state(any::<u32>()).prop_map(Request::GetVringBase).boxed(),
        C::SetVringKick => ring_fd().prop_map(Request::SetVringKick).boxed(),
        C::SetVringCall => ring_fd().prop_map(Request::SetVringCall).boxed(),
        C::SetVringErr => ring_fd().prop_map(Request::SetVringErr).boxed(),
        C::GetProtocolFeatures => Just(Request::GetProtocolFeatures).boxed(),
        C::SetProtocolFeatures => number.prop_map(Request::SetProtocolFeatures).boxed(),
        C::GetQueueNum => Just(Request::GetQueueNum).boxed(),
        C::SetVringEnable => state(0..=1_u32).prop_map(Request::SetVringEnable).boxed(),
        C::SendRarp => number.prop_map(Request::SendRarp).boxed(),
        C::NetSetMtu => number.prop_map(Request::NetSetMtu).boxed(),
        C::SetBackendReqFd => fd().prop_map(Request::SetBackendReqFd).boxed(),
        C::IotlbMsg => iotlb().prop_map(Request::IotlbMsg).boxed(),
        C::SetVringEndian => state(0..=1_u32).prop_map(Request::SetVringEndian).boxed(),
        C::GetConfig => config().prop_map(Request::GetConfig).boxed(),
        C::SetConfig => config().prop_map(Request::SetConfig).boxed(),
        C::CreateCryptoSession => vec(any::<u8>(), 0..1200).prop_map(Request::CreateCryptoSession).boxed(),
        C::CloseCryptoSession => number.prop_map(Request::CloseCryptoSession).boxed(),
        C::PostcopyAdvise => Just(Request::PostcopyAdvise).boxed(),
        C::PostcopyListen => Just(Request::PostcopyListen).boxed(),
        C::PostcopyEnd => Just(Request::PostcopyEnd).boxed(),
        C::GetInflightFd => inflight().prop_map(Request::GetInflightFd).boxed(),
        C::SetInflightFd => (inflight(), fd()).prop_map(|(region, fd)| Request::SetInflightFd { region, fd }).boxed(),
        C::GpuSetSocket => fd().prop_map(Request::GpuSetSocket).boxed(),
        C::ResetDevice => Just(Request::ResetDevice).boxed(),
        C::VringKick => state(any::<u32>()).prop_map(Request::VringKick).boxed(),
        C::GetMaxMemSlots => Just(Request::GetMaxMemSlots).boxed(),
        C::AddMemReg => {
            (region(), proptest::option::of(fd())).prop_map(|(region, fd)| Request::AddMemReg { region, fd }).boxed()
        }
        C::RemMemReg => region().prop_map(Request::RemMemReg).boxed(),
        C::SetStatus => number.prop_map(Request::SetStatus).boxed(),
        C::GetStatus => Just(Request::GetStatus).boxed(),
        C::GetSharedObject => object().prop_map(Request::GetSharedObject).boxed(),
        C::SetDeviceStateFd => (any::<[u32; 2]>(), fd())
            .prop_map(|([direction, phase], fd)| {
                let transfer = DeviceStateTransfer { direction, phase };
                Request::SetDeviceStateFd { transfer, fd }
            })
            .boxed(),
        C::CheckDeviceState => Just(Request::CheckDeviceState).boxed(),
    }
}

fn request() -> impl Strategy<Value = Request> {
    proptest::sample::select(RequestCode::ALL).prop_flat_map(request_of)
}

fn backend_request() -> impl Strategy<Value = BackendRequest> {
    prop_oneof![
        iotlb().prop_map(BackendRequest::Iotlb),
        Just(BackendRequest::ConfigChange),
        (any::<[u64; 3]>(), proptest::option::of(fd())).prop_map(|([ring, size, offset], fd)| {
            BackendRequest::VringHostNotifier { area: HostNotifierArea { ring, size, offset }, fd }
        }),
        state(any::<u32>()).prop_map(BackendRequest::VringCall),
        state(any::<u32>()).prop_map(BackendRequest::VringErr),
        object().prop_map(BackendRequest::SharedObjectAdd),
        object().prop_map(BackendRequest::SharedObjectRemove),
        object().prop_map(BackendRequest::SharedObjectLookup),
    ]
}

fn reply() -> impl Strategy<Value = (RequestCode, Reply)> {
    use warmswap_wire::ReplyKind as K;
    proptest::sample::select(RequestCode::ALL).prop_flat_map(|code| {
        let number = any::<u64>().prop_map(Reply::U64);
        let with_fd = (any::<u64>(), proptest::option::of(fd())).prop_map(|(value, fd)| Reply::Fd { value, fd });
        let reply = match code.reply_kind() {
            K::Ack | K::U64 => number.boxed(),
            K::Log => prop_oneof![
                number,
                Just(Reply::Empty),
                any::<[u64; 2]>().prop_map(|[size, offset]| Reply::Log(LogRegion { size, offset }))
            ]
            .boxed(),
            K::VringState => state(any::<u32>()).prop_map(Reply::VringState).boxed(),
            K::Config => proptest::option::of(config()).prop_map(Reply::Config).boxed(),
            K::Inflight => {
                (inflight(), proptest::option::of(fd())).prop_map(|(region, fd)| Reply::Inflight { region, fd }).boxed()
            }
            K::Crypto => vec(any::<u8>(), 0..1200).prop_map(Reply::Crypto).boxed(),
            K::Fd | K::U64Fd => with_fd.boxed(),
        };
        (Just(code), reply)
    })
}

/// Splits one encoded message, which must be all there is.
fn split(bytes: &[u8]) -> (Header, &[u8]) {
    let (header, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("a header");
    let header = Header::decode(header).expect("our own header");
    assert_eq!(header.size as usize, payload.len(), "the header tells the length");
    (header, payload)
}

fn flags() -> impl Strategy<Value = HeaderFlags> {
    prop_oneof![Just(HeaderFlags::empty()), Just(HeaderFlags::NEED_REPLY)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_survive(request in request(), flags in flags()) {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        request.encode(flags, &mut bytes, &mut fds);
        let (header, payload) = split(&bytes);
        prop_assert_eq!(header.needs_reply(), flags.contains(HeaderFlags::NEED_REPLY));
        prop_assert_eq!(Request::decode(&header, payload, &fds), Ok(request));
    }

    #[test]
    fn replies_survive((code, reply) in reply()) {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        reply.encode(code as u32, &mut bytes, &mut fds);
        let (header, payload) = split(&bytes);
        let decoded = Reply::decode(code as u32, code.name(), code.reply_kind(), &header, payload, &fds);
        prop_assert_eq!(decoded, Ok(reply));
    }

    #[test]
    fn backend_requests_survive(request in backend_request(), flags in flags()) {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        request.encode(flags, &mut bytes, &mut fds);
        let (header, payload) = split(&bytes);
        prop_assert_eq!(BackendRequest::decode(&header, payload, &fds), Ok(request));
    }

    #[test]
    fn a_missing_or_surplus_byte_or_descriptor_is_an_error(request in request(), surplus in any::<bool>()) {
        // Crypto parameters are opaque, and what comes with a message that is only a descriptor is not looked at.
        let lenient = matches!(
            request,
            Request::CreateCryptoSession(_) | Request::SetLogFd(_) | Request::SetBackendReqFd(_) | Request::GpuSetSocket(_)
        );
        prop_assume!(!lenient);
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        request.encode(HeaderFlags::empty(), &mut bytes, &mut fds);
        let (header, payload) = split(&bytes);
        let payload = if surplus {
            [payload, &[0]].concat()
        } else {
            payload.split_last().map(|(_, rest)| rest.to_vec()).unwrap_or(vec![0])
        };
        prop_assert!(Request::decode(&header, &payload, &fds).is_err());
        let fds = [fds.as_slice(), &[FdSlot(7); 9]].concat();
        prop_assert!(Request::decode(&header, &bytes[HEADER_SIZE..], &fds).is_err());
    }
}
