//! `lab bench overhead`: requests per second and tail latency, guarded over direct.
//!
//! Two QSDs with the same options, one of them behind a broker with its observer and an idle shadow beside it. For each cell
//! both have a guest connected; they run in turn, never together, in random order within a pair, each after a warm-up. The
//! figure is the median of the ratios of the pairs. Each pair has a second run of the direct device: the ratio of its two runs
//! (`same_…`) shows what this machine makes of no difference at all.

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;

use super::backend::{self, Bare, Engine};
use super::broker::Broker;
use super::driver::{Driver, SILENCE_NS, Shape};
use super::report::Report;
use super::spread::{Samples, rounded};
use super::throughput::{self, Run, Waiting};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;
use crate::guest::now_ns;

/// The cells: queues and requests in flight per queue.
const CELLS: [(u16, u16); 4] = [(1, 1), (1, 32), (2, 1), (2, 32)];
/// Queues of the backends.
const QUEUES: u16 = 2;
/// Guest RAM in MiB.
const GUEST_MIB: u64 = 256;
/// Part of a run before it is measured.
const WARM_UP: f64 = 0.15;

/// Options of `lab bench overhead`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Pairs of runs per cell.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pairs: u32,
    /// Length of a measured run in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// How the driver learns of completions: it polls, or it sleeps until an interrupt as Linux does.
    #[arg(long, value_enum, default_value_t = Waiting::Poll)]
    driver: Waiting,
    /// The backends' I/O engine.
    #[arg(long, value_enum, default_value_t = Engine::Threads)]
    engine: Engine,
    #[command(flatten)]
    common: super::Common,
}

/// The devices.
struct Devices {
    broker: Broker,
    direct: Direct,
}

/// The device nobody guards.
struct Direct {
    backend: Bare,
    socket: std::path::PathBuf,
}

/// What is run in a pair.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Direct,
    Again,
    Guarded,
}

/// One cell of the table.
#[derive(Debug, Serialize)]
pub(super) struct Cell {
    queues: u16,
    qd: u16,
    pub(super) iops_ratio: f64,
    pub(super) p999_ratio: f64,
    pub(super) iops_ratio_range: [f64; 2],
    pub(super) p999_ratio_range: [f64; 2],
    pub(super) same_iops_ratio: f64,
    pub(super) same_p999_ratio: f64,
    iops_direct: f64,
    pub(super) iops_warmswap: f64,
    p999_direct_us: f64,
    p999_warmswap_us: f64,
    pairs: u32,
}

/// Samples of a cell.
#[derive(Default)]
pub(super) struct Pairs {
    iops_ratio: Samples,
    p999_ratio: Samples,
    same_iops_ratio: Samples,
    same_p999_ratio: Samples,
    iops: [Samples; 2],
    p999: [Samples; 2],
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.seconds > 0.0 && args.seconds <= 3600.0, "--seconds must be positive");
    let workspace = Workspace::new(&args.common.image_dir, "bench")?;
    let mut devices = Devices::start(args, &workspace)?;
    let mut choices = Rng::new(args.common.seed, 1);
    let mut cells = Vec::new();
    for (queues, depth) in CELLS {
        let cell = measure(args, &mut devices, queues, depth, &mut choices)?;
        eprintln!(
            "{queues} queues, depth {depth}: {} of the direct requests per second ({}), {} of the p99.9",
            cell.iops_ratio, cell.iops_direct, cell.p999_ratio
        );
        cells.push(cell);
    }
    let mut report = Report::new("overhead", &args.common);
    report.set("cells", &cells)?;
    report.set("seconds", &args.seconds)?;
    report.set("driver", &format!("{:?}", args.driver))?;
    report.set("engine", &format!("{:?}", args.engine))?;
    report.print(args.common.json, || table(&report.fields));
    Ok(())
}

impl Devices {
    fn start(args: &Args, workspace: &Workspace) -> anyhow::Result<Self> {
        let guarded = workspace.directory("guarded")?;
        let image = guarded.join("image");
        backend::make_image(&image)?;
        let line = backend::on_file(image, QUEUES, args.engine).command_line("{socket}");
        let broker = Broker::start(&guarded, &[], &line)?;
        let direct = workspace.directory("direct")?;
        let (image, socket) = (direct.join("image"), direct.join("backend.sock"));
        backend::make_image(&image)?;
        let line = backend::on_file(image, QUEUES, args.engine).command_line(&socket.display().to_string());
        let backend = backend::start(&line)?;
        Ok(Devices { broker, direct: Direct { backend, socket } })
    }
}

fn measure(args: &Args, devices: &mut Devices, queues: u16, depth: u16, choices: &mut Rng) -> anyhow::Result<Cell> {
    let shape = |socket| Shape { memory_mib: GUEST_MIB, queues, depth, ..Shape::at(socket) };
    let mut direct = devices.direct.boot(&shape(devices.direct.socket.clone()), &Rng::new(args.common.seed, 2))?;
    let guarded = Driver::boot(&shape(devices.broker.socket()), Rng::new(args.common.seed, 2));
    let mut guarded = guarded.with_context(|| devices.broker.last_words())?;
    let mut pairs = Pairs::default();
    for _ in 0..args.pairs {
        let mut turns = [Turn::Direct, Turn::Guarded, Turn::Again];
        for last in [2, 1] {
            turns.swap(last, choices.below(last as u64 + 1) as usize);
        }
        let mut runs = [Run::default(); 3];
        for turn in turns {
            let driver = if turn == Turn::Guarded { &mut guarded } else { &mut direct };
            throughput::measure(driver, args.driver, args.seconds * WARM_UP)?;
            runs[turn as usize] =
                throughput::measure(driver, args.driver, args.seconds).with_context(|| devices.broker.last_words())?;
            driver.rest()?;
        }
        pairs.add(&runs);
    }
    for driver in [&mut direct, &mut guarded] {
        driver.guest.stop()?;
        driver.guest.disconnect();
    }
    Ok(pairs.cell(queues, depth, args.pairs))
}

impl Direct {
    /// Boots a guest. QSD takes one client at a time, so it is tried until the last one is forgotten.
    fn boot(&mut self, shape: &Shape, rng: &Rng) -> anyhow::Result<Driver> {
        let deadline = now_ns() + SILENCE_NS;
        loop {
            match Driver::boot(shape, rng.clone()) {
                Err(_) if now_ns() < deadline => self.backend.must_live()?,
                other => return other.context("booting on the direct device"),
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

impl Pairs {
    /// Adds the runs of a pair, in the order of [`Turn`].
    pub(super) fn add(&mut self, runs: &[Run; 3]) {
        let [direct, again, guarded] = [Turn::Direct, Turn::Again, Turn::Guarded].map(|turn| runs[turn as usize]);
        self.iops_ratio.push(guarded.iops / direct.iops);
        self.p999_ratio.push(guarded.p999_us / direct.p999_us);
        self.same_iops_ratio.push(again.iops / direct.iops);
        self.same_p999_ratio.push(again.p999_us / direct.p999_us);
        for (at, run) in [direct, guarded].into_iter().enumerate() {
            self.iops[at].push(run.iops);
            self.p999[at].push(run.p999_us);
        }
    }

    /// What they come to.
    pub(super) fn cell(&self, queues: u16, qd: u16, pairs: u32) -> Cell {
        let range = |samples: &Samples| [samples.range().0, samples.range().1].map(|ratio| rounded(ratio, 4));
        Cell {
            queues,
            qd,
            iops_ratio: rounded(self.iops_ratio.median(), 4),
            p999_ratio: rounded(self.p999_ratio.median(), 4),
            iops_ratio_range: range(&self.iops_ratio),
            p999_ratio_range: range(&self.p999_ratio),
            same_iops_ratio: rounded(self.same_iops_ratio.median(), 4),
            same_p999_ratio: rounded(self.same_p999_ratio.median(), 4),
            iops_direct: rounded(self.iops[0].median(), 0),
            iops_warmswap: rounded(self.iops[1].median(), 0),
            p999_direct_us: rounded(self.p999[0].median(), 1),
            p999_warmswap_us: rounded(self.p999[1].median(), 1),
            pairs,
        }
    }
}

/// The report for people.
pub(super) fn table(report: &Value) -> String {
    const COLUMNS: [(&str, &str); 10] = [
        ("queues", "queues"),
        ("qd", "qd"),
        ("iops", "iops_ratio"),
        ("range", "iops_ratio_range"),
        ("(same)", "same_iops_ratio"),
        ("p99.9", "p999_ratio"),
        ("range", "p999_ratio_range"),
        ("(same)", "same_p999_ratio"),
        ("direct/s", "iops_direct"),
        ("direct p99.9 us", "p999_direct_us"),
    ];
    let mut text: String = COLUMNS.iter().map(|(title, _)| format!("{title:>16}")).collect();
    for cell in report["cells"].as_array().into_iter().flatten() {
        text += "\n";
        for (_, field) in COLUMNS {
            let value = match &cell[field] {
                Value::Array(range) => format!("{}..{}", range[0], range[1]),
                value => value.to_string(),
            };
            text += &format!("{value:>16}");
        }
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_guarded_over_direct() {
        let run = |iops, p999_us| Run { iops, p999_us, ..Run::default() };
        let mut pairs = Pairs::default();
        // In the order of `Turn`: direct, again, guarded.
        pairs.add(&[run(100.0, 10.0), run(100.0, 20.0), run(99.0, 30.0)]);
        let cell = pairs.cell(1, 32, 1);
        assert_eq!((cell.iops_ratio, cell.p999_ratio, cell.same_p999_ratio), (0.99, 3.0, 2.0));
    }
}
