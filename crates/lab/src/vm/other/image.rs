//! The image of a disk that is only read. Host and guest agree on its content because both are this program.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;

use crate::vm::layout::BLOCK;
use crate::vm::rng::Rng;

/// Blocks of the image.
pub(crate) const BLOCKS: u64 = 4096;

/// The content of one block.
pub(crate) fn block(seed: u64, index: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(BLOCK).expect("a block is small")];
    Rng::new(seed, index.wrapping_mul(2) + 31).fill(&mut bytes);
    bytes
}

/// Makes the image.
pub(super) fn make(path: &Path, seed: u64) -> anyhow::Result<()> {
    let mut file = BufWriter::new(File::create_new(path).context("making the image")?);
    for index in 0..BLOCKS {
        file.write_all(&block(seed, index))?;
    }
    file.flush().context("making the image")
}
