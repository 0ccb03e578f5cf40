//! `lab bench observer`: what the broker uses while it only watches, and how fast it answers when its backend does not.
//!
//! * *Idle*: a guest is connected, its rings run and have had work, nothing is in flight.
//! * *Highest rate*: QSD on a null device behind the broker; of several depths and queue counts the fastest is taken.
//! * *Answers*: [`super::answers`].
//!
//! Processor time is what the scheduler accounts to the threads of the broker's process, in nanoseconds.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};

use super::answers;
use super::backend;
use super::broker::Broker;
use super::driver::{Driver, Shape};
use super::report::Report;
use super::spread::{header, line, rounded};
use super::throughput::{self, Waiting};
use super::usage;
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// Queues and requests in flight per queue that are tried for the highest rate.
const SHAPES: [(u16, u16); 5] = [(1, 32), (1, 64), (1, 128), (2, 32), (2, 128)];
/// How long each is tried, in seconds.
const TRY_SECONDS: f64 = 0.5;
/// Guest RAM in MiB.
const GUEST_MIB: u64 = 256;

/// Options of `lab bench observer`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Seconds without I/O.
    #[arg(long, default_value_t = 10)]
    idle_seconds: u64,
    /// Seconds at the highest rate.
    #[arg(long, default_value_t = 5.0)]
    busy_seconds: f64,
    /// Times a backend is stopped and the VMM goes through its requests.
    #[arg(long, default_value_t = 30)]
    stops: u32,
    #[command(flatten)]
    common: super::Common,
}

/// The broker at its highest rate.
struct Busiest {
    queues: u16,
    depth: u16,
    iops: f64,
    core_percent: f64,
    peak_bytes: u64,
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let workspace = Workspace::new(&args.common.image_dir, "bench")?;
    let (idle, rss_bytes) = idle(args, &workspace)?;
    eprintln!("idle: {idle} % of a core, {} KiB", rss_bytes / 1024);
    let busiest = busiest(args, &workspace)?;
    eprintln!("{:.0} requests per second: {:.3} % of a core", busiest.iops, busiest.core_percent);
    let answers = answers::measure(&workspace, args.stops, args.common.seed)?;
    let mut report = Report::new("observer", &args.common);
    report.set("idle_core_percent", &idle)?;
    report.set("max_core_percent", &rounded(busiest.core_percent, 3))?;
    report.set("max_iops", &rounded(busiest.iops, 0))?;
    report.set("max_shape", &json!({ "queues": busiest.queues, "qd": busiest.depth }))?;
    report.set("rss_bytes", &rss_bytes)?;
    report.set("rss_peak_bytes", &busiest.peak_bytes)?;
    report.set("control_answer_us", &answers.all())?;
    report.set("control_answer_by_request_us", &answers.by_request())?;
    report.set("failovers_while_stopped", &answers.failovers)?;
    report.print(args.common.json, || table(&report.fields));
    Ok(())
}

/// Per cent of a core, and resident bytes after it.
fn idle(args: &Args, workspace: &Workspace) -> anyhow::Result<(f64, u64)> {
    let directory = workspace.directory("idle")?;
    let image = directory.join("image");
    backend::make_image(&image)?;
    let line = backend::on_file(image, 1, backend::Engine::Threads).command_line("{socket}");
    let broker = Broker::start(&directory, &[], &line)?;
    let shape = Shape { memory_mib: GUEST_MIB, depth: 16, ..Shape::at(broker.socket()) };
    let mut driver = Driver::boot(&shape, Rng::new(args.common.seed, 1)).with_context(|| broker.last_words())?;
    // What happens while a pair becomes whole and load ends is not idling.
    driver.run_for(500_000_000)?;
    driver.rest()?;
    std::thread::sleep(Duration::from_secs(1));
    let before = usage::processor_ns(broker.pid())?;
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(args.idle_seconds));
    let used = usage::processor_ns(broker.pid())? - before;
    let percent = used as f64 / began.elapsed().as_nanos() as f64 * 100.0;
    let (resident, _) = usage::resident_bytes(broker.pid())?;
    driver.guest.stop()?;
    Ok((rounded(percent, 4), resident))
}

fn busiest(args: &Args, workspace: &Workspace) -> anyhow::Result<Busiest> {
    let broker = Broker::start(&workspace.directory("null")?, &[], &backend::on_nothing(2, "{socket}"))?;
    let mut best = (0.0, SHAPES[0]);
    for shape in SHAPES {
        let mut driver = boot(&broker, shape, args.common.seed)?;
        let iops = throughput::measure(&mut driver, Waiting::Poll, TRY_SECONDS)?.iops;
        driver.rest()?;
        driver.guest.stop()?;
        eprintln!("null device, {} queues, depth {}: {iops:.0} requests per second", shape.0, shape.1);
        if iops > best.0 {
            best = (iops, shape);
        }
    }
    let (queues, depth) = best.1;
    let mut driver = boot(&broker, best.1, args.common.seed)?;
    throughput::measure(&mut driver, Waiting::Poll, TRY_SECONDS)?;
    let before = usage::processor_ns(broker.pid())?;
    let began = Instant::now();
    let run = throughput::measure(&mut driver, Waiting::Poll, args.busy_seconds)?;
    let used = usage::processor_ns(broker.pid())? - before;
    let core_percent = used as f64 / began.elapsed().as_nanos() as f64 * 100.0;
    let (_, peak_bytes) = usage::resident_bytes(broker.pid())?;
    driver.rest()?;
    driver.guest.stop()?;
    Ok(Busiest { queues, depth, iops: run.iops, core_percent, peak_bytes })
}

fn boot(broker: &Broker, (queues, depth): (u16, u16), seed: u64) -> anyhow::Result<Driver> {
    let shape = Shape { memory_mib: GUEST_MIB, queues, depth, ..Shape::at(broker.socket()) };
    Driver::boot(&shape, Rng::new(seed, 2)).with_context(|| broker.last_words())
}

/// The report for people.
fn table(report: &Value) -> String {
    let mut text = format!(
        "idle                 {} % of a core\nhighest rate         {} % of a core at {} requests per second, {}\n\
         memory               {} bytes resident, {} at most\n",
        report["idle_core_percent"],
        report["max_core_percent"],
        report["max_iops"],
        report["max_shape"],
        report["rss_bytes"],
        report["rss_peak_bytes"]
    );
    text += &header("answers while stopped, us");
    text += &line("all", &report["control_answer_us"]);
    for (request, spread) in report["control_answer_by_request_us"].as_object().into_iter().flatten() {
        text += &line(request, spread);
    }
    text
}
