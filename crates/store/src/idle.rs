//! When nothing happens.

use warmswap_predict::{Feature, Record, Role, Source, Unit};

/// Whether `next` says nothing that `kept` does not: nothing was requested in either, and what is left is alike. Readers see what is left
/// out as `idle`.
///
/// What tells of the host or of the measurement itself is not looked at, for it never rests. The rest is alike within what an idle process
/// shows by itself: its timers, and a question to it now and then.
#[must_use]
pub fn idle_like(kept: &Record, next: &Record) -> bool {
    kept.grain == next.grain
        && kept.backend == next.backend
        && is_idle(kept)
        && is_idle(next)
        && Feature::ALL.into_iter().filter(|feature| counts(*feature)).all(|feature| {
            match (kept.get(feature), next.get(feature)) {
                (Some(kept), Some(next)) => alike(feature.spec().unit, kept, next),
                (None, None) => true,
                _ => false,
            }
        })
}

/// Nothing was requested, as far as is known.
fn is_idle(record: &Record) -> bool {
    record.get(Feature::Arrivals).is_none_or(|arrivals| arrivals == 0.0)
}

fn counts(feature: Feature) -> bool {
    let spec = feature.spec();
    spec.role != Role::Quality && !matches!(spec.source, Source::Host | Source::Sampler)
}

fn alike(unit: Unit, kept: f32, next: f32) -> bool {
    let (apart, greater) = ((kept - next).abs(), kept.abs().max(next.abs()));
    match unit {
        Unit::Share | Unit::Cores => apart <= 0.01,
        Unit::PerSecond => apart <= (greater / 4.0).max(2.0),
        Unit::Micros => apart <= greater / 2.0,
        Unit::Bytes | Unit::BytesPerSecond | Unit::Count => apart <= greater / 128.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmswap_predict::Grain;

    fn record(values: &[(Feature, f32)]) -> Record {
        let mut record = Record::new(Grain::Window, 7, 1, 1_000, 1_000_000);
        values.iter().for_each(|(feature, value)| record.set(*feature, Some(*value)));
        record
    }

    #[test]
    fn a_process_at_rest_is_idle_whatever_the_host_does() {
        let one = record(&[
            (Feature::Cpu, 0.001),
            (Feature::Rss, 1e8),
            (Feature::HostCpuPressure, 0.1),
            (Feature::SamplerDelay, 5.0),
        ]);
        let two = record(&[
            (Feature::Cpu, 0.002),
            (Feature::Rss, 1e8),
            (Feature::HostCpuPressure, 0.9),
            (Feature::SamplerDelay, 90.0),
        ]);
        assert!(idle_like(&one, &two));
    }

    #[test]
    fn a_request_a_leak_another_backend_and_a_missing_value_are_something() {
        let quiet = record(&[(Feature::Arrivals, 0.0), (Feature::Rss, 1e8)]);
        let mut other = quiet;
        other.backend = 2;
        let news = [
            record(&[(Feature::Arrivals, 1.0), (Feature::Rss, 1e8)]),
            record(&[(Feature::Arrivals, 0.0), (Feature::Rss, 1.02e8)]),
            record(&[(Feature::Arrivals, 0.0)]),
            other,
        ];
        assert!(idle_like(&quiet, &quiet));
        news.iter().for_each(|next| assert!(!idle_like(&quiet, next), "{next:?}"));
    }
}
