//! Every short datagram, and random ones against another reading of the same rules.

use proptest::prelude::*;

use super::*;

/// The lines of a datagram as they come, read the slow way: with strings, and every line looked at for itself.
fn slow(datagram: &[u8]) -> Result<Notice<'_>, Refusal> {
    let text = if datagram.last() == Some(&0) { &datagram[..datagram.len() - 1] } else { datagram };
    if text.is_empty() {
        return Err(Refusal::Empty);
    }
    if datagram.len() > 4096 {
        return Err(Refusal::TooLong);
    }
    if text.contains(&0) {
        return Err(Refusal::Zero);
    }
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    let has = |wanted: &str| lines.contains(&wanted.as_bytes());
    let value = |key: &str| lines.iter().find(|line| line.starts_with(key.as_bytes())).map(|line| &line[key.len()..]);
    let name = value("FDNAME=")
        .filter(|name| name.len() < 256 && !name.contains(&b':') && name.iter().all(|byte| (32..127).contains(byte)));
    let store = if has("BARRIER=1") {
        if lines.len() > 1 {
            return Err(Refusal::BarrierAndMore);
        }
        Some(Request::Barrier)
    } else if has("FDSTOREREMOVE=1") {
        let Some(name) = name else { return Err(Refusal::NothingToRemove) };
        Some(Request::Remove { name })
    } else {
        has("FDSTORE=1").then_some(Request::Put { name: name.unwrap_or(b"stored"), poll: !has("FDPOLL=0") })
    };
    let pids = lines.iter().filter_map(|line| std::str::from_utf8(line.strip_prefix(b"MAINPID=")?).ok());
    let mut pids = pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit())).filter_map(|pid| pid.parse().ok());
    Ok(Notice {
        store,
        ready: has("READY=1"),
        stopping: has("STOPPING=1"),
        reloading: has("RELOADING=1"),
        status: value("STATUS="),
        main_pid: pids.find(|pid| (1..=i32::MAX as u32).contains(pid)),
    })
}

#[test]
fn the_lines_of_the_protocol_mean_what_they_say() {
    let put = parse(b"FDSTORE=1\nFDPOLL=0\nFDNAME=3kq").expect("it is well-formed");
    assert_eq!(put.store, Some(Request::Put { name: b"3kq", poll: false }));
    let remove = parse(b"FDSTOREREMOVE=1\nFDNAME=3kq\nFDSTORE=1").expect("it is well-formed");
    assert_eq!(remove.store, Some(Request::Remove { name: b"3kq" }));
    let unnamed = parse(b"FDSTORE=1\n").expect("it is well-formed");
    assert_eq!(unnamed.store, Some(Request::Put { name: b"stored", poll: true }));
    assert_eq!(parse(b"BARRIER=1").expect("it is well-formed").store, Some(Request::Barrier));
    assert_eq!(parse(b"BARRIER=1\nREADY=1"), Err(Refusal::BarrierAndMore));
    assert_eq!(parse(b"FDSTOREREMOVE=1\nFDNAME=a:b"), Err(Refusal::NothingToRemove));
    let said = parse(b"READY=1\nSTATUS=12 devices\nMAINPID=77\nX_OWN=1\0").expect("it is well-formed");
    let expected = Notice { ready: true, status: Some(b"12 devices"), main_pid: Some(77), ..Notice::default() };
    assert_eq!(said, expected);
}

#[test]
fn every_datagram_of_two_bytes_is_read_without_a_panic() {
    for first in 0..=u8::MAX {
        assert_eq!(parse(&[first]), slow(&[first]));
        for second in 0..=u8::MAX {
            assert_eq!(parse(&[first, second]), slow(&[first, second]));
        }
    }
}

#[test]
fn every_name_of_one_byte_is_a_name_or_none() {
    for byte in 0..=u8::MAX {
        let datagram = [b"FDSTOREREMOVE=1\nFDNAME=", &[byte][..]].concat();
        assert_eq!(parse(&datagram), slow(&datagram), "{byte}");
    }
}

#[test]
fn lengths_are_bounded_on_the_byte() {
    for (length, right) in [(NAME_MAX, true), (NAME_MAX + 1, false)] {
        assert_eq!(is_name(&vec![b'n'; length]), right);
    }
    for (length, right) in [(DATAGRAM_MAX, true), (DATAGRAM_MAX + 1, false)] {
        assert_eq!(parse(&vec![b'n'; length]).is_ok(), right);
    }
}

#[test]
fn every_order_of_three_lines_is_read_like_the_slow_way() {
    let lines: [&[u8]; 14] = [
        b"FDSTORE=1",
        b"FDSTOREREMOVE=1",
        b"BARRIER=1",
        b"FDPOLL=0",
        b"FDPOLL=1",
        b"FDNAME=a",
        b"FDNAME=",
        b"FDNAME=:",
        b"READY=1",
        b"STATUS=",
        b"MAINPID=0",
        b"MAINPID=2147483647",
        b"MAINPID=2147483648",
        b"",
    ];
    for first in lines {
        for second in lines {
            for third in lines {
                let datagram = [first, second, third].join(&b'\n');
                assert_eq!(parse(&datagram), slow(&datagram), "{}", String::from_utf8_lossy(&datagram));
            }
        }
    }
}

/// Lines that are nearly right, and bytes that are nothing.
fn datagram() -> impl Strategy<Value = Vec<u8>> {
    let key = prop::sample::select(vec![
        "FDSTORE=",
        "FDSTOREREMOVE=",
        "BARRIER=",
        "FDPOLL=",
        "FDNAME=",
        "READY=",
        "STATUS=",
        "MAINPID=",
        "fdstore=",
        "\n",
    ]);
    let value = prop_oneof![Just(b"1".to_vec()), Just(b"0".to_vec()), prop::collection::vec(any::<u8>(), 0..300)];
    let line = (key, value).prop_map(|(key, value)| [key.as_bytes(), &value].concat());
    let lines = prop::collection::vec(line, 0..20).prop_map(|lines| lines.join(&b'\n'));
    prop_oneof![4 => lines, 1 => prop::collection::vec(any::<u8>(), 0..5000)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) })]

    #[test]
    fn hostile_datagrams_are_read_like_the_slow_way(datagram in datagram()) {
        prop_assert_eq!(parse(&datagram), slow(&datagram));
    }
}
