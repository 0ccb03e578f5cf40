//! Ticks become windows.

use crate::measure::Measure;
use crate::record::{Grain, Record};
use crate::schema::Feature;

/// What a tick brought.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// The tick.
    pub tick: Record,
    /// The window that it completed.
    pub window: Option<Record>,
}

/// Makes records of one component's measures.
#[derive(Clone, Debug)]
pub struct Profiler {
    ticks_per_window: u32,
    /// Ticks in the window so far.
    ticks: u32,
    window: Measure,
    span_us: u32,
    ticks_lost: u32,
    numbers: [u64; 2],
    backend: Option<u64>,
}

impl Profiler {
    /// Windows of so many ticks, at least one.
    #[must_use]
    pub fn new(ticks_per_window: u32) -> Self {
        Profiler {
            ticks_per_window: ticks_per_window.max(1),
            ticks: 0,
            window: Measure::default(),
            span_us: 0,
            ticks_lost: 0,
            numbers: [0; 2],
            backend: None,
        }
    }

    /// Ticks until a window is complete.
    #[must_use]
    pub fn ticks_left(&self) -> u32 {
        self.ticks_per_window.saturating_sub(self.ticks)
    }

    /// Takes the measure of a tick that ended at `end_unix_ns` and covers `span_us`. It stands for `ticks`, more than one where nothing
    /// happened and they were measured together, of which `lost` came too late to be measured by themselves. A window ends when its ticks are complete, counting lost ones; where another backend serves it begins anew, and what there was of
    /// the last one's is dropped.
    pub fn tick(
        &mut self,
        measure: &mut Measure,
        backend: u64,
        end_unix_ns: u64,
        span_us: u32,
        ticks: u32,
        lost: u32,
    ) -> Recorded {
        if self.backend.replace(backend) != Some(backend) {
            self.begin();
        }
        measure.note(Feature::TicksLost, f64::from(lost));
        let tick = self.record(Grain::Tick, measure, end_unix_ns, span_us);
        self.window.merge(measure);
        self.span_us = self.span_us.saturating_add(span_us);
        self.ticks_lost += lost;
        self.ticks = self.ticks.saturating_add(ticks.max(1));
        if self.ticks < self.ticks_per_window {
            return Recorded { tick, window: None };
        }
        let mut whole = core::mem::take(&mut self.window);
        whole.note(Feature::TicksLost, f64::from(self.ticks_lost));
        let window = self.record(Grain::Window, &whole, end_unix_ns, self.span_us);
        self.begin();
        Recorded { tick, window: Some(window) }
    }

    fn begin(&mut self) {
        self.window.clear();
        (self.ticks, self.span_us, self.ticks_lost) = (0, 0, 0);
    }

    fn record(&mut self, grain: Grain, measure: &Measure, end_unix_ns: u64, span_us: u32) -> Record {
        let number = &mut self.numbers[grain as usize];
        let mut record = Record::new(grain, *number, self.backend.unwrap_or(0), end_unix_ns, span_us);
        *number += 1;
        measure.fill(&mut record);
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick(profiler: &mut Profiler, backend: u64, arrivals: f64, lost: u32) -> Recorded {
        let mut measure = Measure::default();
        measure.add(Feature::Arrivals, arrivals, 0.1);
        profiler.tick(&mut measure, backend, 0, 100_000, 1 + lost, lost)
    }

    #[test]
    fn a_window_is_what_its_ticks_were_together() {
        let mut profiler = Profiler::new(3);
        assert!(tick(&mut profiler, 1, 10.0, 0).window.is_none());
        assert!(tick(&mut profiler, 1, 20.0, 0).window.is_none());
        let recorded = tick(&mut profiler, 1, 30.0, 0);
        let window = recorded.window.expect("three ticks are a window");
        assert_eq!((window.number, window.span_us, window.get(Feature::Arrivals)), (0, 300_000, Some(200.0)));
        assert_eq!((recorded.tick.number, recorded.tick.get(Feature::Arrivals)), (2, Some(300.0)));
    }

    #[test]
    fn lost_ticks_count_and_are_told_of() {
        let mut profiler = Profiler::new(3);
        tick(&mut profiler, 1, 10.0, 0);
        let window = tick(&mut profiler, 1, 10.0, 1).window.expect("a lost tick counts");
        assert_eq!((window.get(Feature::TicksLost), window.span_us), (Some(1.0), 200_000));
    }

    #[test]
    fn no_window_covers_two_backends() {
        let mut profiler = Profiler::new(2);
        tick(&mut profiler, 1, 10.0, 0);
        assert!(tick(&mut profiler, 2, 50.0, 0).window.is_none());
        let window = tick(&mut profiler, 2, 50.0, 0).window.expect("two ticks of one backend");
        assert_eq!((window.backend, window.get(Feature::Arrivals)), (2, Some(500.0)));
    }
}
