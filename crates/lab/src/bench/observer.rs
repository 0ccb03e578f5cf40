//! `lab bench observer`: what the broker uses while it only watches, and how fast it answers when its backend does not.
//!
//! * *Idle*: a guest is connected, its rings run and have had work, nothing is in flight.
//! * *Highest rate*: QSD on a null device behind the broker; of several depths and queue counts the fastest is taken, and measured
//!   with rings of several sizes: the longer a ring, the more rarely it has to be looked at. Beside each stands what as many
//!   wake-ups cost a thread that does nothing ([`super::wakeups`]).
//! * *Answers*: [`super::answers`].
//! * *Cases*: what measuring costs, of one device and of many in one process: [`super::many`].
//!
//! Processor time is what the scheduler accounts to the threads of the broker's process, in nanoseconds.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::answers;
use super::backend;
use super::broker::Broker;
use super::driver::{Driver, Shape};
use super::many;
use super::report::Report;
use super::spread::{header, line, rounded};
use super::throughput::{self, Waiting};
use super::usage;
use super::wakeups::{self, Bare};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// Queues and requests in flight per queue that are tried for the highest rate.
const SHAPES: [(u16, u16); 5] = [(1, 32), (1, 64), (1, 128), (2, 32), (2, 128)];
/// Ring sizes measured in every run: what virtio-blk has by default (QEMU's vhost-user-blk has 128), and what `warmswap example`
/// advises.
const RINGS: [u16; 2] = [256, ADVISED_RING];
/// The ring size that `warmswap example` advises.
const ADVISED_RING: u16 = 1024;
/// How long the broker's status may take.
const STATUS_MAX: Duration = Duration::from_secs(10);
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
    /// Ring size of the highest rate that is reported as such: a power of two from 128 to 1024. Others are measured beside it.
    #[arg(long, default_value_t = ADVISED_RING, value_parser = ring_size)]
    ring_size: u16,
    /// Seconds at the highest rate, for each ring size; as many again for bare wake-ups.
    #[arg(long, default_value_t = 5.0)]
    busy_seconds: f64,
    /// Times a backend is stopped and the VMM goes through its requests.
    #[arg(long, default_value_t = 30)]
    stops: u32,
    /// Devices in one process, one number after the other; the first is to be 1, beside which the others are reckoned.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000])]
    devices: Vec<usize>,
    /// Seconds of each case of what measuring costs.
    #[arg(long, default_value_t = 10.0)]
    case_seconds: f64,
    /// Pairs of runs with the profile and without.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pairs: u32,
    /// Only the cases of what measuring costs: of one device, of the guest, of many devices.
    #[arg(long, value_enum, value_delimiter = ',')]
    only_cases: Vec<Cases>,
    #[command(flatten)]
    common: super::Common,
}

/// Groups of cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Cases {
    /// One device, idle and under load.
    One,
    /// What the guest notices.
    Guest,
    /// Many devices in one process.
    Many,
}

fn ring_size(text: &str) -> Result<u16, String> {
    let size = text.parse::<u16>().map_err(|error| error.to_string())?;
    // The deepest shape must fit, and QSD takes no more.
    let possible = size.is_power_of_two() && (128..=1024).contains(&size);
    possible.then_some(size).ok_or_else(|| format!("{size} is no power of two from 128 to 1024"))
}

/// The broker at its highest rate.
struct Busiest {
    queues: u16,
    depth: u16,
    rings: Vec<Ring>,
    peak_bytes: u64,
}

/// The highest rate with rings of one size.
struct Ring {
    size: u16,
    iops: f64,
    core_percent: f64,
    /// Looks at a ring, per second.
    observations: f64,
    bare: Bare,
}

impl Ring {
    /// What as many wake-ups as the broker looked cost by themselves. A busy machine wakes the bare thread late now and then, and so
    /// more rarely; what one wake-up cost is what counts.
    fn bare_percent(&self) -> f64 {
        self.bare.core_percent * self.observations / self.bare.per_second
    }

    fn json(&self) -> Value {
        json!({
            "size": self.size,
            "iops": rounded(self.iops, 0),
            "core_percent": rounded(self.core_percent, 3),
            "observations_per_second": rounded(self.observations, 0),
            "bare_wakeups_core_percent": rounded(self.bare_percent(), 3),
            "bare_wakeups_per_second": rounded(self.bare.per_second, 0),
        })
    }
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.devices.first() == Some(&1), "--devices begins with 1");
    ensure!(args.devices.iter().all(|count| *count > 0), "--devices takes numbers of devices");
    let workspace = Workspace::new(&args.common.image_dir, "bench")?;
    let mut report = Report::new("observer", &args.common);
    report.set("cases", &cases(args, &workspace)?)?;
    if !args.only_cases.is_empty() {
        report.print(args.common.json, || cases_table(&report.fields));
        return Ok(());
    }
    let (idle, rss_bytes) = idle(args, &workspace)?;
    eprintln!("idle: {idle} % of a core, {} KiB", rss_bytes / 1024);
    let busiest = busiest(args, &workspace)?;
    let chosen = busiest.rings.iter().find(|ring| ring.size == args.ring_size).context("it was measured")?;
    let answers = answers::measure(&workspace, args.stops, args.common.seed)?;
    report.set("idle_core_percent", &idle)?;
    report.set("max_core_percent", &rounded(chosen.core_percent, 3))?;
    report.set("bare_wakeups_core_percent", &rounded(chosen.bare_percent(), 3))?;
    report.set("bare_wakeups_real_time", &chosen.bare.real_time)?;
    report.set("ring_size", &chosen.size)?;
    report.set("rings", &busiest.rings.iter().map(Ring::json).collect::<Vec<_>>())?;
    report.set("max_iops", &rounded(chosen.iops, 0))?;
    report.set("max_shape", &json!({ "queues": busiest.queues, "qd": busiest.depth }))?;
    report.set("rss_bytes", &rss_bytes)?;
    report.set("rss_peak_bytes", &busiest.peak_bytes)?;
    report.set("control_answer_us", &answers.all())?;
    report.set("control_answer_by_request_us", &answers.by_request())?;
    report.set("failovers_while_stopped", &answers.failovers)?;
    report.print(args.common.json, || table(&report.fields));
    Ok(())
}

fn cases(args: &Args, workspace: &Workspace) -> anyhow::Result<Vec<many::Case>> {
    let wanted = |group| args.only_cases.is_empty() || args.only_cases.contains(&group);
    let mut cases = Vec::new();
    eprintln!("{}", many::header());
    if wanted(Cases::One) {
        cases.extend(many::one_device(workspace, args.case_seconds, args.common.seed)?);
    }
    if wanted(Cases::Guest) {
        cases.extend(many::guest_ratios(workspace, args.pairs, 1.0, args.common.seed)?);
    }
    if wanted(Cases::Many) {
        cases.extend(many::together(workspace, &args.devices, args.case_seconds, args.common.seed)?);
    }
    Ok(cases)
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
    let mut broker = Broker::start(&workspace.directory("null")?, &[], &backend::on_nothing(2, "{socket}"))?;
    let mut best = (0.0, SHAPES[0]);
    for shape in SHAPES {
        let mut driver = boot(&broker, shape, args.ring_size, args.common.seed)?;
        let iops = throughput::measure(&mut driver, Waiting::Poll, TRY_SECONDS)?.iops;
        driver.rest()?;
        driver.guest.stop()?;
        eprintln!("null device, {} queues, depth {}: {iops:.0} requests per second", shape.0, shape.1);
        if iops > best.0 {
            best = (iops, shape);
        }
    }
    let (queues, depth) = best.1;
    let mut sizes = RINGS.to_vec();
    sizes.push(args.ring_size);
    sizes.sort_unstable();
    sizes.dedup();
    let mut rings = Vec::new();
    for size in sizes {
        let ring = one_ring(args, &mut broker, best.1, size)?;
        eprintln!(
            "rings of {size}: {:.0} requests per second, {:.3} % of a core for {:.0} looks per second; bare wake-ups {:.3} %",
            ring.iops,
            ring.core_percent,
            ring.observations,
            ring.bare_percent()
        );
        rings.push(ring);
    }
    let (_, peak_bytes) = usage::resident_bytes(broker.pid())?;
    Ok(Busiest { queues, depth, rings, peak_bytes })
}

/// The highest rate with rings of `size`: the broker, and then a thread that is only woken as often.
fn one_ring(args: &Args, broker: &mut Broker, shape: (u16, u16), size: u16) -> anyhow::Result<Ring> {
    let mut driver = boot(broker, shape, size, args.common.seed)?;
    throughput::measure(&mut driver, Waiting::Poll, TRY_SECONDS)?;
    let looked = observations(broker)?;
    let before = usage::processor_ns(broker.pid())?;
    let began = Instant::now();
    let run = throughput::measure(&mut driver, Waiting::Poll, args.busy_seconds)?;
    let used = usage::processor_ns(broker.pid())? - before;
    let elapsed = began.elapsed();
    let observations = (observations(broker)? - looked) as f64 / elapsed.as_secs_f64();
    let core_percent = used as f64 / elapsed.as_nanos() as f64 * 100.0;
    ensure!(observations >= 1.0, "the broker does not look at the rings");
    let busy = || throughput::measure(&mut driver, Waiting::Poll, args.busy_seconds);
    let (bare, _) = wakeups::measure(Duration::from_secs_f64(1.0 / observations), busy)?;
    ensure!(bare.per_second > 0.0, "no timer has woken anybody");
    driver.rest()?;
    driver.guest.stop()?;
    Ok(Ring { size, iops: run.iops, core_percent, observations, bare })
}

/// How often the broker has looked at rings.
fn observations(broker: &mut Broker) -> anyhow::Result<u64> {
    broker.ask_status()?;
    let deadline = Instant::now() + STATUS_MAX;
    loop {
        if let Some(status) = broker.status()? {
            return status["counters"]["observations"].as_u64().context("the status has no observations");
        }
        ensure!(Instant::now() < deadline, "the broker does not answer\n{}", broker.last_words());
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn boot(broker: &Broker, (queues, depth): (u16, u16), ring: u16, seed: u64) -> anyhow::Result<Driver> {
    let shape = Shape { memory_mib: GUEST_MIB, queues, depth, ring, ..Shape::at(broker.socket()) };
    Driver::boot(&shape, Rng::new(seed, 2)).with_context(|| broker.last_words())
}

/// What measuring costs, for people.
fn cases_table(report: &Value) -> String {
    let mut text = many::header() + "\n";
    for case in report["cases"].as_array().into_iter().flatten() {
        text += &(many::row(case) + "\n");
    }
    text
}

/// The report for people.
fn table(report: &Value) -> String {
    let mut text = format!(
        "idle                 {} % of a core\nhighest rate         {} % of a core at {} requests per second, {}, rings of {}\n\
         bare wake-ups        {} % of a core\nmemory               {} bytes resident, {} at most\n",
        report["idle_core_percent"],
        report["max_core_percent"],
        report["max_iops"],
        report["max_shape"],
        report["ring_size"],
        report["bare_wakeups_core_percent"],
        report["rss_bytes"],
        report["rss_peak_bytes"]
    );
    text += &header("answers while stopped, us");
    text += &line("all", &report["control_answer_us"]);
    for (request, spread) in report["control_answer_by_request_us"].as_object().into_iter().flatten() {
        text += &line(request, spread);
    }
    text + &cases_table(report)
}
