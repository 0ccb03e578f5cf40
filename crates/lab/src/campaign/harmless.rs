//! What happens to a healthy backend, and harms nobody: at what times, and how.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::process::Signal;

use super::GROUPS;
use super::guest::Event;
use super::inject::{Rival, drop_cache};
use super::kind::Harmless;
use crate::common::cgroup::Group;
use crate::common::process::Target;
use crate::common::rng::Rng;

/// Something that happens beside the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Aside {
    /// Somebody else computes from now on.
    Hog,
    /// And rests.
    Calm,
    /// Somebody reads the whole image.
    Backup,
    /// The page cache forgets it.
    DropCache,
    /// It grows.
    Grow,
    /// The broker stands still for so many milliseconds.
    StopBroker(u64),
}

/// What happens in a run, by the time since it began, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Timetable {
    /// To the guest.
    pub(super) guest: Vec<(u64, Event)>,
    /// Beside it.
    pub(super) aside: Vec<(u64, Aside)>,
}

/// Draws what happens between `from` and `to`.
pub(super) fn timetable(what: Harmless, from_ms: u64, to_ms: u64, rng: &mut Rng) -> Timetable {
    let mut table = Timetable::default();
    let mut at = from_ms;
    while at + 500 < to_ms {
        match what {
            Harmless::Steady => {}
            Harmless::LoadSteps => {
                let factor = [0.25, 0.5, 1.0, 1.5, 2.0, 2.5][rng.below(6) as usize];
                table.guest.push((at, Event::Speed(factor)));
            }
            Harmless::MixChanges => table.guest.push((at, Event::Writes(rng.below(100)))),
            Harmless::Bursts => {
                table.guest.push((at, Event::Speed(0.05)));
                table.guest.push((at + 1_000, Event::Speed(2.0)));
                table.guest.push((at + 1_000 + rng.between(200, 600), Event::Speed(1.0)));
            }
            Harmless::Neighbour => {
                table.aside.push((at, Aside::Hog));
                table.aside.push((at + rng.between(600, 1_800), Aside::Calm));
            }
            Harmless::Backup => table.aside.push((at, Aside::Backup)),
            Harmless::Reboot => table.guest.push((at, Event::Reboot)),
            Harmless::DropCache => table.aside.push((at, Aside::DropCache)),
            Harmless::Resize => table.aside.push((at, Aside::Grow)),
            Harmless::StoppedSampler => table.aside.push((at, Aside::StopBroker(rng.between(300, 1_000)))),
            Harmless::Configuration => {
                let event = rng.choose(&[Event::Mask, Event::ReplaceCall, Event::PlugMemory]);
                table.guest.push((at, event));
            }
        }
        at += rng.between(2_000, 3_500);
    }
    table
}

/// Does what happens beside a guest.
#[derive(Debug)]
pub(super) struct Neighbour<'a> {
    pub(super) name: &'a str,
    pub(super) image: &'a Path,
    pub(super) broker: u32,
    hog: Option<(Rival, Group)>,
}

impl<'a> Neighbour<'a> {
    /// Does nothing yet.
    pub(super) fn new(name: &'a str, image: &'a Path, broker: u32) -> Self {
        Neighbour { name, image, broker, hog: None }
    }

    /// Does it. May take a while.
    pub(super) fn act(&mut self, aside: Aside) -> anyhow::Result<()> {
        match aside {
            Aside::Hog => {
                let group = Group::new("cpu", GROUPS, &format!("{}.hog", self.name))?;
                // The least there is.
                group.write("cpu.shares", "2")?;
                let hog = Rival::start()?;
                group.add(hog.pid())?;
                self.hog = Some((hog, group));
            }
            Aside::Calm => self.hog = None,
            Aside::Backup => back_up(self.image)?,
            Aside::DropCache => drop_cache(self.image)?,
            Aside::Grow => {
                let file = File::options().write(true).open(self.image)?;
                file.set_len(file.metadata()?.len() + (4 << 20)).context("the image grows")?;
            }
            Aside::StopBroker(ms) => {
                let broker = Target::open(self.broker)?;
                broker.signal(Signal::STOP)?;
                std::thread::sleep(Duration::from_millis(ms));
                broker.signal(Signal::CONT)?;
            }
        }
        Ok(())
    }
}

/// Reads an image from its beginning to its end, not faster than a few hundred megabytes per second.
fn back_up(image: &Path) -> anyhow::Result<()> {
    let mut file = File::open(image)?;
    let mut piece = vec![0; 1 << 20];
    while file.read(&mut piece)? > 0 {
        std::thread::sleep(Duration::from_millis(4));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_happens_in_order_and_within_its_time() {
        use Harmless::{
            Backup, Bursts, Configuration, DropCache, LoadSteps, MixChanges, Reboot, Resize, Steady, StoppedSampler,
        };
        for what in [
            LoadSteps,
            MixChanges,
            Bursts,
            Harmless::Neighbour,
            Backup,
            Reboot,
            DropCache,
            Resize,
            StoppedSampler,
            Configuration,
        ] {
            let table = timetable(what, 5_000, 25_000, &mut Rng::new(3, 1));
            let guest: Vec<u64> = table.guest.iter().map(|(at, _)| *at).collect();
            let aside: Vec<u64> = table.aside.iter().map(|(at, _)| *at).collect();
            assert!(guest.len() + aside.len() >= 5, "{what:?}");
            assert!(guest.is_sorted() && aside.is_sorted(), "{what:?}");
            assert!(guest.iter().chain(&aside).all(|at| (5_000..27_000).contains(at)), "{what:?}");
        }
        let nothing = timetable(Steady, 5_000, 25_000, &mut Rng::new(3, 1));
        assert!(nothing.guest.is_empty() && nothing.aside.is_empty());
    }
}
