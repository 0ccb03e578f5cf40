//! Robust location and scale of one quantity, learnt as it comes: what "as usual" is for it.
//!
//! Mean and variance are exponentially weighted. Innovations are clipped at three standard deviations (Huber's proposal: P. J. Huber, Robust
//! Estimation of a Location Parameter, 1964), so that a few outliers move neither; who learns decides when. Until [`Scale::START`] values were
//! seen, and for as long as the memory is without end, every value weighs the same and none is clipped.

/// Innovations beyond so many standard deviations count as that many.
const CLIP: f32 = 3.0;
/// Beyond so many values f32 cannot count one more.
const COUNT_MAX: f32 = 1e6;
/// Values beyond this are none: the squares of what lies between two of them have to be numbers.
const VALUE_MAX: f32 = 1e15;
/// Variances of values within that, with room for rounding.
const VARIANCE_MAX: f32 = 8.0 * VALUE_MAX * VALUE_MAX;
/// Scores beyond this count as this: their sixth powers have to be numbers.
pub const Z_MAX: f32 = 1e5;

/// Location and scale of one quantity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scale {
    mean: f32,
    variance: f32,
    /// Values learnt, up to a bound: beyond it every value weighs as one of that many.
    count: f32,
}

impl Scale {
    /// Values of which the first estimate is made: they are not clipped.
    pub const START: f32 = 8.0;

    /// What is expected.
    #[must_use]
    pub fn mean(&self) -> f32 {
        self.mean
    }

    /// The standard deviation, at least `floor`.
    #[must_use]
    pub fn deviation(&self, floor: f32) -> f32 {
        libm::sqrtf(self.variance.max(0.0)).max(floor)
    }

    /// Number of values that the estimate is worth.
    #[must_use]
    pub fn count(&self) -> f32 {
        self.count
    }

    /// How many standard deviations a value is from what is expected, none before the first.
    #[must_use]
    pub fn score(&self, value: f32, floor: f32) -> f32 {
        if self.count == 0.0 {
            return 0.0;
        }
        ((value - self.mean) / self.deviation(floor)).clamp(-Z_MAX, Z_MAX)
    }

    /// Learns a value, which weighs as one of `memory`, or as one of all there were if that is infinite. Before anything was learnt it
    /// should be.
    pub fn learn(&mut self, value: f32, memory: f32, floor: f32) {
        if value.is_nan() || value.abs() > VALUE_MAX {
            return;
        }
        self.count = (self.count + 1.0).min(memory.max(1.0)).min(COUNT_MAX);
        let weight = if memory.is_finite() { 1.0 / memory.max(1.0) } else { 1.0 / self.count };
        let mut innovation = value - self.mean;
        if memory.is_finite() && self.count > Self::START {
            let most = CLIP * self.deviation(floor);
            innovation = innovation.clamp(-most, most);
        }
        self.mean += weight * innovation;
        // West, Updating Mean and Variance Estimates, CACM 22(9), 1979, with weights that decay.
        self.variance = (1.0 - weight) * (self.variance + weight * innovation * innovation);
    }

    /// Its three numbers, for storage.
    #[must_use]
    pub fn parts(&self) -> [f32; 3] {
        [self.mean, self.variance, self.count]
    }

    /// Of its three numbers; what cannot be is nothing learnt.
    #[must_use]
    pub fn from_parts([mean, variance, count]: [f32; 3]) -> Self {
        let is_mean = mean.abs() <= 2.0 * VALUE_MAX;
        if is_mean && (0.0..=VARIANCE_MAX).contains(&variance) && (0.0..=COUNT_MAX).contains(&count) {
            Scale { mean, variance, count }
        } else {
            Scale::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence as good as random, between -1 and 1.
    fn noise(step: u32) -> f32 {
        let mixed = step.wrapping_mul(0x9e37_79b9) ^ (step.wrapping_mul(0x85eb_ca6b) >> 13);
        (mixed.wrapping_mul(0xc2b2_ae35) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    #[test]
    fn mean_and_deviation_are_those_of_the_values() {
        let mut scale = Scale::default();
        (0..2_000).for_each(|step| scale.learn(5.0 + noise(step), f32::INFINITY, 0.0));
        // A uniform distribution of width 2 has a deviation of 2/sqrt(12).
        assert!((scale.mean() - 5.0).abs() < 0.05, "{scale:?}");
        assert!((scale.deviation(0.0) - 0.577).abs() < 0.03, "{scale:?}");
        assert!((scale.score(6.154, 0.0) - 2.0).abs() < 0.2);
        assert_eq!(scale.score(1e9, 0.0), Z_MAX);
    }

    #[test]
    fn outliers_move_it_little_and_a_new_level_in_the_end() {
        let mut scale = Scale::default();
        (0..500).for_each(|step| scale.learn(noise(step), f32::INFINITY, 0.01));
        let before = scale;
        (0..5).for_each(|_| scale.learn(1_000.0, 500.0, 0.01));
        assert!(scale.mean() - before.mean() < 0.05, "{scale:?}");
        (0..5_000).for_each(|step| scale.learn(3.0 + noise(step), 500.0, 0.01));
        assert!((scale.mean() - 3.0).abs() < 0.2, "{scale:?}");
    }

    #[test]
    fn a_constant_has_the_floor_as_scale_and_nonsense_teaches_nothing() {
        let mut scale = Scale::default();
        assert_eq!(scale.score(7.0, 0.1), 0.0, "nothing is known yet");
        (0..50).for_each(|_| scale.learn(2.0, f32::INFINITY, 0.1));
        assert!((scale.score(2.2, 0.1) - 2.0).abs() < 1e-3);
        let before = scale;
        scale.learn(f32::NAN, 100.0, 0.1);
        scale.learn(f32::INFINITY, 100.0, 0.1);
        assert_eq!(scale, before);
        assert_eq!(Scale::from_parts(scale.parts()), scale);
        assert_eq!(Scale::from_parts([0.0, f32::NAN, 1.0]), Scale::default());
    }
}
