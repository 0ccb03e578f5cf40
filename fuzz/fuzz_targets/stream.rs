#![no_main]

#[path = "../src/allocation.rs"]
mod allocation;
// The program has no part that another crate could use: its reader is taken as it stands.
#[path = "../../crates/warmswap/src/profile/stream.rs"]
mod stream;
#[path = "../src/stream.rs"]
mod streams;

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| streams::run(data));
