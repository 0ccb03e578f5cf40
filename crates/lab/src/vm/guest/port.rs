//! The guest's end of the second serial port.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::sync::Mutex;

use anyhow::Context as _;

use crate::vm::orders::Line;

const DEVICE: &str = "/dev/ttyS1";

/// The port, for writing; lines of several threads do not mix.
#[derive(Debug)]
pub(crate) struct Port(Mutex<File>);

impl Port {
    /// Opens the port (the init script has set it to raw mode).
    pub(crate) fn open() -> anyhow::Result<Self> {
        let file = File::options().write(true).open(DEVICE).context("opening the serial port")?;
        Ok(Self(Mutex::new(file)))
    }

    /// Sends a line. A host that no longer listens is not our trouble: it ends this machine.
    pub(crate) fn say(&self, line: &Line) {
        let mut file = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = file.write_all(format!("{}\n", line.text()).as_bytes());
    }
}

/// Returns when the host says `stop`.
pub(crate) fn wait_for_stop() -> anyhow::Result<()> {
    let reader = BufReader::new(File::open(DEVICE).context("opening the serial port")?);
    for line in reader.lines() {
        if line.context("reading the serial port")?.trim() == "stop" {
            return Ok(());
        }
    }
    anyhow::bail!("the serial port closed")
}
