//! The backends of other kinds, as they are installed, and how each is guarded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::vm::broker::Guarded;
use crate::vm::cache;
use crate::vm::device::Device;
use crate::vm::workspace::Workspace;

/// The program that serves a kind of device.
#[derive(Debug, Clone)]
pub(super) struct Program {
    device: Device,
    path: PathBuf,
}

impl Program {
    /// Its name.
    pub(super) fn name(device: Device) -> &'static str {
        match device {
            Device::Blk => "qemu-storage-daemon",
            Device::Net => "dpdk-testpmd",
            Device::Rng => "vhost-device-rng",
            Device::Scsi => "vhost-device-scsi",
            Device::Fs => "virtiofsd",
        }
    }

    /// Finds it: where `cargo xtask setup --backends` puts it, or on the search path.
    pub(super) fn find(device: Device) -> Option<Self> {
        let name = Self::name(device);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let built = cache::directory().join("backends/bin");
        let mut places = std::iter::once(built).chain(std::env::split_paths(&path));
        let path = places.find_map(|place| Some(place.join(name)).filter(|program| program.is_file()))?;
        Some(Self { device, path })
    }

    /// How it is guarded. Everything that belongs to the run lies in `workspace`.
    pub(super) fn guarded(&self, workspace: &Workspace) -> Guarded {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let mut options = words(&["--type", self.device.name()]);
        // Two processors are shared by emulated ones and two backends, of which some poll: one that gets no turn for half a second is not
        // hung.
        options.extend(words(&["--hang-ms", "5000"]));
        let line = match self.device {
            Device::Blk => Vec::new(),
            Device::Net => testpmd(&self.path),
            Device::Rng => {
                options.extend(words(&["--drain", "disable"]));
                self.numbered()
            }
            Device::Scsi => scsi(&self.path, &workspace.image()),
            Device::Fs => virtiofsd(&self.path, &share(workspace)),
        };
        Guarded { kept: false, options, command_line: line, environment: Vec::new() }
    }

    /// A backend that serves several sockets, and adds a number to the name of each: the one that is asked for is a link to the first.
    fn numbered(&self) -> Vec<OsString> {
        let script = r#"ln -s "${1}0" "$1" && exec "$0" --socket-path "$1""#;
        vec!["sh".into(), "-c".into(), script.into(), self.path.clone().into_os_string(), "{socket}".into()]
    }
}

/// The directory that the guest mounts.
pub(super) fn share(workspace: &Workspace) -> PathBuf {
    workspace.path("share")
}

/// DPDK's test program with one port, which sends every packet back to where it came from. Without huge pages, devices and files shared
/// with other instances, so that it can run anywhere, and twice.
fn testpmd(program: &Path) -> Vec<OsString> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let words = [
        // One thread to watch, one to forward, on any processor: none may take one for itself.
        format!("--lcores=(0-1)@(0-{})", processors - 1),
        "--no-pci".to_owned(),
        "--no-huge".to_owned(),
        "-m".to_owned(),
        "64".to_owned(),
        "--no-shconf".to_owned(),
        "--no-telemetry".to_owned(),
        // Else it says each message it is sent, signs of life included.
        "--log-level=lib.vhost.config:warning".to_owned(),
        "--vdev=net_vhost0,iface={socket},queues=1".to_owned(),
        "--".to_owned(),
        "--forward-mode=5tswap".to_owned(),
        "--port-topology=loop".to_owned(),
        "--total-num-mbufs=2048".to_owned(),
        "--no-flush-rx".to_owned(),
        // Without it the program ends when its input does.
        "--stats-period=3600".to_owned(),
    ];
    std::iter::once(program.as_os_str().to_owned()).chain(words.into_iter().map(OsString::from)).collect()
}

fn scsi(program: &Path, image: &Path) -> Vec<OsString> {
    // What it was given to write it would refuse.
    let mut line = vec![program.as_os_str().to_owned()];
    line.extend(["--read-only", "--socket-path", "{socket}"].map(OsString::from));
    line.push(image.as_os_str().to_owned());
    line
}

fn virtiofsd(program: &Path, share: &Path) -> Vec<OsString> {
    let words = ["--socket-path={socket}", "--sandbox=none", "--cache=never", "--shared-dir"];
    let mut line = vec![program.as_os_str().to_owned()];
    line.extend(words.map(OsString::from));
    line.push(share.as_os_str().to_owned());
    line
}
