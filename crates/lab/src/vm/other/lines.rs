//! The lines that go through a guarded console: numbered, each with a content of its own.

use std::fmt::Write as _;

use crate::vm::rng::Rng;

/// The line of that number, with its line end.
pub(crate) fn line(seed: u64, number: u64) -> String {
    let mut rng = Rng::new(seed, number.wrapping_mul(2) + 31);
    let mut line = format!("{number:08}");
    for _ in 0..rng.range(1, 12) {
        write!(line, " {:08x}", rng.next() >> 32).expect("writing to a string cannot fail");
    }
    line.push('\n');
    line
}
