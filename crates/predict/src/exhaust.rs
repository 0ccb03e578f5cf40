//! When a bounded resource will be used up.
//!
//! A few points of its share of the bound are kept, evenly spread over the time since it was first seen or the last of it, and the median
//! slope of all their pairs is its drift (Theil-Sen: P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 63, 1968): a step, an
//! outlier or a saw-tooth does not make a trend. A drift that grows from one half of the points to the next goes on growing: most leaks do, as
//! what leaks is asked for more and more. Time to the bound is that of a Wiener process with that drift (first passage; the second term in
//! the log domain, where the exponential alone would overflow).

use crate::math::normal;

/// Points that are kept.
const POINTS: usize = 16;
const PAIRS: usize = POINTS * (POINTS - 1) / 2;
/// A forecast is made of at least so many.
const POINTS_MIN: usize = 8;
/// Windows between two estimates of the slope.
const EVERY: u32 = 8;
/// Windows that a reading may be waited for: beyond it what is known is old.
const WAITED_MAX: u32 = 64;
/// A slope that is so many times as great in the second half of the points as in the first grows.
const GROWS_FROM: f32 = 1.25;

/// The share of one resource over time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exhaustion {
    /// Greatest distance of two points, in windows.
    stride_max: u32,
    points: [f32; POINTS],
    count: u8,
    /// Windows between two points, and since the last.
    stride: u32,
    since: u32,
    /// Sum of what came since the last point.
    sum: f32,
    now: f32,
    /// Slopes per window: 10, 50 and 90 of a hundred pairs are below.
    slopes: [f32; 3],
    /// The slope now, and how much it grows per window.
    pace: f32,
    growth: f32,
    /// What was read last, and windows since.
    read: f32,
    waited: u32,
    /// Deviation of one window's step from the drift.
    deviation: f32,
    until_next: u32,
    is_new: bool,
    known: bool,
}

/// When a resource will be used up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// Share of the bound in use now.
    pub share: f32,
    /// Windows until the bound is reached, at the median drift; infinite if it does not grow.
    pub windows: f32,
    /// The same at the fastest and slowest drift that is plausible: an interval of 80 %.
    pub between: (f32, f32),
}

impl Exhaustion {
    /// Of which the last windows are looked at, sixteen times as many as this.
    #[must_use]
    pub const fn new(stride_max: u32) -> Self {
        Exhaustion {
            stride_max,
            points: [0.0; POINTS],
            count: 0,
            stride: 1,
            since: 0,
            sum: 0.0,
            now: 0.0,
            slopes: [0.0; 3],
            pace: 0.0,
            growth: 0.0,
            read: f32::NAN,
            waited: 0,
            deviation: 0.0,
            until_next: 0,
            is_new: false,
            known: false,
        }
    }

    /// A window has passed. Takes the share of the bound that is used, 1 is the bound, if it was read in it: what is read once in several windows
    /// has gone evenly from one reading to the next.
    pub fn pass(&mut self, share: Option<f32>) {
        let Some(share) = share.filter(|share| share.is_finite()) else {
            self.waited = (self.waited + 1).min(WAITED_MAX);
            return;
        };
        let (windows, before) = (self.waited + 1, if self.read.is_finite() { self.read } else { share });
        (1..=windows).for_each(|window| self.see(before + (share - before) * window as f32 / windows as f32));
        (self.read, self.waited) = (share, 0);
    }

    fn see(&mut self, share: f32) {
        self.now = share;
        self.sum += share;
        self.since += 1;
        if self.since == self.stride {
            self.keep(self.sum / self.stride as f32);
            (self.sum, self.since) = (0.0, 0);
            self.is_new = true;
        }
        self.until_next = self.until_next.saturating_sub(1);
        // Without a new point there is nothing new to be said.
        if self.until_next == 0 && self.is_new && usize::from(self.count) >= POINTS_MIN {
            (self.until_next, self.is_new) = (EVERY, false);
            self.estimate();
        }
    }

    fn keep(&mut self, point: f32) {
        if usize::from(self.count) == POINTS {
            self.make_room();
        }
        self.points[usize::from(self.count)] = point;
        self.count += 1;
    }

    fn make_room(&mut self) {
        if self.stride.saturating_mul(2) > self.stride_max {
            self.points.rotate_left(1);
            self.count -= 1;
            return;
        }
        // Every two become one: half as many, twice as far apart.
        for at in 0..POINTS / 2 {
            self.points[at] = (self.points[2 * at] + self.points[2 * at + 1]) / 2.0;
        }
        (self.count, self.stride) = ((POINTS / 2) as u8, self.stride * 2);
    }

    fn estimate(&mut self) {
        let points = &self.points[..usize::from(self.count)];
        self.known = true;
        if points.iter().all(|point| *point == points[0]) {
            (self.slopes, self.deviation, self.pace, self.growth) = ([0.0; 3], 0.0, 0.0, 0.0);
            return;
        }
        let stride = self.stride as f32;
        self.slopes = slopes(points, stride);
        let half = points.len() / 2;
        let [first, second] = [&points[..half], &points[points.len() - half..]].map(|half| slopes(half, stride)[1]);
        let apart = (points.len() - half) as f32 * stride;
        (self.pace, self.growth) = if first >= 0.0 && second > GROWS_FROM * first {
            let growth = (second - first) / apart;
            (second + growth * half as f32 * stride / 2.0, growth)
        } else {
            (self.slopes[1], 0.0)
        };
        let steps = points.windows(2).map(|two| two[1] - two[0] - self.slopes[1] * stride);
        let squares: f32 = steps.map(|step| step * step).sum();
        // A step of so many windows has a variance of so many times that of one.
        self.deviation = libm::sqrtf(squares / ((points.len() - 1) as f32 * stride));
    }

    /// When the bound will be reached, once there is enough to tell.
    #[must_use]
    pub fn forecast(&self) -> Option<Forecast> {
        if !self.known {
            return None;
        }
        let now = self.now();
        let left = (1.0 - now).max(0.0);
        let at = |slope: f32| match self.growth {
            growth if growth > 0.0 => (libm::sqrtf(slope * slope + 2.0 * growth * left) - slope) / growth,
            _ if slope > 0.0 => left / slope,
            _ => f32::INFINITY,
        };
        let [slow, median, fast] = self.slopes;
        let windows = at(self.pace);
        let between =
            (at(self.pace + (fast - median)).min(windows), at((self.pace - (median - slow)).max(0.0)).max(windows));
        Some(Forecast { share: now, windows, between })
    }

    /// The share now, as far as can be told without a new reading.
    fn now(&self) -> f32 {
        self.now + self.pace.max(0.0) * self.waited as f32
    }

    /// The probability that the bound is reached within so many windows.
    #[must_use]
    pub fn within(&self, windows: f32) -> f32 {
        if !self.known {
            return 0.0;
        }
        let left = 1.0 - self.now();
        if left <= 0.0 {
            return 1.0;
        }
        let [slow, _, fast] = self.slopes;
        let drift = self.pace + self.growth * windows / 2.0;
        // What is not known of the drift: an interval of 80 % of a normal distribution is 2.563 deviations wide.
        let unsure = (fast - slow).max(0.0) / 2.563 * windows;
        let spread = libm::sqrtf(self.deviation * self.deviation * windows + unsure * unsure).max(1e-6);
        let variance = spread * spread / windows;
        let direct = normal((drift * windows - left) / spread);
        let beyond = normal((-left - drift * windows) / spread);
        let reflected =
            if beyond > 0.0 { libm::expf((2.0 * drift * left / variance + libm::logf(beyond)).min(0.0)) } else { 0.0 };
        (direct + reflected).clamp(0.0, 1.0)
    }

    /// Whether it grows, and not by chance: nine of ten pairs of points say so.
    #[must_use]
    pub fn grows(&self) -> bool {
        self.known && self.slopes[0] > 0.0
    }
}

/// Slopes of all pairs of points: 10, 50 and 90 of a hundred are below.
fn slopes(points: &[f32], stride: f32) -> [f32; 3] {
    let mut slopes = [0.0_f32; PAIRS];
    let mut pairs = 0;
    for (at, one) in points.iter().enumerate() {
        for (apart, other) in points[at + 1..].iter().enumerate() {
            slopes[pairs] = (other - one) / ((apart + 1) as f32 * stride);
            pairs += 1;
        }
    }
    let slopes = &mut slopes[..pairs];
    [10, 50, 90].map(|percent| {
        let at = pairs.saturating_sub(1) * percent / 100;
        *slopes.select_nth_unstable_by(at, f32::total_cmp).1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(windows: u32, share: impl Fn(u32) -> f32) -> Exhaustion {
        let mut resource = Exhaustion::new(1_024);
        (0..windows).for_each(|window| resource.see(share(window)));
        resource
    }

    fn wobble(window: u32) -> f32 {
        libm::sinf(window as f32 * 1.7) * 0.01
    }

    #[test]
    fn a_leak_is_forecast_at_half_its_life() {
        for life in [100.0, 400.0, 3_000.0] {
            let resource = after((life / 2.0) as u32, |window| window as f32 / life + wobble(window));
            let forecast = resource.forecast().expect("there is enough");
            assert!((forecast.windows / (life / 2.0) - 1.0).abs() < 0.15, "{life}: {forecast:?}");
            assert!(forecast.between.0 <= forecast.windows && forecast.windows <= forecast.between.1);
            assert!(resource.grows());
            assert!(resource.within(life / 4.0) < 0.1 && resource.within(life) > 0.9, "{life}: {resource:?}");
        }
    }

    #[test]
    fn a_leak_that_grows_is_forecast_as_one() {
        // A quadratic one, read every fifth window.
        let mut resource = Exhaustion::new(512);
        let share = |window: u32| (window as f32 / 120.0).powi(2);
        (0..60).for_each(|window| resource.pass((window % 5 == 0).then(|| share(window))));
        let forecast = resource.forecast().expect("there is enough");
        assert!((forecast.windows / 60.0 - 1.0).abs() < 0.2, "{forecast:?}");
        assert!(forecast.between.0 <= forecast.windows && forecast.windows <= forecast.between.1);
    }

    #[test]
    fn what_is_read_seldom_is_no_staircase() {
        let mut resource = Exhaustion::new(4);
        (0..200).for_each(|window| resource.pass((window % 10 == 0).then(|| window as f32 / 400.0)));
        let forecast = resource.forecast().expect("there is enough");
        assert!((forecast.windows / 200.0 - 1.0).abs() < 0.1, "{forecast:?}");
        resource.pass(Some(f32::NAN));
        assert!(resource.forecast().is_some_and(|forecast| forecast.share.is_finite()));
    }

    #[test]
    fn a_short_memory_sees_a_leak_that_began_lately() {
        let mut resource = Exhaustion::new(2);
        (0..1_000).for_each(|_| resource.see(0.2));
        (0..40).for_each(|window| resource.see(0.2 + window as f32 * 0.01));
        let forecast = resource.forecast().expect("there is enough");
        assert!(resource.grows() && (forecast.windows / 41.0 - 1.0).abs() < 0.15, "{forecast:?}");
    }

    #[test]
    fn what_does_not_grow_is_never_used_up() {
        for share in [|window| 0.6 + wobble(window), |window| if window > 150 { 0.9 } else { 0.5 }] {
            let resource = after(1_000, share);
            assert!(!resource.grows());
            assert!(resource.within(10.0) < 0.01, "{resource:?}");
        }
    }

    #[test]
    fn what_is_used_up_is_and_nothing_is_said_too_early() {
        assert_eq!(after(3, |_| 0.99).forecast(), None);
        assert_eq!(after(40, |_| 1.0).within(1.0), 1.0);
        let mut resource = after(40, |_| 0.5);
        resource.pass(None);
        assert!(resource.forecast().expect("there is enough").share == 0.5);
    }
}
