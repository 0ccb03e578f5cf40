//! What is made of records, the same whether they come from a living device or from a file.

use warmswap_predict::{Grain, Record};

use super::predictor::{Predicted, Predictor};

/// Most records that can be missing between two that came. Numbers begin with the program, and of ten ticks a second it gives out fewer
/// than this in a year: a greater jump is the work of somebody who made up numbers.
const MISSED_MAX: u64 = 400_000_000;

/// What was seen of one grain.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    count: u64,
    missed: u64,
    latest: Option<Record>,
}

impl Seen {
    fn take(&mut self, record: &Record) {
        // Numbers begin anew where the program does.
        let skipped = self.latest.and_then(|latest| record.number.checked_sub(latest.number)?.checked_sub(1));
        self.missed = self.missed.saturating_add(skipped.unwrap_or(0).min(MISSED_MAX));
        self.count += 1;
        self.latest = Some(*record);
    }
}

/// Takes every record of one device in its order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Consumer {
    ticks: Seen,
    windows: Seen,
    /// Made with the first window.
    predictor: Option<Box<Predictor>>,
}

impl Consumer {
    /// Takes the next record. Gives what is said if a failure is imminent.
    pub(crate) fn feed(&mut self, record: &Record) -> Option<Predicted> {
        match record.grain {
            Grain::Tick => {
                self.ticks.take(record);
                self.predictor.as_mut()?.feed_tick(record)
            }
            Grain::Window => {
                self.windows.take(record);
                self.predictor.get_or_insert_default().feed(record)
            }
        }
    }

    /// Goes on with this failure model.
    pub(crate) fn set_predictor(&mut self, predictor: Predictor) {
        self.predictor = Some(Box::new(predictor));
    }

    /// The failure model, once there was a window.
    pub(crate) fn predictor(&self) -> Option<&Predictor> {
        self.predictor.as_deref()
    }

    fn seen(&self, grain: Grain) -> &Seen {
        match grain {
            Grain::Tick => &self.ticks,
            Grain::Window => &self.windows,
        }
    }

    /// Records of that grain so far.
    pub(crate) fn count(&self, grain: Grain) -> u64 {
        self.seen(grain).count
    }

    /// Records of that grain that never came, by their numbers. Of one jump no more count than a year of ticks, and the sum ends at the
    /// greatest number: it tells of gaps in what a broker sent, and nothing of what somebody made up.
    pub(crate) fn missed(&self, grain: Grain) -> u64 {
        self.seen(grain).missed
    }

    /// The last record of that grain.
    pub(crate) fn latest(&self, grain: Grain) -> Option<&Record> {
        self.seen(grain).latest.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmswap_predict::Feature;

    #[test]
    fn numbers_that_were_made_up_count_for_no_more_than_can_be_missing() {
        let mut consumer = Consumer::default();
        for number in [0, u64::MAX, 0, 10, u64::MAX - 1, 3, 4] {
            consumer.feed(&Record::new(Grain::Tick, number, 1, 0, 0));
        }
        assert_eq!((consumer.count(Grain::Tick), consumer.missed(Grain::Tick)), (7, 2 * MISSED_MAX + 9));
        consumer.ticks.missed = u64::MAX - 1;
        consumer.feed(&Record::new(Grain::Tick, 9, 1, 0, 0));
        assert_eq!(consumer.missed(Grain::Tick), u64::MAX);
    }

    #[test]
    fn records_are_counted_and_the_latest_values_kept() {
        let mut consumer = Consumer::default();
        let mut feed = |grain, number, rss: Option<f32>| {
            let mut record = Record::new(grain, number, 1, 0, 0);
            record.set(Feature::Rss, rss);
            consumer.feed(&record);
        };
        feed(Grain::Tick, 0, Some(1.0));
        feed(Grain::Tick, 1, Some(2.0));
        feed(Grain::Window, 0, Some(3.0));
        feed(Grain::Tick, 5, None);
        // A program that was started again.
        feed(Grain::Tick, 0, None);
        assert_eq!((consumer.count(Grain::Tick), consumer.missed(Grain::Tick)), (4, 3));
        assert_eq!((consumer.count(Grain::Window), consumer.missed(Grain::Window)), (1, 0));
        let rss = |grain| consumer.latest(grain).map(|record| record.get(Feature::Rss));
        assert_eq!((rss(Grain::Tick), rss(Grain::Window)), (Some(None), Some(Some(3.0))));
    }
}
