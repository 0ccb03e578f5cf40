//! The virtual machine: an unmodified QEMU with emulated processors, one device behind a vhost-user socket.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::cache::{Kernel, Qemu, QemuVersion};
use super::device::Device;
use super::initramfs;
use super::orders::Orders;
use super::process::Process;
use super::workspace::Workspace;

const MEMORY: &str = "768M";
/// Ring size, as `warmswap example qemu` advises it.
const RING: u16 = 1024;
/// Processors, queues of the disk: one queue for each processor.
const PROCESSORS: u32 = 2;

/// A running machine.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Process,
}

impl Machine {
    /// Starts the machine; `socket` is that of its device, which the orders name. Returns it with the host's end of the guest's port.
    pub(crate) fn start(
        qemu: &Qemu,
        kernel: &Kernel,
        orders: Orders,
        socket: &Path,
        workspace: &Workspace,
    ) -> anyhow::Result<(Self, UnixStream)> {
        let initramfs = workspace.path("initramfs");
        initramfs::build(kernel, workspace.root(), &initramfs)?;
        let port = workspace.path("port.sock");
        let log = File::create(workspace.path("qemu.log"))?;
        let mut command = qemu.command("qemu-system-x86_64");
        for directory in qemu.firmware() {
            command.arg("-L").arg(directory);
        }
        command
            .args(["-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "Nehalem"])
            .args(["-smp", &PROCESSORS.to_string(), "-m", MEMORY])
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY},share=on")])
            .args(["-numa", "node,memdev=ram"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot"])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", workspace.path(CONSOLE).display()))
            .arg("-chardev")
            .arg(format!("socket,id=port,path={},server=on,wait=on", port.display()))
            .args(["-serial", "chardev:console", "-serial", "chardev:port"])
            .args(device(orders.device, qemu.version, socket))
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 loglevel=5 mitigations=off panic=-1 {}", orders.to_command_line()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut process = Process::start("QEMU", &mut command)?;
        let port = connect(&port, &mut process)?;
        Ok((Self { process }, port))
    }

    /// How the machine ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.process.ended()
    }

    /// Waits until the guest has switched itself off.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        self.process.wait(patience)
    }

    /// Ends the machine, whatever the guest does.
    pub(crate) fn end(&mut self) {
        self.process.kill();
    }

    /// One sentence on how it ended.
    pub(crate) fn obituary(&mut self) -> String {
        self.process.obituary()
    }
}

/// The options that give the machine its device.
fn device(device: Device, version: QemuVersion, socket: &Path) -> Vec<String> {
    let chardev = format!("socket,id=device,path={}", socket.display());
    let reconnecting = format!("{chardev},{}", reconnect(version));
    match device {
        Device::Blk => {
            let disk = format!("vhost-user-blk-pci,chardev=device,num-queues={PROCESSORS},queue-size={RING}");
            vec!["-chardev", &reconnecting, "-device", &disk].into_iter().map(str::to_owned).collect()
        }
        Device::Net => {
            // No offloads: every packet carries its checksum, so that one which was damaged on its way does not arrive.
            let offloads = [
                "csum",
                "gso",
                "guest_csum",
                "guest_tso4",
                "guest_tso6",
                "guest_ecn",
                "guest_ufo",
                "host_tso4",
                "host_tso6",
                "host_ecn",
                "host_ufo",
            ];
            let off: String = offloads.iter().map(|name| format!(",{name}=off")).collect();
            let card = format!("virtio-net-pci,netdev=net,mac={GUEST_MAC},romfile={off}{}", vectors(version));
            let netdev = "vhost-user,id=net,chardev=device,queues=1";
            vec!["-chardev", &reconnecting, "-netdev", netdev, "-device", &card]
                .into_iter()
                .map(str::to_owned)
                .collect()
        }
        // Of the others QEMU does not wait for the socket: what connects again is not connected yet when it asks for the first time.
        Device::Rng => plain(&chardev, "vhost-user-rng-pci,chardev=device"),
        Device::Scsi => plain(&chardev, "vhost-user-scsi-pci,chardev=device,num_queues=1,param_change=off"),
        Device::Fs => plain(&chardev, &format!("vhost-user-fs-pci,chardev=device,tag={SHARE_TAG},queue-size={RING}")),
    }
}

/// QEMU 7.2.22 of Debian 12 ends with a segmentation fault, in `msix_set_vector_notifiers` called by `vhost_net_start`, when a guest starts a
/// card with MSI-X vectors whose back-end is another process: with no broker between as well. Such a card works by its interrupt pin.
fn vectors(version: QemuVersion) -> &'static str {
    match version {
        QemuVersion::V10 => "",
        QemuVersion::V7 => ",vectors=0",
    }
}

/// A device that is its chardev and itself.
fn plain(chardev: &str, device: &str) -> Vec<String> {
    ["-chardev", chardev, "-device", device].map(str::to_owned).to_vec()
}

/// The hardware address of the guest's network card.
pub(crate) const GUEST_MAC: &str = "52:54:00:77:00:01";
/// The name the guest mounts the shared file system by.
pub(crate) const SHARE_TAG: &str = "share";

/// Name of the file with the guest's kernel log.
pub(crate) const CONSOLE: &str = "console.log";

/// The option that makes QEMU connect again when its disk's socket closes: as quick as each version can.
fn reconnect(version: QemuVersion) -> &'static str {
    match version {
        QemuVersion::V10 => "reconnect-ms=100",
        QemuVersion::V7 => "reconnect=1",
    }
}

/// Connects to the guest's port; QEMU starts the machine only then, so no line is missed.
fn connect(port: &Path, process: &mut Process) -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(stream) = UnixStream::connect(port) {
            return Ok(stream);
        }
        if process.ended().is_some() || Instant::now() > deadline {
            let log = port.with_file_name("qemu.log");
            let log = std::fs::read_to_string(log).unwrap_or_default();
            return Err(anyhow::anyhow!("{}: {}", process.obituary(), log.trim())).context("starting the machine");
        }
        thread::sleep(Duration::from_millis(10));
    }
}
