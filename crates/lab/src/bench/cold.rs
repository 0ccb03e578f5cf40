//! The same backend without a broker: killed, started again at once, and the VMM reconnects by itself.
//!
//! The supervisor is the best there can be: it waits for nothing but the end of the old process, which holds the lock on the
//! image, and starts the new one at that instant. The VMM follows QEMU's rule, `used.idx`, and reconnects either as soon as a
//! connect succeeds, or by QEMU's timer: a first attempt `reconnect-ms` after the hang-up, and further ones as far apart.

use std::io::{Error, ErrorKind};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::backend::{self, Bare};
use super::driver::{Driver, SILENCE_NS, Shape, pause};
use crate::common::qsd::Qsd;
use crate::common::rng::Rng;
use crate::guest::now_ns;

/// No completion for this long after a reconnect: nothing more will come.
const LOST_NS: u64 = 20_000_000;
/// QEMU's `reconnect-ms`.
const RECONNECT_NS: u64 = 100_000_000;

/// When the VMM tries to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reconnect {
    /// Without a pause until it succeeds.
    AtOnce,
    /// At multiples of `reconnect-ms` after the hang-up.
    Timer,
}

/// One cold restart. All times are since just before the kill.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Restart {
    /// The old process was reaped.
    pub(super) reaped_ns: u64,
    /// The new one was executed.
    pub(super) started_ns: u64,
    /// The VMM was connected and had negotiated.
    pub(super) connected_ns: u64,
    /// `used.idx` moved.
    pub(super) first_ns: u64,
    /// Requests in flight at the end of the old process.
    pub(super) inflight: u64,
    /// Of these, requests that were never completed.
    pub(super) lost: u64,
    /// Completions of requests that had been completed.
    pub(super) duplicated: u64,
}

/// A device nobody guards, with its guest.
#[derive(Debug)]
pub(super) struct Unguarded {
    driver: Driver,
    qsd: Qsd,
    socket: PathBuf,
    backend: Bare,
}

impl Unguarded {
    /// Starts `qsd` and boots a guest of `shape` on it.
    pub(super) fn boot(qsd: Qsd, shape: &Shape, rng: &Rng) -> anyhow::Result<Self> {
        let socket = shape.socket.clone();
        let _ = std::fs::remove_file(&socket);
        let mut backend = backend::start(&qsd.command_line(&socket.display().to_string()))?;
        // The one client QSD takes is the guest, so nobody else tries whether it listens.
        let deadline = now_ns() + SILENCE_NS;
        let mut driver = loop {
            match Driver::boot(shape, rng.clone()) {
                Err(error) if is_absent(&error) && now_ns() < deadline => backend.must_live()?,
                other => break other?,
            }
        };
        driver.tolerate();
        Ok(Unguarded { driver, qsd, socket, backend })
    }

    /// Kills the backend after `load_ns` of load, and starts it again.
    pub(super) fn restart(&mut self, load_ns: u64, how: Reconnect) -> anyhow::Result<Restart> {
        self.driver.run_for(load_ns)?;
        let killed = now_ns();
        let since = || now_ns() - killed;
        self.backend.kill()?;
        let hang_up = self.wait_for_the_end()?;
        let mut restart = Restart { reaped_ns: since(), inflight: self.driver.outstanding(), ..Restart::default() };
        self.start_backend()?;
        restart.started_ns = since();
        self.connect(how, hang_up)?;
        restart.connected_ns = since();
        self.resume_by_used_idx()?;
        restart.first_ns = self.first_completion()? - killed;
        self.count_damage(&mut restart)?;
        Ok(restart)
    }

    /// Takes the last completions until the process is reaped. Returns when the VMM saw the hang-up.
    fn wait_for_the_end(&mut self) -> anyhow::Result<u64> {
        self.driver.busy = true;
        let deadline = now_ns() + SILENCE_NS;
        let mut hang_up = None;
        loop {
            if self.driver.poll(&mut |_| {})? == 0 {
                pause();
            }
            if hang_up.is_none() && self.has_hung_up()? {
                hang_up = Some(now_ns());
            }
            if self.backend.is_reaped()? {
                break;
            }
            ensure!(now_ns() < deadline, "the backend survives SIGKILL");
        }
        self.driver.poll(&mut |_| {})?;
        Ok(hang_up.unwrap_or_else(now_ns))
    }

    fn has_hung_up(&mut self) -> anyhow::Result<bool> {
        let front = self.driver.guest.front()?;
        let mut fds = [PollFd::from_borrowed_fd(front.as_fd(), PollFlags::RDHUP)];
        let ready = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(ready > 0)
    }

    fn connect(&mut self, how: Reconnect, hang_up: u64) -> anyhow::Result<()> {
        let deadline = now_ns() + SILENCE_NS;
        let mut attempt = hang_up;
        loop {
            if how == Reconnect::Timer {
                attempt += RECONNECT_NS;
                sleep_until(attempt);
            }
            // An attempt that fails is not free here; a look whether it can succeed is.
            if how == Reconnect::AtOnce && !self.socket.exists() {
                ensure!(now_ns() < deadline, "the backend does not listen");
                self.backend.must_live()?;
                pause();
                continue;
            }
            match self.driver.guest.connect() {
                Ok(()) => return self.give_calls(),
                Err(error) if is_absent(&error) && now_ns() < deadline => self.backend.must_live()?,
                Err(error) => return Err(error).context("reconnecting"),
            }
            pause();
        }
    }

    /// QEMU gives call descriptors when it connects, before anything runs (`vhost_virtqueue_init`). A backend that found a
    /// kick before its call would give up.
    fn give_calls(&mut self) -> anyhow::Result<()> {
        let queues = std::mem::take(&mut self.driver.guest.queues);
        let given = queues.iter().try_for_each(|queue| {
            self.driver.guest.front().and_then(|front| front.set_call(queue.index(), queue.call_fd()))
        });
        self.driver.guest.queues = queues;
        given
    }

    /// QEMU's rule (`virtio_queue_split_restore_last_avail_idx`). It kicks what may be waiting.
    fn resume_by_used_idx(&mut self) -> anyhow::Result<()> {
        let bases: Vec<u16> = self.driver.guest.queues.iter().map(|queue| queue.vring().used_idx()).collect();
        self.driver.guest.start_from(&bases)?;
        self.driver.guest.queues.iter().for_each(|queue| queue.kick_fd().signal());
        Ok(())
    }

    /// Waits until `used.idx` moves: even a completion of what was complete already counts as the first.
    fn first_completion(&mut self) -> anyhow::Result<u64> {
        let deadline = now_ns() + SILENCE_NS;
        loop {
            if self.driver.guest.queues.iter().any(|queue| queue.vring().used_idx() != queue.vring().taken_idx()) {
                return Ok(now_ns());
            }
            ensure!(now_ns() < deadline, "no completion after the reconnect: {}", self.driver.describe());
            pause();
        }
    }

    /// Waits for what is left, counts what does not come, and begins anew.
    fn count_damage(&mut self, restart: &mut Restart) -> anyhow::Result<()> {
        let duplicated = self.driver.duplicated;
        self.driver.busy = false;
        let mut last = now_ns();
        while self.driver.outstanding() > 0 && now_ns() < last + LOST_NS {
            if self.driver.poll(&mut |_| {})? > 0 {
                last = now_ns();
            }
            pause();
        }
        restart.lost = self.driver.outstanding();
        restart.duplicated = self.driver.duplicated - duplicated;
        self.begin_anew()
    }

    /// Another backend and a guest that was just booted: neither rings nor backend remember what went wrong.
    fn begin_anew(&mut self) -> anyhow::Result<()> {
        self.backend.kill()?;
        while !self.backend.is_reaped()? {
            pause();
        }
        self.start_backend()?;
        self.connect(Reconnect::AtOnce, now_ns())?;
        self.driver.start()
    }

    /// Starts a backend in the place of one that is gone.
    fn start_backend(&mut self) -> anyhow::Result<()> {
        self.driver.guest.disconnect();
        let _ = std::fs::remove_file(&self.socket);
        self.backend = backend::start(&self.qsd.command_line(&self.socket.display().to_string()))?;
        Ok(())
    }
}

/// Whether nobody listens (yet).
fn is_absent(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<Error>().map(Error::kind);
    matches!(kind, Some(ErrorKind::NotFound | ErrorKind::ConnectionRefused))
}

/// Sleeps, and spins through the last part that a sleep would overrun.
fn sleep_until(instant: u64) {
    const SPIN_NS: u64 = 300_000;
    let left = instant.saturating_sub(now_ns());
    if left > SPIN_NS {
        std::thread::sleep(Duration::from_nanos(left - SPIN_NS));
    }
    while now_ns() < instant {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_socket_is_told_from_other_failures() {
        let missing: anyhow::Result<()> = Err(Error::from(ErrorKind::NotFound)).context("connecting");
        assert!(is_absent(&missing.expect_err("it is one")));
        assert!(!is_absent(&anyhow::anyhow!("refused by the device")));
    }

    #[test]
    fn sleeping_ends_at_the_instant() {
        let instant = now_ns() + 2_000_000;
        sleep_until(instant);
        assert!(now_ns() >= instant);
    }
}
