//! Half-space trees (S. C. Tan, K. M. Ting, T. F. Liu, Fast anomaly detection for streaming data, IJCAI 2011): 25 trees of depth 8, windows of
//! 250 rows, on columns scaled to what the burn-in had.

use super::baselines::Scorer;
use crate::common::rng::Rng;

const TREES: usize = 25;
const DEPTH: usize = 8;
const WINDOW: usize = 250;
/// A node with fewer rows is not gone further into, as part of the window.
const SIZE_LIMIT: f32 = 0.1;

struct Tree {
    /// Column and place of the cut of each inner node, as a heap.
    cuts: Vec<(usize, f32)>,
    /// Rows of the last window and of this one in each node.
    masses: Vec<(f32, f32)>,
}

/// The trees.
pub(crate) struct HalfSpaceTrees {
    burn_in: usize,
    rows: usize,
    ranges: Vec<(f32, f32)>,
    kept: Vec<Vec<f32>>,
    trees: Vec<Tree>,
    in_window: usize,
    /// Rows of the window that scores are reckoned from.
    reference: f32,
    rng: Rng,
}

impl HalfSpaceTrees {
    /// Of so many columns; the seed decides the cuts.
    pub(crate) fn new(columns: usize, burn_in: usize, seed: u64) -> Self {
        HalfSpaceTrees {
            burn_in,
            rows: 0,
            ranges: vec![(f32::INFINITY, f32::NEG_INFINITY); columns],
            kept: Vec::new(),
            trees: Vec::new(),
            in_window: 0,
            reference: 0.0,
            rng: Rng::new(seed, 0),
        }
    }

    fn plant(&mut self) {
        let columns: Vec<usize> = (0..self.ranges.len()).filter(|at| self.ranges[*at].0 < self.ranges[*at].1).collect();
        for _ in 0..TREES {
            // The work range of each column is wider than its values, about a point within them.
            let ranges: Vec<(f32, f32)> = (0..self.ranges.len())
                .map(|_| {
                    let centre = self.uniform();
                    let half = 2.0 * centre.max(1.0 - centre);
                    (centre - half, centre + half)
                })
                .collect();
            let mut tree = Tree { cuts: vec![(0, 0.0); (1 << DEPTH) - 1], masses: vec![(0.0, 0.0); (2 << DEPTH) - 1] };
            if !columns.is_empty() {
                self.cut(&mut tree, 0, ranges, &columns);
            }
            self.trees.push(tree);
        }
        for row in std::mem::take(&mut self.kept) {
            let row = self.scaled(&row);
            self.trees.iter_mut().for_each(|tree| tree.add(&row));
        }
        self.turn(self.burn_in);
    }

    fn cut(&mut self, tree: &mut Tree, node: usize, ranges: Vec<(f32, f32)>, columns: &[usize]) {
        if node >= tree.cuts.len() {
            return;
        }
        let column = columns[self.rng.below(columns.len() as u64) as usize];
        let (low, high) = ranges[column];
        let middle = (low + high) / 2.0;
        tree.cuts[node] = (column, middle);
        let (mut left, mut right) = (ranges.clone(), ranges);
        (left[column].1, right[column].0) = (middle, middle);
        self.cut(tree, 2 * node + 1, left, columns);
        self.cut(tree, 2 * node + 2, right, columns);
    }

    fn uniform(&mut self) -> f32 {
        self.rng.below(1 << 24) as f32 / (1 << 24) as f32
    }

    /// Each column as a part of the range that the burn-in had; what is missing is in its middle.
    fn scaled(&self, row: &[f32]) -> Vec<f32> {
        let scaled = row.iter().zip(&self.ranges).map(|(value, (low, high))| {
            if value.is_finite() && low < high { (value - low) / (high - low) } else { 0.5 }
        });
        scaled.collect()
    }

    /// The window that was counted is the one that scores come from now.
    fn turn(&mut self, rows: usize) {
        self.reference = rows as f32;
        self.in_window = 0;
        self.trees.iter_mut().flat_map(|tree| &mut tree.masses).for_each(|mass| *mass = (mass.1, 0.0));
    }
}

impl Tree {
    fn path(&self, row: &[f32]) -> [usize; DEPTH + 1] {
        let mut path = [0; DEPTH + 1];
        for depth in 0..DEPTH {
            let (column, cut) = self.cuts[path[depth]];
            path[depth + 1] = 2 * path[depth] + if row[column] < cut { 1 } else { 2 };
        }
        path
    }

    fn add(&mut self, row: &[f32]) {
        for node in self.path(row) {
            self.masses[node].1 += 1.0;
        }
    }

    /// Rows in the node where the row comes to lie, weighted by depth: the fewer, the more unusual.
    fn mass(&self, row: &[f32], limit: f32) -> f32 {
        let path = self.path(row);
        let depth = path.iter().position(|node| self.masses[*node].0 < limit).unwrap_or(DEPTH);
        self.masses[path[depth]].0 * (1_u32 << depth) as f32
    }
}

impl Scorer for HalfSpaceTrees {
    fn step(&mut self, row: &[f32]) -> Option<f32> {
        self.rows += 1;
        if self.rows <= self.burn_in {
            for ((low, high), value) in self.ranges.iter_mut().zip(row).filter(|(_, value)| value.is_finite()) {
                (*low, *high) = (low.min(*value), high.max(*value));
            }
            self.kept.push(row.to_vec());
            if self.rows == self.burn_in {
                self.plant();
            }
            return None;
        }
        let row = self.scaled(row);
        let limit = SIZE_LIMIT * self.reference;
        let mass: f32 = self.trees.iter().map(|tree| tree.mass(&row, limit)).sum();
        self.trees.iter_mut().for_each(|tree| tree.add(&row));
        self.in_window += 1;
        if self.in_window == WINDOW {
            self.turn(WINDOW);
        }
        Some(-mass / self.reference.max(1.0))
    }
}
