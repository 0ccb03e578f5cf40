//! One broker's life: several guests after each other, failovers under load, and at the end nothing left over.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::broker::{Broker, Setup};
use super::failover;
use super::halt;
use super::kind::Kind;
use super::ledger::Ledger;
use super::load::Load;
use super::options::{EpochChoices, Fixed, SessionChoices};
use super::process::{Holdings, reap_orphans};
use super::programs::Programs;
use super::progress::Progress;
use super::tally::Tally;
use super::vmm::{self, Behaviour};
use super::world::World;
use crate::common::interrupt;
use crate::common::rng::Rng;
use crate::guest::{BLOCK, now_ns};

/// Failovers of one guest.
const SESSION_FAILOVERS: u64 = 50;
/// Refusals and halts after each other with which a broker has stopped to do its work.
const REFUSED_IN_A_ROW_MAX: u64 = 100;
/// Growth of private memory over an epoch that counts as a leak.
const GROWTH_MAX_BYTES: u64 = 2 << 20;
/// How long holdings may take to return to what they were.
const SETTLE_TRIES: u32 = 200;

/// What an epoch is given.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// Seed of the run.
    pub(crate) seed: u64,
    /// Number of the epoch.
    pub(crate) epoch: u64,
    /// Failovers it lasts.
    pub(crate) failovers: u64,
    /// Kinds to inject.
    pub(crate) kinds: &'a [Kind],
    /// What the VMM may do.
    pub(crate) behaviours: &'a [Behaviour],
    /// Values the command line fixes.
    pub(crate) fixed: Fixed,
    /// Directory for image and sockets.
    pub(crate) directory: &'a Path,
    /// Whether the directory's file system has O_DIRECT.
    pub(crate) direct_possible: bool,
    /// More options for `guard`.
    pub(crate) guard: &'a [String],
    /// The broker is killed as well.
    pub(crate) kills_broker: bool,
    /// Another build of this program, which the broker is replaced by, and back.
    pub(crate) upgrade: Option<&'a Path>,
    /// Say the options of every guest and everything that is done.
    pub(crate) verbose: bool,
}

impl Plan<'_> {
    /// Stream `number` of this epoch's random numbers.
    fn stream(&self, number: u64) -> Rng {
        Rng::new(self.seed, self.epoch * 16 + number)
    }

    fn image(&self) -> PathBuf {
        self.directory.join("image")
    }
}

/// Runs one epoch. The tally has what was seen even where it fails.
pub(crate) fn run(plan: &Plan<'_>, tally: &mut Tally, progress: &mut Progress) -> anyhow::Result<()> {
    let mut options = plan.stream(0);
    let choices = EpochChoices::draw(&mut options, plan.direct_possible);
    eprintln!("epoch {}: {}", plan.epoch, serde_json::to_string(&choices)?);
    let file = std::fs::File::create(plan.image()).context("creating the image")?;
    file.set_len(choices.image_blocks * BLOCK as u64)?;
    let programs = plan.upgrade.map(|other| Programs::new(plan.directory, other)).transpose()?;
    let setup = Setup {
        directory: plan.directory.to_owned(),
        hang_ms: choices.hang_ms,
        backend: choices.command_line(plan.fixed.backends, plan.image()),
        extra: plan
            .fixed
            .backends
            .guard()
            .iter()
            .map(|it| (*it).to_owned())
            .chain(on_prediction(plan.kinds))
            .chain(plan.guard.iter().cloned())
            .collect(),
        kept: plan.kills_broker || plan.upgrade.is_some(),
        program: programs.as_ref().map(Programs::path),
    };
    let broker = Broker::start(&setup)?;
    let device = 1 + plan.epoch as u32;
    let blocks = usize::try_from(choices.image_blocks)?;
    let session = next_session(plan, &mut options, &choices)?;
    let load = Load::new(Ledger::new(device, blocks), plan.stream(2), session.mix(false));
    let socket = broker.socket();
    let mut world = World::new(broker, load, plan.stream(1), session, plan.behaviours, plan.verbose, socket)?;
    world.kills_broker = plan.kills_broker || plan.upgrade.is_some();
    world.programs = programs;
    let ended = sessions(plan, &choices, &mut options, &mut world, tally, progress);
    tally.requests += world.load.completed;
    let World { mut broker, mut load, .. } = match ended {
        Ok(()) => world,
        Err(error) => {
            tally.verdict.add(&world.load.verdict);
            let words = world.broker.last_words();
            let rings: Vec<String> = world.guest.queues.iter().map(|queue| queue.vring().describe()).collect();
            return Err(error.context(format!("rings:\n{}\n{words}", rings.join("\n"))));
        }
    };
    while let Some(halted) = broker.take_halt() {
        eprintln!("  HALTED when the last guest was gone: {}", halted.reason);
        tally.halt(&halted.reason);
    }
    broker.end()?;
    for orphan in reap_orphans(plan.directory)? {
        tally.leaks += 1;
        tally.verdict.note(|| format!("the broker left a process behind: {orphan}"));
    }
    let checked = load.check_image(&plan.image());
    tally.verdict.add(&load.verdict);
    checked
}

fn next_session(plan: &Plan<'_>, options: &mut Rng, choices: &EpochChoices) -> anyhow::Result<SessionChoices> {
    let session = SessionChoices::draw(options, choices, plan.fixed);
    if plan.verbose {
        eprintln!("  guest: {}", serde_json::to_string(&session)?);
    }
    Ok(session)
}

/// Guest after guest until the epoch's failovers are done.
fn sessions(
    plan: &Plan<'_>,
    choices: &EpochChoices,
    options: &mut Rng,
    world: &mut World,
    tally: &mut Tally,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let end = tally.failovers + plan.failovers;
    let mut baseline = None;
    loop {
        let session_end = end.min(tally.failovers + SESSION_FAILOVERS);
        while tally.failovers < session_end && !interrupt::is_asked() {
            let step = one_failover(plan, world, tally);
            halt::recover(step, world, tally)?;
            progress.say(tally);
            let refused = tally.refused_in_a_row;
            ensure!(refused < REFUSED_IN_A_ROW_MAX, "{refused} failovers in a row were refused");
        }
        let down = world.shut_down();
        if down.is_err() {
            halt::recover(down, world, tally)?;
            world.shut_down()?;
        }
        let now = holdings(world, baseline.as_ref())?;
        tally.broker_rss_max_bytes = tally.broker_rss_max_bytes.max(now.rss_bytes);
        match &baseline {
            None => baseline = Some(now),
            Some(before) => count_leaks(before, &now, tally),
        }
        if tally.failovers >= end || interrupt::is_asked() {
            return Ok(());
        }
        world.session = next_session(plan, options, choices)?;
        world.boot_again()?;
    }
}

/// What the VMM does before, and the failover.
fn one_failover(plan: &Plan<'_>, world: &mut World, tally: &mut Tally) -> anyhow::Result<()> {
    failover::impatient(world, tally)?;
    let started = now_ns();
    vmm::between_failovers(world, tally)?;
    tally.waited("vmm", now_ns() - started);
    let kind = draw_kind(plan.kinds, &mut world.choices);
    failover::inject(world, kind, tally).with_context(|| {
        format!("failover {} (of the run), kind {kind}, guest {:?}", tally.failovers + 1, world.session)
    })
}

/// What the broker holds without a VMM, once its pair is whole again. With `baseline`, waits a while for it to come back to
/// that.
fn holdings(world: &mut World, baseline: Option<&Holdings>) -> anyhow::Result<Holdings> {
    let mut now = Holdings::default();
    for left in (0..SETTLE_TRIES).rev() {
        let whole = world.broker_is_protected()?;
        match held(world) {
            Ok(held) => now = held,
            // A failpoint that was left has killed it just now: the next one holds things.
            Err(_) if world.kills_broker && left > 0 => {
                std::thread::sleep(std::time::Duration::from_millis(5));
                continue;
            }
            Err(error) => return Err(error),
        }
        if whole && now.zombies == 0 && baseline.is_none_or(|before| excess(before, &now) == 0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(now)
}

fn held(world: &World) -> anyhow::Result<Holdings> {
    let mut held = Holdings::of(world.broker.broker_pid()?)?;
    if world.kills_broker {
        held.and_keeper(&Holdings::of(world.broker.keeper_pid())?);
    }
    Ok(held)
}

/// How many things more a broker holds than before. One more descriptor of a kind may be something made on first use and kept;
/// two more are a leak.
fn excess(before: &Holdings, now: &Holdings) -> usize {
    let more_of_kind = now
        .fd_kinds
        .iter()
        .map(|(kind, count)| count.saturating_sub(before.fd_kinds.get(kind).copied().unwrap_or(0)).saturating_sub(1));
    let grown = now.anonymous_bytes > before.anonymous_bytes + GROWTH_MAX_BYTES;
    more_of_kind.sum::<usize>() + now.children.saturating_sub(before.children) + now.zombies + usize::from(grown)
}

/// Counts what the broker holds more than after the epoch's first guest.
fn count_leaks(before: &Holdings, now: &Holdings, tally: &mut Tally) {
    let leaks = excess(before, now);
    if leaks > 0 {
        tally.leaks += leaks as u64;
        tally.verdict.note(|| format!("the broker holds more than before: {now:?}, before {before:?}"));
    }
}

/// Predictions are made up where they are wanted, and those of the model are left alone elsewhere.
fn on_prediction(kinds: &[Kind]) -> Vec<String> {
    let options: &[&str] = match kinds.contains(&Kind::Predicted) {
        true => &["--predicted-per-hour", "1000000", "--cool-down", "0"],
        false => &["--observe"],
    };
    options.iter().map(|option| (*option).to_owned()).collect()
}

fn draw_kind(kinds: &[Kind], rng: &mut Rng) -> Kind {
    let total = kinds.iter().map(|kind| kind.weight()).sum();
    let mut draw = rng.below(total);
    for kind in kinds {
        if draw < kind.weight() {
            return *kind;
        }
        draw -= kind.weight();
    }
    unreachable!("the draw is below the sum of the weights")
}

/// Whether the file system of `directory` has O_DIRECT.
pub(crate) fn has_direct(directory: &Path) -> anyhow::Result<bool> {
    use rustix::fs::{Mode, OFlags};
    let path = directory.join("probe");
    std::fs::write(&path, [0; BLOCK])?;
    let opened = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty());
    std::fs::remove_file(&path)?;
    Ok(opened.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_drawn() {
        let kinds = [Kind::Crash, Kind::Stop, Kind::Poison];
        let mut rng = Rng::new(1, 1);
        let drawn: std::collections::BTreeSet<Kind> = (0..1000).map(|_| draw_kind(&kinds, &mut rng)).collect();
        assert_eq!(drawn.len(), kinds.len());
    }

    #[test]
    fn more_descriptors_processes_or_memory_are_leaks() {
        let fds = |sockets| std::collections::BTreeMap::from([("socket:[]".to_owned(), sockets)]);
        let before = Holdings { fd_kinds: fds(20), children: 2, ..Holdings::default() };
        let leaks = |now: Holdings| {
            let mut tally = Tally::default();
            count_leaks(&before, &now, &mut tally);
            tally.leaks
        };
        assert_eq!(leaks(before.clone()), 0);
        assert_eq!(leaks(Holdings { fd_kinds: fds(21), ..before.clone() }), 0);
        assert_eq!(leaks(Holdings { fd_kinds: fds(23), ..before.clone() }), 2);
        assert_eq!(leaks(Holdings { zombies: 1, children: 3, ..before.clone() }), 2);
        assert_eq!(leaks(Holdings { anonymous_bytes: 3 << 20, ..before.clone() }), 1);
    }
}
