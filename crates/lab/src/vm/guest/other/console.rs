//! The load of a console: numbered lines, one after the other, which the host collects and checks.

use std::fs::File;
use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;

use super::Load;
use crate::vm::other::lines;

/// The first console of the guarded device.
const DEVICE: &str = "/dev/hvc0";
/// Time between two lines.
const PAUSE: Duration = Duration::from_millis(5);

/// Writes lines until told to stop.
pub(super) fn run(load: &Load) -> anyhow::Result<()> {
    let mut device = File::options().write(true).open(DEVICE).context("opening the console")?;
    for number in 0.. {
        if load.stopping() {
            break;
        }
        if let Err(error) = load.tally.timed(|| device.write_all(lines::line(load.seed, number).as_bytes())) {
            load.complain(&format!("line {number}: {error}"));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
