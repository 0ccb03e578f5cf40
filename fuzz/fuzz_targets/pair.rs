#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warmswap_core::fuzz_pair(data));
