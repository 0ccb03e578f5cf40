//! One run: a ring, and the back-ends that serve it one after the other until one gets to the end.
//!
//! ```text
//! Starting ─▶ Serving ─▶ Stopping ─▶ done
//!    └───────────┴───────────┴─ killed ─▶ the next back-end, Starting
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::backend::Backend;
use super::config::{Base, Chains, Config};
use super::load::{BLOCKS, Damage, Load};
use crate::common::rng::Rng;
use crate::guest::{BLOCK, Guest, Options};

/// Nothing completed for so long: nothing will.
const SILENCE: Duration = Duration::from_secs(3);
/// The same for a control, where that is what is looked for.
const SILENCE_OF_CONTROLS: Duration = Duration::from_millis(30);
/// Most lives of a run: the last is not killed.
pub(super) const LIVES_MAX: usize = 3;

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Back-ends that were killed.
    pub(super) deaths: u64,
    /// Requests that were in flight when they were.
    pub(super) owed: u64,
    /// Requests of the run.
    pub(super) requests: u64,
    /// What went wrong.
    pub(super) damage: Damage,
}

/// How a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Killed,
    /// It completed everything, or came to a standstill, and was stopped in order.
    Stopped,
}

/// A run in progress.
#[derive(Debug)]
struct Run<'a> {
    config: &'a Config,
    guest: Guest,
    load: Load,
    rng: Rng,
    image: PathBuf,
    socket: PathBuf,
    /// The rings have been started once: from then on they are as they are.
    started: bool,
    /// The driver waits for a call: until there is one it looks at nothing.
    asleep: bool,
}

/// Runs the series' load. `stores` says before which store each life ends; what has none ends in order.
pub(super) fn run(config: &Config, stores: &[u64], seed: u64, directory: &Path) -> anyhow::Result<Outcome> {
    let (image, socket) = (directory.join("image"), directory.join("socket"));
    std::fs::File::create(&image)?.set_len(BLOCKS * BLOCK as u64)?;
    let mut rng = Rng::new(seed, config.stream());
    let shape = Load::shape(config, &mut rng);
    let guest = Guest::new(Options {
        socket: socket.clone(),
        memory_bytes: 1 << 20,
        shape,
        event_idx: config.event_idx,
        indirect: config.chains == Chains::Indirect,
        ..Options::default()
    })?;
    let load = Load::new(config, Rng::new(seed, config.stream() | 1 << 32));
    let mut run = Run { config, guest, load, rng, image, socket, started: false, asleep: false };
    run.guest.keep_inflight();
    run.complete(stores)
}

impl Run<'_> {
    fn complete(mut self, stores: &[u64]) -> anyhow::Result<Outcome> {
        assert!(stores.len() < LIVES_MAX, "the last life is not killed");
        let mut outcome = Outcome::default();
        for store in stores.iter().copied().map(Some).chain([None]) {
            let mut backend = Backend::start(self.config, store, &self.image, &self.socket)?;
            let end = self.live(&mut backend).with_context(|| format!("life {}", outcome.deaths + 1))?;
            if end == End::Stopped {
                break;
            }
            ensure!(store.is_some(), "the back-end was killed and nobody had ordered it; {}", backend.words());
            outcome.deaths += 1;
            self.between_lives(&mut outcome);
        }
        self.load.conclude(&self.guest.queues[0], &self.image)?;
        outcome.requests = self.load.submitted;
        outcome.damage = self.load.damage;
        Ok(outcome)
    }

    /// Nobody serves the ring; the driver does not know.
    fn between_lives(&mut self, outcome: &mut Outcome) {
        self.guest.disconnect();
        if !self.config.region {
            self.guest.keep_inflight();
        }
        let queue = &mut self.guest.queues[0];
        outcome.owed += u64::from(queue.vring().held_by_device());
        if self.started && self.rng.percent(50) {
            self.wake();
        }
    }

    /// The driver is awake: it takes what is completed, submits what it has, and asks for a call before it sleeps.
    fn wake(&mut self) {
        let queue = &mut self.guest.queues[0];
        self.asleep = false;
        while !self.asleep {
            queue.disable_calls();
            self.load.take(queue);
            if self.load.submit(queue) {
                queue.kick();
            }
            // What is no entry cannot be taken, and must not be waited on.
            self.asleep = queue.enable_calls() || self.load.damage.duplicated > 0;
        }
    }

    fn live(&mut self, backend: &mut Backend) -> anyhow::Result<End> {
        if !backend.connect(&mut self.guest)? {
            return Ok(End::Killed);
        }
        let lived = match self.start() {
            Ok(()) => self.serve(),
            error => error.map(|()| End::Killed),
        };
        let stopped = match lived {
            Ok(End::Stopped) => self.stop().map(|()| End::Stopped),
            other => other,
        };
        match stopped {
            Ok(End::Stopped) => Ok(End::Stopped),
            Ok(End::Killed) => backend.has_died(&anyhow::anyhow!("its socket was closed")).map(|()| End::Killed),
            Err(error) => backend.has_died(&error).map(|()| End::Killed),
        }
    }

    fn start(&mut self) -> anyhow::Result<()> {
        if self.started {
            let vring = self.guest.queues[0].vring();
            let base = match self.config.base {
                Base::Used => vring.used_idx(),
                Base::Avail => vring.available_idx(),
            };
            self.guest.start_from(&[base])?;
            // Every front-end does: what the driver has kicked may have been taken by who is dead.
            self.guest.queues[0].kick_fd().signal();
        } else {
            self.guest.start()?;
            self.started = true;
        }
        if self.config.base == Base::Used {
            // QEMU unmasks the vectors when the rings run.
            self.guest.mask(0)?;
            self.guest.unmask(0)?;
        }
        Ok(())
    }

    /// Loads the ring until the load is over, nothing comes any more, or the back-end is gone.
    fn serve(&mut self) -> anyhow::Result<End> {
        let silence = if self.config.region { SILENCE } else { SILENCE_OF_CONTROLS };
        loop {
            if !self.asleep {
                self.wake();
            }
            if self.load.is_done(&self.guest.queues[0]) || self.load.damage.duplicated > 0 {
                return Ok(End::Stopped);
            }
            let (called, gone) = self.wait(silence)?;
            if gone {
                return Ok(End::Killed);
            }
            self.asleep = false;
            let vring = self.guest.queues[0].vring();
            if called {
                self.guest.queues[0].call_fd().take();
            } else if vring.used_idx() == vring.taken_idx() {
                return Ok(End::Stopped);
            } else if self.config.region {
                self.load.damage.uncalled += 1;
                self.load.damage.say(format!("completed without a call: {}", vring.describe()));
            }
        }
    }

    /// Waits for a call or the end of the connection.
    fn wait(&self, patience: Duration) -> anyhow::Result<(bool, bool)> {
        let timeout = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
        let (call, connection) = (self.guest.queues[0].call_fd(), self.guest.connection()?);
        let mut fds = [PollFd::new(call, PollFlags::IN), PollFd::new(connection, PollFlags::RDHUP)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout)))?;
        let [called, gone] = [0, 1].map(|at: usize| !fds[at].revents().is_empty());
        Ok((called, gone))
    }

    /// Stops the ring: everything that was taken is completed then, and nothing comes after it.
    fn stop(&mut self) -> anyhow::Result<()> {
        let bases = self.guest.stop()?;
        let queue = &mut self.guest.queues[0];
        self.load.take(queue);
        if queue.vring().outstanding() == 0 && bases[0] != queue.vring().available_idx() {
            self.load.damage.wrong += 1;
            let vring = queue.vring().describe();
            self.load.damage.say(format!("the ring was stopped at {}, and it is: {vring}", bases[0]));
        }
        Ok(())
    }
}
