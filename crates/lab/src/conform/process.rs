//! The back-end under test as a child.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::Signal;

use crate::common::process::{Target as Handle, die_with_parent, inherit};

/// How long a process may take to be collected once its connection is closed: a core file is written first.
const COLLECT: Duration = Duration::from_millis(500);
/// Lines of what it printed that are quoted.
const QUOTED: usize = 3;
/// Exit codes of a Rust program that panicked, and of a shell whose child was aborted.
const PANICKED: [i32; 2] = [101, 134];

/// Words of the command line that are replaced.
#[derive(Debug)]
pub(super) struct Places<'a> {
    /// `{socket}`, and where the listener of `{fd}` is bound.
    pub(super) socket: &'a Path,
    /// `{image}`.
    pub(super) image: &'a Path,
    /// `{dir}`.
    pub(super) dir: &'a Path,
}

/// A process. Killed on drop.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    log: PathBuf,
    /// We have ended it, so its end says nothing.
    ended_by_us: bool,
}

impl Process {
    /// Starts one. What it prints goes to `log`.
    pub(super) fn start(line: &[String], places: &Places<'_>, log: PathBuf) -> anyhow::Result<Self> {
        let listener = line.iter().any(|word| word.contains("{fd}")).then(|| UnixListener::bind(places.socket));
        let listener = listener.transpose().with_context(|| format!("binding {}", places.socket.display()))?;
        let fd = listener.as_ref().map_or_else(String::new, |it| it.as_raw_fd().to_string());
        let text = |path: &Path| path.display().to_string();
        let (socket, image, dir) = (text(places.socket), text(places.image), text(places.dir));
        let replaced = |word: &String| {
            word.replace("{socket}", &socket).replace("{image}", &image).replace("{dir}", &dir).replace("{fd}", &fd)
        };
        let words: Vec<String> = line.iter().map(replaced).collect();
        let file = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        // An interrupt from the terminal is for the suite.
        command.process_group(0);
        if let Some(listener) = &listener {
            inherit(&mut command, listener.as_fd());
        }
        let child = die_with_parent(&mut command).spawn().with_context(|| format!("starting {}", words[0]))?;
        Ok(Process { child, log, ended_by_us: false })
    }

    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// How it ended, if it does within `within`.
    pub(super) fn ends_within(&mut self, within: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + within;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(Some(status)),
                None if Instant::now() > deadline => return Ok(None),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// How it died, if it did so by itself and not in order. Waits a moment for that if its connection was `closed`.
    pub(super) fn died(&mut self, closed: bool) -> anyhow::Result<Option<String>> {
        if self.ended_by_us {
            return Ok(None);
        }
        let status = if closed { self.ends_within(COLLECT)? } else { self.ended()? };
        let Some(status) = status else { return Ok(None) };
        let how = match (status.signal(), status.code()) {
            (Some(signal), _) => format!("signal {signal}"),
            (None, Some(code)) if PANICKED.contains(&code) => format!("it panicked (exit code {code})"),
            _ => return Ok(None),
        };
        Ok(Some(format!("{how}{}", self.said())))
    }

    /// In what order it has ended by itself, for a report. Empty while it runs.
    pub(super) fn end_in_words(&mut self) -> anyhow::Result<String> {
        let status = if self.ended_by_us { None } else { self.ended()? };
        Ok(status.map_or_else(String::new, |status| format!("; the process ended ({status}){}", self.said())))
    }

    /// The last of what it printed.
    fn said(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        // It goes to a terminal, and into JSON.
        let text: String =
            String::from_utf8_lossy(&text).chars().filter(|it| *it == '\n' || !it.is_control()).collect();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = &lines[lines.len().saturating_sub(QUOTED)..];
        if last.is_empty() { String::new() } else { format!("; it said: {}", last.join(" / ")) }
    }

    /// Asks it to end.
    pub(super) fn ask_to_end(&mut self) -> anyhow::Result<()> {
        self.ended_by_us = true;
        Handle::open(self.child.id())?.signal(Signal::TERM)
    }

    /// SIGKILL, and waits until it is collected.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_none() {
            self.ended_by_us = true;
            self.child.kill()?;
            self.child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
