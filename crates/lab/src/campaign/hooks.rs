//! Faults inside our own backend: a shape as a plan of `warmswap_blk::faults`, piece by piece.

use super::form::{Form, Shape, between};
use super::inject::delay_ns;
use super::kind::Hook;
use super::workload::BLOCKS;

/// Length of a piece, in milliseconds.
const PIECE_MS: u64 = 100;
/// Pieces of a leak.
const LEAK_PIECES: u64 = 20;
/// Bytes that a backend which leaks may lose until its memory is used up.
pub(super) const LEAK_BYTES: u64 = 48 << 20;
/// Descriptors and threads that one which leaks them may lose.
pub(super) const LEAK_COUNT: u64 = 200;
/// The time between two stalls.
const STALL_EVERY_MS: u64 = 600;
/// What poison adds to: a backend that is slow to this degree in health, in microseconds, and its share of a request's time.
const POISON_BASE_US: f64 = 300.0;
const POISON_WHOLE_US: f64 = 340.0;
/// Poison in a window.
const POISON_GROWTH: f64 = 1.01;
/// At which it stops.
const POISON_MOST: f64 = 4.0;

/// When a fault begins, and how long it takes to collapse, in milliseconds since the rings were started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) from_ms: u64,
    pub(super) for_ms: u64,
    /// Length of a window.
    pub(super) window_ms: u64,
}

/// The plan of a fault under a load of `rate` requests per second.
pub(super) fn plan(hook: Hook, form: Form, shape: &Shape, span: Span, rate: f64) -> String {
    let micros = |level: f64| delay_ns(level) / 1_000;
    match hook {
        Hook::Latency => pieces(shape, span, |level| format!("latency:us={}", micros(level))),
        Hook::Region => {
            // The third quarter of the disk, in sectors.
            let (first, last) = (BLOCKS * 4, BLOCKS * 6 - 1);
            pieces(shape, span, |level| format!("latency:us={},first={first},last={last}", micros(level)))
        }
        Hook::Convoy => {
            let hold = |level: f64| between(100.0, 1_500_000.0, level) as u64;
            pieces(shape, span, |level| format!("convoy:hold_us={},every_us=500", hold(level)))
        }
        Hook::LoseCall => {
            let every = |level: f64| between(2_000.0, 1.0, level) as u64;
            pieces(shape, span, |level| format!("lose-interrupt:every={}", every(level)))
        }
        Hook::Stall => stalls(shape, span),
        Hook::Leak => leak(form, span, |weight| {
            let per_request = LEAK_BYTES as f64 * weight / (rate * span.for_ms as f64 / 1e3);
            format!("leak:bytes={}", (per_request as u64).max(1))
        }),
        Hook::Descriptors => leak(form, span, |weight| format!("descriptors:every={}", every(weight, span, rate))),
        Hook::Threads => leak(form, span, |weight| format!("threads:every={}", every(weight, span, rate))),
        Hook::LoseCompletion => format!("lose-completion:every=50,from_ms={}", span.from_ms),
        Hook::Spin => format!("spin:from_ms={}", span.from_ms),
        Hook::Errors => format!("errors:every=50,from_ms={}", span.from_ms),
        Hook::Poison => poison(span),
    }
}

/// For how long a fault of that kind grows, in seconds, unless a plan says so.
pub(super) fn poison_s(window_ms: u64) -> f64 {
    POISON_MOST.ln() / POISON_GROWTH.ln() * window_ms as f64 / 1e3
}

/// Every so many requests lose one, so that all are lost in the time of the fault.
fn every(weight: f64, span: Span, rate: f64) -> u64 {
    let requests = rate * span.for_ms as f64 / 1e3;
    ((requests / (LEAK_COUNT as f64 * weight)) as u64).max(1)
}

fn pieces(shape: &Shape, span: Span, fault: impl Fn(f64) -> String) -> String {
    let mut parts = Vec::new();
    for from in (0..span.for_ms).step_by(PIECE_MS as usize) {
        let level = shape.level(from as f64 / span.for_ms as f64);
        if level > 0.0 {
            parts.push(format!("{},from_ms={},for_ms_in_all={PIECE_MS}", fault(level), span.from_ms + from));
        }
    }
    parts.push(format!("{},from_ms={}", fault(1.0), span.from_ms + span.for_ms));
    parts.join(";")
}

fn stalls(shape: &Shape, span: Span) -> String {
    // Once each, however long their time.
    const NEVER_MS: u64 = 100_000_000;
    let stall = |from: u64, length: u64| format!("stop:every_ms={NEVER_MS},for_ms={length},from_ms={from}");
    let mut parts = Vec::new();
    for from in (0..span.for_ms).step_by(STALL_EVERY_MS as usize) {
        let level = shape.level(from as f64 / span.for_ms as f64);
        if level > 0.0 {
            parts.push(stall(span.from_ms + from, between(10.0, STALL_EVERY_MS as f64 * 0.9, level) as u64));
        }
    }
    parts.push(stall(span.from_ms + span.for_ms, 600_000));
    parts.join(";")
}

/// The same plan, whose last faults end after so many milliseconds instead of never.
pub(super) fn until(plan: &str, end_ms: u64) -> String {
    let number = |fault: &str, name: &str| {
        let mut values = fault.split([':', ',']).filter_map(|it| it.strip_prefix(name)?.strip_prefix('='));
        values.next().and_then(|it| it.parse::<u64>().ok())
    };
    let ended = |fault: &str| {
        let left = end_ms.saturating_sub(number(fault, "from_ms").unwrap_or(0)).max(1);
        match number(fault, "for_ms_in_all") {
            Some(length) if length > 0 => fault.to_owned(),
            Some(length) => fault.replace(&format!("for_ms_in_all={length}"), &format!("for_ms_in_all={left}")),
            // What a stop keeps back it keeps back to its end.
            None => match number(fault, "for_ms").filter(|length| *length > left) {
                Some(length) => fault.replace(&format!("for_ms={length}"), &format!("for_ms={left}")),
                None => format!("{fault},for_ms_in_all={left}"),
            },
        }
    };
    plan.split(';').map(ended).collect::<Vec<_>>().join(";")
}

/// A leak, of which each piece has its weight; all of them make a little more than is there.
fn leak(form: Form, span: Span, fault: impl Fn(f64) -> String) -> String {
    const MORE: f64 = 1.1;
    let weight = |at: u64| match form {
        // It becomes faster.
        Form::Ramp => 2.0 * (at as f64 + 0.5) / LEAK_PIECES as f64,
        Form::Periodic if at % 4 < 2 => 2.0,
        Form::Periodic => 0.0,
        _ => 1.0,
    };
    let length = span.for_ms / LEAK_PIECES;
    let mut parts = Vec::new();
    for at in (0..LEAK_PIECES).filter(|at| weight(*at) > 0.0) {
        let from = span.from_ms + at * length;
        parts.push(format!("{},from_ms={from},for_ms_in_all={length}", fault(MORE * weight(at))));
    }
    // What the guest asked for less than it could have is made up for.
    parts.push(format!("{},from_ms={}", fault(MORE * 1.5), span.from_ms + LEAK_PIECES * length));
    parts.join(";")
}

fn poison(span: Span) -> String {
    let mut parts = vec![format!("latency:us={POISON_BASE_US:.0},for_ms_in_all={}", span.from_ms)];
    let windows = (span.for_ms / span.window_ms).max(1);
    for at in 0..windows {
        let factor = POISON_GROWTH.powf(at as f64 + 1.0).min(POISON_MOST);
        let us = POISON_BASE_US + POISON_WHOLE_US * (factor - 1.0);
        let from = span.from_ms + at * span.window_ms;
        let length = if at + 1 == windows { 0 } else { span.window_ms };
        parts.push(format!("latency:us={us:.0},from_ms={from},for_ms_in_all={length}"));
    }
    parts.join(";")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::rng::Rng;

    const SPAN: Span = Span { from_ms: 10_000, for_ms: 10_000, window_ms: 200 };

    fn values(plan: &str, name: &str) -> Vec<u64> {
        let parts = plan.split(';').flat_map(|fault| fault.split([',', ':']));
        parts.filter_map(|it| it.strip_prefix(name)?.strip_prefix('=')?.parse().ok()).collect()
    }

    #[test]
    fn a_ramp_begins_small_and_ends_beyond_patience() {
        let shape = Shape::new(Form::Ramp, &mut Rng::new(1, 1));
        let us = values(&plan(Hook::Latency, Form::Ramp, &shape, SPAN, 1_000.0), "us");
        assert_eq!(us.len(), 101);
        assert!(us[0] < 60 && us[100] > 1_500_000 && us.is_sorted(), "{us:?}");
    }

    #[test]
    fn a_plan_that_ends_has_no_fault_left_at_its_end() {
        let shape = Shape::new(Form::Ramp, &mut Rng::new(1, 1));
        for hook in [Hook::Latency, Hook::Stall, Hook::Leak, Hook::Spin, Hook::Poison] {
            let text = until(&plan(hook, Form::Ramp, &shape, SPAN, 1_000.0), 26_000);
            for fault in text.split(';') {
                let of = |name: &str| values(fault, name).first().copied();
                let length = of("for_ms_in_all").or(of("for_ms")).unwrap_or_else(|| panic!("{fault}"));
                // Poison is slow from the beginning.
                let from = of("from_ms").unwrap_or(0);
                assert!(length > 0 && (from + length <= 26_000 || from >= 26_000), "{fault}");
            }
        }
    }

    #[test]
    fn a_leak_takes_a_little_more_than_there_is_however_it_comes() {
        for form in [Form::Step, Form::Ramp, Form::Periodic] {
            let shape = Shape::new(form, &mut Rng::new(1, 1));
            let text = plan(Hook::Leak, form, &shape, SPAN, 2_000.0);
            let (bytes, lengths) = (values(&text, "bytes"), values(&text, "for_ms_in_all"));
            let all: u64 = bytes.iter().zip(&lengths).map(|(bytes, length)| bytes * 2 * length).sum();
            let share = all as f64 / LEAK_BYTES as f64;
            assert!((1.05..1.15).contains(&share), "{form:?}: {share}");
        }
    }

    #[test]
    fn poison_grows_by_a_hundredth_to_four_times_as_much() {
        let span = Span { for_ms: (poison_s(200) * 1e3) as u64, ..SPAN };
        let us = values(&plan(Hook::Poison, Form::Ramp, &Shape::new(Form::Ramp, &mut Rng::new(1, 1)), span, 1.0), "us");
        assert_eq!((us[0], us[1]), (300, 303));
        let last = us.last().expect("there are some");
        assert!((1_300..=1_320).contains(last), "{last}");
    }
}
