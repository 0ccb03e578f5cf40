//! `lab score`: the detector of the failure model on any multivariate series, one causal pass.
//!
//! The code is that of [`warmswap_predict::SeriesDetector`], of which the model that watches backends is built. Every row is scored before
//! it is learnt, and nothing is known of the rows behind it. What the scores are worth says `lab vus`.
//!
//! Written is one row for each row of the series: its time if there is a column for it, `score`, 0 during the burn-in; `alarm`, 0 or 1; and the
//! columns that contribute most to it, `cause1` to `cause3`, each as `NAME:DEVIATIONS:SHARE`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;
use warmswap_predict::{CONTEXT_MAX, ColumnCause, Scored, SeriesDetector};

use crate::common::commit::commit;
use crate::eval::table::Table;

/// Most columns that are scored.
pub(crate) const COLUMNS_MAX: usize = 128;

/// Options of `lab score`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The series: comma-separated values with a header row, compressed if the name ends with `.gz`. An empty cell is a missing value.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// A column with the time, which is copied.
    #[arg(long, value_name = "COL")]
    time: Option<String>,
    /// A column with labels, which is not looked at.
    #[arg(long, default_value = "label", value_name = "COL")]
    label: String,
    /// Columns that say how much is asked for, not how well it is done: what they explain is not unusual.
    #[arg(long, value_name = "COL,...", value_delimiter = ',')]
    context: Vec<String>,
    /// Rows at the beginning that say what is usual.
    #[arg(long, default_value_t = 500, value_name = "ROWS")]
    burn_in: u32,
    /// Where the scores go.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    rows: u64,
    columns: usize,
    alarms: u64,
    greatest: f32,
    ns_per_row: f64,
    command: String,
    commit: String,
}

/// Scores a series.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut table = Table::open(&args.input)?;
    let columns = Columns::of(&table, args)?;
    let output = std::fs::File::create(&args.output).with_context(|| args.output.display().to_string())?;
    let mut output = std::io::BufWriter::new(output);
    let report = score(&mut table, &columns, args, &mut output)
        .and_then(|report| output.flush().map(|()| report).with_context(|| args.output.display().to_string()))?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        let Report { rows, columns, alarms, greatest, ns_per_row, .. } = &report;
        println!(
            "{rows} rows of {columns} columns: {alarms} alarms, greatest score {greatest:.2}, {ns_per_row:.0} ns per row"
        );
    }
    Ok(())
}

/// Which columns are what.
struct Columns {
    time: Option<usize>,
    context: Vec<usize>,
    scored: Vec<usize>,
}

impl Columns {
    fn of(table: &Table, args: &Args) -> anyhow::Result<Self> {
        let time = args.time.as_deref().map(|name| table.find(name)).transpose()?;
        let context = args.context.iter().map(|name| table.find(name)).collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(context.len() <= CONTEXT_MAX, "{} columns of context, at most {CONTEXT_MAX}", context.len());
        let path = args.input.display();
        let is_other =
            |place: &usize| Some(*place) == time || context.contains(place) || table.names()[*place] == args.label;
        let scored: Vec<usize> = (0..table.names().len()).filter(|place| !is_other(place)).collect();
        ensure!(!scored.is_empty(), "{path}: there is no column to be scored");
        ensure!(scored.len() <= COLUMNS_MAX, "{path}: {} columns to be scored, at most {COLUMNS_MAX}", scored.len());
        Ok(Columns { time, context, scored })
    }
}

fn score(table: &mut Table, columns: &Columns, args: &Args, output: &mut impl Write) -> anyhow::Result<Report> {
    let place = |error: std::io::Error| anyhow::Error::new(error).context(args.output.display().to_string());
    let mut detector = detector(columns.scored.len(), args.burn_in, !columns.context.is_empty());
    let header =
        if columns.time.is_some() { format!("{},", quoted(args.time.as_deref().unwrap_or(""))) } else { String::new() };
    writeln!(output, "{header}score,alarm,cause1,cause2,cause3").map_err(place)?;
    let places: Vec<usize> = columns.scored.iter().chain(&columns.context).copied().collect();
    let names: Vec<String> = columns.scored.iter().map(|place| table.names()[*place].clone()).collect();
    let (mut values, mut rows, mut alarms, mut greatest, mut spent_ns) = (Vec::new(), 0_u64, 0_u64, 0.0_f32, 0_u128);
    while table.next(&places, &mut values)? {
        let (row, context) = values.split_at(columns.scored.len());
        let began = Instant::now();
        let scored = detector.step(row, context);
        spent_ns += began.elapsed().as_nanos();
        (rows, alarms, greatest) = (rows + 1, alarms + u64::from(scored.alarm), greatest.max(scored.score));
        let time = columns.time.map_or(String::new(), |place| format!("{},", quoted(table.text(place))));
        writeln!(output, "{time}{}", line(&scored, &names)).map_err(place)?;
    }
    ensure!(rows > 0, "{}: there are no rows", args.input.display());
    Ok(Report {
        rows,
        columns: names.len(),
        alarms,
        greatest,
        ns_per_row: spent_ns as f64 / rows as f64,
        command: command(args),
        commit: commit(),
    })
}

/// A detector of a size that any table fits.
pub(crate) fn detector(columns: usize, burn_in: u32, with_context: bool) -> Box<SeriesDetector<COLUMNS_MAX>> {
    Box::new(SeriesDetector::new(columns, burn_in, with_context))
}

fn line(scored: &Scored, names: &[String]) -> String {
    let cause = |cause: &Option<ColumnCause>| match cause {
        Some(cause) => quoted(&format!("{}:{:.2}:{:.3}", names[cause.column], cause.score, cause.share)),
        None => String::new(),
    };
    let [first, second, third] = [0, 1, 2].map(|at| cause(&scored.causes[at]));
    format!("{},{},{first},{second},{third}", scored.score, u8::from(scored.alarm))
}

/// A cell as RFC 4180 has it.
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

fn command(args: &Args) -> String {
    let shown = |path: &Path| path.display().to_string();
    let mut words = vec!["cargo run -rq -p lab -- score --input".to_owned(), shown(&args.input)];
    for (name, value) in [("--time", args.time.clone().unwrap_or_default()), ("--context", args.context.join(","))] {
        if !value.is_empty() {
            words.extend([name.to_owned(), value]);
        }
    }
    words.extend(["--burn-in".to_owned(), args.burn_in.to_string(), "--output".to_owned(), shown(&args.output)]);
    words.join(" ")
}
