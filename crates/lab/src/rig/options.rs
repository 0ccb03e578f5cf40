//! What a seed chooses: the backend of an epoch, the guest of a session.

use std::time::Duration;

use serde::Serialize;

use super::load::Mix;
use crate::common::blk::{Blk, Engine};
use crate::common::qsd::{Aio, Qsd};
use crate::common::rng::Rng;
use crate::guest::{Acks, BLOCK, Options, QueueShape};

/// Most data segments of a request.
const SEGMENTS_MAX: u16 = 16;
/// Queues every backend has.
pub(crate) const BACKEND_QUEUES: u16 = 4;

/// Which backends the pair is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backends {
    /// qemu-storage-daemons.
    #[default]
    Qsd,
    /// Our own.
    Blk,
    /// One of each, by turns: every failover goes from one to the other.
    Mixed,
}

impl Backends {
    /// The name on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Backends::Qsd => "qsd",
            Backends::Blk => "blk",
            Backends::Mixed => "mixed",
        }
    }

    /// Whether there is a request that it cannot survive.
    pub(crate) fn can_be_poisoned(self) -> bool {
        self == Backends::Qsd
    }

    /// Options that `guard` needs for them.
    pub(crate) fn guard(self) -> &'static [&'static str] {
        match self {
            // By its name.
            Backends::Qsd => &[],
            Backends::Blk => &["--drain", "stop", "--region", "trust"],
            // What suits the one that does not drain when it is asked to stop suits the other as well.
            Backends::Mixed => &["--drain", "private-kick"],
        }
    }
}

/// Values the command line fixes for the whole run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fixed {
    /// Number of queues.
    pub(crate) queues: Option<u16>,
    /// Ring size.
    pub(crate) size: Option<u16>,
    /// Requests in flight per queue.
    pub(crate) depth: Option<u16>,
    /// The backends.
    pub(crate) backends: Backends,
}

/// Choices that hold for one broker.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct EpochChoices {
    /// `threads` or `io_uring`.
    pub(crate) aio: &'static str,
    /// O_DIRECT.
    pub(crate) direct: bool,
    /// Requests per second a throttled backend serves.
    pub(crate) throttle: Option<u32>,
    /// Blocks of the image.
    pub(crate) image_blocks: u64,
    /// The broker's patience.
    pub(crate) hang_ms: u64,
}

impl EpochChoices {
    /// Draws them.
    pub(crate) fn draw(rng: &mut Rng, direct_possible: bool) -> Self {
        EpochChoices {
            aio: rng.choose(&["threads", "threads", "io_uring"]),
            direct: rng.percent(50) && direct_possible,
            throttle: rng.percent(30).then(|| rng.choose(&[4_000, 10_000, 20_000])),
            image_blocks: rng.choose(&[1024, 4096, 16384]),
            hang_ms: 50,
        }
    }

    /// The backends' command line, with `{socket}` in it.
    pub(crate) fn command_line(&self, backends: Backends, image: std::path::PathBuf) -> Vec<String> {
        let aio = if self.aio == "io_uring" { Aio::IoUring } else { Aio::Threads };
        let throttle = self.throttle.filter(|_| backends == Backends::Qsd);
        let qsd = Qsd { image: image.clone(), queues: BACKEND_QUEUES, aio, direct: self.direct, throttle };
        let engine = if self.aio == "io_uring" { Engine::Uring } else { Engine::Auto };
        let blk = Blk { image, queues: BACKEND_QUEUES, engine, direct: self.direct };
        match backends {
            Backends::Qsd => qsd.command_line("{socket}"),
            Backends::Blk => {
                let mut line = blk.command_line("{socket}");
                if let Some(rate) = self.throttle {
                    // Many in flight at little cost: each takes as long as a disk that is asked for so many at once.
                    line.extend(["--fault".into(), format!("latency:us={}", 16_000_000 / rate)]);
                }
                line
            }
            Backends::Mixed => {
                let mut blk = blk.command_line("$0");
                // As the other has it: the guest is told of one device.
                blk.extend(["--write-cache".into(), "off".into()]);
                let (even, odd) = (words(&qsd.command_line("$0")), words(&blk));
                let script = format!("case $0 in *[02468].sock) exec {even};; *) exec {odd};; esac");
                ["sh", "-c", &script, "{socket}"].map(str::to_owned).into()
            }
        }
    }
}

/// As a shell reads them; what begins with a dollar is for it to fill in.
fn words(line: &[String]) -> String {
    let quoted: Vec<String> = line.iter().map(|word| format!("\"{word}\"")).collect();
    quoted.join(" ")
}

/// Choices that hold for one guest.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SessionChoices {
    /// Number of queues.
    pub(crate) queues: u16,
    /// Ring size.
    pub(crate) size: u16,
    /// Requests in flight per queue.
    pub(crate) depth: u16,
    /// Index at which the rings start.
    pub(crate) start: u16,
    /// EVENT_IDX asked for.
    pub(crate) event_idx: bool,
    /// INDIRECT_DESC asked for.
    pub(crate) indirect: bool,
    /// Guest RAM in MiB.
    pub(crate) memory_mib: u64,
    /// Regions one by one instead of a table.
    pub(crate) memory_slots: bool,
    /// The back-end's channel is opened.
    pub(crate) backend_channel: bool,
    /// Messages to be acknowledged: `qemu`, `all`, `none`.
    pub(crate) acks: &'static str,
    /// Largest request in blocks.
    pub(crate) blocks_max: u32,
    /// Most segments of a request.
    pub(crate) segments_max: u16,
    /// Of 100 requests, how many read.
    pub(crate) reads_percent: u64,
    /// Of 100 requests, how many use a direct chain in spite of indirect descriptors.
    pub(crate) direct_percent: u64,
    /// Blocks most requests go to.
    pub(crate) hot_blocks: u64,
    /// The driver polls instead of waiting for calls.
    pub(crate) polling: bool,
}

impl SessionChoices {
    /// Draws them.
    pub(crate) fn draw(rng: &mut Rng, epoch: &EpochChoices, fixed: Fixed) -> Self {
        let queues = rng.between(1, u64::from(BACKEND_QUEUES)) as u16;
        let size = rng.choose(&[64, 128, 256, 1024]);
        let depth = rng.choose(&[1, 2, 4, 8, 16, 32, 64]);
        let (queues, size) = (fixed.queues.unwrap_or(queues), fixed.size.unwrap_or(size));
        let depth = fixed.depth.unwrap_or(depth).min(size);
        let memory_mib = rng.choose(&[64, 256, 1024, 4096, 8192]);
        // Half of the smallest memory at most goes into buffers.
        let room = memory_mib * (1 << 20) / 2 / u64::from(queues) / u64::from(depth) / BLOCK as u64;
        let blocks_max = rng.choose(&[1_u64, 4, 16, 64]).min(room).max(1) as u32;
        SessionChoices {
            queues,
            size,
            depth,
            start: rng.choose(&[0, 0, 65_500, 65_000, 60_000]),
            event_idx: rng.percent(70),
            indirect: rng.percent(60),
            memory_mib,
            memory_slots: rng.percent(70),
            backend_channel: rng.percent(80),
            acks: rng.choose(&["qemu", "qemu", "all", "none"]),
            blocks_max,
            segments_max: rng.between(1, u64::from(SEGMENTS_MAX.min(size / 4))) as u16,
            reads_percent: rng.between(20, 70),
            direct_percent: rng.choose(&[0, 0, 30]),
            hot_blocks: rng.choose(&[64, 256, 1024]).min(epoch.image_blocks),
            polling: rng.percent(15),
        }
    }

    /// The guest.
    pub(crate) fn guest(&self, socket: std::path::PathBuf) -> Options {
        let shape = QueueShape {
            size: self.size,
            depth: self.depth,
            blocks_max: self.blocks_max,
            segments_max: self.segments_max,
            start: self.start,
        };
        let acks = match self.acks {
            "all" => Acks::All,
            "none" => Acks::None,
            _ => Acks::Qemu,
        };
        Options {
            socket,
            memory_bytes: self.memory_mib << 20,
            queues: self.queues,
            shape,
            event_idx: self.event_idx,
            indirect: self.indirect,
            memory_slots: self.memory_slots,
            backend_channel: self.backend_channel,
            acks,
            timeout: Duration::from_secs(5),
        }
    }

    /// The load. `discards` says whether the device has them.
    pub(crate) fn mix(&self, discards: bool) -> Mix {
        Mix {
            reads_percent: self.reads_percent,
            others_percent: 6,
            blocks_max: self.blocks_max,
            segments_max: self.segments_max,
            direct_percent: self.direct_percent,
            hot_blocks: self.hot_blocks,
            discards,
            polling: self.polling,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_chooses_the_same_for_ever_and_every_choice_is_possible() {
        let draw = |seed| {
            let mut rng = Rng::new(seed, 1);
            let epoch = EpochChoices::draw(&mut rng, true);
            let session = SessionChoices::draw(&mut rng, &epoch, Fixed::default());
            (serde_json::to_string(&epoch).expect("json"), serde_json::to_string(&session).expect("json"))
        };
        assert_eq!(draw(5), draw(5));
        for seed in 0..2000 {
            let mut rng = Rng::new(seed, 1);
            let epoch = EpochChoices::draw(&mut rng, true);
            let session = SessionChoices::draw(&mut rng, &epoch, Fixed::default());
            let buffers = u64::from(session.queues) * u64::from(session.depth) * u64::from(session.blocks_max) * 4096;
            assert!(buffers <= session.memory_mib << 19, "{session:?}");
            assert!(session.segments_max + 2 <= session.size && session.depth <= session.size);
            assert!(u64::from(session.blocks_max) <= epoch.image_blocks);
        }
    }
}
