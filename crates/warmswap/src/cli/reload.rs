//! `warmswap reload`.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Control, Failure, plain, show, upgrade};
use crate::control::{Client, socket_path};

/// Options of `warmswap reload`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A device of the process that is to read its configuration again
    name: String,
    /// How long to wait until it is in force
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    wait: u64,
    #[command(flatten)]
    control: Control,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let path = socket_path(&args.control.dir(), &args.name);
    show::names(std::slice::from_ref(&args.name), &args.control.dir())?;
    let mut client = Client::connect(&path)?;
    show::greet(&mut client)?;
    let before = client.status()?["devices"][0]["broker"]["configuration"].as_u64();
    let began = Instant::now();
    let accepted = client.reload()?;
    drop(client);
    let pid = accepted["pid"].as_u64();
    let devices: Vec<&str> =
        accepted["devices"].as_array().into_iter().flatten().filter_map(|name| name.as_str()).collect();
    // The device that was asked may have been taken out.
    let asked = devices.iter().copied().find(|name| *name == args.name).or(devices.first().copied());
    let path = socket_path(&args.control.dir(), asked.unwrap_or(&args.name));
    let mut followed = false;
    let came = upgrade::look(&path, Duration::from_secs(args.wait), |device| {
        let broker = &device["broker"];
        let other = broker["pid"].as_u64() != pid;
        followed |= other;
        other && (broker["configuration"].as_u64() > before || broker["configuration_undone"] == true)
    });
    let Some(device) = came else {
        return Err(if followed { Failure::new(1, SLOW) } else { upgrade::nobody(pid, args.wait) });
    };
    let configuration = device["broker"]["configuration"].as_u64();
    if configuration <= before {
        return Err(Failure::new(1, UNDONE));
    }
    let took = began.elapsed().as_secs_f64() * 1e3;
    let mut out = std::io::stdout().lock();
    if args.json {
        let line = json!({
            "configuration": configuration, "devices": devices, "took_ms": took, "pid": device["broker"]["pid"],
        });
        writeln!(out, "{}", plain::json_line(&line.to_string()))?;
    } else {
        let (number, count) = (configuration.unwrap_or(0), devices.len());
        let text =
            format!("configuration {number} is in force after {took:.1} ms: {count} devices, {}", devices.join(", "));
        writeln!(out, "{}", plain::clean(&text))?;
    }
    Ok(0)
}

const SLOW: &str = "the next process goes by the new configuration, but not every device has begun in that time: see `warmswap events` and \
                    `warmswap status`";
const UNDONE: &str = "the new configuration did not get in force, and the old one goes on: the journal of the first device says why \
                      (ReloadUndone)";
