#![no_main]

#[path = "../src/allocation.rs"]
mod allocation;
#[path = "../src/model.rs"]
mod model;

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| model::run(data));
