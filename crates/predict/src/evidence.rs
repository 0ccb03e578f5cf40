//! Evidence of failure with a bound on false alarms: the e-detector for a bounded conditional mean.
//!
//! Harm u in 0 to 1 is seen once a window. While the component is healthy its conditional mean, given all the past, is at most a tolerance m.
//! For each of a few bets lambda = c/m the Shiryaev-Roberts recursion R <- (R + 1)(1 + lambda (u - m)) then grows by at most one a window in
//! the mean, whatever the dependence between windows, and so does the mean of all bets: an alarm when that passes 1/alpha comes at most every
//! 1/alpha windows in the mean. (J. Shin, A. Ramdas, A. Rinaldo, E-detectors: a nonparametric framework for sequential change detection, New
//! England Journal of Statistics in Data Science, 2023.) The bound is exactly as good as m.

/// Bets as parts of the largest that keeps every factor positive.
const BETS: [f32; 5] = [0.1, 0.25, 0.5, 0.75, 0.95];
/// Evidence beyond this counts as this: products do not overflow.
const EVIDENCE_MAX: f32 = 1e30;

/// Evidence gathered so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evidence {
    bets: [f32; BETS.len()],
}

impl Evidence {
    /// Sees the harm of a window, at a tolerance of 0 to 1, both excluded.
    pub fn see(&mut self, harm: f32, tolerance: f32) {
        let tolerance = tolerance.clamp(1e-3, 0.999);
        let harm = if harm.is_finite() { harm.clamp(0.0, 1.0) } else { return };
        for (evidence, bet) in self.bets.iter_mut().zip(BETS) {
            *evidence = ((*evidence + 1.0) * (1.0 + bet / tolerance * (harm - tolerance))).min(EVIDENCE_MAX);
        }
    }

    /// How much there is: an alarm is due where it passes 1/alpha.
    #[must_use]
    pub fn value(&self) -> f32 {
        self.bets.iter().sum::<f32>() / BETS.len() as f32
    }

    /// Forgets everything, as after an alarm.
    pub fn clear(&mut self) {
        self.bets = [0.0; BETS.len()];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uniform in 0 to 1, of a 64-bit state (Steele et al., SplitMix64).
    fn uniform(state: &mut u64) -> f32 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    }

    fn mean_run(harm: impl Fn(&mut u64, bool) -> (f32, bool), tolerance: f32, limit: f32) -> f32 {
        let (mut evidence, mut state, mut alarms, mut was) = (Evidence::default(), 7, 0, false);
        const WINDOWS: u32 = 1_000_000;
        for _ in 0..WINDOWS {
            let (seen, is) = harm(&mut state, was);
            was = is;
            evidence.see(seen, tolerance);
            if evidence.value() >= limit {
                alarms += 1;
                evidence.clear();
            }
        }
        WINDOWS as f32 / alarms.max(1) as f32
    }

    #[test]
    fn false_alarms_are_as_rare_as_promised_where_harm_is_at_the_tolerance() {
        let bernoulli = |state: &mut u64, _| (f32::from(u8::from(uniform(state) < 0.1)), false);
        let run = mean_run(bernoulli, 0.1, 1_000.0);
        assert!((1_000.0..3_000.0).contains(&run), "{run}");
        // Harm that comes in runs is a heavier tail at the same conditional mean bound: what holds is the bound on that mean.
        let sticky = |state: &mut u64, was| {
            let is = uniform(state) < if was { 0.1 } else { 0.02 };
            (f32::from(u8::from(is)), is)
        };
        assert!(mean_run(sticky, 0.1, 1_000.0) > 1_000.0);
    }

    #[test]
    fn harm_beyond_the_tolerance_is_found_soon_and_the_sooner_the_greater_it_is() {
        let windows = |harm| {
            let mut evidence = Evidence::default();
            (1..10_000).find(|_| {
                evidence.see(harm, 0.1);
                evidence.value() >= 2.6e6
            })
        };
        let found = (windows(1.0), windows(0.3), windows(0.1));
        assert!(matches!(found, (Some(5..=8), Some(12..=20), None)), "{found:?}");
    }

    #[test]
    fn neither_nonsense_nor_certainty_breaks_it() {
        let mut evidence = Evidence::default();
        evidence.see(f32::NAN, 0.1);
        assert_eq!(evidence, Evidence::default());
        (0..1_000).for_each(|_| evidence.see(9.0, 0.0));
        assert!(evidence.value().is_finite() && evidence.value() > 1e6);
        evidence.clear();
        assert_eq!(evidence.value(), 0.0);
    }
}
