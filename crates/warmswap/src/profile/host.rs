//! The host below a backend: what its tasks wait for, the block devices below its images, and the room that is left for them.
//!
//! A partition is counted as its whole disk: whoever else uses that makes it busy. What lies on no block device of this host (memory, an
//! overlay, a server) has none that could be looked at.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
use warmswap_predict::{Feature, Measure};

use super::source::{Due, Effort, Held, Image, Rate, Source, Subject, Time};
use super::text::{self, Buffer, Reread};

/// File systems without a block device of their own whose room can be asked for without waiting for a server.
const LOCAL: [&[u8]; 6] = [b"btrfs", b"bcachefs", b"overlay", b"ramfs", b"tmpfs", b"zfs"];

/// Seconds between questions for room, when nobody asks for everything.
const ROOM_S: f64 = 9.5;

/// What tasks of the host wait for. It is the same for every backend, and read once.
#[derive(Debug)]
pub(crate) struct Pressure {
    files: Vec<(Feature, Reread, Rate)>,
    time: Time,
    buffer: Buffer,
    seen: Held,
}

impl Default for Pressure {
    fn default() -> Self {
        Pressure::below(Path::new("/"))
    }
}

impl Pressure {
    fn below(root: &Path) -> Self {
        let files = [
            (Feature::HostCpuPressure, "cpu"),
            (Feature::HostMemoryPressure, "memory"),
            (Feature::HostIoPressure, "io"),
        ];
        let files = files.into_iter().filter_map(|(feature, name)| {
            Some((feature, Reread::open(CWD, root.join("proc/pressure").join(name))?, Rate::default()))
        });
        Pressure { files: files.collect(), time: Time::default(), buffer: Buffer::default(), seen: Held::default() }
    }

    /// Reads it, once a tick, `span_s` seconds after the last call.
    pub(crate) fn read(&mut self, span_s: f64, effort: Effort) {
        let Pressure { files, time, buffer, seen } = self;
        time.pass(span_s);
        seen.forget();
        if effort == Effort::Light {
            return;
        }
        for (feature, file, rate) in files {
            let waited = file.read(buffer).and_then(text::pressure).and_then(|micros| rate.since(micros, *time));
            // A task that waits all the time is told in steps, which may be longer than the time between.
            seen.add_scaled(*feature, waited.map(|(micros, seconds)| (micros.min(seconds * 1e6), seconds)), 1e6);
        }
    }

    /// Adds what this tick has read, if anything, for one backend.
    pub(crate) fn add(&self, into: &mut Measure) {
        self.seen.give(into);
    }
}

/// What lies below the images of one backend.
#[derive(Debug)]
pub(crate) struct Store {
    subject: Arc<Subject>,
    disks: Vec<Disk>,
    /// Images that take room in a file system, by their place in the subject.
    files: Vec<usize>,
    time: Time,
    /// When the disks were read last.
    read_s: f64,
    room: Due,
    buffer: Buffer,
}

/// A block device.
#[derive(Debug)]
struct Disk {
    directory: PathBuf,
    stat: Reread,
    busy: Rate,
    queued: Rate,
    waited: Rate,
    done: Rate,
}

impl Store {
    /// Begins to look below the images of a backend.
    pub(crate) fn new(subject: Arc<Subject>) -> Self {
        Store::below(Path::new("/"), subject)
    }

    fn below(root: &Path, subject: Arc<Subject>) -> Self {
        let mounts = std::fs::read(root.join("proc/self/mountinfo")).unwrap_or_default();
        let mut disks: Vec<Disk> = Vec::new();
        let mut files = Vec::new();
        for (index, image) in subject.images.iter().enumerate() {
            let Some(place) = Place::of(image, &mounts) else { continue };
            if place.has_room {
                files.push(index);
            }
            // Several images on one disk are one disk.
            let disk = place.device.and_then(|device| Disk::find(root, device));
            let disk = disk.filter(|disk| !disks.iter().any(|it| it.directory == disk.directory));
            disks.extend(disk);
        }
        Store {
            subject,
            disks,
            files,
            time: Time::default(),
            read_s: 0.0,
            room: Due::default(),
            buffer: Buffer::default(),
        }
    }

    fn ask_for_room(&self, into: &mut Measure) {
        let mut least: Option<Room> = None;
        for image in self.files.iter().filter_map(|index| self.subject.images.get(*index)) {
            let Some(room) = Room::around(image) else { continue };
            least = Some(least.map_or(room, |least| Room {
                free_bytes: least.free_bytes.min(room.free_bytes),
                used_share: least.used_share.max(room.used_share),
            }));
        }
        if let Some(room) = least {
            into.note(Feature::StoreFree, room.free_bytes);
            into.note(Feature::StoreShare, room.used_share);
        }
    }
}

impl Source for Store {
    fn measure(&mut self, span_s: f64, effort: Effort, into: &mut Measure) {
        self.time.pass(span_s);
        if effort == Effort::Light {
            return;
        }
        let (time, buffer) = (self.time, &mut self.buffer);
        let seconds = time.now_s() - std::mem::replace(&mut self.read_s, time.now_s());
        // Of several disks everything waits for the busiest; queues add up.
        let (mut busy, mut depth) = (None, None);
        for disk in &mut self.disks {
            let Some(seen) = disk.stat.read(buffer).and_then(DiskStat::parse) else { continue };
            let share = |(ms, seconds): (f64, f64)| ms / 1e3 / seconds;
            if let Some(share) = disk.busy.since(seen.busy_ms, time).map(share) {
                busy = Some(busy.map_or(share, |most: f64| most.max(share)).min(1.0));
            }
            if let Some(share) = disk.queued.since(seen.queued_ms, time).map(share) {
                depth = Some(depth.unwrap_or(0.0) + share);
            }
            let (waited, done) = (disk.waited.since(seen.waited_ms, time), disk.done.since(seen.done, time));
            if let (Some((ms, _)), Some((done, _))) = (waited, done) {
                into.add(Feature::DiskWait, ms * 1e3, done);
            }
        }
        for (feature, share) in [(Feature::DiskBusy, busy), (Feature::DiskDepth, depth)] {
            if let Some(share) = share {
                into.add(feature, share * seconds, seconds);
            }
        }
        if effort == Effort::Deep || self.room.is_due(time) {
            self.room.in_s(time, ROOM_S);
            self.ask_for_room(into);
        }
    }
}

impl Disk {
    fn find(root: &Path, (major, minor): (u32, u32)) -> Option<Self> {
        let directory = std::fs::canonicalize(root.join(format!("sys/dev/block/{major}:{minor}"))).ok()?;
        let whole = if directory.join("partition").exists() { directory.parent()?.to_path_buf() } else { directory };
        let stat = Reread::open(CWD, whole.join("stat"))?;
        let [busy, queued, waited, done] = [(); 4].map(|()| Rate::default());
        Some(Disk { directory: whole, stat, busy, queued, waited, done })
    }
}

/// What is taken from the `stat` of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DiskStat {
    busy_ms: u64,
    queued_ms: u64,
    waited_ms: u64,
    done: u64,
}

impl DiskStat {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut words = text::words(text).map(text::number);
        let mut fields = [0; 17];
        let mut count = 0;
        for (field, word) in fields.iter_mut().zip(&mut words) {
            *field = word?;
            count += 1;
        }
        // Discards and flushes were added later, and are zero before.
        if count < 11 {
            return None;
        }
        let sum = |places: [usize; 4]| places.into_iter().try_fold(0_u64, |sum, place| sum.checked_add(fields[place]));
        Some(DiskStat {
            busy_ms: fields[9],
            queued_ms: fields[10],
            waited_ms: sum([3, 7, 14, 16])?,
            done: sum([0, 4, 11, 15])?,
        })
    }
}

/// Where an image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    device: Option<(u32, u32)>,
    /// It takes room in a file system that answers by itself.
    has_room: bool,
}

impl Place {
    fn of(image: &Image, mounts: &[u8]) -> Option<Self> {
        let wanted = StatxFlags::TYPE | StatxFlags::MNT_ID;
        // A server is not asked: it may hang.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let seen = rustix::fs::statx(image, "", flags, wanted).ok()?;
        if FileType::from_raw_mode(seen.stx_mode.into()) == FileType::BlockDevice {
            return Some(Place { device: Some((seen.stx_rdev_major, seen.stx_rdev_minor)), has_room: false });
        }
        if seen.stx_dev_major != 0 {
            return Some(Place { device: Some((seen.stx_dev_major, seen.stx_dev_minor)), has_room: true });
        }
        // Not the device's own number: some file systems have one for each of their volumes. The mount tells what is below.
        let known = seen.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        let mount = if known { mount(mounts, seen.stx_mnt_id) } else { None };
        let device = mount.and_then(|mount| mount.source.strip_prefix(b"/").map(|_| mount.source)).and_then(device_at);
        Some(Place { device, has_room: mount.is_some_and(|mount| LOCAL.contains(&mount.kind)) })
    }
}

fn device_at(path: &[u8]) -> Option<(u32, u32)> {
    let seen = std::fs::metadata(OsStr::from_bytes(path)).ok()?;
    let is_device = FileType::from_raw_mode(seen.mode()) == FileType::BlockDevice;
    is_device.then(|| (rustix::fs::major(seen.rdev()), rustix::fs::minor(seen.rdev())))
}

/// What is taken from a line of `mountinfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mounted<'a> {
    kind: &'a [u8],
    source: &'a [u8],
}

fn mount(mounts: &[u8], id: u64) -> Option<Mounted<'_>> {
    let line =
        mounts.split(|byte| *byte == b'\n').find(|line| text::words(line).next().and_then(text::number) == Some(id))?;
    let mut rest = text::words(line).skip_while(|word| *word != b"-").skip(1);
    Some(Mounted { kind: rest.next()?, source: rest.next()? })
}

/// What is left of a file system.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Room {
    free_bytes: f64,
    used_share: f64,
}

impl Room {
    fn around(image: impl AsFd) -> Option<Self> {
        let seen = rustix::fs::fstatvfs(image).ok()?;
        let used = seen.f_blocks.checked_sub(seen.f_bfree)? as f64;
        // What only root may take is not free.
        let all = used + seen.f_bavail as f64;
        (all > 0.0).then(|| Room { free_bytes: seen.f_bavail as f64 * seen.f_frsize as f64, used_share: used / all })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::process::tests::subject_of;
    use proptest::prelude::*;
    use std::fs;

    struct System(PathBuf);

    impl System {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("warmswap-host-{name}-{}", std::process::id()));
            fs::create_dir_all(&root).expect("a temporary directory");
            System(root)
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().expect("it has one")).expect("a temporary directory");
            fs::write(path, text).expect("a temporary file");
        }
    }

    impl Drop for System {
        fn drop(&mut self) {
            let _gone = fs::remove_dir_all(&self.0);
        }
    }

    fn measured(source: &mut impl Source, span_s: f64, effort: Effort) -> Measure {
        let mut measure = Measure::default();
        source.measure(span_s, effort, &mut measure);
        measure
    }

    fn with_images(images: Vec<Image>) -> Arc<Subject> {
        let mut subject = Arc::into_inner(subject_of(std::process::id())).expect("nobody else has it");
        subject.images = images;
        Arc::new(subject)
    }

    #[test]
    fn pressure_is_read_once_and_given_to_everybody() {
        let system = System::new("pressure");
        let pressure = |total| format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n");
        system.put("proc/pressure/cpu", &pressure(1_000_000));
        system.put("proc/pressure/io", &pressure(0));
        let mut host = Pressure::below(&system.0);
        let added = |host: &Pressure| {
            let mut measure = Measure::default();
            host.add(&mut measure);
            let features = [Feature::HostCpuPressure, Feature::HostMemoryPressure, Feature::HostIoPressure];
            features.map(|feature| measure.value(feature))
        };
        host.read(1.0, Effort::Full);
        assert_eq!(added(&host), [None; 3]);
        system.put("proc/pressure/cpu", &pressure(1_500_000));
        system.put("proc/pressure/io", &pressure(9_000_000));
        host.read(1.0, Effort::Light);
        assert_eq!(added(&host), [None; 3]);
        host.read(1.0, Effort::Full);
        for _ in 0..2 {
            assert_eq!(added(&host), [Some(0.25), None, Some(1.0)]);
        }
        host.read(1.0, Effort::Light);
        assert_eq!(added(&host), [None; 3], "it was given already");
    }

    #[test]
    fn an_image_is_served_by_the_whole_disk_below_it() {
        let system = System::new("disk");
        system.put("image", "");
        let device = rustix::fs::stat(system.0.join("image")).expect("just made").st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        if major == 0 {
            // Temporary files lie on no block device here.
            return;
        }
        let stat = |text: &str| system.put("sys/devices/disk/stat", text);
        stat("100 0 0 1000 100 0 0 1000 0 5000 7000 0 0 0 0 0 0\n");
        system.put("sys/devices/disk/disk1/stat", "1 1 1 1 1 1 1 1 1 1 1\n");
        system.put("sys/devices/disk/disk1/partition", "1\n");
        fs::create_dir_all(system.0.join("sys/dev/block")).expect("a directory");
        let link = system.0.join(format!("sys/dev/block/{major}:{minor}"));
        std::os::unix::fs::symlink("../../devices/disk/disk1", link).expect("a link");
        let image = || Image::at(&system.0.join("image")).expect("just made");
        let mut store = Store::below(&system.0, with_images(vec![image(), image()]));
        assert_eq!(store.disks.len(), 1, "two images on one disk");
        let first = measured(&mut store, 1.0, Effort::Full);
        assert_eq!(first.value(Feature::DiskBusy), None);
        assert!(first.value(Feature::StoreFree).is_some_and(|bytes| bytes > 0.0));
        assert!(first.value(Feature::StoreShare).is_some_and(|share| (0.0..=1.0).contains(&share)));
        stat("150 0 0 1400 140 0 0 1100 3 6000 11000 8 0 0 0 2 0\n");
        assert_eq!(measured(&mut store, 1.0, Effort::Light), Measure::default());
        let second = measured(&mut store, 1.0, Effort::Full);
        let values = [Feature::DiskBusy, Feature::DiskDepth, Feature::DiskWait, Feature::StoreFree];
        assert_eq!(values.map(|it| second.value(it)), [Some(0.5), Some(2.0), Some(5_000.0), None]);
        stat("150 0 0 1400 140 0 0 1100 0 6000 11000\n");
        let idle = measured(&mut store, 1.0, Effort::Full);
        assert_eq!((idle.value(Feature::DiskBusy), idle.value(Feature::DiskWait)), (Some(0.0), None));
        stat("garbage\n");
        assert_eq!(measured(&mut store, 1.0, Effort::Full), Measure::default());
    }

    #[test]
    fn what_lies_on_no_block_device_has_none() {
        let memory = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let null = Image::at(Path::new("/dev/null")).expect("everybody has it");
        let mut store = Store::new(with_images(vec![Image::new(memory), null]));
        let measure = measured(&mut store, 1.0, Effort::Deep);
        assert_eq!((store.disks.len(), measure.value(Feature::DiskBusy)), (0, None));
    }

    #[test]
    fn a_mount_is_found_by_its_number() {
        let mounts = b"27 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n28 1 0:3 / /x rw - nfs4 host:/x rw\nx\n29 - \n";
        let found = |id| mount(mounts, id);
        assert_eq!(found(28), Some(Mounted { kind: b"nfs4", source: b"host:/x" }));
        assert_eq!(found(27).map(|mount| mount.source), Some(b"/dev/vda".as_slice()));
        assert_eq!((found(29), found(2)), (None, None));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(text in proptest::collection::vec(any::<u8>(), 0..200), numbers in proptest::collection::vec(any::<u64>(), 0..20)) {
            let _any = DiskStat::parse(&text);
            let _any = mount(&text, 1);
            let words: Vec<_> = numbers.iter().map(u64::to_string).collect();
            let _any = DiskStat::parse(words.join(" ").as_bytes());
        }
    }
}
