//! `warmswap blk`: the built-in back-end, by the conventions for back-end programs (QEMU `docs/interop/vhost-user.rst`, "Backend
//! programs").

use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use warmswap_blk::image::{Direct, Identity};
use warmswap_blk::sandbox::{Policy, Seccomp, Switch};
use warmswap_blk::{Endpoint, EngineKind, LOOK_MAX, Options, QUEUES_MAX};

use super::Failure;

/// Queues if nothing else is said: more than most guests use, and one that is not used costs a few kilobytes.
const QUEUES: u16 = 16;

/// Options of `warmswap blk`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to listen for the front-end; what a dead back-end left there is replaced
    #[arg(long, value_name = "PATH", required_unless_present = "fd")]
    socket_path: Option<PathBuf>,
    /// A socket that is inherited: one that listens, or one that is connected
    #[arg(long, value_name = "FDNUM", conflicts_with = "socket_path", value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<RawFd>,
    /// Print what this program can do, as JSON, and end
    #[arg(long)]
    print_capabilities: bool,
    /// The image: a raw file or a block device
    #[arg(long, value_name = "PATH")]
    blk_file: PathBuf,
    /// The file that the image must be, as DEVICE:INODE: its path may lead to another one by now
    #[arg(long, value_name = "DEVICE:INODE", value_parser = identity, hide = true)]
    image_id: Option<Identity>,
    /// Nothing is written to the image
    #[arg(long)]
    read_only: bool,
    /// Queues of the device: at least as many as the VMM uses, which is one for each virtual processor with QEMU
    #[arg(long, value_name = "NUMBER", default_value_t = QUEUES, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    num_queues: u16,
    /// Threads that serve the queues: queue q belongs to thread q modulo their number
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    workers: u16,
    /// How I/O is done: auto (plain calls on an image in memory, else uring where the system allows it, else sync), uring or sync
    #[arg(long, default_value = "auto", value_parser = engine)]
    engine: EngineKind,
    /// Go past the page cache: auto (where the file system can), on or off
    #[arg(long, default_value = "auto", value_parser = direct)]
    direct: Direct,
    /// Begin with a write cache, which the guest flushes and may switch off: on, or off (every write is durable when it is completed)
    #[arg(long, value_name = "ON|OFF", default_value = "on", value_parser = on_off, action = clap::ArgAction::Set)]
    write_cache: bool,
    /// Name of the device, as the guest sees it; 20 bytes at most
    #[arg(long, default_value = "", value_parser = serial)]
    serial: String,
    /// Longest time, in microseconds, for which a thread without work looks on before it sleeps; 0: it sleeps at once
    #[arg(long, value_name = "US", default_value_t = u64::try_from(LOOK_MAX.as_micros()).unwrap_or(0), value_parser = clap::value_parser!(u64).range(0..=10_000))]
    look_us: u64,
    /// Give up privileges and access to files: on (as far as the kernel can), require (or end) or off
    #[arg(long, default_value = "on", value_parser = ["on", "require", "off"])]
    sandbox: String,
    /// Filter system calls: on (another one ends the process), log (another one is logged) or off
    #[arg(long, default_value = "on", value_parser = ["on", "log", "off"])]
    seccomp: String,
    /// Faults on purpose, for the laboratory
    #[cfg(feature = "lab")]
    #[arg(long, value_name = "PLAN", env = "WARMSWAP_BLK_FAULT", hide = true)]
    fault: Option<String>,
}

fn engine(word: &str) -> Result<EngineKind, String> {
    let kinds = [EngineKind::Auto, EngineKind::Uring, EngineKind::Sync];
    kinds.into_iter().find(|kind| kind.name() == word).ok_or_else(|| "expected auto, uring or sync".to_owned())
}

fn direct(word: &str) -> Result<Direct, String> {
    match word {
        "auto" => Ok(Direct::Auto),
        "on" => Ok(Direct::On),
        "off" => Ok(Direct::Off),
        _ => Err("expected auto, on or off".to_owned()),
    }
}

fn identity(text: &str) -> Result<Identity, String> {
    let numbers = text.split_once(':').and_then(|(device, inode)| Some((device.parse().ok()?, inode.parse().ok()?)));
    let (device, inode) = numbers.ok_or_else(|| "expected two numbers and a colon between".to_owned())?;
    Ok(Identity { device, inode })
}

fn on_off(word: &str) -> Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        0..=20 => Ok(text.to_owned()),
        len => Err(format!("it has {len} bytes, a serial at most 20")),
    }
}

/// What a management layer may count on (`docs/interop/vhost-user.json`).
pub(super) fn print_capabilities() -> ExitCode {
    let capabilities = serde_json::json!({ "type": "block", "features": ["blk-file", "read-only"] });
    // Nobody has to read it.
    let _unread = writeln!(std::io::stdout(), "{capabilities:#}");
    ExitCode::SUCCESS
}

/// Serves until a signal.
pub(super) fn run(args: Args) -> Result<u8, Failure> {
    #[cfg(feature = "lab")]
    if let Some(fault) = &args.fault {
        warmswap_blk::faults::plan(fault).map_err(|error| Failure::new(2, error))?;
    }
    warmswap_blk::run(&options(args)?).map_err(|error| Failure::new(1, error.to_string()))?;
    Ok(0)
}

fn options(args: Args) -> Result<Options, Failure> {
    let endpoint = match (args.socket_path, args.fd) {
        (Some(path), _) => Endpoint::Path(path),
        (None, Some(fd)) => Endpoint::Inherited(fd),
        (None, None) => return Err(Failure::new(2, "give --socket-path or --fd")),
    };
    let layers = if args.sandbox == "off" { Switch::Off } else { Switch::On };
    let seccomp = match args.seccomp.as_str() {
        _ if args.sandbox == "off" => Seccomp::Off,
        "off" => Seccomp::Off,
        "log" => Seccomp::Log,
        _ => Seccomp::On,
    };
    Ok(Options {
        endpoint,
        image: args.blk_file,
        identity: args.image_id,
        read_only: args.read_only,
        direct: args.direct,
        engine: args.engine,
        queues: args.num_queues,
        workers: args.workers,
        serial: args.serial,
        write_cache: args.write_cache,
        look_max: Duration::from_micros(args.look_us),
        sandbox: Policy {
            privileges: layers,
            core_files: layers,
            landlock: layers,
            seccomp,
            require: args.sandbox == "require",
        },
    })
}
