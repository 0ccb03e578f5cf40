//! Ticks as few bytes: each as what is different from the one before it.
//!
//! Values keep nine significant bits, that is two parts in a thousand; whole numbers up to 512 stay what they are. What is left of a float
//! then orders as an integer does, a value that wavers by a few per cent differs by a small one, and a small one is a byte.
//!
//! An entry is a byte of flags and, in this order: the number of the tick unless it is the next one, the backend unless it is the same,
//! its span and its end against what they were expected to be, a bit per feature that is present if these are others than before, a bit
//! per feature that has another value, and the differences of these. Integers have seven bits a byte, the lowest first; differences are
//! zigzag. A run of idle ticks is one entry: how many, and when the last one ended.

use std::fmt;

use warmswap_predict::{FEATURE_COUNT, Feature, Grain, Record};

/// The number is not that of the tick before plus one.
const NUMBER: u8 = 1;
/// Another backend.
const BACKEND: u8 = 2;
/// Other features are present.
const PRESENT: u8 = 4;
/// The grain is a window's.
const WINDOW: u8 = 8;
/// Idle ticks, all like the one before.
const RUN: u8 = 16;
const KNOWN: u8 = NUMBER | BACKEND | PRESENT | WINDOW | RUN;

/// Bytes of a bit per feature.
const MASK: usize = FEATURE_COUNT.div_ceil(8);
/// Bits of a float's mantissa that are not kept.
const CUT: u32 = 15;
/// Code of the greatest finite value.
const CODE_MAX: u32 = f32::MAX.to_bits() >> CUT;
/// Most bytes of one entry.
pub(crate) const ENTRY_MAX: usize = 1 + 4 * 10 + 2 * MASK + 3 * FEATURE_COUNT;
/// Most ticks of a run, so that a recorder can drop what is old.
pub(crate) const RUN_MAX: u64 = 100;

/// Why encoded ticks cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// They end within a tick.
    Short,
    /// A tick begins as none does.
    Flags(u8),
    /// A number has no end, or a value is none.
    Number,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Broken::Short => f.write_str("encoded ticks end within a tick"),
            Broken::Flags(found) => write!(f, "an encoded tick begins with {found:#04x}, which none does"),
            Broken::Number => f.write_str("a number in an encoded tick is none"),
        }
    }
}

impl std::error::Error for Broken {}

fn code(value: f32) -> i32 {
    let magnitude = value.abs().to_bits();
    // Rounded to nearest; the greatest values would become infinite.
    let code = ((magnitude + (1 << (CUT - 1))) >> CUT).min(CODE_MAX).cast_signed();
    if value.is_sign_negative() { -code } else { code }
}

/// A code of a finite value.
fn checked(code: Option<i64>) -> Result<i32, Broken> {
    let code = code.and_then(|code| i32::try_from(code).ok());
    code.filter(|code| code.unsigned_abs() <= CODE_MAX).ok_or(Broken::Number)
}

fn value(code: i32) -> f32 {
    let magnitude = f32::from_bits(code.unsigned_abs() << CUT);
    if code < 0 { -magnitude } else { magnitude }
}

/// The record as a recorder keeps it.
#[must_use]
pub fn rounded(record: &Record) -> Record {
    let mut rounded = *record;
    for (feature, exact) in record.values() {
        rounded.set(feature, Some(value(code(exact))));
    }
    rounded
}

/// What the next entry is related to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct State {
    grain: Grain,
    number: u64,
    backend: u64,
    end_unix_ns: u64,
    span_us: u32,
    present: [u8; MASK],
    /// Of features that are missing now: as they were last.
    codes: [i32; FEATURE_COUNT],
}

impl Default for State {
    fn default() -> Self {
        State {
            grain: Grain::Tick,
            number: 0,
            backend: 0,
            end_unix_ns: 0,
            span_us: 0,
            present: [0; MASK],
            codes: [0; FEATURE_COUNT],
        }
    }
}

/// A bit of a mask.
fn bit(mask: &[u8; MASK], feature: Feature) -> bool {
    mask[feature as usize / 8] >> (feature as usize % 8) & 1 == 1
}

fn set_bit(mask: &mut [u8; MASK], feature: Feature) {
    mask[feature as usize / 8] |= 1 << (feature as usize % 8);
}

/// An entry that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// One tick: what the state is now.
    Tick,
    /// This many ticks like the one before. The state is that of the last of them, the first began at `from_unix_ns`.
    Run { ticks: u64, from_unix_ns: u64 },
}

impl State {
    /// Appends a tick.
    pub(crate) fn put(&mut self, record: &Record, out: &mut Vec<u8>) {
        let flags_at = out.len();
        let mut flags = if record.grain == Grain::Window { WINDOW } else { 0 };
        out.push(0);
        if record.number != self.number.wrapping_add(1) {
            flags |= NUMBER;
            put_varint(out, record.number);
        }
        if record.backend != self.backend {
            flags |= BACKEND;
            put_varint(out, record.backend);
        }
        put_varint(out, zigzag(i64::from(record.span_us) - i64::from(self.span_us)));
        let expected = self.end_unix_ns.wrapping_add(u64::from(record.span_us) * 1_000);
        put_varint(out, zigzag(record.end_unix_ns.wrapping_sub(expected).cast_signed()));
        let mut present = [0; MASK];
        record.values().for_each(|(feature, _)| set_bit(&mut present, feature));
        if present != self.present {
            flags |= PRESENT;
            out.extend_from_slice(&present);
        }
        let changed_at = out.len();
        let mut changed = [0; MASK];
        out.extend_from_slice(&changed);
        for (feature, exact) in record.values() {
            let (last, now) = (&mut self.codes[feature as usize], code(exact));
            if now != *last {
                set_bit(&mut changed, feature);
                put_varint(out, zigzag(i64::from(now) - i64::from(*last)));
                *last = now;
            }
        }
        out[flags_at] = flags;
        out[changed_at..changed_at + MASK].copy_from_slice(&changed);
        self.grain = record.grain;
        self.number = record.number;
        self.backend = record.backend;
        self.end_unix_ns = record.end_unix_ns;
        self.span_us = record.span_us;
        self.present = present;
    }

    /// Appends a run of ticks like the last one.
    pub(crate) fn put_run(&mut self, ticks: u64, end_unix_ns: u64, out: &mut Vec<u8>) {
        out.push(RUN);
        put_varint(out, ticks);
        put_varint(out, zigzag(end_unix_ns.wrapping_sub(self.end_unix_ns).cast_signed()));
        self.number = self.number.wrapping_add(ticks);
        self.end_unix_ns = end_unix_ns;
    }

    /// Reads an entry. `None` where the bytes end before one.
    pub(crate) fn take(&mut self, bytes: &mut impl Iterator<Item = u8>) -> Result<Option<Entry>, Broken> {
        let Some(flags) = bytes.next() else { return Ok(None) };
        if flags & !KNOWN != 0 || (flags & RUN != 0 && flags != RUN) {
            return Err(Broken::Flags(flags));
        }
        if flags & RUN != 0 {
            let (ticks, from_unix_ns) = (take_varint(bytes)?, self.end_unix_ns);
            // More would be many ticks from few bytes.
            if ticks == 0 || ticks > RUN_MAX {
                return Err(Broken::Number);
            }
            self.end_unix_ns = self.end_unix_ns.wrapping_add(unzigzag(take_varint(bytes)?).cast_unsigned());
            self.number = self.number.wrapping_add(ticks);
            return Ok(Some(Entry::Run { ticks, from_unix_ns }));
        }
        self.grain = if flags & WINDOW == 0 { Grain::Tick } else { Grain::Window };
        self.number = if flags & NUMBER == 0 { self.number.wrapping_add(1) } else { take_varint(bytes)? };
        if flags & BACKEND != 0 {
            self.backend = take_varint(bytes)?;
        }
        let span = i64::from(self.span_us).checked_add(unzigzag(take_varint(bytes)?));
        self.span_us = span.and_then(|span| u32::try_from(span).ok()).ok_or(Broken::Number)?;
        let expected = self.end_unix_ns.wrapping_add(u64::from(self.span_us) * 1_000);
        self.end_unix_ns = expected.wrapping_add(unzigzag(take_varint(bytes)?).cast_unsigned());
        if flags & PRESENT != 0 {
            self.present = take_mask(bytes)?;
        }
        let changed = take_mask(bytes)?;
        for feature in Feature::ALL.into_iter().filter(|feature| bit(&changed, *feature)) {
            let last = &mut self.codes[feature as usize];
            *last = checked(i64::from(*last).checked_add(unzigzag(take_varint(bytes)?)))?;
        }
        Ok(Some(Entry::Tick))
    }

    /// The last tick of the last entry.
    pub(crate) fn record(&self) -> Record {
        let mut record = Record::new(self.grain, self.number, self.backend, self.end_unix_ns, self.span_us);
        for feature in Feature::ALL.into_iter().filter(|feature| bit(&self.present, *feature)) {
            record.set(feature, Some(value(self.codes[feature as usize])));
        }
        record
    }

    /// The state itself: number, backend, end, span, a bit per feature that is present, every value.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.grain == Grain::Window));
        for number in [self.number, self.backend, self.end_unix_ns, u64::from(self.span_us)] {
            put_varint(out, number);
        }
        out.extend_from_slice(&self.present);
        self.codes.iter().for_each(|code| put_varint(out, zigzag(i64::from(*code))));
    }

    /// Reads what [`State::encode`] wrote.
    pub(crate) fn decode(bytes: &mut impl Iterator<Item = u8>) -> Result<State, Broken> {
        let grain = match bytes.next().ok_or(Broken::Short)? {
            0 => Grain::Tick,
            1 => Grain::Window,
            _ => return Err(Broken::Number),
        };
        let mut state = State { grain, ..State::default() };
        for number in [&mut state.number, &mut state.backend, &mut state.end_unix_ns] {
            *number = take_varint(bytes)?;
        }
        state.span_us = u32::try_from(take_varint(bytes)?).map_err(|_| Broken::Number)?;
        state.present = take_mask(bytes)?;
        for code in &mut state.codes {
            *code = checked(Some(unzigzag(take_varint(bytes)?)))?;
        }
        Ok(state)
    }

    pub(crate) fn end_unix_ns(&self) -> u64 {
        self.end_unix_ns
    }
}

/// Encoded ticks, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Decoder<I> {
    state: State,
    bytes: I,
    /// Ticks of a run that are still to come, of how many, and when it began.
    run: Option<(u64, u64, u64)>,
    broken: bool,
}

impl<I: Iterator<Item = u8>> Decoder<I> {
    pub(crate) fn new(state: State, bytes: I) -> Self {
        Decoder { state, bytes, run: None, broken: false }
    }
}

impl<I: Iterator<Item = u8>> Iterator for Decoder<I> {
    type Item = Result<Record, Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.broken {
            return None;
        }
        if self.run.is_none() {
            match self.state.take(&mut self.bytes) {
                Ok(Some(Entry::Tick)) => return Some(Ok(self.state.record())),
                Ok(Some(Entry::Run { ticks, from_unix_ns })) => self.run = Some((ticks, ticks, from_unix_ns)),
                Ok(None) => return None,
                Err(broken) => {
                    self.broken = true;
                    return Some(Err(broken));
                }
            }
        }
        let (left, ticks, from) = self.run?;
        self.run = (left > 1).then_some((left - 1, ticks, from));
        let mut record = self.state.record();
        record.number = record.number.wrapping_sub(left - 1);
        // The ticks of a run are as far apart as all of them were in the mean.
        let whole = i128::from(record.end_unix_ns.wrapping_sub(from).cast_signed());
        let part = whole * i128::from(ticks - (left - 1)) / i128::from(ticks);
        record.end_unix_ns = from.wrapping_add((part as i64).cast_unsigned());
        Some(Ok(record))
    }
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_varint(bytes: &mut impl Iterator<Item = u8>) -> Result<u64, Broken> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = bytes.next().ok_or(Broken::Short)?;
        let part = u64::from(byte & 0x7f);
        if part << shift >> shift != part {
            return Err(Broken::Number);
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Broken::Number)
}

fn take_mask(bytes: &mut impl Iterator<Item = u8>) -> Result<[u8; MASK], Broken> {
    let mut mask = [0; MASK];
    for byte in &mut mask {
        *byte = bytes.next().ok_or(Broken::Short)?;
    }
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nine_bits_of_a_value_are_kept() {
        for whole in 0..=512_u16 {
            assert_eq!(value(code(f32::from(whole))), f32::from(whole));
        }
        assert_eq!(
            (value(code(f32::MAX)), value(code(-3.5)), value(code(-0.0))),
            (value(CODE_MAX.cast_signed()), -3.5, 0.0)
        );
        assert!(value(code(f32::MAX)).is_finite());
    }

    proptest! {
        #[test]
        fn rounding_is_within_two_parts_in_a_thousand_and_done_once(exact in any::<f32>().prop_filter("a number", |it| it.is_normal())) {
            let once = value(code(exact));
            prop_assert!((once - exact).abs() <= exact.abs() / 256.0, "{exact} became {once}");
            prop_assert_eq!(value(code(once)), once);
        }

        #[test]
        fn integers_come_back(number in any::<u64>(), signed in any::<i64>()) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, number);
            prop_assert_eq!(take_varint(&mut bytes.into_iter()), Ok(number));
            prop_assert_eq!(unzigzag(zigzag(signed)), signed);
        }

        #[test]
        fn any_bytes_are_ticks_or_say_why(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            for tick in Decoder::new(State::default(), bytes.into_iter()).flatten() {
                prop_assert!(tick.values().all(|(_, value)| value.is_finite()));
            }
        }
    }
}
