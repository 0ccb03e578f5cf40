//! `warmswap failover`.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Control, Failure, plain, show};
use crate::control::{Client, ClientError, exit_code, socket_path};

/// The device is looked at this often while it is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// A failover, or the replacement of a shadow, is waited for this long beside what `--wait` says. It ends by itself in far less.
const DONE_MAX: Duration = Duration::from_secs(60);

/// Options of `warmswap failover`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// Do not drain: kill the primary at once
    #[arg(long)]
    now: bool,
    /// Replace the shadow by a newly started backend first, so that a new program or configuration takes over
    #[arg(long)]
    fresh: bool,
    /// How long to wait for what passes by itself, as a shadow that is starting; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=86_400))]
    wait: u64,
    /// Why, for the journal
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    reason: String,
    #[command(flatten)]
    control: Control,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why the device is not ready for a failover.
enum Unready {
    /// It will pass.
    ForNow(String),
    /// It will not.
    ForGood,
}

/// Looks whether a failover could be made now, by a shadow that is newer than `than`.
fn look(client: &mut Client, than: u64) -> Result<Option<Unready>, Failure> {
    let status = client.status()?;
    let device = &status["devices"][0];
    let note = device["shadow_note"].as_str().unwrap_or("-");
    if device["state"] == "halted" || device["shadow_wanted"] == false {
        return Ok(Some(Unready::ForGood));
    }
    if let Some(why) = device["refusal"].as_str() {
        return Ok(Some(Unready::ForNow(why.to_owned())));
    }
    let old = device["shadow"]["generation"].as_u64().is_none_or(|generation| generation <= than);
    Ok((than > 0 && old).then(|| Unready::ForNow(format!("the new shadow is not there yet: {note}"))))
}

/// Waits until the device is ready, it is certain that it will not be, or time is over.
fn wait(client: &mut Client, than: u64, until: Instant) -> Result<Option<Unready>, Failure> {
    loop {
        match look(client, than)? {
            Some(Unready::ForNow(_)) if Instant::now() < until => std::thread::sleep(LOOK_EVERY),
            found => return Ok(found),
        }
    }
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let dir = args.control.dir();
    let name = &args.name;
    show::names(std::slice::from_ref(name), &dir)?;
    let mut client = Client::connect(&socket_path(&dir, name))?;
    if args.fresh && args.wait == 0 {
        return Err(Failure::new(2, "--fresh waits for the new shadow: give it time with --wait"));
    }
    show::greet(&mut client)?;
    let until = Instant::now() + Duration::from_secs(args.wait);
    client.set_end(Some(until + DONE_MAX));
    let mut than = 0;
    if args.fresh {
        // A failover that runs ends first: its new shadow is then the one to be replaced.
        wait(&mut client, 0, until)?;
        than = client.refresh(name)?["replaced"].as_u64().unwrap_or(0);
    }
    let report = loop {
        if args.wait > 0
            && let Some(Unready::ForNow(why)) = wait(&mut client, than, until)?
            && args.fresh
        {
            // Without the new shadow the old state is left as it is.
            let message = format!("{why} (waited {} s)", args.wait);
            break json!({"result": "refused", "kind": "planned", "cause": args.reason, "message": message});
        }
        let report = client.failover(name, args.now, &args.reason).map_err(unknown)?;
        let refused = report["result"] == "refused";
        let passes = refused && args.wait > 0 && matches!(look(&mut client, than)?, Some(Unready::ForNow(_)) | None);
        if !passes || Instant::now() >= until {
            break report;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    print(name, &report, args.json)
}

/// Where the answer to the command itself is missing, it may have been carried out.
fn unknown(error: ClientError) -> Failure {
    match error {
        ClientError::Silent { .. } | ClientError::Ended(_) => {
            Failure::new(1, plain::clean(&format!("{error}; whether there was a failover, `status` and `events` tell")))
        }
        error => error.into(),
    }
}

fn print(name: &str, report: &Value, as_json: bool) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    let result = report["result"].as_str().unwrap_or("failed");
    if as_json {
        writeln!(out, "{}", plain::json_line(&report.to_string()))?;
    } else if result == "settled" {
        writeln!(out, "{}", plain::clean(&show::settled(name, report)))?;
    } else {
        let message = report["message"].as_str().unwrap_or("-");
        writeln!(out, "{}", plain::clean(&format!("{result}: {message}")))?;
    }
    Ok(exit_code(result))
}
