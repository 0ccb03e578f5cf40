//! The period of a column, by its autocorrelation: the longest window of the measure where none is given.
//!
//! The rule of the benchmark TSB-AD (`find_length_rank` with rank 1): autocorrelation at the lags 3 to 400 over the first 20,000
//! rows; of the lags between these two that are above both neighbours, the one with the highest. The period is that lag, or 125
//! where there is none, or where it is below 6 or above 303. A lower peak does not take the place of one that is out of these
//! bounds. A period of 3 is seen as 6, since the first lag has no neighbour.
//!
//! The sums are made directly, where the original transforms there and back: exact ties aside, which its rounding decides, the
//! peaks are the same.

/// Rows that are looked at.
const ROWS_MAX: usize = 20_000;
/// The first lag that is looked at; it can be no peak itself.
const LAG_MIN: usize = 3;
/// The last one.
const LAG_MAX: usize = 400;
/// The bounds of a period that is believed.
const BELIEVED: std::ops::RangeInclusive<usize> = 6..=303;
/// The period of what shows none.
const FALLBACK: usize = 125;

/// The period of `column` in rows.
pub(crate) fn period(column: &[f64]) -> usize {
    let correlation = autocorrelation(&column[..column.len().min(ROWS_MAX)]);
    let mut best: Option<(f64, usize)> = None;
    for (at, around) in correlation.windows(3).enumerate() {
        let is_peak = around[1] > around[0] && around[1] > around[2];
        if is_peak && best.is_none_or(|(height, _)| around[1] >= height) {
            best = Some((around[1], LAG_MIN + at + 1));
        }
    }
    match best {
        Some((_, lag)) if BELIEVED.contains(&lag) => lag,
        _ => FALLBACK,
    }
}

/// The autocorrelation at the lags from `LAG_MIN` on; not a number where the column is constant.
fn autocorrelation(column: &[f64]) -> Vec<f64> {
    let mean = column.iter().sum::<f64>() / column.len() as f64;
    let centred: Vec<f64> = column.iter().map(|value| value - mean).collect();
    let at = |lag: usize| -> f64 { centred.iter().zip(&centred[lag..]).map(|(a, b)| a * b).sum() };
    let lags = LAG_MIN..column.len().min(LAG_MAX + 1);
    let variance = at(0);
    lags.map(|lag| at(lag) / variance).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(original: usize, rows: u32, value: impl Fn(u32) -> u32) {
        let column: Vec<f64> = (0..rows).map(|row| f64::from(value(row))).collect();
        assert_eq!(period(&column), original, "{rows} rows that start with {:?}", &column[..column.len().min(12)]);
    }

    /// The figures were printed by the original: `find_length_rank` of TSB-AD at 87630099ea8d, under statsmodels 0.15.0.
    #[test]
    fn the_periods_are_those_of_the_original() {
        let saws = [
            (2, 500, 125),
            (3, 500, 6),
            (4, 500, 125),
            (5, 500, 125),
            (6, 500, 6),
            (7, 500, 7),
            (50, 2000, 50),
            (302, 3000, 302),
            (303, 3000, 303),
            (304, 3000, 125),
            (350, 3000, 125),
            (399, 3000, 125),
            (400, 3000, 125),
            (401, 3000, 125),
            (24, 30_000, 24),
            (12, 14, 12),
            (9, 30, 9),
        ];
        for (teeth, rows, original) in saws {
            check(original, rows, |row| row % teeth);
        }
        check(97, 1000, |row| (3 * row * row + 5 * row) % 97);
        check(294, 1000, |row| (13 * row * row + 17 * row) % 487);
        check(125, 3000, |row| (19 * row * row + 23 * row) % 2003);
        check(23, 300, |row| (7 * row * row + row) % 23);
    }

    #[test]
    fn what_shows_no_period_has_that_of_the_original() {
        check(125, 5000, |_| 0);
        check(125, 5000, |_| 1);
        check(125, 1000, |row| row);
        check(125, 5000, |row| u32::from(row == 777));
        for rows in 0..6 {
            check(125, rows, |row| row % 2);
        }
        assert_eq!(period(&[0.1; 5000]), 125);
    }

    #[test]
    fn only_the_first_rows_are_looked_at() {
        let mixed = |row: u32| (19 * (row % 2003).pow(2) + 23 * row) % 2003;
        check(97, 25_000, mixed);
        check(125, 3000, mixed);
        let head = |row: u32| if row < 20_000 { row % 24 } else { 1_000_000 * (row % 31) };
        check(24, 30_000, head);
        check(24, 20_000, head);
    }
}
