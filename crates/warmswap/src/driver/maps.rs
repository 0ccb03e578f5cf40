//! Whether the VMM itself shares the memory it has handed over: looked up in `/proc`, on a thread of its own.
//!
//! A VMM that maps guest memory privately hands over a descriptor all the same. Backends and broker then see an empty memory for
//! ever, and nobody reports an error: the guest just hangs.

use crossbeam_channel::{Receiver, Sender};

use super::{Command, Commander};

/// Looks that may wait.
const LOOKS_MAX: usize = 64;

/// A file by its device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// A VMM to be looked at.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) device: u16,
    /// Process of the VMM.
    pub(crate) vmm: u32,
    /// What it gave as memory.
    pub(crate) files: Vec<File>,
}

/// Hands looks to the thread.
#[derive(Clone, Debug)]
pub(crate) struct Maps {
    looks: Sender<Look>,
}

impl Maps {
    /// Starts the thread. The results come back as commands.
    pub(crate) fn start(commander: Commander) -> std::io::Result<Self> {
        let (sender, looks) = crossbeam_channel::bounded(LOOKS_MAX);
        std::thread::Builder::new().name("maps".to_owned()).spawn(move || run(&looks, &commander))?;
        Ok(Maps { looks: sender })
    }

    /// Hands one over. Where too many wait it is left out: a mistake in the set-up is then not explained, nothing else.
    pub(crate) fn look(&self, look: Look) {
        let _left_out = self.looks.try_send(look);
    }
}

fn run(looks: &Receiver<Look>, commander: &Commander) {
    for Look { device, vmm, files } in looks {
        // A VMM that cannot be looked into is taken to be right.
        let maps = std::fs::read_to_string(format!("/proc/{vmm}/maps")).unwrap_or_default();
        let private = files.iter().any(|file| is_private(&maps, *file));
        if !commander.send(Command::MemoryLooked { device, vmm, private }) {
            return;
        }
    }
}

/// Whether a file is mapped, and nowhere so that others see what is written.
fn is_private(maps: &str, file: File) -> bool {
    let mut private = false;
    for line in maps.lines() {
        // address perms offset dev inode path
        let mut words = line.split_ascii_whitespace();
        let (Some(permissions), Some(device), Some(inode)) = (words.nth(1), words.nth(1), words.next()) else {
            continue;
        };
        if inode.parse() != Ok(file.inode) || device_number(device) != Some(file.device) {
            continue;
        }
        if permissions.ends_with('s') {
            return false;
        }
        private = true;
    }
    private
}

/// A device's number from `major:minor` in hexadecimal.
fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let part = |text| u32::from_str_radix(text, 16).ok();
    Some(rustix::fs::makedev(part(major)?, part(minor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: File = File { device: 1, inode: 1041 };

    #[test]
    fn memory_that_is_only_mapped_privately_is_told_from_what_is_shared_or_not_mapped() {
        let other = "55d0c8000000-55d0c8021000 rw-p 00000000 00:00 0    [heap]\n7f0000000000-7f0000001000 rw-p 0 fe:01 1041 /x\n";
        let private = "7f6a23c00000-7f6a63c00000 rw-p 00000000 00:01 1041   /memfd:memory-backend-memfd (deleted)\n";
        let shared = "7f6a23c00000-7f6a63c00000 rw-s 00000000 00:01 1041   /memfd:memory-backend-memfd (deleted)\n";
        assert!(is_private(&format!("{other}{private}"), RAM));
        assert!(!is_private(&format!("{other}{shared}"), RAM));
        assert!(!is_private(&format!("{private}{shared}"), RAM));
        assert!(!is_private(other, RAM));
        assert!(!is_private("", RAM));
        assert!(!is_private("nonsense\n\n", RAM));
    }
}
