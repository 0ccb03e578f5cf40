//! A real systemd around an instrument: as the first process of a namespace of its own, with the instrument as one of its services and the
//! broker as another, so that what is measured under our keeper can be measured under the one that most users have.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::Signal;

use super::interrupt;
use super::process::signal_with_parent;

/// Tells an instrument that it runs as a service, and where it may keep things.
const INSIDE: &str = "WARMSWAP_LAB_SERVICE";
/// Where units are read from inside.
const UNITS: &str = "/run/warmswap-lab";
const PROGRAM: &str = "/lib/systemd/systemd";
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Its process: the first one.
pub(crate) const PID: u32 = 1;

/// Whether a systemd of ours is around.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Where an instrument makes its directory. They are named after processes, and removed if there is none of that number: inside a namespace,
/// where numbers begin anew, not beside those of others.
pub(crate) fn place(otherwise: &Path) -> PathBuf {
    std::env::var_os(INSIDE).map_or_else(|| otherwise.to_path_buf(), PathBuf::from)
}

/// Mounts what the namespace needs, writes the instrument's unit and becomes systemd.
const BEGIN: &str = "set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/lock /run/warmswap-lab
# What is only covered is still listed, and would be taken for the hierarchy.
umount -R /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cp \"$1\"/*.service \"$1\"/*.target /run/warmswap-lab
export SYSTEMD_UNIT_PATH=/run/warmswap-lab container=warmswap-lab
exec \"$2\" --system --unit=lab.target --log-target=console --show-status=no
";

/// Runs this very command again as a service, and says how it ended.
pub(crate) fn again(directory: &Path) -> anyhow::Result<u8> {
    ensure!(Path::new(PROGRAM).exists(), "{PROGRAM} is not there: install systemd");
    let (out, err, status) = (directory.join("out"), directory.join("err"), directory.join("status"));
    [&out, &err].into_iter().try_for_each(|path| File::create(path).map(drop))?;
    std::fs::write(directory.join("lab.target"), "[Unit]\nDefaultDependencies=no\nWants=lab.service\n")?;
    std::fs::write(directory.join("lab.service"), service(directory, &[&out, &err, &status])?)?;
    let mut command = Command::new("unshare");
    command.args(["-m", "-p", "-f", "-C", "-u", "-i", "--kill-child=KILL", "--mount-proc", "sh", "-c", BEGIN, "sh"]);
    command.arg(directory).arg(PROGRAM).stdin(Stdio::null()).stdout(File::create(directory.join("systemd.log"))?);
    command.stderr(File::options().append(true).open(directory.join("systemd.log"))?);
    let mut child = signal_with_parent(&mut command, Signal::TERM).spawn().context("unshare")?;
    let ended = follow(&mut child, &[&out, &err], &status);
    let _ended = child.kill();
    child.wait()?;
    ended.with_context(|| std::fs::read_to_string(directory.join("systemd.log")).unwrap_or_default())
}

/// Passes on what the service prints until it has ended.
fn follow(child: &mut std::process::Child, printed: &[&Path; 2], status: &Path) -> anyhow::Result<u8> {
    let [mut out, mut err] = [File::open(printed[0])?, File::open(printed[1])?];
    let mut pass_on = || -> std::io::Result<()> {
        let (mut text, mut words) = (Vec::new(), Vec::new());
        out.read_to_end(&mut text)?;
        err.read_to_end(&mut words)?;
        std::io::stdout().write_all(&text)?;
        std::io::stderr().write_all(&words)
    };
    loop {
        let ended = std::fs::read_to_string(status).ok().filter(|text| text.ends_with('\n'));
        pass_on()?;
        if let Some(ended) = ended {
            return ended.trim().parse().with_context(|| format!("the service ended: {ended}"));
        }
        ensure!(child.try_wait()?.is_none(), "systemd has ended before the instrument");
        ensure!(!interrupt::is_asked(), "interrupted");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The unit of the instrument itself.
fn service(directory: &Path, [out, err, status]: &[&Path; 3]) -> anyhow::Result<String> {
    let words: Vec<OsString> =
        std::iter::once(std::env::current_exe()?.into()).chain(std::env::args_os().skip(1)).collect();
    let mut text = String::from("[Unit]\nDefaultDependencies=no\n[Service]\nType=exec\nTimeoutStopSec=30\n");
    writeln!(text, "Environment={INSIDE}={}", directory.display())?;
    writeln!(text, "WorkingDirectory={}", std::env::current_dir()?.display())?;
    for name in ["PATH", "HOME", "CARGO_HOME", "RUST_BACKTRACE"] {
        if let Ok(value) = std::env::var(name) {
            writeln!(text, "Environment=\"{name}={value}\"")?;
        }
    }
    writeln!(text, "StandardOutput=append:{}\nStandardError=append:{}", out.display(), err.display())?;
    writeln!(text, "ExecStart={}", quoted(&words))?;
    writeln!(text, "ExecStopPost=/bin/sh -c 'echo $EXIT_STATUS > {0}.new; mv {0}.new {0}'", status.display())?;
    Ok(text)
}

/// Words as a unit has them.
fn quoted(words: &[OsString]) -> String {
    let quote = |word: &OsString| {
        let word = String::from_utf8_lossy(word.as_bytes()).replace('\\', "\\\\").replace('"', "\\\"");
        format!("\"{}\"", word.replace('%', "%%").replace('$', "$$"))
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Starts a unit and stays until it is asked to end it: what a keeper is elsewhere.
const STAND_IN: &str = "trap 'systemctl stop \"$1\"; s=$?; kill $! 2>/dev/null; exit $s' TERM
systemctl daemon-reload && systemctl start \"$1\" || exit 1
echo ready: under systemd
sleep infinity &
wait
";

/// A process that stands for a broker which systemd starts, again when it dies, with these words; its log is appended to `log`. The unit is as
/// `contrib/warmswap-kept@.service` has it. `environment` is what the broker's has to hold besides.
pub(crate) fn stand_in(
    name: &str,
    words: &[OsString],
    environment: &[(&str, PathBuf)],
    log: &Path,
) -> anyhow::Result<Command> {
    let unit = format!("{name}-{}.service", std::process::id());
    let mut text = format!(
        "[Unit]\nDefaultDependencies=no\nStartLimitIntervalSec=0\n[Service]\nType=notify\nNotifyAccess=main\nFileDescriptorStoreMax=1000\n\
         KillMode=process\nRestart=always\nRestartSec=0\nSuccessExitStatus=75\nTimeoutStopSec=15\nDelegate=yes\n\
         StandardOutput=null\nStandardError=append:{}\nEnvironment=\"PATH={}\"\nExecStart={}\n",
        log.display(),
        std::env::var("PATH").unwrap_or_default(),
        quoted(words),
    );
    for (name, value) in environment {
        writeln!(text, "Environment=\"{name}={}\"", value.display())?;
    }
    std::fs::write(PathBuf::from(UNITS).join(&unit), text)?;
    let mut command = Command::new("sh");
    command.args(["-c", STAND_IN, "sh", &unit]);
    Ok(command)
}
