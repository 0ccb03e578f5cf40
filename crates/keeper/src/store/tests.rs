//! The client against a real socket, with real descriptors.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;

use super::*;

fn pair(name: &str, inherited: Vec<(String, OwnedFd)>, max: Option<u32>) -> (UnixDatagram, Store) {
    let path = std::env::temp_dir().join(format!("ws-store-{name}-{}", std::process::id()));
    let _stale = std::fs::remove_file(&path);
    let receiver = UnixDatagram::bind(&path).expect("a socket");
    receiver.set_nonblocking(true).expect("it can be set");
    let store = Store::new(path.as_os_str(), inherited, max).expect("it listens");
    std::fs::remove_file(&path).expect("it is there");
    (receiver, store)
}

/// Everything that was sent; descriptors are left behind.
fn heard(receiver: &UnixDatagram) -> Vec<String> {
    let mut bytes = [0; 5000];
    std::iter::from_fn(|| {
        receiver.recv(&mut bytes).ok().map(|count| String::from_utf8_lossy(&bytes[..count]).into_owned())
    })
    .collect()
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")
}

#[test]
fn every_number_has_one_name_and_every_name_one_number() {
    let mut names = BTreeSet::new();
    for number in 0..NAMES_MAX {
        let kept = Kept::from_number(number).expect("below the bound");
        let name = kept.to_string();
        assert!(name.len() <= 3);
        assert_eq!(Kept::from_name(&name), Some(kept));
        assert!(names.insert(name));
    }
    assert_eq!(Kept::from_number(NAMES_MAX), None);
    for wrong in ["", "01", "00", "1000", "A", "-1", "a:", "stored", "ä"] {
        assert_eq!(Kept::from_name(wrong), None, "{wrong}");
    }
    assert_eq!(Kept(46_655).to_string(), "zzz");
}

#[test]
fn the_same_description_is_sent_once_and_let_go_of_with_its_last_reference() {
    let (receiver, mut store) = pair("same", Vec::new(), None);
    let event = eventfd();
    let again = event.try_clone().expect("a descriptor");
    let other = eventfd();
    let first = store.put(event.as_fd()).expect("it is sent");
    assert_eq!(store.put(again.as_fd()).expect("it is known"), first);
    let second = store.put(other.as_fd()).expect("it is sent");
    assert_ne!(first, second);
    assert_eq!(heard(&receiver), ["FDSTORE=1\nFDPOLL=0\nFDNAME=0", "FDSTORE=1\nFDPOLL=0\nFDNAME=1"]);
    // That the caller has closed its own changes nothing.
    drop(event);
    store.let_go(first).expect("it is kept");
    assert_eq!((heard(&receiver).len(), store.references(first)), (0, Some(1)));
    store.let_go(first).expect("it is kept");
    assert_eq!(heard(&receiver), ["FDSTOREREMOVE=1\nFDNAME=0"]);
    let _refused = store.let_go(first).expect_err("it is kept no longer");
    // It is put anew, in this order, and under a name that was not used just now.
    let third = store.put(again.as_fd()).expect("it is sent");
    assert_eq!(heard(&receiver), ["FDSTORE=1\nFDPOLL=0\nFDNAME=2"]);
    assert_eq!((third.number(), store.len()), (2, 2));
}

#[test]
fn one_inode_may_have_many_descriptions_and_one_memory_two() {
    let (receiver, mut store) = pair("inode", Vec::new(), None);
    let events: Vec<OwnedFd> = (0..500).map(|_| eventfd()).collect();
    let mut put = Vec::new();
    for event in &events {
        put.push(store.put(event.as_fd()).expect("it is sent"));
        let _sent = heard(&receiver);
    }
    assert_eq!(put.iter().collect::<BTreeSet<_>>().len(), events.len());
    for (event, kept) in events.iter().zip(&put).rev() {
        assert_eq!(store.put(event.as_fd()).expect("it is known"), *kept);
    }
    for kept in put.iter().chain(&put) {
        store.let_go(*kept).expect("it is kept");
        let _sent = heard(&receiver);
    }
    assert!(store.is_empty() && store.by_inode.is_empty());

    let memory = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memfd");
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let read_only: OwnedFd = std::fs::File::open(path).expect("it can be opened anew").into();
    let [memory, read_only] = [memory, read_only].map(|fd| store.put(fd.as_fd()).expect("it is sent"));
    assert_ne!(memory, read_only);
}

#[test]
fn what_was_inherited_keeps_its_name_until_it_is_adopted_or_discarded() {
    let events: Vec<OwnedFd> = (0..3).map(|_| eventfd()).collect();
    let inherited = ["zzz", "0", "vm.socket"].iter().zip(&events);
    let inherited = inherited.map(|(name, fd)| ((*name).to_owned(), fd.try_clone().expect("a descriptor"))).collect();
    let (receiver, mut store) = pair("inherited", inherited, Some(3));
    assert_eq!(store.take_inherited().len(), 3);
    assert_eq!(store.take_inherited().len(), 0);
    // Names that are taken are not given again, although the count goes round.
    let new = eventfd();
    assert_eq!(store.put(new.as_fd()).expect("it is sent").to_string(), "1");
    assert_eq!(store.put(eventfd().as_fd()).expect_err("three are held").kind(), io::ErrorKind::QuotaExceeded);
    let kept = store.adopt("zzz", events[0].as_fd()).expect("it was inherited");
    assert_eq!(store.adopt("zzz", events[0].as_fd()).expect("again"), kept);
    assert_eq!(store.put(events[0].as_fd()).expect("it is known"), kept);
    assert_eq!(store.references(kept), Some(3));
    for (name, fd) in [("zzz", &events[1]), ("0", &events[0]), ("2", &events[2]), ("vm.socket", &events[2])] {
        assert!(store.adopt(name, fd.as_fd()).is_err(), "{name}");
    }
    let _refused = store.discard("zzz").expect_err("it was adopted");
    store.discard("0").expect("it was not adopted");
    assert_eq!(heard(&receiver), ["FDSTORE=1\nFDPOLL=0\nFDNAME=1", "FDSTOREREMOVE=1\nFDNAME=0"]);
    assert_eq!(store.put(events[1].as_fd()).expect("there is room").to_string(), "2");
}

#[test]
fn a_full_queue_is_waited_for() {
    let (receiver, mut store) = pair("queue", Vec::new(), None);
    let reader = std::thread::spawn(move || {
        let mut count = 0;
        while count < 300 {
            count += heard(&receiver).len();
            std::thread::yield_now();
        }
        receiver
    });
    let events: Vec<OwnedFd> = (0..300).map(|_| eventfd()).collect();
    for event in &events {
        store.put(event.as_fd()).expect("there is room after a while");
    }
    drop(reader.join().expect("it has read everything"));
    // Nobody listens any more: nothing is changed by what could not be sent.
    let _refused = store.put(eventfd().as_fd()).expect_err("nobody listens");
    let _refused = store.let_go(Kept(7)).expect_err("nobody listens");
    assert_eq!((store.len(), store.references(Kept(7))), (300, Some(1)));
}

#[test]
fn a_status_is_one_line_of_bounded_length() {
    let (receiver, store) = pair("status", Vec::new(), None);
    store.ready().expect("it is sent");
    store.stopping().expect("it is sent");
    store.status("3 devices\nREADY=1").expect("it is sent");
    store.status(&"ä".repeat(3000)).expect("it is sent");
    let heard = heard(&receiver);
    assert_eq!(heard[..3], ["READY=1", "STOPPING=1", "STATUS=3 devices"]);
    assert_eq!(heard[3], format!("STATUS={}", "ä".repeat(1024)));
}

#[test]
fn what_is_no_address_is_refused_in_words() {
    for wrong in ["", "relative", "vsock:2:1"] {
        let error = Store::new(OsStr::new(wrong), Vec::new(), None).expect_err("no address").to_string();
        assert!(error.contains("neither path nor @name"), "{error}");
    }
    let nobody = Store::new(OsStr::new("/no/such/socket"), Vec::new(), None).expect_err("nobody is there").to_string();
    assert!(nobody.contains("/no/such/socket"), "{nobody}");
}
