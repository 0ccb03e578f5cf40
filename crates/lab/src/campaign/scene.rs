//! A device on its own: image, backend, broker. What surrounds a run, set up and taken down.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::fuse::Store;
use super::inject::{Small, Subject, budget, monitor, throttled};
use super::kind::{Backend, Hook, Means, Outside};
use super::plan::{Plan, Spec};
use super::workload::BLOCKS;
use super::{GROUPS, hooks};
use crate::common::blk::{Blk, Engine};
use crate::common::broker::{BrokerProcess, Launch};
use crate::common::cgroup::Group;
use crate::common::lines::Lines;
use crate::common::qsd::{Aio, Qsd};
use crate::guest::BLOCK;

/// Name of the guarded device.
pub(super) const DEVICE: &str = "disk";
/// How long an answer of the broker may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Lines of its log in an error.
const LOG_LINES: usize = 20;
/// Blocks of an image that takes space only where it is written: 512 MiB.
pub(super) const SPARSE_BLOCKS: u64 = 131_072;

/// Where a run is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// An empty directory.
    pub(super) directory: &'a Path,
    /// An image, if there is one already: what runs one after the other use, so that none begins with a disk that is busy writing it.
    pub(super) image: &'a Path,
}

/// A guarded device.
#[derive(Debug)]
pub(super) struct Scene {
    // Dropped in this order: the broker takes its backend along, then what that was on goes.
    broker: BrokerProcess,
    _limit: Option<Group>,
    pub(super) store: Option<Store>,
    pub(super) small: Option<Small>,
    /// Name of the run.
    pub(super) name: String,
    pub(super) seed: u64,
    directory: PathBuf,
    /// The image, as the backend sees it.
    pub(super) image: PathBuf,
    /// Blocks of it.
    pub(super) blocks: u64,
    /// The backend's process.
    pub(super) pid: u32,
}

impl Scene {
    /// Sets one up at a place. `fault` is a plan for our own backend.
    pub(super) fn new(spec: &Spec, plan: &Plan, place: Place<'_>, fault: Option<String>) -> anyhow::Result<Self> {
        let directory = place.directory;
        let outside = spec.kind.outside();
        let small = if outside == Some(Outside::Fill) { Some(Small::mount(&directory.join("small"))?) } else { None };
        let blocks = if small.is_some() { SPARSE_BLOCKS } else { BLOCKS };
        let file = small.as_ref().map_or_else(|| place.image.to_path_buf(), |small| small.path().join("image"));
        make_image(&file, blocks, small.is_some())?;
        let store = match outside {
            Some(Outside::Store(_)) => {
                let mount = directory.join("store");
                std::fs::create_dir_all(&mount)?;
                Some(Store::mount(&file, &mount)?)
            }
            _ => None,
        };
        let image = store.as_ref().map_or(file, Store::image);
        let line = command_line(spec, &image, Some(&monitor_path(directory)), fault);
        let broker = start_broker(plan, directory, &line)?;
        let pid = backend_of(&broker)?;
        let limit = limit(spec, pid)?;
        let name = spec.name.clone();
        Ok(Scene {
            broker,
            _limit: limit,
            store,
            small,
            name,
            seed: spec.seed,
            directory: directory.to_path_buf(),
            image,
            blocks,
            pid,
        })
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        self.broker.socket()
    }

    /// Where the broker answers.
    pub(super) fn control(&self) -> PathBuf {
        self.directory.join("control").join(format!("{DEVICE}.ctl"))
    }

    /// What an injector acts on. The monitor of a qemu-storage-daemon is at `monitor`.
    pub(super) fn subject<'a>(&'a self, monitor: &'a Path) -> Subject<'a> {
        Subject {
            name: &self.name,
            seed: self.seed,
            pid: self.pid,
            image: &self.image,
            monitor,
            small: self.small.as_ref(),
            faults: self.store.as_ref().map(Store::faults),
        }
    }

    /// Where a qemu-storage-daemon has its monitor.
    pub(super) fn monitor(&self) -> PathBuf {
        monitor_path(&self.directory)
    }

    /// The broker's process.
    pub(super) fn broker(&self) -> u32 {
        self.broker.pid()
    }

    /// The end of the broker's log.
    pub(super) fn last_words(&self) -> String {
        self.broker.log_tail(LOG_LINES)
    }
}

/// Where the monitor of a qemu-storage-daemon is.
pub(super) fn monitor_path(directory: &Path) -> PathBuf {
    directory.join("qmp.sock")
}

fn make_image(path: &Path, blocks: u64, sparse: bool) -> anyhow::Result<()> {
    let bytes = blocks as usize * BLOCK;
    if sparse {
        return Ok(std::fs::File::create(path)?.set_len(bytes as u64)?);
    }
    if let Ok(there) = std::fs::File::options().write(true).open(path) {
        // It may have grown.
        return Ok(there.set_len(bytes as u64)?);
    }
    std::fs::write(path, vec![0x5a; bytes]).with_context(|| format!("writing {}", path.display()))?;
    // Whoever reads past the page cache, or flushes, would wait for all of it.
    Ok(std::fs::File::open(path)?.sync_all()?)
}

/// The command line of a backend on that image, with a monitor if it is a qemu-storage-daemon, and a plan of faults if it is our own.
pub(super) fn command_line(spec: &Spec, image: &Path, at: Option<&Path>, fault: Option<String>) -> Vec<String> {
    let image = image.to_path_buf();
    let ours = |direct| Blk { image: image.clone(), queues: 1, engine: Engine::Auto, direct }.command_line("{socket}");
    let qsd = |aio| {
        let mut line =
            Qsd { image: image.clone(), queues: 1, aio, direct: false, throttle: None }.command_line("{socket}");
        if let Some(at) = at {
            line.splice(1..1, monitor(at));
        }
        if spec.kind.outside() == Some(Outside::Throttle) {
            throttled(&mut line);
        }
        line
    };
    let mut line = match spec.backend {
        Backend::Blk => ours(false),
        Backend::BlkDirect => ours(true),
        Backend::Qsd => qsd(Aio::Threads),
        Backend::QsdUring => qsd(Aio::IoUring),
    };
    if let Some(fault) = fault {
        line.extend(["--fault".to_owned(), fault]);
        if matches!(spec.kind.means, Means::Hook(Hook::Threads | Hook::Descriptors | Hook::Leak)) {
            // What these do is what its sandbox would stop.
            line.extend(["--sandbox".to_owned(), "off".to_owned()]);
        }
    }
    line
}

fn start_broker(plan: &Plan, directory: &Path, backend: &[String]) -> anyhow::Result<BrokerProcess> {
    let (tick, window) = (plan.tick_ms.to_string(), plan.window_ms.to_string());
    // Nobody is replaced, however slow it is: the guest shall see the failure. A process that dies has ended the run.
    let options = [
        "--no-shadow",
        "--observe",
        "--quiet",
        "--tick-ms",
        &tick,
        "--window-ms",
        &window,
        "--hang-ms",
        "600000",
        "--stall-ms",
        "3600000",
        "--drain-ms",
        "200",
    ];
    let options = options.map(str::to_owned);
    BrokerProcess::start(&Launch {
        name: DEVICE,
        directory,
        options: &options,
        backend,
        environment: None,
        kept: false,
        program: None,
    })
}

/// The process of the backend.
pub(super) fn backend_of(broker: &BrokerProcess) -> anyhow::Result<u32> {
    let mut lines = broker.connect()?;
    let status = ask(&mut lines, &json!({"verb": "status"}))?;
    let pid =
        status["devices"][0]["primary"]["pid"].as_u64().with_context(|| format!("there is no primary: {status}"))?;
    Ok(u32::try_from(pid)?)
}

/// Asks a broker.
pub(super) fn ask(lines: &mut Lines, command: &Value) -> anyhow::Result<Value> {
    lines.send(command)?;
    let deadline = Instant::now() + ANSWER_MAX;
    loop {
        if let Some(line) = lines.next()? {
            return serde_json::from_str(&line).context("the broker's answer");
        }
        ensure!(Instant::now() < deadline, "the broker does not answer");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The bound that a leak runs into.
pub(super) fn limit(spec: &Spec, pid: u32) -> anyhow::Result<Option<Group>> {
    match spec.kind.means {
        Means::Hook(Hook::Leak) => budget(&spec.name, pid, hooks::LEAK_BYTES).map(Some),
        Means::Hook(Hook::Threads) => {
            let group = Group::new("pids", GROUPS, &spec.name)?;
            group.add(pid)?;
            let there = group.number("pids.current")?;
            group.write("pids.max", &(there + hooks::LEAK_COUNT).to_string())?;
            Ok(Some(group))
        }
        Means::Hook(Hook::Descriptors) => {
            let there = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
            let most = Some(there + hooks::LEAK_COUNT);
            let process = rustix::process::Pid::from_raw(pid.cast_signed()).context("a backend without a process")?;
            let limit = rustix::process::Rlimit { current: most, maximum: most };
            rustix::process::prlimit(Some(process), rustix::process::Resource::Nofile, limit)?;
            Ok(None)
        }
        _ => Ok(None),
    }
}
