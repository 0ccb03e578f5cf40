#![no_main]

#[path = "../src/inflight.rs"]
mod inflight;

libfuzzer_sys::fuzz_target!(|data: &[u8]| inflight::run(data));
