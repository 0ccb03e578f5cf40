//! A session as bytes and back.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;

use super::*;

fn region() -> impl Strategy<Value = (MemoryRegion, FdSlot)> {
    (any::<[u64; 4]>(), any::<u32>()).prop_map(|([guest_addr, size, user_addr, mmap_offset], fd)| {
        (MemoryRegion { guest_addr, size, user_addr, mmap_offset }, FdSlot(fd))
    })
}

fn fd() -> impl Strategy<Value = Option<FdSlot>> {
    of(any::<u32>().prop_map(FdSlot))
}

fn ring() -> impl Strategy<Value = Ring> {
    let addr = of((any::<u32>(), any::<[u64; 4]>()));
    (of(any::<u32>()), addr, of(any::<u32>()), [fd(), fd(), fd()], of(any::<bool>()), any::<bool>()).prop_map(
        |(size, addr, base, [kick, call, err], enabled, started)| {
            let addr = addr.map(|(flags, [descriptor, used, available, log])| VringAddr {
                index: 0,
                flags,
                descriptor,
                used,
                available,
                log,
            });
            Ring { size, addr, base, kick, call, err, enabled, started }
        },
    )
}

fn session() -> impl Strategy<Value = Session> {
    let config = (0..256_u32, 0..3_u32, vec(any::<u8>(), 0..=256));
    let config = config.prop_map(|(offset, flags, bytes)| ConfigSpace { offset, flags, bytes });
    let log = of((any::<[u64; 2]>(), any::<u32>()));
    let numbers = (of(any::<u64>()), of(any::<u64>()), of(any::<u64>()), any::<bool>());
    (numbers, vec(region(), 0..12), log, [fd(), fd()], vec(config, 0..4), vec(ring(), 0..5)).prop_map(
        |(
            (features, protocol_features, mtu, memory_set),
            mut memory,
            log,
            [log_fd, backend_req],
            config_writes,
            mut rings,
        )| {
            memory.sort_by_key(|(region, _)| region.guest_addr);
            memory.dedup_by_key(|(region, _)| region.guest_addr);
            for (index, ring) in (0..).zip(&mut rings) {
                ring.addr = ring.addr.map(|addr| VringAddr { index, ..addr });
            }
            let log = log.map(|([size, offset], fd)| (LogRegion { size, offset }, FdSlot(fd)));
            Session {
                features,
                protocol_features,
                memory,
                memory_set,
                log,
                log_fd,
                backend_req,
                config_writes,
                mtu,
                rings,
            }
        },
    )
}

fn named(session: &Session) -> BTreeMap<String, FdSlot> {
    session.fds().into_iter().map(|(fd, name)| (name, fd)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_session_survives_its_encoding(session in session()) {
        let names = named(&session);
        prop_assert_eq!(names.len(), session.fds().len(), "every descriptor has a name of its own");
        let decoded = Session::decode(&session.encode(), &|name| names.get(name).copied());
        prop_assert_eq!(decoded, Ok(session));
    }

    #[test]
    fn a_descriptor_the_table_lacks_is_named(session in session(), which in any::<prop::sample::Index>()) {
        let names = named(&session);
        prop_assume!(!names.is_empty());
        let missing = which.get(&names.keys().cloned().collect::<Vec<_>>()).clone();
        let table = |name: &str| names.get(name).copied().filter(|_| name != missing);
        prop_assert_eq!(Session::decode(&session.encode(), &table), Err(SessionError::Missing { name: missing }));
    }

    #[test]
    fn truncated_or_prolonged_bytes_are_refused(session in session(), cut in any::<prop::sample::Index>()) {
        let (bytes, names) = (session.encode(), named(&session));
        let table = |name: &str| names.get(name).copied();
        let short = &bytes[..cut.index(bytes.len())];
        prop_assert!(Session::decode(short, &table).is_err());
        prop_assert!(Session::decode(&[&bytes, [0].as_slice()].concat(), &table).is_err());
    }
}

#[test]
fn foreign_bytes_and_other_versions_are_told_apart() {
    let none = |_: &str| None;
    assert_eq!(Session::decode(b"", &none), Err(SessionError::Foreign));
    assert_eq!(Session::decode(b"ELF\x7f and more", &none), Err(SessionError::Foreign));
    let mut bytes = Session::default().encode();
    bytes[4] = 9;
    assert_eq!(Session::decode(&bytes, &none), Err(SessionError::Version { found: 9 }));
}

#[test]
fn what_a_request_replaces_is_closed() {
    let mut session = Session::default();
    let mut out = Actions::default();
    let kick = |fd| Request::SetVringKick(VringFd { index: 3, fd: Some(FdSlot(fd)) });
    session.record(&kick(1), &mut out);
    session.record(&kick(2), &mut out);
    session.record(&Request::SetBackendReqFd(FdSlot(3)), &mut out);
    session.record(&Request::SetBackendReqFd(FdSlot(4)), &mut out);
    session.clear(&mut out);
    let closed: Vec<u32> =
        out.drain().filter_map(|action| if let Action::Close(fd) = action { Some(fd.0) } else { None }).collect();
    assert_eq!(closed, [1, 3, 4, 2]);
    assert_eq!(session, Session::default());
}
