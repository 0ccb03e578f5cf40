//! `lab bench snapshot`: what a health snapshot costs the control thread, how large it is, and how long who asks for it waits.
//!
//! The control thread's processor time is read around rounds of snapshots and rounds of the same length without, by turns; what is more in the
//! former is what they cost it. The device is under load, so that there is something to say of it.

use std::time::{Duration, Instant};

use super::broker::Broker;
use super::driver::{Driver, Shape};
use super::report::Report;
use super::spread::Samples;
use super::{Common, backend, usage};
use crate::common::rng::Rng;
use crate::common::workspace::Workspace;

/// Load before the first: windows of a minute's kind, at a tick of 20 ms.
const LOAD_NS: u64 = 12_000_000_000;
/// Snapshots in a round.
const PER_ROUND: u32 = 10;
/// The main thread, by the name of the program.
const CONTROL: [&str; 2] = ["warmswap", "lab"];

/// Options of `lab bench snapshot`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    /// Rounds with snapshots, and as many without.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// Runs the bench.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let workspace = Workspace::new(&args.common.image_dir, "snapshot")?;
    let directory = workspace.directory("snapshot")?;
    let (image, store) = (directory.join("image"), directory.join("store"));
    backend::make_image(&image)?;
    let line = backend::on_file(image, 1, backend::Engine::Threads).command_line("{socket}");
    let store = store.display().to_string();
    let options = ["--store", store.as_str(), "--tick-ms", "20", "--window-ms", "200"];
    let mut broker = Broker::start(&directory, &options, &line)?;
    let mut driver = Driver::boot(&Shape::at(broker.socket()), Rng::new(args.common.seed, 9))?;
    driver.run_for(LOAD_NS)?;
    let (mut cost, mut asked, mut bytes) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..args.rounds {
        let began = Instant::now();
        let before = usage::threads_ns(broker.pid(), &CONTROL)?;
        for _ in 0..PER_ROUND {
            let (file, took) = broker.snapshot()?;
            asked.push_ns(u64::try_from(took.as_nanos())?);
            bytes.push(std::fs::metadata(&file)?.len() as f64);
        }
        let with = usage::threads_ns(broker.pid(), &CONTROL)? - before;
        let span = began.elapsed();
        let before = usage::threads_ns(broker.pid(), &CONTROL)?;
        std::thread::sleep(span);
        let without = usage::threads_ns(broker.pid(), &CONTROL)? - before;
        cost.push((with as f64 - without as f64) / 1e3 / f64::from(PER_ROUND));
        eprint!("\rround {} of {}", round + 1, args.rounds);
        driver.run_for(u64::try_from(Duration::from_millis(100).as_nanos())?)?;
    }
    eprintln!();
    driver.guest.stop()?;
    let mut report = Report::new("snapshot", &args.common);
    report.set("control_thread_us", &cost.spread())?;
    report.set("control_thread_us_median", &cost.median())?;
    report.set("asked_us", &asked.spread())?;
    report.set("bytes", &bytes.spread())?;
    report.print(args.common.json, || {
        format!(
            "control thread: {:.1} us a snapshot (median of {} rounds)\nwho asks waits:  {:.0} us (p50), {:.0} us (p99)\nsize:           {:.0} bytes (p50), {:.0} (max)\n",
            cost.median(),
            args.rounds,
            asked.spread().p50,
            asked.spread().p99,
            bytes.spread().p50,
            bytes.spread().max
        )
    });
    Ok(())
}
