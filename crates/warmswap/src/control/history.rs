//! The verbs of the control socket that tell of profiles, and a record's outward form.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crossbeam_channel::RecvTimeoutError;
use serde::Deserialize;
use serde_json::{Value, json};
use warmswap_predict::{Alarm, Cause, Grain, HORIZONS, Model, RECORD_BYTES, Record, SCHEMA_VERSION, WARM_AFTER};
use warmswap_store::StoreError;

use super::hex;
use super::server::error;
use crate::profile::historian::HistoryHandle;
use crate::profile::predictor::{Predictor, trained};

/// Windows that a profile shows.
const PROFILE_WINDOWS: usize = 60;
/// One who follows a device that says nothing is looked after this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How much time the records asked for cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AskedGrain {
    /// A tick.
    Tick,
    /// A window.
    Window,
}

impl From<AskedGrain> for Grain {
    fn from(grain: AskedGrain) -> Self {
        match grain {
            AskedGrain::Tick => Grain::Tick,
            AskedGrain::Window => Grain::Window,
        }
    }
}

/// A record as one JSON object: members in their order, values in that of the table.
pub(crate) fn record(record: &Record) -> String {
    let ms = |micros: u64| micros as f64 / 1e3;
    let values: Vec<String> =
        record.values().map(|(feature, value)| format!("\"{}\":{value}", feature.name())).collect();
    format!(
        r#"{{"grain":"{}","number":{},"backend":{},"end_unix_ms":{},"span_ms":{},"values":{{{}}}}}"#,
        record.grain.name(),
        record.number,
        record.backend,
        ms(record.end_unix_ns / 1_000),
        ms(u64::from(record.span_us)),
        values.join(",")
    )
}

/// A record as JSON with its very bytes.
fn raw(record: &Record) -> String {
    format!("{{\"record\":\"{}\"}}", hex::encode(&record.encode()))
}

/// A record from what [`raw`] wrote.
pub(crate) fn from_raw(digits: &str) -> Result<Record, String> {
    if digits.len() != 2 * RECORD_BYTES {
        return Err(format!("a record of {} digits, expected {}", digits.len(), 2 * RECORD_BYTES));
    }
    let bytes = hex::decode(digits).map_err(|why| format!("a record that is {why}"))?;
    Record::decode(&bytes).map_err(|error| error.to_string())
}

/// The profile of a device: one line.
pub(super) fn profile(history: &HistoryHandle, device: &str) -> String {
    let windows: Vec<String> = history.last_windows(device, PROFILE_WINDOWS).iter().map(record).collect();
    let tick = history.last_tick(device).map_or_else(|| "null".to_owned(), |tick| record(&tick));
    let verdict = history.predictor(device, verdict).flatten().unwrap_or(Value::Null);
    format!(
        r#"{{"device":{},"schema_version":{SCHEMA_VERSION},"windows":[{}],"tick":{tick},"verdict":{verdict},"records_lost":{}}}"#,
        json!(device),
        windows.join(","),
        history.records_lost()
    )
}

/// What the failure model says of the last window, outward.
pub(crate) fn verdict(predictor: &Predictor) -> Option<Value> {
    let verdict = predictor.verdict()?;
    let number = |value: f32| if value.is_finite() { json!(value) } else { Value::Null };
    let risk: serde_json::Map<String, Value> =
        HORIZONS.iter().zip(verdict.risk).map(|(windows, risk)| (windows.to_string(), number(risk))).collect();
    let cause = |cause: &Cause| json!({"feature": cause.feature.name(), "residual": number(cause.residual), "share": number(cause.share)});
    let exhaustion = verdict.exhaustion.map(|(feature, forecast)| {
        json!({"feature": feature.name(), "share": number(forecast.share), "windows": number(forecast.windows)})
    });
    Some(json!({
        "risk_within_windows": risk,
        "harm": number(verdict.harm),
        "evidence": number(verdict.evidence),
        "alarm": verdict.alarm.map(Alarm::name),
        "reason": verdict.alarm.map(|alarm| alarm.to_string()),
        "causes": verdict.causes.iter().flatten().map(cause).collect::<Vec<_>>(),
        "exhaustion": exhaustion,
        "lead_windows": verdict.lead_windows(),
        "is_warm": verdict.is_warm,
        "alarms": predictor.alarms(),
        "windows_learnt": predictor.learnt(),
    }))
}

/// What the failure model of a device has learnt, after it was told to go on with something else, if it was.
pub(super) fn model(history: &HistoryHandle, device: &str, state: Option<&str>, reset: bool) -> Value {
    let loaded = |digits: &str| {
        let bytes = hex::decode(digits).map_err(|why| format!("a model that is {why}"))?;
        Model::decode(trained(), &bytes).map(Predictor::with).map_err(|error| error.to_string())
    };
    let changed = match (state, reset) {
        (Some(state), _) => loaded(state).and_then(|it| history.set_predictor(device, it, "a model was loaded")),
        (None, true) => history.set_predictor(device, Predictor::default(), "the model was reset"),
        (None, false) => Ok(()),
    };
    if let Err(why) = changed {
        return error(1, &why);
    }
    let state = history.predictor(device, |predictor| {
        let state = hex::encode(&predictor.model().encode(trained()));
        json!({"windows_learnt": predictor.learnt(), "is_warm": predictor.learnt() >= WARM_AFTER, "state": state})
    });
    state.unwrap_or_else(|| error(1, "the device has no failure model yet: it comes with the first window"))
}

/// Why records did not all reach the asker.
enum Stop {
    /// The asker has gone.
    Gone(std::io::Error),
    /// The history cannot be read.
    Unread(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Stop::Unread(error)
    }
}

/// Records of some time, line by line.
pub(super) fn records(
    writer: &UnixStream,
    history: &HistoryHandle,
    device: &str,
    (from_unix_ms, to_unix_ms): (Option<f64>, Option<f64>),
    grain: Grain,
    as_bytes: bool,
) -> std::io::Result<()> {
    // Conversion ends at the least and the greatest number.
    let ns = |ms: f64| (ms * 1e6) as u64;
    let asked = (from_unix_ms.map_or(0, ns), to_unix_ms.map_or(u64::MAX, ns));
    let mut out = std::io::BufWriter::new(writer);
    let mut each = |it: &Record| {
        let line = if as_bytes { raw(it) } else { record(it) };
        writeln!(out, "{line}").map_err(Stop::Gone)
    };
    let told = match grain {
        Grain::Window => history.windows(device, asked, &mut each),
        Grain::Tick => history.ticks(device, asked, &mut each),
    };
    match told {
        Ok(()) => writeln!(out, "{}", json!({"end": true}))?,
        Err(Stop::Unread(why)) => writeln!(out, "{}", error(1, &why.to_string()))?,
        Err(Stop::Gone(error)) => return Err(error),
    }
    out.flush()
}

/// Every record from now on, line by line.
pub(super) fn stream(mut writer: &UnixStream, history: &HistoryHandle, device: &str) -> std::io::Result<()> {
    let Some(followed) = history.follow(device) else {
        return writeln!(writer, "{}", error(4, "warmswap is ending"));
    };
    loop {
        match followed.records.recv_timeout(LOOK_EVERY) {
            Ok(record) => {
                // In one piece: a system call per line.
                let mut line = raw(&record);
                line.push('\n');
                match followed.lost() {
                    0 => {}
                    lost => line.push_str(&format!("{}\n", json!({"lost": lost}))),
                }
                writer.write_all(line.as_bytes())?;
            }
            Err(RecvTimeoutError::Timeout) if has_gone(writer) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return writeln!(writer, "{}", json!({"end": true})),
        }
    }
}

/// The asker has closed its end: nobody would ever notice while there is nothing to be written. One that only has no more to ask
/// has not gone.
pub(super) fn has_gone(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
        && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{self, START, Served, wait_for};
    use serde_json::Value;
    use warmswap_store::rounded;

    /// Lines until the end, which is not among them.
    fn lines(client: &mut crate::control::Client, command: &Value) -> Vec<Value> {
        client.tell(command).expect("it can be sent");
        let answers = std::iter::from_fn(|| Some(client.line().expect("there is an answer")));
        answers.take_while(|answer| answer.get("end").is_none()).collect()
    }

    #[test]
    fn a_record_is_one_object_with_its_members_in_order() {
        let text = record(&testing::record(Grain::Window, 3));
        let head = r#"{"grain":"window","number":3,"backend":3,"end_unix_ms":1767225604000,"span_ms":1000,"values":"#;
        assert_eq!(text, format!("{head}{{\"arrivals_per_s\":103,\"latency_p99_us\":37.5,\"cpu_cores\":0.25}}}}"));
        let made = testing::record(Grain::Tick, 8);
        let line: Value = serde_json::from_str(&raw(&made)).expect("it is JSON");
        let hex = line["record"].as_str().expect("it is text");
        assert_eq!(from_raw(hex), Ok(made));
        for wrong in ["", &hex[2..], &hex.replace('0', "x"), &hex.replacen('7', "8", 1), &"\u{e4}".repeat(RECORD_BYTES)]
        {
            assert!(from_raw(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_profile_and_its_history_are_told_over_the_socket() {
        let served = Served::start("told", Some("store".as_ref()));
        served.note(Grain::Tick, 0..300);
        served.note(Grain::Window, 0..100);
        served.freeze("a test", START);
        // They come faster here than a disk is written, and more than memory keeps must be there when the others come.
        wait_for("the disk", || served.history.on_disk("disk") == 100);
        served.note(Grain::Window, 100..200);
        let mut client = served.client();
        let profile = client.ask(&json!({"verb": "profile"})).expect("there is an answer");
        assert_eq!((&profile["device"], &profile["records_lost"]), (&json!("disk"), &json!(0)));
        let numbers: Vec<u64> =
            profile["windows"].as_array().into_iter().flatten().filter_map(|it| it["number"].as_u64()).collect();
        assert_eq!(numbers, (140..200).collect::<Vec<u64>>());
        assert_eq!(profile["tick"]["values"]["arrivals_per_s"], json!(399));

        // More than memory holds: what is on disk comes first.
        let windows = lines(&mut client, &json!({"verb": "history", "grain": "window"}));
        let numbers: Vec<u64> = windows.iter().filter_map(|it| it["number"].as_u64()).collect();
        assert_eq!(numbers, (0..200).collect::<Vec<u64>>());
        let ms = |number: u64| testing::record(Grain::Window, number).end_unix_ns as f64 / 1e6;
        let some =
            json!({"verb": "history", "grain": "window", "from_unix_ms": ms(5), "to_unix_ms": ms(7), "raw": true});
        let some = lines(&mut client, &some);
        let some: Vec<Record> =
            some.iter().map(|it| from_raw(it["record"].as_str().unwrap_or("")).expect("a record")).collect();
        assert_eq!(some, [5, 6, 7].map(|number| testing::record(Grain::Window, number)));
        let ticks = lines(&mut client, &json!({"verb": "history", "grain": "tick", "raw": true}));
        let ticks: Vec<Record> =
            ticks.iter().map(|it| from_raw(it["record"].as_str().unwrap_or("")).expect("a record")).collect();
        assert_eq!(ticks, (0..300).map(|number| rounded(&testing::record(Grain::Tick, number))).collect::<Vec<_>>());
        let none = lines(&mut client, &json!({"verb": "history", "grain": "tick", "from_unix_ms": 5, "to_unix_ms": 4}));
        assert_eq!(none, [] as [Value; 0]);

        let refused = client.ask(&json!({"verb": "profile", "device": "net"})).expect_err("it is another's");
        assert!(refused.to_string().contains("control socket of disk, not of net"), "{refused}");
        let refused = client.ask(&json!({"verb": "history", "grain": "hour"})).expect_err("there is no such grain");
        assert!(refused.to_string().contains("hour"), "{refused}");
    }

    #[test]
    fn one_who_follows_is_told_of_every_record_and_of_the_end() {
        let mut served = Served::start("follows", None);
        let mut client = served.client();
        client.tell(&json!({"verb": "stream"})).expect("it can be sent");
        // Followed from some record on.
        let mut next = 0;
        let first = loop {
            served.note(Grain::Tick, next..next + 1);
            next += 1;
            client.set_patience(Some(Duration::from_millis(20)));
            if let Ok(line) = client.line() {
                break line;
            }
        };
        client.set_patience(Some(Duration::from_secs(20)));
        let number = |line: &Value| from_raw(line["record"].as_str().unwrap_or("")).expect("a record").number;
        let first = number(&first);
        served.note(Grain::Tick, next..next + 50);
        for expected in first + 1..next + 50 {
            assert_eq!(number(&client.line().expect("there is a line")), expected);
        }
        served.end();
        assert_eq!(client.line().expect("there is a line"), json!({"end": true}));
    }

    #[test]
    fn a_history_that_somebody_reads_is_waited_for() {
        let mut served = Served::start("waits", Some("store".as_ref()));
        served.note(Grain::Window, 0..5);
        served.end();
        let path = crate::profile::historian::history_path(&served.dir.join("store"), "disk");
        let reader = warmswap_store::Reader::open(&path).expect("it was closed");
        let mut again = Served::start("waits-again", Some(&served.dir.join("store")));
        wait_for("the journal", || again.journal().contains("HistoryWaits"));
        again.note(Grain::Window, 5..8);
        drop(reader);
        wait_for("the history", || warmswap_store::Reader::open(&path).is_err());
        again.note(Grain::Window, 8..10);
        again.end();
        let windows = warmswap_store::Reader::open(&path).and_then(|reader| reader.range(0, u64::MAX));
        let numbers = windows.expect("it can be read").map(|window| window.expect("it is whole").number);
        assert_eq!(numbers.collect::<Vec<u64>>(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn a_disk_that_hangs_keeps_nobody_waiting_and_gets_everything_in_the_end() {
        let mut served = Served::start("hangs", Some("store".as_ref()));
        let path = crate::profile::historian::history_path(&served.dir.join("store"), "disk");
        wait_for("the history", || warmswap_store::Reader::open(&path).is_err());
        {
            let _hanging = served.history.hang_disk();
            served.freeze("a crash", START + 1);
            // More than finds room, and fewer than are kept in memory.
            served.note(Grain::Window, 0..115);
            served.note(Grain::Tick, 0..50);
            assert_eq!(served.history.last_windows("disk", 200).len(), 115);
        }
        served.end();
        let reader = warmswap_store::Reader::open(&path).expect("it was closed");
        let windows = reader.range(0, u64::MAX).expect("it can be read");
        let numbers = windows.map(|window| window.expect("it is whole").number);
        assert_eq!(numbers.collect::<Vec<u64>>(), (0..115).collect::<Vec<u64>>());
        assert_eq!(reader.recordings().expect("it can be read"), [START + 1]);
    }

    #[test]
    fn one_who_does_not_read_delays_nobody_and_is_told_what_it_missed() {
        let served = Served::start("slow", None);
        let followed = served.history.follow("disk").expect("it has not ended");
        served.note(Grain::Tick, 0..2_000);
        let got = followed.records.try_iter().count() as u64;
        assert_eq!(got + followed.lost(), 2_000);
        assert!(got >= 300 && served.history.records_lost() < 2_000);
        // One that has gone is forgotten.
        drop(followed);
        served.note(Grain::Tick, 2_000..2_001);
        assert!(served.history.follow("net").is_none());
    }

    #[test]
    fn a_history_that_is_changed_or_replaced_while_it_is_written_is_given_up_and_memory_goes_on() {
        for (name, reason) in [("changed", "is damaged"), ("replaced", "was replaced or taken away")] {
            let mut served = Served::start(name, Some("store".as_ref()));
            let path = crate::profile::historian::history_path(&served.dir.join("store"), "disk");
            wait_for("the history", || {
                warmswap_store::Reader::open(&path).is_err_and(|error| error.to_string().contains("in use"))
            });
            served.note(Grain::Window, 0..10);
            if name == "changed" {
                let len = std::fs::metadata(&path).expect("it is there").len() as usize;
                std::fs::write(&path, vec![7; len]).expect("it can be written");
            } else {
                std::fs::rename(&path, path.with_extension("away")).expect("it is there");
            }
            served.freeze("a crash", START + 1);
            wait_for("the journal", || served.journal().contains("HistoryGivenUp"));
            assert!(served.journal().contains(reason), "{}", served.journal());
            served.note(Grain::Window, 10..20);
            assert_eq!(served.history.last_windows("disk", 99).len(), 20);
            let mut there = 0;
            let all = served.history.windows("disk", (0, u64::MAX), &mut |_| {
                there += 1;
                Ok::<(), StoreError>(())
            });
            assert_eq!(
                (all.ok(), there, served.history.recordings("disk").ok()),
                (Some(()), 20, Some(vec![START + 1]))
            );
            served.end();
        }
    }

    #[test]
    fn what_was_kept_is_there_for_the_next_program_and_a_file_that_is_none_is_left_alone() {
        let mut served = Served::start("kept", Some("store".as_ref()));
        served.note(Grain::Tick, 0..100);
        served.note(Grain::Window, 0..10);
        served.freeze("a crash", START + 1);
        served.note(Grain::Window, 10..20);
        served.end();
        assert!(served.history.follow("disk").is_none());
        let path = crate::profile::historian::history_path(&served.dir.join("store"), "disk");
        let reader = warmswap_store::Reader::open(&path).expect("it was closed");
        assert_eq!((reader.windows().ok(), reader.recordings().ok()), (Some(20), Some(vec![START + 1])));
        let recording = reader.recording(START + 1).expect("it can be read").expect("it is there");
        assert_eq!((recording.reason.as_str(), recording.len()), ("a crash", 100));

        std::fs::write(&path, "no history").expect("it can be written");
        let again = Served::start("kept-again", Some(&served.dir.join("store")));
        again.note(Grain::Window, 0..5);
        wait_for("the journal", || again.journal().contains("HistoryGivenUp"));
        assert!(again.journal().contains("is no profile history"), "{}", again.journal());
        assert_eq!(again.history.last_windows("disk", 9).len(), 5);
        assert_eq!(std::fs::read(&path).expect("it is there"), b"no history");

        let nowhere = Served::start("kept-nowhere", Some(&path));
        wait_for("the journal", || nowhere.journal().contains("HistoryGivenUp"));
    }
}
