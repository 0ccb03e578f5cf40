//! What `core` does not have.

/// The standard normal distribution function.
pub(crate) fn normal(value: f32) -> f32 {
    libm::erfcf(-value * core::f32::consts::FRAC_1_SQRT_2) / 2.0
}

/// Of log odds a probability.
pub(crate) fn logistic(logit: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-logit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_what_tables_say() {
        for (value, expected) in [(0.0, 0.5), (1.0, 0.841_345), (-1.96, 0.024_998), (4.0, 0.999_968)] {
            assert!((normal(value) - expected).abs() < 1e-5, "{value}");
        }
        assert_eq!((normal(-40.0), normal(40.0)), (0.0, 1.0));
        assert!((logistic(2.0) - 0.880_797).abs() < 1e-5 && logistic(-200.0) == 0.0);
    }
}
