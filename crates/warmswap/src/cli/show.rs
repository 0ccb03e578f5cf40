//! `warmswap status`, `events` and `failover`.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Control, Failure};
use crate::control::{Client, exit_code};

/// Control sockets: of one device, or of all.
fn sockets(name: Option<&str>, dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    if let Some(name) = name {
        return Ok(vec![dir.join(format!("{name}.sock"))]);
    }
    let none = |why: String| Failure::new(4, format!("no warmswap runs in {}: {why}", dir.display()));
    let entries = std::fs::read_dir(dir).map_err(|error| none(error.to_string()))?;
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .collect();
    paths.sort();
    if paths.is_empty() { Err(none("there is no control socket".to_owned())) } else { Ok(paths) }
}

/// `warmswap status`.
pub(super) fn status(name: Option<&str>, control: &Control, json: bool) -> Result<u8, Failure> {
    let mut devices = Vec::new();
    for path in sockets(name, &control.dir())? {
        let answer = Client::connect(&path)?.status()?;
        devices.extend(answer["devices"].as_array().cloned().unwrap_or_default());
    }
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", json!({ "devices": devices }))?;
        return Ok(0);
    }
    let row = |out: &mut dyn Write, cells: [&str; 8]| {
        let [name, state, vmm, primary, shadow, recovery, fence, failovers] = cells;
        writeln!(
            out,
            "{name:<12} {state:<12} {vmm:<10} {primary:<18} {shadow:<18} {recovery:<9} {fence:<11} {failovers}"
        )
    };
    row(&mut out, ["DEVICE", "STATE", "VMM", "PRIMARY", "SHADOW", "RECOVERY", "FENCE", "FAILOVERS"])?;
    for device in &devices {
        let counts = &device["failovers"];
        let failovers =
            format!("{} settled, {} refused, {} halted", counts["settled"], counts["refused"], counts["halted"]);
        let text = |key: &str| device[key].as_str().unwrap_or("-");
        let cells = [
            text("name"),
            text("state"),
            text("vmm"),
            &backend(&device["primary"]),
            &backend(&device["shadow"]),
            text("recovery_level"),
            text("fence_level"),
            &failovers,
        ];
        row(&mut out, cells)?;
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
        if let Some(halted) = device["halted"].as_str() {
            writeln!(out, "  halted: {halted}")?;
        }
        if device["shadow"]["state"] != "ready" {
            writeln!(out, "  shadow: {}", text("shadow_note"))?;
        }
    }
    Ok(0)
}

fn backend(value: &Value) -> String {
    match value["state"].as_str() {
        Some(state) => format!("{} ({state})", value["pid"]),
        None => "-".to_owned(),
    }
}

/// `warmswap events`.
pub(super) fn events(name: Option<&str>, follow: bool, control: &Control, json: bool) -> Result<u8, Failure> {
    let sockets = sockets(name, &control.dir())?;
    if follow && sockets.len() > 1 {
        return Err(Failure::new(2, "events -f follows one device: name it"));
    }
    let mut out = std::io::stdout().lock();
    for path in sockets {
        let mut client = Client::connect(&path)?;
        let mut line = client.ask(&json!({"verb": "events", "follow": follow}))?;
        while line.get("end").is_none() {
            print_event(&mut out, &line, json)?;
            line = match client.line() {
                Ok(line) => line,
                // The broker has ended, and with it the events.
                Err(crate::control::ClientError::Ended(_)) if follow => return Ok(0),
                Err(error) => return Err(error.into()),
            };
        }
    }
    Ok(0)
}

fn print_event(out: &mut dyn Write, event: &Value, json: bool) -> std::io::Result<()> {
    if json {
        writeln!(out, "{event}")?;
        return out.flush();
    }
    let text = |key: &str| event[key].as_str().unwrap_or("-");
    write!(out, "{} {} {}", text("timestamp"), text("source"), text("event"))?;
    for (name, value) in event["properties"].as_object().into_iter().flatten() {
        write!(out, " {name}={value}")?;
    }
    writeln!(out)?;
    out.flush()
}

/// `warmswap failover`.
pub(super) fn failover(name: &str, now: bool, reason: &str, control: &Control, json: bool) -> Result<u8, Failure> {
    let path = control.dir().join(format!("{name}.sock"));
    let report = Client::connect(&path)?.failover(name, now, reason)?;
    let mut out = std::io::stdout().lock();
    let result = report["result"].as_str().unwrap_or("failed");
    if json {
        writeln!(out, "{report}")?;
    } else if result == "settled" {
        writeln!(
            out,
            "settled: {name} swapped in {} us, {} requests handed over, recovery {}, fence {}",
            report["blackout_us"],
            report["survivors"],
            report["recovery"].as_str().unwrap_or("-"),
            report["fence"].as_str().unwrap_or("-")
        )?;
    } else {
        writeln!(out, "{result}: {}", report["message"].as_str().unwrap_or("-"))?;
    }
    Ok(exit_code(result))
}
