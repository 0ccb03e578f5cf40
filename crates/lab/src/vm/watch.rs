//! The host's ear: what the guest says on its second serial port, added up.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::layout::{DISK_BYTES, MIB};
use super::orders::Heard;

/// How many remarks of the guest are kept.
const NOTES_MAX: usize = 100;

/// One second of the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tick {
    /// When the host heard it.
    pub(crate) at: Instant,
    /// Requests completed.
    pub(crate) iops: u64,
    /// The slowest probe, or the age of the one that is still waiting.
    pub(crate) worst_us: u64,
    /// Requests the disk had not completed.
    pub(crate) inflight: u64,
    /// Age of the probe that is waiting.
    probe_age: Duration,
    /// Age of the running round of fio.
    fio_age: Duration,
}

/// What all rounds of fio found.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct FioTotals {
    /// Rounds that ended.
    pub(crate) rounds: u64,
    /// Requests they made.
    pub(crate) requests: u64,
    /// Errors in fio's own report; with `continue_on_error=verify` these are verify errors or what ended a job.
    pub(crate) errors: u64,
    /// Rounds that ended with a bad exit code or wrote less than asked, without reporting an error.
    pub(crate) cut_short: u64,
    /// The longest request.
    pub(crate) longest_us: u64,
}

/// What a load said of itself at its end.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct LoadTotals {
    /// Operations done.
    pub(crate) operations: u64,
    /// Operations that failed.
    pub(crate) errors: u64,
    /// Contents that were not what had been acknowledged.
    pub(crate) mismatches: u64,
}

/// Everything heard so far.
#[derive(Debug)]
pub(crate) struct Account {
    /// Milliseconds from the start of the kernel to the start of the loads.
    pub(crate) boot_ms: Option<u64>,
    /// Every second so far.
    pub(crate) ticks: Vec<Tick>,
    /// The fio load.
    pub(crate) fio: FioTotals,
    /// The stamp load, once ended.
    pub(crate) stamps: Option<LoadTotals>,
    /// Digest of the generations the guest was promised.
    pub(crate) stamp_table: Option<u64>,
    /// The longest request of the stamp load.
    pub(crate) stamp_longest_us: u64,
    /// The file system load, once ended.
    pub(crate) files: Option<LoadTotals>,
    /// Digest of each mebibyte of the disk, as the guest reads it.
    pub(crate) digests: Vec<Option<u64>>,
    /// Remarks on what went wrong.
    pub(crate) notes: Vec<String>,
    /// Whether the guest said that it is done.
    pub(crate) ended: bool,
    heard_at: Instant,
}

impl Account {
    /// Nothing heard yet.
    pub(crate) fn new() -> Self {
        let mebibytes = usize::try_from(DISK_BYTES / MIB).expect("a small disk");
        Self {
            boot_ms: None,
            ticks: Vec::new(),
            fio: FioTotals::default(),
            stamps: None,
            stamp_table: None,
            stamp_longest_us: 0,
            files: None,
            digests: vec![None; mebibytes],
            notes: Vec::new(),
            ended: false,
            heard_at: Instant::now(),
        }
    }

    /// Takes in one line.
    fn take_in(&mut self, line: &str) {
        let Some(heard) = Heard::parse(line) else { return };
        self.heard_at = Instant::now();
        let number = |key| heard.number(key).unwrap_or(0);
        match heard.word.as_str() {
            "up" => self.boot_ms = heard.number("uptime_ms"),
            "tick" => self.ticks.push(tick(&heard)),
            "fio" => self.fio.add(&heard),
            "stamp" => {
                let operations = number("writes") + number("reads");
                self.stamps = Some(totals(&heard, operations));
                self.stamp_table = heard.hex("table");
                self.stamp_longest_us = number("longest_us");
            }
            "files" => self.files = Some(totals(&heard, number("operations"))),
            "digest" => {
                let slot = heard.number("mib").and_then(|mib| usize::try_from(mib).ok());
                if let Some(slot) = slot.and_then(|index| self.digests.get_mut(index)) {
                    *slot = heard.hex("sum");
                }
            }
            "end" => self.ended = true,
            _ => self.note(line),
        }
    }

    fn note(&mut self, line: &str) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(line.trim().replace('_', " "));
        }
    }

    /// The longest request any load saw, the one still waiting included.
    pub(crate) fn longest_us(&self) -> u64 {
        let ticks = self.ticks.iter().map(|tick| tick.worst_us).max().unwrap_or(0);
        ticks.max(self.stamp_longest_us).max(self.fio.longest_us)
    }

    /// The slowest probe the guest reported in a span of time.
    pub(crate) fn worst_us_between(&self, from: Instant, to: Instant) -> u64 {
        self.ticks.iter().filter(|tick| tick.at >= from && tick.at <= to).map(|tick| tick.worst_us).max().unwrap_or(0)
    }

    /// Why the guest must be given up, if it must.
    pub(crate) fn standstill(&self, patience: &Patience) -> Option<String> {
        let silent = self.heard_at.elapsed();
        if silent > patience.silence {
            return Some(format!("the guest has said nothing for {} s", silent.as_secs()));
        }
        let tick = self.ticks.last()?;
        if tick.probe_age > patience.probe {
            let age = tick.probe_age.as_secs();
            return Some(format!("a request has been waiting for {age} s ({} in flight)", tick.inflight));
        }
        if tick.fio_age > patience.fio {
            let age = tick.fio_age.as_secs();
            return Some(format!("a round of fio has not ended for {age} s ({} in flight)", tick.inflight));
        }
        None
    }
}

impl FioTotals {
    fn add(&mut self, heard: &Heard) {
        let number = |key| heard.number(key).unwrap_or(0);
        let errors = number("errors").max(number("verify"));
        self.rounds += 1;
        self.requests += number("ios");
        self.errors += errors;
        self.cut_short += u64::from(errors == 0 && (number("exit") != 0 || number("short") != 0));
        self.longest_us = self.longest_us.max(number("max_us"));
    }
}

fn tick(heard: &Heard) -> Tick {
    let number = |key| heard.number(key).unwrap_or(0);
    Tick {
        at: Instant::now(),
        iops: number("iops"),
        worst_us: number("worst_us"),
        inflight: number("inflight"),
        probe_age: Duration::from_micros(number("probe_age_us")),
        fio_age: Duration::from_micros(number("fio_age_us")),
    }
}

fn totals(heard: &Heard, operations: u64) -> LoadTotals {
    let number = |key| heard.number(key).unwrap_or(0);
    LoadTotals { operations, errors: number("errors"), mismatches: number("mismatches") }
}

/// How long the guest may stand still before it counts as lost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Without any word.
    pub(crate) silence: Duration,
    /// With one request of the probe waiting.
    pub(crate) probe: Duration,
    /// With one round of fio running.
    pub(crate) fio: Duration,
}

/// Somebody who keeps account of what the guest says.
pub(crate) trait Hear {
    /// Takes in one line; true if it ends a second of the guest.
    fn hear(&mut self, line: &str) -> bool;
}

impl Hear for Account {
    fn hear(&mut self, line: &str) -> bool {
        let ticks = self.ticks.len();
        self.take_in(line);
        self.ticks.len() > ticks
    }
}

/// The host's end of the guest's port.
#[derive(Debug)]
pub(crate) struct Watch<A> {
    port: UnixStream,
    lines: Receiver<String>,
    /// What was heard.
    pub(crate) account: A,
}

impl<A: Hear> Watch<A> {
    /// Listens on `port`.
    pub(crate) fn new(port: UnixStream, account: A) -> anyhow::Result<Self> {
        let reader = BufReader::new(port.try_clone().context("a second handle of the port")?);
        let (sender, lines) = channel();
        // Ends when the machine does: the port closes with it.
        thread::spawn(move || {
            for line in reader.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { port, lines, account })
    }

    /// Listens for `span`, or until the next tick; true if that came.
    pub(crate) fn listen(&mut self, span: Duration) -> bool {
        let deadline = Instant::now() + span;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if self.account.hear(&line) {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => {
                    // The machine is gone, which its own handle tells; do not spin until then.
                    thread::sleep(deadline.saturating_duration_since(Instant::now()));
                    return false;
                }
            }
        }
    }

    /// Tells the guest to end its loads.
    pub(crate) fn say_stop(&mut self) -> anyhow::Result<()> {
        self.port.write_all(b"stop\n").context("telling the guest to stop")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience =
        Patience { silence: Duration::from_secs(30), probe: Duration::from_secs(10), fio: Duration::from_secs(60) };

    #[test]
    fn errors_of_fio_are_counted_whatever_form_they_take() {
        let mut account = Account::new();
        account.hear("LAB fio lane=a exit=0 errors=0 verify=0 ios=100 short=0 max_us=5");
        account.hear("LAB fio lane=a exit=1 errors=3 verify=2 ios=100 short=0 max_us=900");
        account.hear("LAB fio lane=a exit=1 errors=0 verify=0 ios=0 short=0 max_us=0");
        account.hear("LAB fio lane=a exit=0 errors=0 verify=0 ios=50 short=50 max_us=0");
        let fio = account.fio;
        assert_eq!((fio.rounds, fio.requests, fio.errors, fio.cut_short, fio.longest_us), (4, 250, 3, 2, 900));
    }

    #[test]
    fn a_request_that_does_not_return_is_a_standstill() {
        let mut account = Account::new();
        account.hear("LAB tick n=1 iops=900 worst_us=900 inflight=17 probe_age_us=900 fio_age_us=3000000");
        assert_eq!(account.standstill(&PATIENCE), None);
        account.hear("LAB tick n=2 iops=0 worst_us=11000000 inflight=17 probe_age_us=11000000 fio_age_us=4000000");
        assert!(account.standstill(&PATIENCE).is_some_and(|why| why.contains("17 in flight")));
        account.hear("LAB tick n=3 iops=9 worst_us=10 inflight=5 probe_age_us=0 fio_age_us=61000000");
        assert!(account.standstill(&PATIENCE).is_some_and(|why| why.contains("fio")));
    }
}
