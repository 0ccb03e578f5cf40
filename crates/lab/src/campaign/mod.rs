//! `lab campaign`: real backends driven into failure, and healthy ones through all that a healthy life holds, for whoever learns from their
//! profiles or judges who has learned.
//!
//! A **run** is one device with its own image, backend, broker and guest. The broker is the real one, told never to replace anybody
//! (`--no-shadow`, `--hang-ms`, `--stall-ms` beyond any run), so that the guest is what sees the failure: a request without an answer for
//! `timeout_ms`, one that is answered with an error, or a backend that is dead. A fault begins behind a healthy part of the run.
//!
//! **Time is compressed.** A window of a plan's `window_ms`, 200 by default, stands for a second of a real device: a ramp of ten seconds
//! stands for one of fifty, a timeout of one for five. Some values of a profile are measured once a second whatever a window is (control
//! groups, resident memory, descriptors): four of five windows lack them, as they would lack them for most seconds if they were asked for
//! once in five.
//!
//! What is made is what its plan and seeds say, times to the millisecond; what the machine does meanwhile is not. `DIR` holds `plan.toml`,
//! `runs.jsonl` (see [`Label`]), `NNNNN.records.gz` and `guests.jsonl`, what each guest felt. A guest that loses its disk where no fault has
//! begun says something of the machine, not of the run: that run is void, is noted in `void.jsonl` and made again. A campaign that was ended
//! goes on where it was when it is started again with the same plan.

mod astray;
mod demand;
pub(crate) mod end_to_end;
mod form;
pub(crate) mod fuse;
mod guest;
mod harmless;
mod hooks;
mod inject;
mod kind;
mod make;
mod plan;
mod pool;
pub(crate) mod runs;
mod scene;
mod script;
mod summary;
mod workload;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

#[allow(unused_imports, reason = "the interface of those who learn and judge")]
pub(crate) use runs::{Label, Run, read};

/// Prefix of the names of control groups.
const GROUPS: &str = "lab-campaign-";
/// Name of what is mounted, as the kernel tells it.
const MOUNTS: &str = "warmswap-lab";
/// File of the plan within a campaign.
const PLAN: &str = "plan.toml";

/// Options.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The plan; without it a campaign that is there is summed up
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Directory of the campaign
    #[arg(long, value_name = "DIR", required_unless_present = "kinds")]
    out: Option<PathBuf>,
    /// Runs at a time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// Begin no run later than so many seconds from now
    #[arg(long, value_name = "SECONDS", default_value_t = 7 * 86_400)]
    within: u64,
    /// Begin no run while this file is there
    #[arg(long, value_name = "FILE")]
    hold: Option<PathBuf>,
    /// Where images and sockets are meanwhile (default: the directory for temporary files)
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Tell what kinds there are
    #[arg(long)]
    kinds: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the campaign, or what is left of it, and sums it up.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.kinds {
        print!("{}", summary::kinds());
        return Ok(());
    }
    let out = args.out.as_deref().context("--out is needed")?;
    if let Some(path) = &args.plan {
        let (plan, text) = plan::Plan::read(path)?;
        claim(out, &text)?;
        let specs = plan.specs()?;
        pool::run(args, &plan, &specs, out)?;
    }
    summary::print(out, args.json)
}

/// Makes the directory of a campaign, or finds one with the same plan.
fn claim(out: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let path = out.join(PLAN);
    match std::fs::read_to_string(&path) {
        Ok(there) => ensure!(there == text, "{} is another plan: choose another directory", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            ensure!(!out.join("runs.jsonl").exists(), "{} has runs, but no plan", out.display());
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Err(error) => bail!("reading {}: {error}", path.display()),
    }
    Ok(())
}
