#![no_main]

#[path = "../src/observer.rs"]
mod observer;

libfuzzer_sys::fuzz_target!(|data: &[u8]| observer::run(data));
