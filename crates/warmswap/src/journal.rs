//! The journal: events in order, kept in memory for `warmswap events`, printed, and appended to a file.
//!
//! The control thread only hands entries over, without waiting; a thread of its own does the rest. What cannot be handed over is
//! counted and said.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender};
use serde_json::json;
use warmswap_core::{Entry, Severity, Value};

use crate::hook::Hook;

/// Entries on their way to the journal's thread.
const QUEUE_MAX: usize = 8192;
/// Entries kept in memory.
const KEPT_MAX: usize = 4096;
/// Lines held back while a device starts.
const HELD_MAX: usize = 256;

/// One entry with its time and device.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    at: SystemTime,
    device: String,
    entry: Entry,
}

/// How a reader wants entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// For programs: one JSON object.
    Json,
    /// For people: one line.
    Text,
}

/// What goes to the journal's thread.
#[derive(Debug)]
enum Note {
    Entry(Record),
    /// The start is over: what was held back of it is printed, or, where the program says itself why it failed, is not.
    Started {
        well: bool,
    },
}

/// The control thread's end.
#[derive(Clone, Debug)]
pub(crate) struct JournalSender {
    queue: Sender<Note>,
    lost: Arc<AtomicU64>,
}

impl JournalSender {
    /// Hands an entry over; never waits.
    pub(crate) fn entry(&self, device: &str, entry: Entry) {
        let record = Record { at: SystemTime::now(), device: device.to_owned(), entry };
        if self.queue.try_send(Note::Entry(record)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A line that a backend printed.
    pub(crate) fn output(&self, device: &str, backend: u64, line: &str) {
        self.entry(device, Entry::info("BackendOutput").with("backend", backend).with("line", line));
    }

    /// The device has started, or could not be. Until then words of backends are held back from the printed journal, for a failed
    /// start is explained once, by the program's last words.
    pub(crate) fn started(&self, well: bool) {
        // A queue that is full delays words of people, nothing else.
        let _full = self.queue.try_send(Note::Started { well });
    }
}

/// What is kept, and where readers wait for more.
#[derive(Debug, Default)]
struct Kept {
    /// Number of the first record kept.
    first: u64,
    records: VecDeque<Record>,
    ended: bool,
}

/// The readers' end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Journal {
    kept: Arc<(Mutex<Kept>, Condvar)>,
}

impl Journal {
    /// Starts the journal's thread.
    pub(crate) fn start(
        file: Option<File>,
        quiet: bool,
        hook: Option<Hook>,
    ) -> std::io::Result<(Self, JournalSender, JournalThread)> {
        let (queue, notes) = crossbeam_channel::bounded(QUEUE_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let journal = Journal::default();
        let sender = JournalSender { queue, lost: Arc::clone(&lost) };
        let writer = Writer { journal: journal.clone(), file, quiet, hook, lost, held: Some(Vec::new()) };
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run(notes))?;
        Ok((journal, sender, JournalThread(thread)))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines of `device` from record number `from` on, and the number after the last. Waits up to `wait` if there are none.
    pub(crate) fn read(&self, device: &str, from: u64, wait: Duration, form: Form) -> (Vec<String>, u64, bool) {
        let mut kept = self.lock();
        if kept.first + kept.records.len() as u64 <= from && !kept.ended {
            kept = self.kept.1.wait_timeout(kept, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let skip = usize::try_from(from.saturating_sub(kept.first)).unwrap_or(usize::MAX);
        let records = kept.records.iter().skip(skip).filter(|record| record.device == device);
        let records: Vec<Record> = records.cloned().collect();
        let (next, ended) = (kept.first + kept.records.len() as u64, kept.ended);
        drop(kept);
        let line = match form {
            Form::Json => to_json,
            Form::Text => to_text,
        };
        (records.iter().map(line).collect(), next, ended)
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
    hook: Option<Hook>,
    lost: Arc<AtomicU64>,
    /// Words of backends while the device starts.
    held: Option<Vec<String>>,
}

impl Writer {
    fn run(mut self, notes: Receiver<Note>) {
        for note in notes {
            match note {
                Note::Entry(record) => {
                    let again = Record { entry: Entry::warning("JournalOverflow"), ..record.clone() };
                    self.write(record);
                    let lost = self.lost.swap(0, Ordering::Relaxed);
                    if lost > 0 {
                        self.write(Record { entry: again.entry.with("lost", lost), ..again });
                    }
                }
                Note::Started { well } => {
                    for line in self.held.take().unwrap_or_default().iter().filter(|_| well) {
                        print(line);
                    }
                }
            }
        }
        self.journal.lock().ended = true;
        self.journal.kept.1.notify_all();
    }

    fn print(&mut self, record: &Record) {
        match &mut self.held {
            Some(held) if matches!(record.entry.event, "BackendOutput" | "BackendFailed") => {
                if held.len() < HELD_MAX {
                    held.push(to_text(record));
                }
            }
            _ => print(&to_text(record)),
        }
    }

    fn write(&mut self, record: Record) {
        if !self.quiet {
            self.print(&record);
        }
        if let Some(file) = &mut self.file
            && let Err(error) = writeln!(file, "{}", to_json(&record))
        {
            print(&format!("the journal file cannot be written and is given up: {error}"));
            self.file = None;
        }
        if let Some(hook) = &mut self.hook {
            hook.tell(&record.device, record.entry.event, || to_json(&record));
        }
        let mut kept = self.journal.lock();
        if kept.records.len() == KEPT_MAX {
            kept.records.pop_front();
            kept.first += 1;
        }
        kept.records.push_back(record);
        drop(kept);
        self.journal.kept.1.notify_all();
    }
}

/// Writes a line to standard error. Nobody has to read it, and a full disk behind it is no reason to leave a guest alone, as
/// `eprintln!` would: it panics.
fn print(line: &str) {
    let _unread = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// One JSON object. Written member by member, so that properties stay in the order in which they were given.
fn to_json(record: &Record) -> String {
    let level = match record.entry.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    let properties: Vec<String> = record
        .entry
        .properties
        .iter()
        .map(|(name, value)| {
            let value = match value {
                Value::Number(number) => json!(number),
                Value::Micros(micros) => json!((micros * 10.0).round() / 10.0),
                Value::Text(text) => json!(text),
                Value::Flag(flag) => json!(flag),
            };
            format!("{}:{value}", json!(name))
        })
        .collect();
    format!(
        r#"{{"timestamp":{},"source":{},"event":{},"level":"{level}","properties":{{{}}}}}"#,
        json!(timestamp(record.at)),
        json!(record.device),
        json!(record.entry.event),
        properties.join(",")
    )
}

/// One line: as in JSON, but durations in a unit of their size, and nothing said of phases that took no time.
fn to_text(record: &Record) -> String {
    let level = match record.entry.severity {
        Severity::Info => "",
        Severity::Warning => " warning:",
        Severity::Error => " ERROR:",
    };
    let mut text = format!("{} {}{level} {}", timestamp(record.at), record.device, record.entry.event);
    for (name, value) in &record.entry.properties {
        let value = match value {
            Value::Micros(0.0) if !name.ends_with("_us") => continue,
            Value::Number(number) => number.to_string(),
            Value::Micros(micros) => span(*micros),
            Value::Text(words) => format!("{:?}", plain_spans(words)),
            Value::Flag(flag) => flag.to_string(),
        };
        text.push_str(&format!(" {}={value}", name.trim_end_matches("_us")));
    }
    text
}

/// A duration for people: three digits and a unit.
pub(crate) fn span(micros: f64) -> String {
    let (value, unit) = match micros {
        _ if micros < 0.05 => return "0".to_owned(),
        _ if micros < 999.5 => (micros, "us"),
        _ if micros < 999_500.0 => (micros / 1e3, "ms"),
        _ => (micros / 1e6, "s"),
    };
    let digits = match value {
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    let number = format!("{value:.digits$}");
    let number = if digits > 0 { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {unit}")
}

/// Stands for a duration of nothing while a sentence is put together.
const NO_TIME: &str = "\0";

/// A sentence in which every duration is one for people.
fn plain_spans(words: &str) -> String {
    let spelled: Vec<String> = words
        .split(' ')
        .map(|word| {
            let bare = word.trim_end_matches([',', ';', '.', ':', ')']);
            let spelled = micros_of(bare).map(span).map(|span| if span == "0" { NO_TIME.to_owned() } else { span });
            spelled.map_or_else(|| word.to_owned(), |span| span + &word[bare.len()..])
        })
        .collect();
    let [within, later] = [format!("in {NO_TIME}"), format!("{NO_TIME} later")];
    spelled.join(" ").replace(&within, "at once").replace(&later, "at once").replace(NO_TIME, "0")
}

/// Microseconds of a word like `500.3ms`.
fn micros_of(word: &str) -> Option<f64> {
    let digits = word.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &word[digits.len()..] {
        "ns" => 1e-3,
        "\u{b5}s" | "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => return None,
    };
    digits.parse::<f64>().ok().map(|value| value * unit)
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

    fn record(entry: Entry) -> Record {
        Record { at: UNIX_EPOCH, device: "disk0".to_owned(), entry }
    }

    #[test]
    fn durations_are_given_in_a_unit_of_their_size() {
        let spans = [0.0, 0.4, 12.34, 443.5, 38_504.5, 500_385.799, 1_600_000.0, 83_214_881.3].map(span);
        assert_eq!(spans, ["0", "0.4 us", "12.3 us", "444 us", "38.5 ms", "500 ms", "1.6 s", "83.2 s"]);
        assert_eq!(span(999.7), "1 ms");
        assert_eq!(plain_spans("nothing was completed for 500.385799ms"), "nothing was completed for 500 ms");
        assert_eq!(plain_spans("another one is started in 0ns"), "another one is started at once");
        assert_eq!(plain_spans("its descriptions closed 0ns later"), "its descriptions closed at once");
        assert_eq!(plain_spans("closed 1.5\u{b5}s later, in 0x10 steps"), "closed 1.5 us later, in 0x10 steps");
        assert_eq!(plain_spans("disks in 05 places"), "disks in 05 places");
    }

    #[test]
    fn properties_keep_their_order_and_people_see_the_level_and_no_empty_phases() {
        let entry =
            Entry::warning("FailoverSettled").with("kind", "planned").with("blackout_us", Value::Micros(38_504.5));
        let entry = entry.with("Draining", Value::Micros(301.0)).with("Fencing", Value::Micros(0.0)).with("a", true);
        let record = record(entry);
        let at = "1970-01-01T00:00:00.000000Z";
        let text = r#"disk0 warning: FailoverSettled kind="planned" blackout=38.5 ms Draining=301 us a=true"#;
        assert_eq!(to_text(&record), format!("{at} {text}"));
        let properties = r#"{"kind":"planned","blackout_us":38504.5,"Draining":301.0,"Fencing":0.0,"a":true}"#;
        let head = format!(r#"{{"timestamp":"{at}","source":"disk0","event":"FailoverSettled","level":"warning""#);
        assert_eq!(to_json(&record), format!(r#"{head},"properties":{properties}}}"#));
    }

    #[test]
    fn timestamps_are_utc() {
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_micros(951_782_400_000_007)), "2000-02-29T00:00:00.000007Z");
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(1_795_392_000)), "2026-11-23T00:00:00.000000Z");
    }
}
