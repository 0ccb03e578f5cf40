//! How columns usually go together: the inverse of their covariance, learnt a row at a time, and what it says of each column given all others.
//!
//! With P the inverse of the covariance of a row z, the error of the best linear guess of column i from all other columns is (Pz)_i / P_ii,
//! and its deviation 1/sqrt(P_ii) (A. P. Dempster, Covariance Selection, Biometrics 28(1), 1972): (Pz)_i / sqrt(P_ii) is a score, large where a
//! column left its relation to the others, though each may be within its own bounds. z'Pz is Hotelling's T2; no number of components is to be
//! chosen as for that of principal components and their remainder Q.
//!
//! P is kept itself: a row more in the covariance is a rank-one change of the inverse (J. Sherman, W. J. Morrison, 1950), as in [`crate::regress`].
//! The covariance is that of the rows and, on its diagonal, a ridge (A. E. Hoerl, R. W. Kennard, 1970), without which what is constant or
//! redundant would have no inverse. Forgetting takes of the ridge as well: each row gives it back to one column, in turn. Rows far out weigh less,
//! as if they were no further than a bound (R. A. Maronna, Robust M-Estimators of Multivariate Location and Scatter, 1976).

/// What is added to each variance, which is about 1.
const RIDGE: f32 = 0.2;
/// No row weighs more than one of so many.
const ROWS_MIN: f32 = 20.0;
/// Rows remembered: how columns go together changes more slowly than their levels.
const ROWS_MAX: f32 = 10_000.0;
/// A row whose root mean square is beyond this is learnt as if it were at it.
const LENGTH_MAX: f32 = 1.5;

/// The relations of up to `N` columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Relation<const N: usize> {
    columns: usize,
    rows: f32,
    /// The column that is given its ridge next.
    turn: usize,
    inverse: [[f32; N]; N],
}

impl<const N: usize> Relation<N> {
    /// Of so many columns, at most `N`, of which nothing is known.
    #[must_use]
    pub fn new(columns: usize) -> Self {
        let mut inverse = [[0.0; N]; N];
        (0..N).for_each(|at| inverse[at][at] = 1.0 / RIDGE);
        Relation { columns: columns.min(N), rows: 0.0, turn: 0, inverse }
    }

    /// The row times the inverse.
    fn product(&self, row: &[f32; N]) -> [f32; N] {
        let mut product = [0.0; N];
        for (line, value) in self.inverse[..self.columns].iter().zip(row).filter(|(_, value)| **value != 0.0) {
            product[..self.columns].iter_mut().zip(line).for_each(|(sum, cell)| *sum += value * cell);
        }
        product
    }

    /// Puts the best guess from all other columns where a value is missing. Exact where one is, good where few are.
    pub fn fill(&self, row: &mut [f32; N], is_missing: impl Fn(usize) -> bool) {
        // Gauss-Seidel on the rows of P z = 0 that are missing.
        for at in (0..2 * self.columns).map(|turn| turn % self.columns).filter(|at| is_missing(*at)) {
            let line = &self.inverse[at];
            let others: f32 =
                line.iter().zip(row.iter()).map(|(cell, value)| cell * value).sum::<f32>() - line[at] * row[at];
            row[at] = -others / line[at];
        }
    }

    /// How far each column of a row, each about 0 with deviation 1, is from what the others say of it, in deviations.
    #[must_use]
    pub fn scores(&self, row: &[f32; N]) -> [f32; N] {
        let mut scores = self.product(row);
        let there = scores[..self.columns].iter_mut().enumerate();
        there.for_each(|(at, score)| *score /= libm::sqrtf(self.inverse[at][at]));
        scores
    }

    /// Learns a row.
    pub fn learn(&mut self, row: &[f32; N]) {
        let columns = self.columns;
        let length = libm::sqrtf(row[..columns].iter().map(|value| value * value).sum::<f32>() / columns.max(1) as f32);
        if !length.is_finite() {
            return;
        }
        let down = LENGTH_MAX / length.max(LENGTH_MAX);
        let row = row.map(|value| down * value);
        self.rows = (self.rows + 1.0).min(ROWS_MAX);
        let weight = 1.0 / self.rows.max(ROWS_MIN);
        let product = self.product(&row);
        let along: f32 = product[..columns].iter().zip(&row).map(|(one, other)| one * other).sum();
        self.take(&product, weight / (1.0 - weight + weight * along), 1.0 / (1.0 - weight));
        if columns > 0 {
            self.turn = (self.turn + 1) % columns;
            let ridge = weight * RIDGE * columns as f32;
            let line = self.inverse[self.turn];
            self.take(&line, ridge / (1.0 + ridge * line[self.turn]), 1.0);
        }
        // Rounding alone could bring it there.
        if (0..columns).any(|at| !self.inverse[at][at].is_finite() || self.inverse[at][at] <= 0.0) {
            *self = Self::new(columns);
        }
    }

    /// Takes a rank-one matrix off the inverse, and makes it so many times what it is then. Both are symmetric to the last bit.
    fn take(&mut self, vector: &[f32; N], part: f32, times: f32) {
        for (line, one) in self.inverse[..self.columns].iter_mut().zip(vector) {
            let cells = line[..self.columns].iter_mut().zip(vector);
            cells.for_each(|(cell, other)| *cell = times * (*cell - part * (one * other)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence as good as random, with deviation 1.
    fn noise(step: u32, column: u32) -> f32 {
        let mixed = (step * 64 + column).wrapping_mul(0x9e37_79b9);
        let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85eb_ca6b);
        1.732 * (((mixed ^ (mixed >> 13)) >> 8) as f32 / (1 << 23) as f32 - 1.0)
    }

    fn learnt(rows: u32) -> Relation<8> {
        let mut relation = Relation::new(3);
        (0..rows).for_each(|step| relation.learn(&row(step)));
        relation
    }

    /// Two columns that go together, and one by itself.
    fn row(step: u32) -> [f32; 8] {
        let (shared, other) = (noise(step, 0), noise(step, 1));
        [shared, 0.95 * shared + 0.3 * noise(step, 2), other, 0.0, 0.0, 0.0, 0.0, 0.0]
    }

    #[test]
    fn a_column_that_leaves_its_relation_is_found_within_its_own_bounds() {
        let relation = learnt(2_000);
        let (with, against) = ([1.5, 1.5, 0.0], [1.5, -1.5, 0.0]);
        let scores = |part: [f32; 3]| relation.scores(&core::array::from_fn(|at| part.get(at).copied().unwrap_or(0.0)));
        assert!(scores(with).iter().all(|score| score.abs() < 1.2), "{:?}", scores(with));
        assert!(scores(against)[0] > 3.0 && scores(against)[1] < -3.0, "{:?}", scores(against));
        assert!((scores([0.0, 0.0, 3.0])[2] - 3.0 / libm::sqrtf(1.0 + RIDGE)).abs() < 0.3);
    }

    #[test]
    fn what_is_missing_is_guessed_from_what_it_goes_together_with() {
        let relation = learnt(2_000);
        let mut row = [2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        relation.fill(&mut row, |at| at == 1);
        assert!(row[0] == 2.0 && row[2] == 1.0 && (1.3..2.0).contains(&row[1]), "{row:?}");
        assert!(relation.scores(&row)[1].abs() < 1e-3);
    }

    #[test]
    fn it_is_the_inverse_of_covariance_and_ridge_also_when_much_was_forgotten() {
        for rows in [3_000, 60_000] {
            let relation = learnt(rows);
            let covariance = [[1.0 + RIDGE, 0.95, 0.0], [0.95, 0.9925 + RIDGE, 0.0], [0.0, 0.0, 1.0 + RIDGE]];
            for (at, line) in covariance.iter().enumerate() {
                let product: [f32; 3] =
                    core::array::from_fn(|to| (0..3).map(|k| line[k] * relation.inverse[k][to]).sum());
                for (to, value) in product.iter().enumerate() {
                    assert!(
                        (value - f32::from(u8::from(at == to))).abs() < 0.25,
                        "{rows} rows: {at} {to}: {product:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn neither_outliers_nor_constants_nor_nonsense_break_it() {
        let mut relation = learnt(500);
        let before = relation.scores(&row(7_777));
        (0..20).for_each(|_| relation.learn(&[1e5, -1e5, 1e5, 0.0, 0.0, 0.0, 0.0, 0.0]));
        let after = relation.scores(&row(7_777));
        assert!(before.iter().zip(&after).all(|(one, other)| (one - other).abs() < 0.5), "{before:?} {after:?}");
        let same = relation.clone();
        relation.learn(&[f32::NAN; 8]);
        assert_eq!(relation, same);
        (0..200_000).for_each(|_| relation.learn(&[0.0; 8]));
        for (at, line) in relation.inverse[..3].iter().enumerate() {
            assert!(line[at] > 0.5 / RIDGE && line[at] < 2.0 / RIDGE, "{:?}", relation.inverse);
            assert!((0..3).all(|to| line[to] == relation.inverse[to][at]), "{:?}", relation.inverse);
        }
    }
}
