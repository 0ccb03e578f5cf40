//! Alarms of other devices of the host. Each broker notes its own as the time of a file in the directory of control sockets, and looks at those
//! of the others: several devices that alarm at the same time have a cause in common.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Alarms are at the same time if they are no further apart.
const TOGETHER: Duration = Duration::from_secs(10);
/// Ending of the names of these files.
const ENDING: &str = ".alarm";
/// Entries of the directory that are looked at, at most.
const ENTRIES_MAX: usize = 10_000;

/// Alarms of other devices.
#[derive(Debug)]
pub(crate) struct Neighbours {
    dir: PathBuf,
}

impl Neighbours {
    /// Those that are noted in a directory.
    pub(crate) fn new(dir: &Path) -> Self {
        Neighbours { dir: dir.to_path_buf() }
    }

    /// Notes an alarm. Where it cannot be noted the others do without.
    pub(crate) fn note(&self, device: &str) {
        let _unnoted = std::fs::write(self.path(device), b"");
    }

    /// Other devices with an alarm of the last seconds.
    pub(crate) fn others(&self, device: &str) -> u32 {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return 0 };
        let own = format!("{device}{ENDING}");
        let now = SystemTime::now();
        let alarms = entries.take(ENTRIES_MAX).flatten().filter(|entry| {
            let name = entry.file_name();
            let other = name.to_str().is_some_and(|name| name.ends_with(ENDING) && name != own);
            other && entry.metadata().and_then(|data| data.modified()).is_ok_and(|at| is_recent(at, now))
        });
        u32::try_from(alarms.count()).unwrap_or(u32::MAX)
    }

    fn path(&self, device: &str) -> PathBuf {
        self.dir.join(format!("{device}{ENDING}"))
    }
}

/// Removes what a device noted, at its broker's end.
pub(crate) fn forget(dir: &Path, device: &str) {
    let _gone = std::fs::remove_file(Neighbours::new(dir).path(device));
}

fn is_recent(at: SystemTime, now: SystemTime) -> bool {
    // A clock that was set back is no reason to take old alarms for new ones.
    now.duration_since(at)
        .or_else(|future| if future.duration() < TOGETHER { Ok(TOGETHER / 2) } else { Err(future) })
        .is_ok_and(|ago| ago < TOGETHER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_counted_while_their_alarms_are_recent() {
        let dir = std::env::temp_dir().join(format!("warmswap-neighbours-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        let neighbours = Neighbours::new(&dir);
        neighbours.note("disk0");
        assert_eq!((neighbours.others("disk0"), neighbours.others("disk1")), (0, 1));
        neighbours.note("disk1");
        std::fs::write(dir.join("disk2.ctl"), b"").expect("it can be written");
        assert_eq!((neighbours.others("disk0"), neighbours.others("disk9")), (1, 2));
        let old = std::fs::File::options().write(true).open(neighbours.path("disk1")).expect("it is there");
        old.set_modified(SystemTime::now() - Duration::from_secs(11)).expect("it is ours");
        assert_eq!(neighbours.others("disk0"), 0);
        forget(&dir, "disk0");
        assert_eq!(neighbours.others("disk9"), 0);
        std::fs::remove_dir_all(&dir).expect("it is there");
    }
}
