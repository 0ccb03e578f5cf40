//! The snapshots of one device: a directory of files.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Refusal, SNAPSHOT_BYTES_MAX, Snapshot, SnapshotError, decode, encode};

/// What a snapshot's name ends with.
const ENDING: &str = "wss";
/// What the name of one ends with that is being written.
const UNFINISHED: &str = "tmp";
/// Digits of a time in a name: as many as the latest has, so that names order as times do.
const DIGITS: usize = 20;

/// How many snapshots are kept. The last one that was written always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotRetention {
    /// Snapshots.
    pub count_max: u64,
    /// Bytes of all of them.
    pub bytes_max: u64,
    /// Age, in nanoseconds before the last one.
    pub keep_ns: u64,
}

impl Default for SnapshotRetention {
    /// 64 snapshots, 16 MiB, 30 days.
    fn default() -> Self {
        SnapshotRetention { count_max: 64, bytes_max: 16 << 20, keep_ns: 30 * 24 * 3_600 * 1_000_000_000 }
    }
}

/// A snapshot that lies in a directory. It was not looked into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The file.
    pub path: PathBuf,
    /// Its time by its name, in nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// The newest snapshot that can be read, or what is made of the newest that will do.
#[derive(Debug)]
pub struct Newest<T = Snapshot> {
    /// It and its file, if there is any.
    pub found: Option<(PathBuf, T)>,
    /// Why those that are newer cannot, the newest first. Each names its file.
    pub refused: Vec<SnapshotError>,
}

/// The snapshots of one device. One process writes them; others read at any time what it has finished.
#[derive(Clone, Debug)]
pub struct Snapshots {
    path: PathBuf,
    device: String,
    retention: SnapshotRetention,
}

impl Snapshots {
    /// Opens the snapshots of `device` in `dir`, which is there, or begins them. What a writer left unfinished is taken away.
    ///
    /// # Errors
    /// The device has a name that no file can have, or the directory cannot be made or read.
    pub fn open(dir: &Path, device: &str, retention: SnapshotRetention) -> Result<Self, SnapshotError> {
        let path = directory(dir, device)?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => sync_directory(dir)?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(SnapshotError::Io { path, source }),
        }
        for (path, _) in named(&path, UNFINISHED)? {
            remove(&path).map_err(|source| SnapshotError::Io { path, source })?;
        }
        Ok(Snapshots { path, device: device.to_owned(), retention })
    }

    /// Their directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a snapshot, and takes away what is beyond the retention. It is on the disk, whole, when this returns; one of the very same time is
    /// replaced. Gives its file.
    ///
    /// # Errors
    /// It is of another device or has too much in it, or the directory cannot be written: those before it are there as they were. Or another file
    /// is to be [taken away](SnapshotError::Kept) and cannot be: then the new one is there.
    pub fn write(&self, snapshot: &Snapshot) -> Result<PathBuf, SnapshotError> {
        let path = self.path.join(format!("{:0DIGITS$}.{ENDING}", snapshot.unix_ns));
        check_device(&path, snapshot, &self.device)?;
        let bytes = encode(snapshot).map_err(|source| SnapshotError::Refused { path: path.clone(), source })?;
        let unfinished = path.with_extension(UNFINISHED);
        if let Err(source) = write_new(&unfinished, &bytes) {
            let _nothing_to_keep = std::fs::remove_file(&unfinished);
            return Err(SnapshotError::Io { path: unfinished, source });
        }
        if let Err(source) = std::fs::rename(&unfinished, &path) {
            let _nothing_to_keep = std::fs::remove_file(&unfinished);
            return Err(SnapshotError::Io { path, source });
        }
        sync_directory(&self.path)?;
        self.prune(snapshot.unix_ns)?;
        Ok(path)
    }

    /// Takes away what is too old or too much beside the snapshot that was just written.
    fn prune(&self, written_ns: u64) -> Result<(), SnapshotError> {
        let SnapshotRetention { count_max, bytes_max, keep_ns } = self.retention;
        let mut listed = self.list()?;
        // One of a later time was written before all the same, when the clock was wrong: it would stay for ever.
        listed.sort_by_key(|listed| (listed.unix_ns <= written_ns, listed.unix_ns));
        let (mut count, mut bytes) = (listed.len() as u64, listed.iter().map(|listed| listed.bytes).sum::<u64>());
        for listed in listed.into_iter().filter(|listed| listed.unix_ns != written_ns) {
            let too_old = listed.unix_ns < written_ns.saturating_sub(keep_ns);
            if too_old || count > count_max || bytes > bytes_max {
                remove(&listed.path).map_err(|source| SnapshotError::Kept { path: listed.path, source })?;
                count -= 1;
                bytes -= listed.bytes;
            }
        }
        Ok(())
    }

    /// Those that are there, the oldest first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, SnapshotError> {
        listed(&self.path)
    }

    /// The newest that can be read, and why newer ones cannot.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn newest_valid(&self) -> Result<Newest, SnapshotError> {
        newest(&self.path, &self.device, |snapshot| Ok(Some(snapshot)))
    }
}

/// The snapshots of `device` in `dir`, the oldest first; none where it never had any. Changes nothing.
///
/// # Errors
/// The device has a name that no file can have, or the directory cannot be read.
pub fn list(dir: &Path, device: &str) -> Result<Vec<Listed>, SnapshotError> {
    listed(&directory(dir, device)?)
}

/// The newest snapshot of `device` in `dir` that can be read, and why newer ones cannot. Changes nothing.
///
/// # Errors
/// The device has a name that no file can have, or the directory cannot be read.
pub fn newest_valid(dir: &Path, device: &str) -> Result<Newest, SnapshotError> {
    newest_that(dir, device, |snapshot| Ok(Some(snapshot)))
}

/// What `accept` makes of the newest snapshot of `device` in `dir` that will do, and why newer ones will not: it says why one does not, or
/// passes over it with `None`. Changes nothing.
///
/// # Errors
/// The device has a name that no file can have, or the directory cannot be read.
pub fn newest_that<T>(
    dir: &Path,
    device: &str,
    accept: impl FnMut(Snapshot) -> Result<Option<T>, String>,
) -> Result<Newest<T>, SnapshotError> {
    newest(&directory(dir, device)?, device, accept)
}

/// Reads a snapshot, of whatever device.
///
/// # Errors
/// The file cannot be read, or is no snapshot.
pub fn read(path: &Path) -> Result<Snapshot, SnapshotError> {
    let bytes = read_bounded(path).map_err(|source| SnapshotError::Io { path: path.to_owned(), source })?;
    let refused = |source| SnapshotError::Refused { path: path.to_owned(), source };
    if bytes.len() > SNAPSHOT_BYTES_MAX {
        let bytes = std::fs::metadata(path).map_or(bytes.len() as u64, |found| found.len());
        return Err(refused(Refusal::Large { bytes }));
    }
    decode(&bytes).map_err(refused)
}

/// All of a file, or a byte more than a snapshot may have.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    // Opening a pipe would wait for who writes to it.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it is no file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(SNAPSHOT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn newest<T>(
    path: &Path,
    device: &str,
    mut accept: impl FnMut(Snapshot) -> Result<Option<T>, String>,
) -> Result<Newest<T>, SnapshotError> {
    let mut newest = Newest { found: None, refused: Vec::new() };
    for Listed { path, .. } in listed(path)?.into_iter().rev() {
        let snapshot = read(&path).and_then(|snapshot| check_device(&path, &snapshot, device).map(|()| snapshot));
        let unfit = |why| SnapshotError::Unfit { path: path.clone(), why };
        match snapshot.and_then(|snapshot| accept(snapshot).map_err(unfit)) {
            Ok(Some(found)) => {
                newest.found = Some((path, found));
                break;
            }
            Ok(None) => {}
            Err(error) => newest.refused.push(error),
        }
    }
    Ok(newest)
}

fn check_device(path: &Path, snapshot: &Snapshot, device: &str) -> Result<(), SnapshotError> {
    if snapshot.device == device {
        return Ok(());
    }
    let (found, expected) = (snapshot.device.clone(), device.to_owned());
    Err(SnapshotError::Device { path: path.to_owned(), found, expected })
}

/// Where the snapshots of a device lie.
fn directory(dir: &Path, device: &str) -> Result<PathBuf, SnapshotError> {
    if device.is_empty() || device.starts_with('.') || device.contains(['/', '\0']) {
        return Err(SnapshotError::Name { path: dir.to_owned(), device: device.to_owned() });
    }
    Ok(dir.join(format!("{device}.snapshots")))
}

fn listed(path: &Path) -> Result<Vec<Listed>, SnapshotError> {
    let mut all = Vec::new();
    for (path, unix_ns) in named(path, ENDING)? {
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_file() => all.push(Listed { path, unix_ns, bytes: found.len() }),
            // What is no file was put there by somebody else; what is gone went a moment ago.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(source) => return Err(SnapshotError::Io { path, source }),
        }
    }
    all.sort_by_key(|listed| listed.unix_ns);
    Ok(all)
}

/// What has a name as snapshots have, with an ending, and the time in it. Other names are not ours.
fn named(path: &Path, ending: &str) -> Result<Vec<(PathBuf, u64)>, SnapshotError> {
    let fail = |source| SnapshotError::Io { path: path.to_owned(), source };
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("");
        let digits = stem.len() == DIGITS && stem.bytes().all(|byte| byte.is_ascii_digit());
        let ours = digits && path.extension().is_some_and(|found| found == ending);
        if let Some(unix_ns) = stem.parse().ok().filter(|_| ours) {
            all.push((path, unix_ns));
        }
    }
    Ok(all)
}

/// Makes a file for nobody else's eyes: a snapshot has what the guest's data look like from outside, and how to reach them.
fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // An earlier write may have failed in a way that left it.
    remove(path)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Names that were made in a directory are there after a power cut only once it was synced itself.
fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|source| SnapshotError::Io { path: path.to_owned(), source })
}
