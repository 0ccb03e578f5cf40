//! Which guest pages a device touches: a bottom-k sketch of fixed size that merges.
//!
//! Pages are hashed; the [`PAGES_KEPT`] smallest hashes are kept with the number of their touches. Which pages are kept depends on their
//! hashes alone, so the sketch of two streams is that of both together, and the density of the kept hashes tells how many pages there are
//! (Bar-Yossef et al., "Counting distinct elements in a data stream", RANDOM 2002). What is touched here was sampled, so pages were touched
//! that never came up: how many is told by how many came up once and twice (Chao, "Nonparametric estimation of the number of classes in a
//! population", Scand. J. Statist. 11, 1984).

/// Pages kept: a standard error of 1/√254, 6 %.
pub const PAGES_KEPT: usize = 256;

/// See the module. Sorted by hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    kept: [(u32, u16); PAGES_KEPT],
    len: usize,
}

impl Default for Pages {
    fn default() -> Self {
        Pages { kept: [(0, 0); PAGES_KEPT], len: 0 }
    }
}

impl Pages {
    /// Counts touches of a page by its number.
    pub fn touch(&mut self, page: u64) {
        self.add(hash(page), 1);
    }

    /// Adds what another stream touched.
    pub fn merge(&mut self, other: &Pages) {
        for &(hash, touches) in &other.kept[..other.len] {
            self.add(hash, touches);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    fn add(&mut self, hash: u32, touches: u16) {
        let at = match self.kept[..self.len].binary_search_by_key(&hash, |(hash, _)| *hash) {
            Ok(at) => {
                self.kept[at].1 = self.kept[at].1.saturating_add(touches);
                return;
            }
            Err(at) => at,
        };
        if at == PAGES_KEPT {
            return;
        }
        let end = self.len.min(PAGES_KEPT - 1);
        self.kept.copy_within(at..end, at + 1);
        self.kept[at] = (hash, touches);
        self.len = end + 1;
    }

    /// Pages touched by what was sampled and what was not. `None` without any, and while so few came up again that there may be any number
    /// of others.
    #[must_use]
    pub fn working_set(&self) -> Option<f64> {
        let kept = self.len as f64;
        let seen = match self.len {
            0 => return None,
            // All of them are kept.
            len if len < PAGES_KEPT => kept,
            _ => (kept - 1.0) * HASHES / (f64::from(self.kept[PAGES_KEPT - 1].0) + 1.0),
        };
        let times = |times: u16| self.kept[..self.len].iter().filter(|(_, touches)| *touches == times).count() as f64;
        let (once, twice) = (times(1), times(2));
        if once > 0.0 && kept - once < AGAIN_MIN {
            return None;
        }
        // The bias-corrected form, which exists without a page that came up twice.
        let unseen = once * (once - 1.0) / (2.0 * (twice + 1.0));
        Some(seen * (1.0 + unseen / kept))
    }

    /// Touches per page that was touched.
    #[must_use]
    pub fn reuse(&self) -> Option<f64> {
        let touches: f64 = self.kept[..self.len].iter().map(|(_, touches)| f64::from(*touches)).sum();
        (self.len > 0).then(|| touches / self.len as f64)
    }
}

/// Pages that must have come up again before the number of others is reckoned: its error is about one over the root of them.
const AGAIN_MIN: f64 = 5.0;

const HASHES: f64 = 4_294_967_296.0;

/// SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), cut to its upper half.
fn hash(page: u64) -> u32 {
    let mut z = page.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(pages: impl IntoIterator<Item = u64>) -> Pages {
        let mut sketch = Pages::default();
        pages.into_iter().for_each(|page| sketch.touch(page));
        sketch
    }

    #[test]
    fn every_page_that_came_up_often_is_counted_and_nothing_more() {
        let sketch = of((0..10).flat_map(|_| 0..200));
        assert_eq!((sketch.working_set(), sketch.reuse()), (Some(200.0), Some(10.0)));
        assert_eq!((Pages::default().working_set(), Pages::default().reuse()), (None, None));
    }

    #[test]
    fn many_pages_are_told_within_a_few_standard_errors() {
        for pages in [1_000_u64, 30_000, 1_000_000] {
            let told = of((0..5).flat_map(|_| 0..pages)).working_set().expect("there are some");
            assert!((told / pages as f64 - 1.0).abs() < 0.25, "{told} for {pages}");
        }
    }

    #[test]
    fn pages_that_never_came_up_are_reckoned_with() {
        // 2000 pages touched at random 2000 times: about 1264 come up.
        let mut random = 1_u64;
        let sketch = of((0..2_000).map(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % 2_000
        }));
        let told = sketch.working_set().expect("there are some");
        assert!((1_500.0..2_700.0).contains(&told), "{told}");
    }

    #[test]
    fn of_pages_that_hardly_ever_came_up_again_the_number_is_not_known() {
        let sketch = of((0..45).chain(0..4));
        assert_eq!((sketch.working_set(), sketch.reuse().map(|reuse| reuse > 1.0)), (None, Some(true)));
        assert!(of((0..45).chain(0..5)).working_set().is_some_and(|told| told > 100.0));
        assert_eq!(of([1, 2, 1, 2]).working_set(), Some(2.0), "all came up again");
    }

    proptest! {
        #[test]
        fn merging_is_seeing_both(one in proptest::collection::vec(0..2_000_u64, 0..600), two in proptest::collection::vec(0..2_000_u64, 0..600)) {
            let mut both = of(one.clone());
            both.merge(&of(two.clone()));
            let whole = of(one.into_iter().chain(two));
            // A page whose hash is dropped from one sketch may be kept in the whole only if it is not among the smallest of both.
            prop_assert_eq!(both.kept[..both.len].iter().map(|it| it.0).collect::<Vec<_>>(),
                whole.kept[..whole.len].iter().map(|it| it.0).collect::<Vec<_>>());
        }
    }
}
