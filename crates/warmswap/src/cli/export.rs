//! `warmswap export`: the profile as a table.

mod table;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use warmswap_predict::{Grain, Record};
use warmswap_store::Reader;

use self::table::{Csv, Parquet, Table};
use super::{Control, Failure, plain, show, time};
use crate::control::{Client, ClientError, history};
use crate::profile::historian::history_path;

/// A broker that says nothing for this long in the middle of a history is taken for stopped.
const RECORD_MAX: Duration = Duration::from_secs(30);

/// Options of `warmswap export`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// Only what ended at this time (UTC) or later: 2026-11-23T14:05:09Z, 2026-11-23, or @ and seconds since 1970
    #[arg(long, value_name = "TIME", value_parser = time::unix_ns)]
    from: Option<u64>,
    /// Only what ended at this time (UTC) or before
    #[arg(long, value_name = "TIME", value_parser = time::unix_ns)]
    to: Option<u64>,
    /// Only this long until now, as 90s, 15m, 1h or 7d
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["from", "to"], value_parser = time::duration)]
    last: Option<Duration>,
    /// Windows, or the ticks of the last minutes and of the minutes before failovers
    #[arg(long, value_enum, default_value_t = AskedGrain::Window)]
    grain: AskedGrain,
    /// Kind of table
    #[arg(long, value_enum, default_value_t = Format::Csv)]
    format: Format,
    /// Where to; one that is there is replaced (default: standard output)
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Read this file, or the device's file in this directory, that a warmswap with --store has left, instead of asking the running one
    #[arg(long, value_name = "FILE")]
    store: Option<PathBuf>,
    #[command(flatten)]
    control: Control,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum AskedGrain {
    Window,
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Text, a line per row; what is missing is empty
    Csv,
    /// Apache Parquet; what is missing is null
    Parquet,
}

/// Takes records in their order.
type Each<'a> = &'a mut dyn FnMut(&Record) -> Result<(), Failure>;

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    super::check_name(&args.name)?;
    let now = time::now_unix_ns();
    let last = args.last.map(|last| now.saturating_sub(u64::try_from(last.as_nanos()).unwrap_or(u64::MAX)));
    let asked = (args.from.or(last).unwrap_or(0), args.to.unwrap_or(u64::MAX));
    if asked.0 > asked.1 {
        return Err(Failure::new(2, "--from is later than --to: nothing lies between them"));
    }
    // Whom to ask is settled before a file is replaced.
    let source = Source::open(args)?;
    let output_file = args.output.as_ref().filter(|path| path.as_os_str() != "-");
    let out: Box<dyn Write + Send> = match output_file {
        Some(path) => Box::new(File::create(path).map_err(|error| output(path, &error))?),
        None if args.format == Format::Parquet && std::io::stdout().is_terminal() => {
            return Err(Failure::new(2, "a Parquet table is not for a terminal: give --output"));
        }
        None => Box::new(std::io::stdout()),
    };
    let mut table: Box<dyn Table> = match args.format {
        Format::Csv => Box::new(Csv::new(out)?),
        Format::Parquet => Box::new(Parquet::new(out)?),
    };
    let mut rows = 0;
    let read = source.read(args, asked, &mut |record| {
        rows += 1;
        table.row(record).map_err(Failure::from)
    });
    // What was read before a failure is a whole table.
    table.end()?;
    read?;
    if let Some(path) = output_file {
        writeln!(std::io::stdout(), "exported: {rows} rows of {} to {}", args.name, path.display())?;
    }
    Ok(0)
}

fn output(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(1, format!("--output {}: {error}", path.display()))
}

/// Where records come from.
enum Source {
    Running(Client),
    Left(Reader),
}

impl Source {
    fn open(args: &Args) -> Result<Self, Failure> {
        let Some(path) = &args.store else {
            let mut client = show::connect(&args.name, &args.control)?;
            client.set_patience(Some(RECORD_MAX));
            return Ok(Source::Running(client));
        };
        let path = if path.is_dir() { history_path(path, &args.name) } else { path.clone() };
        if !path.exists() {
            let text = format!(
                "--store: there is no {}; it is the directory, or a file in it, that a guard with --store was given",
                path.display()
            );
            return Err(Failure::new(1, text));
        }
        let reader = Reader::open(&path)?;
        if reader.device() != args.name {
            let text = format!("--store {} is of device {}, not of {}", path.display(), reader.device(), args.name);
            return Err(Failure::new(1, text));
        }
        Ok(Source::Left(reader))
    }

    fn read(self, args: &Args, asked: (u64, u64), each: Each<'_>) -> Result<(), Failure> {
        match (self, args.grain) {
            (Source::Running(client), grain) => from_running(client, args, asked, grain, each),
            (Source::Left(reader), AskedGrain::Window) => {
                for window in reader.range(asked.0, asked.1)? {
                    match window {
                        Ok(window) => each(&window)?,
                        // It says that the others can be read.
                        Err(error) => plain::say(&error.to_string()),
                    }
                }
                Ok(())
            }
            (Source::Left(reader), AskedGrain::Tick) => recorded_ticks(&reader, asked, each),
        }
    }
}

fn from_running(
    mut client: Client,
    args: &Args,
    (from, to): (u64, u64),
    grain: AskedGrain,
    each: Each<'_>,
) -> Result<(), Failure> {
    let grain = match grain {
        AskedGrain::Window => Grain::Window.name(),
        AskedGrain::Tick => Grain::Tick.name(),
    };
    let ms = |ns: u64| ns as f64 / 1e6;
    client.tell(&json!({
        "verb": "history", "device": args.name, "grain": grain, "raw": true, "from_unix_ms": ms(from), "to_unix_ms": ms(to),
    }))?;
    loop {
        let line = client.line().map_err(|error| match error {
            ClientError::Ended(error) if error.kind() != std::io::ErrorKind::InvalidData => Failure::new(
                1,
                format!(
                    "the connection to warmswap ended: {error}. It leaves who does not read: --output does not wait"
                ),
            ),
            error => error.into(),
        })?;
        if line.get("end").is_some() {
            return Ok(());
        }
        let Some(hex) = line["record"].as_str() else { continue };
        let record = history::from_raw(hex).map_err(|why| Failure::new(1, format!("{}: {why}", args.name)))?;
        each(&record)?;
    }
}

/// The ticks of every recording. Recordings overlap: no tick comes twice.
fn recorded_ticks(reader: &Reader, (from, to): (u64, u64), each: Each<'_>) -> Result<(), Failure> {
    let mut last = None;
    for unix_ns in reader.recordings()?.into_iter().filter(|it| *it >= from) {
        let recording = match reader.recording(unix_ns) {
            Ok(Some(recording)) => recording,
            Ok(None) => continue,
            Err(error) => {
                plain::say(&error.to_string());
                continue;
            }
        };
        for tick in recording.ticks() {
            let tick = match tick {
                Ok(tick) => tick,
                Err(broken) => {
                    let recording = time::timestamp(unix_ns);
                    plain::say(&format!("the recording of {recording}: {broken}; its other ticks are lost"));
                    break;
                }
            };
            if (from..=to).contains(&tick.end_unix_ns) && Some(tick.end_unix_ns) > last {
                last = Some(tick.end_unix_ns);
                each(&tick)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
