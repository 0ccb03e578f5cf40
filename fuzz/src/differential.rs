//! Any message to a back-end, decoded by us and by rust-vmm's `vhost`, which is given it over a socket: both make the same of it, or differ
//! where it is written down here that they do. What their back-end replies is understood.
//!
//! | refused by us alone | refused by them alone |
//! |---|---|
//! | a ring index beyond 255, a ring without entries or with more than 32,768 | flags in the header that the specification does not name |
//! | more than eight regions at once, a configuration beyond 256 bytes | a table of no regions, or with something in its padding |
//! | more descriptors than the message has (KICK, CALL, ERR without one; REM_MEM_REG) | ring addresses that are not aligned, flags of rings and configuration beyond the known |
//! | a reply in place of a request (CHECK_DEVICE_STATE, GPU_SET_SOCKET), a payload of the former | an in-flight region of no rings or entries, or of 20 bytes |
//! | | a log of no bytes or without a descriptor, the UUIDs of zeros and ones, an unknown direction or phase |
//! | a region to be added that is empty or wraps around | ADD_MEM_REG without a descriptor |
//! | | what they do not implement: [`unknown_there`] |

#[path = "../../crates/wire/tests/support/told.rs"]
mod told;

use std::cell::RefCell;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use warmswap_wire::{
    FdSlot, HEADER_SIZE, Header, HeaderFlags, PAYLOAD_SIZE_MAX, ProtocolFeatures, Reply, ReplyKind, Request,
    RequestCode, VirtioFeatures,
};

use self::told::{Told, normal};

const FEATURES: u64 = VirtioFeatures::PROTOCOL_FEATURES.bits() | VirtioFeatures::VERSION_1.bits();
/// They take no more with one message.
const FDS: usize = 12;

/// The first byte is the number of descriptors, then request and flags, then the payload.
pub(crate) fn run(data: &[u8]) {
    thread_local! {
        static PEERS: RefCell<Option<Peers>> = const { RefCell::new(None) };
    }
    let Some((count, rest)) = data.split_first() else { return };
    let Some((words, payload)) = rest.split_first_chunk::<8>() else { return };
    let payload = &payload[..payload.len().min(PAYLOAD_SIZE_MAX as usize)];
    // The length is always right: with another one both only wait for more.
    let size = u32::try_from(payload.len()).expect("it was cut off");
    let message = [words.as_slice(), &size.to_ne_bytes(), payload].concat();
    PEERS.with_borrow_mut(|cell| {
        let mut peers = cell.take().unwrap_or_else(Peers::new);
        peers.compare(&message, usize::from(*count) % (FDS + 1));
        *cell = Some(peers);
    });
}

/// A descriptor that their handler keeps where it asks for a file, and that passes for a socket where it asks for one.
fn file() -> File {
    thread_local! {
        static END: OwnedFd = UnixStream::pair().expect("a pair of sockets").0.into();
    }
    END.with(|end| File::from(end.try_clone().expect("a descriptor can be copied")))
}

/// A negotiated back-end of theirs, its socket and our end of it.
struct Peers {
    handler: BackendReqHandler<Mutex<Told>>,
    told: Arc<Mutex<Told>>,
    theirs: UnixStream,
    ours: UnixStream,
}

impl Peers {
    fn new() -> Self {
        let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
        // Neither ever waits: what is not there will not come.
        theirs.set_nonblocking(true).expect("a socket can be told so");
        ours.set_nonblocking(true).expect("a socket can be told so");
        let told = Arc::new(Mutex::new(Told::default()));
        let copy = theirs.try_clone().expect("a descriptor can be copied");
        let handler = BackendReqHandler::from_stream(copy, Arc::clone(&told));
        let mut peers = Peers { handler, told, theirs, ours };
        peers.negotiate();
        peers
    }

    /// Everything that can be negotiated is.
    fn negotiate(&mut self) {
        let all = ProtocolFeatures::all().bits();
        for request in [Request::GetFeatures, Request::SetProtocolFeatures(all), Request::SetFeatures(FEATURES)] {
            let mut bytes = Vec::new();
            request.encode(HeaderFlags::empty(), &mut bytes, &mut Vec::new());
            self.send(&bytes, 0);
            self.handler.handle_request().expect("they negotiate");
        }
        self.clear();
    }

    fn send(&self, message: &[u8], count: usize) {
        let end = file();
        let raw: Vec<RawFd> = vec![end.as_fd().as_raw_fd(); count];
        assert_eq!(self.ours.send_with_fds(&[message], &raw).expect("there is room"), message.len());
    }

    /// Takes away what is left in both directions, and what was told.
    fn clear(&mut self) -> Vec<u8> {
        let mut reply = [0; 8192];
        let got = drain(&self.ours, &mut reply);
        let _what_they_left = drain(&self.theirs, &mut [0; 8192]);
        let mut told = self.told.lock().expect("nobody panics");
        told.requests.clear();
        told.files.clear();
        told.backend = None;
        reply[..got].to_vec()
    }

    fn compare(&mut self, message: &[u8], count: usize) {
        let fds: Vec<FdSlot> = (0..count).map(|slot| FdSlot(slot as u32)).collect();
        let (head, payload) = message.split_first_chunk::<HEADER_SIZE>().expect("it was made with one");
        let header = Header::decode(head).ok();
        let ours = header.as_ref().and_then(|header| Request::decode(header, payload, &fds).ok());
        self.send(message, count);
        let handled = self.handler.handle_request();
        let theirs = self.told.lock().expect("nobody panics").requests.pop();
        let reply = self.clear();
        let understood = handled.is_ok();
        let shown = || format!("{count} descriptors with {message:?}: {ours:?}, and they {handled:?}: {theirs:?}");
        match (&header, &ours) {
            (Some(header), Some(ours)) => {
                let stricter = refused_there(head, payload, ours);
                assert_eq!(understood, !stricter, "{}", shown());
                if let Some(theirs) = theirs.as_ref().filter(|_| understood) {
                    assert_eq!(normal(theirs), normal(&reading(ours)), "{}", shown());
                }
                if !reply.is_empty() {
                    self.understand(header, ours.code(), &reply);
                }
            }
            (Some(header), None) if understood => assert!(refused_here(header, payload, count), "{}", shown()),
            (_, None) => assert!(!understood, "{}", shown()),
            (None, Some(_)) => unreachable!("nothing is decoded without a header"),
        }
        if matches!(ours, Some(Request::SetFeatures(_) | Request::SetProtocolFeatures(_))) {
            self.negotiate();
        }
    }

    fn understand(&self, asked: &Header, code: RequestCode, reply: &[u8]) {
        let (head, payload) = reply.split_first_chunk::<HEADER_SIZE>().expect("a whole header");
        let header = Header::decode(head).expect("their header");
        assert_eq!(header.size as usize, payload.len());
        // The descriptors that came with it went with the bytes; their number depends on the message alone.
        let kind = code.reply_kind();
        let decoded = Reply::decode(code as u32, code.name(), kind, &header, payload, &[]);
        let acknowledged = Reply::decode(code as u32, code.name(), ReplyKind::Ack, &header, payload, &[]);
        assert!(decoded.is_ok() || (asked.needs_reply() && acknowledged.is_ok()), "{code:?}: {reply:?}");
    }
}

fn drain(mut stream: &UnixStream, into: &mut [u8]) -> usize {
    let mut got = 0;
    loop {
        match stream.read(&mut into[got..]) {
            Ok(0) => return got,
            Ok(more) => got += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return got,
            Err(error) => panic!("our own socket: {error}"),
        }
    }
}

/// What their handler tells of a request: of one that asks, only what it asks for.
fn reading(request: &Request) -> Request {
    match request.clone() {
        Request::GetVringBase(mut state) => {
            state.value = 0;
            Request::GetVringBase(state)
        }
        Request::GetConfig(mut config) => {
            config.bytes.fill(0);
            Request::GetConfig(config)
        }
        other => other,
    }
}

/// Messages that they have no arm for.
fn unknown_there(code: RequestCode) -> bool {
    use RequestCode as C;
    matches!(
        code,
        C::SetLogFd
            | C::SendRarp
            | C::NetSetMtu
            | C::IotlbMsg
            | C::SetVringEndian
            | C::CreateCryptoSession
            | C::CloseCryptoSession
            | C::PostcopyAdvise
            | C::PostcopyListen
            | C::PostcopyEnd
            | C::VringKick
            | C::SetStatus
            | C::GetStatus
    )
}

/// They refuse what we take.
fn refused_there(head: &[u8; HEADER_SIZE], payload: &[u8], request: &Request) -> bool {
    let flags = u32::from_ne_bytes([head[4], head[5], head[6], head[7]]);
    flags & !0xf != 0
        || unknown_there(request.code())
        || match request {
            Request::SetMemTable(regions) => regions.is_empty() || payload[4..8] != [0; 4],
            Request::SetVringAddr(addr) => {
                addr.flags > 1
                    || !(addr.descriptor.is_multiple_of(16)
                        && addr.available.is_multiple_of(2)
                        && addr.used.is_multiple_of(4))
            }
            Request::GetConfig(config) | Request::SetConfig(config) => config.flags > 3 || config.bytes.is_empty(),
            Request::GetInflightFd(region) | Request::SetInflightFd { region, .. } => {
                region.num_queues == 0 || region.queue_size == 0 || payload.len() == 20
            }
            Request::SetLogBase { region, fd } => {
                fd.is_none() || region.size == 0 || region.offset.checked_add(region.size).is_none()
            }
            Request::GetSharedObject(id) => id.0 == [0; 16] || id.0 == [0xff; 16],
            Request::SetDeviceStateFd { transfer, .. } => transfer.direction > 1 || transfer.phase > 0,
            Request::AddMemReg { fd, .. } => fd.is_none(),
            _ => false,
        }
}

/// We refuse what they take.
fn refused_here(header: &Header, payload: &[u8], fds: usize) -> bool {
    use RequestCode as C;
    let word = |at: usize| payload.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().expect("four")));
    let Some(code) = RequestCode::from_id(header.request) else { return false };
    match code {
        C::SetVringNum => word(0) > 255 || !(1..=32_768).contains(&word(4)),
        C::SetVringAddr | C::SetVringBase | C::GetVringBase | C::SetVringEnable => word(0) > 255,
        C::SetMemTable => word(0) > 8,
        C::GetConfig | C::SetConfig => word(0) > 256 || word(4) > 256,
        C::SetVringKick | C::SetVringCall | C::SetVringErr => word(0) & 0x100 != 0 && fds > 1,
        C::RemMemReg => fds > 1,
        C::AddMemReg => {
            let number = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
            let size = number(16);
            size == 0 || [8, 24, 32].iter().any(|at| number(*at).checked_add(size).is_none())
        }
        C::GpuSetSocket => header.is_reply(),
        C::CheckDeviceState => header.is_reply() || !payload.is_empty(),
        _ => false,
    }
}
