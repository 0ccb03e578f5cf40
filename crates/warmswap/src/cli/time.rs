//! Times and durations on the command line.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A duration such as `90s`, `15m`, `1.5h` or `7d`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err("expected a number with a unit, as 90s, 15m, 1h or 7d".to_owned()),
    };
    let number = digits.parse::<f64>().ok().filter(|number| *number >= 0.0);
    let duration = number.and_then(|number| Duration::try_from_secs_f64(number * seconds).ok());
    duration.ok_or_else(|| "expected a number with a unit, as 90s, 15m, 1h or 7d".to_owned())
}

/// A time in nanoseconds since the Unix epoch: `2026-11-23`, `2026-11-23T14:05`, `2026-11-23 14:05:09.25Z` (always UTC), or `@` and seconds
/// since the epoch.
pub(super) fn unix_ns(text: &str) -> Result<u64, String> {
    let wrong =
        || "expected a time in UTC, as 2026-11-23T14:05:09Z or 2026-11-23, or @ and seconds since 1970".to_owned();
    if let Some(seconds) = text.strip_prefix('@') {
        return nanoseconds(seconds).ok_or_else(wrong);
    }
    let text = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    let (date, time) = text.split_once(['T', 't', ' ']).unwrap_or((text, "00:00"));
    let number = |text: &str, digits: usize, range: std::ops::RangeInclusive<u64>| {
        let plain = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u64>().ok().filter(|number| plain && range.contains(number))
    };
    let parse = || {
        let mut date = date.split('-');
        let (year, month) = (number(date.next()?, 4, 1970..=2500)?, number(date.next()?, 2, 1..=12)?);
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let days = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
        let day = number(date.next()?, 2, 1..=days)?;
        let mut time = time.split(':');
        let (hour, minute) = (number(time.next()?, 2, 0..=23)?, number(time.next()?, 2, 0..=59)?);
        let second = match time.next() {
            Some(second) => {
                let whole = second.split('.').next()?;
                number(whole, 2, 0..=59)?;
                nanoseconds(second)?
            }
            None => 0,
        };
        if date.next().is_some() || time.next().is_some() {
            return None;
        }
        let minutes = (days_since_1970(year, month, day) * 24 + hour) * 60 + minute;
        (minutes * 60).checked_mul(1_000_000_000)?.checked_add(second)
    };
    parse().ok_or_else(wrong)
}

/// Nanoseconds of seconds with a fraction.
fn nanoseconds(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) {
        return None;
    }
    let part = format!("{part:0<9}")[..9].parse::<u64>().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(part)
}

/// H. Hinnant, "chrono-compatible low-level date algorithms", `days_from_civil`.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let y = if month <= 2 { year - 1 } else { year };
    let (era, yoe) = (y / 400, y % 400);
    let doy = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

/// Now, in nanoseconds since the Unix epoch.
pub(super) fn now_unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// UTC of nanoseconds since the Unix epoch.
pub(super) fn timestamp(unix_ns: u64) -> String {
    crate::journal::timestamp(UNIX_EPOCH + Duration::from_nanos(unix_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        let seconds = |text| duration(text).map(|it| it.as_secs_f64());
        assert_eq!(["250ms", "90s", "15m", "1.5h", "7d"].map(seconds), [0.25, 90.0, 900.0, 5_400.0, 604_800.0].map(Ok));
        for wrong in ["", "5", "h", "-1h", "1w", "1e400s", "nans", "ns"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_those_that_are_printed() {
        for ns in [0, 951_782_400_000_007_000, 1_795_392_000_000_000_000, 1_709_251_199_999_999_000] {
            assert_eq!(unix_ns(&timestamp(ns)), Ok(ns), "{}", timestamp(ns));
        }
        assert_eq!(unix_ns("2026-11-23"), Ok(1_795_392_000_000_000_000));
        assert_eq!(unix_ns("2026-11-23 00:01"), Ok(1_795_392_060_000_000_000));
        assert_eq!(unix_ns("@1.5"), Ok(1_500_000_000));
        let wrong = [
            "",
            "yesterday",
            "2026-02-29",
            "2026-13-01",
            "2026-1-1",
            "2026-11-23T25:00",
            "2026-11-23T10:00:00+02:00",
            "@",
            "@-1",
            "1.5",
        ];
        for wrong in wrong {
            assert!(unix_ns(wrong).is_err(), "{wrong}");
        }
    }
}
