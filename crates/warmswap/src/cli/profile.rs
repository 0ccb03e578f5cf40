//! The asking side of the verb `profile`: what a broker has measured of its primary.

use serde_json::{Value, json};
use warmswap_predict::{FEATURE_COUNT, Feature, Unit};

use crate::control::{Client, ClientError};
use crate::journal::span;

/// Windows that are looked at; a broker that sends more sends them for somebody else.
pub(super) const WINDOWS_MAX: usize = 60;

/// What one window or tick holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Window {
    /// Counted by the broker.
    pub(super) number: Option<u64>,
    /// Generation of the backend that it tells of.
    pub(super) backend: Option<u64>,
    /// How long it was.
    pub(super) span_ms: Option<f64>,
    /// By feature; what was not measured is missing.
    values: [Option<f64>; FEATURE_COUNT],
    /// Values of names that this program does not know.
    pub(super) unknown: usize,
}

/// What a broker answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Profile {
    /// The oldest first.
    pub(super) windows: Vec<Window>,
    /// The last tick.
    pub(super) tick: Option<Window>,
    /// Records that found no room on their way to the predictor.
    pub(super) records_lost: Option<u64>,
}

impl Window {
    fn read(value: &Value) -> Option<Window> {
        let given = value.get("values")?.as_object()?;
        let mut values = [None; FEATURE_COUNT];
        let mut unknown = 0;
        for (name, value) in given {
            match Feature::from_name(name) {
                Some(feature) => values[feature as usize] = value.as_f64().filter(|number| number.is_finite()),
                None => unknown += 1,
            }
        }
        Some(Window {
            number: value["number"].as_u64(),
            backend: value["backend"].as_u64(),
            span_ms: value["span_ms"].as_f64(),
            values,
            unknown,
        })
    }

    pub(super) fn value(&self, feature: Feature) -> Option<f64> {
        self.values[feature as usize]
    }
}

impl Profile {
    /// Reads what can be read of an answer; what is of another form counts as not there.
    pub(super) fn read(answer: &Value) -> Profile {
        let windows = answer["windows"].as_array().map_or(&[][..], Vec::as_slice);
        let windows = &windows[windows.len().saturating_sub(WINDOWS_MAX)..];
        Profile {
            windows: windows.iter().filter_map(Window::read).collect(),
            tick: Window::read(&answer["tick"]),
            records_lost: answer["records_lost"].as_u64(),
        }
    }

    /// The latest window, or before the first one has ended the latest tick.
    pub(super) fn current(&self) -> Option<&Window> {
        self.windows.last().or(self.tick.as_ref())
    }

    /// The course of a feature over the windows.
    pub(super) fn course(&self, feature: Feature) -> Vec<Option<f64>> {
        self.windows.iter().map(|window| window.value(feature)).collect()
    }
}

/// Asks for the profile. `None`: a broker that keeps none, for it is older than this program.
///
/// # Errors
/// The connection ended.
pub(super) fn ask(client: &mut Client) -> Result<Option<Value>, ClientError> {
    match client.ask(&json!({"verb": "profile"})) {
        Ok(answer) => Ok(Some(answer)),
        Err(ClientError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What stands for a value that is missing.
pub(super) const MISSING: &str = "-";

/// From here on a number is told by its power of ten.
const SPELLED_MAX: f64 = 1e15;

/// A number with two or three digits and a prefix, each a thousand or 1024 times the one before.
fn scaled(value: f64, base: f64, prefixes: &[&str]) -> String {
    if !value.is_finite() || value.abs() >= SPELLED_MAX {
        return format!("{value:.1e} {}", prefixes[0]).trim_end().to_owned();
    }
    let (mut value, mut prefix) = (value, 0);
    // What would be rounded to the next prefix's one is told with that prefix.
    while value.abs() >= base - 0.5 && prefix + 1 < prefixes.len() {
        value /= base;
        prefix += 1;
    }
    let digits = match value.abs() {
        size if size < 0.995 => 2,
        size if size < 9.95 => 1,
        _ => 0,
    };
    let number = format!("{value:.digits$}");
    let number = if digits > 0 { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    // What would be shown as nothing is none, whatever its sign.
    let number = if number == "-0" { "0" } else { number };
    format!("{number} {}", prefixes[prefix]).trim_end().to_owned()
}

/// A value for people, with its unit where there is one.
pub(super) fn amount(value: Option<f64>, unit: Unit) -> String {
    let Some(value) = value else { return MISSING.to_owned() };
    let number = |value: f64| scaled(value, 1_000.0, &["", "k", "M", "G", "T"]);
    let bytes = |value: f64| scaled(value, 1_024.0, &["B", "KiB", "MiB", "GiB", "TiB"]);
    match unit {
        Unit::PerSecond => format!("{}/s", number(value)),
        Unit::Count => number(value),
        Unit::Bytes => bytes(value),
        Unit::BytesPerSecond => format!("{}/s", bytes(value)),
        Unit::Share => format!("{} %", number(value * 100.0)),
        Unit::Cores if value.abs() < 100.0 => format!("{value:.2}"),
        Unit::Cores => number(value),
        Unit::Micros if (0.0..SPELLED_MAX).contains(&value) => span(value),
        Unit::Micros => format!("{value:.1e} us"),
    }
}

/// The word for a unit.
pub(super) fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::PerSecond => "per second",
        Unit::Micros => "us",
        Unit::Bytes => "bytes",
        Unit::BytesPerSecond => "bytes per second",
        Unit::Share => "share",
        Unit::Cores => "processors",
        Unit::Count => "count",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(unit: Unit, expected: &[(f64, &str)]) {
        for (value, text) in expected {
            assert_eq!(amount(Some(*value), unit), *text, "{value:?} {unit:?}");
        }
    }

    #[test]
    fn amounts_are_short_and_carry_their_unit() {
        check(
            Unit::PerSecond,
            &[(0.0, "0/s"), (0.25, "0.25/s"), (3.0, "3/s"), (1_234.0, "1.2 k/s"), (999_700.0, "1 M/s")],
        );
        check(
            Unit::Bytes,
            &[(0.0, "0 B"), (512.0, "512 B"), (1_023.9, "1 KiB"), (35_651_584.0, "34 MiB"), (1.5e12, "1.4 TiB")],
        );
        check(Unit::BytesPerSecond, &[(4_096.0, "4 KiB/s")]);
        check(Unit::Micros, &[(0.0, "0"), (250.0, "250 us"), (1_300.0, "1.3 ms"), (2_100_000.0, "2.1 s")]);
        check(Unit::Share, &[(0.0, "0 %"), (0.123, "12 %"), (1.0, "100 %")]);
        check(Unit::Cores, &[(0.534, "0.53"), (12.0, "12.00")]);
        check(Unit::Count, &[(17.0, "17"), (9.97, "10"), (0.001, "0"), (-0.001, "0"), (1_048_576.0, "1 M")]);
        assert_eq!(amount(None, Unit::Bytes), "-");
    }

    #[test]
    fn absurd_numbers_stay_short() {
        for value in [f64::MAX, -1e300, -1.0, -5e3, 1e15, 9.99e14, f64::MIN_POSITIVE, f64::NAN, f64::INFINITY] {
            for unit in [Unit::PerSecond, Unit::Micros, Unit::Bytes, Unit::BytesPerSecond, Unit::Share, Unit::Cores] {
                let text = amount(Some(value), unit);
                assert!(text.len() <= 16, "{text}");
            }
        }
        assert_eq!(amount(Some(1e300), Unit::Bytes), "1.0e300 B");
        assert_eq!(amount(Some(-1.0), Unit::Micros), "-1.0e0 us");
    }

    #[test]
    fn what_is_not_of_the_right_form_is_not_there() {
        let hostile = [
            json!(null),
            json!([]),
            json!("windows"),
            json!({"windows": 7, "tick": [], "records_lost": -1}),
            json!({"windows": [null, 1, [], {}, {"values": 3}], "tick": {"values": []}}),
        ];
        for answer in hostile {
            assert_eq!(Profile::read(&answer), Profile::default(), "{answer}");
        }
        let answer = json!({"windows": [{
            "number": -1, "backend": "one", "span_ms": {}, "end_unix_ms": 1e300,
            "values": {"arrivals_per_s": "many", "cpu_cores": null, "depth_mean": [1], "rss_bytes": 1e308, "new_one": 1}
        }]});
        let profile = Profile::read(&answer);
        let window = profile.current().expect("it has values");
        assert_eq!((window.number, window.backend, window.span_ms, window.unknown), (None, None, None, 1));
        assert_eq!(window.value(Feature::Arrivals), None);
        assert_eq!(window.value(Feature::Rss), Some(1e308));
    }

    #[test]
    fn only_the_last_windows_are_kept() {
        let windows: Vec<Value> =
            (0..1_000).map(|number| json!({"number": number, "values": {"cpu_cores": number}})).collect();
        let profile = Profile::read(&json!({ "windows": windows }));
        assert_eq!(profile.windows.len(), WINDOWS_MAX);
        assert_eq!(profile.windows[0].number, Some(940));
        assert_eq!(profile.course(Feature::Cpu).last(), Some(&Some(999.0)));
    }
}
