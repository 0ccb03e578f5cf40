//! What the control thread waits for.

use std::cell::RefCell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::event::{EventfdFlags, Timespec};
use warmswap_core::Nanos;

use super::kicks::Kicks;

/// What a descriptor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A command waits.
    Commands,
    /// A signal waits.
    Signals,
    /// A VMM connects.
    Listener,
    /// The VMM.
    Vmm,
    /// Link of a backend.
    Link(u64),
    /// Back-end request channel of a backend.
    Requests(u64),
    /// Process of a backend.
    Process(u64),
    /// Output of a backend.
    Output(u64),
    /// Kick of a ring.
    Kick(u32),
    /// Kicks were seen.
    Kicks,
}

/// Device and source, as one word of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) device: u16,
    pub(crate) source: Source,
}

const NUMBER_BITS: u32 = 40;

impl Token {
    fn encode(self) -> u64 {
        let (kind, number) = match self.source {
            Source::Commands => (0, 0),
            Source::Signals => (1, 0),
            Source::Listener => (2, 0),
            Source::Vmm => (3, 0),
            Source::Link(id) => (4, id),
            Source::Requests(id) => (5, id),
            Source::Process(id) => (6, id),
            Source::Output(id) => (7, id),
            Source::Kick(ring) => (8, u64::from(ring)),
            Source::Kicks => (9, 0),
        };
        u64::from(self.device) << (NUMBER_BITS + 8) | kind << NUMBER_BITS | number & ((1 << NUMBER_BITS) - 1)
    }

    fn decode(word: u64) -> Option<Self> {
        let number = word & ((1 << NUMBER_BITS) - 1);
        let source = match word >> NUMBER_BITS & 0xff {
            0 => Source::Commands,
            1 => Source::Signals,
            2 => Source::Listener,
            3 => Source::Vmm,
            4 => Source::Link(number),
            5 => Source::Requests(number),
            6 => Source::Process(number),
            7 => Source::Output(number),
            8 => Source::Kick(number as u32),
            9 => Source::Kicks,
            _ => return None,
        };
        Some(Token { device: (word >> (NUMBER_BITS + 8)) as u16, source })
    }
}

/// How a descriptor is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    /// As long as there is something to read.
    Read,
    /// Whenever something new arrives to read.
    Edge,
    /// Once, when something new arrives; what is there is left to others.
    Once,
}

impl Interest {
    fn flags(self) -> epoll::EventFlags {
        match self {
            Interest::Read => epoll::EventFlags::IN,
            Interest::Edge => epoll::EventFlags::IN | epoll::EventFlags::ET,
            Interest::Once => epoll::EventFlags::IN | epoll::EventFlags::ET | epoll::EventFlags::ONESHOT,
        }
    }
}

/// The kernel's event queue.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
    /// Watches that must miss nothing; none where io_uring is forbidden, and `epoll` has to do.
    kicks: Option<RefCell<Kicks>>,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let kicks = Kicks::new();
        if let Some(kicks) = &kicks {
            let token = Token { device: 0, source: Source::Kicks }.encode();
            epoll::add(&epoll, kicks.as_fd(), epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
        }
        Ok(Poller { epoll, kicks: kicks.map(RefCell::new) })
    }

    pub(crate) fn add(&self, fd: BorrowedFd<'_>, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.encode()), interest.flags())?)
    }

    /// Watches a stream that is watched already, for room to write as well while there is something unsent. What can be read at
    /// this moment is told again.
    pub(crate) fn watch_room(
        &self,
        fd: BorrowedFd<'_>,
        token: Token,
        interest: Interest,
        room: bool,
    ) -> io::Result<()> {
        let flags = interest.flags() | if room { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token.encode()), flags)?)
    }

    /// Watches a descriptor that others read, once.
    pub(crate) fn watch_once(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        match &self.kicks {
            Some(kicks) => kicks.borrow_mut().add(fd, token.encode()),
            None => self.add(fd, token, Interest::Once),
        }
    }

    /// Ends a watch of [`Poller::watch_once`].
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>, token: Token) {
        match &self.kicks {
            Some(kicks) => kicks.borrow_mut().remove(token.encode()),
            None => self.remove(fd),
        }
    }

    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        // Removing what was never added is harmless.
        let _absent = epoll::delete(&self.epoll, fd);
    }

    /// Waits until something happens or `timeout` has passed.
    pub(crate) fn wait(&self, timeout: Option<Nanos>, tokens: &mut Vec<Token>) -> io::Result<()> {
        let span = timeout.map(|span| Timespec {
            tv_sec: i64::try_from(span.0 / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(span.0 % 1_000_000_000).unwrap_or(0),
        });
        let empty = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [empty; 64];
        tokens.clear();
        match epoll::wait(&self.epoll, &mut events, span.as_ref()) {
            Ok(count) => {
                for token in events[..count].iter().filter_map(|event| Token::decode(event.data.u64())) {
                    match (token.source, &self.kicks) {
                        (Source::Kicks, Some(kicks)) => {
                            kicks.borrow_mut().take(|token| tokens.extend(Token::decode(token)));
                        }
                        _ => tokens.push(token),
                    }
                }
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A descriptor that wakes the control thread.
pub(crate) fn waker() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use warmswap_socket::Connection;

    #[test]
    fn what_a_slow_peer_could_not_be_sent_reaches_it_when_it_reads_again() {
        let poller = Poller::new().expect("an event queue");
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (unix, stream) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
        let (ours, theirs) = rustix::net::socketpair(unix, stream, flags, None).expect("a pair of sockets");
        let (mut ours, mut theirs) = [ours, theirs].map(|end| Connection::new(end).expect("a stream")).into();
        let token = Token { device: 0, source: Source::Link(1) };
        poller.add(ours.as_fd(), token, Interest::Read).expect("it can be watched");
        let mut tokens = Vec::new();
        let mut ready = || {
            poller.wait(Some(Nanos(0)), &mut tokens).expect("it can be waited for");
            tokens.clone()
        };
        let message = |number: u32| [3, 1, 4, number].map(u32::to_ne_bytes).concat();
        let (mut sent, event) = (0, waker().expect("an eventfd"));
        while ours.room_wanted() != Some(true) {
            // Every message brings a descriptor.
            ours.send(&message(sent), &[event.as_fd()]).expect("it is kept");
            sent += 1;
        }
        for _ in 0..1000 {
            ours.send(&message(sent), &[event.as_fd()]).expect("it is kept");
            sent += 1;
        }
        poller.watch_room(ours.as_fd(), token, Interest::Read, true).expect("it is watched");
        assert_eq!(ready(), [], "there is no room as long as nobody reads");
        let mut received = 0;
        while received < sent {
            while let Some(message) = theirs.receive().expect("whole messages") {
                assert_eq!(message.payload, received.to_ne_bytes());
                assert_eq!(message.fds.len(), 1);
                received += 1;
            }
            if received < sent {
                assert_eq!(ready(), [token], "the peer has read, so there is room");
                ours.flush().expect("it is sent");
            }
        }
        assert_eq!(ours.room_wanted(), Some(false));
        poller.watch_room(ours.as_fd(), token, Interest::Read, false).expect("it is watched");
        assert_eq!(ready(), [], "nobody is woken for room that nobody needs");
    }

    #[test]
    fn what_is_kept_for_a_peer_that_never_reads_is_bounded() {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (unix, stream) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
        let fill = |with_descriptors: bool| {
            let (ours, _theirs) = rustix::net::socketpair(unix, stream, flags, None).expect("a pair of sockets");
            let mut ours = Connection::new(ours).expect("a stream");
            let event = waker().expect("an eventfd");
            let fds = [event.as_fd()];
            let fds = if with_descriptors { &fds[..] } else { &[] };
            (0..1_000_000).position(|_| ours.send(&[0; 16], fds).is_err())
        };
        assert!(fill(false).is_some_and(|sent| sent < 100_000));
        assert!(fill(true).is_some_and(|sent| sent < 4_000));
    }

    #[test]
    fn tokens_survive_the_kernel() {
        for source in [Source::Vmm, Source::Link(77), Source::Kick(255), Source::Process((1 << 40) - 1), Source::Kicks]
        {
            let token = Token { device: 65535, source };
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }
}
