//! Damage done to the image behind everybody's back. A run with it must fail: that is how the checks are checked.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::layout::{BLOCK, FIO, STAMP};
use super::rng::Rng;

/// The kind of damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sabotage {
    /// Noise over some blocks: what a wild write does.
    Noise,
    /// Old contents put back: what a lost or a repeated late write does. Every block of it is whole in itself.
    Stale,
}

/// Contents of the image at one time.
#[derive(Debug)]
pub(crate) struct Damage {
    image: File,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Damage {
    /// Prepares the damage from the image as it is now.
    pub(crate) fn prepare(kind: Sabotage, image: &Path, rng: &mut Rng) -> anyhow::Result<Self> {
        let image = File::options().read(true).write(true).open(image)?;
        let mut pieces = Vec::new();
        let blocks = match kind {
            Sabotage::Noise => 64,
            // Wide enough that some of it is written between now and then.
            Sabotage::Stale => 1024,
        };
        for region in [FIO, STAMP] {
            let mut bytes = vec![0; blocks * usize::try_from(BLOCK)?];
            let first = rng.range(0, region.bytes / BLOCK - blocks as u64);
            let offset = region.offset + first * BLOCK;
            match kind {
                Sabotage::Noise => rng.fill(&mut bytes),
                Sabotage::Stale => image.read_exact_at(&mut bytes, offset)?,
            }
            pieces.push((offset, bytes));
        }
        Ok(Self { image, pieces })
    }

    /// Does the damage.
    pub(crate) fn strike(self) -> anyhow::Result<()> {
        self.pieces.iter().try_for_each(|(offset, bytes)| Ok(self.image.write_all_at(bytes, *offset)?))
    }
}
