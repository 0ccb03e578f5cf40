//! `lab campaign`: fault campaigns on real backends, and what they leave behind for whoever learns or judges.

mod runs;

use std::path::PathBuf;

#[allow(unused_imports, reason = "the interface of those who learn and judge")]
pub(crate) use runs::{Label, Run, read};

/// Options.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory of the campaign
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the campaign.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    for run in read(&args.out)? {
        println!("{} {} {}: {} windows", run.label.name, run.label.kind, run.label.form, run.windows.len());
    }
    let _ = (runs::write_labels, runs::add);
    Ok(())
}
