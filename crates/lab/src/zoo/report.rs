//! The verdict, for people and for programs.

use std::time::Duration;

use serde::Serialize;
use warmswap_zoo::Animal;

use super::hunt::Hunt;
use crate::common::commit::commit;

/// What came of one animal. Its field names are read by other programs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    id: &'static str,
    what: &'static str,
    #[serde(rename = "where")]
    home: &'static str,
    source: &'static str,
    /// What caught it: `sim` with the check that noticed, or the test or instrument.
    checker: String,
    caught: bool,
    /// Seeds the simulator needed from each start; none from one where it was not caught.
    seeds: Vec<Option<u64>>,
    median_seeds: Option<u64>,
    /// What the checker said.
    detail: String,
}

impl Row {
    /// Of an animal that was hunted in the simulator.
    pub(super) fn hunted(animal: Animal, hunts: &[Hunt]) -> Self {
        let seeds: Vec<Option<u64>> = hunts.iter().map(|hunt| hunt.catch.as_ref().map(|_| hunt.seeds)).collect();
        let first = hunts.iter().find_map(|hunt| hunt.catch.as_ref());
        let median_seeds = median(&seeds);
        Row {
            checker: first.map_or_else(|| "sim".to_owned(), |catch| format!("sim: {}", catch.check)),
            caught: median_seeds.is_some(),
            detail: first.map_or_else(String::new, |catch| catch.detail.clone()),
            seeds,
            median_seeds,
            ..Row::of(animal)
        }
    }

    /// Of an animal that a named checker was to catch.
    pub(super) fn checked(animal: Animal, checker: String, caught: Result<String, String>, hunts: &[Hunt]) -> Self {
        let (caught, detail) = match caught {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        let seeds = hunts.iter().map(|hunt| hunt.catch.as_ref().map(|_| hunt.seeds)).collect();
        Row { checker, caught, detail, seeds, ..Row::of(animal) }
    }

    /// Whether something caught it: the simulator from more than half of the starts, or its checker.
    pub(super) fn is_caught(&self) -> bool {
        self.caught
    }

    fn of(animal: Animal) -> Self {
        Row {
            id: animal.id(),
            what: animal.what(),
            home: animal.home(),
            source: animal.source(),
            checker: String::new(),
            caught: false,
            seeds: Vec::new(),
            median_seeds: None,
            detail: String::new(),
        }
    }

    fn median_text(&self) -> String {
        self.median_seeds.map_or_else(|| "-".to_owned(), |seeds| seeds.to_string())
    }

    /// One line for people.
    pub(super) fn line(&self) -> String {
        let Row { id, what, checker, .. } = self;
        let caught = if self.caught { checker.as_str() } else { "AT LARGE" };
        format!("{id:<28} {:>6}  {caught:<40}  {what}", self.median_text())
    }

    fn markdown(&self) -> String {
        let Row { id, what, home, source, checker, .. } = self;
        let caught = if self.caught { checker.replace('|', "\\|") } else { "**at large**".to_owned() };
        format!("| `{id}` | {what} | `{home}` | {source} | {caught} | {} |", self.median_text())
    }
}

/// The report. Its field names are read by other programs.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// How many there are.
    animals: usize,
    caught: usize,
    /// Of those that the simulator catches, the middle one's.
    median_seeds: Option<u64>,
    caught_by_sim: usize,
    /// Seeds without any animal, all clean.
    clean_seeds: u64,
    zoo: Vec<Row>,
    starts: u64,
    seeds_max: u64,
    commit: String,
    command: String,
    seconds: f64,
}

impl Report {
    pub(super) fn new(zoo: Vec<Row>, clean_seeds: u64, starts: u64, seeds_max: u64, took: Duration) -> Self {
        let medians: Vec<Option<u64>> = zoo.iter().map(|row| row.median_seeds).filter(Option::is_some).collect();
        Report {
            animals: zoo.len(),
            caught: zoo.iter().filter(|row| row.caught).count(),
            median_seeds: median(&medians),
            caught_by_sim: medians.len(),
            clean_seeds,
            zoo,
            starts,
            seeds_max,
            commit: commit(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            seconds: took.as_secs_f64(),
        }
    }

    /// Whether each was caught.
    pub(super) fn is_ok(&self) -> bool {
        self.caught == self.animals
    }

    pub(super) fn print(&self) {
        println!("{:<28} {:>6}  {:<40}  what it does wrong", "animal", "seeds", "caught by");
        self.zoo.iter().for_each(|row| println!("{}", row.line()));
        for row in self.zoo.iter().filter(|row| !row.caught) {
            println!("\n{} is at large: {}", row.id, row.detail);
        }
        println!("\n{}", self.summary());
    }

    pub(super) fn print_markdown(&self) {
        println!("| animal | what it does wrong | lives in | source | caught by | median seeds |");
        println!("|---|---|---|---|---|--:|");
        self.zoo.iter().for_each(|row| println!("{}", row.markdown()));
        println!("\n{}", self.summary());
    }

    fn summary(&self) -> String {
        let median = self.median_seeds.map_or_else(|| "-".to_owned(), |seeds| seeds.to_string());
        format!(
            "{} animals, {} caught, {} of them by the simulator after {median} seeds (median of medians over {} starts, at most {} seeds \
             each); {} seeds without any animal were clean; commit {}, {:.0} s",
            self.animals,
            self.caught,
            self.caught_by_sim,
            self.starts,
            self.seeds_max,
            self.clean_seeds,
            self.commit,
            self.seconds
        )
    }
}

/// The middle one, where those that were not caught are the largest; none if the middle one was not caught.
fn median(seeds: &[Option<u64>]) -> Option<u64> {
    let mut sorted: Vec<u64> = seeds.iter().map(|seeds| seeds.unwrap_or(u64::MAX)).collect();
    sorted.sort_unstable();
    sorted.get(sorted.len().checked_sub(1)? / 2).copied().filter(|seeds| *seeds < u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_counts_what_was_not_caught_as_the_largest() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[Some(3), None, Some(1)]), Some(3));
        assert_eq!(median(&[Some(3), None, None]), None);
        assert_eq!(median(&[Some(5), Some(2), Some(9), Some(4)]), Some(4));
    }
}
