#![no_main]

#[path = "../src/telemetry.rs"]
mod telemetry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| telemetry::run(data));
