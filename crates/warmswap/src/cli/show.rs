//! `warmswap status`.

use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Control, Failure, plain};
use crate::control::{Client, ClientError, devices_in, socket_path};
use crate::journal::span;

/// A broker that does not answer a question within this is taken for stopped.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Brokers that are asked at the same time.
const ASKED_MAX: usize = 256;

/// What `--help` says below the options of `status`.
pub(super) const LEGEND: &str = "\
STATE
  starting      it is not known yet what can be offered to the VMM
  protected     a primary serves, or will as soon as a VMM connects, and a shadow is ready
  unprotected   no shadow is ready; the reason is below the line
  failing-over  a failover is running
  halted        a failover could not be finished without guessing: the rings stay unserved until the guest is reset
  dead          a control socket that nobody serves: its broker ended without cleaning up
  silent        a broker that does not answer
PRIMARY, SHADOW  process id and state: starting, negotiating, offered, warming (the session is replayed to it), ready,
  active (it serves rings), ended
RECOVERY  what a crash now could promise: exact (every request that is owed is known), drained (such a device is handed over
  only where nothing is owed), refused (what is in flight is not known)
FENCE  the best that can be proved of a dead primary: reaped (process gone, its storage closed), target (the storage refuses
  it), unprovable, - (not known yet). The option --fence of guard is the least that is required
FAILOVERS  how many settled; then the last one: how long ago, its kind (planned, predicted,
  crash, hang), and how long the guest's requests waited
observer  exact, inexact or violated: what is known of the requests in flight

Exit code 4 if no broker answers; with --check 5 unless every device is protected";

/// The devices asked for: by name, or all that have a control socket.
pub(super) fn names(asked: &[String], dir: &Path) -> Result<Vec<String>, Failure> {
    let none = |why: String| Failure::new(4, format!("no warmswap runs in {}: {why}", dir.display()));
    let advice = || match std::env::var_os("XDG_RUNTIME_DIR") {
        None if !rustix::process::geteuid().is_root() => " (XDG_RUNTIME_DIR is not set; see --control)",
        _ => " (a broker that was given another directory is asked with the same --control)",
    };
    let known = devices_in(dir).map_err(|error| none(format!("{error}{}", advice())))?;
    if known.is_empty() {
        return Err(none(format!("there is no control socket{}", advice())));
    }
    match asked.iter().find(|name| !known.contains(name)) {
        Some(unknown) => {
            let text = format!("no device {unknown:?} in {}; guarded are: {}", dir.display(), known.join(", "));
            Err(Failure::new(4, text))
        }
        None if asked.is_empty() => Ok(known),
        None => Ok(asked.to_vec()),
    }
}

/// A connection to the broker of a device, which has answered.
pub(super) fn connect(name: &str, control: &Control) -> Result<Client, Failure> {
    let dir = control.dir();
    names(&[name.to_owned()], &dir)?;
    let mut client = Client::connect(&socket_path(&dir, name))?;
    greet(&mut client)?;
    Ok(client)
}

/// What is shown of one device, and the connection on which its broker answered.
pub(super) fn ask(dir: &Path, name: &str) -> (Value, Option<Client>) {
    let (path, until) = (socket_path(dir, name), Instant::now() + ANSWER_MAX);
    let absent = |state: &str, message: String| (json!({"name": name, "state": state, "message": message}), None);
    let answer = Client::connect(&path).and_then(|mut client| {
        client.set_end(Some(until));
        client.set_patience(Some(ANSWER_MAX));
        let status = client.status()?;
        client.set_end(None);
        Ok((status, client))
    });
    match answer {
        Ok((mut answer, client)) if answer["devices"][0].is_object() => (answer["devices"][0].take(), Some(client)),
        Ok(_) => absent("silent", "its broker names no device".to_owned()),
        Err(ClientError::Unreachable { source, .. }) if is_dead(&source) => {
            let text = "no broker answers: it ended without cleaning up. Start it again, or remove";
            absent("dead", format!("{text} {}", path.display()))
        }
        Err(error) => absent("silent", silence(&error)),
    }
}

/// Why a broker that is there has told nothing.
pub(super) fn silence(error: &ClientError) -> String {
    match error {
        ClientError::Silent { .. } => format!("its broker has not answered within {} s", ANSWER_MAX.as_secs()),
        _ => error.to_string(),
    }
}

fn is_dead(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound)
}

/// Has a broker show that it answers, before it is asked for what may take long.
pub(super) fn greet(client: &mut Client) -> Result<(), ClientError> {
    client.set_patience(Some(ANSWER_MAX));
    let answer = client.status();
    client.set_patience(None);
    match answer {
        // A refusal is an answer; what is asked next will tell.
        Ok(_) | Err(ClientError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// What is shown of each device, and whether its broker answered. All are asked at the same time: one that hangs delays no other.
fn ask_all(dir: &Path, names: &[String]) -> Vec<(Value, bool)> {
    let (next, answers) = (AtomicUsize::new(0), vec![OnceLock::new(); names.len()]);
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((name, answer)) = names.get(at).zip(answers.get(at)) else { return };
            let (device, client) = ask(dir, name);
            let _first = answer.set((device, client.is_some()));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..names.len().min(ASKED_MAX) {
            let thread = std::thread::Builder::new().name("asker".to_owned()).stack_size(512 * 1024);
            // With fewer threads it takes longer.
            let _fewer = thread.spawn_scoped(scope, work);
        }
        work();
    });
    answers.into_iter().filter_map(OnceLock::into_inner).collect()
}

/// `warmswap status`.
pub(super) fn status(asked: &[String], check: bool, control: &Control, json: bool) -> Result<u8, Failure> {
    let dir = control.dir();
    let (mut devices, answered): (Vec<Value>, Vec<bool>) = ask_all(&dir, &names(asked, &dir)?).into_iter().unzip();
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", plain::json_line(&json!({ "devices": devices }).to_string()))?;
    } else {
        devices.iter_mut().for_each(plain::clean_value);
        table(&mut out, &devices)?;
    }
    Ok(match () {
        () if !answered.contains(&true) => 4,
        () if check && devices.iter().any(|device| device["state"] != "protected") => 5,
        () => 0,
    })
}

/// Devices for people. Their texts have been cleaned.
pub(super) fn table(out: &mut dyn Write, devices: &[Value]) -> std::io::Result<()> {
    let row = |out: &mut dyn Write, cells: [&str; 8]| {
        let [name, state, vmm, primary, shadow, recovery, fence, failovers] = cells;
        writeln!(
            out,
            "{name:<12} {state:<12} {vmm:<10} {primary:<18} {shadow:<18} {recovery:<9} {fence:<11} {failovers}"
        )
    };
    row(out, ["DEVICE", "STATE", "VMM", "PRIMARY (PID)", "SHADOW (PID)", "RECOVERY", "FENCE", "FAILOVERS"])?;
    for device in devices {
        let text = |key: &str| device[key].as_str().unwrap_or("-");
        if let Some(message) = device["message"].as_str() {
            writeln!(out, "{:<12} {:<12} {message}", text("name"), text("state"))?;
            continue;
        }
        let cells = [
            text("name"),
            text("state"),
            text("vmm"),
            &backend(&device["primary"]),
            &backend(&device["shadow"]),
            text("recovery_level"),
            text("fence_level"),
            &failovers(device),
        ];
        row(out, cells)?;
        notes(out, device)?;
    }
    Ok(())
}

/// What there is to say of a device below its line.
fn notes(out: &mut dyn Write, device: &Value) -> std::io::Result<()> {
    for ring in device["rings"].as_array().into_iter().flatten() {
        writeln!(
            out,
            "  ring {}: {} entries, {} in flight, observer {}",
            ring["index"],
            ring["size"],
            ring["inflight"],
            ring["observer"].as_str().unwrap_or("-")
        )?;
    }
    for key in ["misconfigured", "halted"] {
        if let Some(why) = device[key].as_str() {
            writeln!(out, "  {key}: {why}")?;
        }
    }
    if device["shadow_wanted"] == false {
        writeln!(out, "  shadow: none, as chosen ({})", device["shadow_note"].as_str().unwrap_or("-"))?;
    } else if device["state"] != "protected" {
        writeln!(out, "  shadow: {}", device["shadow_note"].as_str().unwrap_or("-"))?;
    }
    if device["policy"]["on_prediction"] == "observe" {
        writeln!(out, "  predicted failures are only reported (--observe)")?;
    }
    let verdict = &device["verdict"];
    if let Some(reason) = verdict["reason"].as_str() {
        let causes = verdict["causes"].as_array().map_or(&[][..], Vec::as_slice);
        let names: Vec<&str> = causes.iter().take(3).filter_map(|cause| cause["feature"].as_str()).collect();
        writeln!(out, "  ALARM: {reason} ({})", names.join(", "))?;
    }
    if let Some(why) = device["policy"]["withheld"]["reason"].as_str() {
        writeln!(out, "  a predicted failure is not acted upon: {why}")?;
    }
    if let Some(pid) = device["after_crash_of"].as_u64() {
        writeln!(
            out,
            "  the broker before this one (process {pid}) did not end in order: check the guest's file system"
        )?;
    }
    Ok(())
}

fn backend(value: &Value) -> String {
    let pid = value["pid"].as_u64().map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    value["state"].as_str().map_or_else(|| "-".to_owned(), |state| format!("{pid} ({state})"))
}

/// How many, and the last one.
pub(super) fn failovers(device: &Value) -> String {
    let (counts, last) = (&device["failovers"], &device["last_failover"]);
    let mut text = counts["settled"].as_u64().unwrap_or(0).to_string();
    for other in ["refused", "halted"] {
        if let Some(count) = counts[other].as_u64().filter(|count| *count > 0) {
            text.push_str(&format!(", {count} {other}"));
        }
    }
    if let Some(kind) = last["kind"].as_str() {
        let ago = last["seconds_ago"].as_u64().map_or_else(|| "-".to_owned(), ago);
        text.push_str(&format!("; last {ago} ago: {kind}"));
        match (last["result"].as_str(), last["blackout_us"].as_f64()) {
            (Some("settled"), Some(micros)) => text.push_str(&format!(" {:.1} ms", micros / 1e3)),
            (result, _) => text.push_str(&format!(" {}", result.unwrap_or("-"))),
        }
    }
    text
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A failover's outcome for people.
pub(super) fn settled(name: &str, report: &Value) -> String {
    let text = |key: &str| report[key].as_str().unwrap_or("-");
    let blackout = match report["blackout_us"].as_f64() {
        Some(micros) if micros > 0.0 => format!("in {}", span(micros)),
        _ => "while no guest used it".to_owned(),
    };
    format!(
        "settled: {name} swapped {blackout}, {} requests handed over, recovery {}, fence {}",
        report["survivors"],
        text("recovery"),
        text("fence")
    )
}
