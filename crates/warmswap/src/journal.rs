//! The journal: events in order, kept in memory for `warmswap events`, printed, and appended to a file.
//!
//! The control thread only hands entries over, without waiting; a thread of its own does the rest. What cannot be handed over is
//! counted and said.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender};
use serde_json::{Map, json};
use warmswap_core::{Entry, Severity, Value};

/// Entries on their way to the journal's thread.
const QUEUE_MAX: usize = 8192;
/// Entries kept in memory.
const KEPT_MAX: usize = 4096;

/// One entry with its time and device.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    at: SystemTime,
    device: String,
    entry: Entry,
}

/// The control thread's end.
#[derive(Clone, Debug)]
pub(crate) struct JournalSender {
    queue: Sender<Record>,
    lost: Arc<AtomicU64>,
}

impl JournalSender {
    /// Hands an entry over; never waits.
    pub(crate) fn entry(&self, device: &str, entry: Entry) {
        let record = Record { at: SystemTime::now(), device: device.to_owned(), entry };
        if self.queue.try_send(record).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A line that a backend printed.
    pub(crate) fn output(&self, device: &str, backend: u64, line: &str) {
        self.entry(device, Entry::info("BackendOutput").with("backend", backend).with("line", line));
    }
}

/// What is kept, and where readers wait for more.
#[derive(Debug, Default)]
struct Kept {
    /// Number of the first record kept.
    first: u64,
    records: VecDeque<(String, String)>,
    ended: bool,
}

/// The readers' end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Journal {
    kept: Arc<(Mutex<Kept>, Condvar)>,
}

impl Journal {
    /// Starts the journal's thread.
    pub(crate) fn start(file: Option<&Path>, quiet: bool) -> std::io::Result<(Self, JournalSender, JournalThread)> {
        let file = match file {
            Some(path) => Some(File::options().create(true).append(true).open(path)?),
            None => None,
        };
        let (queue, records) = crossbeam_channel::bounded(QUEUE_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let journal = Journal::default();
        let sender = JournalSender { queue, lost: Arc::clone(&lost) };
        let writer = Writer { journal: journal.clone(), file, quiet, lost };
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run(&records))?;
        Ok((journal, sender, JournalThread(thread)))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines of `device` from record number `from` on, and the number after the last. Waits up to `wait` if there are none.
    pub(crate) fn read(&self, device: &str, from: u64, wait: Duration) -> (Vec<String>, u64, bool) {
        let mut kept = self.lock();
        if kept.first + kept.records.len() as u64 <= from && !kept.ended {
            kept = self.kept.1.wait_timeout(kept, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let skip = usize::try_from(from.saturating_sub(kept.first)).unwrap_or(usize::MAX);
        let lines = kept.records.iter().skip(skip).filter(|(name, _)| name == device).map(|(_, line)| line.clone());
        (lines.collect(), kept.first + kept.records.len() as u64, kept.ended)
    }
}

/// The journal's thread, to be waited for once every sender is gone.
#[derive(Debug)]
pub(crate) struct JournalThread(std::thread::JoinHandle<()>);

impl JournalThread {
    pub(crate) fn join(self) {
        // A journal that panicked has said so on stderr.
        let _panicked = self.0.join();
    }
}

struct Writer {
    journal: Journal,
    file: Option<File>,
    quiet: bool,
    lost: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self, records: &Receiver<Record>) {
        for record in records {
            self.write(&record);
            let lost = self.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                let entry = Entry::warning("JournalOverflow").with("lost", lost);
                self.write(&Record { entry, ..record });
            }
        }
        self.journal.lock().ended = true;
        self.journal.kept.1.notify_all();
    }

    fn write(&mut self, record: &Record) {
        let line = to_json(record).to_string();
        if !self.quiet {
            eprintln!("{}", to_text(record));
        }
        if let Some(file) = &mut self.file
            && let Err(error) = writeln!(file, "{line}")
        {
            eprintln!("the journal file cannot be written and is given up: {error}");
            self.file = None;
        }
        let mut kept = self.journal.lock();
        if kept.records.len() == KEPT_MAX {
            kept.records.pop_front();
            kept.first += 1;
        }
        kept.records.push_back((record.device.clone(), line));
        drop(kept);
        self.journal.kept.1.notify_all();
    }
}

fn to_json(record: &Record) -> serde_json::Value {
    let mut properties = Map::new();
    for (name, value) in &record.entry.properties {
        let value = match value {
            Value::Number(number) => json!(number),
            Value::Micros(micros) => json!((micros * 10.0).round() / 10.0),
            Value::Text(text) => json!(text),
            Value::Flag(flag) => json!(flag),
        };
        properties.insert((*name).to_owned(), value);
    }
    let level = match record.entry.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    json!({
        "timestamp": timestamp(record.at),
        "source": record.device,
        "event": record.entry.event,
        "level": level,
        "properties": properties,
    })
}

fn to_text(record: &Record) -> String {
    let level = match record.entry.severity {
        Severity::Info => "",
        Severity::Warning => " warning:",
        Severity::Error => " ERROR:",
    };
    let mut text = format!("{} {}{level} {}", timestamp(record.at), record.device, record.entry.event);
    for (name, value) in &record.entry.properties {
        let value = match value {
            Value::Number(number) => number.to_string(),
            Value::Micros(micros) => format!("{micros:.1}"),
            Value::Text(words) => format!("{words:?}"),
            Value::Flag(flag) => flag.to_string(),
        };
        text.push_str(&format!(" {name}={value}"));
    }
    text
}

/// UTC in the form of RFC 3339, with microseconds.
pub(crate) fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
}

/// Date of a day counted from 1970-01-01 (H. Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_utc() {
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_micros(951_782_400_000_007)), "2000-02-29T00:00:00.000007Z");
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(1_795_392_000)), "2026-11-23T00:00:00.000000Z");
    }
}
