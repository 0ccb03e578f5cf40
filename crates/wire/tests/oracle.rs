//! This codec against rust-vmm's `vhost` crate, over real sockets, in both directions and on both channels.
//!
//! Where the two differ on purpose the test says so: `vhost` sends an eight-byte SET_LOG_BASE where LOG_SHMFD is not negotiated
//! (QEMU sends sixteen), and attaches a descriptor to SHARED_OBJECT_LOOKUP. Not tried is the empty reply that refuses GET_CONFIG:
//! its front-end waits for ever for the length it asked for, whatever the header says, its own back-end's refusal included.

#[path = "support/told.rs"]
mod told;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Frontend, FrontendReqHandler, VhostUserFrontend, VhostUserFrontendReqHandler,
    VhostUserFrontendReqHandlerMut,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use warmswap_wire::{
    BackendRequest, Channel, ConfigSpace, DeviceStateTransfer, Error, FDS_MAX, FdSlot, HEADER_SIZE, Header,
    HeaderFlags, InflightDescription, LogRegion, MemoryRegion, ProtocolFeatures, Reply, Request, RequestCode,
    SharedObjectId, VirtioFeatures, VringAddr, VringFd, VringState,
};

use told::{Told, normal};

const FEATURES: u64 = VirtioFeatures::PROTOCOL_FEATURES.bits() | VirtioFeatures::VERSION_1.bits() | 1 << 9;

/// Our end of a socket: whole messages, descriptors as slots of a table.
struct Peer {
    stream: UnixStream,
    fds: Vec<OwnedFd>,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket has a timeout");
        Peer { stream, fds: Vec::new() }
    }

    fn slot(&mut self, fd: impl Into<OwnedFd>) -> FdSlot {
        self.fds.push(fd.into());
        FdSlot(u32::try_from(self.fds.len() - 1).expect("few"))
    }

    fn file(&self, slot: FdSlot) -> u64 {
        let copy = self.fds[slot.0 as usize].try_clone().expect("a descriptor can be copied");
        File::from(copy).metadata().expect("a file").ino()
    }

    fn receive(&mut self) -> (Header, Vec<u8>, Vec<FdSlot>) {
        let (head, mut slots) = self.read(HEADER_SIZE);
        let header = Header::decode(head.first_chunk().expect("a whole header")).expect("a header that is right");
        let (payload, more) = self.read(header.size as usize);
        slots.extend(more);
        (header, payload, slots)
    }

    fn read(&mut self, length: usize) -> (Vec<u8>, Vec<FdSlot>) {
        let (mut bytes, mut slots) = (vec![0; length], Vec::new());
        let mut filled = 0;
        while filled < length {
            let mut raw: [RawFd; FDS_MAX] = [-1; FDS_MAX];
            let rest = &mut bytes[filled..];
            let mut part = [libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() }];
            // SAFETY: the vector describes `rest`, which outlives the call.
            let (count, fds) = unsafe { self.stream.recv_with_fds(&mut part, &mut raw) }.expect("a message in time");
            assert!(count > 0, "the peer hung up");
            filled += count;
            for fd in &raw[..fds] {
                // SAFETY: the kernel has just made this descriptor for us.
                slots.push(self.slot(unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
        (bytes, slots)
    }

    fn send(&self, bytes: &[u8], slots: &[FdSlot]) {
        let raw: Vec<RawFd> = slots.iter().map(|slot| self.fds[slot.0 as usize].as_raw_fd()).collect();
        let sent = self.stream.send_with_fds(&[bytes], &raw).expect("the peer reads");
        assert_eq!(sent, bytes.len());
    }

    fn send_request(&self, request: &Request, flags: HeaderFlags) {
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        request.encode(flags, &mut bytes, &mut slots);
        self.send(&bytes, &slots);
    }

    fn send_reply(&self, code: RequestCode, reply: &Reply) {
        let (mut bytes, mut slots) = (Vec::new(), Vec::new());
        reply.encode(code as u32, &mut bytes, &mut slots);
        self.send(&bytes, &slots);
    }

    fn receive_reply(&mut self, code: RequestCode) -> Result<Reply, Error> {
        let (header, payload, slots) = self.receive();
        Reply::decode(code as u32, code.name(), code.reply_kind(), &header, &payload, &slots)
    }
}

/// A file nobody else has, known again by its inode.
fn file() -> File {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("warmswap-oracle-{}-{number}", std::process::id()));
    let file = File::create_new(&path).expect("a temporary file");
    std::fs::remove_file(path).expect("our own file");
    file
}

fn inode(file: &File) -> u64 {
    file.metadata().expect("a file").ino()
}

// --- their front-end, our decoder and our replies ----------------------------------------------------------------------------

/// A negotiated front-end of theirs and our end of its socket.
struct Front {
    theirs: Frontend,
    ours: Peer,
}

impl Front {
    fn new(need_reply: bool) -> Self {
        let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
        theirs.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket has a timeout");
        let mut front = Front { theirs: Frontend::from_stream(theirs, 4), ours: Peer::new(ours) };
        let all = ProtocolFeatures::all().bits();
        let (got, _) = front.exchange(|it| it.get_features(), Some(Reply::U64(FEATURES)));
        assert_eq!(got.expect("features"), FEATURES);
        let (got, _) = front.exchange(|it| it.get_protocol_features(), Some(Reply::U64(all)));
        let offered = got.expect("protocol features");
        let (_, request) = front.exchange(move |it| it.set_protocol_features(offered), None);
        assert_eq!(request, Request::SetProtocolFeatures(offered.bits()));
        if need_reply {
            front.theirs.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        front
    }

    /// Lets them send one request, decodes it, and answers with `reply`, or with an acknowledgement if one is asked for.
    fn exchange<T: Send>(
        &mut self,
        call: impl FnOnce(&mut Frontend) -> T + Send,
        reply: Option<Reply>,
    ) -> (T, Request) {
        let Front { theirs, ours } = self;
        std::thread::scope(|scope| {
            let calling = scope.spawn(|| call(theirs));
            let (header, payload, slots) = ours.receive();
            let request = Request::decode(&header, &payload, &slots).expect("what they send is right");
            match reply {
                Some(reply) => ours.send_reply(request.code(), &reply),
                None if header.needs_reply() => ours.send_reply(request.code(), &Reply::U64(0)),
                None => {}
            }
            (calling.join().expect("their side does not panic"), request)
        })
    }

    fn expect(&mut self, call: impl FnOnce(&mut Frontend) -> vhost::Result<()> + Send, expected: &Request) {
        let (result, request) = self.exchange(call, None);
        result.expect("our acknowledgement is understood");
        assert_eq!(request, *expected);
    }
}

#[test]
fn requests_of_their_front_end_are_understood_and_acknowledged() {
    for need_reply in [false, true] {
        let mut front = Front::new(need_reply);
        front.expect(|it| it.set_owner(), &Request::SetOwner);
        front.expect(|it| it.reset_owner(), &Request::ResetOwner);
        front.expect(|it| it.set_features(FEATURES), &Request::SetFeatures(FEATURES));
        front.expect(|it| it.reset_device(), &Request::ResetDevice);
        front.expect(|it| it.set_vring_num(2, 256), &Request::SetVringNum(VringState { index: 2, value: 256 }));
        front.expect(|it| it.set_vring_base(1, 65535), &Request::SetVringBase(VringState { index: 1, value: 65535 }));
        front.expect(|it| it.set_vring_enable(3, true), &Request::SetVringEnable(VringState { index: 3, value: 1 }));
        let place = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 1,
            desc_table_addr: 0x1000,
            used_ring_addr: 0x3000,
            avail_ring_addr: 0x2000,
            log_addr: Some(0x5000),
        };
        let expected =
            VringAddr { index: 1, flags: 1, descriptor: 0x1000, used: 0x3000, available: 0x2000, log: 0x5000 };
        front.expect(|it| it.set_vring_addr(1, &place), &Request::SetVringAddr(expected));
        let config = ConfigSpace { offset: 32, flags: 1, bytes: vec![7] };
        front.expect(|it| it.set_config(32, VhostUserConfigFlags::WRITABLE, &[7]), &Request::SetConfig(config));
        let info = region(9, -1);
        front.expect(|it| it.remove_mem_region(&info), &Request::RemMemReg(described(9)));
    }
}

#[test]
fn descriptors_of_their_front_end_arrive_with_the_message_they_belong_to() {
    for need_reply in [false, true] {
        let mut front = Front::new(need_reply);
        let event = EventFd::new(0).expect("an eventfd");
        let next = |front: &Front| FdSlot(u32::try_from(front.ours.fds.len()).expect("few"));
        let ring = |front: &Front| VringFd { index: 1, fd: Some(next(front)) };
        let expected = Request::SetVringKick(ring(&front));
        front.expect(|it| it.set_vring_kick(1, &event), &expected);
        let expected = Request::SetVringCall(ring(&front));
        front.expect(|it| it.set_vring_call(1, &event), &expected);
        let expected = Request::SetVringErr(ring(&front));
        front.expect(|it| it.set_vring_err(1, &event), &expected);
        let (log, expected) = (file(), Request::SetLogFd(next(&front)));
        if !need_reply {
            front.expect(|it| it.set_log_fd(log.as_raw_fd()), &expected);
            assert_eq!(front.ours.file(FdSlot(front.ours.fds.len() as u32 - 1)), inode(&log));
        }
        let (files, first) = ([file(), file()], next(&front).0);
        let regions = [region(1, files[0].as_raw_fd()), region(2, files[1].as_raw_fd())];
        let expected = Request::SetMemTable(vec![(described(1), FdSlot(first)), (described(2), FdSlot(first + 1))]);
        front.expect(|it| it.set_mem_table(&regions).map(|_| ()), &expected);
        assert_eq!([first, first + 1].map(|slot| front.ours.file(FdSlot(slot))), [inode(&files[0]), inode(&files[1])]);
        let expected = Request::AddMemReg { region: described(1), fd: Some(next(&front)) };
        front.expect(|it| it.add_mem_region(&regions[0]).map(|_| ()), &expected);
        let (end, _other) = UnixStream::pair().expect("a pair of sockets");
        let expected = Request::SetBackendReqFd(next(&front));
        front.expect(|it| it.set_backend_request_fd(&end), &expected);
        let inflight = VhostUserInflight::new(4096, 0, 2, 128);
        let description = InflightDescription { mmap_size: 4096, mmap_offset: 0, num_queues: 2, queue_size: 128 };
        let expected = Request::SetInflightFd { region: description, fd: next(&front) };
        front.expect(|it| it.set_inflight_fd(&inflight, files[0].as_raw_fd()), &expected);
    }
}

#[test]
fn our_replies_are_understood_by_their_front_end() {
    for need_reply in [false, true] {
        let mut front = Front::new(need_reply);
        let (got, request) = front.exchange(|it| it.get_queue_num(), Some(Reply::U64(8)));
        assert_eq!((got.expect("a number"), request), (8, Request::GetQueueNum));
        let (got, request) = front.exchange(|it| it.get_max_mem_slots(), Some(Reply::U64(509)));
        assert_eq!((got.expect("a number"), request), (509, Request::GetMaxMemSlots));
        let base = Reply::VringState(VringState { index: 3, value: 65535 });
        let (got, request) = front.exchange(|it| it.get_vring_base(3), Some(base));
        assert_eq!(got.expect("a base"), 65535);
        assert_eq!(request, Request::GetVringBase(VringState { index: 3, value: 0 }));
        let config = ConfigSpace { offset: 8, flags: 0, bytes: vec![1, 2, 3, 4] };
        let wanted = ConfigSpace { bytes: vec![0; 4], ..config.clone() };
        let ask = |it: &mut Frontend| it.get_config(8, 4, VhostUserConfigFlags::empty(), &[0; 4]);
        let (got, request) = front.exchange(ask, Some(Reply::Config(Some(config))));
        assert_eq!((got.expect("bytes").1, request), (vec![1, 2, 3, 4], Request::GetConfig(wanted)));
        let slot = front.ours.slot(file());
        let region = InflightDescription { mmap_size: 8192, mmap_offset: 0, num_queues: 2, queue_size: 128 };
        let asked = VhostUserInflight::new(0, 0, 2, 128);
        let (got, request) =
            front.exchange(|it| it.get_inflight_fd(&asked), Some(Reply::Inflight { region, fd: Some(slot) }));
        let (inflight, memory) = got.expect("a region");
        assert_eq!((inflight.mmap_size, inode(&memory)), (8192, front.ours.file(slot)));
        let description = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 128 };
        assert_eq!(request, Request::GetInflightFd(description));
        let (log, memory) = (LogRegion { size: 4096, offset: 512 }, file());
        let described = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 512, mmap_handle: memory.as_raw_fd() };
        let (got, request) = front.exchange(|it| it.set_log_base(0, Some(described)), Some(Reply::Log(log)));
        got.expect("the reply is as long as the request");
        let Request::SetLogBase { region, fd: Some(fd) } = request else { panic!("{request:?}") };
        assert_eq!((region, front.ours.file(fd)), (log, inode(&memory)));
        let (got, request) = front.exchange(|it| it.check_device_state(), Some(Reply::U64(0)));
        got.expect("success");
        assert_eq!(request, Request::CheckDeviceState);
        let object = object();
        let (got, request) = front.exchange(|it| it.get_shared_object(&object), Some(Reply::Empty));
        got.expect_err("no descriptor, no object");
        assert_eq!(request, Request::GetSharedObject(SharedObjectId(*object.uuid.as_bytes())));
        let pipe = OwnedFd::from(file());
        let ours = front.ours.slot(file());
        let (got, request) = front.exchange(
            |it| it.set_device_state_fd(VhostTransferStateDirection::LOAD, VhostTransferStatePhase::STOPPED, pipe),
            Some(Reply::Fd { value: 0, fd: Some(ours) }),
        );
        assert_eq!(inode(&got.expect("success").expect("a descriptor")), front.ours.file(ours));
        let Request::SetDeviceStateFd { transfer, .. } = request else { panic!("{request:?}") };
        assert_eq!(transfer, DeviceStateTransfer { direction: 1, phase: 0 });
    }
}

#[test]
fn a_log_without_a_descriptor_is_told_from_one_with_it_by_its_length() {
    let mut front = Front::new(false);
    front.theirs.set_log_base(0x1000, None).expect("sent");
    let (header, payload, slots) = front.ours.receive();
    let error =
        Request::decode(&header, &payload, &slots).expect_err("eight bytes are an address of theirs, useless to us");
    assert_eq!(error, Error::Length { request: "SET_LOG_BASE", expected: 16, found: 8 });
}

fn region(number: u64, handle: RawFd) -> VhostUserMemoryRegionInfo {
    let MemoryRegion { guest_addr, size, user_addr, mmap_offset } = described(number);
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest_addr,
        memory_size: size,
        userspace_addr: user_addr,
        mmap_offset,
        mmap_handle: handle,
    }
}

fn described(number: u64) -> MemoryRegion {
    MemoryRegion { guest_addr: number << 32, size: 0x1000 * number, user_addr: number << 40, mmap_offset: 4096 }
}

fn object() -> VhostUserSharedMsg {
    VhostUserSharedMsg { uuid: "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().expect("a well-formed UUID") }
}

// --- our encoder and decoder, their back-end ---------------------------------------------------------------------------------

/// A negotiated back-end of theirs and our end of its socket.
struct Back {
    theirs: BackendReqHandler<Mutex<Told>>,
    told: Arc<Mutex<Told>>,
    ours: Peer,
}

impl Back {
    fn new() -> Self {
        let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
        let told = Arc::new(Mutex::new(Told::default()));
        let mut back =
            Back { theirs: BackendReqHandler::from_stream(theirs, Arc::clone(&told)), told, ours: Peer::new(ours) };
        assert_eq!(back.ask(&Request::GetFeatures), Reply::U64(FEATURES));
        let Reply::U64(offered) = back.ask(&Request::GetProtocolFeatures) else { panic!("protocol features") };
        back.tell(&Request::SetProtocolFeatures(offered));
        back.acknowledged(&Request::SetFeatures(FEATURES));
        back
    }

    /// Sends a request and has it handled. It must arrive as the same request.
    fn tell(&mut self, request: &Request) {
        self.send(request, HeaderFlags::empty());
    }

    fn send(&mut self, request: &Request, flags: HeaderFlags) {
        self.ours.send_request(request, flags);
        self.theirs.handle_request().unwrap_or_else(|error| panic!("{request:?}: {error}"));
        let mut told = self.told.lock().expect("nobody panics");
        let arrived = told.requests.pop();
        if !matches!(request, Request::SetBackendReqFd(_)) {
            let arrived = arrived.expect("it was handled");
            assert_eq!(normal(&arrived), normal(request));
            let (mut sent, mut got) = (Vec::new(), Vec::new());
            request.encode(flags, &mut Vec::new(), &mut sent);
            arrived.encode(flags, &mut Vec::new(), &mut got);
            if !matches!(request, Request::GpuSetSocket(_)) {
                let sent: Vec<u64> = sent.into_iter().map(|slot| self.ours.file(slot)).collect();
                let got: Vec<u64> = got.into_iter().map(|slot| inode(&told.files[slot.0 as usize])).collect();
                assert_eq!(got, sent, "{request:?}");
            }
        }
    }

    fn ask(&mut self, request: &Request) -> Reply {
        self.tell(request);
        self.ours.receive_reply(request.code()).expect("their reply is understood")
    }

    fn acknowledged(&mut self, request: &Request) {
        self.send(request, HeaderFlags::NEED_REPLY);
        let code = request.code();
        let (header, payload, slots) = self.ours.receive();
        let reply = Reply::decode(code as u32, code.name(), warmswap_wire::ReplyKind::Ack, &header, &payload, &slots);
        assert_eq!(reply, Ok(Reply::U64(0)));
    }
}

#[test]
fn our_requests_are_understood_by_their_back_end() {
    let mut back = Back::new();
    let slots: Vec<FdSlot> = (0..8).map(|_| back.ours.slot(file())).collect();
    let state = |index, value| VringState { index, value };
    let ring = |fd| VringFd { index: 255, fd };
    let requests = [
        Request::SetOwner,
        Request::ResetOwner,
        Request::ResetDevice,
        Request::SetFeatures(FEATURES),
        Request::SetMemTable(slots.iter().zip(1..).map(|(slot, number)| (described(number), *slot)).collect()),
        Request::SetVringNum(state(255, 32768)),
        Request::SetVringAddr(VringAddr { index: 7, flags: 1, descriptor: 16, used: 64, available: 32, log: 9 }),
        Request::SetVringBase(state(3, 65535)),
        Request::SetVringKick(ring(Some(slots[0]))),
        Request::SetVringKick(ring(None)),
        Request::SetVringCall(ring(Some(slots[1]))),
        Request::SetVringCall(ring(None)),
        Request::SetVringErr(ring(Some(slots[2]))),
        Request::SetVringErr(ring(None)),
        Request::SetVringEnable(state(1, 1)),
        Request::SetVringEnable(state(1, 0)),
        Request::SetConfig(ConfigSpace { offset: 32, flags: 1, bytes: vec![1] }),
        Request::SetInflightFd {
            region: InflightDescription { mmap_size: 4096, mmap_offset: 0, num_queues: 1, queue_size: 128 },
            fd: slots[3],
        },
        Request::AddMemReg { region: described(3), fd: Some(slots[4]) },
        Request::RemMemReg(described(3)),
    ];
    for request in &requests {
        back.tell(request);
        back.acknowledged(request);
    }
}

#[test]
fn replies_of_their_back_end_are_understood() {
    let mut back = Back::new();
    assert_eq!(back.ask(&Request::GetQueueNum), Reply::U64(16));
    assert_eq!(back.ask(&Request::GetMaxMemSlots), Reply::U64(509));
    assert_eq!(back.ask(&Request::CheckDeviceState), Reply::U64(0));
    let state = VringState { index: 200, value: 4711 };
    assert_eq!(back.ask(&Request::GetVringBase(VringState { index: 200, value: 0 })), Reply::VringState(state));
    let wanted = ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 256] };
    let given = ConfigSpace { bytes: vec![5; 256], ..wanted.clone() };
    assert_eq!(back.ask(&Request::GetConfig(wanted.clone())), Reply::Config(Some(given)));
    back.told.lock().expect("nobody panics").config_fails = true;
    assert_eq!(back.ask(&Request::GetConfig(wanted)), Reply::Config(None), "a description of no bytes is a failure");
    let asked = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 128 };
    let Reply::Inflight { region, fd: Some(_) } = back.ask(&Request::GetInflightFd(asked)) else { panic!("a region") };
    assert_eq!(region, InflightDescription { mmap_size: 4096, mmap_offset: 64, ..asked });
    let (region, fd) = (LogRegion { size: 4096, offset: 0 }, Some(back.ours.slot(file())));
    assert_eq!(back.ask(&Request::SetLogBase { region, fd }), Reply::Log(region));
    let id = SharedObjectId(*object().uuid.as_bytes());
    assert!(matches!(back.ask(&Request::GetSharedObject(id)), Reply::Fd { value: 0, fd: Some(_) }));
    let fd = back.ours.slot(file());
    let transfer = DeviceStateTransfer { direction: 0, phase: 0 };
    let reply = back.ask(&Request::SetDeviceStateFd { transfer, fd });
    assert_eq!(reply, Reply::Fd { value: 0x100, fd: None });
}

// --- the back channel --------------------------------------------------------------------------------------------------------

#[test]
fn requests_on_their_back_channel_are_understood() {
    let mut back = Back::new();
    let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
    let slot = back.ours.slot(OwnedFd::from(theirs));
    back.tell(&Request::SetBackendReqFd(slot));
    let channel = back.told.lock().expect("nobody panics").backend.take().expect("a channel");
    channel.set_shared_object_flag(true);
    let mut ours = Peer::new(ours);
    let id = SharedObjectId(*object().uuid.as_bytes());
    channel.shared_object_add(&object()).expect("sent");
    channel.shared_object_remove(&object()).expect("sent");
    for expected in [BackendRequest::SharedObjectAdd(id), BackendRequest::SharedObjectRemove(id)] {
        let (header, payload, slots) = ours.receive();
        assert!(!header.needs_reply());
        assert_eq!(BackendRequest::decode(&header, &payload, &slots), Ok(expected));
    }
    channel.set_reply_ack_flag(true);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| channel.shared_object_add(&object()));
        let (header, payload, slots) = ours.receive();
        assert!(header.needs_reply());
        let request = BackendRequest::decode(&header, &payload, &slots).expect("understood");
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        Reply::U64(0).encode(request.id(), &mut bytes, &mut fds);
        ours.send(&bytes, &fds);
        asking.join().expect("no panic").expect("our acknowledgement is understood");
    });
    // Their lookup carries a descriptor, which the specification does not know: refused, as the feature is masked anyway.
    channel.set_reply_ack_flag(false);
    channel.shared_object_lookup(&object(), &file()).expect("sent");
    let (header, payload, slots) = ours.receive();
    BackendRequest::decode(&header, &payload, &slots).expect_err("a surplus descriptor");
}

#[derive(Default)]
struct Heard(Vec<BackendRequest>);

impl VhostUserFrontendReqHandlerMut for Heard {
    fn handle_config_change(&mut self) -> std::io::Result<u64> {
        self.0.push(BackendRequest::ConfigChange);
        Ok(0)
    }
    fn shared_object_add(&mut self, object: &VhostUserSharedMsg) -> std::io::Result<u64> {
        self.0.push(BackendRequest::SharedObjectAdd(SharedObjectId(*object.uuid.as_bytes())));
        Ok(0)
    }
    fn shared_object_remove(&mut self, object: &VhostUserSharedMsg) -> std::io::Result<u64> {
        self.0.push(BackendRequest::SharedObjectRemove(SharedObjectId(*object.uuid.as_bytes())));
        Ok(0)
    }
}

#[test]
fn our_requests_on_the_back_channel_are_understood_by_their_front_end() {
    let heard = Arc::new(Mutex::new(Heard::default()));
    let mut theirs = FrontendReqHandler::new(Arc::clone(&heard)).expect("a channel");
    theirs.set_reply_ack_flag(true);
    // SAFETY: the handler owns its descriptor for as long as it lives; this is a copy of it.
    let ours = unsafe { std::os::fd::BorrowedFd::borrow_raw(theirs.get_tx_raw_fd()) };
    let mut ours = Peer::new(UnixStream::from(ours.try_clone_to_owned().expect("a copy")));
    let id = SharedObjectId(*object().uuid.as_bytes());
    for request in
        [BackendRequest::ConfigChange, BackendRequest::SharedObjectAdd(id), BackendRequest::SharedObjectRemove(id)]
    {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        request.encode(HeaderFlags::NEED_REPLY, &mut bytes, &mut fds);
        ours.send(&bytes, &fds);
        theirs.handle_request().expect("understood");
        assert_eq!(heard.lock().expect("nobody panics").0.pop(), Some(request.clone()));
        let (header, payload, _) = ours.receive();
        assert!(header.is_reply() && header.request == request.id() && payload == 0_u64.to_ne_bytes());
    }
}

#[test]
fn an_id_beyond_the_specification_is_unknown_to_us() {
    // GET_SHMEM_CONFIG is 44 in their numbering, another message in others': refused rather than guessed.
    let mut front = Front::new(false);
    std::thread::scope(|scope| {
        let Front { theirs, ours } = &mut front;
        let asking = scope.spawn(|| theirs.get_shmem_config().is_err());
        let (header, payload, slots) = ours.receive();
        let error = Request::decode(&header, &payload, &slots).expect_err("unknown");
        assert_eq!(error, Error::UnknownRequest { request: header.request, channel: Channel::Front });
        ours.stream.shutdown(std::net::Shutdown::Both).expect("connected");
        assert!(asking.join().expect("no panic"));
    });
}
