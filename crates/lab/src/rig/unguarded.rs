//! The control: no broker. A backend is killed and started again at once, and the VMM reconnects by its own rule. The same
//! oracle must find what that loses, or it has no teeth.

use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use super::ledger::Ledger;
use super::load::{Load, Mix, Pace};
use super::options::BACKEND_QUEUES;
use crate::common::interrupt;
use crate::common::qsd::{Aio, Qsd, Running};
use crate::common::rng::Rng;
use crate::guest::{BLOCK, Guest, Options, QueueShape, now_ns};

/// Blocks of the image: small, for it is read after every kill.
const BLOCKS: u64 = 1024;
/// No completion for this long after the reconnect: nothing more will come.
const SILENCE_NS: u64 = 60_000_000;

/// From where a VMM has the new backend go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// QEMU: from `used.idx` (`virtio_queue_split_restore_last_avail_idx`).
    Qemu,
    /// Cloud Hypervisor: from `avail.idx` (`setup_vhost_user`).
    CloudHypervisor,
}

/// What a rule did to the guest.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Damage {
    /// Backends killed.
    pub(crate) kills: u64,
    /// Requests in flight when they were.
    pub(crate) inflight: u64,
    /// Requests that were never completed.
    pub(crate) lost: u64,
    /// Completions of requests that were complete.
    pub(crate) duplicated: u64,
    /// Blocks with wrong contents.
    pub(crate) corrupted: u64,
}

impl Damage {
    /// Whether anything was lost or done twice.
    pub(crate) fn is_seen(&self) -> bool {
        self.lost + self.duplicated + self.corrupted > 0
    }
}

/// Kills `kills` backends under load and reconnects by `rule`; goes on up to `kills_max` where nothing was seen yet, for
/// whether completions come out of order is up to the machine.
pub(crate) fn measure(rule: Rule, kills: u64, kills_max: u64, seed: u64, directory: &Path) -> anyhow::Result<Damage> {
    let image = directory.join("control-image");
    let qsd = Qsd { image, queues: BACKEND_QUEUES, aio: Aio::Threads, direct: false, throttle: None };
    let mut damage = Damage::default();
    for kill in 0..kills_max {
        if (kill >= kills && damage.is_seen()) || interrupt::is_asked() {
            break;
        }
        let mut rng = Rng::new(seed, u64::MAX - 2 * kill - rule as u64);
        // A new image each time: what one kill broke is counted once.
        std::fs::File::create(&qsd.image)?.set_len(BLOCKS * BLOCK as u64)?;
        let load_for = rng.between(2_000_000, 6_000_000);
        let mut load = Load::new(Ledger::new(u32::MAX, BLOCKS as usize), rng, mix());
        one_kill(rule, &qsd, directory, load_for, &mut load, &mut damage)?;
    }
    Ok(damage)
}

/// Large and small requests, so that completions come out of order.
fn mix() -> Mix {
    Mix {
        reads_percent: 50,
        others_percent: 4,
        blocks_max: 64,
        segments_max: 8,
        direct_percent: 0,
        hot_blocks: BLOCKS,
        discards: false,
        polling: true,
    }
}

fn one_kill(
    rule: Rule,
    qsd: &Qsd,
    directory: &Path,
    load_for: u64,
    load: &mut Load,
    damage: &mut Damage,
) -> anyhow::Result<()> {
    let socket = directory.join("control.sock");
    let mut backend = respawn(qsd, &socket)?;
    let shape = QueueShape { size: 256, depth: 16, blocks_max: 64, segments_max: 8, start: 65_400 };
    let mut guest = Guest::new(Options { socket: socket.clone(), queues: 2, shape, ..Options::default() })?;
    guest.connect()?;
    load.attach_bare(&guest);
    guest.start()?;
    let until = now_ns() + load_for;
    while now_ns() < until {
        load.service(&mut guest, Pace::Full);
    }
    backend.kill()?;
    load.service(&mut guest, Pace::Quiet);
    damage.kills += 1;
    damage.inflight += load.outstanding(&guest);
    guest.disconnect();
    drop(backend);
    let backend = respawn(qsd, &socket)?;
    reconnect(rule, &mut guest).context("reconnecting")?;
    wait_for_silence(&mut guest, load);
    damage.lost += load.outstanding(&guest);
    drop(backend);
    load.abandon(&guest, false);
    load.check_image(&qsd.image)?;
    damage.duplicated += load.verdict.duplicated;
    damage.corrupted += load.verdict.corrupted;
    Ok(())
}

fn respawn(qsd: &Qsd, socket: &Path) -> anyhow::Result<Running> {
    let _ = std::fs::remove_file(socket);
    qsd.spawn(socket)
}

fn reconnect(rule: Rule, guest: &mut Guest) -> anyhow::Result<()> {
    guest.connect()?;
    let base = |queue: &crate::guest::BlkQueue| match rule {
        Rule::Qemu => queue.vring().used_idx(),
        Rule::CloudHypervisor => queue.vring().available_idx(),
    };
    let bases: Vec<u16> = guest.queues.iter().map(base).collect();
    guest.start_from(&bases)?;
    // Both kick what may be waiting in the ring.
    guest.queues.iter().for_each(|queue| queue.kick_fd().signal());
    Ok(())
}

fn wait_for_silence(guest: &mut Guest, load: &mut Load) {
    let mut last = (load.completed, now_ns());
    while load.outstanding(guest) > 0 && now_ns() < last.1 + SILENCE_NS {
        load.service(guest, Pace::Quiet);
        if load.completed > last.0 {
            last = (load.completed, now_ns());
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    // What was done twice may come after the last answer that was due.
    let until = now_ns() + SILENCE_NS / 6;
    while now_ns() < until {
        load.service(guest, Pace::Quiet);
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}
