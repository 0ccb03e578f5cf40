#![no_main]

#[path = "../src/allocation.rs"]
mod allocation;
#[path = "../src/recording.rs"]
mod recording;

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| recording::run(data));
