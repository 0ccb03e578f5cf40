//! `warmswap snapshot`: what a device is and how it has been behaving, at one moment, in a file.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use warmswap_predict::{Feature, HORIZONS, Record};
use warmswap_store::{Listed, Snapshot, SnapshotError, snapshot};

use super::{Control, Failure, check_name, plain, show};
use crate::control::history;
use crate::journal::timestamp;
use crate::profile::snapshots::model_of;

/// Quantities that a comparison shows, as means over the windows of each snapshot.
const COMPARED: [Feature; 9] = [
    Feature::Arrivals,
    Feature::Depth,
    Feature::LatencyMean,
    Feature::LatencyP99,
    Feature::Cpu,
    Feature::Rss,
    Feature::MemoryShare,
    Feature::DescriptorShare,
    Feature::StoreShare,
];

/// What is done with snapshots.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Takes one of a device now; its broker needs --store
    Take {
        /// The device
        name: String,
        /// Why
        #[arg(long, default_value = "asked for")]
        reason: String,
        #[command(flatten)]
        control: Control,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Lists those of a device, the oldest first
    List {
        /// The device
        name: String,
        /// The directory that its broker was given with --store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows one
    Show {
        /// Its file
        file: PathBuf,
        /// Print JSON, the windows included
        #[arg(long)]
        json: bool,
    },
    /// Shows what is different in the second
    Diff {
        /// The one
        before: PathBuf,
        /// The other
        after: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Writes one as JSON, and its learnt model as a file of its own
    Export {
        /// Its file
        file: PathBuf,
        /// Where the JSON goes (- for standard output)
        #[arg(short, long, value_name = "FILE", default_value = "-")]
        output: PathBuf,
        /// Where the learnt model goes, for `warmswap model load`
        #[arg(long, value_name = "FILE")]
        model: Option<PathBuf>,
    },
    /// Guards the device again as it was guarded then, with what its model had learnt, here or on another host
    Restore {
        /// Its file
        file: PathBuf,
        /// Under another name
        #[arg(long)]
        name: Option<String>,
        /// With another socket for the VMM
        #[arg(long)]
        socket: Option<PathBuf>,
        /// Print the command line, do not run it
        #[arg(long)]
        print: bool,
    },
}

/// Runs `warmswap snapshot`.
pub(super) fn run(verb: &Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Take { name, reason, control, json } => take(name, reason, control, *json),
        Verb::List { name, store, json } => list(name, store, *json),
        Verb::Show { file, json } => show_one(&read(file)?, *json, &mut std::io::stdout().lock()),
        Verb::Diff { before, after, json } => diff(&read(before)?, &read(after)?, *json, &mut std::io::stdout().lock()),
        Verb::Export { file, output, model } => export(&read(file)?, output, model.as_deref()),
        Verb::Restore { file, name, socket, print } => {
            restore(file, &read(file)?, name.as_deref(), socket.as_deref(), *print)
        }
    }
}

impl From<SnapshotError> for Failure {
    fn from(error: SnapshotError) -> Self {
        Failure::new(1, error.to_string())
    }
}

fn read(path: &Path) -> Result<Snapshot, Failure> {
    Ok(snapshot::read(path)?)
}

fn take(name: &str, reason: &str, control: &Control, as_json: bool) -> Result<u8, Failure> {
    let answer = show::connect(name, control)?.ask(&json!({"verb": "snapshot", "reason": reason}))?;
    let mut out = std::io::stdout().lock();
    if as_json {
        writeln!(out, "{}", plain::json_line(&answer.to_string()))?;
    } else {
        writeln!(out, "{}", plain::clean(answer["file"].as_str().unwrap_or("-")))?;
    }
    Ok(0)
}

fn time_of(unix_ns: u64) -> String {
    UNIX_EPOCH.checked_add(Duration::from_nanos(unix_ns)).map_or_else(|| "-".to_owned(), timestamp)
}

fn list(name: &str, store: &Path, as_json: bool) -> Result<u8, Failure> {
    check_name(name)?;
    let listed = snapshot::list(store, name)?;
    if listed.is_empty() {
        return Err(Failure::new(1, format!("{}: there is no health snapshot of {name}", store.display())));
    }
    let described = |it: &Listed| snapshot::read(&it.path).map_err(|error| error.to_string());
    let mut out = std::io::stdout().lock();
    if !as_json {
        writeln!(out, "{:<25} {:>8}  {:<28} {:<12} FILE", "TIME", "BYTES", "REASON", "ALARM")?;
    }
    for one in &listed {
        let read = described(one);
        let path = one.path.display().to_string();
        if as_json {
            let value = match &read {
                Ok(it) => json!({"file": path, "time": time_of(one.unix_ns), "bytes": one.bytes, "reason": it.reason,
                    "alarm": it.verdict.as_ref().and_then(|verdict| verdict.alarm.clone())}),
                Err(error) => json!({"file": path, "time": time_of(one.unix_ns), "bytes": one.bytes, "error": error}),
            };
            writeln!(out, "{}", plain::json_line(&value.to_string()))?;
            continue;
        }
        let (reason, alarm) = match &read {
            Ok(it) => (plain::clean(&it.reason), it.verdict.as_ref().and_then(|verdict| verdict.alarm.clone())),
            Err(error) => (format!("unreadable: {}", plain::clean(error)), None),
        };
        let alarm = alarm.unwrap_or_else(|| "-".to_owned());
        writeln!(
            out,
            "{:<25} {:>8}  {reason:<28} {:<12} {path}",
            time_of(one.unix_ns),
            one.bytes,
            plain::clean(&alarm)
        )?;
    }
    Ok(0)
}

/// The outward form; with every window if they are wanted.
fn to_json(snapshot: &Snapshot, windows: bool) -> Value {
    let configuration: serde_json::Map<String, Value> =
        snapshot.configuration.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let rings = snapshot.rings.iter().map(|ring| {
        json!({"index": ring.index, "size": ring.size, "avail_idx": ring.avail_idx, "used_idx": ring.used_idx,
            "in_flight": ring.in_flight, "exact": ring.exact})
    });
    let verdict = snapshot.verdict.as_ref().map(|verdict| {
        let risk: serde_json::Map<String, Value> =
            HORIZONS.iter().zip(verdict.risk).map(|(windows, risk)| (windows.to_string(), json!(risk))).collect();
        let causes = verdict.causes.iter().map(|(feature, share)| json!({"feature": feature, "share": share}));
        json!({"risk_within_windows": risk, "harm": verdict.harm, "evidence": verdict.evidence, "alarm": verdict.alarm,
            "reason": verdict.reason, "causes": causes.collect::<Vec<_>>(), "windows_learnt": verdict.learnt})
    });
    let records = |list: &[Record]| {
        list.iter().filter_map(|it| serde_json::from_str(&history::record(it)).ok()).collect::<Vec<Value>>()
    };
    json!({
        "device": snapshot.device,
        "time": time_of(snapshot.unix_ns),
        "unix_ns": snapshot.unix_ns,
        "reason": snapshot.reason,
        "software": snapshot.software,
        "configuration": configuration,
        "arguments": snapshot.arguments,
        "session_bytes": snapshot.session.len(),
        "rings": rings.collect::<Vec<_>>(),
        "verdict": verdict,
        "trained_digest": format!("{:08x}", snapshot.trained_digest),
        "model_bytes": snapshot.model.len(),
        "recording": snapshot.recording.as_ref().map(|it| json!({"reason": it.reason, "ticks": it.ticks().filter_map(Result::ok).count()})),
        "window_count": snapshot.windows.len(),
        "windows": if windows { json!(records(&snapshot.windows)) } else { Value::Null },
        "passed_over": snapshot.passed_over.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn show_one(snapshot: &Snapshot, as_json: bool, out: &mut dyn Write) -> Result<u8, Failure> {
    if as_json {
        writeln!(out, "{}", plain::json_line(&to_json(snapshot, true).to_string()))?;
        return Ok(0);
    }
    let clean = |text: &str| plain::clean(text);
    writeln!(out, "{} at {}: {}", clean(&snapshot.device), time_of(snapshot.unix_ns), clean(&snapshot.reason))?;
    writeln!(out, "written by {}", clean(&snapshot.software))?;
    for (name, value) in &snapshot.configuration {
        writeln!(out, "  {:<22} {}", clean(name), clean(value))?;
    }
    for ring in &snapshot.rings {
        let known = if ring.exact { "known one by one" } else { "counted only" };
        writeln!(out, "  ring {}: {} entries, {} in flight, {known}", ring.index, ring.size, ring.in_flight)?;
    }
    let ticks = snapshot.recording.as_ref().map_or(0, |it| it.ticks().filter_map(Result::ok).count());
    writeln!(out, "profile: {} windows, {ticks} ticks of the flight recorder", snapshot.windows.len())?;
    for feature in COMPARED {
        if let Some(mean) = mean(&snapshot.windows, feature) {
            writeln!(out, "  {:<22} {mean:.4} in the mean", feature.name())?;
        }
    }
    match &snapshot.verdict {
        Some(verdict) => {
            let [.., risk] = verdict.risk;
            writeln!(
                out,
                "verdict: failure within {} windows {:.1} %, harm {:.2}, learnt {} windows",
                HORIZONS[HORIZONS.len() - 1],
                risk * 100.0,
                verdict.harm,
                verdict.learnt
            )?;
            if let Some(reason) = &verdict.reason {
                writeln!(out, "  ALARM: {}", clean(reason))?;
            }
            for (feature, share) in &verdict.causes {
                writeln!(out, "  cause {}, {:.0} % of what speaks for a failure", clean(feature), share * 100.0)?;
            }
        }
        None => writeln!(out, "verdict: none yet")?,
    }
    match model_of(snapshot) {
        _ if snapshot.model.is_empty() => writeln!(out, "model: none")?,
        Ok(model) => writeln!(out, "model: learnt {} windows", model.windows())?,
        Err(why) => writeln!(out, "model: cannot be gone on with here: {why}")?,
    }
    for why in &snapshot.passed_over {
        writeln!(out, "left out: {}", clean(&why.to_string()))?;
    }
    Ok(0)
}

fn mean(windows: &[Record], feature: Feature) -> Option<f64> {
    let values: Vec<f64> = windows.iter().filter_map(|it| it.get(feature)).map(f64::from).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// What is different: name, before, after.
fn differences(before: &Snapshot, after: &Snapshot) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    let mut note = |name: &str, one: String, other: String| {
        if one != other {
            found.push((name.to_owned(), one, other));
        }
    };
    note("device", before.device.clone(), after.device.clone());
    note("software", before.software.clone(), after.software.clone());
    let value = |snapshot: &Snapshot, name: &str| {
        let found = snapshot.configuration.iter().find(|(known, _)| known == name);
        found.map_or_else(|| "-".to_owned(), |(_, value)| value.clone())
    };
    let mut names: Vec<&String> = before.configuration.iter().chain(&after.configuration).map(|it| &it.0).collect();
    names.sort();
    names.dedup();
    for name in names {
        note(name, value(before, name), value(after, name));
    }
    note("rings", before.rings.len().to_string(), after.rings.len().to_string());
    let alarm = |it: &Snapshot| it.verdict.as_ref().and_then(|it| it.alarm.clone()).unwrap_or_else(|| "-".to_owned());
    note("alarm", alarm(before), alarm(after));
    let digest = |it: &Snapshot| format!("{:08x}", it.trained_digest);
    note("trained_digest", digest(before), digest(after));
    let learnt = |it: &Snapshot| model_of(it).map_or_else(|why| why, |model| model.windows().to_string());
    note("windows_learnt", learnt(before), learnt(after));
    for feature in COMPARED {
        let text = |it: &Snapshot| mean(&it.windows, feature).map_or_else(|| "-".to_owned(), |it| format!("{it:.4}"));
        note(feature.name(), text(before), text(after));
    }
    found
}

fn diff(before: &Snapshot, after: &Snapshot, as_json: bool, out: &mut dyn Write) -> Result<u8, Failure> {
    let found = differences(before, after);
    if as_json {
        let list: Vec<Value> =
            found.iter().map(|(name, one, other)| json!({"name": name, "before": one, "after": other})).collect();
        writeln!(out, "{}", plain::json_line(&json!(list).to_string()))?;
        return Ok(0);
    }
    if found.is_empty() {
        writeln!(out, "no difference")?;
        return Ok(0);
    }
    writeln!(out, "{:<26} {:>24} {:>24}", "", time_of(before.unix_ns), time_of(after.unix_ns))?;
    for (name, one, other) in found {
        writeln!(out, "{:<26} {:>24} {:>24}", plain::clean(&name), plain::clean(&one), plain::clean(&other))?;
    }
    Ok(0)
}

fn export(snapshot: &Snapshot, output: &Path, model: Option<&Path>) -> Result<u8, Failure> {
    if let Some(path) = model {
        if snapshot.model.is_empty() {
            return Err(Failure::new(1, "the snapshot holds no model: none was learnt yet"));
        }
        super::write_own(path, &snapshot.model)?;
    }
    let line = format!("{}\n", plain::json_line(&to_json(snapshot, true).to_string()));
    if output == Path::new("-") {
        std::io::stdout().lock().write_all(line.as_bytes())?;
    } else {
        super::write_own(output, line.as_bytes())?;
    }
    Ok(0)
}

/// The arguments of `guard` with other values for some of its options.
fn with(mut arguments: Vec<String>, option: &str, value: &str) -> Vec<String> {
    let end = arguments.iter().position(|it| it == "--").unwrap_or(arguments.len());
    let joined = format!("{option}=");
    if let Some(at) = arguments[..end].iter().position(|it| it.starts_with(&joined)) {
        arguments[at] = format!("{joined}{value}");
    } else if let Some(at) = arguments[..end].iter().position(|it| it == option).filter(|at| at + 1 < end) {
        arguments[at + 1] = value.to_owned();
    } else {
        arguments.splice(end..end, [option.to_owned(), value.to_owned()]);
    }
    arguments
}

fn restore(
    file: &Path,
    snapshot: &Snapshot,
    name: Option<&str>,
    socket: Option<&Path>,
    print: bool,
) -> Result<u8, Failure> {
    if snapshot.arguments.first().is_none_or(|verb| verb != "guard") {
        return Err(Failure::new(1, format!("{}: it does not say how the device was guarded", file.display())));
    }
    // What cannot be gone on with is said before anything is started.
    if !snapshot.model.is_empty() {
        model_of(snapshot).map_err(|why| Failure::new(1, format!("{}: {why}", file.display())))?;
    }
    let mut arguments = snapshot.arguments.clone();
    if let Some(name) = name {
        check_name(name)?;
        arguments = with(arguments, "--name", name);
    }
    if let Some(socket) = socket {
        arguments = with(arguments, "--socket", &socket.display().to_string());
    }
    if !snapshot.model.is_empty() {
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
        arguments = with(arguments, "--restore", &file.display().to_string());
    }
    let program = std::env::current_exe().map_err(|error| Failure::new(1, format!("this program's path: {error}")))?;
    if print {
        let line = command_line(&program, &arguments, directory(snapshot))
            .map_err(|why| Failure::new(1, format!("{}: {why}", file.display())))?;
        writeln!(std::io::stdout().lock(), "{line}")?;
        return Ok(0);
    }
    let mut command = Command::new(program);
    command.args(arguments);
    // Paths may be told from where it was started.
    if let Some(directory) = directory(snapshot) {
        command.current_dir(directory);
    }
    // Only what went wrong comes back.
    Err(Failure::from(command.exec()))
}

/// What a shell is to be given. A terminal would obey some characters that a shell takes for nothing else: whoever reads the line would not
/// see what it does.
fn command_line(program: &Path, arguments: &[String], directory: Option<&str>) -> Result<String, String> {
    let words = std::iter::once(program.display().to_string()).chain(arguments.iter().cloned());
    let words: Vec<String> = words.map(|word| quoted(&word)).collect();
    let there = directory.map_or_else(String::new, |it| format!("cd {} && ", quoted(it)));
    let line = format!("{there}{}", words.join(" "));
    if plain::clean(&line) == line {
        return Ok(line);
    }
    Err("its command line has characters that a terminal obeys or hides: it is not printed; --json of `snapshot show` has them spelt out"
        .to_owned())
}

/// Where the broker was started.
fn directory(snapshot: &Snapshot) -> Option<&str> {
    let found = snapshot.configuration.iter().find(|(name, _)| name == "directory");
    found.map(|(_, value)| value.as_str()).filter(|value| value.starts_with('/'))
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use warmswap_store::SnapshotVerdict;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn options_are_given_other_values_wherever_they_stand_and_the_backends_are_left_alone() {
        let before = words("guard --name a --socket=/x -- qsd --socket {socket} --name b");
        let after = with(with(before.clone(), "--name", "c"), "--socket", "/y");
        assert_eq!(after, words("guard --name c --socket=/y -- qsd --socket {socket} --name b"));
        let restored = with(before, "--restore", "/f");
        assert_eq!(restored, words("guard --name a --socket=/x --restore /f -- qsd --socket {socket} --name b"));
        assert_eq!(with(words("guard --name a"), "--restore", "/f"), words("guard --name a --restore /f"));
    }

    #[test]
    fn a_command_line_can_be_pasted() {
        assert_eq!(quoted("/a/b-c.sock"), "/a/b-c.sock");
        assert_eq!(quoted("{socket}"), "'{socket}'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }

    /// Anything that can be read of a file: texts, numbers and lengths at will.
    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        let text = || r#"\PC{0,6}|[\x00-\x1f\x7f-\x9f\u{202e}\u{200b}'"]{1,4}|[a-z]{1,6}"#;
        let pairs = proptest::collection::vec((text(), text()), 0..4);
        let words = proptest::collection::vec(text(), 0..4);
        let verdict =
            (any::<[f32; 6]>(), proptest::option::of(text()), proptest::collection::vec((text(), any::<f32>()), 0..3));
        (any::<u64>(), [text(), text(), text()], pairs, words, proptest::option::of(verdict), any::<Vec<u8>>())
            .prop_map(|(unix_ns, [device, reason, software], configuration, arguments, verdict, model)| {
                let verdict = verdict.map(|([one, two, three, four, harm, evidence], alarm, causes)| SnapshotVerdict {
                    risk: [one, two, three, four],
                    harm,
                    evidence,
                    reason: alarm.clone(),
                    alarm,
                    causes,
                    learnt: unix_ns,
                });
                Snapshot {
                    unix_ns,
                    device,
                    reason,
                    software,
                    configuration,
                    arguments,
                    verdict,
                    model,
                    ..Snapshot::default()
                }
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_a_snapshot_holds_is_shown_and_compared_without_a_character_that_a_terminal_obeys(
            one in any_snapshot(), other in any_snapshot(), as_json in any::<bool>()
        ) {
            let mut out = Vec::new();
            prop_assert!(show_one(&one, as_json, &mut out).is_ok());
            prop_assert!(diff(&one, &other, as_json, &mut out).is_ok());
            let said = String::from_utf8(out).expect("text");
            prop_assert_eq!(plain::clean_lines(&said), said);
            match command_line(Path::new("/bin/warmswap"), &one.arguments, directory(&one)) {
                Ok(line) => prop_assert_eq!(plain::clean(&line), line),
                Err(why) => prop_assert!(why.contains("not printed")),
            }
            prop_assert!(serde_json::from_str::<Value>(&to_json(&one, true).to_string()).is_ok());
        }
    }

    #[test]
    fn what_is_different_is_named() {
        let before = Snapshot {
            device: "a".into(),
            configuration: vec![("hang_ms".into(), "500".into())],
            ..Snapshot::default()
        };
        let mut after = before.clone();
        assert!(differences(&before, &after).is_empty());
        after.configuration = vec![("hang_ms".into(), "100".into()), ("drain_ms".into(), "5".into())];
        let found = differences(&before, &after);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1], ("hang_ms".to_owned(), "500".to_owned(), "100".to_owned()));
    }
}
