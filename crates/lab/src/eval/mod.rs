//! How good detectors are: measures, tables, what others run, and the protocol by which the failure model is judged.

pub(crate) mod baselines;
mod causes;
pub(crate) mod columns;
pub(crate) mod components;
pub(crate) mod fit;
mod further;
pub(crate) mod health;
pub(crate) mod period;
pub(crate) mod protocol;
pub(crate) mod replay;
pub(crate) mod series;
pub(crate) mod table;
pub(crate) mod trees;
pub(crate) mod vus;

use crate::campaign::end_to_end;

/// Options of `lab eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

/// What is judged, and by what.
#[derive(Debug, clap::Subcommand)]
enum What {
    /// The failure model, by the runs of a campaign: recall, lead times, false alarms, calibration, baselines.
    Runs(protocol::Args),
    /// The whole: for how long guests stand still while their backends fail, with foresight, without it, and without a broker.
    EndToEnd(end_to_end::Args),
    /// The detector of series, by public series with labels: VUS-PR, beside what others run.
    Series(series::Args),
}

/// Judges.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.what {
        What::Runs(args) => protocol::run(args),
        What::EndToEnd(args) => end_to_end::run(args),
        What::Series(args) => series::run(args),
    }
}
