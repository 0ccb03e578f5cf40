//! `warmswap guard`: one device, its primary and its shadow.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use warmswap_blk::image::Identity;
use warmswap_core::{DrainMethod, Entry, FenceLevel, Limits, Nanos, OnPrediction, PairConfig, RegionUse, Survivors};
use warmswap_store::Retention;
use warmswap_wire::DeviceType;

use super::{Control, Failure};
use crate::cgroup::Janitor;
use crate::config::{DeviceConfig, Source};
use crate::control;
use crate::driver::{Driver, Ended, Keeping, Reread, listen, take_signals};
use crate::hook::Hook;
use crate::journal::{Journal, JournalSender};
use crate::profile::historian::{self, Beginning, StoreConfig};
use crate::profile::predictor;
use crate::profile::sampler::{self, Pace};
use crate::profile::snapshots::{Described, model_of, window_ms};

/// Options of `warmswap guard`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the device: letters, digits, dots, dashes and underscores
    #[arg(long)]
    name: String,
    /// Where the VMM connects
    #[arg(long)]
    socket: PathBuf,
    /// File mode of that socket, in octal (default: what the umask leaves)
    #[arg(long, value_name = "MODE", value_parser = mode)]
    socket_mode: Option<u32>,
    /// Group of that socket: a group of /etc/group, or a number (default: the broker's group)
    #[arg(long, value_name = "GROUP", value_parser = group)]
    socket_group: Option<u32>,
    /// Type of the device: blk, scsi, net, fs, rng, console, input
    #[arg(long = "type", default_value = "blk", value_parser = device_type)]
    device: DeviceType,
    /// Serve this raw image or block device with the built-in back-end, as primary and as shadow; what follows -- are further options
    /// of `warmswap blk`
    #[arg(long, value_name = "FILE", conflicts_with = "primary_socket")]
    disk: Option<PathBuf>,
    /// Socket of a primary that somebody else started
    #[arg(long, conflicts_with = "command")]
    primary_socket: Option<PathBuf>,
    /// Socket of a shadow that somebody else started
    #[arg(long, requires = "primary_socket")]
    shadow_socket: Option<PathBuf>,
    /// Run without a shadow: a dead primary is replaced by a cold start
    #[arg(long)]
    no_shadow: bool,
    /// Never let the shadow read from the device: it is then less warm, and a storage it cannot reach is noticed late
    #[arg(long)]
    no_canary: bool,
    /// How the backend is kept from new work before it is stopped: private-kick, disable or stop (default: by the program's name,
    /// private-kick for qemu-storage-daemon and vhost-user-blk, disable for vhost-device-*, virtiofsd and vhost_user_block, else stop)
    #[arg(long, value_parser = drain_method)]
    drain: Option<DrainMethod>,
    /// Least proof before another backend may write: stopped, reaped or target
    #[arg(long, default_value = "stopped", value_parser = fence_level)]
    fence: FenceLevel,
    /// Command that makes the storage target refuse a dead backend (WARMSWAP_DEVICE, WARMSWAP_BACKEND_PID); exit code 0 is the proof
    #[arg(long, value_name = "COMMAND")]
    fence_command: Option<String>,
    /// What may be done with requests a dead backend still owed: place (write them into the ring again) or refuse
    #[arg(long, default_value = "place", value_parser = survivors)]
    survivors: Survivors,
    /// What is made of the in-flight region that a backend keeps: witness (it must not contradict the ring) or trust (it is believed where
    /// the ring could not be followed) (default: trust with --disk, else witness)
    #[arg(long, value_name = "USE", value_parser = region)]
    region: Option<RegionUse>,
    /// A primary that is silent this long, in milliseconds, is taken for hung
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..=600_000))]
    hang_ms: u64,
    /// A primary that answers but completes nothing this long, in milliseconds, is failed over once
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    stall_ms: u64,
    /// A planned failover waits this long, in milliseconds, for the primary to complete what it holds
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    drain_ms: u64,
    /// Report predicted failures, do not act on them
    #[arg(long)]
    observe: bool,
    /// Predicted failovers within an hour, at most
    #[arg(long, value_name = "COUNT", default_value_t = 6, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    predicted_per_hour: u32,
    /// After a predicted failover none is made for so many seconds; twice as long each time one did not help, up to an hour
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    cool_down: u64,
    /// Directory for the backends' sockets (default: the control directory)
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Keep the history of the device's profile in this directory, in a file of its name: a day of windows, and the recordings of the last
    /// minutes before failovers (default: in memory only)
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Have the failure model go on with what it had learnt in this health snapshot (default: with the newest in --store)
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
    /// Have the failure model begin with this trained model instead of the one that is built in
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Do not measure the device
    #[arg(long, conflicts_with_all = ["store", "offload_cpus", "restore", "model"])]
    no_profile: bool,
    /// Time between two measurements, in milliseconds
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    tick_ms: u64,
    /// Length of the windows that a profile is made of, in milliseconds
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    window_ms: u64,
    /// Processors on which shadows run, and measuring and keeping profiles is done, as 0,2-3 (default: any). A shadow that becomes the primary
    /// goes where this program may run; one for which they have no time left is not started
    #[arg(long, value_name = "CPUS", value_parser = cpus)]
    offload_cpus: Option<Cpus>,
    /// Command that is run when something happens that somebody may want to act on: failovers, predictions, shadows lost or ready
    /// (WARMSWAP_DEVICE, WARMSWAP_EVENT, the entry as JSON on its standard input); one at a time, each at most 10 s
    #[arg(long, value_name = "COMMAND")]
    hook: Option<String>,
    /// Append the journal to this file, as JSON lines
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Do not print the journal
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    control: Control,
    /// The backend's command line, with {socket} where it shall listen, or {fd} for a listening socket it inherits
    #[arg(last = true, value_name = "BACKEND ARG")]
    command: Vec<String>,
}

/// A list of processors.
#[derive(Clone, Debug)]
struct Cpus(Vec<usize>);

fn cpus(text: &str) -> Result<Cpus, String> {
    const CPUS_MAX: usize = rustix::thread::CpuSet::MAX_CPU;
    let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu < CPUS_MAX);
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Some(first), Some(last)) = (number(first), number(last)) else {
            return Err(format!("expected numbers below {CPUS_MAX} and ranges of them, as 0,2-3"));
        };
        cpus.extend(first..=last);
    }
    if let Ok(allowed) = rustix::thread::sched_getaffinity(None)
        && let Some(absent) = cpus.iter().find(|cpu| !allowed.is_set(**cpu))
    {
        return Err(format!("this process may not run on processor {absent}: there is none, or it is kept from it"));
    }
    Ok(Cpus(cpus))
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "expected a file mode in octal, as 660".to_owned())
}

fn group(name: &str) -> Result<u32, String> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let groups = std::fs::read_to_string("/etc/group").map_err(|error| format!("/etc/group: {error}"))?;
    let line = groups.lines().find(|line| line.split(':').next() == Some(name));
    let number = line.and_then(|line| line.split(':').nth(2)?.parse().ok());
    number.ok_or_else(|| "there is no such group in /etc/group; a number will do as well".to_owned())
}

fn device_type(name: &str) -> Result<DeviceType, String> {
    DeviceType::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = DeviceType::ALL.iter().map(|kind| kind.name()).collect();
        format!("there is no shadow for such a device; known are {}", known.join(", "))
    })
}

fn drain_method(name: &str) -> Result<DrainMethod, String> {
    let method = DrainMethod::ALL.iter().copied().find(|method| method.name() == name);
    method.ok_or_else(|| "expected private-kick, disable or stop".to_owned())
}

fn fence_level(name: &str) -> Result<FenceLevel, String> {
    let levels = [FenceLevel::Stopped, FenceLevel::Reaped, FenceLevel::Target];
    levels.into_iter().find(|level| level.name() == name).ok_or_else(|| "expected stopped, reaped or target".to_owned())
}

fn survivors(name: &str) -> Result<Survivors, String> {
    match name {
        "place" => Ok(Survivors::Place),
        "refuse" => Ok(Survivors::Refuse),
        _ => Err("expected place or refuse".to_owned()),
    }
}

fn region(name: &str) -> Result<RegionUse, String> {
    match name {
        "witness" => Ok(RegionUse::Witness),
        "trust" => Ok(RegionUse::Trust),
        _ => Err("expected witness or trust".to_owned()),
    }
}

/// What all devices of one process share.
struct Shared {
    hook: Option<String>,
    journal: Option<PathBuf>,
    quiet: bool,
    store: Option<StoreConfig>,
    pace: Pace,
    profile: bool,
    cpus: Vec<usize>,
}

impl Shared {
    fn of(args: &Args) -> Self {
        Shared {
            hook: args.hook.clone(),
            journal: args.journal.clone(),
            quiet: args.quiet,
            store: args.store.clone().map(|dir| StoreConfig { dir, retention: Retention::default() }),
            pace: Pace { tick: Nanos::from_millis(args.tick_ms), window: args.window_ms.div_ceil(args.tick_ms) as u32 },
            profile: !args.no_profile,
            cpus: args.offload_cpus.clone().map_or_else(Vec::new, |cpus| cpus.0),
        }
    }
}

/// Runs until a signal.
pub(super) fn run(args: Args) -> Result<u8, Failure> {
    guard(vec![args], Begun { keeping: Keeping::begin()?, reread: None, undone: false })
}

/// What was found out before it was known which devices there are.
pub(super) struct Begun {
    /// What lies in the descriptor store, if there is one. It takes what concerns it out of the environment: there is one thread so far.
    pub(super) keeping: Option<Rc<RefCell<Keeping>>>,
    /// Reads the configuration again.
    pub(super) reread: Option<Arc<Reread>>,
    /// The process before this one did not get through with a new configuration, which is undone.
    pub(super) undone: bool,
}

/// Which option of a guarded device cannot become another one while a guest uses it: what it writes to would be another disk, or nobody would
/// find it any more. The program of a backend may be another, for the next one that is started, its arguments not.
pub(super) fn must_stay(old: &Args, new: &Args) -> Option<&'static str> {
    let arguments = |args: &Args| args.command.get(1..).unwrap_or_default().to_vec();
    let differs = [
        ("socket", old.socket != new.socket),
        ("type", old.device != new.device),
        ("disk", old.disk != new.disk),
        ("primary-socket", old.primary_socket != new.primary_socket),
        ("shadow-socket", old.shadow_socket != new.shadow_socket),
        ("run-dir", old.run_dir != new.run_dir),
        ("control", old.control.dir() != new.control.dir()),
        ("command", arguments(old) != arguments(new) || old.command.is_empty() != new.command.is_empty()),
    ];
    differs.into_iter().find_map(|(option, differs)| differs.then_some(option))
}

impl Args {
    /// Name of the device.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// The options of `guard` for one device, as words.
///
/// # Errors
/// They are not what `guard` takes.
pub(super) fn parse(line: Vec<String>) -> Result<Args, clap::Error> {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }
    let words = std::iter::once("guard".to_owned()).chain(line);
    <Line as clap::Parser>::try_parse_from(words).map(|line| line.args)
}

/// What is wrong with a device can be seen before anything is started.
///
/// # Errors
/// What is wrong, in words.
pub(super) fn check(args: Args) -> Result<(), String> {
    configure(args).and_then(|config| check_paths(&config)).map_err(|failure| failure.message)
}

/// Each line holds the options of `guard` for one device. All of them are guarded by this process: one control thread, one journal, one
/// sampler and one historian. What is not of a single device is taken from the first line.
#[cfg(feature = "lab")]
pub(super) fn together(lines: Vec<Vec<String>>) -> Result<u8, Failure> {
    let parse = |line| parse(line).map_err(|error| Failure::new(2, error.to_string()));
    let begun = Begun { keeping: Keeping::begin()?, reread: None, undone: false };
    guard(lines.into_iter().map(parse).collect::<Result<Vec<_>, _>>()?, begun)
}

/// Guards these devices, of which there is at least one.
pub(super) fn guard(devices: Vec<Args>, begun: Begun) -> Result<u8, Failure> {
    let Begun { keeping, reread, undone } = begun;
    let Some(first) = devices.first() else { return Err(Failure::new(2, "there is no device to guard")) };
    let shared = Shared::of(first);
    if let Some(path) = &first.model {
        predictor::begin_with(super::model::read(path)?);
    }
    let beginning = beginning(&devices)?;
    let mut configs = devices.into_iter().map(configure).collect::<Result<Vec<_>, _>>()?;
    configs.iter().try_for_each(check_paths)?;
    let journal_file = shared.journal.map(|path| open_journal(&path)).transpose()?;
    let signals = take_signals()?;
    let left = keeping.as_ref().map(|keeping| keeping.borrow().left()).unwrap_or_default();
    let hook = shared.hook.map(Hook::start).transpose()?;
    let (janitor, cleaning) = Janitor::start()?;
    let (journal, sender, thread) = Journal::start(journal_file, shared.quiet, hook)?;
    let names: Vec<Arc<str>> = configs.iter().map(|config| config.name.as_str().into()).collect();
    let (notes, history, historian) =
        historian::start(&names, shared.store, beginning, sender.clone(), shared.cpus.clone())?;
    let cpus = shared.cpus.clone();
    let sampler = if shared.profile { Some(sampler::start(shared.pace, shared.cpus, notes.clone())?) } else { None };
    let (mut driver, commander) = Driver::new(signals, janitor, sampler, cpus, keeping, reread)?;
    history.tell_of_alarms(commander.clone(), &configs[0].control_dir);
    let mut control_sockets = Vec::new();
    if undone {
        let entry = Entry::error("ReloadUndone")
            .with("reason", "a process that began with it ended before every device had begun");
        sender.entry(&names[0], entry.with("next", "the configuration before it is used again"));
    }
    end_strangers(&left, &names, &sender)?;
    for config in &mut configs {
        let listener = prepare(config, left.contains(&config.name), &sender)?;
        control_sockets.push(config.control_socket());
        control::serve(config, listener, commander.clone(), journal.clone(), history.clone())?;
    }
    // Those who ask keep what they need of these.
    drop((commander, journal, history));
    let control_dir = configs[0].control_dir.clone();
    let mut unready = configs.len();
    let ended = driver.add(configs, &sender).and_then(|()| {
        driver.run(&mut |config| {
            unready -= 1;
            if unready == 0 {
                sender.started(true);
            }
            let mut out = std::io::stdout();
            // Nobody has to read it.
            let _unread = writeln!(out, "ready: {} listening on {}", config.name, config.socket.display());
            let _unread = out.flush();
        })
    });
    sender.started(!matches!(ended, Ok(Ended::Failed(_))));
    drop((driver, sender, notes));
    names.iter().for_each(|name| historian::forget_alarms(&control_dir, name));
    for socket in &control_sockets {
        let _gone = std::fs::remove_file(socket);
    }
    // What is left of the profile goes to the disk; it may have to say that it cannot.
    if historian.join() {
        thread.join();
    } else {
        eprintln!(
            "warmswap: the last of the profile could not be stored in time: a disk, or a process that is measured, hangs"
        );
    }
    // Every group is removed, or has been named, when this ends.
    let _panicked = cleaning.join();
    match ended? {
        Ended::Left => Ok(warmswap_keeper::RESTART),
        Ended::Asked { at_rest: true } => Ok(0),
        Ended::Asked { at_rest: false } => {
            let text = "not every ring could be brought to rest in time: what the guest is owed is uncertain, check its file system";
            Err(Failure::new(1, text))
        }
        Ended::Failed(reason) => Err(Failure::new(1, spread(&reason))),
    }
}

/// What devices are told, for their health snapshots, and the models they go on with.
fn beginning(devices: &[Args]) -> Result<Beginning, Failure> {
    let mut beginning = Beginning::default();
    // What is no text cannot be given on.
    let arguments: Option<Vec<String>> = std::env::args_os().skip(1).map(|word| word.into_string().ok()).collect();
    let arguments = arguments.unwrap_or_default();
    for args in devices {
        let described = Described { configuration: described(args), arguments: arguments.clone() };
        beginning.described.insert(args.name.clone(), described);
        let Some(path) = &args.restore else { continue };
        let fail = |why: &dyn std::fmt::Display| Failure::new(1, format!("--restore {}: {why}", path.display()));
        let snapshot = warmswap_store::snapshot::read(path)?;
        let now = args.window_ms.to_string();
        if let Some(then) = window_ms(&snapshot.configuration).filter(|then| *then != now) {
            let why = format!(
                "its model learnt from windows of {then} ms, here they are {now} ms long: give --window-ms {then}"
            );
            return Err(fail(&why));
        }
        let model = model_of(&snapshot).map_err(|why| fail(&why))?;
        beginning.models.insert(args.name.clone(), (model, path.display().to_string()));
    }
    Ok(beginning)
}

/// The configuration of a device, as a health snapshot has it.
fn described(args: &Args) -> Vec<(String, String)> {
    let path = |path: &Path| path.display().to_string();
    let backend = match (&args.disk, &args.primary_socket) {
        (Some(disk), _) => format!("built-in on {}", path(disk)),
        (None, Some(socket)) => format!("external at {}", path(socket)),
        (None, None) => args.command.join(" "),
    };
    let on_prediction = if args.observe { OnPrediction::Observe } else { OnPrediction::Act };
    let directory = std::env::current_dir().map_or_else(|_| "-".to_owned(), |it| path(&it));
    [
        ("directory", directory),
        ("name", args.name.clone()),
        ("socket", path(&args.socket)),
        ("type", args.device.name().to_owned()),
        ("backend", backend),
        ("shadow", (!args.no_shadow).to_string()),
        ("canary", (!args.no_canary).to_string()),
        ("fence", args.fence.name().to_owned()),
        ("hang_ms", args.hang_ms.to_string()),
        ("stall_ms", args.stall_ms.to_string()),
        ("drain_ms", args.drain_ms.to_string()),
        ("on_prediction", on_prediction.name().to_owned()),
        ("predicted_per_hour", args.predicted_per_hour.to_string()),
        ("cool_down_s", args.cool_down.to_string()),
        ("tick_ms", args.tick_ms.to_string()),
        ("window_ms", args.window_ms.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// A device that was kept and is not to be guarded any more ends here: nobody looks after its backends.
fn end_strangers(left: &[String], names: &[Arc<str>], journal: &JournalSender) -> Result<(), Failure> {
    for name in left.iter().filter(|name| !names.iter().any(|known| **known == ***name)) {
        let entry = Entry::warning("DeviceDropped").with("reason", "it was kept, and is not to be guarded any more");
        journal.entry(name, entry.with("next", "its backends are ended; its VMM has lost the device"));
        crate::cgroup::end_leftovers(name, &[])?;
    }
    Ok(())
}

/// Takes a device's paths, and returns the listener of its control socket.
/// One that was `kept` is gone on with: its socket is ours already, and what its last broker has left is taken over.
fn prepare(config: &mut DeviceConfig, kept: bool, journal: &JournalSender) -> Result<OwnedFd, Failure> {
    make_dir("--control", &config.control_dir)?;
    make_dir("--run-dir", &config.run_dir)?;
    // Both are taken before anything is started, so that a second broker of that name harms nobody.
    if !kept {
        check_free(&config.socket)?;
    }
    let listener = listen(&config.control_socket()).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            let text = format!("{error}: choose a directory of your own with --control, or set XDG_RUNTIME_DIR");
            Failure::new(1, text)
        }
        _ => error.into(),
    })?;
    if kept {
        return Ok(listener);
    }
    // With the control socket ours, another broker of that name is dead.
    config.predecessor = bury_predecessors(&config.run_dir, &config.name);
    if let Some(pid) = config.predecessor {
        let next = "requests it left are taken from the rings and may run twice: check the guest's file system";
        journal.entry(&config.name, Entry::warning("BrokerDied").with("pid", pid).with("next", next));
    }
    Ok(listener)
}

fn configure(args: Args) -> Result<DeviceConfig, Failure> {
    super::check_name(&args.name)?;
    let source = source(&args)?;
    let shadow = match &source {
        Source::Command(_) => !args.no_shadow,
        Source::External { shadow, .. } => shadow.is_some(),
    };
    let drain = args.drain.unwrap_or_else(|| known_drain(&source));
    let limits = Limits {
        hang: Nanos::from_millis(args.hang_ms),
        stall: Nanos::from_millis(args.stall_ms),
        drain_max: Nanos::from_millis(args.drain_ms),
        predicted_per_hour: args.predicted_per_hour,
        cool_down_min: Nanos::from_millis(args.cool_down * 1_000),
        ..Limits::default()
    };
    if args.fence == FenceLevel::Target && args.fence_command.is_none() {
        return Err(Failure::new(2, "--fence target needs --fence-command"));
    }
    let control_dir = args.control.dir();
    Ok(DeviceConfig {
        name: args.name,
        socket: args.socket,
        socket_mode: args.socket_mode,
        socket_group: args.socket_group,
        predecessor: None,
        pair: PairConfig {
            device: args.device,
            drain,
            survivors: args.survivors,
            region: args.region.unwrap_or(if args.disk.is_some() { RegionUse::Trust } else { RegionUse::Witness }),
            fence: args.fence,
            shadow,
            canary: !args.no_canary,
            on_prediction: if args.observe { OnPrediction::Observe } else { OnPrediction::Act },
            limits,
        },
        source,
        run_dir: args.run_dir.unwrap_or_else(|| control_dir.clone()),
        control_dir,
        fence_command: args.fence_command,
    })
}

fn source(args: &Args) -> Result<Source, Failure> {
    if let Some(primary) = &args.primary_socket {
        let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
        if args.shadow_socket.as_ref().is_some_and(|shadow| real(shadow) == real(primary)) {
            let reason =
                "--primary-socket and --shadow-socket are the same socket: primary and shadow must be two processes";
            return Err(Failure::new(2, reason));
        }
        for (option, path) in [("--primary-socket", Some(primary)), ("--shadow-socket", args.shadow_socket.as_ref())] {
            if let Some(path) = path
                && let Err(error) = std::fs::metadata(path)
            {
                return Err(Failure::new(1, format!("{option} {}: {error}; start the backend first", path.display())));
            }
        }
        return Ok(Source::External { primary: primary.clone(), shadow: args.shadow_socket.clone() });
    }
    if let Some(disk) = &args.disk {
        return built_in(args, disk).map(Source::Command);
    }
    if args.command.is_empty() {
        let text = "give --disk, or the backend's command line after --, or --primary-socket and --shadow-socket";
        return Err(Failure::new(2, text));
    }
    let holders = args.command.iter().filter(|arg| arg.contains("{socket}") || arg.contains("{fd}")).count();
    if holders == 0 {
        let text = "the backend's command line needs {socket} where the backend shall listen (or {fd}): primary and shadow each get \
                    a socket of their own";
        return Err(Failure::new(2, text));
    }
    Ok(Source::Command(args.command.clone()))
}

/// The command line of the built-in back-end: this very program, as it is installed when a backend is started.
fn built_in(args: &Args, disk: &Path) -> Result<Vec<String>, Failure> {
    if args.device != DeviceType::Blk {
        return Err(Failure::new(2, format!("--disk is a device of type blk, not {}", args.device.name())));
    }
    let fail = |error| Failure::new(1, format!("--disk {}: {error}", disk.display()));
    if args.command.first().is_some_and(|word| !word.starts_with('-')) {
        let text = "with --disk only options of `warmswap blk` may follow --, not a backend's command line: leave out one of them";
        return Err(Failure::new(2, text));
    }
    // Its name stays what it is, for it may be one that outlives a device's number. What it names must stay the same file: a shadow that
    // opened another one would turn the guest's disk into another disk.
    let identity = Identity::of(&File::open(disk).map_err(fail)?).map_err(fail)?;
    let disk = std::path::absolute(disk).map_err(fail)?;
    let program = std::env::current_exe().map_err(|error| Failure::new(1, format!("this program's path: {error}")))?;
    let word = |path: &Path| {
        let word = path.to_str().filter(|it| !it.contains("{socket}") && !it.contains("{fd}"));
        word.map(str::to_owned)
            .ok_or_else(|| Failure::new(2, format!("{}: no such path can be given on", path.display())))
    };
    let mut line = vec![word(&program)?, "blk".into(), "--socket-path".into(), "{socket}".into()];
    line.extend(["--blk-file".into(), word(&disk)?]);
    line.extend(["--image-id".into(), format!("{}:{}", identity.device, identity.inode)]);
    line.extend(args.command.iter().cloned());
    Ok(line)
}

/// How well-known backends are drained. An unknown one is asked to stop; if its claim does not hold it is fenced.
fn known_drain(source: &Source) -> DrainMethod {
    let Source::Command(command) = source else { return DrainMethod::Stop };
    let program = command.first().map_or("", |program| program.rsplit('/').next().unwrap_or(program));
    match program {
        "qemu-storage-daemon" | "vhost-user-blk" => DrainMethod::PrivateKick,
        name if name.starts_with("vhost-device-") || matches!(name, "vhost_user_block" | "virtiofsd") => {
            DrainMethod::Disable
        }
        _ => DrainMethod::Stop,
    }
}

/// Longest path of a Unix socket, in bytes (`sun_path` with its end).
const SOCKET_PATH_MAX: usize = 107;

/// What is wrong with a path is said before anything is started.
fn check_paths(config: &DeviceConfig) -> Result<(), Failure> {
    let check = |option: &str, path: &Path| match path.as_os_str().len() {
        len if len > SOCKET_PATH_MAX => {
            let text =
                format!("{option}: {} has {len} bytes, a socket's path at most {SOCKET_PATH_MAX}", path.display());
            Err(Failure::new(2, text))
        }
        _ => Ok(()),
    };
    check("--socket", &config.socket)?;
    check("--control", &config.control_socket())?;
    // As long as such a path may become.
    check("--run-dir", &config.run_dir.join(format!("{}.{}/backend-100000.sock", config.name, std::process::id())))?;
    match std::fs::metadata(&config.socket) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            let what = if found.is_dir() { "a directory" } else { "a file" };
            Err(Failure::new(
                1,
                format!("--socket {} is {what}, not a socket: it is left alone", config.socket.display()),
            ))
        }
        _ => Ok(()),
    }
}

fn open_journal(path: &Path) -> Result<File, Failure> {
    let fail = |error| Failure::new(1, format!("--journal {}: {error}", path.display()));
    File::options().create(true).append(true).open(path).map_err(fail)
}

fn make_dir(option: &str, path: &Path) -> Result<(), Failure> {
    let advice = match std::env::var_os("XDG_RUNTIME_DIR") {
        None if !rustix::process::geteuid().is_root() => " (XDG_RUNTIME_DIR is not set)",
        _ => "",
    };
    std::fs::create_dir_all(path)
        .map_err(|error| Failure::new(1, format!("{option} {}: {error}{advice}", path.display())))
}

/// Removes the run directories of dead brokers of this name, and says which was the last: one that ends in order leaves none.
fn bury_predecessors(run_dir: &Path, name: &str) -> Option<u32> {
    let mut found = None;
    for entry in std::fs::read_dir(run_dir).ok()?.flatten() {
        let file_name = entry.file_name();
        let Some((device, pid)) = file_name.to_str().and_then(|text| text.rsplit_once('.')) else { continue };
        let Ok(pid) = pid.parse::<u32>() else { continue };
        if device != name || pid == std::process::id() || !entry.path().is_dir() || is_broker(pid) {
            continue;
        }
        let age = entry.metadata().and_then(|data| data.modified()).ok();
        // Only sockets of its backends are in it, and they have died with it.
        let _left = std::fs::remove_dir_all(entry.path());
        found = found.max(Some((age, pid)));
    }
    found.map(|(_, pid)| pid)
}

/// Whether that process is a living broker; its number may have been given to somebody else.
fn is_broker(pid: u32) -> bool {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).any(|word| word == b"guard" || word == b"daemon")
}

/// A reason with what a backend printed on lines of its own.
fn spread(reason: &str) -> String {
    match reason.split_once("; it said: ") {
        Some((how, said)) => format!("{how}; it said:\n  {}", said.replace(" / ", "\n  ")),
        None => reason.to_owned(),
    }
}

fn check_free(socket: &Path) -> Result<(), Failure> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        let text = format!("{}: another process listens there; is this device guarded already?", socket.display());
        return Err(Failure::new(1, text));
    }
    match socket.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) if !parent.is_dir() => {
            Err(Failure::new(1, format!("{}: there is no such directory", parent.display())))
        }
        _ => Ok(()),
    }
}
