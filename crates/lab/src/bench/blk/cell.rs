//! The cells of the table: what is asked of which medium, how deep, through how many queues.

use std::fmt;

use anyhow::ensure;

use crate::bench::load::{Load, Mix, Order};
use crate::guest::BLOCK;

/// Requests in flight per queue.
const DEPTHS: [u16; 2] = [1, 32];
/// Queues.
const QUEUES: [u16; 2] = [1, 2];

/// Where the image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// A tmpfs, through its page cache: there is nothing else.
    Tmpfs,
    /// A disk, with O_DIRECT.
    Disk,
}

impl Medium {
    /// Whether everybody opens the image with O_DIRECT.
    pub(super) fn direct(self) -> bool {
        self == Medium::Disk
    }
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Medium::Tmpfs => "tmpfs",
            Medium::Disk => "disk",
        })
    }
}

/// What is asked. Small requests go anywhere, large ones are sequential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Random reads of 4 KiB.
    SmallReads,
    /// Random writes of 4 KiB.
    SmallWrites,
    /// Sequential reads of 128 KiB.
    LargeReads,
    /// Sequential writes of 128 KiB.
    LargeWrites,
}

impl Asked {
    const ALL: [Asked; 4] = [Asked::SmallReads, Asked::SmallWrites, Asked::LargeReads, Asked::LargeWrites];

    /// The load on a disk of `disk_bytes`.
    pub(super) fn load(self, disk_bytes: u64) -> Load {
        let disk_blocks = disk_bytes / BLOCK as u64;
        let (blocks, order) = match self {
            Asked::SmallReads | Asked::SmallWrites => (1, Order::Random),
            Asked::LargeReads | Asked::LargeWrites => (32, Order::Sequential),
        };
        let mix = match self {
            Asked::SmallReads | Asked::LargeReads => Mix::Reads,
            Asked::SmallWrites | Asked::LargeWrites => Mix::Writes,
        };
        Load { disk_blocks, blocks, mix, order }
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Asked::SmallReads => "read 4k",
            Asked::SmallWrites => "write 4k",
            Asked::LargeReads => "read 128k",
            Asked::LargeWrites => "write 128k",
        })
    }
}

/// One cell. Its name is how it is displayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// Where the image lies.
    pub(super) medium: Medium,
    /// What is asked.
    pub(super) asked: Asked,
    /// Requests in flight per queue.
    pub(super) depth: u16,
    /// Queues.
    pub(super) queues: u16,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell { medium, asked, depth, queues } = self;
        write!(f, "{medium} {asked} qd{depth} q{queues}")
    }
}

/// All cells.
fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    for medium in [Medium::Tmpfs, Medium::Disk] {
        for asked in Asked::ALL {
            for queues in QUEUES {
                cells.extend(DEPTHS.map(|depth| Cell { medium, asked, depth, queues }));
            }
        }
    }
    cells
}

/// The cells with any of `only` in their names; all of them if there is none.
pub(super) fn chosen(only: &[String]) -> anyhow::Result<Vec<Cell>> {
    let mut cells = all();
    for wanted in only {
        ensure!(
            cells.iter().any(|cell| cell.to_string().contains(wanted)),
            "--only {wanted:?} is in no name of a cell; names are such as {:?}",
            cells[0].to_string()
        );
    }
    cells.retain(|cell| only.is_empty() || only.iter().any(|wanted| cell.to_string().contains(wanted)));
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[&str]) -> Vec<String> {
        let only: Vec<String> = only.iter().map(|&wanted| wanted.to_owned()).collect();
        chosen(&only).expect("there are such cells").iter().map(Cell::to_string).collect()
    }

    #[test]
    fn every_combination_has_a_name_of_its_own() {
        let mut names = names(&[]);
        assert_eq!(names.len(), 2 * 4 * 2 * 2);
        assert!(names.contains(&"tmpfs read 4k qd32 q1".to_owned()));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 32);
    }

    #[test]
    fn only_takes_parts_of_names_and_refuses_what_is_in_none() {
        assert_eq!(names(&["disk write 128k qd1 q2"]), ["disk write 128k qd1 q2"]);
        assert_eq!(names(&["tmpfs read 4k"]).len(), 4);
        assert_eq!(names(&["read 4k qd32", "read 4k qd1 "]).len(), 8);
        let refused = chosen(&["floppy".to_owned()]).expect_err("no such medium");
        assert!(refused.to_string().contains("floppy"), "{refused}");
    }

    #[test]
    fn a_large_request_is_128_kib_and_a_small_one_a_block() {
        assert_eq!(Asked::LargeWrites.load(1 << 20).bytes(), 128 << 10);
        assert_eq!(Asked::SmallReads.load(1 << 20).bytes(), 4096);
    }
}
