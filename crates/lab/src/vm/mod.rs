//! `lab vm`.

/// Options of `lab vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs the instrument.
pub(crate) fn run(_args: &Args) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
