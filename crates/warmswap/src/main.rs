//! The warmswap program.
fn main() {}
