//! Whether the causes that are named are right, on series whose labels name the columns of each anomaly.
//!
//! Of each anomaly the row with the greatest score counts, as each detector has it. Chance is exact: three columns drawn at random.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Serialize;

use super::baselines::Scorer;
use super::components::Components;
use super::series::{self, Series};
use super::table::Table;
use crate::score::detector;

/// Causes that are named.
const NAMED: usize = 3;

/// How often one of three named causes was right.
#[derive(Debug, Serialize)]
pub(super) struct Named {
    pub(super) anomalies: usize,
    pub(super) ours: f64,
    pub(super) components: f64,
    pub(super) chance: f64,
}

/// An anomaly.
struct Anomaly {
    server: String,
    rows: std::ops::RangeInclusive<usize>,
    columns: Vec<usize>,
}

/// Judges causes by a file of anomalies, on the series in these files.
pub(super) fn judge(path: &Path, files: &[PathBuf], burn_in: usize) -> anyhow::Result<Named> {
    let anomalies = read(path)?;
    let (mut count, mut ours, mut components, mut chance) = (0, 0.0, 0.0, 0.0);
    for file in files {
        let series = series::read(file)?;
        let of = |anomaly: &&Anomaly| series.name.starts_with(&format!("{}_", anomaly.server));
        let these: Vec<&Anomaly> = anomalies.iter().filter(of).filter(|it| *it.rows.start() >= burn_in).collect();
        if these.is_empty() {
            continue;
        }
        let (by_us, by_components) = (ours_of(&series, burn_in)?, components_of(&series, burn_in));
        for anomaly in these {
            count += 1;
            ours += f64::from(u8::from(is_right(&by_us, anomaly)));
            components += f64::from(u8::from(is_right(&by_components, anomaly)));
            chance += by_chance(series.rows[0].len(), anomaly.columns.len());
        }
    }
    ensure!(count > 0, "{}: no anomaly of these series", path.display());
    let share = |sum: f64| sum / count as f64;
    Ok(Named { anomalies: count, ours: share(ours), components: share(components), chance: share(chance) })
}

fn read(path: &Path) -> anyhow::Result<Vec<Anomaly>> {
    let mut table = Table::open(path)?;
    let [server, start, end, columns] = ["server", "start", "end", "columns"].map(|name| table.find(name));
    let (server, places, columns) = (server?, [start?, end?], columns?);
    let (mut values, mut anomalies) = (Vec::new(), Vec::new());
    while table.next(&places, &mut values)? {
        let names = table.text(columns).split_whitespace();
        let columns: Option<Vec<usize>> = names.map(|name| name.strip_prefix('f')?.parse().ok()).collect();
        let columns = columns.with_context(|| format!("{}: expected columns as f00", path.display()))?;
        let rows = values[0] as usize..=values[1] as usize;
        anomalies.push(Anomaly { server: table.text(server).to_owned(), rows, columns });
    }
    Ok(anomalies)
}

/// Of each row its score and its causes.
type Explained = Vec<(f64, Vec<usize>)>;

fn ours_of(series: &Series, burn_in: usize) -> anyhow::Result<Explained> {
    let mut detector = detector(series.rows[0].len(), u32::try_from(burn_in)?, false);
    let explain = |row: &Vec<f32>| {
        let scored = detector.step(row, &[]);
        (f64::from(scored.score), scored.causes.iter().flatten().map(|cause| cause.column).collect())
    };
    Ok(series.rows.iter().map(explain).collect())
}

fn components_of(series: &Series, burn_in: usize) -> Explained {
    let mut components = Components::new(series.rows[0].len(), burn_in);
    let explain = |row: &Vec<f32>| {
        let Some(score) = components.step(row) else { return (f64::NEG_INFINITY, Vec::new()) };
        let mut columns: Vec<(usize, f64)> = components.contributions(row).into_iter().enumerate().collect();
        columns.sort_by(|one, two| two.1.total_cmp(&one.1));
        (f64::from(score), columns.iter().take(NAMED).map(|it| it.0).collect())
    };
    series.rows.iter().map(explain).collect()
}

fn is_right(explained: &Explained, anomaly: &Anomaly) -> bool {
    let rows = &explained[anomaly.rows.clone()];
    let greatest = rows.iter().max_by(|one, two| one.0.total_cmp(&two.0));
    greatest.is_some_and(|(_, causes)| causes.iter().any(|cause| anomaly.columns.contains(cause)))
}

/// Probability that one of three columns drawn at random is among so many.
fn by_chance(all: usize, right: usize) -> f64 {
    let none =
        (0..NAMED).fold(1.0, |none, drawn| none * (all - right).saturating_sub(drawn) as f64 / (all - drawn) as f64);
    1.0 - none
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_that_of_drawing_three() {
        assert!((by_chance(38, 1) - 3.0 / 38.0).abs() < 1e-12);
        assert!((by_chance(19, 19) - 1.0).abs() < 1e-12);
        assert!((by_chance(4, 2) - 1.0).abs() < 1e-12, "three of four with two right ones");
    }
}
