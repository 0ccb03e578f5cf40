//! What surrounds a run: an image, the way to it of each backend, and whoever looks after the backends.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::json;

use super::cases::{Case, Mode, Variant};
use super::supervisor::Supervisor;
use super::turns::Turns;
use crate::campaign::fuse::Store;
use crate::campaign::inject::{Small, Subject};
use crate::campaign::kind::{Backend, Outside};
use crate::campaign::plan::Plan;
use crate::campaign::scene::{DEVICE, SPARSE_BLOCKS, ask, backend_of, command_line, limit, monitor_path};
use crate::campaign::workload::BLOCKS;
use crate::common::broker::{BrokerProcess, Launch};
use crate::common::cgroup::Group;
use crate::guest::BLOCK;

/// Option of `guard` by which it reports what it foresees and does nothing about it.
const OBSERVE: &str = "--observe";
/// A primary that answers and completes nothing for so long is failed over: 30 s of a real device, in the compressed time of a campaign.
const STALL_MS: &str = "6000";
/// A pair is ready so soon after the boot of its guest.
const READY_MAX: Duration = Duration::from_secs(5);
/// Lines of a log in an error.
const LOG_LINES: usize = 20;

/// A device with those who look after it.
#[derive(Debug)]
pub(super) struct World {
    // Dropped in this order: whoever looks after the backends takes them along, then what they were on goes.
    keeper: Keeper,
    _limit: Option<Group>,
    store: Option<Store>,
    _other: Option<Store>,
    small: Option<Small>,
    directory: PathBuf,
    name: String,
    seed: u64,
    /// The image, as the first backend sees it.
    pub(super) image: PathBuf,
    /// Blocks of it.
    pub(super) blocks: u64,
    /// The first backend's process.
    pub(super) pid: u32,
}

/// Who looks after the backends.
#[derive(Debug)]
enum Keeper {
    Broker(BrokerProcess),
    Supervisor(Supervisor),
}

impl World {
    /// Sets one up in an empty directory. `fault` is a plan for our own backend, the first one.
    pub(super) fn new(
        case: &Case,
        mode: Mode,
        plan: &Plan,
        directory: &Path,
        fault: Option<String>,
    ) -> anyhow::Result<Self> {
        let spec = &case.spec;
        let outside = spec.kind.outside();
        let small = if outside == Some(Outside::Fill) { Some(Small::mount(&directory.join("small"))?) } else { None };
        let blocks = if small.is_some() { SPARSE_BLOCKS } else { BLOCKS };
        let file = small.as_ref().map_or(directory, Small::path).join("image");
        make_image(&file, blocks, small.is_some())?;
        let store = match outside {
            Some(Outside::Store(_)) => Some(mount(&file, &directory.join("store"))?),
            _ => None,
        };
        // Without a broker there is one way to the storage, for every backend that comes.
        let two = case.variant == Variant::OwnPath && mode != Mode::Reconnect;
        let other = if two { Some(mount(&file, &directory.join("other"))?) } else { None };
        let image = store.as_ref().map_or(file, Store::image);
        let healthy = other.as_ref().map_or_else(|| image.clone(), Store::image);
        let turns = Turns {
            first: command_line(spec, &image, Some(&monitor_path(directory)), fault),
            later: command_line(spec, &healthy, None, None),
        };
        let name = format!("{}-{}", spec.name, mode.name());
        let (keeper, pid) = match mode {
            Mode::Predictive | Mode::Reactive => {
                let broker = start_broker(spec.backend, mode, plan, directory, &turns)?;
                let pid = backend_of(&broker)?;
                (Keeper::Broker(broker), pid)
            }
            Mode::Reconnect => {
                let supervisor = Supervisor::start(turns, directory)?;
                let pid = supervisor.pid;
                (Keeper::Supervisor(supervisor), pid)
            }
        };
        let limit = limit(&spec.named(&name), pid)?;
        let (directory, seed) = (directory.to_path_buf(), spec.seed);
        Ok(World { keeper, _limit: limit, store, _other: other, small, directory, name, seed, image, blocks, pid })
    }

    /// Name of the run.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where the VMM connects.
    pub(super) fn socket(&self) -> PathBuf {
        match &self.keeper {
            Keeper::Broker(broker) => broker.socket(),
            Keeper::Supervisor(supervisor) => supervisor.socket(),
        }
    }

    /// Where the broker answers, if there is one.
    pub(super) fn control(&self) -> Option<PathBuf> {
        let path = || self.directory.join("control").join(format!("{DEVICE}.ctl"));
        matches!(self.keeper, Keeper::Broker(_)).then(path)
    }

    /// The broker's process, if there is one.
    pub(super) fn broker(&self) -> Option<u32> {
        match &self.keeper {
            Keeper::Broker(broker) => Some(broker.pid()),
            Keeper::Supervisor(_) => None,
        }
    }

    /// Where a qemu-storage-daemon has its monitor.
    pub(super) fn monitor(&self) -> PathBuf {
        monitor_path(&self.directory)
    }

    /// Whether it is the first backend that serves the guest, which was just booted. A broker takes whichever of a pair is ready first.
    pub(super) fn is_served_by_the_first(&self) -> anyhow::Result<bool> {
        let Keeper::Broker(broker) = &self.keeper else { return Ok(true) };
        let mut lines = broker.connect()?;
        let until = Instant::now() + READY_MAX;
        loop {
            let status = ask(&mut lines, &json!({"verb": "status"}))?;
            let device = &status["devices"][0];
            if device["state"] == "protected" {
                return Ok(device["primary"]["pid"] == self.pid);
            }
            ensure!(Instant::now() < until, "there is no pair: {status}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What an injector acts on.
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

    /// Makes room again on a file system that was filled.
    pub(super) fn make_room(&self) {
        if let Some(small) = &self.small {
            // There may be none.
            let _ = std::fs::remove_file(small.path().join("filler"));
        }
    }

    /// The end of the log of whoever looks after the backends.
    pub(super) fn last_words(&self) -> String {
        match &self.keeper {
            Keeper::Broker(broker) => broker.log_tail(LOG_LINES),
            Keeper::Supervisor(_) => std::fs::read_to_string(self.directory.join("backends.log")).unwrap_or_default(),
        }
    }

    /// A broker lives to the end.
    pub(super) fn must_live(&mut self) -> anyhow::Result<()> {
        if let Keeper::Broker(broker) = &mut self.keeper {
            let status = broker.ended()?;
            ensure!(status.is_none(), "the broker ended: {status:?}");
        }
        Ok(())
    }
}

fn mount(file: &Path, at: &Path) -> anyhow::Result<Store> {
    std::fs::create_dir_all(at)?;
    Store::mount(file, at)
}

/// An image that is all zero.
fn make_image(path: &Path, blocks: u64, sparse: bool) -> anyhow::Result<()> {
    let bytes = blocks as usize * BLOCK;
    if sparse {
        return Ok(std::fs::File::create(path)?.set_len(bytes as u64)?);
    }
    std::fs::write(path, vec![0; bytes]).with_context(|| format!("writing {}", path.display()))?;
    // Whoever reads past the page cache, or flushes, would wait for all of it.
    Ok(std::fs::File::open(path)?.sync_all()?)
}

fn start_broker(
    backend: Backend,
    mode: Mode,
    plan: &Plan,
    directory: &Path,
    turns: &Turns,
) -> anyhow::Result<BrokerProcess> {
    let (tick, window) = (plan.tick_ms.to_string(), plan.window_ms.to_string());
    let mut options = vec!["--tick-ms", &tick, "--window-ms", &window, "--hang-ms", "500", "--stall-ms", STALL_MS];
    // The rest after a predicted failover in compressed time, too.
    options.extend(["--drain-ms", "200", "--cool-down", "2"]);
    // What a broker knows by the name of a program, which is hidden from it here.
    options.extend(match backend {
        Backend::Blk | Backend::BlkDirect => ["--region", "trust"],
        Backend::Qsd | Backend::QsdUring => ["--drain", "private-kick"],
    });
    if mode == Mode::Reactive {
        options.push(OBSERVE);
    }
    let options: Vec<String> = options.into_iter().map(str::to_owned).collect();
    let backend = turns.command_line(&directory.join("turns.json"))?;
    BrokerProcess::start(&Launch {
        name: DEVICE,
        directory,
        options: &options,
        backend: &backend,
        environment: None,
        kept: false,
        program: None,
    })
}
