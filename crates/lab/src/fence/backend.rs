//! qemu-storage-daemon on a block device.

use std::path::Path;

/// How QSD does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// io_uring: what was submitted outlives the process.
    IoUring,
    /// Linux AIO: the exit waits.
    Native,
    /// A thread pool: the exit waits.
    Threads,
}

impl Engine {
    /// Name as QSD knows it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Engine::IoUring => "io_uring",
            Engine::Native => "native",
            Engine::Threads => "threads",
        }
    }

    /// Whether every request goes to the kernel at once. A thread pool keeps those for which it has no thread to itself.
    pub(super) fn submits_at_once(self) -> bool {
        self != Engine::Threads
    }
}

/// The command line for `warmswap guard`.
pub(super) fn command_line(device: &Path, engine: Engine, locking: bool) -> Vec<String> {
    let (device, aio) = (device.display(), engine.name());
    let locking = if locking { "on" } else { "off" };
    let driver =
        format!("driver=host_device,node-name=disk,filename={device},aio={aio},cache.direct=on,locking={locking}");
    let export = "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on";
    ["qemu-storage-daemon", "--blockdev", &driver, "--export", export].map(str::to_owned).to_vec()
}

/// The same behind a process that serves nothing itself and waits for the one that does.
pub(super) fn wrapped(command: &[String]) -> Vec<String> {
    // None of the words has a space or a quote.
    ["sh".to_owned(), "-c".to_owned(), format!("{}; true", command.join(" "))].to_vec()
}
