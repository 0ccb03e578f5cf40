//! What the loop computes; what it does is tested with real processes.

use super::*;

#[test]
fn delays_begin_after_some_early_deaths_and_double_up_to_a_bound() {
    let delays: Vec<u128> = (0..=12).map(|deaths| delay(deaths).as_millis()).collect();
    assert_eq!(delays, [0, 0, 0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    assert_eq!(delay(u32::MAX), DELAY_MAX);
}

#[test]
fn text_is_cut_where_it_ends_to_be_text() {
    assert_eq!(text(b"/usr/bin/\xffx"), "/usr/bin/");
    let mut line = Line::<8>::new();
    line.add(format_args!("{}", "0123456789"));
    line.add(format_args!("more"));
    assert_eq!(line.bytes(), b"01234567");
}
