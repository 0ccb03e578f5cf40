use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use warmswap_wire::{FdSlot, HeaderFlags, MemoryRegion, Request, VringFd, VringState};

use super::*;

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    (Connection::new(ours.into()).expect("a connection"), theirs)
}

fn bytes(request: &Request) -> Vec<u8> {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    request.encode(HeaderFlags::empty(), &mut bytes, &mut fds);
    bytes
}

/// Two messages with a payload and one without.
fn messages() -> [Vec<u8>; 3] {
    let region = MemoryRegion { guest_addr: 1, size: 2, user_addr: 3, mmap_offset: 4 };
    [
        bytes(&Request::SetVringNum(VringState { index: 1, value: 256 })),
        bytes(&Request::GetFeatures),
        bytes(&Request::AddMemReg { region, fd: None }),
    ]
}

fn is_whole(message: &Message, sent: &[u8]) -> bool {
    let mut found = Vec::new();
    message.header.encode(&mut found);
    found.extend(&message.payload);
    found == sent
}

#[test]
fn a_message_that_comes_byte_by_byte_is_received_once_it_is_whole() {
    let (mut ours, mut theirs) = pair();
    for sent in messages() {
        for (at, byte) in sent.iter().enumerate() {
            assert!(ours.receive().expect("it lives").is_none(), "{at} bytes of {} are no message", sent.len());
            theirs.write_all(&[*byte]).expect("there is room");
        }
        let message = ours.receive().expect("it lives").expect("it is whole");
        assert!(is_whole(&message, &sent), "{message:?}");
        assert!(message.fds.is_empty());
    }
}

#[test]
fn messages_that_come_together_and_cut_anywhere_are_received_one_by_one() {
    let all: Vec<u8> = messages().concat();
    for cut in 0..=all.len() {
        let (mut ours, mut theirs) = pair();
        let mut received = Vec::new();
        for part in [&all[..cut], &all[cut..]] {
            theirs.write_all(part).expect("there is room");
            while let Some(message) = ours.receive().expect("it lives") {
                received.push(message);
            }
        }
        let whole =
            received.len() == 3 && received.iter().zip(messages()).all(|(message, sent)| is_whole(message, &sent));
        assert!(whole, "cut at {cut}: {received:?}");
        drop(theirs);
        assert!(matches!(ours.receive(), Err(ConnectionError::Closed)));
    }
}

#[test]
fn descriptors_come_with_their_message_and_too_many_end_the_connection() {
    let ((mut ours, theirs), (pipe, _other)) = (pair(), rustix::pipe::pipe().expect("a pipe"));
    let mut theirs = Connection::new(theirs.into()).expect("a connection");
    let kick = bytes(&Request::SetVringKick(VringFd { index: 0, fd: Some(FdSlot(1)) }));
    theirs.send(&kick, &[pipe.as_fd()]).expect("it is sent");
    theirs.send(&bytes(&Request::GetFeatures), &[]).expect("it is sent");
    let message = ours.receive().expect("it lives").expect("it is whole");
    assert!(is_whole(&message, &kick));
    assert_eq!(message.fds.len(), 1);
    assert!(ours.receive().expect("it lives").expect("it is whole").fds.is_empty());

    let many = vec![pipe.as_fd(); FDS_MAX];
    theirs.send(&kick[..4], &many).expect("so many may be sent");
    assert!(ours.receive().expect("so many may come").is_none());
    theirs.send(&kick[4..], &[pipe.as_fd()]).expect("it is sent");
    assert!(matches!(ours.receive(), Err(ConnectionError::TooManyFds)));
}

#[test]
fn what_a_peer_does_not_read_is_kept_in_order_with_its_descriptors_up_to_a_bound() {
    let ((mut ours, mut theirs), (pipe, _other)) = (pair(), rustix::pipe::pipe().expect("a pipe"));
    // As much as the socket holds, and as much again is kept.
    let chunk = vec![7; 1 << 16];
    let mut sent = 0;
    while !ours.has_unsent() {
        ours.send(&chunk, &[]).expect("it is sent or kept");
        sent += chunk.len();
    }
    assert_eq!((ours.room_wanted(), ours.room_wanted()), (Some(true), None), "it is said once");
    ours.send(&[1, 2, 3], &[pipe.as_fd()]).expect("it is kept");
    let refused = (0..=UNSENT_MAX / chunk.len()).find_map(|_| ours.send(&chunk, &[]).err());
    assert!(matches!(refused, Some(ConnectionError::Unread)), "{refused:?}");

    theirs.read_exact(&mut vec![0; sent - chunk.len()]).expect("it is there");
    ours.flush().expect("it lives");
    let mut last = vec![0; chunk.len()];
    theirs.read_exact(&mut last).expect("it is there");
    assert_eq!(last, chunk);
    let mut theirs = Connection::new(theirs.into()).expect("a connection");
    ours.flush().expect("it lives");
    // Not a message, but it comes with its descriptor.
    assert!(theirs.receive().is_err() || theirs.fds.len() == 1);
    assert_eq!((&theirs.head[..3], theirs.fds.len()), (&[1, 2, 3][..], 1));
}

#[test]
fn a_hang_up_is_seen_and_ends_what_is_sent() {
    let (mut ours, theirs) = pair();
    assert!(!ours.is_hung_up());
    drop(theirs);
    assert!(ours.is_hung_up());
    assert!(matches!(ours.send(&[1], &[]), Err(ConnectionError::Closed)));
}

#[test]
fn a_path_is_taken_over_from_nobody_alone() {
    let directory = std::env::temp_dir().join(format!("warmswap-socket-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a directory");
    let path = directory.join("socket");
    let listener = listen(&path, 1).expect("nobody is there");
    let refused = listen(&path, 1).expect_err("somebody listens");
    assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    drop(listener);
    let again = listen(&path, 1).expect("it is left over");
    drop(again);
    std::fs::remove_file(&path).expect("a socket");
    std::fs::write(&path, "a file").expect("a file");
    assert_eq!(listen(&path, 1).expect_err("it is a file").kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).expect("it is left alone"), b"a file");
    std::fs::remove_dir_all(&directory).expect("it is ours");
}
