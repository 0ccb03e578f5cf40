//! The image: a raw file or block device, opened, measured and locked.
//!
//! Two descriptions of it at most: one past the page cache, where that is wanted and possible, and one through it, for requests that
//! are not aligned as the first wants them. On each lies a lock of this instance's own ([`INSTANCE_LOCKS`]) for as long as the description
//! is open, which is as long as any I/O on it is in flight, whatever became of the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, StatxFlags};

use crate::memory::Piece;

/// First byte of the range in which instances lock one byte each, and its length. What an instance locks is this and its
/// [`Instance`], which its telemetry page names as well.
pub const INSTANCE_LOCKS: i64 = 1 << 60;
/// See [`INSTANCE_LOCKS`].
pub const INSTANCE_LOCKS_LEN: i64 = 1 << 60;
/// Bytes by which programs of QEMU tell each other what they do with an image: a read lock on the first range says that a permission
/// is in use, on the second that others must not use it (QEMU `docs/system/qemu-block-drivers`, image locking).
const QEMU_USES: i64 = 100;
const QEMU_FORBIDS: i64 = 200;
/// Permissions of a raw image: to read, and to write.
const QEMU_READ: i64 = 0;
const QEMU_WRITE: i64 = 1;

/// Sectors of virtio-blk, whatever the block size.
pub(crate) const SECTOR: u64 = 512;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened or looked at.
    #[error("{path}: {what}: {error}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("{0}: neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Another file lies at its path than the one that is meant.
    #[error(
        "{0}: this is another file than the one that was guarded: it was replaced; put that back, or start the guard again"
    )]
    Replaced(PathBuf),
    /// It is shorter than a block.
    #[error(
        "{path}: {bytes} bytes are no whole block of {block}: make it as large as the disk shall be (truncate --size 10G)"
    )]
    Small {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Its block size.
        block: u32,
    },
    /// O_DIRECT was asked for.
    #[error("{0}: the file system has no direct I/O; use --direct auto or off")]
    NotDirect(PathBuf),
    /// Another program has it for itself alone.
    #[error("{path}: another program does not share it for {what} (an image lock of QEMU): end that one first")]
    Locked {
        /// The image.
        path: PathBuf,
        /// `reading` or `writing`.
        what: &'static str,
    },
}

/// How it is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Past the page cache where that is possible.
    #[default]
    Auto,
    /// Past the page cache, or not at all.
    On,
    /// Through the page cache.
    Off,
}

/// Which file or device an image is, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of a file the device it lies on, of a block device its own number.
    pub device: u64,
    /// Of a file its inode, of a block device zero.
    pub inode: u64,
}

impl Identity {
    /// That of an open file.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(match metadata.file_type().is_block_device() {
            true => Identity { device: metadata.rdev(), inode: 0 },
            false => Identity { device: metadata.dev(), inode: metadata.ino() },
        })
    }
}

/// One backend process, as its locks tell it: the lower 22 bits are its process id, the 28 above them when it was started, in ticks of
/// the clock since the system was, and the 10 above those tell its process namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance(pub i64);

const PID_BITS: u32 = 22;
const START_BITS: u32 = 28;
const NAMESPACE_BITS: u32 = 10;

impl Instance {
    /// This process.
    fn ours() -> Self {
        let pid = std::process::id();
        let namespace = std::fs::metadata("/proc/self/ns/pid").map_or(0, |it| it.ino()) & ((1 << NAMESPACE_BITS) - 1);
        let namespace = i64::try_from(namespace).expect("ten bits");
        let start = started_at(pid).unwrap_or(0);
        Instance(i64::from(pid) | start << PID_BITS | namespace << (PID_BITS + START_BITS))
    }

    fn pid(self) -> u32 {
        u32::try_from(self.0 & ((1 << PID_BITS) - 1)).expect("22 bits")
    }

    /// Whether that very process is there, and not on its way out. Of one in another process namespace nothing is known.
    fn is_alive(self) -> bool {
        let start = self.0 >> PID_BITS & ((1 << START_BITS) - 1);
        let ours = Instance::ours().0 >> (PID_BITS + START_BITS);
        self.0 >> (PID_BITS + START_BITS) != ours || started_at(self.pid()).is_some_and(|at| at == start)
    }
}

/// Field 22 of `/proc/PID/stat`, if the process is neither a zombie nor gone.
fn started_at(pid: u32) -> Option<i64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    let at: i64 = fields.nth(18)?.parse().ok()?;
    (!dead).then_some(at & ((1 << START_BITS) - 1))
}

/// An image that is open.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    /// Past the page cache.
    direct: Option<File>,
    /// Through it.
    cached: File,
    device: bool,
    /// Its file system lies in memory: reading and writing never wait.
    in_memory: bool,
    read_only: bool,
    block_size: u32,
    memory_mask: usize,
    offset_mask: u64,
    instance: Instance,
}

impl Image {
    /// Opens and locks it.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path, read_only: bool, direct: Direct) -> Result<Self, ImageError> {
        let io = |what| move |error| ImageError::Io { path: path.to_path_buf(), what, error };
        let open = |flags| File::options().read(true).write(!read_only).custom_flags(flags).open(path);
        let cached = open(libc::O_CLOEXEC).map_err(io("opening it"))?;
        let metadata = cached.metadata().map_err(io("looking at it"))?;
        let device = metadata.file_type().is_block_device();
        if !device && !metadata.is_file() {
            return Err(ImageError::Kind(path.to_path_buf()));
        }
        let direct = match direct {
            Direct::Off => None,
            _ => match open(libc::O_CLOEXEC | libc::O_DIRECT) {
                Ok(file) => Some(file),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => match direct {
                    Direct::On => return Err(ImageError::NotDirect(path.to_path_buf())),
                    _ => None,
                },
                Err(error) => return Err(io("opening it past the page cache")(error)),
            },
        };
        let in_memory = !device && is_in_memory(cached.as_fd()).map_err(io("looking at its file system"))?;
        // Memory is the page cache there: nothing is gained by going past it.
        let direct = direct.filter(|_| !in_memory);
        let (memory_align, offset_align) = match &direct {
            Some(file) => alignment(file, device).map_err(io("asking for its alignment"))?,
            None => (1, 1),
        };
        let logical = if device { logical_block_size(&cached).map_err(io("asking for its block size"))? } else { 512 };
        let image = Image {
            path: path.to_path_buf(),
            block_size: logical.max(u32::try_from(offset_align).unwrap_or(512)).max(512),
            direct,
            cached,
            device,
            in_memory,
            read_only,
            memory_mask: memory_align - 1,
            offset_mask: offset_align - 1,
            instance: Instance::ours(),
        };
        let bytes = image.bytes().map_err(io("asking for its size"))?;
        if bytes < u64::from(image.block_size) {
            return Err(ImageError::Small { path: path.to_path_buf(), bytes, block: image.block_size });
        }
        image.lock()?;
        Ok(image)
    }

    /// Makes sure that it is the file that is meant, whatever lies at its path by now.
    ///
    /// # Errors
    /// [`ImageError::Replaced`].
    pub(crate) fn must_be(&self, identity: Option<Identity>) -> Result<(), ImageError> {
        let ours = Identity::of(&self.cached);
        match identity {
            Some(wanted) if ours.is_ok_and(|ours| ours != wanted) => Err(ImageError::Replaced(self.path.clone())),
            _ => Ok(()),
        }
    }

    /// Says what an operator may not have meant: an image of another format, a tail that no block holds. A guest can write such a beginning
    /// itself, so it is no reason to serve nothing.
    pub(crate) fn warn(&self) {
        let mut magic = [0; 8];
        let known = match std::os::unix::fs::FileExt::read_at(&self.cached, &mut magic, 0) {
            Ok(_) if magic.starts_with(b"QFI\xfb") => Some("qcow2"),
            Ok(_) if magic.starts_with(b"KDMV") => Some("VMDK"),
            Ok(_) if magic == *b"vhdxfile" => Some("VHDX"),
            _ => None,
        };
        let path = self.path.display();
        if let Some(format) = known {
            crate::tell(&format!(
                "{path} looks like {format}: it is served as raw, byte for byte; to convert it: qemu-img convert -O raw"
            ));
        }
        let rest = self.bytes().unwrap_or(0) % u64::from(self.block_size);
        if rest > 0 {
            crate::tell(&format!("{path}: its last {rest} bytes are no whole block, the guest does not see them"));
        }
    }

    /// Whether nothing may be written to it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Smallest unit that it is addressed in, in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether its I/O never waits for a device.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Whether it is read and written past the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Who we are to others that have it open.
    #[must_use]
    pub fn instance(&self) -> Instance {
        self.instance
    }

    /// The descriptions, in the order in which engines number them.
    pub(crate) fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.direct.iter().chain([&self.cached]).map(AsFd::as_fd)
    }

    /// Which of [`Image::files`] these pieces can be read to or written from.
    #[inline]
    pub(crate) fn file_for(&self, offset: u64, pieces: &[Piece]) -> usize {
        if self.direct.is_none() {
            return 0;
        }
        let memory = pieces.iter().fold(0, |bits, piece| bits | piece.alignment());
        let offset_and_len = pieces.iter().fold(offset, |bits, piece| bits | piece.len as u64);
        usize::from(memory & self.memory_mask != 0 || offset_and_len & self.offset_mask != 0)
    }

    /// The description of that number.
    pub(crate) fn file(&self, number: usize) -> BorrowedFd<'_> {
        self.files().nth(number).expect("engines get their numbers from file_for")
    }

    /// Its size in bytes, as it is now.
    ///
    /// # Errors
    /// What the system says.
    pub fn bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(&self.cached)?;
        if !self.device {
            return Ok(u64::try_from(stat.st_size).unwrap_or(0));
        }
        let mut bytes = 0_u64;
        // SAFETY: the call writes eight bytes into the integer.
        let result = unsafe { libc::ioctl(self.cached.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
    }

    /// Its size in whole blocks, in sectors.
    ///
    /// # Errors
    /// What the system says.
    pub fn sectors(&self) -> io::Result<u64> {
        let block = u64::from(self.block_size);
        Ok(self.bytes()? / block * block / SECTOR)
    }

    /// What a discard is on it, and what writing zeroes is: keeping the space, or giving it back.
    pub(crate) const DISCARD_MODE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

    /// See [`Image::DISCARD_MODE`].
    pub(crate) fn zeroes_mode(&self, unmap: bool) -> FallocateFlags {
        // A file system in memory cannot zero a range and keep it.
        if unmap || self.in_memory {
            Self::DISCARD_MODE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        }
    }

    /// Takes this instance's lock on every description, and says to QEMU's programs what is done with the image.
    fn lock(&self) -> Result<(), ImageError> {
        let io = |error| ImageError::Io { path: self.path.clone(), what: "locking it", error };
        for (permission, what) in [(QEMU_READ, "reading"), (QEMU_WRITE, "writing")] {
            if self.read_only && permission == QEMU_WRITE {
                continue;
            }
            set_lock(self.cached.as_fd(), libc::F_RDLCK, QEMU_USES + permission).map_err(io)?;
            if any_lock(self.cached.as_fd(), QEMU_FORBIDS + permission, 1).map_err(io)?.is_some() {
                return Err(ImageError::Locked { path: self.path.clone(), what });
            }
        }
        for file in self.files() {
            set_lock(file, libc::F_RDLCK, INSTANCE_LOCKS + self.instance.0).map_err(io)?;
        }
        Ok(())
    }

    /// Waits until no process that is gone has I/O on the image in flight: io_uring's outlives it, and could overwrite what a request of
    /// ours wrote after it. Nothing but its end proves its end, so there is no bound. `tell` is called once if there is something to
    /// wait for.
    ///
    /// # Errors
    /// What the system says to the question who holds locks.
    pub fn wait_for_the_dead(&self, tell: impl FnOnce(u32)) -> io::Result<()> {
        let mut tell = Some(tell);
        loop {
            let Some(dead) = self.dead()? else { return Ok(()) };
            if let Some(tell) = tell.take() {
                tell(dead.pid());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// An instance that holds a lock and does not live any more.
    fn dead(&self) -> io::Result<Option<Instance>> {
        // The kernel names any lock in a range, not the first: what lies on both sides of it is asked for in its turn.
        let mut ranges = vec![(0, INSTANCE_LOCKS_LEN)];
        while let Some((from, to)) = ranges.pop() {
            if from >= to {
                continue;
            }
            let Some((at, bytes)) = any_lock(self.cached.as_fd(), INSTANCE_LOCKS + from, to - from)? else { continue };
            if bytes != 1 || at < INSTANCE_LOCKS + from {
                // It hides what lies beneath it.
                return Err(io::Error::other("another program has locked the image as a whole: end that one first"));
            }
            let instance = Instance(at - INSTANCE_LOCKS);
            // Our own lock on the other description is in the way of a question through this one.
            if instance != self.instance && !instance.is_alive() {
                return Ok(Some(instance));
            }
            ranges.extend([(from, instance.0), (instance.0 + 1, to)]);
        }
        Ok(None)
    }
}

/// `BLKGETSIZE64` and `BLKSSZGET` of `linux/fs.h`: not in the libc crate.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKSSZGET: libc::Ioctl = 0x1268;

fn logical_block_size(device: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the call writes one int.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKSSZGET, &raw mut size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(u32::try_from(size).unwrap_or(512)) }
}

/// Alignment that direct I/O needs, of memory and of offsets and lengths. Where the kernel does not say, what always does.
fn alignment(file: &File, device: bool) -> io::Result<(usize, u64)> {
    let stat = rustix::fs::statx(file, "", rustix::fs::AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let (memory, offset) = (stat.stx_dio_mem_align as usize, u64::from(stat.stx_dio_offset_align));
    if memory.is_power_of_two() && offset.is_power_of_two() {
        return Ok((memory, offset));
    }
    let offset =
        if device { u64::from(logical_block_size(file)?) } else { file.metadata()?.blksize().clamp(512, 4096) };
    Ok((offset as usize, offset.next_power_of_two()))
}

/// Whether a file lives in memory alone.
fn is_in_memory(file: BorrowedFd<'_>) -> io::Result<bool> {
    /// `TMPFS_MAGIC`, `RAMFS_MAGIC`, `HUGETLBFS_MAGIC` of `linux/magic.h`.
    const MAGIC: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];
    let stat = rustix::fs::fstatfs(file)?;
    #[allow(clippy::unnecessary_cast, reason = "its width depends on the machine")]
    Ok(MAGIC.contains(&(stat.f_type as i64)))
}

fn flock(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    // SAFETY: zero is valid for every field of this plain structure.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    range.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    (range.l_start, range.l_len) = (start, len);
    range
}

fn set_lock(file: BorrowedFd<'_>, kind: libc::c_int, byte: i64) -> io::Result<()> {
    let range = flock(kind, byte, 1);
    // SAFETY: the structure outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A lock of another description's that meets a range: where it begins, and its length.
fn any_lock(file: BorrowedFd<'_>, start: i64, len: i64) -> io::Result<Option<(i64, i64)>> {
    let mut range = flock(libc::F_WRLCK, start, len);
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((libc::c_int::from(range.l_type) != libc::F_UNLCK).then_some((range.l_start, range.l_len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: u64) -> PathBuf {
        let path = std::env::temp_dir().join(format!("warmswap-blk-{name}-{}", std::process::id()));
        let file = File::create(&path).expect("a temporary file");
        file.set_len(bytes).expect("any size");
        path
    }

    #[test]
    fn a_lock_tells_the_living_from_the_dead() {
        let path = file("dead", 1 << 20);
        let image = Image::open(&path, false, Direct::Auto).expect("it opens");
        let second = Image::open(&path, false, Direct::Auto).expect("two may have it");
        assert_eq!(image.dead().expect("asked"), None, "both are this process, which lives");
        let ours = image.instance();
        assert!(ours.is_alive() && ours.pid() == std::process::id());
        // The same process id, started at another time: one that is gone.
        let gone = Instance(ours.0 ^ 1 << PID_BITS);
        let orphan = File::open(&path).expect("it opens");
        set_lock(orphan.as_fd(), libc::F_RDLCK, INSTANCE_LOCKS + gone.0).expect("a lock");
        assert_eq!(second.dead().expect("asked"), Some(gone));
        let waited = std::thread::spawn(move || second.wait_for_the_dead(|pid| assert_eq!(pid, gone.pid())));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waited.is_finished(), "it is still held");
        drop(orphan);
        waited.join().expect("no panic").expect("asked");
        std::fs::remove_file(path).expect("it is there");
    }

    #[test]
    fn an_image_that_another_does_not_share_is_refused() {
        let path = file("shared", 1 << 20);
        let other = File::open(&path).expect("it opens");
        set_lock(other.as_fd(), libc::F_RDLCK, QEMU_FORBIDS + QEMU_WRITE).expect("a lock");
        let refused = Image::open(&path, false, Direct::Auto).expect_err("it must not be written");
        assert!(matches!(refused, ImageError::Locked { what: "writing", .. }), "{refused}");
        Image::open(&path, true, Direct::Auto).expect("it may be read");
        std::fs::remove_file(path).expect("it is there");
    }

    #[test]
    fn what_is_no_image_is_refused_in_words() {
        let path = file("small", 100);
        let refused = Image::open(&path, false, Direct::Auto).expect_err("no whole sector");
        assert!(refused.to_string().contains("100 bytes"), "{refused}");
        let refused = Image::open(Path::new("/dev/null"), false, Direct::Auto).expect_err("no image");
        assert!(matches!(refused, ImageError::Kind(_)), "{refused}");
        let refused = Image::open(Path::new("/nowhere/at/all"), false, Direct::Auto).expect_err("nothing there");
        assert!(refused.to_string().contains("opening it"), "{refused}");
        std::fs::remove_file(path).expect("it is there");
    }
}
