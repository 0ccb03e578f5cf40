//! Random numbers that mean the same for ever: xoshiro256** (Blackman, Vigna 2018), seeded by SplitMix64.

use warmswap_core::Nanos;

/// A generator.
#[derive(Clone, Debug)]
pub(crate) struct Random([u64; 4]);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        Random([next(), next(), next(), next()])
    }

    pub(crate) fn next(&mut self) -> u64 {
        let [s0, s1, s2, s3] = &mut self.0;
        let result = s1.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *s1 << 17;
        *s2 ^= *s0;
        *s3 ^= *s1;
        *s1 ^= *s2;
        *s0 ^= *s3;
        *s2 ^= shifted;
        *s3 = s3.rotate_left(45);
        result
    }

    /// A number below `bound`, which must not be zero.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // The bias of a product is below 2^-32 for the bounds used here.
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from `least` to `most`, both included.
    pub(crate) fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    /// True in `percent` of a hundred cases.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// True in one of so many cases.
    pub(crate) fn one_in(&mut self, cases: u64) -> bool {
        self.below(cases) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A span whose logarithm is spread evenly between two spans.
    pub(crate) fn span(&mut self, least: Nanos, most: Nanos) -> Nanos {
        let (least, most) = (least.0.max(1), most.0.max(1));
        let octaves = u64::from(most.ilog2() - least.ilog2());
        let octave = self.below(octaves + 1);
        let from = (least << octave).min(most);
        Nanos(self.between(from, (from * 2).min(most.max(from))))
    }

    /// A span around a mean: from a quarter of it to seven quarters, and now and then much longer.
    pub(crate) fn around(&mut self, mean: Nanos) -> Nanos {
        let mean = mean.0.max(4);
        let longer = if self.one_in(64) { 8 } else { 1 };
        Nanos((mean / 4 + self.below(mean * 3 / 2)) * longer)
    }
}
