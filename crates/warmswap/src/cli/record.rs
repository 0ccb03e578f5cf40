//! `warmswap record` and `replay`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use warmswap_predict::{Feature, Grain, Record, Verdict};

use super::{Control, Failure, plain, show, time};
use crate::control::{ClientError, history};
use crate::profile::consumer::Consumer;
use crate::profile::predictor;
use crate::profile::stream::{Damage, Item, StreamReader, write_header, write_record};

/// Options of `warmswap record`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// Where to; a file that is there already is left alone
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// For how long, as 90s, 15m, 1h or 7d (default: until warmswap ends, or this command is interrupted)
    #[arg(long = "for", value_name = "DURATION", value_parser = time::duration)]
    duration: Option<Duration>,
    #[command(flatten)]
    control: Control,
}

/// When a recording that begins now ends.
fn end(args: &Args) -> Result<Option<Instant>, Failure> {
    let Some(duration) = args.duration else { return Ok(None) };
    let end = Instant::now().checked_add(duration);
    let text = "--for is longer than time can be told: without it, recording goes on until warmswap ends";
    end.map(Some).ok_or_else(|| Failure::new(2, text))
}

/// Runs `warmswap record`.
pub(super) fn record(args: &Args) -> Result<u8, Failure> {
    end(args)?;
    // Later silence may mean that there is nothing to be told.
    let mut client = show::connect(&args.name, &args.control)?;
    let fail = |error: std::io::Error| Failure::new(1, format!("--output {}: {error}", args.output.display()));
    let mut file = File::create_new(&args.output).map_err(fail)?;
    write_header(&mut file, &args.name).map_err(fail)?;
    let until = end(args)?;
    client.set_end(until);
    client.tell(&json!({"verb": "stream", "device": args.name}))?;
    let (mut consumer, mut lost) = (Consumer::default(), 0_u64);
    loop {
        // What is there already is read without a look at the time.
        if until.is_some_and(|until| until <= Instant::now()) {
            break;
        }
        let line = match client.line() {
            Ok(line) => line,
            Err(ClientError::Silent { .. }) => break,
            // The broker has ended, and with it the stream.
            Err(ClientError::Ended(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error.into()),
        };
        if line.get("end").is_some() {
            break;
        }
        lost = line["lost"].as_u64().unwrap_or(0).saturating_add(lost);
        let Some(hex) = line["record"].as_str() else { continue };
        let record = history::from_raw(hex).map_err(|why| Failure::new(1, format!("{}: {why}", args.name)))?;
        let _said_by_the_broker = consumer.feed(&record);
        write_record(&mut file, &record).map_err(fail)?;
    }
    let counts = [Grain::Tick, Grain::Window].map(|grain| consumer.count(grain));
    let mut text = format!("recorded: {} ticks and {} windows of {}", counts[0], counts[1], args.name);
    if lost > 0 {
        text.push_str(&format!("; {lost} records were lost on the way: this command was too slow"));
    }
    writeln!(std::io::stdout(), "{text}")?;
    Ok(0)
}

/// What a replay has read.
#[derive(Debug, Default)]
struct Replayed {
    consumer: Consumer,
    damages: u64,
    /// When the failure model said that a failure was imminent, and why.
    alarms: Vec<(u64, Verdict)>,
}

/// Reads a stream to its end; `each` is told of every record after it was taken, and of every damage.
fn read(
    stream: &mut StreamReader<File>,
    each: &mut dyn FnMut(Result<&Record, &Damage>) -> std::io::Result<()>,
) -> std::io::Result<Replayed> {
    let mut replayed = Replayed::default();
    while let Some(item) = stream.next()? {
        match item {
            Item::Record(record) => {
                if let Some(predicted) = replayed.consumer.feed(&record).filter(|it| it.is_news) {
                    replayed.alarms.push((record.end_unix_ns, predicted.verdict));
                }
                each(Ok(&record))?;
            }
            Item::Damage(damage) => {
                replayed.damages += 1;
                each(Err(&damage))?;
            }
        }
    }
    Ok(replayed)
}

/// Columns of windows for people.
const SHOWN: [(&str, Feature); 6] = [
    ("ARRIVALS/S", Feature::Arrivals),
    ("DEPTH", Feature::Depth),
    ("P50 US", Feature::LatencyP50),
    ("P99 US", Feature::LatencyP99),
    ("CPU", Feature::Cpu),
    ("RSS MB", Feature::Rss),
];

fn head() -> String {
    let mut line = format!("{:<27} {:>8} {:>7} {:>9}", "END", "NUMBER", "BACKEND", "SPAN MS");
    SHOWN.iter().for_each(|(name, _)| line.push_str(&format!(" {name:>11}")));
    line
}

fn row(window: &Record) -> String {
    let span = f64::from(window.span_us) / 1e3;
    let end = time::timestamp(window.end_unix_ns);
    let mut line = format!("{end:<27} {:>8} {:>7} {span:>9.1}", window.number, window.backend);
    for (_, feature) in SHOWN {
        let scale = if feature == Feature::Rss { 1e6 } else { 1.0 };
        let value =
            window.get(feature).map_or_else(|| "-".to_owned(), |value| format!("{:.2}", f64::from(value) / scale));
        line.push_str(&format!(" {value:>11}"));
    }
    line
}

/// Runs `warmswap replay`.
pub(super) fn replay(path: &Path, json: bool) -> Result<u8, Failure> {
    replay_to(&mut std::io::BufWriter::new(std::io::stdout().lock()), path, json)
}

fn replay_to(out: &mut dyn Write, path: &Path, json: bool) -> Result<u8, Failure> {
    let fail = |what: &dyn std::fmt::Display| Failure::new(1, format!("{}: {what}", path.display()));
    let file = File::open(path).map_err(|error| fail(&error))?;
    let mut stream = StreamReader::open(file).map_err(|error| fail(&error))?;
    if !json {
        writeln!(out, "{}", head())?;
    }
    let replayed = read(&mut stream, &mut |item| match item {
        Ok(record) if json => writeln!(out, "{}", history::record(record)),
        Ok(window) if window.grain == Grain::Window => writeln!(out, "{}", row(window)),
        Ok(_) => Ok(()),
        Err(damage) => {
            // Damage is said where it is met, and the rest goes on.
            out.flush()?;
            plain::say(&format!("{}: {damage}", path.display()));
            Ok(())
        }
    })?;
    if !json {
        let seen = |grain| (replayed.consumer.count(grain), replayed.consumer.missed(grain));
        let ((ticks, ticks_missed), (windows, windows_missed)) = (seen(Grain::Tick), seen(Grain::Window));
        let device = plain::clean(stream.device());
        for (end, verdict) in &replayed.alarms {
            let reason = verdict.alarm.map_or(String::new(), |alarm| alarm.to_string());
            writeln!(out, "{}: ALARM: {reason}; causes: {}", time::timestamp(*end), predictor::causes(verdict))?;
        }
        writeln!(out, "{device}: {ticks} ticks ({ticks_missed} missed), {windows} windows ({windows_missed} missed)")?;
    }
    out.flush()?;
    Ok(u8::from(replayed.damages > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{self, Served};

    #[test]
    fn what_is_recorded_is_replayed() {
        let served = Served::start("record", None);
        let output = served.dir.join("stream");
        let args = Args {
            name: "disk".to_owned(),
            output: output.clone(),
            duration: Some(Duration::from_millis(1_500)),
            control: Control { dir: Some(served.dir.clone()) },
        };
        let recorder = std::thread::spawn(move || (record(&args), record(&args)));
        let mut number = 0;
        while !recorder.is_finished() {
            served.note(Grain::Tick, number..number + 1);
            if number.is_multiple_of(10) {
                served.note(Grain::Window, number / 10..number / 10 + 1);
            }
            number += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        let (done, again) = recorder.join().expect("it does not panic");
        assert_eq!(done.expect("it can be recorded"), 0);
        let again = again.expect_err("it is there already");
        assert!(again.message.contains("exists"), "{}", again.message);

        let mut stream = StreamReader::open(File::open(&output).expect("it is there")).expect("it is a stream");
        let mut records = Vec::new();
        let replayed = read(&mut stream, &mut |item| {
            records.push(*item.expect("it is whole"));
            Ok(())
        });
        let consumer = replayed.expect("it can be read").consumer;
        let counts = [Grain::Tick, Grain::Window].map(|grain| (consumer.count(grain), consumer.missed(grain)));
        assert_eq!(counts[0].0 + counts[1].0, records.len() as u64);
        assert!(counts[0].0 > 20 && counts[1].0 > 2, "{counts:?}");
        assert_eq!((counts[0].1, counts[1].1), (0, 0));
        assert!(records.iter().all(|it| *it == testing::record(it.grain, it.number)));
        let (mut text, mut lines) = (Vec::new(), Vec::new());
        assert_eq!(replay_to(&mut text, &output, false).expect("it is whole"), 0);
        let text = String::from_utf8(text).expect("it is text");
        assert_eq!(text.lines().count() as u64, counts[1].0 + 2, "{text}");
        assert!(text.contains(&format!("disk: {} ticks (0 missed), {} windows", counts[0].0, counts[1].0)), "{text}");

        File::options()
            .append(true)
            .open(&output)
            .and_then(|mut file| file.write_all(b"half"))
            .expect("it can be written");
        assert_eq!(replay_to(&mut lines, &output, true).expect("it can be read"), 1);
        let parsed = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let parsed = parsed.map(|line| serde_json::from_slice::<serde_json::Value>(line).expect("it is JSON"));
        assert_eq!(parsed.count(), records.len());
        let error = replay(&served.dir.join("nothing"), false).expect_err("there is none");
        assert!(error.message.contains("nothing"), "{}", error.message);
    }

    #[test]
    fn a_file_tells_a_terminal_nothing_that_it_obeys() {
        let path = std::env::temp_dir().join(format!("ws-replay-{}", std::process::id()));
        let mut file = File::create(&path).expect("it can be written");
        write_header(&mut file, "\u{1b}[2J\u{9b}\u{202e}disk\r").expect("it can be written");
        for number in [0, u64::MAX, 0, u64::MAX] {
            write_record(&mut file, &Record::new(Grain::Tick, number, 1, testing::START, 100_000))
                .expect("it can be written");
        }
        let mut text = Vec::new();
        let replayed = replay_to(&mut text, &path, false);
        let _gone = std::fs::remove_file(&path);
        assert_eq!(replayed.expect("it is whole"), 0);
        let text = String::from_utf8(text).expect("it is text");
        assert!(text.contains(" [2J  disk : 4 ticks (800000000 missed)"), "{text}");
    }

    #[test]
    fn windows_are_rows_for_people() {
        let text = format!("{}\n{}", head(), row(&testing::record(Grain::Window, 3)));
        expect_test::expect![[r#"
            END                           NUMBER BACKEND   SPAN MS  ARRIVALS/S       DEPTH      P50 US      P99 US         CPU      RSS MB
            2026-01-01T00:00:04.000000Z        3       3    1000.0      103.00           -           -       37.50        0.25           -"#]].assert_eq(&text);
    }
}
