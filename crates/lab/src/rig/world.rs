//! Broker, guest and load in one thread: everything that happens while the rig waits for something.

use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use warmswap_wire::VirtioFeatures;

use super::broker::Broker;
use super::control::{BackendStatus, DeviceStatus};
use super::halt::Halted;
use super::load::{Load, Pace};
use super::options::SessionChoices;
use super::programs::Programs;
use super::vmm::Behaviour;
use crate::common::rng::Rng;
use crate::guest::{Guest, now_ns};

/// A request in flight for longer is lost.
pub(crate) const LOST_NS: u64 = 10_000_000_000;
/// How long a state of the broker is waited for.
const STATE_NS: u64 = 20_000_000_000;
/// Longest sleep in the loop.
const SLEEP_NS: u64 = 1_000_000;
/// Sleep of a guest that polls.
const POLLING_SLEEP_NS: u64 = 50_000;
/// How long the word that the device is halted may be on its way.
const PENDING_NS: u64 = 500_000_000;
/// How often things that must not happen are looked for.
const LOOK_NS: u64 = 50_000_000;

/// VIRTIO_BLK_F_DISCARD and VIRTIO_BLK_F_WRITE_ZEROES.
const DISCARDS: u64 = 1 << 13 | 1 << 14;

/// The world of one session.
#[derive(Debug)]
pub(crate) struct World {
    /// The broker.
    pub(crate) broker: Broker,
    /// The guest.
    pub(crate) guest: Guest,
    /// Its load.
    pub(crate) load: Load,
    /// How much is submitted now.
    pub(crate) pace: Pace,
    /// Choices that are to repeat: kinds, instants, behaviours.
    pub(crate) choices: Rng,
    /// The guest's choices.
    pub(crate) session: SessionChoices,
    /// What its VMM may do.
    pub(crate) behaviours: Vec<Behaviour>,
    /// Say everything that is done.
    verbose: bool,
    /// Settled failovers the rig knows of.
    pub(crate) settled: u64,
    /// The broker is killed as well, and its keeper starts another one.
    pub(crate) kills_broker: bool,
    /// The programs that take turns as the broker, where it is upgraded and not killed.
    pub(crate) programs: Option<Programs>,
    /// A backend was killed where it need not lead to a failover: take the broker's count as it is next time.
    pub(crate) resynchronise: bool,
    looked_ns: u64,
}

impl World {
    /// Boots a guest of `session` on the broker's device.
    pub(crate) fn new(
        broker: Broker,
        mut load: Load,
        choices: Rng,
        session: SessionChoices,
        behaviours: &[Behaviour],
        verbose: bool,
        socket: PathBuf,
    ) -> anyhow::Result<Self> {
        let guest = boot(&session, &mut load, socket)?;
        Ok(World {
            broker,
            guest,
            load,
            pace: Pace::Trickle,
            choices,
            session,
            behaviours: behaviours.to_vec(),
            verbose,
            settled: 0,
            kills_broker: false,
            programs: None,
            resynchronise: false,
            looked_ns: now_ns(),
        })
    }

    /// Says what is done, with the time, where that is wanted.
    pub(crate) fn say(&self, what: impl std::fmt::Display) {
        if self.verbose {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
            eprintln!("  {:02}.{:06} {what}", now.tv_sec % 60, now.tv_nsec / 1000);
        }
    }

    /// Boots another guest in the place of the one that is gone.
    pub(crate) fn boot_again(&mut self) -> anyhow::Result<()> {
        let socket = self.guest.options().socket.clone();
        self.guest = boot(&self.session, &mut self.load, socket)?;
        Ok(())
    }

    /// Shuts the guest down in order: nothing in flight, rings stopped, all its memory looked at, disconnected.
    pub(crate) fn shut_down(&mut self) -> anyhow::Result<()> {
        self.quiesce()?;
        self.guest.stop()?;
        self.load.look_everywhere(&self.guest)?;
        ensure!(self.load.verdict.is_clean(), "the oracle found something");
        self.guest.disconnect();
        Ok(())
    }

    /// One turn: judge, submit, listen to the broker, sleep until something comes (at most until `until_ns`).
    pub(crate) fn turn(&mut self, watch: bool, until_ns: u64) -> anyhow::Result<()> {
        self.load.service(&mut self.guest, self.pace);
        ensure!(self.load.verdict.is_clean(), "the oracle found something");
        self.broker.tick(watch)?;
        if let Some(halted) = self.broker.take_halt() {
            return Err(halted.into());
        }
        let now = now_ns();
        if now > self.looked_ns + LOOK_NS {
            self.looked_ns = now;
            self.look(now)?;
        }
        let longest = if self.session.polling { POLLING_SLEEP_NS } else { SLEEP_NS };
        self.sleep(until_ns.saturating_sub(now).min(longest));
        Ok(())
    }

    fn look(&mut self, now: u64) -> anyhow::Result<()> {
        self.broker.must_live()?;
        self.load.look_at_trap();
        if self.guest.is_connected() {
            self.guest.front()?.serve_backend()?;
        }
        if self.load.oldest_ns(&self.guest).is_some_and(|oldest| now.saturating_sub(oldest) > LOST_NS) {
            self.load.give_up(&mut self.guest, "no answer in time");
            bail!("requests were lost");
        }
        Ok(())
    }

    fn sleep(&self, nanoseconds: u64) {
        let mut fds = Vec::with_capacity(12);
        if !self.session.polling {
            fds.extend(
                self.guest.queues.iter().map(|queue| PollFd::from_borrowed_fd(queue.call_fd().as_fd(), PollFlags::IN)),
            );
        }
        fds.extend(self.broker.fds().into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = Timespec { tv_sec: 0, tv_nsec: nanoseconds.cast_signed() };
        // An interrupted sleep is a short one.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
    }

    /// Lets the load run for `nanoseconds`.
    pub(crate) fn run_for(&mut self, nanoseconds: u64) -> anyhow::Result<()> {
        let until = now_ns() + nanoseconds;
        while now_ns() < until {
            self.turn(false, until)?;
        }
        // The last turn ended with a sleep: a real driver would have answered by now what woke it.
        self.load.service(&mut self.guest, self.pace);
        Ok(())
    }

    /// Runs until `done` says so. `what` names the state for the report if it never comes.
    pub(crate) fn run_until(
        &mut self,
        what: &str,
        watch: bool,
        mut done: impl FnMut(&mut World) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = now_ns() + STATE_NS;
        while !done(self)? {
            ensure!(now_ns() < deadline, "waited {} s in vain for {what}", STATE_NS / 1_000_000_000);
            self.turn(watch, deadline)?;
        }
        Ok(())
    }

    /// Runs until the broker's status, asked for from now on, is as `wanted`; returns it.
    pub(crate) fn run_until_status(
        &mut self,
        what: &str,
        wanted: impl Fn(&DeviceStatus) -> bool,
    ) -> anyhow::Result<DeviceStatus> {
        let since = now_ns();
        let is = |world: &World| world.broker.status_since(since).filter(|status| wanted(status)).cloned();
        self.run_until(what, true, |world| Ok(is(world).is_some()))?;
        Ok(is(self).expect("run_until returned with it"))
    }

    /// Stops submitting and waits until nothing is in flight.
    pub(crate) fn quiesce(&mut self) -> anyhow::Result<()> {
        self.pace = Pace::Quiet;
        self.run_until("the requests in flight", false, |world| Ok(world.load.outstanding(&world.guest) == 0))
    }

    /// Asks the broker whether the pair is whole. For times without a guest.
    pub(crate) fn broker_is_protected(&mut self) -> anyhow::Result<bool> {
        let since = now_ns();
        while self.broker.status_since(since).is_none() {
            self.broker.tick(true)?;
            ensure!(now_ns() < since + STATE_NS, "the broker does not answer");
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        let status = self.broker.status_since(since).expect("the loop waited for it");
        let has_process = |backend: &Option<BackendStatus>| backend.as_ref().is_some_and(|it| it.pid.is_some());
        let ready = status.shadow.as_ref().is_some_and(|shadow| shadow.state == "ready");
        Ok(ready && has_process(&status.primary))
    }

    /// A halt that has come, if one comes soon: the guest may learn that it gets no service before the rig learns why.
    pub(crate) fn pending_halt(&mut self) -> anyhow::Result<Option<Halted>> {
        let deadline = now_ns() + PENDING_NS;
        while now_ns() < deadline {
            self.broker.tick(true)?;
            if let Some(halted) = self.broker.take_halt() {
                return Ok(Some(halted));
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        Ok(None)
    }

    /// Requests the device holds at this instant, by the indices in the rings.
    pub(crate) fn held_by_device(&self) -> u64 {
        self.guest.queues.iter().map(|queue| u64::from(queue.vring().held_by_device())).sum()
    }
}

fn boot(session: &SessionChoices, load: &mut Load, socket: PathBuf) -> anyhow::Result<Guest> {
    let mut guest = Guest::new(session.guest(socket))?;
    guest.connect()?;
    let front = guest.front()?;
    let indirect = front.has(VirtioFeatures::INDIRECT_DESC.bits());
    load.set_mix(session.mix(front.has(DISCARDS)));
    let sectors = guest.config()?.sectors;
    ensure!(sectors == load.blocks() * 8, "the device has {sectors} sectors, the image {}", load.blocks() * 8);
    load.attach(&mut guest, indirect)?;
    guest.start()?;
    Ok(guest)
}
