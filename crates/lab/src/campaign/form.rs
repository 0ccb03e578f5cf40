//! How a fault grows: a level from 0, nothing, to 1, collapse, over the time that it is given. Every fault ends in collapse, so that the
//! guest sees a failure; what differs is the way there. The forms are those of "Fail-Slow at Scale" (Gunawi et al., FAST 2018, section 3).

use crate::common::rng::Rng;

/// A way to collapse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Straight up.
    Ramp,
    /// At once to a part of it, which stays, and collapse in the last fifth.
    Step,
    /// On and off by chance, worse each time.
    OnOff,
    /// Off but for a part of each period, worse each time.
    Periodic,
    /// At once: there is nothing in between.
    Sudden,
}

impl Form {
    /// Every form.
    const ALL: [Form; 5] = [Form::Ramp, Form::Step, Form::OnOff, Form::Periodic, Form::Sudden];

    /// The word in plans and labels.
    pub(super) fn name(self) -> &'static str {
        match self {
            Form::Ramp => "ramp",
            Form::Step => "step",
            Form::OnOff => "onoff",
            Form::Periodic => "periodic",
            Form::Sudden => "sudden",
        }
    }

    /// The form of that name.
    pub(super) fn from_name(name: &str) -> Option<Form> {
        Form::ALL.into_iter().find(|form| form.name() == name)
    }
}

/// Pieces in which a fault is on or off.
const PIECES: usize = 20;
/// Periods of a periodic fault.
const PERIODS: f64 = 8.0;
/// Of each period, this part is bad.
const BAD: f64 = 0.4;
/// The last part of a step is the way from where it stayed to collapse.
const LAST: f64 = 0.8;

/// A form with what chance has made of it.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    form: Form,
    /// Where a step stays.
    plateau: f64,
    on: [bool; PIECES],
}

impl Shape {
    /// Draws what is left to chance.
    pub(super) fn new(form: Form, rng: &mut Rng) -> Self {
        let plateau = 0.30 + 0.01 * rng.below(20) as f64;
        let mut on = [true; PIECES];
        for at in 1..PIECES {
            // Markov: it stays what it was in two cases of three. What is begun is seen, and the end is bad.
            on[at] = if rng.percent(66) { on[at - 1] } else { !on[at - 1] };
        }
        on[PIECES - 2..].fill(true);
        Shape { form, plateau, on }
    }

    /// How bad it is after a part (0 to 1) of the time that it is given; before, nothing, and behind, collapse.
    pub(super) fn level(&self, part: f64) -> f64 {
        if part < 0.0 {
            return 0.0;
        }
        if part >= 1.0 {
            return 1.0;
        }
        // What has begun is there.
        let ramp = part.max(0.01);
        match self.form {
            Form::Ramp => ramp,
            Form::Step if part < LAST => self.plateau,
            Form::Step => self.plateau + (1.0 - self.plateau) * (part - LAST) / (1.0 - LAST),
            Form::OnOff => {
                if self.on[(part * PIECES as f64) as usize] {
                    ramp.max(self.plateau)
                } else {
                    0.0
                }
            }
            Form::Periodic => {
                if (part * PERIODS).fract() < BAD {
                    ramp.max(self.plateau)
                } else {
                    0.0
                }
            }
            Form::Sudden => 1.0,
        }
    }
}

/// From `good` at level 0 to `bad` at 1 in equal ratios.
pub(super) fn between(good: f64, bad: f64, level: f64) -> f64 {
    good * (bad / good).powf(level)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_begins_at_nothing_shows_at_once_and_ends_in_collapse() {
        for form in Form::ALL {
            assert_eq!(Form::from_name(form.name()), Some(form));
            for seed in 0..50 {
                let shape = Shape::new(form, &mut Rng::new(seed, 1));
                let levels: Vec<f64> = (0..1000).map(|at| shape.level(f64::from(at) / 1000.0)).collect();
                assert!(levels.iter().all(|level| (0.0..=1.0).contains(level)), "{form:?} {seed}");
                assert_eq!((shape.level(-0.1), shape.level(1.0)), (0.0, 1.0));
                assert!(levels[0] > 0.0, "{form:?} {seed}");
                let goes = levels.contains(&0.0);
                assert_eq!(goes, form == Form::Periodic || form == Form::OnOff && shape.on.contains(&false));
            }
        }
    }

    #[test]
    fn equal_steps_are_equal_ratios() {
        assert!((between(1.0, 100.0, 0.5) - 10.0).abs() < 1e-9);
        assert!((between(50.0, 1.0, 1.0) - 1.0).abs() < 1e-9);
    }
}
