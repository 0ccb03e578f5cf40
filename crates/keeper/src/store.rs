//! The side of the process whose descriptors are held, by a keeper or by systemd alike.
//!
//! A descriptor is put once for each *open file description*, whatever number it has here and however often it comes: systemd drops
//! in silence what it holds already, under whatever name, and the second name would then be missing after a restart. A VMM gives
//! the same memory over two connections, and the same eventfd again after a reset. So equal descriptions share one [`Kept`], and are
//! counted. Whether two descriptions are equal only kcmp(2) can tell; it orders them too, so ten thousand eventfds, which all have
//! one inode, are told apart in fourteen looks.
//!
//! To compare, the store has a descriptor of its own for each description: what is kept takes one more in this process.
//!
//! Everything is sent before the call returns, so it survives the sender: it then lies in the receiver's queue, which is read
//! before the next process is started. Datagrams of one socket arrive in their order, so that a removal and a later put never
//! change places.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// How many descriptions can have a name: as many as three digits in base 36 tell apart.
///
/// Names are short because all of them together are handed over in one variable of the environment, which may have 128 KiB.
pub const NAMES_MAX: u32 = 36 * 36 * 36;
/// Longest that is waited for room in the receiver's queue, or for its answer to a barrier.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest text of a status: a datagram has 4096 bytes at most.
const STATUS_MAX: usize = 2048;
/// Number of the first descriptor that is handed over (sd_listen_fds(3)).
pub(crate) const FIRST: RawFd = 3;

/// A description that is kept, by its number. As text it is the name it is kept by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kept(u32);

impl Kept {
    /// Its number, below [`NAMES_MAX`].
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }

    /// What has this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        (number < NAMES_MAX).then_some(Kept(number))
    }

    /// What has this name; none if it is no name of ours. One number has one name only.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(u32::from(byte - b'0')),
            b'a'..=b'z' => Some(u32::from(byte - b'a') + 10),
            _ => None,
        };
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() > 3 || (bytes.len() > 1 && bytes[0] == b'0') {
            return None;
        }
        bytes.iter().try_fold(0, |number, byte| Some(number * 36 + digit(*byte)?)).map(Kept)
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [0_u8; 3];
        let (mut rest, mut from) = (self.0, digits.len());
        loop {
            from -= 1;
            digits[from] = b"0123456789abcdefghijklmnopqrstuvwxyz"[(rest % 36) as usize];
            rest /= 36;
            if rest == 0 {
                break;
            }
        }
        f.pad(std::str::from_utf8(&digits[from..]).map_err(|_| fmt::Error)?)
    }
}

/// What a number stands for.
#[derive(Debug)]
enum Slot {
    /// It was inherited under this number, and nobody has asked for it yet.
    Inherited,
    /// It is kept. The descriptor is the store's own, to compare with.
    Kept { fd: OwnedFd, inode: Inode, references: u32 },
}

/// Device and inode: what differs in it differs in its description, but not the other way round.
type Inode = (u64, u64);

/// The descriptors that are held for this process, and the way to those who hold them.
#[derive(Debug)]
pub struct Store {
    socket: OwnedFd,
    inherited: Vec<(String, OwnedFd)>,
    slots: HashMap<u32, Slot>,
    /// The descriptions of each inode, in the order of kcmp(2).
    by_inode: HashMap<Inode, Vec<u32>>,
    /// Where the search for a free number begins. Numbers go round, so that a name is not soon used for something else.
    next: u32,
    max: Option<u32>,
}

impl Store {
    /// Takes what the environment says of a store out of it: `NOTIFY_SOCKET`, `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES` and
    /// `FDSTORE`. None if nobody listens. To be called before any thread is started.
    ///
    /// # Errors
    /// A thread runs already, or what was handed over is not what the environment says.
    pub fn from_env() -> io::Result<Option<Self>> {
        let [socket, pid, count, names, max] =
            ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE"].map(take_variable);
        let (socket, pid, count, names, max) = (socket?, pid?, count?, names?, max?);
        let Some(socket) = socket else { return Ok(None) };
        // They are for the process that was started, not for whoever it has started in turn.
        let ours = pid.is_some_and(|pid| pid.to_str() == Some(&std::process::id().to_string()));
        let inherited = match count {
            Some(count) if ours => inherit(&count, names.as_deref())?,
            _ => Vec::new(),
        };
        let max = max.and_then(|max| max.to_str()?.parse().ok());
        Store::new(&socket, inherited, max).map(Some)
    }

    /// Reaches those who listen at `socket`, as `NOTIFY_SOCKET` has it: a path, or a name that begins with `@`. `inherited` is what
    /// they held for the process before this one, `max` how many they hold at most, if that is known.
    ///
    /// # Errors
    /// What the system says; the kernel cannot compare descriptors.
    pub fn new(socket: &OsStr, inherited: Vec<(String, OwnedFd)>, max: Option<u32>) -> io::Result<Self> {
        let bytes = socket.as_bytes();
        let address = match bytes.first() {
            Some(b'/') => SocketAddrUnix::new(bytes)?,
            Some(b'@') => SocketAddrUnix::new_abstract_name(&bytes[1..])?,
            _ => return Err(invalid(format!("NOTIFY_SOCKET is {}: neither path nor @name", socket.display()))),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket_fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        // Only a connected socket tells when there is room in the queue of the other; and it is reached from any sandbox.
        rustix::net::connect(&socket_fd, &address)
            .map_err(|error| io::Error::new(error.kind(), format!("NOTIFY_SOCKET {}: {error}", socket.display())))?;
        order(socket_fd.as_fd(), socket_fd.as_fd())?;
        let numbers = inherited.iter().filter_map(|(name, _)| Kept::from_name(name)).map(|kept| kept.0);
        let slots: HashMap<u32, Slot> = numbers.map(|number| (number, Slot::Inherited)).collect();
        let next = slots.keys().max().map_or(0, |last| (last + 1) % NAMES_MAX);
        Ok(Store { socket: socket_fd, inherited, slots, by_inode: HashMap::new(), next, max })
    }

    /// What was held for the process before this one, by name: what this one keeps of it is given to [`Store::adopt`], every other
    /// name to [`Store::discard`]. Empty the second time. None of it is passed on to a program that is executed.
    pub fn take_inherited(&mut self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.inherited)
    }

    /// How many descriptors are held at most, listening sockets not counted; none if nobody has said so (systemd before 254).
    #[must_use]
    pub fn max(&self) -> Option<u32> {
        self.max
    }

    /// How many descriptors are held, as far as this side knows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// How many references there are to what is kept; none if it is not.
    #[must_use]
    pub fn references(&self, kept: Kept) -> Option<u32> {
        match self.slots.get(&kept.0)? {
            Slot::Kept { references, .. } => Some(*references),
            Slot::Inherited => None,
        }
    }

    /// Has a descriptor held, or counts one more reference to its description if that is held already. It is sent when this returns.
    ///
    /// # Errors
    /// As many as possible are held; nobody has made room within five seconds; what the system says. Nothing is changed then.
    pub fn put(&mut self, fd: BorrowedFd<'_>) -> io::Result<Kept> {
        let inode = inode_of(fd)?;
        let place = match self.find(inode, fd)? {
            Ok(number) => return self.refer(number),
            Err(place) => place,
        };
        if self.max.is_some_and(|max| self.slots.len() >= max as usize) {
            let text = format!("the descriptor store is full: it holds {}, as many as it may", self.slots.len());
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        let kept = self.free()?;
        let own = rustix::io::fcntl_dupfd_cloexec(fd, FIRST)?;
        self.send(format!("FDSTORE=1\nFDPOLL=0\nFDNAME={kept}").as_bytes(), Some(fd))?;
        self.enter(kept.0, place, own, inode);
        self.next = (kept.0 + 1) % NAMES_MAX;
        Ok(kept)
    }

    /// Enters what was inherited under this name, or counts one more reference to it. It is held already, so nothing is sent.
    ///
    /// # Errors
    /// Nothing was inherited under this name; it is not this description; what the system says.
    pub fn adopt(&mut self, name: &str, fd: BorrowedFd<'_>) -> io::Result<Kept> {
        let kept = Kept::from_name(name).ok_or_else(|| invalid(format!("{name:?} is no name of a kept descriptor")))?;
        let inode = inode_of(fd)?;
        let found = self.find(inode, fd)?;
        match (self.slots.get(&kept.0), found) {
            (None, _) => Err(invalid(format!("nothing was inherited as {name}"))),
            (Some(Slot::Kept { .. }), Ok(number)) if number == kept.0 => self.refer(number),
            (Some(Slot::Kept { .. }), _) => Err(invalid(format!("{name} is another descriptor"))),
            (Some(Slot::Inherited), Ok(number)) => Err(invalid(format!("{name} is held as {} already", Kept(number)))),
            (Some(Slot::Inherited), Err(place)) => {
                let own = rustix::io::fcntl_dupfd_cloexec(fd, FIRST)?;
                self.enter(kept.0, place, own, inode);
                Ok(kept)
            }
        }
    }

    /// Has whatever was inherited under this name, and was not adopted, held no longer. Names of others (a socket that systemd
    /// listens at) may be given too.
    ///
    /// # Errors
    /// It was adopted; nobody has made room within five seconds; what the system says.
    pub fn discard(&mut self, name: &str) -> io::Result<()> {
        let kept = Kept::from_name(name);
        if kept.is_some_and(|kept| matches!(self.slots.get(&kept.0), Some(Slot::Kept { .. }))) {
            return Err(invalid(format!("{name} was adopted")));
        }
        self.remove(name)?;
        if let Some(kept) = kept {
            self.slots.remove(&kept.0);
        }
        Ok(())
    }

    /// Gives one reference back. With the last one it is held no longer; that is sent when this returns.
    ///
    /// # Errors
    /// It is not kept; nobody has made room within five seconds; what the system says. The reference stands then.
    pub fn let_go(&mut self, kept: Kept) -> io::Result<()> {
        let Some(Slot::Kept { references, inode, fd }) = self.slots.get_mut(&kept.0) else {
            return Err(invalid(format!("{kept} is not kept")));
        };
        if *references > 1 {
            *references -= 1;
            return Ok(());
        }
        let (inode, fd) = (*inode, fd.as_raw_fd());
        self.remove(&kept.to_string())?;
        let descriptions = self.by_inode.get_mut(&inode).expect("entered together");
        descriptions.retain(|number| *number != kept.0);
        if descriptions.is_empty() {
            self.by_inode.remove(&inode);
        }
        let gone = self.slots.remove(&kept.0);
        debug_assert!(matches!(gone, Some(Slot::Kept { fd: own, .. }) if own.as_raw_fd() == fd));
        Ok(())
    }

    /// Says that the service is ready.
    ///
    /// # Errors
    /// Nobody has made room within five seconds; what the system says.
    pub fn ready(&self) -> io::Result<()> {
        self.send(b"READY=1", None)
    }

    /// Says that the service is about to end.
    ///
    /// # Errors
    /// Nobody has made room within five seconds; what the system says.
    pub fn stopping(&self) -> io::Result<()> {
        self.send(b"STOPPING=1", None)
    }

    /// Says in one line how the service is. What is after a line break, or too long, is left out.
    ///
    /// # Errors
    /// Nobody has made room within five seconds; what the system says.
    pub fn status(&self, text: &str) -> io::Result<()> {
        let line = text.lines().next().unwrap_or("");
        let end = (0..=line.len().min(STATUS_MAX)).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
        self.send(format!("STATUS={}", &line[..end]).as_bytes(), None)
    }

    /// Waits until everything that was sent before has been taken in.
    ///
    /// # Errors
    /// That took longer than five seconds; what the system says.
    pub fn barrier(&self) -> io::Result<()> {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        self.send(b"BARRIER=1", Some(theirs.as_fd()))?;
        drop(theirs);
        // Closed by the last one who has it: the receiver, when it has come to this message.
        if !wait(ours.as_fd(), PollFlags::empty(), Instant::now() + WAIT_MAX)? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the descriptor store does not answer a barrier"));
        }
        Ok(())
    }

    /// The number under which a description is kept, or where it would stand among those of its inode.
    fn find(&self, inode: Inode, fd: BorrowedFd<'_>) -> io::Result<Result<u32, usize>> {
        let descriptions = self.by_inode.get(&inode).map_or(&[][..], Vec::as_slice);
        let mut failed = None;
        let found = descriptions.binary_search_by(|number| match self.slots.get(number) {
            Some(Slot::Kept { fd: own, .. }) => order(own.as_fd(), fd).unwrap_or_else(|error| {
                failed = Some(error);
                std::cmp::Ordering::Equal
            }),
            _ => unreachable!("what is listed by inode is kept"),
        });
        failed.map_or(Ok(found.map(|place| descriptions[place])), Err)
    }

    fn enter(&mut self, number: u32, place: usize, fd: OwnedFd, inode: Inode) {
        self.by_inode.entry(inode).or_default().insert(place, number);
        self.slots.insert(number, Slot::Kept { fd, inode, references: 1 });
    }

    fn refer(&mut self, number: u32) -> io::Result<Kept> {
        let Some(Slot::Kept { references, .. }) = self.slots.get_mut(&number) else {
            unreachable!("it was found among what is kept");
        };
        *references = references.checked_add(1).ok_or_else(|| invalid("too many references".into()))?;
        Ok(Kept(number))
    }

    fn free(&self) -> io::Result<Kept> {
        let free = (self.next..NAMES_MAX).chain(0..self.next).find(|number| !self.slots.contains_key(number));
        free.map(Kept).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("{NAMES_MAX} descriptors are kept: there are no more names"),
            )
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.send(format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes(), None)
    }

    /// Sends one datagram. A full queue is waited for within a bound: it is emptied by a process that does nothing else.
    fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one descriptor");
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if wait(self.socket.as_fd(), PollFlags::OUT, deadline)? => {}
                // Too many descriptors of this user are on their way; nothing tells when they have arrived.
                Err(Errno::TOOMANYREFS) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Err(Errno::AGAIN | Errno::TOOMANYREFS) => {
                    let text = "the descriptor store takes nothing in: its queue is full";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                Err(error) => return Err(io::Error::new(error.kind(), format!("the descriptor store: {error}"))),
            }
        }
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Waits for these events, or a hang-up. False if the deadline came first.
fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn inode_of(fd: BorrowedFd<'_>) -> io::Result<Inode> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// The order of two open file descriptions: an arbitrary one, which stays the same as long as both are open.
fn order(left: BorrowedFd<'_>, right: BorrowedFd<'_>) -> io::Result<std::cmp::Ordering> {
    const KCMP_FILE: libc::c_int = 0;
    let pid = std::process::id();
    // SAFETY: kcmp(2) takes numbers alone and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, left.as_raw_fd(), right.as_raw_fd()) };
    match result {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2 => Ok(std::cmp::Ordering::Greater),
        _ => {
            let error = io::Error::last_os_error();
            Err(io::Error::new(error.kind(), format!("kcmp cannot compare two descriptors: {error}")))
        }
    }
}

/// Takes a variable out of the environment: what this process starts must not believe that it is meant.
fn take_variable(name: &str) -> io::Result<Option<OsString>> {
    let value = std::env::var_os(name);
    if value.is_some() {
        // A directory has two links and one more for each directory in it, here: for each thread.
        let threads = rustix::fs::stat("/proc/self/task")?.st_nlink.saturating_sub(2);
        if threads != 1 {
            return Err(invalid(format!("{name} must be taken before threads are started; there are {threads}")));
        }
        // SAFETY: no other thread exists that could read the environment meanwhile; it was looked at just now.
        unsafe { std::env::remove_var(name) };
    }
    Ok(value)
}

/// The descriptors that were handed over to this process, by name, none of which a program inherits in turn.
fn inherit(count: &OsStr, names: Option<&OsStr>) -> io::Result<Vec<(String, OwnedFd)>> {
    let refused = || invalid(format!("LISTEN_FDS is {}: no number of descriptors", count.display()));
    let count: u16 =
        count.to_str().and_then(|count| count.parse().ok()).filter(|count| *count > 0).ok_or_else(refused)?;
    let names = names.map(|names| names.to_string_lossy().into_owned());
    let names: Vec<&str> =
        names.as_deref().map_or_else(|| vec!["unknown"; count.into()], |names| names.split(':').collect());
    if names.len() != usize::from(count) {
        return Err(invalid(format!("LISTEN_FDNAMES has {} names for {count} descriptors", names.len())));
    }
    let numbers = FIRST..FIRST + RawFd::from(count);
    names
        .into_iter()
        .zip(numbers)
        .map(|(name, number)| {
            // SAFETY: fcntl(2) with a number; one that is not open is refused and nothing else.
            if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
                let error = io::Error::last_os_error();
                return Err(io::Error::new(
                    error.kind(),
                    format!("descriptor {number}, handed over as {name}: {error}"),
                ));
            }
            // SAFETY: it is open, was handed over to this very process (LISTEN_PID), and is taken once: the variables are gone.
            Ok((name.to_owned(), unsafe { OwnedFd::from_raw_fd(number) }))
        })
        .collect()
}

#[cfg(test)]
mod tests;
