//! Reconstruction error of principal components (H. Hotelling, 1933; the Q statistic of J. E. Jackson, G. S. Mudholkar, Technometrics 21, 1979),
//! fitted to the burn-in: the strongest baseline of TSB-AD-M among those that fit a matrix.

use super::baselines::Scorer;

/// Part of the variance that the components explain.
const EXPLAINED: f64 = 0.9;
/// Most components.
const COMPONENTS_MAX: usize = 20;
/// Steps of the power iteration for each.
const STEPS: usize = 60;

/// The components of a burn-in.
pub(crate) struct Components {
    burn_in: usize,
    kept: Vec<Vec<f32>>,
    means: Vec<f64>,
    deviations: Vec<f64>,
    axes: Vec<Vec<f64>>,
    rows: usize,
    columns: usize,
}

impl Components {
    /// Of so many columns.
    pub(crate) fn new(columns: usize, burn_in: usize) -> Self {
        let (means, deviations) = (vec![0.0; columns], vec![0.0; columns]);
        Components { burn_in, kept: Vec::new(), means, deviations, axes: Vec::new(), rows: 0, columns }
    }

    fn fit(&mut self) {
        let kept = std::mem::take(&mut self.kept);
        for column in 0..self.columns {
            let values: Vec<f64> =
                kept.iter().map(|row| f64::from(row[column])).filter(|value| value.is_finite()).collect();
            let count = values.len().max(1) as f64;
            let mean = values.iter().sum::<f64>() / count;
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
            (self.means[column], self.deviations[column]) = (mean, variance.sqrt().max(0.01 * mean.abs()).max(0.01));
        }
        let mut rows: Vec<Vec<f64>> = kept.iter().map(|row| self.scaled(row)).collect();
        let energy = |rows: &[Vec<f64>]| rows.iter().flatten().map(|value| value * value).sum::<f64>();
        let whole = energy(&rows);
        while self.axes.len() < COMPONENTS_MAX && energy(&rows) > (1.0 - EXPLAINED) * whole {
            let Some(axis) = strongest(&rows, self.columns) else { break };
            for row in &mut rows {
                take_off(row, &axis);
            }
            self.axes.push(axis);
        }
    }

    fn scaled(&self, row: &[f32]) -> Vec<f64> {
        let scaled = row.iter().zip(self.means.iter().zip(&self.deviations)).map(|(value, (mean, deviation))| {
            if value.is_finite() { (f64::from(*value) - mean) / deviation } else { 0.0 }
        });
        scaled.collect()
    }

    /// What each column contributes to the error of a row: squares.
    pub(crate) fn contributions(&self, row: &[f32]) -> Vec<f64> {
        let mut rest = self.scaled(row);
        self.axes.iter().for_each(|axis| take_off(&mut rest, axis));
        rest.iter().map(|value| value * value).collect()
    }
}

/// The axis along which rows vary most, by power iteration.
fn strongest(rows: &[Vec<f64>], columns: usize) -> Option<Vec<f64>> {
    let mut axis: Vec<f64> = (0..columns).map(|at| 1.0 + (at as f64 * 0.7).sin() / 2.0).collect();
    for _ in 0..STEPS {
        let mut next = vec![0.0; columns];
        for row in rows {
            let along: f64 = row.iter().zip(&axis).map(|(value, part)| value * part).sum();
            next.iter_mut().zip(row).for_each(|(sum, value)| *sum += along * value);
        }
        let length = next.iter().map(|value| value * value).sum::<f64>().sqrt();
        if length < 1e-12 {
            return None;
        }
        axis = next.into_iter().map(|value| value / length).collect();
    }
    Some(axis)
}

fn take_off(row: &mut [f64], axis: &[f64]) {
    let along: f64 = row.iter().zip(axis).map(|(value, part)| value * part).sum();
    row.iter_mut().zip(axis).for_each(|(value, part)| *value -= along * part);
}

impl Scorer for Components {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        self.rows += 1;
        if self.rows <= self.burn_in {
            self.kept.push(row.to_vec());
            if self.rows == self.burn_in {
                self.fit();
            }
            return None;
        }
        Some(self.contributions(row).iter().sum::<f64>() as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_off_the_plane_of_the_others_is_found_though_no_column_of_it_is_unusual() {
        let mut components = Components::new(3, 200);
        let row = |step: usize| {
            let (a, b) = ((step as f32 * 0.37).sin(), (step as f32 * 0.91).cos());
            [a, b, a + b]
        };
        (0..200).for_each(|step| assert_eq!(components.step(&row(step)), None));
        let usual = components.step(&row(777)).expect("it is fitted");
        let unusual = components.step(&[0.5, 0.5, -0.5]).expect("it is fitted");
        assert!(usual < 0.1 && unusual > 1.0, "{usual} {unusual}");
    }
}
