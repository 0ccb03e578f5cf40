//! Waiting that ends when the instrument is asked to end.

use std::time::Duration;

use anyhow::ensure;

use crate::common::interrupt;

/// Sleeps. Fails if the instrument was asked to end.
pub(super) fn pause(time: Duration) -> anyhow::Result<()> {
    std::thread::sleep(time);
    ensure!(!interrupt::is_asked(), "interrupted");
    Ok(())
}
