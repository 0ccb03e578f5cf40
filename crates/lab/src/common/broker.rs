//! A broker as a child: this very binary under another verb, started, waited for and ended as an operator does.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;

use super::lines::Lines;
use super::process::{Target, signal_with_parent};
use super::systemd;

/// How long it may take to start and to end.
const TURN_MAX: Duration = Duration::from_secs(20);
/// Lines of its log in an error.
const LOG_LINES: usize = 60;

/// How a broker is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'a> {
    /// Name of the guarded device.
    pub(crate) name: &'a str,
    /// Directory for sockets and log.
    pub(crate) directory: &'a Path,
    /// More options for `guard`.
    pub(crate) options: &'a [String],
    /// The backend's command line with `{socket}` in it.
    pub(crate) backend: &'a [String],
    /// One variable of the environment: set to a value, or not there.
    pub(crate) environment: Option<(&'a str, Option<&'a str>)>,
    /// A keeper starts it, and again when it dies.
    pub(crate) kept: bool,
    /// What the keeper executes, if not this program.
    pub(crate) program: Option<&'a Path>,
}

/// How a broker ended that did not become ready.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Its exit.
    pub(crate) status: ExitStatus,
    /// What it printed.
    pub(crate) log: String,
}

/// A broker process. Ended in order on drop, whatever fails.
#[derive(Debug)]
pub(crate) struct BrokerProcess {
    child: Child,
    name: String,
    directory: PathBuf,
}

impl BrokerProcess {
    /// Starts one with its backends and waits until it listens.
    pub(crate) fn start(launch: &Launch<'_>) -> anyhow::Result<Self> {
        match Self::try_start(launch)? {
            Ok(broker) => Ok(broker),
            Err(Refusal { status, log }) => {
                bail!("the broker ended before it was ready: {status}\n{}", tail(&log, LOG_LINES))
            }
        }
    }

    /// As [`BrokerProcess::start`]; a broker that refuses to start is an answer.
    pub(crate) fn try_start(launch: &Launch<'_>) -> anyhow::Result<Result<Self, Refusal>> {
        let directory = launch.directory;
        let control = directory.join("control");
        std::fs::create_dir_all(&control)?;
        let words = words(launch, &control)?;
        let log = directory.join("broker.log");
        let file = File::create(&log)?;
        let mut command = Command::new(std::env::current_exe()?);
        if launch.kept && systemd::is_inside() {
            command = systemd::stand_in(launch.name, &words, &[], &log)?;
        } else if launch.kept {
            command.args(["warmswap", "keeper", "--run-dir"]).arg(&control).arg("--").args(words);
        } else {
            command.args(&words[1..]);
        }
        match launch.environment {
            Some((name, Some(value))) => drop(command.env(name, value)),
            Some((name, None)) => drop(command.env_remove(name)),
            None => {}
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        // An interrupt from the terminal is for the instrument, which ends the broker in its turn.
        command.process_group(0);
        // Asked to end in order, it takes its backends and control groups along.
        let child = signal_with_parent(&mut command, Signal::TERM).spawn().context("starting the broker")?;
        let mut broker = BrokerProcess { child, name: launch.name.to_owned(), directory: directory.to_path_buf() };
        if broker.becomes_ready().with_context(|| broker.log_tail(LOG_LINES))? {
            return Ok(Ok(broker));
        }
        let status = broker.child.wait()?;
        Ok(Err(Refusal { status, log: std::fs::read_to_string(directory.join("broker.log"))? }))
    }

    /// Waits for the line that says so. False: it has ended, or is about to.
    fn becomes_ready(&mut self) -> anyhow::Result<bool> {
        let stdout = self.child.stdout.take().context("the broker's output")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            // The receiver may have given up; the pipe is drained all the same, so that the broker never blocks on it.
            let _ = sender.send(lines.next());
            lines.for_each(drop);
        });
        match receiver.recv_timeout(TURN_MAX) {
            Ok(Some(line)) => {
                let line = line?;
                ensure!(line.starts_with("ready:"), "the broker said {line:?} instead of that it is ready");
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => bail!("the broker was not ready within {TURN_MAX:?}"),
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the VMM connects.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// A connection to its control socket.
    pub(crate) fn connect(&self) -> anyhow::Result<Lines> {
        Lines::connect(&self.control_socket())
    }

    fn control_socket(&self) -> PathBuf {
        self.directory.join("control").join(format!("{}.ctl", self.name))
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The end of its log, for the report of a failure.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let log = std::fs::read_to_string(self.directory.join("broker.log")).unwrap_or_default();
        tail(&log, lines)
    }

    /// Ends it as an operator does and waits until it is gone. It must succeed and leave no socket behind.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        let status = self.terminate()?;
        ensure!(status.success(), "on SIGTERM the broker ended with {status}\n{}", self.log_tail(LOG_LINES));
        for socket in [self.socket(), self.control_socket()] {
            ensure!(!socket.exists(), "the broker left {} behind", socket.display());
        }
        Ok(())
    }

    fn terminate(&mut self) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        Target::open(self.child.id())?.signal(Signal::TERM)?;
        let deadline = Instant::now() + TURN_MAX;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the broker did not end on SIGTERM within {TURN_MAX:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The broker's command line.
fn words(launch: &Launch<'_>, control: &Path) -> anyhow::Result<Vec<OsString>> {
    let program = launch.program.map_or_else(std::env::current_exe, |program| Ok(program.to_path_buf()))?;
    let mut words: Vec<OsString> = vec![program.into()];
    words.extend(["warmswap", "guard", "--name", launch.name, "--type", "blk", "--socket"].map(OsString::from));
    words.extend([socket(launch.directory).into(), "--control".into(), control.into()]);
    words.extend(["--run-dir".into(), launch.directory.join("run").into()]);
    words.extend(launch.options.iter().chain([&"--".to_owned()]).chain(launch.backend).map(OsString::from));
    Ok(words)
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        if self.terminate().is_err() {
            // Its backends die with it.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("vmm.sock")
}

fn tail(log: &str, count: usize) -> String {
    let lines: Vec<&str> = log.lines().collect();
    format!("end of the broker's log:\n{}", lines[lines.len().saturating_sub(count)..].join("\n"))
}
