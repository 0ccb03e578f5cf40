//! `warmswap example`: configurations that work.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::Failure;

/// Why examples ask for longer rings than VMMs do by themselves.
const LONG_RINGS: &str = "rings of 1024 entries can be followed exactly for longer than a VMM's default of 128 or 256.";

/// VMMs there is an example for.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum Vmm {
    /// QEMU's command line
    Qemu,
    /// libvirt's domain XML
    Libvirt,
    /// Cloud Hypervisor's command line
    CloudHypervisor,
}

/// Prints the example.
pub(super) fn print(vmm: Vmm, name: &str, socket: Option<PathBuf>, as_json: bool) -> Result<u8, Failure> {
    super::check_name(name)?;
    let socket = socket.unwrap_or_else(|| PathBuf::from(format!("/run/{name}.sock")));
    if socket.is_relative() {
        return Err(Failure::new(
            2,
            "--socket must be an absolute path here: VMM and warmswap may run in different directories",
        ));
    }
    let socket = socket.display();
    // libvirt's QEMU does not run as root.
    let access = if matches!(vmm, Vmm::Libvirt) { " --socket-group libvirt-qemu --socket-mode 660" } else { "" };
    let guard = format!("warmswap guard --name {name} --socket {socket}{access} --disk /var/lib/images/{name}.raw");
    let vmm_part = match vmm {
        Vmm::Qemu => format!(
            "qemu-system-x86_64 -machine q35,memory-backend=ram -m 2G -smp 2 \\\n  \
             -object memory-backend-memfd,id=ram,size=2G,share=on \\\n  \
             -chardev socket,id={name},path={socket},reconnect-ms=100 \\\n  \
             -device vhost-user-blk-pci,chardev={name},num-queues=2,queue-size=1024"
        ),
        Vmm::Libvirt => format!(
            "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n\
             <!-- inside <devices>: -->\n\
             <disk type='vhostuser' device='disk'>\n  <driver name='qemu' type='raw' queues='2' queue_size='1024'/>\n  \
             <source type='unix' path='{socket}'>\n    <reconnect enabled='yes' timeout='1'/>\n  </source>\n  \
             <target dev='vda' bus='virtio'/>\n</disk>"
        ),
        Vmm::CloudHypervisor => format!(
            "cloud-hypervisor --memory size=2G,shared=on --cpus boot=2 \\\n  \
             --disk vhost_user=true,socket={socket},num_queues=2"
        ),
    };
    let mut out = std::io::stdout().lock();
    if as_json {
        writeln!(out, "{}", json!({ "guard": guard, "vmm": vmm_part, "socket": socket.to_string() }))?;
    } else {
        let note = match vmm {
            Vmm::Qemu | Vmm::Libvirt => LONG_RINGS,
            Vmm::CloudHypervisor => "",
        };
        let title = format!("# The VMM: {note}");
        writeln!(out, "# The guarded device:\n{guard}\n\n{}\n{vmm_part}", title.trim_end())?;
    }
    Ok(0)
}
