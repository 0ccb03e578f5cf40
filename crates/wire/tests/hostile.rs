//! Random bytes, lengths and numbers of descriptors: a clear error or a value, never a panic. The same functions run under the
//! fuzzer (`fuzz/`).

#[path = "../../../fuzz/src/codec.rs"]
mod codec;
#[path = "../../../fuzz/src/differential.rs"]
mod differential;
#[path = "../../../fuzz/src/inflight.rs"]
mod inflight;
#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;

use proptest::prelude::*;
use warmswap_wire::inflight::ring_bytes;
use warmswap_wire::{
    BackendRequest, ConfigSpace, DeviceStateTransfer, FdSlot, HEADER_SIZE, HeaderFlags, InflightDescription,
    IotlbMessage, LogRegion, MemoryRegion, Reply, Request, SharedObjectId, VringAddr, VringFd, VringState,
};

/// A request of every shape.
fn requests() -> Vec<(&'static str, Request)> {
    let fd = FdSlot(0);
    let region = MemoryRegion { guest_addr: 0, size: 4096, user_addr: 1 << 40, mmap_offset: 0 };
    let state = VringState { index: 1, value: 1 };
    let inflight = InflightDescription { mmap_size: 4096, mmap_offset: 0, num_queues: 1, queue_size: 8 };
    vec![
        ("nothing", Request::GetFeatures),
        ("number", Request::SetFeatures(1 << 30)),
        ("table", Request::SetMemTable(vec![(region, fd), (region, FdSlot(1))])),
        ("log", Request::SetLogBase { region: LogRegion { size: 4096, offset: 0 }, fd: Some(fd) }),
        ("state", Request::SetVringEnable(state)),
        ("base", Request::GetVringBase(state)),
        (
            "addr",
            Request::SetVringAddr(VringAddr {
                index: 0,
                flags: 1,
                descriptor: 4096,
                used: 8192,
                available: 6144,
                log: 1,
            }),
        ),
        ("kick", Request::SetVringKick(VringFd { index: 0, fd: Some(fd) })),
        ("no-kick", Request::SetVringKick(VringFd { index: 0, fd: None })),
        ("channel", Request::SetBackendReqFd(fd)),
        ("iotlb", Request::IotlbMsg(IotlbMessage { iova: 1, size: 2, user_addr: 3, perm: 3, kind: 1 })),
        ("config", Request::SetConfig(ConfigSpace { offset: 32, flags: 0, bytes: vec![1; 8] })),
        ("crypto", Request::CreateCryptoSession(vec![1; 9])),
        ("inflight", Request::SetInflightFd { region: inflight, fd }),
        ("add", Request::AddMemReg { region, fd: Some(fd) }),
        ("remove", Request::RemMemReg(region)),
        ("object", Request::GetSharedObject(SharedObjectId([7; 16]))),
        ("transfer", Request::SetDeviceStateFd { transfer: DeviceStateTransfer::SAVE, fd }),
    ]
}

fn with_count(encode: impl FnOnce(&mut Vec<u8>, &mut Vec<FdSlot>)) -> Vec<u8> {
    let (mut bytes, mut fds) = (vec![0], Vec::new());
    encode(&mut bytes, &mut fds);
    bytes[0] = u8::try_from(fds.len()).expect("few");
    bytes
}

#[test]
fn the_seeds_of_codec_are_those_of_our_encoder() {
    let request = |request: &Request| with_count(|bytes, fds| request.encode(HeaderFlags::NEED_REPLY, bytes, fds));
    let mut made: Vec<(&str, Vec<u8>)> = requests().iter().map(|(name, it)| (*name, request(it))).collect();
    let reply = |code: u32, reply: &Reply| with_count(|bytes, fds| reply.encode(code, bytes, fds));
    made.push(("reply", reply(1, &Reply::U64(7))));
    made.push(("reply-config", reply(24, &Reply::Config(Some(ConfigSpace { offset: 0, flags: 0, bytes: vec![2] })))));
    let changed = BackendRequest::ConfigChange;
    made.push(("changed", with_count(|bytes, fds| changed.encode(HeaderFlags::empty(), bytes, fds))));
    seeds::check("codec", &made, codec::run);
}

#[test]
fn the_seeds_of_differential_are_those_of_our_encoder() {
    let made = requests().into_iter().map(|(name, request)| {
        let mut bytes = with_count(|bytes, fds| request.encode(HeaderFlags::NEED_REPLY, bytes, fds));
        // The length is not part of it.
        bytes.drain(HEADER_SIZE - 3..=HEADER_SIZE);
        (name, bytes)
    });
    seeds::check("differential", &made.collect::<Vec<_>>(), differential::run);
}

#[test]
fn the_seeds_of_inflight_are_regions_as_a_back_end_leaves_them() {
    // Ring of four; the last batch is 2 then 1, and used.idx went on without the region.
    let mut region = vec![0; ring_bytes(4) as usize];
    region[8..16].copy_from_slice(&[1_u16, 4, 2, 0].map(u16::to_ne_bytes).concat());
    let mut batch = region.clone();
    for (head, next, counter) in [(2_usize, 1_u16, 5_u64), (1, 0, 6), (3, 0, 7)] {
        let entry = &mut batch[16 + 16 * head..][..16];
        entry[0] = 1;
        entry[6..8].copy_from_slice(&next.to_ne_bytes());
        entry[8..].copy_from_slice(&counter.to_ne_bytes());
    }
    let made = [("idle", [&[2, 0, 0], region.as_slice()].concat()), ("batch", [&[2, 2, 0], batch.as_slice()].concat())];
    seeds::check("inflight", &made, inflight::run);
}

/// A message that is nearly right: a known id, the version, a length that fits or nearly fits.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let size = prop_oneof![Just(0_usize), Just(8), Just(16), Just(20), Just(24), Just(32), Just(40), 0..400_usize];
    (0..40_u8, 0..48_u32, 0..16_u32, size, any::<[u8; 400]>(), -1..=1_i64).prop_map(
        |(fds, id, flags, size, payload, off)| {
            let claimed = u32::try_from((i64::try_from(size).expect("small") + off).max(0)).expect("small");
            let mut bytes = vec![fds];
            for word in [id, flags, claimed] {
                bytes.extend_from_slice(&word.to_ne_bytes());
            }
            bytes.extend_from_slice(&payload[..size]);
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic_the_codec(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        codec::run(&bytes);
    }

    #[test]
    fn messages_that_are_nearly_right_never_panic_the_codec(bytes in nearly_right()) {
        codec::run(&bytes);
    }

    #[test]
    fn of_messages_that_are_nearly_right_vhost_makes_the_same(bytes in nearly_right()) {
        let length = HEADER_SIZE - 3..=HEADER_SIZE;
        differential::run(&[&bytes[..*length.start()], &bytes[length.end() + 1..]].concat());
    }

    #[test]
    fn random_in_flight_regions_never_panic_the_reader(
        size in 0..6_u8, used in any::<u16>(), mut region in proptest::collection::vec(any::<u8>(), 0..640), right in any::<bool>()
    ) {
        if right && region.len() >= 16 {
            region[8..10].copy_from_slice(&1_u16.to_ne_bytes());
            region[10..12].copy_from_slice(&(1_u16 << size).to_ne_bytes());
        }
        let [low, high] = used.to_le_bytes();
        inflight::run(&[&[size, low, high], region.as_slice()].concat());
    }
}
