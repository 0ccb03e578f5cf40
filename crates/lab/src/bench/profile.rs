//! `lab bench profile`: what warmswap says of a device, held against what the driver of that device measured itself.
//!
//! Each case is a backend and a load. A broker guards the device, and the driver writes down every request. When the load has run, the
//! broker is asked for its windows; for each that lies within the load the truth of exactly that time is reckoned ([`super::truth`]).
//! A driver that was kept from its processor does not know when its requests ended: `range` has the truth if they all ended as early as they
//! can have, and as late. `told` and `true` are medians over the windows, of greatest values the greatest. Nothing is asserted here.
//!
//! # What resolution is to be expected
//!
//! * *Arrivals, completions, depth, mean latency*: counted, not sampled. A window ends between two looks at the ring, which are at most a
//!   quarter of a ring or some milliseconds apart: 1 %. The driver's latencies contain the time until it took a completion, which the
//!   broker does not see: some microseconds of a driver that polls, the time of a wake-up of one that sleeps.
//! * *Quantiles*: buckets are a quarter of their beginning wide and are divided evenly, so 12 %, and a sample of n requests has a rank of
//!   its own: beyond p99 of a device without a telemetry page it is the luck of some hundred samples a second. Requests that are long
//!   against the distance of looks are all known; a long one among many that is shorter than that is seen if it was sampled, so the
//!   greatest latency is a lower bound.
//! * *A processor for the prober*: it runs only where one has nothing to do. Where driver and backend poll on the only two there are it gets
//!   moments at which one of them slept, few and not like the others; where they sleep between requests it sees nearly all.
//! * *Shares and sizes*: of some hundred sampled requests a second, a few points of a hundred. With a telemetry page they are exact.
//! * *Kicks and calls*: without a page from samples. A look cannot tell two kicks in one look apart: told is too low at high rates.
//! * *Working set*: a sketch of 256 pages, 6 %; of many more pages than were sampled twice it is an estimate with an error of a third.
//!   Until some pages were sampled twice it is missing. *Page reuse* is of sampled touches, which are few: it says that pages come again, not how often.
//! * *Oldest age, gap*: the distance of two looks.
//! * *Errors*: as shares; a status is seen only where the driver has not used its buffer again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde::Serialize;
use serde_json::Value;

use super::backend;
use super::broker::Broker;
use super::driver::{Driver, Shape, populate};
use super::load::{Load, Mix, Order};
use super::report::Report;
use super::spread::{Samples, rounded};
use super::throughput::Waiting;
use super::truth::Log;
use crate::common::blk::{self, Blk};
use crate::common::process::{Target, children_of};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;
use crate::guest::{BLOCK, GuestMemory, now_ns};

/// Guest RAM in MiB: more than the largest working set.
const GUEST_MIB: u64 = 256;
/// Length of a window.
const WINDOW_MS: &str = "1000";
/// What is not measured: the pair becomes whole, the backend's page is found.
const WARM_UP_S: f64 = 1.5;
/// For how long a backend is stopped.
const STOPPED: Duration = Duration::from_millis(300);
/// Blocks of the disk of which the first fails.
const FAILING_BLOCKS: u64 = 4;

/// Options of `lab bench profile`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Seconds that are measured of each case.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Only cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    #[command(flatten)]
    common: super::Common,
}

/// What serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    /// QSD with a thread pool.
    Threads,
    /// QSD with io_uring.
    IoUring,
    /// QSD that lets so many requests per second through.
    Throttled(u32),
    /// QSD on nothing.
    Null,
    /// Our own, which has a telemetry page.
    Blk,
    /// QSD whose reads of the first block fail.
    Failing,
}

/// A case.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    on: On,
    depth: u16,
    load: Load,
    /// Requests per second of an open loop.
    rate: Option<f64>,
    waiting: Waiting,
    /// Pages that the buffers lie in.
    pages: Option<usize>,
    /// The backend is stopped for a while.
    stop: bool,
}

/// One quantity of a case.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    feature: &'static str,
    told: Option<f64>,
    r#true: f64,
    /// What the truth is at least and at most, where the driver's own looks leave it open.
    range: Option<[f64; 2]>,
    ratio: Option<f64>,
    difference: Option<f64>,
    missing: bool,
}

/// Of one quantity over all cases.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    feature: &'static str,
    cases: usize,
    missing: usize,
    median_ratio: f64,
    worst_ratio: f64,
    worst_case: &'static str,
    worst_difference: f64,
}

/// Of these the greatest window counts.
const GREATEST: [&str; 3] = ["latency_max_us", "completion_gap_max_us", "oldest_age_us"];
/// In this order they are shown.
const FEATURES: [&str; 26] = [
    "arrivals_per_s",
    "completions_per_s",
    "depth_mean",
    "bytes_per_s",
    "size_mean_bytes",
    "read_share",
    "device_write_share",
    "sequential_share",
    "latency_mean_us",
    "latency_p50_us",
    "latency_p90_us",
    "latency_p99_us",
    "latency_p999_us",
    "latency_max_us",
    "read_latency_p50_us",
    "read_latency_p99_us",
    "write_latency_p50_us",
    "write_latency_p99_us",
    "completion_gap_max_us",
    "oldest_age_us",
    "error_share",
    "kicks_per_s",
    "calls_per_s",
    "calls_suppressed_per_s",
    "working_set_pages",
    "page_reuse",
];

impl Case {
    const fn new(name: &'static str, on: On, depth: u16) -> Self {
        let (rate, waiting, pages) = (None, Waiting::Poll, None);
        Case { name, on, depth, load: Load::MIXED, rate, waiting, pages, stop: false }
    }

    const fn load(self, blocks: u32, mix: Mix, order: Order) -> Self {
        Case { load: Load { blocks, mix, order, ..Load::MIXED }, ..self }
    }

    const fn rate(self, rate: f64) -> Self {
        Case { rate: Some(rate), ..self }
    }

    const fn interrupt(self) -> Self {
        Case { waiting: Waiting::Interrupt, ..self }
    }

    const fn pages(self, pages: usize) -> Self {
        Case { pages: Some(pages), ..self }
    }
}

/// All cases.
fn cases() -> Vec<Case> {
    use Mix::{Both, Reads, Writes};
    use Order::{Random, Sequential};
    let mut failing = Case::new("errors-qd4", On::Failing, 4);
    failing.load = Load { disk_blocks: FAILING_BLOCKS, blocks: 1, mix: Reads, order: Random };
    vec![
        Case::new("threads-qd1", On::Threads, 1),
        Case::new("threads-qd4", On::Threads, 4),
        Case::new("threads-qd32", On::Threads, 32),
        Case::new("uring-qd1", On::IoUring, 1),
        Case::new("uring-qd32", On::IoUring, 32),
        Case::new("null-qd1", On::Null, 1),
        Case::new("null-qd32", On::Null, 32),
        Case::new("blk-qd1", On::Blk, 1),
        Case::new("blk-qd4", On::Blk, 4),
        Case::new("blk-qd32", On::Blk, 32),
        Case::new("slow-1ms-qd1", On::Throttled(1_000), 1),
        Case::new("slow-2ms-qd4", On::Throttled(2_000), 4),
        Case::new("slow-5ms-qd4", On::Throttled(800), 4),
        Case::new("slow-20ms-qd32", On::Throttled(1_600), 32),
        Case::new("open-100", On::Threads, 32).rate(100.0),
        Case::new("open-1k", On::Threads, 32).rate(1_000.0),
        Case::new("open-10k", On::Threads, 64).rate(10_000.0),
        Case::new("blk-open-1k", On::Blk, 32).rate(1_000.0),
        Case::new("reads-128k-sequential-qd4", On::IoUring, 4).load(32, Reads, Sequential),
        Case::new("writes-128k-random-qd4", On::Threads, 4).load(32, Writes, Random),
        Case::new("reads-4k-sequential-qd1", On::Threads, 1).load(1, Reads, Sequential),
        Case::new("reads-4k-sequential-qd32", On::Threads, 32).load(1, Reads, Sequential),
        Case::new("blk-128k-qd4", On::Blk, 4).load(32, Both, Random),
        Case::new("pages-64", On::IoUring, 16).pages(64),
        Case::new("pages-1000", On::IoUring, 16).pages(1_000),
        Case::new("pages-20000", On::IoUring, 16).pages(20_000),
        Case::new("blk-pages-1000", On::Blk, 16).pages(1_000),
        Case::new("interrupt-qd1", On::Threads, 1).interrupt(),
        Case::new("interrupt-qd32", On::Threads, 32).interrupt(),
        Case::new("interrupt-open-1k", On::Threads, 32).rate(1_000.0).interrupt(),
        Case::new("blk-interrupt-qd1", On::Blk, 1).interrupt(),
        Case::new("blk-interrupt-qd32", On::Blk, 32).interrupt(),
        Case { stop: true, ..Case::new("stopped-300ms-qd4", On::Threads, 4) },
        failing,
    ]
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(
        args.seconds >= 2.0 && args.seconds <= 50.0,
        "--seconds must be 2 to 50: whole windows that the broker still has"
    );
    let workspace = Workspace::new(&args.common.image_dir, "bench")?;
    let mut measured: Vec<(&'static str, Vec<Row>)> = Vec::new();
    let wanted = |case: &Case| args.only.as_ref().is_none_or(|only| case.name.contains(only.as_str()));
    for case in cases().into_iter().filter(wanted) {
        let rows = measure(args, &case, &workspace).with_context(|| format!("case {}", case.name))?;
        eprint!("{}", case_table(case.name, &rows));
        measured.push((case.name, rows));
    }
    ensure!(!measured.is_empty(), "there is no such case");
    let mut report = Report::new("profile", &args.common);
    let cases: Vec<Value> =
        measured.iter().map(|(name, rows)| serde_json::json!({ "name": name, "rows": rows })).collect();
    report.set("seconds", &args.seconds)?;
    report.set("cases", &cases)?;
    report.set("summary", &summary(&measured))?;
    report.print(args.common.json, || table(&measured));
    Ok(())
}

fn command_line(case: &Case, directory: &Path) -> anyhow::Result<Vec<String>> {
    if case.on == On::Null {
        return Ok(backend::on_nothing(1, "{socket}"));
    }
    let image = directory.join("image");
    backend::make_image(&image)?;
    let qsd = |engine| backend::on_file(image.clone(), 1, engine);
    Ok(match case.on {
        On::Threads => qsd(backend::Engine::Threads).command_line("{socket}"),
        On::IoUring => qsd(backend::Engine::IoUring).command_line("{socket}"),
        On::Throttled(rate) => {
            let mut slow = qsd(backend::Engine::Threads);
            slow.throttle = Some(rate);
            slow.command_line("{socket}")
        }
        On::Blk => Blk { image, queues: 1, engine: blk::Engine::Auto, direct: false }.command_line("{socket}"),
        On::Failing => failing(qsd(backend::Engine::Threads).command_line("{socket}")),
        On::Null => unreachable!("it has no image"),
    })
}

/// Puts a node in front of the disk that fails reads of its first block.
fn failing(mut line: Vec<String>) -> Vec<String> {
    let export = line.len() - 2;
    let node = "driver=blkdebug,node-name=bad,image=disk,inject-error.0.event=none,inject-error.0.iotype=read,\
                inject-error.0.errno=5,inject-error.0.sector=0,inject-error.0.once=off,inject-error.0.immediately=off";
    line.splice(export..export, ["--blockdev".to_owned(), node.to_owned()]);
    let last = line.last_mut().expect("the export");
    *last = last.replace("node-name=disk", "node-name=bad");
    line
}

fn boot(case: &Case, broker: &Broker, seed: u64) -> anyhow::Result<Driver> {
    let shape = Shape { memory_mib: GUEST_MIB, depth: case.depth, load: case.load, ..Shape::at(broker.socket()) };
    let rng = Rng::new(seed, 2);
    let mut driver = match case.pages {
        None => Driver::boot(&shape, rng),
        Some(pages) => {
            let mut memory = GuestMemory::new(GUEST_MIB << 20)?;
            populate(&memory)?;
            let buffers = (0..pages).map(|_| memory.allocate(0, BLOCK, BLOCK as u64)).collect::<anyhow::Result<_>>()?;
            Driver::boot_in(memory, buffers, &shape, rng)
        }
    };
    if let (Ok(driver), Some(rate)) = (&mut driver, case.rate) {
        driver.pace(rate, Rng::new(seed, 3));
    }
    if let (Ok(driver), On::Failing) = (&mut driver, case.on) {
        driver.may_fail();
    }
    driver.with_context(|| broker.last_words())
}

fn measure(args: &Args, case: &Case, workspace: &Workspace) -> anyhow::Result<Vec<Row>> {
    let directory = workspace.directory(case.name)?;
    let line = command_line(case, &directory)?;
    // Nobody is replaced here, however slow it is.
    let options = ["--no-shadow", "--window-ms", WINDOW_MS, "--hang-ms", "60000", "--stall-ms", "60000"];
    let mut broker = Broker::start(&directory, &options, &line)?;
    let mut driver = boot(case, &broker, args.common.seed)?;
    let mut log = Log::default();
    log.run(&mut driver, case.waiting, WARM_UP_S)?;
    let stopped = case.stop.then(|| stop_later(&broker)).transpose()?;
    let steady = log.run(&mut driver, case.waiting, args.seconds)?;
    if let Some(stopped) = stopped {
        stopped.join().expect("it does not panic")?;
    }
    log.rest(&mut driver)?;
    // The last window may still be on its way.
    std::thread::sleep(Duration::from_millis(100));
    let told = broker.profile()?;
    driver.guest.stop()?;
    driver.guest.disconnect();
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as f64 - now_ns() as f64;
    let windows = within(&told, &steady, epoch);
    ensure!(!windows.is_empty(), "no window lies within the load");
    Ok(rows(case, &log, &windows))
}

/// Stops the backend for a while, in the middle of what is measured.
fn stop_later(broker: &Broker) -> anyhow::Result<std::thread::JoinHandle<anyhow::Result<()>>> {
    let children = children_of(broker.pid())?;
    let [backend] = children[..] else { anyhow::bail!("the broker has {} children", children.len()) };
    let backend = Target::open(backend)?;
    Ok(std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1_500));
        backend.signal(Signal::STOP)?;
        std::thread::sleep(STOPPED);
        backend.signal(Signal::CONT)
    }))
}

/// The windows of a profile that lie within a time, and theirs. `epoch`: the Unix time of the driver's zero, in nanoseconds.
fn within<'a>(told: &'a Value, steady: &Range<u64>, epoch: f64) -> Vec<(Range<u64>, &'a Value)> {
    let windows = told["windows"].as_array().into_iter().flatten();
    let spans = windows.filter_map(|window| {
        let end = window["end_unix_ms"].as_f64()? * 1e6 - epoch;
        let begin = end - window["span_ms"].as_f64()? * 1e6;
        (begin >= steady.start as f64 && end <= steady.end as f64)
            .then(|| (begin as u64..end as u64, &window["values"]))
    });
    spans.collect()
}

fn rows(case: &Case, log: &Log, windows: &[(Range<u64>, &Value)]) -> Vec<Row> {
    let truths: Vec<BTreeMap<&str, f64>> = windows.iter().map(|(span, _)| log.truth(span)).collect();
    let bounds: Vec<[BTreeMap<&str, f64>; 2]> = windows.iter().map(|(span, _)| log.bounds(span)).collect();
    let (pages, reuse) = log.pages();
    let longest = truths.iter().filter_map(|truth| truth.get("latency_max_us")).copied().reduce(f64::max);
    let mut rows = Vec::new();
    for feature in FEATURES {
        let r#true = match feature {
            "working_set_pages" => Some(pages),
            "page_reuse" => Some(reuse),
            // What is seen of an age at some instant is less than what becomes of it, but for a backend that stands still.
            "oldest_age_us" => longest.filter(|_| case.stop),
            _ => over(feature, truths.iter().map(|truth| truth.get(feature).copied())),
        };
        let told = windows.iter().map(|(_, values)| values[feature].as_f64());
        let told = match feature {
            "working_set_pages" | "page_reuse" => told.flatten().last(),
            _ => over(feature, told),
        };
        let bound = |at: usize| over(feature, bounds.iter().map(|bounds| bounds[at].get(feature).copied()));
        let range = bound(0).zip(bound(1)).filter(|_| feature.contains("latency") || feature == "depth_mean");
        let range = range.map(|(least, most)| [least, most].map(|bound| rounded(bound, 4)));
        rows.extend(r#true.map(|it| Row { range, ..Row::new(feature, told, it) }));
    }
    rows
}

/// The median of the windows, or the greatest.
fn over(feature: &str, windows: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let mut samples = Samples::default();
    let mut any = false;
    for value in windows.flatten() {
        samples.push(value);
        any = true;
    }
    let value = if GREATEST.contains(&feature) { samples.range().1 } else { samples.median() };
    any.then_some(value)
}

impl Row {
    fn new(feature: &'static str, told: Option<f64>, r#true: f64) -> Self {
        let ratio = told.filter(|_| r#true > 0.0).map(|told| rounded(told / r#true, 4));
        let difference = told.map(|told| rounded(told - r#true, 4));
        let [told, r#true] = [told, Some(r#true)].map(|value| value.map(|value| rounded(value, 4)));
        Row { feature, told, r#true: r#true.unwrap_or(0.0), range: None, ratio, difference, missing: told.is_none() }
    }
}

fn summary(measured: &[(&'static str, Vec<Row>)]) -> Vec<Summary> {
    let of = |feature: &'static str| {
        let rows: Vec<(&'static str, &Row)> = measured
            .iter()
            .flat_map(|(name, rows)| rows.iter().map(move |row| (*name, row)))
            .filter(|(_, row)| row.feature == feature)
            .collect();
        let mut ratios = Samples::default();
        let mut worst: Option<(f64, &'static str)> = None;
        let distance = |ratio: f64| ratio.max(1e-9).ln().abs();
        for (name, ratio) in rows.iter().filter_map(|(name, row)| Some((*name, row.ratio?))) {
            ratios.push(ratio);
            if worst.is_none_or(|(last, _)| distance(ratio) > distance(last)) {
                worst = Some((ratio, name));
            }
        }
        let differences = rows.iter().filter_map(|(_, row)| row.difference);
        let worst_difference = differences.fold(0.0, |worst: f64, it| if it.abs() > worst.abs() { it } else { worst });
        let (worst_ratio, worst_case) = worst.unwrap_or((0.0, ""));
        let missing = rows.iter().filter(|(_, row)| row.missing).count();
        let median_ratio = rounded(ratios.median(), 4);
        let cases = rows.len();
        (cases > 0).then_some(Summary {
            feature,
            cases,
            missing,
            median_ratio,
            worst_ratio,
            worst_case,
            worst_difference,
        })
    };
    FEATURES.into_iter().filter_map(of).collect()
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 1_000.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.3}"),
    }
}

fn case_table(name: &str, rows: &[Row]) -> String {
    let mut text = format!("{name:<28}{:>16}{:>16}{:>10}  {}\n", "told", "true", "ratio", "true is within");
    for row in rows {
        let (told, is, ratio) = (number(row.told), number(Some(row.r#true)), number(row.ratio));
        let range = row.range.map_or_else(String::new, |[least, most]| format!("  {least:.2} to {most:.2}"));
        text += &format!("  {:<26}{told:>16}{is:>16}{ratio:>10}{range}\n", row.feature);
    }
    text
}

/// The report for people.
fn table(measured: &[(&'static str, Vec<Row>)]) -> String {
    let mut text: String = measured.iter().map(|(name, rows)| case_table(name, rows)).collect();
    text += &format!("{:<28}{:>8}{:>10}{:>10}{:>10}  {}\n", "summary", "cases", "missing", "median", "worst", "where");
    for it in summary(measured) {
        text += &format!(
            "{:<28}{:>8}{:>10}{:>10.3}{:>10.3}  {}\n",
            it.feature, it.cases, it.missing, it.median_ratio, it.worst_ratio, it.worst_case
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_windows_within_the_load_count() {
        let window = |end_ms: u64| json!({"end_unix_ms": end_ms, "span_ms": 1_000.0, "values": {"number": end_ms}});
        let told = json!({"windows": [window(10_900), window(12_000), window(13_000), window(13_600)]});
        // The driver's zero is at 10 s; it ran from its second 1 to 3.5.
        let windows = within(&told, &(1_000_000_000..3_500_000_000), 10e9);
        let spans: Vec<Range<u64>> = windows.iter().map(|(span, _)| span.clone()).collect();
        assert_eq!(spans, [1_000_000_000..2_000_000_000, 2_000_000_000..3_000_000_000]);
        assert_eq!(windows[1].1["number"], 13_000);
    }

    #[test]
    fn a_row_says_what_is_missing_and_divides_by_nothing() {
        let row = Row::new("read_share", Some(0.1), 0.0);
        assert_eq!((row.ratio, row.difference, row.missing), (None, Some(0.1), false));
        let row = Row::new("read_share", None, 0.5);
        assert_eq!((row.ratio, row.difference, row.missing), (None, None, true));
    }

    #[test]
    fn the_summary_has_the_median_and_the_ratio_farthest_from_one() {
        let row = |told: f64| Row::new("depth_mean", Some(told), 10.0);
        let measured = [("a", vec![row(10.0)]), ("b", vec![row(5.0)]), ("c", vec![row(15.0)])];
        let summary = summary(&measured);
        assert_eq!(summary.len(), 1);
        assert_eq!((summary[0].median_ratio, summary[0].worst_ratio, summary[0].worst_case), (1.0, 0.5, "b"));
    }

    #[test]
    fn greatest_values_are_not_averaged() {
        let values = [Some(1.0), None, Some(5.0), Some(2.0)];
        assert_eq!(over("latency_max_us", values.into_iter()), Some(5.0));
        assert_eq!(over("depth_mean", values.into_iter()), Some(2.0));
        assert_eq!(over("depth_mean", [None].into_iter()), None);
    }

    #[test]
    fn the_failing_node_stands_before_its_export() {
        let line = failing(backend::on_file("image".into(), 1, backend::Engine::Threads).command_line("socket"));
        let node = line.iter().position(|word| word.starts_with("driver=blkdebug")).expect("it is there");
        let export = line.iter().position(|word| word == "--export").expect("it is there");
        assert_eq!(node + 1, export);
        assert!(line[export + 1].contains("node-name=bad,"));
    }
}
