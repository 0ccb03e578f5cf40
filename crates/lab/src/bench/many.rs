//! What watching costs: the threads that measure, `sampler` and `historian`, and the whole broker, for one device under several loads
//! and for many devices in one process.
//!
//! The devices of the many are real: each a `warmswap blk` process on a small image, a socket, a guest with a ring. Three of them have
//! load, the others none. Processor time is what the scheduler accounts to threads; the machinery that starts devices is at rest when it
//! is taken.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Resource;
use serde::Serialize;

use super::backend;
use super::broker::Broker;
use super::driver::{Driver, SILENCE_NS, Shape, pause};
use super::load::Load;
use super::overhead::{Pairs, Turn};
use super::spread::rounded;
use super::throughput::{self, Run, Waiting};
use super::usage;
use crate::common::blk::{Blk, Engine};
use crate::common::rng::Rng;
use crate::common::together::Together;
use crate::common::workspace::Workspace;
use crate::guest::{BLOCK, now_ns};

/// Threads that measure and keep.
const PROFILE_THREADS: [&str; 4] = ["sampler", "prober", "historian", "writer"];
/// Requests per second of the one device; none is as many as possible.
const RATES: [Option<f64>; 3] = [Some(10_000.0), Some(100_000.0), None];
/// Depths at which guests are compared, the deep one for the rate, both for the tail.
const DEPTHS: [u16; 2] = [32, 1];
/// Devices with load among many, and the requests per second of each.
const LOADED: usize = 3;
const LOADED_RATE: f64 = 1_000.0;
/// Guest RAM in MiB, blocks of the image, and ring of each of the many.
const MANY_MIB: u64 = 2;
const MANY_BLOCKS: u64 = 64;
const MANY_RING: u16 = 64;
const MANY_DEPTH: u16 = 8;
/// What is left of the descriptors that a process may have for what is not of single devices.
const DESCRIPTORS_SPARE: u64 = 100;
/// Time between two guests that connect.
const CONNECT_EVERY: Duration = Duration::from_millis(10);
/// How long nothing happens before what idle devices cost is taken: whatever is done seldom has been put off by then.
const SETTLE: Duration = Duration::from_secs(6);

/// One line of the report.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Case {
    pub(super) devices: usize,
    /// None: as many as possible. 0: idle.
    pub(super) iops_target: Option<f64>,
    pub(super) qd: Option<u16>,
    pub(super) iops: Option<f64>,
    /// Of the threads that measure, in per cent of a core.
    pub(super) core_percent: Option<f64>,
    /// Of all the broker.
    pub(super) process_core_percent: Option<f64>,
    pub(super) rss_bytes: Option<u64>,
    /// Resident memory without that of one device, over the others.
    pub(super) rss_bytes_per_device: Option<f64>,
    pub(super) descriptors: Option<u64>,
    pub(super) descriptors_per_device: Option<f64>,
    /// With the profile over without.
    pub(super) guest_iops_ratio: Option<f64>,
    pub(super) guest_p999_ratio: Option<f64>,
    pub(super) guest_iops_ratio_range: Option<[f64; 2]>,
    pub(super) guest_p999_ratio_range: Option<[f64; 2]>,
    /// Without over without.
    pub(super) same_iops_ratio: Option<f64>,
    pub(super) same_p999_ratio: Option<f64>,
    pub(super) pairs: Option<u32>,
}

/// Processor time at some moment.
struct Taken {
    at: Instant,
    profile_ns: u64,
    process_ns: u64,
}

impl Taken {
    fn now(pid: u32) -> anyhow::Result<Self> {
        let (profile_ns, process_ns) = (usage::threads_ns(pid, &PROFILE_THREADS)?, usage::processor_ns(pid)?);
        Ok(Taken { at: Instant::now(), profile_ns, process_ns })
    }

    /// Per cent of a core since then: what measures, and everything.
    fn since(&self, before: &Taken) -> (f64, f64) {
        let span = self.at.duration_since(before.at).as_nanos() as f64;
        let percent = |now: u64, then: u64| rounded(now.saturating_sub(then) as f64 / span * 100.0, 4);
        (percent(self.profile_ns, before.profile_ns), percent(self.process_ns, before.process_ns))
    }
}

/// One device on nothing, idle and at several rates.
pub(super) fn one_device(workspace: &Workspace, seconds: f64, seed: u64) -> anyhow::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for rate in [Some(0.0)].into_iter().chain(RATES) {
        let directory = workspace.directory("watched")?;
        let broker = Broker::start(&directory, &["--no-shadow"], &backend::on_nothing(1, "{socket}"))?;
        let shape = Shape { depth: 32, ..Shape::at(broker.socket()) };
        let mut driver = Driver::boot(&shape, Rng::new(seed, 2)).with_context(|| broker.last_words())?;
        if let Some(rate) = rate.filter(|rate| *rate > 0.0) {
            driver.pace(rate, Rng::new(seed, 3));
        }
        // An idle device has had work as well.
        throughput::measure(&mut driver, Waiting::Poll, 0.5)?;
        let before;
        let mut iops = 0.0;
        if rate == Some(0.0) {
            driver.rest()?;
            std::thread::sleep(Duration::from_secs(2));
            before = Taken::now(broker.pid())?;
            std::thread::sleep(Duration::from_secs_f64(seconds));
        } else {
            before = Taken::now(broker.pid())?;
            iops = throughput::measure(&mut driver, Waiting::Poll, seconds)?.iops;
        }
        let (core_percent, process_core_percent) = Taken::now(broker.pid())?.since(&before);
        driver.rest()?;
        driver.guest.stop()?;
        let case = Case {
            devices: 1,
            iops_target: rate,
            qd: Some(32),
            iops: Some(rounded(iops, 0)),
            core_percent: Some(core_percent),
            process_core_percent: Some(process_core_percent),
            rss_bytes: Some(usage::resident_bytes(broker.pid())?.0),
            descriptors: Some(usage::descriptors(broker.pid())?),
            ..Case::default()
        };
        tell(&case);
        cases.push(case);
    }
    Ok(cases)
}

/// What the guest notices: the same load with the profile and without, in random order, and twice without.
pub(super) fn guest_ratios(workspace: &Workspace, pairs: u32, seconds: f64, seed: u64) -> anyhow::Result<Vec<Case>> {
    let start = |name: &str, options: &[&str]| -> anyhow::Result<Broker> {
        let directory = workspace.directory(name)?;
        let image = directory.join("image");
        backend::make_image(&image)?;
        let line = backend::on_file(image, 1, backend::Engine::Threads).command_line("{socket}");
        Broker::start(&directory, options, &line)
    };
    let with = start("with", &["--no-shadow"])?;
    let without = start("without", &["--no-shadow", "--no-profile"])?;
    let mut choices = Rng::new(seed, 4);
    let mut cases = Vec::new();
    for depth in DEPTHS {
        let boot = |broker: &Broker| {
            let shape = Shape { depth, ..Shape::at(broker.socket()) };
            Driver::boot(&shape, Rng::new(seed, 2)).with_context(|| broker.last_words())
        };
        let (mut measured, mut bare) = (boot(&with)?, boot(&without)?);
        let mut all = Pairs::default();
        for _ in 0..pairs {
            let mut turns = [Turn::Direct, Turn::Guarded, Turn::Again];
            for last in [2, 1] {
                turns.swap(last, choices.below(last as u64 + 1) as usize);
            }
            let mut runs = [Run::default(); 3];
            for turn in turns {
                let driver = if turn == Turn::Guarded { &mut measured } else { &mut bare };
                throughput::measure(driver, Waiting::Interrupt, seconds * 0.15)?;
                runs[turn as usize] = throughput::measure(driver, Waiting::Interrupt, seconds)?;
                driver.rest()?;
            }
            all.add(&runs);
        }
        for driver in [&mut measured, &mut bare] {
            driver.guest.stop()?;
            driver.guest.disconnect();
        }
        let cell = all.cell(1, depth, pairs);
        let case = Case {
            devices: 1,
            qd: Some(depth),
            iops: Some(cell.iops_warmswap),
            guest_iops_ratio: Some(cell.iops_ratio),
            guest_p999_ratio: Some(cell.p999_ratio),
            guest_iops_ratio_range: Some(cell.iops_ratio_range),
            guest_p999_ratio_range: Some(cell.p999_ratio_range),
            same_iops_ratio: Some(cell.same_iops_ratio),
            same_p999_ratio: Some(cell.same_p999_ratio),
            pairs: Some(pairs),
            ..Case::default()
        };
        tell(&case);
        cases.push(case);
    }
    Ok(cases)
}

/// So many devices in one process: with load on three of them, and with none.
pub(super) fn together(workspace: &Workspace, counts: &[usize], seconds: f64, seed: u64) -> anyhow::Result<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    let mut alone: Option<(u64, u64)> = None;
    let mut per_device = 0.0;
    for &wanted in counts {
        let room = descriptors_max().saturating_sub(DESCRIPTORS_SPARE) as f64;
        let devices = if per_device > 0.0 { wanted.min((room / per_device) as usize) } else { wanted };
        if devices < wanted {
            eprintln!(
                "{wanted} devices need {:.0} descriptors, {room} may be had: {devices} devices",
                per_device * wanted as f64
            );
        }
        let directory = workspace.directory(&format!("many-{devices}"))?;
        let (busy, idle) = of_many(&directory, devices, seconds, seed)?;
        for mut case in [busy, idle] {
            let now = (case.rss_bytes.unwrap_or(0), case.descriptors.unwrap_or(0));
            match alone {
                Some(one) if devices > 1 => {
                    let each = |now: u64, one: u64| (now as f64 - one as f64) / (devices - 1) as f64;
                    case.rss_bytes_per_device = Some(rounded(each(now.0, one.0), 0));
                    case.descriptors_per_device = Some(rounded(each(now.1, one.1), 2));
                    per_device = each(now.1, one.1);
                }
                _ if devices == 1 && case.iops_target == Some(0.0) => alone = Some(now),
                _ => {}
            }
            tell(&case);
            cases.push(case);
        }
        std::fs::remove_dir_all(&directory)?;
    }
    Ok(cases)
}

fn descriptors_max() -> u64 {
    rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

/// The case with load, and the idle one after it.
fn of_many(directory: &Path, devices: usize, seconds: f64, seed: u64) -> anyhow::Result<(Case, Case)> {
    let began = Instant::now();
    let named: Vec<(String, std::path::PathBuf)> =
        (0..devices).map(|index| (format!("d{index}"), directory.join(format!("d{index}.sock")))).collect();
    let lines =
        named.iter().map(|(name, socket)| options(directory, name, socket)).collect::<anyhow::Result<Vec<_>>>()?;
    let broker = Together::start(directory, &lines)?;
    eprintln!("{devices} devices can be connected to after {:.1} s", began.elapsed().as_secs_f64());
    let mut drivers = Vec::with_capacity(devices);
    for (index, (_, socket)) in named.iter().enumerate() {
        let load = Load { disk_blocks: MANY_BLOCKS, ..Load::MIXED };
        let shape =
            Shape { memory_mib: MANY_MIB, depth: MANY_DEPTH, ring: MANY_RING, load, ..Shape::at(socket.clone()) };
        let mut driver = small_driver(&shape, Rng::new(seed, index as u64)).with_context(|| broker.last_words())?;
        // Each has had work.
        driver.busy = true;
        driver.poll(&mut |_| {})?;
        driver.rest()?;
        drivers.push(driver);
        // Guests do not start all at once, and what a broker looks into when one has connected it holds open meanwhile.
        std::thread::sleep(CONNECT_EVERY);
        if drivers.len() % 100 == 0 {
            eprintln!("{} guests, {} descriptors", drivers.len(), usage::descriptors(broker.pid())?);
        }
    }
    eprintln!("{devices} guests are connected after {:.1} s", began.elapsed().as_secs_f64());
    let loaded = devices.min(LOADED);
    for (index, driver) in drivers[..loaded].iter_mut().enumerate() {
        driver.pace(LOADED_RATE, Rng::new(seed, 1_000_000 + index as u64));
    }
    std::thread::sleep(SETTLE);
    let pid = broker.pid();
    let case = |iops_target: f64, iops: f64, (profile, process): (f64, f64)| -> anyhow::Result<Case> {
        Ok(Case {
            devices,
            iops_target: Some(iops_target),
            iops: Some(rounded(iops, 0)),
            core_percent: Some(profile),
            process_core_percent: Some(process),
            rss_bytes: Some(usage::resident_bytes(pid)?.0),
            descriptors: Some(usage::descriptors(pid)?),
            ..Case::default()
        })
    };
    run_all(&mut drivers[..loaded], 0.5)?;
    let before = Taken::now(pid)?;
    let iops = run_all(&mut drivers[..loaded], seconds)?;
    let used = Taken::now(pid)?.since(&before);
    let busy = case(LOADED_RATE * loaded as f64, iops, used)?;
    drivers[..loaded].iter_mut().try_for_each(Driver::rest)?;
    std::thread::sleep(SETTLE);
    let before = Taken::now(pid)?;
    std::thread::sleep(Duration::from_secs_f64(seconds.max(10.0)));
    let used = Taken::now(pid)?.since(&before);
    let idle = case(0.0, 0.0, used)?;
    for driver in &mut drivers {
        driver.guest.stop()?;
        driver.guest.disconnect();
    }
    Ok((busy, idle))
}

/// The options of one device of many.
fn options(directory: &Path, name: &str, socket: &Path) -> anyhow::Result<Vec<String>> {
    let image = directory.join(format!("{name}.img"));
    std::fs::write(&image, vec![0x5a; MANY_BLOCKS as usize * BLOCK])?;
    let word = |path: &Path| path.display().to_string();
    // A directory for each: every one is looked through for what an earlier broker left.
    let [control, run] = ["control", "run"].map(|it| word(&directory.join(it).join(name)));
    let mut line: Vec<String> = ["--name", name, "--socket", &word(socket), "--control", &control, "--run-dir", &run]
        .map(str::to_owned)
        .to_vec();
    line.extend(["--no-shadow", "--no-canary", "--hang-ms", "60000", "--stall-ms", "60000", "--"].map(str::to_owned));
    line.extend(Blk { image, queues: 1, engine: Engine::Sync, direct: false }.command_line("{socket}"));
    Ok(line)
}

/// A driver whose buffers are few, for there are few pages in its memory.
fn small_driver(shape: &Shape, rng: Rng) -> anyhow::Result<Driver> {
    let mut memory = crate::guest::GuestMemory::new(shape.memory_mib << 20)?;
    let buffers =
        (0..4 * shape.depth).map(|_| memory.allocate(0, BLOCK, BLOCK as u64)).collect::<anyhow::Result<_>>()?;
    Driver::boot_in(memory, buffers, shape, rng)
}

/// Runs several drivers for a while and says how many requests per second they got in all.
fn run_all(drivers: &mut [Driver], seconds: f64) -> anyhow::Result<f64> {
    let began = now_ns();
    let until = began + (seconds * 1e9) as u64;
    let (mut completed, mut last) = (0_u64, began);
    drivers.iter_mut().for_each(|driver| driver.busy = true);
    while now_ns() < until {
        let mut taken = 0;
        for driver in drivers.iter_mut() {
            taken += driver.poll(&mut |_| {})?;
        }
        completed += taken as u64;
        if taken > 0 {
            last = now_ns();
        } else {
            ensure!(now_ns() < last + SILENCE_NS, "the disks are silent: {}", drivers[0].describe());
            pause();
        }
    }
    Ok(completed as f64 / ((now_ns() - began) as f64 / 1e9))
}

/// A line of progress.
fn tell(case: &Case) {
    eprintln!("{}", row(&serde_json::to_value(case).expect("plain numbers")));
}

const COLUMNS: [(&str, &str); 12] = [
    ("devices", "devices"),
    ("target/s", "iops_target"),
    ("qd", "qd"),
    ("iops", "iops"),
    ("profile %", "core_percent"),
    ("broker %", "process_core_percent"),
    ("rss/device", "rss_bytes_per_device"),
    ("fds/device", "descriptors_per_device"),
    ("guest iops", "guest_iops_ratio"),
    ("(same)", "same_iops_ratio"),
    ("guest p99.9", "guest_p999_ratio"),
    ("(same)", "same_p999_ratio"),
];

/// Titles of [`row`].
pub(super) fn header() -> String {
    COLUMNS.iter().map(|(title, _)| format!("{title:>13}")).collect()
}

/// A case for people.
pub(super) fn row(case: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| if value.is_null() { "-".to_owned() } else { value.to_string() };
    COLUMNS.iter().map(|(_, field)| format!("{:>13}", text(&case[field]))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_a_share_of_the_time_between() {
        let at = Instant::now();
        let before = Taken { at, profile_ns: 1_000, process_ns: 5_000 };
        let after = Taken { at: at + Duration::from_nanos(1_000_000), profile_ns: 11_000, process_ns: 105_000 };
        assert_eq!(after.since(&before), (1.0, 10.0));
    }

    #[test]
    fn what_was_not_measured_is_a_dash() {
        let text = row(&serde_json::to_value(Case { devices: 7, ..Case::default() }).expect("plain numbers"));
        assert_eq!(text.split_whitespace().collect::<Vec<_>>()[..2], ["7", "-"]);
        assert_eq!(text.split_whitespace().count(), COLUMNS.len());
    }
}
