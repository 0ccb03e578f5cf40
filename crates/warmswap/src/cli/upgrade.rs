//! `warmswap upgrade`.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Control, Failure, plain, show};
use crate::control::{Client, socket_path};

/// The next process is looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Asks at a device's control socket, which process after process listens at, until the status says what is waited for.
pub(super) fn look(path: &Path, wait: Duration, mut came: impl FnMut(&Value) -> bool) -> Option<Value> {
    let until = Instant::now() + wait;
    while Instant::now() < until {
        if let Ok(mut client) = Client::connect(path)
            && let Ok(status) = client.status()
            && came(&status["devices"][0])
        {
            return Some(status["devices"][0].clone());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    None
}

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

/// Nobody has followed the process that has ended.
pub(super) fn nobody(pid: Option<u64>, seconds: u64) -> Failure {
    let pid = pid.unwrap_or(0);
    let text = format!(
        "no process has taken the place of the last one (pid {pid}) within {seconds} s: the guest's I/O goes on without one; look at what \
         `warmswap keeper`, or systemd, says"
    );
    Failure::new(1, text)
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let path = socket_path(&args.control.dir(), &args.name);
    show::names(std::slice::from_ref(&args.name), &args.control.dir())?;
    let mut client = Client::connect(&path)?;
    show::greet(&mut client)?;
    let began = Instant::now();
    let old = client.upgrade()?;
    drop(client);
    let (pid, version) = (old["pid"].as_u64(), old["version"].as_str().unwrap_or("-"));
    let next = look(&path, Duration::from_secs(args.wait), |device| device["broker"]["pid"].as_u64() != pid);
    let device = next.ok_or_else(|| nobody(pid, args.wait))?;
    let (broker, state) = (&device["broker"], device["state"].as_str().unwrap_or("-"));
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
