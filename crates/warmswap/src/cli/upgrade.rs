//! `warmswap upgrade`.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Control, Failure, plain, show};
use crate::control::{Client, socket_path};

/// The next process is looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Options of `warmswap upgrade`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A device of the process that is to be replaced
    name: String,
    /// How long to wait for the next process
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3_600))]
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
    let began = Instant::now();
    let until = began + Duration::from_secs(args.wait);
    let old = client.upgrade()?;
    drop(client);
    let (pid, version) = (old["pid"].as_u64(), old["version"].as_str().unwrap_or("-"));
    let (broker, state) = loop {
        if let Ok(mut client) = Client::connect(&path)
            && let Ok(status) = client.status()
            && status["devices"][0]["broker"]["pid"].as_u64() != pid
        {
            let device = &status["devices"][0];
            break (device["broker"].clone(), device["state"].as_str().unwrap_or("-").to_owned());
        }
        if Instant::now() > until {
            let text = format!(
                "no process has taken the place of the last one (pid {}) within {} s: the guest's I/O goes on without one; look at what \
                 `warmswap keeper`, or systemd, says",
                pid.unwrap_or(0),
                args.wait
            );
            return Err(Failure::new(1, text));
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let took = began.elapsed();
    let new = broker["version"].as_str().unwrap_or("-");
    let mut out = std::io::stdout().lock();
    if args.json {
        let line = json!({
            "device": args.name, "took_ms": took.as_secs_f64() * 1e3, "state": state,
            "before": { "pid": pid, "version": version }, "after": { "pid": broker["pid"], "version": new },
        });
        writeln!(out, "{}", plain::json_line(&line.to_string()))?;
    } else {
        let text = format!(
            "{}: pid {} (version {version}) was replaced by pid {} (version {new}) in {:.1} ms; the device is {state}",
            args.name,
            pid.unwrap_or(0),
            broker["pid"].as_u64().unwrap_or(0),
            took.as_secs_f64() * 1e3
        );
        writeln!(out, "{}", plain::clean(&text))?;
    }
    Ok(0)
}
