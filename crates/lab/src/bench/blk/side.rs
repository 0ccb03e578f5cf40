//! A backend with its guest, and the search for QSD's best mode.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::cell::Cell;
use super::image::Image;
use super::memory::Memory;
use super::pairs::Figures;
use crate::bench::backend::{self, Bare};
use crate::bench::driver::{Driver, Shape};
use crate::bench::spread::rounded;
use crate::bench::throughput::{self, Waiting};
use crate::bench::usage;
use crate::common::blk::Blk;
use crate::common::interrupt;
use crate::common::process::Target;
use crate::common::qsd::{Aio, Qsd};
use crate::common::rng::Rng;

/// A way QSD can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mode {
    aio: Aio,
    /// The export has a thread of its own, with QSD's own default of polling.
    iothread: bool,
}

impl Mode {
    /// All there are. Native asynchronous I/O wants O_DIRECT.
    fn all(direct: bool) -> Vec<Mode> {
        let mut modes = Vec::new();
        for aio in [Aio::Threads, Aio::IoUring, Aio::Native] {
            if aio != Aio::Native || direct {
                modes.extend([false, true].map(|iothread| Mode { aio, iothread }));
            }
        }
        modes
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.aio {
            Aio::Threads => "threads",
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
        })?;
        f.write_str(if self.iothread { "+iothread" } else { "" })
    }
}

/// A backend and its guest.
#[derive(Debug)]
pub(super) struct Side {
    /// What it is called in the report.
    pub(super) name: String,
    /// How QSD is run, if it is one.
    pub(super) mode: Option<Mode>,
    /// The guest.
    pub(super) driver: Driver,
    backend: Bare,
    /// What the backend says.
    log: PathBuf,
    /// Its process, if it has to be stopped while others run.
    stopped: Option<Target>,
}

impl Side {
    /// Lets it run, for one that polls without end.
    pub(super) fn wake(&self) -> anyhow::Result<()> {
        self.stopped.as_ref().map_or(Ok(()), |process| process.signal(Signal::CONT))
    }

    /// Stops it, for one that polls without end.
    pub(super) fn suspend(&self) -> anyhow::Result<()> {
        self.stopped.as_ref().map_or(Ok(()), |process| process.signal(Signal::STOP))
    }

    /// One run. The load goes on afterwards.
    pub(super) fn run(&mut self, waiting: Waiting, seconds: f64) -> anyhow::Result<Figures> {
        let before = self.processor_ns()?;
        let run = throughput::measure(&mut self.driver, waiting, seconds);
        let run = run.with_context(|| format!("measuring {}, which said: {}", self.name, told(&self.log)))?;
        Ok(Figures::of_run(&run, self.processor_ns()? - before))
    }

    /// The engine that blk says it has.
    pub(super) fn engine(&self) -> Option<String> {
        engine_in(&told(&self.log)).map(str::to_owned)
    }

    /// Processor time of the backend so far.
    pub(super) fn processor_ns(&self) -> anyhow::Result<u64> {
        usage::process_ns(self.backend.pid())
    }
}

/// What a backend said so far.
fn told(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_else(|error| error.to_string()).trim().to_owned()
}

/// The engine in what blk says of itself when it starts: `…, engine uring; …`.
fn engine_in(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once(", engine ")?;
    rest.split([';', ',', '\n']).next()
}

/// Starts sides for one cell.
pub(super) struct Guests<'a> {
    /// Where their sockets are.
    pub(super) directory: PathBuf,
    /// The cell.
    pub(super) cell: Cell,
    /// The image.
    pub(super) image: &'a Image,
    /// Its memory.
    pub(super) memory: Memory,
    /// Every guest asks for the same.
    pub(super) seed: u64,
}

impl Guests<'_> {
    /// QSD in a mode.
    pub(super) fn start_qsd(&mut self, name: &str, mode: Mode) -> anyhow::Result<Side> {
        let (image, queues) = (self.image.path.clone(), self.cell.queues);
        let qsd = Qsd { image, queues, aio: mode.aio, direct: self.cell.medium.direct(), throttle: None };
        let line = |socket: &str| match mode.iothread {
            true => qsd.command_line_with_iothread(socket),
            false => qsd.command_line(socket),
        };
        self.start(name.to_owned(), Some(mode), line)
    }

    /// blk.
    pub(super) fn start_blk(&mut self, blk: &Blk) -> anyhow::Result<Side> {
        self.start("blk".to_owned(), None, |socket| blk.command_line(socket))
    }

    /// Any other backend, by its shell line. It may poll without end, so it runs only when it is its turn. `{socket}`, `{image}` and `{queues}` in it stand for what they say.
    pub(super) fn start_peer(&mut self, line: &str) -> anyhow::Result<Side> {
        let image = self.image.path.display().to_string();
        let line = line.replace("{image}", &image).replace("{queues}", &self.cell.queues.to_string());
        let mut side = self.start("peer".to_owned(), None, |socket| {
            ["sh".into(), "-c".into(), format!("exec {}", line.replace("{socket}", socket))].into()
        })?;
        side.stopped = Some(Target::open(side.backend.pid())?);
        side.suspend()?;
        Ok(side)
    }

    fn start(&mut self, name: String, mode: Option<Mode>, line: impl Fn(&str) -> Vec<String>) -> anyhow::Result<Side> {
        let socket = self.directory.join(format!("{name}.sock"));
        if let Err(error) = std::fs::remove_file(&socket) {
            ensure!(error.kind() == std::io::ErrorKind::NotFound, "{}: {error}", socket.display());
        }
        let log = self.directory.join(format!("{name}.log"));
        let mut backend = backend::start_telling(&line(&socket.display().to_string()), File::create(&log)?.into())?;
        let said = || format!("starting {name}, which said: {}", told(&log));
        backend.wait_until_listening(&socket).with_context(said)?;
        let load = self.cell.asked.load(self.image.bytes);
        let shape = Shape { queues: self.cell.queues, depth: self.cell.depth, load, ..Shape::at(socket) };
        let (memory, buffers, rng) = (self.memory.for_guest(), self.memory.buffers(), Rng::new(self.seed, 3));
        let driver = Driver::boot_in(memory, buffers, &shape, rng).with_context(said)?;
        Ok(Side { name, mode, driver, backend, log, stopped: None })
    }
}

/// QSD in all its modes.
pub(super) struct Candidates {
    running: Vec<(Side, Vec<Figures>)>,
    /// Modes this machine does not have, and why.
    missing: Vec<Value>,
}

impl Candidates {
    /// Starts them.
    pub(super) fn start(guests: &mut Guests<'_>) -> anyhow::Result<Self> {
        let mut candidates = Candidates { running: Vec::new(), missing: Vec::new() };
        for mode in Mode::all(guests.cell.medium.direct()) {
            match guests.start_qsd(&mode.to_string(), mode) {
                Ok(side) => candidates.running.push((side, Vec::new())),
                Err(error) => {
                    eprintln!("  QSD has no {mode} here: {error:#}");
                    candidates.missing.push(json!({"mode": mode.to_string(), "missing": format!("{error:#}")}));
                }
            }
        }
        ensure!(!candidates.running.is_empty(), "QSD starts in none of its modes");
        Ok(candidates)
    }

    /// Runs each for `seconds`, in random order, and all of them again.
    pub(super) fn try_all(&mut self, waiting: Waiting, seconds: f64, choices: &mut Rng) -> anyhow::Result<()> {
        for _ in 0..super::TRIALS {
            let mut order: Vec<usize> = (0..self.running.len()).collect();
            super::shuffle(&mut order, choices);
            for index in order {
                ensure!(!interrupt::is_asked(), "asked to end");
                let (side, figures) = &mut self.running[index];
                side.run(waiting, super::warm_up(seconds))?;
                figures.push(side.run(waiting, seconds)?);
                side.driver.rest()?;
            }
        }
        Ok(())
    }

    /// The one that does most; the one that does most per processor time, where it is another; and what all of them did. The
    /// rest ends.
    pub(super) fn decide(mut self) -> (Side, Option<Side>, Vec<Value>) {
        let sums: Vec<(f64, f64)> = self
            .running
            .iter()
            .map(|(_, figures)| {
                let sum = |of: fn(&Figures) -> f64| figures.iter().map(of).sum::<f64>();
                (sum(|figures| figures.iops), sum(|figures| figures.requests as f64) / sum(|figures| figures.cpu_s))
            })
            .collect();
        let mut tried = self.missing;
        for ((side, figures), (iops, per_cpu)) in self.running.iter().zip(&sums) {
            let iops = rounded(iops / figures.len() as f64, 0);
            tried.push(json!({"mode": side.name, "iops": iops, "iops_per_cpu": rounded(*per_cpu, 0)}));
        }
        let (best, frugal) = choose(&sums);
        // The later one is taken first, so that the other stays where it is.
        let mut take = |index: usize| self.running.remove(index).0;
        let (best, frugal) = match frugal {
            None => (take(best), None),
            Some(frugal) if frugal > best => {
                let frugal = take(frugal);
                (take(best), Some(frugal))
            }
            Some(frugal) => {
                let best = take(best);
                (best, Some(take(frugal)))
            }
        };
        (best, frugal, tried)
    }
}

/// Of pairs of requests per second and per second of processor time: which has most of the first, and which has most of the
/// second, where that is another.
fn choose(sums: &[(f64, f64)]) -> (usize, Option<usize>) {
    let most = |of: fn(&(f64, f64)) -> f64| {
        let indices = (0..sums.len()).max_by(|&one, &other| of(&sums[one]).total_cmp(&of(&sums[other])));
        indices.expect("there is at least one")
    };
    let (best, frugal) = (most(|sums| sums.0), most(|sums| sums.1));
    (best, (frugal != best).then_some(frugal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_is_a_mode_only_where_there_is_direct_io() {
        let names = |direct| Mode::all(direct).iter().map(Mode::to_string).collect::<Vec<_>>();
        assert_eq!(names(false), ["threads", "threads+iothread", "io_uring", "io_uring+iothread"]);
        assert_eq!(names(true)[4..], ["native", "native+iothread"]);
    }

    #[test]
    fn what_blk_says_names_its_engine() {
        let text = "warmswap blk: /an/image (4096 bytes), 1 queues, engine uring; privileges: in force\n";
        assert_eq!((engine_in(text), engine_in("no such thing")), (Some("uring"), None));
    }

    #[test]
    fn the_frugal_one_takes_part_only_where_it_is_another() {
        assert_eq!(choose(&[(1.0, 5.0), (3.0, 4.0), (2.0, 1.0)]), (1, Some(0)));
        assert_eq!(choose(&[(1.0, 4.0), (3.0, 5.0)]), (1, None));
    }
}
