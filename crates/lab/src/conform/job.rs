//! Requests of each type of device, one after the other in slots of their own: how one is laid, and what shows that it was done.

use std::sync::atomic::Ordering;

use warmswap_wire::ring::{DESC_F_WRITE, Descriptor};

use super::outcome::Miss;
use crate::guest::{GuestMemory, Window};

/// Bytes of a slot: what the device reads in its first page, what it writes in its second.
const SLOT: usize = 8192;
const PAGE: usize = 4096;
/// Descriptors a slot may use.
pub(super) const CHAIN: u16 = 4;
/// Bytes that are asked of an entropy source.
const ENTROPY: usize = 64;
/// Where the status byte of a block request lies in the first page.
const STATUS: usize = 64;
/// What a byte holds that the device has to write.
const UNWRITTEN: u8 = 0xee;
/// Bytes of a SCSI request and of its answer, without sense data, and where in that the response is.
const SCSI_REQUEST: usize = 51;
const SCSI_ANSWER: usize = 108;
const SCSI_RESPONSE: usize = 11;
/// Bytes of a packet's header, and the guest's address.
const VSOCK_HEADER: usize = 44;
const VSOCK_GUEST: u64 = 4;
/// Opcode of FUSE_INIT, and the length of its request and of its answer's head.
const FUSE_INIT: u32 = 26;
const FUSE_REQUEST: usize = 40 + 64;
const FUSE_ANSWER: usize = 256;

/// A type of device, as far as requests can be made for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kind {
    /// Block device.
    Blk,
    /// SCSI host with a disk.
    Scsi,
    /// Entropy source.
    Rng,
    /// File system.
    Fs,
    /// Network card: what is sent.
    Net,
    /// Console: what is printed.
    Console,
    /// Sockets to the host: what is sent.
    Vsock,
    /// Anything else: the control channel alone is checked.
    Other,
}

impl Kind {
    /// The word for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Blk => "blk",
            Kind::Scsi => "scsi",
            Kind::Rng => "rng",
            Kind::Fs => "fs",
            Kind::Net => "net",
            Kind::Console => "console",
            Kind::Vsock => "vsock",
            Kind::Other => "other",
        }
    }

    /// The ring that requests go to.
    pub(super) fn ring(self) -> u32 {
        match self {
            Kind::Blk | Kind::Rng | Kind::Other => 0,
            Kind::Fs | Kind::Net | Kind::Console | Kind::Vsock => 1,
            Kind::Scsi => 2,
        }
    }

    /// Whether it reads and writes a disk.
    pub(super) fn has_disk(self) -> bool {
        matches!(self, Kind::Blk | Kind::Scsi)
    }

    /// Whether its requests are answered with data.
    pub(super) fn is_answered(self) -> bool {
        matches!(self, Kind::Blk | Kind::Scsi | Kind::Rng | Kind::Fs)
    }

    /// Whether there are requests of that type.
    pub(super) fn has_requests(self) -> bool {
        self != Kind::Other
    }
}

/// Slots in guest memory, each with a request of its own.
#[derive(Debug)]
pub(super) struct Jobs {
    kind: Kind,
    window: Window,
    /// What is read can be compared: the image is ours.
    known: bool,
}

impl Jobs {
    /// `count` slots in region `region`.
    pub(super) fn new(
        memory: &mut GuestMemory,
        region: usize,
        kind: Kind,
        count: u16,
        known: bool,
    ) -> Result<Self, Miss> {
        let window = memory.allocate(region, SLOT * usize::from(count), 4096)?;
        let jobs = Jobs { kind, window, known };
        (0..count).for_each(|slot| jobs.clear(slot));
        Ok(jobs)
    }

    fn slot(&self, slot: u16) -> Window {
        self.window.part(SLOT * usize::from(slot), SLOT)
    }

    /// First entry of the descriptor table that the slot's chain lies in.
    pub(super) fn head(slot: u16) -> u16 {
        slot * CHAIN
    }

    /// Makes everything in the slot unwritten.
    pub(super) fn clear(&self, slot: u16) {
        let slot = self.slot(slot);
        for word in slot.mapping.words(slot.start, SLOT) {
            word.store(u64::from_ne_bytes([UNWRITTEN; 8]), Ordering::Relaxed);
        }
    }

    /// The chain of a request in that slot. A block request reads the block of the slot's number.
    pub(super) fn chain(&self, slot: u16) -> Vec<Descriptor> {
        self.clear(slot);
        let part = self.slot(slot);
        let put = |bytes: &[u8]| part.mapping.write(part.start, bytes);
        let read =
            |at: usize, len: usize| Descriptor { addr: part.guest + at as u64, len: len as u32, flags: 0, next: 0 };
        let write = |at: usize, len: usize| Descriptor { flags: DESC_F_WRITE, ..read(at, len) };
        match self.kind {
            Kind::Blk => {
                put(&header(0, u64::from(slot) * (PAGE / 512) as u64));
                vec![read(0, 16), write(PAGE, PAGE), write(STATUS, 1)]
            }
            Kind::Scsi => {
                put(&scsi_read(u32::from(slot) * (PAGE / 512) as u32));
                vec![read(0, SCSI_REQUEST), write(STATUS, SCSI_ANSWER), write(PAGE, PAGE)]
            }
            Kind::Rng => vec![write(PAGE, ENTROPY)],
            Kind::Fs => {
                put(&fuse_init(slot));
                vec![read(0, 40), read(40, FUSE_REQUEST - 40), write(PAGE, 16), write(PAGE + 16, FUSE_ANSWER - 16)]
            }
            Kind::Net => {
                // A header without offloads, and a frame to nobody.
                put(&[0; 12 + 60]);
                vec![read(0, 12), read(12, 60)]
            }
            Kind::Console => {
                put(b"conform\n");
                vec![read(0, 8)]
            }
            Kind::Vsock => {
                put(&vsock_reset());
                vec![read(0, VSOCK_HEADER)]
            }
            Kind::Other => Vec::new(),
        }
    }

    /// Whether the request in that slot was done, as far as its type shows it. `len` is what the used entry says.
    pub(super) fn check(&self, slot: u16, len: u32) -> Result<(), String> {
        let part = self.slot(slot);
        let byte = |at: usize| part.mapping.u8(part.start + at).load(Ordering::Acquire);
        match self.kind {
            // The status of a block request, or the response of a SCSI host: zero is good in both.
            Kind::Blk | Kind::Scsi => match byte(STATUS + self.status_at()) {
                0 if !self.known || (0..PAGE / 8).all(|word| self.word(slot, word) == pattern(slot, word)) => Ok(()),
                0 => Err(format!("the data of block {slot} is not what the image holds")),
                UNWRITTEN => Err(format!("the request for block {slot} was completed without a status")),
                status => Err(format!("the request for block {slot} ended with status {status}")),
            },
            Kind::Rng if len == 0 => Err("an entropy request was completed with nothing".to_owned()),
            Kind::Rng if (0..ENTROPY.min(len as usize)).all(|at| byte(PAGE + at) == UNWRITTEN) => {
                Err("an entropy request was completed, and its buffer was not written".to_owned())
            }
            Kind::Fs => {
                let unique = part.mapping.u64(part.start + PAGE + 8).load(Ordering::Acquire);
                if unique == u64::from(slot) + 1 {
                    Ok(())
                } else {
                    Err(format!("a file system request of number {} got the answer to number {unique:#x}", slot + 1))
                }
            }
            Kind::Rng | Kind::Net | Kind::Console | Kind::Vsock | Kind::Other => Ok(()),
        }
    }

    /// Where in the answer its status lies.
    fn status_at(&self) -> usize {
        if self.kind == Kind::Scsi { SCSI_RESPONSE } else { 0 }
    }

    fn word(&self, slot: u16, word: usize) -> u64 {
        let part = self.slot(slot);
        part.mapping.u64(part.start + PAGE + 8 * word).load(Ordering::Acquire)
    }

    /// Whether anything the device writes in that slot was written.
    pub(super) fn is_touched(&self, slot: u16) -> bool {
        let part = self.slot(slot);
        let data = (0..PAGE / 8).any(|word| self.word(slot, word) != u64::from_ne_bytes([UNWRITTEN; 8]));
        let at = part.start + STATUS + self.status_at();
        let status = self.kind.has_disk() && part.mapping.u8(at).load(Ordering::Acquire) != UNWRITTEN;
        data || status
    }

    /// A copy of all that devices write here.
    pub(super) fn contents(&self) -> Vec<u64> {
        let words = self.window.mapping.words(self.window.start, self.window.length);
        words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Guest-physical address of the page that the device writes in that slot.
    pub(super) fn data_guest(&self, slot: u16) -> u64 {
        self.slot(slot).guest + PAGE as u64
    }

    /// Its memory, for what is laid by hand.
    pub(super) fn window(&self, slot: u16) -> Window {
        self.slot(slot)
    }
}

/// The header of a block request (virtio 1.3 §5.2.6).
pub(super) fn header(code: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&code.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// `struct virtio_scsi_cmd_req` (virtio 1.3 §5.6.6.1): READ(10) of a page by the first target.
fn scsi_read(block: u32) -> [u8; SCSI_REQUEST] {
    let mut bytes = [0; SCSI_REQUEST];
    bytes[..4].copy_from_slice(&[1, 0, 0x40, 0]);
    bytes[19] = 0x28;
    bytes[21..25].copy_from_slice(&block.to_be_bytes());
    bytes[26..28].copy_from_slice(&((PAGE / 512) as u16).to_be_bytes());
    bytes
}

/// `struct virtio_vsock_hdr` (virtio 1.3 §5.10.6): the reset of a stream that nobody knows.
fn vsock_reset() -> [u8; VSOCK_HEADER] {
    let mut bytes = [0; VSOCK_HEADER];
    let mut put = |at: usize, word: &[u8]| bytes[at..at + word.len()].copy_from_slice(word);
    put(0, &VSOCK_GUEST.to_le_bytes());
    put(8, &2_u64.to_le_bytes());
    put(16, &1000_u32.to_le_bytes());
    put(20, &1000_u32.to_le_bytes());
    put(28, &1_u16.to_le_bytes());
    put(30, &3_u16.to_le_bytes());
    bytes
}

/// `struct fuse_in_header` and `struct fuse_init_in` (`linux/fuse.h`, 7.38).
fn fuse_init(slot: u16) -> [u8; FUSE_REQUEST] {
    let mut bytes = [0; FUSE_REQUEST];
    let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    put(0, FUSE_REQUEST as u32);
    put(4, FUSE_INIT);
    put(8, u32::from(slot) + 1);
    put(40, 7);
    put(44, 38);
    put(48, 128 << 10);
    bytes
}

/// What the image of the suite holds in word `word` of block `block`.
pub(super) fn pattern(block: u16, word: usize) -> u64 {
    (u64::from(block) + 1) << 32 | word as u64
}
