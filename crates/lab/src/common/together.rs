//! One broker process that guards many devices: this very binary under a verb of its own.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::Signal;

use super::process::{Target, signal_with_parent};

/// How long nothing may become ready while devices are started.
const TURN_MAX: Duration = Duration::from_secs(60);
/// How long it may take to end.
const END_MAX: Duration = Duration::from_secs(120);
/// Progress is told this often.
const TELL_EVERY: usize = 100;

/// Such a process. Ended in order on drop, whatever fails.
#[derive(Debug)]
pub(crate) struct Together {
    child: Child,
    log: PathBuf,
}

impl Together {
    /// Starts one with these devices, the options of `guard` for each, and waits until a VMM can connect to all of them. A few are started
    /// at a time.
    pub(crate) fn start(directory: &Path, devices: &[Vec<String>]) -> anyhow::Result<Self> {
        let lines = directory.join("devices");
        let mut file = File::create(&lines)?;
        for device in devices {
            writeln!(file, "{}", serde_json::to_string(device)?)?;
        }
        let log = directory.join("broker.log");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("guard").arg(&lines);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        // An interrupt from the terminal is for the instrument, which ends the broker in its turn.
        command.process_group(0);
        let mut child = signal_with_parent(&mut command, Signal::TERM).spawn().context("starting the broker")?;
        let stdout = child.stdout.take().context("the broker's output")?;
        let (sender, ready) = channel();
        std::thread::spawn(move || {
            // Read on when nobody waits any more, so that the broker never blocks on it.
            BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        let together = Together { child, log };
        together.wait_for(&ready, devices.len())?;
        Ok(together)
    }

    fn wait_for(&self, ready: &Receiver<String>, devices: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        for count in 1..=devices {
            match ready.recv_timeout(TURN_MAX) {
                Ok(line) if line.starts_with("ready:") => {}
                Ok(line) => bail!("the broker said {line:?}"),
                Err(RecvTimeoutError::Timeout) => bail!("only {count} devices became ready\n{}", self.last_words()),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the broker ended with {} of {devices} devices ready\n{}", count - 1, self.last_words())
                }
            }
            if count % TELL_EVERY == 0 {
                eprintln!("{count} of {devices} devices ready after {:.1} s", began.elapsed().as_secs_f64());
            }
        }
        Ok(())
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of its log, for the report of a failure.
    pub(crate) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("end of the broker's log:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }

    fn terminate(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        Target::open(self.child.id())?.signal(Signal::TERM)?;
        let deadline = Instant::now() + END_MAX;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("the broker did not end on SIGTERM within {END_MAX:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Together {
    fn drop(&mut self) {
        if self.terminate().is_err() {
            // Its backends die with it.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The broker's side: guards what the file says.
pub(crate) fn main(file: Option<OsString>) -> ExitCode {
    let read = || -> anyhow::Result<Vec<Vec<String>>> {
        let file = PathBuf::from(file.context("a file with devices is missing")?);
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    match read() {
        Ok(lines) => warmswap::guard_together(lines),
        Err(error) => {
            eprintln!("lab guard: {error:#}");
            ExitCode::FAILURE
        }
    }
}
