//! The load of a source of random bytes: read all the time, and never twice the same.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;

use anyhow::Context as _;

use super::Load;

const DEVICE: &str = "/dev/hwrng";
/// Bytes of one read.
const BYTES: usize = 256;
/// What is compared: 64 bits each, of which a true source repeats none among so few.
const WORD: usize = 8;
/// Words that are remembered, 32 MiB of them.
const WORDS_MAX: usize = 1 << 20;

/// Reads until told to stop.
pub(super) fn run(load: &Load) -> anyhow::Result<()> {
    let chosen = std::fs::read_to_string("/sys/class/misc/hw_random/rng_current").context("which source is used")?;
    anyhow::ensure!(chosen.starts_with("virtio_rng"), "the source is {chosen:?}, not the guarded device");
    let mut device = File::open(DEVICE).context("opening the source")?;
    let mut seen = HashSet::new();
    let mut bytes = [0; BYTES];
    while !load.stopping() {
        match load.tally.timed(|| device.read(&mut bytes)) {
            Ok(0) => load.complain("the source gave nothing"),
            Ok(length) => {
                for word in bytes[..length].as_chunks::<WORD>().0 {
                    if seen.len() < WORDS_MAX && !seen.insert(*word) {
                        load.tally.mistake();
                        load.complain("random bytes came a second time");
                    }
                }
            }
            Err(error) => load.complain(&format!("reading: {error}")),
        }
    }
    Ok(())
}
