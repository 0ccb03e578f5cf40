//! The verdict, for people and for programs.

use std::time::Duration;

use serde::Serialize;

use super::config::Config;
use super::life::Outcome;
use super::load::Damage;
use crate::common::commit::commit;

/// Failures that are told in words.
const TOLD_MAX: usize = 8;

/// A run that went wrong.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Failure {
    /// What went wrong, in words.
    words: Vec<String>,
    /// The command that repeats it.
    command: String,
}

/// What came of a series.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    #[serde(skip)]
    config: Config,
    series: String,
    control: bool,
    /// Stores of the first life before each of which it was killed.
    pub(super) stores: u64,
    runs: u64,
    deaths: u64,
    requests: u64,
    /// Requests in flight at a death, completed by a later life.
    recovered: u64,
    lost: u64,
    duplicated: u64,
    corrupted: u64,
    wrong: u64,
    uncalled: u64,
    /// Runs that could not be gone on with.
    stuck: u64,
    /// Runs in which anything went wrong.
    pub(super) failures: Vec<Failure>,
    seconds: f64,
}

impl Row {
    /// A series of which nothing is known.
    pub(super) fn new(config: Config) -> Self {
        Row {
            config,
            series: config.to_string(),
            control: !config.region,
            stores: 0,
            runs: 0,
            deaths: 0,
            requests: 0,
            recovered: 0,
            lost: 0,
            duplicated: 0,
            corrupted: 0,
            wrong: 0,
            uncalled: 0,
            stuck: 0,
            failures: Vec::new(),
            seconds: 0.0,
        }
    }

    /// Notes a run. Returns how many back-ends died in it.
    pub(super) fn note(&mut self, stores: &[u64], outcome: anyhow::Result<Outcome>, seed: u64) -> u64 {
        self.runs += 1;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                self.stuck += 1;
                self.fail(stores, vec![format!("{error:#}")], seed);
                // As far as the series is concerned it has died as ordered.
                return stores.len() as u64;
            }
        };
        let Outcome { deaths, owed, requests, damage } = outcome;
        let Damage { lost, duplicated, corrupted, wrong, uncalled, words } = &damage;
        self.deaths += deaths;
        self.requests += requests;
        self.recovered += owed.saturating_sub(*lost);
        self.lost += lost;
        self.duplicated += duplicated;
        self.corrupted += corrupted;
        self.wrong += wrong;
        self.uncalled += uncalled;
        if damage.is_seen() {
            self.fail(stores, words.clone(), seed);
        }
        deaths
    }

    fn fail(&mut self, stores: &[u64], words: Vec<String>, seed: u64) {
        let again = stores.get(1).map_or_else(String::new, |again| format!(" --again {again}"));
        let command = format!("lab crash {} --seed {seed} --store {}{again}", self.config.options(), stores[0]);
        self.failures.push(Failure { words, command });
    }

    /// How long it took.
    pub(super) fn took(&mut self, took: Duration) {
        self.seconds = took.as_secs_f64();
    }

    /// Whether it went as it must: well, or wrong where nothing protects.
    fn is_ok(&self) -> bool {
        self.failures.is_empty() != self.control
    }

    /// One line of the table.
    pub(super) fn line(&self) -> String {
        let Row { series, stores, runs, deaths, requests, recovered, .. } = self;
        let Row { lost, duplicated, corrupted, wrong, uncalled, stuck, .. } = self;
        let control = if self.control { " (control)" } else { "" };
        format!(
            "{series:<47} {stores:>6} {runs:>6} {deaths:>6} {requests:>8} {recovered:>9} {lost:>6} {duplicated:>10} {corrupted:>9} \
             {wrong:>5} {uncalled:>8} {stuck:>5} {:>6.1}{control}",
            self.seconds
        )
    }
}

/// The report. Its field names are read by other programs.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    ok: bool,
    deaths: u64,
    recovered: u64,
    failures: usize,
    /// Runs of controls that went wrong, as they must.
    control_failures: usize,
    rows: Vec<Row>,
    seed: u64,
    commit: String,
    command: String,
    seconds: f64,
}

impl Report {
    /// Judges all series.
    pub(super) fn new(rows: Vec<Row>, seed: u64, took: Duration) -> Self {
        let guarded = || rows.iter().filter(|row| !row.control);
        Report {
            ok: rows.iter().all(Row::is_ok),
            deaths: guarded().map(|row| row.deaths).sum(),
            recovered: guarded().map(|row| row.recovered).sum(),
            failures: guarded().map(|row| row.failures.len()).sum(),
            control_failures: rows.iter().filter(|row| row.control).map(|row| row.failures.len()).sum(),
            rows,
            seed,
            commit: commit(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            seconds: took.as_secs_f64(),
        }
    }

    /// Whether every death was survived and every control was not.
    pub(super) fn is_ok(&self) -> bool {
        self.ok
    }

    /// Prints it as a table.
    pub(super) fn print(&self) {
        println!(
            "{:<47} stores   runs deaths requests recovered   lost duplicated corrupted wrong uncalled stuck      s",
            "series"
        );
        self.rows.iter().for_each(|row| println!("{}", row.line()));
        for failure in self.rows.iter().filter(|row| !row.is_ok()).flat_map(|row| &row.failures).take(TOLD_MAX) {
            println!("\n{}\n  repeat: {}", failure.words.join("\n"), failure.command);
        }
        for row in self.rows.iter().filter(|row| row.control && row.failures.is_empty()) {
            println!("\nthe control {} went well: the oracle has no teeth", row.series);
        }
        println!(
            "\n{} deaths, {} requests recovered, {} runs of controls went wrong as they must; seed {}, commit {}, {:.0} s",
            self.deaths, self.recovered, self.control_failures, self.seed, self.commit, self.seconds
        );
        println!("{}", if self.ok { "passed" } else { "FAILED" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::config::controls;

    #[test]
    fn a_series_is_right_when_it_goes_well_and_a_control_when_it_does_not() {
        let control = controls()[0];
        let lost = || Outcome { deaths: 1, owed: 3, requests: 9, damage: Damage { lost: 1, ..Damage::default() } };
        let (mut row, mut guarded) = (Row::new(control), Row::new(Config { region: true, ..control }));
        assert!(!row.is_ok() && guarded.is_ok());
        assert_eq!(row.note(&[4], Ok(lost()), 1), 1);
        guarded.note(&[4, 2], Ok(lost()), 1);
        assert!(row.is_ok() && !guarded.is_ok());
        assert_eq!((guarded.lost, guarded.recovered), (1, 2));
        assert!(guarded.failures[0].command.ends_with("--slow-reads on --seed 1 --store 4 --again 2"));
        let stuck = guarded.note(&[4, 2], Err(anyhow::anyhow!("no")), 1);
        assert_eq!((stuck, guarded.stuck), (2, 1));
    }
}
