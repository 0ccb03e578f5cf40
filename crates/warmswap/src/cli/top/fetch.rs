//! Asking brokers, each on a thread of its own: one that hangs delays neither the keys nor the others.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use serde_json::json;

use super::model::{Device, EVENTS_MAX, clean};
use crate::cli::{profile, show};
use crate::control::{Client, ClientError, devices_in, socket_path};

/// Devices that are watched at a time.
pub(super) const DEVICES_MAX: usize = 256;
/// Reports on their way.
const REPORTS_MAX: usize = 2 * DEVICES_MAX;
/// A journal is read at most this often: a broker sends all it has kept of it.
const EVENTS_EVERY: Duration = Duration::from_secs(3);
/// Lines of a journal that are read.
const LINES_MAX: usize = 65_536;

/// Whose page is open, and that it has changed.
#[derive(Debug, Default)]
struct Open {
    name: Mutex<Option<String>>,
    changed: Condvar,
}

/// The threads that ask. They end with the program, or when the reports have no reader any more.
#[derive(Debug)]
pub(super) struct Fetcher {
    pub(super) reports: Receiver<Device>,
    open: Arc<Open>,
}

/// What a thread asks, and where it puts it.
#[derive(Clone, Debug)]
struct Asker {
    dir: PathBuf,
    every: Duration,
    open: Arc<Open>,
    reports: Sender<Device>,
}

impl Fetcher {
    /// Starts to ask these devices, and with `more` those that appear later in the directory.
    pub(super) fn start(dir: &Path, names: &[String], more: bool, every: Duration) -> std::io::Result<Fetcher> {
        let (sender, reports) = crossbeam_channel::bounded(REPORTS_MAX);
        let open = Arc::new(Open::default());
        let asker = Asker { dir: dir.to_owned(), every, open: Arc::clone(&open), reports: sender };
        let mut known: Vec<String> = Vec::new();
        asker.take_on(names, &mut known)?;
        if more {
            std::thread::Builder::new().name("scanner".to_owned()).stack_size(256 * 1024).spawn(move || {
                loop {
                    std::thread::sleep(every);
                    // A directory that is gone has no more devices, and a thread that cannot be started now may be the next time.
                    if let Ok(names) = devices_in(&asker.dir) {
                        let _later = asker.take_on(&names, &mut known);
                    }
                }
            })?;
        }
        Ok(Fetcher { reports, open })
    }

    /// Says whose page is open: its journal is read as well.
    pub(super) fn open(&self, name: Option<&str>) {
        let mut open = self.open.name.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_deref() != name {
            *open = name.map(str::to_owned);
            self.open.changed.notify_all();
        }
    }
}

impl Asker {
    /// Starts a thread for each name that has none.
    fn take_on(&self, names: &[String], known: &mut Vec<String>) -> std::io::Result<()> {
        for name in names {
            if known.len() < DEVICES_MAX && !known.contains(name) {
                let (asker, its) = (self.clone(), name.clone());
                let thread = std::thread::Builder::new().name("asker".to_owned()).stack_size(512 * 1024);
                thread.spawn(move || asker.run(&its))?;
                known.push(name.clone());
            }
        }
        Ok(())
    }

    fn run(&self, name: &str) {
        let mut events: Vec<String> = Vec::new();
        let mut read: Option<Instant> = None;
        loop {
            let mine = |open: &Option<String>| open.as_deref() == Some(name);
            let was_open = mine(&self.open.name.lock().unwrap_or_else(PoisonError::into_inner));
            let wanted = was_open && read.is_none_or(|read| read.elapsed() >= EVENTS_EVERY);
            let mut device = self.ask(name, wanted.then_some(&mut events));
            if wanted {
                read = Some(Instant::now());
            }
            device.events.clone_from(&events);
            if self.reports.send(device).is_err() {
                return;
            }
            let open = self.open.name.lock().unwrap_or_else(PoisonError::into_inner);
            // A page that has just been opened does not wait for its journal.
            let _woken = self.open.changed.wait_timeout_while(open, self.every, |open| was_open || !mine(open));
        }
    }

    fn ask(&self, name: &str, events: Option<&mut Vec<String>>) -> Device {
        let path = socket_path(&self.dir, name);
        if !path.exists() {
            return Device::absent(name, "dead", "no broker answers: it has ended, and its control socket is gone");
        }
        let (status, client) = show::ask(&self.dir, name);
        let Some(mut client) = client else { return Device::read(name, &status, None) };
        let silent = |error: &ClientError| Device::absent(name, "silent", &show::silence(error));
        client.set_end(Some(Instant::now() + show::ANSWER_MAX));
        let profile = match profile::ask(&mut client) {
            Ok(profile) => profile,
            Err(error) => return silent(&error),
        };
        if let Some(events) = events {
            client.set_end(Some(Instant::now() + show::ANSWER_MAX));
            match last_events(&mut client, name) {
                Ok(read) => *events = read,
                Err(error) => return silent(&error),
            }
        }
        Device::read(name, &status, profile.as_ref())
    }
}

/// A line of the journal without the day and the device, which the page has.
fn short(line: &str, name: &str) -> String {
    let parts = line.split_once(' ').and_then(|(time, rest)| {
        let time = time.split_once('T')?.1.get(..TIME.len())?;
        Some((time, rest.strip_prefix(name)?))
    });
    parts.map_or_else(|| clean(line), |(time, rest)| clean(&format!("{time}{rest}")))
}

/// What is left of a time.
const TIME: &str = "12:34:56.789";

/// The last lines of the journal.
fn last_events(client: &mut Client, name: &str) -> Result<Vec<String>, ClientError> {
    client.tell(&json!({"verb": "events", "follow": false, "text": true}))?;
    let mut kept = std::collections::VecDeque::new();
    for _ in 0..LINES_MAX {
        let line = match client.line() {
            Ok(line) => line,
            // A broker that tells no events has none to show.
            Err(ClientError::Refused { .. }) => break,
            Err(error) => return Err(error),
        };
        if line.get("end").is_some() {
            break;
        }
        if let Some(text) = line["text"].as_str() {
            if kept.len() == EVENTS_MAX {
                kept.pop_front();
            }
            kept.push_back(short(text, name));
        }
    }
    Ok(kept.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_journal_are_shortened_if_they_have_its_form() {
        let line = |text: &str| short(text, "disk");
        assert_eq!(
            line("2026-01-01T10:11:12.123456Z disk ShadowReady took=1 ms"),
            "10:11:12.123 ShadowReady took=1 ms"
        );
        assert_eq!(line("2026-01-01T10:11:12.123456Z disk warning: Late"), "10:11:12.123 warning: Late");
        for other in
            ["", "x", "x y", "T disk", "2026-01-01T10:11:12.12é Z disk X", "2026-01-01T10:11:12.123456Z other X"]
        {
            assert_eq!(line(other), other);
        }
    }
}
