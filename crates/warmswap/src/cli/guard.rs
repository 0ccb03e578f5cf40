//! `warmswap guard`: one device, its primary and its shadow.

use std::io::Write;
use std::path::PathBuf;

use warmswap_core::{DrainMethod, FenceLevel, Limits, Nanos, PairConfig, Survivors};
use warmswap_wire::DeviceType;

use super::{Control, Failure};
use crate::cgroup::Janitor;
use crate::config::{DeviceConfig, Source};
use crate::control;
use crate::driver::{Driver, Ended, listen, take_signals};
use crate::journal::Journal;

/// Options of `warmswap guard`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the device: letters, digits, dots and dashes
    #[arg(long)]
    name: String,
    /// Where the VMM connects
    #[arg(long)]
    socket: PathBuf,
    /// Type of the device: blk, scsi, net, fs, rng, console, input
    #[arg(long = "type", default_value = "blk", value_parser = device_type)]
    device: DeviceType,
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
    /// How the backend is kept from new work before it is stopped: private-kick, disable or stop
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
    /// A primary that is silent this long, in milliseconds, is taken for hung
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..=600_000))]
    hang_ms: u64,
    /// A primary that answers but completes nothing this long, in milliseconds, is failed over once
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    stall_ms: u64,
    /// A planned failover waits this long, in milliseconds, for the primary to complete what it holds
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    drain_ms: u64,
    /// Directory for the backends' sockets (default: the control directory)
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
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

/// Runs until a signal.
pub(super) fn run(args: Args) -> Result<u8, Failure> {
    let journal_file = args.journal.clone();
    let quiet = args.quiet;
    let config = configure(args)?;
    let signals = take_signals()?;
    let (janitor, cleaning) = Janitor::start()?;
    let (mut driver, commander) = Driver::new(signals, janitor)?;
    let (journal, sender, thread) = Journal::start(journal_file.as_deref(), quiet)?;
    std::fs::create_dir_all(&config.control_dir)?;
    let control_socket = config.control_socket();
    // Both are taken before anything is started, so that a second broker of that name harms nobody.
    check_free(&config.socket)?;
    let listener = listen(&control_socket)?;
    control::serve(&config, listener, commander, journal)?;
    let ended = driver.add(config, sender.clone()).and_then(|()| {
        driver.run(&mut |config| {
            let mut out = std::io::stdout();
            // Nobody has to read it.
            let _unread = writeln!(out, "ready: {} listening on {}", config.name, config.socket.display());
            let _unread = out.flush();
        })
    });
    drop((driver, sender));
    let _gone = std::fs::remove_file(&control_socket);
    thread.join();
    // Every group is removed, or has been named, when this ends.
    let _panicked = cleaning.join();
    match ended? {
        Ended::Asked => Ok(0),
        Ended::Failed(reason) => Err(Failure::new(1, reason)),
    }
}

fn configure(args: Args) -> Result<DeviceConfig, Failure> {
    let name_ok = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '_';
    if args.name.is_empty() || args.name.len() > 64 || args.name.starts_with('.') || !args.name.chars().all(name_ok) {
        return Err(Failure::new(2, "--name takes letters, digits, dots, dashes and underscores, at most 64"));
    }
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
        ..Limits::default()
    };
    if args.fence == FenceLevel::Target && args.fence_command.is_none() {
        return Err(Failure::new(2, "--fence target needs --fence-command"));
    }
    let control_dir = args.control.dir();
    Ok(DeviceConfig {
        name: args.name,
        socket: args.socket,
        pair: PairConfig {
            device: args.device,
            drain,
            survivors: args.survivors,
            fence: args.fence,
            shadow,
            canary: !args.no_canary,
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
        return Ok(Source::External { primary: primary.clone(), shadow: args.shadow_socket.clone() });
    }
    if args.command.is_empty() {
        let text = "give the backend's command line after --, or --primary-socket and --shadow-socket";
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

/// How well-known backends are drained. An unknown one is asked to stop; if its claim does not hold it is fenced.
fn known_drain(source: &Source) -> DrainMethod {
    let Source::Command(command) = source else { return DrainMethod::Stop };
    let program = command.first().map_or("", |program| program.rsplit('/').next().unwrap_or(program));
    match program {
        "qemu-storage-daemon" | "vhost-user-blk" => DrainMethod::PrivateKick,
        name if name.starts_with("vhost-device-") || name == "vhost_user_block" => DrainMethod::Disable,
        _ => DrainMethod::Stop,
    }
}

fn check_free(socket: &std::path::Path) -> Result<(), Failure> {
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
