//! The failure model of one device in the running program: windows in, what it says of the last one out.

use std::sync::OnceLock;

use warmswap_predict::{Alarm, Cause, Feature, Law, Model, Record, Trained, Verdict, load_trained_model};

static TRAINED: OnceLock<Trained> = OnceLock::new();

/// What every model begins with.
pub(crate) fn trained() -> &'static Trained {
    TRAINED.get_or_init(load_trained_model)
}

/// Has every model begin with this one. Before the first has begun.
///
/// # Panics
/// One has begun.
pub(crate) fn begin_with(trained: Trained) {
    assert!(TRAINED.set(trained).is_ok(), "no model has begun yet");
}

/// A failure is imminent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Predicted {
    /// What the model says.
    pub(crate) verdict: Verdict,
    /// It was not said before.
    pub(crate) is_news: bool,
}

/// The model of one device.
#[derive(Clone, Debug)]
pub(crate) struct Predictor {
    model: Model,
    verdict: Option<Verdict>,
    alarms: u64,
    /// Number of the last window.
    number: u64,
    /// Alarms by name, each with the last window that had it: as long as it lasts it is said once.
    said: Vec<(&'static str, u64)>,
}

/// Windows without an alarm until the same one is news again.
const SAID_FOR: u64 = 60;

impl Default for Predictor {
    fn default() -> Self {
        Predictor { model: Model::new(trained()), verdict: None, alarms: 0, number: 0, said: Vec::new() }
    }
}

impl Predictor {
    /// One that goes on with what was learnt before.
    pub(crate) fn with(model: Model) -> Self {
        Predictor { model, ..Predictor::default() }
    }

    /// What was learnt.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Judges a window, then learns it. Gives an alarm, if there is one.
    pub(crate) fn feed(&mut self, window: &Record) -> Option<Predicted> {
        let verdict = self.model.predict(trained(), window);
        self.model.train(trained());
        self.verdict = Some(verdict);
        self.number = window.number;
        let alarm = verdict.alarm?;
        self.alarms += 1;
        Some(Predicted { verdict, is_news: self.is_news(alarm, window.number) })
    }

    /// Sees a tick: what the laws say is not left until the end of the window.
    pub(crate) fn feed_tick(&mut self, tick: &Record) -> Option<Predicted> {
        let law = self.model.see_tick(tick)?;
        let feature = match law {
            Law::KickIsSeen => Feature::KickOverdue,
            Law::RequestIsCompleted => Feature::OldestAge,
            Law::AnythingIsCompleted => Feature::Gap,
            Law::InterruptIsTaken => Feature::CallOverdue,
        };
        let cause = Cause { feature, residual: tick.get(feature).unwrap_or(0.0), share: 1.0 };
        let alarm = Alarm::Law(law);
        let verdict = Verdict { alarm: Some(alarm), causes: [Some(cause), None, None], ..self.verdict? };
        Some(Predicted { verdict, is_news: self.is_news(alarm, self.number) })
    }

    /// Whether an alarm has not been given for some windows.
    fn is_news(&mut self, alarm: Alarm, number: u64) -> bool {
        let Some((_, at)) = self.said.iter_mut().find(|(name, _)| *name == alarm.name()) else {
            self.said.push((alarm.name(), number));
            return true;
        };
        let since = number.checked_sub(std::mem::replace(at, number));
        since.is_none_or(|since| since >= SAID_FOR)
    }

    /// What was said of the last window.
    pub(crate) fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// Windows with an alarm.
    pub(crate) fn alarms(&self) -> u64 {
        self.alarms
    }

    /// Windows that were learnt.
    pub(crate) fn learnt(&self) -> u64 {
        self.model.windows()
    }
}

/// The causes of a verdict for people: features with their parts.
pub(crate) fn causes(verdict: &Verdict) -> String {
    let causes = verdict.causes.iter().flatten();
    let words: Vec<String> =
        causes.map(|cause| format!("{} {:.0} %", cause.feature.name(), cause.share * 100.0)).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmswap_predict::{Feature, Grain, Law};

    fn window(number: u64, kick_overdue_us: f32) -> Record {
        let mut record = Record::new(Grain::Window, number, 1, number * 1_000_000_000, 1_000_000);
        record.set(Feature::Arrivals, Some(100.0));
        record.set(Feature::KickOverdue, Some(kick_overdue_us));
        record
    }

    #[test]
    fn an_alarm_is_news_once() {
        let mut predictor = Predictor::default();
        assert!(predictor.feed(&window(0, 0.0)).is_none());
        assert!(predictor.feed(&window(1, 500_000.0)).is_none());
        let is_news = |predicted: Option<Predicted>| predicted.map(|it| it.is_news);
        assert_eq!(is_news(predictor.feed(&window(2, 1_500_000.0))), Some(true));
        assert_eq!(is_news(predictor.feed(&window(3, 2_500_000.0))), Some(false), "it was said");
        assert_eq!(predictor.alarms(), 2);
        assert!(predictor.is_news(Alarm::Harm, 4), "another one is");
        assert!(!predictor.is_news(Alarm::Law(Law::KickIsSeen), 5), "and the first still not");
        assert!(predictor.is_news(Alarm::Harm, 64));
        let verdict = predictor.verdict().expect("it was judged");
        assert_eq!(verdict.alarm.map(Alarm::name), Some("law"));
    }
}
