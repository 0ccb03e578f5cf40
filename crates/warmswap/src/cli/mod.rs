//! The command line.
//!
//! Exit codes: 0 done, 1 failed, 2 usage, 3 refused, 4 no warmswap answers, 5 not protected (`status --check`).

mod blk;
mod daemon;
mod device;
mod events;
mod example;
mod export;
mod failover;
mod guard;
mod keeper;
mod model;
mod plain;
mod profile;
mod record;
mod reload;
mod schema;
mod show;
mod snapshot;
mod time;
mod top;
mod upgrade;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Guards a VM's device: a warm shadow beside its backend, and a failover that loses nothing.
#[derive(Debug, Parser)]
#[command(
    name = "warmswap",
    version,
    about,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 refused, 4 no warmswap answers, 5 not protected (status --check)"
)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Guard one device: start primary and shadow, and listen for the VMM
    Guard(Box<guard::Args>),
    /// Serve one raw image or block device as a vhost-user-blk back-end
    Blk(blk::Args),
    /// Show devices, roles, rings and failovers
    #[command(after_help = show::LEGEND)]
    Status {
        /// Only these devices
        names: Vec<String>,
        /// End with exit code 5 unless every device shown is protected
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        control: Control,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show everything that is known of one device: its status and its whole profile
    Show(device::Args),
    /// Watch devices on a terminal: load, latency and resources as they change
    #[command(after_help = top::LEGEND)]
    Top(top::Args),
    /// Print the journal
    Events {
        /// Only this device
        name: Option<String>,
        /// Go on as events happen, of all devices that are guarded now
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        control: Control,
        /// Print JSON lines
        #[arg(long)]
        json: bool,
    },
    /// Have the shadow take over, and wait for the end of it; the old primary is ended and a new shadow started
    Failover(failover::Args),
    /// Replace the running program by the one that is installed now, under load: the guest's I/O goes on, and the next process goes on
    /// with every device of the old one
    Upgrade(upgrade::Args),
    /// Have `warmswap daemon` read its configuration again, under load: all of it is put in force, or nothing of it
    Reload(reload::Args),
    /// Write the profile of a device as a table: CSV or Parquet, one row per window or tick, one column per feature
    Export(export::Args),
    /// Write every tick and window of a device to a file as they happen, for `replay`
    Record(record::Args),
    /// Read what `record` wrote, and print its windows
    Replay {
        /// The file
        file: PathBuf,
        /// Print every record as a JSON line
        #[arg(long)]
        json: bool,
    },
    /// Health snapshots: take one, list, show and compare them, go on from one
    Snapshot {
        #[command(subcommand)]
        verb: snapshot::Verb,
    },
    /// The trained model that the failure model of every device begins with, and what that of one device has learnt
    Model {
        #[command(subcommand)]
        verb: model::Verb,
    },
    /// Print what a profile holds: the name, unit, role, source and meaning of every feature
    Schema {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print a table in Markdown
        #[arg(long, conflicts_with = "json")]
        markdown: bool,
    },
    /// Guard every device of a configuration file in one process
    Daemon(daemon::Args),
    /// Say whether a configuration file could be used, and where it is wrong if not
    CheckConfig(daemon::Args),
    /// Hold the descriptors of a command, and start it again with them when it dies
    #[command(after_help = keeper::LEGEND)]
    Keeper(keeper::Args),
    /// Print a ready-made VMM configuration for a guarded device
    Example {
        /// For which VMM
        #[arg(value_enum)]
        vmm: example::Vmm,
        /// The device
        name: String,
        /// Where the VMM connects
        #[arg(long)]
        socket: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Where control sockets are.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Control {
    /// Directory of the control sockets (default: /run/warmswap for root, else $XDG_RUNTIME_DIR/warmswap)
    #[arg(long = "control", value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Control {
    pub(crate) fn dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(default_dir)
    }
}

/// `/run/warmswap` for root, the user's own runtime directory otherwise.
fn default_dir() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !rustix::process::geteuid().is_root());
    runtime.map_or_else(|| PathBuf::from("/run/warmswap"), |dir| PathBuf::from(dir).join("warmswap"))
}

/// The name under which the program is `warmswap blk`: front-ends that start back-ends themselves can give a program and no verb.
const BLK_NAME: &str = "warmswap-blk";

/// Runs the program with these arguments (the first is its name).
#[must_use]
pub fn main(args: impl IntoIterator<Item = std::ffi::OsString>) -> ExitCode {
    let mut args: Vec<std::ffi::OsString> = args.into_iter().collect();
    if args.first().is_some_and(|name| PathBuf::from(name).file_name().is_some_and(|name| name == BLK_NAME)) {
        args.insert(1, "blk".into());
    }
    // It wins over everything else that is given, right or wrong.
    if args.get(1).is_some_and(|verb| verb == "blk") && args.iter().any(|arg| arg == "--print-capabilities") {
        return blk::print_capabilities();
    }
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are no failures.
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            let _unwritable = error.print();
            return ExitCode::from(code);
        }
    };
    outcome(match args.verb {
        Verb::Guard(args) => guard::run(*args),
        Verb::Blk(args) => blk::run(args),
        Verb::Status { names, check, control, json } => show::status(&names, check, &control, json),
        Verb::Show(args) => device::run(&args),
        Verb::Top(args) => top::run(&args),
        Verb::Events { name, follow, control, json } => events::run(name, follow, &control, json),
        Verb::Failover(args) => failover::run(&args),
        Verb::Upgrade(args) => upgrade::run(&args),
        Verb::Reload(args) => reload::run(&args),
        Verb::Export(args) => export::run(&args),
        Verb::Record(args) => record::record(&args),
        Verb::Replay { file, json } => record::replay(&file, json),
        Verb::Snapshot { verb } => snapshot::run(&verb),
        Verb::Model { verb } => model::run(&verb),
        Verb::Schema { json, markdown } => schema::run(json, markdown),
        Verb::Daemon(args) => daemon::run(&args),
        Verb::CheckConfig(args) => daemon::check(&args),
        Verb::Keeper(args) => keeper::run(args),
        Verb::Example { vmm, name, socket, json } => example::print(vmm, &name, socket, json),
    })
}

/// Guards many devices in one process: each line holds the options of `guard` for one of them. For instruments only: what is promised
/// is promised of one device to a process.
#[cfg(feature = "lab")]
#[must_use]
pub fn guard_together(lines: Vec<Vec<String>>) -> ExitCode {
    outcome(guard::together(lines))
}

fn outcome(result: Result<u8, Failure>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            plain::say(&failure.message);
            ExitCode::from(failure.code)
        }
    }
}

/// Checks the name of a device: it becomes part of paths.
fn check_name(name: &str) -> Result<(), Failure> {
    if !crate::control::is_name(name) {
        return Err(Failure::new(2, "--name takes letters, digits, dots, dashes and underscores, at most 64"));
    }
    Ok(())
}

/// Writes a file; one that is there is replaced only if it is of a kind that is written here.
fn write_own(path: &std::path::Path, bytes: &[u8]) -> Result<(), Failure> {
    let fail = |error: std::io::Error| Failure::new(1, format!("{}: {error}", path.display()));
    let mut first = [0; 4];
    // A pipe or a terminal keeps nothing that could be lost.
    let is_file = std::fs::metadata(path).is_ok_and(|found| found.is_file());
    if is_file {
        let mut there = std::fs::File::open(path).map_err(fail)?;
        let read = std::io::Read::read(&mut there, &mut first).map_err(fail)?;
        let ours = read == 0 || first.starts_with(b"wsM") || first.starts_with(b"{");
        if !ours {
            return Err(Failure::new(
                1,
                format!("{}: it is there and is something else: it is left alone", path.display()),
            ));
        }
    }
    std::fs::write(path, bytes).map_err(fail)
}

/// What a file of another kind is for.
fn hint(bytes: &[u8]) -> &'static str {
    match bytes.get(..4) {
        Some(b"wsMd") => "; it is a trained model, for `guard --model`",
        Some(b"wsMs") => "; it is what a device's model has learnt, for `model load`",
        Some(b"wsSn") => "; it is a health snapshot: `snapshot export --model` writes its model",
        _ => "",
    }
}

/// Why a command failed, and its exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
    broken_pipe: bool,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Failure { code, message: message.into(), broken_pipe: false }
    }

    fn is_broken_pipe(&self) -> bool {
        self.broken_pipe
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        let broken_pipe = error.kind() == std::io::ErrorKind::BrokenPipe;
        Failure { code: 1, message: error.to_string(), broken_pipe }
    }
}

impl From<warmswap_store::StoreError> for Failure {
    fn from(error: warmswap_store::StoreError) -> Self {
        Failure::new(1, error.to_string())
    }
}

impl From<crate::control::ClientError> for Failure {
    fn from(error: crate::control::ClientError) -> Self {
        use crate::control::ClientError;
        let code = match &error {
            ClientError::Unreachable { .. } | ClientError::Silent { .. } => 4,
            ClientError::Ended(_) => 1,
            ClientError::Refused { code, .. } => *code,
        };
        // A broker's reason is one line: with more of them it could speak for somebody else.
        Failure::new(code, plain::clean(&error.to_string()))
    }
}
