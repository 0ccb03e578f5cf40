//! Where a check plays: a fresh directory, fresh back-ends, guest memory, and a front-end that says what the check wants.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use warmswap_wire::{FdSlot, ProtocolFeatures, Reply, Request, VirtioFeatures, VringFd, VringState};

use super::job::{Jobs, Kind};
use super::link::{Heard, Link};
use super::outcome::{Miss, expect, failed, lacks};
use super::process::{Places, Process};
use super::ring::Ring;
use crate::campaign::fuse::Faults;
use crate::guest::GuestMemory;

/// How long a back-end may take to listen.
const LISTEN: Duration = Duration::from_secs(10);
/// Within what a request must be completed that nothing holds back.
pub(super) const SERVED: Duration = Duration::from_secs(2);
/// For how long it is watched that nothing happens.
pub(super) const QUIET: Duration = Duration::from_millis(300);
/// Entries of a ring, unless a check wants others.
pub(super) const SIZE: u16 = 64;
/// Guest memory. Rings and requests take less than a megabyte.
const MEMORY: u64 = 16 << 20;

/// What is checked, and with what.
#[derive(Debug)]
pub(super) struct Subject {
    /// The command line.
    pub(super) line: Vec<String>,
    /// The device's type.
    pub(super) kind: Kind,
    /// Where the image is, with a pattern that is known.
    pub(super) image: PathBuf,
    /// What makes the image slow, where that is possible.
    pub(super) store: Option<Arc<Faults>>,
    /// An answer must come within that.
    pub(super) patience: Duration,
}

impl Subject {
    /// Whether the back-end serves the suite's image, so that its data is known.
    pub(super) fn is_ours(&self) -> bool {
        self.line.iter().any(|word| word.contains("{image}"))
    }

    /// Makes every read and write of the image take so much longer.
    pub(super) fn slow(&self, delay: Duration) {
        if let Some(store) = &self.store {
            store.delay_ns.store(delay.as_nanos() as u64, Ordering::Relaxed);
        }
    }
}

/// The place of one check.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    /// What is checked.
    pub(super) subject: &'a Subject,
    dir: PathBuf,
    processes: Vec<Rc<RefCell<Process>>>,
}

impl<'a> Stage<'a> {
    /// One in that directory, which is there and empty.
    pub(super) fn new(subject: &'a Subject, dir: PathBuf) -> Self {
        Stage { subject, dir, processes: Vec::new() }
    }

    /// Starts a back-end, without a connection.
    pub(super) fn start(&mut self) -> Result<(Rc<RefCell<Process>>, PathBuf), Miss> {
        let number = self.processes.len();
        let socket = self.dir.join(format!("socket{number}"));
        let dir = self.dir.join(format!("dir{number}"));
        std::fs::create_dir_all(&dir)?;
        let places = Places { socket: &socket, image: &self.subject.image, dir: &dir };
        let process = Process::start(&self.subject.line, &places, self.dir.join(format!("log{number}")))?;
        let process = Rc::new(RefCell::new(process));
        self.processes.push(Rc::clone(&process));
        Ok((process, socket))
    }

    /// Starts a back-end and connects to it. Nothing is said yet.
    pub(super) fn open(&mut self) -> Result<Bench, Miss> {
        let memory = GuestMemory::new(MEMORY)?;
        self.open_with(memory)
    }

    /// The same with memory that another back-end has served.
    pub(super) fn open_with(&mut self, memory: GuestMemory) -> Result<Bench, Miss> {
        let (process, socket) = self.start()?;
        let link = match Link::connect(&socket, LISTEN, self.subject.patience) {
            Ok(link) => link,
            Err(Miss::Timeout(why)) => {
                let end = process.borrow_mut().end_in_words()?;
                return Err(Miss::Broken(anyhow::anyhow!("the back-end does not start: {why}{end}")));
            }
            Err(other) => return Err(other),
        };
        Ok(Bench {
            kind: self.subject.kind,
            known: self.subject.is_ours(),
            process,
            socket,
            link,
            memory,
            offered: 0,
            features: 0,
            protocol: ProtocolFeatures::empty(),
            beside: None,
        })
    }

    /// The usual beginning: a back-end with which the usual things were negotiated and that knows the memory.
    pub(super) fn ready(&mut self) -> Result<Bench, Miss> {
        self.ready_with(Choice::default())
    }

    /// The same with other features.
    pub(super) fn ready_with(&mut self, choice: Choice) -> Result<Bench, Miss> {
        let mut bench = self.open()?;
        bench.negotiate(choice)?;
        bench.share_memory()?;
        Ok(bench)
    }

    /// How one of the back-ends died, if one did.
    pub(super) fn died(&self, closed: bool) -> anyhow::Result<Option<String>> {
        for process in &self.processes {
            if let Some(how) = process.borrow_mut().died(closed)? {
                return Ok(Some(how));
            }
        }
        Ok(None)
    }

    /// How the last of them ended by itself, in words.
    pub(super) fn end_in_words(&self) -> anyhow::Result<String> {
        self.processes.last().map_or_else(|| Ok(String::new()), |process| process.borrow_mut().end_in_words())
    }

    /// Ends all of them.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        self.subject.slow(Duration::ZERO);
        self.processes.iter().try_for_each(|process| process.borrow_mut().kill())
    }
}

/// What is negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    /// Virtio features that are wanted, of those that are offered.
    pub(super) features: u64,
    /// Protocol features that are wanted, of those that are offered.
    pub(super) protocol: ProtocolFeatures,
}

impl Default for Choice {
    fn default() -> Self {
        let features = VirtioFeatures::VERSION_1 | VirtioFeatures::PROTOCOL_FEATURES;
        let protocol = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::MQ | ProtocolFeatures::CONFIG;
        Choice { features: features.bits(), protocol }
    }
}

impl Choice {
    /// The usual, and these.
    pub(super) fn and(features: VirtioFeatures, protocol: ProtocolFeatures) -> Self {
        let usual = Choice::default();
        Choice { features: usual.features | features.bits(), protocol: usual.protocol | protocol }
    }
}

/// A back-end, a connection to it, and the guest's memory.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) kind: Kind,
    /// It serves the suite's image.
    pub(super) known: bool,
    pub(super) process: Rc<RefCell<Process>>,
    pub(super) socket: PathBuf,
    pub(super) link: Link,
    pub(super) memory: GuestMemory,
    /// Virtio features that are offered.
    pub(super) offered: u64,
    /// Those in use.
    pub(super) features: u64,
    /// Protocol features in use.
    pub(super) protocol: ProtocolFeatures,
    /// A ring that has to run beside the one that requests go to, and stays empty.
    beside: Option<Ring>,
}

impl Bench {
    /// GET_FEATURES … SET_FEATURES.
    pub(super) fn negotiate(&mut self, choice: Choice) -> Result<(), Miss> {
        self.offered = self.number(&Request::GetFeatures)?;
        if self.offered & VirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let offered = self.number(&Request::GetProtocolFeatures)?;
            let chosen = ProtocolFeatures::from_bits_truncate(offered) & choice.protocol;
            self.tell(&Request::SetProtocolFeatures(chosen.bits()), &[])?;
            self.protocol = chosen;
        }
        self.tell(&Request::SetOwner, &[])?;
        self.features = self.offered & choice.features;
        self.tell(&Request::SetFeatures(self.features), &[])
    }

    /// Not applicable unless these were offered and are in use.
    pub(super) fn needs(&self, protocol: ProtocolFeatures) -> Result<(), Miss> {
        let lacking = protocol - self.protocol;
        if lacking.is_empty() { Ok(()) } else { lacks(format!("protocol feature {lacking:?} is not offered")) }
    }

    /// Not applicable unless these are in use.
    pub(super) fn needs_virtio(&self, features: VirtioFeatures) -> Result<(), Miss> {
        if self.has(features) { Ok(()) } else { lacks(format!("virtio feature {features:?} is not offered")) }
    }

    /// Whether these are in use.
    pub(super) fn has(&self, features: VirtioFeatures) -> bool {
        self.features & features.bits() == features.bits()
    }

    /// SET_MEM_TABLE.
    pub(super) fn share_memory(&mut self) -> Result<(), Miss> {
        let fds: Vec<BorrowedFd<'_>> = self.memory.table().map(|(_, fd)| fd).collect();
        let table = self.memory.table().enumerate().map(|(at, (region, _))| (region, FdSlot(at as u32))).collect();
        self.tell(&Request::SetMemTable(table), &fds)?;
        self.settle()?;
        self.run_beside()
    }

    /// The answer to a request that has one.
    pub(super) fn ask(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), Miss> {
        self.link.send(request, &[], false)?;
        self.answer(request)
    }

    /// The answer to a request that was sent.
    pub(super) fn answer(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), Miss> {
        let code = request.code();
        match self.link.hear()? {
            Heard::Closed => Err(Miss::Closed(format!("instead of an answer to {}", code.name()))),
            Heard::Silence => Err(Miss::Timeout(format!("{} is not answered", code.name()))),
            Heard::Message { header, payload, fds } => {
                let slots: Vec<FdSlot> = (0..fds.len() as u32).map(FdSlot).collect();
                let reply = Reply::decode(code as u32, code.name(), code.reply_kind(), &header, &payload, &slots);
                // A message with an answer of its own may be refused with a number.
                match reply.or_else(|error| number_in(&payload).map(Reply::U64).ok_or(error)) {
                    Ok(reply) => Ok((reply, fds)),
                    Err(error) => failed(format!("the answer to {} is wrong: {error}", code.name())),
                }
            }
        }
    }

    /// The number that a request is answered with.
    pub(super) fn number(&self, request: &Request) -> Result<u64, Miss> {
        match self.ask(request)?.0 {
            Reply::U64(value) => Ok(value),
            other => failed(format!("{} is answered with {other:?}", request.code().name())),
        }
    }

    /// Sends a request, and requires that it is acknowledged where that was negotiated.
    pub(super) fn tell(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Miss> {
        if !self.protocol.contains(ProtocolFeatures::REPLY_ACK) {
            return self.link.send(request, fds, false);
        }
        let answer = self.acknowledged(request, fds)?;
        expect(answer == 0, || format!("{} is refused with {answer}", request.code().name()))
    }

    /// Sends a request that asks for an acknowledgement, and returns what that is.
    pub(super) fn acknowledged(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<u64, Miss> {
        self.link.send(request, fds, true)?;
        match self.answer(request)?.0 {
            Reply::U64(value) => Ok(value),
            other => failed(format!("{} is acknowledged with {other:?}", request.code().name())),
        }
    }

    /// Waits until everything sent so far was taken: GET_FEATURES is answered, and nothing else is.
    pub(super) fn settle(&self) -> Result<(), Miss> {
        let features = self.number(&Request::GetFeatures)?;
        expect(self.offered == 0 || features == self.offered, || {
            format!("GET_FEATURES says {features:#x} after {:#x}", self.offered)
        })
    }

    /// Starts what has to run beside the ring that requests go to: DPDK serves a pair of rings when both are started.
    fn run_beside(&mut self) -> Result<(), Miss> {
        if self.kind == Kind::Net && self.beside.is_none() {
            let receiving = Ring::new(&mut self.memory, 0, SIZE, 0)?;
            self.start(&receiving, 0)?;
            self.beside = Some(receiving);
        }
        Ok(())
    }

    /// A ring for requests, with both indices at `start`.
    pub(super) fn ring(&mut self, start: u16) -> Result<Ring, Miss> {
        self.run_beside()?;
        Ring::new(&mut self.memory, self.kind.ring(), SIZE, start)
    }

    /// Slots for requests.
    pub(super) fn jobs(&mut self) -> Result<Jobs, Miss> {
        Jobs::new(&mut self.memory, 0, self.kind, SIZE / super::job::CHAIN, self.known)
    }

    /// Lays and offers requests in these slots. The guest's kick is the caller's.
    pub(super) fn offer(&self, ring: &mut Ring, jobs: &Jobs, slots: impl IntoIterator<Item = u16>) {
        for slot in slots {
            ring.lay(Jobs::head(slot), &jobs.chain(slot));
            ring.offer(Jobs::head(slot));
        }
    }

    /// Offers requests in these slots, kicks, and requires that they are done.
    pub(super) fn serve(&self, ring: &mut Ring, jobs: &Jobs, slots: impl IntoIterator<Item = u16>) -> Result<(), Miss> {
        let (slots, from) = (slots.into_iter().collect::<Vec<_>>(), ring.used_idx());
        self.offer(ring, jobs, slots.iter().copied());
        ring.kick.signal();
        self.served(ring, jobs, from, &slots)
    }

    /// Requires that the requests in these slots, and no others, are completed from used index `from` on, each once.
    pub(super) fn served(&self, ring: &Ring, jobs: &Jobs, from: u16, slots: &[u16]) -> Result<(), Miss> {
        let until = from.wrapping_add(slots.len() as u16);
        if !ring.reaches(until, SERVED) {
            // A back-end that is gone explains it.
            self.settle()?;
            return failed(format!("{} requests are not completed within {SERVED:?} ({})", slots.len(), ring.words()));
        }
        let mut heads = ring.heads_since(from);
        heads.sort_unstable();
        let mut wanted: Vec<u32> = slots.iter().map(|slot| Jobs::head(*slot).into()).collect();
        wanted.sort_unstable();
        expect(heads == wanted, || format!("heads {wanted:?} were offered, {heads:?} are completed"))?;
        for at in 0..slots.len() as u16 {
            let (head, len) = ring.used(from.wrapping_add(at));
            jobs.check(head as u16 / super::job::CHAIN, len).map_err(Miss::Fail)?;
        }
        Ok(())
    }

    /// Describes a ring up to its addresses: CALL, NUM, BASE, ADDR. It is not started.
    pub(super) fn describe(&self, ring: &Ring, base: u16) -> Result<(), Miss> {
        self.set_call(ring)?;
        self.describe_without_call(ring, base)
    }

    /// The same without a call descriptor.
    pub(super) fn describe_without_call(&self, ring: &Ring, base: u16) -> Result<(), Miss> {
        let index = ring.index;
        self.tell(&Request::SetVringNum(VringState { index, value: ring.size().into() }), &[])?;
        self.tell(&Request::SetVringBase(VringState { index, value: base.into() }), &[])?;
        self.tell(&Request::SetVringAddr(ring.addresses(false)), &[])
    }

    /// Describes a ring, starts and enables it.
    pub(super) fn start(&self, ring: &Ring, base: u16) -> Result<(), Miss> {
        self.describe(ring, base)?;
        self.set_kick(ring)?;
        self.enable(ring, true)?;
        self.settle()
    }

    /// SET_VRING_KICK.
    pub(super) fn set_kick(&self, ring: &Ring) -> Result<(), Miss> {
        let request = VringFd { index: ring.index, fd: Some(FdSlot(0)) };
        self.tell(&Request::SetVringKick(request), &[ring.kick.as_fd()])
    }

    /// SET_VRING_CALL.
    pub(super) fn set_call(&self, ring: &Ring) -> Result<(), Miss> {
        let request = VringFd { index: ring.index, fd: Some(FdSlot(0)) };
        self.tell(&Request::SetVringCall(request), &[ring.call.as_fd()])
    }

    /// SET_VRING_ENABLE, where rings can be disabled at all.
    pub(super) fn enable(&self, ring: &Ring, enable: bool) -> Result<(), Miss> {
        if !self.has(VirtioFeatures::PROTOCOL_FEATURES) {
            return Ok(());
        }
        self.tell(&Request::SetVringEnable(VringState { index: ring.index, value: enable.into() }), &[])
    }

    /// GET_VRING_BASE.
    pub(super) fn stop(&self, ring: &Ring) -> Result<u16, Miss> {
        let request = Request::GetVringBase(VringState { index: ring.index, value: 0 });
        match self.ask(&request)?.0 {
            Reply::VringState(state) => {
                expect(state.index == ring.index, || {
                    format!("ring {} was stopped, ring {} answers", ring.index, state.index)
                })?;
                u16::try_from(state.value)
                    .map_err(|_| Miss::Fail(format!("the base is {:#x}, no split index", state.value)))
            }
            other => failed(format!("GET_VRING_BASE is answered with {other:?}")),
        }
    }

    /// Closes the connection in both directions.
    pub(super) fn hang_up(&self) -> Result<(), Miss> {
        self.link.hang_up()
    }

    /// Another connection to the same process, after this one was closed.
    pub(super) fn reconnect(&mut self, within: Duration, patience: Duration) -> Result<(), Miss> {
        self.link = Link::connect(&self.socket, within, patience)?;
        self.offered = 0;
        self.protocol = ProtocolFeatures::empty();
        self.beside = None;
        Ok(())
    }
}

/// The number that a payload of eight bytes is.
pub(super) fn number_in(payload: &[u8]) -> Option<u64> {
    payload.try_into().ok().map(u64::from_ne_bytes)
}

/// Makes an image of that many blocks with a pattern that is known.
pub(super) fn make_image(path: &Path, blocks: u16) -> std::io::Result<()> {
    let words = |block: u16| (0..512).flat_map(move |word| super::job::pattern(block, word).to_le_bytes());
    let file = std::fs::File::create(path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &(0..blocks).flat_map(words).collect::<Vec<u8>>(), 0)
}
