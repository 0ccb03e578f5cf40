//! Proving that a killed backend touches nothing any more.
//!
//! ```text
//! killed ─▶ reaped ─▶ control group empty ─▶ [storage descriptions closed] ─▶ [operator's command succeeded] ─▶ proved
//! ```
//! No timeout stands in for a step: what does not come is waited for and reported.

use std::io;
use std::process::{Child, Command, Stdio};

use warmswap_core::{BackendId, FenceLevel, Nanos};
use warmswap_zoo::{Animal, loose};

use super::keeping::StorageRecord;
use crate::process::Process;
use crate::storage::{FenceBasis, Mark, Storage};

/// First and longest time between two looks. The end of a process makes itself heard; looking for it often would only take time from it,
/// where the two share a processor. What comes after the end is looked for.
const CHECK_ALIVE: Nanos = Nanos::from_micros(500);
const CHECK_MIN: Nanos = Nanos::from_micros(30);
const CHECK_MAX: Nanos = Nanos::from_millis(5);
/// Waiting longer than this is reported, and then ever more rarely.
const REPORT_FIRST: Nanos = Nanos::from_millis(200);
/// What is held for so long after the exit may be held by another process: it is looked for, before the first report.
const SEARCH_AFTER: Nanos = Nanos::from_millis(100);

/// A fence being raised.
#[derive(Debug)]
pub(crate) struct Fence {
    pub(crate) backend: BackendId,
    pub(crate) process: Process,
    /// What it had open; none while the inspector still looks.
    pub(crate) storage: Option<Storage>,
    /// What it had open, for the next broker.
    pub(crate) recorded: StorageRecord,
    /// When it was first given rings in its role.
    pub(crate) given_at: Option<Nanos>,
    /// Who else holds what it had open, once that was found out.
    pub(crate) holder: Option<String>,
    /// That was asked for.
    searched: bool,
    command: Option<String>,
    running: Option<Child>,
    pub(crate) began: Nanos,
    gone_at: Option<Nanos>,
    pub(crate) check_at: Nanos,
    report_at: Nanos,
}

/// Where a fence stands after a look.
#[derive(Debug)]
pub(crate) enum Progress {
    Proved {
        level: FenceLevel,
        evidence: String,
    },
    Waiting,
    /// Waiting for so long that somebody should know.
    Overdue(String),
}

impl Fence {
    /// Kills the backend and starts to wait.
    pub(crate) fn raise(
        backend: BackendId,
        process: Process,
        storage: Option<Storage>,
        recorded: StorageRecord,
        given_at: Option<Nanos>,
        command: Option<String>,
        now: Nanos,
    ) -> Self {
        process.kill();
        Fence {
            backend,
            process,
            storage,
            recorded,
            given_at,
            holder: None,
            searched: false,
            command,
            running: None,
            began: now,
            gone_at: None,
            check_at: now,
            report_at: now + REPORT_FIRST,
        }
    }

    /// Looks once.
    pub(crate) fn look(&mut self, device: &str, now: Nanos) -> Progress {
        let waited = now.since(self.began);
        let next = |soonest| now + Nanos(waited.0 / 8).clamp(soonest, CHECK_MAX);
        self.check_at = next(CHECK_MIN);
        let proof = self.proof(device, now);
        if self.gone_at.is_none() {
            self.check_at = next(CHECK_ALIVE);
        }
        match proof {
            Ok((level, evidence)) => Progress::Proved { level, evidence },
            Err(missing) if now >= self.report_at => {
                self.report_at = now + waited.max(REPORT_FIRST);
                Progress::Overdue(missing)
            }
            Err(_) => Progress::Waiting,
        }
    }

    /// What it waits for although the process is gone, if nobody has looked yet who holds it.
    pub(crate) fn unexplained(&mut self, now: Nanos) -> Option<Mark> {
        if self.searched || self.gone_at.is_none_or(|at| now.since(at) < SEARCH_AFTER) {
            return None;
        }
        self.searched = true;
        self.storage.as_ref()?.held()
    }

    /// Whether it was looked at after it was given rings, in words. A backend that opens storage only then and dies before the look is
    /// proved by what it had open before: to wait for a look that cannot come any more would leave the guest without its disk for ever.
    fn looked(&self, storage: &Storage) -> &'static str {
        let looked = storage.last_look();
        match self.given_at {
            Some(at) if looked.is_none_or(|looked| looked < at) => "; last looked at before it was given rings",
            _ => "",
        }
    }

    fn proof(&mut self, device: &str, now: Nanos) -> Result<(FenceLevel, String), String> {
        let exit = self.process.is_gone()?;
        let gone_at = *self.gone_at.get_or_insert(now);
        if self.command.is_some() {
            self.run_command(device)?;
            return Ok((FenceLevel::Target, format!("{exit}, the operator's fence command succeeded")));
        }
        let Some(storage) = &self.storage else { return Err("it is still being looked at".to_owned()) };
        storage.has_no_process(self.process.is_ours())?;
        let basis = storage.basis();
        let looked = match &basis {
            FenceBasis::Unprovable(_) => "",
            _ => self.looked(storage),
        };
        match basis {
            FenceBasis::Exit if storage.marked() == 0 => {
                let evidence = format!("{exit}; it had no file, block device or io_uring open{looked}");
                Ok((FenceLevel::Reaped, evidence))
            }
            FenceBasis::Exit => {
                Ok((FenceLevel::Reaped, format!("{exit}; it did no I/O that outlives a process{looked}")))
            }
            // The laboratory shows with it what the next step is for; the program that is shipped has no such switch.
            #[cfg(feature = "lab")]
            FenceBasis::Marks if std::env::var_os("WARMSWAP_LAB_TRUST_EXIT").is_some() => {
                Ok((FenceLevel::Reaped, format!("{exit}; SABOTAGED: its storage descriptions were not looked at")))
            }
            FenceBasis::Marks if loose(Animal::ExitTakenForQuiet) => Ok((FenceLevel::Reaped, exit)),
            FenceBasis::Marks => {
                storage.is_closed().map_err(|missing| match &self.holder {
                    Some(holder) => format!("{missing}; {holder}"),
                    None => missing,
                })?;
                let after = now.since(gone_at);
                let marked = storage.marked();
                Ok((
                    FenceLevel::Reaped,
                    format!("{exit}, its {marked} storage descriptions closed {after} later{looked}"),
                ))
            }
            FenceBasis::Unprovable(reason) => Err(reason),
        }
    }

    /// Runs the operator's command to its success; a failure is tried again at the next look.
    fn run_command(&mut self, device: &str) -> Result<(), String> {
        let command = self.command.as_deref().unwrap_or_default();
        if self.running.is_none() {
            let pid = self.process.pid.to_string();
            let child = start_command(command, device, &pid).map_err(|error| format!("{command}: {error}"))?;
            self.running = Some(child);
        }
        let Some(child) = &mut self.running else { return Err("the fence command is not running".to_owned()) };
        match child.try_wait() {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => {
                self.running = None;
                // A failing command must not be started as fast as it fails.
                self.check_at = self.check_at + Nanos::from_millis(500);
                Err(format!("the fence command failed: {status}"))
            }
            Ok(None) => Err("the fence command is still running".to_owned()),
            Err(error) => Err(format!("the fence command cannot be waited for: {error}")),
        }
    }
}

fn start_command(command: &str, device: &str, pid: &str) -> io::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", command])
        .env("WARMSWAP_DEVICE", device)
        .env("WARMSWAP_BACKEND_PID", pid)
        .stdin(Stdio::null())
        .spawn()
}
