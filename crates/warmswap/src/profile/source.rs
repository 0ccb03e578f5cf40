//! What a source of a profile is, and what the sources share.
//!
//! A source is called at every tick and reads as much as it was told to. What it counts, it counts from one reading to the next, over the
//! time between them: a counter that was left unread for ten ticks covers ten ticks when it is read.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use warmswap_predict::{Counter, Feature, Measure, Summary};

/// What is read once a second when ticks are shorter than that: it costs more, or says no more when it is read more often.
pub(super) const SLOW_S: f64 = 0.95;

/// What is measured of one backend process.
#[derive(Debug)]
pub(crate) struct Subject {
    /// Its number, which is another process's once it has ended and was collected.
    pub(crate) pid: u32,
    /// The process itself.
    pub(crate) pidfd: Arc<OwnedFd>,
    /// Directory of the version 2 control group that it was put into, where it has one of its own. Those of version 1, and what it was
    /// put into by others, are found where the kernel tells them.
    pub(crate) group: Option<PathBuf>,
    /// What it does its I/O on.
    pub(crate) images: Vec<Image>,
}

impl Subject {
    /// Whether the process has ended, or nobody knows. What was read under its number before it ended is its own.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        !matches!(rustix::event::poll(&mut fds, Some(&none)), Ok(0))
    }

    /// What is needed to look at it again, without anything open but the process, which others have open as well.
    pub(crate) fn rest(&self) -> Resting {
        Resting {
            pid: self.pid,
            pidfd: Arc::clone(&self.pidfd),
            group: self.group.clone(),
            images: self.images.iter().filter_map(Image::name).collect(),
        }
    }
}

/// A subject that nobody looks at.
#[derive(Debug)]
pub(crate) struct Resting {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    group: Option<PathBuf>,
    /// Each with the device and number of its file.
    images: Vec<(PathBuf, (u64, u64))>,
}

impl Resting {
    /// The subject again. An image that has another file in its place by now is left out.
    pub(crate) fn wake(&self) -> Subject {
        let images = self.images.iter().filter_map(|(path, file)| {
            let image = Image::at(path).ok()?;
            (image.file() == Some(*file)).then_some(image)
        });
        Subject { pid: self.pid, pidfd: Arc::clone(&self.pidfd), group: self.group.clone(), images: images.collect() }
    }
}

/// A file or block device that a backend does its I/O on.
#[derive(Debug)]
pub(crate) struct Image(OwnedFd);

impl Image {
    /// Any descriptor of the file will do, one that can only name it as well.
    #[cfg(test)]
    pub(crate) fn new(file: OwnedFd) -> Self {
        Image(file)
    }

    /// Takes hold of a file without opening it: nothing is read, nothing is locked.
    pub(crate) fn at(path: &Path) -> std::io::Result<Self> {
        Ok(Image(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Device and number of the file.
    fn file(&self) -> Option<(u64, u64)> {
        rustix::fs::fstat(&self.0).ok().map(|stat| (stat.st_dev, stat.st_ino))
    }

    /// Where the file is found again.
    fn name(&self) -> Option<(PathBuf, (u64, u64))> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", self.0.as_raw_fd())).ok()?;
        Some((path, self.file()?))
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How much a source may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Effort {
    /// As good as nothing: the component is idle.
    Light,
    /// What changes with the work: once a second, or at each tick of a busy component.
    Full,
    /// What changes slowly and is costly to know as well: every ten seconds or so.
    Deep,
}

/// Where a part of a profile comes from.
pub(crate) trait Source: Send {
    /// Adds what was seen in the `span_s` seconds since the last call to `into`. What cannot be read is left out.
    fn measure(&mut self, span_s: f64, effort: Effort, into: &mut Measure);
}

/// The time of a source: the sum of the spans it was told.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Time {
    now_s: f64,
}

impl Time {
    /// Goes on by a span.
    pub(super) fn pass(&mut self, span_s: f64) {
        if span_s.is_finite() && span_s > 0.0 {
            self.now_s += span_s;
        }
    }

    /// Seconds since the source began.
    pub(super) fn now_s(self) -> f64 {
        self.now_s
    }
}

/// Something that is done not more often than once in a while.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Due {
    at_s: f64,
}

impl Due {
    /// Whether it is due.
    pub(super) fn is_due(self, time: Time) -> bool {
        time.now_s >= self.at_s
    }

    /// Not before so many seconds have passed.
    pub(super) fn in_s(&mut self, time: Time, seconds: f64) {
        self.at_s = time.now_s + seconds;
    }
}

/// A counter with the time at which it was last read.
#[derive(Debug, Default)]
pub(super) struct Rate {
    counter: Counter,
    read_s: Option<f64>,
}

impl Rate {
    /// What was counted since the last reading, and in how many seconds. A reading without time between is put off, not lost.
    pub(super) fn since(&mut self, value: u64, time: Time) -> Option<(f64, f64)> {
        let seconds = time.now_s - self.read_s.unwrap_or(0.0);
        if self.read_s.is_some() && seconds <= 0.0 {
            return None;
        }
        self.read_s = Some(time.now_s);
        self.counter.since(value).map(|count| (count as f64, seconds))
    }
}

/// What was seen of a process, held back until it is sure that it was that process.
#[derive(Debug, Default)]
pub(super) struct Held(Vec<(Feature, f64, f64)>);

impl Held {
    /// A count and what it is related to, as [`Measure::add`] takes it.
    pub(super) fn add(&mut self, feature: Feature, seen: Option<(f64, f64)>) {
        self.0.extend(seen.map(|(count, to)| (feature, count, to)));
    }

    /// The same in a unit of which there are `per` in one.
    pub(super) fn add_scaled(&mut self, feature: Feature, seen: Option<(f64, f64)>, per: f64) {
        self.add(feature, seen.map(|(count, to)| (count / per, to)));
    }

    /// A value, as [`Measure::note`] takes it.
    pub(super) fn note(&mut self, feature: Feature, value: Option<f64>) {
        self.0.extend(value.map(|value| (feature, value, 1.0)));
    }

    /// Gives it out and keeps it.
    pub(super) fn give(&self, into: &mut Measure) {
        for (feature, count, to) in self.0.iter().copied() {
            match feature.spec().summary {
                Summary::Ratio => into.add(feature, count, to),
                Summary::Max | Summary::Last | Summary::Quantile(..) => into.note(feature, count),
            }
        }
    }

    /// Gives it out once.
    pub(super) fn release(&mut self, into: &mut Measure) {
        self.give(into);
        self.forget();
    }

    /// Forgets it.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::process::tests::{Sleeper, pid_of};

    #[test]
    fn what_rests_has_nothing_open_but_the_process_and_an_image_is_found_again_if_it_is_the_same() {
        let child = Sleeper::start();
        let pidfd = rustix::process::pidfd_open(pid_of(child.pid()), rustix::process::PidfdFlags::empty());
        let path = std::env::temp_dir().join(format!("warmswap-resting-{}", std::process::id()));
        std::fs::write(&path, "one").expect("a temporary file");
        let images = vec![Image::at(&path).expect("just made")];
        let pidfd = Arc::new(pidfd.expect("it lives"));
        let subject = Subject { pid: child.pid(), pidfd: Arc::clone(&pidfd), group: None, images };
        let resting = subject.rest();
        drop(subject);
        assert_eq!(Arc::strong_count(&pidfd), 2);
        let again = resting.wake();
        assert_eq!((again.pid, again.images.len(), again.has_ended()), (child.pid(), 1, false));
        drop(again);
        let other = path.with_extension("other");
        std::fs::write(&other, "two").and_then(|()| std::fs::rename(&other, &path)).expect("a temporary file");
        assert_eq!(resting.wake().images.len(), 0, "another file has its name");
        std::fs::remove_file(&path).expect("it is there");
    }

    #[test]
    fn a_rate_covers_all_the_time_since_its_last_reading() {
        let (mut rate, mut time) = (Rate::default(), Time::default());
        assert_eq!(rate.since(100, time), None, "the first one");
        (0..10).for_each(|_| time.pass(0.125));
        assert_eq!(rate.since(110, time), Some((10.0, 1.25)));
        assert_eq!(rate.since(120, time), None, "no time has passed");
        time.pass(f64::NAN);
        time.pass(-1.0);
        time.pass(0.5);
        assert_eq!(rate.since(130, time), Some((20.0, 0.5)), "and nothing was lost");
        time.pass(1.0);
        assert_eq!(rate.since(3, time), None, "another counter");
        time.pass(1.0);
        assert_eq!(rate.since(4, time), Some((1.0, 1.0)));
    }

    #[test]
    fn what_is_held_back_is_given_out_once_or_never() {
        let (mut held, mut measure) = (Held::default(), Measure::default());
        held.add(Feature::Cpu, Some((1.0, 2.0)));
        held.add(Feature::RunDelay, None);
        held.forget();
        held.release(&mut measure);
        assert_eq!(measure, Measure::default());
        held.add(Feature::Cpu, Some((1.0, 2.0)));
        held.note(Feature::Rss, Some(4.0));
        held.note(Feature::RssAnon, None);
        held.release(&mut measure);
        held.release(&mut measure);
        let values = [Feature::Cpu, Feature::Rss, Feature::RssAnon].map(|feature| measure.value(feature));
        assert_eq!(values, [Some(0.5), Some(4.0), None]);
    }
}
