#![no_main]

#[path = "../src/allocation.rs"]
mod allocation;
#[path = "../src/snapshot.rs"]
mod snapshot;

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| snapshot::run(data));
