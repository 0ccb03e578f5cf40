//! The backends' command line, and a backend without warmswap: killed and started again at once, while QEMU connects
//! again by its own rule.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::broker::Guarded;
use super::cache::Qemu;
use super::process::Process;
use super::workspace::Workspace;
use crate::common::blk::{Blk, Engine};

/// Queues of the disk.
const QUEUES: u16 = 2;

/// What serves the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backends {
    /// qemu-storage-daemons.
    #[default]
    Qsd,
    /// Our own. It keeps an in-flight region, which QEMU hands to the next one: with `--no-guard` nothing must be lost.
    Blk,
    /// One of each, by turns: every failover goes from one to the other.
    Mixed,
}

impl Backends {
    /// The name on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qsd => "qsd",
            Self::Blk => "blk",
            Self::Mixed => "mixed",
        }
    }

    /// Options that `guard` needs for them.
    pub(crate) fn guard(self) -> &'static [&'static str] {
        match self {
            // By its name.
            Self::Qsd => &[],
            Self::Blk => &["--drain", "stop"],
            // What suits the one that does not drain when it is asked to stop suits the other as well.
            Self::Mixed => &["--drain", "private-kick"],
        }
    }
}

/// What the backend puts between the guest and the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Limits {
    /// Limits on reads and on writes, as a cloud gives its disks: requests wait inside the daemon, and reads and writes
    /// overtake each other. Our own backend takes longer for each request instead. An emulated guest on an image in
    /// memory leaves next to nothing in flight otherwise, and a kill would have nothing to lose.
    Cloud,
    /// No limits: as fast as the image.
    None,
}

impl Limits {
    fn words(self) -> Vec<OsString> {
        const READS_PER_SECOND: u32 = 600;
        const WRITES_PER_SECOND: u32 = 1000;
        let (group, node) = match self {
            Self::None => return vec!["--blockdev".into(), "driver=raw,node-name=disk,file=image".into()],
            Self::Cloud => (
                format!(
                    "throttle-group,id=limits,limits.iops-read={READS_PER_SECOND},limits.iops-write={WRITES_PER_SECOND}"
                ),
                "driver=throttle,node-name=disk,throttle-group=limits,file=image",
            ),
        };
        vec!["--object".into(), group.into(), "--blockdev".into(), node.into()]
    }
}

/// A disk on `image`, guarded.
pub(crate) fn guarded(backends: Backends, qemu: &Qemu, limits: Limits, image: &Path) -> Guarded {
    Guarded {
        kept: false,
        options: backends.guard().iter().map(|&word| word.to_owned()).collect(),
        command_line: command_line(backends, qemu, limits, image, "{socket}"),
        environment: qemu.environment(),
    }
}

/// The command line of backends that serve `image` on `socket`, in which `{socket}` may stand for one that changes.
pub(crate) fn command_line(
    backends: Backends,
    qemu: &Qemu,
    limits: Limits,
    image: &Path,
    socket: &str,
) -> Vec<OsString> {
    match backends {
        Backends::Qsd => qsd(qemu, limits, image, socket),
        Backends::Blk => blk(limits, image, socket).into_iter().map(OsString::from).collect(),
        Backends::Mixed => {
            let mut blk = blk(limits, image, "$0");
            // As the other has it: the guest is told of one device.
            blk.extend(["--write-cache".to_owned(), "off".to_owned()]);
            let qsd: Vec<String> =
                qsd(qemu, limits, image, "$0").iter().map(|word| word.to_string_lossy().into_owned()).collect();
            let script = format!("case $0 in *[02468].sock) exec {};; *) exec {};; esac", words(&qsd), words(&blk));
            ["sh", "-c", &script, socket].map(OsString::from).into()
        }
    }
}

/// As a shell reads them; what begins with a dollar is for it to fill in.
fn words(line: &[String]) -> String {
    let quoted: Vec<String> = line.iter().map(|word| format!("\"{word}\"")).collect();
    quoted.join(" ")
}

/// The command line of our own backend.
fn blk(limits: Limits, image: &Path, socket: &str) -> Vec<String> {
    let blk = Blk { image: image.to_path_buf(), queues: QUEUES, engine: Engine::Auto, direct: false };
    let mut line = blk.command_line(socket);
    if limits == Limits::Cloud {
        line.extend(["--fault".to_owned(), "latency:us=2000".to_owned()]);
    }
    line
}

/// The command line of a storage daemon.
fn qsd(qemu: &Qemu, limits: Limits, image: &Path, socket: &str) -> Vec<OsString> {
    let image = image.display();
    let mut words = vec![
        qemu.program("qemu-storage-daemon").into_os_string(),
        "--blockdev".into(),
        format!("driver=file,node-name=image,filename={image},locking=on").into(),
    ];
    words.extend(limits.words());
    words.push("--export".into());
    words.push(
        format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues={QUEUES}"
        )
        .into(),
    );
    words
}

/// A backend nobody guards.
#[derive(Debug)]
pub(crate) struct Bare {
    backends: Backends,
    qemu: Qemu,
    limits: Limits,
    image: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    process: Process,
}

impl Bare {
    /// Starts the backend on `socket`.
    pub(crate) fn start(
        backends: Backends,
        qemu: &Qemu,
        limits: Limits,
        workspace: &Workspace,
        socket: PathBuf,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(backends != Backends::Mixed, "nobody gives the disk to another backend without warmswap");
        let (image, log) = (workspace.image(), workspace.path("backend.log"));
        let process =
            spawn(&command_line(backends, qemu, limits, &image, &socket.to_string_lossy()), qemu, &socket, &log)?;
        Ok(Self { backends, qemu: qemu.clone(), limits, image, socket, log, process })
    }

    /// Ends the backend with `signal` and starts another one at once.
    pub(crate) fn replace(&mut self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal);
        anyhow::ensure!(self.process.wait(Duration::from_secs(10)).is_some(), "the backend does not end");
        let socket = self.socket.to_string_lossy();
        let words = command_line(self.backends, &self.qemu, self.limits, &self.image, &socket);
        self.process = spawn(&words, &self.qemu, &self.socket, &self.log)?;
        Ok(())
    }

    /// Requests of a dead backend that the next one says it has submitted again.
    pub(crate) fn resubmitted(&self) -> u64 {
        count_resubmitted(&std::fs::read_to_string(&self.log).unwrap_or_default())
    }

    /// Ends the backend.
    pub(crate) fn end(&mut self) {
        self.process.end();
    }
}

/// Adds up what backends say of it in their log.
fn count_resubmitted(log: &str) -> u64 {
    let said = log.lines().filter(|line| line.contains("requests of the last back-end are submitted again"));
    said.filter_map(|line| line.split(": ").nth(2)?.split(' ').next()?.parse::<u64>().ok()).sum()
}

/// Starts a backend and returns once it listens.
fn spawn(words: &[OsString], qemu: &Qemu, socket: &Path, log: &Path) -> anyhow::Result<Process> {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).envs(qemu.environment()).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::options().create(true).append(true).open(log)?);
    let mut process = Process::start("the backend", &mut command)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    // Looking at the socket must not take the one connection the backend serves at a time.
    while !listens(socket) {
        let said = || std::fs::read_to_string(log).unwrap_or_default();
        anyhow::ensure!(process.ended().is_none(), "{}: {}", process.obituary(), said());
        anyhow::ensure!(Instant::now() < deadline, "the backend does not listen: {}", said());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(process)
}

/// Whether a socket at `path` is in the kernel's table of listening sockets.
fn listens(path: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    table.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(7).is_some_and(|found| Path::new(found) == path) && words.get(3) == Some(&ACCEPTS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_submitted_again_is_added_up() {
        let log = "warmswap blk: ring 0: 7 requests of the last back-end are submitted again\n\
                   warmswap blk: the front-end is gone (x), 2 rings were started\n\
                   warmswap blk: ring 1: 12 requests of the last back-end are submitted again\n";
        assert_eq!(count_resubmitted(log), 19);
    }

    #[test]
    fn a_shell_gives_the_socket_to_one_or_the_other_by_its_number() {
        let qsd = words(&["qsd".to_owned(), "addr.path=$0,x".to_owned()]);
        assert_eq!(qsd, r#""qsd" "addr.path=$0,x""#);
        let line = blk(Limits::Cloud, Path::new("/a b/image"), "$0");
        assert!(words(&line).contains(r#""--socket-path" "$0" "--blk-file" "/a b/image""#));
        assert!(line.ends_with(&["--fault".to_owned(), "latency:us=2000".to_owned()]));
    }
}
