//! `lab bench`: what a failover costs, and what being guarded costs, side by side with what a user would otherwise run.
//!
//! * `blackout`: the silence of the guest's disk: planned and crashed failovers, and cold restarts of the same backend.
//! * `overhead`: requests per second and tail latency through a guarded device and a direct one.
//! * `observer`: what the broker itself uses, and how fast it answers a VMM whose backend is stopped.
//!
//! * `blk`: our own backend beside QSD in its best mode, and beside what the storage gives without any of them.
//! * `predict`: what the failure model costs.
//! * `shadows`: what idle shadows cost somebody else's primary.
//! * `snapshot`: what a health snapshot costs the control thread.
//! * `profile`: what is told of a device, held against what its driver measured.
//!
//! All but `blk` drive real qemu-storage-daemons on a tmpfs with the user-space driver of [`crate::guest`]; times are its own
//! readings of CLOCK_MONOTONIC. A failure anywhere (a status, a broken ring, a failover that does not settle) ends the bench.

mod answers;
mod backend;
mod blackout;
mod blk;
mod broker;
mod cold;
mod driver;
mod guarded;
mod load;
mod many;
mod observer;
mod overhead;
mod predict;
mod profile;
mod report;
mod shadows;
mod snapshot;
mod spread;
mod throughput;
mod truth;
mod usage;
mod wakeups;

use std::path::PathBuf;

/// Options of `lab bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

/// The benches.
#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// How long the guest's disk is silent: warmswap, and cold restarts.
    Blackout(blackout::Args),
    /// What being guarded costs: requests per second and p99.9, guarded over direct.
    Overhead(overhead::Args),
    /// What the broker uses, and how fast it answers while its backend is stopped.
    Observer(observer::Args),
    /// What warmswap tells of a device, held against what its driver measured.
    Profile(profile::Args),
    /// What the failure model costs per window, beside a random cut forest.
    Predict(predict::Args),
    /// What idle shadows cost somebody else's primary.
    Shadows(shadows::Args),
    /// What a health snapshot costs the control thread.
    Snapshot(snapshot::Args),
    /// Our own backend beside QSD: requests per second, per second of processor time, and tail latency.
    Blk(blk::Args),
}

/// Options of every bench.
#[derive(Debug, clap::Args)]
struct Common {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Seed of all choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Directory for images and sockets; a tmpfs by default.
    #[arg(long, default_value = "/dev/shm")]
    image_dir: PathBuf,
}

/// Runs a bench.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.bench {
        Bench::Blackout(args) => blackout::run(args),
        Bench::Overhead(args) => overhead::run(args),
        Bench::Observer(args) => observer::run(args),
        Bench::Profile(args) => profile::run(args),
        Bench::Predict(args) => predict::run(args),
        Bench::Shadows(args) => shadows::run(args),
        Bench::Snapshot(args) => snapshot::run(args),
        Bench::Blk(args) => blk::run(args),
    }
}
