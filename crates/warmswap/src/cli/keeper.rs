//! `warmswap keeper`: a parent that holds the descriptors of a command.

use std::ffi::OsString;
use std::path::PathBuf;

use warmswap_keeper::{Keeper, Options};

use super::Failure;

/// What is held, and when the command is started again.
pub(super) const LEGEND: &str = "\
The command is started again, with every descriptor it has sent: at once, with a delay only if it dies early several times in a row.
It ends for good with status 0, or with any status after SIGTERM or SIGINT, which are passed on, as SIGHUP is.
Status 75 asks to be started again: a live upgrade. Where systemd runs, its own descriptor store does the same.";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many descriptors are held at most (default: 32000, or as many as the limit of descriptors allows)
    #[arg(long, value_name = "N")]
    descriptors_max: Option<usize>,
    /// Where the socket is made that the command sends descriptors to (default: /run/warmswap for root, else
    /// $XDG_RUNTIME_DIR/warmswap)
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The command, with its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the keeper until its command has ended for good.
pub(super) fn run(args: Args) -> Result<u8, Failure> {
    let Args { descriptors_max, run_dir, command } = args;
    let options = Options { descriptors_max, run_dir: run_dir.unwrap_or_else(super::default_dir), command };
    Ok(Keeper::prepare(&options)?.run())
}
