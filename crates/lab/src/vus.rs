//! `lab vus`: how well the scores of a detector agree with labels, as VUS-PR, the measure of the benchmark TSB-AD.
//!
//! Each series is a table with one row per sample and a column of labels, 0 or 1; its scores are a table with as many rows. The
//! measure itself is [`crate::eval::vus`], the longest window, if none is given, [`crate::eval::period`] of the first column.
//!
//! Not checked: that the scores were made from this series, beyond the number of rows; and that they were made without a look at
//! what came later.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use crate::eval::columns::{self, Column, Which};
use crate::eval::period::period;
use crate::eval::vus::Series;

/// Longest window that may be asked for.
const WINDOW_MAX: usize = 10_000;
/// How the name of a table may end.
const ENDINGS: [&str; 2] = [".csv", ".csv.gz"];

/// Options of `lab vus`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The series: tables of comma-separated values with a header row, compressed if the name ends with `.gz`.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    series: Vec<PathBuf>,
    /// The column of a series with the labels, 0 or 1.
    #[arg(long, default_value = "label", value_name = "COL")]
    label: String,
    /// The scores: a table for each series, in the same order, or a directory with tables of the same names.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR|FILE")]
    scores: Vec<PathBuf>,
    /// The column with the scores; the higher, the more suspicious.
    #[arg(long, default_value = "score", value_name = "COL")]
    score: String,
    /// The longest window in rows, or `auto`: the period of the first column.
    #[arg(long, default_value = "auto", value_name = "N|auto", value_parser = parse_window)]
    window: Window,
    /// The column whose period is the longest window; by default the first that is not the label.
    #[arg(long, value_name = "COL")]
    first: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The longest window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Window {
    /// By the period of a column.
    Auto,
    /// So many rows.
    Rows(usize),
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    /// The mean VUS-PR.
    mean: f64,
    per_series: Vec<Row>,
}

/// What is found for one series.
#[derive(Debug, Serialize)]
struct Row {
    series: String,
    rows: usize,
    window: usize,
    vus_pr: f64,
    vus_roc: f64,
}

/// Computes the measure and prints it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let pairs = pair_up(&args.series, &args.scores)?;
    let per_series = pairs.iter().map(|(series, scores)| judge(args, series, scores)).collect::<Result<Vec<_>, _>>()?;
    let mean = per_series.iter().map(|row| row.vus_pr).sum::<f64>() / per_series.len() as f64;
    let report = Report { mean, per_series };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(())
}

fn parse_window(text: &str) -> Result<Window, String> {
    match text.parse() {
        _ if text == "auto" => Ok(Window::Auto),
        Ok(rows) if rows <= WINDOW_MAX => Ok(Window::Rows(rows)),
        _ => Err(format!("expected `auto` or a number of rows up to {WINDOW_MAX}")),
    }
}

/// Each series with the table of its scores.
fn pair_up(series: &[PathBuf], scores: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, PathBuf)>> {
    let tables = match scores {
        [directory] if directory.is_dir() => {
            let mut names = BTreeSet::new();
            for path in series {
                let name = name(path);
                ensure!(names.insert(name.clone()), "two series have the name {name}: give the scores as files");
            }
            series.iter().map(|path| in_directory(directory, &name(path))).collect::<anyhow::Result<_>>()?
        }
        files => {
            let (wanted, found) = (series.len(), files.len());
            ensure!(wanted == found, "{wanted} series, but {found} tables of scores: expected one for each");
            files.to_vec()
        }
    };
    Ok(series.iter().cloned().zip(tables).collect())
}

/// The table of the scores of the series `name`.
fn in_directory(directory: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let tables = ENDINGS.map(|ending| directory.join(format!("{name}{ending}")));
    match tables.each_ref().map(|table| table.exists()) {
        [true, false] => Ok(tables[0].clone()),
        [false, true] => Ok(tables[1].clone()),
        [true, true] => bail!("{}: there are {name}.csv and {name}.csv.gz, expected one of them", directory.display()),
        [false, false] => bail!("{}: there is no {name}.csv, and no {name}.csv.gz", directory.display()),
    }
}

/// The name of a series: that of its file without the ending.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let stem = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)).map(str::to_owned);
    stem.unwrap_or(name)
}

fn judge(args: &Args, series: &Path, scores: &Path) -> anyhow::Result<Row> {
    let label = Which::Named(&args.label);
    let (labels, window) = match args.window {
        Window::Rows(rows) => {
            let [labels] = columns::read(series, [label])?;
            (labels, rows)
        }
        Window::Auto => {
            let first = args.first.as_deref().map_or(Which::FirstBut(&args.label), Which::Named);
            let [labels, first] = columns::read(series, [label, first])?;
            (labels, period(&first.values))
        }
    };
    let labels = as_labels(&labels).with_context(|| series.display().to_string())?;
    let [scores_read] = columns::read(scores, [Which::Named(&args.score)])?;
    let judged = Series::new(&labels, &scores_read.values)
        .with_context(|| format!("{} with the scores of {}", series.display(), scores.display()))?;
    let volume = judged.volume(window);
    Ok(Row { series: name(series), rows: labels.len(), window, vus_pr: volume.pr, vus_roc: volume.roc })
}

fn as_labels(column: &Column) -> anyhow::Result<Vec<bool>> {
    let labels = column.values.iter().enumerate().map(|(at, &value)| match value {
        0.0 => Ok(false),
        1.0 => Ok(true),
        _ => bail!("row {}, column {:?}: expected a label, 0 or 1, found {value}", at + 1, column.name),
    });
    labels.collect()
}

fn table(report: &Report) -> String {
    let width = report.per_series.iter().map(|row| row.series.chars().count()).max().unwrap_or(0).max("series".len());
    let mut text = format!("{:width$}  {:>9}  {:>6}  {:>7}  {:>7}\n", "series", "rows", "window", "VUS-PR", "VUS-ROC");
    for Row { series, rows, window, vus_pr, vus_roc } in &report.per_series {
        text += &format!("{series:width$}  {rows:>9}  {window:>6}  {vus_pr:>7.4}  {vus_roc:>7.4}\n");
    }
    text + &format!("{:width$}  {:>9}  {:>6}  {:>7.4}\n", "mean", "", "", report.mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with tables, gone when it is dropped.
    struct Tables(PathBuf);

    impl Tables {
        fn new(test: &str, tables: &[(&str, &str)]) -> Self {
            let directory = std::env::temp_dir().join(format!("lab-vus-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&directory).unwrap();
            for (name, text) in tables {
                std::fs::write(directory.join(name), text).unwrap();
            }
            Tables(directory)
        }

        fn paths(&self, names: &[&str]) -> Vec<PathBuf> {
            names.iter().map(|name| self.0.join(name)).collect()
        }

        /// The error for a series and its scores, without the directory's name.
        fn refusal(&self, series: &str, scores: &str, window: Window) -> String {
            let args = Args {
                series: self.paths(&[series]),
                label: "label".into(),
                scores: self.paths(&[scores]),
                score: "score".into(),
                window,
                first: None,
                json: true,
            };
            let error = judge(&args, &args.series[0], &args.scores[0]).expect_err("this is refused");
            format!("{error:#}").replace(&format!("{}/", self.0.display()), "")
        }
    }

    impl Drop for Tables {
        fn drop(&mut self) {
            let _gone = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn refusals_name_the_file_the_row_and_the_column() {
        let tables = [
            ("good.csv", "x,label\n1,0\n2,1\n3,0\n"),
            ("calm.csv", "x,label\n1,0\n2,0\n"),
            ("half.csv", "x,label\n1,0\n2,0.5\n"),
            ("time.csv", "t,label\n12:00,0\n12:01,1\n"),
            ("scores.csv", "score\n1\n2\n3\n"),
            ("two.csv", "score\n1\n2\n"),
            ("nan.csv", "score\n1\nnan\n3\n"),
        ];
        let tables = Tables::new("refusals", &tables);
        let rows = Window::Rows(3);
        assert_eq!(
            tables.refusal("good.csv", "nan.csv", rows),
            "nan.csv: row 2 (line 3), column \"score\": expected a finite number, found \"nan\""
        );
        assert_eq!(
            tables.refusal("half.csv", "two.csv", rows),
            "half.csv: row 2, column \"label\": expected a label, 0 or 1, found 0.5"
        );
        assert_eq!(
            tables.refusal("time.csv", "two.csv", Window::Auto),
            "time.csv: row 1 (line 2), column \"t\": expected a finite number, found \"12:00\""
        );
        assert_eq!(
            tables.refusal("good.csv", "two.csv", rows),
            "good.csv with the scores of two.csv: 3 rows with a label, but 2 with a score"
        );
        assert_eq!(
            tables.refusal("calm.csv", "two.csv", rows),
            "calm.csv with the scores of two.csv: every label is 0: there is nothing to find"
        );
    }

    #[test]
    fn scores_are_paired_by_name_in_a_directory_and_by_place_as_files() {
        let tables = Tables::new("pairs", &[("a.csv", ""), ("b.csv.gz", ""), ("c.csv", ""), ("c.csv.gz", "")]);
        let series: Vec<PathBuf> = ["in/a.csv.gz", "in/b.csv"].map(PathBuf::from).into();
        let pairs = pair_up(&series, std::slice::from_ref(&tables.0)).unwrap();
        let found: Vec<PathBuf> = pairs.into_iter().map(|(_, scores)| scores).collect();
        assert_eq!(found, tables.paths(&["a.csv", "b.csv.gz"]));
        let files = tables.paths(&["b.csv.gz", "a.csv"]);
        assert_eq!(pair_up(&series, &files).unwrap()[0].1, files[0]);

        let refused = |series: &[&str], scores: &[PathBuf]| {
            let series: Vec<PathBuf> = series.iter().map(PathBuf::from).collect();
            pair_up(&series, scores).expect_err("this is refused").to_string()
        };
        let directory = std::slice::from_ref(&tables.0);
        assert!(refused(&["in/c.csv"], directory).ends_with("there are c.csv and c.csv.gz, expected one of them"));
        assert!(refused(&["in/d.csv"], directory).ends_with("there is no d.csv, and no d.csv.gz"));
        assert!(refused(&["in/a.csv", "on/a.csv.gz"], directory).starts_with("two series have the name a"));
        assert_eq!(
            refused(&["a.csv", "b.csv"], &files[..1]),
            "2 series, but 1 tables of scores: expected one for each"
        );
    }

    #[test]
    fn a_window_is_a_number_in_bounds_or_left_to_the_column() {
        assert_eq!(parse_window("auto"), Ok(Window::Auto));
        assert_eq!(parse_window("0"), Ok(Window::Rows(0)));
        assert_eq!(parse_window("10000"), Ok(Window::Rows(10_000)));
        assert!(parse_window("10001").is_err() && parse_window("-1").is_err() && parse_window("").is_err());
    }
}
