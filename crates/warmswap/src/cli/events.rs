//! `warmswap events`.

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Control, Failure, plain, show};
use crate::control::{Client, ClientError, socket_path};

/// Devices whose journals are read at a time.
const DEVICES_MAX: usize = 256;
/// Longest line of a journal, in bytes.
const LINE_MAX: usize = 1024 * 1024;
/// Lines of one journal, unless it is followed; a broker keeps far fewer.
const LINES_MAX: usize = 65_536;
/// Bytes of lines that wait to be printed. A whole journal fits, so that its broker does not wait for one who reads it page by page.
const WAITING_MAX: usize = 4 * 1024 * 1024;
/// Within this many bytes of a line lies its time, in either form.
const TIME_END: usize = r#"{"timestamp":"2026-01-01T00:00:00.000000Z"#.len();

/// Lines on their way from the threads that read to the one that prints.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<String>,
    bytes: usize,
    readers: usize,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next line; `None` where there is nobody left who reads.
    fn next(&self) -> Option<String> {
        let none = |waiting: &mut Waiting| waiting.lines.is_empty() && waiting.readers > 0;
        let mut waiting = self.changed.wait_while(self.lock(), none).unwrap_or_else(PoisonError::into_inner);
        let line = waiting.lines.pop_front()?;
        waiting.bytes -= line.len();
        self.changed.notify_all();
        Some(line)
    }
}

/// An end of a queue for a thread that reads.
struct Lines(Arc<Queue>);

impl Lines {
    fn of(queue: &Arc<Queue>) -> Self {
        queue.lock().readers += 1;
        Lines(Arc::clone(queue))
    }

    /// Waits for room, and for a single line there always is.
    fn push(&self, line: String) {
        let full = |waiting: &mut Waiting| waiting.bytes > 0 && waiting.bytes + line.len() > WAITING_MAX;
        let mut waiting = self.0.changed.wait_while(self.0.lock(), full).unwrap_or_else(PoisonError::into_inner);
        waiting.bytes += line.len();
        waiting.lines.push_back(line);
        self.0.changed.notify_all();
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.0.lock().readers -= 1;
        self.0.changed.notify_all();
    }
}

/// Reads one device's events line by line until there are no more.
fn read(path: &Path, follow: bool, json: bool, each: &mut dyn FnMut(String)) -> Result<(), ClientError> {
    let mut client = Client::connect(path)?;
    client.set_line_max(LINE_MAX);
    client.tell(&json!({"verb": "events", "follow": follow, "text": !json}))?;
    // What has happened is told without delay; what will happen is waited for. Time in which nobody takes lines is not its broker's.
    let mut left = show::ANSWER_MAX;
    for count in 0_usize.. {
        if !follow {
            if count == LINES_MAX {
                let what = format!("a journal of more than {LINES_MAX} lines");
                return Err(ClientError::Ended(std::io::Error::new(std::io::ErrorKind::InvalidData, what)));
            }
            client.set_patience(Some(left));
        }
        let began = Instant::now();
        let (event, line) = match client.line_as_sent() {
            Ok(answer) => answer,
            // The broker has ended, and with it the events.
            Err(ClientError::Ended(error)) if follow && error.kind() != std::io::ErrorKind::InvalidData => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        left = left.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
        if event.get("end").is_some() {
            return Ok(());
        }
        match event["text"].as_str().filter(|_| !json) {
            Some(text) => each(plain::clean(text)),
            None => each(plain::json_line(line.trim_end())),
        }
    }
    Ok(())
}

/// Starts a thread that reads a device's events into a queue.
fn start(path: PathBuf, queue: &Arc<Queue>, follow: bool, json: bool) -> std::io::Result<Reading> {
    let lines = Lines::of(queue);
    let thread = std::thread::Builder::new().name("reader".to_owned()).stack_size(512 * 1024);
    thread.spawn(move || read(&path, follow, json, &mut |line| lines.push(line)))
}

type Reading = std::thread::JoinHandle<Result<(), ClientError>>;

/// Prints lines of several queues by their time. In each they are in order already.
fn merge(out: &mut dyn Write, queues: &[Arc<Queue>]) -> std::io::Result<()> {
    let mut heads: Vec<Option<String>> = queues.iter().map(|queue| queue.next()).collect();
    loop {
        // Every line begins with its time, always of the same length.
        let times = heads.iter().enumerate().filter_map(|(at, head)| {
            let line = head.as_ref()?.as_bytes();
            Some((&line[..line.len().min(TIME_END)], at))
        });
        let Some((_, at)) = times.min() else { return out.flush() };
        if let Some(line) = std::mem::replace(&mut heads[at], queues[at].next()) {
            writeln!(out, "{line}")?;
        }
    }
}

/// Runs the command.
pub(super) fn run(name: Option<String>, follow: bool, control: &Control, json: bool) -> Result<u8, Failure> {
    let dir = control.dir();
    let asked: Vec<String> = name.into_iter().collect();
    let names = show::names(&asked, &dir)?;
    if names.len() > DEVICES_MAX {
        let text = format!(
            "{} devices are guarded, and the journals of at most {DEVICES_MAX} are read at a time: name one",
            names.len()
        );
        return Err(Failure::new(2, text));
    }
    // Followed, they are printed as they come: one queue is enough.
    let queues: Vec<Arc<Queue>> = (0..if follow { 1 } else { names.len() }).map(|_| Arc::default()).collect();
    let readers: std::io::Result<Vec<Reading>> = names
        .iter()
        .zip(queues.iter().cycle())
        .map(|(name, queue)| start(socket_path(&dir, name), queue, follow, json))
        .collect();
    let readers = readers?;
    let mut out = std::io::stdout().lock();
    if follow {
        while let Some(line) = queues[0].next() {
            writeln!(out, "{line}")?;
            out.flush()?;
        }
    } else {
        merge(&mut std::io::BufWriter::new(&mut out), &queues)?;
    }
    let mut failures = Vec::new();
    for (name, reader) in names.iter().zip(readers) {
        if let Err(error) = reader.join().unwrap_or(Ok(())) {
            failures.push((name, error));
        }
    }
    if failures.len() == names.len()
        && let Some((_, error)) = failures.pop()
    {
        return Err(error.into());
    }
    for (name, error) in failures {
        plain::say(&format!("{name}: {error}"));
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(lines: &[&str]) -> Arc<Queue> {
        let queue = Arc::default();
        let writer = Lines::of(&queue);
        lines.iter().for_each(|line| writer.push((*line).to_owned()));
        queue
    }

    #[test]
    fn journals_are_merged_by_time_and_stay_in_order() {
        let time = |second: u32| format!("2026-01-01T00:00:{second:02}.000000Z padding to the end");
        let [one, two, three, four] = [1, 2, 3, 4].map(time);
        let queues = [queue(&[&two, &four]), queue(&["", "é", &one, &three, &two]), queue(&[])];
        let mut out = Vec::new();
        merge(&mut out, &queues).expect("memory takes everything");
        let expected = ["", &two, &four, "é", &one, &three, &two];
        assert_eq!(String::from_utf8(out).expect("text").lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn no_more_waits_than_there_is_room_for() {
        let queue: Arc<Queue> = Arc::default();
        let lines = Lines::of(&queue);
        let writer = std::thread::spawn(move || (0..20).for_each(|_| lines.push("x".repeat(LINE_MAX))));
        let mut read = 0;
        while let Some(line) = queue.next() {
            assert!(queue.lock().bytes <= WAITING_MAX);
            read += line.len();
        }
        writer.join().expect("it ends");
        assert_eq!(read, 20 * LINE_MAX);
    }
}
