//! The guest's kernel log, and which of its lines mean that the disk failed the guest.

use super::orders::KERNEL_LOG_MARK;

/// What the kernel says when I/O failed. Any of them is a defect: the guest must not notice a failover.
const TROUBLE: [&str; 16] = [
    "I/O error",
    "blk_update_request",
    "is not a head",
    "EXT4-fs error",
    "EXT4-fs warning",
    "EXT4-fs (vda1): failed",
    "Remounting filesystem read-only",
    "JBD2: ",
    "Aborting journal",
    "blocked for more than",
    "virtio_blk virtio0: ",
    "lost async page write",
    "timing out command",
    "Kernel panic",
    "Oops",
    "kernel BUG at",
];
/// Lines that contain a word of trouble and are none.
const HARMLESS: [&str; 2] = ["default/read/poll queues", "512-byte logical blocks"];

/// What was read from a log.
#[derive(Debug, Default)]
pub(crate) struct KernelLog {
    /// Lines that tell of trouble.
    pub(crate) trouble: Vec<String>,
    /// Whether the guest's mark was found: without it the log was not seen at all.
    pub(crate) marked: bool,
}

impl KernelLog {
    /// Reads a log.
    pub(crate) fn read(text: &str) -> Self {
        let is_trouble = |line: &&str| {
            TROUBLE.iter().any(|word| line.contains(word)) && !HARMLESS.iter().any(|word| line.contains(word))
        };
        let trouble = text.lines().filter(is_trouble).map(|line| line.trim().to_owned()).collect();
        Self { trouble, marked: text.contains(KERNEL_LOG_MARK) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(line: &str) -> usize {
        KernelLog::read(line).trouble.len()
    }

    #[test]
    fn what_linux_says_of_a_failed_disk_is_trouble() {
        assert_eq!(trouble("[   20.1] virtio_blk virtio0: requests.0:id 17 is not a head!"), 1);
        assert_eq!(trouble("[   20.1] I/O error, dev vda, sector 40 op 0x1:(WRITE) flags 0x8800"), 1);
        assert_eq!(trouble("[   60.1] INFO: task fio:123 blocked for more than 30 seconds."), 1);
        assert_eq!(trouble("[   20.1] EXT4-fs error (device vda1): ext4_find_entry:1455: inode #2"), 1);
    }

    #[test]
    fn what_linux_says_of_a_good_disk_is_not() {
        assert_eq!(trouble("[    5.0] virtio_blk virtio0: 2/0/0 default/read/poll queues"), 0);
        assert_eq!(trouble("[    5.0] virtio_blk virtio0: [vda] 524288 512-byte logical blocks (268 MB/256 MiB)"), 0);
        assert_eq!(
            trouble("[    5.0] EXT4-fs (vda1): mounted filesystem with ordered data mode. Quota mode: none."),
            0
        );
    }

    #[test]
    fn a_log_without_the_mark_was_not_seen() {
        assert!(!KernelLog::read("[ 5.0] Linux").marked);
        assert!(KernelLog::read(&format!("[ 6.0] {KERNEL_LOG_MARK}")).marked);
    }
}
